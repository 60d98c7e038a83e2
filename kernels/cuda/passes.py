"""What is done to each value once the statistics of its channel are known, and the sums of the
backward. The work is cut as in moments.py; what reads memory for the second time goes backwards,
from what a cache still holds.
"""

from functools import cache

import numpy as np

from .intrinsics import arrive, cuda, device, quotient, width
from .launch import Kernel
from .moments import THREADS, add_trees, line_at
from .vectors import each, filled, of_lanes, reader, scatter, writer

__all__ = ["ADD", "BETA", "BY_Y", "CENTER", "GAMMA", "GAMMA_IN", "RELU", "WRITE", "add_lines",
           "add_parts", "centered", "differential", "four_lines", "gradient", "normalize",
           "put_lines", "shares", "sums", "words"]

ROWS = 4                     # lines of each array of a thread at once
LOG = THREADS.bit_length() - 1
GAMMA, BETA, ADD, RELU, BY_Y, WRITE, CENTER, GAMMA_IN = 1, 2, 4, 8, 16, 32, 64, 128
_min, _max = min, max


@cache
def words(dtype):
    """What values of channel c are normalized with: the mean in two words, 1/σ, γ and β."""
    real, one, zero = dtype.type, dtype.type(1), dtype.type(0)

    @device
    def f(mean, invstd, c, gamma, beta, option):
        high = real(mean)
        low = real(mean - np.float64(high)) if high - high == zero else zero
        return (high, low, real(invstd), gamma[c] if option & GAMMA else one,
                beta[c] if option & BETA else zero)
    return f


@cache
def constants(dtype, W, columns):
    """``words`` for each number of a line, from those of column, or channel, q; channels c share
    statistics in groups of K, samples have G."""
    of = words(dtype)

    @device
    def f(k, mean, invstd, gamma, beta, q, B, G, K, option):
        q += k
        a = q // B
        c = q - a * B
        i = a * G + c // K
        return of(mean[i], invstd[i], c, gamma, beta, option)
    return of_lanes(f, W, not columns)


def _kernel(body, name, dtype, W, columns, index, parameters):
    kind = dtype.str[1:]
    layout = "columns" if columns else f"segments_{index}"
    return Kernel(body, parameters.replace("k", kind), name=f"{name}_{kind}_{W}_{layout}",
                  threads=THREADS, minimum=2)


@cache
def centered(W):
    """x − mean of x and ``constants``."""
    return each(device(lambda x, c: (x - c[0]) - c[1]), 2, W)


@cache
def normalized(dtype, W):
    """y of x, of what is added, and of ``constants``; what is not below 0."""
    zero = dtype.type(0)

    @device
    def value(x, z, c):
        return ((x - c[0]) - c[1]) * (c[2] * c[3]) + c[4] + z
    return each(value, 3, W), each(device(lambda v: zero if v < zero else v), 1, W)


@cache
def four_places(W, columns, index):
    """How many of lines r, r + lanes … there are before ``end``, at most ROWS, and where they lie;
    others are the first again."""
    at = line_at(W, columns, index)

    @device
    def f(base, r, end, q, B, S, shift):
        lanes = THREADS >> shift
        m = _min(ROWS, (end - r + lanes - 1) >> (LOG - shift))
        return m, (base + at(r, q, B, S), base + at(r + (lanes if m > 1 else 0), q, B, S),
                   base + at(r + (2 * lanes if m > 2 else 0), q, B, S),
                   base + at(r + (3 * lanes if m > 3 else 0), q, B, S))
    return f


@cache
def put_lines(W):
    """Write the first m of four lines to where i says."""
    write = writer(W)

    @device
    def f(p, i, m, v):
        write(p, i[0], v[0])
        if m > 1:
            write(p, i[1], v[1])
        if m > 2:
            write(p, i[2], v[2])
        if m > 3:
            write(p, i[3], v[3])
    return f


