"""The product of two matrices in tiles, whatever the matrices are made of.

A block computes ``rows`` × ``columns`` of c = a b, a thread 64 of them, on the CUDA cores (fma.py)
or the tensor cores (tensor.py). Tiles of a and b are read ahead into registers while those before
are multiplied, and go to the other half of shared memory. Sums run over k in its order: a result
has the same bits in every run.

An operand says where an element lies, in two halves: one for its row (of a; column of b), computed
once, and one for k, in each step. A convolution's pixels and taps are such halves, too.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .epilogue import epilogue, staged
from .intrinsics import address, cuda, device, load, quotient, store, width
from .layout import MISSING
from .memory import SIMULATED

__all__ = ["LARGE", "SMALL", "Arithmetic", "Operand", "Plan", "depth", "divided", "multiplier",
           "plan", "shared", "threads", "tile_of", "together"]

LARGE, SMALL = (128, 128), (64, 64)
BLOCKS = 264                 # what fills a large GPU twice; a constant, so that bits do not depend
DEEP = 256                   # on the device. And the least k that is worth a block of its own
GROUP = 8                    # rows of tiles computed side by side: they share b in the L2 cache


class Operand(NamedTuple):
    """Where the elements of a matrix lie: ``join(g, along(g, row), deep(g, k))``, an offset or
    MISSING. ``g``: the kernel's numbers. ``by``: "k" or "row", along which they are neighbours;
    ``vectors``: read them 16 bytes at once, which ``join`` allows for each first of them."""

    along: Any
    deep: Any
    join: Any
    by: str
    vectors: bool


class Arithmetic(NamedTuple):
    """How a block multiplies tiles in shared memory s. ``at(thread)``: where its first elements of
    a and b are for k = 0. ``step(sums, s, p, q)``: the sums after ``each`` more k of a at p, b at
    q. ``put`` and ``begin``: how ``epilogue`` gets them."""

    at: Any
    zeros: Any
    each: int
    step: Any
    put: Any
    begin: Any


class Plan(NamedTuple):
    """How a product is cut: tiles, and splits of k in multiples of ``length``."""

    shape: tuple[int, int]
    tiles: int
    down: int                # rows of tiles
    splits: int
    length: int


def depth(dtype):
    """k of a step: 33 KB of shared memory for two steps of two large tiles."""
    return 64 // np.dtype(dtype).itemsize


def threads(shape):
    """Threads of a block: one for 64 results."""
    return shape[0] * shape[1] // 64


def together(shape, dtype, way):
    """Blocks that a multiprocessor must have room for: large tiles of 32 bits take half of it. Two
    fragments for one, as 3xtf32 has them, would then lie in memory."""
    return 2 if shape == LARGE and dtype.itemsize == 4 and way != "3xtf32" else None


def plan(M, N, K, batches, dtype):
    """Large tiles where they fill the device; fewer small ones share k, if it is long."""
    def count(shape):
        return -(-M // shape[0]) * -(-N // shape[1])
    large = 2 * count(LARGE) * batches > BLOCKS and not SIMULATED and dtype.itemsize == 4
    shape = LARGE if large else SMALL
    tiles, step = count(shape), depth(dtype)
    splits = max(1, min(BLOCKS // max(1, tiles * batches), K // DEEP))
    length = -(-K // (splits * step)) * step
    return Plan(shape, tiles, -(-M // shape[0]), -(-K // length) if K else 1, max(length, step))


@device
def divided(n, d):
    """n // d for 0 ≤ n < 2³², in the 32 bits that a GPU divides well."""
    return np.int64(quotient(np.uint32(n), np.uint32(d)))


@device
def tile_of(t, down, tiles):
    """Row and column of the t-th tile: GROUP rows of tiles at a time, column by column."""
    across = divided(tiles, down)
    group = divided(t, GROUP * across)
    first = group * GROUP
    high = min(GROUP, down - first)
    rest = t - first * across
    column = divided(rest, high)
    return first + rest - column * high, column


def _repeated(V, one):
    """(one(0), …, one(V − 1)) of a function of p, g, u, m, k and a number."""
    if V == 2:
        return device(lambda p, g, u, m, k: (one(p, g, u, m, k, 0), one(p, g, u, m, k, 1)))
    return device(lambda p, g, u, m, k: (one(p, g, u, m, k, 0), one(p, g, u, m, k, 1),
                                         one(p, g, u, m, k, 2), one(p, g, u, m, k, 3)))


def _vector(operand, dtype):
    """The 16 bytes from row m and step k on; u is ``along(g, m)``."""
    along, deep, join, by, vectors = operand
    W, zero = width(dtype), dtype.type(0)
    zeros = (zero,) * W

    @device
    def single(p, g, u, k):
        at = join(g, u, deep(g, k))
        return p[at] if at > MISSING // 2 else zero

    if vectors:
        @device
        def vector(p, g, u, m, k):
            at = join(g, u, deep(g, k))
            return load(p, at) if at > MISSING // 2 else zeros
        return vector
    if by == "k":
        return device((lambda p, g, u, m, k: (single(p, g, u, k), single(p, g, u, k + 1)))
                      if W == 2 else
                      (lambda p, g, u, m, k: (single(p, g, u, k), single(p, g, u, k + 1),
                                              single(p, g, u, k + 2), single(p, g, u, k + 3))))
    return device((lambda p, g, u, m, k: (single(p, g, u, k), single(p, g, along(g, m + 1), k)))
                  if W == 2 else
                  (lambda p, g, u, m, k: (single(p, g, u, k), single(p, g, along(g, m + 1), k),
                                          single(p, g, along(g, m + 2), k),
                                          single(p, g, along(g, m + 3), k))))


