"""A matrix product made fast a step at a time, as docs/matmul-ladder.md tells it.

Every rung is y = f(a, b) for row-major float32 matrices whose M is a multiple of 6, K of 4 and N of
two vectors: what a real kernel does at the edges is in ``kernels/cpu/matmul.py``.
"""

import numpy as np
from nbgrad.kernels import cpu
from nbgrad.kernels.cpu import memory, simd
from nbgrad.kernels.cpu.jit import device, kernel, prange

__all__ = ["dots", "four_rows", "numpy", "panels", "rows", "shipped", "threads", "tiles"]

ROWS = 6               # of the tile: 6 × 2 sums, 2 of b and 1 of a are 15 of 16 registers or 32
BLOCK = 64             # rows of b that are used while L2 has them
DEPTH = 128            # rows of a panel that are used while L1 has them: 16 KB, half of it
TALL = 96              # rows of a that are used while L2 has them: 295 KB of 768 columns


@kernel
def _dots(a, b, y):
    """Every element of y is a row times a column."""
    M, K = a.shape
    for i in range(M):
        for j in range(b.shape[1]):
            total = np.float32(0)
            for k in range(K):
                total += a[i, k] * b[k, j]
            y[i, j] = total


def _new(a, b):
    return memory.empty((a.shape[0], b.shape[1]), a.dtype)


def dots(a, b):
    y = _new(a, b)
    _dots(a, b, y)
    return y


@kernel
def _rows(a, b, y):
    """Every row of y is a sum of rows of b."""
    M, K = a.shape
    for i in range(M):
        out = y[i]
        out[:] = 0
        for k in range(K):
            v, row = a[i, k], b[k]
            for j in range(row.size):
                out[j] += v * row[j]


def rows(a, b):
    y = _new(a, b)
    _rows(a, b, y)
    return y


@device
def _four(a, b, i, k, out):
    """out += four rows of b, each times its element of a: out is loaded and stored once."""
    p, q, r, s = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
    b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
    for j in range(out.size):
        out[j] = out[j] + p * b0[j] + q * b1[j] + r * b2[j] + s * b3[j]


@kernel
def _four_rows(a, b, y):
    M, K = a.shape
    y[:] = 0
    for k0 in range(0, K, BLOCK):
        for i in range(M):
            for k in range(k0, min(k0 + BLOCK, K), 4):
                _four(a, b, i, k, y[i])


def four_rows(a, b):
    y = _new(a, b)
    _four_rows(a, b, y)
    return y


@device
def _row(a, at, n):
    """A view: an index from 0 up needs no test for being negative."""
    return a[at:at + n]


@device
def _tile(a, at, lda, K, b, bt, ldb, y, yt, ldy):
    """Six rows and two vectors of y: += over K values of k, in twelve registers."""
    W = simd.lanes(a)
    p0, q0 = simd.load(y, yt), simd.load(y, yt + W)
    p1, q1 = simd.load(y, yt + ldy), simd.load(y, yt + ldy + W)
    p2, q2 = simd.load(y, yt + 2 * ldy), simd.load(y, yt + 2 * ldy + W)
    p3, q3 = simd.load(y, yt + 3 * ldy), simd.load(y, yt + 3 * ldy + W)
    p4, q4 = simd.load(y, yt + 4 * ldy), simd.load(y, yt + 4 * ldy + W)
    p5, q5 = simd.load(y, yt + 5 * ldy), simd.load(y, yt + 5 * ldy + W)
    r0, r1, r2 = _row(a, at, K), _row(a, at + lda, K), _row(a, at + 2 * lda, K)
    r3, r4 = _row(a, at + 3 * lda, K), _row(a, at + 4 * lda, K)
    r5 = _row(a, at + 5 * lda, K)
    for k in range(K):
        p, q = simd.load(b, bt + k * ldb), simd.load(b, bt + k * ldb + W)
        v = simd.splat(r0[k])
        p0, q0 = simd.fma(v, p, p0), simd.fma(v, q, q0)
        v = simd.splat(r1[k])
        p1, q1 = simd.fma(v, p, p1), simd.fma(v, q, q1)
        v = simd.splat(r2[k])
        p2, q2 = simd.fma(v, p, p2), simd.fma(v, q, q2)
        v = simd.splat(r3[k])
        p3, q3 = simd.fma(v, p, p3), simd.fma(v, q, q3)
        v = simd.splat(r4[k])
        p4, q4 = simd.fma(v, p, p4), simd.fma(v, q, q4)
        v = simd.splat(r5[k])
        p5, q5 = simd.fma(v, p, p5), simd.fma(v, q, q5)
    _pair(y, yt, W, p0, q0)
    _pair(y, yt + ldy, W, p1, q1)
    _pair(y, yt + 2 * ldy, W, p2, q2)
    _pair(y, yt + 3 * ldy, W, p3, q3)
    _pair(y, yt + 4 * ldy, W, p4, q4)
    _pair(y, yt + 5 * ldy, W, p5, q5)


@device
def _pair(y, at, W, p, q):
    simd.store(y, at, p)
    simd.store(y, at + W, q)


@kernel
def _tiles(a, b, M, K, N, y):
    """Two vectors of columns after the other, tile below tile."""
    W = 2 * simd.lanes(a)
    y[:] = 0
    for j in range(0, N, W):
        for k in range(0, K, DEPTH):
            for i in range(0, M, ROWS):
                _tile(a, i * K + k, K, min(DEPTH, K - k), b, k * N + j, N, y, i * N + j, N)


def tiles(a, b):
    y = _new(a, b)
    _tiles(a.reshape(-1), b.reshape(-1), *a.shape, b.shape[1], y.reshape(-1))
    return y


@device
def _pack(b, bt, K, N, packed, at):
    """Two vectors of b's columns, one row after the other without a gap."""
    W = simd.lanes(b)
    for k in range(K):
        _pair(packed, at + 2 * k * W, W, simd.load(b, bt + k * N), simd.load(b, bt + k * N + W))


@device
def _block(a, at, m, K, packed, bt, W, y, yt, N):
    """m rows of a, which L2 holds, times one panel, by parts which L1 holds."""
    for i in range(m):
        y[yt + i * N:yt + i * N + W] = 0
    for k in range(0, K, DEPTH):
        for i in range(0, m, ROWS):
            _tile(a, at + i * K + k, K, min(DEPTH, K - k), packed, bt + k * W, W, y, yt + i * N, N)


@kernel
def _panels(a, b, M, K, N, packed, y):
    """First a copy of b in panels, then blocks of 96 rows and one panel."""
    W = 2 * simd.lanes(a)
    P, blocks = N // W, (M + TALL - 1) // TALL
    for p in prange(P):
        _pack(b, p * W, K, N, packed, p * K * W)
    for t in prange(blocks * P):
        r, p = t // P * TALL, t % P
        _block(a, r * K, min(TALL, M - r), K, packed, p * K * W, W, y, r * N + p * W, N)


def panels(a, b, work=0):
    y, packed = _new(a, b), memory.empty((b.size,), b.dtype)
    _panels(a.reshape(-1), b.reshape(-1), *a.shape, b.shape[1], packed, y.reshape(-1), work=work)
    return y


def threads(a, b):
    return panels(a, b, work=2 * a.size * b.shape[1])


shipped, numpy = cpu.matmul, np.matmul
