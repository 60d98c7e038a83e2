"""Reductions by definition. Sums of float32 are accumulated in float64 and rounded once."""

import numpy as np

from ..quiet import quiet

__all__ = ["max", "min", "prod", "sum"]


@quiet
def sum(x, *, axes, keepdims):
    """Σ over axes."""
    return np.sum(x, axis=axes, keepdims=keepdims, dtype=np.float64 if x.dtype.kind == "f" else None
                  ).astype(x.dtype if x.dtype.kind == "f" else np.int64)


@quiet
def prod(x, *, axes, keepdims):
    """Π over axes."""
    return np.prod(x, axis=axes, keepdims=keepdims)


def max(x, *, axes, keepdims):
    """Largest element over axes; NaN if there is one."""
    return np.max(x, axis=axes, keepdims=keepdims)


def min(x, *, axes, keepdims):
    """Smallest element over axes; NaN if there is one."""
    return np.min(x, axis=axes, keepdims=keepdims)
