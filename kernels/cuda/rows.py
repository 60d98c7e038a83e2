"""Layer, RMS and group normalization of rows that lie in one piece: a warp or a block takes a row,
which stays in registers from the first pass to the last; a longer one is read again from a cache.

A thread's values are summed up in float32 about their own mean; what threads have found is added in
float64, about the row's first value, in an order that is always the same.
"""

from functools import cache

import numpy as np

from .intrinsics import cuda, device, libm, quotient, width
from .launch import Kernel
from .memory import SIMULATED
from .moments import merged, moments_of_eight
from .passes import BETA, CENTER, GAMMA
from .reduce import across
from .vectors import each, filled, reader, writer

__all__ = ["WARPS", "backward", "block_sum", "blocks", "forward", "plan"]

WARPS = 8 if not SIMULATED else 2         # rows of a block, where a warp takes one
WIDE = 256, 384                           # threads that take a longer row: 168 registers each
if SIMULATED:
    WIDE = 64, 96
_add = across(device(lambda a, b: a + b))      # a + b is b + a: every lane gets the same bits
_min, _max = min, max


def plan(D, W, vectors):
    """Threads of a row of D numbers, and whether they hold it in so many vectors each."""
    for T in (32, *WIDE):
        if T * vectors * W >= D:
            return T, True
    return WIDE[-1], False


