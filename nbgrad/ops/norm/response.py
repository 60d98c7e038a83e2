"""Normalization with the activation inside it, or by what other channels respond."""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, composition, op
from nbgrad.backend import kernels, serves
from nbgrad.ops.activation import relu_backward, sigmoid
from nbgrad.ops.elementwise import abs, rsqrt
from nbgrad.ops.norm.batch import data, scaled
from nbgrad.ops.norm.channels import (
    affine,
    at_least,
    check_channels,
    check_eps,
    check_tensors,
    divide_channels,
    mean_of,
    per_channel,
)
from nbgrad.ops.norm.samples import Sampled, gains, merged, root, row, sample_norm, zero
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import broadcast_to, reshape

__all__ = ["evonorm_b0", "evonorm_s0", "filter_response_norm", "global_response_norm"]


def _channel(t: Tensor | None, x: Tensor) -> Tensor | None:
    return None if t is None else per_channel(t, x)


@op(name="filter_response_norm", method=False)
def response(x: Tensor, gamma: Tensor | None, beta: Tensor | None, tau: Tensor | None = None, /, *,
              eps: float) -> Any:
    """y = max(γ x̂ + β, τ),  x̂ = x / r,  r² = mean of x² over S + ε, per sample and channel.

    ∂x = γ/r (g − x̂ mean(g x̂)),   ∂γ = Σ g x̂,   ∂β = Σ g,   ∂τ = Σ (∂y − g);   g = ∂y where y > τ.
    """
    y, mean, invrms = kernels(x).group_norm(x.data, data(gamma), data(beta), eps=eps, center=False,
                                            groups=max(x.shape[1], 1), floor=data(tau))
    return y, lambda dy: (*filter_response_norm_backward(
        dy, x, gamma, beta, tau, mean=mean, invrms=invrms, eps=eps), None)[:4]


@op(method=False)
def filter_response_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None,
                                  tau: Tensor | None, /, mean: Any, invrms: Any, eps: float) -> Any:
    """∂x, ∂γ, ∂β and, with τ, ∂τ of filter_response_norm."""
    grads = kernels(dy).group_norm_backward(
        dy.data, x.data, data(gamma), mean, invrms, groups=max(x.shape[1], 1), center=False,
        beta=data(beta), floor=data(tau))

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None,
              tau: Tensor | None) -> Any:
        space, others = tuple(range(2, x.ndim)), (0, *range(2, x.ndim))
        inv = rsqrt(mean_of(x * x, space, True) + eps)
        xhat = x * inv
        rest: tuple[Tensor, ...] = ()
        if tau is not None:
            above = relu_backward(dy, affine(xhat, gamma, beta) - per_channel(tau, x))
            rest, dy = (sum(dy - above, others),), above
        g = dy if gamma is None else dy * per_channel(gamma, x)
        return (inv * (g - xhat * mean_of(g * xhat, space, True)), sum(dy * xhat, others),
                sum(dy, others), *rest)
    return grads, composition(again, dy, x, gamma, beta, tau, dtype=np.float64)


@op(name="filter_response_norm_eps", method=False)
def _learned_response(x: Tensor, gamma: Tensor | None, beta: Tensor | None, extra: Tensor, /, *,
                      eps: float) -> Any:
    """y = γ x̂ + β,  x̂ = x / r,  r² = mean of x² over S + ε + e, per sample and channel.

    ∂x = γ/r (∂y − x̂ mean(∂y x̂)),   ∂γ = Σ ∂y x̂,   ∂β = Σ ∂y,   ∂e = −γ/2 Σ ∂y x̂ / r².
    """
    k, flat = kernels(x), _rows(x.data)
    mean, var = k.batch_norm_stats(flat)
    with np.errstate(all="ignore"):
        square = mean * mean + var + eps
        invrms = 1 / np.sqrt(square + _each(extra, x))
    y = k.batch_norm_elemt(flat, _each(gamma, x), _each(beta, x), np.zeros_like(mean), invrms)
    return y.reshape(x.shape), lambda dy: filter_response_norm_eps_backward(
        dy, x, gamma, extra, invrms=invrms, eps=eps)


