"""2-d convolution in channels-last memory.

3×3 convolutions with stride 1 and enough channels go by Winograd's products (winograd.py), all
others by direct sums over windows (windows.py) or, where outputs are few, over kernel rows
(folded.py); each also makes the gradient of the input.
Depthwise convolutions are too thin for both and have loops of their own (depthwise.py), and so has
the gradient of the weights (conv_weight.py).
"""

from functools import lru_cache
from itertools import product
from math import isfinite

import numpy as np

from ..shapes import Conv
from . import phases, pixelwise, winograd
from .conv_weight import conv2d_weight
from .depthwise import depthwise, depthwise_input
from .folded import folded, suits
from .groups import groups_together, joined, spoiled_images
from .layout import channels_first, channels_last
from .memory import empty
from .padded import clear
from .simd import VECTOR
from .windows import Windows, packed, shifts, windows
from .winograd import Tiles
from .winograd_deep import winograd_deep

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]


def _finite(weight):
    """Whether all weights are (or their squares overflow)."""
    flat = weight.ravel()
    return isfinite(np.dot(flat, flat))


@lru_cache(256)
def _windows_of(g, itemsize):
    """The windows of a convolution, rows and columns of its taps in them, and whether its outputs
    are so few that they go by folded.py."""
    rows, columns = tuple(range(0, g.I * g.dh, g.dh)), tuple(range(0, g.J * g.dw, g.dw))
    s = Windows(g.N, g.H, g.W, g.P, g.Q, g.sh, g.sw, g.ph, g.pw, rows[-1] + 1, columns[-1] + 1,
                g.G, g.C // g.G, g.O // g.G, g.P * g.Q * g.O, g.Q * g.O, g.O, 0)
    return s, rows, columns, suits(s, (g.I, g.J), itemsize)


def _forward(x, weight, bias, g, y, moments=None):
    """y (N, P, Q, O), direct."""
    s, rows, columns, few = _windows_of(g, x.itemsize)
    if few and _finite(weight):
        folded(x, weight, bias, rows, columns, s, y)
    else:
        windows(x, packed(weight, range(g.I * g.J), g.G), shifts(bias, g.G, s.n_o, x.dtype),
                tuple(product(rows, columns)), s, y, moments=moments)


def _dense(g):
    """A 1×1 convolution of pixels in a row as one of short rows, which tasks share out in whole
    tiles."""
    if g.I == g.J == g.sh == g.sw == 1 and g.ph == g.pw == 0:
        pixels = g.N * g.H * g.W
        for W in (16, 12, 8, 4):
            if pixels % W == 0:
                return g._replace(N=1, H=pixels // W, W=W, P=pixels // W, Q=W)
    return g


def _fastest(direct, x, weight, bias, g, tiles, y, moments=None):
    """y (N, …) by Winograd's products or groups together where they are faster. Both spread NaN
    and Inf to other results: images in which a result is not finite are computed directly, and
    there are no moments."""
    plain = g.G == g.sh == g.sw == g.dh == g.dw == 1 and g.I == g.J == 3
    together = groups_together(g, VECTOR // x.itemsize)
    if plain and winograd.suits(tiles):
        made = winograd_deep if winograd.deep(tiles, x.itemsize) else winograd.winograd
        spoiled = made(x, weight, bias, tiles, y, direct is _input, moments)
    elif together > 1:
        direct(x, joined(weight, g, together), bias, g._replace(G=g.G // together), y, moments)
        spoiled = spoiled_images(y)
    else:
        direct(x, weight, bias, _dense(g), y, moments)
        return
    if spoiled.size:
        if moments:
            moments.clear()
        some = np.empty((spoiled.size, *y.shape[1:]), y.dtype)
        direct(x[spoiled], weight, bias, g._replace(N=spoiled.size), some)
        y[spoiled] = some


def conv2d(x, weight, bias=None, *, stride, padding, dilation, groups, moments=None):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[o,c,i,j] x[n, c, p·s + i·d − pad, q·s + j·d − pad].

    ``moments``, an empty list, gets count, mean and M2 = Σ (y − mean)² of each o, float64 (O,), if
    to take them here costs less than batch_norm's pass over y: not of outputs that a cache holds,
    of few outputs that go by folded.py, and of values that Winograd's products cannot make."""
    g = Conv.of(x.shape, weight.shape, stride, padding, dilation, groups)
    y = empty((g.N, g.P, g.Q, g.O), x.dtype)
    if y.size == 0 or g.depth == 0:
        y[...] = 0 if bias is None else bias
    elif g.G == g.C > 1:
        shift = np.zeros(g.O, x.dtype) if bias is None else np.ascontiguousarray(bias, x.dtype)
        depthwise(channels_last(x), weight, shift, g, y, x.nbytes + y.nbytes, moments)
    else:
        tiles = Tiles(g.N, g.H, g.W, g.C, g.P, g.Q, g.O, g.ph, g.pw)
        _fastest(_forward, channels_last(x), weight, bias, g, tiles, y, moments)
    return channels_first(y)


def _phase(g, h, w):
    """The windows of the pixels h, h + sh, … and w, w + sw, … of dx; by their numbers in the
    kernel, the rows and columns where the taps that they meet stand in the windows."""
    P, rows = phases.meeting(h, g.H, g.I, g.sh, g.ph, g.dh)
    Q, columns = phases.meeting(w, g.W, g.J, g.sw, g.pw, g.dw)
    if not rows or not columns:
        return None
    top, left = -rows[0][1], -columns[0][1]
    rows = {i: at + top for i, at in rows}
    columns = {j: at + left for j, at in columns}
    return Windows(g.N, g.P, g.Q, P, Q, 1, 1, top, left, max(rows.values()) + 1,
                   max(columns.values()) + 1, g.G, g.O // g.G, g.C // g.G, g.H * g.W * g.C,
                   g.sh * g.W * g.C, g.sw * g.C, (h * g.W + w) * g.C), rows, columns


@lru_cache(256)
def _phases(g, itemsize):
    """stride² phases of dx's pixels, that meet different taps: those of which outputs are few, the
    others, and whether there are pixels that meet none."""
    every = [_phase(g, h, w) for h in range(min(g.sh, g.H)) for w in range(min(g.sw, g.W))]
    few, direct = [], []
    for s, rows, columns in filter(None, every):
        if suits(s, (len(rows), len(columns)), itemsize):
            few.append((s, list(rows), list(columns), tuple(rows.values()),
                        tuple(columns.values())))
        direct.append((s, tuple(i * g.J + j for i in rows for j in columns),
                       tuple(product(rows.values(), columns.values()))))
    return few, direct, None in every


def _input(dy, weight, bias, g, dx, moments=None, together=True):
    """dx (N, H, W, C), direct; no moments. ``together``: all phases at once where that is
    faster."""
    few, direct, gaps = _phases(g, dy.itemsize)
    if gaps:
        clear(dx)
    if len(few) == len(direct) and _finite(weight):
        for s, i, j, rows, columns in few:
            folded(dy, weight[:, :, i][..., j].swapaxes(0, 1), bias, rows, columns, s, dx)
        return
    plan = phases.plan(g, dy.itemsize) if together and bias is None else None
    if plan is not None:
        spoiled = phases.joined(dy, weight, g, *plan, dx)
        if spoiled.size:
            some = np.empty((spoiled.size, *dx.shape[1:]), dx.dtype)
            _input(dy[spoiled], weight, None, g._replace(N=spoiled.size), some, together=False)
            dx[spoiled] = some
        return
    weight = packed(weight, [t for _, own, _ in direct for t in own], g.G, True)
    shift, t0 = shifts(bias, g.G, g.C // g.G, dy.dtype), 0
    for s, own, places in direct:
        windows(dy, weight, shift, places, s, dx, t0)
        t0 += len(own)


def conv2d_input(dy, weight, *, input_size, stride, padding, dilation, groups):
    """dx[n, c, p·s + i·d − pad, …] = Σ_{o,i,j} w[o,c,i,j] dy[n,o,p,q]: conv2d's transpose in x."""
    g = Conv.of(input_size, weight.shape, stride, padding, dilation, groups)
    if pixelwise.few_pixels(g):
        return channels_first(pixelwise.input_gradient(channels_last(dy), weight, g))
    dx = empty((g.N, g.H, g.W, g.C), dy.dtype)
    if dy.size == 0 or dx.size == 0 or g.depth == 0:
        dx[...] = 0
    elif g.G == g.C > 1:
        depthwise_input(channels_last(dy), weight, g, dx, work=dx.nbytes + dy.nbytes)
    else:
        tiles = Tiles(g.N, g.P, g.Q, g.O, g.H, g.W, g.C, 2 - g.ph, 2 - g.pw)
        _fastest(_input, channels_last(dy), weight, None, g, tiles, dx)
    return channels_first(dx)
