"""Picking, ordering and comparing elements; not ops of their own but ``getitem`` and ``gather``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.ops.indexing import gather, getitem
from nbgrad.ops.shape import _axis, broadcast_to, checked


class Ordered(NamedTuple):
    """What ``sort`` and ``topk`` return."""

    values: Tensor
    indices: Tensor


def masked_select(input: Tensor, mask: Any) -> Tensor:
    """The elements where mask, in row-major order. Broadcasts."""
    mask = checked(mask, "masked_select")
    if mask.dtype != np.bool_:
        raise RuntimeError(f"masked_select: expected BoolTensor for mask, got {mask.dtype}")
    shape = np.broadcast_shapes(input.shape, mask.shape)
    return getitem(broadcast_to(input, shape), broadcast_to(mask, shape))  # type: ignore[no-any-return]


def nonzero(input: Tensor, *, as_tuple: bool = False) -> Any:
    """Indices of what is not 0: (count, ndim), or with ``as_tuple`` one tensor per dim."""
    found = np.nonzero(np.atleast_1d(input.data))
    if as_tuple:
        return tuple(map(as_tensor, found))
    return as_tensor(np.stack(found, 1)[:, :input.ndim])


def narrow(input: Tensor, dim: int, start: int, length: int) -> Tensor:
    """``length`` slices along dim from ``start`` on. A view."""
    axis = _axis(dim, input.ndim, "narrow")
    n = input.shape[axis] if input.ndim else 0
    if not -n <= start <= n:
        raise IndexError(f"narrow: start out of range (expected to be in range of [{-n}, {n}], but "
                         f"got {start})")
    start = start + n if start < 0 else start
    if not 0 <= length <= n - start:
        raise RuntimeError(f"narrow: start ({start}) + length ({length}) exceeds dimension size "
                           f"({n}), or length is negative")
    before = (slice(None),) * axis
    return getitem(input, (*before, slice(start, start + length)))  # type: ignore[no-any-return]


def select(input: Tensor, dim: int, index: int) -> Tensor:
    """The slice number ``index`` along dim, without it. A view."""
    axis = _axis(dim, input.ndim, "select")
    n = input.shape[axis] if input.ndim else 0
    if not -n <= index < n:
        raise IndexError(f"select: index {index} out of range for tensor of size {input.shape} at "
                         f"dimension {axis}")
    return getitem(input, (*(slice(None),) * axis, int(index)))  # type: ignore[no-any-return]


def argsort(input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Tensor:
    """Indices that order x along dim; NaN counts as the largest. Always stable."""
    axis = _axis(dim, input.ndim, "argsort")
    if not input.ndim:
        return as_tensor(np.zeros_like(input.data, np.int64))
    if not descending:
        return as_tensor(np.argsort(input.data, axis, kind="stable"))
    last_first = np.argsort(np.flip(input.data, axis), axis, kind="stable")
    return as_tensor(input.shape[axis] - 1 - np.flip(last_first, axis))


def sort(input: Tensor, dim: int = -1, descending: bool = False, stable: bool = False) -> Ordered:
    """x in order along dim, and where each was.   ∂y goes back there."""
    indices = argsort(input, dim, descending)
    return Ordered(gather(input, dim, indices) if input.ndim else input.clone(), indices)


def topk(input: Tensor, k: int, dim: int = -1, largest: bool = True,
         sorted: bool = True) -> Ordered:
    """The k largest (smallest) along dim, in order, and where they were.   ∂y goes back there."""
    axis = _axis(dim, input.ndim, "topk")
    n = input.shape[axis] if input.ndim else 1
    if not 0 <= k <= n:
        raise RuntimeError(f"topk: selected index k out of range: got k={k} for a dimension of "
                           f"size {n}")
    indices = argsort(input, dim, largest)
    if not input.ndim:
        return Ordered(input.clone(), indices)
    indices = narrow(indices, axis, 0, k)
    return Ordered(gather(input, axis, indices), indices)


def equal(input: Tensor, other: Tensor) -> bool:
    """Whether both have one shape and the same elements."""
    a, b = checked(input, "equal").data, checked(other, "equal").data
    return bool(np.array_equal(a, b))


def allclose(input: Tensor, other: Tensor, rtol: float = 1e-5, atol: float = 1e-8,
             equal_nan: bool = False) -> bool:
    """Whether |input − other| ≤ atol + rtol |other| everywhere. Broadcasts."""
    a, b = checked(input, "allclose").data, checked(other, "allclose").data
    return bool(np.allclose(a, b, rtol, atol, equal_nan))


for _f in (masked_select, nonzero, narrow, select, argsort, sort, topk, equal, allclose):
    setattr(Tensor, _f.__name__, _f)

__all__ = ["allclose", "argsort", "equal", "masked_select", "narrow", "nonzero", "select", "sort",
           "topk"]
