"""Group normalization by definition, in float64, rounded once at the end.

x is (N, C, *S), its C channels in groups of C / groups that lie together; each sample's group has
statistics of its own: float64 (N, groups).      Wu & He 2018; Ulyanov et al. 2016
"""

import numpy as np

__all__ = ["group_norm", "group_norm_backward"]


def _grouped(a, groups):
    """(N, C, *S) as (N, groups, channels, values), in float64."""
    N, C = a.shape[:2]
    S = int(np.prod(a.shape[2:]))
    return a.astype(np.float64).reshape(N, groups, C // groups, S)


def _gain(a, x, groups, missing):
    """A (C,) array shaped to broadcast against _grouped(x)."""
    a = np.full(x.shape[1], missing) if a is None else np.asarray(a, np.float64)
    return a.reshape(1, groups, x.shape[1] // groups, 1)


def _as(x, values):
    """``values`` as an array like x."""
    out = np.empty_like(x)
    out[...] = values.reshape(x.shape)
    return out


def group_norm(x, gamma, beta, *, groups, eps, center=True, floor=None):
    """y = x̂ γ + β, mean, invstd = 1 / √(var + eps); without center, the mean counts as 0. With
    floor (C,), max(y, floor)."""
    g = _grouped(x, groups)
    n = max(g.shape[2] * g.shape[3], 1)
    with np.errstate(all="ignore"):
        pivot = g[:, :, :1, :1] if g.size else np.zeros((*g.shape[:2], 1, 1))
        pivot = np.where(np.isfinite(pivot), pivot, 0.0)      # a constant group's mean is exact
        mean = pivot + (g - pivot).sum((2, 3), keepdims=True) / n if center else 0 * pivot
        var = ((g - mean) ** 2).sum((2, 3), keepdims=True) / n
        invstd = 1 / np.sqrt(var + eps)
        y = (g - mean) * invstd * _gain(gamma, x, groups, 1.0) + _gain(beta, x, groups, 0.0)
        y = y if floor is None else np.maximum(y, _gain(floor, x, groups, 0.0))
        return _as(x, y), mean[:, :, 0, 0], invstd[:, :, 0, 0]


def group_norm_backward(dy, x, gamma, mean, invstd, *, groups, center=True, beta=None, floor=None):
    """dx = invstd (g − mean(g) − x̂ mean(g x̂)) with g = γ dy, no mean(g) without center;
    dγ = Σ dy x̂ and dβ = Σ dy over N and S. With floor, dy counts where x̂ γ + β > floor, and what is
    left of it is dfloor."""
    d, s = _grouped(dy, groups), invstd[:, :, None, None]
    n = max(d.shape[2] * d.shape[3], 1)
    with np.errstate(all="ignore"):
        xhat = (_grouped(x, groups) - mean[:, :, None, None]) * s
        gain, rest = _gain(gamma, x, groups, 1.0), ()
        if floor is not None:
            above = xhat * gain + _gain(beta, x, groups, 0.0) > _gain(floor, x, groups, 0.0)
            d, rest = np.where(above, d, 0.0), (np.where(above, 0.0, d),)
        g = d * gain
        a = g.sum((2, 3), keepdims=True) / n if center else 0.0
        b = (g * xhat).sum((2, 3), keepdims=True) / n
        dx = _as(x, (g - a - xhat * b) * s)
        return dx, *((v.sum((0, 3)).reshape(-1).astype(x.dtype)) for v in (d * xhat, d, *rest))
