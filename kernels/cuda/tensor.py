"""A tile's product on the tensor cores, added up in float32: of halves (``halves``), two of
neighbouring k to a word, or in TF32, float32 with 11 bits of fraction (``fast``). ``exact``: a
number is the sum of two of TF32, of whose products the least is left out, which keeps float32's
accuracy at a third of the speed. Needs compute capability 8.0.

A warp computes 64 × 32 results, as 4 × 4 products of (16, 8) and (8, 8) for 8 k at once; of halves
for 16, with words in the places of numbers. A row of shared memory has 8 elements more than the
tile: the 4 k by 8 rows of a fragment lie in 32 banks.
"""

from functools import partial

import numpy as np

from .intrinsics import cuda, device, mma, mma_of_halves, tf32
from .tile import Arithmetic

__all__ = ["PAD", "exact", "fast", "halves"]

PAD = 8


def _places(shape):
    """Where a thread's fragments begin: its warp's row and column; its row and k in a fragment."""
    across = shape[1] // 32

    @device
    def warp(t):
        return t // 32 // across * 64, t // 32 % across * 32

    @device
    def lane(t):
        return t % 32 // 4, t % 4
    return warp, lane


@device
def _rounded(v):
    return tf32(v)


@device
def _same(v):
    return v


@device
def _rest(v):
    return tf32(v - tf32(v))


def _fragments(f, high, broad):
    """A thread's part of 16 rows of a and of 8 columns of b, for 8 k; f of each number."""
    @device
    def left(s, p):
        return f(s[p]), f(s[p + 8]), f(s[p + 4 * high]), f(s[p + 4 * high + 8])

    @device
    def right(s, q):
        return f(s[q]), f(s[q + 4 * broad])
    return left, right


def _line_of(left, right, multiply):
    """16 rows by 32 columns of the sums after 8 more k."""
    @device
    def rows(sums, a, b):
        return (multiply(sums[0], a, b[0]), multiply(sums[1], a, b[1]),
                multiply(sums[2], a, b[2]), multiply(sums[3], a, b[3]))

    @device
    def step(acc, s, p, q):
        b = right(s, q), right(s, q + 8), right(s, q + 16), right(s, q + 24)
        return (rows(acc[0], left(s, p), b), rows(acc[1], left(s, p + 16), b),
                rows(acc[2], left(s, p + 32), b), rows(acc[3], left(s, p + 48), b))
    return step


def _step(precise, high, broad):
    if isinstance(precise, str):
        return _line_of(*_fragments(_same, high, broad), mma_of_halves(precise))
    left, right = _fragments(_rounded, high, broad)
    if not precise:
        return _line_of(left, right, mma)
    rest_left, rest_right = _fragments(_rest, high, broad)

    @device
    def multiply(sums, a, b):                    # the small products first
        return mma(mma(mma(sums, a[1], b[0]), a[0], b[1]), a[0], b[0])
    return _line_of(device(lambda s, p: (left(s, p), rest_left(s, p))),
                    device(lambda s, q: (right(s, q), rest_right(s, q))), multiply)


def _put(shape, pitch, half):
    """A thread's sums of two of its four lines of fragments into shared memory."""
    warp, lane = _places(shape)

    @device
    def line(s, i, sums):
        for n in range(2):
            s[i + n], s[i + 8 * pitch + n] = sums[0][n], sums[0][2 + n]
            s[i + 8 + n], s[i + 8 * pitch + 8 + n] = sums[1][n], sums[1][2 + n]
            s[i + 16 + n], s[i + 8 * pitch + 16 + n] = sums[2][n], sums[2][2 + n]
            s[i + 24 + n], s[i + 8 * pitch + 24 + n] = sums[3][n], sums[3][2 + n]

    @device
    def put(s, sums):
        t = cuda.threadIdx.x
        (m, n), (row, k) = warp(t), lane(t)
        i = (m // 2 + row) * pitch + n + 2 * k
        line(s, i, sums[half])
        line(s, i + 16 * pitch, sums[half + 1])
    return put


def _arithmetic(precise, dtype, shape, pitches):
    high, broad = pitches
    warp, lane = _places(shape)

    @device
    def at(t):
        (m, n), (row, k) = warp(t), lane(t)
        return m + row + k * high, n + row + k * broad
    zeros = (((np.float32(0),) * 4,) * 4,) * 4
    put = [_put(shape, broad, half) for half in (0, 2)]
    return Arithmetic(at, zeros, 8, _step(precise, high, broad), put,
                      device(lambda part, r: r // 32 * 64 + part * 32 + r % 32))


fast, exact = partial(_arithmetic, False), partial(_arithmetic, True)
halves = {kind: partial(_arithmetic, kind) for kind in ("f2", "bf")}
