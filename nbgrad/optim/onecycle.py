"""The one-cycle schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .optimizer import Optimizer
from .schedule import LRScheduler, _per_group, _positive

__all__ = ["OneCycleLR"]

PerGroup = float | Sequence[float]


class OneCycleLR(LRScheduler):
    """Up from max_lr / div_factor to max_lr in pct_start of the steps, then down to
    max_lr / (div_factor · final_div_factor); ``three_phase`` comes down the way it went up first.
    Momentum (SGD) or β₁ (Adam) goes the other way, between max_momentum and base_momentum.
    Smith & Topin 2018

    Step after every batch. Raises ValueError when stepped more than ``total_steps`` times.
    """

    def __init__(self, optimizer: Optimizer, max_lr: PerGroup, total_steps: int | None = None,
                 epochs: int | None = None, steps_per_epoch: int | None = None,
                 pct_start: float = 0.3, anneal_strategy: str = "cos", cycle_momentum: bool = True,
                 base_momentum: PerGroup = 0.85, max_momentum: PerGroup = 0.95,
                 div_factor: float = 25.0, final_div_factor: float = 1e4, three_phase: bool = False,
                 last_epoch: int = -1) -> None:
        self.total_steps = _total_steps(total_steps, epochs, steps_per_epoch)
        if not 0 <= pct_start <= 1:
            raise ValueError(f"Expected float between 0 and 1 pct_start, but got {pct_start}")
        if anneal_strategy not in _ANNEAL:
            raise ValueError("anneal_strategy must be one of 'cos' or 'linear', instead got "
                             f"{anneal_strategy}")
        self.anneal = _ANNEAL[anneal_strategy]
        self.max_lrs = _per_group("max_lr", optimizer, max_lr)
        self.final_div_factor = final_div_factor
        self.momentum = _momentum_option(optimizer) if cycle_momentum else None
        self.momenta = [{"high": high, "low": low} for high, low in zip(
            _per_group("max_momentum", optimizer, max_momentum),
            _per_group("base_momentum", optimizer, base_momentum))]
        self.phases = _phases(self.total_steps, pct_start, three_phase)
        if last_epoch == -1:
            for group, lr in zip(optimizer.param_groups, self.max_lrs):
                group["initial_lr"] = lr / div_factor
        super().__init__(optimizer, last_epoch)

    def _phase(self, step: int) -> tuple[_Phase, float]:
        """The phase of a step, and how much of it is done."""
        start = 0.0
        for phase in self.phases:
            if step <= phase.end or phase is self.phases[-1]:
                break
            start = phase.end
        length = phase.end - start                  # 0 where a phase is a single step
        return phase, (step - start) / length if length else 1.0

    def at(self, step: int, base: float, i: int) -> float:
        phase, done = self._phase(step)
        stops = {"low": base, "high": self.max_lrs[i], "end": base / self.final_div_factor}
        return self.anneal(stops[phase.lr[0]], stops[phase.lr[1]], done)

    def options(self, step: int) -> list[dict[str, Any]]:
        if step > self.total_steps:
            raise ValueError(f"Tried to step {step} times. The specified number of total steps is "
                             f"{self.total_steps}")
        options = super().options(step)
        if self.momentum is not None:
            phase, done = self._phase(step)
            for group, own, stops in zip(self.optimizer.param_groups, options, self.momenta):
                m = self.anneal(stops[phase.momentum[0]], stops[phase.momentum[1]], done)
                own[self.momentum] = (m, *group["betas"][1:]) if self.momentum == "betas" else m
        return options


@dataclass(frozen=True)
class _Phase:
    """Its last step, and what the rate and the momentum go from and to."""

    end: float
    lr: tuple[str, str]
    momentum: tuple[str, str]


def _phases(total: int, pct: float, three: bool) -> list[_Phase]:
    up = _Phase(pct * total - 1, ("low", "high"), ("high", "low"))
    if three:
        return [up, _Phase(2 * pct * total - 2, ("high", "low"), ("low", "high")),
                _Phase(total - 1, ("low", "end"), ("high", "high"))]
    return [up, _Phase(total - 1, ("high", "end"), ("low", "high"))]


def _total_steps(total: int | None, epochs: int | None, per_epoch: int | None) -> int:
    if total is not None:
        return _positive("OneCycleLR", "total_steps", total)
    if epochs is None or per_epoch is None:
        raise ValueError("You must define either total_steps OR (epochs AND steps_per_epoch)")
    return (_positive("OneCycleLR", "epochs", epochs)
            * _positive("OneCycleLR", "steps_per_epoch", per_epoch))


def _momentum_option(optimizer: Optimizer) -> str:
    for option in ("betas", "momentum"):
        if option in optimizer.defaults:
            return option
    raise ValueError("optimizer must support momentum or beta1 with `cycle_momentum` option "
                     "enabled")


def _cosine(a: float, b: float, done: float) -> float:
    return b + (a - b) / 2.0 * (1 + math.cos(math.pi * done))


def _linear(a: float, b: float, done: float) -> float:
    return a + (b - a) * done


_ANNEAL = {"cos": _cosine, "linear": _linear}
