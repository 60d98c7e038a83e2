"""Layer and RMS normalization: each row is read from memory once and normalized while it is in a
cache. Without ``center`` the mean counts as 0: RMS normalization. With ``G`` above 1, γ and β are
those of G rows, which take turns; ``S`` values after each other have the same.

Sums as in batch_norm.py: in the array's dtype over chunks, about a pivot close to the mean, merged
in float64; where float32 is not enough, the caller does it in float64.
"""

import math

import numpy as np

from .columns import inlined, inner, zeros
from .memory import empty, empty_like
from .simd import (
    PAST_BYTES,
    VECTOR,
    after,
    fill,
    fma,
    keep,
    lanes,
    load,
    load_or,
    load_part,
    number,
    pointer,
    prefetch,
    splat,
    store,
    store_part,
    stream,
    total,
)
from .tasks import share, tasks

__all__ = ["about", "layer_norm", "layer_norm_backward", "normalize_rows",
           "normalize_rows_backward", "rms_norm", "rms_norm_backward", "square", "statistics",
           "unfit"]

BLOCK = 1 << 16            # elements of a task: 256 KB of float32
GROUPS = 16                # tasks of the backward at most: each has sums of its own
CHUNK = 128                # vectors, or rows, added up in the array's dtype
AHEAD = 1024
SIDE, TOGETHER = 16, 1 << 12    # rows, and elements of them, between two steps of the same row
u = np.uintp               # an index that is not negative


@inner
def about(x, at, n, pivot):
    """Sums of d and of d², d = x − pivot, over n values."""
    L, p = lanes(x), fill(x, pivot)
    s = q = r = u = p - p
    end = at + n // (2 * L) * (2 * L)
    for i in range(at, end, 2 * L):
        prefetch(x, i + AHEAD)
        prefetch(x, i + AHEAD + L)
        d, e = load(x, i) - p, load(x, i + L) - p
        s, r = s + d, r + e
        q, u = fma(d, d, q), fma(e, e, u)
    while end < at + n:
        d = load_or(x, end, min(L, at + n - end), p) - p          # 0 in lanes behind the end
        s, q = s + d, fma(d, d, q)
        end += L
    return np.float64(total(s + r)), np.float64(total(q + u))


@inner
def statistics(x, at, D):
    """Mean and variance of a row."""
    mean, m2, size = np.float64(x[at]), 0.0, CHUNK * 2 * lanes(x)
    if not abs(mean) < math.inf:
        mean = 0.0
    for start in range(0, D, size):
        n = min(size, D - start)
        pivot, d, q = number(x, mean), 0.0, 0.0
        for k in range(2):
            s, q = about(x, at + start, n, pivot)
            d = s / n
            q -= d * d * n
            if k == 1 or not d * d * n > 4.0 * q:
                break
            pivot = number(x, pivot + d)
        w, d = n / (start + n), pivot + d - mean
        mean += d * w
        m2 += (0.0 if q < 0.0 else q) + d * d * w * start
    return mean, m2 / D


@inner
def square(x, at, D):
    """Mean of x² over a row."""
    sums, size = 0.0, CHUNK * 2 * lanes(x)
    for start in range(0, D, size):
        sums += about(x, at + start, min(size, D - start), number(x, 0.0))[1]
    return sums / D


@inner
def _words(x, mean, invstd):
    """The mean as two words, and invstd, as vectors of x's dtype."""
    hi = number(x, mean)
    return splat(hi), fill(x, mean - hi if abs(hi) < math.inf else 0.0), fill(x, invstd)


@inner
def _normalize(x, gamma, beta, at, c, D, mean, invstd, past, y):
    """y of a row whose γ and β begin at c."""
    L, (hi, lo, s) = lanes(x), _words(x, mean, invstd)
    end = D // L * L
    for j in range(0, end, L):
        v = fma(((load(x, at + j) - hi) - lo) * s, load(gamma, c + j), load(beta, c + j))
        if past:
            stream(y, at + j, v)
        else:
            store(y, at + j, v)
    if end < D:
        k = D - end
        d = ((load_part(x, at + end, k) - hi) - lo) * s
        v = fma(d, load_part(gamma, c + end, k), load_part(beta, c + end, k))
        store_part(y, at + end, v, k)