def _across(W, pitch):
    """A vector into shared memory as a column."""
    if W == 2:
        @device
        def put(s, i, v):
            s[i] = v[0]
            s[i + pitch] = v[1]
    else:
        @device
        def put(s, i, v):
            s[i] = v[0]
            s[i + pitch] = v[1]
            s[i + 2 * pitch] = v[2]
            s[i + 3 * pitch] = v[3]
    return put


def _loader(operand, size, dtype, count, pitch):
    """For an operand's tile of so many rows: where thread t's vectors are in it (row, k), how they
    are read, and how they go to shared memory, which holds k after k of ``pitch`` elements."""
    W, steps = width(dtype), depth(dtype)
    vector = _vector(operand, dtype)
    if operand.by == "k":            # 16 rows by 2 vectors of a warp go to 32 banks
        lanes = count // size
        V, step, shift, put = steps // W // lanes, lanes * W, lanes * W * pitch, _across(W, pitch)
        place = device(lambda t: (t // lanes, t % lanes * W))
    else:
        line = size // W
        step, put = count // line, store
        V, shift = steps // step, step * pitch
        place = device(lambda t: (t % line * W, t // line))
    fetch = _repeated(V, device(lambda p, g, u, m, k, v: vector(p, g, u, m, k + v * step)))
    if V == 2:
        @device
        def keep(s, i, x):
            put(s, i, x[0])
            put(s, i + shift, x[1])
    else:
        @device
        def keep(s, i, x):
            put(s, i, x[0])
            put(s, i + shift, x[1])
            put(s, i + 2 * shift, x[2])
            put(s, i + 3 * shift, x[3])
    return place, fetch, keep


def shared(shape, dtype, pad):
    """Bytes of shared memory: two steps of both tiles; half a tile of sums; what statistics need.
    """
    item, pitches = dtype.itemsize, sum(shape) + 2 * pad
    return max(2 * pitches * depth(dtype) * item, staged(shape, shape[1] + pad, f"f{item}"),
               24 * threads(shape))


@cache
def multiplier(a, b, line, shape, dtype, arithmetic, pad, kind, moments=False):
    """The body of a block: tile (i, j) of c = a b + bias for k from ``begin`` to ``end``.

    c, of ``kind``: its rows lie where ``line(g, row)`` says, N columns behind it; ``wide``: on 16
    bytes. ``first``: bias for column 0 is bias[first]; none if it is negative. ``pad``: unused
    elements behind each row of a tile in shared memory, for its banks' sake. ``found``: see
    ``epilogue``, which gives it ``moments``."""
    (tall, across), steps, element = shape, depth(dtype), dtype.type
    high, broad = tall + pad, across + pad
    place_a, fetch_a, keep_a = _loader(a, tall, dtype, threads(shape), high)
    place_b, fetch_b, keep_b = _loader(b, across, dtype, threads(shape), broad)
    at, zeros, each, step, put, first_row = arithmetic(dtype, shape, (high, broad))
    along_a, along_b = a.along, b.along
    size_a, size_b = steps * high, steps * broad
    down, right, behind_a = each * high, each * broad, 2 * size_a
    finish = epilogue(shape, broad, line, np.dtype(f"f{dtype.itemsize}").type, kind, put, first_row,
                      moments)

    @device
    def body(pa, pb, c, bias, first, g, i, j, begin, end, N, wide, found):
        s, t = address(cuda.shared.array(0, element)), cuda.threadIdx.x
        (ra, ka), (rb, kb), (pt, qt) = place_a(t), place_b(t), at(t)
        to_a, to_b, qt = ka * high + ra, behind_a + kb * broad + rb, behind_a + qt
        ra, rb = i * tall + ra, j * across + rb
        u, v = along_a(g, ra), along_b(g, rb)
        keep_a(s, to_a, fetch_a(pa, g, u, ra, begin + ka))
        keep_b(s, to_b, fetch_b(pb, g, v, rb, begin + kb))
        cuda.syncthreads()
        acc, now = zeros, 0
        for k in range(begin, end, steps):
            after = min(k + steps, end)          # beyond the end all is missing: nothing is read
            x, y = fetch_a(pa, g, u, ra, after + ka), fetch_b(pb, g, v, rb, after + kb)
            p, q = now * size_a + pt, now * size_b + qt
            for _ in range(0, steps, each):      # unrolled by the assembler; by hand it spills
                acc = step(acc, s, p, q)
                p += down
                q += right
            now = 1 - now
            keep_a(s, now * size_a + to_a, x)
            keep_b(s, now * size_b + to_b, y)
            cuda.syncthreads()
        finish(c, g, i * tall, j * across, N, wide, acc, bias, first, found)
    return body
