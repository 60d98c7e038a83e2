"""2-d convolution in channels-last memory, direct: no window is copied.

The pixels of an output row read windows that lie sw · C apart in a padded x, and one row of a
window (J · C values) is contiguous: each is a strip of a matrix product with a slice of the
weights. Only x is copied, once, where it needs padding. Depthwise convolutions are too thin for
this and have loops of their own. K = taps × channels of a group, in the order (i, j, c).
"""

import numpy as np

from ..shapes import Conv
from .conv_weight import conv2d_weight
from .depthwise import depthwise, depthwise_input
from .jit import device, kernel, prange
from .memory import empty
from .tiles import columns, fill, panels

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]


def _last(x):
    """x (N, C, H, W) as contiguous (N, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _first(y):
    return y.transpose(0, 3, 1, 2)


def _matrix(weight, g):
    """Weights (O, C/G, I, J) as (G, O/G, K)."""
    w = weight.reshape(g.G, g.O // g.G, g.C // g.G, g.I, g.J).transpose(0, 1, 3, 4, 2)
    return w.reshape(g.G, g.O // g.G, g.depth)


@kernel
def _pad(x, g, out):
    """out (N, H + 2 ph, W + 2 pw, C) = x (N, H, W, C) with zeros around."""
    rows, width, size = out.shape[1], out.shape[2] * g.C, g.W * g.C
    x, out = x.reshape(-1), out.reshape(-1)
    for t in prange(g.N * rows):
        n, h = t // rows, t % rows - g.ph
        row = out[t * width:(t + 1) * width]
        if 0 <= h < g.H:
            row[:g.pw * g.C] = 0
            source, middle = x[(n * g.H + h) * size:(n * g.H + h + 1) * size], row[g.pw * g.C:]
            for c in range(size):
                middle[c] = source[c]
            middle[size:] = 0
        else:
            row[:] = 0


def _padded(x, g):
    """x (N, C, H, W) in channels-last memory with its padding, as (N, H', W', C)."""
    x = _last(x)
    if not g.ph and not g.pw:
        return x
    out = empty((g.N, g.H + 2 * g.ph, g.W + 2 * g.pw, g.C), x.dtype)
    _pad(x, g, out, work=2 * out.nbytes)
    return out


@kernel
def _forward(x, weight, bias, g, y):
    """y (pixels, O) from padded x and weight panels (G, panels, K, W); a task is a row of y."""
    G, P, K, W = weight.shape
    n_o, n_c, H, width = g.O // g.G, g.C // g.G, x.shape[1], x.shape[2] * g.C
    x, weight, y = x.reshape(-1), weight.reshape(-1), y.reshape(-1)
    taps, run = (1, g.J * n_c) if g.G == 1 and g.dw == 1 else (g.J, n_c)
    for t in prange(g.N * g.P):
        top = (t // g.P * H + t % g.P * g.sh) * width
        aside = np.empty(0 if n_o % W == 0 else g.Q * W, x.dtype)
        for ep in range(G * P):
            e, p = ep // P, ep % P
            n, first = min(W, n_o - p * W), e * n_o + p * W
            yt = t * g.Q * g.O + first
            fill(y, yt, g.Q, g.O, n, bias, first)
            for i in range(g.I):
                for j in range(taps):
                    at = top + i * g.dh * width + j * g.dw * g.C + e * n_c
                    wt = (ep * K + (i * g.J + j) * n_c) * W
                    columns(x, at, g.sw * g.C, 1, g.Q, run, weight, wt, W, n, y, yt, g.O, aside)


def conv2d(x, weight, bias=None, *, stride, padding, dilation, groups):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[o,c,i,j] x[n, c, p·s + i·d − pad, q·s + j·d − pad]."""
    g = Conv.of(x.shape, weight.shape, stride, padding, dilation, groups)
    y = empty((g.N, g.P, g.Q, g.O), x.dtype)
    shift = np.zeros(0, x.dtype) if bias is None else np.ascontiguousarray(bias, x.dtype)
    if y.size == 0 or g.depth == 0:
        y[...] = shift if shift.size else 0
    elif g.depthwise:
        shift = shift if shift.size else np.zeros(g.O, x.dtype)
        depthwise(_last(x), _taps(weight, g), shift, g, y, work=x.nbytes + y.nbytes)
    else:
        _forward(_padded(x, g), panels(_matrix(weight, g).transpose(0, 2, 1)), shift, g, y,
                 work=2 * y.size * g.depth)
    return _first(y)


@kernel
def _input(dy, weight, g, dx):
    """One task per image: rows = dy w for weight panels (G, panels, O/G, W), summed into dx."""
    G, P, n_o, W = weight.shape
    count, K, n_c = g.P * g.Q, g.I * g.J * (g.C // g.G), g.C // g.G
    dy, weight, bias = dy.reshape(-1), weight.reshape(-1), np.empty(0, dx.dtype)
    for n in prange(g.N):
        rows = np.empty(count * K, dx.dtype)
        aside = np.empty(0 if K % W == 0 else count * W, dx.dtype)
        for e in range(G):
            fill(rows, 0, count, K, K, bias, 0)
            for p in range(P):
                wt = (e * P + p) * n_o * W
                columns(dy, n * count * g.O + e * n_o, g.O, 1, count, n_o, weight, wt, W,
                        min(W, K - p * W), rows, p * W, K, aside)
            _unpack(rows.reshape(count, K), g, dx[n, :, :, e * n_c:(e + 1) * n_c])


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
        _input(_last(dy), panels(_matrix(weight, g)), g, dx, work=2 * dy.size * g.depth)
    return _first(dx)


def _taps(weight, g):
    """Depthwise weights (C, 1, I, J) as contiguous (I·J, C)."""
    return np.ascontiguousarray(weight.reshape(g.C, g.I * g.J).T)
