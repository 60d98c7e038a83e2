"""Batch norm that also takes the correlations out."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor
from nbgrad.ops.norm.whitening import whiten_inference

from .norm import MOMENTUM
from .parameter import check_sizes
from .running import RunningNorm

__all__ = ["DecorrelatedBatchNorm"]


class DecorrelatedBatchNorm(RunningNorm):
    """y = gamma W (x − mean) + beta,  W = (Σ + eps I)^(−1/2) of each group of channels (ZCA).
    Huang et al. 2018

    x: (N, C, *S).  Σ: (biased) covariance of the ``group_size`` channels of a group over N and S;
    None: the largest size up to 16 that divides C. W by the coupled Newton–Schulz iteration of
    Huang et al. 2019, run until it has converged, in float64. Training: mean and W of the batch,
    towards which the running ones move; evaluation: the running ones.

    average, like, update, on_nonfinite: as in ``BatchNorm``; for ``update="step"``, the mean over
    all values between two steps. statistics: "batch", or "frozen", the running ones in training.

    Buffers: running_mean (C,), running_whitening (C / group_size, group_size, group_size), the
    identity at first, num_batches_tracked. Keeps x, gamma, mean and W. Raises ValueError for group
    sizes that do not divide C, and one value per channel in training.

    >>> import nbgrad
    >>> x = nbgrad.randn(1000, 2, dtype=nbgrad.float64)
    >>> x[:, 1] += 3 * x[:, 0]
    >>> y = DecorrelatedBatchNorm(2, dtype=nbgrad.float64)(x).detach()
    >>> [[round(v + 0.0, 3) for v in row] for row in (y.T @ y / 1000).tolist()]
    [[1.0, 0.0], [0.0, 1.0]]
    """

    running_mean: Tensor
    running_whitening: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM, *,
                 group_size: int | None = None, affine: bool = True, dtype: Any = np.float32,
                 **policies: Any) -> None:
        check_sizes("DecorrelatedBatchNorm", num_features=num_features)
        C, d = num_features, group_size
        if d is None:
            d = next((n for n in range(min(C, 16), 0, -1) if C % n == 0), 1)
        if not isinstance(d, (int, np.integer)) or d < 1 or C % d or d > max(C, 1):
            raise ValueError(f"DecorrelatedBatchNorm: group_size must divide the {C} channels, got "
                             f"{d!r}")
        eye = np.broadcast_to(np.eye(d), (C // d, d, d))
        super().__init__(C, eps, momentum, affine=affine, dtype=dtype, **policies,
                         starts={"running_mean": 0.0, "running_whitening": eye})
        self.group_size = d

    def _normalized(self, x: Tensor) -> Tensor:
        if self._by_batch:
            y, mean, w = ops.whiten(x, self.group_size, self.eps, *self._gains(x))
            self._move(x, running_mean=mean.data, running_whitening=w.data)
            return y
        known = self.running_mean.data, self.running_whitening.data
        mu, root = (a.astype(np.float64) for a in known)
        return whiten_inference(x, *self._gains(x), mean=mu, w=root)

    def extra_repr(self) -> str:
        return (f"{self.num_features}, group_size={self.group_size}, eps={self.eps}, "
                f"{self._told()}, affine={self.affine}")
