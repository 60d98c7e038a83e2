"""Loops of batch normalization over dense memory: statistics, then y; sums, then dx.

Sums are taken in the array's dtype over chunks in which one accumulator takes at most 128 values,
about a pivot close to the chunk's mean; chunks are merged in float64 in index order by Chan's
formula (Chan, Golub & LeVeque 1979). The pivot is the mean so far. Where it lies more than 2
standard deviations from the chunk's mean, cancellation would cost digits: the chunk is read again
about its own mean. What leaves the range of float32 (squares of 1e20, say) makes a kernel return
True: the caller does it in float64.

A *task* is a tile of channels and a block of rows. If one block holds all rows of its tile, it is
small enough to be in a cache still when it is read the second time, and the task does all; else
sums come from all tasks first, and the second pass goes backwards, from what was read last.
"""

import math
from typing import NamedTuple

import numpy as np

from .columns import (
    HI,
    INV,
    MEAN_DY,
    PAST,
    WRITE,
    add_products,
    add_squares,
    inner,
    normalize,
    normalize_backward,
    pitch,
)
from .jit import kernel, prange
from .simd import VECTOR, lanes, load, load_part, pointer, splat, store, store_part, total

__all__ = ["ADDS", "Plan", "backward", "backward_block", "forward", "forward_block", "infinite",
           "lost", "move", "plan"]

ADDS = 128                 # values per accumulator and chunk
LINE = 1024                # columns of a tile
FEW = 32                   # rows that several rows are made one for
RUN = 256                  # values of a plane from which on it is a matrix of its own
BLOCK_BYTES = 1 << 19
SLAB_BYTES = 1 << 22       # what one task reads twice: two cores' share of a 16 MB cache and more


class Plan(NamedTuple):
    """How (N, C, S) memory is cut. A segment is S values of one channel, or a piece of them."""

    N: int                 # segments per channel
    C: int
    S: int                 # values of a channel that lie together
    pieces: int            # segments that they are cut into
    length: int            # values of a segment, the last piece apart
    tile: int              # channels per task
    together: int          # channels whose columns make one row
    inner: int             # columns of a channel that lie together
    W: int                 # columns held
    chunk: int             # segments summed in the array's dtype
    rows: int              # segments per block
    blocks: int
    tiles: int
    back: int              # whether the second pass goes backwards
    aligned: int           # whether every vector begins at a multiple of vectors


