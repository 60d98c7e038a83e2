"""The backward of batch normalization that reads memory once: blocks keep x − mean and the masked
dy in shared memory until their channels' sums are known. How they share the work is single.py's.
"""

from functools import cache

import numpy as np

from .intrinsics import address, cuda, device, width
from .launch import Kernel
from .memory import empty, empty_like
from .moments import THREADS, add_trees, line_at
from .passes import (
    ROWS,
    WRITE,
    add_lines,
    add_parts,
    centered,
    differential,
    four_lines,
    put_lines,
    shares,
    words,
)
from .single import SHARED, leave, meet, planned, two_per_tile
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


@cache
def gradients(dtype, W, columns, index):
    """dx, dγ = Σ g x̂ and dβ = Σ g of channels; g, the masked dy, is written to dz with WRITE."""
    read, write, at, kind = reader(W), writer(W), line_at(W, columns, index), dtype.str[1:]
    load, add, L = four_lines(dtype, W, columns, index), add_lines(dtype, W), W if columns else 1
    table, means = _tables(dtype, W, columns)
    same, put, put_four = filled(W), scatter(W), put_lines(W)
    apart, values, real = centered(W), differential(W), dtype.type
    CELLS, STEP = W * THREADS, 2 * W * THREADS

    def body(dy, x, y, gamma, beta, mean, invstd, dx, dz, dgamma, dbeta, parts_dy, parts_dyx,
             counters, R, B, S, shift, segment, P, tiles, groups, n, option):
        first = cuda.shared.array(CELLS, np.float64)
        second = cuda.shared.array(CELLS, np.float64)
        kept, limits = address(cuda.shared.array(0, real)), cuda.shared.array(2, np.int64)
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
                    m, _, g, v = load(dy, x, y, c, 0, r, limits[1], q, B, S, shift, option)
                    s, sx = add(s, sx, c, m, g, v)
                    put_four(kept, (j, j + STEP, j + 2 * STEP, j + 3 * STEP), m, g)
                    i = j + STEP // 2
                    put_four(kept, (i, i + STEP, i + 2 * STEP, i + 3 * STEP), m, (
                        apart(v[0], c), apart(v[1], c), apart(v[2], c), apart(v[3], c)))
                    r += ROWS * lanes
                    j += ROWS * STEP
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
                    write(dx, i, values(g, read(kept, j + STEP // 2), c, e))
                    r += lanes
                    j += STEP
            cuda.syncthreads()                 # cells are written to again
            tile += groups
    layout = "columns" if columns else f"segments_{index}"
    same_kind = f"*{kind} "
    return Kernel(body, f"{same_kind * 5} *f8 *f8 {same_kind * 4} *f8 *f8 *i4 {'i8 ' * 8} f8 i4",
                  name=f"single_backward_{kind}_{W}_{layout}", threads=THREADS, shared=SHARED,
                  minimum=2, together=True)


def run(dy, x, y, c, gamma, beta, mean, invstd, dz, option):
    """dx, dγ and dβ of dense arrays of one memory order, cut as c says; None where this is not the
    way."""
    kernel = gradients(x.dtype, *c.kind)
    how = planned(kernel, c, x, 2)
    if how is None:
        return None
    lines, P, groups, parts = how
    dx, C = empty_like(x), x.shape[1]
    dgamma, dbeta = empty((C,), x.dtype), empty((C,), x.dtype)
    kernel(groups * P, dy, x, y, gamma, beta, mean, invstd, dx, dz, dgamma, dbeta, *parts,
           two_per_tile(c.tiles), c.R, c.B, c.S, c.shift, lines, P, c.tiles, groups, x.size // C,
           option)
    return dx, dgamma, dbeta


def every():
    """All kernels of this module."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for W in (width(dtype), 1):
            for columns in (True, False):
                yield gradients(dtype, W, columns, "u4")
