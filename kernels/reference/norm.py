"""Batch and layer normalization by definition, in float64, rounded once at the end.

x is (N, C, *S). Statistics are float64 (C,), over every axis but 1; var is the biased one.
x̂ = (x − mean) · invstd,  y = x̂ γ + β.  Ioffe & Szegedy 2015; Ba, Kiros & Hinton 2016.
"""

import math

import numpy as np

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_backward_elemt",
           "batch_norm_backward_reduce", "batch_norm_elemt", "batch_norm_stats",
           "batch_norm_update", "layer_norm", "layer_norm_backward", "rms_norm",
           "rms_norm_backward"]


def _per_channel(a, x):
    """A (C,) array shaped to broadcast against x (N, C, *S)."""
    return np.asarray(a, np.float64).reshape(1, -1, *[1] * (x.ndim - 2))


def _axes(x):
    return (0, *range(2, x.ndim))


def _count(x):
    return x.size // x.shape[1] if x.shape[1] else 0


def _scale(gamma, n):
    return np.ones(n) if gamma is None else np.asarray(gamma, np.float64)


def batch_norm_stats(x):
    """mean = Σx / n,  var = Σ(x − mean)² / n;  0 and 0 of nothing."""
    n, x = max(_count(x), 1), x.astype(np.float64)
    with np.errstate(all="ignore"):
        pivot = x[:1, :, *[slice(0, 1)] * (x.ndim - 2)] if x.size else 0.0
        pivot = np.where(np.isfinite(pivot), pivot, 0.0)     # a constant channel's mean is exact
        mean = (pivot + (x - pivot).sum(_axes(x), keepdims=True) / n).reshape(-1)
        var = ((x - _per_channel(mean, x)) ** 2).sum(_axes(x)) / n
    return mean, var


def batch_norm_elemt(x, gamma, beta, mean, invstd, residual=None, *, relu=False):
    """y = (x − mean) invstd γ + β [+ residual], not below 0 with relu."""
    C = x.shape[1]
    shift = np.zeros(C) if beta is None else beta
    with np.errstate(all="ignore"):
        xhat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
        y = xhat * _per_channel(_scale(gamma, C), x) + _per_channel(shift, x)
        if residual is not None:
            y = y + residual
        return (np.maximum(y, 0) if relu else y).astype(x.dtype)


def batch_norm_backward_reduce(dy, x, mean, invstd):
    """Σdy and Σ dy x̂."""
    dy = dy.astype(np.float64)
    with np.errstate(all="ignore"):
        xhat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
        return dy.sum(_axes(x)), (dy * xhat).sum(_axes(x))


def batch_norm_backward_elemt(dy, x, gamma, mean, invstd, sum_dy, sum_dy_xhat):
    """dx = γ invstd (dy − Σdy / n − x̂ Σ(dy x̂) / n); without the sums, dx = γ invstd dy."""
    n = max(_count(x), 1)
    with np.errstate(all="ignore"):
        d = dy.astype(np.float64)
        if sum_dy is not None:
            xhat = (x - _per_channel(mean, x)) * _per_channel(invstd, x)
            d = d - _per_channel(sum_dy, x) / n - xhat * (_per_channel(sum_dy_xhat, x) / n)
        scale = _per_channel(_scale(gamma, x.shape[1]), x) * _per_channel(invstd, x)
        return (d * scale).astype(x.dtype)


def batch_norm(x, gamma, beta, residual=None, *, eps, relu=False, running=None, known=None):
    """y, mean, var, invstd = 1 / √(var + eps), from the statistics of x, or ``known`` = (mean, var)
    that are; y = x̂ γ + β [+ residual], not below 0 with relu. ``running`` = (mean, var, momentum):
    see batch_norm_update."""
    mean, var = batch_norm_stats(x) if known is None else known
    with np.errstate(all="ignore"):
        invstd = 1 / np.sqrt(var + eps)
    if running is not None:
        batch_norm_update(*running[:2], mean, var, momentum=running[2], count=_count(x))
    return batch_norm_elemt(x, gamma, beta, mean, invstd, residual, relu=relu), mean, var, invstd


