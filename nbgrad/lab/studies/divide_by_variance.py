"""Does it matter that one divides by the standard deviation, and not by the variance?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbgrad import nn, ops
from nbgrad.autograd import Tensor
from nbgrad.lab.arms import accuracies, bars, edges, grouped, lost, percent, points, tuned
from nbgrad.lab.intervals import bootstrap, paired
from nbgrad.lab.judging import BY_MEAN
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table
from nbgrad.lab.training import configured, train
from nbgrad.nn.running import RunningNorm

ALIKE = 0.01            # a difference in accuracy that is none
_SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"gains": (1.0,), "lrs": (0.1,), "seeds": 2, "steps": 10},
    "quick": {"gains": (0.1, 1.0, 10.0), "lrs": (0.001, 0.01, 0.1, 1.0, 10.0),
              "seeds": 5, "steps": 400},
    "full": {"gains": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "lrs": (0.001, 0.01, 0.1, 1.0, 10.0),
             "seeds": 10, "steps": 10_000},
}


class VarianceNorm(RunningNorm):
    """y = gamma (x − mean) / (var + eps) + beta, for x (N, C): batch norm without the root. Twice
    the input gives half the output."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, **settings: Any) -> None:
        super().__init__(num_features, **settings,
                         starts={"running_mean": 0.0, "running_var": 1.0})

    def _normalized(self, x: Tensor) -> Tensor:
        if not self._by_batch:
            return self._infer(x, self.running_mean, self.running_var.data + self.eps)
        centered, mean = ops.center(x)
        var = (centered * centered).mean(0)
        self._move(x, running_mean=mean.data, running_var=var.data)
        y: Tensor = centered / (var + self.eps) * self.weight + self.bias
        return y


def cells(scale: str) -> list[Cell]:
    s = _SCALES[scale]
    return [{"divisor": divisor, "gain": gain, "lr": lr, "seed": seed, "steps": s["steps"]}
            for seed in range(s["seeds"]) for gain in s["gains"] for lr in s["lrs"]
            for divisor in ("std", "variance")]


def run(cell: Cell) -> Record:
    config = configured(cell, model="mlp", activation="relu", init="kaiming", batch_size=60)

    def prepare(model: nn.Module) -> nn.Module:
        if cell["divisor"] == "std":
            return model
        return nn.convert_norm(model, lambda norm: VarianceNorm(norm.num_features))

    found = train(config, steps=cell["steps"], every=cell["steps"] // 2, prepare=prepare)
    return {name: found[name] for name in ("final_accuracy", "diverged")}


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    best = tuned(grouped(records, cells, "divisor", "gain", "lr"))
    gains = sorted({gain for _, gain in best})
    more = {g: paired(accuracies(best["std", g][1]), accuracies(best["variance", g][1]))
            for g in gains}
    alike = [more[g].above(-ALIKE) and more[g].below(ALIKE) for g in gains]
    apart = [more[g].above(ALIKE) or more[g].below(-ALIKE) for g in gains]
    verdict: Any = ("supported" if all(alike) else
                    "not supported" if all(apart) else "depends")
    sentence = ("Dividing by the standard deviation instead of the variance ends "
                + "; ".join(f"{points(more[g])} more accurate at {g:g} times the usual weights"
                            for g in gains) + ", each at its best learning rate.")
    rows = [[f"{g:g}", *(f"{percent(accuracies(best[d, g][1]))} at {best[d, g][0]:g}"
                         for d in ("std", "variance")), points(more[g]),
             ", ".join(lost(best[d, g][1]) for d in ("std", "variance"))] for g in gains]
    figure = Figure("Final test accuracy, each at its best learning rate",
                    "times the usual initial weights", "test accuracy", [
        bars(f"divided by the {name}", gains, [bootstrap(accuracies(best[d, g][1])) for g in gains])
        for d, name in (("std", "standard deviation"), ("variance", "variance"))], log_x=True)
    return Finding(verdict, sentence, Table(
        ["times the usual weights", "by std (at learning rate)", "by variance", "std − variance",
         "diverged"], rows), [figure], [*edges(best, (c["lr"] for c in cells)), SCALES])


SCALES = ("Of inputs with a standard deviation of 0.1 and of 10, batch norm makes 1 and 1, "
          "division by the variance 10 and 0.1: it turns scales around instead of taking them out.")

STUDY = Study(
    name="divide-by-variance",
    question="May one divide by the variance instead of the standard deviation?",
    claim="Dividing by the variance instead of the standard deviation makes no difference.",
    source="a tutorial's formula, x̂ = (x − μ) / (σ² + ε)",
    published="Nothing: a slip, which still trains. Ioffe & Szegedy 2015, algorithm 1, divide by "
              "√(σ² + ε).",
    setup="An MLP of 3 × 100 ReLUs on 8 × 8 digits with the one and with the other, He's initial "
          "weights times 0.1, 1 and 10, plain SGD at each arm's best of five learning rates, "
          "batches of 60, 5 paired seeds of 400 steps.",
    rule="Per scale of the weights, test accuracy by the standard deviation minus by the variance: "
         "median over paired seeds with its 95 % interval. Supported (no matter): within 1 point "
         "of 0 at every scale. Not supported: beyond 1 point on either side at every scale. "
         "Depends: otherwise.",
    cells=cells, run=run, judge=judge,
    literature="Only the first is invariant to the scale of its input, on which the claims about "
               "initialisation and learning rates rest.",
    changed="After a first run, the claim, which had read \"Batch normalization divides by the "
            "variance\", got the words that the rule tests. After another, the grid got the "
            "learning rates 0.001 and 10, because arms were best at both of its ends. " + BY_MEAN +
            " The rule, which had looked at one side only, got the other one later; the verdict is "
            "the same.",
)
