"""Group normalization: x is (N, C, *S) in either memory format, which the result keeps. Each
sample's group is read from memory once and normalized while it is in a cache.

Groups that leave the range of float32, or hold a NaN or an infinity, are done again in float64, and
they alone.
"""

import math

import numpy as np

from .layer_norm import BLOCK, normalize_rows, normalize_rows_backward
from .memory import empty_like
from .norm import _NONE, _dense, _flat, _flat_as, _vector, _writable
from .norm_plan import BLOCK_BYTES, SLAB_BYTES
from .pixels import RUN, forward_pixels
from .pixels_backward import backward_pixels
from .planes import backward_planes, forward_planes
from .simd import PAST_BYTES, VECTOR

__all__ = ["group_norm", "group_norm_backward"]

TASKS = 16                 # of planes at least: they divide evenly among few threads


def _gain(a, x, missing):
    """γ or β; ones or zeros for None."""
    return np.full(x.shape[1], missing, x.dtype) if a is None else _vector(a, x.dtype)


def _blocks(N, S, C, itemsize):
    """How samples are cut: blocks that make one task, blocks of a sample, pixels of a block. Not at
    all where a sample stays in a cache and there are enough; then small ones share a task."""
    nbytes = S * C * itemsize
    if N * nbytes <= 1 << 20 or (nbytes <= SLAB_BYTES and min(16, N * nbytes >> 19) <= N):
        return max(1, (1 << 17) // nbytes), 1, S
    rows = max(1, BLOCK_BYTES // (C * itemsize * RUN)) * RUN
    return 1, -(-S // rows), rows


def _rows(R, n):
    """How many rows of n values make one task: as many as fill BLOCK, and tasks for all threads."""
    return max(1, min(BLOCK // n, -(-R // TASKS)))


def _narrow(x, axes, S):
    """Whether planes are no longer than a vector: γ and β are then repeated for each value."""
    return axes is None and S * x.itemsize <= VECTOR


def _past(x, row):
    """Whether results are written past the caches: rows of so many values begin at vectors."""
    return x.nbytes > PAST_BYTES and row * x.itemsize % VECTOR == 0


def group_norm(x, gamma, beta, *, groups, eps, center=True, floor=None):
    """y = x̂ γ + β, mean, invstd = 1 / √(var + eps); without center, the mean counts as 0. With
    floor (C,), max(y, floor)."""
    (N, C), G = x.shape[:2], groups
    if not x.size:
        return (empty_like(x), np.zeros((N, G)),
                np.full((N, G), 1 / math.sqrt(eps) if eps else math.inf))
    x, (axes, *_) = _dense(x)
    S = x.size // (N * C)
    if floor is None and _narrow(x, axes, S):
        y, *stats = normalize_rows(x, gamma, beta, N * G, C // G * S, eps, center, G, S)
        return y, *(a.reshape(N, G) for a in stats)
    y, stats, bad = empty_like(x), np.empty((2, N * G)), np.empty(N * G, np.uint8)
    gains = _gain(gamma, x, 1), _gain(beta, x, 0), _vector(floor, x.dtype)
    flat, out = _flat(x, axes), _flat(y, axes)
    if axes is None:
        lost = forward_planes(flat, *gains, eps, center, _rows(N * G, C * S // G), G, C // G, S,
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
    gamma, beta, floor = (a.astype(np.float64) for a in gains)
    wide = group_norm(x, gamma, beta, groups=G, eps=eps, center=center,
                      floor=floor if floor.size else None)
    with np.errstate(all="ignore"):
        _parted(y, G)[bad] = _parted(wide[0], G)[bad[some]]
    mean[bad], invstd[bad] = wide[1][bad[some]], wide[2][bad[some]]


def group_norm_backward(dy, x, gamma, mean, invstd, *, groups, center=True, beta=None, floor=None):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy, no mean(g) without center;
    dγ = Σ dy x̂ and dβ = Σ dy over N and S. With floor, dy counts where x̂ γ + β > floor, and what is
    left of it is dfloor."""
    (N, C), dtype = x.shape[:2], x.dtype
    sums = np.zeros((2 if floor is None else 3, C), dtype)
    if not x.size:
        return empty_like(x), *sums
    x, (axes, *_) = _dense(x)
    S = x.size // (N * C)
    stats = [_writable(a, np.float64).reshape(-1) for a in (mean, invstd)]
    if floor is None and _narrow(x, axes, S):
        return normalize_rows_backward(dy, x, gamma, *stats, N * groups, C // groups * S, center,
                                       groups, S)
    gains = _gain(gamma, x, 1), _NONE[dtype], _NONE[dtype]
    if floor is not None:
        gains = gains[0], _gain(beta, x, 0), _vector(floor, dtype)
    dx, bad = _run_backward(dy, x, axes, S, groups, gains, stats, center, sums)
    if bad is not None:
        _backward_again(dy, x, gains, mean, invstd, bad.view(bool).reshape(N, groups), center, dx,
                        sums)
    return dx, *sums


def _run_backward(dy, x, axes, S, G, gains, stats, center, sums):
    """dx, and the sums in place; which groups float32 is not enough for, or None."""
    (N, C), past = x.shape[:2], _past(x, S if axes is None else x.shape[1])
    per, B, rows = (1, 1, S) if axes is None else _blocks(N, S, C, x.itemsize)
    dx, bad = empty_like(x), np.empty(N * G, np.uint8)
    arrays = _flat(x, axes), _flat_as(dy, x, axes), *gains, *stats, center
    out = past, _flat(dx, axes), bad, sums
    if axes is None:
        lost = backward_planes(*arrays, _rows(N * G, C * S // G), G, C // G, S, *out,
                               work=3 * x.nbytes)
    else:
        lost = backward_pixels(*arrays, per, B, rows, S, G, *out, work=3 * x.nbytes)
    return dx, bad if lost else None


def _backward_again(dy, x, gains, mean, invstd, bad, center, dx, sums):
    """The groups that ``bad`` marks in any sample, in float64."""
    G = bad.shape[1]
    some = bad.any(0)
    dy, x, *gains = (_parted(a, G)[:, some].astype(np.float64).reshape(len(a), -1, *a.shape[2:])
                     if a.size else a for a in (dy, x, *(a[None] for a in gains)))
    gamma, beta, floor = (a[0] if a.size else None for a in gains)
    grads = group_norm_backward(dy, x, gamma, mean[:, some], invstd[:, some], center=center,
                                groups=int(some.sum()), beta=beta, floor=floor)
    with np.errstate(all="ignore"):
        _parted(dx, G)[bad] = _parted(grads[0], len(mean[0, some]))[bad[:, some]]
        for out, values in zip(sums, grads[1:]):
            out.reshape(G, -1)[some] = values.reshape(int(some.sum()), -1)
