"""The weight gradient of a 3×3 convolution with stride 1 by Winograd's products: the transpose of
winograd.py in the weights.

What y = A [(G g Gᵀ) ⊙ (B d Bᵀ)] Aᵀ is in a tile, dg = Gᵀ [Σ (Aᵀ dy A) ⊙ (B d Bᵀ)] G is over all
tiles: 36 matrix products whose inner dimension is the tiles, a quarter of the direct sum's
multiplications. A task has a part of the tiles and a slice of the channels of x and of dy; it takes
a block of tiles at a time to 36 values each and adds their products to its sums, that stay in its
second level of cache. Errors are those of winograd.py, whose points it uses: 1 to 2 times the
direct sum's. Where a result is not finite, the direct path is to make all of them.
"""

import math
from typing import NamedTuple

import numpy as np

from . import winograd
from .jit import device
from .memory import empty
from .microkernel import transpose
from .padded import zeros
from .simd import (
    VECTOR,
    after,
    fill,
    fma,
    keep,
    lanes,
    load,
    load_part,
    pointer,
    store,
    store_part,
    total,
)
from .sumtile import strip
from .tasks import share, spaces, taken, tasks
from .windows import aligned
from .winograd import Tiles, load6, next_tile, save, take_tile

__all__ = ["suits", "winograd_weight"]

SLICE_BYTES = 256          # of channels: 36 × 64 × 64 sums of float32 are half an L2
BLOCK_BYTES = 1 << 18      # of transformed values: a quarter of an L2
BLOCKS = 16, 96            # tiles in a block, at least and at most
TASKS = 16
PART_TILES = 64            # below, the sums of a part cost more than a tenth of its products
# Costs in multiply-adds, measured: of the transforms per tile and channel, and of a weight's sums.
# One core took this part of the direct sums' time: of 64 images of 16×16 with 8 → 16 channels 1.23,
# with 12 → 24 0.71; of 6×6 with 16 → 16 1.03; of 8 images of 7×7 with 128 → 128 0.47, of 2 of 14×14
# with 256 → 256 1.02, of one 1.29.
TRANSFORM, WEIGHT, BETTER = 200, 1000, 0.7


class _Cut(NamedTuple):
    """How the work is cut: by the shape alone, so that the sums are the same for all threads."""

    n_c: int               # channels of x and of dy in a slice
    n_o: int
    slices_c: int
    slices_o: int
    parts: int
    share: int             # tiles of a part
    block: int
    pitch_v: int           # values between the tiles of one product
    pitch_w: int
    size_v: int            # and between its 36 matrices
    size_w: int
    size: int              # and of those of the sums
    own: int               # values to work with: 36 vectors, and all taps of a slice's channels


def _tiles(g):
    return Tiles(g.N, g.H, g.W, g.C, g.P, g.Q, g.O, g.ph, g.pw)


