"""Does batch norm make the loss smoother along the gradient?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.lab.arms import curve, grouped
from nbgrad.lab.curvature import landscape
from nbgrad.lab.judging import Pairs, corrected, differs, few, ratio, shorter, text
from nbgrad.lab.networks import Problem, along, last_step, problem
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table, Verdict

__all__ = ["STUDY"]

NETWORKS = {"digits": "MLP", "linear": "25-layer linear network"}
MEASURES = {"range": "range of the loss", "smoothness": "effective β",
            "change": "largest change of the gradient"}
JUDGED = ("range", "smoothness")
COMPARISONS = len(NETWORKS) * len(JUDGED)
# of the learning rate: section 3.1 and appendix A of the paper
MULTIPLES = {"digits": np.linspace(0.5, 4, 8), "linear": np.geomspace(0.01, 30, 8)}


def cells(scale: str) -> list[Cell]:
    sizes = {"tiny": (2, 4, 2), "quick": (8, 500, 10), "full": (8, 15000, 100)}
    seeds, steps, every = sizes[scale]
    linear = {"tiny": {"samples": 20, "depth": 4, "lr": 5e-5},
              "quick": {"samples": 200, "lr": 5e-6},
              "full": {"samples": 1000, "lr": 1e-6, "steps": 10000}}[scale]
    return [{"network": network, "norm": norm, "seed": seed, "steps": steps, "every": every, **own}
            for seed in range(seeds) for network, own in (("digits", {"lr": 0.1}),
                                                          ("linear", linear))
            for norm in ("none", "batch")]


def run(cell: Cell) -> Record:
    etas = cell["lr"] * MULTIPLES[cell["network"]]

    def measure(p: Problem, batch: Any) -> Record:
        around = landscape(p.model, batch, etas, p.loss)
        low, high = around.loss_range
        return {"low": low, "high": high, "range": high - low, "smoothness": around.smoothness,
                "change": around.predictiveness[1]}
    rows = along(problem(cell), cell, measure)
    record = {name: [row[name] for row in rows] for name in ("step", "loss", "low", "high",
                                                              *MEASURES)}
    first = max(1, len(rows) // 5)
    early = {f"early_{name}": _median(record[name][:first]) for name in MEASURES}
    return {**record, **early, **{f"all_{name}": _median(record[name]) for name in MEASURES},
            "planned": last_step(cell)}


def _median(numbers: Sequence[float]) -> float | None:
    """None (infinitely rough) where the loss is not finite on the way of half of the steps."""
    if not len(numbers):
        return None
    found = float(np.median([v if np.isfinite(v) else np.inf for v in numbers]))
    return found if np.isfinite(found) else None


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    arms = grouped(records, cells, "network", "norm")
    ratios, throughout = (
        {(network, key): _ratio(arms, network, f"{when}_{key}")
         for network in NETWORKS for key in MEASURES} for when in ("early", "all"))
    rows: list[list[str]] = []
    for network, name in NETWORKS.items():
        for key, what in MEASURES.items():
            for when in ("early", "all"):
                plain, normed = ([r[f"{when}_{key}"] for r in arms[network, norm]]
                                 for norm in ("none", "batch"))
                over = (ratios if when == "early" else throughout)[network, key]
                rows.append([name, what, {"early": "first fifth", "all": "all steps"}[when],
                             text(plain), text(normed), text(over)])
    judged = [ratios[network, key] for network in NETWORKS for key in JUDGED]
    smoother = [r is not None and r.above(1.0) for r in judged]
    verdict: Verdict = ("supported" if all(smoother) else
                        "depends" if any(smoother) or any(map(few, judged)) else "not supported")
    parts = [f"the {MEASURES[key]} is " + " and ".join(
        f"{text(ratios[network, key])} (over all steps {text(throughout[network, key])}; {name})"
        for network, name in NETWORKS.items()) for key in JUDGED]
    return Finding(
        verdict, f"Clearly smoother with batch norm in {sum(smoother)} of {len(smoother)} "
        "comparisons: along the gradient, without batch norm, in the first fifth of training, "
        + ", ".join(parts) + " times that with it.",
        Table(["network", "measure", "steps", "plain", "batch norm", "plain / batch norm"], rows),
        [_figure(arms, network, key) for network in NETWORKS for key in JUDGED],
        [*differs(verdict, "supported", "there, both are smaller with batch norm"),
         *_notes(ratios), *shorter(cells)])


def _ratio(arms: dict[Any, list[Record]], network: str, name: str) -> Pairs | None:
    """Plain to batch norm; what is not finite on the way is infinitely rough."""
    plain, normed = ([r[name] for r in arms[network, norm]] for norm in ("none", "batch"))
    return ratio(plain, normed, missing=np.inf, comparisons=COMPARISONS)


def _figure(arms: dict[Any, list[Record]], network: str, key: str) -> Figure:
    return Figure(f"{NETWORKS[network]}: {MEASURES[key]} along the gradient", "step", MEASURES[key],
                  [curve(label, arms[network, norm], key, "step")
                   for norm, label in (("none", "plain"), ("batch", "batch norm"))], log_y=True)


def _notes(ratios: dict[tuple[str, str], Pairs | None]) -> list[str]:
    notes = [("β is the largest ‖g − g'‖/‖w − w'‖ over the steps tried; a gradient step of "
              "the same learning rate moves the two networks by different distances.")]
    for (network, key), r in ratios.items():
        if key in JUDGED and r is not None and r.below(10.0):
            notes.append(f"Differs from the paper: {NETWORKS[network]}, {MEASURES[key]}: figure 4 "
                         "shows one to two orders of magnitude early in training; ours is "
                         f"{text(r)} times.")
    return notes


STUDY = Study(
    name="landscape-smoothness",
    question="Does batch norm make the loss smoother?",
    claim="Batch norm makes the loss landscape smoother early in training: loss and gradients "
          "change less along a gradient step.",
    source="Santurkar et al. 2018, section 3",
    published="Figure 4 (VGG, CIFAR-10) and appendix (25-layer linear network): variation of the "
              "loss, change of the gradient and effective β along the gradient are smaller with "
              "batch norm, early in training by orders of magnitude.",
    setup="An MLP of 5 × 100 ReLUs on digits (SGD, lr 0.1, batches of 64), and the paper's "
          "25-layer linear network, with and without batch norm, same initial weights, batches and "
          "learning rate. Every few steps: loss and gradient at 8 points along the gradient, 1/2 "
          "to 4 (linear network: 1/100 to 30) times the learning rate away. Learning rates are not "
          "tuned: the claim is not about how well a network ends.",
    rule="Ratio of plain to batch norm of the range of the loss and of the effective β, each the "
         "median over the first fifth of training (98.8 % intervals). Supported "
         "if all four intervals (two networks) "
         "lie above 1, not supported if none does, depends otherwise, and where fewer than six "
         "pairs of seeds have a value.",
    cells=cells, run=run, judge=judge, comparisons=COMPARISONS,
    literature="Bjorck et al. 2018 make the same point with pictures of the loss along the "
               "gradient. Yao et al. 2020 (PyHessian) find that a residual network without batch "
               "norm is not always less smooth: it depends on the depth.",
    changed="Steps (from 200 to 500) and seeds (from 5 to 8) were raised after a first run; "
            "\"early in training\" was added to the claim, because it is what the rule tests. "
            + corrected(COMPARISONS))
