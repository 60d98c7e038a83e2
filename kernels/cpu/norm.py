"""Batch and layer normalization. x is (N, C, *S); statistics are float64.

A channel of equal values gives exactly β at any size and offset, and results do not depend on the
number of threads.
"""

import math
from functools import lru_cache

import numpy as np

from .batch_norm import backward, forward, plan
from .columns import ADD, BY_X, BY_Y, PAST, RELU, WRITE
from .jit import kernel
from .layer_norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from .memory import empty, empty_like

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_backward_elemt",
           "batch_norm_backward_reduce", "batch_norm_elemt", "batch_norm_stats",
           "batch_norm_update", "layer_norm", "layer_norm_backward", "rms_norm",
           "rms_norm_backward"]

STREAM_BYTES = 3 << 23     # 24 MB: arrays that take more together leave a 32 MB cache, and results
                           # are stored past it
_NONE = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}


def _contiguous(shape, strides, step):
    if 0 in shape:
        return True
    for n, s in zip(shape[::-1], strides[::-1]):
        if n != 1 and s != step:
            return False
        step *= n
    return True


@lru_cache(1 << 12)
def _order(shape, strides, itemsize):
    """Axes in their order in memory (None if they are), the plan, and PAST if its vectors may be
    stored past the caches. None if x is not dense."""
    N, C, *S = shape
    S, axes = math.prod(S), None
    if not _contiguous(shape, strides, itemsize):
        axes = 0, *range(2, len(shape)), 1
        if not _contiguous([shape[i] for i in axes], [strides[i] for i in axes], itemsize):
            return None
        N, S = N * S, 1
    how = plan(N, C, S, itemsize) if N * C * S else None
    return axes, how, PAST if how is not None and how[-1] else 0


def _dense(x):
    """x, or a copy of it, and what _order says."""
    order = _order(x.shape, x.strides, x.itemsize)
    if order is not None:
        return x, order
    dense = empty_like(x)
    if _order(dense.shape, dense.strides, dense.itemsize) is None:
        dense = empty(x.shape, x.dtype)
    dense[...] = x
    return dense, _order(dense.shape, dense.strides, dense.itemsize)


def _past(x, arrays, past):
    """PAST where so many arrays like x are more than a cache holds."""
    return past if arrays * x.nbytes > STREAM_BYTES else 0


def _flat(x, axes):
    """The memory of a dense x as one axis."""
    return x.ravel() if axes is None else x.transpose(axes).ravel()


def _flat_as(a, x, axes):
    """The values of ``a``, which has x's shape, in the order of x's memory."""
    if a is x:
        return _flat(x, axes)
    if a.dtype != x.dtype or a.strides != x.strides:
        order = _order(a.shape, a.strides, x.itemsize) if a.dtype == x.dtype else None
        if order is None or order[0] != axes:
            copy = empty_like(x)
            copy[...] = a
            a = copy
    return _flat(a, axes)


def _vector(a, dtype):
    """A (C,) array of that dtype; an empty one stands for None."""
    if a is None:
        return _NONE[dtype]
    return a if a.dtype is dtype and a.flags.c_contiguous else np.ascontiguousarray(a, dtype)


def _writable(a, dtype):
    """One contiguous (C,) array of that dtype, copied where need be; kernels are compiled once."""
    return a if a.dtype == dtype and a.flags.carray else np.array(a, dtype)


def _lost(var, invstd, eps):
    """The channels for which float32 is not enough, by the rule of ``lost`` in batch_norm.py."""
    with np.errstate(all="ignore"):
        bad = (invstd < 1e-12) | (invstd > 1e12) | ~(var < math.inf)
        return np.flatnonzero(bad | (eps < 1e-20) & (var < 1e-30))


def _calm(a, bad):
    """A copy of ``a`` (N, C, *S) with harmless values in the bad channels."""
    out = empty_like(a)
    out[...] = a
    N, _, *S = a.shape
    out[:, bad] = (np.arange(N * math.prod(S)) % 2).reshape(N, 1, *S)
    return out


def _of(bad, *arrays):
    """The bad channels of arrays (C,) and (N, C, *S), in float64."""
    return [None if a is None else (a[bad] if a.ndim == 1 else a[:, bad]).astype(np.float64)
            for a in arrays]


def _put(bad, whole, part):
    """``part`` into those channels of ``whole``, rounded."""
    if whole is not None and part is not None:
        with np.errstate(all="ignore"):
            whole[(slice(None),) * (whole.ndim > 1) + (bad,)] = part


