"""Matrix products by definition."""

import math

import numpy as np

from ..quiet import quiet

__all__ = ["linear", "linear_backward", "matmul"]


@quiet
def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    return np.matmul(a, b)


@quiet
def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    y = matmul(x, weight.T)
    return y if bias is None else y + bias


def linear_backward(dy, x, weight, *, input_gradient):
    """dx = dy w (0 unless asked for),  dw = dyᵀ x,  db = Σ dy over rows."""
    M = math.prod(dy.shape[:-1])
    rows, nothing = dy.reshape(M, dy.shape[-1]), np.zeros((), x.dtype)
    dx = matmul(rows, weight).reshape(x.shape) if input_gradient else nothing
    dweight = matmul(rows.T, x.reshape(M, x.shape[-1]))
    return dx, dweight, rows.sum(0, dtype=np.float64).astype(dy.dtype)
