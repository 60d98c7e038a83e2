"""Decorrelation: the inverse square root of a covariance, made of matrix products."""

# mypy: no-warn-return-any

from __future__ import annotations

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.backend import greatest, move
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.matmul import matmul
from nbgrad.ops.norm.channels import center, check_channels, check_count, check_tensors
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import broadcast_to, mT, permute, reshape

__all__ = ["inverse_sqrt", "whiten"]

CLOSE = 1e-8                # from here on, two more steps are exact, and so are their derivatives
STEPS = 100                 # what is not there then never will be: it is singular


def inverse_sqrt(matrix: Tensor) -> Tensor:
    """A^(−1/2) of symmetric, positive definite matrices (…, d, d).

    The coupled Newton–Schulz iteration Y ← Y T, Z ← T Z, T = (3 I − Z Y)/2 from Y = A / tr A and
    Z = I, whose Z approaches √(tr A) A^(−1/2), until it has converged (Higham 2008; Huang et al.
    2019, who stop early). Made of products, so derivatives of all orders follow. Steps grow with
    the logarithm of the condition number: about 10 for 10, 24 for 10⁶. Raises ValueError for what
    is singular or not positive definite in its dtype; a matrix with NaN or infinity gives NaN.

    >>> import nbgrad
    >>> root = inverse_sqrt(nbgrad.tensor([[4.0, 0.0], [0.0, 16.0]]))
    >>> [[round(v, 6) for v in row] for row in root.tolist()]
    [[0.5, 0.0], [0.0, 0.25]]
    """
    check_tensors("inverse_sqrt", matrix=matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.dtype.kind not in "fV":
        raise ValueError("inverse_sqrt: expected floating square matrices, got "
                         f"{matrix.dtype} of size {list(matrix.shape)}")
    eye = as_tensor(move(np.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.device))
    trace = sum(matrix * eye, (-2, -1), True)
    finite = np.isfinite(greatest(np.abs(matrix.data), (-2, -1)))
    if (finite & ~(trace.data[..., 0, 0] > 0)).any() and matrix.data.size:
        raise ValueError("inverse_sqrt: expected positive definite matrices, got a trace of "
                         "0 or less")
    y, z, left, last = matrix / trace, broadcast_to(eye, matrix.shape), 2, np.inf
    for _ in range(STEPS):
        product = matmul(z, y)
        each = greatest(np.abs(product.data - eye.data), (-2, -1))
        apart = float(greatest(np.where(finite, each, 0)))            # one bad matrix is not all
        close = apart < CLOSE or (apart < 1e-2 and apart >= last)     # or as close as rounding lets
        left, last = left - close, apart
        t = (eye * 3 - product) * 0.5
        y, z = matmul(y, t), matmul(t, z)
        if left <= 0:
            return z * rsqrt(trace)
        if not np.isfinite(apart):
            break
    raise ValueError("inverse_sqrt: expected positive definite matrices, got one that is singular "
                     f"in {matrix.dtype}: the iteration does not converge")


def whiten(input: Tensor, group_size: int, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ = W (x − μ),  W = (Σ + ε I)^(−1/2): channels of a group are uncorrelated, of variance 1,
    and as near to x as that can be (ZCA). Also μ (C,) and W (groups, d, d), for running averages,
    which carry no gradient.      Huang et al. 2018

    x: (N, C, *S), groups of d = ``group_size`` channels; μ and Σ (biased) are over N and S. Σ and W
    are computed in float64 and kept. Raises ValueError for group sizes that do not divide C, for
    one value per channel, and for a Σ + ε I that is singular in float64.
    """
    check_channels("whiten", input)
    check_count("whiten", input)
    C, d = input.shape[1], group_size
    if not isinstance(d, int) or d < 1 or C % d or d > max(C, 1):
        raise ValueError(f"whiten: group_size must divide the {C} channels, got {d!r}")
    if not eps >= 0:
        raise ValueError(f"whiten: eps must not be negative, got {eps}")
    xc, mean = center(input)
    xc = grouped(xc, d).to(np.float64)
    m = max(xc.shape[-1], 1)
    eye = as_tensor(move(np.eye(d), input.device))
    w = inverse_sqrt(matmul(xc, mT(xc)) / m + eye * eps)
    y = ungrouped(matmul(w, xc), input)
    return y, mean, w.detach()


def grouped(x: Tensor, d: int) -> Tensor:
    """(N, C, *S) as (C/d, d, N·|S|)."""
    order = (1, 0, *range(2, x.ndim))
    return reshape(permute(x, *order), (x.shape[1] // d, d, x.data.size // max(x.shape[1], 1)))


def ungrouped(y: Tensor, x: Tensor) -> Tensor:
    """Back to x's shape and dtype."""
    N, C, *S = x.shape
    order = (1, 0, *range(2, x.ndim))
    return permute(reshape(y, (C, N, *S)), *order).to(x.dtype)
