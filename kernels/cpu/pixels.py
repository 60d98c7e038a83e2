"""Group normalization of channels-last memory: a sample is a matrix of pixels × channels, a column
of it a channel.

Pixels are read one after the other, four at a time for sums, whose lines stay in the first level
of cache as the constants do. (A column at a time, over RUN pixels, with both in registers: the
lines of pixels a power of two apart share a few sets of that cache. 8 samples of 256 × 14 × 14 on
two cores of Zen 1, both ways: 338 and 612 us so, 271 and 302 as here.) Sums of RUN pixels
are in the array's dtype, those of all in float64. A large sample is cut into blocks of pixels,
whose statistics are merged.
"""

import math

import numpy as np

from .columns import inlined, inner, zeros
from .group_lines import INVSTD, LOW, WIDE, statistics_of_groups, width
from .layer_norm import unfit
from .simd import (
    absolute,
    after,
    fill,
    fma,
    greater,
    high,
    keep,
    lanes,
    load,
    load_or,
    load_part,
    low,
    maximum,
    narrow,
    number,
    pointer,
    put,
    splat,
    store,
    store_part,
    total,
    where,
)
from .tasks import share, tasks

__all__ = ["RUN", "add", "constants", "forward_pixels", "middle", "settle", "sums_of",
           "values_of"]

RUN = 64                   # pixels


@inner
def add(sums, j, v):
    """sums[j], sums[j + 1], … += v, in float64."""
    store(sums, j, load(sums, j) + low(v))
    j += lanes(sums)
    store(sums, j, load(sums, j) + high(v))


@inner
def _flush(run, W, C, first, sums):
    """Two lines of float64 sums += those of a run, which are 0 then; = those of the first."""
    L, zero = lanes(run), fill(run, 0)
    for line in (0, W):
        for j in range(line, line + C, L):
            v = load(run, j)
            store(run, j, zero)
            if first:
                store(sums, j, low(v))
                store(sums, j + lanes(sums), high(v))
            else:
                add(sums, j, v)


def sums_of(add):
    """The loop over pixels for two sums s, q = add(x, dy, i, n, p, s, q) of each column, p its
    pivot: lines of W float64 sums, by way of those of a run, zeros before and after."""
    @inlined
    def column(x, dy, i, C, four, n, pivots, run, W, j):
        p, s, q = load(pivots, j), load(run, j), load(run, W + j)
        s, q = add(x, dy, i, n, p, s, q)
        if four:
            s, q = add(x, dy, i + C, n, p, s, q)
            s, q = add(x, dy, i + 2 * C, n, p, s, q)
            s, q = add(x, dy, i + 3 * C, n, p, s, q)
        store(run, j, s)
        store(run, W + j, q)

    @inlined
    def row(x, dy, at, C, four, pivots, run, W):
        L = lanes(x)
        for j in range(0, C - L + 1, L):
            column(x, dy, at + j, C, four, L, pivots, run, W, j)
        if C % L:
            j = C - C % L
            column(x, dy, at + j, C, four, C % L, pivots, run, W, j)

    @inner
    def over(x, dy, at, rows, C, W, pivots, run, sums):
        for start in range(at, at + rows * C, RUN * C):
            end = min(start + RUN * C, at + rows * C)
            four = end - (end - start) // C % 4 * C
            for i in range(start, four, 4 * C):
                row(x, dy, i, C, True, pivots, run, W)
            for i in range(four, end, C):
                row(x, dy, i, C, False, pivots, run, W)
            _flush(run, W, C, start == at, sums)
    return over


def values_of(lines, put):
    """The loop over pixels that puts a vector of n results to y from i on: put(x, dy, i, n, k,
    floored, past, y), k = lines(table, j, W) the constants of column j, read for four pixels at
    once."""
    @inlined
    def column(x, dy, i, C, four, n, k, floored, past, y):
        put(x, dy, i, n, k, floored, past, y)
        if four:
            put(x, dy, i + C, n, k, floored, past, y)
            put(x, dy, i + 2 * C, n, k, floored, past, y)
            put(x, dy, i + 3 * C, n, k, floored, past, y)

    @inlined
    def row(x, dy, at, C, four, W, table, floored, past, y):
        L = lanes(x)
        for j in range(0, C - L + 1, L):
            column(x, dy, at + j, C, four, L, lines(table, j, W), floored, past, y)
        if C % L:
            j = C - C % L
            column(x, dy, at + j, C, four, C % L, lines(table, j, W), floored, past, y)

    @inner
    def over(x, dy, at, rows, C, W, table, floored, past, y):
        end = at + rows * C
        four = end - rows % 4 * C
        for i in range(at, four, 4 * C):
            row(x, dy, i, C, True, W, table, floored, past, y)
        for i in range(four, end, C):
            row(x, dy, i, C, False, W, table, floored, past, y)
    return over


