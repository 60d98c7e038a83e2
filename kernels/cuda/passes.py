"""What is done to each value once the statistics of its channel are known, and the sums of the
backward. The work is cut as in moments.py; what reads memory for the second time goes backwards,
from what a cache still holds.
"""

from functools import cache

import numpy as np

from .intrinsics import arrive, cuda, device, width
from .launch import Kernel
from .moments import THREADS, add_trees, line_at
from .vectors import each, filled, gather, reader, scatter, writer

__all__ = ["ADD", "BETA", "BY_Y", "CENTER", "GAMMA", "GAMMA_IN", "RELU", "WRITE", "gradient",
           "normalize", "sums"]

ROWS = 4                     # lines of each array of a thread at once
LOG = THREADS.bit_length() - 1
GAMMA, BETA, ADD, RELU, BY_Y, WRITE, CENTER, GAMMA_IN = 1, 2, 4, 8, 16, 32, 64, 128
_min, _max = min, max


@cache
def constants(dtype, W, columns):
    """For each number of a line: the mean in two words, 1/σ, γ and β, from those of column, or
    channel, q; channels c share statistics in groups of K, samples have G."""
    real, one, zero = dtype.type, dtype.type(1), dtype.type(0)

    @device
    def f(mean, invstd, gamma, beta, q, B, G, K, option):
        a = q // B
        c = q - a * B
        i = a * G + c // K
        m = mean[i]
        high = real(m)
        low = real(m - np.float64(high)) if high - high == zero else zero
        return (high, low, real(invstd[i]), gamma[c] if option & GAMMA else one,
                beta[c] if option & BETA else zero)
    if not columns or W == 1:
        same = filled(W)
        return device(lambda mean, invstd, gamma, beta, q, B, G, K, o:
                      same(f(mean, invstd, gamma, beta, q, B, G, K, o)))
    if W == 2:
        return device(lambda mean, invstd, gamma, beta, q, B, G, K, o: (
            f(mean, invstd, gamma, beta, q, B, G, K, o),
            f(mean, invstd, gamma, beta, q + 1, B, G, K, o)))
    return device(lambda mean, invstd, gamma, beta, q, B, G, K, o: (
        f(mean, invstd, gamma, beta, q, B, G, K, o),
        f(mean, invstd, gamma, beta, q + 1, B, G, K, o),
        f(mean, invstd, gamma, beta, q + 2, B, G, K, o),
        f(mean, invstd, gamma, beta, q + 3, B, G, K, o)))


def _kernel(body, name, dtype, W, columns, index, parameters):
    kind = dtype.str[1:]
    layout = "columns" if columns else f"segments_{index}"
    return Kernel(body, parameters.replace("k", kind), name=f"{name}_{kind}_{W}_{layout}",
                  threads=THREADS, minimum=2)


@cache
def normalized(dtype, W):
    """y of x, of what is added, and of ``constants``; what is not below 0."""
    zero = dtype.type(0)

    @device
    def value(x, z, c):
        return ((x - c[0]) - c[1]) * (c[2] * c[3]) + c[4] + z
    return each(value, 3, W), each(device(lambda v: zero if v < zero else v), 1, W)


