"""Datasets: anything with a length and samples by index."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.ops.random import Generator, randperm


class Dataset(Protocol):
    """What a DataLoader reads: `len(dataset)` samples, `dataset[i]` for 0 ≤ i < len(dataset).

    A list will do; so will a subclass with these two methods. `__getitem__` is called from several
    threads at once where the loader has workers; for results that repeat, it must depend on the
    index alone.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int, /) -> Any: ...


class TensorDataset(Dataset):
    """Samples are the rows of tensors: `dataset[i] == (tensors[0][i], tensors[1][i], ...)`.

    NumPy arrays are taken as tensors that share their memory.

    Raises:
        ValueError: no tensors, a 0-d tensor, or first dimensions that differ.

    >>> import numpy as np
    >>> x, y = TensorDataset(np.arange(6.0).reshape(3, 2), np.array([7, 8, 9]))[1]
    >>> x.tolist(), y.item()
    ([2.0, 3.0], 8)
    """

    def __init__(self, *tensors: Tensor | npt.NDArray[Any]) -> None:
        self.tensors = tuple(t if isinstance(t, Tensor) else as_tensor(t) for t in tensors)
        shapes = [tuple(t.shape) for t in self.tensors]
        if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
            raise ValueError(f"TensorDataset: Size mismatch between tensors: got shapes {shapes}")

    def __len__(self) -> int:
        return int(self.tensors[0].shape[0])

    def __getitem__(self, index: Any, /) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)


class Subset(Dataset):
    """The samples of `dataset` at `indices`, in that order.

    Raises:
        TypeError: indices that are not integers in one dimension.
        IndexError: an index outside the dataset.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int] | npt.NDArray[np.integer]) -> None:
        rows = np.asarray(indices)
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            kind = f"{rows.dtype} {rows.shape}"
            raise TypeError(f"Subset: indices must be integers in one dimension, got {kind}")
        wrong = rows[(rows < -len(dataset)) | (rows >= len(dataset))]
        if wrong.size:
            raise IndexError(f"Subset: index {wrong[0]} is not in a dataset of {len(dataset)}")
        self.dataset = dataset
        self.indices = rows.astype(np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any, /) -> Any:
        rows = self.indices[index]
        return self.dataset[int(rows) if rows.ndim == 0 else rows]


def gather(dataset: Dataset, rows: npt.NDArray[np.int64]) -> tuple[Tensor, ...] | None:
    """The rows of a TensorDataset, also through Subsets, with one copy per tensor; else None."""
    while type(dataset) is Subset:  # not a subclass: it may have a __getitem__ of its own
        rows = dataset.indices[rows]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or any(t.requires_grad for t in dataset.tensors):
        return None
    return tuple(as_tensor(_rows(t.data, rows)) for t in dataset.tensors)


def _rows(x: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    # take beats x[rows] (by 3 times for rows of 256 bytes), but first copies all of a strided x
    return x.take(rows, axis=0) if x.flags.c_contiguous else x[rows]


def random_split(
    dataset: Dataset, lengths: Sequence[int | float], generator: Generator | None = None
) -> list[Subset]:
    """Disjoint random Subsets of the given lengths, or of fractions that sum to 1.

    Fractions are rounded down and what is left over is dealt out one by one from the first on, as
    in PyTorch. Draws one permutation from `generator` (default: nbgrad.default_generator).

    Raises:
        ValueError: lengths that do not sum to len(dataset), a fraction outside 0..1.
    """
    counts = _counts(lengths, len(dataset))
    for i, count in enumerate(counts):
        if count == 0:
            message = f"Length of split at index {i} is 0. This might result in an empty dataset."
            warnings.warn(message, stacklevel=2)
    order = randperm(len(dataset), generator=generator).data
    ends = np.cumsum(counts)
    return [Subset(dataset, order[end - count : end]) for end, count in zip(ends, counts)]


def _counts(lengths: Sequence[int | float], total: int) -> list[int]:
    if math.isclose(sum(lengths), 1):
        for i, fraction in enumerate(lengths):
            if not 0 <= fraction <= 1:
                raise ValueError(f"random_split: Fraction at index {i} is not between 0 and 1")
        counts = [math.floor(total * fraction) for fraction in lengths]
        for i in range(total - sum(counts)):
            counts[i % len(counts)] += 1
        return counts
    whole = [int(n) for n in lengths]
    if whole != list(lengths) or sum(whole) != total or min(whole, default=0) < 0:
        raise ValueError(
            "random_split: Sum of input lengths does not equal the length of the input dataset! "
            f"got {list(lengths)} for {total} samples"
        )
    return whole
