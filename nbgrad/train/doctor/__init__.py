"""Why a model with batch norm does worse in evaluation than in training: measures, and names it.

In the running statistics (``averages``): non-finite-statistics, non-finite-data,
left-in-training-mode, never-updated, momentum-zero, last-batch-only, remembers-start, stale-frozen,
moved-in-validation, other-data, lagging. In the data and the model (``channels``): tiny-batches,
single-sample-batch, unshuffled, test-data-differ, used-twice, dropout-before-norm,
weight-decay-on-gamma, constant-channels, dead-channels, eps-dominates,
batch-statistics-at-evaluation (a note). Norms with other running statistics (``others``: ℓp or
mean-only batch norm, instance norm that tracks, …) are looked at for three of these, and named in
a note, other-statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbgrad.nn import Module
from nbgrad.nn.module import check_model
from nbgrad.train.evaluation import Evaluation

from . import averages, channels, others
from .examination import Examination, Layer, examine
from .findings import Finding, tracked, upper

__all__ = ["Finding", "Report", "bn_doctor"]


@dataclass(frozen=True)
class Report:
    """What was found; ``str`` is the text for people."""

    findings: tuple[Finding, ...]                   # problems first
    evaluations: dict[str, Evaluation]              # by the statistics used, on the loader's data
    examination: Examination

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings that cost something; the others are notes."""
        return tuple(f for f in self.findings if f.problem)

    @property
    def ok(self) -> bool:
        """No problem found."""
        return not self.problems

    def __str__(self) -> str:
        e = self.examination
        parts = [_model(e), _evaluations(self.evaluations), _layers(e.layers)]
        parts += [str(f) for f in self.findings if f.problem] or ["no problem found"]
        parts += [str(f) for f in self.findings if not f.problem]
        return "\n\n".join(filter(None, parts))


def bn_doctor(model: Module, loader: Iterable[Any], *, test: Iterable[Any] | None = None,
              optimizer: Any = None, batches: int | None = None) -> Report:
    """Look for known causes of a gap between training and evaluation in a model's batch norms.

    loader: batches (x, class numbers) of the training data, as large and as mixed as in training.
    test: the same of the data that are evaluated, to tell data from statistics. optimizer: the one
    in use, for its weight decay. batches: at most so many of each loader are looked at (all).

    Compares, per channel, the running statistics with those of the data, in standard deviations of
    the layer's output; loss and accuracy by running, batch and population statistics; variance with
    and without dropout; batches with each other; and gamma, beta and ReLUs that follow directly (of
    dropout and ReLU, modules are seen and functions are not). Each Finding says in words what is
    wrong, with which numbers, and what to do. The passes over the data number six and one per batch
    norm. The model, its mode and all random generators are left as they were.

    Raises ValueError for a loader without samples, or one that is an iterator.

    >>> import nbgrad
    >>> from nbgrad import nn
    >>> model = nn.Sequential(nn.BatchNorm1d(3))
    >>> report = bn_doctor(model, [nbgrad.randn(20, 3) + 5 for _ in range(4)])
    >>> report.ok, [f.code for f in report.problems]
    (False, ['never-updated'])
    """
    check_model("bn_doctor", model)
    if batches is not None and not (isinstance(batches, (int, np.integer)) and batches >= 1):
        raise ValueError(f"bn_doctor: batches must be a whole number of at least 1, got {batches}")
    e = examine(model, loader, test, optimizer, batches)
    checks = *averages.CHECKS, *channels.CHECKS, *others.CHECKS
    findings = [f for check in checks for f in check(e)]
    findings += averages.gap(e, findings)
    return Report(tuple(sorted(findings, key=lambda f: not f.problem)), e.evaluations, e)


def _model(e: Examination) -> str:
    layers = f"{len(e.layers)} batch norm{'s' * (len(e.layers) != 1)}" if e.layers else (
        "no batch norm")
    return (f"{layers}, {'training' if e.training else 'evaluation'} mode; {sum(e.sizes):,} "
            f"samples in {len(e.sizes):,} batches of {min(e.sizes)} to {max(e.sizes)}")


def _evaluations(evaluations: dict[str, Evaluation]) -> str:
    rows = [("statistics", "accuracy", "loss")]
    rows += [(word, f"{100 * found.accuracy:.2f} %", f"{found.loss:.4f}")
             for word, found in evaluations.items()]
    return _table(rows) if evaluations else ""


def _layers(layers: list[Layer]) -> str:
    """One line per batch norm; "off by" is what a quarter of its channels exceeds."""
    rows = [("layer", "batches", "momentum", "off by", "dropout shift", "samples")]
    for layer in layers:
        with np.errstate(all="ignore"):
            ratio = [q.var() / i.var() for q, i in zip(layer.quiet[:1], layer.inputs[:1])]
        known = [r[np.isfinite(r)] for r in ratio]
        shift = f"{np.median(known[0]):.2f}" if known and known[0].size else "-"
        off = "-" if layer.running is None else f"{upper(layer.off(layer.inputs)):.2f}"
        average = layer.norm.average or layer.norm.momentum
        rows.append((layer.name, str(tracked(layer)), str(average), off, shift,
                     str(sum(n for n, _ in layer.batch_means))))
    return _table(rows) if layers else ""


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
