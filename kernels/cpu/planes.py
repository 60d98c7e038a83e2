"""Group normalization of NCHW memory: a sample's group is a row, its channels are planes with
constants of their own.

Functions take pointers: an array that is handed to one is counted up and down, atomically, at every
call. The mean's second word is below a standard deviation of any values that are not all equal, so
that it may be part of the shift: y = (x − hi) scale + (shift − lo scale).

With ``floored``, y is not below ``floor`` of its channel, and dy counts where it was above: the
backward makes the values before the maximum again, to the bit.
"""

import math

import numpy as np

from .columns import inlined, inner, zeros
from .group_lines import (
    INVSTD,
    LOW,
    MEAN_G,
    MEAN_P,
    WIDE,
    gammas,
    low_word,
    slopes,
    spread,
    width,
)
from .layer_norm import CHUNK, about, square, statistics, unfit
from .simd import (
    fill,
    fma,
    greater,
    keep,
    lanes,
    load,
    load_part,
    maximum,
    number,
    pointer,
    prefetch,
    put,
    splat,
    store_part,
    total,
    where,
)
from .tasks import share, tasks

__all__ = ["above", "add_up_all", "backward_planes", "forward_planes", "unfit_gradients"]

AHEAD = 1024
SIDE, TOGETHER = 16, 1 << 12    # rows, and values of them, between two steps of the same row
u = np.uintp                    # an index that is not negative


@inner
def _moments(x, at, n, inverse):
    """Mean and variance of a row of n values; ``inverse`` is 1 / n. A row of one chunk does not
    wait for the divisions of several."""
    pivot = x[at]
    if n <= 2 * CHUNK * lanes(x) and abs(pivot) < math.inf:
        s, q = about(x, at, n, pivot)
        d = s * inverse
        q -= d * d * n
        if not d * d * n > 4.0 * q:
            return pivot + d, (0.0 if q < 0.0 else q) * inverse
    return statistics(x, at, n)


@inner
def _line(x, scale, beta, lo):
    """Slope and shift of y as a function of x − hi."""
    return fill(x, scale), fill(x, beta - lo * scale)


@inner
def _normalize(x, gamma, beta, floor, floored, at, c, D, S, mean, invstd, past, y):
    L, hi, n = lanes(x), number(x, mean), S % lanes(x)
    lo, pivot = low_word(hi, mean), splat(hi)
    for k in range(c, c + D):
        a, b = _line(x, gamma[k] * invstd, beta[k], lo)
        t, end = fill(x, floor[k] if floored else 0.0), at + S // L * L
        for i in range(at, end, L):
            v = fma(load(x, i) - pivot, a, b)
            if floored:
                v = maximum(v, t)
            put(y, i, v, past)
        if n:
            v = fma(load_part(x, end, n) - pivot, a, b)
            if floored:
                v = maximum(v, t)
            store_part(y, end, v, n)
        at += S


