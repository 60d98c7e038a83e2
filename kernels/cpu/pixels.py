"""Group normalization of channels-last memory: a sample is a matrix of pixels × channels, a column
of it a channel.

Columns are taken a vector at a time, over RUN pixels with the constants in registers; the next RUN
are asked for meanwhile. Sums of a run are in the array's dtype, of runs in float64. A large sample
is cut into blocks of pixels, whose statistics are merged.
"""

import math

import numpy as np

from .columns import inner
from .jit import kernel, prange
from .layer_norm import unfit
from .planes import low_word
from .simd import (
    fill,
    fma,
    high,
    keep,
    lanes,
    load,
    load_part,
    low,
    maximum,
    number,
    pointer,
    prefetch,
    put,
    store,
    store_part,
)

__all__ = ["RUN", "add", "constants", "forward_pixels"]

RUN = 64                   # pixels


@inner
def add(sums, j, v):
    """sums[j], sums[j + 1], … += v, in float64."""
    store(sums, j, load(sums, j) + low(v))
    j += lanes(sums)
    store(sums, j, load(sums, j) + high(v))


@inner
def _squares(x, at, rows, C, pivot, sums, squares):
    """Adds Σ d and Σ d² of each column, d = x − pivot."""
    L, zero = lanes(x), fill(x, 0)
    for start in range(at, at + rows * C, RUN * C):
        m = min(RUN, (at + rows * C - start) // C)
        for j in range(0, C, L):
            k, i, p = min(L, C - j), start + j, load(pivot, j)
            a = b = q = r = zero
            for _ in range(m // 2):
                prefetch(x, i + RUN * C)
                prefetch(x, i + RUN * C + C)
                d, e = load_part(x, i, k) - p, load_part(x, i + C, k) - p
                a, b, q, r = a + d, b + e, fma(d, d, q), fma(e, e, r)
                i += 2 * C
            if m % 2:
                d = load_part(x, i, k) - p
                a, q = a + d, fma(d, d, q)
            add(sums, j, a + b)
            add(squares, j, q + r)


@inner
def _first_pivots(x, at, rows, C, pivot):
    """The mean of four pixels: within half a standard deviation of the mean as a rule."""
    step = rows // 4 * C
    for c in range(C):
        i = at + c
        v = (np.float64(x[i]) + x[i + step] + x[i + 2 * step] + x[i + 3 * step]) * 0.25
        v = number(x, v)
        pivot[c] = v if abs(v) < math.inf else 0.0


@inner
def _statistics(x, at, rows, C, W, pivot, sums, squares, mean, m2, to):
    """Mean, and sum of squares about it, of each column. Where a pivot lies more than 2 standard
    deviations from the mean, pixels are read again about the means."""
    _first_pivots(x, at, rows, C, pivot)
    inverse = 1.0 / rows
    for final in range(2):
        for c in range(W):
            sums[c] = squares[c] = 0.0
        _squares(x, at, rows, C, pivot, sums, squares)
        far = False
        for c in range(C):
            d = sums[c] * inverse
            q = squares[c] - d * d * rows
            far |= d * d * rows > 4.0 * q
            mean[to + c] = pivot[c] + d
            m2[to + c] = 0.0 if q < 0.0 else q
        if not far or final == 1:
            break
        for c in range(C):
            pivot[c] = number(x, mean[to + c])


@inner
def _merge(block_mean, block_m2, n, B, rows, S, C, G, eps, center, mean, invstd, bad, size):
    """Statistics of the groups of sample n from those of its channels, block by block."""
    D = C // G
    inverse = 1.0 / (D * S)
    for g in range(G):
        at, d, q = n * B * C + g * D, 0.0, 0.0
        pivot = block_mean[at]
        for b in range(B):
            k = min(rows, S - b * rows) * inverse
            for c in range(at + b * C, at + b * C + D):
                d += k * (block_mean[c] - pivot)
        m = pivot + d
        for b in range(B):
            k = min(rows, S - b * rows)
            for c in range(at + b * C, at + b * C + D):
                q += block_m2[c] + k * (block_mean[c] - m) ** 2
        v = q * inverse
        if not center:
            m, v = 0.0, v + m * m
        s = 1.0 / np.sqrt(v + eps)
        lost = unfit(size, v, s, eps) or (not center and v != v)      # NaN, or an infinity
        mean[n * G + g], invstd[n * G + g], bad[n * G + g] = m, s, lost


@inner
def constants(x, gamma, beta, floor, floored, mean, invstd, n, G, C, W, table):
    """Lines of W constants: the mean's first word, scale, shift and floor of each column."""
    D = C // G
    for g in range(G):
        m, s = mean[n * G + g], invstd[n * G + g]
        word = number(x, m)
        lo = low_word(word, m)
        for c in range(g * D, (g + 1) * D):
            v = gamma[c] * s
            table[c], table[W + c] = word, number(x, v)
            table[2 * W + c] = number(x, beta[c] - lo * v)
    for c in range(C if floored else 0):
        table[3 * W + c] = floor[c]


@inner
def _normalize(x, at, rows, C, W, table, floored, past, y):
    """y = (x − hi) scale + shift, not below the floor."""
    L = lanes(x)
    for start in range(at, at + rows * C, RUN * C):
        m = min(RUN, (at + rows * C - start) // C)
        for j in range(0, C, L):
            k, i, p, a = C - j, start + j, load(table, j), load(table, W + j)
            b, t = load(table, 2 * W + j), load(table, 3 * W + j)
            if k >= L:
                for _ in range(m):
                    v = fma(load(x, i) - p, a, b)
                    if floored:
                        v = maximum(v, t)
                    put(y, i, v, past)
                    i += C
            else:
                for _ in range(m):
                    v = fma(load_part(x, i, k) - p, a, b)
                    if floored:
                        v = maximum(v, t)
                    store_part(y, i, v, k)
                    i += C


@inner
def _forward(x, gamma, beta, floor, floored, eps, center, first, last, collect, B, rows, S, C, G,
             past, y, mean, invstd, bad, block_mean, block_m2, size, W, room, sums):
    """Statistics of the channels in blocks first … last, and y if those of the groups are known."""
    table = pointer(room)
    s, q = pointer(sums), pointer(sums[W:])
    for u in range(first, last):
        n, b = u // B, u % B * rows
        m, at = min(rows, S - b), (n * S + b) * C
        if collect:
            _statistics(x, at, m, C, W, table, s, q, block_mean, block_m2, u * C)
            if B > 1:
                continue
            _merge(block_mean, block_m2, n, B, rows, S, C, G, eps, center, mean, invstd, bad, size)
        constants(x, gamma, beta, floor, floored, mean, invstd, n, G, C, W, table)
        _normalize(x, at, m, C, W, table, floored, past, y)
    keep(room)
    keep(sums)


@inner
def _forward_task(x, gamma, beta, floor, eps, center, first, last, collect, B, rows, S, G, past, y,
                  mean, invstd, bad, block_mean, block_m2):
    C = gamma.size
    W = (C + 31) // 16 * 16
    _forward(pointer(x), pointer(gamma), pointer(beta), pointer(floor), floor.size > 0, eps, center,
             first, last, collect, B, rows, S, C, G, past, pointer(y), pointer(mean),
             pointer(invstd), pointer(bad), pointer(block_mean), pointer(block_m2), x.itemsize, W,
             np.zeros(4 * W, x.dtype), np.empty(2 * W))


@kernel
def forward_pixels(x, gamma, beta, floor, eps, center, per, B, rows, S, G, past, y, mean, invstd,
                   bad):
    """y and the statistics of each sample's groups, x (N S, C), in blocks of so many rows, B of
    which are a sample and ``per`` of which a task; which groups float32 is not enough for. True if
    there are such."""
    C, N = gamma.size, mean.size // G
    tasks, blocks = (N * B + per - 1) // per, N * B
    block_mean, block_m2 = np.empty(blocks * C), np.empty(blocks * C)
    for phase in range(2 if B > 1 else 1):
        for t in prange(tasks):
            u = np.int64(t)
            if phase == 1:                        # from what was read last
                u = tasks - 1 - u
            _forward_task(x, gamma, beta, floor, eps, center, u * per, min(blocks, (u + 1) * per),
                          phase == 0, B, rows, S, G, past, y, mean, invstd, bad, block_mean,
                          block_m2)
        if phase == 0 and B > 1:
            for n in range(N):
                _merge(pointer(block_mean), pointer(block_m2), n, B, rows, S, C, G, eps, center,
                       pointer(mean), pointer(invstd), pointer(bad), x.itemsize)
    keep(block_mean)
    keep(block_m2)
    return bad.sum() > 0
