"""Matrix products of any strides: float32 and float64 on the CUDA cores, rounded as they add up,
float16 and bfloat16 on the tensor cores, added up in float32 and rounded once.

Each operand is read along the axis that is contiguous, in vectors where its sizes and steps allow.
Where tiles are too few for the device, parts of k go to blocks of their own and are added up
afterwards, in their order. Halves are multiplied as words of two of neighbouring k: operands that
do not lie so, 16 bytes by 16 bytes, are copied first.
"""

import math

import numpy as np

from ..half import is_half, kind as kind_of, real, wide as widened
from ..quiet import quiet
from . import precision, reduce
from .elementwise import add
from .intrinsics import cuda, device, width
from .launch import factory
from .layout import MISSING, aligned, collapsed, spread
from .memory import empty, xp
from .tile import (
    LARGE,
    SMALL,
    WORD,
    Operand,
    compiled,
    divided,
    multiplier,
    plan,
    tile_of,
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


@factory
def _products(dtype, shape, by_a, by_b, way="fma", out=None, loads="ahead"):
    """c[z, x, y] = a[x, y] b[x, y] + bias over the z-th part of k; x and y: axes of batches.
    by: ("k" or "row", in vectors or not). Of words of halves, c is of them or float32: ``out``."""
    kind, half = dtype.str[1:], way in precision.HALVES
    how = (precision.HALVES if half else precision.WAYS)[way]
    body = multiplier(Operand(_row, _row_k, _sum, *by_a), Operand(_column, _column_k, _sum, *by_b),
                      _line, shape, dtype, how, out or kind, loads)

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
        body(a, b, c, bias, first, g, i, j, begin, min(begin + length, K), N, wide, ())
    name = "_".join(by + ("s" if vectors else "1") for by, vectors in (by_a, by_b))
    results = f"*{out} *{way}" if half else f"*{kind} *{kind}"
    name = (f"matmul_{kind}_{shape[0]}_{name}{how.suffix}" + (f"_{out}" if half else "")
            + "_plain" * (loads == "plain"))
    return compiled(run, f"*{kind} *{kind} {results} i4 i4 " + "i8 " * 17, name,
                    (by_a[0], by_b[0]), shape, dtype, how, loads, strided=True)


def every():
    """Those of the usual orders in memory, for those who compile them ahead."""
    by_k, by_row, apart = ("k", True), ("row", True), ("k", False)
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for shape in (LARGE, SMALL) if dtype == np.float32 else (SMALL,):
            yield _products(dtype, shape, by_k, by_row)
        yield _products(dtype, SMALL, apart, apart)
    single = np.dtype(np.float32)
    for a, b in ((by_k, by_k), (by_row, by_row)):
        yield _products(single, LARGE, a, b)
    yield _products(single, LARGE, by_k, by_row, loads="plain")
    for half in precision.HALVES:
        yield _products(WORD, LARGE, by_k, by_k, half, half)
        yield _products(WORD, SMALL, by_k, by_k, half, "f4")
    for way in ("tf32", "3xtf32"):
        yield _products(single, LARGE, by_k, by_row, way)


def _reading(x, row, k, others):
    """How an operand is read whose axes ``row`` and ``k`` are these: along which of them, and
    whether in vectors; ``others``: its steps from batch to batch."""
    W, steps = width(x.dtype), [s // x.itemsize for s in x.strides]
    by, a, b = ("k", k, row) if steps[k] == 1 or steps[row] != 1 else ("row", row, k)
    return by, bool(steps[a] == 1 and x.shape[a] % W == 0 and aligned(x)
                    and not any(s % W for s in (steps[b], *others)))


def _steps(x):
    return [s // x.itemsize for s in x.strides[-2:]]


def _launch(a, b, c, bias, p, sizes, s, t, dtype):
    """c (splits, …, M, N): parts of a b, of ``dtype``; s, t: steps of a and b over two axes of
    batches."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    kernel = _products(a.dtype, p.shape, _reading(a, -2, -1, s), _reading(b, -1, -2, t),
                       kind_of(dtype) if a.dtype == WORD else precision.way(a.dtype),
                       kind_of(c.dtype) if a.dtype == WORD else None, precision.loads())
    (am, ak), (bk, bn) = _steps(a), _steps(b)
    wide = N % width(c.dtype) == 0
    kernel(p.tiles * p.splits * math.prod(sizes), a, b, c, bias, -1 if bias is None else 0, wide, M,
           N, K, am, ak, bn, bk, sizes[1], sizes[0], *s, *t, p.down, p.tiles, p.splits, p.length)


def words(x):
    """(…, R, K) of halves as words (…, R, K / 2): x itself if each row begins on 16 bytes, else a
    copy, with 0 behind K."""
    W, (*steps, last), K = width(x.dtype), (s // x.itemsize for s in x.strides), x.shape[-1]
    if last != 1 or K % W or not aligned(x) or any(s % W for s in steps):
        bits, x = x.view(np.uint16), empty((*x.shape[:-1], -(-K // W) * W), np.uint16)
        x[..., :K] = bits
        x[..., K:] = 0
    return x.view(WORD)


def _product(a, b, bias=None):
    """a b + bias for (…, M, K) and (…, K, N) of one dtype, C-ordered."""
    dtype = a.dtype
    if not is_half(dtype) or not a.shape[-1] or not a.size or not b.size:
        return _tiled(a, b, bias, dtype)
    if not precision.multiplies_halves():
        bias = None if bias is None else widened(bias)
        return _tiled(widened(a), widened(b), bias, np.dtype(np.float32)).astype(dtype)
    return _tiled(words(a), words(b.swapaxes(-1, -2)).swapaxes(-1, -2), bias, dtype)


def _tiled(a, b, bias, dtype):
    """``_product`` of that dtype, which a and b have or are words of."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (M, K), N = a.shape[-2:], b.shape[-1]
    a, b = spread(a, (*batch, M, K)), spread(b, (*batch, K, N))
    if not math.prod((*batch, M, N)) or not K:
        out = empty((*batch, M, N), dtype)
        out[...] = 0 if bias is None else bias
        return out
    sizes, (s, t) = collapsed(batch, list(range(len(batch))), (a, b))
    if len(sizes) > AXES:
        return xp.stack([_tiled(x, y, bias, dtype) for x, y in zip(a, b)])
    sizes, s, t = [1] * (2 - len(sizes)) + sizes, [0] * (2 - len(s)) + s, [0] * (2 - len(t)) + t
    p = plan(M, N, K, math.prod(batch), a.dtype)
    parts = empty((p.splits, *batch, M, N), dtype if p.splits == 1 else real(dtype))
    _launch(a, b, parts, bias if p.splits == 1 else None, p, sizes, s, t, dtype)
    if p.splits == 1:
        return parts[0]
    out = reduce.sum(parts, axes=(0,), keepdims=False)
    return (out if bias is None else add(out, widened(bias))).astype(dtype, copy=False)


@quiet
def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    dtype = np.result_type(a, b)
    if dtype not in (np.float32, np.float64) and not is_half(dtype):
        return xp.matmul(a, b)
    a, b = a.astype(dtype, copy=False), b.astype(dtype, copy=False)
    y = _product(a[None] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b)
    y = y[..., 0] if b.ndim == 1 else y
    return y if a.ndim > 1 else y[..., 0] if b.ndim == 1 else y[..., 0, :]


@quiet
def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    ours = x.dtype in (np.float32, np.float64) or is_half(x.dtype)
    if not ours or x.dtype != weight.dtype or (
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
    if input_gradient:
        dx = matmul(rows, weight).reshape(x.shape)
    else:
        dx = empty((), x.dtype)
        dx.fill(0)
    dweight = matmul(rows.T, x.reshape(M, x.shape[-1]))
    db = reduce.sum(widened(rows), axes=(0,), keepdims=False)
    return dx, dweight, db.astype(dy.dtype, copy=False)
