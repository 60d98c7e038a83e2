"""2-d pooling in channels-last memory: loops run over the contiguous channels of a pixel."""

import numpy as np

from ..shapes import Pool, adaptive_ranges, window_ranges
from .jit import kernel, prange
from .memory import empty

__all__ = ["adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", "avg_pool2d",
           "avg_pool2d_backward", "max_pool2d", "max_pool2d_backward", "max_pool2d_gather"]

CHANNELS = 32              # channels per task of the scatter: 128 bytes of float32


def _last(x):
    """x (N, C, H, W) as contiguous (N, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _first(y):
    return y.transpose(0, 3, 1, 2)


@kernel
def _max(x, g, y, indices):
    """One task per row of windows. The first maximum wins, unless a NaN comes."""
    C = x.shape[3]
    for row in prange(x.shape[0] * g.P):
        n, p = row // g.P, row % g.P
        for q in range(g.Q):
            best, at = y[n, p, q], indices[n, p, q]
            best[:] = -np.inf
            at[:] = -1
            for i in range(g.I):
                h = p * g.sh - g.ph + i * g.dh
                for j in range(g.J):
                    w = q * g.sw - g.pw + j * g.dw
                    if 0 <= h < g.H and 0 <= w < g.W:
                        tap, here = x[n, h, w], h * g.W + w
                        for c in range(C):
                            v = tap[c]
                            take = (v > best[c]) | (v != v) | (at[c] < 0)
                            best[c] = v if take else best[c]
                            at[c] = here if take else at[c]


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


@kernel
def _scatter(dy, indices, dx):
    """dx (N, H·W, C) at the indices += dy (N, P·Q, C); one task per image and few channels."""
    N, PQ, C = dy.shape
    tiles = (C + CHANNELS - 1) // CHANNELS
    for t in prange(N * tiles):
        n, c0 = t // tiles, t % tiles * CHANNELS
        c1 = min(C, c0 + CHANNELS)
        dx[n, :, c0:c1] = 0
        for p in range(PQ):
            for c in range(c0, c1):
                if indices[n, p, c] >= 0:
                    dx[n, indices[n, p, c], c] += dy[n, p, c]


def max_pool2d_backward(dy, indices, *, input_size):
    """dx = dy added at the indices, 0 elsewhere."""
    N, C, H, W = input_size
    dx = empty((N, H, W, C), dy.dtype)
    if dx.size:
        shape = N, dy.shape[2] * dy.shape[3], C
        _scatter(_last(dy).reshape(shape), _last(indices).reshape(shape), dx.reshape(N, H * W, C),
                 work=dx.nbytes + 3 * dy.nbytes)
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


@kernel
def _window_sums(x, h0, h1, w0, w1, y):
    """y[n, p, q] = Σ x[n, h0[p]:h1[p], w0[q]:w1[q]], in float64, for x and y (N, H, W, C)."""
    N, P, Q, C = y.shape
    for row in prange(N * P):
        n, p = row // P, row % P
        acc = np.empty(C)
        for q in range(Q):
            acc[:] = 0.0
            for h in range(h0[p], h1[p]):
                for w in range(w0[q], w1[q]):
                    pixel = x[n, h, w]
                    for c in range(C):
                        acc[c] += pixel[c]
            out = y[n, p, q]
            for c in range(C):
                out[c] = acc[c]


def _sums(x, rows, columns):
    """Sums over the windows rows × columns of x (N, H, W, C)."""
    N, _, _, C = x.shape
    y = empty((N, len(rows[0]), len(columns[0]), C), x.dtype)
    if y.size:
        _window_sums(x, *rows[:2], *columns[:2], y, work=x.nbytes + y.nbytes)
    return y


def _holders(ranges, size):
    """The windows [first, last) that hold input position i. Windows move on with their number."""
    first, last, _ = ranges
    i = np.arange(size)
    return np.searchsorted(last, i, side="right"), np.searchsorted(first, i, side="right")


def _divisor(rows, columns, dtype, override=None):
    """(P, Q, 1): what each window's sum is divided by."""
    count = np.maximum(np.multiply.outer(rows[2], columns[2]), 1)
    return (count if override is None else np.full_like(count, override)).astype(dtype)[..., None]


def _mean(x, rows, columns, override=None):
    y = _sums(_last(x), rows, columns)
    y /= _divisor(rows, columns, x.dtype, override)
    return _first(y)


def _mean_backward(dy, input_size, rows, columns, override=None):
    share = _last(dy) / _divisor(rows, columns, dy.dtype, override)
    holders = [_holders(r, size) for r, size in zip((rows, columns), input_size[2:])]
    return _first(_sums(share, *holders))


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
    return _mean(x, *(adaptive_ranges(*a) for a in zip(x.shape[2:], output_size)))


def adaptive_avg_pool2d_backward(dy, *, input_size):
    """dx = Σ over the windows that hold the pixel of dy / window size."""
    ranges = (adaptive_ranges(*a) for a in zip(input_size[2:], dy.shape[2:]))
    return _mean_backward(dy, input_size, *ranges)
