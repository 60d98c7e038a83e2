"""A tile's product on the tensor cores, added up in float32: of halves (``halves``), two of
neighbouring k to a word, or in TF32, float32 with 11 bits of fraction (``fast``). ``exact``: a
number is the sum of two of TF32, of whose products the least is left out, which keeps float32's
accuracy at a third of the speed; from 2¹²⁸ (1 − 2⁻¹²) on they are Inf. Needs compute capability
8.0.

A warp computes 64 × 32 results, as 4 × 4 products of (16, 8) and (8, 8) for 8 k at once; of halves
for 16, with words in the places of numbers. Where rows are neighbours in shared memory, those of a
k have 8 elements more than the tile: the 4 k by 8 rows of a fragment lie in 32 banks. Where k are,
one instruction reads 16 rows of 8, as it does, transposed, where rows of halves are.
"""

from functools import partial

import numpy as np

from .intrinsics import crossed, cuda, device, matrices, mma, mma_of_halves, store, tf32
from .tile import Arithmetic, swizzled

__all__ = ["PAD", "exact", "fast", "halves"]

PAD = 8
LARGEST = np.finfo(np.float32).max


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
def _finite(v):
    """What corrections multiply: 0 for Inf and NaN, which reach the sums by the large products
    alone. Inf times a rest of 0 would be NaN."""
    high = tf32(v)
    return high if abs(high) <= LARGEST else np.float32(0)


@device
def _rest(v):
    high = tf32(v)
    return tf32(v - high) if abs(high) <= LARGEST else np.float32(0)


def _of_each(f):
    """f of a fragment's four numbers, and of two."""
    return (device(lambda v: (f(v[0]), f(v[1]), f(v[2]), f(v[3]))),
            device(lambda v: (f(v[0]), f(v[1]))))


def _left(layout):
    """A thread's part of rows 16 n … 16 n + 15 of a, for 8 k."""
    pitch = layout.pitch
    if layout.by == "k":
        return device(lambda s, p, k, n: matrices(s, (p ^ k) + 16 * n * pitch))
    if layout.packed:
        return device(lambda s, p, k, n: crossed(s, p + k * pitch + 8 * n))

    @device
    def left(s, p, k, n):
        i = p + k * pitch + 16 * n
        return s[i], s[i + 8], s[i + 4 * pitch], s[i + 4 * pitch + 8]
    return left


def _right(layout):
    """Its part of columns 16 n … 16 n + 15 of b: two of each 8."""
    pitch = layout.pitch
    if layout.by == "k":
        return device(lambda s, q, k, n: matrices(s, (q ^ k) + 16 * n * pitch))
    if layout.packed:
        return device(lambda s, q, k, n: crossed(s, q + k * pitch + 8 * n))

    @device
    def right(s, q, k, n):
        i = q + k * pitch + 16 * n
        return s[i], s[i + 4 * pitch], s[i + 8], s[i + 4 * pitch + 8]
    return right


def _line_of(left, right, of_a, of_b, multiply):
    """64 rows by 32 columns of the sums after 8 more k; of_a, of_b: what is made of fragments."""
    @device
    def rows(sums, a, b):
        return (multiply(sums[0], a, b[0]), multiply(sums[1], a, b[1]),
                multiply(sums[2], a, b[2]), multiply(sums[3], a, b[3]))

    @device
    def step(acc, s, p, q, k):
        v, w = right(s, q, k, 0), right(s, q, k, 1)
        b = of_b(v[:2]), of_b(v[2:]), of_b(w[:2]), of_b(w[2:])
        return (rows(acc[0], of_a(left(s, p, k, 0)), b), rows(acc[1], of_a(left(s, p, k, 1)), b),
                rows(acc[2], of_a(left(s, p, k, 2)), b), rows(acc[3], of_a(left(s, p, k, 3)), b))
    return step


def _step(precise, left, right):
    if isinstance(precise, str):
        same = device(lambda v: v)
        return _line_of(left, right, same, same, mma_of_halves(precise))
    high_a, high_b = _of_each(_rounded)
    if not precise:
        return _line_of(left, right, high_a, high_b, mma)
    (finite_a, finite_b), (low_a, low_b) = map(_of_each, (_finite, _rest))

    @device
    def multiply(sums, a, b):                    # the small products first
        return mma(mma(mma(sums, a[1], b[2]), a[2], b[1]), a[0], b[0])
    return _line_of(left, right, device(lambda v: (high_a(v), low_a(v), finite_a(v))),
                    device(lambda v: (high_b(v), low_b(v), finite_b(v))), multiply)


def _put(shape, pitch, half):
    """A thread's sums of two of its four lines of fragments into shared memory."""
    warp, lane = _places(shape)

    @device
    def square(s, i, v):
        store(s, i, v[:2])
        store(s, i + 8 * pitch, v[2:])

    @device
    def line(s, i, sums):
        square(s, i, sums[0])
        square(s, i + 8, sums[1])
        square(s, i + 16, sums[2])
        square(s, i + 24, sums[3])

    @device
    def put(s, sums):
        t = cuda.threadIdx.x
        (m, n), (row, k) = warp(t), lane(t)
        i = (m // 2 + row) * pitch + n + 2 * k
        line(s, i, sums[half])
        line(s, i + 16 * pitch, sums[half + 1])
    return put


def _places_of(layout, dtype, left):
    """Where lane t reads for k = 0, behind row, or column, ``first`` of its warp."""
    pitch = layout.pitch
    if layout.packed:                # the k that lane t has the address of, and which 8 rows
        if left:
            return device(lambda first, t: (t // 16 * 8 + t % 8) * pitch
                          + first // 2 + t // 8 % 2 * 4)
        return device(lambda first, t: t % 16 * pitch + first // 2 + t // 16 * 4)
    if layout.by == "row":
        return device(lambda first, t: first + t // 4 + t % 4 * pitch)
    to = swizzled(dtype)             # the row that lane t has the address of, and which 4 k
    if left:
        return device(lambda first, t: to(first + t % 16, t // 16))
    return device(lambda first, t: to(first + t // 16 * 8 + t % 8, t // 8 % 2))


def _arithmetic(precise, dtype, shape, a, b):
    warp, _ = _places(shape)
    of_a, of_b = _places_of(a, dtype, True), _places_of(b, dtype, False)

    @device
    def at(t):
        m, n = warp(t)
        return of_a(m, t % 32), of_b(n, t % 32)
    zeros = (((np.float32(0),) * 4,) * 4,) * 4
    put = [_put(shape, shape[1] + PAD, half) for half in (0, 2)]
    return Arithmetic(at, zeros, 16 if a.packed else 8, _step(precise, _left(a), _right(b)), put,
                      device(lambda part, r: r // 32 * 64 + part * 32 + r % 32))


fast, exact = partial(_arithmetic, False), partial(_arithmetic, True)
halves = {kind: partial(_arithmetic, kind) for kind in ("f2", "bf")}
