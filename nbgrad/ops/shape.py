"""Shape and indexing ops. Views share memory and a version counter with their input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.autograd import OPS, Tensor, _constant, as_tensor, op


def checked(x: Any, name: str) -> Tensor:
    """x as a Tensor. Raises TypeError for what is none, and no array or number."""
    return x if isinstance(x, Tensor) else _constant(x, None, name)


def _axis(dim: Any, ndim: int, name: str) -> int:
    """``dim`` counted from 0. Raises TypeError unless it is an integer, IndexError out of range."""
    if not isinstance(dim, (int, np.integer)):
        raise TypeError(f"{name}: expected one dim, an integer, got {dim!r}")
    rank = max(ndim, 1)
    if not -rank <= dim < rank:
        raise IndexError(f"{name}: Dimension out of range (expected to be in range of "
                         f"[{-rank}, {rank - 1}], but got {dim})")
    return int(dim) % rank


def _ints(args: Any) -> tuple[int, ...]:
    """Sizes or dims given one by one or as one sequence."""
    if len(args) == 1 and not isinstance(args[0], (int, np.integer)):
        args = args[0]
    return tuple(int(a) for a in args)


@op(view=True, method=False)
def alias(x: Tensor, /) -> Any:
    """y = x: another name for the same value in the graph.   ∂x = ∂y."""
    return x.data, (lambda dy: dy,)


@op
def clone(x: Tensor, /) -> Any:
    """y = a copy of x.   ∂x = ∂y."""
    return x.data.copy(order="K"), (lambda dy: dy,)


@op(method=False)
def cast(x: Tensor, /, dtype: Any) -> Any:
    """y = x in another dtype.   ∂x = ∂y in x's dtype; not differentiated into integers."""
    before = x.dtype
    smooth = np.dtype(dtype).kind == "f" == before.kind
    vjp = (lambda dy: cast(dy, dtype=before),) if smooth else None
    with np.errstate(all="ignore"):
        return x.data.astype(dtype), vjp


@op(name="reshape", view=True, method=False)
def _reshape(x: Tensor, /, shape: tuple[int, ...]) -> Any:
    before = x.shape
    return x.data.reshape(shape), (lambda dy: _reshape(dy, shape=before),)


def reshape(input: Tensor, *shape: Any) -> Tensor:
    """y = x's elements in row-major order in another shape; one size may be −1. A view where it
    can be."""
    sizes = _ints(shape)
    known = math.prod(s for s in sizes if s != -1)
    n = input.data.size
    if sizes.count(-1) > 1 or any(s < -1 for s in sizes):
        raise ValueError(f"reshape: invalid shape {sizes}: sizes are >= 0, and at most one is -1")
    if (n != known) if -1 not in sizes else (known == 0 or n % known):
        raise RuntimeError(f"shape '{list(sizes)}' is invalid for input of size {n}")
    return _reshape(input, shape=sizes)  # type: ignore[no-any-return]


def view(input: Tensor, *shape: Any) -> Tensor:
    """``reshape`` that raises RuntimeError where it would have to copy."""
    y = reshape(input, *shape)
    if input.data.size and not np.shares_memory(input.data, y.data):
        raise RuntimeError("view size is not compatible with input tensor's size and stride (at "
                           "least one dimension spans across two contiguous subspaces). Use "
                           ".reshape(...) instead.")
    return y


def flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """The dims from start to end as one."""
    if not input.ndim:
        return reshape(input, (1,))
    a, b = _axis(start_dim, input.ndim, "flatten"), _axis(end_dim, input.ndim, "flatten")
    if a > b:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    n = math.prod(input.shape[a:b + 1])
    return reshape(input, input.shape[:a] + (n,) + input.shape[b + 1:])


@op(name="permute", view=True, method=False)
def _permute(x: Tensor, /, dims: Any) -> Any:
    back = tuple(np.argsort(dims))
    return x.data.transpose(dims), (lambda dy: _permute(dy, dims=back),)


