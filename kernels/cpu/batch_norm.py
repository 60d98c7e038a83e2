"""Loops of batch normalization over dense memory: statistics, then y; sums, then dx.

What leaves the range of float32 (squares of 1e20, say) makes a kernel return True: the caller does
it in float64.
"""

import math

import numpy as np

from .channels import (
    channels_of,
    normalize_backward_channels,
    normalize_channels,
    statistics_of_channels,
    sums_of_channels,
)
from .columns import HI, INV, MEAN_DY, PAST, WRITE, inner, normalize, normalize_backward
from .moments import rooms, spread, statistics, sums, u
from .norm_plan import ADDS, Plan, plan, unpack, values
from .simd import pointer
from .tasks import share, tasks

__all__ = ["ADDS", "Plan", "backward", "backward_block", "forward", "forward_block", "infinite",
           "lost", "merge", "move", "plan", "total"]



@inner
def _constants(plan, gamma, beta, mean, invstd, c, channels, table, work):
    """HI, LO, SCALE and SHIFT of the channels from c on, and lines of the table of them."""
    for k in range(channels):
        hi = np.float64(table.dtype.type(mean[u(c + k)]))
        work[u(k)] = hi
        work[u(channels + k)] = mean[u(c + k)] - hi if abs(hi) < math.inf else 0.0
        work[u(2 * channels + k)] = invstd[u(c + k)]
        work[u(3 * channels + k)] = 0.0
    for k in range(channels if gamma.size else 0):
        work[u(2 * channels + k)] *= gamma[u(c + k)]
    for k in range(channels if beta.size else 0):
        work[u(3 * channels + k)] = beta[u(c + k)]
    for line in range(0 if channels_of(plan) else 4):
        spread(work, line * channels, channels, plan, table, HI + line)


@inner
def merge(plan, block_mean, block_m2, eps, c0, c1, mean, var, invstd):
    """Statistics of channels c0 … c1 from those of their blocks, in order."""
    for c in range(c0, c1):
        mean[u(c)] = var[u(c)] = 0.0
    for b in range(plan.blocks):
        before = values(plan, b * plan.rows)
        n = values(plan, min(plan.N, (b + 1) * plan.rows)) - before
        w, at = n / (before + n), b * plan.C
        for c in range(c0, c1):
            d = block_mean[u(at + c)] - mean[u(c)]
            mean[u(c)] += d * w
            var[u(c)] += block_m2[u(at + c)] + d * d * w * before
    total = 1.0 / values(plan, plan.N)
    for c in range(c0, c1):
        var[u(c)] *= total
        invstd[u(c)] = 1.0 / np.sqrt(var[u(c)] + eps)


@inner
def lost(x, var, invstd, eps):
    """Whether float32 is not enough: squares overflowed, or underflowed where eps does not hide
    it, or constants would."""
    bad = False
    if x.itemsize == 4:
        for c in range(invstd.size):
            bad |= invstd[c] < 1e-12 or invstd[c] > 1e12
            bad |= not var[c] < math.inf or (eps < 1e-20 and var[c] < 1e-30)
    return bad


@inner
def forward_block(x, residual, gamma, beta, eps, plan, b, c0, c1, collect, option, y, mean, var,
                  invstd, block_mean, block_m2):
    """Statistics of channels c0 … c1 in block b, and y if they are known after that."""
    first = b * plan.rows
    last = min(first + plan.rows, plan.N)
    table, work = rooms(x, plan, 6)
    for c in range(c0, c1, plan.together):
        channels = min(c1 - c, plan.together)
        if collect:
            if channels_of(plan):
                statistics_of_channels(x, plan, c, channels, block_mean, block_m2, c)
            else:
                statistics(x, plan, first, last, c, channels, table, work, block_mean, block_m2,
                           b * plan.C + c)
            if plan.blocks > 1:
                continue
            merge(plan, block_mean, block_m2, eps, c, c + channels, mean, var, invstd)
        if y.size:
            _constants(plan, gamma, beta, mean, invstd, c, channels, table, work)
            if channels_of(plan):
                normalize_channels(pointer(x), pointer(residual), pointer(y), plan, c, channels,
                                   work, option)
            else:
                normalize(pointer(x), pointer(residual), pointer(x), pointer(y), plan, first, last,
                          True, c, channels, table, option)


