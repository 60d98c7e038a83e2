"""3×3 convolution with stride 1 by Winograd's F(4×4, 3×3): 36 products make 16 outputs that take
144 directly.

A tile of 6×6 inputs d and the weights g are taken to 36 values each, B d Bᵀ and G g Gᵀ; their
products are summed over the channels, which makes 36 small matrix products, and A m Aᵀ is a tile of
4×4 outputs. The interpolation points are 0, ±√½, ±√2 and ∞: against float64 on normal data the
largest error is 1 to 2 times the direct sum's (1 to 6e-6 of the largest output in float32, for 64
to 1024 channels), where the usual points 0, ±1, ±2 and ∞ err 3 to 5 times more.
(Where weights fit no cache: winograd_deep.py.)

NaN and Inf, and values that overflow, spread over a tile: images in which a result is not finite
are reported, and the direct path makes them again. Beside one huge value, small results of the same
tile keep only the digits that the huge one leaves them.
"""

import math
from typing import NamedTuple

import numpy as np

from .convkernel import FEW
from .epilogue import collect, merge, room_for
from .jit import device
from .memory import empty
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
from .tasks import share, tasks
from .windows import aligned, packed, panel, shifts, spread

__all__ = ["DEEP", "Tiles", "collect_tiles", "deep", "enabled", "load6", "next_tile", "put_tile",
           "put_weights", "save", "suits", "take_tile", "winograd"]

enabled = True
BLOCK_BYTES = 1 << 19      # of transformed inputs and products: half an L2
BLOCKS = 24, 96            # tiles in a block, at least and at most
TASKS = 16
# Transformed weights of more than LARGE bytes are in no cache when they are read, those of NEAR not
# in a core's own; DEEP tiles are one block of winograd_deep.py.
LARGE, NEAR, DEEP = 1 << 24, 1 << 21, 64
LANES = VECTOR // 4
# Costs in multiply-adds, measured: of the two transforms per tile and channel, and of a weight's.
# One core makes, in GFLOP/s of the direct sum's operations (direct : products), from 64 images of
# 32×32 with 3 → 32 channels 85 : 76, with 8 → 16 97 : 120, with 16 → 16 94 : 157; with 16 → 16 of
# 5×5 pixels 61 : 58, of 6×6 74 : 83; with 256 → 256 of one image of 7×7 75 : 62, of two 87 : 98.
# Weights transformed where they are used cost less: of one image of 7×7 with 512 → 512 channels one
# core of Emerald Rapids takes 2.8 ms directly, 2.3 so; of 4×4 1.75 and 2.0.
TRANSFORM, WEIGHT, DEEP_WEIGHT, BETTER = 200, 300, 200, 0.9


