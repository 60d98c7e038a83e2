"""Softmax and log-softmax, in vectors along the classes or across rows of them.

A row is read three times, from memory once: for its maximum, for its exponentials and their sum,
for its result.
Sums of exponentials are in x's dtype over SPAN elements or STEPS classes and float64 beyond.
"""

import math

import numpy as np

from ..polynomials import exp, log_above_one
from .columns import inlined, inner
from .memory import empty_like
from .simd import (
    fill,
    high,
    keep,
    lanes,
    load,
    load_or,
    load_part,
    low,
    peak,
    pointer,
    splat,
    store,
    store_part,
    total,
    where,
)
from .tasks import share, tasks

__all__ = ["log_softmax", "log_softmax_backward", "softmax", "softmax_backward"]

TASK = 1 << 14             # elements of a task: 64 KB of float32
SPAN = 512                 # elements of a row that are summed in their own precision
STEPS = 32                 # classes of a strip that are summed so, one after the other
STRIP = 64                 # rows side by side where classes are not next to each other
ROOM = 1 << 12             # elements of rows between two steps of the same row: 16 KB of float32
BUFFER = 1 << 17           # elements of a strip: half of a core's L2


_IN_ORDER = (0, 1)


def _dense(x):
    """x dense in memory, and the order of axes in which it is C-contiguous."""
    if x.flags.c_contiguous:
        return x, _IN_ORDER if x.ndim == 2 else tuple(range(x.ndim))
    order = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    if not x.transpose(order).flags.c_contiguous:
        x = x.copy(order="K")
        order = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    return x, order


def _classes(x, order, axis):
    """x as contiguous (A, C, B), C being that axis."""
    if order is _IN_ORDER and axis in (1, -1) and x.flags.c_contiguous:
        return x.reshape(*x.shape, 1)
    if not x.ndim:
        return x.reshape(1, 1, 1)
    t = x.transpose(order)
    if not t.flags.c_contiguous:
        t = np.ascontiguousarray(t)
    at = order.index(axis % x.ndim)
    return t.reshape(math.prod(t.shape[:at]), t.shape[at], math.prod(t.shape[at + 1:]))


