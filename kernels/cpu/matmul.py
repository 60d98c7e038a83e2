"""Matrix products: tiles of y stay in registers (microkernel.py) while k runs.

Two forms. Tiles: each value of a times a row of b; a is read where it lies, with any steps, b in
panels of two vectors, in place if it is row-major. Dots: where both are contiguous along k, rows of
a times columns of b, vectors along k; nothing is packed and no column is too few.

BLAS serves only products so small that the way into a kernel of ours is longer: its threads and
these would fight for the cores (with a second process running, OpenBLAS' two threads took 43 ms for
a product of 0.1 ms).
"""

import math

import numpy as np

from ..quiet import quiet
from . import memory
from .jit import device, kernel, prange
from .microkernel import DOTS, ROWS, WIDE, dots
from .reduce import sum
from .simd import VECTOR, load_part, store_part
from .tiles import copy, pack, strip

__all__ = ["linear", "linear_backward", "matmul"]

DEPTH = 2048            # bytes of k per pass of tiles: 96 rows of a and a panel stay in L2
SHALLOW = 16            # the same for one row: so many rows of b are read at once, each to its end
LONG = 2048             # k per pass of dots
BLOCK = 8 * ROWS        # rows of y per task, fewer where that makes too few tasks to share out
TASKS, TASK = 32, 17    # tasks of 2^TASK multiply-adds (2.3 us of one core), but no more than TASKS
CHUNK = 128             # k per task of packing
ALONE = 1 << 15         # values that one thread packs (3 us) sooner than two meet twice
IN_PLACE = 1 << 18      # bytes of a row-major b that are read where they are: a quarter of L2
ALIAS = 2048            # bytes: rows that lie a multiple of this apart share a few sets of L1
SMALL = memory.SMALLEST // 8
TINY = 1 << 17          # multiply-adds: up to here BLAS, on one thread, is 1 us faster


