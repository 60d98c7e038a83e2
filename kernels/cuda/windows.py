"""Products of matrices one of which is the windows of images: rows are pixels, k is taps.

Images are channels-last, (n, h, w, c). A window reads pixel (a, b) of a grid at h = a s + h0 + i d
for tap i, which is a convolution with any stride, padding and dilation, and, with d < 0, its
transpose.
"""

from typing import NamedTuple

import numpy as np

from . import precision
from .intrinsics import cuda, device
from .launch import Kernel, factory
from .layout import MISSING
from .memory import SIMULATED
from .tile import LARGE, SMALL, WORD, Operand, compiled, divided, multiplier, tile_of

__all__ = ["Grid", "SINGLE", "convolution", "direct", "direct_weights", "every", "weights"]

OUTSIDE = -(1 << 30)         # a row or column that no image has; the sum of two fits 32 bits
SINGLE = 256 if not SIMULATED else 32        # threads of ``direct``


class Grid(NamedTuple):
    """Where windows read: N images of H × W pixels of C channels; A × B windows of I × J taps."""

    N: int
    H: int
    W: int
    C: int
    A: int
    B: int
    I: int
    J: int
    sh: int
    sw: int
    h0: int
    w0: int
    dh: int
    dw: int


FIELDS = "i8 " * 14
# g: Grid's fields, then: 14 channels of a group; 15 the first of them; M N K of the product;
# 19 channels of the result in all, 20 the first of this group; 21-25 where pixel (0, 0) of the
# grid lies in it, the steps from image to image, row to row, pixel to pixel; then for operands.


# Rows, columns and pixels of an image are counted in 32 bits: half of what a step of a product of
# halves would else do is 64-bit arithmetic.


@device
def _pixel(g, m):
    """The first element of an image, and the row and column where a window begins."""
    image = divided(m, g[4] * g[5])
    rest = m - image * g[4] * g[5]
    a = divided(rest, g[5])
    b = rest - a * g[5]
    return (image * g[1] * g[2] * g[3], np.int32(a * g[8] + g[10]), np.int32(b * g[9] + g[11]))


@device
def _row(g, m):
    return _pixel(g, m) if m < g[16] else (0, np.int32(OUTSIDE), np.int32(0))


@device
def _tap(g, k):
    """What a tap and channel add to where a window begins."""
    tap = divided(k, g[14])
    i = divided(tap, g[7])
    return (np.int32(i * g[12]), np.int32((tap - i * g[7]) * g[13]), g[15] + k - tap * g[14])


@device
def _tap_k(g, k):
    return _tap(g, k) if k < g[18] else (np.int32(OUTSIDE), np.int32(0), 0)


@device
def _window(g, u, v):
    h, w = np.int32(u[1] + v[0]), np.int32(u[2] + v[1])
    H, W, C = np.int32(g[1]), np.int32(g[2]), np.int32(g[3])
    inside = h >= 0 and h < H and w >= 0 and w < W
    return u[0] + np.int64(np.int32(h * W + w)) * np.int64(C) + v[2] if inside else MISSING


@device
def _filter(g, n):
    return g[20] + n if n < g[17] else MISSING


@device
def _filter_k(g, k):
    return k * g[19] if k < g[18] else MISSING


@device
def _filter_row(g, n):
    return (g[20] + n) * g[18] if n < g[17] else MISSING


@device
def _word_k(g, k):
    return k if k < g[18] else MISSING


@device
def _sum(g, u, v):
    return u + v


@device
def _line(g, m):
    """Where the result's pixel m lies."""
    image = divided(m, g[4] * g[5])
    rest = m - image * g[4] * g[5]
    a = divided(rest, g[5])
    return (g[21] + image * g[22] + a * g[23] + (rest - a * g[5]) * g[24] + g[20]
            if m < g[16] else MISSING)


