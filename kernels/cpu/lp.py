"""Powers of deviations: r = sign(d) |d|^(p−1) of d = (x − pivot) / unit, their sums and what they
add to a gradient. For p = inf, r is sign(d) where |d| is the largest of its channel, else 0.

x is (N, C, *S), a task so many positions of a sample, or of all with channels last, and all
channels. Arithmetic is float64, in pairs of vectors, rounded once: with a unit near σ, no power of
a value leaves that range.
"""

import math

import numpy as np

from .columns import inlined, inner
from .memory import empty_like
from .norm import _dense, _flat, _flat_as
from .samples import NONE, L, _pair, _weights
from .simd import (
    VECTOR,
    absolute,
    fill,
    greater,
    lanes,
    largest,
    load_part,
    maximum,
    narrow,
    pointer,
    store_part,
    total,
    where,
)
from .tasks import share, tasks

__all__ = ["power_map", "power_sums"]

TASK_BYTES = 1 << 17       # of x that a task reads
LARGEST = 0                # as a power: p = inf
SUMS, CONSTANTS = 3, 6     # of a channel


@inlined
def _power(d, size, p, one):
    """sign(d) |d|^(p−1); of LARGEST, sign(d): d itself where it is 0 or NaN."""
    if p <= 1:
        return where(greater(size, one - one), where(greater(d, -d), one, -one), d)
    r = d
    for _ in range(p - 2):
        r = r * size
    return r


@inlined
def _add(v, here, k, p, s, zero, one):
    """A vector's values, those that are ``here``, added to the sums. Others are 0 and have any
    distance from the pivot: no finite power of it, perhaps."""
    d = where(greater(here, zero), (v - k[0]) * k[1], zero)
    size = absolute(d)
    r = _power(d, size, p, one)
    if p == LARGEST:
        above, below = greater(size, s[0]), greater(s[0], size)
        n = where(greater(size, zero), one, zero)
        return (maximum(size, s[0]), where(above, r, where(below, s[1], s[1] + r)),
                where(above, n, where(below, s[2], s[2] + n)))
    return s[0] + r * d, s[1] + r, s[2]


@inlined
def _both(x, at, n, k, l, p, s, z, zero, one):
    """The same of the n values from ``at`` on, as two vectors of float64."""
    a, b = _pair(x, at, n)
    here, there = _weights(NONE, 0, n)
    s = _add(a, here, k, p, s, zero, one)
    if lanes(x) > L:
        z = _add(b, there, l, p, z, zero, one)
    return s, z


@inner
def _together(out, b, step, p, s, z):
    """Sums of one channel from those of the lanes of two vectors."""
    o = pointer(out)
    if p == LARGEST:
        top, zero = largest(maximum(s[0], z[0])), fill(o, 0.0)
        t = fill(o, top)
        out[b] = top
        out[b + step] = total(where(greater(t, s[0]), zero, s[1])
                              + where(greater(t, z[0]), zero, z[1]))
        out[b + 2 * step] = total(where(greater(t, s[0]), zero, s[2])
                                  + where(greater(t, z[0]), zero, z[2]))
        return
    out[b], out[b + step] = total(s[0] + z[0]), total(s[1] + z[1])


@inlined
def _apart(out, b, step, s, n):
    """Sums of n channels."""
    o = pointer(out)
    store_part(o, b, s[0], n)
    store_part(o, b + step, s[1], n)
    store_part(o, b + 2 * step, s[2], n)


@inlined
def _row(table, C, c, n):
    """The constants of n channels; of none if n is negative."""
    t = pointer(table)
    return (load_part(t, c, n), load_part(t, c + C, n), load_part(t, c + 2 * C, n),
            load_part(t, c + 3 * C, n), load_part(t, c + 4 * C, n), load_part(t, c + 5 * C, n))


@inlined
def _one(table, C, c):
    """The constants of one channel, in whole vectors."""
    t = pointer(table)
    return (fill(t, table[c]), fill(t, table[c + C]), fill(t, table[c + 2 * C]),
            fill(t, table[c + 3 * C]), fill(t, table[c + 4 * C]), fill(t, table[c + 5 * C]))


@inner
def _sums_task(t, x, last_axis, C, S, pieces, length, p, table, out):
    n, first = t // pieces, t % pieces * length
    last, P, a, b = min(S, first + length), lanes(x), pointer(x), t * SUMS * C
    zero, one = fill(pointer(table), 0.0), fill(pointer(table), 1.0)
    for c in range(0, C, P if last_axis else 1):
        s, z = (zero, zero, zero), (zero, zero, zero)
        if last_axis:
            m = min(P, C - c)
            k, l = _row(table, C, c, m), _row(table, C, c + L, m - L)
            for j in range(first, last):
                s, z = _both(a, (n * S + j) * C + c, m, k, l, p, s, z, zero, one)
            _apart(out, b + c, C, s, m)
            _apart(out, b + c + L, C, z, m - L)
            continue
        at, k = (n * C + c) * S, _one(table, C, c)
        full = last - (last - first) % P
        for j in range(first, full, P):
            s, z = _both(a, at + j, P, k, k, p, s, z, zero, one)
        if full < last:
            s, z = _both(a, at + full, last - full, k, k, p, s, z, zero, one)
        _together(out, b + c, C, p, s, z)