@inner
def _forward_task(t, x, residual, gamma, beta, eps, packed, collect, option, y, mean, var, invstd,
                  block_mean, block_m2):
    plan = unpack(packed)
    b, c0 = t // plan.tiles, t % plan.tiles * plan.tile
    forward_block(x, residual, gamma, beta, eps, plan, b, c0, min(c0 + plan.tile, plan.C), collect,
                  option, y, mean, var, invstd, block_mean, block_m2)


@inner
def move(running_mean, running_var, momentum, n, mean, var):
    """The running arrays, where there are any, towards the statistics of n values."""
    for c in range(running_mean.size):
        new = var[c] * (n / (n - 1.0))
        running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * mean[c]
        running_var[c] = (1.0 - momentum) * running_var[c] + momentum * new


@tasks
def forward(run, x, residual, gamma, beta, running_mean, running_var, momentum, eps, packed,
            collect, known, option, y, mean, var, invstd):
    """mean, var and invstd of x (if ``collect``; invstd from the others if ``known``), then y where
    it is not empty. True if float32 is not enough: nothing holds then."""
    plan = unpack(packed)
    for c in range(invstd.size if known else 0):
        invstd[c] = 1.0 / np.sqrt(var[c] + eps)
    if not collect and lost(x, var if known else invstd, invstd, eps if known else 1.0):
        return True
    n, blocks = plan.tiles * plan.blocks, plan.blocks if collect else 0
    block_mean, block_m2 = np.empty(blocks * plan.C), np.empty(blocks * plan.C)
    for phase in range(2 if blocks > 1 else 1):
        share(_forward_task, -n if plan.back and (phase == 1 or not collect) else n, run,
              (x, residual, gamma, beta, eps, packed, collect and phase == 0, option, y, mean, var,
               invstd, block_mean, block_m2))
        if phase == 0 and blocks > 1:
            merge(plan, block_mean, block_m2, eps, 0, plan.C, mean, var, invstd)
        if phase == 0 and collect and lost(x, var, invstd, eps):
            return True
    move(running_mean, running_var, momentum, values(plan, plan.N), mean, var)
    return False


@inner
def _slopes(plan, gamma, invstd, sum_dy, sum_p, c, channels, table, work):
    """MEAN_DY, SLOPE and REST of the channels from c on, and lines of the table of them."""
    inverse, at = 1.0 / values(plan, plan.N), 4 * channels
    for k in range(channels):
        work[u(at + k)] = invstd[u(c + k)]
    for k in range(channels if gamma.size else 0):
        work[u(at + k)] *= gamma[u(c + k)]
    for k in range(channels):
        mean, scale = sum_dy[u(c + k)] * inverse, work[u(at + k)]
        hi = np.float64(table.dtype.type(mean))
        work[u(at + k)] = hi
        work[u(at + channels + k)] = sum_p[u(c + k)] * inverse * -scale
        work[u(at + 2 * channels + k)] = (hi - mean) * scale if abs(hi) < math.inf else 0.0
    for line in range(0 if channels_of(plan) else 3):
        spread(work, at + line * channels, channels, plan, table, MEAN_DY + line)


@inner
def total(plan, block_dy, block_p, c0, c1, sum_dy, sum_p, dgamma, dbeta):
    """Sums over the blocks of channels c0 … c1, in order."""
    for c in range(c0, c1):
        sum_dy[u(c)] = sum_p[u(c)] = 0.0
    for b in range(plan.blocks):
        for c in range(c0, c1):
            sum_dy[u(c)] += block_dy[u(b * plan.C + c)]
            sum_p[u(c)] += block_p[u(b * plan.C + c)]
    for c in range(c0, c1):
        dbeta[u(c)], dgamma[u(c)] = sum_dy[u(c)], sum_p[u(c)]


