"""Softmax family and cross-entropy: rows are gathered into a block that stays in L1.

Within a block: maxima, then one vectorised run of exponentials, then sums in float64.
"""

import math
from functools import lru_cache

import numpy as np

from ..formulas import exp
from .columns import add, total
from .jit import device, kernel, prange
from .memory import empty_like

__all__ = ["cross_entropy", "cross_entropy_backward", "log_softmax", "log_softmax_backward",
           "softmax", "softmax_backward"]

BLOCK = 2048               # elements of a block: 8 KB of float32, twice (shifted, exponentials)
LANES = 64
SHORT = 64                 # rows up to here are summed one by one


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
def _sum(row, zero, acc):
    if row.size <= SHORT:
        s = 0.0
        for c in range(row.size):
            s += row[c]
        return s
    acc[:] = 0.0
    add(row, zero, acc)
    return total(acc)


@device
def _peak(row):
    """The maximum, of comparisons that NaN never wins: it comes back in the exponentials."""
    top = row[0]
    n = row.size
    if n <= SHORT:
        for c in range(1, n):
            top = row[c] if row[c] > top else top
        return top
    acc = row[:LANES].copy()
    for k in range(1, n // LANES):
        part = row[k * LANES:k * LANES + LANES]
        for j in range(LANES):
            acc[j] = part[j] if part[j] > acc[j] else acc[j]
    for j in range(LANES):
        top = acc[j] if acc[j] > top else top
    for c in range(n // LANES * LANES, n):
        top = row[c] if row[c] > top else top
    return top


@device
def _load(x, r, row):
    B = x.shape[2]
    if B == 1:
        source = x[r, :, 0]
        for c in range(row.size):
            row[c] = source[c]
    else:
        for c in range(row.size):
            row[c] = x[r // B, c, r % B]


@device
def _shift_exp(x, first, d, e, sums):
    """Rows from `first`: d = x − max, e = e^d, sums = Σ e."""
    C = d.shape[1]
    zero, acc = np.zeros(LANES), np.empty(LANES)
    for k in range(d.shape[0]):
        row = d[k]
        _load(x, first + k, row)
        top = _peak(row)
        for c in range(C):
            row[c] -= top
    a, b = d.reshape(-1), e.reshape(-1)
    for i in range(a.size):
        b[i] = exp(a[i])
    for k in range(d.shape[0]):
        sums[k] = _sum(e[k], zero, acc)


@kernel
def _softmax(x, block, logarithm, y):
    A, C, B = x.shape
    R = A * B
    for t in prange((R + block - 1) // block):
        first = t * block
        rows = min(block, R - first)
        d, e, sums = np.empty((rows, C), x.dtype), np.empty((rows, C), x.dtype), np.empty(rows)
        _shift_exp(x, first, d, e, sums)
        for k in range(rows):
            a, b = (first + k) // B, (first + k) % B
            if logarithm:
                s = math.log(sums[k])
                for c in range(C):
                    y[a, c, b] = d[k, c] - s
            else:
                for c in range(C):
                    y[a, c, b] = e[k, c] / sums[k]


def _forward(x, axis, logarithm):
    x, order = _dense(x)
    y = empty_like(x)
    if x.size == 0:
        return y
    x3, y3 = _classes(x, order, axis), _classes(y, order, axis)
    _softmax(x3, _block_rows(x3.shape[1]), logarithm, y3, work=8 * x.nbytes)
    return y


def softmax(x, *, axis):
    """y = eˣ / Σ eˣ along axis."""
    return _forward(x, axis, False)


def log_softmax(x, *, axis):
    """y = x − log Σ eˣ along axis; all −inf gives NaN."""
    return _forward(x, axis, True)


@kernel
def _softmax_backward(dy, y, block, logarithm, dx):
    A, C, B = y.shape
    R = A * B
    for t in prange((R + block - 1) // block):
        d, p, product = np.empty(C, y.dtype), np.empty(C, y.dtype), np.empty(C, y.dtype)
        zero, acc = np.zeros(LANES), np.empty(LANES)
        for r in range(t * block, min(R, (t + 1) * block)):
            a, b = r // B, r % B
            _load(dy, r, d)
            _load(y, r, p)
            if logarithm:
                s = _sum(d, zero, acc)
                for c in range(C):
                    product[c] = exp(p[c])
                for c in range(C):
                    dx[a, c, b] = d[c] - product[c] * s
            else:
                for c in range(C):
                    product[c] = d[c] * p[c]
                s = _sum(product, zero, acc)
                for c in range(C):
                    dx[a, c, b] = p[c] * (d[c] - s)


def _backward(dy, y, axis, logarithm):
    y, order = _dense(y)
    dx = empty_like(y)
    if y.size == 0:
        return dx
    y3 = _classes(y, order, axis)
    dy = dy if dy.dtype == y.dtype else dy.astype(y.dtype)
    _softmax_backward(_classes(dy, order, axis), y3, _block_rows(y3.shape[1]), logarithm,
                      _classes(dx, order, axis), work=6 * y.nbytes)
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
