"""Layer, RMS and group normalization of rows that lie in one piece: a warp or a block takes a row,
which stays in registers from the first pass to the last; a longer one is read again from a cache.

A thread's values are summed up in float32 about their own mean; what threads have found is added in
float64, about the row's first value, in an order that is always the same.
"""

from functools import cache

import numpy as np

from ..half import kind as kind_of, real as real_of
from .intrinsics import cuda, device, libm, quotient, width
from .launch import Kernel, factory
from .memory import SIMULATED
from .moments import merged, moments_of_vectors, states
from .passes import BETA, CENTER, GAMMA
from .reduce import across
from .vectors import dtypes, each, filled, of_lanes, reader, wide_reader, writer

__all__ = ["WARPS", "backward", "block_sum", "blocks", "forward", "held", "plan"]

WARPS = 8 if not SIMULATED else 2         # rows of a block, where a warp takes one
WIDE = 256, 384                           # threads that take a longer row: 168 registers each
if SIMULATED:
    WIDE = 64, 96
_add = across(device(lambda a, b: a + b))      # a + b is b + a: every lane gets the same bits
_min, _max = min, max


def held(W, arrays=1):
    """How many vectors of one of so many arrays a thread holds: 32 numbers in all, of halves, too.
    """
    return _min(32 // W, 8) // arrays


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
    def eight(v):
        return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
    return device({1: lambda v: v[0], 2: lambda v: v[0] + v[1],
                   4: lambda v: (v[0] + v[1]) + (v[2] + v[3]), 8: eight}[W])


@cache
def _vectors(T, count):
    """How many of ``count`` vectors t, t + T … of a row of V there are, and which; others are the
    first again, or that of the row."""
    which = of_lanes(device(lambda k, t, m: t + (k * T if m > k else 0)), count)

    @device
    def f(V, t):
        m = _max(0, _min(count, (V - t + T - 1) // T))
        return m, which(t if m > 0 else 0, m)
    return f


def _gain(params, W, planes):
    """γ or β of vector r of a row: one by one, or one for S values that lie together."""
    read, same = wide_reader(params, W), filled(W)
    if planes:
        return device(lambda p, r, first, S: same(
            p[first + quotient(np.uint32(r * W), np.uint32(S))]))
    return device(lambda p, r, first, S: read(p, r * W))


def _name(what, dtype, params, W, T, resident, planes=False):
    k, p = kind_of(dtype), kind_of(params)
    return (f"{what}_{k}{'' if p == k else '_' + p}_{W}_{T}{'' if resident else '_long'}"
            f"{'_planes' if planes else ''}")


@factory
def forward(dtype, params, W, T, resident, planes):
    """y = x̂ γ + β, mean and invstd of rows of D; row i has γ from (i mod G) K on with planes."""
    count, K, real, wide = held(W), states(W, False), real_of(dtype).type, np.float64
    read, copies = each(reader(W), 2, count), filled(count)
    write, same, whole, total, vectors = (writer(W), filled(K), filled(W), _total(K),
                                          _vectors(T, count))
    moments, merge, gain, add = (moments_of_vectors(dtype, W, K < W), each(merged, 3, K),
                                 _gain(params, W, planes), block_sum(T))
    sqrt, zero, one, CELLS = libm("sqrt", np.float64), real(0), real(1), 2 * _max(1, T // 32)
    PER, EACH = WARPS if T == 32 else 1, W // K
    apart = each(device(lambda s, p: s[0] - p), 2, K)
    around = each(device(lambda s, u: s[1] + u[1] * ((s[0] - u[0]) * (s[0] - u[0]))), 2, K)
    places = each(device(lambda base, r: base + r * W), 2, count)

    @device
    def value(x, g, b, c):
        return ((x - c[0]) - c[1]) * c[2] * g + b
    values = each(value, 4, W)

    @device
    def put(k, y, i, m, v, r, gamma, beta, first, S, c, option):
        if m > k:
            g = gain(gamma, r[k], first, S) if option & GAMMA else whole(one)
            b = gain(beta, r[k], first, S) if option & BETA else whole(zero)
            write(y, i[k], values(v[k], g, b, whole(c)))
        return 0
    put_all = of_lanes(put, count)

    def body(x, gamma, beta, y, mean, invstd, rows, D, G, K, S, eps, option):
        cells, length = cuda.shared.array(CELLS, np.float64), cuda.shared.array(1, np.int64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        V, base, n, state, q = D // W, row * D, 0.0, same((0.0, 0.0)), t
        pivot = wide(x[base])
        if T > 32 and t == 0:
            length[0] = V
        m, r = vectors(V, t)
        i = places(copies(base), r)
        v = read(copies(x), i)
        if resident:
            state = moments(_max(m, 1), *v)
            n = wide(EACH * m)
        else:
            while q < V:
                m, r = vectors(V, q)
                w = EACH * m / (n + EACH * m)
                state = merge(state, moments(m, *read(copies(x), places(copies(base), r))),
                              same((w, n * w)))
                n += EACH * m
                q += count * T
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
        c, first = (high, low, real(inverse)), (row % G) * K
        if resident:
            if T > 32:           # again, of what is read: 32 registers are free while it is summed
                m, r = vectors(length[0], t)
            put_all(y, places(copies(base), r), m, v, r, gamma, beta, first, S, c, option)
        else:
            for q in range(t, V, count * T):
                m, r = vectors(V, q)
                i = places(copies(base), r)
                put_all(y, i, m, read(copies(x), i), r, gamma, beta, first, S, c, option)
    k, p = kind_of(dtype), kind_of(params)
    return Kernel(body, f"*{k} *{p} *{p} *{k} *f8 *f8 i8 i8 i8 i8 i8 f8 i4",
                  name=_name("rows", dtype, params, W, T, resident, planes), threads=T * PER)


@factory
def backward(dtype, params, W, T, resident):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) of rows, g = γ dy; no mean(g) without CENTER."""
    count, real, wide = held(W, 2), real_of(dtype).type, np.float64
    read, copies = each(reader(W), 2, count), filled(count)
    write, same, total, add = writer(W), filled(W), _total(W), block_sum(T)
    gain, vectors = each(wide_reader(params, W), 2, count), _vectors(T, count)
    zero, CELLS, PER = real(0), 2 * _max(1, T // 32), WARPS if T == 32 else 1
    product = each(device(lambda a, b: a * b), 2, W)
    times = each(product, 2, count)
    hat = each(each(device(lambda x, c: ((x - c[0]) - c[1]) * c[2]), 2, W), 2, count)
    value = each(device(lambda g, h, e: e[2] * ((g - e[0]) - h * e[1])), 3, W)
    places = each(device(lambda base, r: base + r * W), 2, count)
    there = of_lanes(device(lambda k, m: m > k), count)
    counted = each(device(lambda g, there: g if there else same(zero)), 2, count)
    together = device({
        2: lambda a, b: wide(total(a) + total(b)),
        4: lambda a, b, c, d: wide((total(a) + total(b)) + (total(c) + total(d)))}[count])

    @device
    def of(dy, gamma, i, r, m, option):
        g = counted(read(copies(dy), i), there(m))
        return times(g, gain(copies(gamma), places(copies(0), r))) if option & GAMMA else g

    @device
    def put(k, dx, i, m, g, h, e):
        if m > k:
            write(dx, i[k], value(g[k], h[k], same(e)))
        return 0
    put_all = of_lanes(put, count)

    def body(dy, x, gamma, mean, invstd, dx, rows, D, option):
        cells = cuda.shared.array(CELLS, np.float64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        V, base, s, sx, q = D // W, row * D, 0.0, 0.0, t
        mu = mean[row] if option & CENTER else 0.0
        high, inverse = real(mu), invstd[row]
        low = real(mu - wide(high)) if high - high == zero else zero
        c = copies(same((high, low, real(inverse))))
        m, r = vectors(V, t)
        i = places(copies(base), r)
        g, h = of(dy, gamma, i, r, m, option), hat(read(copies(x), i), c)
        if resident:
            s, sx = together(*g), together(*times(g, h))
        else:
            while q < V:
                m, r = vectors(V, q)
                i = places(copies(base), r)
                g, h = of(dy, gamma, i, r, m, option), hat(read(copies(x), i), c)
                s += together(*g)
                sx += together(*times(g, h))
                q += count * T
        s, sx = add(s, cells, 0) / D, add(sx, cells, CELLS // 2) / D
        e = real(s) if option & CENTER else zero, real(sx), real(inverse)
        if resident:
            put_all(dx, i, m, g, h, e)
        else:
            for q in range(t, V, count * T):
                m, r = vectors(V, q)
                i = places(copies(base), r)
                put_all(dx, i, m, of(dy, gamma, i, r, m, option), hat(read(copies(x), i), c), e)
    k, p = kind_of(dtype), kind_of(params)
    return Kernel(body, f"*{k} *{k} *{p} *f8 *f8 *{k} i8 i8 i4",
                  name=_name("rows_backward", dtype, params, W, T, resident), threads=T * PER)


def every():
    """All kernels of this module."""
    ways = [(T, True) for T in (32, *WIDE)] + [(WIDE[-1], False)]
    for dtype in dtypes():
        for W in (width(dtype), 1):
            for params in {dtype: None, real_of(dtype): None} if W > 1 else (dtype,):
                for T, resident in ways:
                    yield forward(dtype, params, W, T, resident, False)
                    yield forward(dtype, params, W, T, resident, True)
                    yield backward(dtype, params, W, T, resident)
