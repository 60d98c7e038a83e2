"""Statistics per channel as ops of their own, from which norms without a fused kernel are made.

x is (N, C, *S); a statistic is over every axis but 1, (1, C, 1, …). Mean and variance are merged in
float64 (``batch_norm_stats``), so that a large offset, a constant channel or a value whose square
overflows costs no digits; each vjp is made of the same ops, so all orders are exact. Statistics per
sample and channel, or group of channels, are those of ``rows(x, n)``. All raise TypeError for what
is no Tensor, ValueError for sizes and dtypes that do not fit.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from nbgrad.autograd import OPS, Tensor, as_tensor, composition, op
from nbgrad.backend import full, kernels, serves
from nbgrad.ops.elementwise import neg, where
from nbgrad.ops.reduce import mean, sum
from nbgrad.ops.shape import reshape

__all__ = ["at_least", "center", "channel_dot", "channel_rms", "channel_size", "channel_std",
           "channel_sums", "divide_channels"]

relu_backward = OPS["relu_backward"]


@op(method=False)
def center(x: Tensor, beta: Tensor | None = None, /) -> Any:
    """y = x − μ + β,  μ the mean of its channel.   ∂x = ∂y − the mean of ∂y,   ∂β = Σ ∂y.   Also μ,
    float64 (C,).      x, y: (N, C, *S)  β: (C,)"""
    check_channels("center", x, beta)
    k, dtype = kernels(x), None if beta is None else beta.dtype
    mean, _ = k.batch_norm_stats(x.data)
    y = k.batch_norm_elemt(x.data, None, None if beta is None else beta.data, mean,
                           np.ones_like(mean))

    def vjp(dy: Tensor) -> Any:
        return (center(dy)[0], None) if dtype is None else center_backward(dy, dtype=dtype)
    return y, vjp, mean


@op(method=False)
def center_backward(dy: Tensor, /, dtype: Any) -> Any:
    """∂x and, in their dtype, ∂β of center."""
    k = kernels(dy)
    mean, _ = k.batch_norm_stats(dy.data)
    dx = k.batch_norm_elemt(dy.data, None, None, mean, np.ones_like(mean))

    def again(dy: Tensor) -> tuple[Tensor, Tensor]:
        return center(dy)[0], sum(dy, (0, *range(2, dy.ndim)))
    with np.errstate(all="ignore"):
        return (dx, (mean * _count(dy)).astype(dtype)), composition(again, dy)


@op(method=False, saves_output=True)
def channel_std(x: Tensor, /, eps: float = 0.0) -> Any:
    """y = √(σ² + ε), σ² the biased variance of a channel.   ∂x = ∂y (x − μ) / (m y), m values per
    channel; 0 where y is.      x: (N, C, *S)  y: (1, C, 1, …)"""
    _check_root("channel_std", x, eps)
    _, var = kernels(x).batch_norm_stats(x.data)
    return _root(var, eps, x), lambda dy, y: _slope(center(x)[0], dy, y)


@op(method=False, saves_output=True)
def channel_rms(x: Tensor, /, eps: float = 0.0) -> Any:
    """y = √(mean x² + ε) of a channel.   ∂x = ∂y x / (m y), m values per channel; 0 where y is.
    x: (N, C, *S)  y: (1, C, 1, …)"""
    _check_root("channel_rms", x, eps)
    mean, var = kernels(x).batch_norm_stats(x.data)
    with np.errstate(all="ignore"):
        square = mean * mean + var                     # of two that are not negative: no cancelling
    return _root(square, eps, x), lambda dy, y: _slope(x, dy, y)


@op(method=False)
def channel_dot(a: Tensor, b: Tensor, /) -> Any:
    """y = Σ a b of a channel, summed in float64.   ∂a = ∂y b,   ∂b = ∂y a.
    a, b: (N, C, *S)  y: (1, C, 1, …)"""
    _check_pair("channel_dot", a, b)
    zero = full(a.shape[1:2], 0.0, np.float64, a.data)
    _, y = kernels(a).batch_norm_backward_reduce(a.data, b.data, zero, zero + 1)
    return _kept(y, a), (lambda dy: dy * b, lambda dy: dy * a)


@op(method=False)
def divide_channels(x: Tensor, s: Tensor, gamma: Tensor | None = None,
                    beta: Tensor | None = None, /) -> Any:
    """y = γ x / s + β in one pass.   ∂x = γ ∂y / s,  ∂s = −γ ∂γ / s,  ∂γ = Σ ∂y x / s,  ∂β = Σ ∂y.
    x: (N, C, *S)  s, γ, β: (1, C, 1, …)"""
    check_tensors("divide_channels", s=s)
    for own in ((s,), (gamma, beta)):
        check_channels("divide_channels", x, *own, shape=_kept_shape(x))
    inverse = _inverse(s)
    y = kernels(x).batch_norm_elemt(x.data, _flat(gamma), _flat(beta), np.zeros_like(inverse),
                                    inverse)

    def vjp(dy: Tensor) -> tuple[Tensor | None, ...]:
        total, product = channel_sums(dy, x, s)
        slope = product if gamma is None else product * gamma
        return (divide_channels(dy, s, gamma), neg(slope / s),
                None if gamma is None else product, None if beta is None else total)
    return y, vjp


@op(method=False)
def channel_sums(a: Tensor, b: Tensor, s: Tensor, /) -> Any:
    """Σ a and Σ a b / s of a channel in one pass, summed in float64.
    a, b: (N, C, *S)  s and the sums: (1, C, 1, …)"""
    _check_pair("channel_sums", a, b)
    check_tensors("channel_sums", s=s)
    check_channels("channel_sums", a, s, shape=_kept_shape(a))
    inverse = _inverse(s)
    sums = kernels(a).batch_norm_backward_reduce(a.data, b.data, np.zeros_like(inverse), inverse)

    def again(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        axes = (0, *range(2, a.ndim))
        return sum(a, axes, True), sum(a * (b / s), axes, True)
    return tuple(_kept(v, a) for v in sums), composition(again, a, b, s)


@op(method=False, saves_output=True)
def channel_size(x: Tensor, /) -> Any:
    """y = mean |x| of a channel, summed in float64.   ∂x = ∂y sign(x) / m, m values per channel.
    x: (N, C, *S)  y: (1, C, 1, …)"""
    check_channels("channel_size", x)
    k = kernels(x)
    mean, _ = k.batch_norm_stats(k.abs(x.data))
    return _kept(mean, x), lambda dy, y: as_tensor(k.sign(x.data)) * (dy / _count(x))


def _inverse(s: Tensor) -> Any:
    with np.errstate(all="ignore"):
        return 1 / s.data.reshape(-1).astype(np.float64)


def _flat(t: Tensor | None) -> Any:
    return None if t is None else t.data.reshape(-1)


@op(method=False)
def at_least(x: Tensor, t: Tensor, /) -> Any:
    """y = max(x, t).   ∂y goes to x where x > t, else to t.      x: (N, C, *S)  t: (1, C, 1, …)"""
    check_tensors("at_least", t=t)
    check_channels("at_least", x, t, shape=_kept_shape(x))
    k = kernels(x)

    def vjp(dy: Tensor) -> tuple[Tensor, Tensor]:
        above = relu_backward(dy, as_tensor(k.sub(x.data, t.data)))
        axes = (0, *range(2, x.ndim))
        return above, sum(dy.to(t.dtype) - above.to(t.dtype), axes, True)
    return k.maximum(x.data, t.data), vjp


def _root(square: Any, eps: float, x: Tensor) -> Any:
    with np.errstate(all="ignore"):
        return _kept(np.sqrt(square + eps), x)


def _kept(statistic: Any, x: Tensor) -> Any:
    """(C,) as (1, C, 1, …) of x's dtype."""
    with np.errstate(all="ignore"):
        return statistic.astype(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))


