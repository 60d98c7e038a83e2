"""Batch normalization."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, bump, composition, op, transient
from nbgrad.backend import full, is_half, kernels, serves, several, writable
from nbgrad.ops.activation import relu_backward
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.moments import Moments
from nbgrad.ops.norm.channels import mean_of
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked, reshape, same_device


def data(t: Tensor | None) -> Any:
    return None if t is None else t.data


def _per_channel(t: Any, x: Tensor) -> Any:
    return reshape(t, (1, -1) + (1,) * (x.ndim - 2))


# ---------------------------------------------------------------------------------- batch, training

def _batch_formula(x: Tensor, gamma: Tensor | None, beta: Tensor | None,
                   residual: Tensor | None = None, /, *, eps: float, relu: bool = False,
                   running: Any = None, statistics: bool = False, known: Any = None) -> Any:
    """y = γ x̂ + β [+ residual], not below 0 with relu;  x̂ = (x − μ) / √(σ² + ε);  μ and σ² of x
    over every axis but 1.

    ∂β = Σ g      ∂γ = Σ g x̂      ∂x = γ/σ (g − ∂β/m − x̂ ∂γ/m)      ∂residual = g,
    g = ∂y, with relu where y > 0;   m = N·|S|.      Ioffe & Szegedy 2015
    """
    more = {} if known is None else {"known": known}
    y, mean, var, invstd = kernels(x).batch_norm(x.data, data(gamma), data(beta), data(residual),
                                                 eps=eps, relu=relu, running=running, **more)
    told = (mean, var) if statistics else ()
    if relu and residual is not None:
        return y, lambda dy, y: batch_norm_backward(dy, x, gamma, None, y, mean=mean, invstd=invstd,
                                                    eps=eps, relu=True), *told
    if relu:
        def vjp(dy: Tensor) -> Any:
            return (*batch_norm_backward(dy, x, gamma, beta, None, mean=mean, invstd=invstd,
                                         eps=eps, relu=True), None)
        vjp.remake = lambda: kernels(x).batch_norm_elemt(  # type: ignore[attr-defined]
            x.data, data(gamma), data(beta), mean, invstd, relu=True)
        return y, vjp, *told
    added = residual is not None
    return y, lambda dy: (*batch_norm_backward(dy, x, gamma, None, None, mean=mean, invstd=invstd,
                                               eps=eps), dy if added else None), *told


_batch_norm = op(name="batch_norm", method=False)(_batch_formula)
# The same, where the mask needs y: what was added to x̂ γ + β is not kept.
_batch_norm_add_relu = op(name="batch_norm_add_relu", method=False,
                          saves_output=True)(_batch_formula)


@op(method=False)
def batch_norm_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None = None,
                        y: Tensor | None = None, /, *, mean: Any, invstd: Any, eps: float,
                        relu: bool = False) -> Any:
    """∂x, ∂γ and ∂β of batch_norm in training, and, where y is given, ∂residual."""
    added = y is not None
    grads = kernels(dy).batch_norm_backward(dy.data, x.data, data(gamma), mean, invstd,
                                            beta=data(beta), y=data(y), relu=relu, residual=added)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None,
              y: Tensor | None) -> tuple[Tensor, ...]:
        return backward_of_batch(dy, x, gamma, beta, y, eps, relu)
    return grads if added else grads[:3], composition(again, dy, x, gamma, beta, y,
                                                      dtype=np.float64)


def backward_of_batch(dy: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None,
                       y: Tensor | None, eps: float, relu: bool) -> tuple[Tensor, ...]:
    axes = (0, *range(2, x.ndim))
    xc = x - mean_of(x, axes, True)
    invstd = rsqrt(mean_of(xc * xc, axes, True) + eps)
    xhat = xc * invstd
    scale = invstd if gamma is None else invstd * _per_channel(gamma, x)
    if relu and y is None:
        y = xc * scale if beta is None else xc * scale + _per_channel(beta, x)
    if y is not None:
        dy = relu_backward(dy, y)
    dx = scale * (dy - mean_of(dy, axes, True) - xhat * mean_of(dy * xhat, axes, True))
    return dx, sum(dy * xhat, axes), sum(dy, axes), dy


# -------------------------------------------------------------------------------- batch, evaluation

def _inference_formula(x: Tensor, gamma: Tensor | None, beta: Tensor | None,
                       residual: Tensor | None = None, /, *, mean: Any, invstd: Any,
                       relu: bool = False) -> Any:
    """y = γ (x − μ)/σ + β [+ residual] with given statistics, not below 0 with relu.

    ∂x = γ/σ g,  ∂γ = Σ g x̂,  ∂β = Σ g,  ∂residual = g;  g = ∂y, with relu where y > 0."""
    y = kernels(x).batch_norm_elemt(x.data, data(gamma), data(beta), mean, invstd,
                                    data(residual), relu=relu)
    added = residual is not None

    def vjp(dy: Tensor, y: Tensor | None = None) -> Any:
        g = dy if y is None else relu_backward(dy, y)
        grads = batch_norm_inference_backward(g, x, gamma, mean=mean, invstd=invstd)
        return (*grads, g if added else None)
    return y, vjp


batch_norm_inference = op(name="batch_norm_inference", method=False)(_inference_formula)
_batch_norm_inference_relu = op(name="batch_norm_inference_relu", method=False,
                                saves_output=True)(_inference_formula)


@op(method=False)
def batch_norm_inference_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, mean: Any,
                                  invstd: Any) -> Any:
    """∂x, ∂γ and ∂β of batch_norm_inference."""
    k = kernels(dy)
    dbeta, dgamma = k.batch_norm_backward_reduce(dy.data, x.data, mean, invstd)
    dx = k.batch_norm_backward_elemt(dy.data, x.data, data(gamma), mean, invstd, None, None)

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        axes = (0, *range(2, x.ndim))
        mu, r = (_per_channel(Tensor(a.astype(x.dtype)), x) for a in (mean, invstd))
        return (dy * (r if gamma is None else r * _per_channel(gamma, x)),
                sum(dy * ((x - mu) * r), axes), sum(dy, axes))
    own = x.dtype if gamma is None else gamma.dtype
    with np.errstate(all="ignore"):
        sums = dgamma.astype(own), dbeta.astype(own)
    return (dx, *sums), composition(again, dy, x, gamma, dtype=np.float64)


def batch_norm(input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
               weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
               momentum: float = 0.1, eps: float = 1e-5, *, residual: Tensor | None = None,
               activation: str | None = None, return_moments: bool = False,
               moments: Moments | None = None) -> Any:
    """y = γ (x − μ) / √(σ² + ε) + β per channel.      Ioffe & Szegedy 2015

    x: (N, C, *)   γ ``weight``, β ``bias``: (C,)

    Training: μ and (biased) σ² of this batch; the running arrays, where given, move in place by
    ``momentum`` towards μ and the unbiased variance. Evaluation: the running arrays. Beyond
    PyTorch's arguments: ``residual``, of x's shape and dtype, is added, and ``activation="relu"``
    clips the sum at 0, both in the same pass over memory; ``return_moments`` (training only): also
    the batch's ``Moments``; ``moments``: those of x, where ``conv2d`` has returned
    them: they are not taken again.

    Keeps x, γ, μ, 1/σ; with relu also β, or with both y. Beside an x of float16 or bfloat16, γ and
    β, and the running arrays, may be float32; y is of x's dtype, rounded once. Raises ValueError
    for one value per channel in training, and for sizes and dtypes that do not fit.
    """
    if type(input) is not Tensor:
        input = checked(input, "batch_norm")
    check_batch(input.data.shape, input.data.dtype, running_mean, running_var, weight, bias,
                training, eps)
    if several:
        same_device("batch_norm", input, running_mean, running_var)
    if residual is not None or activation is not None:
        check_fused(input, residual, activation)
    weight = scaled(input, weight, bias)
    settings: dict[str, Any] = {} if activation is None else {"relu": True}
    if return_moments:
        if not training:
            raise ValueError("batch_norm: return_moments needs training=True")
        settings["statistics"] = True
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mu = running_mean.data.astype(np.float64)
        with np.errstate(all="ignore"):
            invstd = 1 / np.sqrt(running_var.data.astype(np.float64) + eps)
        infer = _batch_norm_inference_relu if settings else batch_norm_inference
        return infer(input, weight, bias, residual, mean=mu, invstd=invstd, **settings)
    relu = activation is not None
    train = _batch_norm_add_relu if relu and residual is not None else _batch_norm
    if not input.data.size:
        running_mean = running_var = None
    if moments is not None:
        _check_moments(input, moments)
        settings["known"] = moments.mean, moments.var()
    out = moving(train, (input, weight, bias, residual), running_mean, running_var, momentum,
                 eps=eps, **settings)
    if not return_moments:
        return out
    n = float(input.data.size // max(input.shape[1], 1))
    count = full(input.shape[1:2], n, np.float64, input.data)
    return out[0], Moments(count, out[1].data, out[2].data * count)


def _check_moments(x: Tensor, given: Any) -> None:
    if not isinstance(given, Moments):
        raise TypeError(f"batch_norm: expected moments to be Moments, got {type(given).__name__}")
    shapes = {a.shape for a in given}
    if shapes != {x.shape[1:2]}:
        raise ValueError(f"batch_norm: expected moments of shape {x.shape[1:2]}, one of each "
                         f"channel of x, got {sorted(shapes)}")


def moving(train: Any, inputs: Any, mean: Tensor | None, var: Tensor | None, momentum: float,
           **settings: Any) -> Any:
    """train(*inputs), whose kernel also moves the running arrays, where there are any."""
    if mean is None or var is None:
        return transient(train, inputs, "known", **settings)
    out = transient(train, inputs, "running", "known", running=(mean.data, var.data, momentum),
                    **settings)
    bump(mean, var)
    return out


def check_fused(x: Tensor, residual: Tensor | None, activation: str | None) -> None:
    if activation not in (None, "relu"):
        raise ValueError(f"batch_norm: expected activation None or 'relu', got {activation!r}")
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError("batch_norm: expected residual to be a Tensor, got "
                        f"{type(residual).__name__}")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"batch_norm: expected residual of the input's {x.dtype} and shape "
                         f"{x.shape}, got {residual.dtype} and {residual.shape}")


def check_batch(shape: tuple[int, ...], dtype: Any, mean: Tensor | None, var: Tensor | None,
                weight: Tensor | None, bias: Tensor | None, training: bool, eps: float) -> None:
    """Raise what batch_norm raises for an input of this shape and dtype."""
    if len(shape) < 2 or dtype.kind not in "fV":
        raise ValueError(f"batch_norm: expected a floating (N, C, *) input, got {dtype} of size "
                         f"{list(shape)}")
    if (mean is None) != (var is None) or (mean is None and not training):
        raise ValueError("batch_norm: Expected running_mean and running_var to be given together, "
                         "and in evaluation to be defined")
    if not eps > 0 and (training or not eps == 0):
        raise ValueError(f"batch_norm: eps must be positive, got {eps}")
    C = shape[1:2]
    for t in (mean, var, weight, bias):              # the usual case; which one it is, if it is one
        if t is not None and not (isinstance(t, Tensor) and t.data.shape == C
                                  and t.data.dtype is dtype):
            _refuse(C, dtype, running_mean=mean, running_var=var, weight=weight, bias=bias)
    if not training:
        return
    for t in (mean, var):
        if t is not None and not writable(t.data):
            name = "running_mean" if t is mean else "running_var"
            raise ValueError(f"batch_norm: {name} is to be updated in training, but is a "
                             "read-only array or an expanded view")
    if math.prod(shape) == shape[1] > 0:
        raise ValueError("Expected more than 1 value per channel when training, got input size "
                         f"{list(shape)}")


def _refuse(shape: tuple[int, ...], dtype: Any, **given: Any) -> None:
    for name, t in given.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"batch_norm: expected {name} to be a Tensor, got {type(t).__name__}")
        if t.shape != shape:
            raise ValueError(f"batch_norm: {name} should contain {shape[0]} elements, one per "
                             f"channel, in a shape of {shape}, got shape {t.shape}")
        if not serves(t.dtype, dtype):
            more = " or float32" if is_half(dtype) else ""
            raise ValueError(f"batch_norm: expected {name} of dtype {dtype}, the input's{more}, "
                             f"got {t.dtype}")
    for a, b in (("running_mean", "running_var"), ("weight", "bias")):
        p, q = given[a], given[b]
        if p is not None and q is not None and p.dtype != q.dtype:
            raise ValueError(f"batch_norm: expected {a} and {b} of one dtype, got {p.dtype} and "
                             f"{q.dtype}")


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """γ; ones where β alone is there and is not of x's dtype: gradients have γ's."""
    if weight is not None or bias is None or bias.data.dtype == x.data.dtype:
        return weight
    return as_tensor(full(bias.shape, 1, bias.dtype, bias.data))


__all__ = ["batch_norm"]
