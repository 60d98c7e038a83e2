"""2-d pooling: a thread for each result, in channels-last memory. Gradients are gathered, each by
one thread in the windows' order, so that they have the same bits in every run."""

from functools import lru_cache

import numpy as np

from ..shapes import Pool, adaptive_ranges, window_ranges
from .intrinsics import cuda
from .launch import Kernel, factory
from .memory import SIMULATED, device_of, empty, to_device, xp
from .tile import divided

__all__ = ["adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", "avg_pool2d",
           "avg_pool2d_backward", "max_pool2d", "max_pool2d_backward", "max_pool2d_gather"]

THREADS = 256 if not SIMULATED else 32


def _blocks(N, size):
    """Blocks for N images of so many results, and for one of them: 32 bits count those."""
    each = -(-size // THREADS)
    return N * each, each


@factory
def _max(dtype):
    kind = dtype.str[1:]

    def body(x, y, indices, H, W, C, P, Q, I, J, sh, sw, ph, pw, dh, dw, blocks):
        n = divided(cuda.blockIdx.x, blocks)
        e = (cuda.blockIdx.x - n * blocks) * THREADS + cuda.threadIdx.x
        if e >= P * Q * C:
            return
        m = divided(e, C)
        p = divided(m, Q)
        top, left = p * sh - ph, (m - p * Q) * sw - pw
        base, best, at = n * H * W * C + e - m * C, x[0], -1
        for i in range(I):
            h = top + i * dh
            for j in range(J):
                w = left + j * dw
                if h >= 0 and h < H and w >= 0 and w < W:
                    v = x[base + (h * W + w) * C]
                    if at < 0 or v > best or v != v:
                        best, at = v, h * W + w
        y[n * P * Q * C + e] = best if at >= 0 else -np.inf
        indices[n * P * Q * C + e] = at
    return Kernel(body, f"*{kind} *{kind} *i8 " + "i8 " * 14, threads=THREADS,
                  name=f"max_pool_{kind}")


@factory
def _max_backward(dtype):
    """dx at a pixel, from the windows that hold it."""
    kind, zero = dtype.str[1:], dtype.type(0)

    def body(dy, indices, dx, H, W, C, P, Q, I, J, sh, sw, ph, pw, dh, dw, blocks):
        n = divided(cuda.blockIdx.x, blocks)
        e = (cuda.blockIdx.x - n * blocks) * THREADS + cuda.threadIdx.x
        if e >= H * W * C:
            return
        m, acc = divided(e, C), zero
        h = divided(m, W)
        top, left, base = h + ph, m - h * W + pw, n * P * Q * C + e - m * C
        for i in range(I - 1, -1, -1):
            p = divided(max(top - i * dh, 0), sh)
            if p < P and p * sh == top - i * dh:
                for j in range(J - 1, -1, -1):
                    q = divided(max(left - j * dw, 0), sw)
                    if q < Q and q * sw == left - j * dw:
                        at = base + (p * Q + q) * C
                        if indices[at] == m:
                            acc += dy[at]
        dx[n * H * W * C + e] = acc
    return Kernel(body, f"*{kind} *i8 *{kind} " + "i8 " * 14, threads=THREADS,
                  name=f"max_pool_backward_{kind}")


@factory
def _scatter(dtype):
    """dx += dy at the indices: a thread for each image and channel, window after window."""
    kind = dtype.str[1:]

    def body(dy, indices, dx, NC, pixels, C, windows):
        e = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if e >= NC:
            return
        n = divided(e, C)
        c = e - n * C
        for m in range(windows):
            at = indices[(n * windows + m) * C + c]
            if at >= 0:
                dx[(n * pixels + at) * C + c] += dy[(n * windows + m) * C + c]
    return Kernel(body, f"*{kind} *i8 *{kind} " + "i8 " * 4, threads=THREADS,
                  name=f"max_pool_scatter_{kind}")


@factory
def _gather(dtype):
    kind, zero = dtype.str[1:], dtype.type(0)

    def body(x, indices, y, pixels, C, windows, blocks):
        n = divided(cuda.blockIdx.x, blocks)
        e = (cuda.blockIdx.x - n * blocks) * THREADS + cuda.threadIdx.x
        if e < windows * C:
            c, at = e - divided(e, C) * C, indices[n * windows * C + e]
            y[n * windows * C + e] = x[(n * pixels + at) * C + c] if at >= 0 else zero
    return Kernel(body, f"*{kind} *i8 *{kind} " + "i8 " * 4, threads=THREADS,
                  name=f"max_pool_gather_{kind}")


@factory
def _mean(dtype, forward):
    """y = Σ x over ranges of rows and columns, divided; backward the divisor is of each x. Sums
    are in float64. ranges: first and end of each row's, of each column's; counts of rows, of
    columns, whose product divides, unless ``override`` does."""
    kind, result = dtype.str[1:], dtype.type

    def body(x, y, ranges, H, W, C, P, Q, blocks, override, overridden):
        n = divided(cuda.blockIdx.x, blocks)
        e = (cuda.blockIdx.x - n * blocks) * THREADS + cuda.threadIdx.x
        if e >= P * Q * C:
            return
        m, acc = divided(e, C), 0.0
        p = divided(m, Q)
        q, counts = m - p * Q, 2 * P + 2 * Q
        rows = P if forward else H
        for h in range(ranges[p], ranges[P + p]):
            for w in range(ranges[2 * P + q], ranges[2 * P + Q + q]):
                v = np.float64(x[((n * H + h) * W + w) * C + e - m * C])
                if not forward:
                    v /= (override if overridden else
                          max(1, ranges[counts + h] * ranges[counts + rows + w]))
                acc += v
        if forward:
            acc /= (override if overridden else
                    max(1, ranges[counts + p] * ranges[counts + rows + q]))
        y[n * P * Q * C + e] = result(acc)
    return Kernel(body, f"*{kind} *{kind} *i8 " + "i8 " * 6 + "f8 i4", threads=THREADS,
                  name=f"mean_pool_{'forward' if forward else 'backward'}_{kind}")


def every():
    """The kernels of float32 and float64, for those who compile them ahead."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for make in (_max, _max_backward, _scatter, _gather):
            yield make(dtype)
        for forward in (True, False):
            yield _mean(dtype, forward)


def _last(x):
    """x as (n, h, w, c), which is its order in memory."""
    return xp.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _first(y):
    return y.transpose(0, 3, 1, 2)


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode):
    """y = max over the window, and where: index into the H·W plane, −1 for a window all in padding.

    The first maximum wins; a NaN is the maximum, the last one if there are several.
    """
    g = Pool.of(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    N, C = x.shape[:2]
    y, indices = (empty((N, g.P, g.Q, C), t) for t in (x.dtype, np.int64))
    if x.size:
        blocks, each = _blocks(N, g.P * g.Q * C)
        _max(x.dtype)(blocks, _last(x), y, indices, g.H, g.W, C, *g[2:], each)
    else:
        y[...], indices[...] = -np.inf, -1
    return _first(y), _first(indices)


def max_pool2d_backward(dy, indices, *, input_size, kernel_size=None, stride=None, padding=None,
                        dilation=None):
    """dx = dy added at the indices, 0 elsewhere. What windows they are from need not be known."""
    N, C, H, W = input_size
    dx, (P, Q) = empty((N, H, W, C), dy.dtype), dy.shape[2:]
    known = None not in (kernel_size, stride, padding, dilation)
    if not known or not dy.size:
        dx[...] = 0
    if dx.size and dy.size:
        dy, indices = _last(dy), _last(indices)
        if known:
            blocks, each = _blocks(N, H * W * C)
            _max_backward(dy.dtype)(blocks, dy, indices, dx, H, W, C, P, Q, *kernel_size, *stride,
                                    *padding, *dilation, each)
        else:
            _scatter(dy.dtype)(-(-N * C // THREADS), dy, indices, dx, N * C, H * W, C, P * Q)
    return _first(dx)


def max_pool2d_gather(x, indices):
    """y = x at the indices, 0 at −1: the transpose of max_pool2d_backward."""
    N, C, H, W = x.shape
    P, Q = indices.shape[2:]
    y = empty((N, P, Q, C), x.dtype)
    if x.size and y.size:
        blocks, each = _blocks(N, P * Q * C)
        _gather(x.dtype)(blocks, _last(x), _last(indices), y, H * W, C, P * Q, each)
    else:
        y[...] = 0
    return _first(y)


def _windows_of(first, end, size):
    """The range of windows that hold each position: windows' firsts and ends both ascend."""
    at = np.arange(size)
    return np.searchsorted(end, at, "right"), np.searchsorted(first, at, "right")


@lru_cache(256)
def _ranges(make, settings, size, forward, number):
    """The kernel's ranges, on a device: sent once. settings: one tuple of ``make``'s per axis."""
    rows, columns = (make(*a) for a in settings)
    spans = [rows[:2], columns[:2]]
    if not forward:
        spans = [_windows_of(*span, n) for span, n in zip(spans, size)]
    parts = [a for span in spans for a in span] + [rows[2], columns[2]]
    return to_device(np.concatenate(parts).astype(np.int64), number)


def _pooled(x, make, settings, size, out, forward, override=None):
    """Means of x over windows, or their transpose; ``size``: of the image, ``out``: of y."""
    N, C, H, W = x.shape
    y = empty((N, *out, C), x.dtype)
    if x.size and y.size:
        ranges = _ranges(make, tuple(settings), tuple(size), forward, device_of(x))
        blocks, each = _blocks(N, out[0] * out[1] * C)
        _mean(x.dtype, forward)(blocks, _last(x), y, ranges, H, W, C, *out, each,
                                0 if override is None else override, override is not None)
    else:
        y[...] = 0
    return _first(y)


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    """y = Σ over the window / (its size, or divisor_override)."""
    settings = [(*a, ceil_mode, count_include_pad)
                for a in zip(x.shape[2:], kernel_size, stride, padding)]
    out = [len(window_ranges(*a)[0]) for a in settings]
    return _pooled(x, window_ranges, settings, x.shape[2:], out, True, divisor_override)


def avg_pool2d_backward(dy, *, input_size, kernel_size, stride, padding, ceil_mode,
                        count_include_pad, divisor_override):
    """dx = Σ over the windows that hold the pixel of dy / divisor."""
    settings = [(*a, ceil_mode, count_include_pad)
                for a in zip(input_size[2:], kernel_size, stride, padding)]
    return _pooled(dy, window_ranges, settings, input_size[2:], input_size[2:], False,
                   divisor_override)


def adaptive_avg_pool2d(x, *, output_size):
    """y[p, q] = mean of rows [⌊pH/P⌋, ⌈(p+1)H/P⌉) and columns likewise."""
    return _pooled(x, adaptive_ranges, zip(x.shape[2:], output_size), x.shape[2:], output_size,
                   True)


def adaptive_avg_pool2d_backward(dy, *, input_size):
    """dx = Σ over the windows that hold the pixel of dy / window size."""
    return _pooled(dy, adaptive_ranges, zip(input_size[2:], dy.shape[2:]), input_size[2:],
                   input_size[2:], False)
