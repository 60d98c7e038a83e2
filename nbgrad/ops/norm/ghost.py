"""Batch normalization of parts of a batch, each for itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, composition, op
from nbgrad.backend import full, kernels
from nbgrad.ops.joining import cat
from nbgrad.ops.moments import Moments
from nbgrad.ops.norm.batch import backward_of_batch, check_batch, data, scaled
from nbgrad.ops.shape import checked

__all__ = ["ghost_batch_norm"]


@op(name="ghost_batch_norm", method=False)
def _ghosts(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, /, *, size: int,
            eps: float) -> Any:
    """y = γ x̂ + β;  x̂ = (x − μ) / √(σ² + ε), μ and σ² of each ``size`` samples for themselves.

    ∂β = Σ ∂y      ∂γ = Σ ∂y x̂      ∂x = γ/σ (∂y − mean ∂y − x̂ mean(∂y x̂)), means over a ghost.
    Hoffer, Hubara & Soudry 2017
    """
    y, mean, var, invstd = kernels(x).ghost_batch_norm(x.data, data(gamma), data(beta), size=size,
                                                       eps=eps)
    return y, lambda dy: ghost_batch_norm_backward(dy, x, gamma, mean=mean, invstd=invstd,
                                                   size=size, eps=eps), mean, var


@op(method=False)
def ghost_batch_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, *, mean: Any,
                              invstd: Any, size: int, eps: float) -> Any:
    """∂x, ∂γ and ∂β of ghost_batch_norm."""
    grads = kernels(dy).ghost_batch_norm_backward(dy.data, x.data, data(gamma), mean, invstd,
                                                  size=size)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        parts = [backward_of_batch(dy[i:i + size], x[i:i + size], gamma, None, None, eps, False)
                 for i in range(0, x.shape[0], size)]
        if not parts:
            parts = [backward_of_batch(dy, x, gamma, None, None, eps, False)]
        dx, dgamma, dbeta = parts[0][:3]
        for part in parts[1:]:
            dgamma, dbeta = dgamma + part[1], dbeta + part[2]
        return (cat([part[0] for part in parts]) if len(parts) > 1 else dx), dgamma, dbeta
    return grads, composition(again, dy, x, gamma)


def ghost_batch_norm(input: Tensor, ghost_size: int, weight: Tensor | None = None,
                     bias: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Moments]:
    """Batch norm in training of each ``ghost_size`` samples for themselves (the last may be fewer),
    in one kernel: y, and the moments of each ghost, arrays (ghosts, C).

    x: (N, C, *S)   γ ``weight``, β ``bias``: (C,). Keeps x, γ, μ, 1/σ of (ghosts, C). Raises
    ValueError for a ghost of one value per channel and for sizes that do not fit.

    >>> import nbgrad
    >>> y, found = ghost_batch_norm(nbgrad.tensor([[1.0], [3.0], [10.0], [30.0]]), 2, eps=1e-9)
    >>> y.flatten().tolist(), found.mean.tolist()
    ([-1.0, 1.0, -1.0, 1.0], [[2.0], [20.0]])
    """
    x = checked(input, "ghost_batch_norm")
    if not isinstance(ghost_size, (int, np.integer)) or ghost_size < 1:
        raise ValueError("ghost_batch_norm: ghost_size must be an int of at least 1, got "
                         f"{ghost_size!r}")
    check_batch(x.shape, x.dtype, None, None, weight, bias, True, eps)
    N, size = x.shape[0] if x.ndim else 0, int(ghost_size)
    for n in {min(size, N), N % size}:
        if n:
            check_batch((n, *x.shape[1:]), x.dtype, None, None, None, None, True, eps)
    y, mean, var = _ghosts(x, scaled(x, weight, bias), bias, size=size, eps=eps)
    area = x.data.size // max(N * x.shape[1], 1)
    count = full(mean.shape, float(size * area), mean.dtype, mean.data)
    if len(count):
        count[-1] = (N - (len(count) - 1) * size) * area
    return y, Moments(count, mean.data, var.data * count)
