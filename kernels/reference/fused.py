"""Kernels that are others in turn, by definition."""

from .elementwise import sigmoid, sigmoid_backward, tanh, tanh_backward
from .matmul import linear, linear_backward
from .norm import batch_norm, batch_norm_backward

__all__ = ["linear_batch_norm", "linear_batch_norm_backward"]

_ACTIVATIONS = {"sigmoid": (sigmoid, sigmoid_backward), "tanh": (tanh, tanh_backward)}


def linear_batch_norm(x, weight, bias, gamma, beta, *, eps, activation=None, running=None):
    """y = φ(ẑ γ + β) of z = x wᵀ + b, z, and z's mean and invstd; ``running`` as in batch_norm.

    x: (N, K)  weight: (C, K)  φ: None, "relu", "sigmoid" or "tanh"."""
    z = linear(x, weight, bias)
    y, mean, _, invstd = batch_norm(z, gamma, beta, eps=eps, relu=activation == "relu",
                                    running=running)
    if activation in _ACTIVATIONS:
        y = _ACTIVATIONS[activation][0](y)
    return y, z, mean, invstd


def linear_batch_norm_backward(dy, x, weight, gamma, z, y, mean, invstd, *, activation=None,
                               input_gradient):
    """dx (0 unless asked for), dw, dγ, dβ and db from what linear_batch_norm returned."""
    masked = activation == "relu"
    if activation in _ACTIVATIONS:
        dy = _ACTIVATIONS[activation][1](dy, y)
    dz, dgamma, dbeta, _ = batch_norm_backward(dy, z, gamma, mean, invstd, y=y if masked else None,
                                               relu=masked)
    dx, dw, db = linear_backward(dz, x, weight, input_gradient=input_gradient)
    return dx, dw, dgamma, dbeta, db