@cache
def normalize(dtype, W, columns, index):
    """y = ((x − mean) invstd) γ + β [+ z], not below 0 with RELU."""
    read, write, at = reader(W), writer(W), line_at(W, columns, index)
    table, same, L = constants(dtype, W, columns), filled(W), W if columns else 1
    (values, clip), zero = normalized(dtype, W), dtype.type(0)

    def body(x, z, gamma, beta, mean, invstd, y, R, B, S, shift, segment, P, tiles, N, G, K,
             option):
        b = cuda.gridDim.x - 1 - cuda.blockIdx.x
        t, tile, rest = cuda.threadIdx.x, b % tiles, b // tiles
        k, a, lanes = rest % P, rest // P, THREADS >> shift
        q = tile * (L << shift) + (t & ((1 << shift) - 1)) * L
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        if q >= B or r >= end:
            return
        base = a * R * B
        # segments of samples with statistics of their own are channels of one sample: B // N each
        c = table(mean, invstd, gamma, beta, a * B + q, B // N, G, K, option)
        nothing = same(zero)
        while r < end:
            m = _min(ROWS, (end - r + lanes - 1) >> (LOG - shift))
            i0 = base + at(r, q, B, S)
            i1 = base + at(r + (lanes if m > 1 else 0), q, B, S)
            i2 = base + at(r + (2 * lanes if m > 2 else 0), q, B, S)
            i3 = base + at(r + (3 * lanes if m > 3 else 0), q, B, S)
            x0, x1, x2, x3 = read(x, i0), read(x, i1), read(x, i2), read(x, i3)
            z0, z1, z2, z3 = nothing, nothing, nothing, nothing
            if option & ADD:
                z0, z1, z2, z3 = read(z, i0), read(z, i1), read(z, i2), read(z, i3)
            x0, x1 = values(x0, z0, c), values(x1, z1, c)
            x2, x3 = values(x2, z2, c), values(x3, z3, c)
            if option & RELU:
                x0, x1, x2, x3 = clip(x0), clip(x1), clip(x2), clip(x3)
            write(y, i0, x0)
            if m > 1:
                write(y, i1, x1)
            if m > 2:
                write(y, i2, x2)
            if m > 3:
                write(y, i3, x3)
            r += ROWS * lanes
    return _kernel(body, "normalize", dtype, W, columns, index,
                   "*k *k *k *k *f8 *f8 *k " + "i8 " * 10 + "i4")


def _masked(dtype):
    """dy where the forward's y, or what it was made of, is above 0."""
    zero = dtype.type(0)

    @device
    def by_y(dy, y):
        return dy if y > zero else zero

    @device
    def by_x(dy, x, c):
        return dy if ((x - c[0]) - c[1]) * (c[2] * c[3]) + c[4] > zero else zero
    return by_y, by_x


@cache
def sums(dtype, W, columns, index):
    """Σ g and Σ g x̂ of channels, in float64, and dγ and dβ, which they are; g is dy [masked]."""
    read, at, L = reader(W), line_at(W, columns, index), W if columns else 1
    table, same, real, wide = constants(dtype, W, columns), filled(W), dtype.type, np.float64
    zero = real(0)
    by_y, by_x = _masked(dtype)
    by_y, by_x = each(by_y, 2, W), each(by_x, 3, W)
    times = each(device(lambda g, x, c: g * (((x - c[0]) - c[1]) * c[2])), 3, W)
    four = each(device(lambda a, b, c, d: wide((a + b) + (c + d))), 4, W)
    plus, put = each(device(lambda a, b: a + b), 2, W), scatter(W)
    take, plus_parts, put_parts = gather(L), each(device(lambda a, b: a + b), 2, L), scatter(L)
    none_parts, CELLS = filled(L), W * THREADS

    def body(dy, x, y, gamma, beta, mean, invstd, sum_dy, sum_dyx, parts_dy, parts_dyx, counters,
             dgamma, dbeta, R, B, S, shift, segment, P, tiles, N, G, K, option):
        first = cuda.shared.array(CELLS, np.float64)
        second = cuda.shared.array(CELLS, np.float64)
        last = cuda.shared.array(1, np.int32)
        t, tile, rest = cuda.threadIdx.x, cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        k, a, lanes, line = rest % P, rest // P, THREADS >> shift, L << shift
        q = tile * line + (t & ((1 << shift) - 1)) * L
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        base, nothing, none = a * R * B, same(zero), same(0.0)
        s, sx = none, none
        if r < end and q < B:
            c = table(mean, invstd, gamma, beta, a * B + q, B // N, G, K, option)
            while r < end:
                m = _min(ROWS, (end - r + lanes - 1) >> (LOG - shift))
                i0 = base + at(r, q, B, S)
                i1 = base + at(r + (lanes if m > 1 else 0), q, B, S)
                i2 = base + at(r + (2 * lanes if m > 2 else 0), q, B, S)
                i3 = base + at(r + (3 * lanes if m > 3 else 0), q, B, S)
                g0, g1, g2, g3 = read(dy, i0), read(dy, i1), read(dy, i2), read(dy, i3)
                x0, x1, x2, x3 = read(x, i0), read(x, i1), read(x, i2), read(x, i3)
                if option & BY_Y:
                    g0, g1 = by_y(g0, read(y, i0)), by_y(g1, read(y, i1))
                    g2, g3 = by_y(g2, read(y, i2)), by_y(g3, read(y, i3))
                elif option & RELU:
                    g0, g1, g2, g3 = by_x(g0, x0, c), by_x(g1, x1, c), by_x(g2, x2, c), by_x(
                        g3, x3, c)
                g1, g2 = g1 if m > 1 else nothing, g2 if m > 2 else nothing
                g3 = g3 if m > 3 else nothing
                s = plus(s, four(g0, g1, g2, g3))
                sx = plus(sx, four(times(g0, x0, c), times(g1, x1, c), times(g2, x2, c),
                                   times(g3, x3, c)))
                r += ROWS * lanes
        put(first, t * W, s)
        put(second, t * W, sx)
        add_trees(first, second, CELLS, line)
        if P > 1:
            if t < line and tile * line + t < B:
                i = (a * P + k) * B + tile * line + t
                parts_dy[i], parts_dyx[i] = first[t], second[t]
            cuda.threadfence()
            cuda.syncthreads()
            if t == 0:
                last[0] = arrive(counters, a * tiles + tile)
            cuda.syncthreads()
            if last[0] != P - 1:
                return
            if t == 0:
                counters[a * tiles + tile] = 0
            cuda.threadfence()
            p, u, v = t >> shift, none_parts(0.0), none_parts(0.0)
            while p < P and q < B:
                i = (a * P + p) * B + q
                u, v = plus_parts(u, take(parts_dy, i)), plus_parts(v, take(parts_dyx, i))
                p += lanes
            put_parts(first, t * L, u)
            put_parts(second, t * L, v)
            add_trees(first, second, L * THREADS, line)
        c = tile * line + t
        if t < line and c < B:
            c += a * B
            sum_dy[c], sum_dyx[c] = first[t], second[t]
            if option & WRITE:
                dgamma[c], dbeta[c] = real(second[t]), real(first[t])
    return _kernel(body, "sums", dtype, W, columns, index,
                   "*k *k *k *k *k *f8 *f8 *f8 *f8 *f8 *f8 *i4 *k *k " + "i8 " * 10 + "i4")


@cache
def gradient(dtype, W, columns, index):
    """dx = invstd (γ g − a − x̂ b) of the sums: a = Σ γ g / n, b = Σ γ g x̂ / n, without γ in the
    sums unless GAMMA_IN; g, the masked dy, is written to dz with WRITE."""
    read, write, at = reader(W), writer(W), line_at(W, columns, index)
    real, L, wide = dtype.type, W if columns else 1, np.float64
    table = constants(dtype, W, columns)
    by_y, by_x = _masked(dtype)
    by_y, by_x = each(by_y, 2, W), each(by_x, 3, W)

    @device
    def value(g, x, c, e):
        return c[2] * ((g * c[3] - e[0]) - ((x - c[0]) - c[1]) * e[1])
    values = each(value, 4, W)

    @device
    def shares(sum_dy, sum_dyx, invstd, gamma, q, B, G, K, n, option):
        a = q // B
        c = q - a * B
        i = a * G + c // K
        gain = wide(gamma[c]) if option & GAMMA and not option & GAMMA_IN else wide(1)
        mean = sum_dy[i] * gain / n if option & CENTER else wide(0)
        return real(mean), real(sum_dyx[i] * gain / n * invstd[i])
    whole = filled(W)
    if not columns or W == 1:
        means = device(lambda s, sx, i, g, q, B, G, K, n, o: whole(
            shares(s, sx, i, g, q, B, G, K, n, o)))
    elif W == 2:
        means = device(lambda s, sx, i, g, q, B, G, K, n, o: (
            shares(s, sx, i, g, q, B, G, K, n, o), shares(s, sx, i, g, q + 1, B, G, K, n, o)))
    else:
        means = device(lambda s, sx, i, g, q, B, G, K, n, o: (
            shares(s, sx, i, g, q, B, G, K, n, o), shares(s, sx, i, g, q + 1, B, G, K, n, o),
            shares(s, sx, i, g, q + 2, B, G, K, n, o), shares(s, sx, i, g, q + 3, B, G, K, n, o)))

    def body(dy, x, y, gamma, beta, mean, invstd, sum_dy, sum_dyx, dx, dz, R, B, S, shift, segment,
             P, tiles, N, G, K, n, option):
        b = cuda.gridDim.x - 1 - cuda.blockIdx.x
        t, tile, rest = cuda.threadIdx.x, b % tiles, b // tiles
        k, a, lanes = rest % P, rest // P, THREADS >> shift
        q = tile * (L << shift) + (t & ((1 << shift) - 1)) * L
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        if q >= B or r >= end:
            return
        base = a * R * B
        c = table(mean, invstd, gamma, beta, a * B + q, B // N, G, K, option)
        e = means(sum_dy, sum_dyx, invstd, gamma, a * B + q, B // N, G, K, n, option)
        while r < end:
            m = _min(ROWS, (end - r + lanes - 1) >> (LOG - shift))
            i0 = base + at(r, q, B, S)
            i1 = base + at(r + (lanes if m > 1 else 0), q, B, S)
            i2 = base + at(r + (2 * lanes if m > 2 else 0), q, B, S)
            i3 = base + at(r + (3 * lanes if m > 3 else 0), q, B, S)
            g0, g1, g2, g3 = read(dy, i0), read(dy, i1), read(dy, i2), read(dy, i3)
            x0, x1, x2, x3 = read(x, i0), read(x, i1), read(x, i2), read(x, i3)
            if option & BY_Y:
                g0, g1 = by_y(g0, read(y, i0)), by_y(g1, read(y, i1))
                g2, g3 = by_y(g2, read(y, i2)), by_y(g3, read(y, i3))
            elif option & RELU:
                g0, g1, g2, g3 = by_x(g0, x0, c), by_x(g1, x1, c), by_x(g2, x2, c), by_x(g3, x3, c)
            if option & WRITE:
                write(dz, i0, g0)
                if m > 1:
                    write(dz, i1, g1)
                if m > 2:
                    write(dz, i2, g2)
                if m > 3:
                    write(dz, i3, g3)
            write(dx, i0, values(g0, x0, c, e))
            if m > 1:
                write(dx, i1, values(g1, x1, c, e))
            if m > 2:
                write(dx, i2, values(g2, x2, c, e))
            if m > 3:
                write(dx, i3, values(g3, x3, c, e))
            r += ROWS * lanes
    return _kernel(body, "gradient", dtype, W, columns, index,
                   "*k *k *k *k *k *f8 *f8 *f8 *f8 *k *k " + "i8 " * 10 + "f8 i4")


def every():
    """All kernels of this module."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for W in (width(dtype), 1):
            for columns in (True, False):
                for make in (normalize, sums, gradient):
                    yield make(dtype, W, columns, "u4")
