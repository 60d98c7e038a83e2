"""The backward pass of group normalization of channels-last memory; see pixels.py."""

import numpy as np

from .columns import inlined, inner
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
from .jit import kernel, prange
from .pixels import RUN, add, clear, constants, sums_of
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
def _sums(x, dy, at, rows, C, W, table, wide, floored, sums, sum_p, sum_dy, rest, to):
    """Σ dy x̂, Σ dy and the rest of dy of each column."""
    L, zero = lanes(wide), fill(wide, 0)
    for c in range(0, 3 * W if floored else 2 * W, L):
        store(sums, c, zero)
    if floored:
        _floored_products(x, dy, at, rows, C, W, table, sums)
    else:
        clear(table, 4 * W, 6 * W)
        _products(x, dy, at, rows, C, W, table, after(table, 4 * W), sums)
    for c in range(0, C, L):
        k, a = min(L, C - c), load(sums, c)
        p = load(sums, W + c) - load(wide, LOW * W + c) * a
        store_part(sum_dy, to + c, a, k)
        store_part(sum_p, to + c, p * load(wide, INVSTD * W + c), k)
        if floored:
            store_part(rest, to + c, load(sums, 2 * W + c), k)


@inner
def _means(invstd, n, B, C, G, inverse, center, sum_p, sum_dy, bad, size, W, wide, sums):
    """Lines MEAN_G and MEAN_P: sums of the channels, weighted by γ, then of the groups."""
    D, L = C // G, lanes(wide)
    for c in range(0, C, L):
        k, a, q = min(L, C - c), fill(wide, 0), fill(wide, 0)
        for b in range(n * B * C, (n + 1) * B * C, C):
            a, q = a + load_part(sum_dy, b + c, k), q + load_part(sum_p, b + c, k)
        g = load(wide, GAMMA * W + c)
        store(sums, c, a * g)
        store(sums, W + c, q * g)
    for g in range(G):
        a, q = parts(sums, g * D, D), parts(sums, W + g * D, D)
        bad[n * G + g] = unfit_gradients(size, a, q, invstd[n * G + g])
        spread(wide, MEAN_G * W + g * D, D, a * inverse if center else 0.0)
        spread(wide, MEAN_P * W + g * D, D, q * inverse)


@inlined
def _value(x, dy, i, n, table, W, j, floored, zero, past, dx):
    g, d = load_part(dy, i, n), load_part(x, i, n) - load(table, j)
    if floored:
        g = above(g, d, load(table, W + j), load(table, 2 * W + j), load(table, 3 * W + j), zero)
    line = after(table, 4 * W + j)
    v = fma(g - load(line, 0), load(line, W), fma(d, load(line, 2 * W), load(line, 3 * W)))
    if n == lanes(x):
        put(dx, i, v, past)
    else:
        store_part(dx, i, v, n)


@inner
def _slope(x, dy, at, rows, C, W, table, floored, past, dx):
    """dx = (dy − pivot) scale + (x − hi) slope + rest."""
    L, zero = lanes(x), fill(x, 0)
    for i in range(at, at + rows * C, C):
        for j in range(0, C - L + 1, L):
            _value(x, dy, i + j, L, table, W, j, floored, zero, past, dx)
        if C % L:
            j = C - C % L
            _value(x, dy, i + j, C % L, table, W, j, floored, zero, past, dx)


@inner
def _backward(x, dy, gamma, beta, floor, floored, mean, invstd, center, first, last, collect, B,
              rows, S, C, G, past, dx, sum_p, sum_dy, rest, bad, size, W, table, wide):
    """Sums of the channels in blocks first … last, and dx if those of the groups are known."""
    sums = after(wide, WIDE * W)
    gammas(gamma, C, W, wide)
    for u in range(first, last):
        n, b = u // B, u % B * rows
        m, at = min(rows, S - b), (n * S + b) * C
        if floored:
            constants(x, gamma, beta, floor, floored, mean, invstd, n, G, C, W, wide, table)
        else:
            statistics_of_groups(x, mean, invstd, n, G, C // G, W, wide, table)
        if collect:
            _sums(x, dy, at, m, C, W, table, wide, floored, sums, sum_p, sum_dy, rest, u * C)
            if B > 1:
                continue
        _means(invstd, n, B, C, G, 1.0 / (C // G * S), center, sum_p, sum_dy, bad, size, W, wide,
               sums)
        slopes(x, 0, C, W, wide, after(table, 4 * W))
        _slope(x, dy, at, m, C, W, table, floored, past, dx)


@inner
def _backward_task(x, dy, gamma, beta, floor, mean, invstd, center, first, last, collect, B, rows,
                   S, G, past, dx, sum_p, sum_dy, rest, bad):
    C, W = gamma.size, width(gamma.size)
    table, wide = np.zeros(8 * W, x.dtype), np.zeros((WIDE + 3) * W)
    _backward(pointer(x), pointer(dy), pointer(gamma), pointer(beta), pointer(floor),
              floor.size > 0, pointer(mean), pointer(invstd), center, first, last, collect, B, rows,
              S, C, G, past, pointer(dx), pointer(sum_p), pointer(sum_dy), pointer(rest),
              pointer(bad), x.itemsize, W, pointer(table), pointer(wide))
    keep(table)
    keep(wide)


@kernel
def backward_pixels(x, dy, gamma, beta, floor, mean, invstd, center, per, B, rows, S, G, past, dx,
                    bad, sums):
    """dx, and dγ, dβ and, with a floor, what is left of dy, over all pixels; as forward_pixels."""
    blocks = mean.size // G * B
    tasks, n = (blocks + per - 1) // per, blocks * gamma.size
    sum_p, sum_dy, rest = np.empty(n), np.empty(n), np.empty(n if floor.size else 0)
    for phase in range(2 if B > 1 else 1):
        for t in prange(tasks):
            u = np.int64(t)
            if phase == 1:
                u = tasks - 1 - u
            _backward_task(x, dy, gamma, beta, floor, mean, invstd, center, u * per,
                           min(blocks, (u + 1) * per), phase == 0, B, rows, S, G, past, dx, sum_p,
                           sum_dy, rest, bad)
    add_up_all(sum_p, sum_dy, rest, sums)
    return bad.sum() > 0
