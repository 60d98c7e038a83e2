"""Findings that nobody measured, for tests of what is done with findings: every kind of figure,
every verdict and state, and texts that would break a page which does not escape them."""

import math
from types import SimpleNamespace

from nbgrad.lab import results, studies
from nbgrad.lab.results import Outcome, Part
from nbgrad.lab.study import Figure, Finding, Series, Table

HOSTILE = "<script>alert('a & b')</script> | `x` \"*q*\" <img src=x onerror=alert(1)>"
MACHINE = {"nbgrad": "0.1.0", "python": "3.11.7", "numpy": "2.4.6", "numba": "0.68.1",
           "cpu": "znver4", "cores": 2, "kernel cache": "/home/someone/secret"}
STEPS = [50 * i for i in range(41)]


def curve(rate, end, steps=STEPS):
    return [end * (1 - math.exp(-rate * s)) for s in steps]


def line(log=False):
    """Two arms with bands; one of them stops in the middle."""
    made = []
    for label, rate, end, lost in (("batch norm", 0.006, 0.97, False),
                                   ("without norm", 0.002, 0.93, True)):
        y = [0.1 + 0.9 * v for v in curve(rate, end)]
        y = [v if not (lost and 20 <= i < 24) else None for i, v in enumerate(y)]
        made.append(Series(label, STEPS, y, [v and v - 0.03 for v in y],
                           [v and v + 0.02 for v in y]))
    return Figure("Accuracy on the test images while training", "step", "test accuracy", made,
                  log_y=log)


def scales():
    """Both axes logarithmic, one value that is not there and one below zero."""
    x = [10.0 ** e for e in range(-4, 3)]
    return Figure("Loss at the end, by learning rate", "learning rate", "training loss", [
        Series("batch norm", x, [2.0, 0.8, 0.1, 0.02, 0.01, 0.05, 0.3],
               [1.9, 0.7, 0.08, -0.01, 0.008, 0.04, 0.1], [2.1, 0.9, 0.12, 0.03, 0.02, 0.07, 0.9]),
        Series("without norm", x, [2.2, 1.4, 0.4, 0.1, 2.6, None, float("nan")])],
        log_x=True, log_y=True)


def bars():
    names = ["none", "before", "after"]
    return Figure("Steps to 95 %", "placement", "steps", [
        Series("ReLU", names, [900, 300, 350], [800, 250, 300], [1000, 340, 420]),
        Series("tanh", names, [700, 320, None], [650, 300, None], [790, 350, None])], kind="bar")


def long_bars():
    names = ["dropout before the last batch norm", "dropout after the last batch norm",
             "no dropout at all", "dropout before every batch norm"]
    return Figure("Accuracy by where dropout stands", "where", "test accuracy (%)", [
        Series("running statistics", names, [91.2, 95.1, 94.2, 88.3], [90.5, 94.8, 93.8, 86.0],
               [91.9, 95.4, 94.6, 90.1]),
        Series("population statistics", names, [93.9, 95.1, 94.2, 92.0], [93.1, 94.8, 93.8, 91.0],
               [94.4, 95.4, 94.6, 93.1])], kind="bar")


def scatter():
    return Figure("Gap between training and test", "batch size", "gap (points)", [
        Series("batch norm", [4, 8, 16, 32, 64, 128], [1.2, 1.6, 2.1, 2.4, 2.9, 3.3],
               [1.0, 1.3, 1.9, 2.1, 2.5, 3.0], [1.5, 1.9, 2.4, 2.8, 3.2, 3.6])],
        kind="scatter", log_x=True)


def many():
    """Eight long series, more points than are drawn."""
    x = list(range(3000))
    return Figure("Percentiles of a unit's input", "step", "input", [
        Series(f"layer {k}", x, [k + math.sin(i / (40 + 9 * k)) for i in x]) for k in range(8)])


def nothing():
    return Figure("All runs diverged", "step", "loss",
                  [Series("without norm", [1, 2, 3], [None, None, None])], log_y=True)


def hostile():
    return Figure(HOSTILE, HOSTILE, HOSTILE, [Series(HOSTILE, [HOSTILE, "b"], [1.0, 2.0]),
                                              Series("b", [HOSTILE, "b"], [2.0, 1.0])], kind="bar")