def suits(g, itemsize):
    """Whether this path is faster than the direct one."""
    if not (winograd.enabled and g.G == g.sh == g.sw == g.dh == g.dw == 1 and g.I == g.J == 3):
        return False
    lanes, count = VECTOR // itemsize, _tiles(g).count
    C, O = -(-g.C // lanes) * lanes, -(-g.O // lanes) * lanes
    cost = count * (36 * C * O + TRANSFORM * (C + O)) + WEIGHT * C * O
    return cost < BETTER * 9 * g.N * g.P * g.Q * g.C * g.O


def _slice(n, lanes, itemsize):
    """The channels of a slice, in whole vectors, and the number of slices."""
    slices = -(-n * itemsize // SLICE_BYTES)
    each = -(-n // (slices * lanes)) * lanes
    return each, -(-n // each)


def _cut(s, itemsize):
    lanes = VECTOR // itemsize
    (n_c, slices_c), (n_o, slices_o) = _slice(s.C, lanes, itemsize), _slice(s.O, lanes, itemsize)
    parts = max(1, min(-(-TASKS // (slices_c * slices_o)), s.count // PART_TILES))
    share = -(-s.count // parts)
    fits = BLOCK_BYTES // (36 * itemsize * (n_c + n_o))
    most = max(BLOCKS[0], min(BLOCKS[1], fits))
    block = -(-share // -(-share // most))
    # a line behind each matrix: the 36 of one place must not share a set of the L1
    return _Cut(n_c, n_o, slices_c, slices_o, -(-s.count // share), share, block, n_c, n_o,
                block * n_c + lanes, block * n_o + lanes, n_c * n_o + lanes,
                (36 + 9 * n_c) * lanes)


@device
def _out(x, e0, e1, e2, e3):
    """Aᵀ e."""
    half, two = fill(x, 0.5), fill(x, 2)
    a, b = fill(x, math.sqrt(0.5)), fill(x, math.sqrt(2))
    p, q, r, s = fma(half, e2, e0), a * fma(half, e3, e1), fma(two, e2, e0), b * fma(two, e3, e1)
    return e0, p + q, p - q, r + s, r - s, e3


@device
def _back(x, m0, m1, m2, m3, m4, m5):
    """Gᵀ m."""
    half, two = fill(x, 0.5), fill(x, 2)
    c, d = fill(x, -2 / 3), fill(x, 1 / 6)
    a, b = fill(x, math.sqrt(0.5)), fill(x, math.sqrt(2))
    p, q, r, s = c * (m1 + m2), c * (m1 - m2), d * (m3 + m4), d * (m3 - m4)
    return m0 + p + r, fma(a, q, b * s), fma(half, p, fma(two, r, m5))


@device
def _four(y, at, step, count, n):
    """Four values down a column of dy, n lanes of each, zeros from ``count`` on."""
    return (load_part(y, at, n if count > 0 else 0), load_part(y, at + step, n if count > 1 else 0),
            load_part(y, at + 2 * step, n if count > 2 else 0),
            load_part(y, at + 3 * step, n if count > 3 else 0))


@device
def _take_outputs(dy, s, channels, n, p, q, own, w, to, size):
    """w[36 rows of ``size``, from to] = Aᵀ dy A of the 4×4 outputs from (p, q) of image n, zeros
    outside, for so many channels."""
    L, inside = lanes(dy), p + 4 <= s.P and q + 4 <= s.Q
    first, down = ((n * s.P + p) * s.Q + q) * s.O, s.Q * s.O
    for o in range(0, channels, L):
        m = min(L, channels - o)
        for j in range(4):
            at = first + j * s.O + o
            if inside and m == L:
                e = (load(dy, at), load(dy, at + down), load(dy, at + 2 * down),
                     load(dy, at + 3 * down))
            else:
                e = _four(dy, at, down, s.P - p if q + j < s.Q else 0, m)
            save(own, j * L, 4 * L, _out(dy, *e))
        for i in range(6):
            at = 4 * i * L
            e = (load(own, at), load(own, at + L), load(own, at + 2 * L), load(own, at + 3 * L))
            save(w, to + o + 6 * i * size, size, _out(dy, *e))


@device
def _products(v, w, cut, tiles, sums):
    """Add the products of a block of tiles."""
    L = lanes(v)
    counts, steps_v, steps_w = (1, 1, tiles), (0, 0, cut.pitch_v), (0, 0, cut.pitch_w)
    for i in range(36):
        for o in range(0, cut.n_o, 2 * L):
            strip(cut.n_o - o <= L, v, i * cut.size_v, steps_v, cut.n_c, w, i * cut.size_w + o,
                  steps_w, counts, sums, i * cut.size + o, cut.n_o, w, 0, 0)


@device
def _part(dy, x, s, cut, t0, t1, c, o, v, w, own, sums):
    """The sums of tiles t0 … t1 of a slice of channels from c and o."""
    down, across = -(-s.P // 4), -(-s.Q // 4)
    channels, outputs = min(cut.n_c, s.C - c), min(cut.n_o, s.O - o)
    n, p, q = t0 // (down * across), t0 // across % down * 4, t0 % across * 4
    for t in range(t0, t1, cut.block):
        tiles = min(cut.block, t1 - t)
        for k in range(tiles):
            take_tile(after(x, c), s, channels, n, p - s.top, q - s.left, own, v, k * cut.pitch_v,
                      cut.size_v)
            _take_outputs(after(dy, o), s, outputs, n, p, q, own, w, k * cut.pitch_w, cut.size_w)
            n, p, q = next_tile(s, n, p, q)
        _products(v, w, cut, tiles, sums)


@device
def _weights(m, at, cut, parts, own, y, to):
    """y[9 vectors from to] = Gᵀ (Σ over the parts of sums) G; NaN if a value is not finite."""
    L, found = lanes(y), fill(y, 0)
    whole = cut.slices_c * cut.slices_o * 36 * cut.size
    for i in range(36):
        value = load(m, at + i * cut.size)
        for part in range(1, parts):
            value = value + load(m, at + i * cut.size + part * whole)
        store(own, i * L, value)
    for j in range(6):
        save(own, j * L, 6 * L, _back(y, *load6(own, j * L, 6 * L)))
    for i in range(3):
        r0, r1, r2 = _back(y, *load6(own, 6 * i * L, L))
        save(y, to + 3 * i * L, L, (r0, r1, r2))
        found = found + (r0 + r1 + r2)
    return found - found


@device
def _put_weights(m, at, cut, parts, s, c, o, own, y):
    """A vector of outputs from o and the channels of a slice from c; whether all are finite."""
    L, bad, channels = lanes(y), fill(y, 0), min(cut.n_c, s.C - c)
    rows = after(own, 36 * L)
    for i in range(channels):
        bad = bad + _weights(m, at + i * cut.n_o, cut, parts, own, rows, i * 9 * L)
    for k in range(0, 9 * channels, L):
        transpose(rows, k * L, L, own, 0, L)
        for r in range(min(L, s.O - o)):
            store_part(y, ((o + r) * s.C + c) * 9 + k, load(own, r * L), min(L, 9 * channels - k))
    return total(bad) == 0


@device
def _task(worker, dy, x, s, cut, spaces, sums, out, spoiled, next_task):
    """The tasks that a worker comes to. Sums of one part stay in its cache and become weights
    there."""
    slices, L = cut.slices_c * cut.slices_o, lanes(out)
    tasks, tiles = cut.parts * slices, s.N * -(-s.P // 4) * -(-s.Q // 4)
    v = after(pointer(spaces), worker * spaces.shape[1])
    w = after(v, 36 * cut.size_v)
    own = after(w, 36 * cut.size_w)
    t = taken(next_task)
    while t < tasks:
        part, c, o = t // slices, t % slices // cut.slices_o * cut.n_c, t % cut.slices_o * cut.n_o
        y = after(pointer(sums), t * 36 * cut.size) if sums.size else after(own, cut.own)
        zeros(y, 0, 36 * cut.size)
        _part(pointer(dy), pointer(x), s, cut, part * cut.share,
              min((part + 1) * cut.share, tiles), c, o, v, w, own, y)
        if not sums.size:
            for j in range(0, min(cut.n_o, s.O - o), L):
                if not _put_weights(y, j, cut, 1, s, c, o + j, own, pointer(out)):
                    spoiled[0] = True
        t = taken(next_task)


@device
def _back_task(t, s, cut, sums, out, spoiled):
    """A vector of outputs and the channels of a slice, from several parts."""
    vectors, L = -(-s.O // lanes(out)), lanes(out)
    slice_c, o = t // vectors, t % vectors * L
    room = aligned(cut.own, out)
    at = (slice_c * cut.slices_o + o // cut.n_o) * 36 * cut.size + o % cut.n_o
    if not _put_weights(pointer(sums), at, cut, cut.parts, s, slice_c * cut.n_c, o, pointer(room),
                        pointer(out)):
        spoiled[0] = True
    keep(room)


@tasks
def _sum(run, dy, x, s, cut, spaces, sums, out, spoiled):
    """out (O, C · 9) by way of sums (parts, slices of C, of O, 36, n_c, n_o), if there are several
    parts."""
    next_task = np.zeros(1, np.int64)
    share(_task, spaces.shape[0], run, (dy, x, s, cut, spaces, sums, out, spoiled, next_task))
    if sums.size:
        share(_back_task, cut.slices_c * -(-s.O // lanes(out)), run, (s, cut, sums, out, spoiled))


def winograd_weight(dy, x, g):
    """dw (O, 9 C), or None where a value is not finite. dy and x are channels-last."""
    s = _tiles(g)
    cut = _cut(s, x.itemsize)
    alone = cut.parts == 1
    sums = empty((0 if alone else cut.parts, cut.slices_c, cut.slices_o, 36, cut.size), x.dtype)
    out, spoiled = empty((g.O, g.depth), x.dtype), np.zeros(1, np.bool_)
    size = 36 * (cut.size_v + cut.size_w + (cut.size if alone else 0)) + cut.own
    _sum(dy, x, s, cut, spaces(size, x.dtype), sums, out, spoiled, work=2 * dy.size * g.depth)
    return None if spoiled[0] else out
