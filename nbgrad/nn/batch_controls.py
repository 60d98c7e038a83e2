"""Batch norm with one thing changed: the controls that show which of its parts does what."""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor, as_tensor

from .batch_norm import BatchNorm, there
from .norm import MOMENTUM, at_least
from .running import RunningNorm

__all__ = ["LpBatchNorm", "MeanOnlyBatchNorm", "NoisyBatchNorm"]


class LpBatchNorm(RunningNorm):
    """y = gamma (x − mean) / s + beta,  s = c_p (mean |x − mean|^p + eps^(p/2))^(1/p) per channel;
    for p = inf, c (max |x − mean| + √eps).      Hoffer et al. 2018; Santurkar et al. 2018

    x: (N, C, *S).  c_p makes s an estimate of the standard deviation of normal x: √(π/2) for p = 1.
    eps is a floor of the variance as in batch norm, which p = 2 is. ``centered=False``: s of |x|
    instead of |x − mean|, as Santurkar et al. have it. Training: mean and s of the batch, towards
    which the running ones move; evaluation: the running ones.

    average, like, update, on_nonfinite: as in ``BatchNorm``; for ``update="step"``, the mean over
    all values between two steps. statistics: "batch", or "frozen", the running ones in training.

    Buffers: running_mean, running_scale (of s, eps included), num_batches_tracked. Keeps x, gamma,
    mean and s; for a p that is no whole number, x − mean, |x − mean| and its powers. Raises
    ValueError for p below 1, eps not above 0, and one value per channel in training.

    >>> import math, nbgrad
    >>> layer = LpBatchNorm(1, p=math.inf)
    >>> y = layer(nbgrad.tensor([[1.0], [2.0], [9.0]]))
    >>> (y / y.abs().max()).tolist()
    [[-0.6000000238418579], [-0.4000000059604645], [1.0]]
    """

    running_mean: Tensor
    running_scale: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM, *,
                 p: float = 1, centered: bool = True, affine: bool = True,
                 dtype: Any = np.float32, **policies: Any) -> None:
        if not isinstance(p, (int, float)) or not p >= 1:
            raise ValueError(f"LpBatchNorm: p must be at least 1, or inf, got {p!r}")
        if not at_least(eps, 0) or eps == 0:
            raise ValueError(f"LpBatchNorm: eps must be positive, got {eps}")
        super().__init__(num_features, eps, momentum, affine=affine, dtype=dtype, **policies,
                         starts={"running_mean": 0.0, "running_scale": 1.0})
        self.p, self.centered = p, centered

    def _normalized(self, x: Tensor) -> Tensor:
        if not self._by_batch:
            return self._infer(x, self.running_mean, self.running_scale.data)
        y, mean, scale = ops.lp_batch_norm(x, *self._gains(x), self.p, self.eps,
                                           centered=self.centered)
        self._move(x, running_mean=mean, running_scale=scale)
        return y

    def extra_repr(self) -> str:
        text = f"{self.num_features}, p={self.p}, eps={self.eps}, {self._told()}"
        return text + f", affine={self.affine}" + ("" if self.centered else ", centered=False")


class MeanOnlyBatchNorm(RunningNorm):
    """y = x − mean + beta per channel: for layers whose weight is normalized (``weight_norm``),
    which already fixes the scale.      Salimans & Kingma 2016

    x: (N, C, *S).  Training: the mean of the batch, towards which the running one moves;
    evaluation: the running one. Keeps nothing. There is no eps.

    average, like, update, on_nonfinite: as in ``BatchNorm``; for ``update="step"``, the mean over
    all values between two steps. statistics: "batch", or "frozen", the running ones in training.

    Buffers: running_mean, num_batches_tracked. Raises ValueError for one value per channel in
    training.

    >>> import nbgrad
    >>> MeanOnlyBatchNorm(1)(nbgrad.tensor([[1.0], [5.0]])).tolist()
    [[-2.0], [2.0]]
    """

    running_mean: Tensor

    def __init__(self, num_features: int, *, momentum: float | None = MOMENTUM, bias: bool = True,
                 dtype: Any = np.float32, **policies: Any) -> None:
        super().__init__(num_features, 0.0, momentum, bias=bias, dtype=dtype, **policies,
                         starts={"running_mean": 0.0})
        self.weight = None

    def _normalized(self, x: Tensor) -> Tensor:
        if not self._by_batch:
            return self._infer(x, self.running_mean)
        y, mean = ops.center(x, *self._gains(x)[1:])
        self._move(x, running_mean=mean.data)
        return y

    def extra_repr(self) -> str:
        return f"{self.num_features}, {self._told()}, bias={self.bias is not None}"


