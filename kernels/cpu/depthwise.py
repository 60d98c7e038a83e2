"""Depthwise convolution: channels-last, a vector of channels of several pixels at a time.

x (N, H, W, C), weight (taps, C), g the geometry (shapes.Conv). The input gradient is a convolution
too: per phase of the stride, dx is a sum over the taps that meet it, at consecutive pixels of dy.
So both are one loop over axes that say which pixel a tap reads; nothing is padded, taps that read
outside are left out.
"""

import math
from typing import NamedTuple

import numpy as np

from .jit import device, kernel, prange
from .memory import empty
from .simd import fma, lanes, load_part, splat, store_part

__all__ = ["depthwise", "depthwise_input", "depthwise_weight"]

BLOCK = 1 << 14            # values of dy per partial sum of a weight gradient
PARTS = 64                 # at most


class _Axis(NamedTuple):
    """Output u · period + phase reads pixel u · step + start + m · apart of size by the kernel's
    tap first + m · by, for m = 0 … taps − 1."""

    size: int
    period: int
    phase: int
    step: int
    start: int
    apart: int
    taps: int
    first: int
    by: int


def _forward(size, k, stride, pad, dilation):
    return np.array([_Axis(size, 1, 0, stride, -pad, dilation, k, 0, 1)])


def _backward(size, k, stride, pad, dilation):
    """One axis per phase of the stride; size is dy's."""
    by, axes = stride // math.gcd(stride, dilation), []
    for phase in range(stride):
        met = [j for j in range(k) if (phase + pad - j * dilation) % stride == 0]
        first = met[0] if met else 0
        start = (phase + pad - first * dilation) // stride
        axes.append(_Axis(size, stride, phase, 1, start, -by * dilation // stride, len(met),
                          first, by))
    return np.array(axes)


@device
def _axis(axes, i):
    a = axes[i]
    return _Axis(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8])


