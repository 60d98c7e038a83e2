"""Convolution and pooling: what slides over two dims; one dim is two of which one is 1."""

import nbgrad as nb
from nbgrad.nn import functional as F
from nbgrad.ops.conv import conv2d_input

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
    """The input gradient of conv2d, in full, of which the padding is cut off."""
    spatial = x.ndim - 2
    x, strides, dilations = flat(x, strides, dilations)
    w = w if spatial == 2 else nb.unsqueeze(w, 2)
    extra = [0] * (2 - spatial) + list(output_padding or [0] * spatial)
    sizes = [s * (n - 1) + d * (k - 1) + 1 + e for n, k, s, d, e
             in zip(x.shape[2:], w.shape[2:], strides, dilations, extra)]
    if auto_pad.startswith("SAME") and not output_shape:
        output_shape = [n * s for n, s in zip(x.shape[2:], strides)]
    cuts = _cuts(sizes, auto_pad, output_shape, pads)
    sizes = [n - min(b + a, 0) for n, (b, a) in zip(sizes, cuts)]
    y = conv2d_input(x, w, input_size=(len(x), w.shape[1] * group, *sizes), stride=tuple(strides),
                     padding=(0, 0), dilation=tuple(dilations), groups=group)
    rows, columns = (slice(max(b, 0), n - max(a, 0)) for n, (b, a) in zip(sizes, cuts))
    y = back(y[:, :, rows, columns], spatial)
    return y if b is None else y + b.reshape(-1, *[1] * spatial)


def _cuts(sizes, auto_pad, output_shape, pads):
    """[(before, after)] to cut off the whole of it; below 0 where it is to grow, at the end."""
    if not output_shape:
        pads = pads or [0] * 4
        pads = [0, *pads[:1], 0, *pads[1:]] if len(pads) == 2 else pads
        return list(zip(pads[:2], pads[2:]))
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
