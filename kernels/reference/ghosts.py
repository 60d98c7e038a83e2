"""Batch normalization of parts of a batch, by definition: one after the other."""

import numpy as np

from .norm import batch_norm, batch_norm_backward

__all__ = ["ghost_batch_norm", "ghost_batch_norm_backward"]


def _parts(x, size):
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _of(a, g):
    """γ or β of a ghost."""
    return a if a is None or a.ndim == 1 else a[g]


def ghost_batch_norm(x, gamma, beta, *, size, eps):
    """y, mean, var, invstd = 1 / √(var + eps) of each ``size`` samples, the last of which may be
    fewer: y = x̂ γ + β, γ and β (C,) or (ghosts, C); the others float64 (ghosts, C)."""
    y, parts = np.empty_like(x), _parts(x, size)
    stats = np.zeros((3, len(parts), x.shape[1]))
    for g, part in enumerate(parts):
        y[part], *stats[:, g] = batch_norm(x[part], _of(gamma, g), _of(beta, g), eps=eps)
    return y, *stats


def ghost_batch_norm_backward(dy, x, gamma, mean, invstd, *, size, apart=False):
    """dx as batch_norm_backward's of each ghost, dγ = Σ dy x̂ and dβ = Σ dy over all, (C,), or of
    each, (ghosts, C), if ``apart``."""
    dx, parts = np.empty_like(x), _parts(x, size)
    sums = np.zeros((2, len(parts), x.shape[1]))
    for g, part in enumerate(parts):
        dx[part], *sums[:, g], _ = batch_norm_backward(dy[part].astype(np.float64), x[part],
                                                       _of(gamma, g), mean[g], invstd[g])
    with np.errstate(all="ignore"):
        return dx, *(sums if apart else sums.sum(1)).astype(x.dtype)
