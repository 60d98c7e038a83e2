"""Group normalization: x is (N, C, *S) in either memory format, which the result keeps. Each
sample's group is read from memory once and normalized while it is in a cache.

Groups that leave the range of float32, or hold a NaN or an infinity, are done again in float64, and
they alone.
"""

import math

import numpy as np

from .layer_norm import BLOCK, normalize_rows, normalize_rows_backward
from .memory import empty_like
from .norm import _dense, _flat, _flat_as, _vector, _writable
from .norm_plan import BLOCK_BYTES, SLAB_BYTES
from .pixels import RUN, backward_pixels, forward_pixels
from .planes import backward_planes, forward_planes
from .simd import PAST_BYTES, VECTOR

__all__ = ["group_norm", "group_norm_backward"]


def _gain(a, x, missing):
    """γ or β; ones or zeros for None."""
    return np.full(x.shape[1], missing, x.dtype) if a is None else _vector(a, x.dtype)


def _repeated(a, S):
    return a if a is None or S == 1 else np.repeat(a, S)


def _blocks(N, S, C, itemsize):
    """How samples are cut: blocks that make one task, blocks of a sample, pixels of a block. Not at
    all where a sample stays in a cache and there are enough; then small ones share a task."""
    nbytes = S * C * itemsize
    if N * nbytes <= 1 << 20 or (nbytes <= SLAB_BYTES and min(16, N * nbytes >> 19) <= N):
        return max(1, (1 << 17) // nbytes), 1, S
    rows = max(1, BLOCK_BYTES // (C * itemsize * RUN)) * RUN
    return 1, -(-S // rows), rows


def _narrow(x, axes, S):
    """Whether planes are no longer than a vector: γ and β are then repeated for each value."""
    return axes is None and S * x.itemsize <= VECTOR


def _past(x, row):
    """Whether results are written past the caches: rows of so many values begin at vectors."""
    return x.nbytes > PAST_BYTES and row * x.itemsize % VECTOR == 0


def group_norm(x, gamma, beta, *, groups, eps, center=True):
    """y = x̂ γ + β, mean, invstd = 1 / √(var + eps); without center, the mean counts as 0."""
    (N, C), G = x.shape[:2], groups
    if not x.size:
        return (empty_like(x), np.zeros((N, G)),
                np.full((N, G), 1 / math.sqrt(eps) if eps else math.inf))
    x, (axes, *_) = _dense(x)
    S = x.size // (N * C)
    if _narrow(x, axes, S):
        y, *stats = normalize_rows(x, _repeated(gamma, S), _repeated(beta, S), N * G, C // G * S,
                                   eps, center, G)
        return y, *(a.reshape(N, G) for a in stats)
    y, stats, bad = empty_like(x), np.empty((2, N * G)), np.empty(N * G, np.uint8)
    gains, flat, out = (_gain(gamma, x, 1), _gain(beta, x, 0)), _flat(x, axes), _flat(y, axes)
    if axes is None:
        lost = forward_planes(flat, *gains, eps, center, max(1, BLOCK * G // (C * S)), G, C // G, S,
                              _past(x, S), out, *stats, bad, work=2 * x.nbytes)
    else:
        lost = forward_pixels(flat, *gains, eps, center, *_blocks(N, S, C, x.itemsize), S, G,
                              _past(x, C), out, *stats, bad, work=2 * x.nbytes)
    mean, invstd = stats.reshape(2, N, G)
    if lost:
        _forward_again(x, gains, bad.view(bool).reshape(N, G), groups, eps, center, y,
                       mean, invstd)
    return y, mean, invstd


def _parted(a, G):
    """(N, C, *S) as (N, G, C / G, *S), in the same memory."""
    return a.reshape(a.shape[0], G, a.shape[1] // G, *a.shape[2:])


def _forward_again(x, gains, bad, G, eps, center, y, mean, invstd):
    """The groups that ``bad`` marks, in float64."""
    some = bad.any(1)
    x = np.array(x[some], np.float64, order="C")
    wide = group_norm(x, *(a.astype(np.float64) for a in gains), groups=G, eps=eps, center=center)
    with np.errstate(all="ignore"):
        _parted(y, G)[bad] = _parted(wide[0], G)[bad[some]]
    mean[bad], invstd[bad] = wide[1][bad[some]], wide[2][bad[some]]


def group_norm_backward(dy, x, gamma, mean, invstd, *, groups, center=True):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy, no mean(g) without center;
    dγ = Σ dy x̂ and dβ = Σ dy over N and S."""
    (N, C), G, dtype = x.shape[:2], groups, x.dtype
    if not x.size:
        return empty_like(x), np.zeros(C, dtype), np.zeros(C, dtype)
    x, (axes, *_) = _dense(x)
    S = x.size // (N * C)
    stats = [_writable(a, np.float64).reshape(-1) for a in (mean, invstd)]
    if _narrow(x, axes, S):
        dx, *sums = normalize_rows_backward(dy, x, _repeated(gamma, S), *stats, N * G, C // G * S,
                                            center, G)
        return dx, *(a if S == 1 else a.reshape(C, S).sum(1) for a in sums)
    per, B, rows = (1, 1, S) if axes is None else _blocks(N, S, C, x.itemsize)
    dx, bad, parts = empty_like(x), np.empty(N * G, np.uint8), np.empty((2, N * B, C))
    arrays, out = (_flat(x, axes), _flat_as(dy, x, axes), _gain(gamma, x, 1)), _flat(dx, axes)
    if axes is None:
        lost = backward_planes(*arrays, *stats, center, max(1, BLOCK * G // (C * S)), G, C // G, S,
                               _past(x, S), out, *parts.reshape(2, -1), bad, work=3 * x.nbytes)
    else:
        lost = backward_pixels(*arrays, *stats, center, per, B, rows, S, G, _past(x, C), out,
                               *parts.reshape(2, -1), bad, work=3 * x.nbytes)
    with np.errstate(all="ignore"):
        dgamma, dbeta = parts.sum(1).astype(dtype)
    if lost:
        _backward_again(dy, x, arrays[2], mean, invstd, bad.view(bool).reshape(N, G),
                        center, dx, dgamma, dbeta)
    return dx, dgamma, dbeta


def _backward_again(dy, x, gamma, mean, invstd, bad, center, dx, dgamma, dbeta):
    """The groups that ``bad`` marks in any sample, in float64."""
    G = bad.shape[1]
    some = bad.any(0)
    wide = [_parted(a, G)[:, some].astype(np.float64) for a in (dy, x, gamma[None])]
    dy, x, gamma = (a.reshape(a.shape[0], -1, *a.shape[3:]) for a in wide)
    grads = group_norm_backward(dy, x, gamma[0], mean[:, some], invstd[:, some], center=center,
                                groups=int(some.sum()))
    with np.errstate(all="ignore"):
        _parted(dx, G)[bad] = _parted(grads[0], len(mean[0, some]))[bad[:, some]]
        for out, sums in zip((dgamma, dbeta), grads[1:]):
            out.reshape(G, -1)[some] = sums.reshape(int(some.sum()), -1)
