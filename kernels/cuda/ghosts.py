"""Batch normalization of parts of a batch, each for itself: ghosts of ``size`` samples, the last of
which may have fewer, in one launch.

A block takes a ghost's tile of channels: it finds their statistics as moments.py does, or adds up
their gradients, and then goes over the same values again, which the caches hold unless a ghost has
several MB. So a batch should have as many ghosts times tiles as there are multiprocessors. Halves
are read and written as such and computed in float32.
"""

import math
from functools import cache

import numpy as np

from ..half import kind as kind_of, real as real_of
from .intrinsics import cuda, device, libm
from .launch import Kernel, factory, processors
from .layer_norm import parameters
from .layout import alike
from .memory import empty, empty_like, xp
from .moments import THREADS, add_trees, line_at, merge_trees, merged, moments_of_eight
from .norm import shaped
from .reduce import sum
from .vectors import dtypes

__all__ = ["ghost_batch_norm", "ghost_batch_norm_backward"]

GAMMA, BETA, APART = 1, 2, 4     # the last: γ and β are every ghost's own
NARROW, WIDE = 8, 32         # channels of a block: numbers that lie side by side in a row
_min, _max = min, max


@cache
def _place(columns, index):
    """Of this thread: its channel and place among the block's, its first value, the ghost's first
    sample and how many values of a channel the ghost has."""
    @device
    def f(N, S, size, side, tiles):
        tile, g = cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        i = cuda.threadIdx.x % side
        return (tile * side + i, i, cuda.threadIdx.x // side, g * size,
                (_min(N, g * size + size) - g * size) * S)
    return f, line_at(1, columns, index)


@cache
def _constants(dtype):
    """A channel's mean in two words, and 1/σ."""
    real, zero = real_of(dtype).type, real_of(dtype).type(0)

    @device
    def f(mean, invstd):
        high = real(mean)
        low = real(mean - np.float64(high)) if high - high == zero else zero
        return high, low, real(invstd)
    return f


def _kernel(body, name, dtype, params, columns, index, given):
    """``given``: its parameters, x and p for the dtypes of x, and of γ and β."""
    x, p = kind_of(dtype), kind_of(params)
    layout = "columns" if columns else f"segments_{index}"
    return Kernel(body, given.replace("x", x).replace("p", p), threads=THREADS, minimum=2,
                  name=f"{name}_{x}{'' if x == p else '_' + p}_{layout}")


