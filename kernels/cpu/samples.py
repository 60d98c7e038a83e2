"""Statistics of each sample's channels, or of all samples' channels by weight, and what is computed
from a value and the constants of its channel: normalization with an activation or a mask inside it.

x is (N, C, *S) in either memory format and is read in its order, in tasks of some positions of a
sample and all channels. Arithmetic is float64, in pairs of vectors, rounded once: no
square of a float32 leaves that range, and what is constant in a channel may have any size.
"""

import math

import numpy as np

from .channel_formulas import CONSTANTS, FORMULAS
from .columns import inlined, inner
from .jit import kernel
from .memory import empty_like
from .norm import _dense, _flat, _flat_as
from .simd import (
    VECTOR,
    fill,
    greater,
    high,
    lanes,
    load_part,
    low,
    narrow,
    pointer,
    store_part,
    total,
    where,
)
from .tasks import share, tasks

__all__ = ["sample_map", "sample_map_backward", "sample_moments", "sample_sums"]

L = VECTOR // 8            # numbers of a vector
TASK_BYTES = 1 << 16       # of a task: it reads them twice
PIECE = 1 << 12            # positions of a task at most, of one channel 16 KB
NONE, ONES = np.empty(0), np.ones(L)


# A task is a piece of a sample, positions ``first`` … ``last``. ``at`` is where its channel begins
# in memory, ``i`` the sample's place among the weights w, which are one where there are none.

@inlined
def _pair(p, i, n):
    """n values of any dtype, as two vectors of float64: of float64, one and zeros."""
    v = load_part(p, i, n)
    return low(v), high(v)


@inlined
def _weights(w, i, n):
    """Of n positions; 0 behind them."""
    if w.size:
        return load_part(pointer(w), i, n), load_part(pointer(w), i + L, n - L)
    return load_part(pointer(ONES), 0, n), load_part(pointer(ONES), 0, n - L)


@inlined
def _deviations(p, i, n, middle, rest, here, there, zero):
    """Two vectors less their middles, 0 where the weight is."""
    a, b = _pair(p, i, n)
    return (where(greater(here, zero), a - middle, zero),
            where(greater(there, zero), b - rest, zero))


