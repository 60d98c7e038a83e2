"""A tile's product on the CUDA cores: float32 and float64, each product and sum rounded once.

A thread computes 8 × 8 results as 2 × 2 squares of 4, so that a warp reads shared memory without
conflicts: 4 rows of squares by 8 columns.
"""

from .intrinsics import device, load, outer, store, width
from .layout import MISSING
from .tile import Arithmetic

__all__ = ["arithmetic"]


def _eight(dtype, half):
    """4 numbers at i and 4 at i + half."""
    if width(dtype) == 4:
        return device(lambda s, i: load(s, i) + load(s, i + half))
    return device(lambda s, i: load(s, i) + load(s, i + 2)
                  + load(s, i + half) + load(s, i + half + 2))


def _square_writer(dtype):
    """4 results of a row, from ``at`` + n on."""
    if width(dtype) == 4:
        return device(lambda c, i, v, b: store(
            c, i, (v[0] + b[0], v[1] + b[1], v[2] + b[2], v[3] + b[3])))

    @device
    def pairs(c, i, v, b):
        store(c, i, (v[0] + b[0], v[1] + b[1]))
        store(c, i + 2, (v[2] + b[2], v[3] + b[3]))
    return pairs


def _row_writer(dtype, half):
    """A thread's 8 results of a row, n and n + half on behind ``at``; columns below N."""
    whole = _square_writer(dtype)

    @device
    def single(c, at, n, N, v, b):
        if n < N:
            c[at + n] = v + b

    @device
    def four(c, at, n, N, wide, v, b):
        if wide and n + 4 <= N:
            whole(c, at + n, v, b)
        else:
            single(c, at, n, N, v[0], b[0])
            single(c, at, n + 1, N, v[1], b[1])
            single(c, at, n + 2, N, v[2], b[2])
            single(c, at, n + 3, N, v[3], b[3])

    @device
    def row(c, at, n, N, wide, v, b):
        if at > MISSING // 2:
            four(c, at, n, N, wide, v[:4], b[:4])
            four(c, at, n + half, N, wide, v[4:], b[4:])
    return row


def _writer(dtype, shape, line):
    """All of a thread's results: rows m … m + 3 and half a tile below, each where ``line`` says."""
    row, down = _row_writer(dtype, shape[1] // 2), shape[0] // 2

    @device
    def write(c, g, m, n, N, wide, acc, b):
        row(c, line(g, m), n, N, wide, acc[0], b)
        row(c, line(g, m + 1), n, N, wide, acc[1], b)
        row(c, line(g, m + 2), n, N, wide, acc[2], b)
        row(c, line(g, m + 3), n, N, wide, acc[3], b)
        row(c, line(g, m + down), n, N, wide, acc[4], b)
        row(c, line(g, m + down + 1), n, N, wide, acc[5], b)
        row(c, line(g, m + down + 2), n, N, wide, acc[6], b)
        row(c, line(g, m + down + 3), n, N, wide, acc[7], b)
    return write


def _addend(dtype, half):
    """The 8 numbers to add to a thread's columns: the bias, or zeros."""
    zero = dtype.type(0)

    @device
    def one(bias, first, n, N):
        return bias[first + n] if first >= 0 and n < N else zero

    @device
    def four(p, first, n, N):
        return (one(p, first, n, N), one(p, first, n + 1, N), one(p, first, n + 2, N),
                one(p, first, n + 3, N))
    return device(lambda p, first, n, N: four(p, first, n, N) + four(p, first, n + half, N))


def _place(shape):
    """Row and column of a thread's first result in the tile."""
    across = shape[1] // 64              # warps side by side in half a tile

    @device
    def place(t):
        warp, lane = t // 32, t % 32
        return warp // across * 16 + lane // 8 * 4, warp % across * 32 + lane % 8 * 4
    return place


def arithmetic(dtype, shape, line, pitches):
    """How a block of ``shape`` multiplies; its results' rows lie where ``line`` says."""
    rows, columns, place = _eight(dtype, shape[0] // 2), _eight(dtype, shape[1] // 2), _place(shape)
    write, addend = _writer(dtype, shape, line), _addend(dtype, shape[1] // 2)

    @device
    def step(acc, sa, p, sb, q):
        return outer(acc, rows(sa, p), columns(sb, q))

    @device
    def finish(c, g, m, n, N, wide, acc, bias, first):
        write(c, g, m, n, N, wide, acc, addend(bias, first, n, N))
    zeros = ((dtype.type(0),) * 8,) * 8
    return Arithmetic(place, place, zeros, 1, step, finish)