def permute(input: Tensor, *dims: Any) -> Tensor:
    """y[i_{d0}, i_{d1}, …] with the dims in another order. A view."""
    order = tuple(_axis(d, input.ndim, "permute") for d in _ints(dims))
    if sorted(order) != list(range(input.ndim)):
        raise RuntimeError(f"permute: expected each of {input.ndim} dims once, got {_ints(dims)}")
    return _permute(input, dims=order)  # type: ignore[no-any-return]


@op(view=True)
def transpose(x: Tensor, /, dim0: int, dim1: int) -> Any:
    """Two dims exchanged. A view."""
    a, b = _axis(dim0, x.ndim, "transpose"), _axis(dim1, x.ndim, "transpose")
    return (x.data.swapaxes(a, b) if x.ndim else x.data), (lambda dy: transpose(dy, a, b),)


def t(input: Tensor) -> Tensor:
    """A matrix transposed; a vector or number as it is. A view."""
    if input.ndim > 2:
        raise RuntimeError("t() expects a tensor with <= 2 dimensions, but self is "
                           f"{input.ndim}D")
    return transpose(input, 0, 1) if input.ndim == 2 else OPS["alias"](input)  # type: ignore[no-any-return]


def mT(x: Tensor) -> Tensor:
    """The last two dims exchanged."""
    return transpose(x, -2, -1)  # type: ignore[no-any-return]


def squeeze(input: Tensor, dim: Any = None) -> Tensor:
    """Without its dims of size 1: all, or those named."""
    named = range(input.ndim) if dim is None else _ints((dim,))
    dims = [_axis(d, input.ndim, "squeeze") for d in named]
    return reshape(input, tuple(n for i, n in enumerate(input.shape) if n != 1 or i not in dims))


def unsqueeze(input: Tensor, dim: int) -> Tensor:
    """With a dim of size 1 at ``dim``."""
    at = _axis(dim, input.ndim + 1, "unsqueeze")
    return reshape(input, input.shape[:at] + (1,) + input.shape[at:])


@op(name="broadcast_to", view=True, method=False)
def _broadcast_to(x: Tensor, /, shape: tuple[int, ...]) -> Any:
    before = x.shape
    try:
        y = np.broadcast_to(x.data, shape)
    except ValueError:
        raise RuntimeError(f"expand: the size {before} cannot be expanded to {shape}: sizes must "
                           "match or be 1") from None
    return y, (lambda dy: OPS["sum_to"](dy, shape=before),)


def broadcast_to(input: Tensor, shape: Any) -> Tensor:
    """y = x repeated along dims of size 1 and new leading dims, without a copy (read-only)."""
    return _broadcast_to(input, shape=tuple(shape))  # type: ignore[no-any-return]


def expand(input: Tensor, *sizes: Any) -> Tensor:
    """``broadcast_to``; −1 keeps a size."""
    shape = _ints(sizes)
    lead = len(shape) - input.ndim
    return broadcast_to(input, tuple(input.shape[i - lead] if s == -1 and i >= lead else s
                                 for i, s in enumerate(shape)))


def expand_as(self: Tensor, other: Tensor) -> Tensor:
    """``expand`` to other's shape."""
    return expand(self, other.shape)


def view_as(self: Tensor, other: Tensor) -> Tensor:
    """``view`` in other's shape."""
    return view(self, other.shape)


def type_as(self: Tensor, other: Tensor) -> Tensor:
    """This tensor in other's dtype."""
    return self.to(other.dtype)


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


# ----------------------------------------------------------------------------------------- indexing

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
    """y = x[index], by NumPy's rules.   ∂x = ∂y added there. A view for slices and integers."""
    index, shape = _index(index), x.shape
    try:
        y = x.data[index]
    except IndexError as e:
        raise IndexError(f"getitem: {e}, for a tensor of shape {shape}") from None
    return y, (lambda dy: index_add(dy, index=index, shape=shape),)


@op(method=False)
def index_add(dy: Tensor, /, index: Any, shape: tuple[int, ...]) -> Any:
    """x = 0 with x[index] += dy: what getitem's gradient is.   ∂dy = ∂x[index]."""
    x = np.zeros(shape, dy.dtype)
    if _is_basic(index):
        x[index] = dy.data
    else:
        np.add.at(x, index, dy.data)
    return x, (lambda dx: getitem(dx, index=index),)


