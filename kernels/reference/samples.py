"""Statistics of each sample's channels, by definition, and what is computed from a value and the
constants of its channel. x: (N, C, *S); w: weights (N, 1, *S) or None; constants: (N, C) or (1, C).
Of functions that arrays on a device have, too.

    affine    y = (x − μ) s + t                      of μ, s, t
    gated     y = x sigmoid(v x) s + t               of v, s, t       Liu, Brock, Simonyan & Le 2020
    bounded   y = γ x / max(v x + r, c) + β          of v, r, c, γ, β                       the same
"""

import numpy as np

__all__ = ["sample_map", "sample_map_backward", "sample_moments", "sample_sums"]


def _affine(x, mu, s, t):
    return (x - mu) * s + t, s, (-s, x - mu, np.ones_like(x))


def _gated(x, v, s, t):
    gate = 1 / (1 + np.exp(-v * x))
    down = gate * (1 - gate)
    return (x * gate * s + t, s * (gate + v * x * down),
            (s * x * x * down, x * gate, np.ones_like(x)))


def _bounded(x, v, r, c, gamma, beta):
    own = v * x + r
    above = own > c
    d = np.where(above, own, c)
    down = -gamma * x / (d * d)
    return (gamma * x / np.maximum(own, c) + beta, gamma / d * np.where(above, r / d, 1.0),
            (above * down * x, above * down, ~above * down, x / d, np.ones_like(x)))


# name -> y, its slope by x and those by the constants, in this order
_FORMULAS = {"affine": _affine, "gated": _gated, "bounded": _bounded}


def _at(constants, x):
    """Tables (N or 1, C) shaped to broadcast against x."""
    return [a.reshape(a.shape + (1,) * (x.ndim - 2)) for a in constants]


def _there(a, w):
    return a if w is None else np.where(w > 0, a, 0.0)


def sample_moments(x, w=None, *, together=False):
    """Σw, the mean by weight (0 of nothing) and M2 of each sample's channels, float64 (N, C); of
    all samples ``together``, (1, C). What has weight 0 is not looked at."""
    axes = (*[0] * together, *range(2, x.ndim))
    rows = 1 if together else len(x)
    wide = x.astype(np.float64)
    w = np.ones_like(wide) if w is None else np.ones_like(wide) * w
    count = w.sum(axes, keepdims=True)
    if not x.size:
        return tuple([count.reshape(rows, x.shape[1]) * 0 for _ in range(3)])
    with np.errstate(all="ignore"):
        there, n = w > 0, np.where(count > 0, count, 1.0)
        pivot = np.where(there, wide, -np.inf).max(axes, keepdims=True)
        pivot = np.where(np.isfinite(pivot), pivot, 0.0)     # a constant channel's mean is exact
        mean = pivot + (w * np.where(there, wide - pivot, 0.0)).sum(axes, keepdims=True) / n
        mean = np.where(count > 0, mean, 0.0)
        m2 = (w * np.where(there, wide - mean, 0.0) ** 2).sum(axes, keepdims=True)
    return tuple([a.reshape(rows, x.shape[1]) for a in (count, mean, m2)])


def sample_map(name, x, constants, w=None):
    """y of x and its channel's constants; 0 where w is."""
    with np.errstate(all="ignore"):
        y = _FORMULAS[name](x.astype(np.float64), *_at(constants, x))[0]
        return _there(y, w).astype(x.dtype)


def sample_map_backward(name, dy, x, constants, w, p, q, mean):
    """dx for constants that stay, and, weighted by w, p + q (x − mean) of the channel."""
    wide, (p, q, mean) = x.astype(np.float64), _at((p, q, mean), x)
    with np.errstate(all="ignore"):
        dx = dy * _FORMULAS[name](wide, *_at(constants, x))[1]
        dx = dx + (1.0 if w is None else w) * (p + q * (wide - mean))
        return _there(dx, w).astype(x.dtype)


def sample_sums(name, dy, x, constants, w=None):
    """The gradients of the constants, float64 (N, C), or (1, C) if all of them are."""
    rows = max(len(a) for a in constants)
    axes = (*[0] * (rows == 1), *range(2, x.ndim))
    with np.errstate(all="ignore"):
        slopes = _FORMULAS[name](x.astype(np.float64), *_at(constants, x))[2]
        return tuple(_there(dy * a, w).sum(axes).reshape(rows, -1) for a in slopes)
