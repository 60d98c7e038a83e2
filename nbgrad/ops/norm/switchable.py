"""Instance, layer and batch statistics mixed with weights that are learned."""

# mypy: no-warn-return-any

from __future__ import annotations

import numpy as np

from nbgrad.autograd import Tensor
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.loss import softmax
from nbgrad.ops.norm.channels import affine, check_channels, check_eps, check_tensors
from nbgrad.ops.reduce import mean

__all__ = ["switchable_norm"]


def switchable_norm(input: Tensor, mean_weight: Tensor, var_weight: Tensor,
                    weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
                    batch: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ (x − Σ a_k μ_k) / √(Σ b_k σ²_k + ε) + β,  a = softmax(mean_weight), b =
    softmax(var_weight), k = instance, layer, batch; also the batch's μ and (biased) σ².
    Luo et al. 2019

    x: (N, C, *S)   mean_weight, var_weight: (3,)   γ, β: (C,)   batch: μ and σ² of the channels,
    (1, C, 1, …), in place of the batch's own, in evaluation. The means and variances of the layer
    and the batch are merged from the instances'. In float64, rounded once; keeps x and some copies
    of it in float64. Raises ValueError for sizes that do not fit and a negative ε, TypeError for
    weights that are no Tensors.
    """
    check_channels("switchable_norm", input, weight, bias, least=3)
    check_eps("switchable_norm", eps)
    check_tensors("switchable_norm", mean_weight=mean_weight, var_weight=var_weight)
    for t in (mean_weight, var_weight):
        if t.shape != (3,):
            raise ValueError("switchable_norm: expected weights of shape (3,), of instance, "
                             f"layer and batch, got {t.shape}")
    x = input.to(np.float64)
    axes = tuple(range(2, x.ndim))
    means = [mean(x, axes, True)]
    xc = x - means[0]
    variances = [mean(xc * xc, axes, True)]
    for axis in (1, 0):                                # layer: over channels; batch: over samples
        if axis == 0 and batch is not None:
            middle, around = batch[0].to(np.float64), batch[1].to(np.float64)
        else:
            middle = mean(means[0], axis, True)
            apart = means[0] - middle
            around = mean(variances[0] + apart * apart, axis, True)
        means.append(middle)
        variances.append(around)
    a, b = (softmax(t.to(np.float64), 0) for t in (mean_weight, var_weight))
    mu = a[0] * means[0] + a[1] * means[1] + a[2] * means[2]
    var = b[0] * variances[0] + b[1] * variances[1] + b[2] * variances[2]
    y = ((x - mu) * rsqrt(var + eps)).to(input.dtype)
    return affine(y, weight, bias), means[2].detach(), variances[2].detach()
