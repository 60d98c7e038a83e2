"""2-d convolution in channels-last memory.

3×3 convolutions with stride 1 and enough channels go by Winograd's products (winograd.py), all
others by direct sums over windows (windows.py); either also makes the gradient of the input.
Depthwise convolutions are too thin for both and have loops of their own. For the gradient of the
weights x is copied once where it needs padding; one row of a window (J · C values) is contiguous
there. K = taps × channels of a group, in the order (i, j, c).
"""

import numpy as np

from ..shapes import Conv
from . import winograd
from .depthwise import depthwise, depthwise_input, depthwise_weight
from .jit import kernel, prange
from .memory import empty
from .simd import VECTOR
from .tiles import columns, pack
from .windows import Windows, packed, shifts, windows
from .winograd import Tiles

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]

SUM_BLOCK = 1 << 16        # values of dy per partial sum of a depthwise weight gradient
SUM_PARTS = 16             # partial sums of a weight gradient


def _last(x):
    """x (N, C, H, W) as contiguous (N, H, W, C)."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _first(y):
    return y.transpose(0, 3, 1, 2)


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


def _forward(x, weight, bias, g, y):
    """y (N, P, Q, O), direct."""
    places = [(i * g.dh, j * g.dw) for i in range(g.I) for j in range(g.J)]
    s = Windows(g.N, g.H, g.W, g.P, g.Q, g.sh, g.sw, g.ph, g.pw, g.dh * (g.I - 1) + 1,
                g.dw * (g.J - 1) + 1, g.G, g.C // g.G, g.O // g.G, g.P * g.Q * g.O, g.Q * g.O,
                g.O, 0)
    windows(x, packed(weight, range(g.I * g.J), g.G), shifts(bias, g.G, s.n_o, x.dtype), places, s,
            y)


def _dense(g):
    """A 1×1 convolution of pixels in a row, where rows of some more pixels fill tiles better."""
    if g.I == g.J == g.sh == g.sw == 1 and g.ph == g.pw == 0:
        pixels = g.N * g.H * g.W
        for W in (96, 64, 48, 32, 28, 16, 12, 8, 4):
            if pixels % W == 0:
                return g._replace(N=1, H=pixels // W, W=W, P=pixels // W, Q=W)
    return g


def _fastest(direct, x, weight, bias, g, tiles, y):
    """y (N, …) by Winograd's products where they are faster. They spread NaN and Inf over a tile:
    images in which a result is not finite are computed directly."""
    plain = g.G == g.sh == g.sw == g.dh == g.dw == 1 and g.I == g.J == 3
    if not (plain and winograd.suits(tiles)):
        direct(x, weight, bias, _dense(g), y)
        return
    spoiled = winograd.winograd(x, weight, bias, tiles, y, direct is _input)
    if spoiled.size:
        some = np.empty((spoiled.size, *y.shape[1:]), y.dtype)
        direct(x[spoiled], weight, bias, g._replace(N=spoiled.size), some)
        y[spoiled] = some


def conv2d(x, weight, bias=None, *, stride, padding, dilation, groups):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[o,c,i,j] x[n, c, p·s + i·d − pad, q·s + j·d − pad]."""
    g = Conv.of(x.shape, weight.shape, stride, padding, dilation, groups)
    y = empty((g.N, g.P, g.Q, g.O), x.dtype)
    if y.size == 0 or g.depth == 0:
        y[...] = 0 if bias is None else bias
    elif g.depthwise:
        shift = np.zeros(g.O, x.dtype) if bias is None else np.ascontiguousarray(bias, x.dtype)
        depthwise(_last(x), _taps(weight, g), shift, g, y, work=x.nbytes + y.nbytes)
    else:
        tiles = Tiles(g.N, g.H, g.W, g.C, g.P, g.Q, g.O, g.ph, g.pw)
        _fastest(_forward, _last(x), weight, bias, g, tiles, y)
    return _first(y)


