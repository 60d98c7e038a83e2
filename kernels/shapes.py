"""Geometry of windows: sizes and ranges that every kernel set computes the same way.

Named tuples, because Numba passes them into kernels by name.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

__all__ = ["Conv", "Pool", "adaptive_ranges", "conv_size", "pool_size", "window_ranges"]


def conv_size(size, k, s, p, d):
    """⌊(size + 2p − d(k−1) − 1) / s⌋ + 1: how many windows of k fit."""
    return (size + 2 * p - d * (k - 1) - 1) // s + 1


def pool_size(size, k, s, p, d, ceil_mode):
    """As conv_size; ceil_mode keeps a last, partial window that starts in input or left padding."""
    if not ceil_mode:
        return conv_size(size, k, s, p, d)
    out = -(-(size + 2 * p - d * (k - 1) - 1) // s) + 1
    return out - 1 if (out - 1) * s >= size + p else out


class Conv(NamedTuple):
    """A 2-d convolution: x (N, C, H, W), weight (O, C/G, I, J), y (N, O, P, Q)."""

    N: int
    C: int
    H: int
    W: int
    O: int
    P: int
    Q: int
    I: int
    J: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int
    G: int

    @classmethod
    @lru_cache(1 << 10)
    def of(cls, x_shape, weight_shape, stride, padding, dilation, groups):
        """Geometry from the shapes of x and weight."""
        (N, C, H, W), (O, _, I, J) = x_shape, weight_shape
        (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
        return cls(N, C, H, W, O, conv_size(H, I, sh, ph, dh), conv_size(W, J, sw, pw, dw),
                   I, J, sh, sw, ph, pw, dh, dw, groups)

    @property
    def depth(self):
        """K, the length of one output's sum: taps × channels of its group."""
        return self.I * self.J * (self.C // self.G)

    @property
    def depthwise(self):
        """One channel in and one out per group."""
        return self.G == self.C == self.O and self.G > 1


class Pool(NamedTuple):
    """A 2-d max pooling: x (N, C, H, W), windows (I, J), y (N, C, P, Q)."""

    H: int
    W: int
    P: int
    Q: int
    I: int
    J: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int

    @classmethod
    @lru_cache(1 << 10)
    def of(cls, x_shape, kernel_size, stride, padding, dilation, ceil_mode):
        """Geometry from the shape of x."""
        (H, W), (I, J) = x_shape[2:], kernel_size
        (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
        P, Q = (pool_size(*a, ceil_mode) for a in ((H, I, sh, ph, dh), (W, J, sw, pw, dw)))
        return cls(H, W, P, Q, I, J, sh, sw, ph, pw, dh, dw)


def window_ranges(size, k, s, p, ceil_mode, include_pad):
    """Start and end of each pooling window inside the input, and what its length counts as."""
    start = np.arange(pool_size(size, k, s, p, 1, ceil_mode)) * s - p
    end = np.minimum(start + k, size + p)
    first, last = np.maximum(start, 0), np.minimum(end, size)
    return first, last, (end - start if include_pad else np.maximum(last - first, 0))


def adaptive_ranges(size, out):
    """Window i of adaptive pooling is [⌊i·size/out⌋, ⌈(i+1)·size/out⌉); as window_ranges."""
    i = np.arange(out)
    first, last = i * size // max(out, 1), -(-(i + 1) * size // max(out, 1))
    return first, last, last - first
