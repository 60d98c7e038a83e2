"""2-d pooling in channels-last memory: loops run over the contiguous channels of a pixel."""

from functools import lru_cache

import numpy as np

from ..shapes import Pool, adaptive_ranges, window_ranges
from .columns import inner, put_part
from .jit import device
from .layout import channels_first, channels_last
from .memory import empty
from .reduce import sum
from .simd import (
    PAST_BYTES,
    VECTOR,
    fill,
    fma,
    high,
    lanes,
    load,
    load_part,
    low,
    narrow,
    places,
    pointer,
    points,
    prefetch,
    splat,
    store_part,
    store_places,
    stream,
    where,
)
from .tasks import share, tasks

__all__ = ["adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", "avg_pool2d",
           "avg_pool2d_backward", "max_pool2d", "max_pool2d_backward", "max_pool2d_gather"]

CHANNELS = 16              # a task of the scatter where images are few: a cache line of float32
FEW = 8
SPAN = 16                  # elements of a window's row that are summed in their own precision

NEAR = 1 << 20             # bytes that an L2 holds
# Bytes of an image's row from which on the rows of a window are streams apart; rows that are
# shorter follow each other as one, which the hardware sees.
APART = 1 << 12


@device
def _apart(x, row):
    return x.size * x.itemsize > NEAR and row * x.itemsize >= APART

# What the loops read of a geometry is made once: it took longer than a small pool.
_once = lru_cache(64)


