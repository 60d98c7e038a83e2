"""Depthwise convolution, channels-last: a vector of channels of four pixels at a time.

x (N, H, W, C), weight (taps, C), g the geometry (shapes.Conv). Nothing is copied: a tile reads each
pixel of a row of x once, for all taps that meet it, and that makes fewer loads than multiply-adds.
Where a tile leaves the image, or channels fill no vector, its loads are masked. 
The input gradient is a convolution too: for each phase of the stride, a sum over the taps that meet
it, of consecutive pixels of dy. So it is the same loop, over axes that say which pixel a tap reads.
"""

import math
from typing import NamedTuple

import numpy as np

from .jit import device, get_num_threads, kernel, prange
from .depthtile import ROWS, tiles
from .memory import empty
from .simd import VECTOR, lanes, pointer

__all__ = ["depthwise", "depthwise_input", "depthwise_weight", "spaces"]

SLICE = 8                  # vectors of channels that go along a row together: what three rows of


class _Axis(NamedTuple):
    """Output u · period + phase reads pixel u · step + start + m · apart by the kernel's
    tap first + m · by, for m = 0 … taps − 1; apart > 0."""

    period: int
    step: int
    start: int
    apart: int
    taps: int
    first: int
    by: int


def _forward(k, stride, pad, dilation):
    return np.array([_Axis(1, stride, -pad, dilation, k, 0, 1)])


def _backward(k, stride, pad, dilation):
    """One axis per phase of the stride; the pixels are dy's, the last tap reads the first."""
    by, axes = stride // math.gcd(stride, dilation), []
    for phase in range(stride):
        met = [j for j in range(k) if (phase + pad - j * dilation) % stride == 0]
        last = met[-1] if met else 0
        axes.append(_Axis(stride, 1, (phase + pad - last * dilation) // stride,
                          by * dilation // stride, len(met), last, -by))
    return np.array(axes)


@device
def _axis(axes, i):
    a = axes[i]
    return _Axis(a[0], a[1], a[2], a[3], a[4], a[5], a[6])


def _strip_of(shape):
    one, two, three = (tiles[rows, *shape] for rows in (1, 2, 3))

    @device
    def strip(x, source, steps, weight, places, bias, first, y, target, n, rows):
        """A row of outputs from so many rows of taps."""
        if rows == 1:
            one(x, source, steps, weight, places, bias, first, y, target, n)
        elif rows == 2:
            two(x, source, steps, weight, places, bias, first, y, target, n)
        else:
            three(x, source, steps, weight, places, bias, first, y, target, n)
    return strip


_single, _pair, _triple, _skipping = (_strip_of(s) for s in ((1, 1), (2, 1), (3, 1), (3, 2)))


@device
def _line(x, at, h, size, down, right, weight, J, C, bias, y, target, c, n):
    """A row of outputs, one vector of channels."""
    H, W = size
    first = 1
    for i in range(0, down.taps, ROWS):
        rows, j = min(ROWS, down.taps - i), 0
        while j < right.taps:
            h0, w0 = h + i * down.apart, right.start + j * right.apart
            place = at + (h0 * W + w0) * C + c, h0, w0, H, W
            tap = (down.first + i * down.by) * J + right.first + j * right.by
            places = tap * C + c, down.by * J * C, right.by * C
            steps = down.apart * W * C, C, down.apart, 1
            left, start = right.taps - j if right.apart == 1 else 1, (first, c)
            if right.step == 1 and left >= 3:
                _triple(x, place, steps, weight, places, bias, start, y, target, n, rows)
                j += 3
            elif right.step == 2 and left >= 3:
                _skipping(x, place, steps, weight, places, bias, start, y, target, n, rows)
                j += 3
            elif right.step == 1 and left == 2:
                _pair(x, place, steps, weight, places, bias, start, y, target, n, rows)
                j += 2
            else:
                steps = steps[0], right.step * C, down.apart, right.step
                _single(x, place, steps, weight, places, bias, start, y, target, n, rows)
                j += 1
            first = 0


@kernel
def _sums(x, weight, bias, J, downs, rights, y):
    """y (N, P, Q, C); a task is a row."""
    N, P, Q, C = y.shape
    H, W, L = x.shape[1], x.shape[2], lanes(x)
    for t in prange(N * P):
        image, p = t // P, t % P
        down = _axis(downs, p % downs.shape[0])
        h = p // down.period * down.step + down.start
        for r in range(min(rights.shape[0], Q)):
            right = _axis(rights, r)
            to, count, out = (t * Q + r) * C, (Q - 1 - r) // right.period + 1, right.period * C
            if down.taps == 0 or right.taps == 0:
                _nothing(y, to, count, out, C)
            for c in range(0, C, L):
                _line(pointer(x), image * H * W * C, h, (H, W), down, right, pointer(weight), J, C,
                      pointer(bias), pointer(y), (to + c, out, count), c, min(L, C - c))


@device
def _nothing(y, to, count, out, C):
    """Pixels that no output reads: there is none in a convolution itself, with its bias."""
    y = y.reshape(-1)
    for u in range(count):
        y[to + u * out:to + u * out + C] = 0


def spaces(values, dtype):
    """Memory for each thread to work in: allocated by the tasks, its pages would be new to each."""
    lanes = VECTOR // dtype.itemsize
    return empty((get_num_threads(), -(-values // lanes) * lanes), dtype)


def depthwise(x, weight, bias, g, y, work=0):
    """y (N, P, Q, C)."""
    _sums(x, weight, bias, g.J, _forward(g.I, g.sh, g.ph, g.dh), _forward(g.J, g.sw, g.pw, g.dw),
          y, work=work)


def depthwise_input(dy, weight, g, dx, work=0):
    """dx (N, H, W, C)."""
    _sums(dy, weight, np.zeros(g.C, dy.dtype), g.J, _backward(g.I, g.sh, g.ph, g.dh),
          _backward(g.J, g.sw, g.pw, g.dw), dx, work=work)


from ._oldweight import depthwise_weight
