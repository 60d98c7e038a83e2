"""Batch and layer normalization. x is (N, C, *S); sums and statistics are float64.

A channel of equal values gives exactly β at any size and offset, and results do not depend on the
number of threads.
"""

import math

import numpy as np

from .batch_norm import BLOCK, LANES, backward, flat, flat_as, forward, layout, vector
from .columns import add, add_squares, total
from .jit import kernel, prange
from .memory import empty_like

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_backward_elemt",
           "batch_norm_backward_reduce", "batch_norm_elemt", "batch_norm_stats",
           "batch_norm_update", "layer_norm", "layer_norm_backward"]


def _channels(*arrays):
    """Statistics as contiguous float64 that may be written: kernels take them as outputs too."""
    return [a if a.dtype == np.float64 and a.flags.carray else np.array(a, np.float64)
            for a in arrays]


def _run_forward(x, gamma, beta, eps, stats, *, collect, apply):
    """Lay x out, run the kernel, return y in x's memory order (None unless apply)."""
    x, plan, rows = layout(x)
    y = empty_like(x) if apply else None
    out = flat(y, rows) if apply else vector(None, x.dtype)
    if x.size:
        forward(flat(x, rows), vector(gamma, x.dtype), vector(beta, x.dtype), eps, plan,
                 plan.blocks * plan.tiles, collect, out, *stats, work=2 * x.nbytes)
    return y


def _new_stats(x, eps):
    mean, var, invstd = np.empty((3, x.shape[1]))
    if x.size == 0:
        mean[:], var[:] = 0, 0
        invstd[:] = 1 / math.sqrt(eps) if eps else math.inf
    return mean, var, invstd


def batch_norm_stats(x):
    """mean = Σx / n,  var = Σ(x − mean)² / n: float64 (C,); 0 and 0 of nothing. Reads x once."""
    stats = _new_stats(x, 1.0)
    _run_forward(x, None, None, 1.0, stats, collect=True, apply=False)
    return stats[:2]


def batch_norm_elemt(x, gamma, beta, mean, invstd):
    """y = (x − mean) invstd γ + β."""
    mean, invstd = _channels(mean, invstd)
    return _run_forward(x, gamma, beta, 1.0, (mean, mean, invstd), collect=False, apply=True)


def batch_norm(x, gamma, beta, *, eps):
    """y, mean, var, invstd = 1 / √(var + eps), from the statistics of x. Reads x twice."""
    stats = _new_stats(x, eps)
    return _run_forward(x, gamma, beta, eps, stats, collect=True, apply=True), *stats


def _run_backward(dy, x, gamma, mean, invstd, sums, *, collect, apply):
    x, plan, rows = layout(x)
    dx = empty_like(x) if apply else None
    out = flat(dx, rows) if apply else vector(None, x.dtype)
    if x.size:
        dy = dy if dy.dtype == x.dtype else dy.astype(x.dtype)
        backward(flat_as(dy, x, rows), flat(x, rows), vector(gamma, x.dtype), mean, invstd, plan,
                  plan.blocks * plan.tiles, collect, *sums, out, work=3 * x.nbytes)
    return dx


def batch_norm_backward_reduce(dy, x, mean, invstd):
    """Σdy and Σ dy x̂: float64 (C,)."""
    sums = np.zeros((2, x.shape[1]))
    _run_backward(dy, x, None, *_channels(mean, invstd), sums, collect=True, apply=False)
    return sums[0], sums[1]


def batch_norm_backward_elemt(dy, x, gamma, mean, invstd, sum_dy, sum_dy_xhat):
    """dx = γ invstd (dy − Σdy / n − x̂ Σ(dy x̂) / n); without the sums, dx = γ invstd dy."""
    if sum_dy is None:
        mean = np.zeros(x.shape[1])
        return batch_norm_elemt(dy, gamma, None, mean, invstd)
    sums = _channels(sum_dy, sum_dy_xhat)
    return _run_backward(dy, x, gamma, *_channels(mean, invstd), sums, collect=False, apply=True)


def batch_norm_backward(dy, x, gamma, mean, invstd):
    """dx, dγ = Σ dy x̂, dβ = Σ dy. Reads x and dy twice."""
    sums = np.zeros((2, x.shape[1]))
    dx = _run_backward(dy, x, gamma, *_channels(mean, invstd), sums, collect=True, apply=True)
    dbeta, dgamma = sums.astype(x.dtype)
    return dx, dgamma, dbeta


def _gain(a, shape, dtype, missing):
    """γ or β as one axis; ones or zeros for None."""
    D = math.prod(shape)
    return np.full(D, missing, dtype) if a is None else np.ascontiguousarray(a, dtype).reshape(D)


