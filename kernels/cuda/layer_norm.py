"""Layer and RMS normalization, of halves, too. Rows are the work of rows.py; dγ and dβ are sums
over rows, of columns, cut and merged as a batch norm's are."""

import math

import numpy as np

from ..half import kind as kind_of, real as real_of
from . import rows
from .intrinsics import arrive, cuda, device, width
from .launch import Kernel, factory
from .layout import aligned
from .memory import empty, empty_like, xp
from .moments import THREADS, add_trees, cut, parts, places, tickets
from .passes import BETA, CENTER, GAMMA, add_lines, add_parts, lines, over_lines
from .vectors import dtypes, filled, of_lanes, reader, scatter

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"]

_min = min


@factory
def column_sums(dtype, params, W):
    """dγ = Σ dy x̂ and dβ = Σ dy of columns, with the statistics of each row."""
    place, (read, copies), count = (places(W, True, "u4", lines(dtype)),
                                    over_lines(reader(W), 2, dtype), lines(dtype))
    put, same, add, wide = scatter(W), filled(W), add_lines(dtype, W), np.float64
    real, CELLS = real_of(dtype).type, W * THREADS
    zero = real(0)

    @device
    def of_row(k, mean, invstd, r, lanes, m, option):
        r += k * lanes if m > k else 0
        mu = mean[r] if option & CENTER else 0.0
        high = real(mu)
        return same((high, real(mu - wide(high)) if high - high == zero else zero, real(invstd[r])))
    constants = of_lanes(of_row, count)

    def body(dy, x, mean, invstd, parts_dy, parts_dyx, counters, dgamma, dbeta, R, B, S, shift,
             segment, P, tiles, option):
        first = cuda.shared.array(CELLS, np.float64)
        second = cuda.shared.array(CELLS, np.float64)
        last = cuda.shared.array(1, np.int32)
        t, tile, k = cuda.threadIdx.x, cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        lanes, line = THREADS >> shift, W << shift
        q = tile * line + (t & ((1 << shift) - 1)) * W
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        s, sx = same(0.0), same(0.0)
        while r < end and q < B:
            m, i = place(0, r, end, q, B, S, shift)
            s, sx = add(s, sx, constants(mean, invstd, r, lanes, m, option), m,
                        read(copies(dy), i), read(copies(x), i))
            r += count * lanes
        put(first, t * W, s)
        put(second, t * W, sx)
        add_trees(first, second, CELLS, line)
        if P > 1:
            if t < line and tile * line + t < B:
                parts_dy[k * B + tile * line + t] = first[t]
                parts_dyx[k * B + tile * line + t] = second[t]
            cuda.threadfence()
            cuda.syncthreads()
            if t == 0:
                cuda.threadfence()
                last[0] = arrive(counters, tile)
            cuda.syncthreads()
            if last[0] != P - 1:
                return
            if t == 0:
                counters[tile] = 0
            cuda.threadfence()
            at = tile * line
            add_parts(parts_dy, parts_dyx, at, B - at, B, line, P, first, second)
        c = tile * line + t
        if t < line and c < B:
            dgamma[c] = real(second[t])
            if option & BETA:
                dbeta[c] = real(first[t])
    k, p = kind_of(dtype), kind_of(params)
    return Kernel(body, f"*{k} *{k} *f8 *f8 *f8 *f8 *i4 *{p} *{p} {'i8 ' * 7} i4",
                  name=f"column_sums_{k}{'' if p == k else '_' + p}_{W}", threads=THREADS,
                  minimum=2)


def every():
    """All kernels of this module."""
    for dtype in dtypes():
        for W in (width(dtype), 1):
            for params in {dtype: None, real_of(dtype): None} if W > 1 else (dtype,):
                yield column_sums(dtype, params, W)


def _rows(x, dims):
    """x in C order, and how many rows there are of how many numbers."""
    cut_at = x.ndim - dims
    return xp.ascontiguousarray(x), math.prod(x.shape[:cut_at]), math.prod(x.shape[cut_at:])


