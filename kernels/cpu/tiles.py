"""Strips of a matrix product: what matmul and conv build from the tiles of microkernel.py.

Matrices are one axis in memory with an offset and steps, so that a convolution's windows are read
where they lie.
"""

import numpy as np

from .jit import device
from .microkernel import ROWS, tile, transpose
from .simd import VECTOR, load_part, store_part

__all__ = ["columns", "copy", "fill", "pack", "panels", "strip"]


def panels(b):
    """b (G, K, n) cut into tile columns: (G, ⌈n/W⌉, K, W), W = two vectors, zeros behind n."""
    G, K, n = b.shape
    W = 2 * VECTOR // b.itemsize
    out = np.zeros((G, -(-n // W), K, W), b.dtype)
    for p in range(out.shape[1]):
        out[:, p, :, :min(W, n - p * W)] = b[:, :, p * W:(p + 1) * W]
    return out


@device
def copy(x, at, ldx, rows, n, out, to, ldo):
    """rows of n values from one place to another; zeros behind n up to a whole vector."""
    lanes = VECTOR // x.itemsize
    for r in range(rows):
        for j in range(0, n, lanes):
            count = min(lanes, n - j)
            store_part(out, to + r * ldo + j, load_part(x, at + r * ldx + j, count), lanes)


@device
def pack(b, bt, ldk, ldn, n, K, out, at):
    """out[at + k W + j] = b[bt + k · ldk + j · ldn], zeros behind n."""
    W, lanes = 2 * VECTOR // b.itemsize, VECTOR // b.itemsize
    if n <= lanes:
        for k in range(K):
            out[at + k * W + lanes:at + (k + 1) * W] = 0
    if ldn == 1:
        copy(b, bt, ldk, K, n, out, at, W)
        return
    squares, whole = (K // lanes * lanes if ldk == 1 else 0), n // lanes * lanes
    for k in range(0, squares, lanes):
        for j in range(0, whole, lanes):
            transpose(b, bt + k + j * ldn, ldn, out, at + k * W + j, W)
    for k in range(K):
        first = whole if k < squares else 0
        for j in range(first, n):
            out[at + k * W + j] = b[bt + j * ldn + k * ldk]
        out[at + k * W + n:at + (k + 1) * W] = 0


@device
def _height(left):
    """Rows of the next tile: never one alone, which takes the time of two."""
    if left >= ROWS and left != ROWS + 1:
        return ROWS
    if left >= 6 and left != 7 and left != 8:
        return 6
    return min(left, 4) if left != 5 else 3


@device
def strip(m, n, K, a, at, row, step, b, bt, ldb, s, st, lds, c, ct, ldc):
    """``tile`` for any number of rows."""
    r = 0
    while r < m:
        h = _height(m - r)
        tile(h, n, K, a, at + r * row, row, step, b, bt, ldb, s, st + r * lds, lds,
             c, ct + r * ldc, ldc)
        r += h


@device
def columns(a, at, row, step, m, K, b, bt, ldb, n, y, yt, N, aside):
    """m rows and n columns, at most two vectors, of y += a b; ``aside`` is not used."""
    strip(m, n, K, a, at, row, step, b, bt, ldb, y, yt, N, y, yt, N)


@device
def fill(y, at, m, N, n, bias, j0):
    """m rows of y from ``at`` are n values of the bias, or 0 where it is empty."""
    for r in range(m):
        row = y[at + r * N:at + r * N + n]
        if bias.size:
            shift = bias[j0:j0 + n]
            for j in range(n):
                row[j] = shift[j]
        else:
            for j in range(n):
                row[j] = 0
