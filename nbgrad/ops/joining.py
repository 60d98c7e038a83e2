"""Tensors put together and taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, op
from nbgrad.ops.indexing import getitem
from nbgrad.ops.shape import _axis, unsqueeze


@op(name="cat", method=False)
def _cat(*xs: Tensor, dim: Any) -> Any:
    ends = np.cumsum([x.shape[dim] for x in xs]).tolist()
    before = (slice(None),) * dim

    def vjp(dy: Tensor) -> list[Tensor]:
        return [getitem(dy, (*before, slice(a, b))) for a, b in zip([0, *ends], ends)]
    return np.concatenate([x.data for x in xs], axis=dim), vjp


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors one after the other along dim; the other sizes must match."""
    xs = [as_tensor(t) for t in tensors]
    if not xs:
        raise ValueError("cat: expected a non-empty list of Tensors")
    axis = _axis(dim, xs[0].ndim, "cat")
    for i, x in enumerate(xs):
        if x.ndim != xs[0].ndim or not x.ndim or any(
                m != n for d, (m, n) in enumerate(zip(x.shape, xs[0].shape)) if d != axis):
            raise RuntimeError(f"cat: Sizes of tensors must match except in dimension {axis}. "
                               f"Expected {xs[0].shape} but got {x.shape} for tensor number {i} in "
                               "the list")
    dtype = np.result_type(*[x.dtype for x in xs])
    return _cat(*[x.to(dtype) for x in xs], dim=axis)  # type: ignore[no-any-return]


concat = cat


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Tensors of one shape along a new dim."""
    xs = [as_tensor(t) for t in tensors]
    if not xs or any(x.shape != xs[0].shape for x in xs):
        raise RuntimeError(f"stack expects a non-empty list of tensors of equal size, got "
                           f"{[x.shape for x in xs]}")
    return cat([unsqueeze(x, dim) for x in xs], dim if dim >= 0 else dim + xs[0].ndim + 1)


def split(tensor: Tensor, split_size_or_sections: int | Sequence[int],
          dim: int = 0) -> tuple[Tensor, ...]:
    """Views of pieces along dim: of one size (the last may be smaller), or of the sizes given."""
    axis = _axis(dim, tensor.ndim, "split")
    n, size = tensor.shape[axis], split_size_or_sections
    if isinstance(size, int):
        if size <= 0:
            raise ValueError(f"split: expected split_size to be positive, got {size}")
        sizes = [min(size, n - a) for a in range(0, n, size)] or [0]
    else:
        sizes = list(size)
        if sum(sizes) != n or min(sizes, default=0) < 0:
            raise ValueError(f"split: sizes {sizes} do not sum to {n}, the size of dim {axis}")
    ends = np.cumsum(sizes).tolist()
    before = (slice(None),) * axis
    return tuple(getitem(tensor, (*before, slice(b - s, b))) for s, b in zip(sizes, ends))


def chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """At most ``chunks`` pieces of equal size along dim; the last may be smaller."""
    if chunks < 1:
        raise ValueError(f"chunk: expects chunks to be greater than 0, got {chunks}")
    n = input.shape[_axis(dim, input.ndim, "chunk")]
    return split(input, max(-(-n // chunks), 1), dim)


def unbind(input: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    """The slices along dim, each without it."""
    axis = _axis(dim, input.ndim, "unbind")
    return tuple(getitem(input, (*(slice(None),) * axis, i)) for i in range(input.shape[axis]))


for _f in (split, chunk, unbind):
    setattr(Tensor, _f.__name__, _f)

__all__ = ["cat", "chunk", "concat", "split", "stack", "unbind"]
