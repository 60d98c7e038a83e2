"""Causes in the running statistics: broken, never moved, averaged over the wrong batches, or of
something else than what is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from .channels import used_twice
from .examination import Examination, Layer, distance
from .findings import (
    OFF,
    Finding,
    Hits,
    evaluated_by_running,
    found,
    momentum,
    some,
    tracked,
    upper,
)

__all__ = ["CHECKS", "gap"]


# ----------------------------------------------------------------------------- broken or untouched

def non_finite(e: Examination) -> Iterator[Finding]:
    hits: Hits = {}
    for layer in e.layers:
        if layer.running is not None:
            mean, var = layer.running
            bad = ~(np.isfinite(mean) & np.isfinite(var)) | (var < 0)
            if bad.any():
                hits[layer.name] = {"channels": int(bad.sum()), "of": bad.size}
    yield from found("non-finite-statistics", hits, "Running statistics are NaN, infinite or of "
                     "negative variance: a batch with such values passed in training, and an "
                     "average never forgets them. Evaluation gives NaN in these channels.",
                     "find where the values came from (on_nonfinite='raise'), then "
                     "nbgrad.train.update_bn(model, loader); on_nonfinite='skip_update' keeps "
                     "later ones out", by="channels")
    if not e.finite:
        yield Finding("non-finite-data", (), "The loader gives inputs that are NaN or infinite.",
                      {"batches": len(e.sizes)}, "check how the data are read and scaled")


def left_in_training_mode(e: Examination) -> Iterator[Finding]:
    hits: Hits = {layer.name: {"batches tracked": tracked(layer)} for layer in e.layers
                  if layer.norm.training and not e.training and not layer.fixed}
    yield from found("left-in-training-mode", hits, "The model is in evaluation mode and this "
                     "layer is not: answers depend on the other samples of their batch, and each "
                     "evaluation moves the running statistics.",
                     "model.eval(), after everything that calls train() on a part of the model")


def never_updated(e: Examination) -> Iterator[Finding]:
    stuck: Hits = {}
    never: Hits = {}
    for layer, mean, var in evaluated_by_running(e):
        if layer.inputs and not mean.any() and (var == 1).all():
            into = stuck if momentum(layer.norm) == 0 and tracked(layer) else never
            into[layer.name] = {"batches tracked": tracked(layer), "running mean": 0,
                                "running var": 1, "off by": upper(layer.off(layer.inputs))}
    yield from found("momentum-zero", stuck, "momentum=0 keeps the running statistics at their "
                     "start, mean 0 and variance 1, however long training goes on.",
                     "momentum is the share of the new batch: 0.1 is PyTorch's default; then "
                     "train on, or nbgrad.train.update_bn(model, loader)", by="off by")
    yield from found("never-updated", never, "The running statistics are still mean 0 and "
                     "variance 1: no batch in training mode moved them (the state was loaded "
                     "without them, or training ran in evaluation mode, or frozen).",
                     "nbgrad.train.update_bn(model, loader)", by="off by")


# --------------------------------------------------------------------------------- how they average

def last_batch_only(e: Examination) -> Iterator[Finding]:
    """From 0.5 on, the average spans (2 − m)/m = 3 batches or fewer. Usual: 0.1 (19) and 0.01."""
    hits: Hits = {}
    for layer, *_ in evaluated_by_running(e):
        m = momentum(layer.norm)
        if m >= 0.5 and not layer.fixed:
            hits[layer.name] = {"momentum": m, "batches averaged": (2 - m) / m,
                                "off by": upper(layer.off(layer.inputs))}
    yield from found("last-batch-only", hits, "The running statistics are little more than those "
                     "of the last batch: momentum is the share of the new batch here, as in "
                     "PyTorch, and not, as in Keras, that of the old average.",
                     "momentum=1 − Keras' momentum (0.01 for 0.99), or like='keras'; then "
                     "nbgrad.train.update_bn(model, loader)", by="momentum")


def running_off(e: Examination) -> Iterator[Finding]:
    """Running statistics far from those of the data, and why. Layers are in the network's order:
    the first is nearest the cause."""
    named = {name for check in (never_updated, last_batch_only, used_twice) for f in check(e)
             if f.problem for name in f.layers}
    groups: dict[Callable[..., Iterator[Finding]], Hits] = {}
    for i, (layer, *_) in enumerate(evaluated_by_running(e)):
        off = upper(layer.off(layer.inputs))
        if off > OFF and layer.name not in named:
            start = _start(layer)
            reason = _reason(e, layer, i, off, start)
            if reason is _other_data and not some(e, layer):
                continue
            hit = {"off by": off, "batches tracked": tracked(layer)}
            if reason is _remembers_start:
                hit["share of the start"] = start
            groups.setdefault(reason, {})[layer.name] = hit
    for reason, hits in groups.items():
        yield from reason(e, hits)


def _start(layer: Layer) -> float:
    """What an average of so many batches still holds of mean 0 and variance 1."""
    t = tracked(layer)
    if layer.norm.average is None and layer.norm.momentum is not None:
        return float((1 - layer.norm.momentum) ** t)
    return math.prod(1 - momentum(layer.norm, i) for i in range(1, min(t, 10000) + 1))


def _reason(e: Examination, layer: Layer, i: int, off: float,
            start: float) -> Callable[..., Iterator[Finding]]:
    if layer.fixed or layer.norm.statistics == "population" or momentum(layer.norm) == 0:
        return _stale
    if _like_an_early_average(layer, start, off):
        return _remembers_start
    if layer.test and upper(layer.off(layer.test)) < off / 2:
        return _moved_by_test
    return _other_data if i == 0 else _lagging


def _like_an_early_average(layer: Layer, start: float, off: float) -> bool:
    """Whether an average that knew these data and nothing else, but for its start, would be off by
    so much, and the running statistics without that share would not: ``update_bn`` counts batches
    and writes no average, and what it wrote holds nothing of the start. Without it, up to 0.43
    remain after 3 to 40 steps on digits, as the weights move; 0.9 and more on other data."""
    if layer.running is None or start == 1:         # loaded without the number of batches
        return False
    first, *others = layer.inputs
    there, eps = first.merge(*others), layer.norm.eps
    early = distance((1 - start) * there.mean, (1 - start) * there.var() + start, there, eps)
    mean, var = layer.running
    late = distance(mean / (1 - start), np.maximum(var - start, 0) / (1 - start), there, eps)
    return upper(early) > off / 2 and upper(late) < max(off / 2, OFF)


def _stale(e: Examination, hits: Hits) -> Iterator[Finding]:
    yield from found("stale-frozen", hits, "This layer normalizes by fixed statistics, which are "
                     "not those of these data under these weights: the layers before have been "
                     "trained, or the data are others, since they were taken.",
                     "nn.unfreeze_batch_norm(model), nbgrad.train.update_bn(model, loader), and "
                     "freeze again; or keep the layers before it fixed, too")


def _remembers_start(e: Examination, hits: Hits) -> Iterator[Finding]:
    yield from found("remembers-start", hits, "Too few steps for this decay: the running "
                     "statistics still hold a share of mean 0 and variance 1, from which they "
                     "started.", "nbgrad.train.update_bn(model, loader) now; for training, a "
                     "larger momentum or average=nn.DebiasedExponential(...)")


def _moved_by_test(e: Examination, hits: Hits) -> Iterator[Finding]:
    both = {layer.name: {**hits[layer.name],
                         "off by from the test data": upper(layer.off(layer.test))}
            for layer in e.layers if layer.name in hits}
    yield from found("moved-in-validation", both, "The running statistics are those of the test "
                     "data and not of the training data: the model was in training mode while it "
                     "was evaluated.", "model.eval() before each evaluation; to repair, "
                     "nbgrad.train.update_bn(model, loader)")


def _other_data(e: Examination, hits: Hits) -> Iterator[Finding]:
    """Of the first norm in the network, which sees the data through one layer."""
    layer = next(layer for layer in e.layers if layer.name in hits)
    assert layer.running is not None
    with np.errstate(all="ignore"):
        ratio = np.log(layer.inputs[0].var() / layer.running[1]) / 2
    ratio = ratio[np.isfinite(ratio)]
    middle, spread = (float(np.median(ratio)), float(ratio.std())) if ratio.size else (0.0, 1.0)
    # alike in all channels to a quarter and of more than 1.5: one scale, not other weights
    scaled = spread < 0.25 and abs(middle) > math.log(1.5)
    text = (f" All channels vary about {math.exp(middle):.3g} times as much: the inputs are "
            "scaled differently." if scaled else "")
    hits = {name: {**h, "spread of the data / running": math.exp(middle)}
            for name, h in hits.items()}
    yield from found("other-data", hits, "The running statistics come from other data than "
                     "these, as the first norm already shows: the inputs are prepared differently "
                     f"(scale, mean, channel order), or other weights were loaded.{text}",
                     "prepare inputs as in training; for data that are meant to differ, "
                     "nbgrad.train.adapt(model, loader)", _costs(e, hits))


def _costs(e: Examination, hits: Hits) -> bool:
    """Fast learning may move the first layer's inputs by half a deviation, and costs little."""
    lost = _lost(e)
    return lost is None or lost > 0.05 or max(h["off by"] for h in hits.values()) > 2 * OFF