def batch_norm_backward(dy, x, gamma, mean, invstd, *, beta=None, y=None, relu=False,
                        residual=False):
    """dx, dγ = Σ dy x̂, dβ = Σ dy, and the residual's gradient (None unless ``residual``).

    With relu, dy counts where y > 0, or, without y (and no residual), where x̂ γ + β does. The
    residual's gradient is that dy; dy itself without relu."""
    if relu:
        seen = batch_norm_elemt(x, gamma, beta, mean, invstd) if y is None else y
        dy = np.where(seen > 0, dy, np.zeros((), dy.dtype))
    sums = batch_norm_backward_reduce(dy, x, mean, invstd)
    dx = batch_norm_backward_elemt(dy, x, gamma, mean, invstd, *sums)
    return dx, sums[1].astype(x.dtype), sums[0].astype(x.dtype), dy if residual else None


def _rows(x, dims):
    shape = x.shape[x.ndim - dims:]
    return x.reshape(math.prod(x.shape[:x.ndim - dims]), math.prod(shape))


def layer_norm(x, gamma, beta, *, dims, eps):
    """y = x̂ γ + β with the statistics of each row (the last dims axes); mean, invstd: (rows,)."""
    shape, rows = x.shape[x.ndim - dims:], _rows(x, dims).T    # a row is a channel of (D, rows)
    mean, var = batch_norm_stats(rows)
    with np.errstate(all="ignore"):
        invstd = 1 / np.sqrt(var + eps)
        y = ((rows - mean) * invstd).T * _scale(gamma, shape).reshape(1, -1)
        y = y.reshape(x.shape) + (0.0 if beta is None else beta)
    out = np.empty_like(x)
    out[...] = y
    return out, mean, invstd


def layer_norm_backward(dy, x, gamma, mean, invstd, *, dims):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂, dβ = Σ dy over rows."""
    shape = x.shape[x.ndim - dims:]
    d, gain = _rows(dy, dims).astype(np.float64), _scale(gamma, shape).reshape(1, -1)
    with np.errstate(all="ignore"):
        xhat = (_rows(x, dims) - mean[:, None]) * invstd[:, None]
        n = max(d.shape[1], 1)
        a, b = (d * gain).sum(1, keepdims=True) / n, (d * gain * xhat).sum(1, keepdims=True) / n
        dx = np.empty_like(x)
        dx[...] = ((d * gain - a - xhat * b) * invstd[:, None]).reshape(x.shape)
        sums = ((d * xhat).sum(0), d.sum(0))
    return dx, *(s.reshape(shape).astype(x.dtype) for s in sums)


def rms_norm(x, gamma, *, dims, eps):
    """y = x / rms γ with rms = √(mean(x²) + eps) of each row (the last dims axes);
    invrms: (rows,)."""
    shape, rows = x.shape[x.ndim - dims:], _rows(x, dims).astype(np.float64)
    with np.errstate(all="ignore"):
        invrms = 1 / np.sqrt((rows * rows).sum(1) / max(rows.shape[1], 1) + eps)
        y = rows * invrms[:, None] * _scale(gamma, shape).reshape(1, -1)
        out = np.empty_like(x)
        out[...] = y.reshape(x.shape)
    return out, invrms


def rms_norm_backward(dy, x, gamma, invrms, *, dims):
    """dx = invrms (g − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂ over rows."""
    shape = x.shape[x.ndim - dims:]
    d, gain = _rows(dy, dims).astype(np.float64), _scale(gamma, shape).reshape(1, -1)
    with np.errstate(all="ignore"):
        xhat = _rows(x, dims) * invrms[:, None]
        b = (d * gain * xhat).sum(1, keepdims=True) / max(d.shape[1], 1)
        dx = np.empty_like(x)
        dx[...] = ((d * gain - xhat * b) * invrms[:, None]).reshape(x.shape)
        return dx, (d * xhat).sum(0).reshape(shape).astype(x.dtype)


def batch_norm_update(running_mean, running_var, mean, var, *, momentum, count):
    """In place: running ← (1 − momentum) running + momentum new, var times count / (count − 1)."""
    with np.errstate(all="ignore"):
        running_mean[...] = (1 - momentum) * running_mean + momentum * mean
        running_var[...] = (1 - momentum) * running_var + momentum * (var * (count / (count - 1)))
