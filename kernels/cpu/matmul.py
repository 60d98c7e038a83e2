"""Matrix products: tiles of y stay in registers (microkernel.py) while k runs.

BLAS serves only products so small that the way into a kernel of ours is longer: its threads and
these would fight for the cores (with a second process running, OpenBLAS' two threads took 43 ms for
a product of 0.1 ms).
"""

import math

import numpy as np

from ..quiet import quiet, silent
from . import memory
from .jit import device
from .microkernel import ROWS, WIDE
from .products import (
    ALIAS,
    ALONE,
    BLOCK,
    IN_PLACE,
    LINES,
    apart_task,
    as_bytes,
    column_sums,
    dots_shares,
    dots_task,
    heap_task,
    pack_pieces,
    pack_task,
    prefers_dots,
    tiles_shares,
    tiles_task,
)
from .reduce import sum
from .simd import VECTOR
from .tasks import share, tasks

__all__ = ["linear", "linear_backward", "matmul"]

SMALL = memory.SMALLEST // 8
MANY = 1024             # bytes of columns for which a is laid out anew
TINY = 1 << 18          # multiply-adds: up to here OpenBLAS uses one thread; 64³: 7.1 us, this 7.9
FEW = 1 << 21           # the same of a product that the way into its kernel delays: 128³, 30 us
TINY_LINE = 1 << 13     # the same for vectors, where it takes threads from 9216 on
TINY_EACH = 1 << 15     # the same for each of a batch: NumPy takes 125 ns for 16³, this 245


@device
def _pack_all(run, pieces, K, N, b, gb, ldk, ldn, packed):
    share(pack_task, pieces, run if packed.size > ALONE else 0, (K, N, b, gb, ldk, ldn, packed))


@tasks
def _product(run, a, b, s, y, packed, G, M, N, K, ga, row, step, heap, gb, ldk, ldn,
             sj):
    """y (G, M, N) = a b + s. b is read from its panels in ``packed``, or in place without them."""
    lanes = VECTOR // a.itemsize
    W = WIDE * lanes if M == 1 and packed.size == 0 else 2 * lanes
    P, ldp, ldb, source = (N + W - 1) // W, W, ldk, b
    if packed.size:
        _pack_all(run, (G if gb else 1) * pack_pieces(K, N, a.itemsize), K, N, b, gb, ldk, ldn,
                  packed)
        ldp, ldb, source, gb = K * W, W, packed, (P * K * W if gb else 0)
    blocks, groups = tiles_shares(G, M, K, N, W)
    share(tiles_task, G * blocks * groups, run,
          (blocks, groups, M, K, N, W, a, ga, row, step, heap, source, gb, ldp, ldb, s, sj, y))


