"""Shapes, indexing, casts, and tensors made from nothing."""

import math

import numpy as np

import nbgrad as nb
from nbgrad.nn import functional as F
from nbgrad.ops.indexing import index_add

from .tools import Unsupported, along, ints, number

# ------------------------------------------------------------------------------------------- dtypes

def cast(x, *, to, saturate=1, round_mode="up"):
    """``to`` is a NumPy dtype."""
    return x.to(to)


def constant(*, value=None, value_float=None, value_floats=None, value_int=None, value_ints=None):
    for given, dtype in ((value_float, "float32"), (value_floats, "float32"), (value_int, "int64"),
                         (value_ints, "int64")):
        if given is not None:
            return nb.tensor(np.asarray(given, dtype))
    return nb.tensor(value)


def constant_of_shape(shape, *, value=None):
    value = np.zeros(1, np.float32) if value is None else value
    return nb.full(ints(shape), value.item(), value.dtype)


def eye_like(x, *, dtype=None, k=0):
    ones = nb.ones(*x.shape, dtype=dtype or x.dtype)
    return nb.tril(nb.triu(ones, k), k)


def arange(start, limit, delta):
    return nb.arange(*map(number, (start, limit, delta)), dtype=start.dtype)


# ------------------------------------------------------------------------------------------- shapes

def reshape(x, shape, *, allowzero=0):
    """A size of 0 is that of x, unless zeros are allowed."""
    sizes = ints(shape)
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(sizes)])


def flatten(x, *, axis=1):
    axis = axis % x.ndim if x.ndim and axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def squeeze(x, axes=None):
    dims = ints(axes)
    return nb.squeeze(x) if dims is None else nb.squeeze(x, dims)


def unsqueeze(x, axes):
    dims = ints(axes)
    for dim in sorted(d % (x.ndim + len(dims)) for d in dims):
        x = nb.unsqueeze(x, dim)
    return x


def shape_of(x, *, start=0, end=None):
    return nb.tensor(np.array(x.shape[start:end], np.int64))


