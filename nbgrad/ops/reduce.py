"""Reductions with ``dim`` and ``keepdim``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, checked_dtype, op
from nbgrad.backend import kernels, move
from nbgrad.ops.elementwise import abs, exp, log, mask, pow, sqrt, where
from nbgrad.ops.indexing import flip, gather
from nbgrad.ops.shape import _axis as axis_of, broadcast_to, checked, reshape, unsqueeze


class Reduced(NamedTuple):
    """What ``max`` and ``min`` along a dimension return."""

    values: Tensor
    indices: Tensor


def axes_of(dim: Any, ndim: int, name: str) -> tuple[int, ...] | None:
    """``dim`` as a sorted tuple of axes; None for all. Raises TypeError and IndexError, and
    ValueError on a repeat."""
    if dim is None or dim == ():
        return None
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    axes = tuple(sorted(axis_of(d, ndim, name) for d in dims))
    if len(set(axes)) < len(axes):
        raise ValueError(f"{name}: dim {dims} appears multiple times in the list of dims")
    return axes if ndim else None


builtin_max = max


def taken(x: Tensor, dtype: Any) -> Any:
    """x's array, as ``dtype`` where one is given."""
    return x.data if dtype is None else x.data.astype(checked_dtype(dtype), copy=False)


def given_back(dx: Tensor, dtype: Any) -> Tensor:
    """A gradient in the dtype that its input had before ``taken``."""
    return dx if dx.data.dtype is dtype else dx.to(dtype)


def _dims(dim: Any, axis: Any, name: str) -> Any:
    if axis is not None and dim is not None:
        raise TypeError(f"{name}: got dim={dim} and axis={axis}, two names of one thing")
    return dim if axis is None else axis


def _spread(dy: Tensor, shape: tuple[int, ...], axes: tuple[int, ...] | None,
            keepdim: bool) -> Tensor:
    """A reduced tensor back over the shape that it was reduced from."""
    if axes is not None and not keepdim:
        dy = reshape(dy, tuple(1 if i in axes else n for i, n in enumerate(shape)))
    return broadcast_to(dy, shape)


