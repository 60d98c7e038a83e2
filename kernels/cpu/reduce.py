"""Reductions. Small sums, sums of float64 and of views with gaps are NumPy's. The others add four
float32 values in pairs, everything beyond in float64 (converting each value would take longer than
reading it), over fixed blocks in index order: they do not depend on the number of threads.
"""

import math

import numpy as np

from ..quiet import quiet
from .jit import device, kernel, prange
from .simd import high, lanes, load, load_part, low, splat, store, total

__all__ = ["max", "min", "prod", "sum"]

SMALL = 1 << 13          # elements: up to here NumPy's float32 sums (2 us) are exact enough
BLOCK = 1 << 17          # elements per partial sum: 512 KB of float32, half a core's L2
COLUMNS = 512            # side by side in one task: their sums are 4 KB of float64
NARROW = 64              # columns below: several rows are taken as one
_smaller = min           # `min` below is a kernel


@device
def _add_four(x, i, B, n, acc):
    """acc[j] += x[i + j] + x[i + B + j] + x[i + 2 B + j] + x[i + 3 B + j] for j < n."""
    W, H = lanes(x), lanes(acc)
    whole = n // W * W
    for j in range(0, whole, W):
        k = i + j
        p, q, r, s = load(x, k), load(x, k + B), load(x, k + 2 * B), load(x, k + 3 * B)
        v = (p + q) + (r + s)
        store(acc, j, load(acc, j) + low(v))
        store(acc, j + H, load(acc, j + H) + high(v))
    for r in range(4):
        v = load_part(x, i + r * B + whole, n - whole)
        store(acc, whole, load(acc, whole) + low(v))
        store(acc, whole + H, load(acc, whole + H) + high(v))


@device
def _add_columns(x, i, B, n, rows, partial, o):
    """partial[o + j] = Σ over the rows of x[i + j], which are B apart, for j < n ≤ COLUMNS."""
    W, H = lanes(x), lanes(partial)
    acc, out = np.zeros(COLUMNS + W), partial.reshape(-1)
    for r in range(0, rows // 4 * 4, 4):
        _add_four(x, i + r * B, B, n, acc)
    for r in range(rows // 4 * 4, rows):
        for j in range(0, n, W):
            v = load_part(x, i + r * B + j, _smaller(W, n - j))
            store(acc, j, load(acc, j) + low(v))
            store(acc, j + H, load(acc, j + H) + high(v))
    for j in range(n):
        out[o + j] = acc[j]


@kernel
def _sum_blocks(x, rows, partial):
    """partial[a, k, b] = Σ of x[a, r, b] over the k-th block of ``rows`` rows; x (A, R, B)."""
    A, blocks, B = partial.shape
    R, groups = x.shape[1], (B + COLUMNS - 1) // COLUMNS
    for t in prange(A * blocks * groups):
        block, b = t // groups, t % groups * COLUMNS
        a, r = block // blocks, block % blocks * rows
        _add_columns(x, (a * R + r) * B + b, B, _smaller(COLUMNS, B - b), _smaller(rows, R - r),
                     partial, block * B + b)


@device
def _sum_row(x, i, n):
    """Σ of n neighbours."""
    W = lanes(x)
    whole, unrolled = i + n // W * W, i + n // (4 * W) * (4 * W)
    rest = load_part(x, whole, i + n - whole)
    a = low(rest) + high(rest)
    b = splat(np.float64(0))
    for k in range(i, unrolled, 4 * W):
        p, q, r, s = load(x, k), load(x, k + W), load(x, k + 2 * W), load(x, k + 3 * W)
        v = (p + q) + (r + s)
        a, b = a + low(v), b + high(v)
    for k in range(unrolled, whole, W):
        p = load(x, k)
        a = a + (low(p) + high(p))
    return total(a + b)


@kernel
def _sum_rows(x, block, out):
    """out[a] = Σ of row a."""
    A, R = x.shape
    for t in prange((A + block - 1) // block):
        for a in range(t * block, _smaller(t * block + block, A)):
            out[a] = _sum_row(x, a * R, R)


def _sum_middle(x):
    """Σ over the middle axis of x (A, R, B), as float64 (A, B)."""
    A, R, B = x.shape
    fold = NARROW // B if B < NARROW else 1
    if 1 < fold <= R:                       # several rows as one, and a few left over
        whole = R // fold * fold
        sums = _sum_middle(x[:, :whole].reshape(A, whole // fold, fold * B))
        sums = sums.reshape(A, fold, B).sum(axis=1)
        return sums if whole == R else sums + x[:, whole:].sum(axis=1, dtype=np.float64)
    rows = -(-BLOCK // _smaller(B, COLUMNS))
    partial = np.empty((A, -(-R // rows), B))
    _sum_blocks(np.ascontiguousarray(x), rows, partial, work=x.nbytes)
    return partial[:, 0] if partial.shape[1] == 1 else partial.sum(axis=1)


def _sum_last(x):
    """Σ over the last axis of x (A, R). Long rows: as columns, then their sum, then the tail."""
    A, R = x.shape
    if R <= BLOCK:
        out = np.empty(A)
        _sum_rows(x, -(-BLOCK // R), out, work=x.nbytes)
        return out
    whole = R // COLUMNS * COLUMNS
    columns = _sum_middle(x[:, :whole].reshape(A, whole // COLUMNS, COLUMNS))
    return columns.sum(axis=1) + x[:, whole:].sum(axis=1, dtype=np.float64)


@quiet
def sum(x, *, axes, keepdims):
    """Σ over axes."""
    if x.size <= SMALL or x.dtype != np.float32:
        dtype = None if x.dtype.kind == "f" else np.int64
        return np.add.reduce(x, axis=axes, keepdims=keepdims, dtype=dtype)
    y = _sum_axes(x, axes)
    if y is None:
        y = np.add.reduce(x, axis=axes, keepdims=keepdims, dtype=np.float64)
    elif keepdims:
        y = np.expand_dims(y, tuple(range(x.ndim)) if axes is None else axes)
    return y.astype(x.dtype)


def _sum_axes(x, axes):
    """The last run of reduced axes in memory order by the kernel, the others on what is left; None
    where x has gaps."""
    if axes is None and (x.flags.c_contiguous or x.flags.f_contiguous):
        return _sum_last(x.reshape(1, -1) if x.flags.c_contiguous else x.T.reshape(1, -1))[0]
    axes = range(x.ndim) if axes is None else axes if type(axes) is tuple else (axes,)
    axes = {a % x.ndim for a in axes}
    if _smaller(x.strides) < 0:                               # a sum may be read from its other end
        x = x[tuple(slice(None, None, -1 if i in axes and x.strides[i] < 0 else 1)
                    for i in range(x.ndim))]
    order = sorted(range(x.ndim), key=lambda i: (-x.strides[i], i))
    t = x.transpose(order)
    if not axes or not t.flags.c_contiguous:
        return None
    last = order.index(next(i for i in reversed(order) if i in axes)) + 1
    first = last - 1
    while first and order[first - 1] in axes:
        first -= 1
    sizes = t.shape
    A, R, B = math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:])
    part = _sum_last(t.reshape(A, R)) if B == 1 else _sum_middle(t.reshape(A, R, B))
    left = order[:first] + order[last:]
    if not left:
        return part.reshape(())
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
