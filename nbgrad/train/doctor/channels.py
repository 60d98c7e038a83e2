"""Causes in the data, the model and its channels: batches, dropout, decay, dead channels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from .examination import Array, Examination, Layer, distance
from .findings import DEAD, SHARE, Finding, Hits, found, graded, share, some, tracked, upper

__all__ = ["CHECKS", "used_twice"]


# ------------------------------------------------------------------------------------------ batches

def small_batches(e: Examination) -> Iterator[Finding]:
    """ResNet-50 errs on 23.6 % of ImageNet at 32 samples per batch, 24.8 at 8, 27.3 at 4 and 34.7
    at 2 (Wu & He 2018): up to 4 a problem, up to 8 a note."""
    own = [layer for layer in e.layers if not layer.fixed and layer.norm.workers is None]
    if not own:
        return
    middle = float(np.median(e.sizes))
    evidence = {"samples per batch (median)": middle, "batches": len(e.sizes)}
    if middle <= 8:
        yield Finding("tiny-batches", (), "Batches are so small that their statistics are mostly "
                      "noise: training normalizes by other numbers at each step, and evaluation "
                      "by their average.", evidence, "larger batches, nn.convert_norm(model, "
                      "'group'), frozen statistics, or workers that share statistics; "
                      "accumulating gradients does not help", middle <= 4)
    elif 1 in e.sizes:
        yield Finding("single-sample-batch", (), "One batch has a single sample, which is its own "
                      "mean: a layer without positions raises an error or gives only beta, and "
                      "its statistics go into the running ones.",
                      {**evidence, "single samples": e.sizes.count(1)},
                      "DataLoader(..., drop_last=True)")


def unshuffled(e: Examination) -> Iterator[Finding]:
    """Batch means of samples in random order vary as the samples do over N: their ratio is 1
    (healthy: 0.8 to 1.2), a mean of χ² over as many batches, which exceeds 4 in one of 5,000 cases
    at 8 batches. Of the first layer alone: later ones see what has been normalized by the batch."""
    layer = next((layer for layer in e.layers if layer.samples is not None), None)
    if layer is None or layer.samples is None or len(layer.batch_means) < 8:
        return
    count = np.array([n for n, _ in layer.batch_means], np.float64)[:, None]
    means = np.stack([mean for _, mean in layer.batch_means])
    with np.errstate(all="ignore"):
        between = (count * (means - layer.samples.mean) ** 2).sum(0) / (len(means) - 1)
        ratio = between / layer.samples.var()
    ratio = ratio[np.isfinite(ratio)]
    if ratio.size and np.median(ratio) > 4:
        hits = {layer.name: {"variance of batch means / expected": float(np.median(ratio)),
                             "batches": len(means)}}
        yield from found("unshuffled", hits, "Batches differ far more than random ones do: they "
                         "are sorted, by class perhaps, and statistics of a batch say what is in "
                         "it. Running statistics are those of the last few kinds.",
                         "DataLoader(..., shuffle=True)")


def test_data_differ(e: Examination) -> Iterator[Finding]:
    """The first layer of which running statistics fit the training data and not the test data."""
    for layer in e.layers:
        if not layer.test or layer.running is None:
            continue
        train, test = upper(layer.off(layer.quiet)), upper(layer.off(layer.test))
        if train <= 0.5 < test and test > 2 * train:
            hits = {layer.name: {"off by from the test data": test, "from the loader's": train}}
            yield from found("test-data-differ", hits, "The test data are not like the training "
                             "data: the running statistics fit these and not those. They are "
                             "prepared differently (scale, mean, channel order, contrast), or "
                             "come from elsewhere.", "prepare both alike; for data that are meant "
                             "to differ, nbgrad.train.adapt(model, test)")
        return


# ------------------------------------------------------------------------------------------- layers

def used_twice(e: Examination) -> Iterator[Finding]:
    """A quarter of a standard deviation between its inputs is a problem, less a note."""
    hits: Hits = {}
    for layer in e.layers:
        if len(layer.inputs) > 1:
            apart = [distance(a.mean, a.var(), b, layer.norm.eps)
                     for a, b in combinations(layer.inputs, 2)]
            hits[layer.name] = {"calls per forward pass": len(layer.inputs),
                                "inputs apart by": max(map(upper, apart))}
    yield from graded("used-twice", hits, 0.25, "inputs apart by", "One batch norm runs several "
                      "times in a forward pass. In training each input has its own statistics; the "
                      "running ones are of all of them, and fit none.",
                      "a batch norm of its own for each use; the convolution may be shared")


def dropout_before(e: Examination) -> Iterator[Finding]:
    """Li et al. 2018: without dropout, evaluation has less variance than training. Directly before
    a norm the ratio is 1 − p: below 0.6 outputs are 23 % too small, below 0.9 5 %. A layer between
    halves it: networks with p = 0.3 before each layer, at 0.65 to 0.9, lose no accuracy. Noise of
    the masks: 0.005 on digits."""
    hits: Hits = {}
    for layer in e.layers:
        if layer.inputs and layer.quiet:
            with np.errstate(all="ignore"):
                ratio = layer.quiet[0].var() / layer.inputs[0].var()
            ratio = ratio[np.isfinite(ratio)]
            if ratio.size and np.median(ratio) < 0.9:
                hits[layer.name] = {"variance, evaluation / training": float(np.median(ratio)),
                                    "shrinks by": 1 - float(np.median(ratio))}
    yield from graded("dropout-before-norm", hits, 0.4, "shrinks by", "Dropout before this norm "
                      "adds variance in training that is missing in evaluation, where the running "
                      "variance is therefore too large (variance shift).",
                      "dropout after the last batch norm; or nbgrad.train.update_bn(model, "
                      "loader), which measures without dropout")


def decayed_gamma(e: Examination) -> Iterator[Finding]:
    """Decay of gamma is common and mostly harmless; that it wins over the loss is not: gammas start
    at 1 (healthy: 0.5 at least, in the median far more) and below 0.1 the layer is fading. So is
    one that started at 0, unless decay alone would by now have halved it."""
    decay = {id(p): group for group in getattr(e.optimizer, "param_groups", ())
             for p in group["params"] if group.get("weight_decay")}
    hits: Hits = {}
    small: set[str] = set()                          # from the start
    for layer in e.layers:
        gamma = layer.norm.weight
        if gamma is not None and id(gamma) in decay:
            middle = float(np.median(np.abs(gamma.data)))
            group = decay[id(gamma)]
            hits[layer.name] = {"weight decay": group["weight_decay"], "median |gamma|": middle,
                                "lost": 1 - middle}
            if _decay_alone(group, tracked(layer)) > 0.5:
                small.add(layer.name)
    yield from graded("weight-decay-on-gamma", hits, 0.9, "lost", "The optimizer decays gamma "
                      "towards 0, which shrinks the layer's output; the weights before a norm "
                      "gain nothing from it, their scale does not matter.",
                      "nbgrad.optim.param_groups(model, weight_decay) leaves norms and biases out",
                      small)


def _decay_alone(group: dict[str, Any], steps: int) -> float:
    """What it leaves of 1 after so many steps without a gradient of the loss."""
    lr = max(group.get(name) or 0.0 for name in ("lr", "initial_lr", "max_lr"))   # of a schedule
    rate = lr * group["weight_decay"]
    momentum = group.get("momentum") or 0.0
    return float(max(1 - rate / max(1 - momentum, rate), 0.0) ** steps)


def batch_at_evaluation(e: Examination) -> Iterator[Finding]:
    hits: Hits = {layer.name: {"samples per batch (median)": float(np.median(e.sizes))}
                  for layer in e.layers
                  if layer.running is None or layer.norm.statistics == "prediction"}
    yield from found("batch-statistics-at-evaluation", hits, "This layer normalizes by the batch "
                     "in evaluation, too: an answer depends on the other samples in its batch.",
                     "intended for adaptation; otherwise track_running_stats=True, "
                     "statistics='batch'", False)


# ----------------------------------------------------------------------------------------- channels

def constant(layer: Layer) -> Array:
    """Channels that never vary: var is exactly 0, or what rounding of float32 leaves."""
    first, *others = layer.inputs
    there = first.merge(*others)
    flat: Array = there.var() <= 1e-12 * there.mean ** 2
    return flat


def constant_channels(e: Examination) -> Iterator[Finding]:
    hits: Hits = {}
    for layer in e.layers:
        if some(e, layer) and constant(layer).any():
            hits[layer.name] = {"share of channels": share(constant(layer)),
                                "channels": int(constant(layer).sum())}
    yield from graded("constant-channels", hits, DEAD, "share of channels", "Channels that have "
                      "one value for all of the data: their output is beta, and no gradient gets "
                      "through. A dead ReLU before the norm, an empty input channel, or weights "
                      "of zero.", "a smaller learning rate or other initial weights; look at the "
                      "layer before")


def dead_channels(e: Examination) -> Iterator[Finding]:
    hits: Hits = {}
    for layer in e.layers:
        shut = layer.highest <= 0 if layer.highest is not None else np.zeros(1, bool)
        gamma = layer.norm.weight
        # 1e-3 of where it started; all exactly 0 are initial values, of a residual branch's end
        faded = np.abs(gamma.data) < 1e-3 if gamma is not None and gamma.data.any() else shut
        worst = max(share(shut), share(faded))
        if worst:
            hits[layer.name] = {"share of channels": worst, "closed by the ReLU": int(shut.sum()),
                                "gamma near 0": int(faded.sum()) if faded is not shut else 0}
    yield from graded("dead-channels", hits, DEAD, "share of channels", "Channels that give the "
                      "same for all of the data: the ReLU after the norm is never open (beta far "
                      "below 0), or gamma is 0.", "a smaller learning rate; beta and gamma of "
                      "these channels set back to 0 and 1; no weight decay on gamma")


def eps_dominates(e: Examination) -> Iterator[Finding]:
    """Of channels that vary: below eps, the output's standard deviation is under 0.71."""
    hits: Hits = {}
    for layer in e.layers:
        if layer.inputs:
            first, *others = layer.inputs
            var = first.merge(*others).var()[~constant(layer)]
            if share(var < layer.norm.eps) >= SHARE:
                hits[layer.name] = {"share of channels": share(var < layer.norm.eps),
                                    "median variance": float(np.median(var)),
                                    "eps": layer.norm.eps}
    yield from found("eps-dominates", hits, "The inputs vary less than eps: the norm scales them "
                     "by 1/√eps instead of to variance 1, and does not normalize.",
                     "scale the inputs, or a smaller eps", by="share of channels")


CHECKS = (small_batches, unshuffled, test_data_differ, used_twice, dropout_before, decayed_gamma,
          constant_channels, dead_channels, eps_dominates, batch_at_evaluation)
