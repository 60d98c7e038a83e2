"""Matrix products: tiles of y stay in registers (microkernel.py) while k runs.

Two forms. Tiles: each value of a times a row of b; a is read where it lies, with any steps, b in
panels of two vectors, in place if it is row-major. Dots: where both are contiguous along k, rows of
a times columns of b, vectors along k; nothing is packed and no column is too few. ``_dots_cost`` and
``_tiles_cost`` estimate both. BLAS is not called: its threads and these would fight for the cores
(with a second process running, OpenBLAS' two threads took 43 ms for a product of 0.1 ms).
"""

import math

import numpy as np

from ..quiet import quiet
from . import memory
from .jit import device, kernel, prange
from .microkernel import DOTS, ROWS, WIDE, dots
from .reduce import sum
from .simd import VECTOR
from .tiles import copy, pack, strip

__all__ = ["linear", "linear_backward", "matmul"]

DEPTH = 512             # k per pass of tiles: 96 rows of a (196 KB) and a panel (64 KB) stay in L2
BLOCK = 8 * ROWS        # rows of y per task, fewer where that makes too few tasks to share out
TASKS = 32
CHUNK = 128             # k per task of packing
ALONE = 1 << 15         # values that one thread packs (3 us) sooner than two meet twice
IN_PLACE = 1 << 18      # bytes of a row-major b that are read where they are: a quarter of L2
LONG = 2048             # k per pass of dots
ALIAS = 2048            # bytes: rows that lie a multiple of this apart share a few sets of L1


