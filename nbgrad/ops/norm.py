"""Batch and layer normalization. Each is one fused op, and so is each backward, whose own gradient
is recorded from elementary ops that recompute the statistics from x: exact at every order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, bump, composition, op
from nbgrad.backend import kernels
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.reduce import mean as mean_of, sum
from nbgrad.ops.shape import checked, reshape


def _data(t: Tensor | None) -> Any:
    return None if t is None else t.data


def _per_channel(t: Any, x: Tensor) -> Any:
    return reshape(t, (1, -1) + (1,) * (x.ndim - 2))


# ---------------------------------------------------------------------------------- batch, training

@op(name="batch_norm", method=False)
def _batch_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, eps: float) -> Any:
    """y = γ x̂ + β,  x̂ = (x − μ) / √(σ² + ε);  μ and σ² of x over every axis but 1.   Also μ and σ².

    ∂β = Σ ∂y      ∂γ = Σ ∂y x̂      ∂x = γ/σ (∂y − ∂β/m − x̂ ∂γ/m),   m = N·|S|.
    Ioffe & Szegedy 2015
    """
    y, mean, var, invstd = kernels(x).batch_norm(x.data, _data(gamma), _data(beta), eps=eps)

    def vjp(dy: Tensor) -> Any:
        return batch_norm_backward(dy, x, gamma, mean=mean, invstd=invstd, eps=eps)
    return y, vjp, mean, var


@op(method=False)
def batch_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, mean: Any, invstd: Any,
                        eps: float) -> Any:
    """∂x, ∂γ and ∂β of batch_norm in training."""
    grads = kernels(dy).batch_norm_backward(dy.data, x.data, _data(gamma), mean, invstd)
    return grads, composition(lambda dy, x, gamma: _backward_of_batch(dy, x, gamma, eps),
                              dy, x, gamma)


def _backward_of_batch(dy: Tensor, x: Tensor, gamma: Tensor | None,
                       eps: float) -> tuple[Tensor, ...]:
    axes = (0, *range(2, x.ndim))
    xc = x - mean_of(x, axes, True)
    invstd = rsqrt(mean_of(xc * xc, axes, True) + eps)
    xhat = xc * invstd
    scale = invstd if gamma is None else invstd * _per_channel(gamma, x)
    dx = scale * (dy - mean_of(dy, axes, True) - xhat * mean_of(dy * xhat, axes, True))
    return dx, sum(dy * xhat, axes), sum(dy, axes)


# -------------------------------------------------------------------------------- batch, evaluation

@op(method=False)
def batch_norm_inference(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, mean: Any,
                         invstd: Any) -> Any:
    """y = γ (x − μ)/σ + β with given statistics.   ∂x = γ/σ ∂y,  ∂γ = Σ ∂y x̂,  ∂β = Σ ∂y."""
    y = kernels(x).batch_norm_elemt(x.data, _data(gamma), _data(beta), mean, invstd)
    return y, lambda dy: batch_norm_inference_backward(dy, x, gamma, mean=mean, invstd=invstd)


@op(method=False)
def batch_norm_inference_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, mean: Any,
                                  invstd: Any) -> Any:
    """∂x, ∂γ and ∂β of batch_norm_inference."""
    k = kernels(dy)
    dbeta, dgamma = k.batch_norm_backward_reduce(dy.data, x.data, mean, invstd)
    dx = k.batch_norm_backward_elemt(dy.data, x.data, _data(gamma), mean, invstd, None, None)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        axes = (0, *range(2, x.ndim))
        mu, r = (_per_channel(Tensor(a.astype(x.dtype)), x) for a in (mean, invstd))
        return (dy * (r if gamma is None else r * _per_channel(gamma, x)),
                sum(dy * ((x - mu) * r), axes), sum(dy, axes))
    return (dx, dgamma.astype(x.dtype), dbeta.astype(x.dtype)), composition(again, dy, x, gamma)


def batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
               weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
               momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """y = γ (x − μ) / √(σ² + ε) + β per channel.      x: (N, C, *)   weight γ, bias β: (C,)

    Training: μ and (biased) σ² of this batch; the running arrays, where given, move in place by
    ``momentum`` towards μ and the unbiased variance. Evaluation: the running arrays. Keeps x, γ, μ,
    1/σ. Raises ValueError for one value per channel in training and for sizes that do not fit.
    """
    input = checked(input, "batch_norm")
    _check(input, running_mean, running_var, weight, bias, training, eps)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mu = running_mean.data.astype(np.float64)
        with np.errstate(all="ignore"):
            invstd = 1 / np.sqrt(running_var.data.astype(np.float64) + eps)
        return batch_norm_inference(input, weight, bias, mean=mu, invstd=invstd)  # type: ignore[no-any-return]
    n = input.data.size // input.shape[1] if input.shape[1] else 0
    if n == 1:
        raise ValueError("Expected more than 1 value per channel when training, got input size "
                         f"{list(input.shape)}")
    y, mean, var = _batch_norm(input, weight, bias, eps=eps)
    if n and running_mean is not None and running_var is not None:
        kernels(input).batch_norm_update(running_mean.data, running_var.data, mean.data, var.data,
                                     momentum=momentum, count=n)
        bump(running_mean)
        bump(running_var)
    return y  # type: ignore[no-any-return]


def _check(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None,
           bias: Tensor | None, training: bool, eps: float) -> None:
    if x.ndim < 2 or x.dtype.kind != "f":
        raise ValueError(f"batch_norm: expected a floating (N, C, *) input, got {x.dtype} of size "
                         f"{list(x.shape)}")
    if (mean is None) != (var is None) or (mean is None and not training):
        raise ValueError("batch_norm: Expected running_mean and running_var to be given together, "
                         "and in evaluation to be defined")
    if not eps > 0 and (training or not eps == 0):
        raise ValueError(f"batch_norm: eps must be positive, got {eps}")
    given = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    for name, t in given.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"batch_norm: expected {name} to be a Tensor, got {type(t).__name__}")
        if t.shape != (x.shape[1],):
            raise ValueError(f"batch_norm: {name} should contain {x.shape[1]} elements, one per "
                             f"channel, in a shape of ({x.shape[1]},), got shape {t.shape}")
        if t.dtype != x.dtype:
            raise ValueError(f"batch_norm: expected {name} of dtype {x.dtype}, the input's, got "
                             f"{t.dtype}")
        if training and name.startswith("running") and not t.data.flags.writeable:
            raise ValueError(f"batch_norm: {name} is to be updated in training, but is a read-only "
                             "array or an expanded view")


# -------------------------------------------------------------------------------------------- layer

@op(name="layer_norm", method=False)
def _layer_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, dims: int,
                eps: float) -> Any:
    """y = γ x̂ + β with the statistics of the last ``dims`` axes.

    ∂β = Σ ∂y,  ∂γ = Σ ∂y x̂ over rows;  ∂x = (g − mean g − x̂ mean(g x̂)) / σ,  g = γ ∂y.
    Ba et al. 2016
    """
    y, mean, invstd = kernels(x).layer_norm(x.data, _data(gamma), _data(beta), dims=dims, eps=eps)
    return y, lambda dy: layer_norm_backward(dy, x, gamma, mean=mean, invstd=invstd, dims=dims,
                                             eps=eps)


@op(method=False)
def layer_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, mean: Any, invstd: Any,
                        dims: int, eps: float) -> Any:
    """∂x, ∂γ and ∂β of layer_norm."""
    grads = kernels(dy).layer_norm_backward(dy.data, x.data, _data(gamma), mean, invstd, dims=dims)
    return grads, composition(lambda dy, x, gamma: _backward_of_layer(dy, x, gamma, dims, eps),
                              dy, x, gamma)


def _backward_of_layer(dy: Tensor, x: Tensor, gamma: Tensor | None, dims: int,
                       eps: float) -> tuple[Tensor, ...]:
    axes, rows = tuple(range(x.ndim - dims, x.ndim)), tuple(range(x.ndim - dims))
    xc = x - mean_of(x, axes, True)
    invstd = rsqrt(mean_of(xc * xc, axes, True) + eps)
    xhat = xc * invstd
    g = dy if gamma is None else dy * gamma
    dx = invstd * (g - mean_of(g, axes, True) - xhat * mean_of(g * xhat, axes, True))
    return dx, sum(dy * xhat, rows) if rows else dy * xhat, sum(dy, rows) if rows else dy


def layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = γ (x − μ) / √(σ² + ε) + β, μ and (biased) σ² over the last dims, ``normalized_shape``.

    weight γ, bias β: normalized_shape. Keeps x, γ, μ, 1/σ. Raises RuntimeError if x does not end in
    normalized_shape.   Ba, Kiros & Hinton 2016.
    """
    input = checked(input, "layer_norm")
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    fits = 0 < len(shape) <= input.ndim and input.shape[-len(shape):] == shape
    if not fits or input.dtype.kind != "f":
        raise RuntimeError(f"Given normalized_shape={list(shape)}, expected a floating input with "
                           f"shape [*, {', '.join(map(str, shape))}], but got {input.dtype} input "
                           f"of size {list(input.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.shape != shape or t.dtype != input.dtype):
            raise RuntimeError(f"layer_norm: Expected {name} to be of same shape as "
                               f"normalized_shape and of {input.dtype}, but got {name} of shape "
                               f"{list(t.shape)} and {t.dtype} and normalized_shape = "
                               f"{list(shape)}")
    if not eps >= 0:
        raise ValueError(f"layer_norm: eps must not be negative, got {eps}")
    if not math.prod(shape):
        return input * 1
    return _layer_norm(input, weight, bias, dims=len(shape), eps=eps)  # type: ignore[no-any-return]


__all__ = ["batch_norm", "layer_norm"]
