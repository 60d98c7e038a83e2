"""What differs from group to group, as lines with a value for each channel: the constants of both
passes of group normalization.

Lines are ``width(C)`` values long, in float64 ``wide`` and in x's dtype ``table``. They are filled
and computed with a vector at a time: for a sample of 16 pixels, channel by channel took longer than
the pixels.
"""

import math

from .columns import inlined, inner
from .simd import (
    absolute,
    fill,
    greater,
    high,
    lanes,
    load,
    load_part,
    low,
    narrow,
    number,
    store,
    total,
    where,
)

__all__ = ["GAMMA", "INVERSE", "INVSTD", "LOW", "MEAN_G", "MEAN_P", "WIDE", "gammas", "low_word",
           "parts", "slopes", "spread", "statistics_of_groups", "width"]

# Lines of ``wide``: γ, 1 / γ or 0, invstd, the mean's low word, mean(g), mean(g x̂).
GAMMA, INVERSE, INVSTD, LOW, MEAN_G, MEAN_P, WIDE = range(7)


@inner
def width(C):
    """Values of a line of C channels, in which a vector may begin at each of them."""
    return (C + 31) // 16 * 16


@inner
def low_word(hi, mean):
    """What hi leaves of the mean."""
    return mean - hi if abs(hi) < math.inf else 0.0


@inner
def spread(line, at, n, value):
    """The value n times from line[at] on; what a vector is longer than that is overwritten."""
    v = fill(line, value)
    for c in range(at, at + n, lanes(line)):
        store(line, c, v)


@inner
def parts(line, at, n):
    """The sum of n values from line[at] on, lane by lane first."""
    L, v, end = lanes(line), fill(line, 0), at + n - n % lanes(line)
    for c in range(at, end, L):
        v = v + load(line, c)
    if n % L:
        v = v + load_part(line, end, n % L)
    return total(v)


@inner
def gammas(gamma, C, W, wide):
    """Lines GAMMA and INVERSE."""
    for c in range(C):
        wide[c], wide[W + c] = gamma[c], 1.0 / gamma[c] if gamma[c] != 0.0 else 0.0


@inner
def statistics_of_groups(x, mean, invstd, n, G, D, W, wide, table):
    """Lines INVSTD and LOW of sample n; the mean's first word in the table's line 0."""
    for g in range(G):
        m, c = mean[n * G + g], g * D
        word = number(x, m)
        spread(table, c, D, word)
        spread(wide, INVSTD * W + c, D, invstd[n * G + g])
        spread(wide, LOW * W + c, D, low_word(word, m))


@inlined
def _slopes(pivot, limit, zero, c, W, wide):
    s, mean_g = load(wide, INVSTD * W + c), load(wide, MEAN_G * W + c)
    pivot = where(greater(limit, absolute(pivot)), pivot, zero)
    scale = load(wide, GAMMA * W + c) * s
    slope = zero - s * load(wide, MEAN_P * W + c) * s
    return pivot, scale, slope, scale * pivot - s * mean_g - load(wide, LOW * W + c) * slope


@inner
def slopes(x, first, last, W, wide, table):
    """dx = (dy − pivot) scale + (x − hi) slope + rest: lines 0 … 3 of channels first … last. The
    pivot cancels in exact arithmetic; it keeps the digits of a dy that is large against its spread.
    """
    limit, zero = fill(wide, 1e30), fill(wide, 0)
    for c in range(first, last, lanes(x)):
        d = c + lanes(wide)
        p = narrow(load(wide, MEAN_G * W + c) * load(wide, INVERSE * W + c),
                   load(wide, MEAN_G * W + d) * load(wide, INVERSE * W + d), x)
        pivot, scale, slope, rest = _slopes(low(p), limit, zero, c, W, wide)
        pivot_2, scale_2, slope_2, rest_2 = _slopes(high(p), limit, zero, d, W, wide)
        store(table, c, narrow(pivot, pivot_2, x))
        store(table, W + c, narrow(scale, scale_2, x))
        store(table, 2 * W + c, narrow(slope, slope_2, x))
        store(table, 3 * W + c, narrow(rest, rest_2, x))
