"""Batch normalization of planes in a cache, a channel after the other.

The planes of a channel (a vector each at least, and all in a cache when they are read again) go
through registers, and so do its constants: tables of columns, which pay where many rows share them,
take longer to fill than 4 planes of 64 values to read (4 × 64 × 8 × 8, one core of Zen 4: forward
15 us with tables, 8 so; backward 20 and 10).
"""

import math

import numpy as np

from .columns import add_product, inlined, inner, normalize_backward_value, normalize_value
from .norm_plan import ADDS
from .simd import fill, fma, lanes, load, load_or, number, pointer, total

__all__ = ["channels_of", "normalize_backward_channels", "normalize_channels",
           "statistics_of_channels", "sums_of_channels"]

u = np.uintp               # an index that is not negative


@inner
def channels_of(plan):
    """Whether this is the way of a plan."""
    return plan.chunk == 0


@inner
def _together(plan, L):
    """Planes whose sums one accumulator takes in the array's dtype."""
    return ADDS * L // plan.S


@inner
def _about(x, plan, c, pivot):
    """Sums of d and of d², d = x − pivot, over a channel."""
    L, p, step, sum_d, sum_q = lanes(x), fill(x, pivot), plan.C * plan.S, 0.0, 0.0
    pairs, at, together = plan.S // (2 * L) * (2 * L), c * plan.S, _together(plan, L)
    for first in range(0, plan.N, together):
        s = q = r = t = p - p
        for _ in range(first, min(plan.N, first + together)):
            for i in range(at, at + pairs, 2 * L):
                d, e = load(x, i) - p, load(x, i + L) - p
                s, r = s + d, r + e
                q, t = fma(d, d, q), fma(e, e, t)
            for i in range(at + pairs, at + plan.S, L):
                d = load_or(x, i, min(L, at + plan.S - i), p) - p     # 0 in lanes behind the end
                s, q = s + d, fma(d, d, q)
            at += step
        sum_d += np.float64(total(s + r))
        sum_q += np.float64(total(q + t))
    return sum_d, sum_q


@inner
def _pivot(x, at):
    """The mean of a vector: of equal values exactly that. Sums about it keep a bit more than about
    one value. 0 where it is not finite."""
    v = load(x, at)
    mean = total(v) / number(x, lanes(x))
    if not abs(mean) < math.inf:
        mean = x[at]
    return mean if abs(mean) < math.inf else number(x, 0)


@inner
def _moments(x, plan, c):
    """Mean and sum of squares about it of a channel. Where the pivot is more than 2 standard
    deviations from the mean, the channel is read again about that; see moments.py."""
    n, pivot, d, q = plan.N * plan.S, _pivot(x, c * plan.S), 0.0, 0.0
    for k in range(2):
        s, q = _about(x, plan, c, pivot)
        d = s / n
        q -= d * d * n
        if k == 1 or not d * d * n > 4.0 * q:
            break
        pivot = number(x, pivot + d)
    return pivot + d, 0.0 if q < 0.0 else q


@inner
def statistics_of_channels(x, plan, c, channels, mean, m2, b):
    """Those of so many channels from c on, from mean[b] and m2[b] on."""
    for k in range(channels):
        mean[u(b + k)], m2[u(b + k)] = _moments(pointer(x), plan, c + k)


@inlined
def _constant(x, work, channels, k, line):
    return fill(x, work[u(line * channels + k)])


def _values(column):
    """The loop over the planes of a channel; ``column`` is one of those of columns.py."""
    column = inlined(column)

    @inner
    def values(x, b, z, y, plan, c, lines, option):
        L, step, at, zero = lanes(x), plan.C * plan.S, c * plan.S, number(x, 0)
        whole, n = plan.S // L * L, plan.S % L
        for _ in range(plan.N):
            for i in range(at, at + whole, L):
                column(x, b, z, y, i, L, lines, 0, zero, option)
            if n:
                column(x, b, z, y, at + whole, n, lines, 0, zero, option)
            at += step
    return values


_normalize, _normalize_backward = _values(normalize_value), _values(normalize_backward_value)
_add_product = inlined(add_product)


@inner
def normalize_channels(x, residual, y, plan, c, channels, work, option):
    """y from lines HI … SHIFT of the constants in ``work``."""
    for k in range(channels):
        lines = (_constant(x, work, channels, k, 0), _constant(x, work, channels, k, 1),
                 _constant(x, work, channels, k, 2), _constant(x, work, channels, k, 3))
        _normalize(x, residual, x, y, plan, c + k, lines, option)


@inner
def _products(x, dy, z, y, plan, c, lines, option):
    """Sums of the masked dy and of it times x̂ over a channel."""
    L, step, at, zero = lanes(x), plan.C * plan.S, c * plan.S, number(x, 0)
    whole, n, together = plan.S // L * L, plan.S % L, _together(plan, L)
    sum_dy, sum_p = 0.0, 0.0
    for first in range(0, plan.N, together):
        s = p = fill(x, 0)
        for _ in range(first, min(plan.N, first + together)):
            for i in range(at, at + whole, L):
                s, p = _add_product(x, dy, z, y, i, L, lines, 0, zero, option, s, p)
            if n:
                s, p = _add_product(x, dy, z, y, at + whole, n, lines, 0, zero, option, s, p)
            at += step
        sum_dy += np.float64(total(s))
        sum_p += np.float64(total(p))
    return sum_dy, sum_p


@inner
def sums_of_channels(x, dy, y, dz, plan, c, channels, invstd, work, option, sum_dy, sum_p, b):
    """Sums of the backward pass of so many channels from c on."""
    for k in range(channels):
        lines = (_constant(x, work, channels, k, 0), _constant(x, work, channels, k, 1),
                 _constant(x, work, channels, k, 2), _constant(x, work, channels, k, 3),
                 fill(x, invstd[u(c + k)]))
        sum_dy[u(b + k)], sum_p[u(b + k)] = _products(x, dy, dz, y, plan, c + k, lines, option)


@inner
def normalize_backward_channels(x, dy, dx, y, plan, c, channels, invstd, work, option):
    """dx, with lines MEAN_DY, SLOPE and REST behind the others."""
    for k in range(channels):
        lines = (_constant(x, work, channels, k, 0), _constant(x, work, channels, k, 1),
                 _constant(x, work, channels, k, 2), _constant(x, work, channels, k, 3),
                 fill(x, invstd[u(c + k)]), _constant(x, work, channels, k, 4),
                 _constant(x, work, channels, k, 5), _constant(x, work, channels, k, 6))
        _normalize_backward(x, dy, dx, y, plan, c + k, lines, option)
