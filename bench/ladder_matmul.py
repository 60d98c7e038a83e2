"""A matrix product made fast a step at a time, as docs/matmul-ladder.md tells it.

Every rung is y = f(a, b) for row-major float32 matrices. From the tile on, M must be a multiple of
6 and N of two vectors: what a real kernel does at the edges is in ``kernels/cpu/matmul.py``.
"""

import numpy as np
from nbgrad.kernels import cpu
from nbgrad.kernels.cpu import memory, simd
from nbgrad.kernels.cpu.jit import device, kernel, prange

__all__ = ["RUNGS"]

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


@kernel
def _blocks(a, b, y):
    """The same for 64 rows of b at a time."""
    M, K = a.shape
    y[:] = 0
    for k0 in range(0, K, BLOCK):
        for i in range(M):
            out = y[i]
            for k in range(k0, min(k0 + BLOCK, K)):
                v, row = a[i, k], b[k]
                for j in range(row.size):
                    out[j] += v * row[j]


def blocks(a, b):
    y = _new(a, b)
    _blocks(a, b, y)
    return y


@device
def _four(a, b, i, k, out):
    """out += four rows of b, each times its element of a: out is loaded and stored once."""
    p, q, r, s = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
    b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
    for j in range(out.size):
        out[j] = out[j] + p * b0[j] + q * b1[j] + r * b2[j] + s * b3[j]


@kernel
def _fours(a, b, y):
    M, K = a.shape
    y[:] = 0
    for k0 in range(0, K, BLOCK):
        for i in range(M):
            for k in range(k0, min(k0 + BLOCK, K), 4):
                _four(a, b, i, k, y[i])


def fours(a, b):
    y = _new(a, b)
    _fours(a, b, y)
    return y


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
    for k in range(K):
        p, q = simd.load(b, bt + k * ldb), simd.load(b, bt + k * ldb + W)
        v = simd.splat(a[at + k])
        p0, q0 = simd.fma(v, p, p0), simd.fma(v, q, q0)
        v = simd.splat(a[at + lda + k])
        p1, q1 = simd.fma(v, p, p1), simd.fma(v, q, q1)
        v = simd.splat(a[at + 2 * lda + k])
        p2, q2 = simd.fma(v, p, p2), simd.fma(v, q, q2)
        v = simd.splat(a[at + 3 * lda + k])
        p3, q3 = simd.fma(v, p, p3), simd.fma(v, q, q3)
        v = simd.splat(a[at + 4 * lda + k])
        p4, q4 = simd.fma(v, p, p4), simd.fma(v, q, q4)
        v = simd.splat(a[at + 5 * lda + k])
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


@kernel
def _panels(a, b, M, K, N, packed, y):
    """96 rows of a, which L2 holds, times a copy of two vectors of b's columns, which L1 holds."""
    W = 2 * simd.lanes(a)
    P = N // W
    for p in prange(P):
        for k in range(K):
            for j in range(W):
                packed[(p * K + k) * W + j] = b[k * N + p * W + j]
    for t in prange((M + TALL - 1) // TALL * P):
        r0, p = t // P * TALL, t % P
        for r in range(r0, min(r0 + TALL, M)):
            y[r * N + p * W:r * N + (p + 1) * W] = 0
        for k in range(0, K, DEPTH):
            for i in range(r0, min(r0 + TALL, M), ROWS):
                _tile(a, i * K + k, K, min(DEPTH, K - k), packed, (p * K + k) * W, W,
                      y, i * N + p * W, N)


def panels(a, b, work=0):
    y, packed = _new(a, b), memory.empty((b.size,), b.dtype)
    _panels(a.reshape(-1), b.reshape(-1), *a.shape, b.shape[1], packed, y.reshape(-1), work=work)
    return y


def threads(a, b):
    return panels(a, b, work=2 * a.size * b.shape[1])


# {name of the rung: (function, every thread?)}
RUNGS = {
    "dot products": (dots, False), "rows": (rows, False), "blocks": (blocks, False),
    "four at a time": (fours, False), "tiles": (tiles, False), "panels": (panels, False),
    "threads": (threads, True), "nbgrad, one thread": (cpu.matmul, False),
    "nbgrad": (cpu.matmul, True), "NumPy": (np.matmul, True)}
