"""Kernels that call others, for any set of them."""

__all__ = ["fused"]


def fused(k):
    """linear_batch_norm and its backward, made of the functions of ``k``."""
    activations = {"sigmoid": (k.sigmoid, k.sigmoid_backward), "tanh": (k.tanh, k.tanh_backward)}

    def linear_batch_norm(x, weight, bias, gamma, beta, *, eps, activation=None, running=None):
        """y = φ(ẑ γ + β) of z = x wᵀ + b, z, and z's mean and invstd; ``running`` as in batch_norm.

        x: (N, K)  weight: (C, K)  φ: None, "relu", "sigmoid" or "tanh"."""
        z = k.linear(x, weight, bias)
        y, mean, _, invstd = k.batch_norm(z, gamma, beta, eps=eps, relu=activation == "relu",
                                          running=running)
        if activation in activations:
            y = activations[activation][0](y)
        return y, z, mean, invstd

    def linear_batch_norm_backward(dy, x, weight, gamma, z, y, mean, invstd, *, activation=None,
                                   input_gradient):
        """dx (0 unless asked for), dw, dγ, dβ and db from what linear_batch_norm returned."""
        masked = activation == "relu"
        if activation in activations:
            dy = activations[activation][1](dy, y)
        dz, dgamma, dbeta, _ = k.batch_norm_backward(dy, z, gamma, mean, invstd,
                                                     y=y if masked else None, relu=masked)
        dx, dw, db = k.linear_backward(dz, x, weight, input_gradient=input_gradient)
        return dx, dw, dgamma, dbeta, db
    return linear_batch_norm, linear_batch_norm_backward