def blocks(rows, T):
    """How many blocks rows take."""
    return rows if T > 32 else -(-rows // WARPS)


@cache
def block_sum(T):
    """Σ over the T threads of a row, given to each; ``cells`` from ``first`` on are used once."""
    if T == 32:
        return device(lambda v, cells, first: _add(v))
    count = T // 32

    def f(v, cells, first):
        v = _add(v)
        if cuda.threadIdx.x % 32 == 0:
            cells[first + cuda.threadIdx.x // 32] = v
        cuda.syncthreads()
        v = cells[first]
        for w in range(1, count):
            v += cells[first + w]
        return v
    return device(f)


@cache
def _total(W):
    return device({1: lambda v: v[0], 2: lambda v: v[0] + v[1],
                   4: lambda v: (v[0] + v[1]) + (v[2] + v[3])}[W])


def _gain(W, planes):
    """γ or β of vector r of a row: one by one, or one for S values that lie together."""
    read, same = reader(W), filled(W)
    if planes:
        return device(lambda p, r, first, S: same(
            p[first + quotient(np.uint32(r * W), np.uint32(S))]))
    return device(lambda p, r, first, S: read(p, r * W))


@cache
def forward(dtype, W, T, resident, planes):
    """y = x̂ γ + β, mean and invstd of rows of D; row i has γ from (i mod G) K on with planes."""
    read, write, same, total = reader(W), writer(W), filled(W), _total(W)
    moments, merge, gain, add = (moments_of_eight(dtype, W), each(merged, 3, W), _gain(W, planes),
                                 block_sum(T))
    real, sqrt, kind, wide = dtype.type, libm("sqrt", np.float64), dtype.str[1:], np.float64
    zero, one, CELLS, PER = real(0), real(1), 2 * _max(1, T // 32), WARPS if T == 32 else 1
    apart = each(device(lambda s, p: s[0] - p), 2, W)
    around = each(device(lambda s, u: s[1] + u[1] * ((s[0] - u[0]) * (s[0] - u[0]))), 2, W)

    @device
    def value(x, g, b, c):
        return ((x - c[0]) - c[1]) * c[2] * g + b
    values = each(value, 4, W)

    @device
    def put(y, i, v, r, gamma, beta, first, S, c, option):
        g = gain(gamma, r, first, S) if option & GAMMA else same(one)
        b = gain(beta, r, first, S) if option & BETA else same(zero)
        write(y, i, values(v, g, b, c))

    def body(x, gamma, beta, y, mean, invstd, rows, D, G, K, S, eps, option):
        cells = cuda.shared.array(CELLS, np.float64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        V, base, n, state = D // W, row * D, 0.0, same((0.0, 0.0))
        pivot, r = wide(x[base]), t
        m = _max(0, _min(8, (V - t + T - 1) // T))
        at = base + (t if m > 0 else 0) * W
        v = v1 = v2 = v3 = v4 = v5 = v6 = v7 = read(x, at)
        if resident:
            v1 = read(x, at + (T * W if m > 1 else 0))
            v2 = read(x, at + (2 * T * W if m > 2 else 0))
            v3 = read(x, at + (3 * T * W if m > 3 else 0))
            v4 = read(x, at + (4 * T * W if m > 4 else 0))
            v5 = read(x, at + (5 * T * W if m > 5 else 0))
            v6 = read(x, at + (6 * T * W if m > 6 else 0))
            v7 = read(x, at + (7 * T * W if m > 7 else 0))
            state = moments(v, v1, v2, v3, v4, v5, v6, v7, real(_max(m, 1)))
            n = wide(m)
        else:
            while r < V:
                m, at = _min(8, (V - r + T - 1) // T), base + r * W
                w = m / (n + m)
                state = merge(state, moments(
                    read(x, at), read(x, at + (T * W if m > 1 else 0)),
                    read(x, at + (2 * T * W if m > 2 else 0)),
                    read(x, at + (3 * T * W if m > 3 else 0)),
                    read(x, at + (4 * T * W if m > 4 else 0)),
                    read(x, at + (5 * T * W if m > 5 else 0)),
                    read(x, at + (6 * T * W if m > 6 else 0)),
                    read(x, at + (7 * T * W if m > 7 else 0)), real(m)), same((w, n * w)))
                n += m
                r += 8 * T
        s = n * total(apart(state, same(pivot))) if n > 0.0 else 0.0
        mu = pivot + add(s, cells, 0) / D
        s = total(around(state, same((mu, n)))) if n > 0.0 else 0.0
        var = add(s, cells, CELLS // 2) / D
        if not option & CENTER:
            var, mu = var + mu * mu, 0.0
        inverse = 1.0 / sqrt(var + eps)
        if t == 0:
            if option & CENTER:
                mean[row] = mu
            invstd[row] = inverse
        high = real(mu)
        low = real(mu - wide(high)) if high - high == zero else zero
        c, first = same((high, low, real(inverse))), (row % G) * K
        if resident:
            if m > 0:
                put(y, at, v, t, gamma, beta, first, S, c, option)
            if m > 1:
                put(y, at + T * W, v1, t + T, gamma, beta, first, S, c, option)
            if m > 2:
                put(y, at + 2 * T * W, v2, t + 2 * T, gamma, beta, first, S, c, option)
            if m > 3:
                put(y, at + 3 * T * W, v3, t + 3 * T, gamma, beta, first, S, c, option)
            if m > 4:
                put(y, at + 4 * T * W, v4, t + 4 * T, gamma, beta, first, S, c, option)
            if m > 5:
                put(y, at + 5 * T * W, v5, t + 5 * T, gamma, beta, first, S, c, option)
            if m > 6:
                put(y, at + 6 * T * W, v6, t + 6 * T, gamma, beta, first, S, c, option)
            if m > 7:
                put(y, at + 7 * T * W, v7, t + 7 * T, gamma, beta, first, S, c, option)
        else:
            for r in range(t, V, T):
                put(y, base + r * W, read(x, base + r * W), r, gamma, beta, first, S, c, option)
    name = f"rows_{kind}_{W}_{T}{'' if resident else '_long'}{'_planes' if planes else ''}"
    return Kernel(body, f"*{kind} *{kind} *{kind} *{kind} *f8 *f8 i8 i8 i8 i8 i8 f8 i4", name=name,
                  threads=T * PER)


@cache
def backward(dtype, W, T, resident):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) of rows, g = γ dy; no mean(g) without CENTER."""
    read, write, same, total, add = reader(W), writer(W), filled(W), _total(W), block_sum(T)
    real, kind, wide = dtype.type, dtype.str[1:], np.float64
    zero, CELLS, PER = real(0), 2 * _max(1, T // 32), WARPS if T == 32 else 1
    times = each(device(lambda a, b: a * b), 2, W)
    hat = each(device(lambda x, c: ((x - c[0]) - c[1]) * c[2]), 2, W)
    value = each(device(lambda g, h, e: e[2] * ((g - e[0]) - h * e[1])), 3, W)

    @device
    def of(dy, gamma, at, r, option):
        g = read(dy, at)
        return times(g, read(gamma, r * W)) if option & GAMMA else g

    def body(dy, x, gamma, mean, invstd, dx, rows, D, option):
        cells = cuda.shared.array(CELLS, np.float64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        V, base, s, sx = D // W, row * D, 0.0, 0.0
        mu = mean[row] if option & CENTER else 0.0
        high, inverse = real(mu), invstd[row]
        low = real(mu - wide(high)) if high - high == zero else zero
        c, none = same((high, low, real(inverse))), same(zero)
        m = _max(0, _min(4, (V - t + T - 1) // T))
        at = base + t * W
        g0 = g1 = g2 = g3 = h0 = h1 = h2 = h3 = none
        if resident:
            if m > 0:
                g0, h0 = of(dy, gamma, at, t, option), read(x, at)
            if m > 1:
                g1, h1 = of(dy, gamma, at + T * W, t + T, option), read(x, at + T * W)
            if m > 2:
                g2, h2 = of(dy, gamma, at + 2 * T * W, t + 2 * T, option), read(x, at + 2 * T * W)
            if m > 3:
                g3, h3 = of(dy, gamma, at + 3 * T * W, t + 3 * T, option), read(x, at + 3 * T * W)
            h0, h1, h2, h3 = hat(h0, c), hat(h1, c), hat(h2, c), hat(h3, c)
            s = wide((total(g0) + total(g1)) + (total(g2) + total(g3)))
            sx = wide((total(times(g0, h0)) + total(times(g1, h1)))
                      + (total(times(g2, h2)) + total(times(g3, h3))))
        else:
            for r in range(t, V, T):
                g0 = of(dy, gamma, base + r * W, r, option)
                s += wide(total(g0))
                sx += wide(total(times(g0, hat(read(x, base + r * W), c))))
        s, sx = add(s, cells, 0) / D, add(sx, cells, CELLS // 2) / D
        e = same((real(s) if option & CENTER else zero, real(sx), real(inverse)))
        if resident:
            if m > 0:
                write(dx, at, value(g0, h0, e))
            if m > 1:
                write(dx, at + T * W, value(g1, h1, e))
            if m > 2:
                write(dx, at + 2 * T * W, value(g2, h2, e))
            if m > 3:
                write(dx, at + 3 * T * W, value(g3, h3, e))
        else:
            for r in range(t, V, T):
                g0 = of(dy, gamma, base + r * W, r, option)
                write(dx, base + r * W, value(g0, hat(read(x, base + r * W), c), e))
    name = f"rows_backward_{kind}_{W}_{T}{'' if resident else '_long'}"
    return Kernel(body, f"*{kind} *{kind} *{kind} *f8 *f8 *{kind} i8 i8 i4", name=name,
                  threads=T * PER)


def every():
    """All kernels of this module."""
    ways = [(T, True) for T in (32, *WIDE)] + [(WIDE[-1], False)]
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for W in (width(dtype), 1):
            for T, resident in ways:
                yield forward(dtype, W, T, resident, False)
                yield forward(dtype, W, T, resident, True)
                yield backward(dtype, W, T, resident)
