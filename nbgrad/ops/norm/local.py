"""Local response normalization and normalization to unit length: compositions of other ops."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor
from nbgrad.ops.elementwise import clamp, div, pow
from nbgrad.ops.indexing import pad
from nbgrad.ops.reduce import norm
from nbgrad.ops.shape import checked

__all__ = ["local_response_norm", "normalize"]


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75,
                        k: float = 1.0) -> Tensor:
    """y = x / (k + α/size Σ x²)^β, the sum over ``size`` channels of which x's is the middle one;
    those that are not there count as 0.      x: (N, C, *), at least 3 dims

    Keeps x and the sums. Raises ValueError for fewer dims and for a size below 1.      Krizhevsky,
    Sutskever & Hinton 2012, with α divided by the size as in PyTorch.

    >>> import nbgrad
    >>> local_response_norm(nbgrad.ones((1, 3, 1)), 3, alpha=3.0, beta=1.0).flatten().tolist()
    [0.3333333432674408, 0.25, 0.3333333432674408]
    """
    x = checked(input, "local_response_norm")
    if x.ndim < 3:
        raise ValueError("local_response_norm: Expected 3D or higher dimensionality input (got "
                         f"{x.ndim} dimensions)")
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"local_response_norm: size must be an int of at least 1, got {size!r}")
    C, others = x.shape[1], (0, 0) * (x.ndim - 2)
    before, behind = min(size // 2, C), min((size - 1) // 2, C)
    squares = pad(x * x, (*others, before, behind))
    total = squares[:, :C]
    for i in range(1, before + behind + 1):
        total = total + squares[:, i:i + C]
    return div(x, pow(total * (alpha / size) + k, beta))  # type: ignore[no-any-return]


def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    """y = x / max(‖x‖ₚ, ε), the norm over ``dim``: vectors of length 1, or 0.

    Raises TypeError for integers, IndexError for a dim that is not there, ValueError for p ≤ 0.

    >>> import nbgrad
    >>> normalize(nbgrad.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = checked(input, "normalize")
    return div(x, clamp(norm(x, p, dim, keepdim=True), min=eps))  # type: ignore[no-any-return]
