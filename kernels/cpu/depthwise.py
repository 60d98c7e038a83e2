"""Loops of depthwise convolution: channels-last, vectorised over the channels of one pixel.

x (N, H, W, C), weight (taps, C), g the geometry (shapes.Conv).
"""

from .jit import kernel, prange

__all__ = ["depthwise", "depthwise_input", "depthwise_weight"]


@kernel
def depthwise(x, weight, bias, g, y):
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
def depthwise_input(dy, weight, g, dx):
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
def depthwise_weight(dy, x, g, rows, sums):
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