@_once
def _taps(size, out, k, s, p, d):
    """Of each window the first position, and the range of taps that lie inside."""
    first = np.arange(out) * s - p
    low = np.maximum(0, -(first // d))
    return np.stack([first, low, np.clip(-((first - size) // d), low, max(k, 0))])


@inner
def _ask(x, at, C, width, h0, h1, w0, w1):
    """Fetch what the next row of windows reads, rows h0 … h1 and columns w0 … w1 of an image: the
    rows of a window are too far from each other for the hardware to see where they go on. 8 × 64
    channels of 112 × 112, windows of 3 × 3, two cores of Zen 5: 2.7 ms without, 0.7 with it."""
    for h in range(h0, h1):
        for i in range(at + (h * width + w0) * C, at + (h * width + w1) * C, lanes(x)):
            prefetch(x, i)


@inner
def _max_ahead(x, at, C, g, rows, columns, p, q):
    """_ask of the window at (p, q); rows and columns as of _taps."""
    h = rows[p] + (rows[2 * g.P + p] - 1) * g.dh + 1
    end = rows[p + 1] + (rows[2 * g.P + p + 1] - 1) * g.dh + 1
    w = max(0, columns[q])
    _ask(x, at, C, g.W, h, min(end, g.H), w, min(g.W, max(w, columns[q] + g.sw)))


@inner
def _max_window(x, at, C, g, h, i0, i1, w, j0, j1, y, indices, o):
    """The first maximum wins, unless a NaN comes. Only taps that lie inside are looked at."""
    L, some = lanes(x), i0 < i1 and j0 < j1
    first = (h + i0 * g.dh) * g.W + w + j0 * g.dw if some else -1
    for c in range(0, C, L):
        m = min(L, C - c)
        best, index = fill(x, -np.inf), places(x, first)
        row, line = first, at + first * C + c
        for _ in range(i0, i1 if some else i0):
            here, k = row, line
            for _ in range(j0, j1):
                v = load_part(x, k, m)
                take = (v > best) | (v != v)
                best, index = where(take, v, best), where(take, places(x, here), index)
                here, k = here + g.dw, k + g.dw * C
            row, line = row + g.dh * g.W, line + g.dh * g.W * C
        store_part(y, o + c, best, m)
        store_places(indices, o + c, index, m)


@inner
def _max_task(row, x, g, rows, columns, y, indices):
    n, p, C, Q = row // g.P, row % g.P, x.shape[3], g.Q
    far, at = _apart(x, x.shape[2] * C) and p + 1 < g.P, n * g.H * g.W * C
    r, c, values = pointer(rows), pointer(columns), pointer(x)
    out, chosen = pointer(y), pointer(indices)
    for q in range(Q):
        if far:
            _max_ahead(values, at, C, g, r, c, p, q)
        _max_window(values, at, C, g, r[p], r[g.P + p], r[2 * g.P + p], c[q], c[Q + q],
                    c[2 * Q + q], out, chosen, (row * Q + q) * C)


@tasks
def _max(run, x, g, rows, columns, y, indices):
    """One task per row of windows."""
    share(_max_task, x.shape[0] * g.P, run, (x, g, rows, columns, y, indices))


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode):
    """y = max over the window, and where: index into the H·W plane, −1 for a window all in padding.

    The first maximum wins; a NaN is the maximum, the last one if there are several.
    """
    g = Pool.of(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    shape = x.shape[0], g.P, g.Q, x.shape[1]
    y, indices = empty(shape, x.dtype), empty(shape, np.int64)
    if y.size:
        _max(channels_last(x), g, _taps(g.H, g.P, g.I, g.sh, g.ph, g.dh),
             _taps(g.W, g.Q, g.J, g.sw, g.pw, g.dw), y, indices,
             work=3 * x.nbytes)
    return channels_first(y), channels_first(indices)


@inner
def _collect(dy, indices, at, p0, p1, Q, columns, W, h, C, dx, o):
    """A row of dx: each pixel is Σ dy of those windows whose maximum it is."""
    L, zero = lanes(dy), fill(dy, 0)
    for w in range(W):
        for c in range(0, C, L):
            acc = zero
            for p in range(p0, p1):
                for q in range(columns[w], columns[W + w]):
                    i = at + (p * Q + q) * C + c
                    chosen = points(dy, indices, i, L, h * W + w)
                    acc = acc + where(chosen, load(dy, i), zero)
            stream(dx, o + w * C + c, acc)


@inner
def _max_backward_task(row, dy, indices, rows, columns, dx):
    H, W, C = dx.shape[1:]
    P, Q = dy.shape[1:3]
    n, h = row // H, row % H
    _collect(pointer(dy), pointer(indices), n * P * Q * C, rows[0, h], rows[1, h], Q,
             pointer(columns), W, h, C, pointer(dx), row * W * C)


@tasks
def _max_backward(run, dy, indices, rows, columns, dx):
    """Each pixel of dx from the windows that hold it: rows (2, H), columns (2, W). dx is written
    once, past the caches; its channels fill vectors."""
    share(_max_backward_task, dx.shape[0] * dx.shape[1], run, (dy, indices, rows, columns, dx))


@inner
def _place(dy, indices, i, windows, C, width, dx, o, pixels):
    """dx[o …] at the indices = Σ dy, 0 elsewhere: ``width`` of C channels of an image."""
    if width == C:
        for j in range(o, o + pixels * C):
            dx[j] = 0
    else:
        for j in range(o, o + pixels * C, C):
            for c in range(width):
                dx[j + c] = 0
    for w in range(i, i + windows * C, C):
        for c in range(width):
            k = indices[w + c]
            if k >= 0:
                j = o + k * C + c
                dx[j] = dx[j] + dy[w + c]


@inner
def _scatter_task(t, dy, indices, dx, width):
    (PQ, C), HW = dy.shape[1:], dx.shape[1]
    groups = (C + width - 1) // width
    n, c = t // groups, t % groups * width
    _place(pointer(dy), pointer(indices), n * PQ * C + c, PQ, C, min(width, C - c), pointer(dx),
           n * HW * C + c, HW)


@tasks
def _scatter(run, dy, indices, dx, width):
    """dx (N, H·W, C) at the indices = Σ dy (N, P·Q, C)."""
    N, C = dy.shape[0], dy.shape[2]
    share(_scatter_task, N * ((C + width - 1) // width), run, (dy, indices, dx, width))


@_once
def _windows_of(size, out, k, s, p):
    """For each position the windows [first, last) that hold it."""
    first = np.arange(out) * s - p
    return np.stack(_holders(first, first + k, size))


def max_pool2d_backward(dy, indices, *, input_size, kernel_size=None, stride=None, padding=None,
                        dilation=None):
    """dx = dy added at the indices, 0 elsewhere. With the windows they are from, a dx larger than
    the caches is written in one pass."""
    N, C, H, W = input_size
    dx = empty((N, H, W, C), dy.dtype)
    dy, indices, work = channels_last(dy), channels_last(indices), 3 * dx.nbytes
    known = kernel_size is not None and tuple(dilation) == (1, 1)
    if known and dx.nbytes >= PAST_BYTES and C * dx.itemsize % VECTOR == 0:
        rows, columns = (_windows_of(*a) for a in zip((H, W), dy.shape[1:3], kernel_size, stride,
                                                      padding))
        _max_backward(dy, indices, rows, columns, dx, work=work)
    elif dx.size:
        shape = N, dy.shape[1] * dy.shape[2], C
        _scatter(dy.reshape(shape), indices.reshape(shape), dx.reshape(N, H * W, C),
                 C if N >= FEW else CHANNELS, work=work)
    return channels_first(dx)


@inner
def _gather_task(n, x, indices, y):
    PQ, C = y.shape[1:]
    for p in range(PQ):
        for c in range(C):
            at = indices[n, p, c]
            y[n, p, c] = x[n, at, c] if at >= 0 else 0


@tasks
def _gather(run, x, indices, y):
    share(_gather_task, y.shape[0], run, (x, indices, y))


def max_pool2d_gather(x, indices):
    """y = x at the indices, 0 at −1: the transpose of max_pool2d_backward."""
    N, C, P, Q = indices.shape
    y = empty((N, P, Q, C), x.dtype)
    if y.size and not x.size:
        y[...] = 0
    elif y.size:
        _gather(channels_last(x).reshape(N, -1, C), channels_last(indices).reshape(N, P * Q, C),
                y.reshape(N, P * Q, C), work=4 * y.nbytes)
    return channels_first(y)


@inner
def _window(x, at, width, C, h0, h1, w0, w1, part, scale, past, y, o):
    """y[o …] = scale Σ part x over a window of rows h0 … h1 and columns w0 … w1: SPAN products in
    x's own dtype, everything beyond in float64."""
    L, few = lanes(x), (h1 - h0) * (w1 - w0) <= SPAN
    for c in range(0, C, L):
        m, acc = min(L, C - c), fill(x, 0)
        a, b = splat(np.float64(0)), splat(np.float64(0))
        if few:
            for h in range(h0, h1):
                for k in range(h * width + w0, h * width + w1):
                    acc = fma(load_part(x, at + k * C + c, m), fill(x, part[k]), acc)
            put_part(y, o + c, acc * fill(x, scale), m, past)
            continue
        for h in range(h0, h1):
            for w in range(w0, w1, SPAN):
                acc = fill(x, 0)
                for k in range(h * width + w, h * width + min(w1, w + SPAN)):
                    acc = fma(load_part(x, at + k * C + c, m), fill(x, part[k]), acc)
                a, b = a + low(acc), b + high(acc)
        put_part(y, o + c, narrow(a * scale, b * scale, y), m, past)


@inner
def _scaled(x, i, C, scale, past, y, o):
    """_window of one element."""
    for c in range(0, C, lanes(x)):
        m = min(lanes(x), C - c)
        put_part(y, o + c, load_part(x, i + c, m) * fill(x, scale), m, past)


@inner
def _windows_task(row, x, part, rows, columns, scale, past, y):
    (P, Q, C), (H, W) = y.shape[1:], part.shape
    n, p = row // P, row % P
    far, at, parts = _apart(x, W * C) and p + 1 < P, n * H * W * C, pointer(part)
    r, c, values, out = pointer(rows), pointer(columns), pointer(x), pointer(y)
    h, end = r[p], r[P + p]
    for q in range(Q):
        w, last, o = c[q], c[Q + q], (row * Q + q) * C
        if far:
            _ask(values, at, C, W, max(end, r[p + 1]), r[P + p + 1], w,
                 c[q + 1] if q + 1 < Q else last)
        if end - h == 1 and last - w == 1:                     # windows that do not overlap
            _scaled(values, at + (h * W + w) * C, C, parts[h * W + w] * scale[p, q], past, out, o)
        else:
            _window(values, at, W, C, h, end, w, last, parts, scale[p, q], past, out, o)


@tasks
def _windows(run, x, part, rows, columns, scale, past, y):
    """y[n, p, q] = scale[p, q] Σ (part x)[n, rows of p, columns of q]; x, y (N, H, W, C)."""
    share(_windows_task, y.shape[0] * y.shape[1], run, (x, part, rows, columns, scale, past, y))


def _sums(x, plan):
    """Sums over a plan's windows of x (N, H, W, C)."""
    part, rows, columns, scale = plan
    y = empty((x.shape[0], *scale.shape, x.shape[3]), x.dtype)
    if y.size:
        past = y.nbytes > PAST_BYTES and y.shape[3] * y.itemsize % VECTOR == 0
        _windows(x, part, rows, columns, scale, past, y, work=x.nbytes + y.nbytes)
    return y


def _holders(first, last, size):
    """The windows [first, last) that hold input position i. Windows move on with their number."""
    i = np.arange(size)
    return np.searchsorted(last, i, side="right"), np.searchsorted(first, i, side="right")


def _shares(rows, columns, override=None):
    """(P, Q): the share of an element in each window's mean."""
    count = np.maximum(np.multiply.outer(rows[2], columns[2]), 1)
    return 1 / np.asarray(count if override is None else np.full(count.shape, override), np.float64)


def _means(dtype, size, rows, columns, override=None):
    """What _windows reads: shares, rows, columns, scale."""
    return (np.ones(size, dtype), np.stack(rows[:2]), np.stack(columns[:2]),
            _shares(rows, columns, override))


def _means_backward(dtype, size, rows, columns, override=None):
    holders = (np.stack(_holders(*r[:2], n)) for r, n in zip((rows, columns), size))
    return _shares(rows, columns, override).astype(dtype), *holders, np.ones(size)


def _ranges(size, kernel_size, stride, padding, ceil_mode, count_include_pad):
    return [window_ranges(*a, ceil_mode, count_include_pad)
            for a in zip(size, kernel_size, stride, padding)]


@_once
def _pools(backward, dtype, size, override, *how):
    """The plan of avg_pool2d, or of its backward."""
    return (_means_backward if backward else _means)(dtype, size, *_ranges(size, *how),
                                                     override)


@_once
def _adaptive(backward, dtype, size, out):
    ranges = (adaptive_ranges(*a) for a in zip(size, out))
    return (_means_backward if backward else _means)(dtype, size, *ranges)


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    """y = Σ over the window / (its size, or divisor_override)."""
    plan = _pools(False, x.dtype, x.shape[2:], divisor_override, kernel_size, stride, padding,
                  ceil_mode, count_include_pad)
    return channels_first(_sums(channels_last(x), plan))


def avg_pool2d_backward(dy, *, input_size, kernel_size, stride, padding, ceil_mode,
                        count_include_pad, divisor_override):
    """dx = Σ over the windows that hold the pixel of dy / divisor."""
    plan = _pools(True, dy.dtype, tuple(input_size[2:]), divisor_override, kernel_size, stride,
                  padding, ceil_mode, count_include_pad)
    return channels_first(_sums(channels_last(dy), plan))


def adaptive_avg_pool2d(x, *, output_size):
    """y[p, q] = mean of rows [⌊pH/P⌋, ⌈(p+1)H/P⌉) and columns likewise."""
    if tuple(output_size) == (1, 1) and x.size:
        y = sum(x, axes=(2, 3), keepdims=True)
        return y / x.dtype.type(x.shape[2] * x.shape[3])
    plan = _adaptive(False, x.dtype, x.shape[2:], tuple(output_size))
    return channels_first(_sums(channels_last(x), plan))


def adaptive_avg_pool2d_backward(dy, *, input_size):
    """dx = Σ over the windows that hold the pixel of dy / window size."""
    plan = _adaptive(True, dy.dtype, tuple(input_size[2:]), dy.shape[2:])
    return channels_first(_sums(channels_last(dy), plan))
