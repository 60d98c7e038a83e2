"""How batch-norm layers average statistics, and workers that share them.

An average is a rule that says how far the running value moves towards the t-th batch's; every usual
one is of that form.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import numpy as np

from nbgrad.backend import device_of, move
from nbgrad.ops import Moments

__all__ = ["Average", "Cumulative", "DebiasedExponential", "Exponential", "InProcess", "PRESETS"]

Array = np.ndarray[Any, Any]


class Average(Protocol):
    """running ← running + momentum(t) · (batch's − running), t = 1, 2, … since the last reset."""

    def momentum(self, t: int) -> float: ...


def _check_decay(owner: Any) -> None:
    if not isinstance(owner.decay, Real) or not 0 <= float(owner.decay) < 1:         # NaN too
        raise ValueError(f"{type(owner).__name__}: decay must be from 0 to below 1, "
                         f"got {owner.decay!r}")


@dataclass(frozen=True)
class Exponential:
    """running ← decay · running + (1 − decay) · batch. PyTorch's momentum is 1 − decay, Keras' is
    decay. Starts from mean 0 and variance 1, which the first 1/(1 − decay) batches remember.

    >>> Exponential(decay=0.75).momentum(t=10)
    0.25
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        _check_decay(self)

    def momentum(self, t: int) -> float:
        return 1 - self.decay


@dataclass(frozen=True)
class DebiasedExponential:
    """The exponential average without its start: weights decayⁱ over the batches seen, normalized
    to 1 (as Adam's, Kingma & Ba 2015). momentum = (1 − decay) / (1 − decayᵗ).

    >>> [DebiasedExponential(decay=0.5).momentum(t) for t in (1, 2)]
    [1.0, 0.6666666666666666]
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        _check_decay(self)

    def momentum(self, t: int) -> float:
        return (1 - self.decay) / (1 - self.decay ** t)


@dataclass(frozen=True)
class Cumulative:
    """The average of all batches: PyTorch's ``momentum=None``. momentum = 1 / t."""

    def momentum(self, t: int) -> float:
        return 1 / t


# what `like=` sets; the correction is that of the running variance, the batch is always normalized
# with its biased one
PRESETS: dict[str, dict[str, Any]] = {
    "torch": {"eps": 1e-5, "average": Exponential(0.9), "correction": 1},
    "keras": {"eps": 1e-3, "average": Exponential(0.99), "correction": 0},
}


def steady(average: Average | None, momentum: float | None) -> bool:
    """Whether every batch moves the running values as far: then nobody has to know how many there
    were, which on a device would be to wait for it."""
    return momentum is not None if average is None else type(average) is Exponential


def momenta(momentum: Callable[[int], float], t: int, skipped: Any) -> Any:
    """momentum of the t-th batch, which is an earlier one of channels that ``skipped`` some; a
    number where none did."""
    if np.ndim(skipped) == 0 or not skipped.any():
        return momentum(t)
    own, back = np.unique(t - move(skipped, "cpu"), return_inverse=True)
    each = np.array([momentum(int(n)) for n in own])[back].reshape(skipped.shape)
    return move(each, device_of(skipped))


def fits(values: Any, dtype: Any) -> Any:
    """Where values are finite, and stay so in dtype."""
    with np.errstate(all="ignore"):
        return np.isfinite(values.astype(dtype))


# --------------------------------------------------------------------------- the optimizer's step

_step = 0


def step_taken() -> None:
    """Every optimizer says here that its step is done: statistics collected before belong to it."""
    global _step
    _step += 1


def current_step() -> int:
    return _step


# --------------------------------------------------------------------------------------- workers

class BrokenWorkers(RuntimeError):
    """Some worker did not come, or failed."""


class InProcess:
    """Workers that are threads of this process: ``InProcess(n).rank(i)`` is the i-th one's.

    For tests, and to see what synchronized batch norm computes. A call that some worker does not
    make within ``timeout`` seconds raises RuntimeError in all.

    >>> InProcess(2).run(lambda worker: worker.sum(np.full(1, 1.0 + worker.number)))
    [(array([3.]),), (array([3.]),)]
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        if size < 1:
            raise ValueError(f"InProcess: expected at least 1 worker, got {size}")
        self.size, self.timeout = size, timeout
        self._barrier = threading.Barrier(size)
        self._given: list[Any] = [None] * size

    def rank(self, i: int) -> _Rank:
        """The i-th worker."""
        if not 0 <= i < self.size:
            raise ValueError(f"InProcess: rank must be from 0 to {self.size - 1}, got {i}")
        return _Rank(self, i)

    def run(self, work: Callable[[_Rank], Any]) -> list[Any]:
        """work(worker) in a thread for each; their results by rank. Raises the first error; the
        others do not wait for the worker that has it."""
        self._barrier.reset()

        def one(worker: _Rank) -> Any:
            try:
                return work(worker)
            except BaseException:
                self._barrier.abort()
                raise
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(one, self.rank(i)) for i in range(self.size)]
        errors = [e for e in (future.exception() for future in futures) if e is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, BrokenWorkers)):
            raise error
        return [future.result() for future in futures]

    def exchange(self, i: int, own: Any) -> list[Any]:
        """What each worker gave, by rank."""
        self._given[i] = own
        try:
            self._barrier.wait(self.timeout)
            given = list(self._given)
            self._barrier.wait(self.timeout)          # nobody gives anew before all have read
        except threading.BrokenBarrierError:
            raise BrokenWorkers(f"InProcess: not all of {self.size} workers called within "
                                f"{self.timeout} s, or one of them failed") from None
        return given


class _Rank:
    """One worker; see nbgrad.ops.Workers."""

    def __init__(self, group: InProcess, rank: int) -> None:
        self.group, self.number = group, rank

    def merge(self, own: Moments) -> Moments:
        first, *others = self.group.exchange(self.number, own)
        return first.merge(*others)  # type: ignore[no-any-return]

    def sum(self, *own: Array) -> tuple[Array, ...]:
        given = self.group.exchange(self.number, own)
        return tuple(_in_order(parts) for parts in zip(*given))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rank:
        return self                                   # a copied model belongs to the same worker


def _in_order(parts: Any) -> Any:
    total = np.array(parts[0], copy=True)
    for part in parts[1:]:
        total += part
    return total
