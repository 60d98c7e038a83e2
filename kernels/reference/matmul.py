"""Matrix products by definition."""

import numpy as np

__all__ = ["linear", "matmul"]


def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    with np.errstate(all="ignore"):
        return np.matmul(a, b)


def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    y = matmul(x, weight.T)
    return y if bias is None else y + bias
