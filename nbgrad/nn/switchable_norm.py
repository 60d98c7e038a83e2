"""A norm that learns which statistics to use."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor
from nbgrad.ops.norm.channels import per_channel

from . import init
from .norm import MOMENTUM
from .parameter import Parameter
from .running import RunningNorm

__all__ = ["SwitchableNorm"]


class SwitchableNorm(RunningNorm):
    """y = gamma (x − Σ a_k mean_k) / √(Σ b_k var_k + eps) + beta over k = instance, layer, batch,
    a = softmax(mean_weight), b = softmax(var_weight).      Luo et al. 2019

    x: (N, C, *S), at least one S.  The variances that normalize are biased; batch statistics are
    those of the batch in training, and the running ones in evaluation, whose variance is the
    unbiased one as batch norm's. mean_weight and var_weight, (3,) each, are 1 at first: all count
    the same.

    average, correction, like, update, on_nonfinite: as in ``BatchNorm``; for ``update="step"``, the
    mean over all values between two steps. statistics: "batch", or "frozen", the running ones in
    the batch's place in training, too.

    Buffers: running_mean, running_var, num_batches_tracked. Keeps x, the parameters, and mean and
    variance of each sample's channels. Raises ValueError for one value per
    channel in training.

    >>> SwitchableNorm(4)
    SwitchableNorm(4, eps=1e-05, momentum=0.1, affine=True)
    """

    mean_weight: Parameter
    var_weight: Parameter
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM,
                 *, affine: bool = True, dtype: Any = np.float32, **policies: Any) -> None:
        super().__init__(num_features, eps, momentum, affine=affine, dtype=dtype, **policies,
                         starts={"running_mean": 0.0, "running_var": 1.0})
        for name in ("mean_weight", "var_weight"):
            self.register_parameter(name, Parameter(np.ones(3, dtype)))

    def reset_parameters(self) -> None:
        """gamma 1, beta 0, the same weight for all, and ``reset_running_stats``."""
        super().reset_parameters()
        for name in ("mean_weight", "var_weight"):
            if hasattr(self, name):
                init.ones_(getattr(self, name))

    def _normalized(self, x: Tensor) -> Tensor:
        batch = None if self._by_batch else (per_channel(self.running_mean.to(x.dtype), x),
                                             per_channel(self.running_var.to(x.dtype), x))
        y, mean, var = ops.switchable_norm(x, self.mean_weight, self.var_weight, *self._gains(x),
                                           self.eps, batch)
        if self._by_batch:
            n = x.data.size // max(x.shape[1], 1)
            free = max(n - self.correction, 1)
            self._move(x, running_mean=mean.data, running_var=var.data * (n / free))
        return y