def parameters(x, *arrays):
    """Arrays of any shape, or None, in C order, and their dtype: x's, if all of them have it, or
    what its numbers are computed in."""
    dtype = x.dtype if all(a is None or a.dtype == x.dtype for a in arrays) else real_of(x.dtype)
    return *(None if a is None else xp.ascontiguousarray(a.astype(dtype, copy=False))
             for a in arrays), dtype


def run(x, gamma, beta, params, count, D, eps, center, G=1, K=0, S=0):
    """y, mean (None without center) and invstd of ``count`` rows of a C-ordered x; S > 0: γ and β
    are of S values each."""
    y, invstd = empty_like(x), empty((count,), np.float64)
    mean = empty((count,), np.float64) if center else None
    there = [a for a in (gamma, beta) if a is not None and not S]
    W = width(x.dtype)
    if (S or D) % W or D % W or not aligned(x, *there):
        W = 1
    T, resident = rows.plan(D, W, rows.held(W))
    option = GAMMA * (gamma is not None) | BETA * (beta is not None) | CENTER * center
    rows.forward(x.dtype, params, W, T, resident, S > 0)(
        rows.blocks(count, T), x, gamma, beta, y, mean, invstd, count, D, G, K, max(S, 1), eps,
        option)
    return y, mean, invstd


def _forward(x, gamma, beta, dims, eps, center):
    x, count, D = _rows(x, dims)
    if not x.size:
        mean, invstd = empty((count,), np.float64), empty((count,), np.float64)
        mean.fill(0)
        invstd.fill(1 / math.sqrt(eps) if eps else math.inf)
        return empty_like(x), mean, invstd
    return run(x, *parameters(x, gamma, beta), count, D, eps, center)


def _backward(dy, x, gamma, mean, invstd, dims):
    x, count, D = _rows(x, dims)
    (gamma, params), shape = parameters(x, gamma), x.shape[x.ndim - dims:]
    dy, dx, dgamma = xp.ascontiguousarray(dy), empty_like(x), empty(shape, params)
    dbeta = empty(shape, params) if mean is not None else None
    if not x.size:
        for a in (dgamma, dbeta):
            if a is not None:
                a.fill(0)
        return dx, dgamma, dbeta
    center = CENTER * (mean is not None)
    W = width(x.dtype)
    if D % W or not aligned(x, dy, *([] if gamma is None else [gamma])):
        W = 1
    T, resident = rows.plan(D, W, rows.held(W, 2))
    rows.backward(x.dtype, params, W, T, resident)(
        rows.blocks(count, T), dy, x, gamma, mean, invstd, dx, count, D,
        center | GAMMA * (gamma is not None))
    c = cut(True, 1, count, D, 1, x.dtype, x, dy)
    column_sums(x.dtype, params, c.W)(c.blocks, dy, x, mean, invstd, *parts(c), tickets(), dgamma,
                                      dbeta, *c.numbers, center | BETA * (mean is not None))
    return dx, dgamma, dbeta


def layer_norm(x, gamma, beta, *, dims, eps):
    """y = x̂ γ + β with the statistics of each row (the last dims axes); mean, invstd: (rows,)."""
    return _forward(x, gamma, beta, dims, eps, True)


def layer_norm_backward(dy, x, gamma, mean, invstd, *, dims):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂, dβ = Σ dy over rows."""
    return _backward(dy, x, gamma, mean, invstd, dims)


def rms_norm(x, gamma, *, dims, eps):
    """y = x / rms γ with rms = √(mean(x²) + eps) of each row (the last dims axes);
    invrms: (rows,)."""
    y, _, invrms = _forward(x, gamma, None, dims, eps, False)
    return y, invrms


def rms_norm_backward(dy, x, gamma, invrms, *, dims):
    """dx = invrms (g − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂ over rows."""
    return _backward(dy, x, gamma, None, invrms, dims)[:2]
