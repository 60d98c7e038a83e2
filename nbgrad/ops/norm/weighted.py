"""Batch norm of part of the values, or of several workers' values: one op over moments."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import OPS, Tensor, as_tensor, composition, op
from nbgrad.backend import kernels
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.moments import Moments, Workers, over_channels, weights
from nbgrad.ops.norm.batch import check_batch, data, scaled
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked, reshape

__all__ = ["weighted_batch_norm"]

_mask = OPS["mask"]


@op(method=False)
def sum_over_workers(x: Tensor, /, *, workers: Workers) -> Any:
    """y = Σ over the workers of their x, the same for each.   ∂x = Σ over the workers of their ∂y
    """
    return workers.sum(x.data)[0], (lambda dy: sum_over_workers(dy, workers=workers),)


@op(name="weighted_batch_norm", method=False)
def _weighted(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, *, eps: float,
              w: Any = None, workers: Workers | None = None) -> Any:
    """y = γ x̂ + β where w > 0, else 0;  x̂ = (x − μ)/√(σ² + ε), μ and σ² weighted by w, of all
    workers.

    ∂x = γ/σ (∂y − w/W (Σ∂y + x̂ Σ∂y x̂)), sums and W = Σw over all workers;   ∂γ = Σ ∂y x̂ and
    ∂β = Σ ∂y over the own x.
    """
    own = over_channels(x.data, w)
    total = own if workers is None else workers.merge(own)
    with np.errstate(all="ignore"):
        invstd = 1 / np.sqrt(np.where(total.count > 0, total.var(), 0.0) + eps)
    if w is None:
        y = kernels(x).batch_norm_elemt(x.data, data(gamma), data(beta), total.mean, invstd)
    else:
        y = kernels(x).sample_map("affine", x.data, _constants(total.mean, invstd, gamma, beta), w)
    return (y, lambda dy: weighted_batch_norm_backward(
        dy, x, gamma, count=total.count, mean=total.mean, invstd=invstd, eps=eps, w=w,
        workers=workers), *total)


def _constants(mean: Any, invstd: Any, gamma: Tensor | None, beta: Tensor | None) -> Any:
    """Of y = (x − μ) γ/σ + β, for all samples."""
    scale = invstd if gamma is None else invstd * gamma.data.astype(np.float64)
    shift = np.zeros_like(mean) if beta is None else beta.data.astype(np.float64)
    return [a.reshape(1, -1) for a in (mean, scale, shift)]


@op(method=False)
def weighted_batch_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, *, count: Any,
                                 mean: Any, invstd: Any, eps: float, w: Any = None,
                                 workers: Workers | None = None) -> Any:
    """∂x, ∂γ and ∂β of weighted_batch_norm."""
    k, d, at = kernels(dy), dy.data, x.data
    if w is None:
        own = k.batch_norm_backward_reduce(d, at, mean, invstd)
    else:
        constants = _constants(mean, invstd, gamma, None)
        _, slope, total = k.sample_sums("affine", d, at, constants, w)
        own = total[0], slope[0] * invstd                                   # Σ∂y and Σ∂y x̂
    s, sx = own if workers is None else workers.sum(*own)
    n = np.where(count > 0, count, 1.0)
    if w is None:
        share = at.size / max(at.shape[1], 1) / n                           # of one's own values
        dx = k.batch_norm_backward_elemt(d, at, data(gamma), mean, invstd, s * share, sx * share)
    else:
        with np.errstate(all="ignore"):
            mu, scale, _ = constants
            p, q = -scale * (s / n), -scale * (sx * invstd / n)
        dx = k.sample_map_backward("affine", d, at, constants, w, p, q, mu)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        return _backward_of_weighted(dy, x, gamma, count, eps, w, workers)
    dtype = x.dtype if gamma is None else gamma.dtype
    with np.errstate(all="ignore"):
        sums = own[1].astype(dtype), own[0].astype(dtype)
    return (dx, *sums), composition(again, dy, x, gamma, dtype=np.float64)


def _backward_of_weighted(dy: Tensor, x: Tensor, gamma: Tensor | None, count: Any, eps: float,
                          w: Any, workers: Workers | None) -> tuple[Tensor, ...]:
    axes, per_channel = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)

    def everywhere(a: Tensor) -> Tensor:
        return a if workers is None else sum_over_workers(a, workers=workers)

    def constant(a: Any) -> Tensor:
        return as_tensor(a.astype(x.dtype))
    n = np.where(count > 0, count, np.inf).reshape(per_channel)
    share = constant((1.0 if w is None else w) / n)    # weights of any size: of all of them, a part
    if w is not None:
        there = np.broadcast_to(w > 0, x.shape)
        x, dy = _mask(x, keep=there), _mask(dy, keep=there)
    xc = x - everywhere(sum(x * share, axes, True))
    invstd = rsqrt(everywhere(sum(xc * xc * share, axes, True)) + eps)
    xhat = xc * invstd
    own, own_x = sum(dy, axes, True), sum(dy * xhat, axes, True)
    dx = invstd * (dy - share * (everywhere(own) + xhat * everywhere(own_x)))
    if gamma is not None:
        dx = dx * reshape(gamma, per_channel)
    return (dx if w is None else _mask(dx, keep=there), reshape(own_x, (-1,)), reshape(own, (-1,)))


def weighted_batch_norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
                        eps: float = 1e-5, *, mask: Any = None,
                        workers: Workers | None = None) -> tuple[Tensor, Moments]:
    """y = γ (x − μ) / √(σ² + ε) + β in training over part of the values, or over several workers'
    values (Peng et al. 2018), and the moments that it normalized by.

    x: (N, C, *S)   γ ``weight``, β ``bias``: (C,)   mask: weights w ≥ 0 or booleans, (N, *S) or
    what broadcasts against (N, 1, *S). What has weight 0 is not there: y = 0 and ∂x = 0, whatever x
    is. workers: see ``Workers``; ∂γ and ∂β are those of the own x. Keeps x, γ, w, μ, 1/σ.

    Raises ValueError for one value or weight per channel over all workers, and for masks and sizes
    that do not fit.
    """
    x = checked(input, "weighted_batch_norm")
    # how many values there are is known when those of all workers are counted
    check_batch((2, *x.shape[1:]), x.dtype, None, None, weight, bias, True, eps)
    w = None if mask is None else weights(mask, x.shape)
    y, *found = _weighted(x, scaled(x, weight, bias), bias, eps=eps, w=w, workers=workers)
    total = Moments(*(a.data for a in found))
    if w is None:
        alone = bool((total.count == 1).any())
    else:                                           # one value of weight 2 is no second value
        alone = workers is None and np.count_nonzero(w) == 1 and x.data.size > 0
    if alone:
        raise ValueError("Expected more than 1 value per channel when training, got input size "
                         f"{list(x.shape)}" + ("" if w is None else " with one value in the mask"))
    return y, total
