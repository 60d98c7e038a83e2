"""The product of two matrices in tiles, whatever the matrices are made of.

A block computes ``rows`` × ``columns`` of c = a b, a thread 64 of them, on the CUDA cores (fma.py)
or the tensor cores (tensor.py). While a step of k is multiplied, those after it are on their way to
other parts of shared memory: two of them, without passing through registers, where the device can
copy so ("ahead", compute capability 8.0); else one, in registers ("plain"). Sums run over k in
its order: a result has the same bits in every run.

An operand says where an element lies, in two halves: one for its row (of a; column of b), computed
once, and one for k, in each step. A convolution's pixels and taps are such halves, too.

Shared memory has an operand's vectors of 16 bytes as they are in memory: of neighbouring rows, k
after k; or of neighbouring k, row after row of 64 bytes, where vector v of row r lies at the place
of v ^ (r / 2 mod 4), so that 8 rows' are in different banks. Halves come in words of two: of
neighbouring k, which are counted in words then, or both operands' of neighbouring rows.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .epilogue import epilogue, staged
from .intrinsics import (
    address,
    commit,
    copy,
    cuda,
    device,
    load,
    quotient,
    store,
    wait,
    width,
)
from .launch import Kernel
from .layout import MISSING
from .memory import SIMULATED

__all__ = ["LARGE", "LOADS", "SMALL", "WORD", "Arithmetic", "Operand", "Plan", "compiled",
           "depth", "divided", "multiplier", "plan", "swizzled", "threads", "tile_of"]

LARGE, SMALL = (128, 128), (64, 64)
BLOCKS = 264                 # what fills a large GPU twice; a constant, so that bits do not depend
DEEP = 256                   # on the device. And the least k that is worth a block of its own
WORD = np.dtype(np.uint32)   # two halves, of neighbouring k or rows
MOST = 2**31 - 512           # rows, columns and k
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
    a and b are for k = 0. ``step(sums, s, p, q, k)``: the sums after ``each`` more from k on, for
    a at p and b at q. ``put`` and ``begin``: how ``epilogue`` gets them."""

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


class Loads(NamedTuple):
    """How vectors come to shared memory. ``x = vector(s, i, p, at)``, or element by element
    ``single``, asks for p[at], 0 if ``at`` is MISSING, to be at s[i] after ``keep(s, i, x)``,
    ``commit()`` and ``wait(n)()``, after which n may have been committed. ``stages``: steps that
    shared memory has."""

    stages: int
    least: tuple[int, int]       # compute capability
    vector: Any
    single: Any
    keep: Any
    commit: Any
    wait: Any


@device
def _nothing(*args):
    return None


