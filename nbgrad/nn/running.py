"""The base of layers that normalize by the batch in training and by running averages otherwise."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, bump
from nbgrad.backend import full, is_half, move
from nbgrad.ops.norm import batch_norm_inference
from nbgrad.ops.norm.channels import check_channels, check_count

from . import init
from .norm import MOMENTUM, Normalization, Unsaid, check_eps, check_momentum
from .parameter import Parameter, check_sizes
from .policies import check_policies, check_word, imitate
from .statistics import Average, current_step, fits, momenta, steady

Found = dict[str, tuple[Any, Any]]                   # values, and how many each is the mean of
STATISTICS = ("batch", "frozen")

__all__ = ["ChannelNorm", "RunningNorm", "keeps_statistics"]


def keeps_statistics(module: Any) -> bool:
    """Whether it evaluates by running statistics, and is no batch norm: what they are of is then
    the layer's own matter."""
    return isinstance(module, RunningNorm) and module.num_batches_tracked is not None


class ChannelNorm(Normalization):
    """Base: gamma ``weight`` and beta ``bias``, (num_features,) each, and a check of x."""

    weight: Parameter | None
    bias: Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-5, *, affine: bool = True,
                 bias: bool = True, dtype: Any = np.float32) -> None:
        super().__init__()
        check_sizes(type(self).__name__, num_features=num_features)
        check_eps(self, eps)
        self.num_features, self.eps, self.affine = num_features, eps, affine
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            self.register_parameter(name, self._vector(0, dtype) if wanted else None)

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
    or, with ``momentum=None``, become the average of all batches; read in evaluation.

    average, like, update, on_nonfinite, correction: as in ``BatchNorm``; the last is of layers with
    a running variance. Between two steps of an optimizer, ``update="step"`` takes the mean over all
    values seen. statistics: "batch", or "frozen": the running ones in training, too, and nothing
    moves them. starts: the running statistics by name, and where they start; None: there are none,
    and evaluation is as training.
    """

    num_batches_tracked: Tensor | None
    average: Average | None
    _optional_state = ("num_batches_tracked",)
    _pending: tuple[Any, Found, dict[str, Any], int, dict[str, Any]] | None = None
    _skipped: tuple[int, dict[str, Any]] | None = None    # as in BatchNorm, of each statistic
    _thawed: tuple[str, list[bool]] | None = None         # what unfreeze_batch_norm goes back to

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = MOMENTUM, *,
                 starts: dict[str, Any], affine: bool = True, bias: bool = True,
                 statistics: str = "batch", average: Average | None = None,
                 correction: int | None = None, like: str | None = None, update: str = "forward",
                 on_nonfinite: str = "propagate", dtype: Any = np.float32) -> None:
        super().__init__(num_features, eps, affine=affine, bias=bias, dtype=dtype)
        check_momentum(self, momentum)
        self.statistics, self._corrects = statistics, "running_var" in starts
        if correction is not None and not self._corrects:
            raise ValueError(f"{type(self).__name__}: there is no running variance to correct")
        said = type(momentum) is not Unsaid
        self.momentum = momentum if said or momentum is None else float(momentum)
        self.average, self.correction = average, 1 if correction is None else correction
        self.update, self.on_nonfinite = update, on_nonfinite
        tracked = all(start is not None for start in starts.values())
        self._starts = starts if tracked else {}
        if like is not None:
            imitate(self, like, said)
        elif average is not None and said:
            raise ValueError(f"{type(self).__name__}: give momentum or average, not both")
        check_eps(self, self.eps)
        check_policies(self)
        check_word(self, "statistics", STATISTICS)
        if statistics == "frozen" and not tracked:
            raise ValueError(f"{type(self).__name__}: statistics='frozen' needs "
                             "track_running_stats=True")
        for name, start in starts.items():             # a number: one such per channel
            shape = np.shape(start) or (num_features,)
            buffer = as_tensor(np.full(shape, start, dtype)) if tracked else None
            self.register_buffer(name, buffer)
        self.register_buffer("num_batches_tracked",
                             as_tensor(np.zeros((), np.int64)) if tracked else None)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """As at construction."""
        self._pending = self._skipped = None
        if self.num_batches_tracked is None:
            return
        for name, start in {**self._starts, "num_batches_tracked": 0}.items():
            buffer = getattr(self, name)
            buffer.data[...] = start
            bump(buffer)

    def reset_parameters(self) -> None:
        """gamma 1, beta 0, and ``reset_running_stats``."""
        super().reset_parameters()
        self.reset_running_stats()

    @property
    def _by_batch(self) -> bool:
        """Whether x's own statistics normalize, and move the running ones."""
        check_word(self, "statistics", STATISTICS)           # which may be set at any time
        return self.training and self.statistics == "batch"

    def _check(self, x: Any) -> None:
        super()._check(x)
        if self._by_batch:
            check_count(type(self).__name__, x)

    def _move(self, x: Tensor, *, of: int | None = None, **found: Any) -> None:
        """Towards what was found in x, if there was anything in it. ``of``: how many things each is
        the mean of, if not all of a channel's values."""
        if not x.data.size:
            return
        assert self.num_batches_tracked is not None
        found = {name: np.reshape(value, getattr(self, name).shape)
                 for name, value in found.items()}
        if self.update == "forward" and self.on_nonfinite == "propagate":
            seen: Any = self.num_batches_tracked.data
            if not steady(self.average, self.momentum):      # or else a device is not waited for
                seen = int(seen)
            self._write({name: (value, 1.0) for name, value in found.items()}, seen + 1)
            return
        t = int(self.num_batches_tracked.data)
        if self.on_nonfinite != "propagate":         # what overflows in the buffer is infinite
            found = {name: np.where(fits(value, getattr(self, name).dtype), value, np.inf)
                     for name, value in found.items()}
        counted = self._counted(found, x.data.size // x.shape[1] if of is None else of)
        start = {name: getattr(self, name).data.copy() for name in found}
        skipped = {}
        if self._skipped is not None and self._skipped[0] == t:
            skipped = {name: move(n, x.device) for name, n in self._skipped[1].items()}
        if self.update == "step" and self._pending is not None and (
                self._pending[0] == self._moment()):
            _, before, start, t, skipped = self._pending
            counted = {name: _together(before[name], counted[name]) for name in counted}
        if not any((count > 0).any() for _, count in counted.values()):
            return
        self._write(counted, t + 1, start, skipped)
        self._skipped = t + 1, {name: skipped.get(name, 0) + (count == 0).astype(np.int64)
                                for name, (_, count) in counted.items()}
        if self.update == "step":
            self._pending = self._moment(), counted, start, t, skipped

    def _write(self, found: Found, t: Any, start: dict[str, Any] | None = None,
               skipped: dict[str, Any] | None = None) -> None:
        """Values with their counts; where nothing is counted, nothing moves."""
        self.num_batches_tracked.data[...] = t  # type: ignore[union-attr]
        for name, (value, count) in found.items():
            m = momenta(self._momentum, t, (skipped or {}).get(name, 0))
            buffer = getattr(self, name)
            now = buffer.data if start is None else start[name]
            with np.errstate(all="ignore"):          # a statistic may be no float32
                moved = (1 - m) * now + m * value
                buffer.data[...] = moved if start is None else np.where(count > 0, moved, now)
            bump(buffer)

    def _momentum(self, t: int) -> float:
        if self.average is not None:
            return self.average.momentum(t)
        return 1 / t if self.momentum is None else self.momentum

    def _moment(self) -> tuple[int, list[list[int]]]:
        """Of the optimizer's step and of the running statistics."""
        return current_step(), [list(getattr(self, name)._version or ()) for name in self._starts]

    def _counted(self, found: dict[str, Any], n: int) -> Found:
        """With counts of n, or, by ``on_nonfinite``, of 0 in the channels, or groups of channels,
        in which some value is not finite."""
        if self.on_nonfinite == "propagate":
            return {name: (value, full(value.shape, float(n), np.float64, value))
                    for name, value in found.items()}
        C = self.num_features
        bad = full((C,), False, bool, next(iter(found.values())))
        for value in found.values():                 # (C,), or (C / d, d, d) of d channels each
            own = (~np.isfinite(value)).reshape(len(value), -1).any(1)
            bad |= np.repeat(own, C // max(len(value), 1))
        if self.on_nonfinite == "raise" and bad.any():
            where = ", ".join(map(str, np.flatnonzero(bad)[:8]))
            raise FloatingPointError(f"{type(self).__name__}: the batch's statistics are not "
                                     f"finite in channels {where}; the running ones are unchanged")
        counted = {}
        for name, value in found.items():
            own = bad.reshape(len(value), -1).any(1).reshape(-1, *[1] * (value.ndim - 1))
            count = np.broadcast_to(np.where(own, 0.0, float(n)), value.shape)
            counted[name] = np.where(own, 0.0, value), count
        return counted

    def forward(self, x: Tensor) -> Tensor:
        """Halves in float32, and rounded once."""
        self._check(x)
        return self._normalized(x.float() if is_half(x.dtype) else x).to(x.dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        """y of an x that is no half and has been checked."""
        raise NotImplementedError

    def _gains(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta in x's dtype."""
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return weight, bias

    def _infer(self, x: Tensor, mean: Tensor, scale: Any = None) -> Tensor:
        """gamma (x − mean) / scale + beta, in one kernel."""
        mu = mean.data.astype(np.float64)
        with np.errstate(all="ignore"):
            invstd = np.ones_like(mu) if scale is None else 1 / scale.astype(np.float64)
        return batch_norm_inference(x, *self._gains(x), None, mean=mu, invstd=invstd)

    def _told(self) -> str:
        """How statistics are averaged, for extra_repr."""
        text = "".join(f", {name}={getattr(self, name)!r}" for name, usual in
                       {"statistics": "batch", "correction": 1, "update": "forward",
                        "on_nonfinite": "propagate"}.items() if getattr(self, name) != usual)
        return (f"momentum={self.momentum}" if self.average is None else
                f"average={self.average}") + text

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, {self._told()}, affine={self.affine}"


def _together(a: Any, b: Any) -> Any:
    """The mean of two values by their counts, and both counts."""
    n = a[1] + b[1]
    with np.errstate(all="ignore"):
        return np.where(n > 0, a[0] + (b[0] - a[0]) * b[1] / np.where(n > 0, n, 1.0), a[0]), n
