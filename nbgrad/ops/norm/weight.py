"""Normalization of weights instead of activations."""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, composition, op
from nbgrad.backend import constant, full, greatest, kernels
from nbgrad.ops.elementwise import rsqrt, sqrt, where
from nbgrad.ops.norm.channels import check_tensors
from nbgrad.ops.norm.layer import layer_norm
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import _axis, checked, permute, reshape

__all__ = ["weight_norm", "weight_standardization"]

LEAST = 1e-150              # of a norm: squares of float64 below 1e-308 lose digits


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    """w = g v / ‖v‖, ‖v‖ over every axis but ``dim``; over all with None or −1.
    Salimans & Kingma 2016

    v: any shape   g: v's shape with 1 for every other axis, or () with None. Where v = 0, which
    has no direction, w = 0 and its gradient is that of w = g v (PyTorch: NaN). The norm of what
    would overflow or underflow when squared is right. Keeps v, g and ‖v‖ (in float64; where
    a norm is 0 or its square leaves the range, v over its largest in place of v). Raises
    ValueError for a g of another shape, TypeError for what are no floating Tensors of one dtype.

    >>> import nbgrad
    >>> weight_norm(nbgrad.tensor([[3.0, 4.0]]), nbgrad.tensor([[10.0]])).tolist()
    [[6.0, 8.0]]
    """
    check_tensors("weight_norm", v=v, g=g)
    if v.dtype.kind not in "fV" or g.dtype != v.dtype:
        raise TypeError(f"weight_norm: expected v and g of one floating dtype, got {v.dtype} and "
                        f"{g.dtype}")
    axes = norm_axes(v, dim)
    shape = tuple(1 if i in axes else n for i, n in enumerate(v.shape))
    if g.shape != (shape if len(axes) < v.ndim else ()):
        raise ValueError(f"weight_norm: expected g of shape {shape if len(axes) < v.ndim else ()} "
                         f"for v of shape {v.shape} and dim={dim}, got {g.shape}")
    if axes and v.data.size:
        w = _by_parts(v, dim if len(axes) < v.ndim else None, g)
        if w is not None:
            return w
    unit = largest(v, axes)
    u = v / as_tensor(unit)                            # w is the same whatever v is measured in
    square = sum(u * u, axes, True) if axes else u * u     # () is "all of them" to a reduction
    zero = square.data == 0
    return u * (g / sqrt(where(zero, 1.0, square) if zero.any() else square))


