"""What is done to each value once the statistics of its channel are known, and the sums of the
backward. The work is cut as in moments.py; what reads memory for the second time goes backwards,
from what a cache still holds.
"""

from functools import cache

import numpy as np

from ..half import is_half, real as real_of
from .intrinsics import arrive, cuda, device, quotient
from .launch import factory
from .moments import THREADS, add_trees, cases, kernel, places
from .vectors import each, filled, of_lanes, reader, scatter, writer

__all__ = ["ADD", "BETA", "BY_Y", "CENTER", "GAMMA", "GAMMA_IN", "RELU", "WRITE", "add_lines",
           "add_parts", "centered", "differential", "gradient", "masked_lines", "normalize",
           "over_lines", "put_lines", "shares", "sums", "words"]

GAMMA, BETA, ADD, RELU, BY_Y, WRITE, CENTER, GAMMA_IN = 1, 2, 4, 8, 16, 32, 64, 128
_min, _max = min, max


def lines(dtype):
    """Lines of each array of a thread at once; of halves, which take twice the registers, two."""
    return 2 if is_half(dtype) else 4


@cache
def words(dtype):
    """What values of channel c are normalized with: the mean in two words, 1/σ, γ and β."""
    real = real_of(dtype).type
    one, zero = real(1), real(0)

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


@cache
def centered(W):
    """x − mean of x and ``constants``."""
    return each(device(lambda x, c: (x - c[0]) - c[1]), 2, W)


@cache
def normalized(dtype, W):
    """y of x, of what is added, and of ``constants``; what is not below 0."""
    zero = real_of(dtype).type(0)

    @device
    def value(x, z, c):
        return ((x - c[0]) - c[1]) * (c[2] * c[3]) + c[4] + z
    return each(value, 3, W), each(device(lambda v: zero if v < zero else v), 1, W)


@cache
def over_lines(f, arrays, dtype):
    """The function of so many tuples of lines that is f of each of them; and a tuple of the same.
    """
    return each(f, arrays, lines(dtype)), filled(lines(dtype))


@cache
def put_lines(dtype, W):
    """Write the first m lines to where i says."""
    write = writer(W)

    @device
    def two(p, i, m, v):
        write(p, i[0], v[0])
        if m > 1:
            write(p, i[1], v[1])

    @device
    def four(p, i, m, v):
        two(p, i, m, v)
        if m > 2:
            write(p, i[2], v[2])
        if m > 3:
            write(p, i[3], v[3])
    return two if is_half(dtype) else four


