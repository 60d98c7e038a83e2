"""Batch norm of channels-last memory made fast, as docs/batch-norm-ladder.md tells it.

As ``ladder_norm.py``, on rows × channels: the channel is the fastest axis.
"""

import numpy as np
from nbgrad.kernels.cpu import memory, simd
from nbgrad.kernels.cpu.jit import Kernel, device, kernel, prange

from .ladder_norm import EPS, aligned, merge, numpy_formula, shipped

__all__ = ["columns", "numpy_formula", "pooled", "rows", "shipped", "streamed", "threads"]

CHUNK = 128            # rows: 64 KB of 128 channels, in L2; a float32 sum takes no more values


def _rows(x):
    """Channels-last memory as rows × channels."""
    return x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])


@kernel
def _columns(x, gamma, beta, y):
    """One channel after the other, as in NCHW memory."""
    R, C = x.shape
    for c in range(C):
        mean = var = np.float64(0)
        for r in range(R):
            mean += x[r, c]
        mean /= R
        for r in range(R):
            var += (x[r, c] - mean) * (x[r, c] - mean)
        scale = gamma[c] / np.sqrt(var / R + EPS)
        for r in range(R):
            y[r, c] = (x[r, c] - mean) * scale + beta[c]


def columns(x, gamma, beta):
    y = np.empty_like(x)
    _columns(_rows(x), gamma, beta, _rows(y))
    return y


@device
def _merge_all(means, squares, R, mean, var):
    """All chunks' statistics, in order."""
    for k in range(means.shape[0]):
        n = min(CHUNK, R - k * CHUNK)
        for c in range(mean.size):
            mean[c], var[c] = merge(mean[c], var[c], k * CHUNK, means[k, c], squares[k, c], n)
    for c in range(mean.size):
        var[c] /= R


@device
def _rows_statistics(x, at, n, mean, square):
    """Mean and squares of every channel over n rows; LLVM makes vectors of the inner loops."""
    C = mean.size
    pivot, low, squares = x[at:at + C], np.zeros(C, np.float32), np.zeros(C, np.float32)
    for r in range(n):
        row = x[at + r * C:at + (r + 1) * C]
        for c in range(C):
            low[c] += row[c] - pivot[c]
    for c in range(C):
        low[c] /= np.float32(n)
    for r in range(n):
        row = x[at + r * C:at + (r + 1) * C]
        for c in range(C):
            v = row[c] - pivot[c] - low[c]
            squares[c] += v * v
    for c in range(C):
        mean[c], square[c] = np.float64(pivot[c]) + low[c], squares[c]


@device
def _rows_normalize(x, at, n, high, low, scale, shift, y):
    C = high.size
    for r in range(n):
        row, out = x[at + r * C:at + (r + 1) * C], y[at + r * C:at + (r + 1) * C]
        for c in range(C):
            out[c] = (row[c] - high[c] - low[c]) * scale[c] + shift[c]


def _in_chunks(name, normalize):
    def in_chunks(x, gamma, beta, R, C, y):
        """Statistics of chunks of rows, all of them merged, then y."""
        K = (R + CHUNK - 1) // CHUNK
        means, squares = np.empty((K, C)), np.empty((K, C))
        mean, var = np.zeros(C), np.zeros(C)
        for k in prange(K):
            _rows_statistics(x, k * CHUNK * C, min(CHUNK, R - k * CHUNK), means[k], squares[k])
        _merge_all(means, squares, R, mean, var)
        high = mean.astype(np.float32)
        low = (mean - high).astype(np.float32)
        scale = (gamma / np.sqrt(var + EPS)).astype(np.float32)
        for k in prange(K):
            normalize(x, k * CHUNK * C, min(CHUNK, R - k * CHUNK), high, low, scale, beta, y)
    return Kernel(in_chunks, name)


_row_by_row = _in_chunks("row by row", _rows_normalize)


def rows(x, gamma, beta):
    y = np.empty_like(x)
    _row_by_row(_rows(x).reshape(-1), gamma, beta, *_rows(x).shape, _rows(y).reshape(-1))
    return y


def pooled(x, gamma, beta):
    y = memory.empty_like(x)
    _row_by_row(_rows(x).reshape(-1), gamma, beta, *_rows(x).shape, _rows(y).reshape(-1))
    return y


@device
def _stream_rows(x, at, n, high, low, scale, shift, y):
    C, W = high.size, simd.lanes(x)
    for i in range(at, at + n * C, C):
        for c in range(0, C, W):
            v = simd.load(x, i + c) - simd.load(high, c) - simd.load(low, c)
            simd.stream(y, i + c, simd.fma(v, simd.load(scale, c), simd.load(shift, c)))


_streamed_rows = _in_chunks("rows, streamed", _stream_rows)


def streamed(x, gamma, beta, work=0):
    y = memory.empty_like(x)
    loop = _streamed_rows if aligned(y, x.shape[1]) else _row_by_row
    loop(_rows(x).reshape(-1), gamma, beta, *_rows(x).shape, _rows(y).reshape(-1), work=work)
    return y


def threads(x, gamma, beta):
    return streamed(x, gamma, beta, work=3 * x.nbytes)