@factory
def _forward(dtype, params, columns, index):
    """y, and mean, var and invstd of the channels of every ghost."""
    (place, at), split = _place(columns, index), _constants(dtype)
    moments = moments_of_eight(dtype, 1)
    real, sqrt = real_of(dtype).type, libm("sqrt", np.float64)
    one, zero = real(1), real(0)

    @device
    def found(x, base, v, count, lanes, c, C, S):
        n, state = 0.0, (0.0, 0.0)
        while v < count and c < C:
            m = _min(8, (count - v + lanes - 1) // lanes)
            a = x[base + at(v, c, C, S)]
            b = x[base + at(v + (lanes if m > 1 else 0), c, C, S)]
            d = x[base + at(v + (2 * lanes if m > 2 else 0), c, C, S)]
            e = x[base + at(v + (3 * lanes if m > 3 else 0), c, C, S)]
            f = x[base + at(v + (4 * lanes if m > 4 else 0), c, C, S)]
            g = x[base + at(v + (5 * lanes if m > 5 else 0), c, C, S)]
            h = x[base + at(v + (6 * lanes if m > 6 else 0), c, C, S)]
            i = x[base + at(v + (7 * lanes if m > 7 else 0), c, C, S)]
            w = m / (n + m)
            more, = moments((a,), (b,), (d,), (e,), (f,), (g,), (h,), (i,), real(m))
            state = merged(state, more, (w, n * w))
            n += m
            v += 8 * lanes
        return n, state

    def body(x, gamma, beta, y, mean, var, invstd, N, C, S, size, side, tiles, eps, option):
        means = cuda.shared.array(THREADS, np.float64)
        squares = cuda.shared.array(THREADS, np.float64)
        counts = cuda.shared.array(THREADS, np.float64)
        t, lanes = cuda.threadIdx.x, THREADS // side
        c, i, v, first, count = place(N, S, size, side, tiles)
        base = first * C * S
        counts[t], (means[t], squares[t]) = found(x, base, v, count, lanes, c, C, S)
        merge_trees(means, squares, counts, THREADS, side)
        if c >= C:
            return
        biased, k = squares[i] / counts[i], first // size * C + c
        inverse = 1.0 / sqrt(biased + eps)
        if t < side:
            mean[k], var[k], invstd[k] = means[i], biased, inverse
        own = k if option & APART else c
        high, low, factor = split(means[i], inverse)
        factor *= gamma[own] if option & GAMMA else one
        shift = beta[own] if option & BETA else zero
        while v < count:
            j = base + at(v, c, C, S)
            y[j] = ((x[j] - high) - low) * factor + shift
            v += lanes
    return _kernel(body, "ghosts", dtype, params, columns, index,
                   "*x *p *p *x *f8 *f8 *f8 i8 i8 i8 i8 i8 i8 f8 i4")


@factory
def _backward(dtype, params, columns, index):
    """dx, and Σ dy and Σ dy x̂ of the channels of every ghost."""
    (place, at), split, real = _place(columns, index), _constants(dtype), real_of(dtype).type
    one, wide = real(1), np.float64

    def body(dy, x, gamma, mean, invstd, dx, sum_dyx, sum_dy, N, C, S, size, side, tiles, option):
        sums = cuda.shared.array(THREADS, np.float64)
        sums_x = cuda.shared.array(THREADS, np.float64)
        t, lanes = cuda.threadIdx.x, THREADS // side
        c, i, begin, first, count = place(N, S, size, side, tiles)
        base, k, there = first * C * S, first // size * C + _min(c, C - 1), c < C
        high, low, inverse = split(mean[k], invstd[k])
        v, s, sx = begin, 0.0, 0.0
        while v < count and there:
            j = base + at(v, c, C, S)
            s += wide(dy[j])
            sx += wide(dy[j] * (((x[j] - high) - low) * inverse))
            v += lanes
        sums[t], sums_x[t] = s, sx
        add_trees(sums, sums_x, THREADS, side)
        if not there:
            return
        if t < side:
            sum_dy[k], sum_dyx[k] = sums[i], sums_x[i]
        gain = gamma[k if option & APART else c] if option & GAMMA else one
        a = real(sums[i] * wide(gain) / count)
        b = real(sums_x[i] * wide(gain) / count * invstd[k])
        v = begin
        while v < count:
            j = base + at(v, c, C, S)
            dx[j] = inverse * ((dy[j] * gain - a) - ((x[j] - high) - low) * b)
            v += lanes
    return _kernel(body, "ghosts_backward", dtype, params, columns, index,
                   "*x *x *p *f8 *f8 *x *f8 *f8 i8 i8 i8 i8 i8 i8 i4")


def _numbers(x, columns, size):
    """The blocks, and a kernel's N, C, S, size, side and tiles."""
    N, C, *S = x.shape
    ghosts, side = -(-N // size), 1
    if columns:
        while side < _min(C, WIDE):
            side *= 2
        while side > NARROW and ghosts * -(-C // side) < 2 * processors():
            side //= 2
    tiles = -(-C // side)
    return ghosts * tiles, (N, C, math.prod(S), size, side, tiles)


def _shaped(x):
    """x in dense memory, and which kernels are for it."""
    x, (columns, *_) = shaped(x)
    return x, (columns, "u4" if x.size < 2**31 else "i8")


def _wide(a):
    return xp.ascontiguousarray(a.astype(np.float64, copy=False))


def _options(gamma, beta=None):
    given = gamma if beta is None else beta
    return (GAMMA * (gamma is not None) | BETA * (beta is not None)
            | APART * (given is not None and given.ndim == 2))


def _filled(dtype, shape, value=0.0):
    out = empty(shape, dtype)
    out.fill(value)
    return out


def ghost_batch_norm(x, gamma, beta, *, size, eps):
    """y, mean, var, invstd = 1 / √(var + eps) of each ``size`` samples, the last of which may be
    fewer: y = x̂ γ + β, γ and β (C,) or (ghosts, C); the others float64 (ghosts, C)."""
    shape = -(-len(x) // size), x.shape[1]
    if not x.size:
        return (empty_like(x), _filled(np.float64, shape), _filled(np.float64, shape),
                _filled(np.float64, shape, 1 / math.sqrt(eps) if eps else math.inf))
    x, how = _shaped(x)
    blocks, numbers = _numbers(x, how[0], size)
    y, stats = empty_like(x), [empty(shape, np.float64) for _ in range(3)]
    gamma, beta, params = parameters(x, gamma, beta)
    _forward(x.dtype, params, *how)(
        blocks, x, gamma, beta, y, *stats, *numbers, eps, _options(gamma, beta))
    return y, *stats


def ghost_batch_norm_backward(dy, x, gamma, mean, invstd, *, size, apart=False):
    """dx as batch_norm_backward's of each ghost, dγ = Σ dy x̂ and dβ = Σ dy over all, (C,), or of
    each, (ghosts, C), if ``apart``; in γ's dtype."""
    C, (gamma, params) = x.shape[1], parameters(x, gamma)
    if not x.size:
        shape = mean.shape if apart else (C,)
        return empty_like(x), _filled(params, shape), _filled(params, shape)
    x, how = _shaped(x)
    blocks, numbers = _numbers(x, how[0], size)
    dx, sums = empty_like(x), empty((2, -(-len(x) // size), C), np.float64)
    _backward(x.dtype, params, *how)(
        blocks, alike(dy, x), x, gamma, _wide(mean), _wide(invstd), dx, *sums, *numbers,
        _options(gamma))
    dgamma, dbeta = (sums if apart else sum(sums, axes=(1,), keepdims=False)).astype(params)
    return dx, dgamma, dbeta


def every():
    """All kernels of this module."""
    for dtype in dtypes():
        for params in {dtype: None, real_of(dtype): None}:
            for columns in (True, False):
                for make in (_forward, _backward):
                    yield make(dtype, params, columns, "u4")