@op(method=False)
def filter_response_norm_eps_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, extra: Tensor, /,
                                      invrms: Any, eps: float) -> Any:
    """∂x, ∂γ, ∂β and ∂e of filter_response_norm_eps."""
    k, flat, d, zero = kernels(dy), _rows(x.data), _rows(dy.data), np.zeros_like(invrms)
    own, own_x = k.batch_norm_backward_reduce(d, flat, zero, invrms)
    dx = k.batch_norm_backward_elemt(d, flat, _each(gamma, x), zero, invrms, zero, own_x)
    de = own_x * invrms * invrms * -0.5
    sums = (own_x, own, de if gamma is None else de * _each(gamma, x))

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None, extra: Tensor) -> Any:
        space, others = tuple(range(2, x.ndim)), (0, *range(2, x.ndim))
        square = mean_of(x * x, space, True) + eps
        inv = rsqrt(square + per_channel(extra, x))
        xhat, g = x * inv, dy if gamma is None else dy * per_channel(gamma, x)
        slope = g * xhat
        return (inv * (g - xhat * mean_of(slope, space, True)), sum(dy * xhat, others),
                sum(dy, others), sum(slope * inv * inv * -0.5, others))
    own_dtype = x.dtype if gamma is None else gamma.dtype
    summed = (s.reshape(x.shape[:2]).sum(0).astype(kind)
              for s, kind in zip(sums, (own_dtype, own_dtype, extra.dtype)))
    return ((dx.reshape(x.shape), *summed),
            composition(again, dy, x, gamma, extra, dtype=np.float64))


def _rows(x: Any) -> Any:
    """An array (N, C, *S) as (1, N·C, |S|): a channel for each sample and channel."""
    return x.reshape(1, x.shape[0] * x.shape[1], math.prod(x.shape[2:]))


def _each(t: Tensor | None, x: Tensor) -> Any:
    """(C,) for each sample, (N·C,)."""
    return None if t is None else np.tile(t.data, x.shape[0])


def filter_response_norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
                         threshold: Tensor | None = None, eps: float = 1e-6,
                         learned_eps: Tensor | None = None) -> Tensor:
    """y = max(γ x / √(ν² + ε + |ε_l|) + β, τ),  ν² the mean of x² over S, per sample and channel.
    Singh & Krishnan 2020

    x: (N, C, *S)   γ ``weight``, β ``bias``, τ ``threshold``, ε_l ``learned_eps``: (C,); what is
    None is left out. Nothing is subtracted: the mean stays. Keeps x, γ, 1/ν, with τ also β and τ;
    with ε_l also y before the maximum. Raises ValueError for a negative ε.

    >>> import nbgrad
    >>> filter_response_norm(nbgrad.tensor([[[3.0, -3.0, 3.0]]]), eps=0.0).tolist()
    [[[1.0, -1.0, 1.0]]]
    """
    check_channels("filter_response_norm", input, weight, bias, threshold, learned_eps, least=3)
    if not eps >= 0:
        raise ValueError(f"filter_response_norm: eps must not be negative, got {eps}")
    eps, weight = float(eps), scaled(input, scaled(input, weight, bias), threshold)
    if learned_eps is None:
        return response(input, weight, bias, threshold, eps=eps)
    y = _learned_response(input, weight, bias, abs(learned_eps), eps=eps)
    return y if threshold is None else at_least(y, per_channel(threshold, y))


def evonorm_b0(input: Tensor, weight: Tensor | None, bias: Tensor | None, v: Tensor | None,
               std: Tensor, eps: float = 1e-5) -> Tensor:
    """y = γ x / max(s, v x + √(σ² + ε)) + β,  σ² the variance over S, per sample and channel.
    Liu, Brock, Simonyan & Le 2020

    x: (N, C, *S)   γ, β, v: (C,)   std: s, √(var + ε) of each channel over the batch (training), or
    the running one; (1, C, 1, …). Without v: y = γ x / s + β. Keeps x, the parameters, s, and mean
    and variance of each sample's channels (without v: x, γ, s). Raises ValueError for sizes that do
    not fit and a negative ε, TypeError for an s that is no Tensor.
    """
    check_channels("evonorm_b0", input, weight, bias, v)
    check_eps("evonorm_b0", eps)
    check_tensors("evonorm_b0", std=std)
    shape = (1, *input.shape[1:2], *[1] * (input.ndim - 2))
    if std.shape != shape or not serves(std.dtype, input.dtype):
        raise ValueError(f"evonorm_b0: expected std of shape (1, C, 1, …) and {input.dtype}, got "
                         f"{std.shape} and {std.dtype} for an input of size {list(input.shape)}")
    if v is None:
        return divide_channels(input, std, _channel(weight, input), _channel(bias, input))
    how = Sampled("bounded", partial(_b0_constants, eps), partial(_b0, eps))
    return sample_norm(input, v, std, *gains(input, weight, bias), how=how)[0]


