"""Group and instance normalization: statistics of every sample's groups of channels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, composition, op
from nbgrad.backend import kernels, serves, writable
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.moments import moments
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked, reshape

from .batch import batch_norm, data, moving, scaled
from .channels import mean_of

__all__ = ["group_norm", "instance_norm"]


@op(name="group_norm", method=False)
def _group_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, *, groups: int, eps: float,
                center: bool = True, running: Any = None) -> Any:
    """y = γ x̂ + β per channel;  x̂ = (x − μ) / √(σ² + ε), μ (0 without center) and σ² of each
    sample's groups of channels.

    ∂β = Σ ∂y,  ∂γ = Σ ∂y x̂ over N and S;  ∂x = (g − mean g − x̂ mean(g x̂)) / σ,  g = γ ∂y, means
    over a group (no mean g without center).      Wu & He 2018
    """
    y, mean, invstd = kernels(x).group_norm(x.data, data(gamma), data(beta), groups=groups, eps=eps,
                                            center=center)
    if running is not None:
        _move(x, *running)
    return y, lambda dy: group_norm_backward(dy, x, gamma, mean=mean, invstd=invstd, groups=groups,
                                             eps=eps, center=center)


def _move(x: Tensor, running_mean: Any, running_var: Any, momentum: float) -> None:
    """The running statistics of channels towards the mean over samples of theirs. x is read again:
    of 1/√(σ² + ε), a σ² far below ε does not come back."""
    with np.errstate(all="ignore"):
        for running, new in zip((running_mean, running_var), over_samples(x)):
            running[...] = (1 - momentum) * running + momentum * new


def over_samples(x: Tensor, correction: int = 1) -> tuple[Any, Any]:
    """The means over samples of the channels' mean and variance, float64 (C,)."""
    found = moments(x, groups=x.shape[1])
    with np.errstate(all="ignore"):
        return found.mean.mean(0), found.var(correction).mean(0)


@op(method=False)
def group_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, mean: Any, invstd: Any,
                        groups: int, eps: float, center: bool = True) -> Any:
    """∂x, ∂γ and ∂β of group_norm."""
    grads = kernels(dy).group_norm_backward(dy.data, x.data, data(gamma), mean, invstd,
                                            groups=groups, center=center)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        return _backward_of_group(dy, x, gamma, groups, eps, center)
    return grads, composition(again, dy, x, gamma, dtype=np.float64)


