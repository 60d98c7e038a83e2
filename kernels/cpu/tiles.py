"""Strips of a matrix product: what matmul and conv build from the tiles of microkernel.py.

Matrices are one axis in memory with an offset and steps, so that a convolution's windows are read
where they lie.
"""

import numpy as np

from .jit import device
from .microkernel import (
    FEW,
    ROWS,
    add_few,
    add_few_half,
    add_half_tile,
    add_row,
    add_row_half,
    add_tile,
    transpose,
)
from .simd import VECTOR

__all__ = ["columns", "fill", "pack", "panels"]


def panels(b):
    """b (G, K, n) cut into tile columns: (G, ⌈n/W⌉, K, W), W = two vectors, zeros behind n."""
    G, K, n = b.shape
    W = 2 * VECTOR // b.itemsize
    out = np.zeros((G, -(-n // W), K, W), b.dtype)
    for p in range(out.shape[1]):
        out[:, p, :, :min(W, n - p * W)] = b[:, :, p * W:(p + 1) * W]
    return out


@device
def pack(b, bt, ldk, ldn, n, K, out, at):
    """out[at + k W + j] = b[bt + k · ldk + j · ldn], zeros behind n; ldk or ldn is 1."""
    W, lanes = 2 * VECTOR // b.itemsize, VECTOR // b.itemsize
    if n < W:
        out[at:at + K * W] = 0
    if ldk != 1:
        for k in range(K):
            first = bt + k * ldk
            source, row = b[first:first + n], out[at + k * W:at + k * W + n]
            for j in range(n):
                row[j] = source[j]
        return
    squares, whole = K // lanes * lanes, n // lanes * lanes
    for k in range(0, squares, lanes):
        for j in range(0, whole, lanes):
            transpose(b, bt + k + j * ldn, ldn, out, at + k * W + j, W)
    for j in range(n):
        for k in range(squares if j < whole else 0, K):
            out[at + k * W + j] = b[bt + j * ldn + k]


def _strip_of(whole, few, one):
    """m rows added to c: whole tiles, then rows by four, then one by one."""
    @device
    def strip(a, at, row, step, m, K, b, bt, ldb, c, ct, ldc):
        r = 0
        while r + ROWS <= m:
            whole(a, at + r * row, row, step, K, b, bt, ldb, c, ct + r * ldc, ldc)
            r += ROWS
        while r + FEW <= m:
            few(a, at + r * row, row, step, K, b, bt, ldb, c, ct + r * ldc, ldc)
            r += FEW
        while r < m:
            one(a, at + r * row, row, step, K, b, bt, ldb, c, ct + r * ldc, ldc)
            r += 1
    return strip


_strip = _strip_of(add_tile, add_few, add_row)                      # two vectors wide
_half_strip = _strip_of(add_half_tile, add_few_half, add_row_half)


@device
def columns(a, at, row, step, m, K, b, bt, ldb, n, y, yt, N, aside):
    """m rows and n columns of y += a b. Columns that fill no vector are computed aside."""
    W = 2 * VECTOR // a.itemsize
    if n == W:
        _strip(a, at, row, step, m, K, b, bt, ldb, y, yt, N)
    elif 2 * n == W:
        _half_strip(a, at, row, step, m, K, b, bt, ldb, y, yt, N)
    else:
        aside[:m * W] = 0
        if 2 * n > W:
            _strip(a, at, row, step, m, K, b, bt, ldb, aside, 0, W)
        else:
            _half_strip(a, at, row, step, m, K, b, bt, ldb, aside, 0, W)
        for r in range(m):
            for j in range(n):
                y[yt + r * N + j] += aside[r * W + j]


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