class NoisyBatchNorm(BatchNorm):
    """Batch norm, and in training noise that is not stable from step to step: y ← s y + m.
    Santurkar et al. 2018, appendix

    In every forward, for each channel, a mean a ~ U(−mean_range, mean_range) and a scale
    b ~ U(1, scale_range); then, for each sample of it, m ~ U(a − mean_jitter, a + mean_jitter) and
    s ~ N(b, scale_jitter). The distribution that the next layer sees shifts more than it would
    without batch norm, and yet training is not hurt. Evaluation: batch norm.

    x: (N, C, *S). ``generator`` draws the noise. Keeps what batch norm keeps, its y and s.
    Other arguments, and the buffers, are those of ``BatchNorm2d``. Raises ValueError for ranges
    and jitters that are negative or not finite, or scale_range below 1.

    >>> import nbgrad
    >>> layer, x = NoisyBatchNorm(3), nbgrad.randn(5, 3)
    >>> bool((layer(x) == layer(x)).any()), bool((layer.eval()(x) == layer(x)).all())
    (False, True)
    """

    _ndims = (2, 3, 4, 5)

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM, *,
                 mean_range: float = 0.5, scale_range: float = 1.25,
                 mean_jitter: float = 0.1, scale_jitter: float = 0.1,
                 generator: ops.Generator | None = None, **settings: Any) -> None:
        self._noise = {"mean_range": mean_range, "scale_range": scale_range,
                       "mean_jitter": mean_jitter, "scale_jitter": scale_jitter}
        for name, value in self._noise.items():
            least = 1 if name == "scale_range" else 0
            if not (at_least(value, least) and value < math.inf):
                raise ValueError(f"NoisyBatchNorm: {name} must be finite and at least {least}, got "
                                 f"{value!r}")
        if generator is not None and not isinstance(generator, ops.Generator):
            raise TypeError("NoisyBatchNorm: expected generator to be an nbgrad.Generator or None, "
                            f"got {generator!r}")
        self.generator = generator
        super().__init__(num_features, eps, momentum, **settings)

    def forward(self, x: Tensor, *, mask: Any = None) -> Tensor:  # type: ignore[override]
        y = super().forward(x, mask=mask)
        if not self.training:
            return y
        scale, shift = self._drawn(*y.shape[:2])
        shape = y.shape[:2] + (1,) * (y.ndim - 2)
        y = y * as_tensor(scale.reshape(shape), y.dtype) + as_tensor(shift.reshape(shape), y.dtype)
        return y if mask is None else there(y, mask)

    def _drawn(self, N: int, C: int) -> Any:
        """s and m for each sample and channel."""
        rng, n = (self.generator or ops.default_generator).numpy, self._noise
        a = rng.uniform(-n["mean_range"], n["mean_range"], C)
        b = rng.uniform(1, n["scale_range"], C)
        m = a + rng.uniform(-n["mean_jitter"], n["mean_jitter"], (N, C))
        return rng.normal(b, n["scale_jitter"], (N, C)), m

    def extra_repr(self) -> str:
        return super().extra_repr() + "".join(f", {k}={v}" for k, v in self._noise.items())
