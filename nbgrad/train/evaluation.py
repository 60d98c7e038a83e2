"""Accuracy and loss of a model, with a choice of the statistics that its batch norms use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, no_grad
from nbgrad.nn import Module
from nbgrad.nn.functional import cross_entropy
from nbgrad.train.metrics import batch_norm_layers

__all__ = ["Evaluation", "evaluate", "population_statistics", "use_population_statistics"]

Batches = Iterable[tuple[Tensor, Tensor]]
STATISTICS = ("running", "batch", "population")


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and share of right answers over ``samples``."""

    loss: float
    accuracy: float
    samples: int


def evaluate(model: Module, batches: Batches, *, statistics: str = "running",
             train: Batches | None = None,
             loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy) -> Evaluation:
    """Loss and accuracy in evaluation mode (no dropout). The model is left as it was.

    statistics: which mean and variance the batch norms use:
    ``"running"``: the moving averages of training, as always at inference;
    ``"batch"``: those of each evaluated batch (an answer then depends on its other samples);
    ``"population"``: those of all of ``train``, see ``population_statistics``.

    Raises ValueError for other words, for no samples, and for "population" without ``train``.
    """
    if statistics not in STATISTICS:
        raise ValueError(f"evaluate: statistics must be one of {', '.join(STATISTICS)}, "
                         f"got {statistics!r}")
    if statistics == "population" and train is None:
        raise ValueError("evaluate: population statistics are computed over the training set; "
                         "pass it as train=")
    with _unchanged(model), no_grad():
        model.eval()
        if statistics == "population":
            assert train is not None
            use_population_statistics(model, train)
        elif statistics == "batch":
            for layer in batch_norm_layers(model).values():
                layer.train()
        return _evaluate(model, batches, loss)


def population_statistics(model: Module, train: Batches) -> dict[str, tuple[Any, Any]]:
    """Mean and variance (biased, float64) of what each batch norm receives over all of ``train``.

    These are the statistics of one forward pass with the whole training set as a single batch
    (the limit of Ioffe & Szegedy 2015, algorithm 2), whatever ``train``'s batch size and order: a
    layer's are taken when the layers before it normalise by their own. That is one pass per layer,
    which ends there. "PreciseBN" (Wu & Johnson 2021) takes a single pass in which the layers
    before use batch statistics, and so depends on the batch size. Per-batch (count, mean, M2) are
    merged in float64 by Chan's formula.

    Raises ValueError for an empty ``train``, and for a layer that runs twice in one forward pass or
    keeps no running statistics.
    """
    with _unchanged(model), no_grad():
        model.eval()
        return use_population_statistics(model, train)


def use_population_statistics(model: Module, train: Batches) -> dict[str, tuple[Any, Any]]:
    """Replace the running statistics of ``model`` by the population's; returns them by layer."""
    result = {}
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for name, layer in _in_order_of_use(model, train).items():
            mean, var = _over(model, layer, train)
            with no_grad():
                layer.running_mean.copy_(_like(layer.running_mean, mean))
                layer.running_var.copy_(_like(layer.running_var, var))
            result[name] = mean, var
    finally:
        _set_modes(modes)
    return result


def _evaluate(model: Module, batches: Batches,
              loss: Callable[[Tensor, Tensor], Tensor]) -> Evaluation:
    total, hits, samples = 0.0, 0, 0
    for x, target in batches:
        y = model(x)
        count = len(target.data)
        total += loss(y, target).item() * count
        hits += int(np.count_nonzero(y.data.argmax(1) == target.data))
        samples += count
    if not samples:
        raise ValueError("evaluate: no samples")
    return Evaluation(total / samples, hits / samples, samples)


class _Reached(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


def _in_order_of_use(model: Module, train: Batches) -> dict[str, Any]:
    """The batch-norm layers in the order in which one batch passes through them."""
    layers = batch_norm_layers(model)
    order: list[str] = []
    handles = [layer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
               for name, layer in layers.items()]
    try:
        with no_grad():
            model(_first(train))
    finally:
        for handle in handles:
            handle.remove()
    for name in order:
        if order.count(name) > 1:
            raise ValueError(f"population statistics: batch norm {name!r} runs twice in one "
                             "forward pass, on two different populations")
        if layers[name].running_mean is None:
            raise ValueError(f"population statistics: batch norm {name!r} keeps no running "
                             "statistics (track_running_stats=False)")
    return {name: layers[name] for name in order}


def _over(model: Module, layer: Any, train: Batches) -> tuple[Any, Any]:
    """Mean and biased variance, per channel, of ``layer``'s input over all of ``train``."""
    count, mean, m2 = 0, np.zeros(()), np.zeros(())

    def merge(_: Module, args: tuple[Tensor, ...]) -> None:
        nonlocal count, mean, m2
        x = args[0].data
        axes = (0, *range(2, x.ndim))
        keep = (1, -1) + (1,) * (x.ndim - 2)
        n = x.size // x.shape[1]
        batch_mean = x.mean(axis=axes, dtype=np.float64)
        batch_m2 = np.square(x - batch_mean.reshape(keep)).sum(axis=axes)
        delta, total = batch_mean - mean, count + n
        m2 = m2 + batch_m2 + delta * delta * (count * n / total)
        mean, count = mean + delta * (n / total), total
        raise _Reached

    handle = layer.register_forward_pre_hook(merge)
    try:
        with no_grad():
            for x, *_ in train:
                with suppress(_Reached):
                    model(x)
    finally:
        handle.remove()
    return mean, m2 / count


def _first(train: Batches) -> Tensor:
    for x, *_ in train:
        if len(x.data):
            return x
    raise ValueError("population statistics: the training set is empty")


def _like(tensor: Tensor, values: Any) -> Tensor:
    return Tensor(values.astype(tensor.dtype))


def _set_modes(modes: Iterable[tuple[Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextmanager
def _unchanged(model: Module) -> Iterator[None]:
    """Put modes and batch-norm statistics back as they were, also after an error."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [b for layer in batch_norm_layers(model).values() for b in layer.buffers()]
    saved = [b.data.copy() for b in buffers]
    try:
        yield
    finally:
        _set_modes(modes)
        with no_grad():
            for b, values in zip(buffers, saved):
                b.copy_(Tensor(values))
