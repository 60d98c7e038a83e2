"""Batch and layer normalization; x of batch_norm is (N, C, *S), statistics are float64. float16
and bfloat16 are read and written as such and computed in float32.

Where what is read can stay on the chip until the statistics are known, batch_norm reads it once
(single.py), and so does its backward (single_backward.py). Otherwise, and for any shape, it takes
two passes over memory. The first finds the statistics, and its last blocks merge them; the second,
backwards, takes from the caches what they still hold. No sum depends on the order in which blocks
run.
"""

import math

import numpy as np

from . import passes, single, single_backward
from .layer_norm import (
    layer_norm,
    layer_norm_backward,
    parameters,
    rms_norm,
    rms_norm_backward,
)
from .layout import alike, ordered
from .memory import empty, empty_like, order_of, xp
from .moments import cut, parts, settled, statistics, tickets
from .passes import ADD, BETA, BY_Y, CENTER, GAMMA, RELU, WRITE

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_backward_elemt",
           "batch_norm_backward_reduce", "batch_norm_elemt", "batch_norm_stats",
           "batch_norm_update", "layer_norm", "layer_norm_backward", "rms_norm",
           "rms_norm_backward"]


def shaped(x):
    """x in dense memory, C-ordered if it was neither that nor channels-last; then whether it is in
    columns, and N, C and S of it: (N, C) with S = 1, or (N, C, S)."""
    N, C, *S = x.shape
    S = math.prod(S)
    if not x.flags.c_contiguous:
        last = 0, *range(2, x.ndim), 1
        if x.transpose(last).flags.c_contiguous:
            return x, (True, N * S, C, 1)
        order = order_of(x)
        copy = ordered(x.shape, x.dtype, last if order and order[-1] == 1 else range(x.ndim))
        copy[...] = x
        return shaped(copy)
    if C == 1:
        return x, (False, 1, 1, N * S)
    return x, (S == 1, N, C, S)


def vector(a):
    """A (C,) array in float64 and one piece."""
    return xp.ascontiguousarray(a.astype(np.float64, copy=False))


def _planned(x, *arrays):
    """x and arrays like it (or None) in the same memory order, and how they are cut."""
    x, (columns, N, C, S) = shaped(x)
    arrays = [None if a is None else alike(a, x) for a in arrays]
    there = [a for a in arrays if a is not None]
    return x, arrays, cut(columns, 1, N, C, S, x.dtype, x, *there)


def _zeros(n, dtype=np.float64, value=0.0):
    out = empty((n,), dtype)
    out.fill(value)
    return out


def _statistics(x, c, eps, params, running=None):
    """mean, var and invstd of x; the running arrays, of dtype ``params`` and in one piece, move."""
    C = x.shape[1]
    stats = [empty((C,), np.float64) for _ in range(3)]
    mean, var, momentum = (None, None, 0.0) if running is None else running
    statistics(x.dtype, params, *c.kind)(c.blocks, x, *stats, *parts(c), tickets(), mean, var,
                                         *c.numbers, eps, momentum, running is not None)
    return stats


def _of_nothing(C, eps):
    return _zeros(C), _zeros(C), _zeros(C, value=1 / math.sqrt(eps) if eps else math.inf)


def batch_norm_stats(x):
    """mean = Σx / n,  var = Σ(x − mean)² / n: float64 (C,); 0 and 0 of nothing. Reads x once."""
    if not x.size:
        return _of_nothing(x.shape[1], 1.0)[:2]
    x, _, c = _planned(x)
    return tuple(_statistics(x, c, 0.0, x.dtype)[:2])


def _normalized(x, residual, c, gamma, beta, params, mean, invstd, relu):
    y = empty_like(x)
    option = (GAMMA * (gamma is not None) | BETA * (beta is not None)
              | ADD * (residual is not None) | RELU * bool(relu))
    passes.normalize(x.dtype, params, *c.kind)(c.blocks, x, residual, gamma, beta, mean, invstd, y,
                                               *c.numbers, 1, 0, 1, option)
    return y


def batch_norm_elemt(x, gamma, beta, mean, invstd, residual=None, *, relu=False):
    """y = (x − mean) invstd γ + β [+ residual], not below 0 with relu."""
    if not x.size:
        return empty_like(x)
    x, (residual,), c = _planned(x, residual)
    mean, invstd = vector(mean), vector(invstd)
    return _normalized(x, residual, c, *parameters(x, gamma, beta), mean, invstd, relu)