def _run_forward(x, gamma, beta, residual, stats, eps=1.0, relu=False, running=None, *, collect,
                 known=False, apply=True):
    """y (None unless apply), and stats, if collect; the last from the others, if known. Channels
    that overflow float32 are done in float64."""
    x, (axes, how, past) = _dense(x)
    dtype, none = x.dtype, _NONE[x.dtype]
    y = empty_like(x) if apply else none
    if not x.size:
        return y
    past = _past(x, 2 + (residual is not None), past)
    option = relu * RELU | (residual is not None) * ADD | past
    mean, var, momentum = (none, none, 0.0) if running is None else running
    if forward(_flat(x, axes), none if residual is None else _flat_as(residual, x, axes),
               _vector(gamma, dtype), _vector(beta, dtype), mean, var, momentum, eps, how, collect,
               known, option, _flat(y, axes) if apply else y, *stats, work=3 * x.nbytes):
        y = _forward_apart(x, gamma, beta, residual, stats, eps, relu, collect or known, apply)
        _run_update(running, stats, x)
    return y


def _forward_apart(x, gamma, beta, residual, stats, eps, relu, collect, apply):
    """The bad channels in float64 and the others as if those were not there: to the same bits."""
    bad = _lost(stats[1], stats[2], eps) if collect else _lost(stats[2], stats[2], 1.0)
    own = [np.empty(bad.size) for _ in stats] if collect else _of(bad, *stats)
    how = {"relu": relu, "collect": collect, "apply": apply}
    part = _run_forward(*_of(bad, x, gamma, beta, residual), own, eps, **how)
    calm = stats if collect else [a.copy() for a in stats]
    y = empty_like(x) if apply else None
    if bad.size < stats[0].size:
        if not collect:
            calm[0][bad], calm[2][bad] = 0.0, 1.0
        y = _run_forward(_calm(x, bad), gamma, beta, residual, calm, eps, **how)
    if apply:
        _put(bad, y, part)
    for whole, values in zip(stats, own) if collect else ():
        whole[bad] = values
    return y


