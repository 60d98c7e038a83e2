"""Batch normalization that reads memory once: blocks that are all there keep what they read in
shared memory until their channels' statistics are known. Its backward is in single_backward.py.

P blocks take a tile of channels, a group; groups take tiles in turn, so that one writes while
another waits. A launch is cooperative: where not all blocks can be there at once, it is refused
before, and ``moments`` and ``passes`` do the work.
"""

from functools import cache, lru_cache

import numpy as np

from ..half import is_half, real as real_of
from . import graphs
from .intrinsics import (
    address_of,
    arrive,
    cuda,
    device,
    libm,
    load_raw,
    store_raw,
    wait_for,
)
from .launch import factory
from .memory import SIMULATED, device_of, empty, empty_like, queue, xp
from .moments import (
    CELLS,
    LOG,
    THREADS,
    cases,
    kernel,
    line_at,
    merge_trees,
    move,
    of_lines,
    of_parts,
    places,
    states,
    to_cells,
)
from .passes import ADD, BETA, GAMMA, RELU, normalized, words
from .vectors import each, filled, of_lanes, reader, writer

__all__ = ["SHARED", "enabled", "leave", "meet", "plan", "planned", "run", "single",
           "two_per_tile", "unit"]

SHARED = 80 << 10 if not SIMULATED else 16 << 10      # bytes: two blocks on a multiprocessor
_max, _min = max, min
enabled = True


@cache
def _constants(dtype, W, columns):
    """``words`` for each number of a line, from the cells in which a block has merged its channels.
    """
    of, sqrt = words(dtype), libm("sqrt", np.float64)

    @device
    def f(k, i, c, means, squares, counts, gamma, beta, eps, option):
        i += k
        return of(means[i], 1.0 / sqrt(squares[i] / counts[i] + eps), c + k, gamma, beta, option)
    return of_lanes(f, W, not columns)


@cache
def _keep(W, columns, index):
    """Copy a thread's lines to shared memory, each thread's to where it alone reads; how many."""
    many = 4 if W == 8 else 8
    read, write, place = (load_raw if W > 1 else reader(1), store_raw if W > 1 else writer(1),
                          places(W, columns, index, many))
    read_all, copies = each(read, 2, many), filled(many)

    @device
    def put(k, kept, j, m, v):
        if m > k:
            write(kept, j + k * THREADS * W, v[k])
        return 0
    put_all = of_lanes(put, many)

    @device
    def f(x, kept, r, end, q, B, S, shift):
        count, j = 0, cuda.threadIdx.x * W
        while r < end and q < B:
            m, i = place(0, r, end, q, B, S, shift)
            put_all(kept, j, m, read_all(copies(x), i))
            r += many * (THREADS >> shift)
            j += many * THREADS * W
            count += m
        return count
    return f


@device
def meet(counters, tile, P):
    """Wait for the other blocks of the tile."""
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.threadfence()
        arrive(counters, 2 * tile)
        wait_for(counters, 2 * tile, P)
    cuda.syncthreads()
    cuda.threadfence()


@device
def leave(counters, tile, P):
    """The last to leave makes the counters 0 again."""
    if cuda.threadIdx.x == 0 and arrive(counters, 2 * tile + 1) == P - 1:
        counters[2 * tile] = 0
        counters[2 * tile + 1] = 0


def unit(dtype):
    """What to ask of shared memory for numbers of a dtype."""
    return np.uint16 if is_half(dtype) else dtype.type


