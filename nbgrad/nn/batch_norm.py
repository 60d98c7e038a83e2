"""Batch normalization: which statistics normalize, and how they are averaged."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import OPS, Tensor, as_tensor, bump
from nbgrad.backend import device_of, move
from nbgrad.ops import Moments
from nbgrad.ops.moments import weights
from nbgrad.ops.norm import check_batch, check_fused

from . import init
from .norm import MOMENTUM, Normalization, Unsaid, check_eps, check_momentum
from .parameter import Parameter, check_sizes
from .policies import check_policies, check_word, imitate
from .statistics import Average, current_step, fits, momenta, steady

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

STATISTICS = ("batch", "running", "frozen", "population", "prediction")


def finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(y + residual), where the kernel has not done it."""
    check_fused(y, residual, activation)
    y = y if residual is None else y + residual
    return ops.relu(y) if activation == "relu" else y


def there(x: Tensor, mask: Any) -> Tensor:
    """x, and 0 where the mask is."""
    return OPS["mask"](x, keep=np.broadcast_to(weights(mask, x.shape) > 0, x.shape))


class BatchNorm(Normalization):
    """y = gamma (x − mean) / √(var + eps) + beta, per channel C.      Ioffe & Szegedy 2015

    x: {shape}.  Training: mean and biased var of this batch, and the running ones move by
    ``momentum`` towards them (var unbiased), or, with ``momentum=None``, become the average of all
    batches. Evaluation: the running ones, or the batch's without ``track_running_stats``. Keeps x,
    gamma, mean and 1/σ, with a mask also that.

    Beyond PyTorch's arguments:

    statistics: which mean and var normalize, in training / in evaluation:
      "batch": the batch's / the running ones;
      "running": the running ones, as constants, which the batch then moves / the running ones;
      "frozen": the running ones, which nothing moves / the running ones;
      "population": the batch's / those that ``nbgrad.train.update_bn`` found over a data set;
      "prediction": the batch's / the batch's (Nado et al. 2020).
    average: ``Exponential(decay)``, ``DebiasedExponential(decay)`` or ``Cumulative()`` instead of
      ``momentum``.
    correction: the running var is M2 / (count − correction); 1 as in PyTorch, 0 as in Keras.
    like: "torch" or "keras" sets eps, average and correction as there, in place of momentum.
    update: "step": the batches between two steps of any optimizer count as one, so that gradient
      accumulation and recomputed activations do not count twice (a batch of n that comes again
      changes the correction, as 2n values); running statistics that normalize in training are
      those with which the step began. "forward": each batch counts.
    on_nonfinite: of a batch whose mean or var, in the running ones' dtype, is NaN or infinite in
      some channels, "propagate" it into their running values, "skip_update" of those channels,
      which average the batches that they have (since a state was loaded), or "raise"
      FloatingPointError.

    Calls take ``mask``: weights w ≥ 0 of samples or positions, (N, *S) or what broadcasts against
    (N, 1, *S); what has weight 0 does not count, and y is 0 there.

    Buffers: running_mean, running_var, num_batches_tracked (int64; state dicts without it load).
    Raises ValueError for a wrong number of dimensions, a wrong C, or one value per channel in
    training, and, at construction, for bad values and words.
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    average: Average | None
    _optional_state = ("num_batches_tracked",)
    _ndims: tuple[int, ...] = (2, 3, 4, 5)
    workers: ops.Workers | None = None
    _pending: tuple[Any, Moments, tuple[Any, Any, int, Any]] | None = None
    _skipped: tuple[int, Any] | None = None           # after t batches, how many each channel lacks
    _thawed: tuple[str, list[bool]] | None = None     # what unfreeze_batch_norm goes back to

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM,
                 affine: bool = True, track_running_stats: bool = True, *, bias: bool = True,
                 statistics: str = "batch", average: Average | None = None, correction: int = 1,
                 like: str | None = None, update: str = "forward", on_nonfinite: str = "propagate",
                 dtype: Any = np.float32) -> None:
        super().__init__()
        check_sizes(type(self).__name__, num_features=num_features)
        check_momentum(self, momentum)
        said = type(momentum) is not Unsaid
        self.num_features, self.eps = num_features, eps
        self.momentum = momentum if said or momentum is None else float(momentum)
        self.affine, self.track_running_stats = affine, track_running_stats
        self.statistics, self.average, self.correction = statistics, average, correction
        self.update, self.on_nonfinite = update, on_nonfinite
        if like is not None:
            imitate(self, like, said)
        elif average is not None and said:
            raise ValueError(f"{type(self).__name__}: give momentum or average, not both")
        check_eps(self, self.eps)
        self._check_words()
        C, track = num_features, track_running_stats
        self.register_parameter("weight", Parameter(np.empty(C, dtype)) if affine else None)
        self.register_parameter("bias", Parameter(np.empty(C, dtype)) if affine and bias else None)
        self.register_buffer("running_mean", as_tensor(np.empty(C, dtype)) if track else None)
        self.register_buffer("running_var", as_tensor(np.empty(C, dtype)) if track else None)
        self.register_buffer("num_batches_tracked",
                             as_tensor(np.zeros((), np.int64)) if track else None)
        self.reset_parameters()

    def _check_words(self) -> None:
        check_policies(self)
        check_word(self, "statistics", STATISTICS)
        if self.statistics in ("running", "frozen", "population") and not self.track_running_stats:
            raise ValueError(f"{type(self).__name__}: statistics={self.statistics!r} needs "
                             "track_running_stats=True")

    def reset_running_stats(self) -> None:
        """mean 0, var 1, no batches."""
        self._pending = self._skipped = None
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

    # ------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *, residual: Tensor | None = None, activation: str | None = None,
                mask: Any = None) -> Tensor:
        """With ``residual`` and ``activation="relu"``: max(y + residual, 0), in one kernel."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: expected a Tensor, got {type(x).__name__}")
        if x.ndim not in self._ndims:
            expected = " or ".join(f"{n}D" for n in self._ndims)
            raise ValueError(f"expected {expected} input (got {x.ndim}D input)")
        if mask is not None or not self._is_plain():
            return self._forward(x, residual, activation, mask)
        return self._plain(x, residual, activation)

    def _plain(self, x: Tensor, residual: Tensor | None, activation: str | None,
               moments: Moments | None = None) -> Tensor:
        """By one kernel; ``moments``: x's, if they are known."""
        mean, var = self._running()
        y = ops.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps,
                           training=self.training or self.running_mean is None,
                           momentum=self._momentum(), residual=residual, activation=activation,
                           moments=moments)
        self._count(y)
        return y

    def _is_plain(self) -> bool:
        """Whether the kernel that normalizes also does all that happens to the statistics."""
        return (self.statistics == "batch" and self.correction == 1 and self.update == "forward"
                and self.on_nonfinite == "propagate" and self.workers is None)

    def _forward(self, x: Tensor, residual: Tensor | None, activation: str | None,
                 mask: Any) -> Tensor:
        by_batch, moves = self._policy()
        self._check(x, residual, activation, mask)
        if by_batch:
            y, batch = self._by_batch(x, residual, activation, mask)
            if moves:
                self._collect(batch)
            return y
        at = x if mask is None else there(x, mask)
        mean, var = self._known()
        y = ops.batch_norm(at, mean, var, self.weight, self.bias, eps=self.eps)
        if moves:
            batch = ops.moments(x, mask=mask)
            self._collect(batch if self.workers is None else self.workers.merge(batch))
        return finish(y if mask is None else there(y, mask), residual, activation)

    def _check(self, x: Tensor, residual: Tensor | None, activation: str | None,
               mask: Any) -> None:
        """Raise what the plain kernel raises, before anything moves."""
        by_batch, moves = self._policy()
        # how many values there are, a mask or all of the workers know
        shape = x.shape if mask is None and self.workers is None else (2, *x.shape[1:])
        check_batch(shape, x.dtype, self.running_mean, self.running_var, self.weight, self.bias,
                    by_batch and (moves or self.running_mean is None), self.eps)
        check_fused(x, residual, activation)

    def _policy(self) -> tuple[bool, bool]:
        """Whether the batch's statistics normalize, and whether they move the running ones."""
        word, tracked = self.statistics, self.track_running_stats and self.running_mean is not None
        check_word(self, "statistics", STATISTICS)   # which may be set at any time
        if self.training:
            return word in ("batch", "population", "prediction"), (
                tracked and word not in ("frozen", "population"))
        if word == "population" and not self.num_batches_tracked.data:  # type: ignore[union-attr]
            raise RuntimeError(f"{type(self).__name__}: evaluation needs the statistics of the "
                               "population: call nbgrad.train.update_bn(model, loader) first")
        return word == "prediction" or self.running_mean is None, False

    def _by_batch(self, x: Tensor, residual: Tensor | None, activation: str | None,
                  mask: Any) -> tuple[Tensor, Moments]:
        if mask is None and self.workers is None:
            return ops.batch_norm(x, None, None, self.weight, self.bias, True, eps=self.eps,
                                  residual=residual, activation=activation, return_moments=True)
        y, batch = ops.weighted_batch_norm(x, self.weight, self.bias, self.eps, mask=mask,
                                           workers=self.workers)
        return finish(y, residual, activation), batch

    # ------------------------------------------------------------------------------------ running

    def _collect(self, batch: Moments) -> None:
        """Move the running statistics towards those of a batch, unless it has none."""
        mean, var, tracked = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert var is not None
        assert tracked is not None
        batch = self._accepted(batch)
        nothing = batch.count <= self.correction     # also of one value: it has no variance
        now = mean.data, var.data
        if self.update == "forward" and steady(self.average, self.momentum):
            mean.data[...], var.data[...] = self._moved(now, batch, self._momentum(1), nothing)
            tracked.data[...] = tracked.data + ~nothing.all()        # without waiting for a device
            bump(mean, var)
            return
        t, skipped = int(tracked.data), 0
        if self._skipped is not None and self._skipped[0] == t:
            skipped = move(self._skipped[1], device_of(batch.count))    # the layer's, if it moved
        if self.update == "step":
            step, pending = self._moment(), self._pending
            if pending is not None and pending[0] == step:
                _, before, start = pending
                batch, now, (t, skipped) = before.merge(batch), start[:2], start[2:]
            else:
                start = now[0].copy(), now[1].copy(), t, skipped
        if nothing.all():
            return
        m = momenta(self._momentum, t + 1, skipped)
        mean.data[...], var.data[...] = self._moved(now, batch, m, nothing)
        tracked.data[...] = t + 1
        self._skipped = t + 1, skipped + nothing.astype(np.int64)
        bump(mean, var)
        if self.update == "step":                    # whoever writes to the mean starts it anew
            self._pending = self._moment(), batch, start

    def _known(self) -> tuple[Tensor, Tensor]:
        """The running mean and var that normalize: what they were when this step began, where its
        batches count as one, so that a forward pass that is recomputed gives what it gave."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        pending = self._pending if self.training and self.update == "step" else None
        if pending is None or pending[0] != self._moment():
            return mean, var
        return as_tensor(pending[2][0]).to(mean.dtype), as_tensor(pending[2][1]).to(mean.dtype)

    def _moment(self) -> tuple[int, list[Any]]:
        """Of the optimizer's step and of the running statistics, as _pending remembers it."""
        assert self.running_mean is not None
        return current_step(), list(self.running_mean._version or ())

    def _accepted(self, batch: Moments) -> Moments:
        """The batch, by ``on_nonfinite`` without channels that are not finite."""
        var = np.where(batch.count > self.correction, batch.var(self.correction), batch.m2)
        dtype = var.dtype if self.running_mean is None else self.running_mean.dtype
        bad = ~(fits(batch.mean, dtype) & fits(var, dtype)) & (batch.count > 0)
        if self.on_nonfinite == "raise" and bad.any():
            where = ", ".join(map(str, np.flatnonzero(bad)[:8]))
            raise FloatingPointError(f"{type(self).__name__}: the batch's mean or variance is not "
                                     f"finite in channels {where}; the running ones are unchanged")
        if self.on_nonfinite == "skip_update":
            return Moments(*(np.where(bad, 0.0, a) for a in batch))
        return batch

    def _moved(self, now: Any, batch: Moments, m: Any, nothing: Any) -> tuple[Any, Any]:
        found = batch.mean, batch.var(self.correction)
        with np.errstate(all="ignore"):
            mean, var = (np.where(nothing, a, (1 - m) * a + m * b) for a, b in zip(now, found))
        return mean, var

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics that this call reads or moves."""
        if self.training and not self.track_running_stats:
            return None, None
        return self.running_mean, self.running_var

    def _momentum(self, t: int | None = None) -> float:
        """Of the t-th batch; without t, of the next."""
        if self.average is None and self.momentum is not None:
            return self.momentum
        tracked = self.num_batches_tracked
        if not (self.training and self.track_running_stats and tracked is not None):
            return 0.0
        t = int(tracked.data) + 1 if t is None else t
        return 1.0 / t if self.average is None else self.average.momentum(t)

    def _count(self, y: Tensor) -> None:
        """After the op, so that a rejected batch is not counted; nor is an empty one."""
        tracked = self.num_batches_tracked
        if tracked is not None and self.training and self.track_running_stats and y.data.size:
            if tracked.device == "cpu":
                tracked.data[()] = tracked.data.item() + 1
            else:
                tracked.data += 1                    # without waiting for the device

    # ------------------------------------------------------------------------------------- fusion

    def follows(self, x: Any, linear: Any) -> bool:
        """Whether ``of_linear`` says what this module would say of linear(x)."""
        return (self.training and isinstance(x, Tensor) and x.ndim == 2 and 2 in self._ndims
                and self._is_plain())

    def of_linear(self, x: Tensor, linear: Any, activation: str | None) -> Tensor:
        """activation(self(linear(x))) as one op."""
        mean, var = self._running()
        y = ops.linear_batch_norm(x, linear.weight, linear.bias, mean, var, self.weight, self.bias,
                                  self._momentum(), self.eps, activation)
        self._count(y)
        return y

    def of_conv(self, x: Tensor, conv: Any, residual: Tensor | None = None,
                activation: str | None = None) -> Tensor:
        """activation(self(conv(x)) + residual) of a Conv2d. In training the statistics are taken by
        the convolution's kernel from its own output, where that costs less than to read it again.
        """
        if not (self.training and isinstance(x, Tensor) and x.ndim == 4
                and 4 in self._ndims and self._is_plain()):
            return self.forward(conv.forward(x), residual=residual, activation=activation)
        y, moments = conv.with_moments(x)
        return self._plain(y, residual, activation, moments)

    def extra_repr(self) -> str:
        rule = "momentum" if self.average is None else "average"
        text = (f"{self.num_features}, eps={self.eps}, {rule}={getattr(self, rule)}, "
                f"affine={self.affine}, bias={self.bias is not None}, "
                f"track_running_stats={self.track_running_stats}")
        more = {"statistics": "batch", "correction": 1, "update": "forward",
                "on_nonfinite": "propagate"}
        return text + "".join(f", {name}={getattr(self, name)!r}" for name, usual in more.items()
                              if getattr(self, name) != usual)


_TEXT = BatchNorm.__doc__ or ""
BatchNorm.__doc__ = _TEXT.replace("{shape}", "(N, C, *) of 2 to 5 dimensions")


class BatchNorm1d(BatchNorm):
    __doc__ = _TEXT.replace("{shape}", "(N, C) or (N, C, L)")
    _ndims = (2, 3)


class BatchNorm2d(BatchNorm):
    __doc__ = _TEXT.replace("{shape}", "(N, C, H, W)")
    _ndims = (4,)


class BatchNorm3d(BatchNorm):
    __doc__ = _TEXT.replace("{shape}", "(N, C, D, H, W)")
    _ndims = (5,)