def _count(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> int:
    return math.prod(shape if axes is None else [shape[a] for a in axes])


@op
def sum(x: Tensor, /, dim: Any = None, keepdim: bool = False, *, dtype: Any = None,
        axis: Any = None) -> Any:
    """y = Σ x over dim (all by default), of x as ``dtype``.   ∂x = ∂y, spread."""
    axes, shape, before = None, x.data.shape, x.data.dtype
    if dim is not None or axis is not None:
        axes = axes_of(_dims(dim, axis, "sum"), x.ndim, "sum")
    y = kernels(x).sum(taken(x, dtype), axes=axes, keepdims=keepdim)
    y = y if dtype is None else y.astype(checked_dtype(dtype), copy=False)
    return y, (lambda dy: _spread(given_back(dy, before), shape, axes, keepdim),)


@op(method=False)
def sum_to(x: Tensor, /, shape: tuple[int, ...]) -> Any:
    """Sum of x over what broadcasting added to ``shape``.   ∂x = ∂y, spread."""
    lead, before = x.ndim - len(shape), x.shape
    axes = (*range(lead), *(i for i, n in enumerate(shape, lead) if n == 1 and before[i] != 1))
    y = kernels(x).sum(x.data, axes=axes, keepdims=True) if axes else x.data
    return np.reshape(y, shape), (lambda dy: broadcast_to(dy, before),)


@op
def mean(x: Tensor, /, dim: Any = None, keepdim: bool = False, *, dtype: Any = None,
         axis: Any = None) -> Any:
    """y = Σ x / n over dim, of x as ``dtype``.   ∂x = ∂y / n, spread.   NaN of nothing. Floating
    point only."""
    data, before = taken(x, dtype), x.data.dtype
    _floating(data, "mean")
    axes, shape = axes_of(_dims(dim, axis, "mean"), x.ndim, "mean"), x.shape
    n, result = _count(shape, axes), data.dtype
    if result.itemsize == 2:                         # of halves the sum may be none
        data = data.astype(np.float32)
    with np.errstate(all="ignore"):
        y = kernels(x).sum(data, axes=axes, keepdims=keepdim) / data.dtype.type(n)
    y = y.astype(result, copy=False)
    return y, (lambda dy: _spread(given_back(dy, before) / n, shape, axes, keepdim),)


def _floating(x: Any, name: str) -> None:
    if x.dtype.kind not in "fV":
        raise RuntimeError(f"{name}(): could not infer output dtype. Input dtype must be either a "
                           f"floating point or complex dtype. Got: {x.dtype}")


def var(input: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
        correction: int = 1) -> Tensor:
    """y = Σ (x − mean)² / (n − correction), in two passes.   ``unbiased=False`` is correction 0."""
    _floating(input, "var")
    axes = axes_of(dim, input.ndim, "var")
    correction = correction if unbiased is None else int(unbiased)
    d = input - mean(input, axes, True)
    n = builtin_max(_count(input.shape, axes) - correction, 0)
    return sum(d * d, axes, keepdim) / n  # type: ignore[no-any-return]


def std(input: Tensor, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, *,
        correction: int = 1) -> Tensor:
    """y = √var.   The gradient where var is 0 is 0."""
    return _flat_at_zero(sqrt, var(input, dim, unbiased, keepdim, correction=correction))


def _flat_at_zero(f: Any, x: Tensor, *settings: float) -> Tensor:
    """f(x), and 0 with gradient 0 where x is 0."""
    zero = x.data == 0
    if not zero.any():
        return f(x, *settings)  # type: ignore[no-any-return]
    return mask(f(where(zero, 1.0, x), *settings), ~zero)  # type: ignore[no-any-return]


def _extreme(name: str, doc: str) -> Any:
    def fn(x: Tensor, /, dim: Any = None, keepdim: bool = False) -> Any:
        axes, shape = axes_of(dim, x.ndim, name), x.shape
        if not _count(shape, axes):
            raise IndexError(f"{name}(): Expected reduction dim to have non-zero size, got shape "
                             f"{shape}")
        y = as_tensor(getattr(kernels(x), name[1:])(x.data, axes=axes, keepdims=True)).data
        rest = [n for i, n in enumerate(shape) if axes is not None and i not in axes]

        def vjp(dy: Tensor) -> Tensor:
            at = x.data == y
            share = kernels(x).div(at, at.sum(axis=axes, keepdims=True)).astype(x.dtype)
            return _spread(dy, shape, axes, keepdim) * as_tensor(share)
        return y if keepdim else y.reshape(rest), (vjp,)
    fn.__doc__, fn.__module__, fn.__name__ = doc, __name__, name
    return op(fn)


amax = _extreme("amax", "y = largest of x over dim.   ∂y is shared evenly among equal ones.")
amin = _extreme("amin", "y = smallest of x over dim.   ∂y is shared evenly among equal ones.")


def _along(x: Tensor, dim: int, keepdim: bool, arg: Any, name: str) -> Reduced:
    axis = axis_of(dim, x.ndim, name)
    if not x.ndim:
        return Reduced(reshape(x, ()), as_tensor(np.int64(0)))
    at = as_tensor(_argument(x, axis, arg, name))
    values = gather(x, axis, at)
    if keepdim:
        return Reduced(values, at)
    shape = x.shape[:axis] + x.shape[axis + 1:]
    return Reduced(reshape(values, shape), reshape(at, shape))


def _argument(x: Tensor, axis: int, arg: Any, name: str) -> Any:
    if not x.shape[axis]:
        raise IndexError(f"{name}(): Expected reduction dim {axis} to have non-zero size.")
    return arg(x.data, axis=axis, keepdims=True)


def max(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """The largest element; with ``dim``, (values, indices) along it; for a tensor, ``maximum``."""
    if isinstance(dim, Tensor):
        from nbgrad.ops.elementwise import maximum

        return maximum(input, dim)
    return amax(input) if dim is None else _along(input, dim, keepdim, np.argmax, "max")


def min(input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """The smallest element; with ``dim``, (values, indices) along it; for a tensor, ``minimum``."""
    if isinstance(dim, Tensor):
        from nbgrad.ops.elementwise import minimum

        return minimum(input, dim)
    return amin(input) if dim is None else _along(input, dim, keepdim, np.argmin, "min")


def _arg(name: str, arg: Any) -> Any:
    def fn(x: Tensor, /, dim: Any = None, keepdim: bool = False) -> Any:
        if not x.data.size and dim is None:
            raise IndexError(f"{name}(): Expected reduction dim to be specified for input.numel() "
                             "== 0")
        axis = None if dim is None else axis_of(dim, x.ndim, name)
        y = arg(x.data, axis=axis if x.ndim else None, keepdims=keepdim)
        return y.astype(np.int64, copy=False), None
    fn.__doc__ = f"Index of the {name[3:]}imum, the first of equal ones."
    fn.__module__, fn.__name__ = __name__, name
    return op(fn)


argmax, argmin = _arg("argmax", np.argmax), _arg("argmin", np.argmin)


@op
def all(x: Tensor, /, dim: Any = None, keepdim: bool = False) -> Any:
    """Whether all are true (non-zero) over dim."""
    return np.all(x.data, axis=axes_of(dim, x.ndim, "all"), keepdims=keepdim), None


@op
def any(x: Tensor, /, dim: Any = None, keepdim: bool = False) -> Any:
    """Whether any is true (non-zero) over dim."""
    return np.any(x.data, axis=axes_of(dim, x.ndim, "any"), keepdims=keepdim), None


@op(saves_output=True)
def prod(x: Tensor, /, dim: Any = None, keepdim: bool = False, *, dtype: Any = None,
         axis: Any = None) -> Any:
    """y = Π x over dim, of x as ``dtype``.   ∂x = ∂y × product of the others, also where some x
    are 0."""
    dim, shape, before = _dims(dim, axis, "prod"), x.shape, x.data.dtype
    axes = None if dim is None or not x.ndim else (axis_of(dim, x.ndim, "prod"),)
    y = kernels(x).prod(taken(x, dtype), axes=axes, keepdims=keepdim)
    y = y if dtype is None else y.astype(checked_dtype(dtype), copy=False)

    def vjp(dy: Tensor, y: Tensor) -> Tensor:
        if (x.data != 0).all():
            dx = _spread(dy * y, shape, axes, keepdim) / x
        else:
            dx = _spread(dy, shape, axes, keepdim) * _product_of_others(x, axes)
        return given_back(dx, before)
    return y, (vjp,)


def _product_of_others(x: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """n products of n factors, one replaced by 1: quadratic, needed only where a factor is 0."""
    flat = reshape(x, (-1,)) if axes is None else x
    axis = 0 if axes is None else axes[0]
    n = flat.shape[axis]
    own = np.eye(n, dtype=bool).reshape([n, *[n if i == axis else 1 for i in range(flat.ndim)]])
    own = move(own, x.device)
    others = prod(where(as_tensor(own), 1.0, unsqueeze(flat, 0)), axis + 1)   # (n, …) without axis
    order = list(range(1, flat.ndim))
    order.insert(axis, 0)
    return reshape(others.permute(*order), x.shape)


def logsumexp(input: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """y = log Σ e^x over dim, shifted by the largest so that it does not overflow."""
    axes = axes_of(dim, input.ndim, "logsumexp")
    n = _count(input.shape, axes)
    top: Any = kernels(input).max(input.data, axes=axes, keepdims=True) if n else 0
    top = np.where(np.isfinite(top), top, 0).astype(input.dtype)
    y = log(sum(exp(input - as_tensor(top)), axes, True)) + as_tensor(top)
    kept = tuple(n for i, n in enumerate(input.shape) if axes is not None and i not in axes)
    return y if keepdim else reshape(y, kept)


@op(name="norm", method=False, saves_output=True)
def _norm2(x: Tensor, /, dim: Any, keepdim: bool) -> Any:
    axes, shape = axes_of(dim, x.ndim, "norm"), x.shape
    y = np.sqrt(kernels(x).sum(kernels(x).square(x.data), axes=axes, keepdims=keepdim))

    def vjp(dy: Tensor, y: Tensor) -> Tensor:
        zero = as_tensor(y.data == 0)
        return _spread(mask(dy, ~zero.data) / where(zero, 1.0, y), shape, axes, keepdim) * x
    return y, (vjp,)


def norm(input: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Tensor:
    """y = (Σ |x|^p)^(1/p) over dim; p may be inf.   The gradient where y is 0 is 0, and, for p < 1,
    where x is."""
    input = checked(input, "norm")
    _floating(input, "norm")
    if p in (2, "fro"):
        return _norm2(input, dim=dim, keepdim=keepdim)  # type: ignore[no-any-return]
    if p == math.inf:
        return amax(abs(input), dim, keepdim)  # type: ignore[no-any-return]
    if p == 1:
        return sum(abs(input), dim, keepdim)  # type: ignore[no-any-return]
    if not isinstance(p, (int, float)) or p <= 0:
        raise ValueError(f"norm: expected p > 0, inf or 'fro', got {p!r}")
    size = abs(input)
    powers = pow(size, p) if p >= 1 else _flat_at_zero(pow, size, p)
    return _flat_at_zero(pow, sum(powers, dim, keepdim), 1 / p)


@op
def cumsum(x: Tensor, /, dim: Any) -> Any:
    """yᵢ = Σ_{j ≤ i} xⱼ along dim.   ∂xᵢ = Σ_{j ≥ i} ∂yⱼ."""
    axis = axis_of(dim, x.ndim, "cumsum")
    with np.errstate(all="ignore"):
        y = np.cumsum(x.data, axis=axis, dtype=x.dtype if x.dtype.kind in "fV" else np.int64)

    def vjp(dy: Tensor) -> Tensor:
        return flip(cumsum(flip(dy, (axis,)), axis), (axis,)) if dy.ndim else dy
    return y.reshape(x.shape), (vjp,)


for _f in (var, std, max, min, logsumexp, norm):
    setattr(Tensor, _f.__name__, _f)

__all__ = ["all", "amax", "amin", "any", "argmax", "argmin", "cumsum", "logsumexp", "max", "mean",
           "min", "norm", "prod", "std", "sum", "var"]
