"""Losses as modules."""

# mypy: no-warn-return-any

from __future__ import annotations

from nbgrad import ops
from nbgrad.autograd import Tensor

from .module import Module

__all__ = ["CrossEntropyLoss", "MSELoss", "NLLLoss"]


class _Loss(Module):
    """``reduction``: "mean", "sum" or "none"."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"{reduction} is not a valid value for reduction: "
                             "choose from 'mean', 'sum', 'none'")
        self.reduction = reduction


class MSELoss(_Loss):
    """(x − target)², reduced.      x, target: one shape"""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return ops.mse_loss(x, target, reduction=self.reduction)


class NLLLoss(_Loss):
    """−w[t] x[t], reduced ("mean" divides by Σ w[t]).      x: (N, C, *S) log-probabilities

    target: (N, *S) class numbers; ``ignore_index`` ones do not count. ``weight`` w: (C,), a buffer.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100,
                 reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return ops.nll_loss(x, target, self.weight, ignore_index=self.ignore_index,
                            reduction=self.reduction)


class CrossEntropyLoss(NLLLoss):
    """−w[t] log_softmax(x)[t], reduced as in NLLLoss.      x: (N, C, *S) scores

    ``label_smoothing`` ε: the target is 1 − ε plus ε / C on every class (Szegedy et al. 2016).
    """

    def __init__(self, weight: Tensor | None = None, *, ignore_index: int = -100,
                 reduction: str = "mean", label_smoothing: float = 0.0) -> None:
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction)
        if not 0 <= label_smoothing <= 1:
            raise ValueError("CrossEntropyLoss: label_smoothing must be between 0 and 1, "
                             f"got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return ops.cross_entropy(x, target, self.weight, ignore_index=self.ignore_index,
                                 reduction=self.reduction, label_smoothing=self.label_smoothing)
