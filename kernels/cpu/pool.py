"""2-d pooling in channels-last memory: loops run over the contiguous channels of a pixel."""

import numpy as np

from ..shapes import Pool, adaptive_ranges, window_ranges
from .jit import device, kernel, prange
from .memory import empty
from .reduce import sum
from .simd import (
    high,
    lanes,
    load_part,
    low,
    narrow,
    places,
    splat,
    store_part,
    store_places,
    where,
)

__all__ = ["adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", "avg_pool2d",
           "avg_pool2d_backward", "max_pool2d", "max_pool2d_backward", "max_pool2d_gather"]

CHANNELS = 16              # a task of the scatter where images are few: a cache line of float32
FEW = 8


def _last(x):
    """x (N, C, H, W) as contiguous (N, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _first(y):
    return y.transpose(0, 3, 1, 2)


@device
def _taps(first, step, count, size):
    """The range of taps that lie inside: 0 ≤ first + i step < size."""
    low = 0 if first >= 0 else (-first + step - 1) // step
    return low, max(low, min(count, (size - first + step - 1) // step))


@device
def _max_window(x, g, C, n, h, w, y, indices, o):
    """The first maximum wins, unless a NaN comes. Only taps that lie inside are looked at."""
    W = lanes(x)
    i0, i1 = _taps(h, g.dh, g.I, g.H)
    j0, j1 = _taps(w, g.dw, g.J, g.W)
    for c in range(0, C, W):
        m = min(W, C - c)
        best, at = splat(x.dtype.type(-np.inf)), places(x, -1)
        if i0 < i1 and j0 < j1:
            here = (h + i0 * g.dh) * g.W + w + j0 * g.dw
            best, at = load_part(x, (n * g.H * g.W + here) * C + c, m), places(x, here)
        for i in range(i0, i1):
            for j in range(j0, j1):
                here = (h + i * g.dh) * g.W + w + j * g.dw
                v = load_part(x, (n * g.H * g.W + here) * C + c, m)
                take = (v > best) | (v != v)
                best, at = where(take, v, best), where(take, places(x, here), at)
        store_part(y, o + c, best, m)
        store_places(indices, o + c, at, m)


@kernel
def _max(x, g, y, indices):
    """One task per row of windows."""
    C = x.shape[3]
    for row in prange(x.shape[0] * g.P):
        n, p = row // g.P, row % g.P
        for q in range(g.Q):
            _max_window(x, g, C, n, p * g.sh - g.ph, q * g.sw - g.pw, y, indices,
                        (row * g.Q + q) * C)


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode):
    """y = max over the window, and where: index into the H·W plane, −1 for a window all in padding.

    The first maximum wins; a NaN is the maximum, the last one if there are several.
    """
    g = Pool.of(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    shape = x.shape[0], g.P, g.Q, x.shape[1]
    y, indices = empty(shape, x.dtype), empty(shape, np.int64)
    if y.size:
        _max(_last(x), g, y, indices, work=x.nbytes + y.nbytes + indices.nbytes)
    return _first(y), _first(indices)


@device
def _zero(y, first, last, width, step):
    """width elements each from first, first + step, … below last."""
    if width == step:
        y[first:last] = 0
    else:
        for i in range(first, last, step):
            for c in range(width):
                y[i + c] = 0


@kernel
def _scatter(dy, indices, dx, width):
    """dx (N, H·W, C) at the indices += dy (N, P·Q, C); a task: an image, ``width`` channels.

    Windows move on: zeros are written just ahead of them, while the lines are in the cache."""
    N, PQ, C = dy.shape
    tiles, plane = (C + width - 1) // width, dx.shape[1] * C
    source, at, out = dy.reshape(-1), indices.reshape(-1), dx.reshape(-1)
    for t in prange(N * tiles):
        n, c0 = t // tiles, t % tiles * width
        m, origin, clear = min(width, C - c0), t // tiles * plane + t % tiles * width, 0
        for i in range(n * PQ * C + c0, (n + 1) * PQ * C, C):
            far = at[i]
            for c in range(1, m):
                far = max(far, at[i + c])
            if far >= clear:
                _zero(out, origin + clear * C, origin + (far + 1) * C, m, C)
                clear = far + 1
            for c in range(m):
                k = at[i + c]
                if k >= 0:
                    out[np.uintp(origin + k * C + c)] += source[i + c]
        _zero(out, origin + clear * C, origin + plane, m, C)


def max_pool2d_backward(dy, indices, *, input_size):
    """dx = dy added at the indices, 0 elsewhere."""
    N, C, H, W = input_size
    dx = empty((N, H, W, C), dy.dtype)
    if dx.size:
        shape = N, dy.shape[2] * dy.shape[3], C
        _scatter(_last(dy).reshape(shape), _last(indices).reshape(shape), dx.reshape(N, H * W, C),
                 C if N >= FEW else CHANNELS, work=dx.nbytes + 3 * dy.nbytes)
    return _first(dx)


@kernel
def _gather(x, indices, y):
    N, PQ, C = y.shape
    for n in prange(N):
        for p in range(PQ):
            for c in range(C):
                at = indices[n, p, c]
                y[n, p, c] = x[n, at, c] if at >= 0 else 0


def max_pool2d_gather(x, indices):
    """y = x at the indices, 0 at −1: the transpose of max_pool2d_backward."""
    N, C, P, Q = indices.shape
    y = empty((N, P, Q, C), x.dtype)
    if y.size and not x.size:
        y[...] = 0
    elif y.size:
        _gather(_last(x).reshape(N, -1, C), _last(indices).reshape(N, P * Q, C),
                y.reshape(N, P * Q, C), work=4 * y.nbytes)
    return _first(y)


@device
def _window(x, n, C, h0, h1, w0, w1, share, scale, y, o):
    """y[o …] = scale Σ share x over a window of rows h0 … h1 and columns w0 … w1, in float64."""
    L, (H, W) = lanes(x), share.shape
    for c in range(0, C, L):
        m, a, b = min(L, C - c), splat(np.float64(0)), splat(np.float64(0))
        for h in range(h0, h1):
            for w in range(w0, w1):
                v, s = load_part(x, ((n * H + h) * W + w) * C + c, m), share[h, w]
                a, b = a + low(v) * s, b + high(v) * s
        store_part(y, o + c, narrow(a * scale, b * scale, y), m)


@device
def _scaled(x, i, C, scale, y, o):
    """_window of one element."""
    s = splat(x.dtype.type(scale))
    for c in range(0, C, lanes(x)):
        m = min(lanes(x), C - c)
        store_part(y, o + c, load_part(x, i + c, m) * s, m)


@kernel
def _windows(x, share, h0, h1, w0, w1, scale, y):
    """y[n, p, q] = scale[p, q] Σ (share x)[n, h0[p]:h1[p], w0[q]:w1[q]]; x, y (N, H, W, C)."""
    N, P, Q, C = y.shape
    for row in prange(N * P):
        n, p = row // P, row % P
        for q in range(Q):
            h, w, o = h0[p], w0[q], (row * Q + q) * C
            if h1[p] - h == 1 and w1[q] - w == 1:              # windows that do not overlap
                i = (n * x.shape[1] + h) * x.shape[2] + w
                _scaled(x, i * C, C, share[h, w] * scale[p, q], y, o)
            else:
                _window(x, n, C, h, h1[p], w, w1[q], share, scale[p, q], y, o)


def _sums(x, share, rows, columns, scale):
    """Sums of (share x) over the windows rows × columns, times scale; x (N, H, W, C)."""
    N, _, _, C = x.shape
    y = empty((N, len(rows[0]), len(columns[0]), C), x.dtype)
    if y.size:
        _windows(x, share, *rows[:2], *columns[:2], scale, y, work=x.nbytes + y.nbytes)
    return y


def _holders(ranges, size):
    """The windows [first, last) that hold input position i. Windows move on with their number."""
    first, last, _ = ranges
    i = np.arange(size)
    return np.searchsorted(last, i, side="right"), np.searchsorted(first, i, side="right")


def _shares(rows, columns, override=None):
    """(P, Q): the share of an element in each window's mean."""
    count = np.maximum(np.multiply.outer(rows[2], columns[2]), 1)
    return 1 / np.asarray(count if override is None else np.full(count.shape, override), np.float64)


