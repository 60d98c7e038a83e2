"""A tile's product on the CUDA cores: float32 and float64, each product and sum rounded once.

A thread computes 8 × 8 results as 2 × 2 squares of 4, so that a warp reads shared memory without
conflicts: 4 rows of squares by 8 columns.
"""

from .intrinsics import cuda, device, load, outer, store, width
from .tile import Arithmetic

__all__ = ["arithmetic"]


def _eight(dtype, half):
    """4 numbers at i and 4 at i + half."""
    if width(dtype) == 4:
        return device(lambda s, i: load(s, i) + load(s, i + half))
    return device(lambda s, i: load(s, i) + load(s, i + 2)
                  + load(s, i + half) + load(s, i + half + 2))


def _place(shape):
    """Row and column of a thread's first result in the tile."""
    across = shape[1] // 64              # warps side by side in half a tile

    @device
    def place(t):
        warp, lane = t // 32, t % 32
        return warp // across * 16 + lane // 8 * 4, warp % across * 32 + lane % 8 * 4
    return place


def _put(dtype, across, pitch, place, half):
    """A thread's 4 rows of half a tile into shared memory."""
    first, second = slice(0, 4), slice(4, 8)
    if width(dtype) == 4:
        four = store
    else:
        @device
        def four(s, i, v):
            store(s, i, v[:2])
            store(s, i + 2, v[2:])

    @device
    def row(s, i, v):
        four(s, i, v[first])
        four(s, i + across // 2, v[second])

    @device
    def put(s, sums):
        m, n = place(cuda.threadIdx.x)
        i = m * pitch + n
        row(s, i, sums[half])
        row(s, i + pitch, sums[half + 1])
        row(s, i + 2 * pitch, sums[half + 2])
        row(s, i + 3 * pitch, sums[half + 3])
    return put


def arithmetic(dtype, shape, pitches):
    """How a block of ``shape`` multiplies."""
    rows, columns, place = _eight(dtype, shape[0] // 2), _eight(dtype, shape[1] // 2), _place(shape)
    below = shape[0] // 2

    @device
    def step(acc, s, p, q):
        return outer(acc, rows(s, p), columns(s, q))
    put = [_put(dtype, shape[1], pitches[1], place, half) for half in (0, 4)]
    zeros = ((dtype.type(0),) * 8,) * 8
    return Arithmetic(place, zeros, 1, step, put, device(lambda part, r: part * below + r))