def table():
    return Table(["arm", "learning rate", "accuracy [95 % interval]", "steps to 95 %", "diverged"],
                 [["batch norm", 0.1, "0.953 [0.948, 0.957]", 400, "0/5"],
                  ["batch norm", 1e-5, "0.934 [0.918, 0.947]", 1250, "0/5"],
                  ["without norm", 10.0, "0.104 [0.098, 0.110]", None, "5/5"]])


SENTENCE = ("With batch norm the network took 2.3 times [1.9, 2.8] fewer steps to 95 % than "
            "without at the best learning rate of each, and 4.1 times [3.2, 5.5] fewer at the "
            "highest.")


def texts(name, number=0):
    return {"name": name, "question": f"Does what study {number} asks about happen?",
            "claim": f"Batch normalization does what claim {number} of the articles says.",
            "source": f"Someone & Other {2000 + number}, section 4.1",
            "published": "Steps to the accuracy of the plain network: 31.0M without, 13.3M with "
            "batch norm, 2.1M at five times the learning rate.",
            "setup": "Three hidden layers of 100 sigmoids on the digits, batches of 60, five "
            "seeds, learning rate tuned for each arm on the same grid.",
            "rule": "Supported where the interval of the ratio lies above 1.5; not supported "
            "where it lies below 1.1; depends otherwise.",
            "literature": "Bjorck et al. 2018 find no difference at small learning rates.",
            "changed": "Seeds were raised after a first run."}


def outcome(name, verdict="supported", figures=(), number=0, **changes):
    finding = Finding(verdict, SENTENCE, table(), figures,
                      ["The effect is smaller than the published one: the digits are easier."])
    values = {"study": texts(name, number), "scale": "quick", "data": "digits", "seeds": 5,
              "cells": 30, "done": 30, "state": "complete", "seconds": 41.2 + number,
              "finding": finding, "date": "2026-11-20T18:00:00+00:00", "machine": MACHINE,
              "command": f"nbgrad lab run {name}"}
    return Outcome(**{**values, **changes})


FIGURES = ((line(), scales()), (bars(), long_bars()), (scatter(), many()), (nothing(),),
           (line(log=True),))
VERDICTS = ("supported", "not supported", "depends")


def outcomes(n=20):
    """As many as there are studies: all verdicts, all figures, and some without a finding."""
    listed = [f"study-{i}" for i in range(1, n + 1)]
    made = [outcome(name, VERDICTS[i % 3], FIGURES[i % len(FIGURES)], i)
            for i, name in enumerate(listed, 1)]
    made[-1] = outcome(listed[-1], number=n, finding=None, state="interrupted", done=12)
    made[-2] = outcome(listed[-2], number=n - 1, finding=None, state="failed", done=28,
                       errors=["FloatingPointError: loss is <nan>", "cell 4"])
    made[0] = outcome(listed[0], "not supported", FIGURES[1], 1, parts=[
        Part(20, "", {}), Part(9, "2026-11-19", MACHINE), Part(1, "2026-11-20", MACHINE)])
    evil = {key: f"{HOSTILE} {key}" for key in made[-3].study} | {"name": listed[-3]}
    finding = Finding("depends", HOSTILE, Table([HOSTILE, "b"], [[HOSTILE, 1.5]]), [hostile()],
                      [HOSTILE])
    made[-3] = outcome(listed[-3], study=evil, finding=finding, command=f"nbgrad {HOSTILE}")
    return made


def listed(patch, n=20):
    """As if the studies were those of ``outcomes(n)``, and one more."""
    known = {i: texts(f"study-{i}", i) for i in range(1, n + 2)}
    patch.setattr(studies, "STUDIES", {i: f"study_{i}" for i in known})
    patch.setattr(studies, "find",
                  {own["name"]: SimpleNamespace(**own) for own in known.values()}.__getitem__)


def write(folder, made=None):
    """Results as ``nbgrad lab run`` leaves them."""
    for one in outcomes() if made is None else made:
        results.save(folder, one)
    return folder