def _slope(x: Tensor, dy: Tensor, y: Tensor) -> Any:
    """∂y x / (m y), 0 where y is: there, x is."""
    zero = y.data == 0
    return divide_channels(x, where(zero, 1.0, y) if zero.any() else y, dy / _count(x))


def _count(x: Tensor) -> int:
    return max(x.data.size // max(x.shape[1], 1), 1)


def rows(x: Tensor, groups: int) -> Tensor:
    """(N, C, *S) as (1, N·groups, C/groups · |S|), a channel per sample and group of channels."""
    n = x.shape[0] * groups
    return reshape(x, (1, n, x.data.size // n if n else 0))


def mean_of(x: Tensor, axes: int | tuple[int, ...], keepdim: bool) -> Any:
    """The mean over axes; 0 of nothing, of which all derivatives are 0."""
    return mean(x, axes, keepdim) if x.data.size else sum(x, axes, keepdim)


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast against x (N, C, *S)."""
    return reshape(t, (1, -1) + (1,) * (x.ndim - 2))


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ x + β per channel, of those that are there."""
    y = x if weight is None else x * per_channel(weight, x)
    return y if bias is None else y + per_channel(bias, x)


def _kept_shape(x: Any) -> Any:
    """That of a statistic of x, (1, C, 1, …)."""
    return (1, *x.shape[1:2], *[1] * (x.ndim - 2)) if isinstance(x, Tensor) else ()


def _check_root(name: str, x: Any, eps: Any) -> None:
    check_channels(name, x)
    check_eps(name, eps)


def _check_pair(name: str, a: Any, b: Any) -> None:
    check_channels(name, a)
    check_tensors(name, b=b)
    if b.shape != a.shape or b.dtype != a.dtype:
        raise ValueError(f"{name}: expected a and b of one shape and dtype, got {a.shape} and "
                         f"{b.shape}, {a.dtype} and {b.dtype}")


def check_channels(name: str, x: Any, *sized: Tensor | None, least: int = 2,
                   shape: tuple[int, ...] | None = None) -> None:
    """Raise unless x is a floating (N, C, *S) with C that of the given vectors, or of what has
    another ``shape`` than (C,)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.ndim < least or x.dtype.kind not in "fV":
        form = "(N, C, *S)" if least == 2 else "(N, C, *S) input with at least one S"
        raise ValueError(f"{name}: expected a floating {form}, got {x.dtype} of size "
                         f"{list(x.shape)}")
    shape = x.shape[1:2] if shape is None else shape
    for t in sized:
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected parameters to be Tensors, got {type(t).__name__}")
        if t is not None and (t.shape != shape or not serves(t.dtype, x.dtype)):
            raise ValueError(f"{name}: expected parameters of shape {shape} and {x.dtype}, "
                             f"one value per channel of x, got {t.shape} and {t.dtype}")
    if len({t.dtype for t in sized if t is not None}) > 1:
        raise ValueError(f"{name}: expected parameters of one dtype")


def check_tensors(name: str, **given: Any) -> None:
    for what, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected {what} to be a Tensor, got {type(t).__name__}")


def check_eps(name: str, eps: Any) -> None:
    if not isinstance(eps, Real) or not float(eps) >= 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps!r}")


def check_count(name: str, x: Tensor) -> None:
    """Raise for one value per channel, which has no variance."""
    if x.data.size == x.shape[1] > 0:
        raise ValueError(f"{name}: Expected more than 1 value per channel when training, got input "
                         f"size {list(x.shape)}")
