"""Strips of a matrix product: what matmul and conv build from the tiles of microkernel.py.

Matrices are one axis in memory with an offset and steps, so that a convolution's windows are read
where they lie.
"""

from .jit import device
from .microkernel import ROWS, tile, transpose, transpose_part
from .simd import VECTOR, lanes, load_part, store_part

__all__ = ["copy", "pack", "strip"]


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
    """out[at + k W + j] = b[bt + k · ldk + j · ldn] for j < n; anything behind."""
    W, lanes = 2 * VECTOR // b.itemsize, VECTOR // b.itemsize
    if ldn == 1:
        copy(b, bt, ldk, K, n, out, at, W)
    elif ldk == 1:
        for k in range(0, K, lanes):
            for j in range(0, n, lanes):
                if k + lanes <= K and j + lanes <= n:
                    transpose(b, bt + k + j * ldn, ldn, out, at + k * W + j, W)
                else:
                    transpose_part(b, bt + k + j * ldn, ldn, out, at + k * W + j, W,
                                   min(lanes, K - k), min(lanes, n - j))
    else:
        for k in range(K):
            for j in range(n):
                out[at + k * W + j] = b[bt + k * ldk + j * ldn]


@device
def _height(left):
    """Rows of the next tile: never one alone, which takes the time of two."""
    if left >= ROWS and left != ROWS + 1:
        return ROWS
    if left >= 6 and left != 7 and left != 8:
        return 6
    return min(left, 4) if left != 5 else 3


@device
def _rows(m, n, K, a, at, row, step, b, bt, ldb, s, st, lds, c, ct, ldc, ahead, ask):
    """``tile`` for any number of rows."""
    r = 0
    while r < m:
        h = _height(m - r)
        tile(h, n, K, a, at + r * row, row, step, b, bt, ldb, s, st + r * lds, lds,
             c, ct + r * ldc, ldc, ahead + r // ROWS * K * ask, ask)
        r += h


@device
def strip(m, n, K, a, at, row, step, b, bt, ldb, s, st, lds, c, ct, ldc, ahead, ask):
    """``tile`` for any number of rows. The few columns behind a whole vector go by themselves: half
    a vector takes half the time."""
    L = lanes(a)
    few = n % L if L < n < 2 * L and 2 * (n % L) <= L else 0
    _rows(m, n - few, K, a, at, row, step, b, bt, ldb, s, st, lds, c, ct, ldc, ahead, ask)
    if few:
        _rows(m, few, K, a, at, row, step, b, bt + n - few, ldb, s, st + n - few, lds,
              c, ct + n - few, ldc, 0, 0)
