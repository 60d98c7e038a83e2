"""Batch normalization of parts of a batch, by definition: one after the other."""

import numpy as np

from .norm import batch_norm, batch_norm_backward

__all__ = ["ghost_batch_norm", "ghost_batch_norm_backward"]


def _parts(x, size):
    return [slice(i, i + size) for i in range(0, len(x), size)]


def ghost_batch_norm(x, gamma, beta, *, size, eps):
    """y, mean, var, invstd = 1 / √(var + eps) of each ``size`` samples, the last of which may be
    fewer: y = x̂ γ + β; the others float64 (ghosts, C)."""
    y, parts = np.empty_like(x), _parts(x, size)
    stats = np.zeros((3, len(parts), x.shape[1]))
    for g, part in enumerate(parts):
        y[part], *stats[:, g] = batch_norm(x[part], gamma, beta, eps=eps)
    return y, *stats


def ghost_batch_norm_backward(dy, x, gamma, mean, invstd, *, size):
    """dx as batch_norm_backward's of each ghost, dγ = Σ dy x̂ and dβ = Σ dy over all."""
    dx, parts = np.empty_like(x), _parts(x, size)
    sums = np.zeros((2, x.shape[1]))
    for g, part in enumerate(parts):
        dx[part], *own, _ = batch_norm_backward(dy[part].astype(np.float64), x[part], gamma,
                                                mean[g], invstd[g])
        sums += own
    with np.errstate(all="ignore"):
        return dx, *sums.astype(x.dtype)
