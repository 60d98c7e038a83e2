"""Dropout by definition. Srivastava et al. 2014."""

import numpy as np

from ..quiet import quiet

__all__ = ["dropout"]


@quiet
def dropout(x, rng, p):
    """y = x / (1 − p) where rng.random(x.shape, float32) ≥ p, else 0; and what y / x is."""
    keep, scale = rng.random(x.shape, np.float32) >= p, x.dtype.type(0 if p == 1 else 1 / (1 - p))
    return np.where(keep, x * scale, x.dtype.type(0)), keep * scale