def plan(N, C, S, itemsize):
    """A Plan, as an array, for memory of that shape: S values of a channel, C channels, N times."""
    lanes = VECTOR // itemsize
    size = C * S * itemsize * N
    if C == 1 or S >= RUN:
        N, S = (1, N * S) if C == 1 else (N, S)
        W = 4 * lanes
        length = min(S, ADDS * W)
        pieces = -(-S // length)
        N, together, inner, chunk = N * pieces, 1, W, max(1, ADDS * W // length)
    else:
        pieces, length, inner = 1, S, S
        unit = lanes // math.gcd(S, lanes)
        together = C if C * S <= LINE else min(C, max(unit, LINE // S // unit * unit))
        W, chunk = together * S, ADDS
        repeat = lanes // math.gcd(W, lanes)
        repeat *= -(-4 * lanes // (repeat * W))
        if together == C and repeat * W <= 2 * LINE and repeat * FEW <= N:
            W, chunk = repeat * W, repeat * ADDS
    return _cut(N, C, S, pieces, length, together, inner, W, chunk, size, itemsize)


def _cut(N, C, S, pieces, length, together, inner, W, chunk, size, itemsize):
    """Tiles and blocks: whole tiles where they are small and there are enough of them."""
    slab = N * length * itemsize
    tiles = -(-C // together)
    if size <= 1 << 20:
        tile, rows = C if together == 1 else together, N
    elif slab * together <= SLAB_BYTES and tiles >= min(16, size >> 19):
        tile, rows = max(together, min(BLOCK_BYTES // 2 // slab, -(-C // 16))), N
    else:
        tile, rows = together, max(1, BLOCK_BYTES // (length * together * itemsize))
        rows = rows if rows < chunk else rows // chunk * chunk
    if together > 1:
        tile = together
    lanes = VECTOR // itemsize
    aligned = W % lanes == 0 and (S if together == 1 else C * S) % lanes == 0
    return np.array(Plan(N, C, S, pieces, length, tile, together, inner, W, chunk, rows,
                         -(-N // rows), -(-C // tile), size > 1 << 22, aligned), np.int64)


@inner
def _unpack(p):
    """A tuple of 16 fields as an argument would cost 2 us per call."""
    return Plan(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12],
                p[13], p[14])


@inner
def _values(plan, m):
    """Values of one channel in the first m segments."""
    return m // plan.pieces * plan.S + min(m % plan.pieces * plan.length, plan.S)


@inner
def _table(x, plan, lines):
    """An uninitialised table, its lines aligned."""
    L = lanes(x)
    room = np.empty(lines * pitch(plan.W, L) + L, x.dtype)
    return room[-(room.ctypes.data // x.itemsize) % L:]


@inner
def _spread(values, v, channels, plan, table, line):
    """Line of the table: the value of each column's channel, found from values[v] on."""
    inner, reach, L, t = plan.inner, channels * plan.inner, lanes(table), pointer(table)
    at = line * pitch(plan.W, L)
    for first in range(at, at + plan.W if channels == plan.together else at + 1, reach):
        if inner == 1:
            for c in range(channels):
                table[first + c] = values[v + c]
            continue
        for c in range(channels):
            value, begin = splat(table.dtype.type(values[v + c])), first + c * inner
            for k in range(0, inner - L + 1, L):
                store(t, begin + k, value)
            if inner % L:
                store_part(t, begin + inner // L * L, value, inner % L)


@inner
def _fold(table, line, channels, plan, out, v):
    """The sum of the columns of each channel, from out[v] on."""
    inner, reach, L, t = plan.inner, channels * plan.inner, lanes(table), pointer(table)
    at = line * pitch(plan.W, L)
    for c in range(channels):
        out[v + c] = 0.0
    for first in range(at, at + plan.W if channels == plan.together else at + 1, reach):
        if inner == 1:
            for c in range(channels):
                out[v + c] += table[first + c]
            continue
        for c in range(channels):
            begin = first + c * inner
            s = load_part(t, begin + inner // L * L, inner % L)
            for k in range(0, inner - L + 1, L):
                s = s + load(t, begin + k)
            out[v + c] += total(s)


@inner
def _settle(work, channels, n, before, mean, m2, b, final):
    """Merge a chunk: n values per channel that, taken about the pivot, add up to s and their
    squares to q. False if a pivot was too far (unless final): pivots are the chunk's means then."""
    far, inverse = False, 1.0 / n
    for c in range(channels):
        d = work[channels + c] * inverse
        q = work[2 * channels + c] - d * d * n
        work[channels + c], work[2 * channels + c] = d, q
        far |= d * d * n > 4.0 * q
    w = n / (before + n)
    for c in range(channels):
        work[c] += work[channels + c]
        if final or not far:
            d, q = work[c] - mean[b + c], work[2 * channels + c]
            mean[b + c] += d * w
            m2[b + c] += (0.0 if q < 0.0 else q) + d * d * w * before
    return final or not far


@inner
def _statistics(x, plan, first, last, c, channels, table, work, mean, m2, b):
    """Mean and sum of squares about it of a block of segments, from mean[b] and m2[b] on."""
    start = (first // plan.pieces * plan.C + c) * plan.S + first % plan.pieces * plan.length
    for k in range(channels):
        v = np.float64(x[start + k * plan.S])
        mean[b + k] = v if abs(v) < math.inf else 0.0
        m2[b + k] = 0.0
    p = pointer(x)
    m, size, before = first, min(16, plan.chunk), 0
    while m < last:
        end = min(last, m + size)
        n = _values(plan, end) - _values(plan, m)
        for k in range(channels):
            work[k] = mean[b + k]
        for final in range(2):
            for k in range(channels):
                work[k] = x.dtype.type(work[k])
            _spread(work, 0, channels, plan, table, HI)
            for k in range(2 * pitch(plan.W, lanes(table))):
                table[k] = 0
            add_squares(p, p, p, p, plan, m, end, False, c, channels, table, 0)
            _fold(table, 0, channels, plan, work, channels)
            _fold(table, 1, channels, plan, work, 2 * channels)
            if _settle(work, channels, n, before, mean, m2, b, final == 1):
                break
        m, size, before = end, plan.chunk, before + n


@inner
def _constants(plan, gamma, beta, mean, invstd, c, channels, table, work):
    """Lines HI, LO, SCALE and SHIFT of the table for the channels from c on."""
    for k in range(channels):
        hi = table.dtype.type(mean[c + k])
        work[k] = hi
        work[channels + k] = mean[c + k] - hi if abs(hi) < math.inf else 0.0
        work[2 * channels + k] = invstd[c + k] * gamma[c + k] if gamma.size else invstd[c + k]
        work[3 * channels + k] = beta[c + k] if beta.size else 0.0
    for line in range(4):
        _spread(work, line * channels, channels, plan, table, HI + line)


@inner
def _merge(plan, block_mean, block_m2, eps, c0, c1, mean, var, invstd):
    """Statistics of channels c0 … c1 from those of their blocks, in order."""
    for c in range(c0, c1):
        mean[c] = var[c] = 0.0
    for b in range(plan.blocks):
        before = _values(plan, b * plan.rows)
        n = _values(plan, min(plan.N, (b + 1) * plan.rows)) - before
        w, at = n / (before + n), b * plan.C
        for c in range(c0, c1):
            d = block_mean[at + c] - mean[c]
            mean[c] += d * w
            var[c] += block_m2[at + c] + d * d * w * before
    total = 1.0 / _values(plan, plan.N)
    for c in range(c0, c1):
        var[c] *= total
        invstd[c] = 1.0 / np.sqrt(var[c] + eps)


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
    table, work = _table(x, plan, 6), np.empty(4 * plan.together, np.float64)
    for c in range(c0, c1, plan.together):
        channels = min(c1 - c, plan.together)
        if collect:
            _statistics(x, plan, first, last, c, channels, table, work, block_mean, block_m2,
                        b * plan.C + c)
            if plan.blocks > 1:
                continue
            _merge(plan, block_mean, block_m2, eps, c, c + channels, mean, var, invstd)
        if y.size:
            _constants(plan, gamma, beta, mean, invstd, c, channels, table, work)
            normalize(pointer(x), pointer(residual), pointer(x), pointer(y), plan, first, last,
                      True, c, channels, table, option)


@inner
def _forward_task(x, residual, gamma, beta, eps, packed, t, collect, option, y, mean, var, invstd,
                  block_mean, block_m2):
    plan = _unpack(packed)
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


@kernel
def forward(x, residual, gamma, beta, running_mean, running_var, momentum, eps, packed, collect,
            option, y, mean, var, invstd):
    """mean, var and invstd of x (if ``collect``), then y where it is not empty. True if float32 is
    not enough: nothing holds then."""
    plan = _unpack(packed)               # a prange takes the array: it cannot rebuild the tuple
    if not collect and lost(x, invstd, invstd, 1.0):
        return True
    tasks, blocks, back = plan.tiles * plan.blocks, plan.blocks if collect else 0, plan.back
    block_mean, block_m2 = np.empty(blocks * plan.C), np.empty(blocks * plan.C)
    for phase in range(2 if blocks > 1 else 1):
        for t in prange(tasks):
            u = np.int64(t)              # a prange counts in uint64, which with int64 gives float64
            if phase == 1 and back:
                u = tasks - 1 - u
            _forward_task(x, residual, gamma, beta, eps, packed, u, collect and phase == 0, option,
                          y, mean, var, invstd, block_mean, block_m2)
        if phase == 0 and blocks > 1:
            _merge(plan, block_mean, block_m2, eps, 0, plan.C, mean, var, invstd)
        if phase == 0 and collect and lost(x, var, invstd, eps):
            return True
    move(running_mean, running_var, momentum, _values(plan, plan.N), mean, var)
    return False


@inner
def _sums(x, dy, y, dz, plan, first, last, c, channels, table, work, option, sum_dy, sum_p, b):
    """Sums of dy and of dy x̂ of a block, chunk by chunk."""
    for k in range(channels):
        sum_dy[b + k] = sum_p[b + k] = 0.0
    m = first
    while m < last:
        end = min(last, m + plan.chunk)
        for k in range(2 * pitch(plan.W, lanes(table))):
            table[k] = 0
        add_products(pointer(x), pointer(dy), pointer(dz), pointer(y), plan, m, end, False, c,
                     channels, table, option)
        _fold(table, 0, channels, plan, work, 0)
        _fold(table, 1, channels, plan, work, channels)
        for k in range(channels):
            sum_dy[b + k] += work[k]
            sum_p[b + k] += work[channels + k]
        m = end


@inner
def _slopes(plan, gamma, invstd, sum_dy, sum_p, c, channels, table, work):
    """Lines MEAN_DY, SLOPE and REST of the table for the channels from c on."""
    inverse = 1.0 / _values(plan, plan.N)
    for k in range(channels):
        mean, scale = sum_dy[c + k] * inverse, invstd[c + k]
        if gamma.size:
            scale *= gamma[c + k]
        hi = table.dtype.type(mean)
        work[k], work[channels + k] = hi, sum_p[c + k] * inverse * -scale
        work[2 * channels + k] = (hi - mean) * scale if abs(hi) < math.inf else 0.0
    for line in range(3):
        _spread(work, line * channels, channels, plan, table, MEAN_DY + line)


@inner
def _total(plan, block_dy, block_p, c0, c1, sum_dy, sum_p, dgamma, dbeta):
    """Sums over the blocks of channels c0 … c1, in order."""
    for c in range(c0, c1):
        sum_dy[c] = sum_p[c] = 0.0
    for b in range(plan.blocks):
        for c in range(c0, c1):
            sum_dy[c] += block_dy[b * plan.C + c]
            sum_p[c] += block_p[b * plan.C + c]
    for c in range(c0, c1):
        dbeta[c], dgamma[c] = sum_dy[c], sum_p[c]


@inner
def backward_block(x, dy, y, gamma, beta, mean, invstd, plan, b, c0, c1, collect, option, dz,
                   block_dy, block_p, sum_dy, sum_p, dgamma, dbeta, dx):
    """Sums of channels c0 … c1 in block b, and dx if they are known after that."""
    first = b * plan.rows
    last = min(first + plan.rows, plan.N)
    table, work = _table(x, plan, 10), np.empty(4 * plan.together, np.float64)
    source, rest = pointer(dy), option
    if option & WRITE:
        source, rest = pointer(dz), option & PAST
    for c in range(c0, c1, plan.together):
        channels = min(c1 - c, plan.together)
        _constants(plan, gamma, beta, mean, invstd, c, channels, table, work)
        _spread(invstd, c, channels, plan, table, INV)
        if collect:
            _sums(x, dy, y, dz, plan, first, last, c, channels, table, work, option, block_dy,
                  block_p, b * plan.C + c)
            if plan.blocks > 1:
                continue
            _total(plan, block_dy, block_p, c, c + channels, sum_dy, sum_p, dgamma, dbeta)
        if dx.size:
            _slopes(plan, gamma, invstd, sum_dy, sum_p, c, channels, table, work)
            normalize_backward(pointer(x), source, pointer(dx), pointer(y), plan, first, last, True,
                               c, channels, table, rest)


@inner
def _backward_task(x, dy, y, gamma, beta, mean, invstd, packed, t, collect, option, dz, block_dy,
                   block_p, sum_dy, sum_p, dgamma, dbeta, dx):
    plan = _unpack(packed)
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


@kernel
def backward(x, dy, y, gamma, beta, mean, invstd, packed, collect, option, dz, sum_dy, sum_p,
             dgamma, dbeta, dx):
    """Σ dy and Σ dy x̂ of the masked dy (if ``collect``), then dx where it is not empty. True if
    float32 is not enough: nothing holds then."""
    plan = _unpack(packed)
    if lost(x, invstd, invstd, 1.0):
        return True
    tasks, blocks, back = plan.tiles * plan.blocks, plan.blocks if collect else 0, plan.back
    block_dy, block_p = np.empty(blocks * plan.C), np.empty(blocks * plan.C)
    for phase in range(2 if blocks > 1 else 1):
        for t in prange(tasks):
            u = np.int64(t)              # a prange counts in uint64, which with int64 gives float64
            if phase == 1 and back:
                u = tasks - 1 - u
            _backward_task(x, dy, y, gamma, beta, mean, invstd, packed, u, collect and phase == 0,
                           option, dz, block_dy, block_p, sum_dy, sum_p, dgamma, dbeta, dx)
        if phase == 0 and blocks > 1:
            _total(plan, block_dy, block_p, 0, plan.C, sum_dy, sum_p, dgamma, dbeta)
    return collect and infinite(x, sum_dy, sum_p)
