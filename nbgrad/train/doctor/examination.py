"""What passes over the data show of the batch norms of a model: measured here, judged elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, no_grad
from nbgrad.backend import greatest
from nbgrad.nn import Dropout, Module, ReLU
from nbgrad.nn.functional import cross_entropy
from nbgrad.nn.hooks import input_of
from nbgrad.ops import Moments, moments
from nbgrad.train.evaluation import STATISTICS, Evaluation, evaluate
from nbgrad.train.metrics import batch_norm_layers
from nbgrad.train.population import first_input, generators_unchanged, unchanged, using

__all__ = ["Examination", "Layer", "distance", "examine", "with_and_without_dropout"]

Array = np.ndarray[Any, Any]


@dataclass
class Layer:
    """One batch norm. Moments are lists by call within a forward pass, over all batches, of inputs
    which the layers before made as in training: normalized by the batch, and with dropout."""

    name: str
    norm: Any
    fixed: bool                                     # normalizes by running statistics in training
    inputs: list[Moments] = field(default_factory=list)
    quiet: list[Moments] = field(default_factory=list)      # without dropout
    test: list[Moments] = field(default_factory=list)       # of the test data, without dropout
    batch_means: list[tuple[int, Array]] = field(default_factory=list)
    samples: Moments | None = None                  # of each sample's mean, per channel
    highest: Array | None = None                    # that a ReLU got from it; None: no ReLU

    @property
    def running(self) -> tuple[Array, Array] | None:
        """Mean and var in float64."""
        if self.norm.running_mean is None:
            return None
        return (self.norm.running_mean.data.astype(np.float64),
                self.norm.running_var.data.astype(np.float64))

    def off(self, found: list[Moments]) -> Array | None:
        """Per channel, how far the running statistics are from those; see ``distance``."""
        if self.running is None or not found:
            return None
        first, *others = found
        return distance(*self.running, first.merge(*others), self.norm.eps)


@dataclass
class Examination:
    """Everything that was measured."""

    model: Module
    training: bool                                  # the model's mode when it came
    layers: list[Layer]
    sizes: list[int]                                # samples in each batch
    finite: bool                                    # all inputs of the model are
    evaluations: dict[str, Evaluation]
    optimizer: Any = None
    skipped: int = 0                                # batches that cannot be normalized


def distance(mean: Array, var: Array, of: Moments, eps: float) -> Array:
    """Per channel, the root mean square over x of (x − mean)/σ − (x − mean')/σ', σ² = var + eps,
    where mean' and var' are those of x: what normalizing by other statistics changes, in standard
    deviations of the output."""
    there = of.var()
    with np.errstate(all="ignore"):
        sigma, own = np.sqrt(var + eps), np.sqrt(there + eps)
        shift = (of.mean - mean) / sigma
        scale = np.sqrt(there) * (1 / sigma - 1 / own)
        found: Array = np.sqrt(shift * shift + scale * scale)
    return found


def examine(model: Module, loader: Iterable[Any], test: Iterable[Any] | None, optimizer: Any,
            batches: int | None) -> Examination:
    """Two passes over ``loader`` (with dropout, without), one over ``test``, three evaluations. The
    model and the generators are left as they were."""
    some = _Some(loader, batches)
    result = Examination(model, model.training, _layers(model), [], True, {}, optimizer)
    passes = [("inputs", some), ("quiet", some)]
    if test is not None:
        passes.append(("test", _Some(test, batches)))
    with no_grad(), np.errstate(all="ignore"), generators_unchanged(loader, test):
        for what, data in passes:
            with unchanged(model):      # each pass starts from the statistics that the model has
                _measure(result, data, what)
        with unchanged(model):
            _evaluate(result, some)
    return result


def with_and_without_dropout(model: Module, loader: Iterable[Any]) -> list[Layer]:
    """The batch norms with ``inputs`` and ``quiet``, from two passes over ``loader``. The model and
    the generators are left as they were."""
    result = Examination(model, model.training, _layers(model), [], True, {})
    some = _Some(loader, None)
    with no_grad(), np.errstate(all="ignore"), generators_unchanged(loader):
        for what in ("inputs", "quiet"):
            with unchanged(model):
                _measure(result, some, what)
    return result.layers


def _layers(model: Module) -> list[Layer]:
    return [Layer(name, norm, _fixed(model, norm))
            for name, norm in batch_norm_layers(model).items()]


def _fixed(model: Module, norm: Any) -> bool:
    return norm.statistics in ("running", "frozen") or (model.training and not norm.training)


class _Some:
    """At most so many batches of a loader, of at least so many samples."""

    def __init__(self, loader: Iterable[Any], batches: int | None, least: int = 0) -> None:
        if isinstance(loader, Iterator):
            raise ValueError("batch norms: an iterator ends after one pass, and several are "
                             "needed: pass a list or a DataLoader")
        self.loader, self.batches, self.least = loader, batches, least

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch in islice(self.loader, self.batches)
                if len(first_input(batch).data) >= self.least)


# --------------------------------------------------------------------------------------- passes

def _measure(result: Examination, some: _Some, what: str) -> None:
    """One pass; ``what`` is the list of each Layer that it fills."""
    model, noisy = result.model.train(what != "test"), what == "inputs"
    for module in model.modules():
        if isinstance(module, Dropout):
            module.train(noisy)
    batch = "prediction" if what == "test" else "population"        # by it, and nothing moves
    words = {layer.norm: "frozen" if layer.fixed else batch for layer in result.layers
             if layer.norm.running_mean is not None}
    watches = [_Watch(layer, getattr(layer, what), what) for layer in result.layers]
    with ExitStack() as stack:
        stack.enter_context(using(words))
        for watch in watches:
            stack.enter_context(watch.layer.norm.register_forward_pre_hook(watch.before,
                                                                           with_kwargs=True))
        if what == "quiet":
            _watch_relus(stack, model, watches)
        for batch_ in some:
            x = first_input(batch_)
            for watch in watches:
                watch.call = 0
            if noisy:
                result.sizes.append(len(x.data))
                result.finite &= x.data.dtype.kind != "f" or bool(np.isfinite(x.data).all())
            done = _run(model, x)
            result.skipped += noisy and not done
    if noisy and not sum(result.sizes):
        raise ValueError("batch norms: the loader gave no samples")


def _run(model: Module, x: Tensor) -> bool:
    """Whether it runs: a single sample has no statistics in a layer without positions."""
    try:
        model(x)
    except ValueError:
        if len(x.data) > 1:
            raise
        return False
    return True


class _Watch:
    """Collects a layer's inputs in one pass."""

    def __init__(self, layer: Layer, into: list[Moments], what: str) -> None:
        self.layer, self.into, self.call = layer, into, 0
        self.spread = what == "quiet"
        self.output: Any = None

    def before(self, _: Module, args: tuple[Any, ...], settings: Mapping[str, Any]) -> None:
        x, mask = input_of(args, settings), settings.get("mask")
        found = moments(x, mask=mask)
        if self.call < len(self.into):
            self.into[self.call] = self.into[self.call].merge(found)
        else:
            self.into.append(found)
        if self.spread and self.call == 0 and mask is None and x.shape[0]:
            self._samples(x.data, found)
        self.call += 1

    def _samples(self, x: Array, found: Moments) -> None:
        layer = self.layer
        means = x.mean(axis=tuple(range(2, x.ndim)), dtype=np.float64) if x.ndim > 2 else x
        own = moments(means)
        layer.samples = own if layer.samples is None else layer.samples.merge(own)
        layer.batch_means.append((len(x), found.mean))

    def after(self, _: Module, args: tuple[Any, ...], y: Any) -> None:
        self.output = y                             # held, so that no other value can be it

    def relu(self, x: Any) -> None:
        y = self.output
        if y is not None and x is y:
            high = greatest(y.data, (0, *range(2, y.data.ndim)), least=-np.inf)
            before = self.layer.highest
            self.layer.highest = high if before is None else np.maximum(before, high)


def _watch_relus(stack: ExitStack, model: Module, watches: list[_Watch]) -> None:
    """What a ReLU gets straight from a batch norm."""
    def to_relu(_: Module, args: tuple[Any, ...], settings: Mapping[str, Any]) -> None:
        for watch in watches:
            watch.relu(input_of(args, settings))

    for watch in watches:
        stack.enter_context(watch.layer.norm.register_forward_hook(watch.after))
    for module in model.modules():
        if isinstance(module, ReLU):
            stack.enter_context(module.register_forward_pre_hook(to_relu, with_kwargs=True))


# ---------------------------------------------------------------------------------- evaluations

def _evaluate(result: Examination, some: _Some) -> None:
    """Loss and accuracy on the loader's own data, by the statistics used; left out where batches
    hold no class numbers, or the model cannot be evaluated so."""
    batch = next(iter(some))
    target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(target, Tensor) or target.dtype.kind != "i" or target.ndim != 1:
        return
    if result.skipped:
        some = _Some(some.loader, some.batches, 2)
    for word in STATISTICS if result.layers else ("running",):
        try:
            found = evaluate(result.model, some, statistics=word, train=some, loss=_loss)
        # no samples, no running statistics, used twice; or targets that are no class numbers of
        # this output, whose many errors are not what was asked about
        except (ValueError, IndexError, TypeError, RuntimeError, AttributeError):
            continue
        result.evaluations[word] = found


def _loss(y: Any, target: Tensor) -> Tensor:
    if not isinstance(y, Tensor) or y.ndim != 2:
        raise ValueError("bn_doctor: classes are told from an output (N, classes)")
    return cross_entropy(y, target)