def _mean(x, rows, columns, override=None):
    scale, ones = _shares(rows, columns, override), np.ones(x.shape[2:])
    return _first(_sums(_last(x), ones, rows, columns, scale))


def _mean_backward(dy, input_size, rows, columns, override=None):
    shares, ones = _shares(rows, columns, override), np.ones(input_size[2:])
    holders = [_holders(r, size) for r, size in zip((rows, columns), input_size[2:])]
    return _first(_sums(_last(dy), shares, *holders, ones))


def _ranges(size, kernel_size, stride, padding, ceil_mode, count_include_pad):
    return [window_ranges(*a, ceil_mode, count_include_pad)
            for a in zip(size, kernel_size, stride, padding)]


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    """y = Σ over the window / (its size, or divisor_override)."""
    ranges = _ranges(x.shape[2:], kernel_size, stride, padding, ceil_mode, count_include_pad)
    return _mean(x, *ranges, divisor_override)


def avg_pool2d_backward(dy, *, input_size, kernel_size, stride, padding, ceil_mode,
                        count_include_pad, divisor_override):
    """dx = Σ over the windows that hold the pixel of dy / divisor."""
    ranges = _ranges(input_size[2:], kernel_size, stride, padding, ceil_mode, count_include_pad)
    return _mean_backward(dy, input_size, *ranges, divisor_override)


def adaptive_avg_pool2d(x, *, output_size):
    """y[p, q] = mean of rows [⌊pH/P⌋, ⌈(p+1)H/P⌉) and columns likewise."""
    if tuple(output_size) == (1, 1) and x.size:
        y = sum(x, axes=(2, 3), keepdims=True)
        return y / x.dtype.type(x.shape[2] * x.shape[3])
    return _mean(x, *(adaptive_ranges(*a) for a in zip(x.shape[2:], output_size)))


def adaptive_avg_pool2d_backward(dy, *, input_size):
    """dx = Σ over the windows that hold the pixel of dy / window size."""
    ranges = (adaptive_ranges(*a) for a in zip(input_size[2:], dy.shape[2:]))
    return _mean_backward(dy, input_size, *ranges)