@inner
def _piece(t, N, S, pieces):
    """Sample, first and last position of task t."""
    length = -(-S // pieces)
    n, first = t // pieces, t % pieces * length
    return n, first, min(S, first + length)


@inner
def _present(w, i, first, last):
    """The first position that is there, and the sum of the weights."""
    if not w.size:
        return first, np.float64(last - first)
    count, begin = 0.0, last
    for j in range(last - 1, first - 1, -1):
        if w[i + j] > 0.0:
            count, begin = count + w[i + j], j
    return begin, count


@inner
def _plane(x, w, at, i, first, last, begin, count):
    """Mean and M2 of one channel of a piece, from one of its values: of equal ones exactly that."""
    p, P, v = pointer(x), lanes(x), np.float64(x[at + begin])
    mean, m2 = v if abs(v) < math.inf else 0.0, 0.0
    zero, one = fill(pointer(ONES), 0.0), fill(pointer(ONES), 1.0)
    here, there, n = one, one if P > L else zero, (last - first) % P
    for _ in range(2):
        middle, s, q, r, t = fill(pointer(ONES), mean), zero, zero, zero, zero
        for j in range(first, last - n, P):
            if w.size:
                here, there = _weights(w, i + j, P)
            a, b = _deviations(p, at + j, P, middle, middle, here, there, zero)
            s, q, r, t = s + here * a, q + here * a * a, r + there * b, t + there * b * b
        if n:
            own, rest = _weights(w, i + last - n, n)
            a, b = _deviations(p, at + last - n, n, middle, middle, own, rest, zero)
            s, q, r, t = s + own * a, q + own * a * a, r + rest * b, t + rest * b * b
        d = total(s + r) / count
        mean, m2 = mean + d, total(q + t) - d * d * count
    return mean, m2


@inner
def _pixels(x, w, at, i, C, n, first, last, begin, count, mean, m2, b):
    """The same of n channels of a piece of pixels, to mean[b] and m2[b] on."""
    p, zero, inverse = pointer(x), fill(pointer(ONES), 0.0), fill(pointer(ONES), 1.0 / count)
    u, v = _pair(p, at + begin * C, n)
    u, v, q, t = where(u - u != zero, zero, u), where(v - v != zero, zero, v), zero, zero
    for _ in range(2):
        s, q, r, t = zero, zero, zero, zero
        for j in range(first, last):
            here = fill(pointer(ONES), w[i + j] if w.size else 1.0)
            if w.size and not w[i + j] > 0.0:
                continue
            a, d = _pair(p, at + j * C, n)
            a, d = a - u, d - v
            e, f = a * here, d * here
            s, q, r, t = s + e, q + e * a, r + f, t + f * d
        e, f = s * inverse, r * inverse
        u, v, q, t = u + e, v + f, q - e * s, t - f * r
    store_part(pointer(mean), b, u, n)
    store_part(pointer(m2), b, q, n)
    store_part(pointer(mean), b + L, v, n - L)
    store_part(pointer(m2), b + L, t, n - L)


@inner
def _moments_task(t, x, w, last_axis, N, C, S, pieces, counts, mean, m2):
    n, first, last = _piece(t, N, S, pieces)
    begin, count = _present(w, n * S, first, last)
    counts[t] = count
    if not count > 0.0:
        return
    if last_axis:
        P = lanes(x)
        for c in range(0, C, P):
            _pixels(x, w, n * S * C + c, n * S, C, min(P, C - c), first, last, begin, count, mean,
                    m2, t * C + c)
        return
    for c in range(C):
        mean[t * C + c], m2[t * C + c] = _plane(x, w, (n * C + c) * S, n * S, first, last, begin,
                                                count)


@tasks
def _moments(run, x, w, last_axis, N, C, S, pieces, counts, mean, m2):
    """Weights, means and M2 of each piece's channels."""
    share(_moments_task, N * pieces, run, (x, w, last_axis, N, C, S, pieces, counts, mean, m2))


@kernel
def _merge(counts, means, m2s, count, mean, m2):
    """Of (rows, pieces, C), the moments of each row and channel, pieces in order."""
    for r in range(count.shape[0]):
        for b in range(counts.shape[1]):
            n = counts[r, b]
            if not n > 0.0:
                continue
            before = count[r, 0]
            w = n / (before + n)
            for c in range(mean.shape[1]):
                d = means[r, b, c] - mean[r, c] if before > 0.0 else 0.0
                mean[r, c] = mean[r, c] + d * w if before > 0.0 else means[r, b, c]
                m2[r, c] += m2s[r, b, c] + d * d * w * before
                count[r, c] = before + n


@inlined
def _every(k, rows, r, C, c):
    """The constants of one channel, each in a whole vector."""
    p, step, at = pointer(k), rows * C, r * C + c
    return (fill(p, k[at]), fill(p, k[at + step]), fill(p, k[at + 2 * step]),
            fill(p, k[at + 3 * step]), fill(p, k[at + 4 * step]))


@inlined
def _each(k, rows, r, C, c, n):
    """The constants of n channels; of none if n is negative."""
    p, step, at = pointer(k), rows * C, r * C + c
    return (load_part(p, at, n), load_part(p, at + step, n), load_part(p, at + 2 * step, n),
            load_part(p, at + 3 * step, n), load_part(p, at + 4 * step, n))


def _map(name):
    """The kernel for y, and for dx: ``(slope + w (p + q (x − mean)))``, 0 where nothing is."""
    prepare, value, _, slope = FORMULAS[name]

    @inlined
    def half(v, g, e, k, b, here, back, one, zero):
        if back:
            v = slope(v, g, e, k, one) + here * (b[0] + b[1] * (v - b[2]))
        else:
            v = value(v, e, k, one)
        return where(greater(here, zero), v, zero)

    @inlined
    def vector(x, dy, y, at, n, k, l, b, d, here, there, back, one, zero):
        u, v = _pair(x, at, n)
        e, f = prepare(u, v, k, l, x)
        g, h = _pair(dy, at, n)
        u = half(u, g, e, k, b, here, back, one, zero)
        if lanes(x) > L:
            v = half(v, h, f, l, d, there, back, one, zero)
        store_part(y, at, narrow(u, v, y), n)

    @inner
    def task(t, x, dy, w, last_axis, N, C, S, pieces, rows, table, slopes, back, y):
        n, first, last = _piece(t, N, S, pieces)
        r, i, P = min(n, rows - 1), n * S, lanes(x)
        px, pd, py = pointer(x), pointer(dy), pointer(y)
        zero, one = fill(pointer(ONES), 0.0), fill(pointer(ONES), 1.0)
        for c in range(0, C, P if last_axis else 1):
            if last_axis:
                m, at = min(P, C - c), i * C + c
                k, l = _each(table, rows, r, C, c, m), _each(table, rows, r, C, c + L, m - L)
                b, d = _each(slopes, rows, r, C, c, m), _each(slopes, rows, r, C, c + L, m - L)
                for j in range(first, last):
                    here = fill(pointer(ONES), w[i + j]) if w.size else one
                    vector(px, pd, py, at + j * C, m, k, l, b, d, here, here, back, one, zero)
            else:
                at, k, m = (n * C + c) * S, _every(table, rows, r, C, c), (last - first) % P
                b, full, here, there = _every(slopes, rows, r, C, c), last - m, one, one
                for j in range(first, full, P):
                    if w.size:
                        here, there = _weights(w, i + j, P)
                    vector(px, pd, py, at + j, P, k, k, b, b, here, there, back, one, zero)
                if m:
                    here, there = _weights(w, i + full, m)
                    vector(px, pd, py, at + full, m, k, k, b, b, here, there, back, one, zero)

    def loop(run, x, dy, w, last_axis, N, C, S, pieces, rows, table, slopes, back, y):
        share(task, N * pieces, run, (x, dy, w, last_axis, N, C, S, pieces, rows, table, slopes,
                                      back, y))
    return tasks(loop, name)


def _sums(name):
    """The kernel for the gradients of the constants, of each piece: (5, pieces, C)."""
    prepare, _, add, _ = FORMULAS[name]

    @inlined
    def half(v, g, e, k, here, s, one, zero):
        there, a = greater(here, zero), add(v, g, e, k, zero, one)
        return (s[0] + where(there, a[0], zero), s[1] + where(there, a[1], zero),
                s[2] + where(there, a[2], zero), s[3] + where(there, a[3], zero),
                s[4] + where(there, a[4], zero))

    @inlined
    def vector(x, dy, at, n, k, l, here, there, s, z, one, zero):
        u, v = _pair(x, at, n)
        e, f = prepare(u, v, k, l, x)
        g, h = _pair(dy, at, n)
        s = half(u, g, e, k, here, s, one, zero)
        if lanes(x) > L:
            z = half(v, h, f, l, there, z, one, zero)
        return s, z

    @inlined
    def put(out, b, step, s, n):
        store_part(out, b, s[0], n)
        store_part(out, b + step, s[1], n)
        store_part(out, b + 2 * step, s[2], n)
        store_part(out, b + 3 * step, s[3], n)
        store_part(out, b + 4 * step, s[4], n)

    @inner
    def task(t, x, dy, w, last_axis, N, C, S, pieces, rows, table, out):
        n, first, last = _piece(t, N, S, pieces)
        r, i, P, step = min(n, rows - 1), n * S, lanes(x), N * pieces * C
        px, pd, po = pointer(x), pointer(dy), pointer(out)
        zero, one = fill(pointer(ONES), 0.0), fill(pointer(ONES), 1.0)
        for c in range(0, C, P if last_axis else 1):
            s, b = (zero, zero, zero, zero, zero), t * C + c
            z = s
            if last_axis:
                m, at = min(P, C - c), i * C + c
                k, l = _each(table, rows, r, C, c, m), _each(table, rows, r, C, c + L, m - L)
                for j in range(first, last):
                    here = fill(pointer(ONES), w[i + j]) if w.size else one
                    s, z = vector(px, pd, at + j * C, m, k, l, here, here, s, z, one, zero)
                put(po, b, step, s, m)
                put(po, b + L, step, z, m - L)
            else:
                at, k, m = (n * C + c) * S, _every(table, rows, r, C, c), (last - first) % P
                full, here, there = last - m, one, one
                for j in range(first, full, P):
                    if w.size:
                        here, there = _weights(w, i + j, P)
                    s, z = vector(px, pd, at + j, P, k, k, here, there, s, z, one, zero)
                if m:
                    here, there = _weights(w, i + full, m)
                    s, z = vector(px, pd, at + full, m, k, k, here, there, s, z, one, zero)
                put(po, b, step, (fill(po, total(s[0] + z[0])), fill(po, total(s[1] + z[1])),
                                  fill(po, total(s[2] + z[2])), fill(po, total(s[3] + z[3])),
                                  fill(po, total(s[4] + z[4]))), 1)

    def loop(run, x, dy, w, last_axis, N, C, S, pieces, rows, table, out):
        share(task, N * pieces, run, (x, dy, w, last_axis, N, C, S, pieces, rows, table, out))
    return tasks(loop, name)


_MAPS, _SUMS = ({name: make(name) for name in FORMULAS} for make in (_map, _sums))


def _cut(x, together):
    """x dense and flat, whether channels are its last axis, N, C and S (of all samples
    ``together``, if they lie so), and how many pieces S is cut into."""
    x, (axes, *_) = _dense(x)
    N, C = x.shape[:2]
    S = x.size // (N * C)
    last_axis = axes is not None or S == 1
    if together and last_axis:
        N, S = 1, N * S
    P = VECTOR // x.itemsize
    length = max(P, min(PIECE, TASK_BYTES // (C * x.itemsize), -(-N * S // 16)))
    if not last_axis:
        length = -(-length // P) * P
    return x, axes, (last_axis, N, C, S, -(-S // length))


def _given(w):
    return NONE if w is None else np.ascontiguousarray(w, np.float64).reshape(-1)


def sample_moments(x, w=None, *, together=False):
    """Σw, the mean by weight (0 of nothing) and M2 of each sample's channels, float64 (N, C); of
    all samples ``together``, (1, C). w: weights (N, 1, *S); what has weight 0 is not looked at."""
    N, C = x.shape[:2]
    found = np.zeros((3, 1 if together else N, C))
    if not x.size:
        return tuple(found)
    dense, axes, how = _cut(x, together)
    parts = how[1] * how[4]
    counts, made = np.empty(parts), np.zeros((2, parts * C))
    _moments(_flat(dense, axes), _given(w), *how, counts, *made, work=x.nbytes)
    rows = len(found[0])
    _merge(counts.reshape(rows, -1), *made.reshape(2, rows, -1, C), *found)
    return tuple(found)


def _table(constants, rows, C):
    """Constants (rows or 1, C) as one array, the missing ones 0."""
    table = np.zeros((CONSTANTS, rows, C))
    for line, value in zip(table, constants):
        line[...] = value
    return table.reshape(-1)


def _rows(constants):
    return max(len(a) for a in constants)


def sample_map(name, x, constants, w=None):
    """y of x and its channel's constants, each float64 (N, C) or (1, C); 0 where w is. The
    formulas: channel_formulas.py."""
    return _run_map(name, x, x, constants, (), w)


def sample_map_backward(name, dy, x, constants, w, p, q, mean):
    """dx for constants that stay, and, weighted by w, p + q (x − mean) of the channel."""
    return _run_map(name, dy, x, constants, (p, q, mean), w)


def _run_map(name, dy, x, constants, slopes, w):
    y = empty_like(x)
    if not x.size:
        return y
    rows, C = _rows((*constants, *slopes)), x.shape[1]
    x, axes, how = _cut(x, rows == 1)
    y = empty_like(x)
    flat = _flat(x, axes)
    table = _table(constants, rows, C)
    _MAPS[name](flat, _flat_as(dy, x, axes) if slopes else flat, _given(w), *how, rows, table,
                _table(slopes, rows, C) if slopes else table, bool(slopes), _flat(y, axes),
                work=3 * x.nbytes)
    return y


def sample_sums(name, dy, x, constants, w=None):
    """The gradients of the constants, float64 (N, C), or (1, C) if all of them are."""
    rows, C = _rows(constants), x.shape[1]
    if not x.size:
        return tuple(np.zeros((len(constants), rows, C)))
    x, axes, how = _cut(x, rows == 1)
    out = np.empty((CONSTANTS, rows, how[1] * how[4] // rows, C))
    _SUMS[name](_flat(x, axes), _flat_as(dy, x, axes), _given(w), *how, rows,
                _table(constants, rows, C), out.reshape(-1), work=2 * x.nbytes)
    with np.errstate(all="ignore"):
        return tuple(out.sum(2)[:len(constants)])
