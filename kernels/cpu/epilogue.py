"""Batch-norm statistics of a convolution's output, by the task that has just made it.

A task's pixels × channels are in a cache still, where they are read at several times the speed of
memory. Each task writes to a row of a table: the number of its pixels, the channels' means, and the
sums of squares about these. Rows are merged in their order by Chan's formula (Chan, Golub & LeVeque
1979), so that results do not depend on the number of threads. Sums are taken in the array's dtype
over RUN pixels, about a pivot, and added up in float64. Where the pivot lies more than 2 standard
deviations from the mean, pixels are read again about the mean.
"""

from typing import NamedTuple

import numpy as np

from .jit import device
from .memory import empty
from .pixels import middle, settle
from .simd import (
    after,
    fill,
    fma,
    high,
    lanes,
    load_part,
    low,
    narrow,
    pointer,
    store_part,
    total,
)
from .tasks import share

__all__ = ["NO_ROOM", "Room", "collect", "merge", "room_for"]

RUN = 256                  # pixels, for four accumulators
# Convolution and batch norm with it, two cores: depthwise, 32 channels of 112×112 (13 MB), 18 %
# faster; 3 → 64, 7×7, and 32 → 64, 1×1 (26 MB), 5 and 3 %; 512 → 512 in tasks of 56 pixels 3 %
# slower. A step of ResNet-20, whose outputs take 8 MB at most, took 91.2 ms with it, 89.7 without.
LEAST_BYTES = 10 << 20     # of an output; batch norm reads a smaller one from a cache, too
SHARE = 24                 # least of the output's bytes per byte of the table: 96 pixels a task
PARALLEL = 1 << 15         # values of a table that all threads merge; 50 us of one


@device
def _step(x, i, n, pivot, s, q):
    d = load_part(x, i, n) - pivot
    return s + d, fma(d, d, q)


@device
def _sums(x, at, count, n, pivot):
    """Σ d and Σ d² of n channels, d = x − pivot, over the pixels x[at[0]], …: halves in float64."""
    zero = fill(x, 0)
    s = s_high = q = q_high = low(zero)
    for first in range(0, count, RUN):
        end = min(count, first + RUN)
        a = b = c = d = e = f = g = h = zero
        for i in range(first, end - 3, 4):
            a, e = _step(x, at[i], n, pivot, a, e)
            b, f = _step(x, at[i + 1], n, pivot, b, f)
            c, g = _step(x, at[i + 2], n, pivot, c, g)
            d, h = _step(x, at[i + 3], n, pivot, d, h)
        for i in range(end - (end - first) % 4, end):
            a, e = _step(x, at[i], n, pivot, a, e)
        a, e = (a + b) + (c + d), (e + f) + (g + h)
        s, s_high, q, q_high = s + low(a), s_high + high(a), q + low(e), q_high + high(e)
    return s, s_high, q, q_high


@device
def _column(x, at, count, n, mean, m2):
    """Mean and sum of squares about it of n channels, at most a vector."""
    k, none = count // 4, fill(mean, 0)
    pivot = middle(x, load_part(x, at[0], n), load_part(x, at[k], n), load_part(x, at[2 * k], n),
                   load_part(x, at[3 * k], n))
    half, inverse, every = lanes(mean), fill(mean, 1.0 / count), fill(mean, count)
    first, rest = min(half, n), max(0, n - half)
    for again in range(2):
        s, s_high, q, q_high = _sums(x, at, count, n, pivot)
        far = settle(s, q, low(pivot), inverse, every, none, none, mean, m2, 0, first)
        if rest:
            far = settle(s_high, q_high, high(pivot), inverse, every, none, far, mean, m2, half,
                         rest)
        if again == 1 or total(far) == 0:
            break
        pivot = narrow(load_part(mean, 0, first), load_part(mean, half, rest), x)


@device
def collect(x, at, count, n, table, row, c):
    """The statistics of n channels of ``count`` pixels x[at[0]], …, as those of channels c, … of a
    row of the table."""
    C, L = table.shape[1] // 2, lanes(x)
    table[row, 0] = count
    line = pointer(table[row])
    for j in range(0, n, L):
        _column(after(x, j), at, count, min(L, n - j), after(line, 1 + c + j),
                after(line, 1 + C + c + j))


@device
def _merge_task(t, table, mean, m2):
    """A vector of channels."""
    c, C, n = t * lanes(mean), mean.size, 0.0
    k, data, line = min(lanes(mean), C - c), pointer(table), table.shape[1]
    center = square = fill(mean, 0)
    for row in range(table.shape[0]):
        more = table[row, 0]
        w, at = more / (n + more), row * line + 1 + c
        d = load_part(data, at, k) - center
        center = center + d * w
        square = square + load_part(data, at + C, k) + d * d * (w * n)
        n += more
    store_part(pointer(mean), c, center, k)
    store_part(pointer(m2), c, square, k)


@device
def merge(run, table, mean, m2):
    """Statistics of all rows, in order."""
    far = run if table.size > PARALLEL else run - run
    share(_merge_task, -(-mean.size // lanes(mean)), far, (table, mean, m2))


class Room(NamedTuple):
    """A table of rows and the merged statistics; without rows where there are none."""

    table: np.ndarray
    mean: np.ndarray
    m2: np.ndarray


NO_ROOM = Room(np.empty((0, 0)), np.empty(0), np.empty(0))


def room_for(y, rows, moments):
    """Room for the statistics of y (N, P, Q, O) in so many rows; none if nobody asks for moments,
    or where batch norm's own pass over y costs less. Else the list will have them."""
    C = y.shape[3]
    width = 1 + 2 * C
    if moments is None or y.nbytes < LEAST_BYTES or SHARE * rows * width * 8 > y.nbytes:
        return NO_ROOM
    room = Room(empty((rows, width), np.float64), np.empty(C), np.empty(C))
    moments += [np.full(C, y.size / C), room.mean, room.m2]
    return room
