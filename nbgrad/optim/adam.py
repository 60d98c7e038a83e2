"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, bump
from nbgrad.backend import full, is_array, kernels, move, refuse_captured

from .optimizer import Optimizer, Params

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps),
    m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ);  g includes weight_decay p.      Kingma & Ba 2015

    State per parameter: step (t), exp_avg (m), exp_avg_sq (v). There is no ``amsgrad``.
    ``capturable``: on a GPU t is counted there, as ``nbgrad.cuda.graph`` needs it; 1 − βᵗ is then
    the device's float64, which may differ from the host's in the last bits. ``state_dict()`` has
    t as a number either way. On the CPU it has no effect.
    """

    _decoupled = False
    _buffers = ("exp_avg", "exp_avg_sq")
    _state_names = ("step", *_buffers)

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0, *, maximize: bool = False,
                 capturable: bool = False) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "maximize": maximize,
                                  "capturable": capturable})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["eps"] >= 0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']}")
        if not isinstance(group["capturable"], bool):
            raise ValueError(f"capturable must be True or False, got {group['capturable']!r}")
        for i, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        counted = group["capturable"] and params[0].device != "cpu"
        states = [self._own(p, counted) for p in params]
        if not counted:
            refuse_captured(f"{type(self).__name__}.step() without capturable=True, which counts "
                            "steps on the host,")
            for own in states:
                own["step"] += 1
        kernels(params[0]).adam_step(
            [p.data for p in params], self._gradients(params, group),
            [own["exp_avg"] for own in states], [own["exp_avg_sq"] for own in states],
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            weight_decay=group["weight_decay"], decoupled=self._decoupled,
            steps=[own["step"] for own in states], plans=self._plans_of(group))
        bump(*params)

    def _own(self, p: Tensor, counted: bool) -> dict[str, Any]:
        """p's state, made at its first step; its count is on the device if it is to be ``counted``.
        """
        own = self.state.get(p)
        if own is not None and isinstance(own["step"], int) != counted:
            return own
        refuse_captured(f"{type(self).__name__}.step() that makes a parameter's state (let warm-up "
                        "steps make it)")
        if own is None:
            own = self.state[p] = {"step": 0, "exp_avg": np.zeros_like(p.data),
                                   "exp_avg_sq": np.zeros_like(p.data)}
        own["step"] = full((), own["step"], np.int64, p.data) if counted else _number(own)
        return own

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        for own in saved["state"].values():
            own["step"] = _number(own)
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    self._own(p, group["capturable"] and p.device != "cpu")


def _number(own: dict[str, Any]) -> int:
    """How many steps a state counts."""
    step = own["step"]
    return int(move(step, "cpu")) if is_array(step) else step


class AdamW(Adam):
    """Adam with p ← (1 − lr weight_decay) p beside the gradient step, not in it.
    Loshchilov & Hutter 2019"""

    _decoupled = True

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, *, maximize: bool = False,
                 capturable: bool = False) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize,
                         capturable=capturable)