@inner
def _forward(x, gamma, beta, floor, floored, eps, center, first, last, G, D, S, past, y, mean,
             invstd, bad, size):
    """Statistics and y of rows."""
    n = D * S
    inverse, together = 1.0 / n, max(1, min(SIDE, TOGETHER // n))
    for start in range(first, last, together):
        end = min(last, start + together)
        for r in range(start, end):
            m, v = 0.0, 0.0
            if center:
                m, v = _moments(x, r * n, n, inverse)
            else:
                v = square(x, r * n, n)
            s = 1.0 / np.sqrt(v + eps)
            mean[r], invstd[r], bad[r] = m, s, unfit(size, v, s, eps)
        for r in range(start, end):
            _normalize(x, gamma, beta, floor, floored, r * n, r % G * D, D, S, mean[r], invstd[r],
                       past, y)


@inner
def _forward_task(t, x, gamma, beta, floor, eps, center, block, G, D, S, past, y, mean, invstd,
                  bad):
    _forward(pointer(x), pointer(gamma), pointer(beta), pointer(floor), floor.size > 0, eps, center,
             t * block, min(mean.size, (t + 1) * block), G, D, S, past, pointer(y), pointer(mean),
             pointer(invstd), pointer(bad), x.itemsize)


@tasks
def forward_planes(run, x, gamma, beta, floor, eps, center, block, G, D, S, past, y, mean, invstd,
                   bad):
    """y and the statistics of the rows of x, D planes of S values each; which of them float32 is
    not enough for. True if there are such. An empty floor is none."""
    share(_forward_task, (mean.size + block - 1) // block, run,
          (x, gamma, beta, floor, eps, center, block, G, D, S, past, y, mean, invstd, bad))
    return bad.sum() > 0


@inlined
def above(d, x, a, b, t, zero):
    """d where a x + b is above t."""
    return where(greater(fma(x, a, b), t), d, zero)


@inner
def _floored_sums(x, dy, at, S, pivot, a, b, t):
    """Σ dy and Σ dy (x − pivot) over one plane where y is above its floor, and Σ dy where not."""
    L, p, zero, last = lanes(x), splat(pivot), fill(x, 0), at + S
    sum_dy = sum_p = sum_rest = 0.0
    while at < last:
        s = q = r = zero
        end = min(last, at + CHUNK * L)
        while at < end:
            n = min(L, end - at)
            prefetch(x, at + AHEAD)
            prefetch(dy, at + AHEAD)
            d, e = load_part(dy, at, n), load_part(x, at, n) - p
            g = above(d, e, a, b, t, zero)
            s, q, r = s + g, fma(g, e, q), r + (d - g)
            at += n
        sum_dy += np.float64(total(s))
        sum_p += np.float64(total(q))
        sum_rest += np.float64(total(r))
    return sum_dy, sum_p, sum_rest


@inner
def _plane_sums(x, dy, at, S, pivot):
    """Σ dy and Σ dy (x − pivot) over one plane."""
    L, p = lanes(x), splat(pivot)
    zero, sum_dy, sum_p, last = fill(x, 0), 0.0, 0.0, at + S
    while at < last:
        a = b = q = r = zero
        end = min(last, at + 2 * CHUNK * L)
        while at + 2 * L <= end:
            for k in range(at, at + 2 * L, L):
                prefetch(x, k + AHEAD)
                prefetch(dy, k + AHEAD)
            d, e = load(dy, at), load(dy, at + L)
            a, b = a + d, b + e
            q = fma(d, load(x, at) - p, q)
            r = fma(e, load(x, at + L) - p, r)
            at += 2 * L
        if at + L <= end:
            d = load(dy, at)
            a, q = a + d, fma(d, load(x, at) - p, q)
            at += L
        if at < end:
            d = load_part(dy, at, end - at)
            b, r = b + d, fma(d, load_part(x, at, end - at) - p, r)
            at = end
        sum_dy += np.float64(total(a + b))
        sum_p += np.float64(total(q + r))
    return sum_dy, sum_p


@inner
def _row_sums(x, dy, gamma, beta, floor, floored, r, c, D, S, mean, invstd, sum_p, sum_dy, rest):
    """Σ dy x̂, Σ dy and the rest of dy of each plane of row r; the sums of the first two weighted by
    γ."""
    hi, g, p = number(x, mean), 0.0, 0.0
    lo = low_word(hi, mean)
    for k in range(D):
        at, a, q = (r * D + k) * S, 0.0, 0.0
        if floored:
            scale, shift = _line(x, gamma[c + k] * invstd, beta[c + k], lo)
            a, q, rest[r * D + k] = _floored_sums(x, dy, at, S, hi, scale, shift,
                                                  fill(x, floor[c + k]))
        else:
            a, q = _plane_sums(x, dy, at, S, hi)
        q = (q - lo * a) * invstd
        sum_p[r * D + k], sum_dy[r * D + k] = q, a
        g += gamma[c + k] * a
        p += gamma[c + k] * q
    return g, p


@inner
def _row_slope(x, dy, gamma, beta, floor, floored, r, c, D, S, mean, invstd, W, table, past, dx):
    L, hi, n, at = lanes(x), number(x, mean), S % lanes(x), r * D * S
    lo, center, zero = low_word(hi, mean), splat(hi), fill(x, 0)
    for k in range(c, c + D):
        p, a = splat(table[k]), splat(table[W + k])
        b, e = splat(table[2 * W + k]), splat(table[3 * W + k])
        end, v, w, t = at + S // L * L, zero, zero, zero
        if floored:                              # else there is no β
            v, w = _line(x, gamma[k] * invstd, beta[k], lo)
            t = fill(x, floor[k])
        for i in range(at, end, L):
            g, d = load(dy, i), load(x, i) - center
            if floored:
                g = above(g, d, v, w, t, zero)
            put(dx, i, fma(g - p, a, fma(d, b, e)), past)
        if n:
            g, d = load_part(dy, end, n), load_part(x, end, n) - center
            if floored:
                g = above(g, d, v, w, t, zero)
            store_part(dx, end, fma(g - p, a, fma(d, b, e)), n)
        at += S


@inner
def unfit_gradients(size, sum_g, sum_p, invstd):
    """Whether float32 is not enough for the gradients of a group; the product of two invstd is one
    of the constants."""
    return size == 4 and not (abs(sum_g) + abs(sum_p) < 1e37 and 1e-9 < invstd < 1e9)


@inner
def _backward(x, dy, gamma, beta, floor, floored, mean, invstd, center, first, last, G, D, S, past,
              dx, sum_p, sum_dy, rest, bad, size, W, wide, table):
    """dx of rows, and Σ dy x̂ and Σ dy of their planes."""
    inverse, together = 1.0 / (D * S), max(1, min(SIDE, TOGETHER // (D * S)))
    start = first
    while start < last:
        end = min(last, start + together, start - start % G + G)       # of one sample
        for r in range(start, end):
            c, hi = r % G * D, number(x, mean[r])
            g, p = _row_sums(x, dy, gamma, beta, floor, floored, r, c, D, S, mean[r], invstd[r],
                             sum_p, sum_dy, rest)
            bad[r] = unfit_gradients(size, g, p, invstd[r])
            spread(wide, INVSTD * W + c, D, invstd[r])
            spread(wide, LOW * W + c, D, low_word(hi, mean[r]))
            spread(wide, MEAN_G * W + c, D, g * inverse if center else 0.0)
            spread(wide, MEAN_P * W + c, D, p * inverse)
        slopes(x, start % G * D, ((end - 1) % G + 1) * D, W, wide, table)
        for r in range(start, end):
            _row_slope(x, dy, gamma, beta, floor, floored, r, r % G * D, D, S, mean[r], invstd[r],
                       W, table, past, dx)
        start = end


@inner
def _backward_task(t, x, dy, gamma, beta, floor, mean, invstd, center, block, G, D, S, past, dx,
                   sum_p, sum_dy, rest, bad):
    W = width(gamma.size)
    wide, table = zeros(mean, WIDE * W), zeros(x, 4 * W)
    gammas(pointer(gamma), gamma.size, W, pointer(wide))
    _backward(pointer(x), pointer(dy), pointer(gamma), pointer(beta), pointer(floor),
              floor.size > 0, pointer(mean), pointer(invstd), center, t * block,
              min(mean.size, (t + 1) * block), G, D, S, past, pointer(dx), pointer(sum_p),
              pointer(sum_dy), pointer(rest), pointer(bad), x.itemsize, W, pointer(wide),
              pointer(table))
    keep(wide)
    keep(table)


@inner
def add_up(parts, C, out):
    """Rows of C values summed, in order."""
    sums = np.zeros(C)
    for at in range(0, parts.size, C):
        for c in range(C):
            sums[u(c)] += parts[u(at + c)]
    for c in range(C):
        out[u(c)] = sums[u(c)]


@inner
def add_up_all(sum_p, sum_dy, rest, sums):
    """Lines of ``sums``: dγ, dβ and, if there is a third, what is left of dy."""
    C = sums.shape[1]
    add_up(sum_p, C, sums[0])
    add_up(sum_dy, C, sums[1])
    if sums.shape[0] > 2:
        add_up(rest, C, sums[2])


@tasks
def backward_planes(run, x, dy, gamma, beta, floor, mean, invstd, center, block, G, D, S, past, dx,
                    bad, sums):
    """dx, and dγ, dβ and, with a floor, what is left of dy, over N and S; which rows float32 is not
    enough for. True if there are such."""
    n = mean.size * D
    sum_p, sum_dy, rest = np.empty(n), np.empty(n), np.empty(n if floor.size else 0)
    share(_backward_task, (mean.size + block - 1) // block, run,
          (x, dy, gamma, beta, floor, mean, invstd, center, block, G, D, S, past, dx, sum_p, sum_dy,
           rest, bad))
    add_up_all(sum_p, sum_dy, rest, sums)
    return bad.sum() > 0