def _by_parts(v: Tensor, dim: int | None, g: Tensor) -> Tensor | None:
    """w by way of v as (before, n, behind) of the n indices of ``dim``, in the order in which that
    is a view if it can be one. None if a norm is 0, not finite, or too small for its square."""
    order = tuple(sorted(range(v.ndim), key=v.data.strides.__getitem__, reverse=True))
    there = order == tuple(range(v.ndim))
    x = v if there else permute(v, *order)
    at = 0 if dim is None else order.index(dim % v.ndim)
    n = 1 if dim is None else x.shape[at]
    parts = reshape(x, (math.prod(x.shape[:at]), n, v.data.size // math.prod(x.shape[:at]) // n))
    norm = _norms(parts)
    if not (norm > LEAST).all() or not np.isfinite(norm).all():
        return None
    w = reshape(_scaled(parts, reshape(g, (-1,)), norm=norm), x.shape)
    return w if there else permute(w, *(order.index(i) for i in range(v.ndim)))


def _norms(x: Tensor) -> Any:
    """‖x‖ of each channel, float64 (C,)."""
    mean, var = kernels(x).batch_norm_stats(x.data)
    with np.errstate(all="ignore"):
        return np.sqrt((mean * mean + var) * (x.data.size / x.shape[1]))


@op(name="weight_norm", method=False)
def _scaled(x: Tensor, g: Tensor, /, *, norm: Any) -> Any:
    """w = g u,  u = x / ‖x‖ of each channel of (N, C, S).   ∂g = Σ ∂w u,  ∂x = g/‖x‖ (∂w − u ∂g)"""
    w = kernels(x).batch_norm_elemt(x.data, g.data, None, np.zeros_like(norm), 1 / norm)
    return w, lambda dw: weight_norm_backward(dw, x, g, norm=norm)


@op(method=False)
def weight_norm_backward(dw: Tensor, x: Tensor, g: Tensor, /, *, norm: Any) -> Any:
    """∂x and ∂g of weight_norm."""
    k, zero, inverse = kernels(dw), np.zeros_like(norm), 1 / norm
    _, dg = k.batch_norm_backward_reduce(dw.data, x.data, zero, inverse)
    with np.errstate(all="ignore"):
        dx = k.batch_norm_backward_elemt(dw.data, x.data, g.data, zero, inverse, zero,
                                         dg * (x.data.size / x.shape[1]))

    def again(dw: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        inverse = rsqrt(sum(x * x, (0, 2), True))
        u = x * inverse
        dg = sum(dw * u, (0, 2), True)
        return reshape(g, (1, -1, 1)) * inverse * (dw - u * dg), reshape(dg, (-1,))
    with np.errstate(all="ignore"):
        return (dx, dg.astype(g.dtype)), composition(again, dw, x, g, dtype=np.float64)


def _by_rows(weight: Tensor, dim: int | None, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of the weight as rows, one for each index of ``dim`` (one of all with None), in a form in
    which they are views if they can be: what f makes of a row is not to depend on the order."""
    strides = weight.data.strides
    first = () if dim is None else (dim % weight.ndim,)
    order = (*first, *sorted((i for i in range(weight.ndim) if i not in first),
                             key=strides.__getitem__, reverse=True))
    there = order == tuple(range(weight.ndim))
    w = weight if there else permute(weight, *order)
    out = 1 if dim is None else w.shape[0]
    y = reshape(f(reshape(w, (out, math.prod(w.shape[len(first):])))), w.shape)
    return y if there else permute(y, *(order.index(i) for i in range(weight.ndim)))


@op(name="spectral_norm", method=False)
def over_sigma(w: Tensor, /, *, u: Any, v: Any, sigma: float) -> Any:
    """y = W / σ,  σ = uᵀ W v, which is given, u and v constants.   ∂W = (∂y − (Σ ∂y y) u vᵀ) / σ
    W, y: (M, N)  u: (M,)  v: (N,) arrays"""
    k = kernels(w)
    y = k.div(w.data, constant(sigma, w.dtype, w.data))
    return y, (lambda dy: spectral_norm_backward(dy, w, u=u, v=v, sigma=sigma),)


@op(method=False)
def spectral_norm_backward(dy: Tensor, w: Tensor, /, *, u: Any, v: Any, sigma: float) -> Any:
    """∂W of spectral_norm."""
    k, whole, one = kernels(dy), (1, 1, -1), full((1,), 1.0, np.float64, w.data)
    _, slope = k.batch_norm_backward_reduce(dy.data.reshape(whole), w.data.reshape(whole), one - 1,
                                            one / sigma)
    dw = k.add_outer(dy.data, u, v, a=1 / sigma, b=-float(slope[0]) / sigma)

    def again(dy: Tensor, w: Tensor) -> Tensor:
        left, right = reshape(as_tensor(u), (-1, 1)), reshape(as_tensor(v), (1, -1))
        outer = left * right
        sigma = sum(w * outer)
        return (dy - sum(dy * w) / sigma * outer) / sigma
    return dw, composition(again, dy, w)


def norm_axes(v: Tensor, dim: int | None) -> tuple[int, ...]:
    """Every axis but ``dim``; all with None or −1, as PyTorch has it."""
    if dim is None or dim == -1:
        return tuple(range(v.ndim))
    at = _axis(dim, v.ndim, "weight_norm")
    return tuple(i for i in range(v.ndim) if i != at)


def largest(v: Tensor, axes: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.floating]]:
    """The largest |v| over axes, kept as 1s; 1 where that is 0."""
    top = greatest(np.abs(v.data), axes, True)
    return np.where(top > 0, top, 1.0).astype(v.dtype)


def weight_standardization(weight: Tensor, eps: float = 1e-5, dim: int = 0) -> Tensor:
    """ŵ = (w − μ) / √(σ² + ε) with μ and (biased) σ² over every axis but ``dim``: for each output
    channel.      Qiao et al. 2019

    w: the weight of a layer, of 2 and more dims. One fused layer norm of its rows. Keeps w, μ, 1/σ.
    Raises ValueError for a weight with one value per channel, which would be 0.

    >>> import nbgrad
    >>> weight_standardization(nbgrad.tensor([[1.0, 3.0]]), eps=0.0).tolist()
    [[-1.0, 1.0]]
    """
    weight = checked(weight, "weight_standardization")
    if weight.dtype.kind not in "fV":
        raise TypeError(f"weight_standardization: expected a floating weight, got {weight.dtype}")
    dim = _axis(dim, weight.ndim, "weight_standardization")
    if weight.ndim < 2 or math.prod(weight.shape) == weight.shape[dim] > 0:
        raise ValueError("weight_standardization: expected more than 1 weight per output channel, "
                         f"got a weight of shape {weight.shape} and dim={dim}")
    if not eps >= 0:
        raise ValueError(f"weight_standardization: eps must not be negative, got {eps}")
    return _by_rows(weight, dim, lambda rows: layer_norm(rows, rows.shape[1:], eps=eps))
