"""Softmax family and cross-entropy: rows are gathered into a block that stays in L1.

Within a block: maxima, then one vectorised run of exponentials, then sums in float64.
"""

import math
from functools import lru_cache

import numpy as np

from ..formulas import exp
from ..quiet import silent
from ..reference import loss as reference
from .jit import device, kernel, prange
from .memory import empty_like
from .reduce import LANES, sum_row

__all__ = ["cross_entropy", "cross_entropy_backward", "log_softmax", "log_softmax_backward",
           "softmax", "softmax_backward"]

BLOCK = 2048               # elements of a block: 8 KB of float32, twice (shifted, exponentials)
SMALL = 1 << 14            # elements of a gradient that NumPy's four passes find in L1 and L2
NARROW = 8                 # columns up to here are copied into rows
FEW = 8                    # classes up to here: NumPy (3 classes: 173 us, 425 by columns)
PEAKS = 32                 # maxima of a row that are kept side by side
STRIP = 256                # columns at a time where classes are not next to each other


def _dense(x):
    """x dense in memory, and the order of axes in which it is C-contiguous."""
    if x.flags.c_contiguous:
        return x, list(range(x.ndim))
    order = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    if not x.transpose(order).flags.c_contiguous:
        x = x.copy(order="K")
        order = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    return x, order


def _classes(x, order, axis):
    """x as contiguous (A, C, B), C being that axis."""
    if not x.ndim:
        return x.reshape(1, 1, 1)
    if x.ndim == 2 and axis == 1 and x.flags.c_contiguous:
        return x.reshape(*x.shape, 1)
    t = x.transpose(order)
    if not t.flags.c_contiguous:
        t = np.ascontiguousarray(t)
    at = order.index(axis % x.ndim)
    return t.reshape(math.prod(t.shape[:at]), t.shape[at], math.prod(t.shape[at + 1:]))


