"""Norms of single samples beside LayerNorm: group, instance, RMS and local response."""

# mypy: no-warn-return-any

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor
from nbgrad.ops.norm.group import over_samples

from . import init
from .module import Module
from .norm import MOMENTUM, Normalization, check_eps
from .parameter import Parameter, check_sizes
from .running import RunningNorm

__all__ = ["GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LocalResponseNorm",
           "RMSNorm"]


class _Affine(Normalization):
    """With weight gamma and bias beta, or without."""

    weight: Parameter | None
    bias: Parameter | None

    def _gains(self, shape: tuple[int, ...], dtype: Any, weight: bool, bias: bool) -> None:
        for name, wanted in (("weight", weight), ("bias", bias)):
            self.register_parameter(name, Parameter(np.empty(shape, dtype)) if wanted else None)

    def reset_parameters(self) -> None:
        """gamma 1, beta 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class GroupNorm(_Affine):
    """y = gamma (x − mean) / √(var + eps) + beta, statistics of each sample's groups of channels,
    biased var; gamma and beta per channel.      Wu & He 2018

    x: (N, C, *), its C = num_channels channels in num_groups groups that lie together. Training and
    evaluation are the same. Keeps x, gamma, and mean and 1/σ of (N, num_groups). Raises ValueError
    where num_groups does not divide num_channels.

    >>> import nbgrad
    >>> y = GroupNorm(2, 6)(nbgrad.randn(4, 6, 5, 5))
    >>> bool(abs(y.reshape((4, 2, 75)).mean(2)).max() < 1e-6)
    True
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True,
                 *, bias: bool = True, dtype: Any = np.float32) -> None:
        super().__init__()
        check_sizes("GroupNorm", num_groups=num_groups, num_channels=num_channels)
        check_eps(self, eps)
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"GroupNorm: num_channels ({num_channels}) must be divisible by "
                             f"num_groups ({num_groups})")
        self.num_groups, self.num_channels = num_groups, num_channels
        self.eps, self.affine = eps, affine
        self._gains((num_channels,), dtype, affine, affine and bias)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
                f"bias={self.bias is not None}")