@device
def _inside(start, end, step, size, n):
    """The range of u in 0 … n for which u · step + start ≥ 0 and u · step + end < size."""
    first = min(max(0, -(start // step)), n)
    return first, max(first, min((size - 1 - end) // step + 1, n))


@device
def _four(x, at, weight, wt, J, down, across, top, v, ldh, C, n, shift):
    """Four consecutive outputs of which all taps read inside the row; n channels."""
    step = across.step * C
    at += (v * across.step + across.start) * C
    a, b, c, d = shift, shift, shift, shift
    for i in range(down.taps):
        h = top + i * down.apart
        if 0 <= h < down.size:
            source = at + h * ldh
            tap = wt + ((down.first + i * down.by) * J + across.first) * C
            for _ in range(across.taps):
                w = load_part(weight, tap, n)
                a = fma(load_part(x, source, n), w, a)
                b = fma(load_part(x, source + step, n), w, b)
                c = fma(load_part(x, source + 2 * step, n), w, c)
                d = fma(load_part(x, source + 3 * step, n), w, d)
                source += across.apart * C
                tap += across.by * C
    return a, b, c, d


@device
def _one(x, at, weight, wt, J, down, across, top, v, ldh, C, n, shift):
    """One output, taps that read outside left out; n channels."""
    for i in range(down.taps):
        h = top + i * down.apart
        if 0 <= h < down.size:
            for j in range(across.taps):
                w = v * across.step + across.start + j * across.apart
                if 0 <= w < across.size:
                    tap = (down.first + i * down.by) * J + across.first + j * across.by
                    shift = fma(load_part(x, at + h * ldh + w * C, n),
                                load_part(weight, wt + tap * C, n), shift)
    return shift


@kernel
def _sums(x, weight, bias, J, rows, columns, y):
    """y (N, P, Q, C); a task is a row of y."""
    N, P, Q, C = y.shape
    H, W, L = x.shape[1], x.shape[2], lanes(x)
    x, weight, y = x.reshape(-1), weight.reshape(-1), y.reshape(-1)
    for t in prange(N * P):
        down = _axis(rows, t % P % rows.shape[0])
        top = t % P // down.period * down.step + down.start
        for phase in range(min(columns.shape[0], Q)):
            across = _axis(columns, phase)
            n, out = (Q - 1 - phase) // across.period + 1, across.period * C
            reach = (across.taps - 1) * across.apart
            first, last = _inside(across.start + min(0, reach), across.start + max(0, reach),
                                  across.step, across.size, n)
            v = 0
            while v < n:
                many = first <= v and v + 4 <= last
                yt, at = (t * Q + v * across.period + phase) * C, t // P * H * W * C
                for c in range(0, C, L):
                    k = min(L, C - c)
                    shift, to = load_part(bias, c, k), yt + c
                    if many:
                        a0, a1, a2, a3 = _four(x, at + c, weight, c, J, down, across, top, v,
                                               W * C, C, k, shift)
                        store_part(y, to, a0, k)
                        store_part(y, to + out, a1, k)
                        store_part(y, to + 2 * out, a2, k)
                        store_part(y, to + 3 * out, a3, k)
                    else:
                        a0 = _one(x, at + c, weight, c, J, down, across, top, v, W * C, C, k,
                                  shift)
                        store_part(y, to, a0, k)
                v += 4 if many else 1


def depthwise(x, weight, bias, g, y, work=0):
    _sums(x, weight, bias, g.J, _forward(g.H, g.I, g.sh, g.ph, g.dh),
          _forward(g.W, g.J, g.sw, g.pw, g.dw), y, work=work)


def depthwise_input(dy, weight, g, dx, work=0):
    _sums(dy, weight, np.zeros(g.C, dy.dtype), g.J, _backward(g.P, g.I, g.sh, g.ph, g.dh),
          _backward(g.Q, g.J, g.sw, g.pw, g.dw), dx, work=work)


@device
def _three(dy, dt, x, at, j0, j1, j2, g, n):
    """Σ over a row of dy of dy x for three taps; dy and x at n channels of their first pixel."""
    C, step = g.C, g.sw * g.C
    zero = splat(dy.dtype.type(0))
    a, b, c, d, e, f = zero, zero, zero, zero, zero, zero
    first, last = _inside(j0 - g.pw, j2 - g.pw, g.sw, g.W, g.Q)
    last = first + (last - first) // 2 * 2
    for q in range(first, last, 2):
        u, source = load_part(dy, dt + q * C, n), at + (q * g.sw - g.pw) * C
        v = load_part(dy, dt + q * C + C, n)
        a = fma(load_part(x, source + j0 * C, n), u, a)
        b = fma(load_part(x, source + j1 * C, n), u, b)
        c = fma(load_part(x, source + j2 * C, n), u, c)
        d = fma(load_part(x, source + step + j0 * C, n), v, d)
        e = fma(load_part(x, source + step + j1 * C, n), v, e)
        f = fma(load_part(x, source + step + j2 * C, n), v, f)
    for r in range(first + g.Q - last):
        q = r if r < first else r - first + last
        u, w = load_part(dy, dt + q * C, n), q * g.sw - g.pw
        if 0 <= w + j0 < g.W:
            a = fma(load_part(x, at + (w + j0) * C, n), u, a)
        if 0 <= w + j1 < g.W:
            b = fma(load_part(x, at + (w + j1) * C, n), u, b)
        if 0 <= w + j2 < g.W:
            c = fma(load_part(x, at + (w + j2) * C, n), u, c)
    return a + d, b + e, c + f


@kernel
def _weight(dy, x, g, rows, sums):
    """sums[b] (I·J, C): the gradient from a block of rows of dy."""
    C, L = g.C, lanes(x)
    parts = sums.shape[0]
    dy, x, sums = dy.reshape(-1), x.reshape(-1), sums.reshape(-1)
    for b in prange(parts):
        sums[b * g.I * g.J * C:(b + 1) * g.I * g.J * C] = 0
        for row in range(b * rows, min((b + 1) * rows, g.N * g.P)):
            for c in range(0, C, L):
                k = min(L, C - c)
                for i in range(g.I):
                    h = row % g.P * g.sh - g.ph + i * g.dh
                    if h < 0 or h >= g.H:
                        continue
                    at = (row // g.P * g.H + h) * g.W * C + c
                    for j in range(0, g.J, 3):
                        j1, j2 = min(j + 1, g.J - 1), min(j + 2, g.J - 1)
                        s0, s1, s2 = _three(dy, row * g.Q * C + c, x, at, j * g.dw, j1 * g.dw,
                                            j2 * g.dw, g, k)
                        to = ((b * g.I + i) * g.J + j) * C + c
                        store_part(sums, to, load_part(sums, to, k) + s0, k)
                        if j1 > j:
                            store_part(sums, to + C, load_part(sums, to + C, k) + s1, k)
                        if j2 > j1:
                            store_part(sums, to + 2 * C, load_part(sums, to + 2 * C, k) + s2, k)


def depthwise_weight(dy, x, g):
    """dw (C, I·J) from dy (N, P, Q, C) and x (N, H, W, C)."""
    lines = g.N * g.P
    rows = max(1, BLOCK // (g.Q * g.C), -(-lines // PARTS))
    sums = empty((-(-lines // rows), g.I * g.J, g.C), x.dtype)
    _weight(dy, x, g, rows, sums, work=x.nbytes + dy.nbytes)
    return np.ascontiguousarray(sums.sum(0).T)
