"""Softmax family and cross-entropy by definition, shifted by the maximum."""

import numpy as np

__all__ = ["cross_entropy", "cross_entropy_backward", "log_softmax", "log_softmax_backward",
           "softmax", "softmax_backward"]


def _shifted(x, axis):
    top = x.max(axis=axis, keepdims=True) if x.shape[axis] else 0
    with np.errstate(invalid="ignore"):
        return x - top


def softmax(x, *, axis):
    """y = eˣ / Σ eˣ along axis."""
    e = np.exp(_shifted(x, axis))
    return e / e.sum(axis=axis, keepdims=True)


def log_softmax(x, *, axis):
    """y = x − log Σ eˣ along axis; all −inf gives NaN."""
    d = _shifted(x, axis)
    return d - np.log(np.exp(d).sum(axis=axis, keepdims=True)) if x.size else d


def softmax_backward(dy, y, *, axis):
    """dx = y (dy − Σ dy y)."""
    return y * (dy - (dy * y).sum(axis=axis, keepdims=True))


def log_softmax_backward(dy, y, *, axis):
    """dx = dy − e^y Σ dy."""
    return dy - np.exp(y) * dy.sum(axis=axis, keepdims=True)


def _targets(x, target, weight, ignore_index, label_smoothing):
    """q (N, C, *S), what the loss −Σ q log p weighs each class with; the weight of the target."""
    C = x.shape[1]
    w = np.ones(C, x.dtype) if weight is None else weight.astype(x.dtype)
    kept = target != ignore_index
    safe = np.where(kept, target, 0)
    hot = np.moveaxis(safe[..., None] == np.arange(C), -1, 1)
    w = w.reshape(1, C, *[1] * (x.ndim - 2))
    q = ((1 - label_smoothing) * hot + label_smoothing / max(C, 1)) * w * kept[:, None]
    return q.astype(x.dtype), (hot * w * kept[:, None]).sum(1, dtype=x.dtype)


def cross_entropy(x, target, weight, *, ignore_index, label_smoothing):
    """loss = −Σ_c q_c log softmax(x)_c,  q = w ((1 − s) onehot(target) + s / C); 0 where ignored.

    Returns the losses, of the target's shape; their sum; the sum of the targets' weights; whether
    each target is a class or ignored.
    """
    q, weights = _targets(x, target, weight, ignore_index, label_smoothing)
    with np.errstate(invalid="ignore"):
        terms = np.where(q != 0, q * log_softmax(x, axis=1), 0)
    losses = -terms.sum(1, dtype=x.dtype)
    valid = ((target >= 0) & (target < x.shape[1])) | (target == ignore_index)
    return (losses, float(losses.sum(dtype=np.float64)), float(weights.sum(dtype=np.float64)),
            bool(valid.all()))


def cross_entropy_backward(dloss, x, target, weight, *, ignore_index, label_smoothing):
    """dx = dloss (softmax(x) Σq − q); dloss of the target's shape, or one number for all."""
    dloss = np.broadcast_to(dloss, target.shape)
    q, _ = _targets(x, target, weight, ignore_index, label_smoothing)
    dx = np.empty_like(x)
    dx[...] = dloss[:, None] * (softmax(x, axis=1) * q.sum(1, keepdims=True) - q)
    kept = np.broadcast_to((target != ignore_index)[:, None], x.shape)
    dx[~kept] = 0
    return dx
