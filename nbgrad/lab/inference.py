"""What batch norms use at inference against what they would need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbgrad.nn import BatchNorm1d, Linear, Module
from nbgrad.ops import Moments, randn
from nbgrad.train.doctor.examination import distance, with_and_without_dropout
from nbgrad.train.metrics import batch_norm_layers
from nbgrad.train.population import generators_unchanged, population_statistics

__all__ = ["PopulationGap", "VarianceShift", "population_vs_running", "variance_shift"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class VarianceShift:
    """One batch norm; arrays by channel."""

    layer: str
    training: Array                     # variance of its inputs with dropout
    evaluation: Array                   # without
    running: Array | None               # what it divides by at inference

    @property
    def ratio(self) -> float:
        """Median over channels of evaluation / training variance; 1 without dropout before it."""
        with np.errstate(all="ignore"):
            ratios = self.evaluation / self.training
        ratios = ratios[np.isfinite(ratios)]
        return float(np.median(ratios)) if ratios.size else float("nan")


def variance_shift(model: Module, loader: Iterable[Any] | None = None) -> list[VarianceShift]:
    """For each batch norm, how much dropout before it changes the variance of its inputs between
    training and evaluation.      Li et al. 2018, "Understanding the disharmony"

    Inverted dropout that keeps a share p of values of mean 0 makes their variance 1/p times as
    large in training, which the running variance learns and evaluation does not have: ratio = p.

    loader: batches (of which the first part is the model's input); default: 4,096 normal inputs, if
    the first layer tells their size (Linear, a BatchNorm1d). Layers before normalize by the batch
    in both passes, so that dropout alone makes the difference. The model is left as it was. Raises
    ValueError without samples, for an iterator, and where the inputs' size is not known.

    >>> from nbgrad import nn
    >>> model = nn.Sequential(nn.Linear(20, 30), nn.Dropout(0.5), nn.BatchNorm1d(30))
    >>> 0.45 < variance_shift(model)[0].ratio < 0.7     # 0.5, but for the bias, which is no noise
    True
    """
    with generators_unchanged():
        seen = with_and_without_dropout(model, _normal(model) if loader is None else loader)
    found = []
    for layer in seen:
        if layer.inputs:
            running = None if layer.running is None else layer.running[1]
            found.append(VarianceShift(layer.name, _all(layer.inputs).var(),
                                       _all(layer.quiet).var(), running))
    return found


def _all(parts: list[Moments]) -> Moments:
    first, *others = parts
    return first.merge(*others)


def _normal(model: Module) -> list[Any]:
    for module in model.modules():
        size = (module.in_features if isinstance(module, Linear) else
                module.num_features if isinstance(module, BatchNorm1d) else None)
        if size is not None:
            return [randn(1024, size, dtype=next(model.parameters()).dtype) for _ in range(4)]
        if any(True for _ in module.parameters(recurse=False)):
            break
    raise ValueError("variance_shift: the size of the inputs is not known: pass a loader")


@dataclass(frozen=True)
class PopulationGap:
    """One batch norm: statistics by channel, and how far apart they are."""

    layer: str
    running_mean: Array
    running_var: Array
    mean: Array                         # of the data
    var: Array
    distance: Array                     # see ``population_vs_running``

    @property
    def typical(self) -> float:
        """Root mean square of ``distance`` over channels."""
        return float(np.sqrt(np.mean(self.distance ** 2)))


def population_vs_running(model: Module, loader: Iterable[Any]) -> list[PopulationGap]:
    """For each batch norm, its running statistics beside those of all of ``loader``.

    distance: per channel, the root mean square over the data of (x − m)/σ − (x − m')/σ', m, σ
    running and m', σ' of the data: what normalizing by the running statistics changes, in standard
    deviations of the output. The data's statistics are ``nbgrad.train.population_statistics``
    (Wu & Johnson 2021 compare the two). The model is left as it was. Raises what that raises.

    >>> import nbgrad
    >>> from nbgrad import nn
    >>> gap, = population_vs_running(nn.Sequential(nn.BatchNorm1d(1, eps=0)),
    ...                              [nbgrad.tensor([[2.0], [4.0]])])
    >>> gap.mean.tolist(), gap.distance.tolist()
    ([3.0], [3.0])
    """
    with generators_unchanged(loader):
        found = population_statistics(model, loader)
    gaps = []
    for name, layer in batch_norm_layers(model).items():
        if name in found:
            mean, var = found[name]
            now = layer.running_mean.data.astype(float), layer.running_var.data.astype(float)
            ones = np.ones_like(mean)
            gaps.append(PopulationGap(name, *now, mean, var, distance(
                *now, Moments(ones, mean, var), layer.eps)))
    return gaps
