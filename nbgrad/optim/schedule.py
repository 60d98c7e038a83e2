"""Learning rate schedules.

A schedule is a function of the step number and a group's initial rate. PyTorch computes the same
values by recursion from the current rate, so that two schedules on one optimizer multiply; here the
last one that steps decides, and a changed ``lr`` is overwritten at the next step. Combine with
SequentialLR.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .optimizer import Optimizer

__all__ = ["ConstantLR", "CosineAnnealingLR", "ExponentialLR", "LRScheduler", "LambdaLR",
           "LinearLR", "MultiStepLR", "SequentialLR", "StepLR", "warmup"]


class LRScheduler:
    """Base class: a subclass defines ``at(step, base, i)``, the rate of group i at a step number,
    given the rate ``base`` at construction. Step number 0 applies from construction on."""

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.optimizer = optimizer
        for i, group in enumerate(optimizer.param_groups):
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise KeyError(f"param 'initial_lr' is not specified in param_groups[{i}] when "
                               "resuming scheduler with last_epoch >= 0")
        self.base_lrs = [float(group["initial_lr"]) for group in optimizer.param_groups]
        self.last_epoch = last_epoch
        self.step()

    def at(self, step: int, base: float, i: int) -> float:
        """The rate of group i at a step number."""
        raise TypeError(f"{type(self).__name__} does not define at(step, base, i)")

    def options(self, step: int) -> list[dict[str, Any]]:
        """What each group's options become at a step number."""
        return [{"lr": self.at(step, base, i)} for i, base in enumerate(self.base_lrs)]

    def step(self) -> None:
        """Go to the next step number."""
        new = self.options(self.last_epoch + 1)
        self.last_epoch += 1
        for group, options in zip(self.optimizer.param_groups, new):
            group.update(options)

    def get_last_lr(self) -> list[float]:
        """The rates of the groups now."""
        return [options["lr"] for options in self.options(self.last_epoch)]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is; its settings are the constructor's."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go there. The optimizer's own state holds the current options. Raises ValueError if the
        number of groups differs."""
        base_lrs = [float(lr) for lr in state_dict["base_lrs"]]
        if len(base_lrs) != len(self.base_lrs):
            raise ValueError(f"{type(self).__name__}: the state has {len(base_lrs)} groups, "
                             f"the optimizer {len(self.base_lrs)}")
        self.last_epoch, self.base_lrs = int(state_dict["last_epoch"]), base_lrs


class LambdaLR(LRScheduler):
    """base · f(t); one function, or one per group."""

    def __init__(self, optimizer: Optimizer,
                 lr_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
                 last_epoch: int = -1) -> None:
        self.lr_lambdas = _per_group("lr_lambda", optimizer, lr_lambda)
        super().__init__(optimizer, last_epoch)

    def at(self, step: int, base: float, i: int) -> float:
        return float(base * self.lr_lambdas[i](step))


class StepLR(LRScheduler):
    """base · gamma^⌊t / step_size⌋"""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1,
                 last_epoch: int = -1) -> None:
        self.step_size, self.gamma = _positive("StepLR", "step_size", step_size), gamma
        super().__init__(optimizer, last_epoch)

    def at(self, step: int, base: float, i: int) -> float:
        return float(base * self.gamma ** (step // self.step_size))


class MultiStepLR(LRScheduler):
    """base · gamma^(number of milestones ≤ t)"""

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1,
                 last_epoch: int = -1) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer, last_epoch)

    def at(self, step: int, base: float, i: int) -> float:
        return float(base * self.gamma ** bisect_right(self.milestones, step))


class ExponentialLR(LRScheduler):
    """base · gammaᵗ"""

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def at(self, step: int, base: float, i: int) -> float:
        return float(base * self.gamma ** step)


class CosineAnnealingLR(LRScheduler):
    """eta_min + (base − eta_min)(1 + cos(π t / T_max)) / 2, periodic.      Loshchilov & Hutter
    2017"""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0,
                 last_epoch: int = -1) -> None:
        self.T_max, self.eta_min = _positive("CosineAnnealingLR", "T_max", T_max), eta_min
        super().__init__(optimizer, last_epoch)

    def at(self, step: int, base: float, i: int) -> float:
        height = (1 + math.cos(math.pi * step / self.T_max)) / 2
        return self.eta_min + (base - self.eta_min) * height


class LinearLR(LRScheduler):
    """base times a factor that goes from start_factor to end_factor in total_iters steps."""

    def __init__(self, optimizer: Optimizer, start_factor: float = 1.0 / 3, end_factor: float = 1.0,
                 total_iters: int = 5, last_epoch: int = -1) -> None:
        if not 0 < start_factor <= 1 or not 0 <= end_factor <= 1:
            raise ValueError("LinearLR: needs 0 < start_factor <= 1 and 0 <= end_factor <= 1, "
                             f"got {start_factor} and {end_factor}")
        self.start_factor, self.end_factor = start_factor, end_factor
        self.total_iters = _positive("LinearLR", "total_iters", total_iters)
        super().__init__(optimizer, last_epoch)

    def at(self, step: int, base: float, i: int) -> float:
        done = min(step, self.total_iters) / self.total_iters
        return base * (self.start_factor + (self.end_factor - self.start_factor) * done)


class ConstantLR(LRScheduler):
    """base · factor for total_iters steps, then base."""

    def __init__(self, optimizer: Optimizer, factor: float = 1.0 / 3, total_iters: int = 5,
                 last_epoch: int = -1) -> None:
        if not 0 <= factor <= 1:
            raise ValueError(f"ConstantLR: factor must be between 0 and 1, got {factor}")
        self.factor, self.total_iters = factor, total_iters
        super().__init__(optimizer, last_epoch)

    def at(self, step: int, base: float, i: int) -> float:
        return base * self.factor if step < self.total_iters else base


class SequentialLR(LRScheduler):
    """The first schedule until the first milestone, then the second with its steps counted from
    there, and so on."""

    def __init__(self, optimizer: Optimizer, schedulers: Sequence[LRScheduler],
                 milestones: Sequence[int], last_epoch: int = -1) -> None:
        if not schedulers or len(milestones) != len(schedulers) - 1:
            raise ValueError("Sequential Schedulers expects number of schedulers provided to be "
                             "one more than the number of milestone points, but got "
                             f"{len(schedulers)} schedulers and {len(milestones)} milestones")
        if any(s.optimizer is not optimizer for s in schedulers):
            raise ValueError("SequentialLR: all schedulers must belong to the optimizer given")
        if sorted(milestones) != list(milestones):
            raise ValueError(f"SequentialLR: milestones must increase, got {list(milestones)}")
        self.schedulers, self.milestones = list(schedulers), list(milestones)
        super().__init__(optimizer, last_epoch)

    def options(self, step: int) -> list[dict[str, Any]]:
        k = bisect_right(self.milestones, step)
        return self.schedulers[k].options(step - self.milestones[k - 1] if k else step)

    def state_dict(self) -> dict[str, Any]:
        """Its own, and those of the schedules."""
        return {**super().state_dict(), "schedulers": [s.state_dict() for s in self.schedulers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go there. Raises ValueError if the number of schedules or groups differs."""
        saved = state_dict["schedulers"]
        if len(saved) != len(self.schedulers):
            raise ValueError(f"SequentialLR: the state has {len(saved)} schedules, "
                             f"this one {len(self.schedulers)}")
        super().load_state_dict(state_dict)
        for scheduler, own in zip(self.schedulers, saved):
            scheduler.load_state_dict(own)


def warmup(scheduler: LRScheduler, steps: int, start_factor: float = 0.01) -> SequentialLR:
    """``scheduler`` after ``steps`` steps in which the rate rises linearly from ``start_factor`` of
    its initial value.

    >>> from nbgrad import nn, optim
    >>> sgd = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    >>> schedule = warmup(CosineAnnealingLR(sgd, T_max=4), steps=2, start_factor=0.5)
    >>> rates = []
    >>> for _ in range(5):
    ...     rates.append(round(sgd.param_groups[0]["lr"], 3))
    ...     schedule.step()
    >>> rates
    [0.5, 0.75, 1.0, 0.854, 0.5]
    """
    rise = LinearLR(scheduler.optimizer, start_factor, total_iters=steps)
    return SequentialLR(scheduler.optimizer, [rise, scheduler], [steps])


def _per_group(name: str, optimizer: Optimizer, value: Any) -> list[Any]:
    groups = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [value] * groups
    if len(value) != groups:
        raise ValueError(f"{name} must have the same length as optimizer.param_groups: "
                         f"expected {groups}, got {len(value)}")
    return list(value)


def _positive(owner: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{owner}: Expected positive integer {name}, but got {value}")
    return value
