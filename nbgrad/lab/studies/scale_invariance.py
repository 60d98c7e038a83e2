"""Does the scale of weights before batch norm matter, or the learning rate relative to it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad import nn, optim
from nbgrad.autograd import Tensor
from nbgrad.lab.arms import curve
from nbgrad.lab.judging import differs, text
from nbgrad.lab.measuring import gradients
from nbgrad.lab.networks import Problem, classifier
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table, Verdict
from nbgrad.lab.watching import watch

__all__ = ["STUDY"]

EXACT = 1e-6
ALPHA = 10.0                            # times the weights before a norm
# weights before a norm and their learning rate are multiplied by these
ARMS = {"base": (1.0, 1.0), "same lr": (ALPHA, 1.0), "lr × α²": (ALPHA, ALPHA ** 2)}
TINY_EPS = 1e-12


def cells(scale: str) -> list[Cell]:
    seeds, steps = {"tiny": (2, 5), "quick": (5, 200), "full": (10, 2000)}[scale]
    return [{"seed": seed, "steps": steps, "lr": 0.1, "depth": 3, "decay": 0.01}
            for seed in range(seeds)]


def run(cell: Cell) -> Record:
    record: Record = {"identities": _identities(cell)}
    curves = {arm: _train(cell, *factors) for arm, factors in ARMS.items()}
    base = np.array(curves["base"])
    record["deviation"] = {arm: float(np.mean(np.abs(np.array(c) - base)) / base.mean())
                           for arm, c in curves.items()}
    record["step"] = list(range(0, cell["steps"], max(1, cell["steps"] // 50)))
    record |= {arm: [c[i] for i in record["step"]] for arm, c in curves.items()}
    usual, small = (np.array(_train(cell, alpha, alpha ** 2, eps=1e-5, double=False))
                    for alpha in (1.0, 1 / ALPHA))
    record["usual"] = float(np.mean(np.abs(usual - small)) / usual.mean())
    for name, decay in (("no decay", 0.0), ("decay", cell["decay"])):
        record["rate_step"], record[name] = _effective(cell, decay)
    return record


def _problem(cell: Cell, eps: float = TINY_EPS, double: bool = True) -> tuple[Problem, Any]:
    """A classifier, in float64 if ``double``, and its weights before norms."""
    p = classifier(lambda C: nn.BatchNorm1d(C, eps=eps), cell)
    if double:
        p.model.double()
    linears = [m for m in p.model.modules() if isinstance(m, nn.Linear)]
    return p, [m.weight for m in linears[:-1]]


def _batch(p: Problem, double: bool = True) -> Any:
    x, target = next(p.batches)
    return (x.double() if double else x), target


def _identities(cell: Cell) -> dict[str, float]:
    """Largest relative error of each, over layers and α."""
    p, weights = _problem(cell)
    batch = _batch(p)
    loss, before = gradients(p.model, batch, p.loss, weights)
    errors = {"L(αw) = L(w)": 0.0, "⟨w, ∇L⟩ = 0": 0.0, "∇L(αw) = ∇L(w)/α": 0.0}

    def note(name: str, error: Any) -> None:
        errors[name] = max(errors[name], float(error))
    for w, g in zip(weights, before):
        note("⟨w, ∇L⟩ = 0", abs(np.vdot(w.data, g)) / np.linalg.norm(w.data) / np.linalg.norm(g))
    for alpha in (0.1, 2.0, 10.0):
        for i, w in enumerate(weights):
            w.data *= alpha
            value, after = gradients(p.model, batch, p.loss, weights)
            w.data /= alpha
            note("L(αw) = L(w)", abs(value - loss) / loss)
            note("∇L(αw) = ∇L(w)/α", np.linalg.norm(alpha * after[i] - before[i])
                 / np.linalg.norm(before[i]))
    return errors


def _train(cell: Cell, alpha: float, rate: float, eps: float = TINY_EPS,
           double: bool = True) -> list[float]:
    """Losses while training with weights before norms × alpha and their learning rate × rate."""
    p, weights = _problem(cell, eps, double)
    for w in weights:
        w.data *= alpha
    scaled = {id(w) for w in weights}
    others: list[Tensor] = [q for q in p.model.parameters() if id(q) not in scaled]
    optimizer = optim.SGD([{"params": weights, "lr": cell["lr"] * rate}, {"params": others}],
                          lr=cell["lr"])
    same = Problem(p.model, optimizer, p.batches, p.loss)
    return [same.step(_batch(p, double)) for _ in range(cell["steps"])]


def _effective(cell: Cell, decay: float) -> tuple[list[int], list[float]]:
    """η/‖w‖² of the first layer: steps and values."""
    p, weights = _problem(cell, 1e-5, False)
    scaled = {id(w) for w in weights}
    others = [q for q in p.model.parameters() if id(q) not in scaled]
    optimizer = optim.SGD([{"params": weights, "weight_decay": decay}, {"params": others}],
                          lr=cell["lr"])
    same = Problem(p.model, optimizer, p.batches, p.loss)
    with watch(p.model, optimizer, layers="1", every=max(1, cell["steps"] // 20)) as seen:
        for _ in range(cell["steps"]):
            same.step(_batch(p, False))
    return seen.series("1", "effective_lr")


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    worst = [max(_number(v) for v in r["identities"].values()) for r in records]
    same, compensated = ([_number(r["deviation"][arm]) for r in records]
                         for arm in ("same lr", "lr × α²"))
    holds = [w <= EXACT and c < 0.01 and s > 10 * c for w, c, s in zip(worst, compensated, same)]
    fails = [w > EXACT or c >= s for w, c, s in zip(worst, compensated, same)]
    verdict: Verdict = "supported" if all(holds) else "not supported" if all(fails) else "depends"
    ratios = {name: text([r[name][-1] / r[name][0] for r in records])
              for name in ("no decay", "decay")}
    sentence = (f"The identities hold to {max(worst):.1e}. Weights × {ALPHA:g} change the loss "
                f"curve by {text([100 * s for s in same])} % at the same learning rate and by "
                f"{max(compensated):.1e} at most with the learning rate × {ALPHA ** 2:g}.")
    errors = {name: max(_number(r["identities"][name]) for r in records)
              for name in records[0]["identities"]}
    rows = [[f"error of {name}, largest", f"{error:.1e}"] for name, error in errors.items()]
    rows += [[f"deviation of the loss curve, weights × {ALPHA:g}, same learning rate", text(same)],
             [f"the same, learning rate × {ALPHA ** 2:g}", text(compensated)],
             [f"weights / {ALPHA:g}, learning rate / {ALPHA ** 2:g}, in float32 with ε = 1e-5",
              text([r["usual"] for r in records])],
             ["η/‖w‖² of the first layer, end over start, no weight decay", ratios["no decay"]],
             [f"the same, weight decay {cells[0]['decay']:g}", ratios["decay"]]]
    return Finding(verdict, sentence, Table(["quantity", "value"], rows),
                   [_curves(records), _rates(records, cells)],
                   [*differs(verdict, "supported", "there, all of it is exact"), *NOTES])


def _number(value: float | None) -> float:
    """A run that diverged deviates without bound."""
    return np.inf if value is None else value


def _curves(records: Sequence[Record]) -> Figure:
    labels = {"base": "w, η", "same lr": f"{ALPHA:g} w, η",
              "lr × α²": f"{ALPHA:g} w, {ALPHA ** 2:g} η"}
    return Figure("Training loss", "step", "loss",
                  [curve(label, records, arm, "step") for arm, label in labels.items()], log_y=True)


def _rates(records: Sequence[Record], cells: Sequence[Cell]) -> Figure:
    labels = {"no decay": "no weight decay", "decay": f"weight decay {cells[0]['decay']:g}"}
    return Figure("Effective learning rate of the first layer", "step", "η/‖w‖²",
                  [curve(label, records, name, "rate_step") for name, label in labels.items()])


NOTES = (("Without weight decay ‖w‖ can only grow, because the gradient is orthogonal to w: the "
          "effective learning rate falls by itself, and weight decay keeps it up."),
         ("The identities are exact for ε → 0; with ε = 1e-5 and weights that are small, they are "
          "not."))

STUDY = Study(
    name="scale-invariance",
    question="Does the scale of weights before batch norm matter?",
    claim="Behind batch norm the scale of the weights does not matter; what acts as learning rate "
          "is η/‖w‖².",
    source="Ioffe & Szegedy 2015, section 3.3; van Laarhoven 2017; Hoffer et al. 2018",
    published="L(αw) = L(w), ∇L(αw) = ∇L(w)/α and ⟨w, ∇L⟩ = 0 (exact); training depends on w and η "
              "through the direction of w and η/‖w‖² alone, and weight decay acts by keeping that "
              "up.",
    setup="An MLP of 3 × 100 ReLUs with batch norm on digits, float64, ε = 1e-12: the identities "
          "at initialization for α = 0.1, 2 and 10; training for 200 steps as it is, with weights "
          "before norms × 10, and with these and their learning rate × 100; and, in float32, with "
          "and without weight decay.",
    rule="Supported if in every seed the identities hold to 1e-6, the loss curve with 10 w and "
         "100 η is within 1 % of the original (mean absolute difference over mean), and the one "
         "with 10 w and η is more than ten times as far away; not supported if in every seed an "
         "identity fails or 100 η is no nearer than η; depends otherwise.",
    cells=cells, run=run, judge=judge,
    literature="Arora, Li & Lyu 2019 prove that this tunes the learning rate by itself; Li & Arora "
               "2020 that weight decay amounts to a learning rate that grows exponentially.")
