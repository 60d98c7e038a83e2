"""Depthwise convolution, channels-last: vectors of channels, eight pixels or nine taps at a time.

x (N, H, W, C), weight (taps, C), g the geometry (shapes.Conv). A task copies rows of a few vectors
of channels, with its padding, to planes of one vector each: there the pixels that a tap
reads for consecutive outputs are consecutive, whatever the stride, none lies outside, and none
shares its cache set with the rows above and below. The copy costs a load and a store for nine
multiply-adds that need no more than a load each.

The input gradient is a convolution too: for each phase of the stride, a sum over the taps that meet
it, of consecutive pixels of dy. So it is the same loop, over axes that say which pixel a tap reads.
"""

import math
from typing import NamedTuple

import numpy as np

from .jit import device, get_num_threads, kernel, prange
from .memory import empty
from .simd import VECTOR, fma, lanes, load, load_part, splat, store, store_part

__all__ = ["depthwise", "depthwise_input", "depthwise_weight", "spaces"]

VECTORS = 4                # of channels in a task
BAND_BYTES = 1 << 18       # of x copied by a task: a quarter of the second level of cache
TASKS = 16                 # at least, of a weight gradient


class _Axis(NamedTuple):
    """Output u · period + phase reads pixel u · step + start + m · apart of size by the kernel's
    tap first + m · by, for m = 0 … taps − 1."""

    size: int
    period: int
    phase: int
    step: int
    start: int
    apart: int
    taps: int
    first: int
    by: int


def _forward(size, k, stride, pad, dilation):
    return np.array([_Axis(size, 1, 0, stride, -pad, dilation, k, 0, 1)])


def _backward(size, k, stride, pad, dilation):
    """One axis per phase of the stride; size is dy's."""
    by, axes = stride // math.gcd(stride, dilation), []
    for phase in range(stride):
        met = [j for j in range(k) if (phase + pad - j * dilation) % stride == 0]
        first = met[0] if met else 0
        start = (phase + pad - first * dilation) // stride
        axes.append(_Axis(size, stride, phase, 1, start, -by * dilation // stride, len(met),
                          first, by))
    return np.array(axes)


@device
def _axis(axes, i):
    a = axes[i]
    return _Axis(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8])


@device
def _reach(axes, first, n):
    """The pixels that outputs first … first + n − 1 read: the lowest, and one past the highest."""
    low, high = 1 << 62, -(1 << 62)
    for u in range(first, first + n):
        a = _axis(axes, u % axes.shape[0])
        if a.taps:
            start = u // a.period * a.step + a.start
            end = start + (a.taps - 1) * a.apart
            low, high = min(low, start, end), max(high, start + 1, end + 1)
    return (low, high) if low < high else (0, 1)


