"""Cross-entropy of rows of classes, forward and backward, from the exponentials of ``softmax``.

Where classes are not next to each other, rows are gathered into a strip and put back.
"""

from functools import lru_cache

import numpy as np

from ..polynomials import log_above_one
from .columns import inner
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
    task_count,
)
from .tasks import share, tasks

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


@inner
def _rows_of(t, x, strip):
    """Of task t: its first row in the order of targets, how many rows, and where they begin."""
    A, C, B = x.shape
    if B == 1:
        return t * strip, min(strip, A - t * strip), t * strip * C
    strips = (B + strip - 1) // strip
    a, b = t // strips, t % strips * strip
    return a * B + b, min(strip, B - b), a * C * B + b


@inner
def _losses_task(t, x, target, weight, strip, ignore_index, smoothing, losses, parts):
    C, B = x.shape[1:]
    first, n, at = _rows_of(t, x, strip)
    room, rows = np.empty(C, x.dtype), np.empty(0 if B == 1 else n * C, x.dtype)
    values = pointer(x)
    if B > 1:
        _gather(values, at, B, C, n, pointer(rows))
        values, at = pointer(rows), 0
    parts[t, 0], parts[t, 1], parts[t, 2] = _losses(
        values, at, C, n, pointer(target), first, pointer(weight), ignore_index, smoothing,
        pointer(losses), pointer(room))
    keep(rows)
    keep(room)


@tasks
def _cross_entropy(run, x, target, weight, strip, ignore_index, smoothing, losses):
    """Σ loss, Σ weight, number of bad targets: of tasks cut by size, in their order."""
    n = task_count(x, strip)
    parts = np.empty((n, 3))
    share(_losses_task, n, run, (x, target, weight, strip, ignore_index, smoothing, losses, parts))
    loss_sum = weight_sum = bad = 0.0
    for t in range(n):
        loss_sum += parts[t, 0]
        weight_sum += parts[t, 1]
        bad += parts[t, 2]
    return loss_sum, weight_sum, bad


@inner
def _gradients_task(t, dloss, x, target, weight, strip, ignore_index, smoothing, dx):
    C, B = x.shape[1:]
    first, n, at = _rows_of(t, x, strip)
    rows = np.empty(0 if B == 1 else n * C, x.dtype)
    values, slopes, start = pointer(x), pointer(dx), at
    if B > 1:
        _gather(values, at, B, C, n, pointer(rows))
        values, slopes, start = pointer(rows), pointer(rows), 0
    _gradients(pointer(dloss), dloss.size > 1, values, start, C, n, pointer(target), first,
               pointer(weight), ignore_index, smoothing, slopes, start)
    if B > 1:
        _scatter(slopes, C, n, pointer(dx), at, B)
    keep(rows)


@tasks
def _cross_entropy_backward(run, dloss, x, target, weight, strip, ignore_index, smoothing, dx):
    share(_gradients_task, task_count(x, strip), run,
          (dloss, x, target, weight, strip, ignore_index, smoothing, dx))


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
