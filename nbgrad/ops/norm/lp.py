"""Powers other than 2: estimates of the standard deviation by the mean of |x − μ|^p."""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, composition, grad, op
from nbgrad.backend import kernels
from nbgrad.ops.elementwise import abs, pow, square
from nbgrad.ops.norm.batch import data, scaled
from nbgrad.ops.norm.channels import (
    _count,
    center,
    channel_size,
    check_channels,
    divide_channels,
    mean_of,
    per_channel,
)
from nbgrad.ops.reduce import amax, sum

__all__ = ["lp_batch_norm", "lp_deviation"]

FAR = 2.0 ** 600            # |d| of an infinite square are 1e154 or more: sums in it are finite
POWERS = 32                 # up to here whole powers have a kernel: n values of σ 1 are below √n


@op(name="lp_batch_norm", method=False)
def _lp_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, *, p: float, eps: float,
             centered: bool, mean: Any, var: Any) -> Any:
    """y = γ (x − μ) / s + β,  s = c_p (mean |d|^p + ε^(p/2))^(1/p) of d = x − μ, or x; also s.

    ∂β = Σ ∂y      ∂γ = Σ ∂y x̂      ∂s = −γ ∂γ / s      ∂x = γ/s (∂y − mean ∂y) + ∂s ∂s/∂d, less its
    mean where d is centered;   m ∂s/∂d = c_p sign(d) |d|^(p−1) (mean |d|^p + ε^(p/2))^(1/p − 1).
    """
    k, mu = kernels(x), mean
    with np.errstate(all="ignore"):
        pivot, unit = _measure(x, mu, var, p, eps, centered)
    sums = k.power_sums(x.data, pivot, unit, p=p)
    scale, slope = _estimate(sums, unit, p, eps, _count(x))
    with np.errstate(all="ignore"):
        scale = np.where(mu != mu, mu, scale)
        y = k.batch_norm_elemt(x.data, data(gamma), data(beta), mu, 1 / scale)
    return y, lambda dy: lp_batch_norm_backward(
        dy, x, gamma, p=p, eps=eps, centered=centered, mean=mu, scale=scale, pivot=pivot,
        unit=unit, slope=slope, sums=sums), scale


@op(method=False)
def lp_batch_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, *, p: float, eps: float,
                           centered: bool, mean: Any, scale: Any, pivot: Any, unit: Any, slope: Any,
                           sums: Any) -> Any:
    """∂x, ∂γ and ∂β of lp_batch_norm."""
    k, m = kernels(dy), _count(x)
    with np.errstate(all="ignore"):
        own, own_x = k.batch_norm_backward_reduce(dy.data, x.data, mean, 1 / scale)
        factor = 1 / scale if gamma is None else gamma.data.astype(np.float64) / scale
        a = -factor * own_x * slope
        shift = -factor * own / m - (a * sums[1] / m if centered else 0.0)
        dx = k.power_map(dy.data, x.data, pivot, unit, factor, shift, a, sums[0], p=p)
        dtype = x.dtype if gamma is None else gamma.dtype
        found = dx, own_x.astype(dtype), own.astype(dtype)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        at = x if x.requires_grad else x.detach().requires_grad_()
        xc, s, _ = lp_deviation(at, p, eps, centered=centered)
        xhat, axes = divide_channels(xc, s), (0, *range(2, x.ndim))
        dx, = grad(xhat, (at,), dy if gamma is None else dy * per_channel(gamma, dy),
                   create_graph=True)
        return dx, sum(dy * xhat, axes), sum(dy, axes)  # type: ignore[return-value]
    return found, composition(again, dy, x, gamma)


def _measure(x: Tensor, mu: Any, var: Any, p: float, eps: float, centered: bool) -> tuple[Any, Any]:
    """What is subtracted before powers are taken, and the unit that they are taken in: σ or the
    root of the mean square, or the largest |d| where no float64 holds their square, and at least
    √ε, so that no power of √ε / unit overflows. Where there is no power to take, 1, but for p = 1
    FAR where a sum of |d| might overflow.
    """
    pivot, unit = mu if centered else np.zeros_like(mu), np.ones_like(mu)
    if p == math.inf:
        return pivot, unit
    square = var if centered else mu * mu + var
    if p == 1:
        return pivot, np.where(square < math.inf, unit, FAR)
    usable = (square > 0) & np.isfinite(square)
    if not usable.all():
        top = kernels(x).power_sums(x.data, pivot, unit, p=math.inf)[0]
        unit = np.where((top > 0) & np.isfinite(top), top, 1.0)
    return pivot, np.maximum(np.where(usable, np.sqrt(square), unit), math.sqrt(eps))


def _estimate(sums: Any, unit: Any, p: float, eps: float, m: int) -> tuple[Any, Any]:
    """s, and what r = sign(d) |d|^(p−1), in the unit, is times in ∂s/∂d."""
    least = math.sqrt(eps)
    if p == math.inf:
        return (sums[0] + least) / _largest(m), 1 / (_largest(m) * np.maximum(sums[2], 1.0))
    if p == 1:
        return (sums[0] / m * unit + least) / _moment(1), np.full_like(unit, 1 / (m * _moment(1)))
    with np.errstate(all="ignore"):
        total, c = sums[0] / m + (least / unit) ** p, 1 / _moment(p)
        return c * unit * total ** (1 / p), c / m * total ** (1 / p - 1)


