"""Mean and variance of channels, and the shape of the work that all kernels over channels share.

A channel is a *column* of rows x columns memory (channels-last) or *segments* of S values that lie
together (channels-first). Either way a block takes so many lines of W numbers of one tile of
channels; a thread holds eight of them at once, takes their mean and squares in two passes over
registers, and merges them in float64 (Chan, Golub & LeVeque 1983). So do threads, in shared memory,
and the last block of a tile to arrive merges what the blocks have found, in their order: results
have the same bits in every run.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

from ..half import kind as kind_of, real as real_of
from . import graphs
from .intrinsics import arrive, cuda, device, libm, quotient, width
from .launch import Kernel, factory
from .layout import aligned
from .memory import SIMULATED, empty, queue, xp
from .vectors import dtypes, each, filled, gather, of_lanes, reader, scatter

__all__ = ["THREADS", "Cut", "add_trees", "cases", "cut", "kernel", "line_at", "move", "settled",
           "statistics", "tickets"]

THREADS = 256 if not SIMULATED else 32
LOG = THREADS.bit_length() - 1
CELLS = THREADS // 2         # of a lane, in which a block merges
ROWS = 8                     # lines of a thread at once: 128 bytes in flight
LINE = 64                    # bytes of a row that a block takes: two sectors of memory
BLOCKS = 1024                # that the work is cut into, as far as it is enough: more tiles than
                             # half of them have one part each
_SMALL, _LARGE = 1e-30, 1e37          # squares beyond are taken again in float64
_min, _max = min, max


class Cut(NamedTuple):
    """How memory is cut: A samples (1: all are one) of R lines of B columns, or of one channel."""

    columns: bool
    A: int
    R: int                   # lines of W numbers of a channel
    B: int                   # columns of a row; channels
    S: int                   # numbers that lie together in a segment
    W: int
    shift: int               # log2 of the threads side by side on a row
    segment: int             # lines of a part
    P: int                   # parts
    tiles: int               # of channels
    index: str               # type that positions fit

    @property
    def blocks(self):
        return self.A * self.tiles * self.P

    @property
    def numbers(self):
        return self.R, self.B, self.S, self.shift, self.segment, self.P, self.tiles

    @property
    def kind(self):
        return self.W, self.columns, self.index


def cut(columns, A, N, C, S, dtype, *arrays):
    """Cut dense arrays: (A, N, C) memory in columns, or (N, C, S) in segments, A = 1."""
    W = width(dtype)
    if (C if columns else S) % W or not aligned(*arrays):
        W = 1
    R = N if columns else N * S // W
    shift = 0
    if columns:
        side = _min(LINE // (W * dtype.itemsize), CELLS)
        while 1 << shift < side and W << shift < C:
            shift += 1
    tiles = -(-C // (W << shift)) if columns else C
    least = ROWS * (THREADS >> shift)                    # lines that keep every thread busy once
    P = _max(1, _min(-(-R // least), BLOCKS // _max(1, A * tiles)))
    segment = -(-R // (P * least)) * least
    index = "u4" if columns or A * N * C * S < 2**31 else "i8"
    return Cut(columns, A, R, C, S, W, shift, segment, -(-R // segment), tiles, index)


@cache
def line_at(W, columns, index):
    """Where line r of column, or channel, q lies behind its sample's first element."""
    if columns:
        return device(lambda r, q, B, S: r * B + q)
    unsigned = np.uint32 if index == "u4" else np.int64

    def at(r, q, B, S):
        e = r * W
        n = np.int64(quotient(unsigned(e), unsigned(S)) if index == "u4" else e // S)
        return (n * B + q) * S + (e - n * S)
    return device(at)


# ------------------------------------------------------------------------------------------ moments

def moments_of(real, count):
    """Mean and M2, in float64, of n of four or eight numbers; the others are copies of the first.

    In two passes about a mean of the first pass, whose rounding the second takes out again."""
    one, full, wide = real(1), real(ROWS), np.float64
    low, high = (_SMALL, _LARGE) if real is np.float32 else (-1.0, math.inf)
    low, high = real(low), real(high)

    def again(a, b, c, d, e, f, g, h, n):
        spare, n = 8.0 - wide(n), wide(n)
        a, b, c, d = wide(a), wide(b), wide(c), wide(d)
        e, f, g, h = wide(e), wide(f), wide(g), wide(h)
        m = a + (((b - a) + (c - a)) + ((d - a) + (e - a)) + ((f - a) + (g - a)) + (h - a)) / n
        a, b, c, d, e, f, g, h = a - m, b - m, c - m, d - m, e - m, f - m, g - m, h - m
        q = a * a + b * b + c * c + d * d + e * e + f * f + g * g + h * h - spare * (a * a)
        return m, q if q > 0.0 or q != q else 0.0

    again = device(again)

    @device
    def settled(m, r, q, part):
        r, off = wide(r), wide(r * part)
        q = wide(q) - r * off
        return wide(m) + off, q if q > 0.0 else 0.0

    @device
    def eight(a, b, c, d, e, f, g, h, n):
        part = one / n
        spare = full - n
        m = a + (((b - a) + (c - a)) + ((d - a) + (e - a)) + ((f - a) + (g - a)) + (h - a)) * part
        p, s, t, u, v, w, y, z = a - m, b - m, c - m, d - m, e - m, f - m, g - m, h - m
        q = (((p * p + s * s) + (t * t + u * u)) + ((v * v + w * w) + (y * y + z * z))
             - spare * (p * p))
        if not (q > low and q < high):
            return again(a, b, c, d, e, f, g, h, n)
        return settled(m, ((p + s) + (t + u)) + ((v + w) + (y + z)) - spare * p, q, part)

    @device
    def four(a, b, c, d, n):
        part = one / n
        spare = real(4) - n
        m = a + (((b - a) + (c - a)) + (d - a)) * part
        p, s, t, u = a - m, b - m, c - m, d - m
        q = (p * p + s * s) + (t * t + u * u) - spare * (p * p)
        if not (q > low and q < high):
            return again(a, b, c, d, a, a, a, a, n)
        return settled(m, (p + s) + (t + u) - spare * p, q, part)
    return {8: eight, 4: four}[count]


@cache
def moments_of_eight(dtype, W):
    """``moments_of`` of eight tuples, lane by lane."""
    f = moments_of(real_of(dtype).type, 8)
    return device({
        1: lambda a, b, c, d, e, g, h, i, n:
            (f(a[0], b[0], c[0], d[0], e[0], g[0], h[0], i[0], n),),
        2: lambda a, b, c, d, e, g, h, i, n:
            (f(a[0], b[0], c[0], d[0], e[0], g[0], h[0], i[0], n),
             f(a[1], b[1], c[1], d[1], e[1], g[1], h[1], i[1], n)),
        4: lambda a, b, c, d, e, g, h, i, n:
            (f(a[0], b[0], c[0], d[0], e[0], g[0], h[0], i[0], n),
             f(a[1], b[1], c[1], d[1], e[1], g[1], h[1], i[1], n),
             f(a[2], b[2], c[2], d[2], e[2], g[2], h[2], i[2], n),
             f(a[3], b[3], c[3], d[3], e[3], g[3], h[3], i[3], n))}[W])


@cache
def moments_of_halves(dtype, folded):
    """Moments of m of four tuples of eight, lane by lane; ``folded``: of lanes k and k + 4 as one.
    """
    f, eight, real = moments_of(np.float32, 4), moments_of_eight(dtype, 4), np.float32

    @device
    def half(a, b, c, d, n):
        return (f(a[0], b[0], c[0], d[0], n), f(a[1], b[1], c[1], d[1], n),
                f(a[2], b[2], c[2], d[2], n), f(a[3], b[3], c[3], d[3], n))

    @device
    def apart(m, a, b, c, d):
        return (half(a[:4], b[:4], c[:4], d[:4], real(m))
                + half(a[4:], b[4:], c[4:], d[4:], real(m)))

    @device
    def together(m, a, b, c, d):
        first = a[:4] + a[:4]
        b, c, d = b if m > 1 else first, c if m > 2 else first, d if m > 3 else first
        return eight(a[:4], a[4:], b[:4], b[4:], c[:4], c[4:], d[:4], d[4:], real(2 * m))
    return together if folded else apart


@cache
def moments_of_vectors(dtype, W, folded):
    """Moments of m of eight tuples of W, of halves of four; see ``moments_of_halves``."""
    if W == 8:
        return moments_of_halves(dtype, folded)
    f, real = moments_of_eight(dtype, W), real_of(dtype).type
    return device(lambda m, a, b, c, d, e, g, h, i: f(a, b, c, d, e, g, h, i, real(m)))


@device
def merged(a, b, how):
    """(mean, M2) of a and b together; how = (n_b / n, n_a n_b / n)."""
    d = b[0] - a[0]
    return a[0] + d * how[0], a[1] + b[1] + d * (d * how[1])


@device
def merge_trees(means, squares, counts, size, line):
    """Merge cells i and i + size / 2 until ``line`` are left, which are what comes together."""
    t, size = cuda.threadIdx.x, size // 2
    while size >= line:
        cuda.syncthreads()
        for i in range(t, size, THREADS):
            a, b = counts[i], counts[i + size]
            if b > 0.0:
                w = b / (a + b)
                d = means[i + size] - means[i]
                means[i] += d * w
                squares[i] += squares[i + size] + d * (d * (a * w))
                counts[i] = a + b
        size //= 2
    cuda.syncthreads()


@device
def add_trees(first, second, size, line):
    """Add cells i and i + size / 2, of two arrays, until ``line`` are left."""
    t, size = cuda.threadIdx.x, size // 2
    while size >= line:
        cuda.syncthreads()
        for i in range(t, size, THREADS):
            first[i] += first[i + size]
            second[i] += second[i + size]
        size //= 2
    cuda.syncthreads()


@device
def _first(v):
    return v[0]


@device
def _second(v):
    return v[1]


@cache
def places(W, columns, index, count):
    """How many of ``count`` lines r, r + lanes … there are before ``end``, and where they lie;
    others are the first again."""
    at = line_at(W, columns, index)

    @device
    def place(k, base, r, lanes, m, q, B, S):
        return base + at(r + (k * lanes if m > k else 0), q, B, S)
    all_of = of_lanes(place, count)

    @device
    def f(base, r, end, q, B, S, shift):
        lanes = THREADS >> shift
        m = _min(count, (end - r + lanes - 1) >> (LOG - shift))
        return m, all_of(base, r, lanes, m, q, B, S)
    return f


def states(W, columns):
    """How many lanes of a vector have moments of their own: of a channel's eight, pairs have."""
    return 4 if W == 8 and not columns else W


@cache
def of_lines(dtype, W, columns, index, loose=False, folded=False):
    """How many numbers of a lane, and the moments of lanes, over every lanes-th line from r to end;
    ``loose``: W is no vector, they are read one by one."""
    count, K = (4 if W == 8 else ROWS), 4 if folded else W
    place, per = places(W, columns, index, count), W // K
    read, copies = each((gather if loose else reader)(W), 2, count), filled(count)
    merge, same, moments = each(merged, 3, K), filled(K), moments_of_vectors(dtype, W, folded)

    @device
    def f(x, base, r, end, q, B, S, shift):
        n, state = 0.0, same((0.0, 0.0))
        while r < end and q < B:
            m, i = place(base, r, end, q, B, S, shift)
            w = per * m / (n + per * m)
            state = merge(state, moments(m, *read(copies(x), i)), same((w, n * w)))
            n += per * m
            r += count * (THREADS >> shift)
        return n, state
    return f


@cache
def to_cells(W):
    """Merge what two threads each have found into the cells of their lanes, for ``merge_trees``:
    cells of half of the block's threads are enough."""
    firsts, seconds, put, same = each(_first, 1, W), each(_second, 1, W), scatter(W), filled(W)
    take, merge, pair = gather(W), each(merged, 3, W), each(device(lambda a, b: (a, b)), 2, W)

    @device
    def f(n, state, means, squares, counts):
        i = (cuda.threadIdx.x - CELLS) * W
        if i >= 0:
            put(means, i, firsts(state))
            put(squares, i, seconds(state))
            put(counts, i, same(n))
        cuda.syncthreads()
        if i < 0:
            i += CELLS * W
            m = counts[i]
            if m > 0.0:
                w = m / (n + m)
                state = merge(state, pair(take(means, i), take(squares, i)), same((w, n * w)))
            put(means, i, firsts(state))
            put(squares, i, seconds(state))
            put(counts, i, same(n + m))
    return f


@cache
def of_parts(W, columns):
    """Merge what the P blocks of a tile have found, the first of it at ``first``, into cells."""
    L, per_line = (W, 1) if columns else (1, W)
    take, merge, same, fill = gather(L), each(merged, 3, L), filled(L), to_cells(L)
    pair = each(device(lambda a, b: (a, b)), 2, L)

    @device
    def f(parts_mean, parts_m2, first, R, B, q, shift, segment, P, means, squares, counts):
        n, found, p = 0.0, same((0.0, 0.0)), cuda.threadIdx.x >> shift
        while p < P and q < B:
            m = np.float64(per_line * (_min(R, p * segment + segment) - p * segment))
            w, i = m / (n + m), first + p * B
            found = merge(found, pair(take(parts_mean, i), take(parts_m2, i)), same((w, n * w)))
            n += m
            p += THREADS >> shift
        fill(n, found, means, squares, counts)
        merge_trees(means, squares, counts, L * CELLS, L << shift)
    return f


def kernel(body, name, dtype, params, W, columns, index, parameters, **settings):
    """A kernel over channels of arrays of a dtype ("k" in ``parameters``), with γ, β and running
    statistics of another ("p")."""
    k, p = kind_of(dtype), kind_of(params)
    layout = "columns" if columns else f"segments_{index}"
    return Kernel(body, parameters.replace("k", k).replace("p", p), threads=THREADS, minimum=2,
                  name=f"{name}_{k}{'' if p == k else '_' + p}_{W}_{layout}", **settings)


def cases():
    """The arguments of every kernel over channels."""
    for dtype in dtypes():
        for W in (width(dtype), 1):
            for params in {dtype: None, real_of(dtype): None} if W > 1 else (dtype,):
                for columns in (True, False):
                    yield dtype, params, W, columns, "u4"


@device
def move(c, n, mean, var, running_mean, running_var, momentum):
    """Running statistics towards those of n numbers."""
    running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * mean
    running_var[c] = (1.0 - momentum) * running_var[c] + momentum * (var * (n / (n - 1.0)))


@factory
def statistics(dtype, params, W, columns, index):
    """mean, var (biased) and invstd of channels; the running ones move."""
    K, L, sqrt = states(W, columns), W if columns else 1, libm("sqrt", np.float64)
    lines, fill, join = (of_lines(dtype, W, columns, index, False, K < W), to_cells(K),
                         of_parts(W, columns))
    SIZE = K * CELLS

    def body(x, mean, var, invstd, parts_mean, parts_m2, counters, running_mean, running_var,
             R, B, S, shift, segment, P, tiles, eps, momentum, moving):
        means = cuda.shared.array(SIZE, np.float64)
        squares = cuda.shared.array(SIZE, np.float64)
        counts = cuda.shared.array(SIZE, np.float64)
        last = cuda.shared.array(1, np.int32)
        t, tile, rest = cuda.threadIdx.x, cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        k, a, line = rest % P, rest // P, L << shift
        q = tile * line + (t & ((1 << shift) - 1)) * L
        n, state = lines(x, a * R * B, k * segment + (t >> shift),
                         _min(R, k * segment + segment), q, B, S, shift)
        cuda.syncthreads()
        tile, rest = cuda.blockIdx.x % tiles, cuda.blockIdx.x // tiles
        k, a = rest % P, rest // P           # again: registers are short while lines are read
        q = tile * line + (t & ((1 << shift) - 1)) * L
        fill(n, state, means, squares, counts)
        merge_trees(means, squares, counts, SIZE, line)
        if P > 1:
            if t < line and tile * line + t < B:
                i = (a * P + k) * B + tile * line + t
                parts_mean[i], parts_m2[i] = means[t], squares[t]
            cuda.threadfence()
            cuda.syncthreads()
            if t == 0:
                cuda.threadfence()         # for what others wrote, too (PTX)
                last[0] = arrive(counters, a * tiles + tile)
            cuda.syncthreads()
            if last[0] != P - 1:
                return
            if t == 0:
                counters[a * tiles + tile] = 0
            cuda.threadfence()
            join(parts_mean, parts_m2, a * P * B + q, R, B, q, shift, segment, P, means, squares,
                 counts)
        c = tile * line + t
        if t < line and c < B:
            n, v, c = counts[t], squares[t] / counts[t], a * B + c
            mean[c], var[c], invstd[c] = means[t], v, 1.0 / sqrt(v + eps)
            if moving:
                move(c, n, means[t], v, running_mean, running_var, momentum)
    return kernel(body, "statistics", dtype, params, W, columns, index,
                  f"*k {'*f8 ' * 5} *i4 *p *p {'i8 ' * 7} f8 f8 i4")


@factory
def _settled(params):
    sqrt, kind = libm("sqrt", np.float64), kind_of(params)

    def body(mean, var, invstd, running_mean, running_var, C, n, eps, momentum, moving):
        c = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if c < C:
            invstd[c] = 1.0 / sqrt(var[c] + eps)
            if moving:
                move(c, n, mean[c], var[c], running_mean, running_var, momentum)
    return Kernel(body, f"*f8 *f8 *f8 *{kind} *{kind} i8 f8 f8 f8 i4", name=f"settled_{kind}",
                  threads=THREADS)


def settled(mean, var, n, eps, params, running=None):
    """invstd of the statistics of n numbers; the running arrays, of dtype ``params``, move."""
    C, invstd = len(mean), empty((len(mean),), np.float64)
    towards = (None, None, 0.0) if running is None else running
    _settled(params)(-(-C // THREADS), mean, var, invstd, *towards[:2], C, n, eps, towards[2],
                     running is not None)
    return invstd


@cache
def _tickets(device_number, stream, thread):
    return xp.zeros(BLOCKS, np.int32)


def tickets():
    """Counters of blocks that have arrived, 0 between kernels; of the current stream, since
    kernels of two may run at the same time."""
    return graphs.own(_tickets, *queue())


def parts(c):
    """Two arrays for what blocks find; none for one block per tile."""
    if c.P == 1:
        return None, None
    return empty((c.A, c.P, c.B), np.float64), empty((c.A, c.P, c.B), np.float64)


def every():
    """All kernels of this module."""
    for kinds in cases():
        yield statistics(*kinds)
    for dtype in dtypes():
        yield _settled(dtype)