def batch_norm(x, gamma, beta, residual=None, *, eps, relu=False, running=None, known=None):
    """y, mean, var, invstd = 1 / √(var + eps), from the statistics of x, or ``known`` = (mean, var)
    that are; y = x̂ γ + β [+ residual], not below 0 with relu. ``running`` = (mean, var, momentum):
    see batch_norm_update."""
    if not x.size:
        return empty_like(x), *_of_nothing(x.shape[1], eps)
    x, (residual,), c = _planned(x, residual)
    gamma, beta, params = parameters(x, gamma, beta)
    inside = running is None or all(a.dtype == params and a.flags.c_contiguous
                                    for a in running[:2])
    moved, found = (running if inside else None), None
    if known is not None:
        mean, var = map(vector, known)
        invstd = settled(mean, var, x.size / x.shape[1], eps, params, moved)
    elif found := single.run(x, residual, gamma, beta, params, c, eps, relu, moved):
        y, mean, var, invstd = found
    else:
        mean, var, invstd = _statistics(x, c, eps, params, moved)
    if not found:
        y = _normalized(x, residual, c, gamma, beta, params, mean, invstd, relu)
    if not inside:
        batch_norm_update(*running[:2], mean, var, momentum=running[2],
                          count=x.size // x.shape[1])
    return y, mean, var, invstd


def batch_norm_update(running_mean, running_var, mean, var, *, momentum, count):
    """In place: running ← (1 − momentum) running + momentum new, var times count / (count − 1)."""
    unbiased = count / (count - 1) if count != 1 else math.inf
    for running, new in ((running_mean, mean), (running_var, var * unbiased)):
        moved = running.astype(np.float64) * (1 - momentum) + new * momentum
        running[...] = moved.astype(running.dtype)


def _sums(dy, x, y, c, gamma, beta, params, mean, invstd, option):
    """Σ g and Σ g x̂, dγ and dβ; g is the masked dy."""
    found = [empty(x.shape[1:2], dtype) for dtype in (np.float64, np.float64, params, params)]
    passes.sums(x.dtype, params, *c.kind)(c.blocks, dy, x, y, gamma, beta, mean, invstd, *found[:2],
                                          *parts(c), tickets(), *found[2:], *c.numbers, 1, 0, 1,
                                          option | WRITE)
    return found


def _gradient(dy, x, y, c, gamma, beta, params, mean, invstd, sums, dz, option):
    dx, n = empty_like(x), x.size // x.shape[1]
    passes.gradient(x.dtype, params, *c.kind)(
        c.blocks, dy, x, y, gamma, beta, mean, invstd, *sums, dx, dz, *c.numbers, 1, 0, 1, n,
        option | CENTER | WRITE * (dz is not None))
    return dx


def _option(gamma, beta, y, relu):
    return (GAMMA * (gamma is not None) | BETA * (beta is not None)
            | (relu and (RELU if y is None else BY_Y)))


def batch_norm_backward_reduce(dy, x, mean, invstd):
    """Σdy and Σ dy x̂: float64 (C,)."""
    if not x.size:
        return _zeros(x.shape[1]), _zeros(x.shape[1])
    x, (dy,), c = _planned(x, dy)
    mean, invstd = vector(mean), vector(invstd)
    return tuple(_sums(dy, x, None, c, None, None, x.dtype, mean, invstd, 0)[:2])


def batch_norm_backward_elemt(dy, x, gamma, mean, invstd, sum_dy, sum_dy_xhat):
    """dx = γ invstd (dy − Σdy / n − x̂ Σ(dy x̂) / n); without the sums, dx = γ invstd dy."""
    if sum_dy is None:
        return batch_norm_elemt(dy, gamma, None, _zeros(x.shape[1]), invstd)
    if not x.size:
        return empty_like(x)
    x, (dy,), c = _planned(x, dy)
    gamma, params = parameters(x, gamma)
    stats = [vector(a) for a in (mean, invstd, sum_dy, sum_dy_xhat)]
    return _gradient(dy, x, None, c, gamma, None, params, *stats[:2], stats[2:], None,
                     _option(gamma, None, None, False))


def batch_norm_backward(dy, x, gamma, mean, invstd, *, beta=None, y=None, relu=False,
                        residual=False):
    """dx, dγ = Σ dy x̂, dβ = Σ dy, and the residual's gradient (None unless ``residual``). dγ and
    dβ have γ's dtype.

    With relu, dy counts where y > 0, or, without y (and no residual), where x̂ γ + β does. The
    residual's gradient is that dy; dy itself without relu."""
    if not x.size:
        C, dtype = x.shape[1], parameters(x, gamma, beta)[-1]
        return (empty_like(x), _zeros(C, dtype), _zeros(C, dtype),
                empty_like(x) if residual else None)
    given = dy
    x, (dy, y), c = _planned(x, dy, y if relu else None)
    gamma, beta, params = parameters(x, gamma, beta)
    mean, invstd = vector(mean), vector(invstd)
    option = _option(gamma, beta, y, relu)
    dz = empty_like(x) if residual and relu else None
    found = single_backward.run(dy, x, y, c, gamma, beta, params, mean, invstd, dz,
                                option | CENTER | WRITE * (dz is not None))
    if found is None:
        given_all = dy, x, y, c, gamma, beta, params, mean, invstd
        *sums, dgamma, dbeta = _sums(*given_all, option)
        dx = _gradient(*given_all, sums, dz, option)
    else:
        dx, dgamma, dbeta = found
    return dx, dgamma, dbeta, given if residual and not relu else dz
