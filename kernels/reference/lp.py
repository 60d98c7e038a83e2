"""Powers of deviations, by definition: r = sign(d) |d|^(p−1) of d = (x − pivot) / unit. For p = inf
r is sign(d) where |d| is the largest of its channel, else 0. x is (N, C, *S); pivot, unit and all
constants are float64 (C,); p is a whole number of at least 1, or inf. Of functions that arrays on a
device have, too."""

import math

import numpy as np

__all__ = ["power_map", "power_sums"]


def _at(a, x):
    return a.reshape(1, -1, *[1] * (x.ndim - 2))


def _powers(x, pivot, unit, p, top):
    d = (x.astype(np.float64) - _at(pivot, x)) / _at(unit, x)
    size = np.abs(d)
    if p == math.inf:
        return size, np.where(size == _at(top, x), np.sign(d), 0.0)
    return size ** p, np.sign(d) * size ** (p - 1)


def power_sums(x, pivot, unit, *, p):
    """Σ |d|^p and Σ r of each channel; for p = inf, the largest |d| (0 of nothing), Σ r, and how
    many r are not 0."""
    axes, top = (0, *range(2, x.ndim)), np.zeros_like(pivot)
    with np.errstate(all="ignore"):
        if p == math.inf:
            size, _ = _powers(x, pivot, unit, p, top)
            top = size.max(axes) if x.size else top
            _, r = _powers(x, pivot, unit, p, top)
            return top, r.sum(axes), np.abs(r).sum(axes)
        size, r = _powers(x, pivot, unit, p, top)
        return size.sum(axes), r.sum(axes)


def power_map(dy, x, pivot, unit, scale, shift, slope, top, *, p):
    """dx = scale dy + shift + slope r, in x's dtype; top: the largest |d|, for p = inf."""
    with np.errstate(all="ignore"):
        _, r = _powers(x, pivot, unit, p, top)
        return (dy * _at(scale, x) + _at(shift, x) + _at(slope, x) * r).astype(x.dtype)
