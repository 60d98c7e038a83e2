"""Layers that normalize and activate in one, and global response normalization."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor
from nbgrad.ops.norm.channels import check_channels, per_channel

from . import init
from .module import Module
from .norm import MOMENTUM
from .parameter import Parameter, check_sizes
from .running import ChannelNorm, RunningNorm

__all__ = ["EvoNormB0", "EvoNormS0", "FilterResponseNorm", "GlobalResponseNorm", "TLU"]


class TLU(Module):
    """y = max(x, τ), a threshold per channel that is learned; 0 at first, where it is a ReLU.
    Singh & Krishnan 2020      x: (N, C, *S)   τ ``threshold``: (C,)      Keeps x and τ.

    >>> import nbgrad
    >>> TLU(2)(nbgrad.tensor([[-1.0, 2.0]])).tolist()
    [[0.0, 2.0]]
    """

    threshold: Parameter

    def __init__(self, num_features: int, *, dtype: Any = np.float32) -> None:
        super().__init__()
        check_sizes("TLU", num_features=num_features)
        self.num_features = num_features
        self.threshold = Parameter(np.zeros(num_features, dtype))

    def forward(self, x: Tensor) -> Tensor:
        check_channels("TLU", x, self.threshold)
        return ops.at_least(x, per_channel(self.threshold, x))

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class FilterResponseNorm(ChannelNorm):
    """y = max(gamma x / √(ν² + eps + |ε|) + beta, τ),  ν² the mean of x² over S, per sample and
    channel.      Singh & Krishnan 2020

    x: (N, C, *S).  No mean is subtracted, nothing depends on the batch: training and evaluation are
    the same. ``tlu=False``: without the maximum. ``learn_eps=True``, for maps of one element: ε is
    learned, 1e-4 at first. The maximum takes the place of a ReLU behind the layer.

    Parameters, (C,) each: weight, bias, threshold (τ), learned_eps (ε). Keeps x, them, and 1/ν of
    (N, C).

    >>> import nbgrad
    >>> FilterResponseNorm(1, eps=0.0)(nbgrad.tensor([[[3.0, -3.0, 3.0]]])).tolist()
    [[[1.0, 0.0, 1.0]]]
    """

    threshold: Parameter | None
    learned_eps: Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-6, *, affine: bool = True,
                 bias: bool = True, tlu: bool = True, learn_eps: bool = False,
                 dtype: Any = np.float32) -> None:
        super().__init__(num_features, eps, affine=affine, bias=bias, dtype=dtype)
        for name, wanted in (("threshold", tlu), ("learned_eps", learn_eps)):
            self.register_parameter(name, self._vector(0, dtype) if wanted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma 1, beta 0, τ 0, ε 1e-4."""
        super().reset_parameters()
        if self.threshold is not None:
            init.zeros_(self.threshold)
        if self.learned_eps is not None:
            init.constant_(self.learned_eps, 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return ops.filter_response_norm(x, self.weight, self.bias, self.threshold, self.eps,
                                        self.learned_eps)

    def extra_repr(self) -> str:
        return (super().extra_repr() + ("" if self.threshold is not None else ", tlu=False")
                + ("" if self.learned_eps is None else ", learn_eps=True"))


class EvoNormB0(RunningNorm):
    """y = gamma x / max(√(var + eps), v x + √(σ² + eps)) + beta: batch norm and activation in one.
    Liu, Brock, Simonyan & Le 2020

    x: (N, C, *S).  σ²: (biased) variance over S, per sample and channel. var: (biased) variance of
    the channel over the batch in training, the running one in evaluation, which moves towards the
    batch's unbiased one as batch norm's does. ``activation=False``: y = gamma x / √(var + eps) +
    beta.

    average, correction, like, update, on_nonfinite: as in ``BatchNorm``; for ``update="step"``, the
    mean over all values between two steps. statistics: "batch", or "frozen", the running ones in
    the batch's place in training, too.

    Parameters, (C,) each: weight, bias, v. Buffers: running_var, num_batches_tracked. Keeps x, the
    parameters, s of each channel, and mean and variance of each sample's. Raises ValueError for one
    value per channel in training.

    >>> import nbgrad
    >>> x = nbgrad.tensor([[[3.0]], [[-1.0]]])          # σ = 0; the batch's is 2: 3 / max(2, 3)
    >>> [round(v, 2) for v in EvoNormB0(1)(x).flatten().tolist()]
    [1.0, -0.5]
    """

    v: Parameter | None
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM, *,
                 affine: bool = True, activation: bool = True, dtype: Any = np.float32,
                 **policies: Any) -> None:
        super().__init__(num_features, eps, momentum, affine=affine, dtype=dtype, **policies,
                         starts={"running_var": 1.0})
        self.register_parameter("v", self._vector(1, dtype) if activation else None)

    def reset_parameters(self) -> None:
        """gamma 1, beta 0, v 1, and ``reset_running_stats``."""
        super().reset_parameters()
        _reset_v(self)

    def _normalized(self, x: Tensor) -> Tensor:
        if self._by_batch:
            std = ops.channel_std(x, eps=self.eps)
        else:
            var = self.running_var.data.astype(np.float64)
            std = per_channel(Tensor(np.sqrt(var + self.eps).astype(x.dtype)), x)
        v = None if self.v is None else self.v.to(x.dtype)
        y = ops.evonorm_b0(x, *self._gains(x), v, std, self.eps)
        if self._by_batch:
            self._move(x, running_var=ops.moments(x).var(self.correction))
        return y


