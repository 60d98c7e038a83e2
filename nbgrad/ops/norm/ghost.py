"""Batch normalization of parts of a batch, each for itself."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, composition, op
from nbgrad.backend import full, kernels, serves
from nbgrad.ops.joining import cat, stack
from nbgrad.ops.moments import Moments
from nbgrad.ops.norm.batch import backward_of_batch, check_batch, data, scaled
from nbgrad.ops.shape import checked

__all__ = ["ghost_batch_norm"]


@op(name="ghost_batch_norm", method=False)
def _ghosts(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, /, *, size: int,
            eps: float) -> Any:
    """y = γ x̂ + β;  x̂ = (x − μ) / √(σ² + ε), μ and σ² of each ``size`` samples for themselves;
    γ and β of all, (C,), or of each, (ghosts, C).

    ∂β = Σ ∂y      ∂γ = Σ ∂y x̂      ∂x = γ/σ (∂y − mean ∂y − x̂ mean(∂y x̂)), means over a ghost.
    Hoffer, Hubara & Soudry 2017
    """
    apart = any(t is not None and t.ndim == 2 for t in (gamma, beta))
    y, mean, var, invstd = kernels(x).ghost_batch_norm(x.data, data(gamma), data(beta), size=size,
                                                       eps=eps)
    return y, lambda dy: ghost_batch_norm_backward(dy, x, gamma, mean=mean, invstd=invstd,
                                                   size=size, eps=eps, apart=apart), mean, var


@op(method=False)
def ghost_batch_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, *, mean: Any,
                              invstd: Any, size: int, eps: float, apart: bool = False) -> Any:
    """∂x, ∂γ and ∂β of ghost_batch_norm; ``apart``: those of each ghost."""
    grads = kernels(dy).ghost_batch_norm_backward(dy.data, x.data, data(gamma), mean, invstd,
                                                  size=size, apart=apart)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        def part(i: int) -> tuple[Tensor, ...]:
            own = gamma[i // size] if gamma is not None and gamma.ndim == 2 else gamma
            return backward_of_batch(dy[i:i + size], x[i:i + size], own, None, None, eps, False)
        if not x.shape[0]:
            dx, *sums = backward_of_batch(dy, x, None, None, None, eps, False)[:3]
            return dx, *(stack([s])[:0] if apart else s for s in sums)
        each, *of = zip(*(part(i)[:3] for i in range(0, x.shape[0], size)))
        return cat(each), *(stack(s) if apart else reduce(add, s) for s in of)
    return grads, composition(again, dy, x, gamma, dtype=np.float64)


def ghost_batch_norm(input: Tensor, ghost_size: int, weight: Tensor | None = None,
                     bias: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Moments]:
    """Batch norm in training of each ``ghost_size`` samples for themselves (the last may be fewer),
    in one kernel: y = γ (x − μ) / √(σ² + ε) + β, and the moments of each ghost, arrays (ghosts, C).
    Hoffer, Hubara & Soudry 2017

    x: (N, C, *S)   γ ``weight``, β ``bias``: (C,), or (ghosts, C), each ghost's own. Keeps x, γ,
    μ, 1/σ of (ghosts, C). Raises ValueError for a ghost of one value per channel and for sizes that
    do not fit.

    >>> import nbgrad
    >>> y, found = ghost_batch_norm(nbgrad.tensor([[1.0], [3.0], [10.0], [30.0]]), 2, eps=1e-9)
    >>> y.flatten().tolist(), found.mean.tolist()
    ([-1.0, 1.0, -1.0, 1.0], [[2.0], [20.0]])
    """
    x = checked(input, "ghost_batch_norm")
    if not isinstance(ghost_size, (int, np.integer)) or ghost_size < 1:
        raise ValueError("ghost_batch_norm: ghost_size must be an int of at least 1, got "
                         f"{ghost_size!r}")
    N, size = x.shape[0] if x.ndim else 0, int(ghost_size)
    apart = any(isinstance(t, Tensor) and t.ndim == 2 for t in (weight, bias))
    check_batch(x.shape, x.dtype, None, None, *(None, None) if apart else (weight, bias), True, eps)
    if apart:
        _check_apart(x, -(-N // size), weight=weight, bias=bias)
    for n in {min(size, N), N % size}:
        if n:
            check_batch((n, *x.shape[1:]), x.dtype, None, None, None, None, True, eps)
    y, mean, var = _ghosts(x, scaled(x, weight, bias), bias, size=size, eps=eps)
    area = x.data.size // max(N * x.shape[1], 1)
    count = full(mean.shape, float(size * area), mean.dtype, mean.data)
    if len(count):
        count[-1] = (N - (len(count) - 1) * size) * area
    return y, Moments(count, mean.data, var.data * count)


def _check_apart(x: Tensor, ghosts: int, **given: Tensor | None) -> None:
    there = {name: t for name, t in given.items() if t is not None}
    for name, t in there.items():
        shape = (ghosts, x.shape[1])
        if not isinstance(t, Tensor) or t.shape != shape or not serves(t.dtype, x.dtype):
            raise ValueError(f"ghost_batch_norm: expected {name} of shape {shape}, one of each "
                             f"ghost, and {x.dtype}, got {getattr(t, 'shape', type(t).__name__)} "
                             f"and {getattr(t, 'dtype', None)}")
    if len({t.dtype for t in there.values()}) > 1:
        raise ValueError("ghost_batch_norm: expected weight and bias of one dtype")