@cache
def _plain(dtype):
    """By registers: read before the step that is multiplied, written after it."""
    zero, zeros = dtype.type(0), (dtype.type(0),) * width(dtype)
    return Loads(
        2, (0, 0), device(lambda s, i, p, at: load(p, at) if at > MISSING // 2 else zeros),
        device(lambda s, i, p, at: p[at] if at > MISSING // 2 else zero), store, _nothing,
        lambda n: _nothing)


@cache
def _ahead(dtype):
    """Two steps ahead, by copies that nobody waits for."""
    many, one = copy(width(dtype)), copy(1)

    @device
    def vector(s, i, p, at):
        there = at > MISSING // 2
        many(s, i, p, at if there else 0, there)
        return 0

    @device
    def single(s, i, p, at):
        there = at > MISSING // 2
        one(s, i, p, at if there else 0, there)
        return 0
    return Loads(3, (8, 0), vector, single, _nothing, commit, wait)


LOADS = {"plain": _plain, "ahead": _ahead}       # by dtype


def depth(dtype):
    """k of a step: 64 bytes of a row."""
    return 64 // np.dtype(dtype).itemsize


def threads(shape):
    """Threads of a block: one for 64 results."""
    return shape[0] * shape[1] // 64


def plan(M, N, K, batches, dtype):
    """Large tiles where they fill the device; fewer small ones share k, if it is long. Raises
    ValueError for sizes that kernels cannot count in 32 bits."""
    if max(M, N, K) > MOST:
        raise ValueError(f"({M}, {K}) times ({K}, {N}) on CUDA: sizes must not be above {MOST:,}")
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


class Layout(NamedTuple):
    """How an operand's tile lies in shared memory: ``by`` "row" or "k", ``pitch`` from line to the
    next; ``size`` elements. ``packed``: they are words of two halves of neighbouring rows."""

    by: str
    pitch: int
    size: int
    packed: bool = False


@cache
def layout(by, rows, dtype, pad):
    """``pad``: unused numbers behind each k, for the banks' sake, where rows are neighbours."""
    steps, pitch = depth(dtype), rows + pad
    if by == "k":
        return Layout(by, steps, rows * steps)
    if dtype == WORD:
        return Layout(by, pitch // 2, steps * pitch, True)
    return Layout(by, pitch, steps * pitch)


@cache
def swizzled(dtype):
    """Where k = v W of a row lies, row after row: v is one of 4 vectors."""
    W, steps = width(dtype), depth(dtype)
    return device(lambda row, v: row * steps + (v ^ ((row >> 1) & 3)) * W)


def _repeated(V, one):
    """(one(0, …), …, one(V − 1, …))."""
    if V == 2:
        return device(lambda s, i, p, g, u, m, k: (one(0, s, i, p, g, u, m, k),
                                                   one(1, s, i, p, g, u, m, k)))
    return device(lambda s, i, p, g, u, m, k: (
        one(0, s, i, p, g, u, m, k), one(1, s, i, p, g, u, m, k), one(2, s, i, p, g, u, m, k),
        one(3, s, i, p, g, u, m, k)))


def _kept(V, shift, keep):
    """V vectors, ``shift`` elements from each to the next, to where they belong."""
    if V == 2:
        @device
        def two(s, i, x):
            keep(s, i, x[0])
            keep(s, i + shift, x[1])
        return two

    @device
    def four(s, i, x):
        keep(s, i, x[0])
        keep(s, i + shift, x[1])
        keep(s, i + 2 * shift, x[2])
        keep(s, i + 3 * shift, x[3])
    return four


def _rows_of(V, along, apart):
    """``along`` of V rows."""
    if V == 2:
        return device(lambda g, m: (along(g, m), along(g, m + apart)))
    return device(lambda g, m: (along(g, m), along(g, m + apart), along(g, m + 2 * apart),
                                along(g, m + 3 * apart)))


def _singles(operand, dtype, loads, at):
    """A vector's elements one by one; ``at(e, g, u, m, k)``: where element e lies."""
    one = loads.single
    if width(dtype) == 2:
        return device(lambda s, i, p, g, u, m, k: (one(s, i, p, at(0, g, u, m, k)),
                                                   one(s, i + 1, p, at(1, g, u, m, k))))
    return device(lambda s, i, p, g, u, m, k: (
        one(s, i, p, at(0, g, u, m, k)), one(s, i + 1, p, at(1, g, u, m, k)),
        one(s, i + 2, p, at(2, g, u, m, k)), one(s, i + 3, p, at(3, g, u, m, k))))


def _of_64_bits(f):
    """Rows and k are kept in 32 bits, for registers' sake; what they are multiplied by is not."""
    return device(lambda g, n: f(g, np.int64(n)))


def _loader(operand, rows, dtype, count, where, loads):
    """For a tile: ``place(t)``, the row and k of thread t's first vector, and where it goes;
    ``state(g, row)`` of its rows; ``begin(s, i, p, g, state, row, k)`` to read all its vectors;
    ``finish(s, i, what begin returned)``."""
    join, by, vectors = operand.join, operand.by, operand.vectors
    along, deep = _of_64_bits(operand.along), _of_64_bits(operand.deep)
    W, steps = width(dtype), depth(dtype)
    if by == "k":                    # a row's 4 vectors are 4 threads'
        apart, to = count * W // steps, swizzled(dtype)
        V, shift = rows // apart, apart * steps
        place = device(lambda t: (t // 4, t % 4 * W, to(t // 4, t % 4)))
        state = _rows_of(V, along, apart)
        at = device(lambda e, g, u, m, k: join(g, u, deep(g, k + e)))
        vector, single = loads.vector, _singles(operand, dtype, loads, at)
        whole = device(lambda v, s, i, p, g, u, m, k: vector(
            s, i + v * shift, p, join(g, u[v], deep(g, k))))
        apiece = device(lambda v, s, i, p, g, u, m, k: single(s, i + v * shift, p, g, u[v], m, k))
    else:                            # a k's vectors are neighbouring threads'
        pitch, line = where.pitch, rows // W
        if where.packed:
            line, steps = line // 2, 2 * steps
        apart = count // line
        V, shift = steps // apart, apart * pitch
        place = device(lambda t: (t % line * W, t // line, t // line * pitch + t % line * W))
        state = along
        at = device(lambda e, g, u, m, k: join(g, along(g, m + e), deep(g, k)))
        vector, single = loads.vector, _singles(operand, dtype, loads, at)
        whole = device(lambda v, s, i, p, g, u, m, k: vector(
            s, i + v * shift, p, join(g, u, deep(g, k + v * apart))))
        apiece = device(lambda v, s, i, p, g, u, m, k: single(
            s, i + v * shift, p, g, u, m, k + v * apart))
    return place, state, _repeated(V, whole if vectors else apiece), _kept(V, shift, loads.keep)


def tiles_in_shared_memory(by_a, by_b, shape, dtype, pad):
    """The layouts of both operands."""
    return layout(by_a, shape[0], dtype, pad), layout(by_b, shape[1], dtype, pad)


def compiled(body, parameters, name, by, shape, dtype, how, loads, strided=False):
    """The kernel of a body made by ``multiplier``.

    Shared memory has ``stages`` steps of both tiles: 48 KB for large ones of the CUDA cores and of
    halves, so that two blocks' fit 100 KB; then half a tile of sums; then what statistics need.
    Two blocks of large tiles must find registers, but not where two fragments stand for one, nor
    before compute capability 8.0, where their shared memory would not fit."""
    two = shape == LARGE and loads == "ahead" and how.suffix != "_3xtf32"
    loads, item = LOADS[loads](dtype), dtype.itemsize
    step = sum(t.size for t in tiles_in_shared_memory(*by, shape, dtype, how.pad)) * item
    sums = staged(shape, shape[1] + (how.pad or 4), f"f{item}")
    return Kernel(body, parameters, name=name, threads=threads(shape),
                  shared=max(loads.stages * step, sums, 24 * threads(shape)),
                  minimum=2 if two else None, least=max(how.least, loads.least), strided=strided)


def multiplier(a, b, line, shape, dtype, how, kind, loads, moments=None):
    """The body of a block: tile (i, j) of c = a b + bias for k from ``begin`` to ``end``.

    c, of ``kind``: its rows lie where ``line(g, row)`` says, N columns behind it; ``wide``: on 16
    bytes. ``first``: bias for column 0 is bias[first]; none if it is negative. ``found``: see
    ``epilogue``, which gives it ``moments``. ``how``: a ``precision.Way``."""
    (tall, across), steps, element = shape, depth(dtype), dtype.type
    arithmetic, pad, loads = how.arithmetic, how.pad, LOADS[loads](dtype)
    stages, commit, all_but, all_there = (
        loads.stages, loads.commit, loads.wait(loads.stages - 2), loads.wait(0))
    in_a, in_b = tiles_in_shared_memory(a.by, b.by, shape, dtype, pad)
    place_a, rows_a, begin_a, finish_a = _loader(a, tall, dtype, threads(shape), in_a, loads)
    place_b, rows_b, begin_b, finish_b = _loader(b, across, dtype, threads(shape), in_b, loads)
    at, zeros, each, step, put, first_row = arithmetic(dtype, shape, in_a, in_b)
    size, behind, per = in_a.size + in_b.size, in_a.size, 2 if in_a.packed else 1
    steps *= per
    finish = epilogue(shape, across + (pad or 4), line, np.dtype(f"f{dtype.itemsize}").type, kind,
                      put, first_row, moments)

    @device
    def body(pa, pb, c, bias, first, g, i, j, begin, end, N, wide, found):
        s, t = address(cuda.shared.array(0, element)), cuda.threadIdx.x
        (ra, ka, to_a), (rb, kb, to_b), (pt, qt) = place_a(t), place_b(t), at(t)
        to_a, to_b = np.int32(to_a), np.int32(to_b + behind)
        pt, qt = np.int32(pt), np.int32(qt + behind)
        top, left = np.int32(i * tall), np.int32(j * across)
        ra, rb = np.int32(top // per + ra), np.int32(left // per + rb)
        u, v = rows_a(g, ra), rows_b(g, rb)
        for d in range(stages - 1):
            n = d * size
            x = begin_a(s, n + to_a, pa, g, u, ra, np.int32(begin + d * steps + ka))
            y = begin_b(s, n + to_b, pb, g, v, rb, np.int32(begin + d * steps + kb))
            finish_a(s, n + to_a, x)
            finish_b(s, n + to_b, y)
            commit()
        acc, now, free = zeros, np.int32(0), np.int32((stages - 1) * size)
        k, end = np.int32(begin), np.int32(end)
        while k < end:
            all_but()
            cuda.syncthreads()       # this step is there, and nobody reads the one before
            after = k + (stages - 1) * steps         # beyond the end nobody uses it
            x = begin_a(s, free + to_a, pa, g, u, ra, np.int32(after + ka))
            y = begin_b(s, free + to_b, pb, g, v, rb, np.int32(after + kb))
            commit()
            n, p, q = np.int32(0), np.int32(now + pt), np.int32(now + qt)
            some = np.int32(min(steps, end - k))     # unknown: written out, the loop would spill
            while n < some:                          # range() would test twice
                acc = step(acc, s, p, q, n)
                n = np.int32(n + each)
            finish_a(s, free + to_a, x)
            finish_b(s, free + to_b, y)
            k = np.int32(k + steps)
            free, now = now, np.int32(now + size if now < (stages - 1) * size else 0)
        all_there()
        cuda.syncthreads()
        finish(c, g, top, left, N, wide, acc, bias, first, found)
    return body
