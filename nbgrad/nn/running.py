"""The base of layers that normalize by the batch in training and by running averages otherwise."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, bump
from nbgrad.ops.norm import batch_norm_inference
from nbgrad.ops.norm.channels import check_channels, check_count

from . import init
from .norm import Normalization, check_eps, check_momentum
from .parameter import Parameter, check_sizes

__all__ = ["ChannelNorm", "RunningNorm", "is_tracked_instance_norm"]


def is_tracked_instance_norm(module: Any) -> bool:
    """Whether it is an instance norm that evaluates by running statistics: the mean over samples of
    what each of them has, which is not the batch's."""
    from .group_norm import _InstanceNorm  # which is made of what is above

    return isinstance(module, _InstanceNorm) and module.running_mean is not None


class ChannelNorm(Normalization):
    """Base: gamma ``weight`` and beta ``bias``, (num_features,) each, and a check of x."""

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True, *,
                 dtype: Any = np.float32) -> None:
        super().__init__()
        check_sizes(type(self).__name__, num_features=num_features)
        check_eps(self, eps)
        self.num_features, self.eps, self.affine = num_features, eps, affine
        for name in ("weight", "bias"):
            self.register_parameter(name, self._vector(0, dtype) if affine else None)

    def _vector(self, value: float, dtype: Any) -> Parameter:
        return Parameter(np.full(self.num_features, value, dtype))

    def reset_parameters(self) -> None:
        """gamma 1, beta 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def _check(self, x: Any) -> None:
        name = type(self).__name__
        check_channels(name, x)
        if x.shape[1] != self.num_features:
            raise ValueError(f"{name}: expected {self.num_features} channels, got an input of size "
                             f"{list(x.shape)}")
        check_channels(name, x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class RunningNorm(ChannelNorm):
    """Base: running statistics, which move by ``momentum`` towards those of each batch in training,
    or, with ``momentum=None``, become the average of all batches; read in evaluation."""

    num_batches_tracked: Tensor
    _optional_state = ("num_batches_tracked",)

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1,
                 affine: bool = True, *, dtype: Any = np.float32, **statistics: Any) -> None:
        super().__init__(num_features, eps, affine, dtype=dtype)
        check_momentum(self, momentum)
        self.momentum, self._starts = momentum, statistics
        for name, start in statistics.items():         # a number: one such per channel
            shape = np.shape(start) or (num_features,)
            self.register_buffer(name, as_tensor(np.full(shape, start, dtype)))
        self.register_buffer("num_batches_tracked", as_tensor(np.zeros((), np.int64)))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """As at construction."""
        for name, start in {**self._starts, "num_batches_tracked": 0}.items():
            buffer = getattr(self, name)
            buffer.data[...] = start
            bump(buffer)

    def reset_parameters(self) -> None:
        """gamma 1, beta 0, and ``reset_running_stats``."""
        super().reset_parameters()
        self.reset_running_stats()

    def _check(self, x: Any) -> None:
        super()._check(x)
        if self.training:
            check_count(type(self).__name__, x)

    def _move(self, x: Tensor, **found: Any) -> None:
        """Towards what was found in x, if there was anything in it."""
        if not x.data.size:
            return
        self.num_batches_tracked.data += 1
        m = self.momentum
        m = 1 / int(self.num_batches_tracked.data) if m is None else m
        for name, value in found.items():
            buffer = getattr(self, name)
            with np.errstate(all="ignore"):
                buffer.data[...] = (1 - m) * buffer.data + m * np.reshape(value, buffer.shape)
            bump(buffer)

    def _infer(self, x: Tensor, mean: Tensor, scale: Any = None) -> Tensor:
        """gamma (x − mean) / scale + beta, in one kernel."""
        mu = mean.data.astype(np.float64)
        with np.errstate(all="ignore"):
            invstd = np.ones_like(mu) if scale is None else 1 / scale.astype(np.float64)
        return batch_norm_inference(x, self.weight, self.bias, None, mean=mu, invstd=invstd)

    def extra_repr(self) -> str:
        return (f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
                f"affine={self.affine}")
