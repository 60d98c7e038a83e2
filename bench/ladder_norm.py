"""Batch norm made fast a step at a time, as docs/batch-norm-ladder.md tells it.

Every rung is y = f(x, gamma, beta) for x (N, C, H, W) in NCHW memory, with the statistics of x, in
float32; ``ladder_rows.py`` is the same for channels-last memory. What else a real kernel must do is
in ``kernels/cpu/batch_norm.py``.
"""

import numpy as np
from nbgrad.kernels import cpu
from nbgrad.kernels.cpu import memory, simd
from nbgrad.kernels.cpu.jit import device, kernel, prange

__all__ = ["EPS", "aligned", "chunks", "merge", "numpy_formula", "one_pass", "pooled", "shipped",
           "streamed", "threads", "together", "two_passes", "vectors"]

EPS = 1e-5
TOGETHER = 8           # channels: 3.2 MB of 32 × 56 × 56 float32, read in runs of 100 KB


def numpy_formula(x, gamma, beta):
    """The definition, in operations on whole arrays."""
    mean = x.mean((0, 2, 3), keepdims=True)
    var = x.var((0, 2, 3), keepdims=True)
    return ((x - mean) / np.sqrt(var + np.float32(EPS)) * gamma[:, None, None]
            + beta[:, None, None])


@device
def _normalize(plane, mean, scale, shift, out):
    """out = (plane − mean) scale + shift."""
    for s in range(plane.size):
        out[s] = (plane[s] - mean) * scale + shift


@kernel
def _one_pass(x, gamma, beta, y):
    """var = E[x²] − E[x]², all in float32."""
    N, C, S = x.shape
    totals, squares = np.zeros((2, C), np.float32)
    for n in range(N):
        for c in range(C):
            total = square = np.float32(0)
            for v in x[n, c]:
                total += v
                square += v * v
            totals[c] += total
            squares[c] += square
    for n in range(N):
        for c in range(C):
            mean = totals[c] / np.float32(N * S)
            var = max(squares[c] / np.float32(N * S) - mean * mean, np.float32(0))
            scale = gamma[c] / np.sqrt(var + np.float32(EPS))
            _normalize(x[n, c], mean, scale, beta[c], y[n, c])


def one_pass(x, gamma, beta):
    y = np.empty_like(x)
    _one_pass(_planes(x), gamma, beta, _planes(y))
    return y


def _planes(x):
    """x as (N, C, S)."""
    return x.reshape(*x.shape[:2], -1)


@kernel
def _two_passes(x, gamma, beta, y):
    """The mean, then the squares about it, in float64."""
    N, C, S = x.shape
    mean, var = np.zeros((2, C))
    for n in range(N):
        for c in range(C):
            total = np.float64(0)
            for v in x[n, c]:
                total += v
            mean[c] += total / (N * S)
    for n in range(N):
        for c in range(C):
            square, m = np.float64(0), mean[c]
            for v in x[n, c]:
                square += (v - m) * (v - m)
            var[c] += square / (N * S)
    for n in range(N):
        for c in range(C):
            scale = gamma[c] / np.sqrt(var[c] + EPS)
            _normalize(x[n, c], mean[c], scale, beta[c], y[n, c])


def two_passes(x, gamma, beta):
    y = np.empty_like(x)
    _two_passes(_planes(x), gamma, beta, _planes(y))
    return y


@device
def _sum(x, at, n, pivot):
    """Σ (v − pivot) over x[at:at + n], in four vectors."""
    W, p = simd.lanes(x), simd.splat(pivot)
    a = b = c = d = simd.splat(np.float32(0))
    end = at + n // (4 * W) * (4 * W)
    for i in range(at, end, 4 * W):
        a = a + (simd.load(x, i) - p)
        b = b + (simd.load(x, i + W) - p)
        c = c + (simd.load(x, i + 2 * W) - p)
        d = d + (simd.load(x, i + 3 * W) - p)
    rest = np.float32(0)
    for i in range(end, at + n):
        rest += x[i] - pivot
    return simd.total((a + b) + (c + d)) + rest


@device
def _squares(x, at, n, high, low):
    """Σ (v − high − low)² over x[at:at + n], in four vectors."""
    W, h, m = simd.lanes(x), simd.splat(high), simd.splat(low)
    a = b = c = d = simd.splat(np.float32(0))
    end = at + n // (4 * W) * (4 * W)
    for i in range(at, end, 4 * W):
        p, q = simd.load(x, i) - h - m, simd.load(x, i + W) - h - m
        r, s = simd.load(x, i + 2 * W) - h - m, simd.load(x, i + 3 * W) - h - m
        a, b, c, d = simd.fma(p, p, a), simd.fma(q, q, b), simd.fma(r, r, c), simd.fma(s, s, d)
    rest = np.float32(0)
    for i in range(end, at + n):
        v = x[i] - high - low
        rest += v * v
    return simd.total((a + b) + (c + d)) + rest