def _lagging(e: Examination, hits: Hits) -> Iterator[Finding]:
    """Common while the learning rate is high, and gone as it falls: a note below 10 points of
    accuracy."""
    lost = _lost(e)
    yield from found("lagging", hits, "The running statistics lag behind the weights, which have "
                     "moved on since, or have been replaced or averaged.",
                     "nbgrad.train.update_bn(model, loader); a smaller learning rate at the end "
                     "of training lets the average catch up", lost is None or lost > 0.1)


def _lost(e: Examination) -> float | None:
    """Accuracy that population statistics would give back; None: not measured."""
    if not {"running", "population"} <= e.evaluations.keys():
        return None
    return e.evaluations["population"].accuracy - e.evaluations["running"].accuracy


def gap(e: Examination, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Running statistics that are little off in each of many layers: three standard errors and 5
    points of accuracy (healthy: 2.7), where nothing else explains it."""
    lost = _lost(e)
    if lost is None or any(f.problem or f.code == "lagging" for f in findings):
        return
    running, population = e.evaluations["running"], e.evaluations["population"]
    error = math.sqrt(2 * max(population.accuracy * (1 - population.accuracy), 0.01)
                      / population.samples)
    if lost > max(0.05, 3 * error):
        hits: Hits = {layer.name: {"off by": upper(layer.off(layer.inputs)),
                                   "accuracy, running": running.accuracy,
                                   "accuracy, population": population.accuracy}
                      for layer, *_ in evaluated_by_running(e)}
        yield from _lagging(e, dict(sorted(hits.items(), key=lambda hit: -hit[1]["off by"])))


CHECKS = (non_finite, left_in_training_mode, never_updated, last_batch_only, running_off)
