"""Cross-entropy of rows of classes, from memory as in softmax.py: rows are read again from a cache
for the sum and the gradient."""

import math
from functools import cache

import numpy as np

from ..polynomials import exp
from . import graphs
from .intrinsics import cuda, device, libm, width
from .launch import Kernel, factory
from .layout import dense
from .memory import empty, empty_like, order_of, to_host, xp
from .reduce import reduced
from .rows import WIDE
from .softmax import (
    add,
    block_max,
    classes,
    larger,
    log_softmax,
    log_softmax_backward,
    over_lanes,
    row_sum,
    rows_of,
    softmax,
    softmax_backward,
    way,
)
from .vectors import each, filled, reader, writer

__all__ = ["cross_entropy", "cross_entropy_backward", "log_softmax", "log_softmax_backward",
           "softmax", "softmax_backward"]

_max = max


@cache
def _shifted(dtype, W, T):
    """The largest of a row, and Σ e^(x − largest) in float64."""
    read, same, real = reader(W), filled(W), dtype.type
    low, top, total = real(-math.inf), over_lanes(larger, W), over_lanes(add, W)
    largest, summed, maximum = block_max(T), row_sum(T), each(larger, 2, W)
    power = each(device(lambda x, m: exp(x - m)), 2, W)
    second = _max(1, T // 32)

    @device
    def f(x, base, step, V, t, cells):
        m, s = same(low), 0.0
        for r in range(t, V, T):
            m = maximum(m, read(x, base + r * step))
        high = real(largest(top(m), cells, 0))
        for r in range(t, V, T):
            s += np.float64(total(power(read(x, base + r * step), same(high))))
        return high, summed(s, cells, second)
    return f


@factory
def forward(dtype, W, T):
    """Per row: the loss, and for adding up in float64 the loss, the target's weight, and whether
    the target is no class. ``weighted``: classes have weights."""
    shifted, summed, real, kind = _shifted(dtype, W, T), row_sum(T), dtype.type, dtype.str[1:]
    PER, CELLS, log, wide = rows_of(T), 4 * _max(1, T // 32), libm("log", np.float64), np.float64

    def body(x, target, weight, losses, found, rows, C, B, ignore_index, smoothing, weighted):
        cells = cuda.shared.array(CELLS, np.float64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        base, c = (row // B) * C * B + row % B, target[row]
        high, s = shifted(x, base, W * B, C // W, t, cells)
        s, w, loss, bad = log(s), 0.0, 0.0, 0.0
        if c != ignore_index and (c < 0 or c >= C):
            bad = 1.0
        elif c != ignore_index:
            w = wide(weight[c]) if weighted else 1.0
            if w != 0.0:
                loss = (1.0 - smoothing) * w * (s - wide(x[base + c * B] - high))
        if smoothing > 0.0:
            each_one = 0.0
            for k in range(t, C, T):
                v = wide(weight[k]) if weighted else 1.0
                if v != 0.0:
                    each_one += v * (s - wide(x[base + k * B] - high))
            each_one = summed(each_one, cells, CELLS // 2) * (smoothing / C)
            if c != ignore_index and bad == 0.0:
                loss += each_one
        if t == 0:
            losses[row] = real(loss)
            found[row], found[rows + row], found[2 * rows + row] = loss, w, bad
    return Kernel(body, f"*{kind} *i8 *{kind} *{kind} *f8 i8 i8 i8 i8 f8 i4", threads=T * PER,
                  name=f"cross_entropy_{kind}_{W}_{T}")


@factory
def backward(dtype, W, T):
    """dx = dloss (softmax(x) Σq − q) per row; 0 where the target is ignored or no class."""
    shifted, summed, real, kind = _shifted(dtype, W, T), row_sum(T), dtype.type, dtype.str[1:]
    PER, CELLS, wide = rows_of(T), 4 * _max(1, T // 32), np.float64
    read, write, same, zero = reader(W), writer(W), filled(W), real(0)
    value = each(device(lambda x, w, c: (exp(x - c[0]) * c[1] - c[2] * w) * c[3]), 3, W)

    def body(dloss, x, target, weight, dx, rows, C, B, every, ignore_index, smoothing, weighted):
        cells = cuda.shared.array(CELLS, np.float64)
        t, row = cuda.threadIdx.x % T, cuda.blockIdx.x * PER + cuda.threadIdx.x // T
        if row >= rows:
            return
        base, c, V, step = (row // B) * C * B + row % B, target[row], C // W, W * B
        if c == ignore_index or c < 0 or c >= C:
            for r in range(t, V, T):
                write(dx, base + r * step, same(zero))
            return
        high, s = shifted(x, base, step, V, t, cells)
        own = (1.0 - smoothing) * (wide(weight[c]) if weighted else 1.0)
        spread, weights = smoothing / C, 0.0
        if smoothing > 0.0 and weighted:
            for k in range(t, C, T):
                weights += wide(weight[k])
            weights = summed(weights, cells, CELLS // 2)
        elif smoothing > 0.0:
            weights = wide(C)
        g, q = dloss[row if every else 0], (spread * weights + own) / s
        at = real((wide(exp(x[base + c * B] - high)) * q
                   - spread * (wide(weight[c]) if weighted else 1.0) - own) * wide(g))
        e, unit = same((high, real(q), real(spread), g)), same(real(1))
        for r in range(t, V, T):
            w = read(weight, r * W) if weighted else unit
            v = value(read(x, base + r * step), w, e)
            write(dx, base + r * step, v)
            if r == c // W:
                dx[base + c * B] = at
    return Kernel(body, f"*{kind} *{kind} *i8 *{kind} *{kind} i8 i8 i8 i4 i8 f8 i4",
                  threads=T * PER, name=f"cross_entropy_backward_{kind}_{W}_{T}")


def every():
    """All kernels of this module."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for W, T in [(width(dtype), T) for T in (32, *WIDE)] + [(1, 32), (1, 1)]:
            yield forward(dtype, W, T)
            yield backward(dtype, W, T)


def _samples(a, order, dtype):
    """A per-sample array (N, *S), one axis, in the order in which x's rows lie in memory."""
    axes = [i - (i > 1) for i in order if i != 1]
    return xp.ascontiguousarray(a.transpose(axes).astype(dtype, copy=False)).reshape(-1)


def _prepared(x, target, weight):
    """x dense, sizes, the axes' order in memory, and the others as the kernels take them."""
    x = dense(x)
    order = list(range(x.ndim)) if x.flags.c_contiguous else order_of(x)
    weight = None if weight is None else xp.ascontiguousarray(weight.astype(x.dtype, copy=False))
    return x, classes(x, 1), order, _samples(target, order, np.int64), weight


def cross_entropy(x, target, weight, *, ignore_index, label_smoothing):
    """loss = −Σ_c q_c log softmax(x)_c,  q = w ((1 − s) onehot(target) + s / C); 0 where ignored.

    Returns the losses, of the target's shape; their sum; the sum of the targets' weights; whether
    each target is a class or ignored. The last three are numbers, for which the device is waited
    for; while a step is captured they are device arrays, and targets are not looked at."""
    if not x.size:
        bad = bool(target.size) and bool((target != ignore_index).any())
        losses = empty(target.shape, x.dtype)
        losses.fill(0)
        return losses, 0.0, 0.0, not bad
    x, (A, C, B), order, rows, weight = _prepared(x, target, weight)
    W, T, _ = way(C, B, x.dtype, 8, x)
    losses, found = empty((rows.size,), x.dtype), empty((3, rows.size), np.float64)
    forward(x.dtype, W, T)(-(-A * B // rows_of(T)), x, rows, weight, losses, found, A * B, C, B,
                           ignore_index, float(label_smoothing), weight is not None)
    sums = reduced("sum", found, {1}, found.dtype)
    total, weights, bad = (sums[0], sums[1], 0) if graphs.state.capture else to_host(sums).tolist()
    axes = [i - (i > 1) for i in order if i != 1]
    losses = losses.reshape([target.shape[i] for i in axes]).transpose(np.argsort(axes).tolist())
    return losses, total, weights, bad == 0


def cross_entropy_backward(dloss, x, target, weight, *, ignore_index, label_smoothing):
    """dx = dloss (softmax(x) Σq − q); dloss of the target's shape, or one number for all."""
    if not x.size:
        return empty_like(x)
    x, (A, C, B), order, rows, weight = _prepared(x, target, weight)
    dx = empty_like(x)
    each_one = bool(dloss.ndim)
    dloss = _samples(dloss, order, x.dtype) if each_one else dloss.astype(x.dtype, copy=False)
    W, T, _ = way(C, B, x.dtype, 8, x, dx, *([] if weight is None else [weight]))
    backward(x.dtype, W, T)(-(-A * B // rows_of(T)), dloss, x, rows, weight, dx, A * B, C, B,
                            each_one, ignore_index, float(label_smoothing), weight is not None)
    return dx
