"""Group normalization of NCHW memory: a sample's group is a row, its channels are planes with
constants of their own.

Functions take pointers: an array that is handed to one is counted up and down, atomically, at every
call. The mean's second word is below a standard deviation of any values that are not all equal, so
that it may be part of the shift: y = (x − hi) scale + (shift − lo scale).
"""

import math

import numpy as np

from .columns import inner
from .jit import kernel, prange
from .layer_norm import CHUNK, about, square, statistics, unfit
from .simd import (
    fill,
    fma,
    keep,
    lanes,
    load,
    load_part,
    number,
    pointer,
    prefetch,
    put,
    splat,
    store_part,
    total,
)

__all__ = ["backward_planes", "forward_planes", "inverses", "low_word", "slopes",
           "unfit_gradients"]

AHEAD = 1024
SIDE, TOGETHER = 16, 1 << 12    # rows, and values of them, between two steps of the same row


@inner
def low_word(hi, mean):
    """What hi leaves of the mean."""
    return mean - hi if abs(hi) < math.inf else 0.0


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
def _normalize(x, gamma, beta, at, c, D, S, mean, invstd, past, y):
    L, hi, n = lanes(x), number(x, mean), S % lanes(x)
    lo, pivot = low_word(hi, mean), splat(hi)
    for k in range(c, c + D):
        scale = gamma[k] * invstd
        a, b, end = fill(x, scale), fill(x, beta[k] - lo * scale), at + S // L * L
        for i in range(at, end, L):
            put(y, i, fma(load(x, i) - pivot, a, b), past)
        if n:
            store_part(y, end, fma(load_part(x, end, n) - pivot, a, b), n)
        at += S


@inner
def _forward(x, gamma, beta, eps, center, first, last, G, D, S, past, y, mean, invstd, bad, size):
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
            _normalize(x, gamma, beta, r * n, r % G * D, D, S, mean[r], invstd[r], past, y)


@kernel
def forward_planes(x, gamma, beta, eps, center, block, G, D, S, past, y, mean, invstd, bad):
    """y and the statistics of the rows of x, D planes of S values each; which of them float32 is
    not enough for. True if there are such."""
    for b in prange((mean.size + block - 1) // block):
        first = np.int64(b) * block
        _forward(pointer(x), pointer(gamma), pointer(beta), eps, center, first,
                 min(mean.size, first + block), G, D, S, past, pointer(y), pointer(mean),
                 pointer(invstd), pointer(bad), x.itemsize)
    return bad.sum() > 0


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
def _row_sums(x, dy, gamma, r, c, D, S, mean, invstd, sum_p, sum_dy):
    """Σ dy x̂ and Σ dy of each plane of row r; the sums of both weighted by γ."""
    hi, g, p = number(x, mean), 0.0, 0.0
    lo = low_word(hi, mean)
    for k in range(D):
        a, q = _plane_sums(x, dy, (r * D + k) * S, S, hi)
        q = (q - lo * a) * invstd
        sum_p[r * D + k], sum_dy[r * D + k] = q, a
        g += gamma[c + k] * a
        p += gamma[c + k] * q
    return g, p


@inner
def inverses(gamma, C, out):
    """1 / γ, or 0 for 0."""
    for c in range(C):
        out[c] = 1.0 / gamma[c] if gamma[c] != 0.0 else 0.0


@inner
def slopes(x, gamma, inverse, invstd, lo, mean_g, mean_p):
    """dx = (dy − pivot) scale + (x − hi) slope + rest. The pivot cancels in exact arithmetic; it
    keeps the digits of a dy that is large against its spread."""
    scale, slope = gamma * invstd, -invstd * mean_p * invstd
    pivot = np.float64(number(x, mean_g * inverse))
    pivot = pivot if abs(pivot) < 1e30 else 0.0
    return pivot, scale, slope, scale * pivot - invstd * mean_g - lo * slope


@inner
def _row_slope(x, dy, gamma, inverse, r, c, D, S, mean, invstd, mean_g, mean_p, past, dx):
    L, hi, n, at = lanes(x), number(x, mean), S % lanes(x), r * D * S
    lo, center = low_word(hi, mean), splat(hi)
    for k in range(c, c + D):
        pivot, scale, slope, rest = slopes(x, np.float64(gamma[k]), inverse[k], invstd, lo, mean_g,
                                           mean_p)
        p, a, b, e = fill(x, pivot), fill(x, scale), fill(x, slope), fill(x, rest)
        end = at + S // L * L
        for i in range(at, end, L):
            put(dx, i, fma(load(dy, i) - p, a, fma(load(x, i) - center, b, e)), past)
        if n:
            d = load_part(x, end, n) - center
            store_part(dx, end, fma(load_part(dy, end, n) - p, a, fma(d, b, e)), n)
        at += S


@inner
def unfit_gradients(size, sum_g, sum_p, invstd):
    """Whether float32 is not enough for the gradients of a group; the product of two invstd is one
    of the constants."""
    return size == 4 and not (abs(sum_g) + abs(sum_p) < 1e37 and 1e-9 < invstd < 1e9)


@inner
def _backward(x, dy, gamma, mean, invstd, center, first, last, G, D, S, past, dx, sum_p, sum_dy,
              bad, size, means, gamma_inverse):
    """dx of rows, and Σ dy x̂ and Σ dy of their planes."""
    inverse, together = 1.0 / (D * S), max(1, min(SIDE, TOGETHER // (D * S)))
    for start in range(first, last, together):
        end = min(last, start + together)
        for r in range(start, end):
            g, p = _row_sums(x, dy, gamma, r, r % G * D, D, S, mean[r], invstd[r], sum_p, sum_dy)
            bad[r] = unfit_gradients(size, g, p, invstd[r])
            means[r - start] = g * inverse if center else 0.0
            means[SIDE + r - start] = p * inverse
        for r in range(start, end):
            _row_slope(x, dy, gamma, gamma_inverse, r, r % G * D, D, S, mean[r], invstd[r],
                       means[r - start], means[SIDE + r - start], past, dx)


@inner
def _backward_task(x, dy, gamma, mean, invstd, center, first, last, G, D, S, past, dx, sum_p,
                   sum_dy, bad):
    means, inverse = np.empty(2 * SIDE), np.empty(gamma.size)
    inverses(pointer(gamma), gamma.size, pointer(inverse))
    _backward(pointer(x), pointer(dy), pointer(gamma), pointer(mean), pointer(invstd), center,
              first, last, G, D, S, past, pointer(dx), pointer(sum_p), pointer(sum_dy),
              pointer(bad), x.itemsize, pointer(means), pointer(inverse))
    keep(means)
    keep(inverse)


@kernel
def backward_planes(x, dy, gamma, mean, invstd, center, block, G, D, S, past, dx, sum_p, sum_dy,
                    bad):
    """dx, and sums over planes; which rows float32 is not enough for. True if there are such."""
    for b in prange((mean.size + block - 1) // block):
        first = np.int64(b) * block
        _backward_task(x, dy, gamma, mean, invstd, center, first, min(mean.size, first + block), G,
                       D, S, past, dx, sum_p, sum_dy, bad)
    return bad.sum() > 0
