"""Group normalization: x is (N, C, *S) in either memory format, which the result keeps.

Channels-first, a group is a row. Channels-last, the statistics of a sample's channels are merged to
those of its groups. The backward takes sums of each sample's channels in both.
"""

import math

import numpy as np

from ..half import kind as kind_of, real as real_of, wide
from . import passes
from .elementwise import maximum
from .intrinsics import cuda, libm
from .launch import Kernel, factory
from .layer_norm import parameters, run
from .layout import alike
from .memory import SIMULATED, empty, empty_like
from .moments import cut, parts, statistics, tickets
from .norm import shaped
from .passes import BETA, CENTER, GAMMA, GAMMA_IN
from .reduce import sum
from .vectors import dtypes

__all__ = ["group_norm", "group_norm_backward"]

SMALL = 128 if not SIMULATED else 32


@factory
def _merge():
    """mean and invstd of groups of K channels with as many values each, from the channels'."""
    sqrt = libm("sqrt", np.float64)

    def body(means, variances, mean, invstd, groups, K, eps, center):
        i = cuda.blockIdx.x * SMALL + cuda.threadIdx.x
        if i >= groups:
            return
        pivot, s, q = means[i * K], 0.0, 0.0
        for c in range(i * K, i * K + K):
            s += means[c] - pivot
        mu = pivot + s / K if center else 0.0
        for c in range(i * K, i * K + K):
            q += variances[c] + (means[c] - mu) * (means[c] - mu)
        mean[i], invstd[i] = mu, 1.0 / sqrt(q / K + eps)
    return Kernel(body, "*f8 *f8 *f8 *f8 i8 i8 f8 i4", name="group_merge", threads=SMALL)


@factory
def _combine(dtype):
    """Σ γ g and Σ γ g x̂ of groups of K channels, from the channels' sums."""
    def body(sums, sums_x, gamma, out, out_x, groups, G, K, gain):
        i = cuda.blockIdx.x * SMALL + cuda.threadIdx.x
        if i >= groups:
            return
        s, sx = 0.0, 0.0
        for c in range(K):
            w = np.float64(gamma[i % G * K + c]) if gain else 1.0
            s += w * sums[i * K + c]
            sx += w * sums_x[i * K + c]
        out[i], out_x[i] = s, sx
    kind = kind_of(dtype)
    return Kernel(body, f"*f8 *f8 *{kind} *f8 *f8 i8 i8 i8 i4", name=f"group_combine_{kind}",
                  threads=SMALL)


@factory
def _over_samples(dtype):
    """dγ and dβ of channels from the sums of each sample's: added in their order."""
    real, kind = real_of(dtype).type, kind_of(dtype)

    def body(sums, sums_x, dgamma, dbeta, N, C):
        c = cuda.blockIdx.x * SMALL + cuda.threadIdx.x
        if c >= C:
            return
        s, sx = 0.0, 0.0
        for n in range(N):
            s += sums[n * C + c]
            sx += sums_x[n * C + c]
        dgamma[c], dbeta[c] = real(sx), real(s)
    return Kernel(body, f"*f8 *f8 *{kind} *{kind} i8 i8", name=f"group_over_samples_{kind}",
                  threads=SMALL)


def every():
    """All kernels of this module."""
    yield _merge()
    for dtype in dtypes():
        yield _combine(dtype)
        yield _over_samples(dtype)


def _shaped(x):
    """x in dense memory, and whether its channels come last; (N, C) counts as channels-first."""
    x, _ = shaped(x)
    return x, not x.flags.c_contiguous


def _cut(x, last, *arrays):
    """How each sample's channels are cut, and what the kernels take N for: the samples side by side
    in a row of channels."""
    N, C, *S = x.shape
    S = math.prod(S)
    if last:
        return cut(True, N, S, C, 1, x.dtype, x, *arrays), 1
    return cut(False, 1, 1, N * C, S, x.dtype, x, *arrays), N


def _stats(N, G):
    return empty((N, G), np.float64), empty((N, G), np.float64)


def _along_channels(a, x):
    """(C,) or (N, C), to broadcast against x."""
    return a.reshape(*a.shape[:-1], x.shape[1], *(1,) * (x.ndim - 2))


