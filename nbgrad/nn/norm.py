"""Batch and layer normalization."""

# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor, as_tensor

from . import init
from .module import Module
from .parameter import Parameter, check_sizes

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "Normalization"]


class Normalization(Module):
    """Base of all layers that normalize; their gamma and beta are customarily not decayed."""


class _BatchNorm(Normalization):
    """y = gamma (x − mean) / √(var + eps) + beta, per channel C.      Ioffe & Szegedy 2015

    x: {shape}.  Training: mean and biased var of this batch, and the running ones move by
    ``momentum`` towards them (var unbiased), or, with ``momentum=None``, become the average of all
    batches. Evaluation: the running ones, or the batch's without ``track_running_stats``.

    Buffers: running_mean, running_var, num_batches_tracked (int64; state dicts without it load).
    Raises ValueError for a wrong number of dimensions, a wrong C, or one value per channel in
    training, and, at construction, for negative ``num_features`` or ``eps``.
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _optional_state = ("num_batches_tracked",)
    _ndims: tuple[int, ...]

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
                 affine: bool = True, track_running_stats: bool = True, *, bias: bool = True,
                 dtype: Any = np.float32) -> None:
        super().__init__()
        check_sizes(type(self).__name__, num_features=num_features)
        check_eps(self, eps)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        C, track = num_features, track_running_stats
        self.register_parameter("weight", Parameter(np.empty(C, dtype)) if affine else None)
        self.register_parameter("bias", Parameter(np.empty(C, dtype)) if affine and bias else None)
        self.register_buffer("running_mean", as_tensor(np.empty(C, dtype)) if track else None)
        self.register_buffer("running_var", as_tensor(np.empty(C, dtype)) if track else None)
        self.register_buffer("num_batches_tracked",
                             as_tensor(np.zeros((), np.int64)) if track else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """mean 0, var 1, no batches."""
        if self.running_mean is not None and self.running_var is not None:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
        if self.num_batches_tracked is not None:
            init.zeros_(self.num_batches_tracked)

    def reset_parameters(self) -> None:
        """gamma 1, beta 0, and ``reset_running_stats``."""
        self.reset_running_stats()
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor, *, residual: Tensor | None = None,
                activation: str | None = None) -> Tensor:
        """With ``residual`` and ``activation="relu"``: max(y + residual, 0), in one kernel."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: expected a Tensor, got {type(x).__name__}")
        if x.ndim not in self._ndims:
            expected = " or ".join(f"{n}D" for n in self._ndims)
            raise ValueError(f"expected {expected} input (got {x.ndim}D input)")
        mean, var = self._running()
        y = ops.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps,
                           training=self.training or self.running_mean is None,
                           momentum=self._momentum(), residual=residual, activation=activation)
        self._count()
        return y

    def follows(self, x: Any, linear: Any) -> bool:
        """Whether ``of_linear`` says what this module would say of linear(x)."""
        return self.training and isinstance(x, Tensor) and x.ndim == 2 and 2 in self._ndims

    def of_linear(self, x: Tensor, linear: Any, activation: str | None) -> Tensor:
        """activation(self(linear(x))) as one op."""
        mean, var = self._running()
        y = ops.linear_batch_norm(x, linear.weight, linear.bias, mean, var, self.weight, self.bias,
                                  self._momentum(), self.eps, activation)
        self._count()
        return y

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics that this call reads or moves."""
        if self.training and not self.track_running_stats:
            return None, None
        return self.running_mean, self.running_var

    def _momentum(self) -> float:
        if self.momentum is not None:
            return self.momentum
        tracked = self.num_batches_tracked
        counts = self.training and self.track_running_stats and tracked is not None
        return 1.0 / (float(tracked.data) + 1.0) if counts else 0.0  # type: ignore[union-attr]

    def _count(self) -> None:
        """After the op, so that a rejected batch is not counted."""
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.data += 1

    def extra_repr(self) -> str:
        return (f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
                f"affine={self.affine}, bias={self.bias is not None}, "
                f"track_running_stats={self.track_running_stats}")


def check_eps(owner: Normalization, eps: Any) -> None:
    if not isinstance(eps, Real) or not float(eps) >= 0:    # NaN too
        raise ValueError(f"{type(owner).__name__}: eps must not be negative, got {eps}")


def _documented(shape: str) -> str:
    return (_BatchNorm.__doc__ or "").replace("{shape}", shape)


class BatchNorm1d(_BatchNorm):
    __doc__ = _documented("(N, C) or (N, C, L)")
    _ndims = (2, 3)


class BatchNorm2d(_BatchNorm):
    __doc__ = _documented("(N, C, H, W)")
    _ndims = (4,)


class BatchNorm3d(_BatchNorm):
    __doc__ = _documented("(N, C, D, H, W)")
    _ndims = (5,)


class LayerNorm(Normalization):
    """y = gamma (x − mean) / √(var + eps) + beta, statistics over the last dimensions of each
    sample. Ba, Kiros & Hinton 2016

    x: (..., *normalized_shape); gamma, beta: normalized_shape. Training and evaluation are the
    same.
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