@cache
def normalize(dtype, W, columns, index):
    """y = ((x − mean) invstd) γ + β [+ z], not below 0 with RELU."""
    read, put, places = reader(W), put_lines(W), four_places(W, columns, index)
    table, same, L = constants(dtype, W, columns), filled(W), W if columns else 1
    (values, clip), zero = normalized(dtype, W), dtype.type(0)

    def body(x, z, gamma, beta, mean, invstd, y, R, B, S, shift, segment, P, tiles, N, G, K,
             option):
        b = cuda.gridDim.x - 1 - cuda.blockIdx.x
        t, tile, rest = cuda.threadIdx.x, b % tiles, b // tiles
        k, a = rest % P, rest // P
        q = tile * (L << shift) + (t & ((1 << shift) - 1)) * L
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        if q >= B or r >= end:
            return
        # segments of samples with statistics of their own are channels of one sample: B // N each
        c = table(mean, invstd, gamma, beta, a * B + q, B // N, G, K, option)
        nothing = same(zero)
        while r < end:
            m, (i0, i1, i2, i3) = places(a * R * B, r, end, q, B, S, shift)
            x0, x1, x2, x3 = read(x, i0), read(x, i1), read(x, i2), read(x, i3)
            z0, z1, z2, z3 = nothing, nothing, nothing, nothing
            if option & ADD:
                z0, z1, z2, z3 = read(z, i0), read(z, i1), read(z, i2), read(z, i3)
            x0, x1 = values(x0, z0, c), values(x1, z1, c)
            x2, x3 = values(x2, z2, c), values(x3, z3, c)
            if option & RELU:
                x0, x1, x2, x3 = clip(x0), clip(x1), clip(x2), clip(x3)
            put(y, (i0, i1, i2, i3), m, (x0, x1, x2, x3))
            r += ROWS * (THREADS >> shift)
    return _kernel(body, "normalize", dtype, W, columns, index,
                   "*k *k *k *k *f8 *f8 *k " + "i8 " * 10 + "i4")


@cache
def four_lines(dtype, W, columns, index):
    """``four_places``, g and x there; g is dy where the forward's y, or what it was made of, is
    above 0."""
    read, places, zero = reader(W), four_places(W, columns, index), dtype.type(0)
    by_y = each(device(lambda g, y: g if y > zero else zero), 2, W)
    by_x = each(device(lambda g, x, c: g if ((x - c[0]) - c[1]) * (c[2] * c[3]) + c[4] > zero
                       else zero), 3, W)

    @device
    def f(dy, x, y, c, base, r, end, q, B, S, shift, option):
        m, (i0, i1, i2, i3) = places(base, r, end, q, B, S, shift)
        g0, g1, g2, g3 = read(dy, i0), read(dy, i1), read(dy, i2), read(dy, i3)
        x0, x1, x2, x3 = read(x, i0), read(x, i1), read(x, i2), read(x, i3)
        if option & BY_Y:
            g0, g1 = by_y(g0, read(y, i0)), by_y(g1, read(y, i1))
            g2, g3 = by_y(g2, read(y, i2)), by_y(g3, read(y, i3))
        elif option & RELU:
            g0, g1, g2, g3 = by_x(g0, x0, c), by_x(g1, x1, c), by_x(g2, x2, c), by_x(g3, x3, c)
        return m, (i0, i1, i2, i3), (g0, g1, g2, g3), (x0, x1, x2, x3)
    return f


@cache
def add_lines(dtype, W):
    """Σ g and Σ g x̂ of lanes, with m more lines of ``four_lines``."""
    wide, same, zero = np.float64, filled(W), dtype.type(0)
    times = each(device(lambda g, x, c: g * (((x - c[0]) - c[1]) * c[2])), 3, W)
    four = each(device(lambda a, b, c, d: wide((a + b) + (c + d))), 4, W)
    plus = each(device(lambda a, b: a + b), 2, W)

    @device
    def f(s, sx, c, m, g, x):
        (g0, g1, g2, g3), nothing = g, same(zero)
        g1, g2 = g1 if m > 1 else nothing, g2 if m > 2 else nothing
        g3 = g3 if m > 3 else nothing
        return (plus(s, four(g0, g1, g2, g3)),
                plus(sx, four(times(g0, x[0], c), times(g1, x[1], c), times(g2, x[2], c),
                              times(g3, x[3], c))))
    return f


@device
def add_parts(parts_dy, parts_dyx, at, there, B, line, P, cells, cells_x):
    """Add what the P blocks of a tile have found, the first of it at ``at``, into cells: of as many
    of a line's channels as are there."""
    t, s, sx = cuda.threadIdx.x, 0.0, 0.0
    p, c = quotient(np.uint32(t), np.uint32(line)), t & (line - 1)
    if c < there:
        while p < P:
            s += parts_dy[at + p * B + c]
            sx += parts_dyx[at + p * B + c]
            p += THREADS // line
    cells[t], cells_x[t] = s, sx
    add_trees(cells, cells_x, THREADS, line)


@cache
def sums(dtype, W, columns, index):
    """Σ g and Σ g x̂ of channels, in float64, and dγ and dβ, which they are; g is dy [masked]."""
    load, add, L = four_lines(dtype, W, columns, index), add_lines(dtype, W), W if columns else 1
    table, same, real, put = constants(dtype, W, columns), filled(W), dtype.type, scatter(W)
    CELLS = W * THREADS

    def body(dy, x, y, gamma, beta, mean, invstd, sum_dy, sum_dyx, parts_dy, parts_dyx, counters,
             dgamma, dbeta, R, B, S, shift, segment, P, tiles, N, G, K, option):
        first = cuda.shared.array(CELLS, np.float64)
        second = cuda.shared.array(CELLS, np.float64)
        last = cuda.shared.array(1, np.int32)
        t, tile, rest = cuda.threadIdx.x, cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        k, a, line = rest % P, rest // P, L << shift
        q = tile * line + (t & ((1 << shift) - 1)) * L
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        s, sx = same(0.0), same(0.0)
        if r < end and q < B:
            c = table(mean, invstd, gamma, beta, a * B + q, B // N, G, K, option)
            while r < end:
                m, _, g, v = load(dy, x, y, c, a * R * B, r, end, q, B, S, shift, option)
                s, sx = add(s, sx, c, m, g, v)
                r += ROWS * (THREADS >> shift)
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
            at = tile * line
            add_parts(parts_dy, parts_dyx, a * P * B + at, B - at, B, line, P, first, second)
        c = tile * line + t
        if t < line and c < B:
            c += a * B
            sum_dy[c], sum_dyx[c] = first[t], second[t]
            if option & WRITE:
                dgamma[c], dbeta[c] = real(second[t]), real(first[t])
    return _kernel(body, "sums", dtype, W, columns, index,
                   "*k *k *k *k *k *f8 *f8 *f8 *f8 *f8 *f8 *i4 *k *k " + "i8 " * 10 + "i4")


@cache
def shares(dtype):
    """Of dx: a = Σ γ g / n and b invstd = invstd Σ γ g x̂ / n, from the sums and channel c's γ."""
    real, wide = dtype.type, np.float64

    @device
    def f(sum_dy, sum_dyx, invstd, c, gamma, n, option):
        gain = wide(gamma[c]) if option & GAMMA and not option & GAMMA_IN else wide(1)
        return (real(sum_dy * gain / n if option & CENTER else wide(0)),
                real(sum_dyx * gain / n * invstd))
    return f


@cache
def differential(W):
    """dx of g and of x − mean, of ``constants`` and of ``shares``."""
    return each(device(lambda g, d, c, e: c[2] * ((g * c[3] - e[0]) - d * e[1])), 4, W)


@cache
def gradient(dtype, W, columns, index):
    """dx = invstd (γ g − a − x̂ b) of the sums: a = Σ γ g / n, b = Σ γ g x̂ / n, without γ in the
    sums unless GAMMA_IN; g, the masked dy, is written to dz with WRITE."""
    load, put, L = four_lines(dtype, W, columns, index), put_lines(W), W if columns else 1
    table, value, apart, share = (constants(dtype, W, columns), differential(W), centered(W),
                                  shares(dtype))

    @device
    def of(k, sum_dy, sum_dyx, invstd, gamma, q, B, G, K, n, option):
        q += k
        a = q // B
        c = q - a * B
        i = a * G + c // K
        return share(sum_dy[i], sum_dyx[i], invstd[i], c, gamma, n, option)
    means = of_lanes(of, W, not columns)

    @device
    def values(g, x, c, e):
        return value(g, apart(x, c), c, e)

    def body(dy, x, y, gamma, beta, mean, invstd, sum_dy, sum_dyx, dx, dz, R, B, S, shift, segment,
             P, tiles, N, G, K, n, option):
        b = cuda.gridDim.x - 1 - cuda.blockIdx.x
        t, tile, rest = cuda.threadIdx.x, b % tiles, b // tiles
        k, a = rest % P, rest // P
        q = tile * (L << shift) + (t & ((1 << shift) - 1)) * L
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        if q >= B or r >= end:
            return
        c = table(mean, invstd, gamma, beta, a * B + q, B // N, G, K, option)
        e = means(sum_dy, sum_dyx, invstd, gamma, a * B + q, B // N, G, K, n, option)
        while r < end:
            m, i, g, v = load(dy, x, y, c, a * R * B, r, end, q, B, S, shift, option)
            if option & WRITE:
                put(dz, i, m, g)
            put(dx, i, m, (values(g[0], v[0], c, e), values(g[1], v[1], c, e),
                           values(g[2], v[2], c, e), values(g[3], v[3], c, e)))
            r += ROWS * (THREADS >> shift)
    return _kernel(body, "gradient", dtype, W, columns, index,
                   "*k *k *k *k *k *f8 *f8 *f8 *f8 *k *k " + "i8 " * 10 + "f8 i4")


def every():
    """All kernels of this module."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for W in (width(dtype), 1):
            for columns in (True, False):
                for make in (normalize, sums, gradient):
                    yield make(dtype, W, columns, "u4")
