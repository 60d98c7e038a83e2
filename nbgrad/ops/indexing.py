"""Indexing ops, and what is made of them: padding, flipping, triangles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.autograd import OPS, Tensor, as_tensor, op
from nbgrad.backend import add_at, check_index, full, move
from nbgrad.ops.shape import _axis, _ints, flatten, reshape


def _index(index: Any) -> Any:
    """Tensors in an index as arrays."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    if isinstance(index, list):
        return np.asarray(index, None if index else np.int64)
    return index.data if isinstance(index, Tensor) else index


def _is_basic(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is None or p is Ellipsis or
               (isinstance(p, (int, slice, np.integer)) and not isinstance(p, bool)) for p in parts)


@op(view=True, method=False)
def getitem(x: Tensor, /, index: Any) -> Any:
    """y = x[index], by NumPy's rules.   ∂x = ∂y added there. A view for slices and integers.

    Raises IndexError for an index out of range, on a GPU only for slices, integers and arrays of
    the host: those of the device wrap around, unless NBGRAD_CUDA_DEBUG is set.
    """
    index, shape = _index(index), x.shape
    try:
        check_index(x.data, index)
        y = x.data[index]
    except IndexError as e:
        raise IndexError(f"getitem: {e}, for a tensor of shape {shape}") from None
    return y, (lambda dy: index_add(dy, index=index, shape=shape),)


def _full_in_order(shape: Sequence[int], value: Any, like: Any) -> Any:
    """An array of one value with like's axes in like's order in memory, where it has as many: a
    gradient or residual in another order costs a strided pass wherever the two meet."""
    if like.ndim != len(shape):
        return full(shape, value, like.dtype, like)
    order = sorted(range(like.ndim), key=lambda i: -abs(like.strides[i]))
    return full([shape[i] for i in order], value, like.dtype, like).transpose(
        [order.index(i) for i in range(like.ndim)])


@op(method=False)
def index_add(dy: Tensor, /, index: Any, shape: tuple[int, ...]) -> Any:
    """x = 0 with x[index] += dy: what getitem's gradient is.   ∂dy = ∂x[index]."""
    x = _full_in_order(shape, 0, dy.data)
    if _is_basic(index):
        x[index] = dy.data
    else:
        add_at(x, index, dy.data)
    return x, (lambda dx: getitem(dx, index=index),)


@op(method=False)
def index_put(x: Tensor, value: Tensor, /, index: Any) -> Any:
    """y = x with y[index] = value.   ∂x is 0 there, ∂value = ∂y[index]; indices must not repeat."""
    index = _index(index)
    check_index(x.data, index)
    y = x.data.copy(order="K")
    y[index] = value.data

    def dx(dy: Tensor) -> Tensor:
        keep = full(dy.shape, True, bool, dy.data)
        keep[index] = False
        return OPS["mask"](dy, keep=keep)  # type: ignore[no-any-return]
    return y, (dx, lambda dy: getitem(dy, index=index))


def index_select(input: Tensor, dim: int, index: Any) -> Tensor:
    """The slices of x along dim that the 1-d index names."""
    index = as_tensor(index)
    if index.ndim > 1 or index.dtype.kind not in "iu":
        raise IndexError("index_select(): Index is supposed to be a vector of integers, got "
                         f"{index.ndim} dims of {index.dtype}")
    axis = _axis(dim, input.ndim, "index_select")
    return getitem(input, (*(slice(None),) * axis, index.data.reshape(-1)))  # type: ignore[no-any-return]


def _grid(index: Any, axis: int) -> tuple[Any, ...]:
    """Index arrays that pick, at every position of ``index``, that entry along ``axis``."""
    grid = list(np.ogrid[tuple(map(slice, index.shape))])
    grid[axis] = index
    return tuple(grid)


def gather(input: Tensor, dim: int, index: Any) -> Tensor:
    """y[i, j, k] = x[index[i, j, k], j, k] for dim 0, and so on.   ∂x = ∂y added there."""
    index, axis = as_tensor(index), _axis(dim, input.ndim, "gather")
    sizes = enumerate(zip(index.shape, input.shape))
    if index.ndim != input.ndim or any(m > n for d, (m, n) in sizes if d != axis):
        raise RuntimeError(f"gather(): Expected index {index.shape} to be no larger than self "
                           f"{input.shape} apart from dimension {axis}")
    if index.dtype.kind not in "iu":
        raise IndexError(f"gather(): Expected an integer index, got {index.dtype}")
    n = input.shape[axis]
    if index.data.size and not (index.data.min() >= 0 and index.data.max() < n):
        raise IndexError(f"gather(): index out of bounds for dimension {axis} with size {n}")
    return getitem(input, _grid(index.data, axis))  # type: ignore[no-any-return]


def flip(input: Tensor, dims: Any) -> Tensor:
    """Reversed along dims."""
    axes = {_axis(d, input.ndim, "flip") for d in _ints((dims,))}
    back, whole = slice(None, None, -1), slice(None)
    return getitem(input, tuple(back if i in axes else whole for i in range(input.ndim)))  # type: ignore[no-any-return]


