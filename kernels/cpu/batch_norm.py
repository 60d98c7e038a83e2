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
    run,
)
from .jit import kernel, prange
from .simd import (
    VECTOR,
    absolute,
    fill,
    greater,
    high,
    keep,
    lanes,
    load,
    load_part,
    low,
    narrow,
    pointer,
    splat,
    store,
    store_part,
    total,
    where,
)

__all__ = ["ADDS", "Plan", "backward", "backward_block", "forward", "forward_block", "infinite",
           "lost", "move", "plan"]

ADDS = 128                 # values per accumulator and chunk
LINE = 1024                # columns of a tile
FEW = 32                   # rows that several rows are made one for
RUN = 256                  # values of a plane from which on it is a matrix of its own
BLOCK_BYTES = 1 << 19
SLAB_BYTES = 1 << 22       # what one task reads twice: two cores' share of a 16 MB cache and more
u = np.uintp               # an index that is not negative: a test for that keeps LLVM from vectors


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
        repeat *= -(-16 * lanes // (repeat * W))
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
def _padded(plan):
    return plan.W + VECTOR // 4


@inner
def _work(plan):
    """Room for two values per column, or four per channel."""
    return np.empty(max(2 * _padded(plan), 4 * plan.together), np.float64)


@inner
def _spread(values, v, channels, plan, table, line):
    """Line of the table: the value of each column's channel, found from values[v] on."""
    inner, reach, L, t = plan.inner, channels * plan.inner, lanes(table), pointer(table)
    at = line * pitch(plan.W, L)
    for first in range(at, at + plan.W if channels == plan.together else at + 1, reach):
        if inner == 1:
            for c in range(channels):
                table[u(first + c)] = values[u(v + c)]
            continue
        for c in range(channels):
            value, begin = splat(table.dtype.type(values[v + c])), first + c * inner
            for k in range(0, inner - L + 1, L):
                store(t, begin + k, value)
            if inner % L:
                store_part(t, begin + inner // L * L, value, inner % L)


@inner
def _clear(table, plan):
    """Zeros in the lines of sums."""
    for k in range(2 * pitch(plan.W, lanes(table))):
        table[u(k)] = 0


@inner
def _far(t, line, W, n):
    """Whether a column's pivot is too far from its mean: then pivots are the chunk's means."""
    inverse, four, far = fill(t, 1.0 / n), fill(t, 4), fill(t, 0)
    for j in range(0, W, lanes(t)):
        s, q = load(t, j), load(t, line + j)
        d = s * inverse
        far = where(greater(d * s, four * (q - d * s)), four, far)
    if total(far) == 0:
        return False
    for j in range(0, W, lanes(t)):
        store(t, HI * line + j, load(t, HI * line + j) + load(t, j) * inverse)
    return True


@inner
def _settle(t, line, W, n, before, mean, m2):
    """Merge a chunk: n values per column that, taken about the pivot, add up to line 0 and their
    squares to line 1. The mean is the next pivot."""
    L, halves = lanes(t), lanes(t) // lanes(mean)
    zero, inverse, w = fill(mean, 0), fill(mean, 1.0 / n), n / (before + n)
    weight, spread = fill(mean, w), fill(mean, w * before)
    for j in range(0, W, L):
        s, q, p = load(t, j), load(t, line + j), load(t, HI * line + j)
        for half in range(halves):
            at = j + half * lanes(mean)
            a, b, pivot = low(s), low(q), low(p)
            if half:
                a, b, pivot = high(s), high(q), high(p)
            d, old = a * inverse, load(mean, at)
            q_own, e = b - d * a, (pivot + d) - old
            q_own = where(greater(zero, q_own), zero, q_own)
            store(mean, at, old + e * weight)
            store(m2, at, load(m2, at) + (q_own + e * e * spread))
        store(t, HI * line + j, narrow(load(mean, j), load(mean, j + lanes(mean)), t))


@inner
def _gather(work, plan, channels, n, mean, m2, b):
    """Statistics of the channels from those of their columns, n values in each."""
    inner, reach, P = plan.inner, channels * plan.inner, _padded(plan)
    repeats = plan.W // reach if channels == plan.together else 1
    for c in range(channels):
        mean[u(b + c)] = m2[u(b + c)] = 0.0
    share = 1.0 / (repeats * inner)
    for first in range(0, repeats * reach, reach):
        for k in range(inner):
            for c in range(channels):
                mean[u(b + c)] += work[u(first + c * inner + k)] * share
    for first in range(0, repeats * reach, reach):
        for k in range(inner):
            for c in range(channels):
                j = first + c * inner + k
                d = work[u(j)] - mean[u(b + c)]
                m2[u(b + c)] += work[u(P + j)] + d * d * n


@inner
def _append(x, plan, first, last, c, channels, n, mean, m2, b):
    """Segments too few for a row of several, value by value after n others."""
    for m in range(first, last):
        for k in range(channels):
            before, at = n + (m - first) * plan.S, run(plan, m, c + k)[0]
            for i in range(plan.S):
                d = x[at + i] - mean[b + k]
                mean[b + k] += d / (before + i + 1.0)
                m2[b + k] += d * (x[at + i] - mean[b + k])


@inner
def _rows(x, plan, first, last, c, channels, table, work, mean, m2, b):
    """Mean and sum of squares about it of a block of rows, column by column."""
    t, L = pointer(table), lanes(table)
    line, unit, p = pitch(plan.W, L), 1, pointer(x)
    if channels == plan.C:
        unit = plan.W // (plan.C * plan.S)
    columns, own, own_m2 = unit * channels * plan.S, pointer(work), pointer(work[_padded(plan):])
    end = last - (last - first) % unit
    at, zero, inf = run(plan, first, c)[0], fill(t, 0), fill(t, math.inf)
    for k in range(2 * _padded(plan)):
        work[u(k)] = 0.0
    for j in range(0, columns if end > first else 0, L):
        v = load_part(p, at + j, min(L, columns - j))
        store(t, HI * line + j, where(greater(inf, absolute(v)), v, zero))
    m, size = first, 16 * unit
    while m < end:
        stop = min(end, m + size)
        n, before = (stop - m) // unit, (m - first) // unit
        for k in range(2):
            _clear(table, plan)
            add_squares(p, p, p, p, plan, m, stop, c, channels, table, 0)
            if k == 1 or not _far(t, line, columns, n):
                break
        _settle(t, line, columns, np.float64(n), np.float64(before), own, own_m2)
        m, size = stop, plan.chunk
    _gather(work, plan, channels, (end - first) // unit, mean, m2, b)
    _append(x, plan, end, last, c, channels, (end - first) * plan.S, mean, m2, b)
    keep(work)


@inner
def _four(t, line):
    """The sum of a line of four vectors."""
    L = lanes(t)
    a, b = load(t, line) + load(t, line + L), load(t, line + 2 * L) + load(t, line + 3 * L)
    return np.float64(total(a + b))


@inner
def _planes(x, plan, first, last, c, table, work, mean, m2, b):
    """The same of a block of segments of one channel."""
    t, p = pointer(table), pointer(x)
    line = pitch(plan.W, lanes(table))
    v = np.float64(x[run(plan, first, c)[0]])
    center, square, before = v if abs(v) < math.inf else 0.0, 0.0, 0
    m, size = first, min(16, plan.chunk)
    while m < last:
        end = min(last, m + size)
        n = _values(plan, end) - _values(plan, m)
        pivot, d, q = np.float64(x.dtype.type(center)), 0.0, 0.0
        for k in range(2):
            work[0] = pivot
            _spread(work, 0, 1, plan, table, HI)
            _clear(table, plan)
            add_squares(p, p, p, p, plan, m, end, c, 1, table, 0)
            d = _four(t, 0) / n
            q = _four(t, line) - d * d * n
            if k == 1 or not d * d * n > 4.0 * q:
                break
            pivot = np.float64(x.dtype.type(pivot + d))
        e, w = pivot + d - center, n / (before + n)
        center += e * w
        square += (0.0 if q < 0.0 else q) + e * e * w * before
        m, size, before = end, plan.chunk, before + n
    mean[b], m2[b] = center, square


@inner
def _statistics(x, plan, first, last, c, channels, table, work, mean, m2, b):
    """Mean and sum of squares about it of a block of segments, from mean[b] and m2[b] on."""
    if plan.inner == plan.W:
        _planes(x, plan, first, last, c, table, work, mean, m2, b)
    else:
        _rows(x, plan, first, last, c, channels, table, work, mean, m2, b)


@inner
def _constants(plan, gamma, beta, mean, invstd, c, channels, table, work):
    """Lines HI, LO, SCALE and SHIFT of the table for the channels from c on."""
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
    for line in range(4):
        _spread(work, line * channels, channels, plan, table, HI + line)


@inner
def _merge(plan, block_mean, block_m2, eps, c0, c1, mean, var, invstd):
    """Statistics of channels c0 … c1 from those of their blocks, in order."""
    for c in range(c0, c1):
        mean[u(c)] = var[u(c)] = 0.0
    for b in range(plan.blocks):
        before = _values(plan, b * plan.rows)
        n = _values(plan, min(plan.N, (b + 1) * plan.rows)) - before
        w, at = n / (before + n), b * plan.C
        for c in range(c0, c1):
            d = block_mean[u(at + c)] - mean[u(c)]
            mean[u(c)] += d * w
            var[u(c)] += block_m2[u(at + c)] + d * d * w * before
    total = 1.0 / _values(plan, plan.N)
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
    table, work = _table(x, plan, 6), _work(plan)
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
def _widen(t, line, W, own, own_p):
    """Add the sums of a chunk to those of the block."""
    L, halves = lanes(t), lanes(t) // lanes(own)
    for j in range(0, W, L):
        s, p = load(t, j), load(t, line + j)
        store(own, j, load(own, j) + low(s))
        store(own_p, j, load(own_p, j) + low(p))
        if halves == 2:
            k = j + lanes(own)
            store(own, k, load(own, k) + high(s))
            store(own_p, k, load(own_p, k) + high(p))


@inner
def _fold(work, P, channels, plan, out, v):
    """The sum of the columns of each channel, from out[v] on."""
    inner, reach = plan.inner, channels * plan.inner
    repeats = plan.W // reach if channels == plan.together else 1
    for c in range(channels):
        out[u(v + c)] = 0.0
    for first in range(P, P + repeats * reach, reach):
        for k in range(inner):
            for c in range(channels):
                out[u(v + c)] += work[u(first + c * inner + k)]


@inner
def _sums(x, dy, y, dz, plan, first, last, c, channels, table, work, option, sum_dy, sum_p, b):
    """Sums of dy and of dy x̂ of a block, chunk by chunk."""
    t, P = pointer(table), _padded(plan)
    for k in range(2 * P):
        work[u(k)] = 0.0
    for m in range(first, last, plan.chunk):
        _clear(table, plan)
        add_products(pointer(x), pointer(dy), pointer(dz), pointer(y), plan, m,
                     min(last, m + plan.chunk), c, channels, table, option)
        _widen(t, pitch(plan.W, lanes(table)), plan.W, pointer(work), pointer(work[P:]))
    _fold(work, 0, channels, plan, sum_dy, b)
    _fold(work, P, channels, plan, sum_p, b)
    keep(work)


@inner
def _slopes(plan, gamma, invstd, sum_dy, sum_p, c, channels, table, work):
    """Lines MEAN_DY, SLOPE and REST of the table for the channels from c on."""
    inverse = 1.0 / _values(plan, plan.N)
    for k in range(channels):
        work[u(k)] = invstd[u(c + k)]
    for k in range(channels if gamma.size else 0):
        work[u(k)] *= gamma[u(c + k)]
    for k in range(channels):
        mean, scale = sum_dy[u(c + k)] * inverse, work[u(k)]
        hi = np.float64(table.dtype.type(mean))
        work[u(k)], work[u(channels + k)] = hi, sum_p[u(c + k)] * inverse * -scale
        work[u(2 * channels + k)] = (hi - mean) * scale if abs(hi) < math.inf else 0.0
    for line in range(3):
        _spread(work, line * channels, channels, plan, table, MEAN_DY + line)


@inner
def _total(plan, block_dy, block_p, c0, c1, sum_dy, sum_p, dgamma, dbeta):
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
    table, work = _table(x, plan, 10), _work(plan)
    source, rest = pointer(dy), option
    if option & WRITE:
        source, rest = pointer(dz), option & PAST
    for c in range(c0, c1, plan.together):
        channels = min(c1 - c, plan.together)
        _constants(plan, gamma, beta, mean, invstd, c, channels, table, work)
        _spread(invstd, c, channels, plan, table, INV)
        if collect:
            _sums(x, dy, y, dz, plan, first, last, c, channels, table, work,
                  option if plan.blocks > 1 else option & ~PAST, block_dy, block_p, b * plan.C + c)
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
