"""2-d convolution in channels-last memory: pixels packed into rows, times the weights by BLAS.

A block of rows is packed and multiplied before the next one, so that the packed copy never leaves the
cache. 1 × 1 convolutions need no packing; depthwise ones are too thin for a matrix product and have
loops of their own. K = taps × channels of a group, in the order (i, j, c).
"""

import numpy as np

from ..shapes import Conv
from .jit import kernel, prange
from .memory import empty

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]

PACK_BYTES = 1 << 21       # of packed rows at a time: L2 of two cores
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


def _by_group(y, g):
    """(N, H, W, channels) as (G, pixels, channels of the group): a view."""
    return y.reshape(y.shape[0] * y.shape[1] * y.shape[2], g.G, -1).transpose(1, 0, 2)


@kernel
def _pack(x, g, first, rows):
    """rows[group, k] = the window of output pixel first + k, zero outside x (N, H, W, C)."""
    G, R, K = rows.shape
    n_c = g.C // G
    for k in prange(R):
        n, pq = (first + k) // (g.P * g.Q), (first + k) % (g.P * g.Q)
        h0, w0 = pq // g.Q * g.sh - g.ph, pq % g.Q * g.sw - g.pw
        whole = G == 1 and g.dw == 1 and w0 >= 0 and w0 + g.J <= g.W
        for i in range(g.I):
            h = h0 + i * g.dh
            for m in range(G):
                out = rows[m, k, i * g.J * n_c:(i + 1) * g.J * n_c]
                if h < 0 or h >= g.H:
                    out[:] = 0
                elif whole:
                    source = x[n, h, w0:w0 + g.J].reshape(-1)
                    for c in range(out.size):
                        out[c] = source[c]
                else:
                    for j in range(g.J):
                        w, tap = w0 + j * g.dw, out[j * n_c:(j + 1) * n_c]
                        if 0 <= w < g.W:
                            source = x[n, h, w, m * n_c:(m + 1) * n_c]
                            for c in range(n_c):
                                tap[c] = source[c]
                        else:
                            tap[:] = 0


