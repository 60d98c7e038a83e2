"""Softmax and the losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, composition, op
from nbgrad.backend import full, is_array, kernels, move
from nbgrad.ops.elementwise import exp, neg
from nbgrad.ops.reduce import given_back, mean, sum, taken
from nbgrad.ops.shape import _axis as axis_of, checked, same_device, unsqueeze


@op(saves_output=True)
def softmax(x: Tensor, /, dim: int, *, dtype: Any = None) -> Any:
    """y = e^x / Σ e^x along dim, of x as ``dtype``.   ∂x = y (∂y − Σ ∂y y).   Keeps y."""
    before, data = x.data.dtype, taken(x, dtype)
    axis = _axis(data, dim, "softmax")
    return (kernels(x).softmax(data, axis=axis),
            (lambda dy, y: given_back(softmax_backward(dy, y, axis=axis), before),))


@op(method=False)
def softmax_backward(dy: Tensor, y: Tensor, /, axis: int) -> Any:
    """∂x of softmax."""
    return (kernels(dy).softmax_backward(dy.data, y.data, axis=axis),
            composition(lambda dy, y: y * (dy - sum(dy * y, axis, True)), dy, y))


@op(saves_output=True)
def log_softmax(x: Tensor, /, dim: int, *, dtype: Any = None) -> Any:
    """y = x − log Σ e^x along dim, of x as ``dtype``.   ∂x = ∂y − e^y Σ ∂y.   Keeps y."""
    before, data = x.data.dtype, taken(x, dtype)
    axis = _axis(data, dim, "log_softmax")
    return (kernels(x).log_softmax(data, axis=axis),
            (lambda dy, y: given_back(log_softmax_backward(dy, y, axis=axis), before),))


@op(method=False)
def log_softmax_backward(dy: Tensor, y: Tensor, /, axis: int) -> Any:
    """∂x of log_softmax."""
    return (kernels(dy).log_softmax_backward(dy.data, y.data, axis=axis),
            composition(lambda dy, y: dy - exp(y) * sum(dy, axis, True), dy, y))


def _axis(x: Any, dim: Any, name: str) -> int:
    if dim is None or x.dtype.kind not in "fV":
        raise ValueError(f"{name}: expected a floating input and a dim, got {x.dtype} and "
                         f"dim={dim}")
    return axis_of(dim, x.ndim, name)


# ----------------------------------------------------------------------------------- classification

@op(name="cross_entropy", method=False)
def _cross_entropy(x: Tensor, /, target: Any, weight: Any, ignore_index: int, reduction: str,
                   label_smoothing: float) -> Any:
    """−log softmax(x)[target], weighted, smoothed and reduced.   ∂x = (softmax(x) − onehot) ∂y."""
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    losses, total, weights, valid = kernels(x).cross_entropy(x.data, target, weight, **how)
    if not valid:
        raise IndexError("cross_entropy" + _out_of_bounds(target, x.shape[1], ignore_index))
    y: Any = losses
    share: Any = 1.0
    if reduction == "mean":
        share = _share(weights)
    if reduction != "none":
        y = total * share
        y = y.astype(x.dtype) if is_array(y) else full((), y, x.data.dtype, x.data)
        share = share.astype(x.dtype) if is_array(share) else share
    return y, (lambda dy: cross_entropy_backward(dy, x, target=target, weight=weight, share=share,
                                                 **how),)


def _share(weights: Any) -> Any:
    """1 / weights, NaN for a mean of nothing (PyTorch's); an array's where a step is captured."""
    if is_array(weights):
        return np.where(weights == 0, math.nan, 1 / weights)
    return 1 / weights if weights else math.nan


@op(method=False)
def cross_entropy_backward(dy: Tensor, x: Tensor, /, target: Any, weight: Any, share: float,
                           ignore_index: int, label_smoothing: float) -> Any:
    """∂x of cross_entropy; dy: the target's shape, or () if the losses were summed and scaled by
    ``share``."""
    dx = kernels(x).cross_entropy_backward(dy.data * share, x.data, target, weight,
                                           ignore_index=ignore_index,
                                           label_smoothing=label_smoothing)

    def again(dy: Tensor, x: Tensor) -> Any:
        q = as_tensor(_target_weights(x, target, weight, ignore_index, label_smoothing) * share)
        return (unsqueeze(dy, 1) if dy.ndim else dy) * (softmax(x, 1) * sum(q, 1, True) - q)
    return dx, composition(again, dy, x)


def _target_weights(x: Tensor, target: Any, weight: Any, ignore_index: int,
                    smoothing: float) -> Any:
    """q with loss = −Σ_c q_c log softmax(x)_c."""
    C = x.shape[1]
    kept = np.expand_dims(target != ignore_index, 1)
    numbers = move(np.arange(C), x.device)
    onehot = np.expand_dims(target, 1) == numbers.reshape(1, C, *[1] * (target.ndim - 1))
    w = full((C,), 1.0, np.float64, x.data) if weight is None else weight
    q = ((1 - smoothing) * onehot + smoothing / C) * w.reshape(1, C, *[1] * (target.ndim - 1))
    return (q * kept).astype(x.dtype)


def _classes(x: Tensor, target: Tensor, weight: Tensor | None, name: str) -> Any:
    """The target as an array of integers of the right shape, which may yet be no classes."""
    shape, dtype = x.data.shape, target.data.dtype
    if not shape or x.data.dtype.kind not in "fV":
        raise ValueError(f"{name}: expected a floating input (N, C, *), got {x.dtype} of size "
                         f"{x.shape}")
    if dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integer class targets, got {dtype}")
    if target.data.shape != shape[:1] + shape[2:] if len(shape) > 1 else target.ndim:
        raise ValueError(f"{name}: Expected target size {shape[:1] + shape[2:]}, got "
                         f"{target.shape}")
    if weight is not None:
        _one_per_class(weight, shape[1 if len(shape) > 1 else 0], name)
    same_device(name, x, target, weight)
    return target.data


def _out_of_bounds(t: Any, C: int, ignore_index: int) -> str:
    """What is wrong with the targets; empty if nothing is."""
    bad = t[((t < 0) | (t >= C)) & (t != ignore_index)]
    return f": Target {int(bad.ravel()[0])} is out of bounds for {C} classes." if bad.size else ""


def _one_per_class(weight: Tensor | None, C: int, name: str) -> None:
    if weight is not None and weight.shape != (C,):
        raise ValueError(f"{name}: weight tensor should be defined either for all {C} classes or "
                         f"no classes but got weight tensor of shape: {weight.shape}")


def _reduction(reduction: str, name: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{name}: {reduction!r} is not a valid value for reduction: none, mean or "
                         "sum")


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None = None,
                  ignore_index: int = -100, reduction: str = "mean",
                  label_smoothing: float = 0.0) -> Tensor:
    """−Σ_c q_c log softmax(x)_c along dim 1, q the target class (smoothed) or class probabilities.

    x: (N, C, *) or (C,)   target: (N, *) integers, or x's shape   weight: (C,)
    The mean is weighted. Keeps x and target. Raises IndexError for a class that is not there.
    """
    _reduction(reduction, "cross_entropy")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    input, target = checked(input, "cross_entropy"), checked(target, "cross_entropy")
    if target.data.dtype.kind in "fV":
        return _soft_cross_entropy(input, target, weight, reduction, label_smoothing)
    t = _classes(input, target, weight, "cross_entropy")
    w = None if weight is None else weight.data.astype(input.dtype)
    how = {"weight": w, "ignore_index": ignore_index, "reduction": reduction,
           "label_smoothing": label_smoothing}
    if input.data.ndim > 1:
        return _cross_entropy(input, target=t, **how)  # type: ignore[no-any-return]
    y = _cross_entropy(unsqueeze(input, 0), target=t.reshape(1), **how)
    return y.reshape(()) if reduction == "none" else y  # type: ignore[no-any-return]


def _soft_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str,
                        smoothing: float) -> Tensor:
    if target.shape != x.shape:
        raise ValueError("cross_entropy: expected class probabilities of the input's shape "
                         f"{x.shape}, got {target.shape}")
    dim = 1 if x.ndim > 1 else 0
    C = x.shape[dim]
    _one_per_class(weight, C, "cross_entropy")
    q = target.to(x.dtype) * (1 - smoothing) + smoothing / C
    if weight is not None:
        q = q * weight.reshape((1, C) + (1,) * (x.ndim - 2) if x.ndim > 1 else (C,))
    losses = neg(sum(q * log_softmax(x, dim), dim))
    return _reduced(losses, reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else (mean if reduction == "mean" else sum)(losses)


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100,
             reduction: str = "mean") -> Tensor:
    """−w[t] x[t] along dim 1 for log-probabilities x: (N, C, *), target: (N, *).

    The mean is weighted."""
    _reduction(reduction, "nll_loss")
    input, target = (checked(t, "nll_loss") for t in (input, target))
    t = _classes(input, target, weight, "nll_loss")
    rows = input if input.ndim > 1 else unsqueeze(input, 0)
    if wrong := _out_of_bounds(t, rows.shape[1], ignore_index):
        raise IndexError("nll_loss" + wrong)
    q = _target_weights(rows, t if input.ndim > 1 else t.reshape(1),
                        None if weight is None else weight.data, ignore_index, 0.0)
    losses = neg(sum(rows * as_tensor(q), 1))
    if reduction != "mean":
        return _reduced(losses if input.ndim > 1 else losses.reshape(()), reduction)
    with np.errstate(all="ignore"):
        return sum(losses) * float(np.float64(1) / float(q.sum(dtype=np.float64)))  # type: ignore[no-any-return]


def mse_loss(input: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """(x − target)², elementwise, then reduced. Raises ValueError where the shapes differ."""
    _reduction(reduction, "mse_loss")
    input, target = (checked(t, "mse_loss") for t in (input, target))
    if input.shape != target.shape:
        raise ValueError(f"mse_loss: expected a target of the input's size {input.shape}, got "
                         f"{target.shape}")
    d = input - target
    return _reduced(d * d, reduction)


__all__ = ["cross_entropy", "log_softmax", "mse_loss", "nll_loss", "softmax"]
