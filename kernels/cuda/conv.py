"""2-d convolution as products of matrices whose windows are read from the image as it is: no
columns are written. Results are channels-last.

The gradient of the input is a convolution of dy for each phase of the strides: the pixels whose
windows have the same taps. Groups of few channels are computed one result to a thread.
"""

import math

import numpy as np

from ..half import is_half, kind, wide
from ..shapes import Conv
from . import precision, reduce, windows
from .elementwise import add
from .epilogue import merged
from .intrinsics import width
from .layout import aligned
from .matmul import words
from .memory import SIMULATED, empty, xp
from .tile import MOST, WORD, plan

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]

FEW = 64                     # products of a group and tap from which tiles are worth it
ROWS = 4096 if not SIMULATED else 8        # pixels of a part of a direct weight gradient


def _last(x, dtype):
    """x as (n, h, w, c), which is its order in memory. Raises ValueError for sizes that kernels
    cannot count in 32 bits."""
    if max(x.shape[1], x.shape[2] * x.shape[3]) > MOST:
        raise ValueError(f"images of {tuple(x.shape[1:])} on CUDA: channels and pixels must not be "
                         f"more than {MOST:,}")
    return xp.ascontiguousarray(x.transpose(0, 2, 3, 1).astype(dtype, copy=False))


def _packed(weight, dtype, *axes):
    return xp.ascontiguousarray(weight.transpose(axes).astype(dtype, copy=False))


def _in_vectors(dtype, *numbers):
    return all(n % width(dtype) == 0 for n in numbers)


def _through_float32(g, dtype):
    """Whether halves are converted: without tensor cores, and where a group's channels are few or
    do not begin on 16 bytes."""
    inner = g.C // g.G, g.O // g.G
    return is_half(dtype) and (not precision.multiplies_halves() or (
        g.G > 1 and (any(n % width(dtype) for n in inner) or math.prod(inner) < FEW)))


def _parts(p, O, moments):
    """Where tiles leave the moments of their rows, if they are asked for: means and squares."""
    if moments is None:
        return None, None
    return empty((p.down, O), np.float64), empty((p.down, O), np.float64)


def _convolve_halves(x, w, bias, y, grid, place, groups, moments):
    """As ``_convolve``, in words of two channels."""
    (I, J, _, O), dtype = w.shape, x.dtype
    x, w = words(x), words(xp.ascontiguousarray(w.transpose(3, 0, 1, 2)))
    depth, columns, M = w.shape[-1], O // groups, grid.N * grid.A * grid.B
    K = I * J * depth
    p = plan(M, columns, K if y.size == M * O else 0, groups, WORD)
    whole = p.splits == 1
    parts = y if whole else empty((p.splits, *y.shape), np.float32)
    found = _parts(p, O, moments if whole else None)
    kernel = windows.convolution(WORD, p.shape, True, True, kind(dtype), kind(parts.dtype),
                                 found[0] is not None, precision.loads())
    kernel(p.tiles * groups * p.splits, x, w, parts, bias, *found,
           whole and bias is not None, _in_vectors(parts.dtype, columns, O, *place),
           *grid._replace(C=x.shape[-1]), depth, columns, O, *place, groups, p.down, p.tiles,
           K if whole else p.length)
    if found[0] is not None:
        moments += merged(*found, M, p.shape[0])
    if whole:
        return y
    y = reduce.sum(parts, axes=(0,), keepdims=False)
    return (y if bias is None else add(y, wide(bias))).astype(dtype)


