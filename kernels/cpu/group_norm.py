"""Group normalization: each sample's group is read from memory once and normalized while it is in a
cache. x is (N, C, *S) in either memory format, which the result keeps.

In NCHW memory a group is a row, and its channels are planes with constants of their own. In
channels-last memory a sample is a matrix whose columns are channels: their statistics are batch
norm's, merged over the channels of a group in float64; a large sample is cut into blocks of pixels.
Groups that leave the range of float32, or hold a NaN or an infinity, are done again in float64, and
they alone.
"""

import math

import numpy as np

from .batch_norm import SLAB_BYTES, _constants, _spread, _statistics, _sums, _table, _unpack
from .columns import INV, MEAN_DY, inner, normalize, normalize_backward
from .jit import kernel, prange
from .layer_norm import (
    BLOCK,
    CHUNK,
    _about,
    _lost,
    _statistics as _row_statistics,
    normalize_rows,
    normalize_rows_backward,
)
from .memory import empty_like
from .norm import _dense, _flat, _flat_as, _vector, _writable
from .simd import (
    PAST_BYTES,
    VECTOR,
    fill,
    fma,
    lanes,
    load,
    load_part,
    pointer,
    put,
    splat,
    store_part,
    total,
)

__all__ = ["group_norm", "group_norm_backward"]

BLOCK_BYTES = 1 << 19      # pixels of a large channels-last sample that make one task


# -------------------------------------------------------------------------------------- NCHW memory

@inner
def _statistics_of(x, first, at, n, inverse, one):
    """Mean and variance of a row that begins with ``first``; ``inverse`` is 1 / n. In one chunk, a
    division and a square root are all that the row waits for."""
    if n <= 2 * CHUNK * lanes(one) and abs(first) < math.inf:
        s, q = _about(x, at, n, first, one)
        d = s * inverse
        q -= d * d * n
        if not d * d * n > 4.0 * q:
            return first + d, (0.0 if q < 0.0 else q) * inverse
    return _row_statistics(x, first, at, n, one)


@inner
def _planes(x, gamma, beta, at, c, D, S, mean, invstd, one, past, y):
    """y = (x − hi) scale + shift over planes; the mean's second word, below a standard deviation
    of any float32 values, is part of the shift."""
    L, hi = lanes(one), one.dtype.type(mean)
    lo = mean - hi if abs(hi) < math.inf else 0.0
    pivot, n = splat(hi), S % L
    for k in range(c, c + D):
        scale = gamma[k] * invstd
        a, b, end = fill(x, scale), fill(x, beta[k] - lo * scale), at + S // L * L
        for i in range(at, end, L):
            put(y, i, fma(load(x, i) - pivot, a, b), past)
        if n:
            store_part(y, end, fma(load_part(x, end, n) - pivot, a, b), n)
        at += S


@inner
def _forward_rows(x, gamma, beta, eps, center, b, block, G, C, S, past, y, mean, invstd, bad):
    """Statistics and y of a block of rows, a row being a sample's group."""
    one, D, n = np.empty(16, x.dtype), C // G, C // G * S
    inverse = 1.0 / n
    for r in range(b * block, min(mean.size, (b + 1) * block)):
        m, v = _statistics_of(pointer(x), x[r * n], r * n, n, inverse, one)
        if not center:
            m, v = 0.0, v + m * m
        s = 1.0 / np.sqrt(v + eps)
        mean[r], invstd[r], bad[r] = m, s, _lost(one, v, s, eps)
        _planes(pointer(x), gamma, beta, r * n, r % G * D, D, S, m, s, one, past, pointer(y))


