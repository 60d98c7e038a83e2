"""Sums over columns: contiguous memory read W values at a time into W float64 accumulators.

The additions of one accumulator happen in memory order, so LLVM may vectorise over the columns
without leave to reassociate. Arguments are contiguous one-dimensional views; W is the size of the
per-column arrays, and what is left after the last whole row of W goes to the first columns.
"""

import numpy as np

from .jit import device

__all__ = ["add", "add_products", "add_squares", "fold", "normalize", "normalize_backward",
           "repeat", "total"]


@device
def add(x, pivot, acc):
    """acc[j] += Σ_r (x[r W + j] − pivot[j])."""
    W = acc.size
    for r in range(x.size // W):
        row = x[r * W:r * W + W]
        for j in range(W):
            acc[j] += row[j] - pivot[j]
    tail = x[x.size // W * W:]
    for j in range(tail.size):
        acc[j] += tail[j] - pivot[j]


@device
def add_squares(x, mean, acc):
    """acc[j] += Σ_r (x[r W + j] − mean[j])²."""
    W = acc.size
    for r in range(x.size // W):
        row = x[r * W:r * W + W]
        for j in range(W):
            d = row[j] - mean[j]
            acc[j] += d * d
    tail = x[x.size // W * W:]
    for j in range(tail.size):
        d = tail[j] - mean[j]
        acc[j] += d * d


@device
def add_products(dy, x, mean, sum_dy, sum_dx):
    """sum_dy[j] += Σ_r dy,  sum_dx[j] += Σ_r dy (x − mean[j])."""
    W = mean.size
    for r in range(x.size // W):
        a, b = dy[r * W:r * W + W], x[r * W:r * W + W]
        for j in range(W):
            d = np.float64(a[j])
            sum_dy[j] += d
            sum_dx[j] += d * (b[j] - mean[j])
    first = x.size // W * W
    a, b = dy[first:], x[first:]
    for j in range(b.size):
        d = np.float64(a[j])
        sum_dy[j] += d
        sum_dx[j] += d * (b[j] - mean[j])


@device
def normalize(x, mean, scale, shift, y):
    """y = (x − mean[j]) scale[j] + shift[j]."""
    W = mean.size
    for r in range(x.size // W):
        a, b = x[r * W:r * W + W], y[r * W:r * W + W]
        for j in range(W):
            b[j] = (a[j] - mean[j]) * scale[j] + shift[j]
    first = x.size // W * W
    a, b = x[first:], y[first:]
    for j in range(a.size):
        b[j] = (a[j] - mean[j]) * scale[j] + shift[j]


@device
def normalize_backward(dy, x, mean, scale, shift, slope, dx):
    """dx = (dy − shift[j] − (x − mean[j]) slope[j]) scale[j]."""
    W = mean.size
    for r in range(x.size // W):
        d, a, b = dy[r * W:r * W + W], x[r * W:r * W + W], dx[r * W:r * W + W]
        for j in range(W):
            b[j] = (d[j] - shift[j] - (a[j] - mean[j]) * slope[j]) * scale[j]
    first = x.size // W * W
    d, a, b = dy[first:], x[first:], dx[first:]
    for j in range(a.size):
        b[j] = (d[j] - shift[j] - (a[j] - mean[j]) * slope[j]) * scale[j]


@device
def fold(acc, channels, out):
    """out[c] = Σ of the columns of channel c."""
    for c in range(channels):
        out[c] = 0.0
    for k in range(acc.size // channels):
        row = acc[k * channels:k * channels + channels]
        for c in range(channels):
            out[c] += row[c]


@device
def repeat(a, channels, out):
    """The value of each column's channel."""
    for k in range(out.size // channels):
        row = out[k * channels:k * channels + channels]
        for c in range(channels):
            row[c] = a[c]


@device
def total(acc):
    """Σ of the accumulators, halved pairwise; changes them."""
    n = acc.size
    while n > 1:
        half = n // 2
        a, b = acc[:half], acc[n - half:n]
        for j in range(half):
            a[j] += b[j]
        n -= half
    return acc[0]
