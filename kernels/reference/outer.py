"""Matrices and outer products, by definition, of functions that arrays on a device have, too."""

import numpy as np

__all__ = ["add_outer"]


def add_outer(x, u, v, *, a, b):
    """y = a x + b u vᵀ.      x, y: (M, N)  u: (M,)  v: (N,), of one dtype"""
    with np.errstate(all="ignore"):
        return (a * x.astype(np.float64) + b * u[:, None].astype(np.float64) * v).astype(x.dtype)