def _b0_constants(eps: float, mean: Tensor, var: Tensor, v: Tensor, std: Tensor, gamma: Tensor,
                  beta: Tensor) -> tuple[Tensor, ...]:
    return row(v), root(var + eps), row(std), row(gamma), row(beta)


def _b0(eps: float, x: Tensor, v: Tensor, std: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    xc = x - mean_of(x, axes, True)
    own = root(mean_of(xc * xc, axes, True) + eps)
    return affine(x / at_least(x * per_channel(v, x) + own, std), gamma, beta)


def evonorm_s0(input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
               v: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = γ x sigmoid(v x) / √(σ² + ε) + β,  σ² the variance over S and the channels of a group.
    Liu, Brock, Simonyan & Le 2020

    x: (N, C, *S)   γ, β, v: (C,). Without v: y = γ x / √(σ² + ε) + β. Keeps x, the parameters, and
    mean and variance of each sample's channels. Raises ValueError for groups that do not divide C
    and for a negative ε.
    """
    check_channels("evonorm_s0", input, weight, bias, v)
    check_eps("evonorm_s0", eps)
    C = input.shape[1]
    if not isinstance(groups, (int, np.integer)) or groups < 1 or C % groups or groups > max(C, 1):
        raise ValueError(f"evonorm_s0: groups must divide the {C} channels, got {groups!r}")
    both = gains(input, weight, bias)
    if v is None:
        how = Sampled("affine", partial(_s0_constants, groups, eps), partial(_s0, groups, eps))
        return sample_norm(input, *both, how=how)[0]
    how = Sampled("gated", partial(_s0_constants, groups, eps), partial(_s0, groups, eps))
    return sample_norm(input, *both, v, how=how)[0]


def _s0_constants(groups: int, eps: float, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor,
                  v: Tensor | None = None) -> tuple[Tensor, ...]:
    """Without v, of a formula that subtracts: 0."""
    N, C = mean.shape
    parted = (N, groups, C // groups)
    _, around = merged(reshape(mean, parted), reshape(var, parted), 2)
    scale = reshape(broadcast_to(rsqrt(around + eps), parted), (N, C)) * row(gamma)
    return zero(mean) if v is None else row(v), scale, row(beta)


def _s0(groups: int, eps: float, x: Tensor, gamma: Tensor, beta: Tensor,
        v: Tensor | None = None) -> Tensor:
    N, C, *S = x.shape
    parted, axes = reshape(x, (N, groups, C // groups, *S)), tuple(range(2, x.ndim + 1))
    xc = parted - mean_of(parted, axes, True)
    z = x if v is None else x * sigmoid(x * per_channel(v, x))
    inverse = rsqrt(mean_of(xc * xc, axes, True) + eps)
    return affine(reshape(reshape(z, parted.shape) * inverse, x.shape), gamma, beta)


def global_response_norm(input: Tensor, weight: Tensor, bias: Tensor,
                         eps: float = 1e-6) -> Tensor:
    """y = γ x n + β + x,  n_c = g_c / (mean over c of g + ε),  g_c = ‖x_c‖₂ over S, per sample.
    Woo et al. 2023

    x: (N, C, *S)   γ, β: (C,). The gradient of the norm of zeros is taken to be 0. Keeps x, γ, β,
    and mean and variance of each sample's channels. Raises TypeError without γ and β, ValueError
    for sizes that do not fit and a negative ε.
    """
    check_channels("global_response_norm", input, weight, bias, least=3)
    if weight is None or bias is None:
        raise TypeError("global_response_norm: expected weight and bias, got None")
    check_eps("global_response_norm", eps)
    how = Sampled("affine", partial(_global_constants, math.prod(input.shape[2:]), eps),
                  partial(_global, eps))
    return sample_norm(input, weight, bias, how=how)[0]


def _global_constants(area: int, eps: float, mean: Tensor, var: Tensor, gamma: Tensor,
                      beta: Tensor) -> tuple[Tensor, ...]:
    norm = root((mean * mean + var) * area)
    scale = norm / (mean_of(norm, 1, True) + eps) * row(gamma) + 1.0
    return zero(mean), scale, row(beta)


def _global(eps: float, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    norm = root(sum(x * x, tuple(range(2, x.ndim)), True))
    return affine(x * (norm / (mean_of(norm, 1, True) + eps)), gamma, beta) + x