@factory
def normalize(dtype, params, W, columns, index):
    """y = ((x − mean) invstd) γ + β [+ z], not below 0 with RELU."""
    place, put, table = (places(W, columns, index, lines(dtype)), put_lines(dtype, W),
                         constants(dtype, W, columns))
    L, (values, clip), none = W if columns else 1, normalized(dtype, W), filled(W)
    (read, same), zero = over_lines(reader(W), 2, dtype), real_of(dtype).type(0)
    values, clip = over_lines(values, 3, dtype)[0], over_lines(clip, 1, dtype)[0]

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
        c = same(table(mean, invstd, gamma, beta, a * B + q, B // N, G, K, option))
        while r < end:
            m, i = place(a * R * B, r, end, q, B, S, shift)
            v, added = read(same(x), i), same(none(zero))
            if option & ADD:
                added = read(same(z), i)
            v = values(v, added, c)
            if option & RELU:
                v = clip(v)
            put(y, i, m, v)
            r += len(i) * (THREADS >> shift)
    return kernel(body, "normalize", dtype, params, W, columns, index,
                  "*k *k *p *p *f8 *f8 *k " + "i8 " * 10 + "i4")


@cache
def masked_lines(dtype, W, columns, index):
    """``places``, g and x there; g is dy where the forward's y, or what it was made of, is above 0.
    """
    place, zero = places(W, columns, index, lines(dtype)), real_of(dtype).type(0)
    read, same = over_lines(reader(W), 2, dtype)
    by_y = each(device(lambda g, y: g if y > zero else zero), 2, W)
    by_x = each(device(lambda g, x, c: g if ((x - c[0]) - c[1]) * (c[2] * c[3]) + c[4] > zero
                       else zero), 3, W)
    by_y, by_x = over_lines(by_y, 2, dtype)[0], over_lines(by_x, 3, dtype)[0]

    @device
    def f(dy, x, y, c, base, r, end, q, B, S, shift, option):
        m, i = place(base, r, end, q, B, S, shift)
        g, v = read(same(dy), i), read(same(x), i)
        if option & BY_Y:
            g = by_y(g, read(same(y), i))
        elif option & RELU:
            g = by_x(g, v, same(c))
        return m, i, g, v
    return f


@cache
def add_lines(dtype, W):
    """Σ g and Σ g x̂ of lanes, with m more lines of ``masked_lines``, each with ``constants``."""
    wide, none, zero, count = np.float64, filled(W), real_of(dtype).type(0), lines(dtype)
    times = each(device(lambda g, x, c: g * (((x - c[0]) - c[1]) * c[2])), 3, W)
    total = {2: lambda a, b: wide(a + b), 4: lambda a, b, c, d: wide((a + b) + (c + d))}[count]
    total, plus = each(device(total), count, W), each(device(lambda a, b: a + b), 2, W)
    there = of_lanes(device(lambda k, m: m > k), count)
    counted = over_lines(device(lambda g, there: g if there else none(zero)), 2, dtype)[0]
    times = over_lines(times, 3, dtype)[0]

    @device
    def f(s, sx, c, m, g, x):
        g = counted(g, there(m))
        return plus(s, total(*g)), plus(sx, total(*times(g, x, c)))
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


@factory
def sums(dtype, params, W, columns, index):
    """Σ g and Σ g x̂ of channels, in float64, and dγ and dβ, which they are; g is dy [masked]."""
    load, add, L = masked_lines(dtype, W, columns, index), add_lines(dtype, W), W if columns else 1
    table, same, put, real = (constants(dtype, W, columns), filled(W), scatter(W),
                              real_of(dtype).type)
    CELLS, copies = W * THREADS, filled(lines(dtype))
    # constants and sums of eight channels are 72 registers: with the compiler for 10.0 and above it
    # takes 144 to spill none, and two blocks have 128 each
    alone = (10, 0) if W == 8 and columns else None

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
                m, i, g, v = load(dy, x, y, c, a * R * B, r, end, q, B, S, shift, option)
                s, sx = add(s, sx, copies(c), m, g, v)
                r += len(i) * (THREADS >> shift)
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
                cuda.threadfence()
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
    return kernel(body, "sums", dtype, params, W, columns, index,
                  "*k *k *k *p *p *f8 *f8 *f8 *f8 *f8 *f8 *i4 *p *p " + "i8 " * 10 + "i4",
                  alone=alone)


@cache
def shares(dtype):
    """Of dx: a = Σ γ g / n and b invstd = invstd Σ γ g x̂ / n, from the sums and channel c's γ."""
    real, wide = real_of(dtype).type, np.float64

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


@factory
def gradient(dtype, params, W, columns, index):
    """dx = invstd (γ g − a − x̂ b) of the sums: a = Σ γ g / n, b = Σ γ g x̂ / n, without γ in the
    sums unless GAMMA_IN; g, the masked dy, is written to dz with WRITE."""
    load, put, L = (masked_lines(dtype, W, columns, index), put_lines(dtype, W),
                    W if columns else 1)
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

    values, same = over_lines(device(lambda g, x, c, e: value(g, apart(x, c), c, e)), 4, dtype)

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
            put(dx, i, m, values(g, v, same(c), same(e)))
            r += len(i) * (THREADS >> shift)
    return kernel(body, "gradient", dtype, params, W, columns, index,
                  "*k *k *k *p *p *f8 *f8 *f8 *f8 *k *k " + "i8 " * 10 + "f8 i4")


def every():
    """All kernels of this module."""
    for kinds in cases():
        for make in (normalize, sums, gradient):
            yield make(*kinds)
