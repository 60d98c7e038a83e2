"""Statistics of a block of batch normalization, and sums of its backward pass, chunk by chunk.

Sums are taken in the array's dtype over chunks in which one accumulator takes at most 128 values,
about a pivot close to the chunk's mean; chunks are merged in float64 in index order by Chan's
formula (Chan, Golub & LeVeque 1979): for rows × channels column by column in vectors, since number
by number it takes as long as to read the chunk from memory. The pivot is the mean so far. Where it
lies more than 2 standard deviations from the chunk's mean, cancellation would cost digits: the
chunk is read again about its own mean.
"""

import math

import numpy as np

from .columns import HI, add_products, add_squares, inner, pitch, planes, run
from .norm_plan import values
from .simd import (
    VECTOR,
    absolute,
    fill,
    greater,
    high,
    keep,
    lanes,
    load,
    load_part,
    low,
    narrow,
    pointer,
    splat,
    store,
    store_part,
    total,
    where,
)

__all__ = ["rooms", "spread", "statistics", "sums", "u"]

u = np.uintp               # an index that is not negative: a test for that keeps LLVM from vectors


@inner
def _padded(plan):
    return plan.W + VECTOR // 4


@inner
def rooms(x, plan, lines):
    """An uninitialised table, its lines aligned, and room for two float64 per column or seven per
    channel."""
    L = lanes(x)
    room = np.empty(lines * pitch(plan.W, L) + L, x.dtype)
    work = np.empty(max(2 * _padded(plan), 7 * plan.together), np.float64)
    return room[-(room.ctypes.data // x.itemsize) % L:], work


@inner
def spread(values, v, channels, plan, table, line):
    """Line of the table: the value of each column's channel, found from values[v] on."""
    inner, reach, L, t = plan.inner, channels * plan.inner, lanes(table), pointer(table)
    at = line * pitch(plan.W, L)
    for first in range(at, at + plan.W if channels == plan.together else at + 1, reach):
        if inner == 1:
            for c in range(channels):
                table[u(first + c)] = values[u(v + c)]
            continue
        for c in range(channels):
            value, begin = splat(table.dtype.type(values[v + c])), first + c * inner
            for k in range(0, inner - L + 1, L):
                store(t, begin + k, value)
            if inner % L:
                store_part(t, begin + inner // L * L, value, inner % L)


@inner
def _clear(table, plan):
    """Zeros in the lines of sums."""
    for k in range(2 * pitch(plan.W, lanes(table))):
        table[u(k)] = 0


@inner
def _far(t, line, W, n):
    """Whether a column's pivot is too far from its mean: then it is the chunk's mean. Those of the
    other columns stay, so that their sums come out the same again."""
    inverse, four, far = fill(t, 1.0 / n), fill(t, 4), fill(t, 0)
    for j in range(0, W, lanes(t)):
        s, q, pivot = load(t, j), load(t, line + j), load(t, HI * line + j)
        d = s * inverse
        moved = greater(d * s, four * (q - d * s))
        far = where(moved, four, far)
        store(t, HI * line + j, where(moved, pivot + d, pivot))
    return total(far) != 0


@inner
def _settle(t, line, W, n, before, mean, m2):
    """Merge a chunk: n values per column that, taken about the pivot, add up to line 0 and their
    squares to line 1. The mean is the next pivot."""
    L, halves = lanes(t), lanes(t) // lanes(mean)
    zero, inverse, w = fill(mean, 0), fill(mean, 1.0 / n), n / (before + n)
    weight, spread = fill(mean, w), fill(mean, w * before)
    for j in range(0, W, L):
        s, q, p = load(t, j), load(t, line + j), load(t, HI * line + j)
        for half in range(halves):
            at = j + half * lanes(mean)
            a, b, pivot = low(s), low(q), low(p)
            if half:
                a, b, pivot = high(s), high(q), high(p)
            d, old = a * inverse, load(mean, at)
            q_own, e = b - d * a, (pivot + d) - old
            q_own = where(greater(zero, q_own), zero, q_own)
            store(mean, at, old + e * weight)
            store(m2, at, load(m2, at) + (q_own + e * e * spread))
        store(t, HI * line + j, narrow(load(mean, j), load(mean, j + lanes(mean)), t))


@inner
def _offsets(work, at, n, base, share):
    """Σ (value − base) · share of n values."""
    p, L, total_of, i = pointer(work), lanes(work), fill(work, 0), at
    center, part = fill(work, base), fill(work, share)
    while i + L <= at + n:
        total_of = total_of + (load(p, i) - center) * part
        i += L
    out = total(total_of)
    for k in range(i, at + n):
        out += (work[u(k)] - base) * share
    return out


@inner
def _squares(work, at, own, n, mean, count):
    """Σ of n values from ``own`` on and of the squares of those from ``at`` on about the mean."""
    p, L, total_of, i = pointer(work), lanes(work), fill(work, 0), 0
    center, times = fill(work, mean), fill(work, count)
    while i + L <= n:
        d = load(p, at + i) - center
        total_of = total_of + (load(p, own + i) + d * d * times)
        i += L
    out = total(total_of)
    for k in range(i, n):
        d = work[u(at + k)] - mean
        out += work[u(own + k)] + d * d * count
    return out


@inner
def _gather(work, plan, channels, n, mean, m2, b):
    """Statistics of the channels from those of their columns, n values in each."""
    inner, reach, P = plan.inner, channels * plan.inner, _padded(plan)
    repeats = plan.W // reach if channels == plan.together else 1
    for c in range(channels):                    # about one of them: of equal ones exactly that
        mean[u(b + c)], m2[u(b + c)] = work[u(c * inner)], 0.0
    share = 1.0 / (repeats * inner)
    if inner >= lanes(work):
        for j in range(0, repeats * reach, inner):
            c = j // inner % channels
            mean[u(b + c)] += _offsets(work, j, inner, work[u(c * inner)], share)
        for j in range(0, repeats * reach, inner):
            c = j // inner % channels
            m2[u(b + c)] += _squares(work, j, P + j, inner, mean[u(b + c)], n)
        return
    for first in range(0, repeats * reach, reach):
        for k in range(inner):
            for c in range(channels):
                mean[u(b + c)] += (work[u(first + c * inner + k)] - work[u(c * inner)]) * share
    for first in range(0, repeats * reach, reach):
        for k in range(inner):
            for c in range(channels):
                j = first + c * inner + k
                d = work[u(j)] - mean[u(b + c)]
                m2[u(b + c)] += work[u(P + j)] + d * d * n


@inner
def _append(x, plan, first, last, c, channels, n, mean, m2, b):
    """Segments too few for a row of several, value by value after n others."""
    for m in range(first, last):
        for k in range(channels):
            before, at = n + (m - first) * plan.S, run(plan, m, c + k)[0]
            for i in range(plan.S):
                d = x[at + i] - mean[b + k]
                mean[b + k] += d / (before + i + 1.0)
                m2[b + k] += d * (x[at + i] - mean[b + k])


@inner
def _rows(x, plan, first, last, c, channels, table, work, mean, m2, b):
    """Mean and sum of squares about it of a block of rows, column by column."""
    t, L = pointer(table), lanes(table)
    line, unit, p = pitch(plan.W, L), 1, pointer(x)
    if channels == plan.C:
        unit = plan.W // (plan.C * plan.S)
    columns, own, own_m2 = unit * channels * plan.S, pointer(work), pointer(work[_padded(plan):])
    end = last - (last - first) % unit
    at, zero, inf = run(plan, first, c)[0], fill(t, 0), fill(t, math.inf)
    for k in range(2 * _padded(plan)):
        work[u(k)] = 0.0
    for j in range(0, columns if end > first else 0, L):
        v = load_part(p, at + j, min(L, columns - j))
        store(t, HI * line + j, where(greater(inf, absolute(v)), v, zero))
    m, size = first, 16 * unit
    while m < end:
        stop = min(end, m + size)
        n, before = (stop - m) // unit, (m - first) // unit
        for k in range(2):
            _clear(table, plan)
            add_squares(p, p, p, p, plan, m, stop, c, channels, table, 0)
            if k == 1 or not _far(t, line, columns, n):
                break
        _settle(t, line, columns, np.float64(n), np.float64(before), own, own_m2)
        m, size = stop, plan.chunk
    _gather(work, plan, channels, (end - first) // unit, mean, m2, b)
    _append(x, plan, end, last, c, channels, (end - first) * plan.S, mean, m2, b)
    keep(work)


@inner
def _four(t, line):
    """The sum of a line of four vectors."""
    L = lanes(t)
    a, b = load(t, line) + load(t, line + L), load(t, line + 2 * L) + load(t, line + 3 * L)
    return np.float64(total(a + b))


@inner
def _planes(x, plan, first, last, c, table, work, mean, m2, b):
    """The same of a block of segments of one channel."""
    t, p = pointer(table), pointer(x)
    line = pitch(plan.W, lanes(table))
    v = np.float64(x[run(plan, first, c)[0]])
    center, square, before = v if abs(v) < math.inf else 0.0, 0.0, 0
    m, size = first, min(16, plan.chunk)
    while m < last:
        end = min(last, m + size)
        n = values(plan, end) - values(plan, m)
        pivot, d, q = np.float64(x.dtype.type(center)), 0.0, 0.0
        for k in range(2):
            work[0] = pivot
            spread(work, 0, 1, plan, table, HI)
            _clear(table, plan)
            add_squares(p, p, p, p, plan, m, end, c, 1, table, 0)
            d = _four(t, 0) / n
            q = _four(t, line) - d * d * n
            if k == 1 or not d * d * n > 4.0 * q:
                break
            pivot = np.float64(x.dtype.type(pivot + d))
        e, w = pivot + d - center, n / (before + n)
        center += e * w
        square += (0.0 if q < 0.0 else q) + e * e * w * before
        m, size, before = end, plan.chunk, before + n
    mean[b], m2[b] = center, square


@inner
def statistics(x, plan, first, last, c, channels, table, work, mean, m2, b):
    """Mean and sum of squares about it of a block of segments, from mean[b] and m2[b] on."""
    if planes(plan, lanes(table)):
        _planes(x, plan, first, last, c, table, work, mean, m2, b)
    else:
        _rows(x, plan, first, last, c, channels, table, work, mean, m2, b)


@inner
def _widen(t, line, W, own, own_p):
    """Add the sums of a chunk to those of the block."""
    L, halves = lanes(t), lanes(t) // lanes(own)
    for j in range(0, W, L):
        s, p = load(t, j), load(t, line + j)
        store(own, j, load(own, j) + low(s))
        store(own_p, j, load(own_p, j) + low(p))
        if halves == 2:
            k = j + lanes(own)
            store(own, k, load(own, k) + high(s))
            store(own_p, k, load(own_p, k) + high(p))


@inner
def _fold(work, P, channels, plan, out, v):
    """The sum of the columns of each channel, from out[v] on."""
    inner, reach = plan.inner, channels * plan.inner
    repeats = plan.W // reach if channels == plan.together else 1
    for c in range(channels):
        out[u(v + c)] = 0.0
    if inner >= lanes(work):
        for j in range(0, repeats * reach, inner):
            out[u(v + j // inner % channels)] += _offsets(work, P + j, inner, 0.0, 1.0)
        return
    for first in range(P, P + repeats * reach, reach):
        for k in range(inner):
            for c in range(channels):
                out[u(v + c)] += work[u(first + c * inner + k)]


@inner
def sums(x, dy, y, dz, plan, first, last, c, channels, table, work, option, sum_dy, sum_p, b):
    """Sums of dy and of dy x̂ of a block, chunk by chunk."""
    t, P = pointer(table), _padded(plan)
    for k in range(2 * P):
        work[u(k)] = 0.0
    for m in range(first, last, plan.chunk):
        _clear(table, plan)
        add_products(pointer(x), pointer(dy), pointer(dz), pointer(y), plan, m,
                     min(last, m + plan.chunk), c, channels, table, option)
        _widen(t, pitch(plan.W, lanes(table)), plan.W, pointer(work), pointer(work[P:]))
    _fold(work, 0, channels, plan, sum_dy, b)
    _fold(work, P, channels, plan, sum_p, b)
    keep(work)
