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

from .intrinsics import device, mma, mma_of_halves, tf32
from .layout import MISSING
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
    def step(acc, sa, p, sb, q):
        b = right(sb, q), right(sb, q + 8), right(sb, q + 16), right(sb, q + 24)
        return (rows(acc[0], left(sa, p), b), rows(acc[1], left(sa, p + 16), b),
                rows(acc[2], left(sa, p + 32), b), rows(acc[3], left(sa, p + 48), b))
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


def _writer(line, zero):
    @device
    def one(c, at, n, N, v, bias, first):
        if at > MISSING // 2 and n < N:
            c[at + n] = v + (bias[first + n] if first >= 0 else zero)

    @device
    def square(c, up, low, n, N, v, bias, first):
        one(c, up, n, N, v[0], bias, first)
        one(c, up, n + 1, N, v[1], bias, first)
        one(c, low, n, N, v[2], bias, first)
        one(c, low, n + 1, N, v[3], bias, first)

    @device
    def rows(c, g, m, n, N, sums, bias, first):
        up, low = line(g, m), line(g, m + 8)
        square(c, up, low, n, N, sums[0], bias, first)
        square(c, up, low, n + 8, N, sums[1], bias, first)
        square(c, up, low, n + 16, N, sums[2], bias, first)
        square(c, up, low, n + 24, N, sums[3], bias, first)

    @device
    def finish(c, g, m, n, N, wide, acc, bias, first):
        rows(c, g, m, n, N, acc[0], bias, first)
        rows(c, g, m + 16, n, N, acc[1], bias, first)
        rows(c, g, m + 32, n, N, acc[2], bias, first)
        rows(c, g, m + 48, n, N, acc[3], bias, first)
    return finish


def _arithmetic(precise, dtype, shape, line, pitches):
    high, broad = pitches
    warp, lane = _places(shape)

    @device
    def at(t):
        (m, n), (row, k) = warp(t), lane(t)
        return m + row + k * high, n + row + k * broad

    @device
    def place(t):
        (m, n), (row, k) = warp(t), lane(t)
        return m + row, n + 2 * k
    zero = np.float32(0)
    zeros = (((zero,) * 4,) * 4,) * 4
    return Arithmetic(at, place, zeros, 8, _step(precise, high, broad), _writer(line, zero))


fast, exact = partial(_arithmetic, False), partial(_arithmetic, True)
halves = {kind: partial(_arithmetic, kind) for kind in ("f2", "bf")}
