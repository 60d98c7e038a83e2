"""What becomes of a tile's sums: they go through shared memory, half a tile at a time, which puts
neighbours of a row side by side, and from there to memory in vectors of 16 bytes, rounded where
the result is of halves.

On the way a thread takes mean and squares of 32 numbers of a column as they are written, in two
passes, and merges them in float64 (Chan, Golub & LeVeque 1983), in a fixed order. What the tiles
leave is merged by a kernel of its own: the statistics of a convolution's channels, without reading
its result.
"""


import numpy as np

from .intrinsics import HALVES, address, cuda, device, load, rounded, store, width
from .launch import Kernel, factory
from .layout import MISSING
from .memory import empty
from .moments import THREADS, of_parts

__all__ = ["epilogue", "every", "merged", "staged"]

RUN = 32                     # rows of a thread's statistics
SIDE = 3                     # log2 of the channels whose parts a block merges: 64 bytes of each
_SMALL, _LARGE = 1e-30, 1e37          # squares beyond are taken again in float64


def staged(shape, pitch, real):
    """Bytes of shared memory that half a tile takes."""
    return shape[0] // 2 * pitch * np.dtype(real).itemsize


def _reader(V):
    """V numbers at i of shared memory, plus b."""
    if V == 2:
        return device(lambda s, i, b: (s[i] + b[0], s[i + 1] + b[1]))

    @device
    def four(s, i, b):
        v = load(s, i)
        return v[0] + b[0], v[1] + b[1], v[2] + b[2], v[3] + b[3]
    return four if V == 4 else device(lambda s, i, b: four(s, i, b[:4]) + four(s, i + 4, b[4:]))


def _addends(real, V):
    """The bias of column n, and of V from n on; column 0's is bias[first], none if first < 0."""
    zero = real(0)

    @device
    def one(p, first, n, N):
        return p[first + n] if first >= 0 and n < N else zero
    two = device(lambda p, first, n, N: (one(p, first, n, N), one(p, first, n + 1, N)))
    four = device(lambda p, first, n, N: two(p, first, n, N) + two(p, first, n + 2, N))
    eight = device(lambda p, first, n, N: four(p, first, n, N) + four(p, first, n + 4, N))
    return one, {2: two, 4: four, 8: eight}[V]