def _above(x, gamma, beta, floor, mean, invstd, groups):
    """Where x̂ γ + β > floor."""
    mean, invstd = (_along_channels(np.repeat(a, x.shape[1] // groups, axis=1), x)
                    for a in (mean, invstd))
    y = (x - mean) * invstd
    y = y if gamma is None else y * _along_channels(gamma, x)
    y = y if beta is None else y + _along_channels(beta, x)
    return y > _along_channels(floor, x)


def group_norm(x, gamma, beta, *, groups, eps, center=True, floor=None):
    """y = x̂ γ + β, mean, invstd = 1 / √(var + eps); without center, the mean counts as 0. With
    floor (C,), max(y, floor), in a pass of its own."""
    if floor is not None:
        y, mean, invstd = group_norm(x, gamma, beta, groups=groups, eps=eps, center=center)
        y = maximum(wide(y), _along_channels(wide(floor), x)).astype(x.dtype, copy=False)
        return y, mean, invstd
    (N, C), G = x.shape[:2], groups
    if not x.size:
        mean, invstd = _stats(N, G)
        mean.fill(0)
        invstd.fill(1 / math.sqrt(eps) if eps else math.inf)
        return empty_like(x), mean, invstd
    x, last = _shaped(x)
    K, S = C // G, x.size // (N * C)
    gamma, beta, params = parameters(x, gamma, beta)
    if not last:
        y, mean, invstd = run(x, gamma, beta, params, N * G, K * S, eps, center, G, K, S)
        if mean is None:
            mean = empty((N * G,), np.float64)
            mean.fill(0)
        return y, mean.reshape(N, G), invstd.reshape(N, G)
    c, side = _cut(x, last)
    means, variances, unused = (empty((N, C), np.float64) for _ in range(3))
    statistics(x.dtype, x.dtype, *c.kind)(c.blocks, x, means, variances, unused, *parts(c),
                                          tickets(), None, None, *c.numbers, 0.0, 0.0, False)
    (mean, invstd), y = _stats(N, G), empty_like(x)
    _merge()(-(-N * G // SMALL), means, variances, mean, invstd, N * G, K, eps, center)
    option = GAMMA * (gamma is not None) | BETA * (beta is not None)
    passes.normalize(x.dtype, params, *c.kind)(c.blocks, x, None, gamma, beta, mean, invstd, y,
                                               *c.numbers, side, G, K, option)
    return y, mean, invstd


def group_norm_backward(dy, x, gamma, mean, invstd, *, groups, center=True, beta=None, floor=None):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy, no mean(g) without center;
    dγ = Σ dy x̂ and dβ = Σ dy over N and S. With floor, dy counts where x̂ γ + β > floor, and what is
    left of it is dfloor."""
    if floor is not None:
        above = _above(*wide((x, gamma, beta, floor)), mean, invstd, groups)
        g = wide(dy)
        none = np.zeros_like(g)
        dfloor = sum(np.where(above, none, g), axes=(0, *range(2, dy.ndim)), keepdims=False)
        g = np.where(above, g, none).astype(dy.dtype, copy=False)
        return (*group_norm_backward(g, x, gamma, mean, invstd, groups=groups, center=center),
                dfloor.astype(floor.dtype, copy=False))
    (N, C), G = x.shape[:2], groups
    gamma, params = parameters(x, gamma)
    dgamma, dbeta = empty((C,), params), empty((C,), params)
    if not x.size:
        dgamma.fill(0)
        dbeta.fill(0)
        return empty_like(x), dgamma, dbeta
    x, last = _shaped(x)
    dy, K = alike(dy, x), C // G
    c, side = _cut(x, last, dy)
    sums, sums_x = empty((N, C), np.float64), empty((N, C), np.float64)
    passes.sums(x.dtype, params, *c.kind)(c.blocks, dy, x, None, None, None, mean, invstd, sums,
                                          sums_x, *parts(c), tickets(), None, None, *c.numbers,
                                          side, G, K, 0)
    _over_samples(params)(-(-C // SMALL), sums, sums_x, dgamma, dbeta, N, C)
    group, group_x = _stats(N, G)
    _combine(params)(-(-N * G // SMALL), sums, sums_x, gamma, group, group_x, N * G, G, K,
                      gamma is not None)
    dx, n = empty_like(x), K * (x.size // (N * C))
    option = GAMMA * (gamma is not None) | GAMMA_IN | CENTER * center
    passes.gradient(x.dtype, params, *c.kind)(c.blocks, dy, x, None, gamma, None, mean, invstd,
                                              group, group_x, dx, None, *c.numbers, side, G, K, n,
                                              option)
    return dx, dgamma, dbeta
