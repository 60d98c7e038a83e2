"""Powers other than 2: estimates of the standard deviation by the mean of |x − μ|^p."""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.backend import kernels
from nbgrad.ops.elementwise import abs, pow, square
from nbgrad.ops.norm.channels import center, channel_size, check_channels
from nbgrad.ops.reduce import amax, mean, sum

__all__ = ["lp_deviation"]


def lp_deviation(input: Tensor, p: float = 2, eps: float = 1e-5, *,
                 centered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x − μ, s and μ,  s = c_p (mean |x − μ|^p + ε^(p/2))^(1/p) per channel; for p = inf, the
    largest |x − μ| + √ε.      x: (N, C, *S)   s: (1, C, 1, …)   μ: float64 (C,), no gradient

    c_p is 1 / (E|z|^p)^(1/p) of a standard normal z (for p = inf, of the largest of as many as
    there are): s estimates σ whatever p. c_1 = √(π/2), c_2 = 1. ε stands as it does in batch norm,
    which p = 2 is. ``centered=False``: of |x| instead of |x − μ|, with the same c_p.
    Hoffer et al. 2018 (p = 1, inf); Santurkar et al. 2018 (not centered)

    >>> import nbgrad
    >>> x = nbgrad.randn(100000, 1, generator=nbgrad.Generator(0))
    >>> [round(lp_deviation(x, p)[1].item(), 2) for p in (1, 2, 3)]
    [1.0, 1.0, 1.0]
    """
    check_channels("lp_deviation", input)
    if not isinstance(p, (int, float)) or not p >= 1:
        raise ValueError(f"lp_deviation: p must be at least 1, or inf, got {p!r}")
    if not eps > 0:
        raise ValueError(f"lp_deviation: eps must be positive, got {eps}")
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
    total = mean(_power(x / as_tensor(unit), p), axes, True) + least
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
