"""Linear layer, batch norm and activation as one op: one node where the parts record three, and two
calls of the engine in a step instead of six."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import OPS, Tensor, composition, op
from nbgrad.backend import kernels, several
from nbgrad.ops import norm
from nbgrad.ops.matmul import check_linear, linear, matmul
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked, mT, same_device

__all__ = ["linear_batch_norm"]

ACTIVATIONS = (None, "relu", "sigmoid", "tanh")


@op(name="linear_batch_norm", method=False, saves_output=True)
def _linear_batch_norm(x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
                       bias: Tensor | None, /, *, eps: float, activation: str | None,
                       running: Any = None) -> Any:
    """y = φ(γ ẑ + β), ẑ = (z − μ)/√(σ² + ε), z = x wᵀ + b; μ and σ² of z's columns.

    The vjp is that of φ, batch_norm and linear in turn.
    """
    y, z, mu, invstd = kernels(x).linear_batch_norm(
        x.data, weight.data, norm.data(bias), norm.data(gamma), norm.data(beta), eps=eps,
        activation=activation, running=running)
    need = x.requires_grad
    return y, lambda dy, y: linear_batch_norm_backward(
        dy, x, weight, gamma, beta, bias, z=z, y=y.data, mean=mu, invstd=invstd, eps=eps,
        activation=activation, input_gradient=need)


@op(method=False)
def linear_batch_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor | None,
                               beta: Tensor | None, bias: Tensor | None, /, *, z: Any, y: Any,
                               mean: Any, invstd: Any, eps: float, activation: str | None,
                               input_gradient: bool) -> Any:
    """∂x (0 unless asked for), ∂w, ∂γ, ∂β and ∂b of linear_batch_norm."""
    grads = kernels(dy).linear_batch_norm_backward(
        dy.data, x.data, weight.data, norm.data(gamma), z, y, mean, invstd, activation=activation,
        input_gradient=input_gradient)

    def again(dy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None,
              bias: Tensor | None) -> tuple[Any, ...]:
        z = linear(x, weight, bias)
        y = norm.batch_norm(z, None, None, gamma, beta, True, eps=eps)
        if activation is not None:
            dy = OPS[activation + "_backward"](dy, OPS[activation](y))
        dz, dgamma, dbeta, _ = norm.backward_of_batch(dy, z, gamma, None, None, eps, False)
        return matmul(dz, weight), matmul(mT(dz), x), dgamma, dbeta, sum(dz, 0)
    return grads, composition(again, dy, x, weight, gamma, beta, bias, dtype=np.float64)


def linear_batch_norm(input: Tensor, weight: Tensor, bias: Tensor | None,
                      running_mean: Tensor | None, running_var: Tensor | None,
                      gamma: Tensor | None = None, beta: Tensor | None = None,
                      momentum: float = 0.1, eps: float = 1e-5,
                      activation: str | None = None) -> Tensor:
    """φ(batch_norm(linear(x, w, b))) in training, as one op with the values of the three.

    x: (N, K)  w: (C, K)  b, γ, β and the running arrays, which move as in ``batch_norm``: (C,).
    φ: None, "relu", "sigmoid" or "tanh". Keeps x, w, γ, z = x wᵀ + b, y, μ, 1/σ. Raises what
    ``linear`` and ``batch_norm`` raise. ``nn.Sequential`` calls it where its modules follow each
    other like this.
    """
    if activation not in ACTIVATIONS:
        raise ValueError("linear_batch_norm: expected activation to be one of "
                         f"{', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    input, weight = (checked(t, "linear_batch_norm") for t in (input, weight))
    bias = None if bias is None else checked(bias, "linear_batch_norm")
    x = input.data
    if x.ndim != 2:
        raise ValueError(f"linear_batch_norm: expected x of shape (N, K), got {input.shape}")
    check_linear(input, weight, bias)
    shape = len(x), len(weight.data)
    norm.check_batch(shape, x.dtype, running_mean, running_var, gamma, beta, True, eps)
    if several:
        same_device("linear_batch_norm", input, running_mean, running_var)
    gamma = norm.scaled(input, gamma, beta)
    if 0 in shape:
        running_mean = running_var = None
    y: Tensor = norm.moving(_linear_batch_norm, (input, weight, gamma, beta, bias), running_mean,
                            running_var, momentum, eps=eps, activation=activation)
    return y