def split(x, sizes=None, *, axis=0, num_outputs=None, outputs):
    n = x.shape[axis]
    each = -(-n // (num_outputs or outputs))
    return nb.split(x, each if sizes is None else ints(sizes), axis)


def depth_to_space(x, *, blocksize, mode="DCR"):
    N, C, H, W = x.shape
    b, D = blocksize, C // blocksize ** 2
    if mode == "DCR":
        y = x.reshape(N, b, b, D, H, W).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(N, D, b, b, H, W).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(N, D, H * b, W * b)


def space_to_depth(x, *, blocksize, mode="DCR"):
    N, C, H, W = x.shape
    b = blocksize
    y = x.reshape(N, C, H // b, b, W // b, b)
    y = y.permute(*((0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)))
    return y.reshape(N, C * b * b, H // b, W // b)


def pad(x, pads, value=None, axes=None, *, mode="constant"):
    mode = {"edge": "replicate", "wrap": "circular"}.get(mode, mode)
    widths, dims = ints(pads), ints(axes) or range(x.ndim)
    all_of_them = [0] * (2 * x.ndim)
    for i, dim in enumerate(dims):
        at = 2 * (x.ndim - 1 - dim % x.ndim)
        all_of_them[at:at + 2] = widths[i], widths[i + len(dims)]
    return F.pad(x, all_of_them, mode, value=0.0 if value is None else number(value))


# ----------------------------------------------------------------------------------------- indexing

def slice_(x, starts, ends, axes=None, steps=None):
    starts, ends = ints(starts), ints(ends)
    index = [slice(None)] * x.ndim
    for a, b, axis, step in zip(starts, ends, ints(axes) or range(x.ndim),
                                ints(steps) or [1] * len(starts)):
        n = x.shape[axis]
        stop = None if step < 0 and b < -n else b      # ONNX's −∞ is before the first element
        index[axis] = slice(a, stop, step)
    return x[tuple(index)]


def gather(x, indices, *, axis=0):
    return x[along(axis % x.ndim, indices)]


def gather_elements(x, indices, *, axis=0):
    return nb.gather(x, axis, nb.where(indices < 0, indices + x.shape[axis], indices))


def gather_nd(x, indices, *, batch_dims=0):
    if batch_dims:
        return nb.stack([gather_nd(a, i, batch_dims=batch_dims - 1) for a, i in zip(x, indices)])
    return x[tuple(nb.unbind(indices, -1))]


def scatter_elements(x, indices, updates, *, axis=0, reduction="none"):
    grid = list(np.ogrid[tuple(map(slice, indices.shape))])
    grid[axis] = indices
    return _scattered(x, tuple(grid), updates, reduction)


def scatter_nd(x, indices, updates, *, reduction="none"):
    return _scattered(x, tuple(nb.unbind(indices, -1)), updates, reduction)


def _scattered(x, index, updates, reduction):
    if reduction == "add":                             # the gradient of taking what is there
        return x + index_add(updates, index=tuple(i.data for i in map(nb.as_tensor, index)),
                             shape=x.shape)
    if reduction != "none":
        raise Unsupported("scatter with a product or an extreme")
    y = nb.clone(x)
    y[index] = updates
    return y


def compress(x, condition, *, axis=None):
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return nb.index_select(x, axis, nb.nonzero(condition).reshape(-1))


def one_hot(indices, depth, values, *, axis=-1):
    """Indices from −depth on count from the end; others are nowhere."""
    depth, axis = int(number(depth)), axis % (indices.ndim + 1)
    classes = nb.arange(depth).reshape(depth, *[1] * (indices.ndim - axis))
    at = nb.unsqueeze(nb.where(indices < 0, indices + depth, indices), axis)
    return nb.where(at == classes, values[1], values[0])


def cumsum(x, axis, *, exclusive=0, reverse=0):
    axis = number(axis) % x.ndim
    y = nb.flip(x, axis) if reverse else x
    y = nb.cumsum(y, axis).to(x.dtype) - (y if exclusive else 0)
    return nb.flip(y, axis) if reverse else y


def topk(x, k, *, axis=-1, largest=1, sorted=1):
    return nb.topk(x, number(k), axis, bool(largest))


def trilu(x, k=None, *, upper=1):
    return (nb.triu if upper else nb.tril)(x, 0 if k is None else number(k))


SHAPES = {
    "Cast": cast, "CastLike": lambda x, like, *, saturate=1, round_mode="up": x.to(like.dtype),
    "Compress": compress,
    "Concat": lambda *xs, axis: nb.cat(xs, axis),
    "Constant": constant, "ConstantOfShape": constant_of_shape, "CumSum": cumsum,
    "DepthToSpace": depth_to_space,
    "Expand": lambda x, shape: x.broadcast_to(np.broadcast_shapes(x.shape, tuple(ints(shape)))),
    "EyeLike": eye_like, "Flatten": flatten, "Gather": gather, "GatherElements": gather_elements,
    "GatherND": gather_nd, "Identity": lambda x: x,
    "NonZero": lambda x: nb.nonzero(x).T,
    "OneHot": one_hot, "Pad": pad, "Range": arange, "Reshape": reshape,
    "Scatter": scatter_elements, "ScatterElements": scatter_elements, "ScatterND": scatter_nd,
    "Shape": shape_of,
    "Size": lambda x: nb.tensor(np.int64(x.numel())),
    "Slice": slice_, "SpaceToDepth": space_to_depth, "Split": split, "Squeeze": squeeze,
    "Tile": lambda x, repeats: x.repeat(*ints(repeats)),
    "TopK": topk,
    "Transpose": lambda x, *, perm=None: x.permute(*(perm or range(x.ndim)[::-1])),
    "Trilu": trilu, "Unsqueeze": unsqueeze,
}