@device
def _shares(G, M, P):
    """Blocks of rows and groups of panels that y is cut into: by its shape alone."""
    blocks = (M + BLOCK - 1) // BLOCK
    groups = min(P, (TASKS + G * blocks - 1) // (G * blocks))
    most = (M + ROWS - 1) // ROWS
    blocks = min(most, max(blocks, (TASKS + G * groups - 1) // (G * groups)))
    return blocks + (blocks & 1 if blocks < most else 0), groups


@device
def _first(i, parts, M):
    """Where part i begins: a multiple of four rows."""
    return M if i == parts else i * M // parts // 4 * 4


@device
def _own(a, at, row, step, m, k):
    """Rows of a copied to where they do not share sets of L1, with their steps."""
    lanes = VECTOR // a.itemsize
    if step == 1:
        ld = (k + lanes - 1) // lanes * lanes + lanes
        own = np.empty(m * ld, a.dtype)
        copy(a, at, row, m, k, own, 0, ld)
        return own, ld, 1
    ld = (m + lanes - 1) // lanes * lanes
    own = np.empty(k * ld, a.dtype)
    copy(a, at, step, k, m, own, 0, ld)
    return own, 1, ld


@device
def _block(m, K, N, W, p0, p1, copies, a, at, row, step, b, bt, ldp, ldb, s, sj, y, yt):
    """m rows and the panels p0 … p1 of y; panels of b lie ldp apart, their rows ldb."""
    for k0 in range(0, K, DEPTH):
        k, x, xt, xr, xs = min(DEPTH, K - k0), a, at + k0 * step, row, step
        if copies:
            x, xr, xs = _own(a, xt, row, step, m, k)
            xt = 0
        for p in range(p0, p1):
            n, to, panel = min(W, N - p * W), yt + p * W, bt + p * ldp + k0 * ldb
            if k0:
                strip(m, n, k, x, xt, xr, xs, b, panel, ldb, y, to, N, y, to, N)
            else:
                strip(m, n, k, x, xt, xr, xs, b, panel, ldb, s, p * W * sj, 0, y, to, N)


@device
def _pack(t, K, N, b, gb, ldk, ldn, packed):
    """Task t of packing: CHUNK values of k of one panel."""
    W = 2 * VECTOR // b.itemsize
    P, chunks = (N + W - 1) // W, (K + CHUNK - 1) // CHUNK
    p, k0 = t // chunks, t % chunks * CHUNK
    j0 = p % P * W
    pack(b, p // P * gb + j0 * ldn + k0 * ldk, ldk, ldn, min(W, N - j0), min(CHUNK, K - k0),
         packed, (p * K + k0) * W)


@kernel
def _tiles(a, b, s, y, packed, G, M, N, K, ga, row, step, gb, ldk, ldn, sj):
    """y (G, M, N) = a b + s. b is read from its panels in ``packed``, or in place without them."""
    lanes = VECTOR // a.itemsize
    W = WIDE * lanes if M == 1 and packed.size == 0 else 2 * lanes
    P = (N + W - 1) // W
    ldp, ldb, source = W, ldk, b
    if packed.size:
        pieces = (G if gb else 1) * P * ((K + CHUNK - 1) // CHUNK)
        if packed.size <= ALONE:
            for t in range(pieces):
                _pack(t, K, N, b, gb, ldk, ldn, packed)
        else:
            for t in prange(pieces):
                _pack(t, K, N, b, gb, ldk, ldn, packed)
        ldp, ldb, source, gb = K * W, W, packed, (P * K * W if gb else 0)
    blocks, groups = _shares(G, M, P)
    alias = max(row, step) * a.itemsize % ALIAS == 0
    for t in prange(G * blocks * groups):
        g, i, q = t // groups // blocks, t // groups % blocks, t % groups
        r0, p0, p1 = _first(i, blocks, M), q * P // groups, (q + 1) * P // groups
        m = _first(i + 1, blocks, M) - r0
        _block(m, K, N, W, p0, p1, alias and p1 - p0 >= 8, a, g * ga + r0 * row, row, step,
               source, g * gb, ldp, ldb, s, sj, y, (g * M + r0) * N)


@device
def _side(left):
    return DOTS if left >= DOTS else 2 if left >= 2 else 1


@kernel
def _dots(a, b, s, y, G, M, N, K, ga, lda, gb, ldb, sj):
    """y (G, M, N) = a b + s where rows of a and columns of b are contiguous."""
    rows, columns = (M + DOTS - 1) // DOTS, (N + DOTS - 1) // DOTS
    groups = min(columns, (TASKS + G * rows - 1) // (G * rows))
    for t in prange(G * rows * groups):
        g, i, q = t // groups // rows, t // groups % rows, t % groups
        j0, j1 = q * columns // groups * DOTS, min(N, (q + 1) * columns // groups * DOTS)
        for k0 in range(0, K, LONG):
            k, r, j = min(LONG, K - k0), i * DOTS, j0
            while j < j1:
                h, w = _side(min(M, (i + 1) * DOTS) - r), _side(j1 - j)
                at, bt, to = g * ga + r * lda + k0, g * gb + j * ldb + k0, (g * M + r) * N + j
                if k0:
                    dots(h, w, k, a, at, lda, b, bt, ldb, y, to, N, y, to, N)
                else:
                    dots(h, w, k, a, at, lda, b, bt, ldb, s, j * sj, 0, y, to, N)
                r += h
                if r == min(M, (i + 1) * DOTS):
                    r, j = i * DOTS, j + w


def _flat(x):
    """Matrices as one axis in memory, with the steps from row to row and column to column; a copy
    where neither rows nor columns follow one another."""
    if not x.flags.c_contiguous:
        t = x.swapaxes(-1, -2)
        if t.flags.c_contiguous:
            return t.ravel(), 1, t.shape[-1]
    return x.ravel(), x.shape[-1], 1


_NOTHING = {np.dtype(t): (np.zeros(WIDE * VECTOR, t), np.zeros(0, t)) for t in (np.float32, np.float64)}


def _product(a, b, bias=None):
    """a b + bias for matrices of one float dtype."""
    (M, K), N = a.shape, b.shape[1]
    y = (np.empty if M * N < SMALL else memory.empty)((M, N), a.dtype)
    return _multiply(a, b, bias, y, 1, M, N, K, 0, 0)


def _multiply(a, b, bias, y, G, M, N, K, ga, gb):
    """y = a b + bias for G matrices that lie ga and gb apart."""
    work = 2 * G * M * N * K
    if not work:
        y[...] = 0 if bias is None else bias
        return y
    s, packed = _NOTHING[y.dtype]
    sj = 0
    if bias is not None:
        s, sj = np.ascontiguousarray(bias), 1
    a, row, step = _flat(a)
    b, ldk, ldn = _flat(b)
    lanes = VECTOR // y.itemsize
    if step == 1 and ldk == 1 and _is_for_dots(M, N, K, lanes):
        _dots(a, b, s, y.ravel(), G, M, N, K, ga, row, gb, ldn, sj, work=work)
        return y
    if ldn != 1 or M >= 2 * BLOCK and b.nbytes > IN_PLACE:
        W = 2 * lanes
        packed = memory.empty(((G if gb else 1) * -(-N // W) * K * W,), y.dtype)
    _tiles(a, b, s, y.ravel(), packed, G, M, N, K, ga, row, step, gb, ldk, ldn, sj, work=work)
    return y


def _is_for_dots(M, N, K, lanes):
    """By cycles: a multiply-add of vectors takes one; a dot's lanes are added up in 6, and packing b
    takes half a cycle per value."""
    dots = M * N * (-(-K // lanes) + 6)
    return dots < K * max(M, 2) * -(-N // lanes) + K * N // 2


SMALL = memory.SMALLEST // 8
_matmul = quiet(np.matmul)


def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    if a.dtype != b.dtype or a.dtype not in _NOTHING:
        return _matmul(a, b)
    if b.ndim == 2:
        if a.ndim == 2:
            return _product(a, b)
        return _product(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])
    (M, K), N, lead = a.shape[-2:], b.shape[-1], np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = _spread(a, lead), _spread(b, lead)
    y = memory.empty((*lead, M, N), a.dtype)
    return _multiply(a, b, None, y, math.prod(lead), M, N, K, M * K if a.ndim > 2 else 0,
                     K * N if b.ndim > 2 else 0)


def _spread(x, lead):
    """x with those leading axes, or as one matrix where it is one for all."""
    if x.ndim == 2 or x.shape[:-2] == lead:
        return x
    if math.prod(x.shape[:-2]) == 1:
        return x.reshape(x.shape[-2:])
    return np.broadcast_to(x, lead + x.shape[-2:])


def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    if x.ndim == 2:
        return _product(x, weight.T, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _product(rows, weight.T, bias).reshape(*x.shape[:-1], weight.shape[0])


def linear_backward(dy, x, weight, *, input_gradient):
    """dx = dy w (0 unless asked for),  dw = dyᵀ x,  db = Σ dy over rows."""
    rows = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
    inputs = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    nothing = np.zeros((), x.dtype)
    dx = matmul(rows, weight).reshape(x.shape) if input_gradient else nothing
    return dx, matmul(rows.T, inputs), sum(rows, axes=0, keepdims=False)