class Tiles(NamedTuple):
    """y (N, P, Q, O) from x (N, H, W, C) whose tile (p, q) begins at 4 p − top, 4 q − left."""

    N: int
    H: int
    W: int
    C: int
    P: int
    Q: int
    O: int
    top: int
    left: int

    @property
    def count(self):
        """Tiles of 4×4 outputs."""
        return self.N * -(-self.P // 4) * -(-self.Q // 4)


def deep(s, itemsize):
    """Whether winograd_deep.py is faster: it transforms weights anew for every block of tiles."""
    size = 36 * s.C * s.O * itemsize
    return size > LARGE or (size > NEAR and s.count <= DEEP)


def suits(s):
    """Whether products are faster than direct sums."""
    C, O = -(-s.C // LANES) * LANES, -(-s.O // LANES) * LANES
    weight = DEEP_WEIGHT if deep(s, 4) else WEIGHT
    cost = s.count * (36 * s.C * O + TRANSFORM * (C + O)) + weight * s.C * O
    return enabled and cost < BETTER * 9 * s.N * s.P * s.Q * s.C * O


@device
def _into(x, x0, x1, x2, x3, x4, x5):
    """B x."""
    half, two, five = fill(x, -0.5), fill(x, -2), fill(x, -2.5)
    a, b = fill(x, math.sqrt(0.5)), fill(x, math.sqrt(2))
    p, q, r, s = fma(two, x2, x4), a * fma(two, x1, x3), fma(half, x2, x4), b * fma(half, x1, x3)
    return fma(five, x2, x0 + x4), p + q, p - q, r + s, r - s, fma(five, x3, x1 + x5)


@device
def _backward(x, m0, m1, m2, m3, m4, m5):
    """A m."""
    half, two = fill(x, 0.5), fill(x, 2)
    a, b = fill(x, math.sqrt(0.5)), fill(x, math.sqrt(2))
    p, q, r, s = m1 + m2, a * (m1 - m2), m3 + m4, b * (m3 - m4)
    return m0 + p + r, q + s, fma(half, p, two * r), fma(half, q, fma(two, s, m5))


@device
def _weights(x, g0, g1, g2):
    """G g."""
    half, two = fill(x, 0.5), fill(x, 2)
    c, d = fill(x, -2 / 3), fill(x, 1 / 6)
    a, b = fill(x, math.sqrt(0.5)) * g1, fill(x, math.sqrt(2)) * g1
    p, q = fma(half, g2, g0), fma(two, g2, g0)
    return g0, c * (p + a), c * (p - a), d * (q + b), d * (q - b), g2


@device
def save(y, at, step, v):
    for i in range(len(v)):
        store(y, at + i * step, v[i])


@device
def load6(y, at, step):
    return (load(y, at), load(y, at + step), load(y, at + 2 * step), load(y, at + 3 * step),
            load(y, at + 4 * step), load(y, at + 5 * step))


@device
def put_weights(g, at, step, own, y, to, size):
    """y[36 matrices of ``size``, from to] = G g Gᵀ of a vector of weights, whose taps are ``step``
    apart."""
    L = lanes(g)
    for j in range(3):
        here = at + j * step
        save(own, j * L, 3 * L, _weights(g, load(g, here), load(g, here + 3 * step),
                                         load(g, here + 6 * step)))
    for i in range(6):
        at = i * 3 * L
        save(y, to + i * 6 * size, size,
             _weights(g, load(own, at), load(own, at + L), load(own, at + 2 * L)))


@device
def _weights_task(p, weight, u):
    """A panel."""
    P, T, K, W = weight.shape
    size, room = P * K * W + W, aligned(18 * lanes(weight), u)
    own, g, y = pointer(room), after(pointer(weight), p * T * K * W), pointer(u)
    for at in range(0, K * W, lanes(weight)):
        put_weights(g, at, K * W, own, y, p * K * W + at, size)
    keep(room)


@tasks
def _transform_weights(run, weight, u):
    """u (36, panels · K · W + W) = G g Gᵀ of panels (panels, 9, K, W)."""
    share(_weights_task, weight.shape[0], run, (weight, u))


@device
def _column(x, at, step, h, H, n):
    """Six values down a column of x, n lanes of each, zeros outside 0 ≤ h < H."""
    return (load_part(x, at, n if 0 <= h < H else 0),
            load_part(x, at + step, n if 0 <= h + 1 < H else 0),
            load_part(x, at + 2 * step, n if 0 <= h + 2 < H else 0),
            load_part(x, at + 3 * step, n if 0 <= h + 3 < H else 0),
            load_part(x, at + 4 * step, n if 0 <= h + 4 < H else 0),
            load_part(x, at + 5 * step, n if 0 <= h + 5 < H else 0))


@device
def take_tile(x, s, channels, n, h, w, own, v, to, size):
    """v[36 rows of ``size``, from to] = B d Bᵀ of the tile of image n that begins at (h, w), zeros
    outside, for so many channels."""
    L, inside = lanes(x), min(h, w) >= 0 and h + 6 <= s.H and w + 6 <= s.W
    first, down = ((n * s.H + h) * s.W + w) * s.C, s.W * s.C
    for c in range(0, channels, L):
        m = min(L, channels - c)
        for j in range(6):
            at = first + j * s.C + c
            if inside and m == L:
                d = load6(x, at, down)
            else:
                d = _column(x, at, down, h, s.H, m if 0 <= w + j < s.W else 0)
            save(own, j * L, 6 * L, _into(x, *d))
        for i in range(6):
            save(v, to + c + 6 * i * size, size, _into(x, *load6(own, 6 * i * L, L)))


@device
def next_tile(s, n, p, q):
    """The tile after (p, q) of image n."""
    q += 4
    if q >= s.Q:
        p, q = p + 4, 0
        if p >= s.P:
            n, p = n + 1, 0
    return n, p, q


@device
def _put_row(y, at, right, bias, m0, m1, m2, m3, m4, m5):
    """Four outputs, ``right`` apart; their sum."""
    a, b, c, d = _backward(y, m0, m1, m2, m3, m4, m5)
    a, b, c, d = a + bias, b + bias, c + bias, d + bias
    save(y, at, right, (a, b, c, d))
    return (a + b) + (c + d)


@device
def put_tile(m, at, size, shift, s, n, p, q, count, own, y, o):
    """``count`` outputs from o of the pixels of a tile at (p, q); NaN if one is not finite."""
    L, found = lanes(y), fill(y, 0)
    for c in range(0, count, L):
        lane, bias, here, down = min(L, count - c), load(shift, c), at + c, 6 * size
        r0, r1, r2, r3, r4, r5 = (
            _backward(y, *load6(m, here, down)), _backward(y, *load6(m, here + size, down)),
            _backward(y, *load6(m, here + 2 * size, down)),
            _backward(y, *load6(m, here + 3 * size, down)),
            _backward(y, *load6(m, here + 4 * size, down)),
            _backward(y, *load6(m, here + 5 * size, down)))
        place = ((n * s.P + p) * s.Q + q) * s.O + o + c
        whole = p + 4 <= s.P and q + 4 <= s.Q and lane == L
        to, below, right, z = (place, s.Q * s.O, s.O, y) if whole else (0, 4 * L, L, own)
        a = _put_row(z, to, right, bias, r0[0], r1[0], r2[0], r3[0], r4[0], r5[0])
        b = _put_row(z, to + below, right, bias, r0[1], r1[1], r2[1], r3[1], r4[1], r5[1])
        found = found + (a + b)
        a = _put_row(z, to + 2 * below, right, bias, r0[2], r1[2], r2[2], r3[2], r4[2], r5[2])
        b = _put_row(z, to + 3 * below, right, bias, r0[3], r1[3], r2[3], r3[3], r4[3], r5[3])
        found = found + (a + b)
        if not whole:
            for i in range(min(4, s.P - p)):
                for j in range(min(4, s.Q - q)):
                    store_part(y, place + (i * s.Q + j) * s.O, load(own, (4 * i + j) * L), lane)
    return total(found - found)


@device
def collect_tiles(s, first, some, numbers, y, channels, table, row, c):
    """Statistics of so many channels from c on of some tiles."""
    (n, p, q), count = first, 0
    for _ in range(some):
        for i in range(p, min(p + 4, s.P)):
            at = ((n * s.P + i) * s.Q + q) * s.O
            for j in range(4):                   # of known length: one vector
                numbers[count + j] = at + j * s.O
            count += min(4, s.Q - q)
        n, p, q = next_tile(s, n, p, q)
    collect(after(pointer(y), c), pointer(numbers), count, channels, table, row, c)


@device
def _task(task, x, u, shift, s, pitch, block, parts, y, spoiled, table):
    """``block`` tiles × 1/parts of the panels of u."""
    W, L = shift.size // shift.shape[0], lanes(x)
    P, down, across = shift.shape[0], -(-s.P // 4), -(-s.Q // 4)
    tiles = s.N * down * across
    shared, blocks, size = -(-P // parts), -(-tiles // block), P * s.C * W + W
    # a line behind each matrix: the 36 of one place must not share a set of the L1
    wide = min(shared * W, -(-s.O // L) * L)
    size_v, size_m = block * pitch + L, block * wide + L
    part, t0 = task // blocks, task % blocks * block
    some = min(block, tiles - t0)
    room = -(-some // FEW) * FEW
    after_v = -(-36 * size_v // L) * L
    values, numbers = aligned(after_v + 36 * (size_m + L) + W, y), np.empty(2 * room + 1, np.int64)
    v, rows = pointer(values), pointer(numbers)
    m, to, tap = after(v, after_v), after(rows, room), after(rows, 2 * room)
    own, none = after(m, 36 * size_m), after(m, 36 * (size_m + L))
    zeros(none, 0, W)
    tap[0] = 0
    for t in range(room):
        rows[t], to[t] = t * pitch, t * wide
    first = t0 // (down * across), t0 // across % down * 4, t0 % across * 4
    n, p, q = first
    for t in range(some):
        take_tile(pointer(x), s, s.C, n, p - s.top, q - s.left, own, v, t * pitch, size_v)
        n, p, q = next_tile(s, n, p, q)
    p0, p1 = part * shared, min((part + 1) * shared, P)
    for i in range(36):
        for k in range(p0, p1):
            panel(s.O - k * W, after(v, i * size_v), rows, room, tap, 1, s.C,
                  after(pointer(u), i * size + k * s.C * W), none,
                  after(m, i * size_m + (k - p0) * W), to, False, v, 0)
    n, p, q = first
    for t in range(some):
        bad = put_tile(m, t * wide, size_m, after(pointer(shift), p0 * W), s, n, p, q,
                        min(p1 * W, s.O) - p0 * W, own, pointer(y), p0 * W)
        if bad != 0:
            spoiled[n] = True
        n, p, q = next_tile(s, n, p, q)
    keep(values)
    keep(numbers)
    if table.size:
        collect_tiles(s, first, some, np.empty(16 * some + 4, np.int64), y,
                      min(p1 * W, s.O) - p0 * W, table, task % blocks, p0 * W)


@tasks
def _winograd(run, x, u, shift, s, pitch, block, parts, y, spoiled, room):
    """y by products with u (36, panels · C · W + W). spoiled[n] is set where a value of image n is
    not finite."""
    tiles = s.N * -(-s.P // 4) * -(-s.Q // 4)
    share(_task, parts * -(-tiles // block), run,
          (x, u, shift, s, pitch, block, parts, y, spoiled, room.table))
    if room.table.size:
        merge(run, room.table, room.mean, room.m2)


def winograd(x, weight, bias, s, y, transposed=False, moments=None):
    """y (N, P, Q, O), or the numbers of the images in which a value is not finite. Moments as of
    conv2d.

    weight is (O, C, 3, 3); ``transposed``: (C, O, 3, 3), read backwards.
    """
    weight = packed(weight, range(8, -1, -1) if transposed else range(9), 1, transposed)[0]
    P, _, K, W = weight.shape
    u = empty((36, P * K * W + W), x.dtype)
    _transform_weights(weight, u, work=8 * u.nbytes)
    fits = BLOCK_BYTES // (36 * x.itemsize * (s.C + s.O))
    most = max(BLOCKS[0], min(BLOCKS[1], fits // 12 * 12))
    blocks = -(-s.count // most)
    block = -(-s.count // (blocks * FEW)) * FEW
    each = -(-P // min(P, -(-TASKS // blocks)))
    spoiled = np.zeros(s.N, np.bool_)
    room = room_for(y, -(-s.count // block), moments)
    _winograd(x, u, shifts(bias, 1, s.O, x.dtype)[0], s, spread(s.C, 1, x.itemsize),
              block, -(-P // each), y, spoiled, room, work=2 * y.size * s.C * 9)
    return np.flatnonzero(spoiled)
