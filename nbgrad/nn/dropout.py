"""Dropout."""

# mypy: no-warn-return-any

from __future__ import annotations

from nbgrad import ops
from nbgrad.autograd import Tensor

from .module import Module

__all__ = ["Dropout"]


class Dropout(Module):
    """Training: y = x m / (1 − p), m Bernoulli(1 − p) per element; evaluation: y = x.
    Srivastava et al. 2014

    ``inplace`` is accepted and has no effect. Raises ValueError unless 0 ≤ p ≤ 1.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p, self.inplace = p, inplace

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, p=self.p, training=self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"