def _strip(C, B):
    """How many rows make a task: of C neighbours each, or side by side."""
    return max(1, TASK // C) if B == 1 else max(16, min(STRIP, BUFFER // C // 16 * 16))


@inner
def _together(C, W):
    """Rows that take each step one after the other: they stay in L1."""
    return max(1, min(W, ROOM // C))


@inner
def _top(x, i, n):
    """The maximum of n elements, of comparisons that NaN never wins: the exponentials show it."""
    W = lanes(x)
    whole = i + n // W * W
    four = i + n // (4 * W) * (4 * W)
    a = load_or(x, whole, i + n - whole, fill(x, -np.inf))
    b, c, d = a, a, a
    for k in range(i, four, 4 * W):
        p, q, r, s = load(x, k), load(x, k + W), load(x, k + 2 * W), load(x, k + 3 * W)
        a, b, c, d = where(p > a, p, a), where(q > b, q, b), where(r > c, r, c), where(s > d, s, d)
    for k in range(four, whole, W):
        p = load(x, k)
        a = where(p > a, p, a)
    a, c = where(b > a, b, a), where(d > c, d, c)
    return peak(where(c > a, c, a))


@inner
def _exponentials(x, i, n, top, e, j):
    """Σ e^(x − top) over n elements, each of which is put into e."""
    W = lanes(x)
    whole, acc = n // W * W, fill(x, 0)
    wide = low(acc)
    for first in range(0, whole, SPAN):
        wide, acc = wide + (low(acc) + high(acc)), fill(x, 0)
        for k in range(first, min(whole, first + SPAN), W):
            v = exp(load(x, i + k) - top)
            store(e, j + k, v)
            acc = acc + v
    if whole < n:
        v = exp(load_or(x, i + whole, n - whole, fill(x, -np.inf)) - top)
        store_part(e, j + whole, v, n - whole)
        acc = acc + v
    return total(wide + (low(acc) + high(acc)))


@inlined
def _result(x, y, k, m, top, s, logarithm):
    if logarithm:
        store_part(y, k, load_part(x, k, m) - top - s, m)
    else:
        store_part(y, k, load_part(y, k, m) * s, m)


@inner
def _softmax_rows(x, i, rows, n, logarithm, y, tops, sums):
    """Rows of n neighbours, no more than lanes: each step for all of them, since the result of one
    row's step takes longer than the step of the next."""
    W, side = lanes(x), pointer(sums)
    for r in range(rows):
        tops[r] = _top(x, i + r * n, n)
    for r in range(rows):
        at = i + r * n
        sums[r] = _exponentials(x, at, n, tops[r], y, at)
    s = load_or(side, 0, rows, fill(x, 1))
    store(side, 0, log_above_one(s) if logarithm else fill(x, 1) / s)
    for r in range(rows):
        at, rest, top, s = i + r * n, n % W, splat(tops[r]), splat(sums[r])
        whole = at + n - rest
        for k in range(at, whole, W):
            _result(x, y, k, W, top, s, logarithm)
        if rest:
            _result(x, y, whole, rest, top, s, logarithm)


@inner
def _softmax_block(x, first, last, logarithm, y):
    C, W = x.shape[1], lanes(x)
    tops, sums, together = np.empty(W, x.dtype), np.empty(W, x.dtype), _together(C, W)
    for a in range(first, last, together):
        _softmax_rows(pointer(x), a * C, min(together, last - a), C, logarithm, pointer(y), tops,
                      sums)
    keep(sums)


@inner
def _softmax_strip(x, i, B, C, n, logarithm, y, room, side):
    """n ≤ STRIP rows side by side: classes are B apart."""
    W = lanes(x)
    for j in range(0, n, W):
        store(side, j, fill(x, -np.inf))
    for c in range(C):
        for j in range(0, n, W):
            v, top = load_part(x, i + c * B + j, min(W, n - j)), load(side, j)
            store(room, c * STRIP + j, v)
            store(side, j, where(v > top, v, top))
    for j in range(0, n, W):
        top, s = load(side, j), fill(x, 0)
        for first in range(0, C, STEPS):
            acc = fill(x, 0)
            for c in range(first, min(C, first + STEPS)):
                d = load(room, c * STRIP + j) - top
                e = exp(d)
                acc = acc + e
                store(room, c * STRIP + j, d if logarithm else e)
            s = s + acc
        store(side, j, log_above_one(s) if logarithm else fill(x, 1) / s)
    for c in range(C):
        for j in range(0, n, W):
            v, s = load(room, c * STRIP + j), load(side, j)
            store_part(y, i + c * B + j, v - s if logarithm else v * s, min(W, n - j))


@inner
def task_count(x, strip):
    """Of x (A, C, B): rows in blocks, or, where classes are apart, strips of those side by side."""
    A, B = x.shape[0], x.shape[2]
    return (A + strip - 1) // strip if B == 1 else A * ((B + strip - 1) // strip)


@inner
def _softmax_task(t, x, strip, logarithm, y):
    A, C, B = x.shape
    if B == 1:
        _softmax_block(x, t * strip, min(A, t * strip + strip), logarithm, y)
        return
    strips = (B + strip - 1) // strip
    b = t % strips * strip
    room, side = np.empty(C * STRIP, x.dtype), np.empty(STRIP, x.dtype)
    _softmax_strip(pointer(x), t // strips * C * B + b, B, C, min(strip, B - b), logarithm,
                   pointer(y), pointer(room), pointer(side))
    keep(room)
    keep(side)


@tasks
def _softmax(run, x, strip, logarithm, y):
    share(_softmax_task, task_count(x, strip), run, (x, strip, logarithm, y))


def _forward(x, axis, logarithm):
    x, order = _dense(x)
    y = empty_like(x)
    if x.size:
        x3 = _classes(x, order, axis)
        _softmax(x3, _strip(*x3.shape[1:]), logarithm, _classes(y, order, axis),
                 work=4 * x.nbytes)
    return y


def softmax(x, *, axis):
    """y = eˣ / Σ eˣ along axis."""
    return _forward(x, axis, False)


def log_softmax(x, *, axis):
    """y = x − log Σ eˣ along axis; all −inf gives NaN."""
    return _forward(x, axis, True)


@inner
def _slope(d, p, s, logarithm):
    return d - exp(p) * s if logarithm else p * (d - s)


@inner
def _dot(dy, y, i, n, logarithm):
    """Σ dy, or Σ dy y, over n elements."""
    W = lanes(y)
    whole, acc = i + n // W * W, fill(y, 0)
    wide, rest = low(acc), i + n - whole
    for first in range(i, whole, SPAN):
        wide, acc = wide + (low(acc) + high(acc)), fill(y, 0)
        for k in range(first, min(whole, first + SPAN), W):
            acc = acc + (load(dy, k) if logarithm else load(dy, k) * load(y, k))
    d, p = load_part(dy, whole, rest), load_part(y, whole, rest)
    acc = acc + (d if logarithm else d * p)
    return total(wide + (low(acc) + high(acc)))


@inner
def _backward_rows(dy, y, i, rows, n, logarithm, dx, sums):
    """As _softmax_rows."""
    W = lanes(y)
    for r in range(rows):
        sums[r] = _dot(dy, y, i + r * n, n, logarithm)
    for r in range(rows):
        at, rest, by = i + r * n, n % W, splat(sums[r])
        whole = at + n - rest
        for k in range(at, whole, W):
            store(dx, k, _slope(load(dy, k), load(y, k), by, logarithm))
        if rest:
            v = _slope(load_part(dy, whole, rest), load_part(y, whole, rest), by, logarithm)
            store_part(dx, whole, v, rest)


@inner
def _backward_block(dy, y, first, last, logarithm, dx):
    C, W = y.shape[1], lanes(y)
    sums, together = np.empty(W, y.dtype), _together(C, W)
    for a in range(first, last, together):
        _backward_rows(pointer(dy), pointer(y), a * C, min(together, last - a), C, logarithm,
                       pointer(dx), sums)


@inner
def _backward_strip(dy, y, i, B, C, n, logarithm, dx):
    W = lanes(y)
    zero = fill(y, 0)
    for j in range(i, i + n, W):
        s, m = zero, min(W, i + n - j)
        for first in range(0, C, STEPS):
            acc = zero
            for c in range(first, min(C, first + STEPS)):
                d = load_part(dy, j + c * B, m)
                acc = acc + (d if logarithm else d * load_part(y, j + c * B, m))
            s = s + acc
        for c in range(C):
            k = j + c * B
            v = _slope(load_part(dy, k, m), load_part(y, k, m), s, logarithm)
            store_part(dx, k, v, m)


@inner
def _backward_task(t, dy, y, strip, logarithm, dx):
    A, C, B = y.shape
    if B == 1:
        _backward_block(dy, y, t * strip, min(A, t * strip + strip), logarithm, dx)
        return
    strips = (B + strip - 1) // strip
    b = t % strips * strip
    _backward_strip(pointer(dy), pointer(y), t // strips * C * B + b, B, C, min(strip, B - b),
                    logarithm, pointer(dx))


@tasks
def _softmax_backward(run, dy, y, strip, logarithm, dx):
    share(_backward_task, task_count(y, strip), run, (dy, y, strip, logarithm, dx))


def _backward(dy, y, axis, logarithm):
    y, order = _dense(y)
    dx = empty_like(y)
    if y.size:
        dy = dy if dy.dtype == y.dtype else dy.astype(y.dtype)
        y3 = _classes(y, order, axis)
        _softmax_backward(_classes(dy, order, axis), y3, _strip(*y3.shape[1:]), logarithm,
                          _classes(dx, order, axis), work=4 * y.nbytes)
    return dx


def softmax_backward(dy, y, *, axis):
    """dx = y (dy − Σ dy y)."""
    return _backward(dy, y, axis, False)


def log_softmax_backward(dy, y, *, axis):
    """dx = dy − e^y Σ dy."""
    return _backward(dy, y, axis, True)
