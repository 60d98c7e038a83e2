"""3×3 convolution with stride 1 by Winograd's F(4×4, 3×3): 36 products make 16 outputs that take
144 directly.

A tile of 6×6 inputs d and the weights g are taken to 36 values each, B d Bᵀ and G g Gᵀ; their
products are summed over the channels, which makes 36 small matrix products, and A m Aᵀ is a tile of
4×4 outputs. The interpolation points are 0, ±√½, ±√2 and ∞: against float64 on normal data the
largest error is 1 to 2 times the direct sum's, where the usual 0, ±1, ±2 and ∞ err 3 times more.
"""

import math
from typing import NamedTuple

import numpy as np

from .convkernel import GROUP
from .jit import device, kernel, prange
from .memory import empty
from .simd import VECTOR, fma, lanes, load, load_part, splat, store, store_part, total
from .windows import half_panel, packed, panel, shifts

__all__ = ["enabled", "suits", "winograd"]

enabled = True
BLOCK_BYTES = 1 << 19      # of transformed inputs and products: half an L2
BLOCKS = 24, 96            # tiles in a block, at least and at most
TASKS = 16
# Costs in multiply-adds, measured: of the two transforms per tile and channel, and of a weight's.
TRANSFORM, WEIGHT, BETTER = 180, 200, 0.9


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


def suits(s):
    """Whether this path is faster than the direct one."""
    cost = (s.count * (36 * s.C * s.O + TRANSFORM * (s.C + s.O)) + WEIGHT * s.C * s.O)
    return enabled and cost < BETTER * 9 * s.N * s.P * s.Q * s.C * s.O


@device
def _forward(x, x0, x1, x2, x3, x4, x5):
    """B x."""
    real = x.dtype.type
    half, two, five = splat(real(-0.5)), splat(real(-2)), splat(real(-2.5))
    a, b = splat(real(math.sqrt(0.5))), splat(real(math.sqrt(2)))
    p, q, r, s = fma(two, x2, x4), a * fma(two, x1, x3), fma(half, x2, x4), b * fma(half, x1, x3)
    return fma(five, x2, x0 + x4), p + q, p - q, r + s, r - s, fma(five, x3, x1 + x5)


@device
def _backward(x, m0, m1, m2, m3, m4, m5):
    """A m."""
    real = x.dtype.type
    half, two = splat(real(0.5)), splat(real(2))
    a, b = splat(real(math.sqrt(0.5))), splat(real(math.sqrt(2)))
    p, q, r, s = m1 + m2, a * (m1 - m2), m3 + m4, b * (m3 - m4)
    return m0 + p + r, q + s, fma(half, p, two * r), fma(half, q, fma(two, s, m5))


@device
def _weights(x, g0, g1, g2):
    """G g."""
    real = x.dtype.type
    half, two = splat(real(0.5)), splat(real(2))
    c, d = splat(real(-2 / 3)), splat(real(1 / 6))
    a, b = splat(real(math.sqrt(0.5))) * g1, splat(real(math.sqrt(2))) * g1
    p, q = fma(half, g2, g0), fma(two, g2, g0)
    return g0, c * (p + a), c * (p - a), d * (q + b), d * (q - b), g2


@device
def _save(y, at, step, v):
    for i in range(len(v)):
        store(y, at + i * step, v[i])


@device
def _load6(y, at, step):
    return (load(y, at), load(y, at + step), load(y, at + 2 * step), load(y, at + 3 * step),
            load(y, at + 4 * step), load(y, at + 5 * step))


@kernel
def _transform_weights(weight, u):
    """u (36, panels · K · W + W) = G g Gᵀ of panels (panels, 9, K, W)."""
    P, T, K, W = weight.shape
    weight, size, L = weight.reshape(-1), P * K * W + W, lanes(weight)
    u = u.reshape(-1)
    for p in prange(P):
        own = np.empty(18 * L, u.dtype)
        for k in range(K):
            for v in range(0, W, L):
                at = p * T * K * W + k * W + v
                for j in range(3):
                    _save(own, j * L, 3 * L, _weights(
                        u, load(weight, at + j * K * W), load(weight, at + (3 + j) * K * W),
                        load(weight, at + (6 + j) * K * W)))
                for i in range(6):
                    _save(u, i * 6 * size + (p * K + k) * W + v, size, _weights(
                        u, load(own, i * 3 * L), load(own, (i * 3 + 1) * L),
                        load(own, (i * 3 + 2) * L)))


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
def _take(x, s, n, h, w, own, v, at, size):
    """v[36 rows of ``size``, from at] = B d Bᵀ of the tile of image n that begins at (h, w)."""
    L, inside = lanes(x), 0 <= h and h + 6 <= s.H and 0 <= w and w + 6 <= s.W
    first = ((n * s.H + h) * s.W + w) * s.C
    for c in range(0, s.C, L):
        m = min(L, s.C - c)
        for j in range(6):
            place = first + j * s.C + c
            if inside and m == L:
                d = _load6(x, place, s.W * s.C)
            else:
                d = _column(x, place, s.W * s.C, h, s.H, m if 0 <= w + j < s.W else 0)
            _save(own, j * L, 6 * L, _forward(x, *d))
        for i in range(6):
            _save(v, at + c + 6 * i * size, size, _forward(x, *_load6(own, 6 * i * L, L)))


