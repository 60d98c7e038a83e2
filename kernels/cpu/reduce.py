"""Reductions over the last axis or a middle one; NumPy's where they are as good.

Sums of float32 add 512 neighbours, or 16 rows, in float32 and everything beyond in float64:
converting each value would take longer than reading it. No value takes part in more than 11
roundings before float64, so |error| ≤ 12 · 2⁻²⁴ Σ|x| for any number of values, the last rounding
included; NumPy's pairwise summation has 15 + log2(n / 16). Blocks are fixed and merged in index
order: sums do not depend on the number of threads.
"""

import math
from functools import lru_cache

import numpy as np

from ..quiet import quiet
from .columns import inner
from .simd import (
    fill,
    high,
    lanes,
    largest,
    load,
    load_or,
    load_part,
    low,
    maximum,
    pointer,
    store,
    store_part,
    total,
)
from .tasks import share, tasks

__all__ = ["max", "min", "prod", "sum"]

SMALL = 1 << 13          # elements: up to here NumPy's float32 sums (2 us) are exact enough
EXTREMES = 1 << 12       # elements: up to here its maxima take no longer than ours
BLOCK = 1 << 15          # elements per partial sum: 128 KB of float32
TASK = 1 << 14           # elements per task of short rows
CHUNK = 32               # vectors of a row that are added up in its dtype, in four chains
ROWS = 16                # rows that are
COLUMNS = 512            # side by side in one task: their sums are 4 KB of float64
NARROW = 64              # columns below: several rows are taken as one
_smaller = min           # `min` below is a kernel


@inner
def _four(x, i, B, n):
    p, q = load_part(x, i, n), load_part(x, i + B, n)
    r, s = load_part(x, i + 2 * B, n), load_part(x, i + 3 * B, n)
    return (p + q) + (r + s)


