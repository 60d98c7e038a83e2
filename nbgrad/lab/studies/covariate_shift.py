"""Does batch norm reduce internal covariate shift?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.lab.arms import curve, grouped
from nbgrad.lab.intervals import Interval
from nbgrad.lab.judging import ratio, shorter, text
from nbgrad.lab.networks import Problem, along, problem
from nbgrad.lab.shift import covariate_shift
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table, Verdict

__all__ = ["STUDY"]

NETWORKS = {"digits": "MLP", "linear": "25-layer linear network"}


def cells(scale: str) -> list[Cell]:
    sizes = {"tiny": (2, 4, 2), "quick": (8, 500, 25), "full": (5, 15000, 500)}
    seeds, steps, every = sizes[scale]
    linear = {"tiny": {"samples": 20, "depth": 4, "lr": 5e-5},
              "quick": {"samples": 200, "lr": 5e-6},
              "full": {"samples": 1000, "lr": 1e-6, "steps": 10000}}[scale]
    return [{"network": network, "norm": norm, "seed": seed, "steps": steps, "every": every, **own}
            for seed in range(seeds) for network, own in (("digits", {"lr": 0.1}),
                                                          ("linear", linear))
            for norm in ("none", "batch")]


def run(cell: Cell) -> Record:
    layers: list[list[float]] = []

    def measure(p: Problem, batch: Any) -> Record:
        found = covariate_shift(p.model, batch, p.optimizer, p.loss)[1:]
        layers.append([s.relative for s in found])
        return {"difference": float(np.median([s.difference for s in found])),
                "relative": float(np.median([s.relative for s in found])),
                "cosine": float(np.median([s.cosine for s in found]))}
    rows = along(problem(cell), cell, measure)
    record = {name: [row[name] for row in rows]
              for name in ("step", "loss", "difference", "relative", "cosine")}
    typical = {f"typical_{name}": float(np.median(record[name])) if rows else None
               for name in ("difference", "relative", "cosine")}
    by_layer = np.median(layers[:len(rows)], axis=0).tolist() if rows else []
    return {**record, **typical, "by_layer": by_layer, "layer": list(range(2, len(by_layer) + 2))}


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    arms = grouped(records, cells, "network", "norm")
    ratios: dict[str, Interval | None] = {}
    rows: list[list[str]] = []
    for network, name in NETWORKS.items():
        for key, what in (("relative", "‖G − G'‖ / ‖G‖"), ("difference", "‖G − G'‖"),
                          ("cosine", "cosine of G and G'")):
            a, b = ([r[f"typical_{key}"] for r in arms[network, norm]]
                    for norm in ("batch", "none"))
            over = None if key == "cosine" else ratio(a, b)
            if key == "relative":
                ratios[network] = over
            rows.append([name, what, text(b), text(a), "–" if key == "cosine" else text(over)])
    lower = [r is not None and r.below(1.0) for r in ratios.values()]
    verdict: Verdict = ("supported" if all(lower) else "depends" if any(lower) else
                        "not supported")
    parts = [f"{text(ratios[network])} times that of the plain {name}"
             for network, name in NETWORKS.items()]
    return Finding(
        verdict, "With batch norm the shift ‖G − G'‖/‖G‖ is " + " and ".join(parts) + ".",
        Table(["network", "measure", "plain", "batch norm", "batch norm / plain"], rows),
        [_figure(arms, network, x) for x in ("step", "layer") for network in NETWORKS],
        [*_notes(ratios), *shorter(cells)])


def _figure(arms: dict[Any, list[Record]], network: str, x: str) -> Figure:
    """Over steps or over layers; the median is over the other."""
    y, other = {"step": ("relative", "layers"), "layer": ("by_layer", "steps")}[x]
    return Figure(f"{NETWORKS[network]}: change of the gradient when the layers below move", x,
                  f"‖G − G'‖ / ‖G‖, median over {other}",
                  [curve(label, arms[network, norm], y, x)
                   for norm, label in (("none", "plain"), ("batch", "batch norm"))])


def _notes(ratios: dict[str, Interval | None]) -> list[str]:
    notes = [("The measure is relative to ‖G‖, because the norms of gradients differ between the "
              "networks; the paper plots ‖G − G'‖ itself, which the table has, too.")]
    for network, r in ratios.items():
        if r is not None and r.below(1.0):
            notes.append(f"Differs from the paper: in the {NETWORKS[network]} we measure less "
                         "shift with batch norm at the same learning rate.")
    return notes


STUDY = Study(
    name="covariate-shift",
    question="Does batch norm reduce internal covariate shift?",
    claim="Batch norm reduces internal covariate shift.",
    source="Ioffe & Szegedy 2015, title and section 2; repeated by most articles since",
    published="Santurkar et al. 2018, figure 3: the change of a layer's gradient when the layers "
              "below are updated is as large with batch norm as without, or larger, in VGG on "
              "CIFAR-10 and in a 25-layer linear network.",
    setup="An MLP of 5 × 100 ReLUs on digits (SGD, lr 0.1, batches of 64), and the paper's "
          "25-layer linear network with full-batch gradient descent, each with and without batch "
          "norm, same initial weights, batches and learning rate. Before every 25th step: the "
          "gradient G of each layer's weight, and G' after the layers below have taken the step.",
    rule="Ratio of batch norm to plain of the median over steps and layers of ‖G − G'‖/‖G‖. "
         "Supported if its interval lies below 1 in both networks, not supported if in neither, "
         "depends if in one.",
    cells=cells, run=run, judge=judge, options=("mnist",),
    literature="Santurkar et al. 2018 find no link between this shift and the success of training; "
               "Awais, Bin Iqbal & Bae 2020 argue that other definitions of the shift do show one.")