def _meeting(h0, size, k, s, p, d):
    """Positions h0, h0 + s, … of x: their number, and (tap, step) for the taps that read them, the
    last first: position number n meets tap i in output n + step."""
    taps = [(i, (h0 + p - i * d) // s) for i in range(k - 1, -1, -1) if (h0 + p - i * d) % s == 0]
    return -(-(size - h0) // s), taps


def _input(dy, weight, bias, g, dx):
    """dx (N, H, W, C), direct: stride² phases of pixels, that meet different taps."""
    phases = [(_meeting(h, g.H, g.I, g.sh, g.ph, g.dh), _meeting(w, g.W, g.J, g.sw, g.pw, g.dw),
               (h * g.W + w) * g.C) for h in range(min(g.sh, g.H)) for w in range(min(g.sw, g.W))]
    taps = [[i * g.J + j for i, _ in rows for j, _ in across]
            for (_, rows), (_, across), _ in phases]
    if not all(taps):
        dx[...] = 0
    weight = packed(weight, [t for own in taps for t in own], g.G, True)
    shift, t0 = shifts(bias, g.G, g.C // g.G, dy.dtype), 0
    for ((P, rows), (Q, across), start), own in zip(phases, taps):
        if own:
            top, left = -rows[0][1], -across[0][1]
            s = Windows(g.N, g.P, g.Q, P, Q, 1, 1, top, left, top + 1 + rows[-1][1],
                        left + 1 + across[-1][1], g.G, g.O // g.G, g.C // g.G,
                        g.H * g.W * g.C, g.sh * g.W * g.C, g.sw * g.C, start)
            places = [(top + i, left + j) for _, i in rows for _, j in across]
            windows(dy, weight, shift, places, s, dx, t0)
            t0 += len(own)


def conv2d_input(dy, weight, *, input_size, stride, padding, dilation, groups):
    """dx[n, c, p·s + i·d − pad, …] = Σ_{o,i,j} w[o,c,i,j] dy[n,o,p,q]: conv2d's transpose in x."""
    g = Conv.of(input_size, weight.shape, stride, padding, dilation, groups)
    dx = empty((g.N, g.H, g.W, g.C), dy.dtype)
    if dy.size == 0 or dx.size == 0 or g.depth == 0:
        dx[...] = 0
    elif g.depthwise:
        depthwise_input(_last(dy), _taps(weight, g), g, dx, work=dx.nbytes + dy.nbytes)
    else:
        tiles = Tiles(g.N, g.P, g.Q, g.O, g.H, g.W, g.C, 2 - g.ph, 2 - g.pw)
        _fastest(_input, _last(dy), weight, None, g, tiles, dx)
    return _first(dx)


@kernel
def _weight(dy, x, g, block, sums):
    """sums (parts, G, K, O/G) from dy (pixels, O) and padded x; a task is a block of rows of dy."""
    n_c, n_o, H, width = g.C // g.G, g.O // g.G, x.shape[1], x.shape[2] * g.C
    W, K = 2 * VECTOR // x.itemsize, g.I * g.J * n_c
    parts, last = sums.shape[0], g.N * g.P
    x, dy, sums = x.reshape(-1), dy.reshape(-1), sums.reshape(-1)
    taps, run = (1, g.J * n_c) if g.G == 1 and g.dw == 1 else (g.J, n_c)
    for b in prange(parts):
        sums[b * g.G * K * n_o:(b + 1) * g.G * K * n_o] = 0
        aside = np.empty(0 if n_o % W == 0 else run * W, x.dtype)
        own = np.empty(0 if n_o % W == 0 else g.Q * W, x.dtype)
        for t in range(b * block, min((b + 1) * block, last)):
            top = (t // g.P * H + t % g.P * g.sh) * width
            for e in range(g.G):
                for o in range(0, n_o, W):
                    n, dt = min(W, n_o - o), t * g.Q * g.O + e * n_o + o
                    if n < W:
                        pack(dy, dt, g.O, 1, n, g.Q, own, 0)
                    for i in range(g.I):
                        for j in range(taps):
                            at = top + i * g.dh * width + j * g.dw * g.C + e * n_c
                            st = ((b * g.G + e) * K + (i * g.J + j) * n_c) * n_o + o
                            if n < W:
                                columns(x, at, 1, g.sw * g.C, run, g.Q, own, 0, W, n, sums, st,
                                        n_o, aside)
                            else:
                                columns(x, at, 1, g.sw * g.C, run, g.Q, dy, dt, g.O, n, sums, st,
                                        n_o, aside)


def _parts(g):
    """Partial sums and the rows of dy in each: of the shape alone, and at most 8 M values."""
    rows = g.N * g.P
    parts = max(1, min(SUM_PARTS, rows // 8, (1 << 23) // (g.depth * g.O)))
    block = -(-rows // parts)
    return -(-rows // block), block


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
    parts, block = _parts(g)
    sums = empty((parts, g.G, g.depth, g.O // g.G), x.dtype)
    _weight(_last(dy), _padded(x, g), g, block, sums, work=2 * dy.size * g.depth)
    out = sums.sum(0).reshape(g.G, g.I, g.J, g.C // g.G, g.O // g.G).transpose(0, 4, 3, 1, 2)
    return np.ascontiguousarray(out).reshape(shape)


def _taps(weight, g):
    """Depthwise weights (C, 1, I, J) as contiguous (I·J, C)."""
    return np.ascontiguousarray(weight.reshape(g.C, g.I * g.J).T)
