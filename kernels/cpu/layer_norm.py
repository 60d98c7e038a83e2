"""Layer normalization: each row is read from memory once and normalized while it is in a cache.

Sums as in batch_norm.py: in the array's dtype over chunks, about a pivot close to the mean, merged
in float64; where float32 is not enough, the caller does it in float64.
"""

import math

import numpy as np

from .columns import inner
from .jit import kernel, prange
from .memory import empty_like
from .simd import (
    PAST_BYTES,
    VECTOR,
    fma,
    lanes,
    load,
    load_part,
    pointer,
    prefetch,
    splat,
    store,
    store_part,
    stream,
    total,
)

__all__ = ["layer_norm", "layer_norm_backward"]

BLOCK = 1 << 16            # elements of a task: 256 KB of float32
GROUPS = 16                # tasks of the backward at least: each has sums of its own
CHUNK = 128                # vectors, or rows, added up in the array's dtype
AHEAD = 1024
SIDE, TOGETHER = 16, 1 << 12    # rows, and elements of them, between two steps of the same row


@inner
def _about(x, at, n, pivot, one):
    """Sums of d and of d², d = x − pivot, over n values."""
    L, p = lanes(one), splat(pivot)
    s = q = r = u = p - p
    end = at + n // (2 * L) * (2 * L)
    for i in range(at, end, 2 * L):
        prefetch(x, i + AHEAD)
        prefetch(x, i + AHEAD + L)
        d, e = load(x, i) - p, load(x, i + L) - p
        s, r = s + d, r + e
        q, u = fma(d, d, q), fma(e, e, u)
    t = pointer(one)
    store(t, 0, p)                            # so that lanes behind the end are 0 − 0
    while end < at + n:
        k = min(L, at + n - end)
        d = load_part(x, end, k) - load_part(t, 0, k)
        s, q = s + d, fma(d, d, q)
        end += L
    return np.float64(total(s + r)), np.float64(total(q + u))


@inner
def _statistics(x, first, at, D, one):
    """Mean and variance of a row that begins with ``first``."""
    mean, m2, size = np.float64(first), 0.0, CHUNK * 2 * lanes(one)
    if not abs(mean) < math.inf:
        mean = 0.0
    for start in range(0, D, size):
        n = min(size, D - start)
        pivot, d, q = one.dtype.type(mean), 0.0, 0.0
        for k in range(2):
            s, q = _about(x, at + start, n, pivot, one)
            d = s / n
            q -= d * d * n
            if k == 1 or not d * d * n > 4.0 * q:
                break
            pivot = one.dtype.type(pivot + d)
        w, d = n / (start + n), pivot + d - mean
        mean += d * w
        m2 += (0.0 if q < 0.0 else q) + d * d * w * start
    return mean, m2 / D


@inner
def _words(mean, one):
    """The mean as two words, as vectors."""
    hi = one.dtype.type(mean)
    lo = one.dtype.type(mean - hi) if abs(hi) < math.inf else one.dtype.type(0)
    return splat(hi), splat(lo)


@inner
def _normalize(x, gamma, beta, at, D, mean, invstd, one, past, y):
    L, s = lanes(one), splat(one.dtype.type(invstd))
    hi, lo = _words(mean, one)
    end = D // L * L
    for j in range(0, end, L):
        v = fma(((load(x, at + j) - hi) - lo) * s, load(gamma, j), load(beta, j))
        if past:
            stream(y, at + j, v)
        else:
            store(y, at + j, v)
    if end < D:
        k = D - end
        d = ((load_part(x, at + end, k) - hi) - lo) * s
        v = fma(d, load_part(gamma, end, k), load_part(beta, end, k))
        store_part(y, at + end, v, k)


@inner
def _lost(one, var, invstd, eps):
    """Whether float32 is not enough: see batch_norm.py."""
    return one.itemsize == 4 and (invstd < 1e-12 or invstd > 1e12 or not var < math.inf
                                  or (eps < 1e-20 and var < 1e-30))


