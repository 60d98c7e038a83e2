"""Does batch norm keep gradients from vanishing and exploding over depth?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad import nn
from nbgrad.autograd import as_tensor, grad
from nbgrad.lab.arms import column, curve, grouped
from nbgrad.lab.intervals import Interval, bootstrap, together
from nbgrad.lab.judging import corrected
from nbgrad.lab.networks import perceptron
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table, Verdict
from nbgrad.ops import Generator

__all__ = ["STUDY"]

THEORY = math.pi / (math.pi - 1)        # 1.467, Yang et al. 2019
SCALES = (0.5, 1.0, 2.0)                # times He's initial weights
WITHIN = 0.05


def cells(scale: str) -> list[Cell]:
    seeds, depth, width, size = {"tiny": (2, 6, 16, 64), "quick": (10, 20, 512, 256),
                                 "full": (50, 20, 1000, 512)}[scale]
    arms: list[dict[str, Any]] = [{"norm": norm, "scale": s, "batch": size}
                                  for s in SCALES for norm in ("none", "batch")]
    arms += [{"norm": "batch", "scale": 1.0, "batch": B} for B in (8, 16, 32)]
    arms += [{"norm": "batch", "scale": 1.0, "batch": B, "linear": True} for B in (8, 16)]
    return [{"seed": seed, "depth": depth, "width": width, **arm}
            for seed in range(seeds) for arm in arms]


def run(cell: Cell) -> Record:
    """‖∂L/∂h‖² at every layer's output h, for a random cotangent at the top."""
    width, linear = cell["width"], cell.get("linear", False)
    net = perceptron([width] * (cell["depth"] + 1), nn.BatchNorm1d if cell["norm"] == "batch" else
                     None, activation=None if linear else nn.ReLU,
                     gain=cell["scale"] * math.sqrt(2), seed=cell["seed"], last=True)
    rng = Generator(1_000_003 * cell["seed"] + 999_999).numpy
    h = as_tensor(rng.standard_normal((cell["batch"], width)).astype(np.float32))
    outputs = []
    for layer in net:
        h = layer(h)
        if isinstance(layer, nn.Linear):
            outputs.append(h)
    top = as_tensor(rng.standard_normal(h.shape).astype(np.float32))
    found = grad(h, outputs, top)
    squares = [float(np.sum(np.square(g.data, dtype=np.float64))) for g in found if g is not None]
    logs = np.log(squares)
    # the two layers at the top, where the cotangent is not yet like those below
    slope = np.polyfit(np.arange(len(logs) - 2), logs[:-2], 1)[0]
    return {"layer": list(range(1, len(logs) + 1)), "factor": float(np.exp(-slope)),
            "log10": ((logs - logs[-1]) / math.log(10)).tolist()}


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    size = max(cell["batch"] for cell in cells)
    arms = grouped(records, cells, "linear", "norm", "scale", "batch")
    level = together(len(SCALES))
    factors = {arm: bootstrap(column(runs, "factor"), level=level) for arm, runs in arms.items()}
    found = {(scale, norm): factors[None, norm, scale, size]
             for scale in SCALES for norm in ("none", "batch")}
    steady = [abs(found[s, "batch"].low - 1) <= WITHIN and abs(found[s, "batch"].high - 1) <= WITHIN
              for s in SCALES]
    nearer = [_away(found[s, "batch"])[1] < _away(found[s, "none"])[0] for s in SCALES]
    verdict: Verdict = ("supported" if all(steady) else "depends" if any(nearer) else
                        "not supported")
    normed, plain = (", ".join(dict.fromkeys(found[s, norm].text() for s in SCALES))
                     for norm in ("batch", "none"))
    sentence = (f"Squared gradients grow per layer by {normed} with batch norm (theory: "
                f"{THEORY:.3f}) and by {plain} without, at ½, 1 and 2 times He's initial weights.")
    depth = cells[0]["depth"]
    rows: list[list[str | float]] = [
        ["ReLU", "batch norm" if norm == "batch" else "plain", scale, size, i.text(),
         THEORY if norm == "batch" else scale ** 2, float(f"{i.estimate ** (depth / 2):.3g}")]
        for (scale, norm), i in found.items()]
    for linear, B in ((None, 32), (None, 16), (None, 8), (True, 16), (True, 8)):
        i = factors[linear, "batch", 1.0, B]
        rows.append(["linear" if linear else "ReLU", "batch norm", 1.0, B, i.text(),
                     (B - 2) / (B - 3) if linear else "larger",
                     float(f"{i.estimate ** (depth / 2):.3g}")])
    return Finding(
        verdict, sentence,
        Table(["activation", "network", "initial weights / He's", "batch",
               "growth of ‖gradient‖² per layer", "theory",
               f"growth of ‖gradient‖ over {depth} layers"], rows),
        [_figure(arms, size)], _notes([found[s, "batch"] for s in SCALES]))


def _away(i: Interval) -> tuple[float, float]:
    """Smallest and largest |log| of the factors in the interval: 0 neither grows nor shrinks."""
    ends = abs(math.log(i.low)), abs(math.log(i.high))
    return 0.0 if i.low <= 1 <= i.high else min(ends), max(ends)


def _figure(arms: dict[Any, list[Record]], size: int) -> Figure:
    return Figure("Gradients on their way down", "layer", "log₁₀ of ‖gradient‖² over the top's",
                  [curve(f"{label}, weights × {scale:g}", arms[None, norm, scale, size], "log10",
                         "layer")
                   for scale in SCALES for norm, label in (("none", "plain"),
                                                           ("batch", "batch norm"))])


def _notes(found: Sequence[Interval]) -> list[str]:
    estimates, notes = [i.estimate for i in found], []
    if max(estimates) - min(estimates) < 0.01:
        notes.append("With batch norm the initial scale of the weights makes no difference: it can "
                     "neither make gradients vanish nor keep them from growing.")
    if abs(estimates[1] / THEORY - 1) > 0.05:
        notes.append(f"Differs from the paper: {found[1].text()} instead of {THEORY:.3f}, which "
                     "holds for infinitely wide layers and large batches.")
    return notes


STUDY = Study(
    name="gradient-growth",
    question="Does batch norm keep gradients from vanishing and exploding over depth?",
    claim="Batch norm prevents vanishing and exploding gradients.",
    source="Ioffe & Szegedy 2015, sections 1 and 3.3",
    published="Yang et al. 2019: in a ReLU network at initialization, batch norm lets squared "
              "gradients grow by π/(π − 1) = 1.467 per layer for large batches, more for small "
              "ones, and by (B − 2)/(B − 3) in a linear one, whatever the weights' scale.",
    setup="Networks of 20 layers of 512 ReLUs at initialization, normal weights at 1/2, 1 and 2 "
          "times He's scale, normal inputs (256), and a random gradient at the top; slope of the "
          "logarithm of ‖gradient‖² over layers, 10 networks for each.",
    rule="Factor per layer. Supported if with batch norm its interval lies within 5 % of 1 at all "
         "three initial scales; not supported if at none of them it is nearer to 1 (in logarithm, "
         "interval against interval, of 98.3 % each) than without; depends otherwise.",
    cells=cells, run=run, judge=judge, data=(), comparisons=len(SCALES),
    literature="Without batch norm, He et al. 2015 choose the weights so that the factor is 1. "
               "Residual connections slow the growth with batch norm: Yang et al. 2019, De & Smith "
               "2020.",
    changed=corrected(len(SCALES)))