@op(method=False)
def index_put(x: Tensor, value: Tensor, /, index: Any) -> Any:
    """y = x with y[index] = value.   ∂x is 0 there, ∂value = ∂y[index]; indices must not repeat."""
    index = _index(index)
    y = x.data.copy(order="K")
    y[index] = value.data

    def dx(dy: Tensor) -> Tensor:
        keep = np.ones(dy.shape, bool)
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


def repeat(input: Tensor, *sizes: Any) -> Tensor:
    """x tiled so many times along each dim."""
    times = _ints(sizes)
    if min(times, default=0) < 0:
        raise ValueError(f"repeat: expected sizes >= 0, got {times}")
    if len(times) < input.ndim:
        raise RuntimeError("Number of dimensions of repeat dims can not be smaller than number of "
                           "dimensions of tensor")
    shape = (1,) * (len(times) - input.ndim) + input.shape
    pairs = [k for r, n in zip(times, shape) for k in (r, n)]
    ones = [k for n in shape for k in (1, n)]
    tiled = broadcast_to(reshape(input, ones), pairs)
    return reshape(tiled, tuple(r * n for r, n in zip(times, shape)))


@op(name="pad", method=False)
def _pad(x: Tensor, /, widths: Any, value: Any) -> Any:
    inner = tuple(slice(a, a + n) for (a, _), n in zip(widths, x.shape))
    return np.pad(x.data, widths, constant_values=value), (lambda dy: getitem(dy, inner),)


def pad(input: Tensor, pad: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """x with ``pad = (left, right, top, bottom, …)`` added from the last dim on; negative ones
    crop."""
    if mode != "constant":
        raise ValueError(f"pad: only mode 'constant' is there, got {mode!r}")
    if len(pad) % 2 or len(pad) > 2 * input.ndim:
        raise ValueError(f"pad: expected an even number of widths, at most {2 * input.ndim}, got "
                         f"{len(pad)}")
    widths = [(0, 0)] * input.ndim
    for i in range(len(pad) // 2):
        widths[input.ndim - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    crop = tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(widths, input.shape))
    y = input if min(pad, default=0) >= 0 else getitem(input, crop)
    if any(max(-a, 0) + max(-b, 0) > n for (a, b), n in zip(widths, input.shape)):
        raise RuntimeError(f"pad: {tuple(pad)} crops more than there is of shape {input.shape}")
    return _pad(y, widths=tuple((max(a, 0), max(b, 0)) for a, b in widths), value=value)  # type: ignore[no-any-return]


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
    return np.broadcast_to(np.tri(rows, columns, diagonal, dtype=bool), x.shape)


def tril(input: Tensor, diagonal: int = 0) -> Tensor:
    """The lower triangle of the last two dims, 0 elsewhere."""
    return OPS["mask"](input, keep=_triangle(input, diagonal))  # type: ignore[no-any-return]


def triu(input: Tensor, diagonal: int = 0) -> Tensor:
    """The upper triangle of the last two dims, 0 elsewhere."""
    return OPS["mask"](input, keep=~_triangle(input, diagonal - 1))  # type: ignore[no-any-return]


def contiguous(input: Tensor) -> Tensor:
    """x in row-major memory."""
    return input if input.data.flags.c_contiguous else OPS["contiguous"](input)


@op(name="contiguous", method=False)
def _contiguous(x: Tensor, /) -> Any:
    return np.ascontiguousarray(x.data), (lambda dy: dy,)


for _f in (reshape, view, flatten, permute, squeeze, unsqueeze, expand, split, chunk, unbind,
           index_select, gather, flip, roll, repeat, masked_fill, tril, triu, contiguous,
           broadcast_to, t, expand_as, view_as, type_as):
    setattr(Tensor, _f.__name__, _f)

__all__ = ["broadcast_to", "cat", "chunk", "clone", "concat", "contiguous", "expand", "flatten",
           "flip", "gather", "index_select", "masked_fill", "pad", "permute", "repeat", "reshape",
           "roll", "split", "squeeze", "stack", "t", "transpose", "tril", "triu", "unbind",
           "unsqueeze", "view"]