def _normalizing(store):
    @device
    def normalize(x, at, n, mean, scale, shift, y):
        """y = (x − mean) scale + shift; the mean is two float32, its value and what that lacks."""
        W, high = simd.lanes(x), np.float32(mean)
        low, scale = np.float32(mean - high), np.float32(scale)
        h, m, f, s = simd.splat(high), simd.splat(low), simd.splat(scale), simd.splat(shift)
        end = at + n // (4 * W) * (4 * W)
        for i in range(at, end, 4 * W):
            p, q = simd.load(x, i) - h - m, simd.load(x, i + W) - h - m
            r, t = simd.load(x, i + 2 * W) - h - m, simd.load(x, i + 3 * W) - h - m
            store(y, i, simd.fma(p, f, s))
            store(y, i + W, simd.fma(q, f, s))
            store(y, i + 2 * W, simd.fma(r, f, s))
            store(y, i + 3 * W, simd.fma(t, f, s))
        for i in range(end, at + n):
            y[i] = (x[i] - high - low) * scale + shift
    return normalize


_stored, _streamed = _normalizing(simd.store), _normalizing(simd.stream)


@kernel
def _vectors(x, gamma, beta, N, C, S, y):
    """The two passes again, in vectors of float32."""
    mean, var = np.zeros((2, C))
    for n in range(N):
        for c in range(C):
            mean[c] += _sum(x, (n * C + c) * S, S, x[c * S]) / (N * S)
    for c in range(C):
        mean[c] += x[c * S]
    for n in range(N):
        for c in range(C):
            high = np.float32(mean[c])
            low = np.float32(mean[c] - high)
            var[c] += _squares(x, (n * C + c) * S, S, high, low) / (N * S)
    for n in range(N):
        for c in range(C):
            scale = gamma[c] / np.sqrt(var[c] + EPS)
            _stored(x, (n * C + c) * S, S, mean[c], scale, beta[c], y)


def vectors(x, gamma, beta):
    y = np.empty_like(x)
    _vectors(x.reshape(-1), gamma, beta, *_planes(x).shape, y.reshape(-1))
    return y


@device
def _chunk(x, at, n):
    """Mean of a chunk that L1 holds, and the sum of squares about it."""
    pivot = x[at]
    low = _sum(x, at, n, pivot) / np.float32(n)
    return np.float64(pivot) + low, _squares(x, at, n, pivot, low)


@device
def merge(mean, square, count, other, other_square, n):
    """Mean and squares of ``count`` values and of n others together (Chan, Golub & LeVeque)."""
    d, w = other - mean, n / (count + n)
    return mean + d * w, square + other_square + d * d * w * count


@kernel
def _chunks(x, gamma, beta, N, C, S, y):
    """One read for the statistics, one for y."""
    mean, square = np.zeros((2, C))
    for n in range(N):
        for c in range(C):
            m, s = _chunk(x, (n * C + c) * S, S)
            mean[c], square[c] = merge(mean[c], square[c], n * S, m, s, S)
    for n in range(N):
        for c in range(C):
            scale = gamma[c] / np.sqrt(square[c] / (N * S) + EPS)
            _stored(x, (n * C + c) * S, S, mean[c], scale, beta[c], y)


def chunks(x, gamma, beta):
    y = np.empty_like(x)
    _chunks(x.reshape(-1), gamma, beta, *_planes(x).shape, y.reshape(-1))
    return y


def pooled(x, gamma, beta):
    y = memory.empty_like(x)
    _chunks(x.reshape(-1), gamma, beta, *_planes(x).shape, y.reshape(-1))
    return y


@kernel
def _together(x, gamma, beta, N, C, S, past, y):
    """Eight channels' statistics, then their part of y, while the cache still has them."""
    for k in prange((C + TOGETHER - 1) // TOGETHER):
        first, last = k * TOGETHER, min(C, (k + 1) * TOGETHER)
        mean, square = np.zeros(TOGETHER), np.zeros(TOGETHER)
        for n in range(N):
            for c in range(first, last):
                m, s = _chunk(x, (n * C + c) * S, S)
                i = c - first
                mean[i], square[i] = merge(mean[i], square[i], n * S, m, s, S)
        for n in range(N):
            for c in range(first, last):
                at, i = (n * C + c) * S, c - first
                scale = gamma[c] / np.sqrt(square[i] / (N * S) + EPS)
                if past:
                    _streamed(x, at, S, mean[i], scale, beta[c], y)
                else:
                    _stored(x, at, S, mean[i], scale, beta[c], y)


def aligned(y, step):
    """Whether a vector that is stored every ``step`` values from the first on is aligned."""
    return y.ctypes.data % simd.VECTOR == 0 and step * y.itemsize % simd.VECTOR == 0


def together(x, gamma, beta, past=False, threads=False):
    y = memory.empty_like(x)
    past = past and aligned(y, x[0, 0].size)
    _together(x.reshape(-1), gamma, beta, *_planes(x).shape, past, y.reshape(-1),
              work=2 * x.nbytes if threads else 0)
    return y


def streamed(x, gamma, beta):
    return together(x, gamma, beta, past=True)


def threads(x, gamma, beta):
    return together(x, gamma, beta, past=True, threads=True)


def shipped(x, gamma, beta):
    return cpu.batch_norm(x, gamma, beta, eps=EPS)[0]
