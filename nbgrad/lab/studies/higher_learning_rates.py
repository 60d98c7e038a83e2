"""Does batch norm allow higher learning rates, and what are they good for?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nbgrad.lab.arms import bars, column, edges, goal, grouped, lost, percent, points, tuned
from nbgrad.lab.intervals import bootstrap, paired, paired_ratio, together
from nbgrad.lab.judging import BY_MEAN, NOBODY_ARRIVED, corrected, differs
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table
from nbgrad.lab.training import configured, train

NETWORKS: dict[str, dict[str, Any]] = {
    "sigmoid MLP": {"model": "mlp", "activation": "sigmoid", "init": "normal", "batch_size": 60},
    "ReLU CNN": {"model": "cnn", "depth": 6, "width": 8, "activation": "relu", "init": "kaiming",
                 "momentum": 0.9, "batch_size": 64},
}
_GRIDS: dict[str, tuple[float, ...]] = {
    "sigmoid MLP": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    "ReLU CNN": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
_SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"grid": slice(3, 5), "seeds": 2, "steps": {"sigmoid MLP": 20, "ReLU CNN": 10}},
    "quick": {"grid": slice(None), "seeds": 5, "steps": {"sigmoid MLP": 1000, "ReLU CNN": 250}},
    "full": {"grid": slice(None), "seeds": 10, "steps": {"sigmoid MLP": 20_000, "ReLU CNN": 5000}},
}


def cells(scale: str) -> list[Cell]:
    s = _SCALES[scale]
    return [{"network": network, "norm": norm, "lr": lr, "seed": seed,
             "steps": s["steps"][network]}
            for seed in range(s["seeds"]) for network in NETWORKS
            for lr in _GRIDS[network][s["grid"]] for norm in ("none", "batch")]


def run(cell: Cell) -> Record:
    config = configured(cell, **NETWORKS[cell["network"]])
    found = train(config, steps=cell["steps"], every=cell["steps"] // 2)
    return {name: found[name] for name in ("final_accuracy", "diverged")}


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    arms = grouped(records, cells, "network", "norm", "lr")
    level = goal(cells[0], "usable")
    found = {network: _Network(network, arms, level)
             for network in dict.fromkeys(k[0] for k in arms)}
    higher = [n for n in found.values() if n.ratio.above(1)]
    verdict: Any = ("supported" if len(higher) == len(found) else
                    "depends" if higher or not all(n.learns for n in found.values()) else
                    "not supported")
    sentence = "; ".join(n.sentence() for n in found.values()) + "."
    rows = [n.row(lr) for n in found.values() for lr in n.lrs]
    notes = differs(verdict, "supported", "there, a network learns at 30 times the learning rate")
    notes += [note for n in found.values() for note in n.notes()]
    return Finding(verdict, sentence, Table(
        ["network", "learning rate", "accuracy without", "with batch norm", "diverged"], rows),
        [n.figure() for n in found.values()], notes)


class _Network:
    """One network's runs: the largest usable learning rate of each seed, and the best accuracy."""

    def __init__(self, name: str, arms: dict[Any, list[Record]], level: float) -> None:
        self.name, self.level = name, level
        self.lrs = sorted({lr for network, _, lr in arms if network == name})
        self.runs = {norm: {lr: column(arms[name, norm, lr], "final_accuracy") for lr in self.lrs}
                     for norm in ("none", "batch")}
        self.learns = any(a >= level for runs in self.runs.values() for own in runs.values()
                          for a in own)
        self.lost = {lr: f"{lost(arms[name, 'none', lr])}, {lost(arms[name, 'batch', lr])}"
                     for lr in self.lrs}
        self.largest = {norm: self._largest(runs) for norm, runs in self.runs.items()}
        self.ratio = paired_ratio(self.largest["batch"], self.largest["none"],
                                  level=together(len(NETWORKS)))
        own = {(norm, lr): arms[name, norm, lr] for norm in self.runs for lr in self.lrs}
        self.best = best = {norm: float(lr) for norm, (lr, _) in tuned(own).items()}
        self.gain = paired(self.runs["batch"][best["batch"]], self.runs["none"][best["none"]])
        self.low = paired(self.runs["batch"][self.lrs[0]], self.runs["none"][self.lrs[0]])

    def _largest(self, runs: dict[float, list[float]]) -> list[float]:
        """Per seed; where none is usable, a step below the grid."""
        step = self.lrs[1] / self.lrs[0] if len(self.lrs) > 1 else 10.0
        seeds = range(len(next(iter(runs.values()))))
        return [max([lr for lr in self.lrs if runs[lr][i] >= self.level] or [self.lrs[0] / step])
                for i in seeds]

    def sentence(self) -> str:
        if not self.learns:
            return f"{self.name}: no run ends with {100 * self.level:g} % test accuracy"
        plain, batch = (bootstrap(self.largest[norm]) for norm in ("none", "batch"))
        return (f"{self.name}: the largest usable learning rate is {self.ratio.text('.2g')} times "
                f"as high with batch norm ({batch.estimate:g} against {plain.estimate:g})")

    def notes(self) -> list[str]:
        found = [(f"{self.name}: at the best learning rate of each ({self.best['none']:g} and "
                 f"{self.best['batch']:g}), batch norm ends {points(self.gain)} higher; at the "
                 f"smallest, {self.lrs[0]:g}, {points(self.low)}.")]
        found += edges({f"{self.name}, {name}": (self.best[norm], []) for norm, name in
                        (("none", "without"), ("batch", "batch norm"))}, self.lrs)
        if math.isclose(max(self.largest["batch"]), self.lrs[-1]):
            found.append(f"{self.name}: batch norm still learns at the end of the grid: the ratio "
                         "is a lower bound.")
        return found

    def row(self, lr: float) -> list[Any]:
        return [self.name, f"{lr:g}", percent(self.runs["none"][lr]),
                percent(self.runs["batch"][lr]), self.lost[lr]]

    def figure(self) -> Figure:
        return Figure(f"{self.name}: final test accuracy", "learning rate", "test accuracy", [
            bars(label, self.lrs, [bootstrap(self.runs[norm][lr]) for lr in self.lrs])
            for norm, label in (("none", "without"), ("batch", "batch norm"))], log_x=True)