@sums_of
@inlined
def _squares(x, _dy, i, n, p, s, q):
    """Σ d and Σ d², d = x − pivot."""
    d = load_part(x, i, n) - p
    return s + d, fma(d, d, q)


@inner
def _first_pivots(x, at, rows, C, pivot):
    step, L = rows // 4 * C, lanes(x)
    for c in range(0, C, L):
        i, k = at + c, min(L, C - c)
        store(pivot, c, middle(x, load_part(x, i, k), load_part(x, i + step, k),
                               load_part(x, i + 2 * step, k), load_part(x, i + 3 * step, k)))


@inlined
def middle(x, a, b, c, d):
    """The mean of four pixels: within half a standard deviation of the mean as a rule. 0 where it
    is not finite."""
    quarter, zero, inf = fill(x, 0.25), fill(x, 0), fill(x, math.inf)
    v = a * quarter + b * quarter + c * quarter + d * quarter
    return where(greater(inf, absolute(v)), v, zero)


@inlined
def settle(s, q, pivot, inverse, rows, zero, far, mean, m2, to, k):
    """Mean and squares about it of k columns whose rows, taken about the pivot, add up to s and
    their squares to q; ``far``, or more where a pivot is too far from its mean."""
    d = s * inverse
    own = d * d * rows
    rest = q - own
    store_part(mean, to, pivot + d, k)
    store_part(m2, to, where(greater(zero, rest), zero, rest), k)
    return where(greater(own, 4.0 * rest), rows, far)


@inner
def _statistics(x, at, rows, C, W, table, sums, mean, m2, to):
    """Mean, and sum of squares about it, of each column. Where a pivot lies more than 2 standard
    deviations from the mean, pixels are read again about the means."""
    _first_pivots(x, at, rows, C, table)
    L, half, zero = lanes(x), lanes(sums), fill(sums, 0)
    inverse, n = fill(sums, 1.0 / rows), fill(sums, rows)
    for final in range(2):
        _squares(x, x, at, rows, C, W, table, after(table, 4 * W), sums)
        far = zero
        for c in range(0, C, L):
            p = load(table, c)
            far = settle(load(sums, c), load(sums, W + c), low(p), inverse, n, zero, far, mean, m2,
                         to + c, min(half, C - c))
            if half < L:
                d = c + half
                far = settle(load(sums, d), load(sums, W + d), high(p), inverse, n, zero, far, mean,
                             m2, to + d, min(half, C - d))
        if final == 1 or total(far) == 0:
            break
        for c in range(C):
            table[c] = number(x, mean[to + c])


@inner
def _merge(block_mean, block_m2, n, B, rows, S, C, G, eps, center, mean, invstd, bad, size):
    """Statistics of the groups of sample n from those of its channels, block by block."""
    D, L, zero = C // G, lanes(block_mean), fill(block_mean, 0)
    inverse = 1.0 / (D * S)
    for g in range(G):
        at, d, q = n * B * C + g * D, zero, zero
        pivot = block_mean[at]
        p = splat(pivot)
        for b in range(B):
            k = fill(block_mean, min(rows, S - b * rows) * inverse)
            for c in range(0, D, L):
                d = d + k * (load_or(block_mean, at + b * C + c, min(L, D - c), p) - p)
        m = pivot + total(d)
        p = splat(m)
        for b in range(B):
            k = fill(block_mean, min(rows, S - b * rows))
            for c in range(0, D, L):
                e = load_or(block_mean, at + b * C + c, min(L, D - c), p) - p
                q = q + load_part(block_m2, at + b * C + c, min(L, D - c)) + k * e * e
        v = total(q) * inverse
        if not center:
            m, v = 0.0, v + m * m
        s = 1.0 / np.sqrt(v + eps)
        lost = unfit(size, v, s, eps) or (not center and v != v)      # NaN, or an infinity
        mean[n * G + g], invstd[n * G + g], bad[n * G + g] = m, s, lost