def _block_rows(C):
    return max(1, BLOCK // C)


@device
def _peak(row, acc):
    """The maximum, of comparisons that NaN never wins: it comes back in the exponentials."""
    top = row[0]
    n = row.size
    if n < PEAKS:
        for c in range(1, n):
            top = row[c] if row[c] > top else top
        return top
    for j in range(PEAKS):
        acc[j] = row[j]
    for k in range(1, n // PEAKS):
        part = row[k * PEAKS:k * PEAKS + PEAKS]
        for j in range(PEAKS):
            acc[j] = part[j] if part[j] > acc[j] else acc[j]
    for j in range(PEAKS // 2):
        acc[j] = acc[j + PEAKS // 2] if acc[j + PEAKS // 2] > acc[j] else acc[j]
    for j in range(PEAKS // 2):
        top = acc[j] if acc[j] > top else top
    for c in range(n // PEAKS * PEAKS, n):
        top = row[c] if row[c] > top else top
    return top


@device
def _load(x, r, row):
    B = x.shape[2]
    if B == 1:
        source = x.reshape(-1)[r * row.size:(r + 1) * row.size]
        for c in range(row.size):
            row[c] = source[c]
    else:
        for c in range(row.size):
            row[c] = x[r // B, c, r % B]


@device
def _shift_exp(x, first, d, e, sums):
    """Rows from `first`: d = x − max, e = e^d, sums = Σ e."""
    C = d.shape[1]
    acc, side = np.empty(LANES), np.empty(PEAKS, d.dtype)
    for k in range(d.shape[0]):
        row = d[k]
        _load(x, first + k, row)
        top = _peak(row, side)
        for c in range(C):
            row[c] -= top
    a, b = d.reshape(-1), e.reshape(-1)
    for i in range(a.size):
        b[i] = exp(a[i])
    for k in range(d.shape[0]):
        sums[k] = sum_row(e[k], acc)


@kernel
def _softmax(x, block, logarithm, y):
    """y (R, C) of x (R, C, 1)."""
    R, C = y.shape
    for t in prange((R + block - 1) // block):
        first = t * block
        rows = min(block, R - first)
        d, e, sums = np.empty((rows, C), x.dtype), np.empty((rows, C), x.dtype), np.empty(rows)
        _shift_exp(x, first, d, e, sums)
        by = np.empty(rows, x.dtype)                         # float32: no detour over float64
        for k in range(rows):
            by[k] = math.log(sums[k]) if logarithm else 1 / sums[k]
        for k in range(rows):
            s, out, source = by[k], y[first + k], d[k] if logarithm else e[k]
            if logarithm:
                for c in range(C):
                    out[c] = source[c] - s
            else:
                for c in range(C):
                    out[c] = source[c] * s


@kernel
def _softmax_columns(x, logarithm, y):
    """As _softmax for B > 1: STRIP columns at a time, which vectorise."""
    A, C, B = x.shape
    strips = (B + STRIP - 1) // STRIP
    for t in prange(A * strips):
        a, b0 = t // strips, t % strips * STRIP
        n = min(STRIP, B - b0)
        top, sums, shift = x[a, 0, b0:b0 + n].copy(), np.zeros(n), np.empty(n, x.dtype)
        for c in range(1, C):
            row = x[a, c, b0:b0 + n]
            for j in range(n):
                top[j] = row[j] if row[j] > top[j] else top[j]
        e = np.empty(n, x.dtype)
        for c in range(C):
            row, out = x[a, c, b0:b0 + n], y[a, c, b0:b0 + n]
            for j in range(n):
                e[j] = exp(row[j] - top[j])
            for j in range(n):
                sums[j] += e[j]
                out[j] = row[j] - top[j] if logarithm else e[j]
        for j in range(n):
            shift[j] = math.log(sums[j]) if logarithm else 1 / sums[j]
        for c in range(C):
            out = y[a, c, b0:b0 + n]
            for j in range(n):
                out[j] = out[j] - shift[j] if logarithm else out[j] * shift[j]


def _rows(x):
    """(A, C, B) as (A B, C)."""
    A, C, B = x.shape
    return (x if B == 1 else np.ascontiguousarray(x.transpose(0, 2, 1))).reshape(A * B, C)


def _put_rows(rows, x):
    """Rows written back to x (A, C, B)."""
    A, C, B = x.shape
    x[...] = rows.reshape(A, B, C).transpose(0, 2, 1)


def _forward(x, axis, logarithm):
    x, order = _dense(x)
    if x.size == 0:
        return empty_like(x)
    x3 = _classes(x, order, axis)
    C, B = x3.shape[1:]
    if B > NARROW and C <= FEW:
        return (reference.log_softmax if logarithm else reference.softmax)(x, axis=axis)
    y = empty_like(x)
    y3 = _classes(y, order, axis)
    if B > NARROW:
        _softmax_columns(x3, logarithm, y3, work=8 * x.nbytes)
        return y
    rows = _rows(x3)
    out = y3.reshape(rows.shape) if B == 1 else np.empty_like(rows)
    _softmax(rows[:, :, None], _block_rows(C), logarithm, out, work=8 * x.nbytes)
    if B > 1:
        _put_rows(out, y3)
    return y


def softmax(x, *, axis):
    """y = eˣ / Σ eˣ along axis."""
    return _forward(x, axis, False)


def log_softmax(x, *, axis):
    """y = x − log Σ eˣ along axis; all −inf gives NaN."""
    return _forward(x, axis, True)


@kernel
def _softmax_backward(dy, y, block, logarithm, dx):
    """Of rows (R, C)."""
    R, C = y.shape
    for t in prange((R + block - 1) // block):
        product, total = np.empty(C, y.dtype), np.empty(1, y.dtype)
        acc = np.empty(LANES)
        for r in range(t * block, min(R, (t + 1) * block)):
            d, p, out = dy[r], y[r], dx[r]
            if logarithm:
                total[0] = sum_row(d, acc)
                s = total[0]
                for c in range(C):
                    out[c] = d[c] - exp(p[c]) * s
            else:
                for c in range(C):
                    product[c] = d[c] * p[c]
                total[0] = sum_row(product, acc)
                s = total[0]
                for c in range(C):
                    out[c] = p[c] * (d[c] - s)


@kernel
def _softmax_backward_columns(dy, y, logarithm, dx):
    """As _softmax_backward for B > 1: STRIP columns at a time, which vectorise."""
    A, C, B = y.shape
    strips = (B + STRIP - 1) // STRIP
    for t in prange(A * strips):
        a, b0 = t // strips, t % strips * STRIP
        n = min(STRIP, B - b0)
        sums, s = np.zeros(n), np.empty(n, y.dtype)
        for c in range(C):
            d, p = dy[a, c, b0:b0 + n], y[a, c, b0:b0 + n]
            for j in range(n):
                sums[j] += d[j] if logarithm else d[j] * p[j]
        for j in range(n):
            s[j] = sums[j]
        for c in range(C):
            d, p, out = dy[a, c, b0:b0 + n], y[a, c, b0:b0 + n], dx[a, c, b0:b0 + n]
            for j in range(n):
                out[j] = d[j] - exp(p[j]) * s[j] if logarithm else p[j] * (d[j] - s[j])


def _backward(dy, y, axis, logarithm):
    if y.size <= SMALL and dy.strides == y.strides and dy.dtype == y.dtype:
        f = reference.log_softmax_backward if logarithm else reference.softmax_backward
        return silent().run(f, dy, y, axis=axis)
    y, order = _dense(y)
    dx = empty_like(y)
    if y.size == 0:
        return dx
    y3 = _classes(y, order, axis)
    dy = dy if dy.dtype == y.dtype else dy.astype(y.dtype)
    dy3, dx3 = _classes(dy, order, axis), _classes(dx, order, axis)
    C, B = y3.shape[1:]
    if B > NARROW:
        _softmax_backward_columns(dy3, y3, logarithm, dx3, work=6 * y.nbytes)
        return dx
    rows = _rows(y3)
    out = dx3.reshape(rows.shape) if B == 1 else np.empty_like(rows)
    _softmax_backward(_rows(dy3), rows, _block_rows(C), logarithm, out, work=6 * y.nbytes)
    if B > 1:
        _put_rows(out, dx3)
    return dx


def softmax_backward(dy, y, *, axis):
    """dx = y (dy − Σ dy y)."""
    return _backward(dy, y, axis, False)


def log_softmax_backward(dy, y, *, axis):
    """dx = dy − e^y Σ dy."""
    return _backward(dy, y, axis, True)


@kernel
def _cross_entropy(x, target, weight, block, ignore_index, smoothing, losses, weights):
    A, C, B = x.shape
    R = A * B
    for t in prange((R + block - 1) // block):
        first = t * block
        rows = min(block, R - first)
        d, e, sums = np.empty((rows, C), x.dtype), np.empty((rows, C), x.dtype), np.empty(rows)
        _shift_exp(x, first, d, e, sums)
        for k in range(rows):
            r, c = first + k, target[first + k]
            losses[r], weights[r] = 0, 0
            if c == ignore_index:
                continue
            s, w = math.log(sums[k]), weight[c]
            loss = (1 - smoothing) * w * (s - d[k, c]) if w != 0 else 0.0
            if smoothing > 0:
                for j in range(C):
                    if weight[j] != 0:
                        loss += smoothing / C * weight[j] * (s - d[k, j])
            losses[r], weights[r] = loss, w


@kernel
def _cross_entropy_backward(dloss, x, target, weight, block, ignore_index, smoothing, dx):
    A, C, B = x.shape
    R = A * B
    spread = smoothing / C
    for t in prange((R + block - 1) // block):
        first = t * block
        rows = min(block, R - first)
        d, e, sums = np.empty((rows, C), x.dtype), np.empty((rows, C), x.dtype), np.empty(rows)
        _shift_exp(x, first, d, e, sums)
        every = 0.0
        for c in range(C):
            every += spread * weight[c]
        for k in range(rows):
            r, a, b = first + k, (first + k) // B, (first + k) % B
            at = target[r]
            if at == ignore_index:
                for c in range(C):
                    dx[a, c, b] = 0
                continue
            own, g = (1 - smoothing) * weight[at], np.float64(dloss[r])
            q = (every + own) / sums[k]
            for c in range(C):
                dx[a, c, b] = g * (e[k, c] * q - spread * weight[c])
            dx[a, at, b] = g * (e[k, at] * q - spread * weight[at] - own)


def _samples(a, order):
    """A per-sample array (N, *S), one axis, in the order in which x's rows lie in memory."""
    if a.ndim == 1 and a.flags.c_contiguous:
        return a
    axes = [i - (i > 1) for i in order if i != 1]
    return np.ascontiguousarray(a.transpose(axes)).reshape(-1)


def _class_weights(weight, C, dtype):
    return _ones(C, dtype) if weight is None else np.ascontiguousarray(weight, dtype)


@lru_cache(64)
def _ones(C, dtype):
    return np.ones(C, dtype)


def cross_entropy(x, target, weight, *, ignore_index, label_smoothing):
    """loss = −Σ_c q_c log softmax(x)_c,  q = w ((1 − s) onehot(target) + s / C); 0 where ignored.

    Returns (loss, weight of the target), both of the target's shape.
    """
    if x.size == 0:
        return np.zeros(target.shape, x.dtype), np.zeros(target.shape, x.dtype)
    x, order = _dense(x)
    x3 = _classes(x, order, 1)
    C = x3.shape[1]
    out = np.empty((2, target.size), x.dtype)
    _cross_entropy(x3, _samples(target, order), _class_weights(weight, C, x.dtype), _block_rows(C),
                   ignore_index, float(label_smoothing), *out, work=8 * x.nbytes)
    if target.ndim == 1:
        return out[0], out[1]
    axes = [i - (i > 1) for i in order if i != 1]
    shape = [target.shape[i] for i in axes]
    return tuple(a.reshape(shape).transpose(np.argsort(axes)) for a in out)


def cross_entropy_backward(dloss, x, target, weight, *, ignore_index, label_smoothing):
    """dx = dloss (softmax(x) Σq − q)."""
    x, order = _dense(x)
    dx = empty_like(x)
    if x.size == 0:
        return dx
    x3 = _classes(x, order, 1)
    C = x3.shape[1]
    dloss = dloss if dloss.dtype == x.dtype else dloss.astype(x.dtype)
    _cross_entropy_backward(_samples(dloss, order), x3, _samples(target, order),
                            _class_weights(weight, C, x.dtype), _block_rows(C), ignore_index,
                            float(label_smoothing), _classes(dx, order, 1), work=8 * x.nbytes)
    return dx