@kernel
def _layer_forward(x, gamma, beta, eps, block, y, mean, invstd):
    """Each row of x (R, D): statistics, then y = (x − mean) invstd γ + β."""
    R, D = x.shape
    for b in prange((R + block - 1) // block):
        pivot, acc = np.empty(min(D, LANES)), np.empty(min(D, LANES))
        for r in range(b * block, min(R, (b + 1) * block)):
            row, out = x[r], y[r]
            m = np.float64(row[0]) if np.isfinite(row[0]) else 0.0
            pivot[:] = m
            acc[:] = 0.0
            add(row, pivot, acc)
            m += total(acc) / D
            pivot[:] = m
            acc[:] = 0.0
            add_squares(row, pivot, acc)
            s = 1.0 / math.sqrt(total(acc) / D + eps)
            mean[r], invstd[r] = m, s
            for j in range(D):
                out[j] = (row[j] - m) * s * gamma[j] + beta[j]


def layer_norm(x, gamma, beta, *, dims, eps):
    """y = x̂ γ + β with the statistics of each row (the last dims axes); mean, invstd: (rows,)."""
    lead, shape = x.shape[:x.ndim - dims], x.shape[x.ndim - dims:]
    R, D = math.prod(lead), math.prod(shape)
    mean, invstd = np.zeros(R), np.full(R, 1 / math.sqrt(eps) if eps else math.inf)
    y = empty_like(x)
    if x.size:
        rows = np.ascontiguousarray(x).reshape(R, D)
        out = y.reshape(R, D) if y.flags.c_contiguous else empty_like(rows)
        _layer_forward(rows, _gain(gamma, shape, x.dtype, 1), _gain(beta, shape, x.dtype, 0), eps,
                       max(1, BLOCK // D), out, mean, invstd, work=2 * x.nbytes)
        if not y.flags.c_contiguous:
            y[...] = out.reshape(x.shape)
    return y, mean, invstd


@kernel
def _layer_backward(dy, x, gamma, mean, invstd, block, dx, dgamma, dbeta):
    """Rows of dx, and the sums dγ and dβ of each block of rows."""
    R, D = x.shape
    for b in prange((R + block - 1) // block):
        d, xhat, product = np.empty(D), np.empty(D), np.empty(D)
        zero = np.zeros(min(D, LANES))
        acc_d, acc_x = np.empty(min(D, LANES)), np.empty(min(D, LANES))
        sum_x, sum_d = dgamma[b], dbeta[b]
        sum_x[:] = 0.0
        sum_d[:] = 0.0
        for r in range(b * block, min(R, (b + 1) * block)):
            m, s, row_dy, row_x, out = mean[r], invstd[r], dy[r], x[r], dx[r]
            for j in range(D):
                xhat[j] = (row_x[j] - m) * s
                d[j] = row_dy[j]
                sum_x[j] += d[j] * xhat[j]
                sum_d[j] += d[j]
                d[j] *= gamma[j]
                product[j] = d[j] * xhat[j]
            acc_d[:] = 0.0
            acc_x[:] = 0.0
            add(d, zero, acc_d)
            add(product, zero, acc_x)
            a, c = total(acc_d) / D, total(acc_x) / D
            for j in range(D):
                out[j] = (d[j] - a - xhat[j] * c) * s


def layer_norm_backward(dy, x, gamma, mean, invstd, *, dims):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂, dβ = Σ dy over rows."""
    shape = x.shape[x.ndim - dims:]
    D = math.prod(shape)
    dx = empty_like(x)
    if x.size == 0:
        return dx, np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    rows = np.ascontiguousarray(x).reshape(-1, D)
    block = max(64, BLOCK // D)
    sums = np.empty((2, -(-len(rows) // block), D))
    out = dx.reshape(rows.shape) if dx.flags.c_contiguous else empty_like(rows)
    _layer_backward(np.ascontiguousarray(dy, x.dtype).reshape(rows.shape), rows,
                    _gain(gamma, shape, x.dtype, 1), *_channels(mean, invstd), block, out, *sums,
                    work=3 * x.nbytes)
    if not dx.flags.c_contiguous:
        dx[...] = out.reshape(x.shape)
    return dx, *(s.reshape(shape).astype(x.dtype) for s in sums.sum(1))


@kernel
def _update(running_mean, running_var, mean, var, momentum, unbiased):
    keep = 1 - momentum
    for c in range(mean.size):
        running_mean[c] = keep * running_mean[c] + momentum * mean[c]
        running_var[c] = keep * running_var[c] + momentum * (var[c] * unbiased)


def batch_norm_update(running_mean, running_var, mean, var, *, momentum, count):
    """In place: running ← (1 − momentum) running + momentum new, var times count / (count − 1)."""
    _update(running_mean, running_var, mean, var, float(momentum), count / (count - 1))