def _writer(shape, pitch, line, begin, real, V):
    """Write half a tile, a vector to a thread at once; rows that ``line`` misses have no place."""
    (tall, across), take, (one, some) = shape, _reader(V), _addends(real, V)
    side = across // V
    down = tall // 2 * across // (32 * side)         # threads below each other

    @device
    def write(s, part, c, g, top, left, N, wide, bias, first):
        q = cuda.threadIdx.x % side * V
        n = left + q
        add = some(bias, first, n, N)
        for r in range(cuda.threadIdx.x // side, tall // 2, down):
            at, i = line(g, top + begin(part, r)), r * pitch + q
            if at > MISSING // 2:
                if wide and n + V <= N:
                    store(c, at + n, take(s, i, add))
                else:
                    for v in range(min(V, N - n)):
                        c[at + n + v] = s[i + v] + one(bias, first, n + v, N)
    return write


def _two_passes(kind, fix, pitch):
    """About a mean m of the first pass: Σ d and Σ d² of n numbers."""
    @device
    def passes(s, i, n, b):
        pivot = kind(fix(s[i] + b))                  # a constant column's mean is exact
        r = q = kind(0)
        for k in range(n):
            r += kind(fix(s[i + k * pitch] + b)) - pivot
        m, r = pivot + r / kind(n), kind(0)
        for k in range(n):
            d = kind(fix(s[i + k * pitch] + b)) - m
            r += d
            q += d * d
        return np.float64(m), np.float64(r), np.float64(q)
    return passes


def _column(pitch, fix):
    """Mean and M2 of n > 0 numbers below each other at i, plus b, as they are written."""
    narrow, wide = _two_passes(np.float32, fix, pitch), _two_passes(np.float64, fix, pitch)

    @device
    def moments(s, i, n, b):
        m, r, q = narrow(s, i, n, b)
        if not (q > _SMALL and q < _LARGE):
            m, r, q = wide(s, i, n, b)
        off = r / n
        q -= r * off
        return m + off if off == off else m, q if q > 0.0 or q != q else 0.0
    return moments


@device
def _joined(n, mean, m2, k, other, more):
    """(n, mean, M2) of n and k numbers together."""
    if k <= 0:
        return n, mean, m2
    if n <= 0:
        return k, other, more
    d, w = other - mean, k / (n + k)
    return n + k, mean + d * w, m2 + more + d * (d * (n * w))


def _statistics(shape, pitch, begin, fix):
    """``add`` half a tile to a thread's (n, mean, M2) of its column and rows; ``keep`` those of all
    threads of each column, first column at ``at`` of the arrays."""
    (tall, across), column, (bias_of, _) = shape, _column(pitch, fix), _addends(np.float32, 2)
    lanes = tall // 2 // RUN

    @device
    def add(state, s, part, rows, left, N, bias, first):
        q, lane = cuda.threadIdx.x % across, cuda.threadIdx.x // across
        n = min(RUN, rows - begin(part, lane * RUN))
        if n <= 0 or left + q >= N:
            return state
        mean, m2 = column(s, lane * RUN * pitch + q, n, bias_of(bias, first, left + q, N))
        return _joined(state[0], state[1], state[2], n, mean, m2)

    @device
    def keep(state, means, squares, at, left, N):
        t, cells = cuda.threadIdx.x, cuda.shared.array(0, np.float64)
        cells[3 * t], cells[3 * t + 1], cells[3 * t + 2] = state[0], state[1], state[2]
        cuda.syncthreads()
        if t < across and left + t < N:
            n, mean, m2 = np.int64(state[0]), state[1], state[2]
            for lane in range(1, lanes):
                i = 3 * (lane * across + t)
                n, mean, m2 = _joined(n, mean, m2, np.int64(cells[i]), cells[i + 1], cells[i + 2])
            means[at + left + t], squares[at + left + t] = mean, m2
    return add, keep


def epilogue(shape, pitch, line, real, kind, put, begin, moments):
    """Write a tile whose row r lies where ``line`` says, N columns behind it, of dtype ``kind``.

    ``put[p](cells, sums)``: a thread's sums of half p into rows of ``pitch`` numbers, of which row
    r is ``begin(p, r)`` of the tile. With ``moments``, ``found`` = (means, squares, where column
    0's are, rows of all) is filled; rows up to ``RUN`` × a whole number follow each other."""
    write = _writer(shape, pitch, line, begin, real, 8 if kind in HALVES else width(kind))
    first_half, second_half = put

    @device
    def plain(c, g, top, left, N, wide, sums, bias, first, found):
        cells = address(cuda.shared.array(0, real))
        first_half(cells, sums)
        cuda.syncthreads()
        write(cells, 0, c, g, top, left, N, wide, bias, first)
        cuda.syncthreads()
        second_half(cells, sums)
        cuda.syncthreads()
        write(cells, 1, c, g, top, left, N, wide, bias, first)
    if not moments:
        return plain
    add, keep = _statistics(shape, pitch, begin, rounded(moments))

    @device
    def with_moments(c, g, top, left, N, wide, sums, bias, first, found):
        cells, rows = address(cuda.shared.array(0, real)), found[3] - top
        first_half(cells, sums)
        cuda.syncthreads()
        write(cells, 0, c, g, top, left, N, wide, bias, first)
        state = add((np.int64(0), 0.0, 0.0), cells, 0, rows, left, N, bias, first)
        cuda.syncthreads()
        second_half(cells, sums)
        cuda.syncthreads()
        write(cells, 1, c, g, top, left, N, wide, bias, first)
        state = add(state, cells, 1, rows, left, N, bias, first)
        cuda.syncthreads()
        keep(state, found[0], found[1], found[2], left, N)
    return with_moments


@factory
def _merge():
    """Count, mean and M2 of B channels from those of P parts, of ``segment`` of R rows each."""
    line, join = 1 << SIDE, of_parts(1, True)

    def body(parts_mean, parts_m2, count, mean, m2, R, B, segment, P):
        means = cuda.shared.array(THREADS, np.float64)
        squares = cuda.shared.array(THREADS, np.float64)
        counts = cuda.shared.array(THREADS, np.float64)
        t, q = cuda.threadIdx.x, cuda.blockIdx.x * line
        own = q + (t & (line - 1))
        join(parts_mean, parts_m2, own, R, B, own, SIDE, segment, P, means, squares, counts)
        if t < line and q + t < B:
            count[q + t], mean[q + t], m2[q + t] = counts[t], means[t], squares[t]
    return Kernel(body, "*f8 " * 5 + "i8 " * 4, name="merge_moments", threads=THREADS)


def merged(parts_mean, parts_m2, rows, segment):
    """Count, mean and M2 (C,) of what tiles have left, (P, C) of ``segment`` rows each."""
    P, C = parts_mean.shape
    found = [empty((C,), np.float64) for _ in range(3)]
    _merge()(-(-C // (1 << SIDE)), parts_mean, parts_m2, *found, rows, C, segment, P)
    return found


def every():
    """For those who compile ahead."""
    yield _merge()
