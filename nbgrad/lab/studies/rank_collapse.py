"""Does batch norm keep deep networks from mapping all inputs to one line?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad import nn
from nbgrad.autograd import as_tensor, no_grad
from nbgrad.lab.arms import column, curve, grouped
from nbgrad.lab.intervals import Interval, bootstrap, together
from nbgrad.lab.judging import corrected
from nbgrad.lab.networks import perceptron
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table, Verdict
from nbgrad.lab.watching import effective_rank
from nbgrad.ops import Generator

__all__ = ["STUDY"]

NETWORKS = {True: "linear", False: "ReLU"}
COLLAPSED = 1.5


def cells(scale: str) -> list[Cell]:
    sizes = {"tiny": (2, 12, 8), "quick": (10, 200, 32), "full": (20, 1000, 32)}
    seeds, depth, width = sizes[scale]
    return [{"seed": seed, "depth": depth, "width": width, "linear": linear, "norm": norm}
            for seed in range(seeds) for linear in NETWORKS for norm in ("none", "batch")]


def run(cell: Cell) -> Record:
    width, linear = cell["width"], cell["linear"]
    net = perceptron([width] * (cell["depth"] + 1), nn.BatchNorm1d if cell["norm"] == "batch" else
                     None, activation=None if linear else nn.ReLU, dtype=np.float64, last=True,
                     gain=1.0 if linear else math.sqrt(2), seed=cell["seed"])
    rng = Generator(1_000_003 * cell["seed"] + 999_999).numpy
    h = as_tensor(rng.standard_normal((2 * width, width)))
    at = sorted({round(d) for d in np.geomspace(1, cell["depth"], 16)})
    ranks, effective, layer = [], [], 0
    with no_grad():
        for module in net:
            h = module(h)
            if isinstance(module, nn.Linear):       # what the layer makes of what it gets
                layer += 1
                if layer in at:
                    ranks.append(_soft_rank(h.data))
                    effective.append(effective_rank(h))
    return {"layer": at, "rank": ranks, "effective": effective, "last": ranks[-1],
            "last_effective": effective[-1]}


def _soft_rank(h: Any) -> float:
    """(Σ σ²)² / Σ σ⁴, at most the rank (Daneshmand et al. 2020)."""
    gram = h.T @ h
    return float(np.trace(gram) ** 2 / np.sum(gram * gram))


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    width, depth = cells[0]["width"], cells[0]["depth"]
    bound = math.sqrt(width) / 2
    arms = grouped(records, cells, "linear", "norm")
    found: dict[tuple[bool, str], Interval] = {}
    rows = []
    for linear, name in NETWORKS.items():
        for norm, label in (("none", "plain"), ("batch", "batch norm")):
            found[linear, norm], other = (
                bootstrap(column(arms[linear, norm], key), level=together(len(NETWORKS)))
                for key in ("last", "last_effective"))
            rows.append([name, label, found[linear, norm].text(), other.text()])
    kept = [found[linear, "batch"].above(bound) and found[linear, "none"].below(COLLAPSED)
            for linear in NETWORKS]
    higher = [found[linear, "batch"].low > found[linear, "none"].high for linear in NETWORKS]
    verdict: Verdict = ("supported" if all(kept) else "depends" if any(higher) else "not supported")
    sentence = (f"Behind {depth} layers of {width} units the soft rank is "
                + " and ".join(f"{found[linear, 'batch'].text()} with batch norm against "
                               f"{found[linear, 'none'].text()} without ({name})"
                               for linear, name in NETWORKS.items())
                + f"; √{width}/2 = {bound:.2f}.")
    return Finding(verdict, sentence,
                   Table(["network", "norm", "soft rank", "effective rank"], rows),
                   [_figure(arms, linear) for linear in NETWORKS],
                   _notes(found, bound))


def _figure(arms: dict[Any, list[Record]], linear: bool) -> Figure:
    return Figure(f"Soft rank over depth, {NETWORKS[linear]}", "layer", "soft rank",
                  [curve(label, arms[linear, norm], "rank", "layer")
                   for norm, label in (("none", "plain"), ("batch", "batch norm"))],
                  log_x=True, log_y=True)


def _notes(found: dict[tuple[bool, str], Interval], bound: float) -> list[str]:
    return [f"Differs from the paper: with batch norm and {NETWORKS[linear]} layers the rank is "
            f"{found[linear, 'batch'].text()}, not above √d/2 = {bound:.2f}."
            for linear in NETWORKS if not found[linear, "batch"].above(bound)]


STUDY = Study(
    name="rank-collapse",
    question="Does batch norm keep deep networks from mapping all inputs to one line?",
    claim="Without batch norm the hidden representations of a deep network collapse to rank one at "
          "initialization; with it their rank stays of the order of √width.",
    source="Daneshmand et al. 2020",
    published="In networks of width d, the soft rank of a hidden batch "
              "goes to 1 with depth without batch norm, and stays at least of the order of √d with "
              "it; for linear layers proved, for ReLU and others observed.",
    setup="Networks of 200 layers of 32 units at initialization, normal weights (Glorot's scale "
          "for linear, He's for ReLU) and 64 normal inputs; soft rank (Σσ²)²/Σσ⁴ of each layer's "
          "output, 10 networks for each.",
    rule="Soft rank behind the last layer. Supported if, in the linear and in the ReLU network, "
         "its interval lies above √d/2 with batch norm and below 1.5 without; not supported if in "
         "neither it is higher with batch norm than without; depends otherwise. Intervals of "
         "97.5 %.",
    cells=cells, run=run, judge=judge, data=(), comparisons=len(NETWORKS),
    literature="Daneshmand, Joudaki & Bach 2021 show that with batch norm the hidden "
               "representations become orthogonal over depth.",
    changed=corrected(len(NETWORKS)))
