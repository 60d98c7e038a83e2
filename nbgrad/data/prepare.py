"""From raw arrays to what a network is given: scaling, fixed splits, standardisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nbgrad.autograd import as_tensor
from nbgrad.data.dataset import Dataset, TensorDataset, gather
from nbgrad.data.files import DataError, Path_

_ROWS = 1024  # rows standardised at a time: the float64 copies stay at 25 MB for CIFAR-10


def scaled(x: npt.NDArray[np.uint8], top: int) -> npt.NDArray[np.float32]:
    """x / top as float32, the quotient rounded once."""
    return np.divide(x, np.float32(top), dtype=np.float32)


def check_labels(labels: npt.NDArray[Any], classes: int, path: Path_) -> None:
    """Raises DataError if a label is not in 0..classes − 1."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(path, f"label {labels[at]} at {at} is not in 0..{classes - 1}")


def every_fifth(labels: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of an 80/20 split: sorted by label (stably), every fifth row is "test".

    Classes are balanced to within one row. No random numbers, so the split is the same with every
    NumPy version. Rows are ascending.
    """
    test = np.sort(np.argsort(labels, kind="stable")[::5])
    train = np.setdiff1d(np.arange(len(labels)), test)
    return {"train": train.astype(np.int64), "test": test.astype(np.int64)}


def standardize(train: Dataset, test: Dataset) -> tuple[TensorDataset, TensorDataset]:
    """x̂ = (x − mean) / std per channel (axis 1) of the first tensor, statistics of `train` only.

    Both are TensorDatasets or Subsets of one; the results are new and the other tensors shared.
    Statistics and the quotient are float64, std is biased (divides by the count). A channel that is
    constant in `train` is only shifted: its std counts as 1.

    Raises:
        TypeError: a dataset that does not hold tensors, or images that are not floating point.
        ValueError: no samples, no channel axis, other channels in `test`, or NaN or infinity in
            `train`.
    """
    (x, *rest), (x_test, *rest_test) = _tensors(train), _tensors(test)
    if x_test.shape[1:2] != x.shape[1:2]:
        raise ValueError(f"standardize: train images are {x.shape}, test images {x_test.shape}")
    mean, std = _statistics(x.data)
    return (
        TensorDataset(as_tensor(_normalized(x.data, mean, std)), *rest),
        TensorDataset(as_tensor(_normalized(x_test.data, mean, std)), *rest_test),
    )


def channel_statistics(
    train: Dataset,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The (mean, std) that `standardize` uses, float64 (C,) each; std is 1 for a constant channel.

    Raises what `standardize` raises for `train`.
    """
    mean, std = _statistics(_tensors(train)[0].data)
    return mean.ravel(), std.ravel()


def _tensors(dataset: Dataset) -> tuple[Any, ...]:
    if type(dataset) is TensorDataset:
        whole: tuple[Any, ...] | None = dataset.tensors
    else:
        whole = gather(dataset, np.arange(len(dataset)))
    if whole is None:
        kind = type(dataset).__name__
        raise TypeError(f"standardize: needs a TensorDataset or a Subset of one, got {kind}")
    if not np.issubdtype(whole[0].dtype, np.floating):
        raise TypeError(f"standardize: images must be floating point, got {whole[0].dtype}")
    return whole


def _statistics(x: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if x.ndim < 2 or not x.size:
        raise ValueError(f"standardize: train images must be (N, C, ...), not empty, got {x.shape}")
    axes = (0, *range(2, x.ndim))
    low, high = x.min(axis=axes, keepdims=True), x.max(axis=axes, keepdims=True)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("standardize: train images hold NaN or infinity")
    count = x.size // x.shape[1]
    mean = x.sum(axis=axes, keepdims=True, dtype=np.float64) / count
    # equality, not a threshold on std: the sum of equal numbers rounds, so their std need not be 0
    constant = low == high
    mean = np.where(constant, low, mean)
    squares = np.zeros_like(mean)
    for rows in _chunks(x):
        squares += np.square(rows - mean).sum(axis=axes, keepdims=True)
    return mean, np.where(constant, 1.0, np.sqrt(squares / count))


def _normalized(
    x: npt.NDArray[Any], mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]
) -> npt.NDArray[Any]:
    y = np.empty(x.shape, x.dtype)
    for rows, out in zip(_chunks(x), _chunks(y)):
        out[...] = (rows - mean) / std
    return y


def _chunks(x: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    return [x[at : at + _ROWS] for at in range(0, len(x), _ROWS)]
