"""How batch normalization cuts dense memory: tiles of channels, blocks of rows, chunks of a block.

A *task* is a tile of channels and a block of rows. If one block holds all rows of its tile, it is
small enough to be in a cache still when it is read the second time, and the task does all; else
sums come from all tasks first, and the second pass goes backwards, from what was read last.
"""

import math
from typing import NamedTuple

import numpy as np

from .columns import inner
from .simd import VECTOR

__all__ = ["ADDS", "BLOCK_BYTES", "SLAB_BYTES", "Plan", "plan", "unpack", "values"]

ADDS = 128                 # values per accumulator and chunk
LINE = 1024                # columns of a tile
FEW = 32                   # rows that several rows are made one for
RUN = 256                  # values of a plane from which on it is a matrix of its own
BLOCK_BYTES = 1 << 19      # of a large array that make one task
SMALL_BYTES = 1 << 18      # one task: 10 us of a core
CHANNELS_BYTES = 1 << 19   # of an array that goes by channels, where there are few,
SHORT_BYTES = 1 << 21      # or planes are short (128 × 64 × 8 × 8, backward: 162 us, 138 so),
LONG_BYTES = 1 << 23       # or neither (32 × 256 × 14 × 14, both ways: 730 and 450)
CHANNELS_TASK = 1 << 16    # of it that makes one task
FEW_PLANES = 8             # of one vector: more, 4096 bytes apart, leave the cache
SLAB_BYTES = 1 << 22       # what one task reads twice: two cores' share of a 16 MB cache and more


class Plan(NamedTuple):
    """How (N, C, S) memory is cut. A segment is S values of one channel, or a piece of them."""

    N: int                 # segments per channel
    C: int
    S: int                 # values of a channel that lie together
    pieces: int            # segments that they are cut into
    length: int            # values of a segment, the last piece apart
    tile: int              # channels per task
    together: int          # channels whose columns make one row
    inner: int             # columns of a channel that lie together
    W: int                 # columns held
    chunk: int             # segments summed in the array's dtype; 0: by channels.py
    rows: int              # segments per block
    blocks: int
    tiles: int
    back: int              # whether the second pass goes backwards
    aligned: int           # whether every vector begins at a multiple of vectors


def plan(N, C, S, itemsize):
    """A Plan, as an array, for memory of that shape: S values of a channel, C channels, N times."""
    lanes = VECTOR // itemsize
    size = C * S * itemsize * N
    if _go_by_channels(N, C, S, size, lanes):
        return _channels(N, C, S, size, lanes)
    if C == 1 or S >= RUN:
        N, S = (1, N * S) if C == 1 else (N, S)
        W = 4 * lanes
        length = min(S, ADDS * W)
        pieces = -(-S // length)
        N, together, inner, chunk = N * pieces, 1, W, max(1, ADDS * W // length)
    else:
        pieces, length, inner = 1, S, S
        unit = lanes // math.gcd(S, lanes)
        together = C if C * S <= LINE else min(C, max(unit, LINE // S // unit * unit))
        W, chunk = together * S, ADDS
        repeat = lanes // math.gcd(W, lanes)
        repeat *= -(-16 * lanes // (repeat * W))
        if together == C and repeat * W <= 2 * LINE and repeat * FEW <= N:
            W, chunk = repeat * W, repeat * ADDS
    return _cut(N, C, S, pieces, length, together, inner, W, chunk, size, itemsize)


def _go_by_channels(N, C, S, size, lanes):
    """Whether tables take longer to fill than they save; larger arrays must be in a cache, and have
    channels enough for all threads."""
    few = 2 * lanes if N > FEW_PLANES else lanes
    most = CHANNELS_BYTES if C < 8 else SHORT_BYTES if S < 128 else LONG_BYTES
    return C > 1 and few <= S <= ADDS * lanes and size <= most


def _channels(N, C, S, size, lanes):
    """Tasks of whole channels whose sums and constants stay in registers (channels.py)."""
    tasks = min(16, C, max(1, size // CHANNELS_TASK // 2 * 2))
    tile = -(-C // tasks)
    return np.array(Plan(N, C, S, 1, S, tile, tile, lanes, lanes, 0, N, 1, -(-C // tile), 0, 0),
                    np.int64)


def _cut(N, C, S, pieces, length, together, inner, W, chunk, size, itemsize):
    """Tiles and blocks: whole tiles where they are small and there are enough of them."""
    slab = N * length * itemsize
    tiles = -(-C // together)
    if size <= (1 << 20 if tiles > 1 else SMALL_BYTES):
        tile, rows = C if together == 1 else together, N
    elif tiles > 1 and slab * together <= SLAB_BYTES and tiles >= min(16, size >> 19):
        tile, rows = max(together, min(BLOCK_BYTES // 2 // slab, -(-C // 16))), N
    else:
        block = max(SMALL_BYTES // 4, min(BLOCK_BYTES, size // 8))
        tile, rows = together, max(1, block // (length * together * itemsize))
        blocks, unit = -(-N // rows), max(1, W // (together * S))     # segments of a row
        rows = -(-N // (blocks + blocks % 2) // unit) * unit          # for two cores alike
    if together > 1:
        tile = together
    lanes = VECTOR // itemsize
    aligned = W % lanes == 0 and (S if together == 1 else C * S) % lanes == 0
    return np.array(Plan(N, C, S, pieces, length, tile, together, inner, W, chunk, rows,
                         -(-N // rows), -(-C // tile), size > 1 << 22, aligned), np.int64)


@inner
def unpack(p):
    """A tuple of 16 fields as an argument would cost 2 us per call."""
    return Plan(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12],
                p[13], p[14])


@inner
def values(plan, m):
    """Values of one channel in the first m segments."""
    return m // plan.pieces * plan.S + min(m % plan.pieces * plan.length, plan.S)