@device
def _inside(w, step, size, n):
    """The range of u in 0 … n for which w + u · step is a pixel of the row."""
    first = min(max(0, -(w // step)), n)
    return first, max(first, min((size - 1 - w) // step + 1, n))


@device
def _copy(x, at, H, W, C, rows, columns, step, c, n, room):
    """An image's rows and columns (ranges; zero outside) of n channels, as planes (vector, row,
    column mod step, column div step)."""
    L, across = lanes(x), -(-(columns[1] - columns[0]) // step)
    plane, zero = (rows[1] - rows[0]) * step * across * L, splat(x.dtype.type(0))
    for line in range((rows[1] - rows[0]) * step):
        h, w = rows[0] + line // step, columns[0] + line % step
        first, last = _inside(w, step, W, across) if 0 <= h < H else (across, across)
        for v in range(0, n, L):
            to, k = v // L * plane + line * across * L, min(L, n - v)
            at_w = at + (h * W + w) * C + c + v
            for u in range(first):
                store(room, to + u * L, zero)
            if k == L:
                for u in range(first, last):
                    store(room, to + u * L, load(x, at_w + u * step * C))
            else:
                for u in range(first, last):
                    store(room, to + u * L, load_part(x, at_w + u * step * C, k))
            for u in range(last, across):
                store(room, to + u * L, zero)
    return plane, step * across * L, across * L


@device
def _taps(down, right, top, left, row, phase, J, L, offsets, taps):
    """Where each tap reads in a plane, for the first output of a row, and which it is."""
    step = right.step
    for i in range(down.taps):
        for j in range(right.taps):
            m, w = i * right.taps + j, left + j * right.apart
            offsets[m] = (top + i * down.apart) * row + w % step * phase + w // step * L
            taps[m] = ((down.first + i * down.by) * J + right.first + j * right.by) * L
    return down.taps * right.taps


@device
def _row(room, at, offsets, weight, wt, taps, m, shift, n, line, to):
    """n outputs of a row from m taps, rounded up to eights."""
    L = lanes(room)
    for u in range(at, at + n * L, 8 * L):
        a, b, c, d, e, f, g, h = shift, shift, shift, shift, shift, shift, shift, shift
        for k in range(m):
            w, i = load(weight, wt + taps[k]), u + offsets[k]
            a, b = fma(load(room, i), w, a), fma(load(room, i + L), w, b)
            c, d = fma(load(room, i + 2 * L), w, c), fma(load(room, i + 3 * L), w, d)
            e, f = fma(load(room, i + 4 * L), w, e), fma(load(room, i + 5 * L), w, f)
            g, h = fma(load(room, i + 6 * L), w, g), fma(load(room, i + 7 * L), w, h)
        store(line, to, a)
        store(line, to + L, b)
        store(line, to + 2 * L, c)
        store(line, to + 3 * L, d)
        store(line, to + 4 * L, e)
        store(line, to + 5 * L, f)
        store(line, to + 6 * L, g)
        store(line, to + 7 * L, h)
        to += 8 * L


@kernel
def _sums(x, weight, bias, J, downs, rights, band, spaces, y):
    """y (N, P, Q, C); a task is a band of rows of some channels of an image."""
    N, P, Q, C = y.shape
    H, W, L = x.shape[1], x.shape[2], lanes(x)
    K, bands, slices = weight.shape[0], -(-P // band), -(-C // (VECTORS * L))
    x, weight, y = x.reshape(-1), weight.reshape(-1), y.reshape(-1)
    columns, step = _reach(rights, 0, Q), _axis(rights, 0).step
    wide, workers = -(-Q // 8) * 8 * L, spaces.shape[0]
    for worker in prange(workers):
        space = spaces[worker]
        tap = space[:VECTORS * K * L]
        line = space[VECTORS * K * L:VECTORS * (K * L + wide)]
        room = space[VECTORS * (K * L + wide):]
        offsets = np.empty(K, np.intp)
        taps = np.empty(K, np.intp)
        tasks = N * bands * slices
        for t in range(tasks * worker // workers, tasks * (worker + 1) // workers):
            image, p0 = t // (bands * slices), t // slices % bands * band
            c = t % slices * VECTORS * L
            count, n = min(band, P - p0), min(VECTORS * L, C - c)
            rows = _reach(downs, p0, count)
            plane, row, phase = _copy(x, image * H * W * C, H, W, C, rows, columns, step, c, n,
                                      room)
            for k in range(K):
                for v in range(0, n, L):
                    store(tap, v * K + k * L, load_part(weight, k * C + c + v, min(L, n - v)))
            for p in range(p0, p0 + count):
                down = _axis(downs, p % downs.shape[0])
                top = p // down.period * down.step + down.start - rows[0]
                for r in range(min(rights.shape[0], Q)):
                    right = _axis(rights, r)
                    m = _taps(down, right, top, right.start - columns[0], row, phase, J, L,
                              offsets, taps)
                    width = (Q - 1 - r) // right.period + 1
                    for v in range(0, n, L):
                        _row(room, v // L * plane, offsets, tap, v * K, taps, m,
                             load_part(bias, c + v, min(L, n - v)), width, line, v // L * wide)
                    first, ld = ((image * P + p) * Q + r) * C + c, right.period * C
                    for v in range(0, n, L):
                        k = min(L, n - v)
                        for u in range(width):
                            store_part(y, first + v + u * ld, load(line, v // L * wide + u * L), k)


def spaces(values, dtype):
    """Memory for each thread to work in: allocated by the tasks, its pages would be new to each."""
    lanes = VECTOR // dtype.itemsize
    return empty((get_num_threads(), -(-values // lanes) * lanes), dtype)


def _band(width, apart, step):
    """Rows of output in a task, for rows of input of that width; more where windows overlap."""
    rows = BAND_BYTES // (VECTORS * VECTOR * width)
    return max(4, (rows - apart) // step)


def _run(x, weight, bias, g, downs, rights, band, high, wide, y, work):
    """The loop in bands of rows of y that read ``high`` rows, ``wide`` pixels each."""
    values = VECTORS * (high * wide + g.I * g.J + y.shape[2] + 8) + 8
    _sums(x, weight, bias, g.J, downs, rights, band,
          spaces(values * VECTOR // x.itemsize, x.dtype), y, work=work)


def depthwise(x, weight, bias, g, y, work=0):
    """y (N, P, Q, C)."""
    wide = g.Q * g.sw + (g.J - 1) * g.dw + 1
    band = min(g.P, _band(wide, g.dh * (g.I - 1), g.sh))
    _run(x, weight, bias, g, _forward(g.H, g.I, g.sh, g.ph, g.dh),
         _forward(g.W, g.J, g.sw, g.pw, g.dw), band, band * g.sh + (g.I - 1) * g.dh, wide, y,
         work)


def depthwise_input(dy, weight, g, dx, work=0):
    """dx (N, H, W, C)."""
    apart, wide = (g.I - 1) * g.dh // g.sh, (g.W + (g.J - 1) * g.dw) // g.sw + 1
    band = min(g.H, _band(wide, apart, 1) * g.sh)
    _run(dy, weight, np.zeros(g.C, dy.dtype), g, _backward(g.P, g.I, g.sh, g.ph, g.dh),
         _backward(g.Q, g.J, g.sw, g.pw, g.dw), band, (band + (g.I - 1) * g.dh) // g.sh + 1, wide,
         dx, work)


@device
def _nine(dy, dt, ldp, ldq, rows, Q, n, x, at, ldx, offsets, k, sums, to):
    """Σ dy x over rows of pixels for taps k … k + 8, added to sums."""
    L = lanes(x)
    last = offsets.size - 1
    zero = splat(x.dtype.type(0))
    a, b, c, d, e, f, g, h, i = zero, zero, zero, zero, zero, zero, zero, zero, zero
    oa, ob, oc = offsets[k], offsets[min(k + 1, last)], offsets[min(k + 2, last)]
    od, oe = offsets[min(k + 3, last)], offsets[min(k + 4, last)]
    of, og = offsets[min(k + 5, last)], offsets[min(k + 6, last)]
    oh, oi = offsets[min(k + 7, last)], offsets[min(k + 8, last)]
    for p in range(rows):
        for q in range(Q):
            u, s = load_part(dy, dt + p * ldp + q * ldq, n), at + p * ldx + q * L
            a, b = fma(load(x, s + oa), u, a), fma(load(x, s + ob), u, b)
            c, d = fma(load(x, s + oc), u, c), fma(load(x, s + od), u, d)
            e, f = fma(load(x, s + oe), u, e), fma(load(x, s + of), u, f)
            g, h = fma(load(x, s + og), u, g), fma(load(x, s + oh), u, h)
            i = fma(load(x, s + oi), u, i)
    here = np.empty(9 * L, x.dtype)
    store(here, 0, a)
    store(here, L, b)
    store(here, 2 * L, c)
    store(here, 3 * L, d)
    store(here, 4 * L, e)
    store(here, 5 * L, f)
    store(here, 6 * L, g)
    store(here, 7 * L, h)
    store(here, 8 * L, i)
    for m in range(min(9, offsets.size - k)):
        place = to + (k + m) * ldq
        store_part(sums, place, load_part(sums, place, n) + load(here, m * L), n)


@kernel
def _weight(dy, x, g, down, right, band, share, spaces, sums):
    """sums (parts, I·J, C); a task is some bands of rows of dy of some channels."""
    C, L, K, bands = g.C, lanes(x), g.I * g.J, -(-g.P // band)
    parts, slices = sums.shape[0], -(-g.C // (VECTORS * L))
    dy, x, sums = dy.reshape(-1), x.reshape(-1), sums.reshape(-1)
    columns, workers = _reach(right, 0, g.Q), spaces.shape[0]
    for worker in prange(workers):
        room, tasks = spaces[worker], parts * slices
        offsets = np.empty(K, np.intp)
        taps = np.empty(K, np.intp)
        for t in range(tasks * worker // workers, tasks * (worker + 1) // workers):
            b, c = t // slices, t % slices * VECTORS * L
            n = min(VECTORS * L, C - c)
            for k in range(K):
                for v in range(0, n, L):
                    store_part(sums, (b * K + k) * C + c + v, splat(x.dtype.type(0)),
                               min(L, n - v))
            for s in range(b * share, min((b + 1) * share, g.N * bands)):
                image, p0 = s // bands, s % bands * band
                count = min(band, g.P - p0)
                rows = _reach(down, p0, count)
                plane, row, phase = _copy(x, image * g.H * g.W * C, g.H, g.W, C, rows, columns,
                                          g.sw, c, n, room)
                _taps(_axis(down, 0), _axis(right, 0), 0, 0, row, phase, g.J, L, offsets, taps)
                for v in range(0, n, L):
                    for k in range(0, K, 9):
                        _nine(dy, ((image * g.P + p0) * g.Q) * C + c + v, g.Q * C, C, count, g.Q,
                              min(L, n - v), room, v // L * plane, g.sh * row, offsets, k, sums,
                              b * K * C + c + v)


def depthwise_weight(dy, x, g):
    """dw (C, I·J) from dy (N, P, Q, C) and x (N, H, W, C)."""
    wide = g.Q * g.sw + (g.J - 1) * g.dw + 1
    band = min(g.P, _band(wide, g.dh * (g.I - 1), g.sh))
    units, slices = g.N * -(-g.P // band), -(-g.C * x.itemsize // (VECTORS * VECTOR))
    share = -(-units // min(units, -(-TASKS // slices)))
    sums = empty((-(-units // share), g.I * g.J, g.C), x.dtype)
    high = band * g.sh + (g.I - 1) * g.dh
    room = spaces(VECTORS * VECTOR // x.itemsize * high * wide, x.dtype)
    _weight(dy, x, g, _forward(g.H, g.I, g.sh, g.ph, g.dh), _forward(g.W, g.J, g.sw, g.pw, g.dw),
            band, share, room, sums, work=x.nbytes + dy.nbytes)
    return np.ascontiguousarray(sums.sum(0).T)
