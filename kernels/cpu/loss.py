"""Cross-entropy of rows of classes, forward and backward, from the exponentials of ``softmax``.

Where classes are not next to each other, rows are gathered into a strip and put back.
"""

from functools import lru_cache

import numpy as np

from ..formulas import log_above_one
from .jit import device, kernel, prange
from .memory import empty_like
from .simd import lanes, load, load_part, splat, store, store_part, total, where
from .softmax import (
    TASK,
    _classes,
    _dense,
    _exponentials,
    _top,
    log_softmax,
    log_softmax_backward,
    softmax,
    softmax_backward,
)

__all__ = ["cross_entropy", "cross_entropy_backward", "log_softmax", "log_softmax_backward",
           "softmax", "softmax_backward"]


@device
def _gather(x, i, B, C, n, rows):
    """n rows whose classes are B apart, one after the other."""
    source, out = x.reshape(-1), rows.reshape(-1)
    for c in range(C):
        for r in range(n):
            out[r * C + c] = source[i + c * B + r]


@device
def _scatter(rows, C, n, x, i, B):
    source, out = rows.reshape(-1), x.reshape(-1)
    for c in range(C):
        for r in range(n):
            out[i + c * B + r] = source[r * C + c]


@device
def _smooth(x, i, C, weight, shift):
    """Σ w (shift − x) over the classes of weight."""
    W, s = lanes(x), 0.0
    zero, whole = splat(x.dtype.type(0)), C // W * W
    for k in range(0, whole, W):
        w = load(weight, k)
        s += total(where(w != zero, w * (shift - load(x, i + k)), zero))
    w = load_part(weight, whole, C - whole)
    return s + total(where(w != zero, w * (shift - load_part(x, i + whole, C - whole)), zero))


@device
def _losses(x, i, C, n, target, first, weight, ignore_index, smoothing, losses):
    """Of n rows from x[i]: Σ loss, Σ weight of the target, and how many targets are no class."""
    room = np.empty(C, x.dtype)
    values, loss_sum, weight_sum, bad = x.reshape(-1), 0.0, 0.0, 0
    for k in range(n):
        r, j, c = first + k, i + k * C, target[first + k]
        losses[r] = 0
        if c == ignore_index:
            continue
        if c < 0 or c >= C:
            bad += 1
            continue
        top = _top(x, j, C)
        s = log_above_one(x.dtype.type(_exponentials(x, j, C, top, room, 0)))
        w = weight[c]
        loss = (1 - smoothing) * w * (s - (values[j + c] - top)) if w != 0 else 0.0
        if smoothing > 0:
            loss += smoothing / C * _smooth(x, j, C, weight, s + top)
        losses[r] = loss
        loss_sum += loss
        weight_sum += w
    return loss_sum, weight_sum, bad


@device
def _gradients(dloss, x, i, C, n, target, first, weight, ignore_index, smoothing, dx, o):
    """Of n rows from x[i] into dx[o]; a target that is no class counts as ignored."""
    W, out, spread, every = lanes(x), dx.reshape(-1), smoothing / C, 0.0
    if smoothing > 0:
        for c in range(C):
            every += spread * weight[c]
    whole = C // W * W
    for k in range(n):
        j, p, c = i + k * C, o + k * C, target[first + k]
        if c == ignore_index or c < 0 or c >= C:
            out[p:p + C] = 0
            continue
        s = _exponentials(x, j, C, _top(x, j, C), dx, p)
        own = (1 - smoothing) * weight[c]
        g = np.float64(dloss[first + k if dloss.size > 1 else 0])
        q = (every + own) / s
        at = g * (out[p + c] * q - spread * weight[c] - own)
        a, b = splat(x.dtype.type(g * q)), splat(x.dtype.type(g * spread))
        for m in range(0, whole, W):
            store(dx, p + m, load(dx, p + m) * a - b * load(weight, m))
        v = load_part(dx, p + whole, C - whole) * a - b * load_part(weight, whole, C - whole)
        store_part(dx, p + whole, v, C - whole)
        out[p + c] = at


