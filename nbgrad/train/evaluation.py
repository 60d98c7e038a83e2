"""Accuracy and loss of a model, with a choice of the statistics that its batch norms use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nbgrad.autograd import Tensor, no_grad
from nbgrad.nn import Module
from nbgrad.nn.functional import cross_entropy
from nbgrad.train.metrics import batch_norm_layers
from nbgrad.train.population import unchanged, use_population_statistics, using

__all__ = ["Evaluation", "evaluate"]

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
    ``"running"``: the moving averages of training, as usual at inference;
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
    layers = batch_norm_layers(model).values()
    word = "prediction" if statistics == "batch" else "running"
    words = {layer: word for layer in layers if layer.track_running_stats}
    with unchanged(model), using(words), no_grad():
        model.eval()
        if statistics == "population":
            assert train is not None
            use_population_statistics(model, train)
        return _evaluate(model, batches, loss)


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
