"""Softmax and its logarithm along any axis: memory is (A, C, B), C along the axis.

With B = 1 a warp or a block takes a row and holds it from the first pass to the last, if it is not
too long; else each thread takes a row of its own, next to its neighbour's. Exponentials are the
CPU's; they are added in float64.
"""

import math
from functools import cache

import numpy as np

from ..polynomials import exp
from .intrinsics import cuda, device, libm, width
from .launch import Kernel, factory
from .layout import aligned, alike, dense
from .memory import SIMULATED, empty_like, in_order, order_of
from .reduce import across
from .rows import WARPS, WIDE, block_sum, plan
from .vectors import each, filled, reader, writer

__all__ = ["log_softmax", "log_softmax_backward", "softmax", "softmax_backward"]

ALONE = 128 if not SIMULATED else 32      # rows of a block, of one thread each
larger = device(lambda a, b: a if a > b or a != a else b)
_max_of_warp = across(larger)
_min, _max = min, max


@cache
def block_max(T):
    """The largest of the T threads of a row, or NaN, given to each; ``cells`` are used once."""
    if T == 1:
        return device(lambda v, cells, first: v)
    if T == 32:
        return device(lambda v, cells, first: _max_of_warp(v))
    count = T // 32

    def f(v, cells, first):
        v = _max_of_warp(v)
        if cuda.threadIdx.x % 32 == 0:
            cells[first + cuda.threadIdx.x // 32] = v
        cuda.syncthreads()
        v = cells[first]
        for w in range(1, count):
            v = larger(v, cells[first + w])
        return v
    return device(f)


@cache
def row_sum(T):
    """``block_sum``, also of one thread."""
    return device(lambda v, cells, first: v) if T == 1 else block_sum(T)


@cache
def over_lanes(f, W):
    """A function of two numbers, of all W of a tuple."""
    return device({1: lambda v: v[0], 2: lambda v: f(v[0], v[1]),
                   4: lambda v: f(f(v[0], v[1]), f(v[2], v[3]))}[W])


add = device(lambda a, b: a + b)


def rows_of(T):
    """Rows that a block takes."""
    return {1: ALONE, 32: WARPS}.get(T, 1)


@factory
def forward(name, dtype, W, T, resident):
    """y of rows of C numbers; row i begins at (i // B) C B + i % B, in steps of B (1 if T > 1)."""
    read, write, same, log = reader(W), writer(W), filled(W), name == "log_softmax"
    real, kind, PER, CELLS = dtype.type, dtype.str[1:], rows_of(T), 2 * _max(1, T // 32)
    top, total, low, ln = over_lanes(larger, W), over_lanes(add, W), real(-math.inf), libm(
        "log", np.float64)
    largest, summed, wide = block_max(T), row_sum(T), np.float64
    maximum = each(larger, 2, W)
    power = each(device(lambda x, m: exp(x - m)), 2, W)
    if log:
        final = each(device(lambda x, e, c: (x - c[0]) - c[1]), 3, W)
    else:
        final = each(device(lambda x, e, c: e * c[1]), 3, W)

    def body(x, y, rows, C, B):
        cells = cuda.shared.array(CELLS, np.float64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        base, step = (row // B) * C * B + row % B, W * B
        V, m, none = C // W, same(low), same(low)
        v0 = v1 = v2 = v3 = v4 = v5 = v6 = v7 = none
        at = base + t * step
        if resident:
            v0 = read(x, at) if t < V else none
            v1 = read(x, at + T * W) if t + T < V else none
            v2 = read(x, at + 2 * T * W) if t + 2 * T < V else none
            v3 = read(x, at + 3 * T * W) if t + 3 * T < V else none
            v4 = read(x, at + 4 * T * W) if t + 4 * T < V else none
            v5 = read(x, at + 5 * T * W) if t + 5 * T < V else none
            v6 = read(x, at + 6 * T * W) if t + 6 * T < V else none
            v7 = read(x, at + 7 * T * W) if t + 7 * T < V else none
            m = maximum(maximum(maximum(v0, v1), maximum(v2, v3)),
                        maximum(maximum(v4, v5), maximum(v6, v7)))
        else:
            for r in range(t, V, T):
                m = maximum(m, read(x, base + r * step))
        high = real(largest(top(m), cells, 0))
        shift, s = same(high), 0.0
        e0 = e1 = e2 = e3 = e4 = e5 = e6 = e7 = none
        if resident:
            e0, e1, e2, e3 = power(v0, shift), power(v1, shift), power(v2, shift), power(v3, shift)
            e4, e5, e6, e7 = power(v4, shift), power(v5, shift), power(v6, shift), power(v7, shift)
            s = wide((total(e0) + total(e1)) + (total(e2) + total(e3))) + wide(
                (total(e4) + total(e5)) + (total(e6) + total(e7)))
        else:
            for r in range(t, V, T):
                s += wide(total(power(read(x, base + r * step), shift)))
        s = summed(s, cells, CELLS // 2)
        c = same((high, real(ln(s)) if log else real(1.0 / s)))
        if resident:
            if t < V:
                write(y, at, final(v0, e0, c))
            if t + T < V:
                write(y, at + T * W, final(v1, e1, c))
            if t + 2 * T < V:
                write(y, at + 2 * T * W, final(v2, e2, c))
            if t + 3 * T < V:
                write(y, at + 3 * T * W, final(v3, e3, c))
            if t + 4 * T < V:
                write(y, at + 4 * T * W, final(v4, e4, c))
            if t + 5 * T < V:
                write(y, at + 5 * T * W, final(v5, e5, c))
            if t + 6 * T < V:
                write(y, at + 6 * T * W, final(v6, e6, c))
            if t + 7 * T < V:
                write(y, at + 7 * T * W, final(v7, e7, c))
        else:
            for r in range(t, V, T):
                v0 = read(x, base + r * step)
                write(y, base + r * step, final(v0, v0 if log else power(v0, shift), c))
    return Kernel(body, f"*{kind} *{kind} i8 i8 i8", threads=T * PER,
                  name=f"{name}_{kind}_{W}_{T}{'' if resident else '_long'}")


@factory
def backward(name, dtype, W, T, resident):
    """dx = y (dy − Σ dy y), of the logarithm dy − e^y Σ dy, of rows as in ``forward``."""
    read, write, same, log = reader(W), writer(W), filled(W), name == "log_softmax"
    real, kind, PER, CELLS = dtype.type, dtype.str[1:], rows_of(T), _max(1, T // 32)
    total, summed, wide, zero = over_lanes(add, W), row_sum(T), np.float64, real(0)
    if log:
        term = each(device(lambda g, y: g), 2, W)
        final = each(device(lambda g, y, s: g - exp(y) * s), 3, W)
    else:
        term = each(device(lambda g, y: g * y), 2, W)
        final = each(device(lambda g, y, s: y * (g - s)), 3, W)

    def body(dy, y, dx, rows, C, B):
        cells = cuda.shared.array(CELLS, np.float64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        base, step = (row // B) * C * B + row % B, W * B
        V, none, s = C // W, same(zero), 0.0
        g0 = g1 = g2 = g3 = y0 = y1 = y2 = y3 = none
        at = base + t * step
        if resident:
            if t < V:
                g0, y0 = read(dy, at), read(y, at)
            if t + T < V:
                g1, y1 = read(dy, at + T * W), read(y, at + T * W)
            if t + 2 * T < V:
                g2, y2 = read(dy, at + 2 * T * W), read(y, at + 2 * T * W)
            if t + 3 * T < V:
                g3, y3 = read(dy, at + 3 * T * W), read(y, at + 3 * T * W)
            s = wide((total(term(g0, y0)) + total(term(g1, y1)))
                     + (total(term(g2, y2)) + total(term(g3, y3))))
        else:
            for r in range(t, V, T):
                s += wide(total(term(read(dy, base + r * step), read(y, base + r * step))))
        c = same(real(summed(s, cells, 0)))
        if resident:
            if t < V:
                write(dx, at, final(g0, y0, c))
            if t + T < V:
                write(dx, at + T * W, final(g1, y1, c))
            if t + 2 * T < V:
                write(dx, at + 2 * T * W, final(g2, y2, c))
            if t + 3 * T < V:
                write(dx, at + 3 * T * W, final(g3, y3, c))
        else:
            for r in range(t, V, T):
                g0, y0 = read(dy, base + r * step), read(y, base + r * step)
                write(dx, base + r * step, final(g0, y0, c))
    return Kernel(body, f"*{kind} *{kind} *{kind} i8 i8 i8", threads=T * PER,
                  name=f"{name}_backward_{kind}_{W}_{T}{'' if resident else '_long'}")


def every():
    """All kernels of this module."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        V = width(dtype)
        ways = {_held(dtype, V, T, True) for T in (32, *WIDE)} | {(V, WIDE[-1], False),
                                                                  (1, 1, False), (1, 32, True)}
        for name in ("softmax", "log_softmax"):
            for way in sorted(ways):
                yield forward(name, dtype, *way)
                yield backward(name, dtype, *way)


def _held(dtype, W, T, resident):
    """The widest rows of float64, held with their exponentials, would take more registers than
    there are."""
    return W, T, resident and (dtype.itemsize == 4 or WIDE[-1] > T)


def classes(x, axis):
    """Sizes A, C, B of dense memory around an axis."""
    order = order_of(x)
    at, shape = order.index(axis % x.ndim), in_order(x).shape
    if x.flags.c_contiguous:
        at, shape = axis % x.ndim, x.shape
    return math.prod(shape[:at]), shape[at], math.prod(shape[at + 1:])


def way(C, B, dtype, vectors, *arrays):
    """W, T and whether a row is held in so many vectors of each thread."""
    if B > 1:
        return 1, 1, False
    W = width(dtype) if C % width(dtype) == 0 and aligned(*arrays) else 1
    return _held(dtype, W, *plan(C, W, vectors))


def _run(make, name, vectors, axis, *arrays):
    """Of arrays of one shape into one like them."""
    if arrays[0].ndim == 0:
        return _run(make, name, vectors, 0, *(a.reshape(1) for a in arrays)).reshape(())
    first = dense(arrays[0])
    arrays = [first, *(alike(a, first) for a in arrays[1:])]
    out = empty_like(first)
    if out.size:
        A, C, B = classes(first, axis)
        how = way(C, B, first.dtype, vectors, *arrays, out)
        make(name, first.dtype, *how)(-(-A * B // rows_of(how[1])), *arrays, out, A * B, C, B)
    return out


def softmax(x, *, axis):
    """y = eˣ / Σ eˣ along axis."""
    return _run(forward, "softmax", 8, axis, x)


def log_softmax(x, *, axis):
    """y = x − log Σ eˣ along axis; all −inf gives NaN."""
    return _run(forward, "log_softmax", 8, axis, x)


def softmax_backward(dy, y, *, axis):
    """dx = y (dy − Σ dy y)."""
    return _run(backward, "softmax", 4, axis, dy, y)


def log_softmax_backward(dy, y, *, axis):
    """dx = dy − e^y Σ dy."""
    return _run(backward, "log_softmax", 4, axis, dy, y)