def _blocks(x, g):
    """(first, last, rows) for blocks of output pixels: rows (G, last − first, K) of x (N, H, W, C)."""
    total = g.N * g.P * g.Q
    if g.pointwise:
        yield 0, total, _by_group(x, g)
        return
    size = max(64, PACK_BYTES // max(1, g.G * g.depth * x.itemsize))
    buffer = empty((g.G, min(size, total), g.depth), x.dtype)
    for first in range(0, total, size):
        last = min(total, first + size)
        rows = buffer if last - first == buffer.shape[1] else empty((g.G, last - first, g.depth), x.dtype)
        _pack(x, g, first, rows, work=2 * rows.nbytes)
        yield first, last, rows


def conv2d(x, weight, bias=None, *, stride, padding, dilation, groups):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[o,c,i,j] x[n, c, p·s + i·d − pad, q·s + j·d − pad]."""
    g = Conv.of(x.shape, weight.shape, stride, padding, dilation, groups)
    y = empty((g.N, g.P, g.Q, g.O), x.dtype)
    if y.size == 0 or g.depth == 0:
        y[...] = 0 if bias is None else bias
    elif g.depthwise:
        _depthwise(_last(x), _taps(weight, g), _bias(bias, g, x.dtype), g, y, work=x.nbytes + y.nbytes)
    else:
        w, out = _matrix(weight, g).transpose(0, 2, 1), _by_group(y, g)
        for first, last, rows in _blocks(_last(x), g):
            np.matmul(rows, w, out=out[:, first:last])
            if bias is not None:
                y.reshape(-1, g.O)[first:last] += bias
    return _first(y)


@kernel
def _unpack(rows, g, first, dx):
    """dx[first + m] = Σ over the taps that read a pixel, of rows (G, m·P·Q, K): every pixel once."""
    G, R, K = rows.shape
    n_c = g.C // G
    for row in prange(R // (g.P * g.Q) * g.H):
        m, h = row // g.H, row % g.H
        for w in range(g.W):
            out = dx[first + m, h, w]
            out[:] = 0
            for i in range(g.I):
                a = h + g.ph - i * g.dh
                if a < 0 or a % g.sh != 0 or a // g.sh >= g.P:
                    continue
                for j in range(g.J):
                    b = w + g.pw - j * g.dw
                    if b < 0 or b % g.sw != 0 or b // g.sw >= g.Q:
                        continue
                    k, at = (m * g.P + a // g.sh) * g.Q + b // g.sw, (i * g.J + j) * n_c
                    for e in range(G):
                        source, target = rows[e, k, at:at + n_c], out[e * n_c:(e + 1) * n_c]
                        for c in range(n_c):
                            target[c] += source[c]


def _input_by_rows(dy, weight, g, dx):
    """Any stride: rows = dy w, a few images at a time, then summed into dx."""
    w, dy = _matrix(weight, g), _last(dy)
    image = g.P * g.Q * g.G * g.depth * dy.itemsize
    step = min(g.N, max(1, PACK_BYTES // image))
    buffer = empty((g.G, step * g.P * g.Q, g.depth), dy.dtype)
    for n in range(0, g.N, step):
        count = min(step, g.N - n)
        rows = buffer if count == step else empty((g.G, count * g.P * g.Q, g.depth), dy.dtype)
        np.matmul(_by_group(dy[n:n + count], g), w, out=rows)
        _unpack(rows, g, n, dx, work=2 * rows.nbytes)


def _flipped(weight, g):
    """Weights of the convolution that is the transpose of a stride-1 one."""
    w = weight.reshape(g.G, g.O // g.G, g.C // g.G, g.I, g.J).transpose(0, 2, 1, 3, 4)
    return w.reshape(g.C, g.O // g.G, g.I, g.J)[:, :, ::-1, ::-1]


def conv2d_input(dy, weight, *, input_size, stride, padding, dilation, groups):
    """dx[n, c, p·s + i·d − pad, …] = Σ_{o,i,j} w[o,c,i,j] dy[n,o,p,q]: conv2d's transpose in x."""
    g = Conv.of(input_size, weight.shape, stride, padding, dilation, groups)
    shape = g.N, g.H, g.W, g.C
    back = g.dh * (g.I - 1) - g.ph, g.dw * (g.J - 1) - g.pw
    if dy.size == 0 or 0 in shape:
        return _first(np.zeros(shape, dy.dtype))
    if g.depthwise:
        dx = empty(shape, dy.dtype)
        _depthwise_input(_last(dy), _taps(weight, g), g, dx, work=dx.nbytes + dy.nbytes)
    elif stride == (1, 1) and min(back) >= 0:
        return conv2d(dy, _flipped(weight, g), stride=stride, padding=back, dilation=dilation,
                      groups=groups)
    else:
        dx = empty(shape, dy.dtype)
        _input_by_rows(dy, weight, g, dx)
    return _first(dx)


def conv2d_weight(dy, x, *, kernel_size, stride, padding, dilation, groups):
    """dw[o,c,i,j] = Σ_{n,p,q} dy[n,o,p,q] x[n, c, p·s + i·d − pad, …]: conv2d's transpose in w."""
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    g = Conv.of(x.shape, shape, stride, padding, dilation, groups)
    if dy.size == 0 or 0 in shape:
        return np.zeros(shape, x.dtype)
    if g.depthwise:
        rows = max(1, SUM_BLOCK // (g.Q * g.C))
        sums = np.zeros((-(-g.N * g.P // rows), g.I * g.J, g.C), x.dtype)
        _depthwise_weight(_last(dy), _last(x), g, rows, sums, work=x.nbytes + dy.nbytes)
        return np.ascontiguousarray(sums.sum(0).T).reshape(shape)
    out = np.zeros((g.G, g.O // g.G, g.depth), x.dtype)
    d = _by_group(_last(dy), g).transpose(0, 2, 1)
    for first, last, rows in _blocks(_last(x), g):
        out += np.matmul(d[:, :, first:last], rows)
    out = out.reshape(g.O, g.I, g.J, g.C // g.G).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(out)


def _taps(weight, g):
    """Depthwise weights (C, 1, I, J) as contiguous (I·J, C)."""
    return np.ascontiguousarray(weight.reshape(g.C, g.I * g.J).T)


def _bias(bias, g, dtype):
    return np.zeros(g.O, dtype) if bias is None else np.ascontiguousarray(bias, dtype)


@kernel
def _depthwise(x, weight, bias, g, y):
    C = x.shape[3]
    for row in prange(g.N * g.P):
        n, p = row // g.P, row % g.P
        for q in range(g.Q):
            out = y[n, p, q]
            for c in range(C):
                out[c] = bias[c]
            for i in range(g.I):
                h = p * g.sh - g.ph + i * g.dh
                if 0 <= h < g.H:
                    for j in range(g.J):
                        w = q * g.sw - g.pw + j * g.dw
                        if 0 <= w < g.W:
                            source, tap = x[n, h, w], weight[i * g.J + j]
                            for c in range(C):
                                out[c] += source[c] * tap[c]


@kernel
def _depthwise_input(dy, weight, g, dx):
    C = dx.shape[3]
    for row in prange(g.N * g.H):
        n, h = row // g.H, row % g.H
        for w in range(g.W):
            out = dx[n, h, w]
            out[:] = 0
            for i in range(g.I):
                a = h + g.ph - i * g.dh
                if a < 0 or a % g.sh != 0 or a // g.sh >= g.P:
                    continue
                for j in range(g.J):
                    b = w + g.pw - j * g.dw
                    if b < 0 or b % g.sw != 0 or b // g.sw >= g.Q:
                        continue
                    source, tap = dy[n, a // g.sh, b // g.sw], weight[i * g.J + j]
                    for c in range(C):
                        out[c] += source[c] * tap[c]


@kernel
def _depthwise_weight(dy, x, g, rows, sums):
    """sums[b] (I·J, C): the gradient from a block of rows of dy."""
    C = x.shape[3]
    for b in prange(sums.shape[0]):
        for row in range(b * rows, min((b + 1) * rows, g.N * g.P)):
            n, p = row // g.P, row % g.P
            for i in range(g.I):
                h = p * g.sh - g.ph + i * g.dh
                if 0 <= h < g.H:
                    for q in range(g.Q):
                        d = dy[n, p, q]
                        for j in range(g.J):
                            w = q * g.sw - g.pw + j * g.dw
                            if 0 <= w < g.W:
                                source, out = x[n, h, w], sums[b, i * g.J + j]
                                for c in range(C):
                                    out[c] += d[c] * source[c]
