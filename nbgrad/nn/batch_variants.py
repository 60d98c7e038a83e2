"""Batch normalization with other statistics: of ghosts, of several batches, of all workers, pulled
towards the running ones, or frozen. All take (N, C), (N, C, L), (N, C, H, W) and (N, C, D, H, W).
"""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor, as_tensor
from nbgrad.ops import Moments

from .batch_norm import BatchNorm, finish
from .norm import MOMENTUM, Unsaid, at_least
from .parameter import check_sizes

__all__ = ["BatchRenorm", "FrozenBatchNorm", "GhostBatchNorm", "SplitBatchNorm", "SyncBatchNorm"]


_SLOW = Unsaid(0.01)


class FrozenBatchNorm(BatchNorm):
    """y = gamma (x − running_mean) / √(running_var + eps) + beta, in training too; nothing moves.

    x: (N, C, *S); gamma, beta and the running statistics: (C,). For fine-tuning with batches too
    small for statistics (He et al. 2016 fine-tune detectors so). gamma and beta do not require
    grad; what ``BatchNorm``'s state dict holds loads into it. Keeps x, gamma, mean and 1/σ.

    >>> layer = FrozenBatchNorm(2)
    >>> layer.weight.requires_grad, layer.statistics
    (False, 'frozen')
    """

    def __init__(self, num_features: int, eps: float = 1e-5, **settings: Any) -> None:
        super().__init__(num_features, eps, statistics="frozen", **settings)
        self._thawed = "batch", [True for _ in self.parameters()]
        self.requires_grad_(False)


def check_workers(owner: str, workers: Any) -> None:
    if workers is not None and not all(callable(getattr(workers, name, None))
                                       for name in ("merge", "sum")):
        raise TypeError(f"{owner}: expected workers with the methods merge and sum (see "
                        f"nbgrad.ops.Workers), or None, got {workers!r}")