@inlined
def _line(gamma, beta, c, W, wide):
    scale = gamma * load(wide, INVSTD * W + c)
    return scale, beta - load(wide, LOW * W + c) * scale


@inner
def constants(x, gamma, beta, floor, floored, mean, invstd, n, G, C, W, wide, table):
    """Lines of W constants: the mean's first word, scale, shift and floor of each column."""
    statistics_of_groups(x, mean, invstd, n, G, C // G, W, wide, table)
    L = lanes(x)
    for c in range(0, C, L):
        k = min(L, C - c)
        g, b = load_part(gamma, c, k), load_part(beta, c, k)
        scale, shift = _line(low(g), low(b), c, W, wide)
        scale_2, shift_2 = _line(high(g), high(b), c + lanes(wide), W, wide)
        store(table, W + c, narrow(scale, scale_2, x))
        store(table, 2 * W + c, narrow(shift, shift_2, x))
        if floored:
            store(table, 3 * W + c, load_part(floor, c, k))


@inlined
def _lines(table, j, W):
    return (load(table, j), load(table, W + j), load(table, 2 * W + j), load(table, 3 * W + j))


@inlined
def _value(x, _dy, i, n, k, floored, past, y):
    hi, scale, shift, floor = k
    v = fma(load_part(x, i, n) - hi, scale, shift)
    if floored:
        v = maximum(v, floor)
    if n == lanes(x):
        put(y, i, v, past)
    else:
        store_part(y, i, v, n)


# y = (x − hi) scale + shift, not below the floor: see constants.
_normalize = values_of(_lines, _value)


@inner
def _forward(x, gamma, beta, floor, floored, eps, center, first, last, collect, B, rows, S, C, G,
             past, y, mean, invstd, bad, block_mean, block_m2, size, W, table, wide):
    """Statistics of the channels in blocks first … last, and y if those of the groups are known."""
    sums = after(wide, WIDE * W)
    for u in range(first, last):
        n, b = u // B, u % B * rows
        m, at = min(rows, S - b), (n * S + b) * C
        if collect:
            _statistics(x, at, m, C, W, table, sums, block_mean, block_m2, u * C)
            if B > 1:
                continue
            _merge(block_mean, block_m2, n, B, rows, S, C, G, eps, center, mean, invstd, bad, size)
        constants(x, gamma, beta, floor, floored, mean, invstd, n, G, C, W, wide, table)
        _normalize(x, x, at, m, C, W, table, floored, past, y)


@inner
def _forward_task(t, x, gamma, beta, floor, eps, center, per, collect, B, rows, S, G, past, y, mean,
                  invstd, bad, block_mean, block_m2):
    C, W, last = gamma.size, width(gamma.size), mean.size // G * B
    table, wide = zeros(x, 6 * W), zeros(mean, (WIDE + 2) * W)
    _forward(pointer(x), pointer(gamma), pointer(beta), pointer(floor), floor.size > 0, eps, center,
             t * per, min(last, (t + 1) * per), collect, B, rows, S, C, G, past, pointer(y),
             pointer(mean), pointer(invstd), pointer(bad), pointer(block_mean), pointer(block_m2),
             x.itemsize, W, pointer(table), pointer(wide))
    keep(table)
    keep(wide)


@tasks
def forward_pixels(run, x, gamma, beta, floor, eps, center, per, B, rows, S, G, past, y, mean,
                   invstd, bad):
    """y and the statistics of each sample's groups, x (N S, C), in blocks of so many rows, B of
    which are a sample and ``per`` of which a task; which groups float32 is not enough for. True if
    there are such."""
    C, N = gamma.size, mean.size // G
    n, blocks = (N * B + per - 1) // per, N * B
    block_mean, block_m2 = np.empty(blocks * C), np.empty(blocks * C)
    for phase in range(2 if B > 1 else 1):
        share(_forward_task, n if phase == 0 else -n, run,
              (x, gamma, beta, floor, eps, center, per, phase == 0, B, rows, S, G, past, y, mean,
               invstd, bad, block_mean, block_m2))
        if phase == 0 and B > 1:
            for i in range(N):
                _merge(pointer(block_mean), pointer(block_m2), i, B, rows, S, C, G, eps, center,
                       pointer(mean), pointer(invstd), pointer(bad), x.itemsize)
    keep(block_mean)
    keep(block_m2)
    return bad.sum() > 0
