"""The backward pass of group normalization of channels-last memory; see pixels.py."""

import numpy as np

from .columns import inlined, inner, zeros
from .group_lines import (
    GAMMA,
    INVSTD,
    LOW,
    MEAN_G,
    MEAN_P,
    WIDE,
    gammas,
    parts,
    slopes,
    spread,
    statistics_of_groups,
    width,
)
from .pixels import RUN, add, constants, sums_of, values_of
from .planes import above, add_up_all, unfit_gradients
from .simd import (
    after,
    fill,
    fma,
    keep,
    lanes,
    load,
    load_part,
    pointer,
    prefetch,
    put,
    store,
    store_part,
)
from .tasks import share, tasks

__all__ = ["backward_pixels"]


@sums_of
@inlined
def _products(x, dy, i, n, hi, s, q):
    """Σ dy and Σ dy (x − hi)."""
    d = load_part(dy, i, n)
    return s + d, fma(d, load_part(x, i, n) - hi, q)


@inner
def _floored_products(x, dy, at, rows, C, W, table, sums):
    """Adds Σ dy and Σ dy (x − hi) of each column where y is above its floor, and Σ dy where not,
    to lines of W sums. ``table``: see constants."""
    L, zero = lanes(x), fill(x, 0)
    for start in range(at, at + rows * C, RUN * C):
        m = min(RUN, (at + rows * C - start) // C)
        for j in range(0, C, L):
            k, i, p, a = min(L, C - j), start + j, load(table, j), load(table, W + j)
            b, t = load(table, 2 * W + j), load(table, 3 * W + j)
            s = q = r = zero
            for _ in range(m):
                prefetch(x, i + RUN * C)
                prefetch(dy, i + RUN * C)
                d, e = load_part(dy, i, k), load_part(x, i, k) - p
                g = above(d, e, a, b, t, zero)
                s, q, r = s + g, fma(g, e, q), r + (d - g)
                i += C
            add(sums, j, s)
            add(sums, W + j, q)
            add(sums, 2 * W + j, r)


@inner
def _sums(x, dy, at, rows, C, W, table, wide, floored, sums, ours):
    """Lines of ``sums``: γ Σ dy and γ Σ dy x̂ of each column; Σ dy x̂, Σ dy and the rest of dy are
    added to the task's."""
    L, zero = lanes(wide), fill(wide, 0)
    if floored:
        for c in range(0, 3 * W, L):
            store(sums, c, zero)
        _floored_products(x, dy, at, rows, C, W, table, sums)
    else:
        _products(x, dy, at, rows, C, W, table, after(table, 8 * W), sums)
    for c in range(0, C, L):
        a, g = load(sums, c), load(wide, GAMMA * W + c)
        q = (load(sums, W + c) - load(wide, LOW * W + c) * a) * load(wide, INVSTD * W + c)
        store(ours, c, load(ours, c) + q)
        store(ours, W + c, load(ours, W + c) + a)
        if floored:
            store(ours, 2 * W + c, load(ours, 2 * W + c) + load(sums, 2 * W + c))
        store(sums, c, a * g)
        store(sums, W + c, q * g)


@inner
def _gather(n, B, C, W, wide, sum_p, sum_dy, sums):
    """The same lines from the sums of sample n's blocks."""
    L = lanes(wide)
    for c in range(0, C, L):
        k, a, q = min(L, C - c), fill(wide, 0), fill(wide, 0)
        for b in range(n * B * C, (n + 1) * B * C, C):
            a, q = a + load_part(sum_dy, b + c, k), q + load_part(sum_p, b + c, k)
        g = load(wide, GAMMA * W + c)
        store(sums, c, a * g)
        store(sums, W + c, q * g)


@inner
def _means(invstd, n, C, G, inverse, center, bad, size, W, wide, sums):
    """Lines MEAN_G and MEAN_P of the groups from the sums of the channels."""
    D = C // G
    for g in range(G):
        a, q = parts(sums, g * D, D), parts(sums, W + g * D, D)
        bad[n * G + g] = unfit_gradients(size, a, q, invstd[n * G + g])
        spread(wide, MEAN_G * W + g * D, D, a * inverse if center else 0.0)
        spread(wide, MEAN_P * W + g * D, D, q * inverse)


@inner
def _hand_over(ours, C, W, floored, sum_p, sum_dy, rest, to):
    """The sums of a task to its place."""
    L = lanes(ours)
    for c in range(0, C, L):
        k = min(L, C - c)
        store_part(sum_p, to + c, load(ours, c), k)
        store_part(sum_dy, to + c, load(ours, W + c), k)
        if floored:
            store_part(rest, to + c, load(ours, 2 * W + c), k)


@inlined
def _lines(table, j, W):
    return (load(table, j), load(table, W + j), load(table, 2 * W + j), load(table, 3 * W + j),
            load(table, 4 * W + j), load(table, 5 * W + j), load(table, 6 * W + j),
            load(table, 7 * W + j))


@inlined
def _value(x, dy, i, n, k, floored, past, dx):
    hi, a, b, t, pivot, scale, slope, rest = k
    g, d = load_part(dy, i, n), load_part(x, i, n) - hi
    if floored:
        g = above(g, d, a, b, t, fill(x, 0))
    v = fma(g - pivot, scale, fma(d, slope, rest))
    if n == lanes(x):
        put(dx, i, v, past)
    else:
        store_part(dx, i, v, n)


# dx = (dy − pivot) scale + (x − hi) slope + rest.
_slope = values_of(_lines, _value)


@inner
def _backward(x, dy, gamma, beta, floor, floored, mean, invstd, center, t, first, last, collect, B,
              rows, S, C, G, past, dx, sum_p, sum_dy, rest, bad, size, W, table, wide):
    """Sums of the channels in blocks first … last, task t, and dx if those of the groups are
    known."""
    sums, ours = after(wide, WIDE * W), after(wide, (WIDE + 3) * W)
    gammas(gamma, C, W, wide)
    for u in range(first, last):
        n, b = u // B, u % B * rows
        m, at = min(rows, S - b), (n * S + b) * C
        if floored:
            constants(x, gamma, beta, floor, floored, mean, invstd, n, G, C, W, wide, table)
        else:
            statistics_of_groups(x, mean, invstd, n, G, C // G, W, wide, table)
        if collect:
            _sums(x, dy, at, m, C, W, table, wide, floored, sums, ours)
            if B > 1:
                continue
        else:
            _gather(n, B, C, W, wide, sum_p, sum_dy, sums)
        _means(invstd, n, C, G, 1.0 / (C // G * S), center, bad, size, W, wide, sums)
        slopes(x, 0, C, W, wide, after(table, 4 * W))
        _slope(x, dy, at, m, C, W, table, floored, past, dx)
    if collect:
        _hand_over(ours, C, W, floored, sum_p, sum_dy, rest, t * C)


@inner
def _backward_task(t, x, dy, gamma, beta, floor, mean, invstd, center, per, collect, B, rows, S, G,
                   past, dx, sum_p, sum_dy, rest, bad):
    C, W, last = gamma.size, width(gamma.size), mean.size // G * B
    table, wide = zeros(x, 10 * W), zeros(mean, (WIDE + 6) * W)
    _backward(pointer(x), pointer(dy), pointer(gamma), pointer(beta), pointer(floor),
              floor.size > 0, pointer(mean), pointer(invstd), center, t, t * per,
              min(last, (t + 1) * per), collect, B, rows, S, C, G, past, pointer(dx),
              pointer(sum_p), pointer(sum_dy), pointer(rest), pointer(bad), x.itemsize, W,
              pointer(table), pointer(wide))
    keep(table)
    keep(wide)


@tasks
def backward_pixels(run, x, dy, gamma, beta, floor, mean, invstd, center, per, B, rows, S, G, past,
                    dx, bad, sums):
    """dx, and dγ, dβ and, with a floor, what is left of dy, over all pixels; as forward_pixels."""
    n = (mean.size // G * B + per - 1) // per
    values = n * gamma.size
    sum_p, sum_dy, rest = np.empty(values), np.empty(values), np.empty(values if floor.size else 0)
    for phase in range(2 if B > 1 else 1):
        share(_backward_task, n if phase == 0 else -n, run,
              (x, dy, gamma, beta, floor, mean, invstd, center, per, phase == 0, B, rows, S, G,
               past, dx, sum_p, sum_dy, rest, bad))
    add_up_all(sum_p, sum_dy, rest, sums)
    return bad.sum() > 0