@cache
def _moments_of_kept(dtype, W, folded):
    """How many numbers of a lane a thread has kept, and their moments; of two lanes at a time, for
    which there are registers, or of all that are ``folded``."""
    H = W if folded else _max(1, _min(2, W // 2))
    lines = of_lines(dtype, H, True, "u4", not folded, folded)

    @device
    def part(k, kept, count):
        return lines(kept, 0, 0, count, cuda.threadIdx.x * W + k, THREADS * W, 1, LOG)

    @device
    def two(kept, count):
        n, state = part(0, kept, count)
        return n, state + part(H, kept, count)[1]

    @device
    def four(kept, count):
        n, state = two(kept, count)
        return n, state + part(2 * H, kept, count)[1] + part(3 * H, kept, count)[1]
    if H == W:
        return device(lambda kept, count: part(0, kept, count))
    return two if W < 8 else four


@factory
def single(dtype, params, W, columns, index):
    """y, mean, var and invstd of channels; the running ones move."""
    read, write, at, here = (reader(W), writer(W), line_at(W, columns, index), address_of(dtype))
    K, keep, join = states(W, columns), _keep(W, columns, index), of_parts(W, columns)
    moments, fill = _moments_of_kept(dtype, W, K < W), to_cells(K)
    table, (values, clip), real = (_constants(dtype, W, columns), normalized(dtype, W),
                                   real_of(dtype).type)
    L, SIZE, UNIT = W if columns else 1, K * CELLS, unit(dtype)
    sqrt, nothing = libm("sqrt", np.float64), filled(W)

    @device
    def finish(c, n, mean_of, m2, mean, var, invstd, running_mean, running_var, eps, momentum,
               moving):
        v = m2 / n
        mean[c], var[c], invstd[c] = mean_of, v, 1.0 / sqrt(v + eps)
        if moving:
            move(c, n, mean_of, v, running_mean, running_var, momentum)

    def body(x, z, gamma, beta, y, mean, var, invstd, parts_mean, parts_m2, counters, running_mean,
             running_var, R, B, S, shift, segment, P, tiles, groups, eps, momentum, moving, option):
        means = cuda.shared.array(SIZE, np.float64)
        squares = cuda.shared.array(SIZE, np.float64)
        counts = cuda.shared.array(SIZE, np.float64)
        kept, limits = here(cuda.shared.array(0, UNIT)), cuda.shared.array(2, np.int64)
        t, k, tile = cuda.threadIdx.x, cuda.blockIdx.x % P, cuda.blockIdx.x // P
        line, side = L << shift, (t & ((1 << shift) - 1)) * L
        if t == 0:                # from memory, lest positions be kept in registers between tiles
            limits[0], limits[1] = k * segment, _min(R, k * segment + segment)
        cuda.syncthreads()
        while tile < tiles:
            q = tile * line + side
            count = keep(x, kept, limits[0] + (t >> shift), limits[1], q, B, S, shift)
            n, state = moments(kept, count)
            fill(n, state, means, squares, counts)
            merge_trees(means, squares, counts, SIZE, line)
            if P > 1:
                if t < line and tile * line + t < B:
                    i = k * B + tile * line + t
                    parts_mean[i], parts_m2[i] = means[t], squares[t]
                meet(counters, tile, P)
                join(parts_mean, parts_m2, q, R, B, q, shift, segment, P, means, squares, counts)
                leave(counters, tile, P)
            if k == 0 and t < line and tile * line + t < B:
                finish(tile * line + t, counts[t], means[t], squares[t], mean, var, invstd,
                       running_mean, running_var, eps, momentum, moving)
            r, j = limits[0] + (t >> shift), t * W
            if count > 0:
                c = table(side, q, means, squares, counts, gamma, beta, eps, option)
                for _ in range(count):
                    i = at(r, q, B, S)
                    v = values(read(kept, j), read(z, i) if option & ADD else nothing(real(0)), c)
                    write(y, i, clip(v) if option & RELU else v)
                    r += THREADS >> shift
                    j += THREADS * W
            cuda.syncthreads()                 # cells are written to again
            tile += groups
    numbers = "i8 " * 8 + "f8 f8 i4 i4"
    return kernel(body, "single", dtype, params, W, columns, index,
                  f"*k *k *p *p *k {'*f8 ' * 5} *i4 *p *p {numbers}", shared=SHARED, together=True)


@lru_cache(1 << 10)
def plan(c, itemsize, resident):
    """Lines of a part, parts, and groups, for so many blocks at once; None where a channel does not
    fit on them. The groups' rounds times what a block reads in one should be least."""
    lanes = THREADS >> c.shift
    most = SHARED // (THREADS * c.W * itemsize) * lanes
    least, best = -(-c.R // most), None
    for P in range(least, resident + 1):
        lines = -(-c.R // (P * lanes)) * lanes
        P = -(-c.R // lines)
        groups = _min(resident // P, c.tiles)
        cost = -(-c.tiles // groups) * lines
        if best is None or cost < best[0]:
            best = cost, (lines, P, groups)
    return best and best[1]


@cache
def _fits(number, cells):
    """Whether the device has as much shared memory, beside that of so many cells."""
    if SIMULATED:
        return True
    needed = SHARED + 8 * cells + 64
    return xp.cuda.Device(number).attributes["MaxSharedMemoryPerBlockOptin"] >= needed


@cache
def _resident(start, number):
    return start.resident()


@cache
def _counters(number, stream, thread, count):
    return xp.zeros(count, np.int32)


def two_per_tile(tiles):
    count = 1 << _max(10, (2 * tiles - 1).bit_length())
    return graphs.own(_counters, *queue(), count)


def planned(start, c, x, cells, kept=1):
    """``plan``, and two arrays for what blocks find, for a kernel that merges in so many cells and
    keeps so many arrays like x; None where this is not the way."""
    if not enabled or not _fits(device_of(x), cells):
        return None
    how = plan(c, kept * x.itemsize, _resident(start, device_of(x)))
    if how is None:
        return None
    alone = how[1] == 1
    return *how, [None if alone else empty((how[1], x.shape[1]), np.float64) for _ in range(2)]


def run(x, z, gamma, beta, params, c, eps, relu, running):
    """y, mean, var and invstd of dense x, cut as c says, all of one memory order; ``params``: dtype
    of γ, β and the running ones. None where this is not the way."""
    start = single(x.dtype, params, *c.kind)
    how = planned(start, c, x, 3 * states(c.W, c.columns) * CELLS)
    if how is None:
        return None
    lines, P, groups, parts = how
    y, stats = empty_like(x), [empty(x.shape[1:2], np.float64) for _ in range(3)]
    mean, var, momentum = (None, None, 0.0) if running is None else running
    option = (GAMMA * (gamma is not None) | BETA * (beta is not None) | ADD * (z is not None)
              | RELU * bool(relu))
    start(groups * P, x, z, gamma, beta, y, *stats, *parts, two_per_tile(c.tiles), mean, var,
          c.R, c.B, c.S, c.shift, lines, P, c.tiles, groups, eps, momentum, running is not None,
          option)
    return y, *stats


def every():
    """All kernels of this module."""
    for kinds in cases():
        yield single(*kinds)
