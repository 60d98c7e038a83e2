"""RMS normalization."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, composition, op
from nbgrad.backend import is_half, kernels
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.norm.layer import check_rows
from nbgrad.ops.reduce import sum

from .batch import data
from .channels import mean_of

__all__ = ["rms_norm"]


@op(name="rms_norm", method=False)
def _rms_norm(x: Tensor, gamma: Tensor | None, /, dims: int, eps: float) -> Any:
    """y = γ x̂,  x̂ = x / r,  r = √(mean x² + ε) over the last ``dims`` axes.

    ∂γ = Σ ∂y x̂ over rows;  ∂x = (g − x̂ mean(g x̂)) / r,  g = γ ∂y.      Zhang & Sennrich 2019
    """
    y, invrms = kernels(x).rms_norm(x.data, data(gamma), dims=dims, eps=eps)
    return y, lambda dy: rms_norm_backward(dy, x, gamma, invrms=invrms, dims=dims, eps=eps)


@op(method=False)
def rms_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, invrms: Any, dims: int,
                      eps: float) -> Any:
    """∂x and ∂γ of rms_norm."""
    grads = kernels(dy).rms_norm_backward(dy.data, x.data, data(gamma), invrms, dims=dims)
    return grads, composition(lambda dy, x, gamma: _backward_of_rms(dy, x, gamma, dims, eps),
                              dy, x, gamma, dtype=np.float64)


def _backward_of_rms(dy: Tensor, x: Tensor, gamma: Tensor | None, dims: int,
                     eps: float) -> tuple[Tensor, ...]:
    axes, rows = tuple(range(x.ndim - dims, x.ndim)), tuple(range(x.ndim - dims))
    invrms = rsqrt(mean_of(x * x, axes, True) + eps)
    xhat = x * invrms
    g = dy if gamma is None else dy * gamma
    dx = invrms * (g - xhat * mean_of(g * xhat, axes, True))
    return dx, sum(dy * xhat, rows) if rows else dy * xhat


def rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
             eps: float | None = None) -> Tensor:
    """y = γ x / √(mean x² + ε), the mean over the last dims, ``normalized_shape``.

    x: (..., *normalized_shape)   γ ``weight``: normalized_shape. ``eps=None`` is the spacing of x's
    dtype at 1, of halves that of float32, in which they are computed (as PyTorch does). Keeps x, γ,
    1/rms.
    Raises RuntimeError if x does not end in normalized_shape.      Zhang & Sennrich 2019

    >>> import nbgrad
    >>> rms_norm(nbgrad.tensor([3.0, -3.0]), (2,), eps=0.0).tolist()
    [1.0, -1.0]
    """
    given = 0.0 if eps is None else eps
    input, shape = check_rows("rms_norm", input, normalized_shape, given, weight=weight)
    if eps is None:
        eps = float(np.finfo(np.float32 if is_half(input.dtype) else input.dtype).eps)
    if not math.prod(shape):
        return input * 1
    return _rms_norm(input, weight, dims=len(shape), eps=float(eps))  # type: ignore[no-any-return]
