"""The weight gradient of a convolution with few outputs: taps of a kernel row are outputs too.

Sums of 6 outputs leave most of a vector idle. Column w of x meets tap j in output w − j: with J − 1
zeros at both ends of a row of dy, the J n_o values of all its taps lie side by side in memory,
    dw[i, c, (j, o)] = Σ_p Σ_w x[p·s + i, w, c] dy[p, w − j, o],
and fill vectors, from the last tap to the first. The windows of x are not copied at all.

Products with those zeros turn a NaN or an infinity of x into a NaN where the definition has none:
results that are not finite are not for this way.
"""

import numpy as np

from ..quiet import quiet
from .jit import device
from .layout import channels_last
from .memory import empty
from .padded import padded, zeros
from .simd import VECTOR, after, keep, lanes, pointer
from .sumtile import by_windows, line_tile
from .tasks import share, tasks
from .windows import aligned

__all__ = ["suits", "thin_weight"]

TASKS = 16                 # at least, where there are images enough
BLOCK_BYTES = 1 << 17      # of x and dy copied at a time
GAIN = 1.2                 # least predicted, where the way is taken


def _vectors(n, lanes):
    return -(-n // lanes)


def suits(g, itemsize):
    """Whether this takes fewer cycles than tiles whose rows are values of the window: for vectors
    of multiply-adds, and for copying those values. (3 → 16 channels, 3×3 of 32×32 pixels: 1.2 ms of
    one core instead of 1.7; 6 → 16, 5×5 of 14×14: 0.21 instead of 0.23.)"""
    lanes = VECTOR // itemsize
    if g.G > 1 or g.sw > 1 or g.dw > 1 or g.J < 2 or g.depth == 0:
        return False
    own = (g.W + 2 * g.pw) * g.I * g.C * _vectors(g.J * g.O, lanes)
    copied = g.depth if by_windows(g.C) else 0
    return GAIN * own < g.Q * (-(-g.depth // 4) * 4 * _vectors(g.O, lanes) + copied)


@device
def _rows(left):
    """Of the next tile, one of LINES."""
    return 7 if left >= 7 else 5 if left >= 5 else 3 if left >= 3 else 1


@device
def _across(left, rows):
    """Vectors of the next tiles, of so many that are left. The last three go together where their
    sums have registers: of 3 rows, 9 sums are enough to hide a multiply-add's latency, 6 and 3 are
    not (4 cycles for either, where two begin in each)."""
    if left == 3 and (VECTOR == 64 or rows <= 3):
        return 3
    return min(left, 2)


@device
def _sums(a, g, rows, width, b, line, y, ld):
    """Add a block of rows of dy, of ``line`` values each, to all sums."""
    L, n, down = lanes(a), g.J * g.O, g.dh * width * g.C
    for c in range(g.C):
        v = 0
        while v < n:
            i, across = 0, _across(-(-(n - v) // L), g.I)
            while i < g.I:
                r = _rows(g.I - i)
                line_tile(r, across, a, i * down + c, down, (g.sh * width * g.C, g.C), b, v,
                          (line, g.O), (rows, width), y, (i * g.C + c) * ld + v, g.C * ld)
                i += r
            v += across * L


@device
def _task(t, dy, x, g, rows, sums):
    """A part of the blocks, each of some rows of an image of dy."""
    L, width, bands, (parts, size, ld) = lanes(x), g.W + 2 * g.pw, -(-g.P // rows), sums.shape
    line, high = (width + g.J - 1) * g.O, (rows - 1) * g.sh + (g.I - 1) * g.dh + 1
    room = -(-high * width * g.C // L) * L
    own, y = aligned(room + rows * line + 2 * L, x), after(pointer(sums), t * size * ld)
    a, b, blocks = pointer(own), after(pointer(own), room), g.N * bands
    zeros(a, 0, own.size)
    zeros(y, 0, size * ld)
    for block in range(blocks * t // parts, blocks * (t + 1) // parts):
        n, p0 = block // bands, block % bands * rows
        count = min(rows, g.P - p0)
        padded(pointer(x), n * g.H * g.W * g.C, g.W * g.C, g.C, g.H, g.W, p0 * g.sh - g.ph, -g.pw,
               (count - 1) * g.sh + (g.I - 1) * g.dh + 1, width, g.C, a, 0, g.C)
        padded(pointer(dy), n * g.P * g.Q * g.O, g.Q * g.O, g.O, g.P, g.Q, p0, 1 - g.J, count,
               width + g.J - 1, g.O, b, 0, g.O)
        _sums(a, g, count, width, b, line, y, ld)
    keep(own)


@tasks
def _thin(run, dy, x, g, rows, sums):
    """sums (parts, I C, J O and more): the last tap of a row first."""
    share(_task, sums.shape[0], run, (dy, x, g, rows, sums))


@quiet
def thin_weight(dy, x, g):
    """dw (O, C, I, J) from dy (N, O, P, Q) and x (N, C, H, W)."""
    width, lanes = g.W + 2 * g.pw, VECTOR // x.itemsize
    bytes_of_row = x.itemsize * (g.sh * width * g.C + (width + g.J - 1) * g.O)
    rows = -(-g.P // -(-g.P // max(1, min(g.P, BLOCK_BYTES // bytes_of_row))))
    parts = min(TASKS, g.N * -(-g.P // rows))
    n = g.J * g.O
    sums = empty((parts, g.I * g.C, _vectors(n, lanes) * lanes), x.dtype)
    _thin(channels_last(dy), channels_last(x), g, rows, sums, work=2 * dy.size * g.depth)
    out = sums.sum(axis=0)[:, :n].reshape(g.I, g.C, g.J, g.O)[:, :, ::-1]
    return np.ascontiguousarray(out.transpose(3, 1, 0, 2))
