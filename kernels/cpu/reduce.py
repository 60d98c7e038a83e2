"""Reductions. Small sums are NumPy's pairwise ones; large sums are accumulated in float64 over
fixed blocks and combined in index order, so that they do not depend on the number of threads.
"""

import math

import numpy as np

from ..quiet import quiet
from .jit import kernel, prange

__all__ = ["max", "min", "prod", "sum"]

SMALL = 1 << 13          # elements: up to here np.add.reduce (2 us) is faster than any preparation
BLOCK = 1 << 15          # elements per partial sum: 128 KB of float32, an eighth of a core's L2
LANES = 32               # a row is summed as this many interleaved columns, which vectorise
_smaller = min           # `min` below is a kernel


@kernel
def _sum_blocks(x, rows, partial):
    """partial[a, k, b] = Σ of x[a, r, b] over the k-th block of ``rows`` rows; x (A, R, B)."""
    A, blocks, B = partial.shape
    R = x.shape[1]
    for t in prange(A * blocks):
        a, k = t // blocks, t % blocks
        acc = np.zeros(B)
        for r in range(k * rows, _smaller(k * rows + rows, R)):
            for b in range(B):
                acc[b] += x[a, r, b]
        for b in range(B):
            partial[a, k, b] = acc[b]


def _sum_middle(x):
    """Σ over the middle axis of x (A, R, B), as float64 (A, B)."""
    A, R, B = x.shape
    rows = -(-BLOCK // (B + 1))
    partial = np.empty((A, -(-R // rows), B))
    _sum_blocks(x, rows, partial, work=x.nbytes)
    return partial.sum(axis=1)


def _sum_last(x):
    """Σ over the last axis of x (A, R): lanes, then their sum, then the tail."""
    A, R = x.shape
    whole = R // LANES * LANES
    lanes = _sum_middle(x[:, :whole].reshape(A, whole // LANES, LANES))
    return lanes.sum(axis=1) + x[:, whole:].sum(axis=1, dtype=np.float64)


@quiet
def sum(x, *, axes, keepdims):
    """Σ over axes."""
    if x.size <= SMALL or x.dtype.kind != "f":
        dtype = None if x.dtype.kind == "f" else np.int64
        return np.add.reduce(x, axis=axes, keepdims=keepdims, dtype=dtype)
    axes = range(x.ndim) if axes is None else axes if type(axes) is tuple else (axes,)
    axes = {a % x.ndim for a in axes}
    total = _sum_axes(x, axes).astype(x.dtype)
    kept = [1 if i in axes else n for i, n in enumerate(x.shape)]
    return total.reshape(kept) if keepdims else total


def _sum_axes(x, axes):
    """The last run of reduced axes in memory order by the kernel, the others on what is left."""
    order = sorted(range(x.ndim), key=lambda i: (-x.strides[i], i))
    if not axes:
        return x
    last = order.index(next(i for i in reversed(order) if i in axes)) + 1
    first = last - 1
    while first and order[first - 1] in axes:
        first -= 1
    sizes = [x.shape[i] for i in order]
    view = x.transpose(order).reshape(math.prod(sizes[:first]), math.prod(sizes[first:last]),
                                      math.prod(sizes[last:]))
    part = _sum_last(view[:, :, 0]) if view.shape[2] == 1 else _sum_middle(view)
    left = order[:first] + order[last:]
    part = part.reshape([x.shape[i] for i in left]).transpose(np.argsort(left))
    rest = tuple(n for n, i in enumerate(sorted(left)) if i in axes)
    return part.sum(axis=rest) if rest else part


@quiet
def prod(x, *, axes, keepdims):
    """Π over axes."""
    return np.prod(x, axis=axes, keepdims=keepdims)


def max(x, *, axes, keepdims):
    """Largest element over axes; NaN if there is one."""
    return np.max(x, axis=axes, keepdims=keepdims)


def min(x, *, axes, keepdims):
    """Smallest element over axes; NaN if there is one."""
    return np.min(x, axis=axes, keepdims=keepdims)