@factory
def convolution(dtype, shape, vectors_a, vectors_b, way="fma", out=None, moments=False,
                loads="ahead"):
    """y[z, pixel, o] = Σ over the z-th part of the taps and a group's channels of x's windows times
    w (I, J, C/G, O). Of words of halves, w is (O, I, J, C/G), and y of them or float32: ``out``.
    ``moments``: also mean and M2 of the rows of each tile, (down, O)."""
    kind, half = dtype.str[1:], way in precision.HALVES
    how = (precision.HALVES if half else precision.WAYS)[way]
    filters = (Operand(_filter_row, _word_k, _sum, "k", vectors_b) if half else
               Operand(_filter, _filter_k, _sum, "row", vectors_b))
    body = multiplier(Operand(_row, _tap_k, _window, "k", vectors_a), filters, _line, shape, dtype,
                      how, out or kind, loads, (out or kind) if moments else None)

    def run(x, w, y, bias, means, squares, biased, wide, N, H, W, C, A, B, I, J, sh, sw, h0, w0, dh,
            dw, depth, columns, O, first, image, row, pixel, groups, down, tiles, length):
        part, t = divided(cuda.blockIdx.x, tiles), cuda.blockIdx.x
        i, j = tile_of(t - part * tiles, down, tiles)
        z = divided(part, groups)
        group, K, begin = part - z * groups, I * J * depth, z * length
        g = (N, H, W, C, A, B, I, J, sh, sw, h0, w0, dh, dw, depth, group * depth, N * A * B,
             columns, K, O, group * columns, first + z * N * A * B * O, image, row, pixel)
        body(x, w, y, bias, group * columns if biased else -1, g, i, j, begin,
             min(begin + length, K), columns, wide,
             (means, squares, i * O + group * columns, N * A * B))
    results = f"*{out} *{way}" if half else f"*{kind} *{kind}"
    name = (f"conv_{kind}_{shape[0]}_{vectors_a:d}{vectors_b:d}{how.suffix}"
            + (f"_{out}" if half else "") + "_moments" * moments + "_plain" * (loads == "plain"))
    return compiled(run, f"*{kind} *{kind} {results} *f8 *f8 i4 i4 " + FIELDS + "i8 " * 11, name,
                    ("k", filters.by), shape, dtype, how, loads)


@device
def _gradient(g, m):
    return g[20] + m if m < g[16] else MISSING


@device
def _gradient_k(g, k):
    return k * g[19] if k < g[18] else MISSING


@device
def _tap_n(g, n):
    return _tap(g, n) if n < g[17] else (np.int32(OUTSIDE), np.int32(0), 0)


@device
def _pixel_k(g, k):
    return _pixel(g, k) if k < g[18] else (0, np.int32(OUTSIDE), np.int32(0))


@device
def _window_of_tap(g, u, v):
    return _window(g, v, u)


@device
def _filters(g, m):
    return g[21] + m * g[17] if m < g[16] else MISSING


@device
def _filters_of_words(g, m):
    return g[21] + m * 2 * g[17] if m < 2 * g[16] else MISSING


@factory
def weights(dtype, shape, vectors_a, vectors_b, way="fma", out=None, loads="ahead"):
    """dw[z, o, tap and channel] = Σ over the z-th part of the pixels of dy[pixel, o] times x's
    windows. Of words of halves, all counts of channels are of words but for dw, which is of halves
    or float32: ``out``."""
    kind, half, by = dtype.str[1:], way in precision.HALVES, "row" if vectors_b else "k"
    how, per = (precision.HALVES if half else precision.WAYS)[way], 2 if half else 1
    body = multiplier(Operand(_gradient, _gradient_k, _sum, "row", vectors_a),
                      Operand(_tap_n, _pixel_k, _window_of_tap, by, vectors_b),
                      _filters_of_words if half else _filters, shape, dtype, how, out or kind,
                      loads)

    def run(dy, x, dw, wide, N, H, W, C, A, B, I, J, sh, sw, h0, w0, dh, dw_, depth, columns, O,
            groups, down, tiles, splits, length):
        part, t = divided(cuda.blockIdx.x, tiles), cuda.blockIdx.x
        i, j = tile_of(t - part * tiles, down, tiles)
        z = divided(part, groups)
        group = part - z * groups
        taps, K = I * J * depth, N * A * B
        g = (N, H, W, C, A, B, I, J, sh, sw, h0, w0, dh, dw_, depth, group * depth, columns, taps,
             K, O, group * columns, part * columns * per * taps * per)
        begin = z * length
        body(dy, x, dw, dw, -1, g, i, j, begin, min(begin + length, K), taps * per, wide, ())
    name = (f"conv_weight_{kind}_{shape[0]}_{vectors_a:d}{vectors_b:d}{how.suffix}"
            + (f"_{out}" if half else "") + "_plain" * (loads == "plain"))
    return compiled(run, f"*{kind} *{kind} *{out or kind} i4 " + FIELDS + "i8 " * 8, name,
                    ("row", by), shape, dtype, how, loads)


