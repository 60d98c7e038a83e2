"""Loops of batch normalization: float64 sums over fixed blocks, merged in index order.

A block is what stays in L2 while it is read twice: its mean, then the squares about it; Chan's
formula (Chan, Golub & LeVeque 1979) merges blocks. Everything is a sum over *columns*: contiguous
memory read W values at a time into W float64 accumulators, so that LLVM vectorises without
reassociating. In rows × channels memory, column j belongs to channel j mod C; in a plane of
(N, C, S) all columns belong to one. Normalising is done in float64 as well, rounded once: exact
(x − mean) at any offset and no overflow at any float32 scale, and still limited by memory.
"""

import math
from typing import NamedTuple

import numpy as np

from .columns import add, add_products, add_squares, fold, normalize, normalize_backward, repeat
from .jit import device, kernel, prange
from .memory import empty, empty_like

__all__ = ["BLOCK", "LANES", "backward", "flat", "flat_as", "forward", "layout", "vector"]

BLOCK = 1 << 15            # elements: 128 KB of float32, of 1 MB of L2: room for dy and dx
LANES = 64                 # columns at least: 8 vectors of float64 hide the latency of the adds
TILE = 1024                # channels at most per task of rows × channels

_EMPTY = {np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)}


class Plan(NamedTuple):
    """How (N, C, S) is cut: tasks of `rows` × `tile` channels; S = 1 is rows × channels."""

    N: int
    C: int
    S: int
    rows: int
    tile: int
    width: int

    @property
    def blocks(self):
        return -(-self.N // self.rows)

    @property
    def tiles(self):
        return -(-self.C // self.tile)


def _plan(N, C, S):
    if S == 1:
        tile = max(1, min(C, TILE))
        width = tile if C > TILE else tile * max(1, LANES // tile)
        return Plan(N, C, 1, max(64, BLOCK // tile), tile, width)
    rows = max(1, min(N, BLOCK // S))
    return Plan(N, C, S, rows, max(1, BLOCK // (rows * S)), LANES)


def _is_rows(x):
    """Channels-last memory, or a matrix: channel is the fastest axis."""
    return x.ndim == 2 or x.transpose(0, *range(2, x.ndim), 1).flags.c_contiguous


def layout(x):
    """x dense in memory, its plan, and whether it is rows × channels."""
    if x.ndim == 2:
        x = x if x.flags.c_contiguous else np.ascontiguousarray(x)
        return x, _plan(*x.shape, 1), True
    N, C = x.shape[:2]
    S = math.prod(x.shape[2:])
    if C == 1 or S == 1:
        x = x if x.flags.c_contiguous else np.ascontiguousarray(x)
        return x, _plan(N * S, C, 1), False
    if _is_rows(x):
        return x, _plan(N * S, C, 1), True
    if x.flags.c_contiguous:
        return x, _plan(N, C, S), False
    dense = empty_like(x)
    if not (_is_rows(dense) or dense.flags.c_contiguous):
        dense = empty(x.shape, x.dtype)
    dense[...] = x
    return layout(dense)


def flat(x, rows):
    """The memory of a dense x as one axis."""
    return (x.transpose(0, *range(2, x.ndim), 1) if rows and x.ndim > 2 else x).reshape(-1)


def flat_as(a, x, rows):
    """Memory of `a` in the same order as x's, as one axis."""
    if rows and x.ndim > 2:
        a = a.transpose(0, *range(2, a.ndim), 1)
    return (a if a.flags.c_contiguous else np.ascontiguousarray(a)).reshape(-1)


def vector(a, dtype):
    """A (C,) array of that dtype; an empty one stands for None."""
    if a is None:
        return _EMPTY[dtype]
    return a if a.dtype == dtype and a.flags.c_contiguous else np.ascontiguousarray(a, dtype)


@device
def _segment(plan, n, c, rows, channels):
    """Memory of rows n.. of channels c..: start, step, count and length of its contiguous runs."""
    if plan.S > 1:
        return (n * plan.C + c) * plan.S, plan.C * plan.S, rows, plan.S
    if channels == plan.C:
        return n * plan.C, 0, 1, rows * plan.C
    return n * plan.C + c, plan.C, rows, channels


@device
def _columns(plan, t):
    """Task t: block, its first row, its rows, first channel, last channel, channels at a time."""
    tiles = (plan.C + plan.tile - 1) // plan.tile
    b, c0 = t // tiles, t % tiles * plan.tile
    n = b * plan.rows
    c1 = min(c0 + plan.tile, plan.C)
    return b, n, min(plan.rows, plan.N - n), c0, c1, (1 if plan.S > 1 else c1 - c0)


@device
def _width(plan, channels):
    """Columns for so many channels: the last tile of many channels is narrower."""
    return plan.width if plan.S > 1 or channels == plan.tile else channels


@device
def _block_stats(x, plan, t, mean, m2):
    """Mean and sum of squares about it of one task, into mean[b, c] and m2[b, c]."""
    b, n, rows, c0, c1, step_c = _columns(plan, t)
    W = _width(plan, step_c)
    pivot, acc = np.empty(W), np.empty(W)
    for c in range(c0, c1, step_c):
        start, step, count, length = _segment(plan, n, c, rows, step_c)
        first = x[start:start + step_c]
        block_mean, block_m2 = mean[b, c:c + step_c], m2[b, c:c + step_c]
        for j in range(step_c):
            block_mean[j] = first[j] if np.isfinite(first[j]) else 0.0
        repeat(block_mean, step_c, pivot)
        acc[:] = 0.0
        for i in range(count):
            add(x[start + i * step:start + i * step + length], pivot, acc)
        fold(acc, step_c, block_m2)
        for j in range(step_c):
            block_mean[j] += block_m2[j] / (rows * plan.S)
        repeat(block_mean, step_c, pivot)
        acc[:] = 0.0
        for i in range(count):
            add_squares(x[start + i * step:start + i * step + length], pivot, acc)
        fold(acc, step_c, block_m2)


@device
def _merge(plan, block_mean, block_m2, mean, var):
    """Chan's formula over the blocks in order; the weights are those of whole blocks."""
    mean[:] = 0.0
    var[:] = 0.0
    for b in range(block_mean.shape[0]):
        before = b * plan.rows
        rows = min(plan.rows, plan.N - before)
        w = rows / (before + rows)
        f = w * before * plan.S
        m, s = block_mean[b], block_m2[b]
        for c in range(plan.C):
            d = m[c] - mean[c]
            mean[c] += d * w
            var[c] += s[c] + d * d * f
    for c in range(plan.C):
        var[c] /= max(1, plan.N * plan.S)


@device
def _block_normalize(x, plan, t, gamma, beta, mean, invstd, y):
    _, n, rows, c0, c1, step_c = _columns(plan, t)
    W = _width(plan, step_c)
    m, scale, shift, a = np.empty(W), np.empty(W), np.empty(W), np.empty(step_c)
    for c in range(c0, c1, step_c):
        start, step, count, length = _segment(plan, n, c, rows, step_c)
        repeat(mean[c:c + step_c], step_c, m)
        for j in range(step_c):
            a[j] = invstd[c + j] * gamma[c + j] if gamma.size else invstd[c + j]
        repeat(a, step_c, scale)
        for j in range(step_c):
            a[j] = beta[c + j] if beta.size else 0.0
        repeat(a, step_c, shift)
        for i in range(count):
            at = start + i * step
            normalize(x[at:at + length], m, scale, shift, y[at:at + length])


@kernel
def forward(x, gamma, beta, eps, plan, tasks, collect, y, mean, var, invstd):
    """Statistics of x (if collect), then y where it is not empty."""
    if collect:
        blocks = (plan.N + plan.rows - 1) // plan.rows
        block_mean, block_m2 = np.empty((blocks, plan.C)), np.empty((blocks, plan.C))
        for t in prange(tasks):
            _block_stats(x, plan, t, block_mean, block_m2)
        _merge(plan, block_mean, block_m2, mean, var)
        for c in range(plan.C):
            invstd[c] = 1.0 / math.sqrt(var[c] + eps)
    if y.size:
        for t in prange(tasks):
            _block_normalize(x, plan, tasks - 1 - t, gamma, beta, mean, invstd, y)


@device
def _block_products(dy, x, plan, t, mean, sum_dy, sum_dx):
    b, n, rows, c0, c1, step_c = _columns(plan, t)
    W = _width(plan, step_c)
    m, s, p = np.empty(W), np.empty(W), np.empty(W)
    for c in range(c0, c1, step_c):
        start, step, count, length = _segment(plan, n, c, rows, step_c)
        repeat(mean[c:c + step_c], step_c, m)
        s[:] = 0.0
        p[:] = 0.0
        for i in range(count):
            at = start + i * step
            add_products(dy[at:at + length], x[at:at + length], m, s, p)
        fold(s, step_c, sum_dy[b, c:c + step_c])
        fold(p, step_c, sum_dx[b, c:c + step_c])


@device
def _block_backward(dy, x, plan, t, gamma, mean, invstd, sum_dy, sum_dy_xhat, dx):
    _, n, rows, c0, c1, step_c = _columns(plan, t)
    W, total = _width(plan, step_c), plan.N * plan.S
    m, scale, shift, slope, a = np.empty(W), np.empty(W), np.empty(W), np.empty(W), np.empty(step_c)
    for c in range(c0, c1, step_c):
        start, step, count, length = _segment(plan, n, c, rows, step_c)
        repeat(mean[c:c + step_c], step_c, m)
        for j in range(step_c):
            a[j] = invstd[c + j] * gamma[c + j] if gamma.size else invstd[c + j]
        repeat(a, step_c, scale)
        for j in range(step_c):
            a[j] = sum_dy[c + j] / total
        repeat(a, step_c, shift)
        for j in range(step_c):
            a[j] = sum_dy_xhat[c + j] / total * invstd[c + j]
        repeat(a, step_c, slope)
        for i in range(count):
            at = start + i * step
            normalize_backward(dy[at:at + length], x[at:at + length], m, scale, shift, slope,
                                dx[at:at + length])


@device
def _sum_blocks(blocks, out):
    out[:] = 0.0
    for b in range(blocks.shape[0]):
        row = blocks[b]
        for c in range(out.size):
            out[c] += row[c]


@kernel
def backward(dy, x, gamma, mean, invstd, plan, tasks, collect, sum_dy, sum_dy_xhat, dx):
    """Σdy and Σ dy x̂ (if collect), then dx where it is not empty."""
    if collect:
        blocks = (plan.N + plan.rows - 1) // plan.rows
        block_dy, block_dx = np.empty((blocks, plan.C)), np.empty((blocks, plan.C))
        for t in prange(tasks):
            _block_products(dy, x, plan, t, mean, block_dy, block_dx)
        _sum_blocks(block_dy, sum_dy)
        _sum_blocks(block_dx, sum_dy_xhat)
        for c in range(plan.C):
            sum_dy_xhat[c] *= invstd[c]
    if dx.size:
        for t in prange(tasks):
            _block_backward(dy, x, plan, tasks - 1 - t, gamma, mean, invstd, sum_dy, sum_dy_xhat,
                            dx)