@tasks
def _sums(run, count, x, last_axis, C, S, pieces, length, p, table, out):
    """Each task's sums, (tasks, 3, C)."""
    share(_sums_task, count, run, (x, last_axis, C, S, pieces, length, p, table, out))


@inlined
def _slope(v, g, k, p, zero, one):
    d = (v - k[0]) * k[1]
    size = absolute(d)
    r = _power(d, size, p, one)
    if p == LARGEST:
        r = where(size != k[5], zero, r)
    return g * k[2] + (k[3] + k[4] * r)


@inlined
def _map_both(x, dy, y, at, n, k, l, p, zero, one):
    a, b = _pair(x, at, n)
    g, h = _pair(dy, at, n)
    u, v = _slope(a, g, k, p, zero, one), zero
    if lanes(x) > L:
        v = _slope(b, h, l, p, zero, one)
    store_part(y, at, narrow(u, v, y), n)


@inner
def _map_task(t, x, dy, last_axis, C, S, pieces, length, p, table, y):
    n, first = t // pieces, t % pieces * length
    last, P, a, b, o = min(S, first + length), lanes(x), pointer(x), pointer(dy), pointer(y)
    zero, one = fill(pointer(table), 0.0), fill(pointer(table), 1.0)
    for c in range(0, C, P if last_axis else 1):
        if last_axis:
            m = min(P, C - c)
            k, l = _row(table, C, c, m), _row(table, C, c + L, m - L)
            for j in range(first, last):
                _map_both(a, b, o, (n * S + j) * C + c, m, k, l, p, zero, one)
            continue
        at, k = (n * C + c) * S, _one(table, C, c)
        full = last - (last - first) % P
        for j in range(first, full, P):
            _map_both(a, b, o, at + j, P, k, k, p, zero, one)
        if full < last:
            _map_both(a, b, o, at + full, last - full, k, k, p, zero, one)


@tasks
def _map(run, count, x, dy, last_axis, C, S, pieces, length, p, table, y):
    share(_map_task, count, run, (x, dy, last_axis, C, S, pieces, length, p, table, y))


def _cut(x):
    """x dense, its axes, how many tasks, and whether channels are its last axis, C, S, how many
    pieces S is cut into, and their length."""
    x, (axes, *_) = _dense(x)
    N, C = x.shape[:2]
    S = x.size // (N * C)
    last_axis = axes is not None or S == 1
    if last_axis:
        N, S = 1, N * S
    P = VECTOR // x.itemsize
    length = min(S, -(-max(1, TASK_BYTES // (C * x.itemsize)) // P) * P)
    pieces = -(-S // length)
    return x, axes, N * pieces, (last_axis, C, S, pieces, length)


def _table(C, *constants):
    """Pivot, 1 / unit and others as lines of C."""
    table = np.zeros((CONSTANTS, C))
    with np.errstate(all="ignore"):
        table[0], table[1] = constants[0], 1 / np.asarray(constants[1])
    for line, value in zip(table[2:], constants[2:]):
        line[...] = value
    return table.reshape(-1)


def _number(p):
    return LARGEST if p == math.inf else int(p)


def power_sums(x, pivot, unit, *, p):
    """Σ |d|^p and Σ r of each channel; for p = inf, the largest |d| (0 of nothing), Σ r, and how
    many r are not 0. A NaN makes its channel's first one NaN."""
    C, kept = x.shape[1], 3 if p == math.inf else 2
    if not x.size:
        return tuple(np.zeros((kept, C)))
    x, axes, count, how = _cut(x)
    out = np.empty((count, SUMS, C))
    _sums(count, _flat(x, axes), *how, _number(p), _table(C, pivot, unit), out.reshape(-1),
          work=x.nbytes)
    with np.errstate(all="ignore"):
        if p == math.inf:
            top = out[:, 0].max(0)
            return top, *(np.where(out[:, 0] == top, out[:, i], 0.0).sum(0) for i in (1, 2))
        return tuple(out[:, :kept].sum(0))


def power_map(dy, x, pivot, unit, scale, shift, slope, top, *, p):
    """dx = scale dy + shift + slope r, in x's dtype; top: the largest |d|, for p = inf."""
    if not x.size:
        return empty_like(x)
    x, axes, count, how = _cut(x)
    y = empty_like(x)
    _map(count, _flat(x, axes), _flat_as(dy, x, axes), *how, _number(p),
         _table(x.shape[1], pivot, unit, scale, shift, slope, top), _flat(y, axes),
         work=3 * x.nbytes)
    return y