def _backward_of_group(dy: Tensor, x: Tensor, gamma: Tensor | None, groups: int, eps: float,
                       center: bool) -> tuple[Tensor, ...]:
    shape, (N, C) = x.shape, x.shape[:2]
    parts = (N, groups, C // groups, math.prod(shape[2:]))
    x, dy = reshape(x, parts), reshape(dy, parts)
    xc = x - mean_of(x, (2, 3), True) if center else x
    invstd = rsqrt(mean_of(xc * xc, (2, 3), True) + eps)
    xhat = xc * invstd
    g = dy if gamma is None else dy * reshape(gamma, (1, groups, C // groups, 1))
    dx = g - xhat * mean_of(g * xhat, (2, 3), True)
    if center:
        dx = dx - mean_of(g, (2, 3), True)
    sums = (reshape(sum(t, (0, 3)), (C,)) for t in (dy * xhat, dy))
    return reshape(dx * invstd, shape), *sums


def group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None,
               bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = γ (x − μ) / √(σ² + ε) + β; μ and (biased) σ² of each sample's groups of channels.

    x: (N, C, *), C divisible by ``num_groups``; channels of a group lie together.  weight γ, bias
    β: (C,).  y has x's memory format. Keeps x, γ, μ and 1/σ of (N, num_groups). Raises RuntimeError
    for sizes that do not fit, ValueError for groups of one value in a batch of one (as PyTorch) and
    for a negative eps.      Wu & He 2018

    >>> import nbgrad
    >>> group_norm(nbgrad.tensor([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    input = checked(input, "group_norm")
    shape = input.shape
    if len(shape) < 2:
        raise RuntimeError("group_norm: Expected at least 2 dimensions for input tensor but "
                           f"received {len(shape)}")
    whole = isinstance(num_groups, (int, np.integer)) and 1 <= num_groups <= max(shape[1], 1)
    if not whole or shape[1] % num_groups:
        raise RuntimeError("group_norm: Expected number of channels in input to be divisible by "
                           f"num_groups, but got input of shape {list(shape)} and num_groups="
                           f"{num_groups}")
    _check("group_norm", input, weight, bias, eps)
    if shape[0] * (shape[1] // num_groups) * math.prod(shape[2:]) == 1:
        raise ValueError("Expected more than 1 value per channel when training, got input size "
                         f"{list(shape)}")
    weight = scaled(input, weight, bias)
    return _group_norm(input, weight, bias, groups=int(num_groups), eps=float(eps))  # type: ignore[no-any-return]


def _check(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    if x.dtype.kind not in "fV":
        raise RuntimeError(f"{name}: expected a floating input, got {x.dtype}")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")
    for what, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected {what} to be a Tensor, got {type(t).__name__}")
        if t.shape != x.shape[1:2] or not serves(t.dtype, x.dtype):
            raise RuntimeError(f"{name}: Expected {what} to be a vector of size equal to the "
                               f"number of channels in input and of {x.dtype}, but got {what} of "
                               f"shape {list(t.shape)} and {t.dtype} and input of shape "
                               f"{list(x.shape)}")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(f"{name}: Expected weight and bias of one dtype, but got {weight.dtype} "
                           f"and {bias.dtype}")


def instance_norm(input: Tensor, running_mean: Tensor | None = None,
                  running_var: Tensor | None = None, weight: Tensor | None = None,
                  bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
                  eps: float = 1e-5) -> Tensor:
    """y = γ (x − μ) / √(σ² + ε) + β; μ and (biased) σ² of each channel of each sample.

    x: (N, C, *) with at least one * axis.  weight γ, bias β and the running arrays: (C,).  The
    latter, where given, move by ``momentum`` towards the mean over samples of μ and of the unbiased
    variance; with ``use_input_stats=False`` they are the statistics. Keeps x, γ, μ and 1/σ of (N,
    C). Raises ValueError for one spatial element, RuntimeError for sizes that do not fit.
    Ulyanov et al. 2016

    >>> import nbgrad
    >>> instance_norm(nbgrad.tensor([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0).tolist()
    [[[-1.0, 1.0], [-1.0, 1.0]]]
    """
    input = checked(input, "instance_norm")
    if (running_mean is None) != (running_var is None):
        raise ValueError("instance_norm: running_mean and running_var must either both be None or "
                         "neither be None")
    if not use_input_stats:
        if running_mean is None:
            raise RuntimeError("instance_norm: Expected running_mean and running_var to be defined "
                               "when use_input_stats is false")
        return batch_norm(input, running_mean, running_var, weight, bias, eps=eps)  # type: ignore[no-any-return]
    if input.ndim < 2:
        raise RuntimeError("instance_norm: Expected at least 2 dimensions for input tensor but "
                           f"received {input.ndim}")
    _check("instance_norm", input, weight, bias, eps)
    if math.prod(input.shape[2:]) == 1:
        raise ValueError("Expected more than 1 spatial element when training, got input size "
                         f"{list(input.shape)}")
    _check_running(input, running_mean, running_var)
    if not input.data.size:
        running_mean = running_var = None
    weight = scaled(input, weight, bias)
    return moving(_group_norm, (input, weight, bias), running_mean, running_var, momentum,  # type: ignore[no-any-return]
                  groups=max(input.shape[1], 1), eps=float(eps))


def _check_running(x: Tensor, *running: Tensor | None) -> None:
    for t in running:
        if t is None:
            continue
        if (not isinstance(t, Tensor) or t.shape != x.shape[1:2]
                or not serves(t.dtype, x.dtype)):
            raise RuntimeError(f"instance_norm: Expected running statistics of shape "
                               f"{list(x.shape[1:2])} and {x.dtype}, got {t!r}")
        if not writable(t.data):
            raise ValueError("instance_norm: running statistics are to be updated, but are a "
                             "read-only array or an expanded view")