def lp_batch_norm(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
                  p: float = 1, eps: float = 1e-5, *,
                  centered: bool = True) -> tuple[Tensor, Any, Any]:
    """y = γ (x − μ) / s + β with the s of ``lp_deviation``; also μ and s, float64 (C,) arrays.
    Hoffer et al. 2018

    x: (N, C, *S)   γ ``weight``, β ``bias``: (C,). Keeps x, γ, and of each channel in float64 μ, s,
    the sums of powers and their unit; for a p that is no whole number, or is above 32, x − μ, that
    in units of its largest, and the absolute values. Raises ValueError as ``lp_deviation`` does,
    and for sizes that do not fit.

    >>> import nbgrad
    >>> y, mean, s = lp_batch_norm(nbgrad.tensor([[1.0], [3.0], [5.0]]), p=1, eps=1e-12)
    >>> mean.tolist(), round(s.item(), 3)              # mean |x − μ| is 4/3
    ([3.0], 1.671)
    """
    check_channels("lp_batch_norm", input, weight, bias)
    _check("lp_batch_norm", p, eps)
    if p < math.inf and (p != int(p) or p > POWERS):
        xc, scale, mean = lp_deviation(input, p, eps, centered=centered)
        gains = (None if t is None else per_channel(t.to(input.dtype), input)
                 for t in (weight, bias))
        return (divide_channels(xc, scale, *gains), mean.data,
                scale.data.reshape(-1).astype(np.float64))
    mu, var = kernels(input).batch_norm_stats(input.data)
    y, s = _lp_norm(input, scaled(input, weight, bias), bias, p=p, eps=float(eps),
                    centered=centered, mean=mu, var=var)
    return y, mu, s.data


def _check(name: str, p: Any, eps: float) -> None:
    if not isinstance(p, (int, float)) or not p >= 1:
        raise ValueError(f"{name}: p must be at least 1, or inf, got {p!r}")
    if not eps > 0:
        raise ValueError(f"{name}: eps must be positive, got {eps}")


def lp_deviation(input: Tensor, p: float = 2, eps: float = 1e-5, *,
                 centered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x − μ, s and μ,  s = c_p (mean |x − μ|^p + ε^(p/2))^(1/p) per channel; for p = inf, the
    largest |x − μ| + √ε.      x: (N, C, *S)   s: (1, C, 1, …)   μ: float64 (C,), no gradient

    c_p is 1 / (E|z|^p)^(1/p) of a standard normal z (for p = inf, of the largest of as many as
    there are): s estimates σ whatever p. c_1 = √(π/2), c_2 = 1. ε stands as it does in batch norm,
    which p = 2 is. ``centered=False``: of |x| instead of |x − μ|, with the same c_p. Keeps once
    or twice as much as x: what powers, or the largest, are taken of.
    Hoffer et al. 2018 (p = 1, inf); Santurkar et al. 2018 (not centered)

    >>> import nbgrad
    >>> x = nbgrad.randn(100000, 1, generator=nbgrad.Generator(0))
    >>> [round(lp_deviation(x, p)[1].item(), 2) for p in (1, 2, 3)]
    [1.0, 1.0, 1.0]
    """
    check_channels("lp_deviation", input)
    _check("lp_deviation", p, eps)
    xc, mu = center(input)
    x, axes = xc if centered else input, (0, *range(2, input.ndim))
    if p == math.inf:
        n = input.data.size // max(input.shape[1], 1)
        top = amax(abs(x), axes, True) if n else sum(x, axes, True)
        return xc, (top + math.sqrt(eps)) * (1 / _largest(max(n, 1))), mu
    if p == 1:
        return xc, (channel_size(x) + math.sqrt(eps)) * (1 / _moment(1)), mu
    # s is the same whatever x is measured in: powers of at most 1 neither over- nor underflow
    unit = _largest_of(x, axes, math.sqrt(eps))
    least = as_tensor(((math.sqrt(eps) / unit.astype(np.float64)) ** p).astype(x.dtype))
    total = mean_of(_power(x / as_tensor(unit), p), axes, True) + least
    return xc, pow(total, 1 / p) * as_tensor(unit) * (1 / _moment(p)), mu


def _largest_of(x: Tensor, axes: tuple[int, ...], least: float) -> Any:
    """The largest |x| over axes, kept as 1s, or ``least`` if it is larger."""
    k = kernels(x)
    top = k.max(k.abs(x.data), axes=axes, keepdims=True) if x.data.size else k.sum(
        x.data, axes=axes, keepdims=True)
    return np.maximum(top, x.dtype.type(least))


def _power(x: Tensor, p: float) -> Tensor:
    """|x|^p, smooth at 0 for even p."""
    if p % 2 == 0:
        return square(x) if p == 2 else pow(square(x), p / 2)
    return pow(abs(x), p)


def _moment(p: float) -> float:
    """(E|z|^p)^(1/p) of a standard normal z."""
    return math.exp((p / 2 * math.log(2) + math.lgamma((p + 1) / 2) - math.lgamma(0.5)) / p)


@cache
def _largest(n: int) -> float:
    """E max |z| of n standard normal z: ∫ 1 − P(|z| < t)ⁿ dt, by the trapezoidal rule."""
    t = np.linspace(0, 10, 2001)
    below = np.array([math.erf(v / math.sqrt(2)) for v in t]) ** n
    return float(np.trapezoid(1 - below, t))
