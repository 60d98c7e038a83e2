"""Batch normalization of parts of a batch, each for itself: ghosts of ``size`` samples, the last of
which may have fewer. Samples lie one after the other in either memory format, so a ghost is a piece
of memory of its own and is cut as a batch of that size would be (norm_plan.py).
"""

import math
from functools import lru_cache

import numpy as np

from .batch_norm import backward_block, forward_block, infinite, lost, merge, total
from .columns import inner
from .memory import empty_like
from .norm import (
    _NONE,
    _dense,
    _flat,
    _flat_as,
    _order,
    _past,
    _vector,
    _writable,
    batch_norm,
    batch_norm_backward,
)
from .norm_plan import unpack, values
from .tasks import share, tasks

__all__ = ["ghost_batch_norm", "ghost_batch_norm_backward"]

PLAN = 15                  # numbers of a plan


@inner
def _place(packed, ghosts, t):
    """The ghost of task t, where its plan is, and the task's number within it."""
    whole = unpack(packed)
    per = whole.tiles * whole.blocks
    g = min(t // per, ghosts - 1)
    return g, PLAN if g == ghosts - 1 else 0, t - g * per


@inner
def _tasks(packed, ghosts):
    """How many there are, and how many blocks a ghost has at most."""
    whole, last = unpack(packed), unpack(packed[PLAN:])
    return ((ghosts - 1) * whole.tiles * whole.blocks + last.tiles * last.blocks,
            max(whole.blocks, last.blocks))


@inner
def _own(a, g, ghosts, C):
    """The constants of a ghost's channels, of (C,) or, behind each other, of every ghost's."""
    return a[g * C:g * C + C] if a.size == ghosts * C else a


@inner
def _forward_task(t, x, none, gamma, beta, eps, packed, ghosts, phase, option, y, stats, blocks,
                  block_mean, block_m2):
    g, at, k = _place(packed, ghosts, t)
    plan, C = unpack(packed[at:]), stats.shape[2]
    if phase == 1 and plan.blocks == 1:
        return
    size = values(unpack(packed), unpack(packed).N) * C
    begin, room = g * size, g * blocks * C
    end = min(x.size, begin + size)
    b, c0 = k // plan.tiles, k % plan.tiles * plan.tile
    forward_block(x[begin:end], none, _own(gamma, g, ghosts, C), _own(beta, g, ghosts, C), eps,
                  plan, b, c0, min(c0 + plan.tile, C), phase == 0, option, y[begin:end],
                  stats[0, g], stats[1, g], stats[2, g], block_mean[room:], block_m2[room:])


@inner
def _merge_all(packed, ghosts, eps, blocks, block_mean, block_m2, stats):
    """Statistics of the ghosts that are cut into blocks."""
    C = stats.shape[2]
    for g in range(ghosts):
        plan = unpack(packed[PLAN if g == ghosts - 1 else 0:])
        if plan.blocks > 1:
            room = g * blocks * C
            merge(plan, block_mean[room:], block_m2[room:], eps, 0, C, stats[0, g], stats[1, g],
                  stats[2, g])


@tasks
def _forward(run, x, none, gamma, beta, eps, packed, ghosts, option, y, stats):
    """y, and mean, var and invstd of each ghost's channels, (3, ghosts, C). True if float32 is not
    enough."""
    n, blocks = _tasks(packed, ghosts)
    rooms = ghosts * blocks * stats.shape[2]
    block_mean, block_m2 = np.empty(rooms), np.empty(rooms)
    for phase in range(2 if blocks > 1 else 1):
        share(_forward_task, n if phase == 0 else -n, run,
              (x, none, gamma, beta, eps, packed, ghosts, phase, option, y, stats, blocks,
               block_mean, block_m2))
        if phase == 0 and blocks > 1:
            _merge_all(packed, ghosts, eps, blocks, block_mean, block_m2, stats)
    return lost(x, stats[1].reshape(-1), stats[2].reshape(-1), eps)


@inner
def _backward_task(t, x, dy, none, gamma, stats, packed, ghosts, phase, option, blocks, block_dy,
                   block_p, sums, scratch, dx):
    g, at, k = _place(packed, ghosts, t)
    plan, C = unpack(packed[at:]), stats.shape[2]
    if phase == 1 and plan.blocks == 1:
        return
    size = values(unpack(packed), unpack(packed).N) * C
    begin, room = g * size, g * blocks * C
    end = min(x.size, begin + size)
    b, c0 = k // plan.tiles, k % plan.tiles * plan.tile
    part = x[begin:end]
    backward_block(part, dy[begin:end], part, _own(gamma, g, ghosts, C), none, stats[0, g],
                   stats[1, g], plan, b, c0, min(c0 + plan.tile, C), phase == 0, option, none,
                   block_dy[room:], block_p[room:], sums[0, g], sums[1, g], scratch[0, g],
                   scratch[1, g], dx[begin:end])


@inner
def _total_all(packed, ghosts, blocks, block_dy, block_p, sums, scratch):
    """Sums of the ghosts that are cut into blocks."""
    C = sums.shape[2]
    for g in range(ghosts):
        plan = unpack(packed[PLAN if g == ghosts - 1 else 0:])
        if plan.blocks > 1:
            room = g * blocks * C
            total(plan, block_dy[room:], block_p[room:], 0, C, sums[0, g], sums[1, g],
                  scratch[0, g], scratch[1, g])


@tasks
def _backward(run, x, dy, none, gamma, stats, packed, ghosts, option, scratch, dx, dgamma, dbeta):
    """dx, dγ and dβ, of (C,) or of every ghost's channels, with mean and invstd of each ghost,
    (2, ghosts, C). True if float32 is not enough."""
    n, blocks = _tasks(packed, ghosts)
    C = stats.shape[2]
    rooms = ghosts * blocks * C
    block_dy, block_p, sums = np.empty(rooms), np.empty(rooms), np.empty((2, ghosts, C))
    if lost(x, stats[1].reshape(-1), stats[1].reshape(-1), 1.0):
        return True
    for phase in range(2 if blocks > 1 else 1):
        share(_backward_task, n if phase == 0 else -n, run,
              (x, dy, none, gamma, stats, packed, ghosts, phase, option, blocks, block_dy, block_p,
               sums, scratch, dx))
        if phase == 0 and blocks > 1:
            _total_all(packed, ghosts, blocks, block_dy, block_p, sums, scratch)
    together = ghosts if dgamma.size == C else 1         # that share their γ and β
    for k in range(dgamma.size):
        a = b = 0.0
        for g in range(k // C, k // C + together):
            a, b = a + sums[1, g, k % C], b + sums[0, g, k % C]
        dgamma[k], dbeta[k] = a, b
    return infinite(x, sums[0].reshape(-1), sums[1].reshape(-1))


@lru_cache(1 << 10)
def _plans(shape, strides, itemsize, size):
    """How many ghosts there are, and the plans of one and of the last, behind each other."""
    N, *rest = shape
    ghosts = -(-N // size)
    return ghosts, np.concatenate([_order((n, *rest), strides, itemsize)[1]
                                   for n in (min(size, N), N - (ghosts - 1) * size)])


def _parts(N, size):
    return [slice(i, min(i + size, N)) for i in range(0, N, size)]


def _gains(a, dtype):
    """γ or β of (C,), or of every ghost, (ghosts, C), as one axis."""
    return _vector(a if a is None or a.ndim == 1 else a.reshape(-1), dtype)


def _of(a, g):
    """γ or β of a ghost."""
    return a if a is None or a.ndim == 1 else a[g]


def ghost_batch_norm(x, gamma, beta, *, size, eps):
    """y, mean, var, invstd = 1 / √(var + eps) of each ``size`` samples, the last of which may be
    fewer: y = x̂ γ + β, γ and β (C,) or (ghosts, C); the others float64 (ghosts, C)."""
    x, (axes, _, past) = _dense(x)
    y, C = empty_like(x), x.shape[1]
    if not x.size:                                   # as of any batch of nothing
        mean, var = np.zeros((2, -(-len(x) // size), C))
        return y, mean, var, np.full_like(var, 1 / math.sqrt(eps) if eps else math.inf)
    ghosts, packed = _plans(x.shape, x.strides, x.itemsize, size)
    stats = np.empty((3, ghosts, C))
    if _forward(_flat(x, axes), _NONE[x.dtype], _gains(gamma, x.dtype), _gains(beta, x.dtype),
                float(eps), packed, ghosts, _past(x, 2, past), _flat(y, axes), stats,
                work=2 * x.nbytes):
        for g, part in enumerate(_parts(len(x), size)):
            y[part], *stats[:, g] = batch_norm(x[part], _of(gamma, g), _of(beta, g), eps=eps)
    return y, *stats


def ghost_batch_norm_backward(dy, x, gamma, mean, invstd, *, size, apart=False):
    """dx as batch_norm_backward's of each ghost, dγ = Σ dy x̂ and dβ = Σ dy over all, (C,), or of
    each, (ghosts, C), if ``apart``."""
    x, (axes, _, past) = _dense(x)
    dx, C = empty_like(x), x.shape[1]
    shape = mean.shape if apart else (C,)
    if not x.size:
        return dx, np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    ghosts, packed = _plans(x.shape, x.strides, x.itemsize, size)
    stats = np.stack((_writable(mean, np.float64), _writable(invstd, np.float64)))
    scratch, sums = np.empty((2, ghosts, C), x.dtype), np.empty((2, *shape), x.dtype)
    if _backward(_flat(x, axes), _flat_as(dy, x, axes), _NONE[x.dtype], _gains(gamma, x.dtype),
                 stats, packed, ghosts, _past(x, 3, past), scratch, _flat(dx, axes),
                 *sums.reshape(2, -1), work=3 * x.nbytes):
        each = np.empty((2, ghosts, C))
        for g, part in enumerate(_parts(len(x), size)):
            dx[part], *each[:, g], _ = batch_norm_backward(dy[part], x[part], _of(gamma, g),
                                                           mean[g], invstd[g])
        with np.errstate(all="ignore"):
            sums[...] = each if apart else each.sum(1)
    return dx, *sums