STUDY = Study(
    name="higher-learning-rates",
    question="Does batch norm allow higher learning rates?",
    claim="Batch normalization permits much higher learning rates.",
    source="Ioffe & Szegedy 2015, section 3.3 and section 4.2.2 (Inception at 5 and 30 times "
           "the learning rate)",
    published="Inception learns at 30 times the learning rate and ends 2.6 points higher (it also "
              "has no dropout and no local response normalization, less L2 and a faster decay: "
              "section 4.2.1); in "
              "Bjorck et al. 2018 (ResNet-110, CIFAR-10) networks with and without end alike at "
              "0.0001, and those without diverge at rates where those with do best.",
    setup="Two networks on 8 × 8 digits, with and without batch norm, at eight learning rates half "
          "a decade apart, 5 paired seeds: three hidden layers of 100 sigmoids (plain SGD, 1,000 "
          "steps), and a CNN of six convolutions with ReLU (momentum 0.9, 250 steps). A learning "
          "rate is usable where the run ends with 90 % test accuracy (MNIST 85, Fashion-MNIST 70, "
          "CIFAR-10 25 %).",
    rule="Per network, ratio of the largest usable learning rate with to without batch norm, "
         "median over paired seeds with its interval (97.5 % for each). Supported: "
         "above 1 in both networks. Depends: in one, or where a network is usable at no rate at "
         "all. Not supported: in none.",
    cells=cells, run=run, judge=judge, comparisons=len(NETWORKS),
    literature="Bjorck et al. 2018 ascribe the limit without batch norm to activations that grow "
               "with depth; with it, the higher rate, not the norm itself, gives the better "
               "result. Scale invariance makes the effective rate η/‖w‖² fall by itself (see "
               "scale-invariance).",
    changed=f"{NOBODY_ARRIVED} {corrected(len(NETWORKS))} Of what only a note says: {BY_MEAN}",
)