@tasks
def _small(run, a, b, y):
    """y = a b of contiguous matrices, read where they lie: an argument costs 0.05 us, an array
    0.15 (products of 96, one core of Emerald Rapids: 27 us, 23 so)."""
    (M, K), N = a.shape, b.shape[1]
    W = (WIDE if M == 1 else 2) * (VECTOR // a.itemsize)
    a, b, y, s = a.reshape(-1), b.reshape(-1), y.reshape(-1), np.zeros(W, a.dtype)
    blocks, groups = tiles_shares(1, M, K, N, W)
    share(tiles_task, blocks * groups, run,
          (blocks, groups, M, K, N, W, a, 0, K, 1, 0, b, 0, W, N, s, 0, y))


dots_preferred = device(prefers_dots)


@tasks
def _copied_apart(run, x, n, y, ld):
    share(apart_task, (x.size // n + LINES - 1) // LINES, run, (x, n, y, ld))


@tasks
def _heaped(run, x, M, K, y):
    share(heap_task, x.size // (K * M) * ((K + LINES - 1) // LINES), run, (x, M, K, y))


@tasks
def _linear(run, x, w, s, y, packed, sj):
    """y = x wᵀ + s, all contiguous."""
    (M, K), N = x.shape, w.shape[0]
    x, w, y, W = x.reshape(-1), w.reshape(-1), y.reshape(-1), 2 * VECTOR // x.itemsize
    if dots_preferred(M, N, K, x.itemsize):
        rows, groups = dots_shares(M, N, K)
        share(dots_task, rows * groups, run, (groups, M, N, K, x, w, s, sj, y))
    else:
        if packed.size == 0:
            packed = np.empty((N + W - 1) // W * K * W, x.dtype)
        _pack_all(run, pack_pieces(K, N, x.itemsize), K, N, w, 0, 1, K, packed)
        blocks, groups = tiles_shares(1, M, K, N, W)
        share(tiles_task, blocks * groups, run,
              (blocks, groups, M, K, N, W, x, 0, K, 1, 0, packed, 0, K * W, W, s, sj, y))


@device
def _backward_task(t, first, blocks, groups, rows, columns, M, N, K, W, V, dy, x, w, s, dx, dw, db):
    if t < first:
        tiles_task(t, blocks, groups, M, N, K, W, dy, 0, N, 1, 0, w, 0, W, K, s, 0, dx)
    else:
        tiles_task(t - first, rows, columns, N, M, K, V, dy, 0, 1, N, 0, x, 0, V, K, s, 0, dw)
        if (t - first) % columns == 0:
            column_sums((t - first) // columns, rows, dy, M, N, db)


@tasks
def _backward(run, dy, x, w, s, dx, dw, db, M, N, K):
    """dx = dy w unless it is empty, dw = dyᵀ x, db = Σ dy, all contiguous: one list of tasks."""
    lanes = VECTOR // x.itemsize
    W, V = WIDE * lanes if M == 1 else 2 * lanes, WIDE * lanes if N == 1 else 2 * lanes
    blocks, groups = tiles_shares(1, M, N, K, W)
    rows, columns = tiles_shares(1, N, M, K, V)
    first = blocks * groups if dx.size else 0
    share(_backward_task, first + rows * columns, run,
          (first, blocks, groups, rows, columns, M, N, K, W, V, dy, x, w, s, dx, dw, db))


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


def _apart(a, row, ga):
    """Rows a multiple of ALIAS apart as a copy where they are not, with what goes with them."""
    ld = row + VECTOR // a.itemsize
    y = memory.empty((a.size // row * ld,), a.dtype)
    _copied_apart(a, row, y, ld, work=2 * a.nbytes)
    return y, ga // row * ld, ld, 1, 0


def _heaps(a, M, K, ga):
    """The columns of rows of M values as heaps, with what goes with them."""
    heaps = -(-M // ROWS)
    y = memory.empty((a.size // M * heaps * ROWS,), a.dtype)
    _heaped(a, M, K, y, work=2 * a.nbytes)
    return y, heaps * K * ROWS if ga else 0, 1, ROWS, K * ROWS


def _left(a, ga, N):
    """a as tiles read it fast N columns long, with the steps from matrix to matrix, row to row, k
    to k and heap to heap."""
    M, K = a.shape[-2:]
    a, row, step = _flat(a)
    if N * a.itemsize >= MANY:
        if step != 1 and M * K * a.itemsize > IN_PLACE:
            return _heaps(a, M, K, ga)
        if row * a.itemsize % ALIAS == 0 and step == 1:
            return _apart(a, row, ga)
    return a, ga, row, step, 0


def _general(a, b, y, G, ga, gb, bias=None):
    """y = a b + bias for G matrices that lie ga and gb apart."""
    (M, K), N = a.shape[-2:], b.shape[-1]
    s, packed = _NOTHING[y.dtype]
    a, ga, row, step, heap = _left(a, ga, N)
    b, ldk, ldn = _flat(b)
    if ldn != 1 or (M >= BLOCK and b.nbytes > IN_PLACE):
        W = 2 * VECTOR // y.itemsize
        packed = memory.empty(((G if gb else 1) * -(-N // W) * K * W,), y.dtype)
    _product(a, b, s if bias is None else bias, y.ravel(), packed, G, M, N, K, ga, row, step,
             heap, gb, ldk, ldn, 0 if bias is None else 1, work=2 * G * M * N * K)
    return y


def _times_transposed(x, w, bias):
    """x wᵀ + bias for contiguous matrices with at least one value."""
    (M, K), N = x.shape, w.shape[0]
    s, packed = _NOTHING[x.dtype]
    y = _empty(M, N, x.dtype)
    if N * K > ALONE and not prefers_dots(M, N, K, x.itemsize):
        return _general(x, w.T, y, 1, 0, 0, bias)
    _linear(x, w, s if bias is None else bias, y, packed, 0 if bias is None else 1,
            work=as_bytes(M * N * K))
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
    if (TINY if M > 1 and N > 1 else TINY_LINE) >= M * N * K:
        return silent().run(np.dot, _dense(a), _dense(b))        # matmul's way there: 0.3 us longer
    if a.flags.c_contiguous:
        if M * N * K <= FEW and N > 8 and N * a.itemsize < MANY and b.flags.c_contiguous:
            y = np.empty((M, N), a.dtype)
            _small(a, b, y, work=2 * M * N * K)
            return y
        w = b.T
        if N <= 8 <= M // 8:
            w = np.ascontiguousarray(w)
        if w.flags.c_contiguous:
            return _times_transposed(a, w, None)
    elif N == 1:
        return _general(b.T, a.T, _empty(N, M, a.dtype), 1, 0, 0).reshape(M, N)
    return _general(a, b, _empty(M, N, a.dtype), 1, 0, 0)


def _dense(x):
    """NumPy hands anything else to a scalar loop, 100 times slower."""
    if x.flags.c_contiguous:
        return x
    s = x.strides
    return x if x.itemsize in s[-2:] and min(s) >= 0 else np.ascontiguousarray(x)


def _batched(a, b):
    (M, K), N = a.shape[-2:], b.shape[-1]
    if M * N * K <= TINY_EACH:
        return _blas(_dense(a), _dense(b))
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    G = math.prod(lead)
    y = memory.empty((*lead, M, N), a.dtype)
    if not G:
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
    large = max(M, N) >= BLOCK and max(M, N) * K * size > IN_PLACE
    if large or not M * N * K or x.dtype not in _NOTHING or not x.dtype == dy.dtype == weight.dtype:
        dx = matmul(rows, weight).reshape(x.shape) if input_gradient else nothing
        return dx, matmul(rows.T, inputs), sum(rows, axes=0, keepdims=False)
    s, none = _NOTHING[x.dtype]
    dx = _empty(M, K, x.dtype) if input_gradient else none
    dw, db = _empty(N, K, x.dtype), np.empty(N, x.dtype)
    _backward(rows.ravel(), inputs.ravel(), weight.ravel(), s, dx.ravel(), dw.ravel(), db, M, N, K,
              work=as_bytes((2 if input_gradient else 1) * M * N * K))
    return dx.reshape(x.shape) if input_gradient else nothing, dw, db
