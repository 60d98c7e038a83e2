"""Instance, layer and batch statistics mixed with weights that are learned."""

# mypy: no-warn-return-any

from __future__ import annotations

from functools import partial
from typing import Any

from nbgrad.autograd import Tensor
from nbgrad.backend import serves
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.loss import softmax
from nbgrad.ops.norm.channels import (
    affine,
    check_channels,
    check_eps,
    check_tensors,
    mean_of,
)
from nbgrad.ops.norm.samples import Sampled, gains, merged, row, sample_norm
from nbgrad.ops.shape import reshape

__all__ = ["switchable_norm"]


def switchable_norm(input: Tensor, mean_weight: Tensor, var_weight: Tensor,
                    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
                    batch: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ (x − Σ a_k μ_k) / √(Σ b_k σ²_k + ε) + β,  a = softmax(mean_weight), b =
    softmax(var_weight), k = instance, layer, batch; also the batch's μ and (biased) σ².
    Luo et al. 2019

    x: (N, C, *S)   mean_weight, var_weight: (3,)   γ, β: (C,)   batch: μ and σ² of the channels,
    (1, C, 1, …), in place of the batch's own, in evaluation. The means and variances of the layer
    and the batch are merged from the instances'. In float64, rounded once; keeps x. Raises
    ValueError for sizes that do not fit, weights that are not floating, a batch of another dtype
    than x and a negative ε, TypeError for weights and batches that are no Tensors.
    """
    check_channels("switchable_norm", input, weight, bias, least=3)
    check_eps("switchable_norm", eps)
    check_tensors("switchable_norm", mean_weight=mean_weight, var_weight=var_weight)
    for t in (mean_weight, var_weight):
        if t.shape != (3,) or t.dtype.kind not in "fV":
            raise ValueError("switchable_norm: expected floating weights of shape (3,), of "
                             f"instance, layer and batch, got {t.shape} and {t.dtype}")
    if batch is not None:
        _check_batch(input, batch)
    how = Sampled("affine", partial(_constants, eps), partial(_composed, eps))
    given = () if batch is None else batch
    y, means, variances = sample_norm(input, mean_weight, var_weight,
                                      *gains(input, weight, bias), *given, how=how)
    if batch is not None:
        return y, batch[0].detach(), batch[1].detach()
    whole = (1, -1, *[1] * (input.ndim - 2))
    mu, var = (reshape(t, whole) for t in merged(means, variances, 0))
    return y, mu, var


def _check_batch(x: Tensor, batch: Any) -> None:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError("switchable_norm: expected batch to be a mean and a variance, got "
                        f"{type(batch).__name__}")
    for name, t in zip(("mean", "variance"), batch):
        check_tensors("switchable_norm", **{f"the batch's {name}": t})
        shape = (1, *x.shape[1:2], *[1] * (x.ndim - 2))
        if t.shape != shape or not serves(t.dtype, x.dtype):
            raise ValueError(f"switchable_norm: expected the batch's {name} of shape (1, C, 1, …) "
                             f"and {x.dtype}, got {t.shape} and {t.dtype} for an input of size "
                             f"{list(x.shape)}")


def _mixed(mean: Tensor, var: Tensor, mean_weight: Tensor, var_weight: Tensor,
           given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """μ and σ² of all three, from those of the instances, (N, C) or (N, C, 1, …)."""
    layer, batch = merged(mean, var, 1), given or merged(mean, var, 0)
    a, b = softmax(mean_weight, 0), softmax(var_weight, 0)
    return (a[0] * mean + a[1] * layer[0] + a[2] * batch[0],
            b[0] * var + b[1] * layer[1] + b[2] * batch[1])


def _constants(eps: float, mean: Tensor, var: Tensor, mean_weight: Tensor, var_weight: Tensor,
               gamma: Tensor, beta: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    mu, around = _mixed(mean, var, mean_weight, var_weight, tuple(map(row, given)))
    return mu, rsqrt(around + eps) * row(gamma), row(beta)


def _composed(eps: float, x: Tensor, mean_weight: Tensor, var_weight: Tensor, gamma: Tensor,
              beta: Tensor, *given: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    mean = mean_of(x, axes, True)
    xc = x - mean
    mu, var = _mixed(mean, mean_of(xc * xc, axes, True), mean_weight, var_weight, given)
    return affine((x - mu) * rsqrt(var + eps), gamma, beta)
