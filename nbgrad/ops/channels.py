"""Statistics per channel as ops of their own, from which norms without a fused kernel are made.

x is (N, C, *S); a statistic is over every axis but 1, (1, C, 1, …). Mean and variance are merged in
float64 (``batch_norm_stats``), so that a large offset, a constant channel or a value whose square
overflows costs no digits; each vjp is made of the same ops, so all orders are exact. Statistics per
sample and channel, or group of channels, are those of ``rows(x, n)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, op
from nbgrad.backend import kernels
from nbgrad.ops.elementwise import where
from nbgrad.ops.shape import reshape

__all__ = ["center", "channel_rms", "channel_std"]


@op(method=False)
def center(x: Tensor, /) -> Any:
    """y = x − μ,  μ the mean of its channel.   ∂x = ∂y − the mean of ∂y.      x, y: (N, C, *S)"""
    k = kernels(x)
    mean, _ = k.batch_norm_stats(x.data)
    return k.batch_norm_elemt(x.data, None, None, mean, np.ones_like(mean)), (center,)


@op(method=False, saves_output=True)
def channel_std(x: Tensor, /, eps: float = 0.0) -> Any:
    """y = √(σ² + ε), σ² the biased variance of a channel.   ∂x = ∂y (x − μ) / (m y), m values per
    channel; 0 where y is.      x: (N, C, *S)  y: (1, C, 1, …)"""
    _, var = kernels(x).batch_norm_stats(x.data)
    return (_root(var, eps, x), lambda dy, y: center(x) / _divisor(y) * (dy / _count(x)))


@op(method=False, saves_output=True)
def channel_rms(x: Tensor, /, eps: float = 0.0) -> Any:
    """y = √(mean x² + ε) of a channel.   ∂x = ∂y x / (m y), m values per channel; 0 where y is.
    x: (N, C, *S)  y: (1, C, 1, …)"""
    mean, var = kernels(x).batch_norm_stats(x.data)
    with np.errstate(all="ignore"):
        square = mean * mean + var                     # of two that are not negative: no cancelling
    return _root(square, eps, x), lambda dy, y: x / _divisor(y) * (dy / _count(x))


def _root(square: Any, eps: float, x: Tensor) -> Any:
    with np.errstate(all="ignore"):
        return np.sqrt(square + eps).astype(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))


def _divisor(y: Tensor) -> Any:
    """y, and 1 where it is 0: what it divides is 0 there, too."""
    zero = y.data == 0
    return where(zero, 1.0, y) if zero.any() else y


def _count(x: Tensor) -> int:
    return max(x.data.size // max(x.shape[1], 1), 1)


def rows(x: Tensor, groups: int) -> Tensor:
    """(N, C, *S) as (1, N·groups, C/groups · |S|), a channel per sample and group of channels."""
    n = x.shape[0] * groups
    return reshape(x, (1, n, x.data.size // n if n else 0))


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast against x (N, C, *S)."""
    return reshape(t, (1, -1) + (1,) * (x.ndim - 2))


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ x + β per channel, of those that are there."""
    y = x if weight is None else x * per_channel(weight, x)
    return y if bias is None else y + per_channel(bias, x)


def check_channels(name: str, x: Any, *sized: Tensor | None, least: int = 2) -> None:
    """Raise unless x is a floating (N, C, *S) with C that of the given vectors."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.ndim < least or x.dtype.kind != "f":
        shape = "(N, C, *S)" if least == 2 else "(N, C, *S) input with at least one S"
        raise ValueError(f"{name}: expected a floating {shape}, got {x.dtype} of size "
                         f"{list(x.shape)}")
    for t in sized:
        if t is not None and (t.shape != x.shape[1:2] or t.dtype != x.dtype):
            raise ValueError(f"{name}: expected parameters of shape {x.shape[1:2]} and {x.dtype}, "
                             f"one value per channel of x, got {t.shape} and {t.dtype}")


def check_count(name: str, x: Tensor) -> None:
    """Raise for one value per channel, which has no variance."""
    if x.data.size == x.shape[1] > 0:
        raise ValueError(f"{name}: Expected more than 1 value per channel when training, got input "
                         f"size {list(x.shape)}")