@kernel
def _cross_entropy(x, target, weight, strip, ignore_index, smoothing, losses):
    """Σ loss, Σ weight, number of bad targets: of tasks cut by size, in their order."""
    A, C, B = x.shape
    strips = (B + strip - 1) // strip if B > 1 else 1
    tasks = A * strips if B > 1 else (A + strip - 1) // strip
    parts = np.empty((tasks, 3))
    for t in prange(tasks):
        if B == 1:
            first = t * strip
            part = _losses(x, first * C, C, min(strip, A - first), target, first, weight,
                           ignore_index, smoothing, losses)
        else:
            a, b = t // strips, t % strips * strip
            n = min(strip, B - b)
            rows = np.empty(n * C, x.dtype)
            _gather(x, a * C * B + b, B, C, n, rows)
            part = _losses(rows, 0, C, n, target, a * B + b, weight, ignore_index, smoothing,
                           losses)
        parts[t, 0], parts[t, 1], parts[t, 2] = part
    loss_sum = weight_sum = bad = 0.0
    for t in range(tasks):
        loss_sum += parts[t, 0]
        weight_sum += parts[t, 1]
        bad += parts[t, 2]
    return loss_sum, weight_sum, bad


@kernel
def _cross_entropy_backward(dloss, x, target, weight, strip, ignore_index, smoothing, dx):
    A, C, B = x.shape
    strips = (B + strip - 1) // strip if B > 1 else 1
    tasks = A * strips if B > 1 else (A + strip - 1) // strip
    for t in prange(tasks):
        if B == 1:
            first = t * strip
            _gradients(dloss, x, first * C, C, min(strip, A - first), target, first, weight,
                       ignore_index, smoothing, dx, first * C)
        else:
            a, b = t // strips, t % strips * strip
            n = min(strip, B - b)
            rows = np.empty(n * C, x.dtype)
            _gather(x, a * C * B + b, B, C, n, rows)
            _gradients(dloss, rows, 0, C, n, target, a * B + b, weight, ignore_index, smoothing,
                       rows, 0)
            _scatter(rows, C, n, dx, a * C * B + b, B)


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

    Returns the losses, of the target's shape; their sum; the sum of the targets' weights; whether
    each target is a class or ignored.
    """
    if x.size == 0:
        bad = target.size and ((target != ignore_index).any())
        return np.zeros(target.shape, x.dtype), 0.0, 0.0, not bad
    x, order = _dense(x)
    x3 = _classes(x, order, 1)
    C = x3.shape[1]
    losses = np.empty(target.size, x.dtype)
    loss, weights, bad = _cross_entropy(
        x3, _samples(target, order), _class_weights(weight, C, x.dtype), max(1, TASK // C),
        ignore_index, float(label_smoothing), losses, work=4 * x.nbytes)
    if target.ndim != 1:
        axes = [i - (i > 1) for i in order if i != 1]
        losses = losses.reshape([target.shape[i] for i in axes]).transpose(np.argsort(axes))
    return losses, loss, weights, not bad


def cross_entropy_backward(dloss, x, target, weight, *, ignore_index, label_smoothing):
    """dx = dloss (softmax(x) Σq − q); dloss of the target's shape, or one number for all."""
    x, order = _dense(x)
    dx = empty_like(x)
    if x.size == 0:
        return dx
    x3 = _classes(x, order, 1)
    C = x3.shape[1]
    dloss = dloss if dloss.dtype == x.dtype else dloss.astype(x.dtype)
    _cross_entropy_backward(_samples(dloss, order) if dloss.ndim else dloss.reshape(1), x3,
                            _samples(target, order), _class_weights(weight, C, x.dtype),
                            max(1, TASK // C), ignore_index, float(label_smoothing),
                            _classes(dx, order, 1), work=4 * x.nbytes)
    return dx