@kernel
def _forward_planes(x, gamma, beta, eps, center, block, G, C, S, past, y, mean, invstd, bad):
    """y and the statistics of the rows of x (N G, C / G S); which of them float32 is not enough
    for. True if there are such."""
    for b in prange((mean.size + block - 1) // block):
        _forward_rows(x, gamma, beta, eps, center, np.int64(b), block, G, C, S, past, y, mean,
                      invstd, bad)
    return bad.sum() > 0


@inner
def _plane_sums(x, dy, at, S, pivot, one):
    """Σ dy and Σ dy (x − pivot) over one plane."""
    L, p = lanes(one), splat(pivot)
    zero, sum_dy, sum_p, last = fill(x, 0), 0.0, 0.0, at + S
    while at < last:
        a = b = q = r = zero
        end = min(last, at + 2 * CHUNK * L)
        while at + 2 * L <= end:
            d, e = load(dy, at), load(dy, at + L)
            a, b = a + d, b + e
            q = fma(d, load(x, at) - p, q)
            r = fma(e, load(x, at + L) - p, r)
            at += 2 * L
        if at + L <= end:
            d = load(dy, at)
            a, q = a + d, fma(d, load(x, at) - p, q)
            at += L
        if at < end:
            d = load_part(dy, at, end - at)
            b, r = b + d, fma(d, load_part(x, at, end - at) - p, r)
            at = end
        sum_dy += np.float64(total(a + b))
        sum_p += np.float64(total(q + r))
    return sum_dy, sum_p


@inner
def _row_sums(x, dy, gamma, at, c, D, S, mean, invstd, one, r, sum_p, sum_dy):
    """Σ dy x̂ and Σ dy of each plane of row r; their sums weighted by γ."""
    hi, g, p = one.dtype.type(mean), 0.0, 0.0
    lo = mean - hi if abs(hi) < math.inf else 0.0
    for k in range(D):
        a, q = _plane_sums(x, dy, at + k * S, S, hi, one)
        q = (q - lo * a) * invstd
        sum_p[r * D + k], sum_dy[r * D + k] = q, a
        g += gamma[c + k] * a
        p += gamma[c + k] * q
    return g, p


@inner
def _slopes(gamma, invstd, mean_g, mean_p, one):
    """dx = (dy − pivot) scale + x̂ slope + rest. The pivot cancels in exact arithmetic; it keeps the
    digits of a dy that is large against its spread."""
    scale, pivot = gamma * invstd, 0.0
    if mean_g != 0.0 and gamma != 0.0:
        pivot = np.float64(one.dtype.type(mean_g / gamma))
        if not abs(pivot) < 1e30:
            pivot = 0.0
    return pivot, scale, -invstd * mean_p, scale * pivot - invstd * mean_g


@inner
def _row_slope(x, dy, gamma, at, c, D, S, mean, invstd, mean_g, mean_p, one, past, dx):
    """dx of the planes of a row."""
    L, hi, n = lanes(one), one.dtype.type(mean), S % lanes(one)
    lo = mean - hi if abs(hi) < math.inf else 0.0
    center = splat(hi)
    for k in range(c, c + D):
        pivot, scale, slope, rest = _slopes(np.float64(gamma[k]), invstd, mean_g, mean_p, one)
        slope *= invstd
        p, a, b, e = fill(x, pivot), fill(x, scale), fill(x, slope), fill(x, rest - lo * slope)
        end = at + S // L * L
        for i in range(at, end, L):
            put(dx, i, fma(load(dy, i) - p, a, fma(load(x, i) - center, b, e)), past)
        if n:
            d = load_part(x, end, n) - center
            store_part(dx, end, fma(load_part(dy, end, n) - p, a, fma(d, b, e)), n)
        at += S


@inner
def _unfit(one, sum_g, sum_p, invstd):
    """Whether float32 is not enough for the gradients of a group, products of two invstd among
    the constants."""
    return one.itemsize == 4 and not (abs(sum_g) + abs(sum_p) < 1e37 and 1e-9 < invstd < 1e9)


@inner
def _backward_rows(x, dy, gamma, mean, invstd, center, b, block, G, C, S, past, dx, sum_p, sum_dy,
                   bad):
    """dx of a block of rows, and Σ dy x̂ and Σ dy of their planes."""
    one, D = np.empty(16, x.dtype), C // G
    inverse = 1.0 / (D * S)
    for r in range(b * block, min(mean.size, (b + 1) * block)):
        at, c, m, s = r * D * S, r % G * D, mean[r], invstd[r]
        g, p = _row_sums(pointer(x), pointer(dy), gamma, at, c, D, S, m, s, one, r, sum_p, sum_dy)
        bad[r] = _unfit(one, g, p, s)
        _row_slope(pointer(x), pointer(dy), gamma, at, c, D, S, m, s,
                   g * inverse if center else 0.0, p * inverse, one, past, pointer(dx))


@kernel
def _backward_planes(x, dy, gamma, mean, invstd, center, block, G, C, S, past, dx, sum_p, sum_dy,
                     bad):
    """dx, and sums over planes; which rows float32 is not enough for. True if there are such."""
    for b in prange((mean.size + block - 1) // block):
        _backward_rows(x, dy, gamma, mean, invstd, center, np.int64(b), block, G, C, S, past, dx,
                       sum_p, sum_dy, bad)
    return bad.sum() > 0


# ----------------------------------------------------------------------------- channels-last memory

@inner
def _merge(block_mean, block_m2, n, B, rows, S, C, eps, center, mean, invstd, bad, one):
    """Statistics of the groups of sample n from those of its channels, block by block."""
    G = mean.shape[1]
    D = C // G
    inverse = 1.0 / (D * S)
    for g in range(G):
        at, d, q = n * B * C + g * D, 0.0, 0.0
        pivot = block_mean[at]
        for b in range(B):
            k = min(rows, S - b * rows) * inverse
            for c in range(at + b * C, at + b * C + D):
                d += k * (block_mean[c] - pivot)
        m = pivot + d
        for b in range(B):
            k = min(rows, S - b * rows)
            for c in range(at + b * C, at + b * C + D):
                q += block_m2[c] + k * (block_mean[c] - m) ** 2
        v = q * inverse
        if not center:
            m, v = 0.0, v + m * m
        s = 1.0 / np.sqrt(v + eps)
        mean[n, g], invstd[n, g], bad[n, g] = m, s, _lost(one, v, s, eps)


@inner
def _of_channels(mean, invstd, n, D, m, s):
    """mean and invstd of each channel's group in sample n."""
    for g in range(mean.shape[1]):
        for c in range(g * D, (g + 1) * D):
            m[c], s[c] = mean[n, g], invstd[n, g]


@inner
def _forward_pixels(x, gamma, beta, eps, center, packed, t, per, collect, B, rows, S, option, y,
                    mean, invstd, bad, block_mean, block_m2):
    """Statistics of the channels in blocks of pixels, and y if those of the groups are known."""
    plan = _unpack(packed)
    C, step = plan.C, plan.together
    table, work, m, s = _table(x, plan, 6), np.empty(4 * step), np.empty(C), np.empty(C)
    for u in range(t * per, min(mean.shape[0] * B, (t + 1) * per)):
        n = u // B
        first = n * S + u % B * rows
        last = min(first + rows, (n + 1) * S)
        if collect:
            for c in range(0, C, step):
                _statistics(x, plan, first, last, c, min(C - c, step), table, work, block_mean,
                            block_m2, u * C + c)
            if B > 1:
                continue
            _merge(block_mean, block_m2, n, B, rows, S, C, eps, center, mean, invstd, bad, table)
        _of_channels(mean, invstd, n, C // mean.shape[1], m, s)
        for c in range(0, C, step):
            _constants(plan, gamma, beta, m, s, c, min(C - c, step), table, work)
            normalize(pointer(x), pointer(x), pointer(x), pointer(y), plan, first, last, True, c,
                      min(C - c, step), table, option)


@kernel
def _forward_columns(x, gamma, beta, eps, center, packed, per, rows, S, option, y, mean, invstd,
                     bad):
    """As _forward_planes, for x (N S, C)."""
    B, C = (S + rows - 1) // rows, gamma.size
    tasks = (mean.shape[0] * B + per - 1) // per
    block_mean, block_m2 = np.empty(mean.shape[0] * B * C), np.empty(mean.shape[0] * B * C)
    for phase in range(2 if B > 1 else 1):
        for t in prange(tasks):
            u = np.int64(t)
            if phase == 1:
                u = tasks - 1 - u
            _forward_pixels(x, gamma, beta, eps, center, packed, u, per, phase == 0, B, rows, S,
                            option, y, mean, invstd, bad, block_mean, block_m2)
        if phase == 0 and B > 1:
            for n in range(mean.shape[0]):
                _merge(block_mean, block_m2, n, B, rows, S, C, eps, center, mean, invstd, bad, x)
    return bad.sum() > 0


@inner
def _group_sums(gamma, sum_p, sum_dy, n, B, C, inverse, invstd, center, g, p, bad, one):
    """Means of γ dy and γ dy x̂ over the groups of sample n."""
    D = C // g.size
    for k in range(g.size):
        a = q = 0.0
        for b in range(n * B, (n + 1) * B):
            for c in range(k * D, (k + 1) * D):
                a += gamma[c] * sum_dy[b * C + c]
                q += gamma[c] * sum_p[b * C + c]
        bad[n, k] = _unfit(one, a, q, invstd[n, k])
        g[k], p[k] = a * inverse if center else 0.0, q * inverse


@inner
def _spread_slopes(plan, gamma, invstd, g, p, c, channels, table, work):
    """Lines MEAN_DY, SLOPE and REST of the table for the channels from c on."""
    D = plan.C // g.size
    j, left = c // D, D - c % D
    for k in range(channels):
        if left == 0:
            j, left = j + 1, D
        left -= 1
        a, _, b, e = _slopes(np.float64(gamma[c + k]), invstd[c + k], g[j], p[j], table)
        work[k], work[channels + k], work[2 * channels + k] = a, b, e
    for line in range(3):
        _spread(work, line * channels, channels, plan, table, MEAN_DY + line)


@inner
def _all_constants(plan, gamma, m, s, c, channels, table, work):
    _constants(plan, gamma, gamma, m, s, c, channels, table, work)
    _spread(s, c, channels, plan, table, INV)


@inner
def _backward_pixels(x, dy, gamma, mean, invstd, center, packed, t, per, collect, B, rows, S,
                     option, dx, sum_p, sum_dy, bad):
    """Sums of the channels in blocks of pixels, and dx if those of the groups are known."""
    plan, G = _unpack(packed), mean.shape[1]
    C, step = plan.C, plan.together
    inverse, g, p = 1.0 / (C // G * S), np.empty(G), np.empty(G)
    table, work, m, s = _table(x, plan, 10), np.empty(4 * step), np.empty(C), np.empty(C)
    for u in range(t * per, min(mean.shape[0] * B, (t + 1) * per)):
        n = u // B
        first = n * S + u % B * rows
        last = min(first + rows, (n + 1) * S)
        _of_channels(mean, invstd, n, C // G, m, s)
        for c in range(0, C if collect else 0, step):
            _all_constants(plan, gamma, m, s, c, min(C - c, step), table, work)
            _sums(x, dy, x, dx, plan, first, last, c, min(C - c, step), table, work, 0, sum_dy,
                  sum_p, u * C + c)
        if collect and B > 1:
            continue
        _group_sums(gamma, sum_p, sum_dy, n, B, C, inverse, invstd, center, g, p, bad, table)
        for c in range(0, C, step):
            if not collect or step < C:
                _all_constants(plan, gamma, m, s, c, min(C - c, step), table, work)
            _spread_slopes(plan, gamma, s, g, p, c, min(C - c, step), table, work)
            normalize_backward(pointer(x), pointer(dy), pointer(dx), pointer(x), plan, first, last,
                               True, c, min(C - c, step), table, option)


@kernel
def _backward_columns(x, dy, gamma, mean, invstd, center, packed, per, rows, S, option, dx, sum_p,
                      sum_dy, bad):
    """As _backward_planes, for x (N S, C); sums over the pixels of a block."""
    B = (S + rows - 1) // rows
    tasks = (mean.shape[0] * B + per - 1) // per
    for phase in range(2 if B > 1 else 1):
        for t in prange(tasks):
            u = np.int64(t)
            if phase == 1:
                u = tasks - 1 - u
            _backward_pixels(x, dy, gamma, mean, invstd, center, packed, u, per, phase == 0, B,
                             rows, S, option, dx, sum_p, sum_dy, bad)
    return bad.sum() > 0


# ------------------------------------------------------------------------------------------ callers

def _gain(a, x, missing):
    """γ or β; ones or zeros for None."""
    return np.full(x.shape[1], missing, x.dtype) if a is None else _vector(a, x.dtype)


def _repeated(a, S):
    return a if a is None or S == 1 else np.repeat(a, S)


def _pixels(N, S, C, itemsize):
    """How a sample is cut: blocks that make one task, and pixels of a block. Not at all where it
    stays in a cache and there are enough of them; then several small ones make a task."""
    nbytes = S * C * itemsize
    if N * nbytes <= 1 << 20 or (nbytes <= SLAB_BYTES and min(16, N * nbytes >> 19) <= N):
        return max(1, (1 << 17) // nbytes), S
    rows = max(1, BLOCK_BYTES // (C * itemsize))
    return 1, rows if rows < CHUNK else rows // CHUNK * CHUNK


def _narrow(x, axes, S):
    """Whether planes are shorter than a vector: γ and β are then repeated for each value."""
    return axes is None and S * x.itemsize < VECTOR


def _past(x, S):
    return x.nbytes > PAST_BYTES and S * x.itemsize % VECTOR == 0


def group_norm(x, gamma, beta, *, groups, eps, center=True):
    """y = x̂ γ + β, mean, invstd = 1 / √(var + eps); without center, the mean counts as 0."""
    (N, C), G = x.shape[:2], groups
    if not x.size:
        return (empty_like(x), np.zeros((N, G)),
                np.full((N, G), 1 / math.sqrt(eps) if eps else math.inf))
    x, (axes, how, past) = _dense(x)
    S = x.size // (N * C)
    if _narrow(x, axes, S):
        y, *stats = normalize_rows(x, _repeated(gamma, S), _repeated(beta, S), N * G, C // G * S,
                                   eps, center, G)
        return y, *(a.reshape(N, G) for a in stats)
    y, mean, invstd, bad = empty_like(x), np.empty((N, G)), np.empty((N, G)), np.empty((N, G), bool)
    gains, flat, out = (_gain(gamma, x, 1), _gain(beta, x, 0)), _flat(x, axes), _flat(y, axes)
    if axes is None:
        lost = _forward_planes(flat, *gains, eps, center, max(1, BLOCK * G // (C * S)), G, C, S,
                               _past(x, S), out, mean.reshape(-1), invstd.reshape(-1),
                               bad.reshape(-1), work=2 * x.nbytes)
    else:
        lost = _forward_columns(flat, *gains, eps, center, how, *_pixels(N, S, C, x.itemsize), S,
                                past, out, mean, invstd, bad, work=2 * x.nbytes)
    if lost:
        _forward_again(x, gains, bad, groups, eps, center, y, mean, invstd)
    return y, mean, invstd


def _parted(a, G):
    """(N, C, *S) as (N, G, C / G, *S), in the same memory."""
    return a.reshape(a.shape[0], G, a.shape[1] // G, *a.shape[2:])


def _forward_again(x, gains, bad, G, eps, center, y, mean, invstd):
    """The groups that ``bad`` marks, in float64."""
    some = bad.any(1)
    wide = group_norm(x[some].astype(np.float64), *(a.astype(np.float64) for a in gains), groups=G,
                      eps=eps, center=center)
    with np.errstate(all="ignore"):
        _parted(y, G)[bad] = _parted(wide[0], G)[bad[some]]
    mean[bad], invstd[bad] = wide[1][bad[some]], wide[2][bad[some]]


def group_norm_backward(dy, x, gamma, mean, invstd, *, groups, center=True):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy, no mean(g) without center;
    dγ = Σ dy x̂ and dβ = Σ dy over N and S."""
    (N, C), G, dtype = x.shape[:2], groups, x.dtype
    if not x.size:
        return empty_like(x), np.zeros(C, dtype), np.zeros(C, dtype)
    x, (axes, how, past) = _dense(x)
    S = x.size // (N * C)
    mean, invstd = _writable(mean, np.float64), _writable(invstd, np.float64)
    if _narrow(x, axes, S):
        dx, *sums = normalize_rows_backward(dy, x, _repeated(gamma, S), mean.reshape(-1),
                                            invstd.reshape(-1), N * G, C // G * S, center, G)
        return dx, *(a if S == 1 else a.reshape(C, S).sum(1) for a in sums)
    per, rows = (1, S) if axes is None else _pixels(N, S, C, x.itemsize)
    dx, bad, parts = empty_like(x), np.empty((N, G), bool), np.empty((2, N * -(-S // rows), C))
    flat, sums = (_flat(x, axes), _flat_as(dy, x, axes), _gain(gamma, x, 1)), parts.reshape(2, -1)
    if axes is None:
        lost = _backward_planes(*flat, mean.reshape(-1), invstd.reshape(-1), center,
                                max(1, BLOCK * G // (C * S)), G, C, S, _past(x, S), _flat(dx, axes),
                                *sums, bad.reshape(-1), work=3 * x.nbytes)
    else:
        lost = _backward_columns(*flat, mean, invstd, center, how, per, rows, S, past,
                                 _flat(dx, axes),
                                 *sums, bad, work=3 * x.nbytes)
    with np.errstate(all="ignore"):
        dgamma, dbeta = parts.sum(1).astype(dtype)
    if lost:
        _backward_again(dy, x, flat[2], mean, invstd, bad, center, dx, dgamma, dbeta)
    return dx, dgamma, dbeta


def _backward_again(dy, x, gamma, mean, invstd, bad, center, dx, dgamma, dbeta):
    """The groups that ``bad`` marks in any sample, in float64."""
    G = bad.shape[1]
    some = bad.any(0)
    wide = [_parted(a, G)[:, some].astype(np.float64) for a in (dy, x, gamma[None])]
    dy, x, gamma = (a.reshape(a.shape[0], -1, *a.shape[3:]) for a in wide)
    grads = group_norm_backward(dy, x, gamma[0], mean[:, some], invstd[:, some], center=center,
                                groups=int(some.sum()))
    with np.errstate(all="ignore"):
        _parted(dx, G)[bad] = _parted(grads[0], len(mean[0, some]))[bad[:, some]]
        for out, sums in zip((dgamma, dbeta), grads[1:]):
            out.reshape(G, -1)[some] = sums.reshape(int(some.sum()), -1)
