"""Batch normalization that reads memory once: blocks that are all there keep what they read in
shared memory until their channels' statistics are known. Its backward is in single_backward.py.

P blocks take a tile of channels, a group; groups take tiles in turn, so that one writes while
another waits. A launch is cooperative: where not all blocks can be there at once, it is refused
before, and ``moments`` and ``passes`` do the work.
"""

from functools import cache, lru_cache

import numpy as np

from .intrinsics import address, arrive, cuda, device, libm, wait_for, width
from .launch import Kernel
from .memory import SIMULATED, device_of, empty, empty_like, xp
from .moments import LOG, THREADS, line_at, merge_trees, of_lines, of_parts, to_cells
from .passes import ADD, BETA, GAMMA, RELU, normalized, words
from .vectors import filled, of_lanes, reader, writer

__all__ = ["SHARED", "enabled", "leave", "meet", "plan", "planned", "run", "single", "two_per_tile"]

SHARED = 80 << 10 if not SIMULATED else 16 << 10      # bytes: two blocks on a multiprocessor
STATIC = 25 << 10                                     # that merging takes, at most
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
    read, write, at = reader(W), writer(W), line_at(W, columns, index)

    @device
    def f(x, kept, r, end, q, B, S, shift):
        lanes, j, step = THREADS >> shift, cuda.threadIdx.x * W, THREADS * W
        count = (end - r + lanes - 1) >> (LOG - shift) if q < B and r < end else 0
        for i in range(0, count, 8):
            m, first = count - i, r + i * lanes
            v = read(x, at(first, q, B, S))
            v1 = read(x, at(first + (lanes if m > 1 else 0), q, B, S))
            v2 = read(x, at(first + (2 * lanes if m > 2 else 0), q, B, S))
            v3 = read(x, at(first + (3 * lanes if m > 3 else 0), q, B, S))
            v4 = read(x, at(first + (4 * lanes if m > 4 else 0), q, B, S))
            v5 = read(x, at(first + (5 * lanes if m > 5 else 0), q, B, S))
            v6 = read(x, at(first + (6 * lanes if m > 6 else 0), q, B, S))
            v7 = read(x, at(first + (7 * lanes if m > 7 else 0), q, B, S))
            write(kept, j, v)
            if m > 1:
                write(kept, j + step, v1)
            if m > 2:
                write(kept, j + 2 * step, v2)
            if m > 3:
                write(kept, j + 3 * step, v3)
            if m > 4:
                write(kept, j + 4 * step, v4)
            if m > 5:
                write(kept, j + 5 * step, v5)
            if m > 6:
                write(kept, j + 6 * step, v6)
            if m > 7:
                write(kept, j + 7 * step, v7)
            j += 8 * step
        return count
    return f


@device
def meet(counters, tile, P):
    """Wait for the other blocks of the tile."""
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
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