@inner
def backward_block(x, dy, y, gamma, beta, mean, invstd, plan, b, c0, c1, collect, option, dz,
                   block_dy, block_p, sum_dy, sum_p, dgamma, dbeta, dx):
    """Sums of channels c0 … c1 in block b, and dx if they are known after that."""
    first = b * plan.rows
    last = min(first + plan.rows, plan.N)
    table, work = rooms(x, plan, 10)
    source, rest = pointer(dy), option
    if option & WRITE:
        source, rest = pointer(dz), option & PAST
    for c in range(c0, c1, plan.together):
        channels = min(c1 - c, plan.together)
        _constants(plan, gamma, beta, mean, invstd, c, channels, table, work)
        if not channels_of(plan):
            spread(invstd, c, channels, plan, table, INV)
        if collect and channels_of(plan):
            sums_of_channels(pointer(x), pointer(dy), pointer(y), pointer(dz), plan, c, channels,
                             invstd, work, option, block_dy, block_p, c)
        elif collect:
            sums(x, dy, y, dz, plan, first, last, c, channels, table, work,
                  option if plan.blocks > 1 else option & ~PAST, block_dy, block_p, b * plan.C + c)
        if collect:
            if plan.blocks > 1:
                continue
            total(plan, block_dy, block_p, c, c + channels, sum_dy, sum_p, dgamma, dbeta)
        if dx.size:
            _slopes(plan, gamma, invstd, sum_dy, sum_p, c, channels, table, work)
            if channels_of(plan):
                normalize_backward_channels(pointer(x), source, pointer(dx), pointer(y), plan, c,
                                            channels, invstd, work, rest)
            else:
                normalize_backward(pointer(x), source, pointer(dx), pointer(y), plan, first, last,
                                   True, c, channels, table, rest)


@inner
def _backward_task(t, x, dy, y, gamma, beta, mean, invstd, packed, collect, option, dz, block_dy,
                   block_p, sum_dy, sum_p, dgamma, dbeta, dx):
    plan = unpack(packed)
    b, c0 = t // plan.tiles, t % plan.tiles * plan.tile
    backward_block(x, dy, y, gamma, beta, mean, invstd, plan, b, c0, min(c0 + plan.tile, plan.C),
                   collect, option, dz, block_dy, block_p, sum_dy, sum_p, dgamma, dbeta, dx)


@inner
def infinite(x, sum_dy, sum_p):
    """Whether sums of the backward pass left the range of float32."""
    bad = False
    if x.itemsize == 4:
        for c in range(sum_dy.size):
            bad |= not abs(sum_dy[c]) + abs(sum_p[c]) < math.inf
    return bad


@tasks
def backward(run, x, dy, y, gamma, beta, mean, invstd, packed, collect, option, dz, sum_dy, sum_p,
             dgamma, dbeta, dx):
    """Σ dy and Σ dy x̂ of the masked dy (if ``collect``), then dx where it is not empty. True if
    float32 is not enough: nothing holds then."""
    plan = unpack(packed)
    if lost(x, invstd, invstd, 1.0):
        return True
    n, blocks = plan.tiles * plan.blocks, plan.blocks if collect else 0
    block_dy, block_p = np.empty(blocks * plan.C), np.empty(blocks * plan.C)
    for phase in range(2 if blocks > 1 else 1):
        share(_backward_task, -n if plan.back and phase == 1 else n, run,
              (x, dy, y, gamma, beta, mean, invstd, packed, collect and phase == 0, option, dz,
               block_dy, block_p, sum_dy, sum_p, dgamma, dbeta, dx))
        if phase == 0 and blocks > 1:
            total(plan, block_dy, block_p, 0, plan.C, sum_dy, sum_p, dgamma, dbeta)
    return collect and infinite(x, sum_dy, sum_p)