class SyncBatchNorm(BatchNorm):
    """y = gamma (x − mean) / √(var + eps) + beta, mean and var of each channel over the batches of
    all workers together; gradients are of the sum of their losses.      Peng et al. 2018 (MegDet)

    x: (N, C, *S), N and S the worker's own; gamma, beta and the running statistics: (C,).
    ``workers`` (see ``nbgrad.ops.Workers``) merges (count, mean, M2) in the order of ranks in
    float64, and sums Σ∂y and Σ∂y x̂ in backward, so that unequal and empty parts are right. All
    workers must call forward and backward in the same order. Without workers: batch norm. Keeps the
    own x, gamma, and mean, 1/σ and count of all.
    Raises TypeError for workers without ``merge`` and ``sum``, ValueError for one value per channel
    over all workers and for what batch norm refuses.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM,
                 affine: bool = True, track_running_stats: bool = True,
                 workers: ops.Workers | None = None, **settings: Any) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **settings)
        check_workers("SyncBatchNorm", workers)
        self.workers = workers


class GhostBatchNorm(BatchNorm):
    """y = gamma (x − mean_g) / √(var_g + eps) + beta in training, mean and biased var of each
    channel over the ``ghost_size`` samples of x's ghost g (the last may be fewer).      Hoffer,
    Hubara & Soudry 2017

    x: (N, C, *S); gamma, beta and the running statistics: (C,).
    The running statistics move, once a batch, towards the moments of the whole batch, merged from
    the ghosts'. Evaluation as in batch norm. Keeps x, gamma, and mean and 1/σ of each ghost.
    Raises ValueError for a ghost of one value per channel.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM, *,
                 ghost_size: int = 32, **settings: Any) -> None:
        super().__init__(num_features, eps, momentum, **settings)
        check_sizes("GhostBatchNorm", ghost_size=ghost_size)
        if not ghost_size:
            raise ValueError("GhostBatchNorm: ghost_size must be at least 1, got 0")
        self.ghost_size = ghost_size

    def _is_plain(self) -> bool:
        return not self.training and super()._is_plain()

    def _by_batch(self, x: Tensor, residual: Tensor | None, activation: str | None,
                  mask: Any) -> tuple[Tensor, Moments]:
        if mask is not None:
            raise ValueError("GhostBatchNorm: expected no mask")
        y, each = ops.ghost_batch_norm(x, self.ghost_size, self.weight, self.bias, self.eps)
        found = each.over(0)
        return (finish(y, residual, activation),
                found if self.workers is None else self.workers.merge(found))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class SplitBatchNorm(BatchNorm):
    """y_i = gamma_i (x_i − mean_i) / √(var_i + eps) + beta_i in training, x_i the i-th of
    ``num_splits`` equal parts of the batch, mean_i and var_i its own; evaluation is by the first
    batch norm, whose keys are those of ``BatchNorm``.      Xie et al. 2020 (auxiliary batch norms)

    x: (N, C, *S); gamma_i, beta_i and the running statistics: (C,), from i = 1 on in ``aux_bn``.
    For batches of parts from different distributions, such as clean and augmented samples. One
    kernel does all parts. Keeps what batch norm keeps of each part. Raises ValueError for a batch
    that does not split evenly.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM, *,
                 num_splits: int = 2, **settings: Any) -> None:
        super().__init__(num_features, eps, momentum, **settings)
        if not isinstance(num_splits, (int, np.integer)) or num_splits < 2:
            raise ValueError(f"SplitBatchNorm: num_splits must be at least 2, got {num_splits!r}")
        from .container import ModuleList

        self.num_splits = num_splits
        self.aux_bn = ModuleList([BatchNorm(num_features, eps, momentum, **settings)
                                  for _ in range(num_splits - 1)])

    def _is_plain(self) -> bool:
        return not self.training and super()._is_plain()

    def _forward(self, x: Tensor, residual: Tensor | None, activation: str | None,
                 mask: Any) -> Tensor:
        if not self._policy()[0] or not self.training:
            return super()._forward(x, residual, activation, mask)
        size, rest = divmod(len(x), self.num_splits)
        if rest or mask is not None:
            raise ValueError(f"SplitBatchNorm: expected a batch that splits into {self.num_splits} "
                             f"equal parts, and no mask, got {len(x)} samples")
        self._check(x, residual, activation, mask)
        if not size:
            return super()._forward(x, residual, activation, None)
        layers: list[BatchNorm] = [self, *self.aux_bn]
        y, found = self._each(x, size, layers)
        for layer, own in zip(layers, found):              # an error before any of them moves
            layer._accepted(own)
        for layer, own in zip(layers, found):
            if layer._policy()[1]:
                layer._collect(own)
        return finish(y, residual, activation)

    def _each(self, x: Tensor, size: int, layers: list[BatchNorm]) -> tuple[Tensor, list[Moments]]:
        """y and the statistics of every part; in one kernel, unless other workers have some."""
        if any(layer.workers is not None for layer in layers):
            made = [BatchNorm._by_batch(layer, x[i * size:(i + 1) * size], None, None, None)
                    for i, layer in enumerate(layers)]
            return ops.cat([y for y, _ in made]), [found for _, found in made]
        weight, bias = (None if own[0] is None else ops.stack(own) for own in zip(
            *((layer.weight, layer.bias) for layer in layers)))
        y, each = ops.ghost_batch_norm(x, size, weight, bias, self.eps)
        return y, [Moments(*(a[i] for a in each)) for i in range(len(layers))]


class BatchRenorm(BatchNorm):
    """y = gamma (x̂ r + d) + beta in training, x̂ by the batch's mean μ and σ = √(var + eps).
    Ioffe 2017

    x: (N, C, *S); gamma, beta and the running statistics: (C,).
    r = σ/σ_run clipped to [1/r_max, r_max] and d = (μ − μ_run)/σ_run clipped to [−d_max, d_max],
    both taken as constants by the gradient. Within the limits y is what evaluation would give.
    ``r_max`` and ``d_max`` may be changed while training (the paper goes from 1 and 0, which is
    batch norm, to 3 and 5). Keeps x, gamma r, mean and 1/σ. Raises ValueError for r_max below 1 or
    a negative d_max.
    """

    def __init__(self, num_features: int, eps: float = 1e-3, momentum: float | None = _SLOW, *,
                 r_max: float = 3.0, d_max: float = 5.0, **settings: Any) -> None:
        super().__init__(num_features, eps, momentum, **settings)
        self.r_max, self.d_max = r_max, d_max
        self._check_limits()
        if self.running_mean is None:
            raise ValueError("BatchRenorm: expected track_running_stats=True")

    def _check_limits(self) -> None:
        if not at_least(self.r_max, 1) or not at_least(self.d_max, 0):
            raise ValueError("BatchRenorm: expected r_max of at least 1 and d_max of at least 0, "
                             f"got {self.r_max!r} and {self.d_max!r}")

    def _is_plain(self) -> bool:
        return not self.training and super()._is_plain()

    def _by_batch(self, x: Tensor, residual: Tensor | None, activation: str | None,
                  mask: Any) -> tuple[Tensor, Moments]:
        if not self.training:
            return super()._by_batch(x, residual, activation, mask)
        found = ops.moments(x, mask=mask)
        if self.workers is not None:
            found = self.workers.merge(found)
        r, d = self._limits(found)
        weight = r if self.weight is None else self.weight * r
        shift = d if self.weight is None else self.weight * d
        bias = shift if self.bias is None else self.bias + shift
        y, _ = ops.weighted_batch_norm(x, weight, bias, self.eps, mask=mask,
                                       workers=self.workers)
        return finish(y, residual, activation), found

    def _limits(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """r and d of each channel."""
        self._check_limits()                         # which may be changed at any time
        known, var = self._known()
        dtype, mean = known.dtype, known.data.astype(np.float64)
        with np.errstate(all="ignore"):
            own = np.sqrt(var.data.astype(np.float64) + self.eps)
            r = np.clip(np.sqrt(batch.var() + self.eps) / own, 1 / self.r_max, self.r_max)
            d = np.clip((batch.mean - mean) / own, -self.d_max, self.d_max)
        r, d = np.where(batch.count > 0, r, 1.0), np.where(batch.count > 0, d, 0.0)
        return as_tensor(r.astype(dtype)), as_tensor(d.astype(dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}"