class _InstanceNorm(RunningNorm):
    """y = gamma (x − mean) / √(var + eps) + beta, statistics of each channel of each sample, biased
    var.      Ulyanov, Vedaldi & Lempitsky 2016

    x: {shape}, or one sample without N.  gamma and beta are there with ``affine``. With
    ``track_running_stats``, running ones move by ``momentum`` towards the mean over samples (var
    unbiased) in training and are the statistics in evaluation; ``momentum=None`` leaves them as
    they are, as in PyTorch. Keeps x, gamma, and mean and 1/σ of (N, C).

    average, correction, like, update, on_nonfinite: as in ``BatchNorm``, of the mean over samples;
    for ``update="step"``, over all samples between two steps. statistics: "frozen": the running
    ones in training, too, and nothing moves them. num_batches_tracked counts where one of these is
    not the usual one, and stays 0 otherwise, as in PyTorch.

    Raises ValueError for a wrong number of dimensions, one spatial element, and, with ``affine``, a
    wrong C; without, a wrong C is a UserWarning.

    >>> import nbgrad
    >>> y = InstanceNorm1d(3)(nbgrad.randn(2, 3, 10))
    >>> bool(abs(y.mean(2)).max() < 1e-6)
    True
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    _ndim: int

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM,
                 affine: bool = False, track_running_stats: bool = False, *, bias: bool = True,
                 dtype: Any = np.float32, **policies: Any) -> None:
        mean, var = (0.0, 1.0) if track_running_stats else (None, None)
        super().__init__(num_features, eps, momentum, affine=affine, bias=bias, dtype=dtype,
                         **policies, starts={"running_mean": mean, "running_var": var})
        self.track_running_stats = track_running_stats

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: expected a Tensor, got {type(x).__name__}")
        if x.ndim not in (self._ndim - 1, self._ndim):
            raise ValueError(f"expected {self._ndim - 1}D or {self._ndim}D input (got {x.ndim}D "
                             "input)")
        self._check_channels(x.shape, x.ndim - self._ndim + 1)
        if x.ndim == self._ndim:
            return self._normalized(x)
        return self._normalized(x.unsqueeze(0)).squeeze(0)

    def _check_channels(self, shape: tuple[int, ...], dim: int) -> None:
        if shape[dim] == self.num_features:
            return
        if self.affine or self.track_running_stats:
            raise ValueError(f"expected input's size at dim={dim} to match num_features "
                             f"({self.num_features}), but got: {shape[dim]}.")
        warnings.warn(f"input's size at dim={dim} does not match num_features, which is not used "
                      "because affine=False", stacklevel=3)

    def _normalized(self, x: Tensor) -> Tensor:
        tracked, given = self.num_batches_tracked is not None, (self.weight, self.bias)
        by_sample = self._by_batch or not self.track_running_stats
        if not by_sample or not tracked or self._is_plain():
            return ops.instance_norm(x, self.running_mean, self.running_var, *given, by_sample,
                                     self._momentum(1), self.eps)
        y = ops.instance_norm(x, None, None, *given, True, 0.0, self.eps)
        mean, var = over_samples(x, self.correction)
        self._move(x, of=len(x), running_mean=mean, running_var=var)
        return y

    def _is_plain(self) -> bool:
        """Whether the op that normalizes also does all that happens to the statistics."""
        return (self.average is None and self.correction == 1 and self.update == "forward"
                and self.on_nonfinite == "propagate")

    def _momentum(self, t: int) -> float:
        return 0.0 if self.average is None and self.momentum is None else super()._momentum(t)

    def extra_repr(self) -> str:
        return (f"{self.num_features}, eps={self.eps}, {self._told()}, affine={self.affine}, "
                f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}")


def _documented(shape: str) -> str:
    return (_InstanceNorm.__doc__ or "").replace("{shape}", shape).partition("\n    >>>")[0]


class InstanceNorm1d(_InstanceNorm):
    __doc__ = _documented("(N, C, L)")
    _ndim = 3


class InstanceNorm2d(_InstanceNorm):
    __doc__ = _documented("(N, C, H, W)")
    _ndim = 4


class InstanceNorm3d(_InstanceNorm):
    __doc__ = _documented("(N, C, D, H, W)")
    _ndim = 5


class RMSNorm(_Affine):
    """y = gamma x / √(mean x² + eps), the mean over the last dimensions of each sample.      Zhang
    & Sennrich 2019

    x: (..., *normalized_shape); gamma: normalized_shape, there with ``elementwise_affine``.
    ``eps=None`` is the spacing of x's dtype at 1. Keeps x, gamma and 1/rms of each sample.

    >>> import nbgrad
    >>> RMSNorm(2, eps=0.0)(nbgrad.tensor([3.0, -3.0])).tolist()
    [1.0, -1.0]
    """

    def __init__(self, normalized_shape: int | Sequence[int], eps: float | None = None,
                 elementwise_affine: bool = True, *, dtype: Any = np.float32) -> None:
        super().__init__()
        shape = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        for n in shape:
            check_sizes("RMSNorm", normalized_shape=n)
        if eps is not None:
            check_eps(self, eps)
        self.normalized_shape, self.eps = tuple(shape), eps
        self.elementwise_affine = elementwise_affine
        weight = Parameter(np.empty(self.normalized_shape, dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma 1."""
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return (f"{self.normalized_shape}, eps={self.eps}, "
                f"elementwise_affine={self.elementwise_affine}")


class LocalResponseNorm(Module):
    """y = x / (k + alpha/size Σ x²)^beta, the sum over ``size`` neighbouring channels.
    Krizhevsky, Sutskever & Hinton 2012, with alpha divided by the size as in PyTorch

    x: (N, C, *), at least 3 dimensions. No parameters. Keeps x, the sums and their powers. Raises
    ValueError for a size below 1.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        check_sizes("LocalResponseNorm", size=size)
        if not size:
            raise ValueError("LocalResponseNorm: size must be at least 1, got 0")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        return ops.local_response_norm(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