def roll(input: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    """Moved by ``shifts`` along dims; what leaves at one end enters at the other. Without dims,
    in row-major order."""
    if dims is None:
        return reshape(roll(flatten(input), shifts, 0), input.shape)
    steps, axes = _ints((shifts,)), [_axis(d, input.ndim, "roll") for d in _ints((dims,))]
    if len(steps) != len(axes):
        raise ValueError(f"roll: shifts and dims must align, got {steps} and {_ints((dims,))}")
    for step, axis in zip(steps, axes):
        input = index_select(input, axis, np.roll(np.arange(input.shape[axis]), step))
    return input


@op(name="pad", method=False)
def _pad(x: Tensor, /, widths: Any, value: Any) -> Any:
    inner = tuple(slice(a, a + n) for (a, _), n in zip(widths, x.shape))
    y = _full_in_order([a + n + b for (a, b), n in zip(widths, x.shape)], value, x.data)
    y[inner] = x.data
    return y, (lambda dy: getitem(dy, inner),)


PAD_MODES = ("constant", "reflect", "replicate", "circular")


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """x with ``pad = (left, right, top, bottom, …)`` added from the last dim on.

    mode: "constant" adds ``value``, and negative widths crop; "reflect" mirrors at the outermost
    element, "replicate" repeats that, "circular" goes on at the other end. Raises ValueError for
    other modes and for widths below 0 in these three, RuntimeError where a dim is too small.
    """
    if mode not in PAD_MODES:
        raise ValueError(f"pad: expected mode to be one of {', '.join(PAD_MODES)}, got {mode!r}")
    if len(pad) % 2 or len(pad) > 2 * input.ndim:
        raise ValueError(f"pad: expected an even number of widths, at most {2 * input.ndim}, got "
                         f"{len(pad)}")
    widths = [(0, 0)] * input.ndim
    for i in range(len(pad) // 2):
        widths[input.ndim - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    if mode != "constant":
        for axis, (before, after) in enumerate(widths):
            input = _continued(input, axis, before, after, mode)
        return input
    crop = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, input.shape))
    y = input if min(pad, default=0) >= 0 else getitem(input, crop)
    if any(max(-a, 0) + max(-b, 0) > n for (a, b), n in zip(widths, input.shape)):
        raise RuntimeError(f"pad: {tuple(pad)} crops more than there is of shape {input.shape}")
    return _pad(y, widths=tuple((max(a, 0), max(b, 0)) for a, b in widths), value=value)  # type: ignore[no-any-return]


def _continued(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """x with its own elements added before and after along one axis."""
    from nbgrad.ops.joining import cat

    def part(start: int, stop: int) -> Tensor:
        return getitem(x, (*(slice(None),) * axis, slice(start, stop)))  # type: ignore[no-any-return]

    def repeated(start: int, times: int) -> Tensor:
        shape = (*x.shape[:axis], times, *x.shape[axis + 1:])
        return OPS["broadcast_to"](part(start, start + 1), shape=shape)  # type: ignore[no-any-return]
    if not before and not after:
        return x
    n = x.shape[axis]
    if min(before, after) < 0:
        raise ValueError(f"pad: mode {mode!r} takes no negative widths, got {(before, after)}")
    if max(before, after) > {"reflect": n - 1, "circular": n}.get(mode, math.inf if n else 0):
        raise RuntimeError(f"pad: widths {(before, after)} of mode {mode!r} are too large for dim "
                           f"{axis} of size {n}")
    if mode == "reflect":
        first, last = flip(part(1, before + 1), axis), flip(part(n - 1 - after, n - 1), axis)
    elif mode == "circular":
        first, last = part(n - before, n), part(0, after)
    else:
        first, last = repeated(0, before), repeated(n - 1, after)
    return cat([first, x, last], axis)


def masked_fill(input: Tensor, mask: Any, value: Any) -> Tensor:
    """x with ``value`` where mask."""
    from nbgrad.ops.elementwise import where

    mask = as_tensor(mask)
    if mask.dtype != np.bool_:
        raise RuntimeError("masked_fill only supports boolean masks, but got mask with dtype "
                           f"{mask.dtype}")
    return where(mask, value, input)  # type: ignore[no-any-return]


def _triangle(x: Tensor, diagonal: int) -> Any:
    """Where the lower triangle is."""
    if x.ndim < 2:
        raise RuntimeError("tril, triu: input tensor must have at least 2 dimensions, got "
                           f"{x.ndim}")
    rows, columns = x.shape[-2:]
    return np.broadcast_to(move(np.tri(rows, columns, diagonal, dtype=bool), x.device), x.shape)


def tril(input: Tensor, diagonal: int = 0) -> Tensor:
    """The lower triangle of the last two dims, 0 elsewhere."""
    return OPS["mask"](input, keep=_triangle(input, diagonal))  # type: ignore[no-any-return]


def triu(input: Tensor, diagonal: int = 0) -> Tensor:
    """The upper triangle of the last two dims, 0 elsewhere."""
    return OPS["mask"](input, keep=~_triangle(input, diagonal - 1))  # type: ignore[no-any-return]


for _f in (index_select, gather, flip, roll, masked_fill, tril, triu):
    setattr(Tensor, _f.__name__, _f)

__all__ = ["flip", "gather", "index_select", "masked_fill", "pad", "roll", "tril", "triu"]