@device
def _shares(G, M, K, N, W):
    """Blocks of rows and groups of panels that each y is cut into, by its shape alone. Two blocks
    at least: rows are cut evenly, panels may differ in width."""
    P, most = (N + W - 1) // W, (M + ROWS - 1) // ROWS
    tasks = (min(TASKS, max(1, (G * M * N * K) >> (TASK if M > 1 else TASK + 2))) + G - 1) // G
    blocks = (M + BLOCK - 1) // BLOCK
    if tasks > 1:
        blocks = min(most, blocks + (blocks & 1))
    groups = min(P, (tasks + blocks - 1) // blocks)
    return max(blocks, min(most, (tasks + groups - 1) // groups)), groups


@device
def _first(i, parts, M):
    """Where part i begins: at an even row."""
    return M if i == parts else i * M // parts // 2 * 2


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
def _tiles(t, blocks, groups, M, K, N, W, a, ga, row, step, b, gb, ldp, ldb, s, sj, y):
    """Task t of y (G, M, N) = a b + s: a block of rows and a group of panels of W columns, which
    lie ldp apart in b, their rows ldb."""
    g, r0, m, p0, p1 = t, 0, M, 0, (N + W - 1) // W
    if blocks * groups > 1:                       # a division takes as long as ten multiply-adds
        i, q, P = t // groups, t % groups, p1
        g, i = i // blocks, i % blocks
        r0, p0, p1 = _first(i, blocks, M), q * P // groups, (q + 1) * P // groups
        m = _first(i + 1, blocks, M) - r0
    at, yt = g * ga + r0 * row, (g * M + r0) * N
    copies = p1 - p0 >= 8 and max(row, step) * a.itemsize % ALIAS == 0
    depth = DEPTH // a.itemsize if M > 1 else SHALLOW
    for k0 in range(0, K, depth):
        k, x, xt, xr, xs = min(depth, K - k0), a, at + k0 * step, row, step
        if copies:
            x, xr, xs = _own(a, xt, row, step, m, k)
            xt = 0
        for p in range(p0, p1):
            n, to, panel = min(W, N - p * W), yt + p * W, g * gb + p * ldp + k0 * ldb
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
def _product(a, b, s, y, packed, G, M, N, K, ga, row, step, gb, ldk, ldn, sj):
    """y (G, M, N) = a b + s. b is read from its panels in ``packed``, or in place without them."""
    lanes = VECTOR // a.itemsize
    W = WIDE * lanes if M == 1 and packed.size == 0 else 2 * lanes
    P, ldp, ldb, source = (N + W - 1) // W, W, ldk, b
    if packed.size:
        pieces = (G if gb else 1) * P * ((K + CHUNK - 1) // CHUNK)
        if packed.size <= ALONE:
            for t in range(pieces):
                _pack(t, K, N, b, gb, ldk, ldn, packed)
        else:
            for t in prange(pieces):
                _pack(t, K, N, b, gb, ldk, ldn, packed)
        ldp, ldb, source, gb = K * W, W, packed, (P * K * W if gb else 0)
    blocks, groups = _shares(G, M, K, N, W)
    for t in prange(G * blocks * groups):
        _tiles(t, blocks, groups, M, K, N, W, a, ga, row, step, source, gb, ldp, ldb, s, sj, y)


@device
def _side(left):
    return DOTS if left >= DOTS else 2 if left >= 2 else 1


@device
def _is_for_dots(M, N, K, itemsize):
    """By cycles: a multiply-add of vectors takes one; a dot's lanes are added up in 6, and packing w
    takes half a cycle per value."""
    lanes = VECTOR // itemsize
    with_dots = M * N * ((K + lanes - 1) // lanes + 6)
    return with_dots < K * max(M, 2) * ((N + lanes - 1) // lanes) + K * N // 2


@device
def _dots(t, groups, M, N, K, x, w, s, sj, y):
    """Task t of y = x wᵀ + s: DOTS rows and a group of columns."""
    columns, r0, q = (N + DOTS - 1) // DOTS, t // groups * DOTS, t % groups
    end = min(M, r0 + DOTS)
    for k0 in range(0, K, LONG):
        k, j = min(LONG, K - k0), q * columns // groups * DOTS
        while j < min(N, (q + 1) * columns // groups * DOTS):
            r, n = r0, _side(N - j)
            while r < end:
                m, at, wt, to = _side(end - r), r * K + k0, j * K + k0, r * N + j
                if k0:
                    dots(m, n, k, x, at, K, w, wt, K, y, to, N, y, to, N)
                else:
                    dots(m, n, k, x, at, K, w, wt, K, s, j * sj, 0, y, to, N)
                r += m
            j += n


@kernel
def _linear(x, w, s, y, packed, sj):
    """y = x wᵀ + s, all contiguous."""
    (M, K), N = x.shape, w.shape[0]
    x, w, y, W = x.reshape(-1), w.reshape(-1), y.reshape(-1), 2 * VECTOR // x.itemsize
    if _is_for_dots(M, N, K, x.itemsize):
        rows, columns = (M + DOTS - 1) // DOTS, (N + DOTS - 1) // DOTS
        tasks = min(TASKS, max(1, (M * N * K) >> TASK))
        groups = min(columns, (tasks + rows - 1) // rows)
        for t in prange(rows * groups):
            _dots(t, groups, M, N, K, x, w, s, sj, y)
    else:
        P = (N + W - 1) // W
        if packed.size == 0:
            packed = np.empty(P * K * W, x.dtype)
        pieces = P * ((K + CHUNK - 1) // CHUNK)
        if packed.size <= ALONE:
            for t in range(pieces):
                _pack(t, K, N, w, 0, 1, K, packed)
        else:
            for t in prange(pieces):
                _pack(t, K, N, w, 0, 1, K, packed)
        blocks, groups = _shares(1, M, K, N, W)
        for t in prange(blocks * groups):
            _tiles(t, blocks, groups, M, K, N, W, x, 0, K, 1, packed, 0, K * W, W, s, sj, y)


@device
def _column_sums(t, dy, M, N, db):
    """One vector of columns, in partial sums of 64 rows."""
    j = t * (VECTOR // dy.itemsize)
    n = min(VECTOR // dy.itemsize, N - j)
    whole = load_part(dy, 0, 0)                   # zeros
    for r0 in range(0, M, 64):
        part = load_part(dy, r0 * N + j, n)
        for r in range(r0 + 1, min(M, r0 + 64)):
            part = part + load_part(dy, r * N + j, n)
        whole = whole + part
    store_part(db, j, whole, n)


@kernel
def _backward(dy, x, w, s, dx, dw, db, M, N, K):
    """dx = dy w unless it is empty, dw = dyᵀ x, db = Σ dy, all contiguous: one list of tasks."""
    lanes = VECTOR // x.itemsize
    W, V = WIDE * lanes if M == 1 else 2 * lanes, WIDE * lanes if N == 1 else 2 * lanes
    blocks, groups = _shares(1, M, N, K, W)
    rows, columns = _shares(1, N, M, K, V)
    first = blocks * groups if dx.size else 0
    second = first + rows * columns
    for t in prange(second + (N + lanes - 1) // lanes):
        if t < first:
            _tiles(t, blocks, groups, M, N, K, W, dy, 0, N, 1, w, 0, W, K, s, 0, dx)
        elif t < second:
            _tiles(t - first, rows, columns, N, M, K, V, dy, 0, 1, N, x, 0, V, K, s, 0, dw)
        else:
            _column_sums(t - second, dy, M, N, db)


# Zeros to start sums from, and no panels.
_NOTHING = {np.dtype(t): (np.zeros(WIDE * VECTOR, t), np.zeros(0, t))
            for t in (np.float32, np.float64)}


def _empty(M, N, dtype):
    return (np.empty if M * N < SMALL else memory.empty)((M, N), dtype)


def _flat(x):
    """Matrices as one axis in memory, with the steps from row to row and column to column; a copy
    where neither rows nor columns follow one another."""
    if not x.flags.c_contiguous:
        t = x.swapaxes(-1, -2)
        if t.flags.c_contiguous:
            return t.ravel(), 1, t.shape[-1]
    return x.ravel(), x.shape[-1], 1


def _general(a, b, y, G, ga, gb):
    """y = a b for G matrices that lie ga and gb apart."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    s, packed = _NOTHING[y.dtype]
    a, row, step = _flat(a)
    b, ldk, ldn = _flat(b)
    if ldn != 1 or M >= 2 * BLOCK and b.nbytes > IN_PLACE:
        W = 2 * VECTOR // y.itemsize
        packed = memory.empty(((G if gb else 1) * -(-N // W) * K * W,), y.dtype)
    _product(a, b, s, y.ravel(), packed, G, M, N, K, ga, row, step, gb, ldk, ldn, 0,
             work=2 * G * M * N * K)
    return y


def _times_transposed(x, w, bias):
    """x wᵀ + bias for contiguous matrices with at least one value."""
    (M, K), N = x.shape, w.shape[0]
    s, packed = _NOTHING[x.dtype]
    y = _empty(M, N, x.dtype)
    if N * K > ALONE and not _is_for_dots(M, N, K, x.itemsize):
        W = 2 * VECTOR // x.itemsize
        packed = memory.empty((-(-N // W) * K * W,), x.dtype)
    _linear(x, w, s if bias is None else bias, y, packed, 0 if bias is None else 1,
            work=2 * M * N * K)
    return y


_blas = quiet(np.matmul)


def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    if a.dtype != b.dtype or a.dtype not in _NOTHING:
        return _blas(a, b)
    if b.ndim > 2:
        return _batched(a, b)
    if a.ndim > 2:
        M = math.prod(a.shape[:-1])
        return matmul(a.reshape(M, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])
    (M, K), N = a.shape, b.shape[1]
    if M * N * K <= TINY:
        return _blas(a, b)
    if a.flags.c_contiguous:
        w = b.T
        if N <= 8 <= M // 8:
            w = np.ascontiguousarray(w)
        if w.flags.c_contiguous:
            return _times_transposed(a, w, None)
    elif N == 1:
        return _general(b.T, a.T, _empty(N, M, a.dtype), 1, 0, 0).reshape(M, N)
    return _general(a, b, _empty(M, N, a.dtype), 1, 0, 0)


def _batched(a, b):
    (M, K), N, lead = a.shape[-2:], b.shape[-1], np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    G = math.prod(lead)
    y = memory.empty((*lead, M, N), a.dtype)
    if not G * M * N * K:
        y[...] = 0
        return y
    a, b = _spread(a, lead), _spread(b, lead)
    return _general(a, b, y, G, M * K if a.ndim > 2 else 0, K * N if b.ndim > 2 else 0)


def _spread(x, lead):
    """x with those leading axes, or as one matrix where it is one for all."""
    if x.ndim == 2 or x.shape[:-2] == lead:
        return x
    if math.prod(x.shape[:-2]) == 1:
        return x.reshape(x.shape[-2:])
    return np.broadcast_to(x, lead + x.shape[-2:])


def _rows(x):
    """(…, K) as a contiguous matrix."""
    if x.ndim != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return np.ascontiguousarray(x)


@quiet
def _linear_of_any(x, weight, bias):
    y = np.matmul(x, weight.T)
    return y if bias is None else y + bias


def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    if x.dtype not in _NOTHING or x.dtype != weight.dtype or not x.size or not weight.size:
        return _linear_of_any(x, weight, bias)
    bias = None if bias is None else np.ascontiguousarray(bias, x.dtype)
    y = _times_transposed(_rows(x), np.ascontiguousarray(weight), bias)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def linear_backward(dy, x, weight, *, input_gradient):
    """dx = dy w (0 unless asked for),  dw = dyᵀ x,  db = Σ dy over rows."""
    rows, inputs, nothing = _rows(dy), _rows(x), np.zeros((), x.dtype)
    (M, N), K, size = rows.shape, inputs.shape[1], x.itemsize
    large = max(M, N) >= 2 * BLOCK and max(M, N) * K * size > IN_PLACE
    if large or not M * N * K or x.dtype not in _NOTHING or not x.dtype == dy.dtype == weight.dtype:
        dx = matmul(rows, weight).reshape(x.shape) if input_gradient else nothing
        return dx, matmul(rows.T, inputs), sum(rows, axes=0, keepdims=False)
    s, none = _NOTHING[x.dtype]
    dx = _empty(M, K, x.dtype) if input_gradient else none
    dw, db = _empty(N, K, x.dtype), np.empty(N, x.dtype)
    _backward(rows.ravel(), inputs.ravel(), weight.ravel(), s, dx.ravel(), dw.ravel(), db, M, N, K,
              work=(4 if input_gradient else 2) * M * N * K)
    return dx.reshape(x.shape) if input_gradient else nothing, dw, db
