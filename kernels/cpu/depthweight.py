"""The weight gradient of depthwise convolution: a vector of channels, nine taps at a time.

A task copies rows of a few vectors of channels of x, with its padding, to planes of one vector
each: there the pixels that a tap meets for consecutive pixels of dy are consecutive, whatever the
stride, none lies outside, and none shares its cache set with the rows above and below.
"""

import numpy as np

from .jit import device, get_num_threads, kernel, prange
from .memory import empty
from .simd import VECTOR, fma, lanes, load, load_part, splat, store, store_part

__all__ = ["depthwise_weight", "spaces"]

VECTORS = 4                # of channels in a task
BAND_BYTES = 1 << 18       # of x copied by a task: a quarter of the second level of cache
TASKS = 16                 # at least


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
def _weight(dy, x, g, band, share, spaces, sums):
    """sums (parts, I·J, C); a task is some bands of rows of dy of some channels."""
    C, L, K, bands = g.C, lanes(x), g.I * g.J, -(-g.P // band)
    parts, slices = sums.shape[0], -(-g.C // (VECTORS * L))
    dy, x, sums = dy.reshape(-1), x.reshape(-1), sums.reshape(-1)
    columns = -g.pw, (g.Q - 1) * g.sw - g.pw + (g.J - 1) * g.dw + 1
    workers = spaces.shape[0]
    for worker in prange(workers):
        room, tasks = spaces[worker], parts * slices
        offsets = np.empty(K, np.intp)
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
                top = p0 * g.sh - g.ph
                rows = top, top + (count - 1) * g.sh + (g.I - 1) * g.dh + 1
                plane, row, phase = _copy(x, image * g.H * g.W * C, g.H, g.W, C, rows, columns,
                                          g.sw, c, n, room)
                for k in range(K):
                    j = k % g.J * g.dw
                    offsets[k] = k // g.J * g.dh * row + j % g.sw * phase + j // g.sw * L
                for v in range(0, n, L):
                    for k in range(0, K, 9):
                        _nine(dy, ((image * g.P + p0) * g.Q) * C + c + v, g.Q * C, C, count, g.Q,
                              min(L, n - v), room, v // L * plane, g.sh * row, offsets, k, sums,
                              b * K * C + c + v)


def spaces(values, dtype):
    """Memory for each thread to work in: allocated by the tasks, its pages would be new to each."""
    lanes = VECTOR // dtype.itemsize
    return empty((get_num_threads(), -(-values // lanes) * lanes), dtype)


def depthwise_weight(dy, x, g):
    """dw (C, I·J) from dy (N, P, Q, C) and x (N, H, W, C)."""
    wide, high = g.Q * g.sw + (g.J - 1) * g.dw + 1, g.dh * (g.I - 1)
    # where windows overlap much, rows enough that most are not copied twice
    band = min(g.P, max(4, (BAND_BYTES // (VECTORS * VECTOR * wide) - high) // g.sh))
    units, slices = g.N * -(-g.P // band), -(-g.C * x.itemsize // (VECTORS * VECTOR))
    share = -(-units // min(units, -(-TASKS // slices)))
    sums = empty((-(-units // share), g.I * g.J, g.C), x.dtype)
    room = spaces(VECTORS * VECTOR // x.itemsize * (band * g.sh + high) * wide, x.dtype)
    _weight(dy, x, g, band, share, room, sums, work=x.nbytes + dy.nbytes)
    return np.ascontiguousarray(sums.sum(0).T)
