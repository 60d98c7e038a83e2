"""A tile's product on the CUDA cores: float32 and float64, each product and sum rounded once.

A thread computes 8 × 8 results, 4 × 4 in each quarter of the tile, so that a warp, of 4 rows of
threads by 8 columns, reads shared memory without conflicts: 4 neighbours where they lie together,
else such 4 whose rows of 64 bytes are in different banks.
"""

import numpy as np

from .intrinsics import couple, cuda, device, load, outer, store, width
from .tile import Arithmetic, swizzled

__all__ = ["arithmetic"]

# a thread's 4 rows, or columns, in each half of the tile, and from which thread to the next; by how
# the operand lies in shared memory
ROWS = {"row": ((0, 1, 2, 3), 4), "k": ((0, 1, 8, 9), 2)}
COLUMNS = {"row": ((0, 1, 2, 3), 4), "k": ((0, 8, 16, 24), 1)}


def _together(dtype, pitch, half):
    """8 numbers for k and 8 for k + 1, where rows are neighbours."""
    if width(dtype) == 4:
        eight = device(lambda s, i: load(s, i) + load(s, i + half))
    else:
        eight = device(lambda s, i: load(s, i) + load(s, i + 2)
                       + load(s, i + half) + load(s, i + half + 2))
    return device(lambda s, i, k: (eight(s, i + k * pitch), eight(s, i + (k + 1) * pitch)))


def _apart(dtype, pitch, half, each):
    """The same where k are neighbours."""
    _, b, c, d = (r * pitch for r in each)
    below, two = half * pitch, load if width(dtype) == 2 else couple

    @device
    def eight(s, i, k):
        i = np.int32(i ^ k)
        p, q, u, v = two(s, i), two(s, i + b), two(s, i + c), two(s, i + d)
        i += below
        w, x, y, z = two(s, i), two(s, i + b), two(s, i + c), two(s, i + d)
        return ((p[0], q[0], u[0], v[0], w[0], x[0], y[0], z[0]),
                (p[1], q[1], u[1], v[1], w[1], x[1], y[1], z[1]))
    return eight


def _eights(dtype, layout, half, each):
    if layout.by == "k":
        return _apart(dtype, layout.pitch, half, each)
    return _together(dtype, layout.pitch, half)


def _place(shape, down, right):
    """Row and column of a thread's first result in the tile."""
    across = shape[1] // 64              # warps side by side in half a tile

    @device
    def place(t):
        warp, lane = t // 32, t % 32
        return warp // across * 16 + lane // 8 * down, warp % across * 32 + lane % 8 * right
    return place


def _first(layout, dtype):
    if layout.by == "row":
        return device(lambda row: row)
    to = swizzled(dtype)
    return device(lambda row: to(row, 0))


def _four(dtype, columns):
    """4 numbers of a row to their columns."""
    _, a, b, c = columns
    if columns != (0, 1, 2, 3):
        @device
        def apart(s, i, v):
            s[i], s[i + a], s[i + b], s[i + c] = v[0], v[1], v[2], v[3]
        return apart
    if width(dtype) == 4:
        return store

    @device
    def pairs(s, i, v):
        store(s, i, v[:2])
        store(s, i + 2, v[2:])
    return pairs


def _put(dtype, across, place, rows, columns, half):
    """A thread's 4 rows of half a tile into shared memory."""
    (_, a, b, c), four = rows, _four(dtype, columns)
    pitch = across + 4

    @device
    def row(s, i, v):
        four(s, i, v[:4])
        four(s, i + across // 2, v[4:])

    @device
    def put(s, sums):
        m, n = place(cuda.threadIdx.x)
        i = m * pitch + n
        row(s, i, sums[half])
        row(s, i + a * pitch, sums[half + 1])
        row(s, i + b * pitch, sums[half + 2])
        row(s, i + c * pitch, sums[half + 3])
    return put


def arithmetic(dtype, shape, a, b):
    """How a block of ``shape`` multiplies operands that lie as a and b say."""
    (rows, down), (columns, right), below = ROWS[a.by], COLUMNS[b.by], shape[0] // 2
    left, top = _eights(dtype, a, below, rows), _eights(dtype, b, shape[1] // 2, columns)
    place, first_a, first_b = _place(shape, down, right), _first(a, dtype), _first(b, dtype)

    @device
    def at(t):
        m, n = place(t)
        return first_a(m), first_b(n)

    @device
    def step(acc, s, p, q, k):
        x, y = left(s, p, k), top(s, q, k)
        return outer(outer(acc, x[0], y[0]), x[1], y[1])
    put = [_put(dtype, shape[1], place, rows, columns, half) for half in (0, 4)]
    zeros = ((dtype.type(0),) * 8,) * 8
    return Arithmetic(at, zeros, 2, step, put, device(lambda part, r: part * below + r))
