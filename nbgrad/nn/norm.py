"""The base of all layers that normalize, and layer normalization."""

# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor

from . import init
from .module import Module
from .parameter import Parameter, check_sizes

__all__ = ["LayerNorm", "Normalization"]


class Normalization(Module):
    """Base of all layers that normalize; their gamma and beta are customarily not decayed."""


def at_least(value: Any, least: float) -> bool:
    """Whether it is a number, and no NaN or less."""
    return isinstance(value, Real) and float(value) >= least


def check_eps(owner: Normalization, eps: Any) -> None:
    if not at_least(eps, 0):
        raise ValueError(f"{type(owner).__name__}: eps must not be negative, got {eps}")


class Unsaid(float):
    """A default, which can be told from the same number given by the caller."""


MOMENTUM = Unsaid(0.1)


def check_momentum(owner: Normalization, momentum: Any) -> None:
    if momentum is not None and not (isinstance(momentum, Real) and 0 <= float(momentum) <= 1):
        raise ValueError(f"{type(owner).__name__}: momentum must be from 0 to 1, or None, got "
                         f"{momentum!r}")


class LayerNorm(Normalization):
    """y = gamma (x − mean) / √(var + eps) + beta, statistics over the last dimensions of each
    sample. Ba, Kiros & Hinton 2016

    x: (..., *normalized_shape); gamma, beta: normalized_shape. Training and evaluation are the
    same. Keeps x, gamma, and mean and 1/σ of each sample. Raises RuntimeError for an x that does
    not end in normalized_shape.
    """

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5,
                 elementwise_affine: bool = True, bias: bool = True, *,
                 dtype: Any = np.float32) -> None:
        super().__init__()
        shape = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        for n in shape:
            check_sizes("LayerNorm", normalized_shape=n)
        check_eps(self, eps)
        self.normalized_shape = tuple(shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            p = Parameter(np.empty(self.normalized_shape, dtype)) if wanted else None
            self.register_parameter(name, p)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma 1, beta 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (f"{self.normalized_shape}, eps={self.eps}, "
                f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}")
