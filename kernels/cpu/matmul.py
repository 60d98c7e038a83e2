"""Matrix products: tiles of y stay in registers (microkernel.py) while k runs.

b is read in panels of two vectors, K values long; a needs no packing, since a tile reads it one
element per row, with any row and column step. BLAS is called for small and for thin products only:
its threads and these would fight for the cores (with a second process running, OpenBLAS' two
threads took 43 ms for a product of 0.1 ms).
"""

import numpy as np

from ..quiet import quiet
from . import memory
from .jit import kernel, prange
from .microkernel import ROWS
from .reduce import sum
from .simd import VECTOR
from .tiles import columns, fill, pack

__all__ = ["linear", "linear_backward", "matmul"]

PART = 128              # k per pass where a task packs for itself: 16 KB, half of L1
DEPTH = 1024            # k per pass: 96 rows of a (400 KB) and a panel (128 KB) stay in a core's L2
BLOCK = 8 * ROWS        # rows of y per task, fewer where that makes too few tasks to share out
TASKS = 16
FEW_ROWS = 2 * BLOCK    # rows of y up to which each task packs for itself: no panel leaves L1
IN_PLACE = 1 << 18      # bytes of a row-major b that are read where they are: a quarter of L2
TINY = 1 << 18          # multiply-adds: up to here BLAS uses one thread; 64³: 6 us, this 7


@kernel
def _product(a, row, step, b, ldk, ldn, M, N, K, block, bias, packed, y):
    """y (M, N) = a b + bias. ``packed`` has room for the last panels of b; the others are read in
    place if b is row-major, else packed by each task for itself, PART values of k at a time."""
    W = 2 * VECTOR // a.itemsize
    P, blocks = (N + W - 1) // W, (M + block - 1) // block
    shared = P - packed.size // (K * W)
    for p in prange(shared, P):
        pack(b, p * W * ldn, ldk, ldn, min(W, N - p * W), K, packed, (p - shared) * K * W)
    for t in prange(blocks * P):
        r0, p = t // P * block, t % P
        m, j0, n = min(block, M - r0), p * W, min(W, N - p * W)
        aside = np.empty(0 if n == W or 2 * n == W else m * W, a.dtype)
        own = np.empty(PART * W if p < shared and ldn != 1 else 0, a.dtype)
        yt = r0 * N + j0
        fill(y, yt, m, N, n, bias, j0)
        depth = PART if own.size else DEPTH
        for k0 in range(0, K, depth):
            k, at = min(depth, K - k0), r0 * row + k0 * step
            if own.size:
                pack(b, k0 * ldk + j0 * ldn, ldk, ldn, n, k, own, 0)
                columns(a, at, row, step, m, k, own, 0, W, n, y, yt, N, aside)
            elif p < shared:
                columns(a, at, row, step, m, k, b, k0 * ldk + j0, ldk, n, y, yt, N, aside)
            else:
                bt = ((p - shared) * K + k0) * W
                columns(a, at, row, step, m, k, packed, bt, W, n, y, yt, N, aside)


def _steps(x):
    """A matrix as one axis in memory, with its row and column step; a copy if neither is 1."""
    if x.flags.c_contiguous:
        return x.reshape(-1), x.shape[1], 1
    if x.flags.f_contiguous:
        return x.T.reshape(-1), 1, x.shape[0]
    return np.ascontiguousarray(x).reshape(-1), x.shape[1], 1


_NO_BIAS = {np.dtype(t): np.zeros(0, t) for t in (np.float32, np.float64)}


def _matmul(a, b, bias=None):
    """a b + bias for matrices of one float dtype."""
    (M, K), N = a.shape, b.shape[1]
    y = memory.empty((M, N), a.dtype)
    a, row, step = _steps(a)
    b, ldk, ldn = _steps(b)
    W = 2 * VECTOR // a.itemsize
    panels = -(-N // W)
    block = _block(M, panels, TASKS)
    if ldn == 1 and b.nbytes <= IN_PLACE:
        panels = 1 if N % W else 0
    elif ldn != 1 and M <= FEW_ROWS:
        panels, block = 0, _block(M, panels, 1)
    packed = memory.empty((panels * K * W,), a.dtype)
    _product(a, row, step, b, ldk, ldn, M, N, K, block,
             _NO_BIAS[a.dtype] if bias is None else bias, packed, y.reshape(-1), work=2 * M * N * K)
    return y


def _block(M, panels, tasks):
    """Rows per task: of the shape alone, so that results do not depend on the number of threads."""
    block = -(-M // (max(1, round(M / BLOCK)) * ROWS)) * ROWS
    while block > ROWS and panels * -(-M // block) < tasks:
        block -= ROWS
    return block


def _is_ours(a, b):
    if a.ndim != 2 or b.ndim != 2 or a.dtype != b.dtype or a.dtype not in _NO_BIAS:
        return False
    (M, K), N = a.shape, b.shape[1]
    return M * K * N > TINY and not _is_thin(M, N, K, b)


def _is_thin(M, N, K, b):
    """Products that read or write memory more than they multiply, one core, BLAS against this:
    1000 × 1000 by a vector 54 us, 300; (1000, 8) (8, 1000) 240, 306; (8, 10⁵) (10⁵, 8) 461, 840.
    Six rows by a row-major b 436, 644 (float64), but by a column-major one 2.0 times this."""
    few = 1 if b.flags.f_contiguous else 12
    return few >= M or N * b.itemsize <= 16 or K <= 8 or M * N <= 256


@quiet
def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    if _is_ours(a, b):
        return _matmul(a, b)
    if a.ndim > 2 == b.ndim and a.size:
        return matmul(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[1])
    return np.matmul(_operand(a), _operand(b))


def _operand(x):
    """Rows or columns contiguous: NumPy hands anything else to a scalar loop, 100 times slower."""
    s = x.strides
    if x.itemsize in (s[-1], s[-2]) and min(s) >= 0:
        return x
    return np.ascontiguousarray(x)


@quiet
def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    K = x.shape[-1]
    rows = x if x.ndim == 2 else x.reshape(-1, K)
    if _is_ours(rows, weight.T):
        y = _matmul(rows, weight.T, None if bias is None else np.ascontiguousarray(bias))
    else:
        y = np.matmul(_operand(rows), _operand(weight.T))
        if bias is not None:
            y += bias
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def linear_backward(dy, x, weight, *, input_gradient):
    """dx = dy w (0 unless asked for),  dw = dyᵀ x,  db = Σ dy over rows."""
    rows = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
    inputs = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    nothing = np.zeros((), x.dtype)
    dx = matmul(rows, weight).reshape(x.shape) if input_gradient else nothing
    return dx, matmul(rows.T, inputs), sum(rows, axes=0, keepdims=False)
