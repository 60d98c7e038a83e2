"""Norms that keep running statistics of another kind than batch norm's mean and variance: what can
be said of them without knowing what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from nbgrad.nn import Module
from nbgrad.nn.running import keeps_statistics

from .examination import Examination
from .findings import Finding, Hits, found

__all__ = ["CHECKS", "other_norms"]


def other_norms(model: Module) -> dict[str, Any]:
    """Name to layer: those derived from RunningNorm, and instance norms that track."""
    return {name or "model": m for name, m in model.named_modules()
            if keeps_statistics(m)}


def _statistics(layer: Any) -> dict[str, Any]:
    return {name: b.data for name, b in layer.named_buffers(recurse=False)
            if b.dtype.kind == "f"}


def _untouched(layer: Any) -> bool:
    """Whether all are what a new layer has."""
    return all((np.asarray(layer._starts[name]) == values).all()
               for name, values in _statistics(layer).items())


def non_finite(e: Examination) -> Iterator[Finding]:
    hits: Hits = {}
    for name, layer in other_norms(e.model).items():
        bad = sum(int((~np.isfinite(values)).sum()) for values in _statistics(layer).values())
        if bad:
            hits[name] = {"values": bad}
    yield from found("non-finite-statistics", hits, "Running statistics are NaN or infinite: a "
                     "batch with such values passed in training, and an average never forgets "
                     "them. Evaluation gives NaN.",
                     "layer.reset_running_stats(), and train on with the cause removed",
                     by="values")


def never_updated(e: Examination) -> Iterator[Finding]:
    hits: Hits = {name: {"batches tracked": int(layer.num_batches_tracked.data)}
                  | ({} if layer.momentum is None else {"momentum": layer.momentum})
                  for name, layer in other_norms(e.model).items() if _untouched(layer)}
    yield from found("never-updated", hits, "The running statistics are what a new layer has: no "
                     "batch in training mode moved them (momentum=0, or None in an instance "
                     "norm, the state was loaded without them, or training ran in evaluation "
                     "mode).",
                     "let batches through in training mode, with momentum above 0")


def left_in_training_mode(e: Examination) -> Iterator[Finding]:
    hits: Hits = {name: {"training mode": 1} for name, layer in other_norms(e.model).items()
                  if layer._by_batch and not e.training}
    yield from found("left-in-training-mode", hits, "The model is in evaluation mode and this "
                     "layer is not: each evaluation moves its running statistics.",
                     "model.eval(), after everything that calls train() on a part of the model")


def not_compared(e: Examination) -> Iterator[Finding]:
    hits: Hits = {name: {"buffers": len(_statistics(layer))}
                  for name, layer in other_norms(e.model).items()}
    yield from found("other-statistics", hits, "This layer's running statistics are no mean and "
                     "variance over the batch: they are looked at for NaN and for never having "
                     "moved, and are not compared with those of the data.",
                     "where evaluation is worse than training, see whether training mode on the "
                     "same data is, too", problem=False)


CHECKS: tuple[Callable[[Examination], Iterable[Finding]], ...] = (
    non_finite, never_updated, left_in_training_mode, not_compared)
