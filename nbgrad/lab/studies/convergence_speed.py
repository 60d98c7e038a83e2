"""Does a network with batch norm converge in fewer steps?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.autograd import no_grad
from nbgrad.lab.arms import (
    curve,
    edges,
    goal,
    grouped,
    lost,
    percent,
    reached,
    speedup,
    steps_to,
    tuned,
)
from nbgrad.lab.intervals import Interval, bootstrap, together
from nbgrad.lab.judging import BY_MEAN, NOBODY_ARRIVED, arrival, corrected, differs
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table
from nbgrad.lab.training import configured, task_of, train
from nbgrad.train.loop import Trainer

PERCENTILES = (15, 50, 85)
_ARMS = {"none": "without", "batch": "batch norm"}
LRS = (0.1, 0.3, 1.0, 3.0, 10.0)
_SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"lrs": (1.0,), "seeds": 2, "steps": 40, "every": 20},
    "quick": {"lrs": LRS, "seeds": 7, "steps": 1500, "every": 25},
    "full": {"lrs": LRS, "seeds": 10, "steps": 50_000, "every": 100},
}


def cells(scale: str) -> list[Cell]:
    s = _SCALES[scale]
    return [{"norm": norm, "lr": lr, "seed": seed, "steps": s["steps"], "every": s["every"]}
            for seed in range(s["seeds"]) for lr in s["lrs"] for norm in ("none", "batch")]


def run(cell: Cell) -> Record:
    config = configured(cell, model="mlp", activation="sigmoid", init="normal", batch_size=60)
    x = task_of(config).test.tensors[0]

    def look(one: Trainer) -> Record:
        """Percentiles of what one unit of the last hidden layer gets, over the test images."""
        one.model.eval()
        layers: Any = one.model
        with no_grad():
            h = x
            for name, layer in layers.named_children():
                if name == "act3":
                    break
                h = layer(h)
        one.model.train()
        return {f"p{p}": float(np.percentile(h.data[:, 0], p)) for p in PERCENTILES}

    return train(config, steps=cell["steps"], every=cell["every"], look=look)


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    arms = grouped(records, cells, "norm", "lr")
    lrs, level = list(dict.fromkeys(lr for _, lr in arms)), goal(cells[0])
    matched = {lr: speedup(arms["none", lr], arms["batch", lr], level, together(len(LRS)))
               for lr in lrs}
    late = float(records[0]["planned"] + records[0]["steps"][0])
    chosen = tuned(arms, lambda r: steps_to(r, level), worst=late, highest=False)
    best = {norm: float(lr) for norm, (lr, _) in chosen.items()}
    plain, batch = chosen["none"][1], chosen["batch"][1]
    verdict, sentence = _verdict(speedup(plain, batch, level), matched, best, level)
    if not any(reached(r, level) for r in records):
        verdict = "depends"
        sentence = f"No run reaches {100 * level:g} % test accuracy: there is nothing to compare."
    drift = _drift(batch), _drift(arms["none", best["batch"]])
    table = Table(["learning rate", f"steps to {100 * level:g} %, without", "with", "ratio",
                   "reached", "accuracy at the end, without", "with", "diverged"],
                  [_row(lr, arms["none", lr], arms["batch", lr], matched[lr], level) for lr in lrs])
    notes = [*differs(verdict, "supported", "there, test accuracy rises sooner with batch norm"),
             (f"Each at its own best learning rate: {best['none']:g} without and "
             f"{best['batch']:g} with batch norm."),
             *edges({_ARMS[norm]: (lr, []) for norm, lr in best.items()}, lrs),
             (f"A run that never reaches {100 * level:g} % counts as if it had after its last "
              "step: where it is the plain run that never arrives, the ratio is a lower bound; "
              "where it is the one with batch norm, an upper one."),
             _steadier(*drift, best["batch"])]
    return Finding(verdict, sentence, table, _figures(arms, best), notes)


def _verdict(tuned: Interval, matched: dict[float, Interval], best: dict[str, float],
             level: float) -> tuple[Any, str]:
    sentence = (f"Without batch norm it takes {tuned.text('.2g')} times as many steps to "
                f"{100 * level:g} % test accuracy, each arm at its best learning rate "
                f"({best['none']:g} and {best['batch']:g})")
    faster = [lr for lr, ratio in matched.items() if ratio.above(1)]
    at = ", ".join(f"{lr:g}" for lr in faster)
    if tuned.above(1):
        return "supported", f"{sentence}; at the same learning rate, batch norm is ahead at {at}."
    if faster:
        return "depends", (f"{sentence}: no clear gain; at the same learning rate, batch norm is "
                           f"ahead at {at}.")
    return "not supported", f"{sentence}, and at no common learning rate is batch norm ahead."


def _steadier(batch: Interval | None, plain: Interval | None, lr: float) -> str:
    """Figure 1 (b, c) of the paper."""
    ends = [found.text(".2g") if found else "(diverged)" for found in (batch, plain)]
    told = (f"the percentiles of one unit's input travel {ends[0]} times their distance with batch "
            f"norm and {ends[1]} without, at learning rate {lr:g}, from evaluation to evaluation")
    if batch and (not plain or batch.high < plain.low):
        return f"As in the paper, they are steadier with batch norm: {told}."
    return f"Not as in the paper, where they are steadier with batch norm: {told}."


def _drift(records: Sequence[Record]) -> Interval | None:
    """How far the three percentiles travel, over their distance (85th − 15th) at the end; of runs
    that end with finite ones."""
    found = []
    for r in records:
        paths = [r[f"p{p}"] for p in PERCENTILES]
        if None not in itertools.chain(*paths):
            travelled = sum(float(np.abs(np.diff(path)).sum()) for path in paths) / 3
            found.append(travelled / max(paths[2][-1] - paths[0][-1], 1e-12))
    return bootstrap(found) if found else None


def _row(lr: float, plain: Sequence[Record], batch: Sequence[Record], ratio: Interval,
         level: float) -> list[Any]:
    steps = [arrival(arm, level) for arm in (plain, batch)]
    hits = [sum(reached(r, level) for r in arm) for arm in (plain, batch)]
    return [f"{lr:g}", *steps, ratio.text(".2g"), f"{hits[0]}, {hits[1]} of {len(batch)}",
            *(percent([r["final_accuracy"] for r in arm]) for arm in (plain, batch)),
            f"{lost(plain)}, {lost(batch)}"]


def _figures(arms: dict[Any, list[Record]], best: dict[str, float]) -> list[Figure]:
    lr = best["batch"]
    curves = [curve(f"{name}, learning rate {best[norm]:g}", arms[norm, best[norm]],
                    "test_accuracy") for norm, name in _ARMS.items()]
    inputs = [Figure(f"Inputs of one sigmoid in the last hidden layer, {name}, learning "
                     f"rate {lr:g}, first seed", "step",
                     "percentiles 15, 50, 85 over the test images",
                     [curve(f"{p} %", arms[norm, lr][:1], f"p{p}") for p in PERCENTILES])
              for norm, name in _ARMS.items()]
    return [Figure("Test accuracy, each at its best learning rate (median of seeds)", "step",
                   "test accuracy", curves), *inputs]


STUDY = Study(
    name="convergence-speed",
    question="Does batch norm make training converge in fewer steps?",
    claim="Batch normalization speeds up convergence.",
    source="Ioffe & Szegedy 2015, section 4.1 and figure 1",
    published="MNIST, three hidden layers of 100 sigmoids, 50,000 steps of 60 images: test "
              "accuracy rises sooner with batch norm and ends higher (curves; the learning rate is "
              "not given), and the 15th, 50th and 85th percentiles of a sigmoid's input stay "
              "steadier.",
    setup="The same network on 8 × 8 digits: weights from N(0, 0.1²), plain SGD, batches of 60, "
          "five learning rates from 0.1 to 10, 7 paired seeds of 1,500 steps (full: 10 of 50,000). "
          "Steps to 95 % test accuracy (MNIST 90, Fashion-MNIST 75, CIFAR-10 30 %).",
    rule="Ratio of steps without to with batch norm, median over paired seeds with its 95 % "
         "interval. Supported: above 1 with each arm at its own best learning rate of the grid. "
         "Depends: not so, but above 1 at some common learning rate (interval of 99 % for each of "
         "the five); or no run gets there. Not supported: neither.",
    cells=cells, run=run, judge=judge, comparisons=len(LRS),
    literature="Santurkar et al. 2018 find the speed-up, too, and that it does not come from a "
               "steadier distribution; at equal small learning rates Bjorck et al. 2018 find "
               "hardly any gain.",
    changed=f"{NOBODY_ARRIVED} {BY_MEAN} {corrected(len(LRS), 5, 7)}",
)