@device
def _put(m, at, size, shift, first, s, n, p, q, count, own, y, o):
    """``count`` outputs from o of the pixels of a tile at (p, q); NaN if one is not finite."""
    L = lanes(y)
    found = splat(y.dtype.type(0))
    for c in range(0, count, L):
        lane, bias = min(L, count - c), load(shift, first + c)
        for j in range(6):
            _save(own, j * L, 6 * L, _backward(y, *_load6(m, at + c + j * size, 6 * size)))
        for i in range(min(4, s.P - p)):
            out = _backward(y, *_load6(own, 6 * i * L, L))
            place = ((n * s.P + p + i) * s.Q + q) * s.O + o + c
            for j in range(min(4, s.Q - q)):
                value = out[j] + bias
                found = found + value
                store_part(y, place + j * s.O, value, lane)
    return total(found - found)


@kernel
def _winograd(x, u, shift, s, block, parts, y, spoiled):
    """A task is ``block`` tiles × 1/parts of the panels of u (36, panels · C · W + W). spoiled[n]
    is set where a value of image n is not finite."""
    W, L = shift.size // shift.shape[0], lanes(x)
    P, down, across = shift.shape[0], -(-s.P // 4), -(-s.Q // 4)
    tiles = s.N * down * across
    share, blocks = -(-P // parts), -(-tiles // block)
    shift, u, size = shift.reshape(-1), u.reshape(-1), P * s.C * W + W
    # a line behind each matrix: the 36 of one place must not share a set of the L1
    size_v, size_m = block * s.C + L, block * share * W + L
    for task in prange(parts * blocks):
        part, t0 = task // blocks, task % blocks * block
        v, m, own = np.empty(36 * size_v, x.dtype), np.empty(36 * size_m, x.dtype), \
            np.empty(36 * L, x.dtype)
        some = min(block, tiles - t0)
        groups = -(-some // GROUP)
        ga, gc, taps = np.empty(groups, np.int64), np.empty(groups, np.int64), \
            np.zeros(1, np.int64)
        zeros = np.zeros(W, x.dtype)
        for g in range(groups):
            ga[g], gc[g] = g * GROUP * s.C, g * GROUP * share * W
        for t in range(some):
            n, at = (t0 + t) // (down * across), (t0 + t) % (down * across)
            _take(x, s, n, at // across * 4 - s.top, at % across * 4 - s.left, own, v, t * s.C,
                  size_v)
        p0, p1 = part * share, min((part + 1) * share, P)
        for i in range(36):
            for p in range(p0, p1):
                a, b, c = v[i * size_v:], u[i * size + p * s.C * W:], \
                    m[i * size_m + (p - p0) * W:]
                if 2 * (s.O - p * W) > W:
                    panel(a, ga, s.C, taps, s.C, b, zeros, c, gc, share * W)
                else:
                    half_panel(a, ga, s.C, taps, s.C, b, zeros, c, gc, share * W)
        for t in range(some):
            n, at = (t0 + t) // (down * across), (t0 + t) % (down * across)
            bad = _put(m, t * share * W, size_m, shift, p0 * W, s, n, at // across * 4,
                       at % across * 4, min(p1 * W, s.O) - p0 * W, own, y, p0 * W)
            if bad != 0:
                spoiled[n] = True


def winograd(x, weight, bias, s, y, transposed=False):
    """y (N, P, Q, O), or the numbers of the images in which a value is not finite.

    weight is (O, C, 3, 3); ``transposed``: (C, O, 3, 3), read backwards.
    """
    weight = packed(weight, range(8, -1, -1) if transposed else range(9), 1, transposed)[0]
    P, _, K, W = weight.shape
    u = empty((36, P * K * W + W), x.dtype)
    _transform_weights(weight, u, work=8 * u.nbytes)
    fits = BLOCK_BYTES // (36 * x.itemsize * (s.C + P * W))
    most = max(BLOCKS[0], min(BLOCKS[1], fits // 12 * 12))
    blocks = -(-s.count // most)
    block = -(-(-(-s.count // blocks)) // GROUP) * GROUP
    spoiled = np.zeros(s.N, np.bool_)
    _winograd(x.reshape(-1), u, shifts(bias, 1, s.O, x.dtype)[0], s, block,
              min(P, -(-TASKS // blocks)), y.reshape(-1), spoiled,
              work=2 * y.size * s.C * 9)
    return np.flatnonzero(spoiled)