def _run_update(running, stats, x):
    if running is not None:
        mean, var, momentum = running
        batch_norm_update(mean, var, *stats[:2], momentum=momentum, count=x.size // x.shape[1])


def _new_stats(x, eps):
    C = x.shape[1]
    if x.size:
        return np.empty(C), np.empty(C), np.empty(C)
    return np.zeros(C), np.zeros(C), np.full(C, 1 / math.sqrt(eps) if eps else math.inf)


def batch_norm_stats(x):
    """mean = Σx / n,  var = Σ(x − mean)² / n: float64 (C,); 0 and 0 of nothing. Reads x once."""
    stats = _new_stats(x, 1.0)
    _run_forward(x, None, None, None, stats, 0.0, collect=True, apply=False)
    return stats[0], stats[1]


def batch_norm_elemt(x, gamma, beta, mean, invstd, residual=None, *, relu=False):
    """y = (x − mean) invstd γ + β [+ residual], not below 0 with relu."""
    mean, invstd = _writable(mean, np.float64), _writable(invstd, np.float64)
    stats = mean, mean, invstd
    return _run_forward(x, gamma, beta, residual, stats, relu=relu, collect=False)


def batch_norm(x, gamma, beta, residual=None, *, eps, relu=False, running=None, known=None):
    """y, mean, var, invstd = 1 / √(var + eps), from the statistics of x; y = x̂ γ + β [+ residual],
    not below 0 with relu. ``running`` = (mean, var, momentum): see batch_norm_update.

    Reads x twice; the second time from a cache, if a channel or all of x fits. Once with ``known``
    = (mean, var) of x, float64 (C,)."""
    eps, stats = float(eps), _new_stats(x, eps)           # one type: kernels are compiled once
    if known is not None and x.size:
        stats = *(a.copy() for a in known), stats[2]
    how = {"collect": known is None, "known": known is not None}
    if running is not None:
        running = *running[:2], float(running[2])
    if running is not None and not (running[0].flags.carray and running[1].flags.carray):
        y = _run_forward(x, gamma, beta, residual, stats, eps, relu, **how)
        _run_update(running, stats, x)
    else:
        y = _run_forward(x, gamma, beta, residual, stats, eps, relu, running, **how)
    return y, *stats


def _run_backward(dy, x, gamma, mean, invstd, sums, *, beta=None, y=None, relu=False, written=False,
                  collect=True, apply=True):
    """dx, dγ, dβ and the masked dy, if ``written``, else None. Channels that overflow float32 are
    done in float64."""
    x, (axes, how, past) = _dense(x)
    dtype, none = x.dtype, _NONE[x.dtype]
    dx, dz = empty_like(x) if apply else none, empty_like(x) if written else none
    dgamma, dbeta = np.empty(x.shape[1], dtype), np.empty(x.shape[1], dtype)
    flat = _flat(x, axes)
    option = relu * (BY_X if y is None else BY_Y) | written * WRITE
    option |= _past(x, 3 + (y is not None) + written, past)
    if backward(flat, _flat_as(dy, x, axes), flat if y is None else _flat_as(y, x, axes),
                _vector(gamma, dtype), _vector(beta, dtype), _writable(mean, np.float64),
                _writable(invstd, np.float64), how, collect, option,
                _flat(dz, axes) if written else none, *sums, dgamma, dbeta,
                _flat(dx, axes) if apply else none, work=3 * x.nbytes):
        if relu and y is None:
            y = batch_norm_elemt(x, gamma, beta, mean, invstd, relu=True)
        bad = _lost(invstd, invstd, 1.0)
        if not bad.size:
            bad = np.flatnonzero(~(abs(sums[0]) + abs(sums[1]) < math.inf))
        return _backward_apart(dy, x, gamma, mean, invstd, sums, bad, y=y, relu=relu,
                               written=written, collect=collect, apply=apply)
    return dx, dgamma, dbeta, dz if written else None


def _backward_apart(dy, x, gamma, mean, invstd, sums, bad, y, **how):
    """The bad channels in float64 and the others as if those were not there: to the same bits."""
    own = _of(bad, *sums)
    part = _run_backward(*_of(bad, dy, x, gamma, mean, invstd), own, y=_of(bad, y)[0], **how)
    C, like = mean.size, empty_like(x)
    found = like, np.empty(C, x.dtype), np.empty(C, x.dtype), empty_like(x)
    if bad.size < C:
        calm = [a if a is None else _calm(a, bad) for a in (dy, x)]
        mean, invstd, given = mean.copy(), invstd.copy(), [a.copy() for a in sums]
        mean[bad], invstd[bad] = 0.0, 1.0
        found = _run_backward(*calm, gamma, mean, invstd, given, y=y, **how)
        for whole, values in zip(sums, given):
            whole[...] = values
    for whole, values in zip(found, part):
        if values is not None and values.size:
            _put(bad, whole, values)
    for whole, values in zip(sums, own):
        whole[bad] = values
    return found[0] if how["apply"] else None, *found[1:3], found[3] if how["written"] else None


def batch_norm_backward_reduce(dy, x, mean, invstd):
    """Σdy and Σ dy x̂: float64 (C,)."""
    sums = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    if x.size:
        _run_backward(dy, x, None, mean, invstd, sums, apply=False)
    return sums


def batch_norm_backward_elemt(dy, x, gamma, mean, invstd, sum_dy, sum_dy_xhat):
    """dx = γ invstd (dy − Σdy / n − x̂ Σ(dy x̂) / n); without the sums, dx = γ invstd dy."""
    if sum_dy is None:
        return batch_norm_elemt(dy, gamma, None, np.zeros(x.shape[1]), invstd)
    if not x.size:
        return empty_like(x)
    sums = _writable(sum_dy, np.float64), _writable(sum_dy_xhat, np.float64)
    return _run_backward(dy, x, gamma, mean, invstd, sums, collect=False)[0]


def batch_norm_backward(dy, x, gamma, mean, invstd, *, beta=None, y=None, relu=False,
                        residual=False):
    """dx, dγ = Σ dy x̂, dβ = Σ dy, and the residual's gradient (None unless ``residual``).

    With relu, dy counts where y > 0, or, without y (and no residual), where x̂ γ + β does. The
    residual's gradient is that dy; dy itself without relu. Reads x and dy twice."""
    C = x.shape[1]
    if not x.size:
        zeros = np.zeros(C, x.dtype), np.zeros(C, x.dtype)
        return empty_like(x), *zeros, empty_like(x) if residual else None
    sums = np.empty(C), np.empty(C)
    dx, dgamma, dbeta, dz = _run_backward(dy, x, gamma, mean, invstd, sums, beta=beta, y=y,
                                          relu=relu, written=residual and relu)
    return dx, dgamma, dbeta, dy if residual and not relu else dz


@kernel
def _update(running_mean, running_var, mean, var, momentum, unbiased):
    keep = 1 - momentum
    for c in range(mean.size):
        running_mean[c] = keep * running_mean[c] + momentum * mean[c]
        running_var[c] = keep * running_var[c] + momentum * (var[c] * unbiased)


def batch_norm_update(running_mean, running_var, mean, var, *, momentum, count):
    """In place: running ← (1 − momentum) running + momentum new, var times count / (count − 1)."""
    _update(running_mean, running_var, mean, var, float(momentum), count / (count - 1))
