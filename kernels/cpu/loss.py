"""Cross-entropy of rows of classes, forward and backward, from the exponentials of ``softmax``.

Where classes are not next to each other, rows are gathered into a strip and put back.
"""

from functools import lru_cache

import numpy as np

from ..polynomials import log_above_one
from .columns import inner
from .jit import kernel, prange
from .memory import empty_like
from .simd import (
    fill,
    keep,
    lanes,
    load,
    load_part,
    peak,
    pointer,
    store,
    store_part,
    total,
    where,
)
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


@inner
def _gather(x, i, B, C, n, rows):
    """n rows whose classes are B apart, one after the other."""
    for c in range(C):
        for r in range(n):
            rows[r * C + c] = x[i + c * B + r]


@inner
def _scatter(rows, C, n, x, i, B):
    for c in range(C):
        for r in range(n):
            x[i + c * B + r] = rows[r * C + c]


@inner
def _smooth(x, i, C, weight, shift):
    """Σ w (shift − x) over the classes of weight."""
    W, s = lanes(x), 0.0
    zero, whole, by = fill(x, 0), C // W * W, fill(x, shift)
    for k in range(0, whole, W):
        w = load(weight, k)
        s += total(where(w != zero, w * (by - load(x, i + k)), zero))
    w = load_part(weight, whole, C - whole)
    return s + total(where(w != zero, w * (by - load_part(x, i + whole, C - whole)), zero))


@inner
def _losses(x, i, C, n, target, first, weight, ignore_index, smoothing, losses, room):
    """Of n rows from x[i]: Σ loss, Σ weight of the target, and how many targets are no class."""
    loss_sum, weight_sum, bad = 0.0, 0.0, 0
    for k in range(n):
        r, j, c = first + k, i + k * C, target[first + k]
        losses[r] = 0
        if c == ignore_index:
            continue
        if c < 0 or c >= C:
            bad += 1
            continue
        top = _top(x, j, C)
        s = peak(log_above_one(fill(x, _exponentials(x, j, C, top, room, 0))))
        w = weight[c]
        loss = (1 - smoothing) * w * (s - (x[j + c] - top)) if w != 0 else 0.0
        if smoothing > 0:
            loss += smoothing / C * _smooth(x, j, C, weight, s + top)
        losses[r] = loss
        loss_sum += loss
        weight_sum += w
    return loss_sum, weight_sum, bad


@inner
def _gradients(dloss, each, x, i, C, n, target, first, weight, ignore_index, smoothing, dx, o):
    """Of n rows from x[i] into dx[o], ``each`` with a dloss of its own or not; a target that is no
    class counts as ignored."""
    W, spread, every = lanes(x), smoothing / C, 0.0
    if smoothing > 0:
        for c in range(C):
            every += spread * weight[c]
    whole = C // W * W
    for k in range(n):
        j, p, c = i + k * C, o + k * C, target[first + k]
        if c == ignore_index or c < 0 or c >= C:
            for m in range(p, p + C):
                dx[m] = 0
            continue
        s = _exponentials(x, j, C, _top(x, j, C), dx, p)
        own = (1 - smoothing) * weight[c]
        g = np.float64(dloss[first + k if each else 0])
        q = (every + own) / s
        at = g * (dx[p + c] * q - spread * weight[c] - own)
        a, b = fill(x, q), fill(x, spread)
        for m in range(0, whole, W):
            store(dx, p + m, (load(dx, p + m) * a - b * load(weight, m)) * fill(x, g))
        if whole < C:
            v = load_part(dx, p + whole, C - whole) * a - b * load_part(weight, whole, C - whole)
            store_part(dx, p + whole, v * fill(x, g), C - whole)
        dx[p + c] = at


@kernel
def _cross_entropy(x, target, weight, strip, ignore_index, smoothing, losses):
    """Σ loss, Σ weight, number of bad targets: of tasks cut by size, in their order."""
    A, C, B = x.shape
    strips = (B + strip - 1) // strip if B > 1 else 1
    tasks = A * strips if B > 1 else (A + strip - 1) // strip
    parts = np.empty((tasks, 3))
    for t in prange(tasks):
        room = np.empty(C, x.dtype)
        if B == 1:
            first = t * strip
            part = _losses(pointer(x), first * C, C, min(strip, A - first), pointer(target), first,
                           pointer(weight), ignore_index, smoothing, pointer(losses),
                           pointer(room))
        else:
            a, b = t // strips, t % strips * strip
            n = min(strip, B - b)
            rows = np.empty(n * C, x.dtype)
            _gather(pointer(x), a * C * B + b, B, C, n, pointer(rows))
            part = _losses(pointer(rows), 0, C, n, pointer(target), a * B + b, pointer(weight),
                           ignore_index, smoothing, pointer(losses), pointer(room))
            keep(rows)
        keep(room)
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
            _gradients(pointer(dloss), dloss.size > 1, pointer(x), first * C, C,
                       min(strip, A - first), pointer(target), first, pointer(weight),
                       ignore_index, smoothing, pointer(dx), first * C)
        else:
            a, b = t // strips, t % strips * strip
            n = min(strip, B - b)
            rows = np.empty(n * C, x.dtype)
            _gather(pointer(x), a * C * B + b, B, C, n, pointer(rows))
            _gradients(pointer(dloss), dloss.size > 1, pointer(rows), 0, C, n, pointer(target),
                       a * B + b, pointer(weight), ignore_index, smoothing, pointer(rows), 0)
            _scatter(pointer(rows), C, n, pointer(dx), a * C * B + b, B)
            keep(rows)


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
