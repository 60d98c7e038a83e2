"""Normalization of weights instead of activations."""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.backend import greatest
from nbgrad.ops.elementwise import sqrt, where
from nbgrad.ops.norm.channels import check_tensors
from nbgrad.ops.norm.layer import layer_norm
from nbgrad.ops.norm.response import response as frn
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import _axis, checked, permute, reshape

__all__ = ["weight_norm", "weight_standardization"]


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    """w = g v / ‖v‖, ‖v‖ over every axis but ``dim``; over all with None or −1.
    Salimans & Kingma 2016

    v: any shape   g: v's shape with 1 for every other axis, or () with None. Where v = 0, which
    has no direction, w = 0 and its gradient is that of w = g v (PyTorch: NaN). The norm of what
    would overflow or underflow when squared is right. Raises ValueError for a g of another
    shape, TypeError for what are no floating Tensors of one dtype.

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
        w = _by_rows(v, dim if len(axes) < v.ndim else None, partial(_scaled, g=g))
        if not np.isnan(w.data).any():                 # a row of zeros, or NaN itself
            return w
    unit = largest(v, axes)
    u = v / as_tensor(unit)                            # w is the same whatever v is measured in
    square = sum(u * u, axes, True) if axes else u * u     # () is "all of them" to a reduction
    zero = square.data == 0
    return u * (g / sqrt(where(zero, 1.0, square) if zero.any() else square))


def _scaled(rows: Tensor, g: Tensor) -> Tensor:
    """g x / ‖x‖ of each row: filter response norm of one sample, without ε."""
    out, n = rows.shape
    x = reshape(rows, (1, out, n))
    gains = reshape(g, (out,)) * (1 / math.sqrt(n))
    return reshape(frn(x, gains, None, None, eps=0.0), rows.shape)


def _by_rows(weight: Tensor, dim: int | None, f: Callable[[Tensor], Tensor]) -> Tensor:
    """f of the weight as rows, one for each index of ``dim`` (one of all with None), in a form in
    which they are views if they can be: what f makes of a row is not to depend on the order."""
    strides = weight.data.strides
    first = () if dim is None else (dim % weight.ndim,)
    order = (*first, *sorted((i for i in range(weight.ndim) if i not in first),
                             key=lambda i: -strides[i]))
    there = order == tuple(range(weight.ndim))
    w = weight if there else permute(weight, *order)
    out = 1 if dim is None else w.shape[0]
    y = reshape(f(reshape(w, (out, math.prod(w.shape[len(first):])))), w.shape)
    return y if there else permute(y, *(order.index(i) for i in range(weight.ndim)))


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

    One fused layer norm of the rows of the weight. Raises ValueError for a weight with one value
    per channel, which would be 0.

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