@cache
def single(dtype, W, columns, index):
    """y, mean, var and invstd of channels; the running ones move."""
    read, write, at, kind = reader(W), writer(W), line_at(W, columns, index), dtype.str[1:]
    H = _max(1, W // 2)          # lanes whose moments are taken at once: registers are for two
    keep, lines, fill, join = (_keep(W, columns, index), of_lines(dtype, H, True, "u4", True),
                               to_cells(W), of_parts(W, columns))
    table, (values, clip), real = _constants(dtype, W, columns), normalized(dtype, W), dtype.type
    L, CELLS, sqrt, nothing = W if columns else 1, W * THREADS, libm("sqrt", np.float64), filled(W)

    if W == 1:
        both = device(lambda kept, count: lines(kept, 0, 0, count, cuda.threadIdx.x, THREADS, 1,
                                                LOG))
    else:
        @device
        def both(kept, count):
            first = cuda.threadIdx.x * W
            n, state = lines(kept, 0, 0, count, first, THREADS * W, 1, LOG)
            return n, state + lines(kept, 0, 0, count, first + H, THREADS * W, 1, LOG)[1]

    @device
    def finish(c, n, mean_of, m2, mean, var, invstd, running_mean, running_var, eps, momentum,
               moving):
        v = m2 / n
        mean[c], var[c], invstd[c] = mean_of, v, 1.0 / sqrt(v + eps)
        if moving:
            running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * mean_of
            running_var[c] = (1.0 - momentum) * running_var[c] + momentum * (v * (n / (n - 1.0)))

    def body(x, z, gamma, beta, y, mean, var, invstd, parts_mean, parts_m2, counters, running_mean,
             running_var, R, B, S, shift, segment, P, tiles, groups, eps, momentum, moving, option):
        means = cuda.shared.array(CELLS, np.float64)
        squares = cuda.shared.array(CELLS, np.float64)
        counts = cuda.shared.array(CELLS, np.float64)
        kept, limits = address(cuda.shared.array(0, real)), cuda.shared.array(2, np.int64)
        t, k, tile = cuda.threadIdx.x, cuda.blockIdx.x % P, cuda.blockIdx.x // P
        line, side = L << shift, (t & ((1 << shift) - 1)) * L
        if t == 0:                # from memory, lest positions be kept in registers between tiles
            limits[0], limits[1] = k * segment, _min(R, k * segment + segment)
        cuda.syncthreads()
        while tile < tiles:
            q = tile * line + side
            count = keep(x, kept, limits[0] + (t >> shift), limits[1], q, B, S, shift)
            n, state = both(kept, count)
            fill(n, state, means, squares, counts)
            merge_trees(means, squares, counts, CELLS, line)
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
    layout = "columns" if columns else f"segments_{index}"
    numbers = "i8 " * 8 + "f8 f8 i4 i4"
    return Kernel(body, f"{f'*{kind} ' * 5} {'*f8 ' * 5} *i4 *{kind} *{kind} {numbers}",
                  name=f"single_{kind}_{W}_{layout}", threads=THREADS, shared=SHARED, minimum=2,
                  together=True)


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
def _fits(number):
    """Whether the device has as much shared memory."""
    if SIMULATED:
        return True
    return xp.cuda.Device(number).attributes["MaxSharedMemoryPerBlockOptin"] >= SHARED + STATIC


@cache
def _resident(kernel, number):
    return kernel.resident()


@cache
def _counters(number, stream, count):
    return xp.zeros(count, np.int32)


def two_per_tile(tiles):
    count = 1 << _max(10, (2 * tiles - 1).bit_length())
    if SIMULATED:
        return _counters(0, 0, count)
    return _counters(xp.cuda.runtime.getDevice(), xp.cuda.get_current_stream().ptr, count)


def planned(kernel, c, x, kept=1):
    """``plan``, and two arrays for what blocks find, for a kernel that keeps so many arrays like x;
    None where this is not the way."""
    if not enabled or not _fits(device_of(x)):
        return None
    how = plan(c, kept * x.itemsize, _resident(kernel, device_of(x)))
    if how is None:
        return None
    alone = how[1] == 1
    return *how, [None if alone else empty((how[1], x.shape[1]), np.float64) for _ in range(2)]


def run(x, z, gamma, beta, c, eps, relu, running):
    """y, mean, var and invstd of dense x, cut as c says, all of one memory order; None where this
    is not the way."""
    kernel = single(x.dtype, *c.kind)
    how = planned(kernel, c, x)
    if how is None:
        return None
    lines, P, groups, parts = how
    y, stats = empty_like(x), [empty(x.shape[1:2], np.float64) for _ in range(3)]
    mean, var, momentum = (None, None, 0.0) if running is None else running
    option = (GAMMA * (gamma is not None) | BETA * (beta is not None) | ADD * (z is not None)
              | RELU * bool(relu))
    kernel(groups * P, x, z, gamma, beta, y, *stats, *parts, two_per_tile(c.tiles), mean, var,
           c.R, c.B, c.S, c.shift, lines, P, c.tiles, groups, eps, momentum, running is not None,
           option)
    return y, *stats


def every():
    """All kernels of this module."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for W in (width(dtype), 1):
            for columns in (True, False):
                yield single(dtype, W, columns, "u4")
