"""The backward of batch normalization that reads memory once: blocks keep x and the masked dy in
shared memory until their channels' sums are known. How they share the work is single.py's.
"""


import numpy as np

from ..half import real as real_of
from .intrinsics import address_of, cuda, device
from .launch import factory
from .memory import empty, empty_like
from .moments import LOG, THREADS, add_trees, cases, kernel, line_at
from .passes import (
    WRITE,
    add_lines,
    add_parts,
    centered,
    differential,
    lines,
    masked_lines,
    over_lines,
    put_lines,
    shares,
    words,
)
from .single import SHARED, leave, meet, planned, two_per_tile, unit
from .vectors import filled, of_lanes, reader, scatter, writer

__all__ = ["gradients", "run"]

_min = min


def _tables(dtype, W, columns):
    """``words`` and ``shares`` for each number of a line; the latter from a block's cells."""
    of, share = words(dtype), shares(dtype)

    def what(k, c, mean, invstd, gamma, beta, option):
        return of(mean[c + k], invstd[c + k], c + k, gamma, beta, option)

    def sums(k, i, c, first, second, invstd, gamma, n, option):
        return share(first[i + k], second[i + k], invstd[c + k], c + k, gamma, n, option)
    return (of_lanes(device(f), W, not columns) for f in (what, sums))


@factory
def gradients(dtype, params, W, columns, index):
    """dx, dγ = Σ g x̂ and dβ = Σ g of channels; g, the masked dy, is written to dz with WRITE."""
    read, write, at, here = reader(W), writer(W), line_at(W, columns, index), address_of(dtype)
    load, add, L = masked_lines(dtype, W, columns, index), add_lines(dtype, W), W if columns else 1
    table, means = _tables(dtype, W, columns)
    same, put, put_all = filled(W), scatter(W), put_lines(dtype, W)
    apart, values, real = centered(W), differential(W), real_of(dtype).type
    CELLS, STEP, UNIT, count = W * THREADS, 2 * W * THREADS, unit(dtype), lines(dtype)
    read_all, copies = over_lines(read, 2, dtype)
    where = of_lanes(device(lambda k, j, m: j + (k * STEP if m > k else 0)), count)

    def body(dy, x, y, gamma, beta, mean, invstd, dx, dz, dgamma, dbeta, parts_dy, parts_dyx,
             counters, R, B, S, shift, segment, P, tiles, groups, n, option):
        first = cuda.shared.array(CELLS, np.float64)
        second = cuda.shared.array(CELLS, np.float64)
        kept, limits = here(cuda.shared.array(0, UNIT)), cuda.shared.array(2, np.int64)
        t, k, tile = cuda.threadIdx.x, cuda.blockIdx.x % P, cuda.blockIdx.x // P
        line, side, lanes = L << shift, (t & ((1 << shift) - 1)) * L, THREADS >> shift
        if t == 0:                # from memory, lest positions be kept in registers between tiles
            limits[0], limits[1] = k * segment, _min(R, k * segment + segment)
        cuda.syncthreads()
        while tile < tiles:
            q, r, j = tile * line + side, limits[0] + (t >> shift), t * W
            s, sx = same(0.0), same(0.0)
            if q < B and r < limits[1]:
                c = table(q, mean, invstd, gamma, beta, option)
                while r < limits[1]:
                    m, i, g, v = load(dy, x, y, c, 0, r, limits[1], q, B, S, shift, option)
                    put_all(kept, where(j, m), m, g)
                    put_all(kept, where(j + STEP // 2, m), m, v)
                    r += count * lanes
                    j += count * STEP
                r, j = limits[0] + (t >> shift), t * W        # again: registers are short for both
                while r < limits[1]:
                    m = _min(count, (limits[1] - r + lanes - 1) >> (LOG - shift))
                    g = read_all(copies(kept), where(j, m))
                    v = read_all(copies(kept), where(j + STEP // 2, m))
                    s, sx = add(s, sx, copies(c), m, g, v)
                    r += count * lanes
                    j += count * STEP
            put(first, t * W, s)
            put(second, t * W, sx)
            add_trees(first, second, CELLS, line)
            if P > 1:
                if t < line and tile * line + t < B:
                    i = k * B + tile * line + t
                    parts_dy[i], parts_dyx[i] = first[t], second[t]
                meet(counters, tile, P)
                add_parts(parts_dy, parts_dyx, tile * line, B - tile * line, B, line, P, first,
                          second)
                leave(counters, tile, P)
            if k == 0 and t < line and tile * line + t < B:
                dgamma[tile * line + t], dbeta[tile * line + t] = real(second[t]), real(first[t])
            r, j = limits[0] + (t >> shift), t * W
            if q < B and r < limits[1]:
                c = table(q, mean, invstd, gamma, beta, option)
                e = means(side, q, first, second, invstd, gamma, n, option)
                while r < limits[1]:
                    i, g = at(r, q, B, S), read(kept, j)
                    if option & WRITE:
                        write(dz, i, g)
                    write(dx, i, values(g, apart(read(kept, j + STEP // 2), c), c, e))
                    r += lanes
                    j += STEP
            cuda.syncthreads()                 # cells are written to again
            tile += groups
    return kernel(body, "single_backward", dtype, params, W, columns, index,
                  f"*k *k *k *p *p *f8 *f8 *k *k *p *p *f8 *f8 *i4 {'i8 ' * 8} f8 i4",
                  shared=SHARED, together=True)


def run(dy, x, y, c, gamma, beta, params, mean, invstd, dz, option):
    """dx, dγ and dβ of dense arrays of one memory order, cut as c says; ``params``: dtype of γ, β
    and their gradients. None where this is not the way."""
    start = gradients(x.dtype, params, *c.kind)
    how = planned(start, c, x, 2 * c.W * THREADS, 2)
    if how is None:
        return None
    segment, P, groups, parts = how
    dx, C = empty_like(x), x.shape[1]
    dgamma, dbeta = empty((C,), params), empty((C,), params)
    start(groups * P, dy, x, y, gamma, beta, mean, invstd, dx, dz, dgamma, dbeta, *parts,
          two_per_tile(c.tiles), c.R, c.B, c.S, c.shift, segment, P, c.tiles, groups, x.size // C,
          option)
    return dx, dgamma, dbeta


def every():
    """All kernels of this module."""
    for kinds in cases():
        yield gradients(*kinds)
