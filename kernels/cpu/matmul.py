"""Matrix products through BLAS, with outputs from the pool and operands that BLAS can take as they are."""

import numpy as np

from ..quiet import quiet
from . import memory
from .reduce import sum

__all__ = ["linear", "linear_backward", "matmul"]

SMALL = 1 << 14          # elements of the output up to which NumPy allocates it in less time


def _operand(x):
    """Rows or columns contiguous: NumPy hands anything else to a scalar loop, 100 times slower."""
    s = x.strides
    if x.itemsize in (s[-1], s[-2]) and min(s) >= 0:
        return x
    return np.ascontiguousarray(x)


@quiet
def matmul(a, b):
    """y = a b for (…, M, K) and (…, K, N); leading axes broadcast."""
    if a.shape[-2] * b.shape[-1] < SMALL or a.ndim > 2 or b.ndim > 2 or a.dtype.kind != "f":
        return np.matmul(_operand(a), _operand(b))
    out = memory.empty((a.shape[-2], b.shape[-1]), a.dtype)
    return np.matmul(_operand(a), _operand(b), out=out)


@quiet
def linear(x, weight, bias=None):
    """y = x wᵀ + b for x (…, K), weight (N, K), bias (N,)."""
    K = x.shape[-1]
    rows = x if x.ndim == 2 else x.reshape(-1, K)
    y = matmul(rows, weight.T)
    if bias is not None:
        y += bias
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def linear_backward(dy, x, weight, *, input_gradient):
    """dx = dy w (zeros unless asked for),  dw = dyᵀ x,  db = Σ dy over rows."""
    rows = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
    inputs = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    dx = matmul(dy, weight) if input_gradient else np.broadcast_to(x.dtype.type(0), x.shape)
    return dx, matmul(rows.T, inputs), sum(rows, axes=0, keepdims=False)
