"""Matrix products on the CUDA cores, of any strides: float32 and float64, rounded as they add up.

Each operand is read along the axis that is contiguous, in vectors where its sizes and steps allow.
Where tiles are too few for the device, parts of k go to blocks of their own and are added up
afterwards, in their order.
"""

import math
from functools import cache

import numpy as np

from ..quiet import quiet
from . import precision, reduce
from .elementwise import add
from .intrinsics import cuda, device, width
from .launch import Kernel
from .layout import MISSING, aligned, collapsed, spread
from .memory import empty, xp
from .tile import (
    LARGE,
    SMALL,
    Operand,
    divided,
    multiplier,
    plan,
    threads,
    tile_of,
    together,
)

__all__ = ["linear", "linear_backward", "matmul"]

AXES = 2                     # of batches that a launch walks; more are launched one by one


# g: M N K, steps of a along m and k, of b along n and k, of a row of c; where a, b and c begin.

@device
def _row(g, m):
    return g[8] + m * g[3] if m < g[0] else MISSING


@device
def _row_k(g, k):
    return k * g[4] if k < g[2] else MISSING


@device
def _column(g, n):
    return g[9] + n * g[5] if n < g[1] else MISSING


@device
def _column_k(g, k):
    return k * g[6] if k < g[2] else MISSING


@device
def _sum(g, u, v):
    return u + v


@device
def _line(g, m):
    return g[10] + m * g[7] if m < g[0] else MISSING


@cache
def _products(dtype, shape, by_a, by_b, way="fma"):
    """c[z, x, y] = a[x, y] b[x, y] + bias over the z-th part of k; x and y: axes of batches.
    by: ("k" or "row", in vectors or not)."""
    kind, (arithmetic, pad, least, suffix) = dtype.str[1:], precision.WAYS[way]
    body = multiplier(Operand(_row, _row_k, _sum, *by_a), Operand(_column, _column_k, _sum, *by_b),
                      _line, shape, dtype, arithmetic, pad)

    def run(a, b, c, bias, first, wide, M, N, K, am, ak, bn, bk, inner, outside, a0, a1, b0, b1,
            down, tiles, splits, length):
        block, t = divided(cuda.blockIdx.x, tiles), cuda.blockIdx.x
        t -= block * tiles
        batch = divided(block, splits)
        z = block - batch * splits
        x = divided(batch, inner)
        y = batch - x * inner
        g = (M, N, K, am, ak, bn, bk, N, x * a0 + y * a1, x * b0 + y * b1,
             (z * outside * inner + batch) * M * N)
        i, j = tile_of(t, down, tiles)
        begin = z * length
        body(a, b, c, bias, first, g, i, j, begin, min(begin + length, K), N, wide)
    name = "_".join(by + ("s" if vectors else "1") for by, vectors in (by_a, by_b))
    return Kernel(run, f"*{kind} *{kind} *{kind} *{kind} i4 i4 " + "i8 " * 17,
                  threads=threads(shape), minimum=together(shape, dtype, way), least=least,
                  name=f"matmul_{kind}_{shape[0]}_{name}{suffix}")


def every():
    """Those of the usual orders in memory, for those who compile them ahead."""
    by_k, by_row, single = ("k", True), ("row", True), ("k", False)
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for shape in (LARGE, SMALL):
            yield _products(dtype, shape, by_k, by_row)
        yield _products(dtype, SMALL, single, single)
    for a, b in ((by_k, by_k), (by_row, by_row)):
        yield _products(np.dtype(np.float32), LARGE, a, b)
    for way in ("tf32", "3xtf32"):
        yield _products(np.dtype(np.float32), LARGE, by_k, by_row, way)


def _reading(x, row, k, others):
    """How an operand is read whose axes ``row`` and ``k`` are these: along which of them, and
    whether in vectors; ``others``: its steps from batch to batch."""
    W, steps = width(x.dtype), [s // x.itemsize for s in x.strides]
    by, a, b = ("k", k, row) if steps[k] == 1 or steps[row] != 1 else ("row", row, k)
    return by, bool(steps[a] == 1 and x.shape[a] % W == 0 and aligned(x)
                    and not any(s % W for s in (steps[b], *others)))


def _steps(x):
    return [s // x.itemsize for s in x.strides[-2:]]


def _launch(a, b, c, bias, p, sizes, s, t):
    """c (splits, …, M, N): parts of a b; s, t: steps of a and b over two axes of batches."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    kernel = _products(a.dtype, p.shape, _reading(a, -2, -1, s), _reading(b, -1, -2, t),
                       precision.way(a.dtype))
    (am, ak), (bk, bn) = _steps(a), _steps(b)
    wide = N % width(c.dtype) == 0
    kernel(p.tiles * p.splits * math.prod(sizes), a, b, c, bias, -1 if bias is None else 0, wide, M,
           N, K, am, ak, bn, bk, sizes[1], sizes[0], *s, *t, p.down, p.tiles, p.splits, p.length)


def _product(a, b, bias=None):
    """a b + bias for (…, M, K) and (…, K, N) of one dtype, C-ordered."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (M, K), N = a.shape[-2:], b.shape[-1]
    a, b = spread(a, (*batch, M, K)), spread(b, (*batch, K, N))
    if not math.prod((*batch, M, N)) or not K:
        out = empty((*batch, M, N), a.dtype)
        out[...] = 0 if bias is None else bias
        return out
    sizes, (s, t) = collapsed(batch, list(range(len(batch))), (a, b))
    if len(sizes) > AXES:
        return xp.stack([_product(x, y, bias) for x, y in zip(a, b)])
    sizes, s, t = [1] * (2 - len(sizes)) + sizes, [0] * (2 - len(s)) + s, [0] * (2 - len(t)) + t
    p = plan(M, N, K, math.prod(batch), a.dtype)
    parts = empty((p.splits, *batch, M, N), a.dtype)
    _launch(a, b, parts, bias if p.splits == 1 else None, p, sizes, s, t)
    if p.splits == 1:
        return parts[0]
    out = reduce.sum(parts, axes=(0,), keepdims=False)
    return out if bias is None else add(out, bias)


@quiet
def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    dtype = np.result_type(a, b)
    if dtype not in (np.float32, np.float64):
        return xp.matmul(a, b)
    a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
    y = _product(a[None] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b)
    y = y[..., 0] if b.ndim == 1 else y
    return y if a.ndim > 1 else y[..., 0] if b.ndim == 1 else y[..., 0, :]


@quiet
def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    if x.dtype not in (np.float32, np.float64) or x.dtype != weight.dtype or (
            bias is not None and bias.dtype != x.dtype):
        y = matmul(x, weight.T)
        return y if bias is None else add(y, bias)
    if bias is not None and not bias.flags.c_contiguous:
        bias = bias.copy()
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _product(rows, weight.T, bias).reshape(*x.shape[:-1], weight.shape[0])


def linear_backward(dy, x, weight, *, input_gradient):
    """dx = dy w (0 unless asked for),  dw = dyᵀ x,  db = Σ dy over rows."""
    M = math.prod(dy.shape[:-1])
    rows = dy.reshape(M, dy.shape[-1])
    dx = matmul(rows, weight).reshape(x.shape) if input_gradient else xp.zeros_like(
        x, shape=())
    dweight = matmul(rows.T, x.reshape(M, x.shape[-1]))
    return dx, dweight, reduce.sum(rows, axes=(0,), keepdims=False)
