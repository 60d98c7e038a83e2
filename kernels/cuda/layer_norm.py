"""Layer and RMS normalization. Rows are the work of rows.py; dγ and dβ are sums over rows, of
columns, cut and merged as a batch norm's are."""

import math
from functools import cache

import numpy as np

from . import rows
from .intrinsics import arrive, cuda, device, width
from .launch import Kernel
from .layout import aligned
from .memory import empty, empty_like, xp
from .moments import THREADS, add_trees, cut, parts, tickets
from .passes import BETA, CENTER, GAMMA, add_parts
from .vectors import each, filled, reader, scatter

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"]

LOG = THREADS.bit_length() - 1
_min = min


@cache
def column_sums(dtype, W):
    """dγ = Σ dy x̂ and dβ = Σ dy of columns, with the statistics of each row."""
    read, put, wide = reader(W), scatter(W), np.float64
    same, real, kind, CELLS = filled(W), dtype.type, dtype.str[1:], W * THREADS
    zero = real(0)
    times = each(device(lambda g, x, c: g * (((x - c[0]) - c[1]) * c[2])), 3, W)
    plus = each(device(lambda a, b: a + b), 2, W)
    four = each(device(lambda a, b, c, d: wide((a + b) + (c + d))), 4, W)

    @device
    def constants(mean, invstd, r, option):
        m = mean[r] if option & CENTER else 0.0
        high = real(m)
        return same((high, real(m - wide(high)) if high - high == zero else zero, real(invstd[r])))

    def body(dy, x, mean, invstd, parts_dy, parts_dyx, counters, dgamma, dbeta, R, B, S, shift,
             segment, P, tiles, option):
        first = cuda.shared.array(CELLS, np.float64)
        second = cuda.shared.array(CELLS, np.float64)
        last = cuda.shared.array(1, np.int32)
        t, tile, k = cuda.threadIdx.x, cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        lanes, line = THREADS >> shift, W << shift
        q = tile * line + (t & ((1 << shift) - 1)) * W
        r, end = k * segment + (t >> shift), _min(R, k * segment + segment)
        nothing, none = same(zero), same(0.0)
        s, sx = none, none
        while r < end and q < B:
            m = _min(4, (end - r + lanes - 1) >> (LOG - shift))
            r1, r2 = r + (lanes if m > 1 else 0), r + (2 * lanes if m > 2 else 0)
            r3 = r + (3 * lanes if m > 3 else 0)
            g0, g1 = read(dy, r * B + q), read(dy, r1 * B + q)
            g2, g3 = read(dy, r2 * B + q), read(dy, r3 * B + q)
            x0, x1 = read(x, r * B + q), read(x, r1 * B + q)
            x2, x3 = read(x, r2 * B + q), read(x, r3 * B + q)
            c0, c1 = constants(mean, invstd, r, option), constants(mean, invstd, r1, option)
            c2, c3 = constants(mean, invstd, r2, option), constants(mean, invstd, r3, option)
            g1, g2 = g1 if m > 1 else nothing, g2 if m > 2 else nothing
            g3 = g3 if m > 3 else nothing
            s = plus(s, four(g0, g1, g2, g3))
            sx = plus(sx, four(times(g0, x0, c0), times(g1, x1, c1), times(g2, x2, c2),
                               times(g3, x3, c3)))
            r += 4 * lanes
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
    return Kernel(body, f"*{kind} *{kind} *f8 *f8 *f8 *f8 *i4 *{kind} *{kind} {'i8 ' * 7} i4",
                  name=f"column_sums_{kind}_{W}", threads=THREADS, minimum=2)


def every():
    """All kernels of this module."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for W in (width(dtype), 1):
            yield column_sums(dtype, W)


def _rows(x, dims):
    """x in C order, and how many rows there are of how many numbers."""
    cut_at = x.ndim - dims
    return xp.ascontiguousarray(x), math.prod(x.shape[:cut_at]), math.prod(x.shape[cut_at:])


def whole(a, dtype):
    """A parameter of any shape in C order and of that dtype, or None."""
    return None if a is None else xp.ascontiguousarray(a.astype(dtype, copy=False))


def run(x, gamma, beta, count, D, eps, center, G=1, K=0, S=0):
    """y, mean (None without center) and invstd of ``count`` rows of a C-ordered x; S > 0: γ and β
    are of S values each."""
    y, invstd = empty_like(x), empty((count,), np.float64)
    mean = empty((count,), np.float64) if center else None
    there = [a for a in (gamma, beta) if a is not None and not S]
    W = width(x.dtype)
    if (S or D) % W or D % W or not aligned(x, *there):
        W = 1
    T, resident = rows.plan(D, W, 8)
    option = GAMMA * (gamma is not None) | BETA * (beta is not None) | CENTER * center
    rows.forward(x.dtype, W, T, resident, S > 0)(
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
    return run(x, whole(gamma, x.dtype), whole(beta, x.dtype), count, D, eps, center)


def _backward(dy, x, gamma, mean, invstd, dims):
    x, count, D = _rows(x, dims)
    dy, gamma, shape = xp.ascontiguousarray(dy), whole(gamma, x.dtype), x.shape[x.ndim - dims:]
    dx, dgamma = empty_like(x), empty(shape, x.dtype)
    dbeta = empty(shape, x.dtype) if mean is not None else None
    if not x.size:
        for a in (dgamma, dbeta):
            if a is not None:
                a.fill(0)
        return dx, dgamma, dbeta
    center = CENTER * (mean is not None)
    W = width(x.dtype)
    if D % W or not aligned(x, dy, *([] if gamma is None else [gamma])):
        W = 1
    T, resident = rows.plan(D, W, 4)
    rows.backward(x.dtype, W, T, resident)(
        rows.blocks(count, T), dy, x, gamma, mean, invstd, dx, count, D,
        center | GAMMA * (gamma is not None))
    c = cut(True, 1, count, D, 1, x.dtype, x, dy)
    column_sums(x.dtype, c.W)(c.blocks, dy, x, mean, invstd, *parts(c), tickets(), dgamma, dbeta,
                              *c.numbers, center | BETA * (mean is not None))
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
