"""2-d convolution in channels-last memory: windows packed into rows, times the weights in tiles.

One parallel region does it all: a task packs a block of rows that stays in its core's L2 and
multiplies it at once. BLAS is not called: its threads and these would fight for the cores at every
block. Depthwise convolutions are too thin for a matrix product: depthwise.py.
K = taps × channels of a group, in the order (i, j, c).
"""

import numpy as np

from ..shapes import Conv
from .depthwise import depthwise, depthwise_input, depthwise_weight
from .jit import device, kernel, prange
from .memory import empty
from .simd import ROWS, VECTOR, half_tile, panels, tile

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]

PACK_BYTES = 1 << 19       # of packed rows per task: half of L2
SUM_ROWS = 192             # pixels added up in one tile of a weight gradient
SUM_BLOCK = 1 << 16        # values of dy per partial sum of a depthwise weight gradient


def _last(x):
    """x (N, C, H, W) as contiguous (N, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _first(y):
    return y.transpose(0, 3, 1, 2)


def _matrix(weight, g):
    """Weights (O, C/G, I, J) as (G, O/G, K)."""
    w = weight.reshape(g.G, g.O // g.G, g.C // g.G, g.I, g.J).transpose(0, 1, 3, 4, 2)
    return w.reshape(g.G, g.O // g.G, g.depth)


@device
def _copy(source, out):
    for c in range(out.size):
        out[c] = source[c]


@device
def _window(x, g, e, n, p, q, t0, t1, row):
    """row = taps t0 … t1 of output pixel (p, q) of image n in group e, zero outside x."""
    n_c, h0, w0 = g.C // g.G, p * g.sh - g.ph, q * g.sw - g.pw
    if g.G == 1 and g.dw == 1 and t1 - t0 == g.I * g.J and w0 >= 0 and w0 + g.J <= g.W:
        length = g.J * n_c
        for i in range(g.I):
            h, out = h0 + i * g.dh, row[i * length:(i + 1) * length]
            if 0 <= h < g.H:
                _copy(x[n, h].reshape(-1)[w0 * n_c:w0 * n_c + length], out)
            else:
                out[:] = 0
        return
    for t in range(t0, t1):
        h, w = h0 + t // g.J * g.dh, w0 + t % g.J * g.dw
        out = row[(t - t0) * n_c:(t - t0 + 1) * n_c]
        if 0 <= h < g.H and 0 <= w < g.W:
            _copy(x[n, h, w, e * n_c:(e + 1) * n_c], out)
        else:
            out[:] = 0


@device
def _pack(x, g, e, first, count, t0, t1, rows):
    """rows[k] = taps t0 … t1 of output pixel first + k. Counts on: a division costs 40 cycles."""
    n, pq = first // (g.P * g.Q), first % (g.P * g.Q)
    p, q = pq // g.Q, pq % g.Q
    for k in range(count):
        _window(x, g, e, n, p, q, t0, t1, rows[k])
        q += 1
        if q == g.Q:
            p, q = p + 1, 0
            if p == g.P:
                n, p = n + 1, 0


@device
def _product(a, at, row, step, K, b, bt, n, c):
    """The n columns that are needed of a tile."""
    if 2 * n > c.shape[1]:
        tile(a, at, row, step, K, b, bt, c)
    else:
        half_tile(a, at, row, step, K, b, bt, c)


@kernel
def _forward(x, weight, bias, g, block, y):
    """y (pixels, O) from weight panels (G, panels, K, W); one task per block of pixels."""
    G, P, K, W = weight.shape
    n_o = g.O // g.G
    for t in prange((y.shape[0] + block - 1) // block):
        first = t * block
        count = min(block, y.shape[0] - first)
        rows, acc = np.empty((block, K), x.dtype), np.empty((ROWS, W), x.dtype)
        for e in range(G):
            _pack(x, g, e, first, count, 0, g.I * g.J, rows)
            for p in range(P):
                o, n = e * n_o + p * W, min(W, n_o - p * W)
                shift = bias[o:o + n]
                for r in range(0, count, ROWS):
                    _product(rows.reshape(-1), r * K, K, 1, K, weight.reshape(-1),
                             (e * P + p) * K * W, n, acc)
                    for i in range(min(ROWS, count - r)):
                        out, sums = y[first + r + i, o:o + n], acc[i]
                        for c in range(n):
                            out[c] = sums[c] + shift[c]


def _block(K, itemsize):
    """Pixels per task: whole tiles, PACK_BYTES of packed rows, but two tiles at least."""
    return ROWS * max(2, PACK_BYTES // (K * itemsize * ROWS))


def conv2d(x, weight, bias=None, *, stride, padding, dilation, groups):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[o,c,i,j] x[n, c, p·s + i·d − pad, q·s + j·d − pad]."""
    g = Conv.of(x.shape, weight.shape, stride, padding, dilation, groups)
    y = empty((g.N, g.P, g.Q, g.O), x.dtype)
    shift = np.zeros(g.O, x.dtype) if bias is None else np.ascontiguousarray(bias, x.dtype)
    if y.size == 0 or g.depth == 0:
        y[...] = shift
    elif g.depthwise:
        depthwise(_last(x), _taps(weight, g), shift, g, y, work=x.nbytes + y.nbytes)
    else:
        _forward(_last(x), panels(_matrix(weight, g).transpose(0, 2, 1)), shift, g,
                 _block(g.depth, x.itemsize), y.reshape(-1, g.O), work=y.nbytes * g.depth // 8)
    return _first(y)


@kernel
def _input(dy, weight, g, dx):
    """One task per image: rows = dy w for weight panels (G, panels, O/G, W), summed into dx."""
    G, P, n_o, W = weight.shape
    count, K, n_c = g.P * g.Q, g.I * g.J * (g.C // g.G), g.C // g.G
    whole = (count + ROWS - 1) // ROWS * ROWS
    for n in prange(g.N):
        acc, rows, d = np.empty((ROWS, W), dx.dtype), np.empty((count, K), dx.dtype), \
            np.zeros((whole, n_o), dx.dtype)
        for e in range(G):
            d[:count] = dy[n, :, e * n_o:(e + 1) * n_o]
            for p in range(P):
                width = min(W, K - p * W)
                for r in range(0, count, ROWS):
                    _product(d.reshape(-1), r * n_o, n_o, 1, n_o, weight.reshape(-1),
                             (e * P + p) * n_o * W, width, acc)
                    for i in range(min(ROWS, count - r)):
                        _copy(acc[i, :width], rows[r + i, p * W:p * W + width])
            _unpack(rows, g, dx[n, :, :, e * n_c:(e + 1) * n_c])


@device
def _unpack(rows, g, dx):
    """dx (H, W, C) = Σ over the taps that read a pixel, of rows (P·Q, K)."""
    n_c = dx.shape[2]
    for h in range(g.H):
        for w in range(g.W):
            out = dx[h, w]
            out[:] = 0
            for i in range(g.I):
                a = h + g.ph - i * g.dh
                if a < 0 or a % g.sh != 0 or a // g.sh >= g.P:
                    continue
                for j in range(g.J):
                    b = w + g.pw - j * g.dw
                    if b < 0 or b % g.sw != 0 or b // g.sw >= g.Q:
                        continue
                    at = (i * g.J + j) * n_c
                    source = rows[a // g.sh * g.Q + b // g.sw, at:at + n_c]
                    for c in range(n_c):
                        out[c] += source[c]


def _flipped(weight, g):
    """Weights of the convolution that is the transpose of a stride-1 one."""
    w = weight.reshape(g.G, g.O // g.G, g.C // g.G, g.I, g.J).transpose(0, 2, 1, 3, 4)
    return w.reshape(g.C, g.O // g.G, g.I, g.J)[:, :, ::-1, ::-1]


def conv2d_input(dy, weight, *, input_size, stride, padding, dilation, groups):
    """dx[n, c, p·s + i·d − pad, …] = Σ_{o,i,j} w[o,c,i,j] dy[n,o,p,q]: conv2d's transpose in x."""
    g = Conv.of(input_size, weight.shape, stride, padding, dilation, groups)
    shape = g.N, g.H, g.W, g.C
    back = g.dh * (g.I - 1) - g.ph, g.dw * (g.J - 1) - g.pw
    if dy.size == 0 or 0 in shape or g.depth == 0:
        return _first(np.zeros(shape, dy.dtype))
    if (g.sh, g.sw) == (1, 1) and min(back) >= 0 and not g.depthwise:
        return conv2d(dy, _flipped(weight, g), stride=stride, padding=back, dilation=dilation,
                      groups=groups)
    dx = empty(shape, dy.dtype)
    if g.depthwise:
        depthwise_input(_last(dy), _taps(weight, g), g, dx, work=dx.nbytes + dy.nbytes)
    else:
        _input(_last(dy).reshape(g.N, g.P * g.Q, g.O), panels(_matrix(weight, g)), g, dx,
               work=dy.nbytes * g.depth // 8)
    return _first(dx)


@kernel
def _weight(dy, x, g, block, taps, sums):
    """sums (blocks, G, K, O/G); a task is a block of pixels of dy (pixels, O) and some taps."""
    n_c, n_o, chunks = g.C // g.G, g.O // g.G, (g.I * g.J + taps - 1) // taps
    W = 2 * VECTOR // x.itemsize
    for t in prange(sums.shape[0] * chunks):
        b, t0 = t // chunks, t % chunks * taps
        t1, last = min(t0 + taps, g.I * g.J), min((b + 1) * block, dy.shape[0])
        n_k = (t1 - t0) * n_c
        K = (n_k + ROWS - 1) // ROWS * ROWS
        rows, acc = np.zeros((SUM_ROWS, K), x.dtype), np.empty((ROWS, W), x.dtype)
        d = np.zeros((SUM_ROWS, W), x.dtype)
        for e in range(g.G):
            out = sums[b, e, t0 * n_c:t1 * n_c]
            out[:] = 0
            for first in range(b * block, last, SUM_ROWS):
                count = min(SUM_ROWS, last - first)
                _pack(x, g, e, first, count, t0, t1, rows[:, :n_k])
                for o in range(0, n_o, W):
                    n = min(W, n_o - o)
                    for r in range(count):
                        _copy(dy[first + r, e * n_o + o:e * n_o + o + n], d[r, :n])
                    for k in range(0, n_k, ROWS):
                        _product(rows.reshape(-1), k, 1, K, count, d.reshape(-1), 0, n, acc)
                        for i in range(min(ROWS, n_k - k)):
                            total, sums_i = out[k + i, o:o + n], acc[i]
                            for c in range(n):
                                total[c] += sums_i[c]


def _weight_cut(g):
    """Pixels and taps per task: some 32 tasks, at most 8 M values of partial sums."""
    taps = min(g.I * g.J, max(1, 144 // (g.C // g.G)))
    chunks, pixels = -(-g.I * g.J // taps), g.N * g.P * g.Q
    blocks = max(1, min(32 // chunks, pixels // 1024, (1 << 23) // (g.depth * g.O)))
    return -(-pixels // blocks), taps


def conv2d_weight(dy, x, *, kernel_size, stride, padding, dilation, groups):
    """dw[o,c,i,j] = Σ_{n,p,q} dy[n,o,p,q] x[n, c, p·s + i·d − pad, …]: conv2d's transpose in w."""
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    g = Conv.of(x.shape, shape, stride, padding, dilation, groups)
    if dy.size == 0 or 0 in shape:
        return np.zeros(shape, x.dtype)
    if g.depthwise:
        rows = max(1, SUM_BLOCK // (g.Q * g.C))
        sums = np.zeros((-(-g.N * g.P // rows), g.I * g.J, g.C), x.dtype)
        depthwise_weight(_last(dy), _last(x), g, rows, sums, work=x.nbytes + dy.nbytes)
        return np.ascontiguousarray(sums.sum(0).T).reshape(shape)
    block, taps = _weight_cut(g)
    sums = empty((-(-g.N * g.P * g.Q // block), g.G, g.depth, g.O // g.G), x.dtype)
    _weight(_last(dy).reshape(-1, g.O), _last(x), g, block, taps, sums,
            work=dy.nbytes * g.depth // 8)
    out = sums.sum(0).reshape(g.G, g.I, g.J, g.C // g.G, g.O // g.G).transpose(0, 4, 3, 1, 2)
    return np.ascontiguousarray(out).reshape(shape)


def _taps(weight, g):
    """Depthwise weights (C, 1, I, J) as contiguous (I·J, C)."""
    return np.ascontiguousarray(weight.reshape(g.C, g.I * g.J).T)