@factory
def direct(dtype):
    """As ``convolution``, a thread for each result: for groups of few channels."""
    kind, zero = dtype.str[1:], dtype.type(0)

    def body(x, w, y, bias, biased, N, H, W, C, A, B, I, J, sh, sw, h0, w0, dh, dw, depth, columns,
             O, first, image, row, pixel, blocks):
        n = divided(cuda.blockIdx.x, blocks)
        e = (cuda.blockIdx.x - n * blocks) * SINGLE + cuda.threadIdx.x
        if e >= A * B * O:
            return
        m = divided(e, O)
        a = divided(m, B)
        o, b = e - m * O, m - a * B
        channel, acc = divided(o, columns) * depth, bias[o] if biased else zero
        for i in range(I):
            h = a * sh + h0 + i * dh
            for j in range(J):
                v = b * sw + w0 + j * dw
                if h >= 0 and h < H and v >= 0 and v < W:
                    p, q = ((n * H + h) * W + v) * C + channel, (i * J + j) * depth * O + o
                    for c in range(depth):
                        acc += x[p + c] * w[q + c * O]
        y[first + n * image + a * row + b * pixel + o] = acc
    return Kernel(body, f"*{kind} *{kind} *{kind} *{kind} i4 " + FIELDS + "i8 " * 8,
                  threads=SINGLE, name=f"conv_direct_{kind}")


@factory
def direct_weights(dtype):
    """As ``weights``, a thread for each result and each part of the windows' rows; dw is
    (splits, I, J, C/G, O)."""
    kind, zero = dtype.str[1:], dtype.type(0)

    def body(dy, x, dw, N, H, W, C, A, B, I, J, sh, sw, h0, w0, dh, dw_, depth, columns, O, splits,
             length):
        e = cuda.blockIdx.x * SINGLE + cuda.threadIdx.x
        rest = divided(e, O)
        o = e - rest * O
        tap = divided(rest, depth)
        channel = divided(o, columns) * depth + rest - tap * depth
        z = divided(tap, I * J)
        tap -= z * I * J
        if z >= splits:
            return
        i = divided(tap, J)
        down, right, acc = h0 + i * dh, w0 + (tap - i * J) * dw_, zero
        for r in range(z * length, min(z * length + length, N * A)):
            n = divided(r, A)
            h = (r - n * A) * sh + down
            if h >= 0 and h < H:
                for b in range(B):
                    v = b * sw + right
                    if v >= 0 and v < W:
                        acc += dy[(r * B + b) * O + o] * x[((n * H + h) * W + v) * C + channel]
        dw[e] = acc
    return Kernel(body, f"*{kind} *{kind} *{kind} " + FIELDS + "i8 " * 5, threads=SINGLE,
                  name=f"conv_direct_weight_{kind}")


def every():
    """The kernels of float32 and float64, for those who compile them ahead."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        large = LARGE if dtype == np.float32 else SMALL
        yield convolution(dtype, large, True, True)
        yield weights(dtype, large, True, True)
        yield convolution(dtype, SMALL, False, True)
        yield weights(dtype, SMALL, True, False)
        yield direct(dtype)
        yield direct_weights(dtype)
    single = np.dtype(np.float32)
    yield convolution(single, LARGE, True, True, moments=True)
    yield convolution(single, LARGE, True, True, loads="plain")
    yield weights(single, LARGE, True, True, loads="plain")
    for half in precision.HALVES:
        yield convolution(WORD, LARGE, True, True, half, half)
        yield convolution(WORD, LARGE, True, True, half, half, True)
        yield weights(WORD, LARGE, True, True, half, half)
    for way in ("tf32", "3xtf32"):
        yield convolution(single, LARGE, True, True, way)
        yield weights(single, LARGE, True, True, way)
