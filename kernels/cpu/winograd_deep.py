"""Winograd's products of winograd.py where their weights fit no cache.

Weights are four times as large transformed: of 512 → 512 channels 38 MB, that go to memory and come
back for every block of tiles. Here a task has a block of tiles and a panel of outputs: it takes the
weights of some channels at a time as they are, transforms them in its second level of cache and
adds their products to its sums there. The inputs, which all panels read, are transformed before.
(One core of Emerald Rapids, 8 images of 7×7: 17.0 ms so far, 14.1 directly, 6.6 so; 512 → 512 of
14×14 32.0, 48.6 and 22.0; 256 → 256 of one image of 14×14 1.6, 1.7 and 0.9. Where many blocks of
tiles share weights that a cache holds, 128 → 128 of 8 images of 28×28, it is 4.2, 11.5 and 5.4.)
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .epilogue import merge, room_for
from .jit import device
from .memory import empty
from .padded import zeros
from .simd import VECTOR, after, keep, lanes, load, pointer, store
from .tasks import share, tasks
from .tiles import strip
from .windows import aligned, shifts, square
from .winograd import DEEP, collect_tiles, next_tile, put_tile, put_weights, take_tile

__all__ = ["winograd_deep"]

DEPTH_BYTES = 256          # of channels at a time: their weights for a panel are then 295 KB
TOGETHER = 1 << 24         # bytes of transformed inputs, half of a usual last-level cache


class _Cut(NamedTuple):
    """How the work is cut: by the shape alone."""

    depth: int             # channels at a time
    passes: int
    block: int             # tiles of a task
    blocks: int
    together: int          # blocks whose inputs are transformed at a time
    wide: int              # values of a tile's sums
    size_v: int            # between the 36 matrices of inputs, of a pass and block, …
    size_u: int            # … of weights, of a pass and panel, …
    size_m: int            # … and of sums


@lru_cache(256)
def _cut(s, itemsize):
    L = VECTOR // itemsize
    W, depth = 2 * L, DEPTH_BYTES // itemsize
    block = -(-s.count // -(-s.count // DEEP))
    wide = min(W, -(-s.O // L) * L)
    # a line behind each matrix: the 36 of one place must not share a set of the L1
    size, passes = block * depth + L, -(-s.C // depth)
    together = max(1, TOGETHER // (passes * 36 * size * itemsize))
    return _Cut(depth, passes, block, -(-s.count // block), together, wide, size, depth * W + L,
                block * wide + L)


@device
def _tiles(s):
    return s.N * -(-s.P // 4) * -(-s.Q // 4)


@device
def _first(t, s):
    """Tile number t: its image and first output."""
    down, across = -(-s.P // 4), -(-s.Q // 4)
    return t // (down * across), t // across % down * 4, t % across * 4


@device
def _inputs_task(task, x, s, cut, b0, v):
    """A block of tiles, from block b0, some channels."""
    part, b = task % cut.passes, b0 + task // cut.passes
    c, t0 = part * cut.depth, b * cut.block
    room = aligned(36 * lanes(x), x)
    n, p, q = _first(t0, s)
    y, own = after(pointer(v), task * 36 * cut.size_v), pointer(room)
    for t in range(min(cut.block, _tiles(s) - t0)):
        take_tile(after(pointer(x), c), s, min(cut.depth, s.C - c), n, p - s.top, q - s.left, own,
                  y, t * cut.depth, cut.size_v)
        n, p, q = next_tile(s, n, p, q)
    keep(room)


@device
def _taps(weight, count, transposed, s, o, k0, k, own, g):
    """g (9, k, L): the taps of outputs o, … and channels k0, …, read backwards if transposed."""
    L, n = lanes(g), min(lanes(g), s.O - o)
    if transposed:
        for i in range(k):
            at = ((k0 + i) * s.O + o) * 9
            for m in range(0, 9, L):
                some = min(L, 9 - m)
                square(weight, count, at + m, 9, n, some, own)
                for r in range(some):
                    store(g, ((8 - m - r) * k + i) * L, load(own, r * L))
        return
    i = t = 0
    for m in range(0, 9 * k, L):
        some = min(L, 9 * k - m)
        square(weight, count, (o * s.C + k0) * 9 + m, 9 * s.C, n, some, own)
        for r in range(some):
            store(g, (t * k + i) * L, load(own, r * L))
            t += 1
            if t == 9:
                i, t = i + 1, 0


@device
def _take_weights(weight, count, transposed, s, o, k0, k, own, g, u, size):
    """u (36 matrices of ``size``, two vectors in a row) = G g Gᵀ of outputs o, … and channels k0,
    …"""
    L = lanes(u)
    for h in range(0, min(2 * L, s.O - o), L):
        _taps(weight, count, transposed, s, o + h, k0, k, own, g)
        for i in range(k):
            put_weights(g, i * L, k * L, own, u, 2 * i * L + h, size)


@device
def _sums(v, weight, count, transposed, s, cut, o, some, own, g, u, m):
    """m (36, tiles, outputs) of a panel from o for so many tiles."""
    L = lanes(m)
    n, W = min(cut.wide, -(-(s.O - o) // L) * L), 2 * L
    for part in range(cut.passes):
        k0 = part * cut.depth
        k, a = min(cut.depth, s.C - k0), after(v, part * 36 * cut.size_v)
        _take_weights(weight, count, transposed, s, o, k0, k, own, g, u, cut.size_u)
        for i in range(36):
            at = i * cut.size_m
            strip(some, n, k, a, i * cut.size_v, cut.depth, 1, u, i * cut.size_u, W,
                  m, at, cut.wide, m, at, cut.wide, 0, 0)


@device
def _task(task, v, weight, transposed, shift, s, cut, b0, blocks, y, spoiled, table):
    """A block of tiles, one of so many from block b0, and a panel."""
    L = lanes(y)
    b, o = b0 + task % blocks, task // blocks * 2 * L
    t0, outputs = b * cut.block, min(2 * L, s.O - o)
    some = min(cut.block, _tiles(s) - t0)
    size_m, size_u, size_g = 36 * cut.size_m, 36 * cut.size_u, 9 * cut.depth * L
    room = aligned(size_m + size_u + size_g + 36 * L, y)
    m = pointer(room)
    u, g, own = after(m, size_m), after(m, size_m + size_u), after(m, size_m + size_u + size_g)
    zeros(m, 0, size_m)
    _sums(after(pointer(v), (b - b0) * cut.passes * 36 * cut.size_v), pointer(weight), weight.size,
          transposed, s, cut, o, some, own, g, u, m)
    n, p, q = start = _first(t0, s)
    for t in range(some):
        bad = put_tile(m, t * cut.wide, cut.size_m, after(pointer(shift), o), s, n, p, q, outputs,
                       own, pointer(y), o)
        if bad != 0:
            spoiled[n] = True
        n, p, q = next_tile(s, n, p, q)
    keep(room)
    if table.size:
        collect_tiles(s, start, some, np.empty(16 * some + 4, np.int64), y, outputs, table, b, o)


@tasks
def _deep(run, x, weight, transposed, shift, s, cut, v, y, spoiled, room):
    """y (N, P, Q, O) by way of v (blocks together, passes, 36, size_v). spoiled[n] is set where a
    value of image n is not finite."""
    for b0 in range(0, cut.blocks, cut.together):
        blocks = min(cut.together, cut.blocks - b0)
        share(_inputs_task, blocks * cut.passes, run, (x, s, cut, b0, v))
        share(_task, blocks * shift.shape[0], run,
              (v, weight, transposed, shift, s, cut, b0, blocks, y, spoiled, room.table))
    if room.table.size:
        merge(run, room.table, room.mean, room.m2)


def winograd_deep(x, weight, bias, s, y, transposed=False, moments=None):
    """As winograd.winograd."""
    cut = _cut(s, x.itemsize)
    v = empty((min(cut.blocks, cut.together) * cut.passes * 36 * cut.size_v,), x.dtype)
    spoiled = np.zeros(s.N, np.bool_)
    _deep(x, np.ascontiguousarray(weight).reshape(-1), transposed,
          shifts(bias, 1, s.O, x.dtype)[0], s, cut, v, y, spoiled,
          room_for(y, cut.blocks, moments), work=2 * y.size * s.C * 9)
    return np.flatnonzero(spoiled)
