"""Reductions. Small sums, sums of float64 and of views with gaps are NumPy's; large float32 sums
are accumulated in float64 over fixed blocks and combined in index order, so that they do not depend
on the number of threads.
"""

import math

import numpy as np

from ..quiet import quiet
from .jit import device, kernel, prange

__all__ = ["max", "min", "prod", "sum"]

SMALL = 1 << 13          # elements: up to here NumPy's float32 sums (2 us) are exact enough
LARGE = 1 << 16          # below, NumPy in float64 (100 × 100: 7 us) beats any preparation (17 us)
BLOCK = 1 << 15          # elements per partial sum: 128 KB of float32, an eighth of a core's L2
LANES = 32               # a row is summed as this many interleaved columns, which vectorise
LONG = 512               # rows: 512 of 196 take NumPy 45 us and this 55
WIDE = 1 << 12           # columns: above, partial sums are no smaller than what they sum
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


@device
def sum_row(row, acc):
    """Σ of a contiguous row, in float64; ``acc`` is LANES long. Constant trip counts unroll."""
    n = row.size
    if n < LANES:
        s = 0.0
        for c in range(n):
            s += row[c]
        return s
    for j in range(LANES):
        acc[j] = row[j]
    for k in range(1, n // LANES):
        part = row[k * LANES:k * LANES + LANES]
        for j in range(LANES):
            acc[j] += part[j]
    tail = row[n // LANES * LANES:]
    for j in range(tail.size):
        acc[j] += tail[j]
    for j in range(LANES // 2):
        acc[j] += acc[j + LANES // 2]
    for j in range(LANES // 4):
        acc[j] += acc[j + LANES // 4]
    s = 0.0
    for j in range(LANES // 4):
        s += acc[j]
    return s


@kernel
def _sum_rows(x, block, out):
    """out[a] = Σ of row a."""
    A = x.shape[0]
    for t in prange((A + block - 1) // block):
        acc = np.empty(LANES)
        for a in range(t * block, _smaller(t * block + block, A)):
            out[a] = sum_row(x[a], acc)


def _sum_middle(x):
    """Σ over the middle axis of x (A, R, B), as float64 (A, B)."""
    A, R, B = x.shape
    rows = -(-BLOCK // (B + 1))
    partial = np.empty((A, -(-R // rows), B))
    _sum_blocks(x, rows, partial, work=x.nbytes)
    return partial.sum(axis=1)


def _sum_last(x):
    """Σ over the last axis of x (A, R). Long rows: lanes, then their sum, then the tail."""
    A, R = x.shape
    if R <= BLOCK:
        out = np.empty(A)
        _sum_rows(x, -(-BLOCK // R), out, work=x.nbytes)
        return out
    whole = R // LANES * LANES
    lanes = _sum_middle(x[:, :whole].reshape(A, whole // LANES, LANES))
    return lanes.sum(axis=1) + x[:, whole:].sum(axis=1, dtype=np.float64)


@quiet
def sum(x, *, axes, keepdims):
    """Σ over axes."""
    if x.size <= SMALL or x.dtype != np.float32:
        dtype = None if x.dtype.kind == "f" else np.int64
        return np.add.reduce(x, axis=axes, keepdims=keepdims, dtype=dtype)
    total = _sum_axes(x, axes) if x.size >= LARGE else None
    if total is None:
        total = np.add.reduce(x, axis=axes, keepdims=keepdims, dtype=np.float64)
    elif keepdims:
        total = np.expand_dims(total, tuple(range(x.ndim)) if axes is None else axes)
    return total.astype(x.dtype)


def _sum_axes(x, axes):
    """The last run of reduced axes in memory order by the kernel, the others on what is left; None
    where NumPy is faster."""
    axes = range(x.ndim) if axes is None else axes if type(axes) is tuple else (axes,)
    axes = {a % x.ndim for a in axes}
    if _smaller(x.strides) < 0:                               # a sum may be read from its other end
        x = x[tuple(slice(None, None, -1 if i in axes and x.strides[i] < 0 else 1)
                    for i in range(x.ndim))]
    order = sorted(range(x.ndim), key=lambda i: (-x.strides[i], i))
    if not axes or not x.transpose(order).flags.c_contiguous:
        return None
    last = order.index(next(i for i in reversed(order) if i in axes)) + 1
    first = last - 1
    while first and order[first - 1] in axes:
        first -= 1
    sizes = [x.shape[i] for i in order]
    view = x.transpose(order).reshape(math.prod(sizes[:first]), math.prod(sizes[first:last]),
                                      math.prod(sizes[last:]))
    if view.shape[2] > WIDE or (view.shape[2] == 1 and view.shape[1] < LONG):
        return None
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
