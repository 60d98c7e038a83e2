"""2-d convolution in channels-last memory.

3×3 convolutions with stride 1 and enough channels go by Winograd's products (winograd.py), all
others by direct sums over windows (windows.py); either also makes the gradient of the input.
Depthwise convolutions are too thin for both and have loops of their own (depthwise.py), and so has
the gradient of the weights (conv_weight.py).
"""

import numpy as np

from ..shapes import Conv
from . import winograd
from .conv_weight import conv2d_weight
from .depthwise import depthwise, depthwise_input
from .groups import groups_together, joined, spoiled_images
from .memory import channels_first, channels_last, empty
from .simd import VECTOR
from .windows import Windows, packed, shifts, windows
from .winograd import Tiles

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]


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
    """y (N, …) by Winograd's products or groups together where they are faster. Both spread NaN
    and Inf to other results: images in which a result is not finite are computed directly."""
    plain = g.G == g.sh == g.sw == g.dh == g.dw == 1 and g.I == g.J == 3
    together = groups_together(g, VECTOR // x.itemsize)
    if plain and winograd.suits(tiles):
        spoiled = winograd.winograd(x, weight, bias, tiles, y, direct is _input)
    elif together > 1:
        direct(x, joined(weight, g, together), bias, g._replace(G=g.G // together), y)
        spoiled = spoiled_images(y)
    else:
        direct(x, weight, bias, _dense(g), y)
        return
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
    elif g.G == g.C > 1:
        shift = np.zeros(g.O, x.dtype) if bias is None else np.ascontiguousarray(bias, x.dtype)
        depthwise(channels_last(x), _taps(weight, g), shift, g, y, work=x.nbytes + y.nbytes)
    else:
        tiles = Tiles(g.N, g.H, g.W, g.C, g.P, g.Q, g.O, g.ph, g.pw)
        _fastest(_forward, channels_last(x), weight, bias, g, tiles, y)
    return channels_first(y)


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
    elif g.G == g.C > 1:
        depthwise_input(channels_last(dy), _taps(weight, g), g, dx, work=dx.nbytes + dy.nbytes)
    else:
        tiles = Tiles(g.N, g.P, g.Q, g.O, g.H, g.W, g.C, 2 - g.ph, 2 - g.pw)
        _fastest(_input, channels_last(dy), weight, None, g, tiles, dx)
    return channels_first(dx)


def _taps(weight, g):
    """Depthwise weights (O, 1, I, J) as contiguous (I·J, O)."""
    return np.ascontiguousarray(weight.reshape(g.O, g.I * g.J).T)