class EvoNormS0(ChannelNorm):
    """y = gamma x sigmoid(v x) / √(σ² + eps) + beta: group norm and activation in one, without
    statistics of the batch.      Liu, Brock, Simonyan & Le 2020

    x: (N, C, *S).  σ²: (biased) variance over S and the channels of a group, per sample.
    ``activation=False``: y = gamma x / √(σ² + eps) + beta. Training and evaluation are the same.

    Parameters, (C,) each: weight, bias, v. Keeps x, them, and mean and variance of each sample's
    channels. Raises ValueError for groups that do not divide C.

    >>> import nbgrad
    >>> x = nbgrad.tensor([[[3.0], [-1.0]]])            # x sigmoid(x) / 2
    >>> [round(v, 2) for v in EvoNormS0(2, groups=1)(x).flatten().tolist()]
    [1.43, -0.13]
    """

    v: Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-5, *, groups: int = 32,
                 affine: bool = True, bias: bool = True, activation: bool = True,
                 dtype: Any = np.float32) -> None:
        super().__init__(num_features, eps, affine=affine, bias=bias, dtype=dtype)
        if not isinstance(groups, (int, np.integer)) or groups < 1 or num_features % groups:
            raise ValueError(f"EvoNormS0: groups must divide the {num_features} channels, got "
                             f"{groups!r}")
        self.groups = groups
        self.register_parameter("v", self._vector(1, dtype) if activation else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma 1, beta 0, v 1."""
        super().reset_parameters()
        _reset_v(self)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return ops.evonorm_s0(x, self.groups, self.weight, self.bias, self.v, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, groups={self.groups}, eps={self.eps}, affine={self.affine}"


def _reset_v(layer: Any) -> None:
    if getattr(layer, "v", None) is not None:
        init.ones_(layer.v)


class GlobalResponseNorm(ChannelNorm):
    """y = gamma x n + beta + x,  n = ‖x_c‖ / (mean over c of ‖x_c‖ + eps), the norms over S of each
    sample: channels that respond alike compete.      Woo et al. 2023 (GRN of ConvNeXt V2)

    x: (N, C, *S).  gamma and beta are 0 at first, and y = x. Training and evaluation are the same.
    Keeps x, gamma, beta, and mean and variance of each sample's channels.

    >>> import nbgrad
    >>> GlobalResponseNorm(2)(nbgrad.tensor([[[1.0], [2.0]]])).tolist()
    [[[1.0], [2.0]]]
    """

    weight: Parameter
    bias: Parameter

    def __init__(self, num_features: int, eps: float = 1e-6, *, dtype: Any = np.float32) -> None:
        super().__init__(num_features, eps, dtype=dtype)

    def reset_parameters(self) -> None:
        """gamma 0, beta 0."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return ops.global_response_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