@inner
def _together(D):
    """Rows that take each step one after the other: the result of one row's step takes longer than
    the step of the next. They stay in L1."""
    return max(1, min(SIDE, TOGETHER // D))


@inner
def _forward_block(x, gamma, beta, eps, first, last, D, past, y, mean, invstd):
    one, together, bad = np.empty(16, x.dtype), _together(D), False
    for start in range(first, last, together):
        end = min(last, start + together)
        for r in range(start, end):
            m, v = _statistics(pointer(x), x[r * D], r * D, D, one)
            s = 1.0 / np.sqrt(v + eps)
            mean[r], invstd[r] = m, s
            bad |= _lost(one, v, s, eps)
        for r in range(start, end):
            _normalize(pointer(x), pointer(gamma), pointer(beta), r * D, D, mean[r], invstd[r], one,
                       past, pointer(y))
    return bad


@kernel
def _forward(x, gamma, beta, eps, R, D, block, past, y, mean, invstd):
    """Each row of x (R, D): statistics, then y = (x − mean) invstd γ + β. True if float32 is not
    enough."""
    bad = np.zeros((R + block - 1) // block, np.uint8)
    for t in prange(bad.size):
        first = np.int64(t) * block
        bad[t] = _forward_block(x, gamma, beta, eps, first, min(R, first + block), D, past, y, mean,
                                invstd)
    return bad.sum() > 0


@inner
def _times(a, b, zero):
    """a b, rounded. LLVM would contract a * b − c, and g − mean(g) of equal g must be exactly 0."""
    return fma(a, b, zero)


@inner
def _products(x, dy, gamma, at, D, mean, invstd, one, sums):
    """Sums of g = γ dy and of g x̂ over a row; dy x̂ and dy are added to the columns of ``sums``."""
    L, s = lanes(one), splat(one.dtype.type(invstd))
    hi, lo = _words(mean, one)
    sum_g, sum_p, zero = 0.0, 0.0, splat(one.dtype.type(0))
    for start in range(0, D, CHUNK * L):
        a = p = zero
        for j in range(start, min(D, start + CHUNK * L), L):
            k = D - j
            if k >= L:
                xhat, d = ((load(x, at + j) - hi) - lo) * s, load(dy, at + j)
                g = _times(d, load(gamma, j), zero)
                store(sums, j, fma(d, xhat, load(sums, j)))
                store(sums, D + j, load(sums, D + j) + d)
            else:
                xhat, d = ((load_part(x, at + j, k) - hi) - lo) * s, load_part(dy, at + j, k)
                g = _times(d, load_part(gamma, j, k), zero)
                store_part(sums, j, fma(d, xhat, load_part(sums, j, k)), k)
                store_part(sums, D + j, load_part(sums, D + j, k) + d, k)
            a, p = a + g, fma(g, xhat, p)
        sum_g += np.float64(total(a))
        sum_p += np.float64(total(p))
    return sum_g, sum_p


@inner
def _slope(x, dy, gamma, at, D, mean, invstd, mean_g, mean_p, one, past, dx):
    """dx = (g − mean(g) − x̂ mean(g x̂)) invstd."""
    L, s = lanes(one), splat(one.dtype.type(invstd))
    hi, lo = _words(mean, one)
    a, b = splat(one.dtype.type(mean_g)), splat(one.dtype.type(-mean_p))
    zero = splat(one.dtype.type(0))
    end = D // L * L
    for j in range(0, end, L):
        xhat = ((load(x, at + j) - hi) - lo) * s
        v = fma(xhat, b, _times(load(dy, at + j), load(gamma, j), zero) - a) * s
        if past:
            stream(dx, at + j, v)
        else:
            store(dx, at + j, v)
    if end < D:
        k = D - end
        xhat = ((load_part(x, at + end, k) - hi) - lo) * s
        g = _times(load_part(dy, at + end, k), load_part(gamma, end, k), zero)
        store_part(dx, at + end, fma(xhat, b, g - a) * s, k)


@inner
def _backward_block(x, dy, gamma, mean, invstd, first, last, D, past, blocks, base, dx):
    """dx, and the sums of the columns into blocks[base] and behind."""
    one, sums, means = np.empty(16, x.dtype), np.zeros(2 * D, x.dtype), np.empty(2 * SIDE)
    together, bad = _together(D), False
    for j in range(2 * D):
        blocks[base + j] = 0.0
    for start in range(first, last, together):
        end = min(last, start + together)
        for r in range(start, end):
            g, p = _products(pointer(x), pointer(dy), pointer(gamma), r * D, D, mean[r], invstd[r],
                             one, pointer(sums))
            means[r - start], means[SIDE + r - start] = g / D, p / D
            bad |= one.itemsize == 4 and not (abs(g) + abs(p) < math.inf
                                              and 1e-12 < invstd[r] < 1e12)
        for r in range(start, end):
            _slope(pointer(x), pointer(dy), pointer(gamma), r * D, D, mean[r], invstd[r],
                   means[r - start], means[SIDE + r - start], one, past, pointer(dx))
        if (end - first) // CHUNK > (start - first) // CHUNK or end == last:
            for j in range(2 * D):
                blocks[base + j] += sums[j]
                sums[j] = 0
    return bad


@kernel
def _backward(x, dy, gamma, mean, invstd, R, D, block, past, blocks, dx, dgamma, dbeta):
    """Rows of dx, and dγ and dβ: sums over rows in the array's dtype, over blocks in float64. True
    if float32 is not enough."""
    bad = np.zeros(blocks.size // (2 * D), np.uint8)
    for t in prange(bad.size):
        first = np.int64(t) * block
        bad[t] = _backward_block(x, dy, gamma, mean, invstd, first, min(R, first + block), D, past,
                                 blocks, np.int64(t) * 2 * D, dx)
    for j in range(2 * D):
        a = 0.0
        for b in range(bad.size):
            a += blocks[b * 2 * D + j]
        if j < D:
            dgamma[j] = a
        else:
            dbeta[j - D] = a
    return bad.sum() > 0


def _gain(a, D, dtype, missing):
    """γ or β as one axis; ones or zeros for None."""
    return np.full(D, missing, dtype) if a is None else np.ascontiguousarray(a, dtype).reshape(D)


def _flat(x, dtype):
    return np.ascontiguousarray(x, dtype).reshape(-1)


def _past(y, D):
    return y.nbytes > PAST_BYTES and D % (VECTOR // y.itemsize) == 0


def _as(y, out):
    """The values of ``out`` in y, in y's memory order."""
    with np.errstate(all="ignore"):
        y[...] = out.reshape(y.shape)
    return y


def layer_norm(x, gamma, beta, *, dims, eps):
    """y = x̂ γ + β with the statistics of each row (the last dims axes); mean, invstd: (rows,)."""
    lead, shape = x.shape[:x.ndim - dims], x.shape[x.ndim - dims:]
    R, D = math.prod(lead), math.prod(shape)
    if not x.size:
        return empty_like(x), np.zeros(R), np.full(R, 1 / math.sqrt(eps) if eps else math.inf)
    mean, invstd = np.empty(R), np.empty(R)
    y = empty_like(x)
    out = y.reshape(-1) if y.flags.c_contiguous else np.empty(x.size, x.dtype)
    if _forward(_flat(x, x.dtype), _gain(gamma, D, x.dtype, 1), _gain(beta, D, x.dtype, 0), eps, R,
                D, max(1, BLOCK // D), _past(y, D) and y.flags.c_contiguous, out, mean, invstd,
                work=2 * x.nbytes):
        wide = [None if a is None else a.astype(np.float64) for a in (x, gamma, beta)]
        out, mean, invstd = layer_norm(*wide, dims=dims, eps=eps)
        return _as(y, out), mean, invstd
    return y if y.flags.c_contiguous else _as(y, out), mean, invstd


def layer_norm_backward(dy, x, gamma, mean, invstd, *, dims):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂, dβ = Σ dy over rows."""
    shape, dtype = x.shape[x.ndim - dims:], x.dtype
    D = math.prod(shape)
    dx = empty_like(x)
    if not x.size:
        return dx, np.zeros(shape, dtype), np.zeros(shape, dtype)
    R = x.size // D
    block = max(1, BLOCK // D, -(-R // GROUPS))
    out = dx.reshape(-1) if dx.flags.c_contiguous else np.empty(x.size, dtype)
    dgamma, dbeta = np.empty(shape, dtype), np.empty(shape, dtype)
    mean, invstd = (a if a.dtype == np.float64 and a.flags.carray else np.array(a, np.float64)
                    for a in (mean, invstd))
    if _backward(_flat(x, dtype), _flat(dy, dtype), _gain(gamma, D, dtype, 1), mean, invstd, R, D,
                 block, _past(dx, D) and dx.flags.c_contiguous, np.empty(-(-R // block) * 2 * D),
                 out, dgamma.reshape(-1), dbeta.reshape(-1), work=3 * x.nbytes):
        wide = [None if a is None else a.astype(np.float64) for a in (dy, x, gamma)]
        grads = layer_norm_backward(*wide, mean, invstd, dims=dims)
        return tuple(_as(a, b) for a, b in zip((dx, dgamma, dbeta), grads))
    return dx if dx.flags.c_contiguous else _as(dx, out), dgamma, dbeta
