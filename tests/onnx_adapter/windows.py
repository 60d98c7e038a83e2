"""Convolution and pooling: what slides over two dims; one dim is two of which one is 1."""

import nbgrad as nb
from nbgrad.nn import functional as F

from .tools import Unsupported


def pads_of(sizes, kernel, strides, dilations, auto_pad, pads):
    """[(before, after)] per dim."""
    if auto_pad in ("NOTSET", "VALID"):
        pads = pads if pads and auto_pad == "NOTSET" else [0] * (2 * len(sizes))
        return list(zip(pads[:len(sizes)], pads[len(sizes):]))
    found = []
    for n, k, s, d in zip(sizes, kernel, strides, dilations):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        half = total // 2
        found.append((half, total - half) if auto_pad == "SAME_UPPER" else (total - half, half))
    return found


def padded(x, pads, value=0.0):
    """x with (before, after) added to its last dims."""
    widths = [width for pair in reversed(pads) for width in pair]
    return F.pad(x, widths, value=value) if any(widths) else x


def flat(x, *lists):
    """x and the lists of a window with two spatial dims; 1s where there was one dim."""
    spatial = x.ndim - 2
    if spatial > 2:
        raise Unsupported("windows over three dims")
    lists = [list(v) if v else [1] * spatial for v in lists]
    return (x, *lists) if spatial == 2 else (nb.unsqueeze(x, 2), *[[1, *v] for v in lists])


def back(y, spatial):
    return y if spatial == 2 else nb.squeeze(y, 2)


# -------------------------------------------------------------------------------------- convolution

def conv(x, w, b=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None,
         strides=None):
    spatial = x.ndim - 2
    pads = pads_of(x.shape[2:], w.shape[2:], strides or [1] * spatial, dilations or [1] * spatial,
                   auto_pad, pads)
    x, strides, dilations = flat(x, strides, dilations)
    w, pads = (w, pads) if spatial == 2 else (nb.unsqueeze(w, 2), [(0, 0), *pads])
    padding = 0
    if all(before == after for before, after in pads):
        padding = [before for before, _ in pads]
    else:
        x = padded(x, pads)
    return back(F.conv2d(x, w, b, strides, padding, dilations, group), spatial)


def conv_transpose(x, w, b=None, *, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None,
                   output_padding=None, output_shape=None, pads=None, strides=None):
    """With ONNX's padding where both ends have the same, else in full and then cut, or grown."""
    spatial = x.ndim - 2
    if spatial > 2:
        raise Unsupported("windows over three dims")
    f = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[spatial]
    ones = [1] * spatial
    strides, dilations, extra = strides or ones, dilations or ones, output_padding or [0] * spatial
    sizes = [s * (n - 1) + d * (k - 1) + 1 + e for n, k, s, d, e
             in zip(x.shape[2:], w.shape[2:], strides, dilations, extra)]
    if auto_pad.startswith("SAME") and not output_shape:
        output_shape = [n * s for n, s in zip(x.shape[2:], strides)]
    cuts = _cuts(sizes, auto_pad, output_shape, pads or [0] * 2 * spatial)
    if all(before == after >= 0 for before, after in cuts):
        return f(x, w, b, strides, [before for before, _ in cuts], extra, group, dilations)
    y = f(x, w, None, strides, 0, 0, group, dilations)
    ends = [(-before, e - after) for (before, after), e in zip(cuts, extra)]
    y = y[(..., *[slice(-min(start, 0), n + min(end, 0)) for (start, end), n
                  in zip(ends, y.shape[2:])])]
    y = F.pad(y, [max(n, 0) for pair in reversed(ends) for n in pair])
    return y if b is None else y + b.reshape(-1, *ones)


def _cuts(sizes, auto_pad, output_shape, pads):
    """[(before, after)] to cut off the whole of it; below 0 where it is to grow, at the end."""
    if not output_shape:
        return list(zip(pads[:len(sizes)], pads[len(sizes):]))
    found = []
    for n, want in zip(sizes, output_shape):
        half, total = (n - want) // 2, n - want
        pair = (half, total - half) if auto_pad == "SAME_UPPER" else (total - half, half)
        found.append(pair if total >= 0 else (0, total))
    return found


# ------------------------------------------------------------------------------------------ pooling

def _windows(x, kernel_shape, strides, dilations, auto_pad, pads):
    """x, kernel, strides, dilations and pads over two dims."""
    spatial = x.ndim - 2
    ones = [1] * spatial
    pads = pads_of(x.shape[2:], kernel_shape, strides or ones, dilations or ones, auto_pad, pads)
    x, kernel_shape, strides, dilations = flat(x, kernel_shape, strides, dilations)
    return x, kernel_shape, strides, dilations, [(0, 0)] * (2 - spatial) + pads


def _even(pads, kernel):
    """Whether the pooling functions take this padding themselves."""
    return all(before == after <= k // 2 for (before, after), k in zip(pads, kernel))


def max_pool(x, *, kernel_shape, auto_pad="NOTSET", ceil_mode=0, dilations=None, pads=None,
             storage_order=0, strides=None):
    spatial = x.ndim - 2
    x, kernel, strides, dilations, pads = _windows(x, kernel_shape, strides, dilations, auto_pad,
                                                   pads)
    N, C, H, W = x.shape
    padding = [before for before, _ in pads] if _even(pads, kernel) else 0
    if not padding:
        x = padded(x, pads, float("-inf"))
    y, at = F.max_pool2d(x, kernel, strides, padding, dilations, bool(ceil_mode), True)
    if storage_order:
        at = nb.remainder(at, W) * H + nb.floor_divide(at, W)
    at = at + (nb.arange(N * C) * (H * W)).reshape(N, C, 1, 1)
    return back(y, spatial), back(at, spatial)


def average_pool(x, *, kernel_shape, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0,
                 dilations=None, pads=None, strides=None):
    spatial = x.ndim - 2
    x, kernel, strides, dilations, pads = _windows(x, kernel_shape, strides, dilations, auto_pad,
                                                   pads)
    if max(dilations) > 1:
        raise Unsupported("dilation of average pooling (PyTorch has none either)")
    if _even(pads, kernel):
        padding = [before for before, _ in pads]
        return back(F.avg_pool2d(x, kernel, strides, padding, bool(ceil_mode),
                                 bool(count_include_pad)), spatial)
    y = F.avg_pool2d(padded(x, pads), kernel, strides, 0, bool(ceil_mode))
    if not count_include_pad:
        y = y / F.avg_pool2d(padded(nb.ones_like(x), pads), kernel, strides, 0, bool(ceil_mode))
    return back(y, spatial)


def lp_pool(x, *, kernel_shape, auto_pad="NOTSET", ceil_mode=0, dilations=None, p=2, pads=None,
            strides=None):
    spatial = x.ndim - 2
    x, kernel, strides, dilations, pads = _windows(x, kernel_shape, strides, dilations, auto_pad,
                                                   pads)
    if max(dilations) > 1:
        raise Unsupported("dilation of average pooling (PyTorch has none either)")
    powers = padded(nb.pow(nb.abs(x), p), pads)
    y = F.avg_pool2d(powers, kernel, strides, 0, bool(ceil_mode), divisor_override=1)
    return back(nb.pow(y, 1 / p), spatial)


CONVOLUTIONS = {"Conv": conv, "ConvTranspose": conv_transpose}
POOLS = {
    "AveragePool": average_pool, "MaxPool": max_pool, "LpPool": lp_pool,
    "GlobalAveragePool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "GlobalMaxPool": lambda x: nb.amax(x, tuple(range(2, x.ndim)), True),
}