@inner
def unfit(itemsize, var, invstd, eps):
    """Whether float32 is not enough: see batch_norm.py."""
    return itemsize == 4 and (invstd < 1e-12 or invstd > 1e12 or not var < math.inf
                              or (eps < 1e-20 and var < 1e-30))


@inner
def _together(D):
    """Rows that take each step one after the other: the result of one row's step takes longer than
    the step of the next. They stay in L1."""
    return max(1, min(SIDE, TOGETHER // D))


@inner
def _forward_block(x, gamma, beta, eps, center, first, last, D, G, past, y, mean, invstd):
    together, bad = _together(D), False
    for start in range(first, last, together):
        end = min(last, start + together)
        for r in range(start, end):
            m, v = 0.0, 0.0
            if center:
                m, v = statistics(pointer(x), r * D, D)
            else:
                v = square(pointer(x), r * D, D)
            s = 1.0 / np.sqrt(v + eps)
            mean[r], invstd[r] = m, s
            bad |= unfit(x.itemsize, v, s, eps)
        for r in range(start, end):
            _normalize(pointer(x), pointer(gamma), pointer(beta), r * D, r % G * D, D, mean[r],
                       invstd[r], past, pointer(y))
    return bad


@inner
def _spread(a, S, out):
    """Each value S times."""
    for i in range(a.size if S > 1 else 0):
        for k in range(i * S, (i + 1) * S):
            out[k] = a[i]


@inner
def _forward_task(t, x, gamma, beta, eps, center, R, D, G, block, past, y, mean, invstd, bad):
    bad[t] = _forward_block(x, gamma, beta, eps, center, t * block, min(R, (t + 1) * block), D, G,
                            past, y, mean, invstd)


@tasks
def _forward(run, x, gamma, beta, eps, center, R, D, G, S, block, past, y, mean, invstd):
    """Each row of x (R, D): statistics, then y = (x − mean) invstd γ + β. True if float32 is not
    enough."""
    if S > 1:
        wide = np.empty(gamma.size * S, x.dtype), np.empty(beta.size * S, x.dtype)
        _spread(gamma, S, wide[0])
        _spread(beta, S, wide[1])
        gamma, beta = wide
    bad = np.zeros((R + block - 1) // block, np.uint8)
    share(_forward_task, bad.size, run,
          (x, gamma, beta, eps, center, R, D, G, block, past, y, mean, invstd, bad))
    return bad.sum() > 0


@inner
def _times(a, b, zero):
    """a b, rounded. LLVM would contract a * b − c, and g − mean(g) of equal g must be exactly 0."""
    return fma(a, b, zero)


@inlined
def _product(x, dy, i, n, row, gamma, zero, a, p, columns):
    """Adds g = γ dy and g x̂ to a row's sums and dy x̂ and dy to the columns'."""
    hi, lo, s = row
    xhat, d = ((load_part(x, i, n) - hi) - lo) * s, load_part(dy, i, n)
    g = _times(d, gamma, zero)
    return a + g, fma(g, xhat, p), (fma(d, xhat, columns[0]), columns[1] + d)


def _products_of(four):
    """Sums of g = γ dy and of g x̂ over a row, or over each of four rows that are ``step`` apart;
    dy x̂ and dy are added to the columns of ``sums``. γ begins at c."""
    @inlined
    def vector(x, dy, gamma, at, step, j, n, c, D, rows, zero, own, sums):
        i = 2 * c + j
        columns = load_part(sums, i, n), load_part(sums, D + i, n)
        g, (a, p, b, q, d, r, e, s) = load_part(gamma, c + j, n), own
        at += j
        a, p, columns = _product(x, dy, at, n, rows[0], g, zero, a, p, columns)
        if four:
            b, q, columns = _product(x, dy, at + step, n, rows[1], g, zero, b, q, columns)
            d, r, columns = _product(x, dy, at + 2 * step, n, rows[2], g, zero, d, r, columns)
            e, s, columns = _product(x, dy, at + 3 * step, n, rows[3], g, zero, e, s, columns)
        store_part(sums, i, columns[0], n)
        store_part(sums, D + i, columns[1], n)
        return a, p, b, q, d, r, e, s

    @inlined
    def add(found, k, a, p):
        found[k] += np.float64(total(a))
        found[SIDE + k] += np.float64(total(p))

    @inner
    def products(x, dy, gamma, r, G, c, D, mean, invstd, sums, found):
        L, zero, at, step = lanes(x), fill(x, 0), r * D, G * D
        row = _words(x, mean[r], invstd[r])
        rows = row, row, row, row
        if four:
            rows = (row, _words(x, mean[r + G], invstd[r + G]),
                    _words(x, mean[r + 2 * G], invstd[r + 2 * G]),
                    _words(x, mean[r + 3 * G], invstd[r + 3 * G]))
        for k in range(4 if four else 1):
            found[k] = found[SIDE + k] = 0.0
        for start in range(0, D, CHUNK * L):
            last = min(D, start + CHUNK * L)
            own, end = (zero, zero, zero, zero, zero, zero, zero, zero), last - last % L
            for j in range(start, end, L):
                own = vector(x, dy, gamma, at, step, j, L, c, D, rows, zero, own, sums)
            if end < last:
                own = vector(x, dy, gamma, at, step, end, last - end, c, D, rows, zero, own, sums)
            add(found, 0, own[0], own[1])
            if four:
                add(found, 1, own[2], own[3])
                add(found, 2, own[4], own[5])
                add(found, 3, own[6], own[7])
    return products


_products, _products_of_four = _products_of(False), _products_of(True)


@inner
def _slope(x, dy, gamma, at, c, D, mean, invstd, mean_g, mean_p, past, dx):
    """dx = (g − mean(g) − x̂ mean(g x̂)) invstd."""
    L, (hi, lo, s) = lanes(x), _words(x, mean, invstd)
    a, b, zero = fill(x, mean_g), fill(x, -mean_p), fill(x, 0)
    end = D // L * L
    for j in range(0, end, L):
        xhat = ((load(x, at + j) - hi) - lo) * s
        v = fma(xhat, b, _times(load(dy, at + j), load(gamma, c + j), zero) - a) * s
        if past:
            stream(dx, at + j, v)
        else:
            store(dx, at + j, v)
    if end < D:
        k = D - end
        xhat = ((load_part(x, at + end, k) - hi) - lo) * s
        g = _times(load_part(dy, at + end, k), load_part(gamma, c + end, k), zero)
        store_part(dx, at + end, fma(xhat, b, g - a) * s, k)


@inner
def _unfit_gradients(size, g, p, invstd):
    return size == 4 and not (abs(g) + abs(p) < math.inf and 1e-12 < invstd < 1e12)


@inner
def _backward_rows(x, dy, gamma, mean, invstd, center, first, units, n, D, G, past, sums, found,
                   dx, size):
    """dx of units of n rows, 4 or 1, that have the same γ: rows G apart. True if float32 is not
    enough."""
    together, bad = max(1, _together(D) // n), False
    for start in range(0, units, together):
        end = min(units, start + together)
        for k in range(start, end):
            r, to = first + k // G * n * G + k % G, after(found, (k - start) * n)
            if n == 4:
                _products_of_four(x, dy, gamma, r, G, k % G * D, D, mean, invstd, sums, to)
            else:
                _products(x, dy, gamma, r, G, k % G * D, D, mean, invstd, sums, to)
        for k in range(start * n, end * n):
            u, i = k // n, k - start * n
            r = first + (u // G * n + k % n) * G + u % G
            g, p = found[i], found[SIDE + i]
            bad |= _unfit_gradients(size, g, p, invstd[r])
            _slope(x, dy, gamma, r * D, u % G * D, D, mean[r], invstd[r], g / D if center else 0.0,
                   p / D, past, dx)
    return bad


@inner
def _backward_block(x, dy, gamma, mean, invstd, center, first, last, D, G, past, blocks, base, dx):
    """dx, and the sums of the columns into blocks[base] and behind."""
    width, sums, found = 2 * G * D, zeros(x, 2 * G * D), np.empty(2 * SIDE)
    bad, most = False, CHUNK * G
    for j in range(width):
        blocks[base + j] = 0.0
    for start in range(first, last, most):
        end, n = min(last, start + most), 4
        while start < end:
            units = (end - start) // (n * G) * G if n == 4 else end - start
            bad |= _backward_rows(pointer(x), pointer(dy), pointer(gamma), pointer(mean),
                                  pointer(invstd), center, start, units, n, D, G, past,
                                  pointer(sums), pointer(found), pointer(dx), x.itemsize)
            start, n = start + units * n, 1
        for j in range(width):
            blocks[u(base + j)] += sums[u(j)]
            sums[u(j)] = 0
    keep(sums)
    keep(found)
    return bad


@inner
def _column_sums(blocks, G, D, S, dgamma, dbeta):
    """dγ and dβ: blocks of 2 G lines of D sums added up, in order, S columns for a value."""
    width, to = 2 * G * D, 0
    for start in range(width, blocks.size, width):
        for j in range(width):
            blocks[u(j)] += blocks[u(start + j)]
    for line in range(0, width, 2 * D):
        for at in range(line, line + D, S):
            a = b = 0.0
            for j in range(at, at + S):
                a, b = a + blocks[u(j)], b + blocks[u(j + D)]
            dgamma[u(to)], dbeta[u(to)] = a, b
            to += 1


@inner
def _backward_task(t, x, dy, gamma, mean, invstd, center, R, D, G, block, past, blocks, dx, bad):
    bad[t] = _backward_block(x, dy, gamma, mean, invstd, center, t * block,
                             min(R, (t + 1) * block), D, G, past, blocks, t * 2 * G * D, dx)


@tasks
def _backward(run, x, dy, gamma, mean, invstd, center, R, D, G, S, block, past, blocks, dx, dgamma,
              dbeta):
    """Rows of dx, and dγ and dβ: sums over rows in the array's dtype, over blocks in float64. True
    if float32 is not enough."""
    if S > 1:
        wide = np.empty(gamma.size * S, x.dtype)
        _spread(gamma, S, wide)
        gamma = wide
    bad = np.zeros(blocks.size // (2 * G * D), np.uint8)
    share(_backward_task, bad.size, run,
          (x, dy, gamma, mean, invstd, center, R, D, G, block, past, blocks, dx, bad))
    _column_sums(blocks, G, D, S, dgamma, dbeta)
    return bad.sum() > 0


def _gain(a, n, dtype, missing):
    """γ or β as one axis; ones or zeros for None."""
    return np.full(n, missing, dtype) if a is None else np.ascontiguousarray(a, dtype).reshape(n)


def _flat(x, dtype):
    return np.ascontiguousarray(x, dtype).reshape(-1)


def _past(y, D):
    return y.nbytes > PAST_BYTES and D % (VECTOR // y.itemsize) == 0


def _as(y, out):
    """The values of ``out`` in y, in y's memory order."""
    with np.errstate(all="ignore"):
        y[...] = out.reshape(y.shape)
    return y


def normalize_rows(x, gamma, beta, R, D, eps, center=True, G=1, S=1):
    """y = x̂ γ + β with the statistics of each of R rows of D values; mean, invstd: (R,)."""
    if not x.size:
        return empty_like(x), np.zeros(R), np.full(R, 1 / math.sqrt(eps) if eps else math.inf)
    mean, invstd, n = np.empty(R), np.empty(R), G * D // S
    y = empty_like(x)
    out = y.reshape(-1) if y.flags.c_contiguous else np.empty(x.size, x.dtype)
    if _forward(_flat(x, x.dtype), _gain(gamma, n, x.dtype, 1), _gain(beta, n, x.dtype, 0), eps,
                center, R, D, G, S, max(1, BLOCK // D), _past(y, D) and y.flags.c_contiguous, out,
                mean, invstd, work=2 * x.nbytes):
        wide = [None if a is None else a.astype(np.float64) for a in (x, gamma, beta)]
        out, mean, invstd = normalize_rows(*wide, R, D, eps, center, G, S)
        return _as(y, out), mean, invstd
    return y if y.flags.c_contiguous else _as(y, out), mean, invstd


def normalize_rows_backward(dy, x, gamma, mean, invstd, R, D, center=True, G=1, S=1):
    """dx, and dγ and dβ as (G D / S,)."""
    dtype, n = x.dtype, G * D // S
    dx = empty_like(x)
    if not x.size:
        return dx, np.zeros(n, dtype), np.zeros(n, dtype)
    block = -(-max(1, BLOCK // D, -(-R // GROUPS)) // G) * G
    out = dx.reshape(-1) if dx.flags.c_contiguous else np.empty(x.size, dtype)
    dgamma, dbeta = np.empty(n, dtype), np.empty(n, dtype)
    mean, invstd = (a if a.dtype == np.float64 and a.flags.carray else np.array(a, np.float64)
                    for a in (mean, invstd))
    if _backward(_flat(x, dtype), _flat(dy, dtype), _gain(gamma, n, dtype, 1), mean, invstd,
                 center, R, D, G, S, block, _past(dx, D) and dx.flags.c_contiguous,
                 empty((-(-R // block) * 2 * G * D,), np.float64), out, dgamma, dbeta,
                 work=3 * x.nbytes):
        wide = [None if a is None else a.astype(np.float64) for a in (dy, x, gamma)]
        grads = normalize_rows_backward(*wide, mean, invstd, R, D, center, G, S)
        return tuple(_as(a, b) for a, b in zip((dx, dgamma, dbeta), grads))
    return dx if dx.flags.c_contiguous else _as(dx, out), dgamma, dbeta


def _parts(x, dims):
    """How many rows x has, and how many values a row."""
    return math.prod(x.shape[:x.ndim - dims]), math.prod(x.shape[x.ndim - dims:])


def layer_norm(x, gamma, beta, *, dims, eps):
    """y = x̂ γ + β with the statistics of each row (the last dims axes); mean, invstd: (rows,)."""
    return normalize_rows(x, gamma, beta, *_parts(x, dims), eps)


def layer_norm_backward(dy, x, gamma, mean, invstd, *, dims):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂, dβ = Σ dy over rows."""
    shape = x.shape[x.ndim - dims:]
    dx, dgamma, dbeta = normalize_rows_backward(dy, x, gamma, mean, invstd, *_parts(x, dims))
    return dx, dgamma.reshape(shape), dbeta.reshape(shape)


def rms_norm(x, gamma, *, dims, eps):
    """y = x / rms γ with rms = √(mean(x²) + eps) of each row (the last dims axes);
    invrms: (rows,)."""
    y, _, invrms = normalize_rows(x, gamma, None, *_parts(x, dims), eps, False)
    return y, invrms


def rms_norm_backward(dy, x, gamma, invrms, *, dims):
    """dx = invrms (g − x̂ mean(g x̂)) with g = γ dy;  dγ = Σ dy x̂ over rows."""
    dx, dgamma, _ = normalize_rows_backward(dy, x, gamma, np.zeros(invrms.size), invrms,
                                            *_parts(x, dims), False)
    return dx, dgamma.reshape(x.shape[x.ndim - dims:])