@inner
def _add_columns(x, i, B, n, rows, acc):
    """acc[j] += Σ over the rows of x[i + j], which are B apart, for j < n ≤ COLUMNS."""
    W, H = lanes(x), lanes(acc)
    for r in range(0, rows, ROWS):
        many = _smaller(ROWS, rows - r)
        for j in range(0, n, W):
            k, m, v = i + r * B + j, _smaller(W, n - j), fill(x, 0)
            for q in range(many // 4):
                v = v + _four(x, k + 4 * q * B, B, m)
            for q in range(many // 4 * 4, many):
                v = v + load_part(x, k + q * B, m)
            store(acc, j, load(acc, j) + low(v))
            store(acc, j + H, load(acc, j + H) + high(v))


@inner
def _sum_blocks_task(t, x, rows, partial):
    (blocks, B), R = partial.shape[1:], x.shape[1]
    groups = (B + COLUMNS - 1) // COLUMNS
    block, b = t // groups, t % groups * COLUMNS
    a, r = block // blocks, block % blocks * rows
    n, acc, out = _smaller(COLUMNS, B - b), np.zeros(COLUMNS + 16), pointer(partial)
    _add_columns(pointer(x), (a * R + r) * B + b, B, n, _smaller(rows, R - r), pointer(acc))
    for j in range(n):
        out[block * B + b + j] = acc[j]


@tasks
def _sum_blocks(run, x, rows, partial):
    """partial[a, k, b] = Σ of x[a, r, b] over the k-th block of ``rows`` rows; x (A, R, B)."""
    A, blocks, B = partial.shape
    share(_sum_blocks_task, A * blocks * ((B + COLUMNS - 1) // COLUMNS), run, (x, rows, partial))


@inner
def _sum_row(x, i, n):
    """Σ of n neighbours."""
    W = lanes(x)
    whole = i + n // W * W
    rest = load_part(x, whole, i + n - whole)
    wide = low(rest) + high(rest)
    for first in range(i, whole, CHUNK * W):
        end = _smaller(whole, first + CHUNK * W)
        four = first + (end - first) // (4 * W) * (4 * W)
        a = fill(x, 0)
        b, c, d = a, a, a
        for k in range(first, four, 4 * W):
            a, b = a + load(x, k), b + load(x, k + W)
            c, d = c + load(x, k + 2 * W), d + load(x, k + 3 * W)
        for k in range(four, end, W):
            a = a + load(x, k)
        v = (a + b) + (c + d)
        wide = wide + (low(v) + high(v))
    return total(wide)


@inner
def _sum_rows_task(t, x, block, out):
    R, pieces, sums = x.shape[1], out.shape[1], pointer(out)
    for k in range(t * block, _smaller(t * block + block, out.size)):
        r = k % pieces * BLOCK
        sums[k] = _sum_row(pointer(x), k // pieces * R + r, _smaller(BLOCK, R - r))


@tasks
def _sum_rows(run, x, block, out):
    """out[a, k] = Σ of the k-th piece of row a; ``block`` of them are a task."""
    share(_sum_rows_task, (out.size + block - 1) // block, run, (x, block, out))


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
    _sum_blocks(np.ascontiguousarray(x), rows, partial, work=3 * x.nbytes)
    return partial[:, 0] if partial.shape[1] == 1 else partial.sum(axis=1)


def _sum_last(x):
    """Σ over the last axis of x (A, R). Long rows: in pieces, then their sum."""
    A, R = x.shape
    out = np.empty((A, -(-R // BLOCK)))
    _sum_rows(x, -(-TASK // R), out, work=x.nbytes)
    return out[:, 0] if out.shape[1] == 1 else out.sum(axis=1)


@inner
def _largest_of_row(x, i, n, sign):
    W, s = lanes(x), fill(x, sign)
    whole = i + n // W * W
    four = i + n // (4 * W) * (4 * W)
    a = load_or(x, whole, i + n - whole, fill(x, -np.inf) * s) * s
    b, c, d = a, a, a
    for k in range(i, four, 4 * W):
        a, b = maximum(a, load(x, k) * s), maximum(b, load(x, k + W) * s)
        c, d = maximum(c, load(x, k + 2 * W) * s), maximum(d, load(x, k + 3 * W) * s)
    for k in range(four, whole, W):
        a = maximum(a, load(x, k) * s)
    return largest(maximum(maximum(a, b), maximum(c, d)))


@inner
def _largest_of_columns(x, i, B, n, rows, sign, out, o):
    """Of n columns, whose rows are B apart."""
    W, s = lanes(x), fill(x, sign)
    for j in range(0, n, W):
        m = _smaller(W, n - j)
        a = fill(x, -np.inf)
        b = a
        for r in range(0, rows - 1, 2):
            k = i + j + r * B
            a, b = maximum(a, load_part(x, k, m) * s), maximum(b, load_part(x, k + B, m) * s)
        a = maximum(a, load_part(x, i + j + (rows - 1) * B, m) * s)
        store_part(out, o + j, maximum(a, b) * s, m)


@inner
def _extremes_task(t, x, sign, width, out):
    A, R, B = x.shape
    if B == 1:
        for a in range(t * width, _smaller(t * width + width, A)):
            out[a, 0] = _largest_of_row(pointer(x), a * R, R, sign) * sign
        return
    groups = (B + width - 1) // width
    a, b = t // groups, t % groups * width
    _largest_of_columns(pointer(x), a * R * B + b, B, _smaller(width, B - b), R, sign,
                        pointer(out), a * B + b)


@tasks
def _extremes(run, x, sign, width, out):
    """out[a, b] = sign · largest of sign · x[a, r, b] over r; x (A, R, B)."""
    A, B = out.shape
    n = A if B == 1 else B
    share(_extremes_task, (n + width - 1) // width * (1 if B == 1 else A), run,
          (x, sign, width, out))


@lru_cache(1 << 12)
def _runs(shape, strides, axes):
    """How x lies around the last run of reduced axes in memory: its axes in memory's order; x in
    that order as (A, R, B) with the run in the middle; the shape of what is left of x, the order
    that sorts its axes (None if they are), and those of them that are reduced."""
    axes = {a % len(shape) for a in axes}
    order = sorted(range(len(shape)), key=lambda i: -strides[i])
    end = order.index(next(i for i in reversed(order) if i in axes)) + 1
    first = end - 1
    while first and order[first - 1] in axes:
        first -= 1
    sizes = [shape[i] for i in order]
    three = math.prod(sizes[:first]), math.prod(sizes[first:end]), math.prod(sizes[end:])
    left = order[:first] + order[end:]
    back = None if left == sorted(left) else tuple(map(int, np.argsort(left)))
    rest = tuple(n for n, i in enumerate(sorted(left)) if i in axes)
    return tuple(order), three, tuple(shape[i] for i in left), back, rest


def _merged(x, axes, last, middle, merge):
    """A reduction of the last run of reduced axes in memory order by last (A, R) or middle
    (A, R, B), merged over the others; None where x has gaps."""
    contiguous = x.flags.c_contiguous
    if axes is None and (contiguous or x.flags.f_contiguous):
        return last(x.reshape(1, -1) if contiguous else x.T.reshape(1, -1))[0]
    axes = tuple(range(x.ndim)) if axes is None else axes if type(axes) is tuple else (axes,)
    if not axes:
        return None
    if not contiguous and _smaller(x.strides) < 0:            # a sum may be read from its other end
        reduced = {a % x.ndim for a in axes}
        x = x[tuple(slice(None, None, -1 if i in reduced and x.strides[i] < 0 else 1)
                    for i in range(x.ndim))]
    order, (A, R, B), left, back, rest = _runs(
        x.shape, tuple(range(x.ndim, 0, -1)) if contiguous else x.strides, axes)
    t = x if contiguous else x.transpose(order)
    if not t.flags.c_contiguous:
        return None
    part = last(t.reshape(A, R)) if B == 1 else middle(t.reshape(A, R, B))
    part = part.reshape(left)
    if back is not None:
        part = part.transpose(back)
    return merge(part, axis=rest) if rest else part


def _kept(y, x, axes, keepdims):
    """y with the reduced axes as ones again."""
    if keepdims:
        y = np.expand_dims(y, tuple(range(x.ndim)) if axes is None else axes)
    return y


@quiet
def sum(x, *, axes, keepdims):
    """Σ over axes."""
    if x.size <= SMALL or x.dtype != np.float32:
        dtype = None if x.dtype.kind == "f" else np.int64
        return np.add.reduce(x, axis=axes, keepdims=keepdims, dtype=dtype)
    y = _merged(x, axes, _sum_last, _sum_middle, np.sum)
    if y is None:
        return np.add.reduce(x, axis=axes, keepdims=keepdims, dtype=np.float64).astype(x.dtype)
    return _kept(y, x, axes, keepdims).astype(x.dtype)


def _extreme(ufunc, sign, x, axes, keepdims):
    def middle(x):
        A, _, B = x.shape
        out = np.empty((A, B), x.dtype)
        _extremes(x, x.dtype.type(sign), -(-TASK // x.shape[1]) if B == 1 else 4 * NARROW, out,
                  work=x.nbytes)
        return out
    y = None
    if axes is not None and x.size > EXTREMES and x.dtype.kind == "f":
        y = _merged(x, axes, lambda x: middle(x[..., None]), middle, ufunc.reduce)
    if y is None:
        return ufunc.reduce(x, axis=axes, keepdims=keepdims)
    return _kept(y, x, axes, keepdims)


@quiet
def prod(x, *, axes, keepdims):
    """Π over axes."""
    return np.prod(x, axis=axes, keepdims=keepdims)


def max(x, *, axes, keepdims):
    """Largest element over axes; NaN if there is one."""
    return _extreme(np.maximum, 1, x, axes, keepdims)


def min(x, *, axes, keepdims):
    """Smallest element over axes; NaN if there is one."""
    return _extreme(np.minimum, -1, x, axes, keepdims)
