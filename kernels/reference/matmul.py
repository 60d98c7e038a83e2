"""Matrix products by definition."""

import numpy as np

from ..quiet import quiet

__all__ = ["linear", "matmul"]


@quiet
def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    return np.matmul(a, b)


@quiet
def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    y = matmul(x, weight.T)
    return y if bias is None else y + bias