def _convolve(x, w, bias, y, grid, place, groups, moments=None):
    """y at ``place`` (first, image, row, pixel) = windows of x, channels-last, times w
    (I, J, C/G, O). Returns y, or, where that is all of it, a sum of parts instead."""
    if is_half(x.dtype):
        return _convolve_halves(x, w, bias, y, grid, place, groups, moments)
    depth, O, dtype = w.shape[2], w.shape[3], x.dtype
    columns, M, K = O // groups, grid.N * grid.A * grid.B, w.size // O
    if groups > 1 and depth * columns < FEW:
        blocks = -(-grid.A * grid.B * O // windows.SINGLE)
        windows.direct(dtype)(blocks * grid.N, x, w, y, bias, bias is not None, *grid, depth,
                              columns, O, *place, blocks)
        return y
    p = plan(M, columns, K if y.size == M * O else 0, groups, dtype)
    parts = y if p.splits == 1 else empty((p.splits, *y.shape), dtype)
    a = _in_vectors(dtype, depth, grid.C) and aligned(x)
    b = _in_vectors(dtype, columns, O) and aligned(w)
    whole = p.splits == 1
    found = _parts(p, O, moments if whole and dtype == np.float32 else None)
    kernel = windows.convolution(dtype, p.shape, a, b, precision.way(dtype),
                                 moments=found[0] is not None, loads=precision.loads())
    kernel(p.tiles * groups * p.splits, x, w, parts, bias, *found,
           whole and bias is not None, b and _in_vectors(dtype, *place), *grid, depth, columns, O,
           *place, groups, p.down, p.tiles, K if whole else p.length)
    if found[0] is not None:
        moments += merged(*found, M, p.shape[0])
    if whole:
        return y
    y = reduce.sum(parts, axes=(0,), keepdims=False)
    return y if bias is None else add(y, bias)


def conv2d(x, weight, bias=None, *, stride, padding, dilation, groups, moments=None):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[o,c,i,j] x[n, c, p·s + i·d − pad, q·s + j·d − pad].

    ``moments``, an empty list, gets count, mean and M2 = Σ (y − mean)² of each o, float64 (O,), if
    blocks see the sums of float32 or halves whole: not where parts of k are added up afterwards,
    and not of groups of few channels."""
    g, dtype = Conv.of(x.shape, weight.shape, stride, padding, dilation, groups), (
        np.result_type(x, weight))
    if _through_float32(g, dtype):
        return conv2d(wide(x), wide(weight), wide(bias), stride=stride, padding=padding,
                      dilation=dilation, groups=groups).astype(dtype)
    y = empty((g.N, g.P, g.Q, g.O), dtype)
    if y.size and not g.depth:
        y[...] = 0 if bias is None else bias
    elif y.size:
        grid = windows.Grid(g.N, g.H, g.W, g.C, g.P, g.Q, g.I, g.J, g.sh, g.sw, -g.ph, -g.pw, g.dh,
                            g.dw)
        bias = None if bias is None else xp.ascontiguousarray(bias.astype(dtype, copy=False))
        y = _convolve(_last(x, dtype), _packed(weight, dtype, 2, 3, 1, 0), bias, y, grid,
                      (0, g.P * g.Q * g.O, g.Q * g.O, g.O), g.G, moments)
    return y.transpose(0, 3, 1, 2)


def _phase(first, taps, stride, padding, dilation):
    """For pixels first, first + stride, …: the first tap that reads them, the step to the next,
    where the window of dy begins and its step from tap to tap; None if no tap does."""
    step = stride // math.gcd(stride, dilation)
    for tap in range(min(step, taps)):
        if (first + padding - tap * dilation) % stride == 0:
            begin = (first + padding - tap * dilation) // stride
            return tap, step, begin, -step * dilation // stride
    return None


def conv2d_input(dy, weight, *, input_size, stride, padding, dilation, groups):
    """dx[n, c, p·s + i·d − pad, …] = Σ_{o,i,j} w[o,c,i,j] dy[n,o,p,q]: conv2d's transpose in x."""
    g = Conv.of(input_size, weight.shape, stride, padding, dilation, groups)
    dtype = np.result_type(dy, weight)
    if _through_float32(g, dtype):
        return conv2d_input(wide(dy), wide(weight), input_size=input_size, stride=stride,
                            padding=padding, dilation=dilation, groups=groups).astype(dtype)
    dx, dy = empty((g.N, g.H, g.W, g.C), dtype), _last(dy, dtype)
    grouped = weight.reshape(g.G, g.O // g.G, g.C // g.G, g.I, g.J)
    for a in range(min(g.sh, g.H) if dx.size else 0):
        for b in range(min(g.sw, g.W)):
            rows, columns = _phase(a, g.I, g.sh, g.ph, g.dh), _phase(b, g.J, g.sw, g.pw, g.dw)
            if rows is None or columns is None or not dy.size:
                dx[:, a::g.sh, b::g.sw] = 0
                continue
            w = grouped[..., rows[0]::rows[1], columns[0]::columns[1]]
            w = _packed(w, dtype, 3, 4, 1, 0, 2)
            w = w.reshape(*w.shape[:3], g.C)
            grid = windows.Grid(g.N, g.P, g.Q, g.O, -(-(g.H - a) // g.sh), -(-(g.W - b) // g.sw),
                                *w.shape[:2], 1, 1, rows[2], columns[2], rows[3], columns[3])
            dx = _convolve(dy, w, None, dx, grid, ((a * g.W + b) * g.C, g.H * g.W * g.C,
                                                   g.sh * g.W * g.C, g.sw * g.C), g.G)
    return dx.transpose(0, 3, 1, 2)


def _weights(dy, x, grid, g):
    """(O/G of each group, I, J, C/G) from parts of the pixels, added up in their order."""
    dtype, depth, columns, O = x.dtype, g.C // g.G, g.O // g.G, g.O
    a = _in_vectors(dtype, columns, O) and aligned(dy)
    b = _in_vectors(dtype, depth, g.C) and aligned(x)
    way, out, result = precision.way(dtype), None, dtype
    if is_half(dtype):
        dy, x, grid = dy.view(WORD), x.view(WORD), grid._replace(C=g.C // 2)
        depth, columns, O = depth // 2, columns // 2, O // 2
    p = plan(g.O // g.G, g.depth, g.N * g.P * g.Q, g.G, x.dtype)
    if is_half(dtype):
        way, result = kind(dtype), dtype if p.splits == 1 else np.dtype(np.float32)
        out = kind(result)
    parts = empty((p.splits, g.O, g.I, g.J, g.C // g.G), result)
    windows.weights(x.dtype, p.shape, a, b, way, out, precision.loads())(
        p.tiles * g.G * p.splits, dy, x, parts, _in_vectors(result, g.depth), *grid, depth, columns,
        O, g.G, p.down, p.tiles, p.splits, p.length)
    return _added(parts).transpose(0, 3, 1, 2).astype(dtype, copy=False)


def _direct_weights(dy, x, grid, g):
    depth, length = g.C // g.G, -(-ROWS // g.Q)
    splits = -(-g.N * g.P // length)
    parts = empty((splits, g.I, g.J, depth, g.O), x.dtype)
    windows.direct_weights(x.dtype)(-(-parts.size // windows.SINGLE), dy, x, parts, *grid, depth,
                                    g.O // g.G, g.O, splits, length)
    return _added(parts).transpose(3, 2, 0, 1)


def _added(parts):
    return parts[0] if len(parts) == 1 else reduce.sum(parts, axes=(0,), keepdims=False)


def conv2d_weight(dy, x, *, kernel_size, stride, padding, dilation, groups):
    """dw[o,c,i,j] = Σ_{n,p,q} dy[n,o,p,q] x[n, c, p·s + i·d − pad, …]: conv2d's transpose in w."""
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    g, dtype = Conv.of(x.shape, shape, stride, padding, dilation, groups), np.result_type(dy, x)
    if not dy.size or not math.prod(shape):
        dw = empty(shape, dtype)
        dw[...] = 0
        return dw
    grid = windows.Grid(g.N, g.H, g.W, g.C, g.P, g.Q, g.I, g.J, g.sh, g.sw, -g.ph, -g.pw, g.dh,
                        g.dw)
    if is_half(dtype) and not (precision.multiplies_halves() and _in_vectors(
            dtype, g.C // g.G, g.O // g.G)):
        return conv2d_weight(wide(dy), wide(x), kernel_size=kernel_size, stride=stride,
                             padding=padding, dilation=dilation, groups=groups).astype(dtype)
    few = g.G > 1 and g.C // g.G * (g.O // g.G) < FEW
    return xp.ascontiguousarray((_direct_weights if few else _weights)(
        _last(dy, dtype), _last(x, dtype), grid, g))
