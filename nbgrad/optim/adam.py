"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import bump
from nbgrad.backend import kernels, refuse_captured

from .optimizer import Optimizer, Params

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps),
    m̂ = m / (1 − β₁ᵗ), v̂ = v / (1 − β₂ᵗ);  g includes weight_decay p.      Kingma & Ba 2015

    State per parameter: step (t), exp_avg (m), exp_avg_sq (v). There is no ``amsgrad``.
    """

    _decoupled = False
    _buffers = ("exp_avg", "exp_avg_sq")
    _state_names = ("step", *_buffers)

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0, *, maximize: bool = False) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "maximize": maximize})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["eps"] >= 0:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if len(group["betas"]) != 2:
            raise ValueError(f"betas must be two numbers, got {group['betas']}")
        for i, beta in enumerate(group["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        refuse_captured(f"{type(self).__name__}.step(), whose step count is on the host (call it "
                        "after the graph: gradients stay where they are),")
        for p in params:
            if p not in self.state:
                self.state[p] = {"step": 0, "exp_avg": np.zeros_like(p.data),
                                 "exp_avg_sq": np.zeros_like(p.data)}
        states = [self.state[p] for p in params]
        for own in states:
            own["step"] += 1
        kernels(params[0]).adam_step(
            [p.data for p in params], self._gradients(params, group),
            [own["exp_avg"] for own in states], [own["exp_avg_sq"] for own in states],
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
            weight_decay=group["weight_decay"], decoupled=self._decoupled,
            steps=[own["step"] for own in states], plans=self._plans_of(group))
        bump(*params)


class AdamW(Adam):
    """Adam with p ← (1 − lr weight_decay) p beside the gradient step, not in it.
    Loshchilov & Hutter 2019"""

    _decoupled = True

    def __init__(self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2, *, maximize: bool = False) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
