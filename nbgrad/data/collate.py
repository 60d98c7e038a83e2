"""A list of samples becomes a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.ops import stack


def default_collate(batch: Sequence[Any]) -> Any:
    """Samples of one structure, stacked along a new first axis; the rules are PyTorch's.

    Tensors and arrays are stacked, numbers become a tensor (int64, float64, bool), strings and
    bytes stay as they are, tuples and lists become a list of batches, mappings a dict of batches.

    Raises:
        TypeError: a sample of another type, naming it.
        ValueError: samples whose shapes or lengths differ.

    >>> x, names = default_collate([(1.5, "a"), (2.5, "b")])
    >>> x.tolist(), names
    ([1.5, 2.5], ('a', 'b'))
    """
    first = batch[0]
    if isinstance(first, Tensor):
        return _stacked(batch)
    if isinstance(first, (np.ndarray, np.generic, bool, int, float)):
        _check_shapes([np.shape(sample) for sample in batch])
        return as_tensor(np.stack([np.asarray(sample) for sample in batch]))
    if isinstance(first, (str, bytes)):
        return batch
    if isinstance(first, Mapping):
        return {key: default_collate([sample[key] for sample in batch]) for key in first}
    if isinstance(first, Sequence):
        if len({len(sample) for sample in batch}) > 1:
            raise ValueError("default_collate: each element in a batch should be of equal size")
        columns = [default_collate(column) for column in zip(*batch)]
        return type(first)(*columns) if hasattr(first, "_fields") else columns
    raise TypeError(
        "default_collate: batch must contain tensors, numpy arrays, numbers, dicts or lists; "
        f"found {type(first).__name__}"
    )


def pinned(batch: Any) -> Any:
    """The batch with its tensors, and what else has ``pin_memory()``, in pinned memory."""
    if hasattr(batch, "pin_memory"):
        return batch.pin_memory()
    if isinstance(batch, Mapping):
        return {key: pinned(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        columns = map(pinned, batch)
        return type(batch)(*columns) if hasattr(batch, "_fields") else type(batch)(columns)
    return batch


def _stacked(batch: Sequence[Tensor]) -> Tensor:
    _check_shapes([tuple(sample.shape) for sample in batch])
    if any(sample.requires_grad for sample in batch):
        return stack(list(batch))
    return as_tensor(np.stack([sample.data for sample in batch]))


def _check_shapes(shapes: list[tuple[int, ...]]) -> None:
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                "default_collate: stack expects each tensor to be equal size, "
                f"but got {shapes[0]} at entry 0 and {shape} at entry {i}"
            )
