"""Layer normalization."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, composition, op
from nbgrad.backend import kernels, serves
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked

from .batch import data, scaled
from .channels import mean_of

__all__ = ["layer_norm"]


@op(name="layer_norm", method=False)
def _layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, dims: int,
                eps: float) -> Any:
    """y = γ x̂ + β with the statistics of the last ``dims`` axes.

    ∂β = Σ ∂y,  ∂γ = Σ ∂y x̂ over rows;  ∂x = (g − mean g − x̂ mean(g x̂)) / σ,  g = γ ∂y.
    Ba et al. 2016
    """
    y, mean, invstd = kernels(x).layer_norm(x.data, data(gamma), data(beta), dims=dims, eps=eps)
    return y, lambda dy: layer_norm_backward(dy, x, gamma, mean=mean, invstd=invstd, dims=dims,
                                             eps=eps)


@op(method=False)
def layer_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, mean: Any, invstd: Any,
                        dims: int, eps: float) -> Any:
    """∂x, ∂γ and ∂β of layer_norm."""
    grads = kernels(dy).layer_norm_backward(dy.data, x.data, data(gamma), mean, invstd, dims=dims)
    return grads, composition(lambda dy, x, gamma: _backward_of_layer(dy, x, gamma, dims, eps),
                              dy, x, gamma, dtype=np.float64)


def _backward_of_layer(dy: Tensor, x: Tensor, gamma: Tensor | None, dims: int,
                       eps: float) -> tuple[Tensor, ...]:
    axes, rows = tuple(range(x.ndim - dims, x.ndim)), tuple(range(x.ndim - dims))
    xc = x - mean_of(x, axes, True)
    invstd = rsqrt(mean_of(xc * xc, axes, True) + eps)
    xhat = xc * invstd
    g = dy if gamma is None else dy * gamma
    dx = invstd * (g - mean_of(g, axes, True) - xhat * mean_of(g * xhat, axes, True))
    return dx, sum(dy * xhat, rows) if rows else dy * xhat, sum(dy, rows) if rows else dy


def check_rows(name: str, x: Any, normalized_shape: Any, eps: float,
               **affine: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """x as a Tensor and normalized_shape as a tuple, if x ends in it and the parameters have it."""
    x = checked(x, name)
    one = isinstance(normalized_shape, (int, np.integer))
    shape = (normalized_shape,) if one else tuple(normalized_shape)
    if not 0 < len(shape) <= x.ndim or x.shape[-len(shape):] != shape or x.dtype.kind not in "fV":
        raise RuntimeError(f"Given normalized_shape={list(shape)}, expected a floating input with "
                           f"shape [*, {', '.join(map(str, shape))}], but got {x.dtype} input "
                           f"of size {list(x.shape)}")
    for what, t in affine.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected {what} to be a Tensor, got {type(t).__name__}")
        if t is not None and (t.shape != shape or not serves(t.dtype, x.dtype)):
            raise RuntimeError(f"{name}: Expected {what} to be of same shape as normalized_shape "
                               f"and of {x.dtype}, but got {what} of shape {list(t.shape)} and "
                               f"{t.dtype} and normalized_shape = {list(shape)}")
    if len({t.dtype for t in affine.values() if t is not None}) > 1:
        raise RuntimeError(f"{name}: Expected {' and '.join(affine)} of one dtype")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")
    return x, shape


def layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = γ (x − μ) / √(σ² + ε) + β, μ and (biased) σ² over the last dims, ``normalized_shape``.

    x: (..., *normalized_shape)   γ ``weight``, β ``bias``: normalized_shape. Keeps x, γ, μ, 1/σ.
    Raises RuntimeError if x does not end in normalized_shape.      Ba, Kiros & Hinton 2016
    """
    input, shape = check_rows("layer_norm", input, normalized_shape, eps, weight=weight, bias=bias)
    if not math.prod(shape):
        return input * 1
    weight = scaled(input, weight, bias)
    return _layer_norm(input, weight, bias, dims=len(shape), eps=float(eps))  # type: ignore[no-any-return]
