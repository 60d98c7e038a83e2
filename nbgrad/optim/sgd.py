"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import bump
from nbgrad.backend import kernels, refuse_captured

from .optimizer import Optimizer, Params

__all__ = ["SGD"]


class SGD(Optimizer):
    """d = g + weight_decay p;  b ← momentum b + (1 − dampening) d (first step: b ← d); p ← p − lr
    b, or p − lr (d + momentum b) with ``nesterov``.      Sutskever et al. 2013, PyTorch's form

    ``maximize`` climbs: g ← −g. State per parameter: momentum_buffer.
    """

    _buffers = ("momentum_buffer",)

    def __init__(self, params: Params, lr: float = 1e-3, momentum: float = 0, dampening: float = 0,
                 weight_decay: float = 0, nesterov: bool = False, *,
                 maximize: bool = False) -> None:
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["momentum"] >= 0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _update(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        bufs: list[Any] | None = None
        first = [False] * len(params)
        if group["momentum"]:
            state = self.state
            bufs = [state[p].get("momentum_buffer") if p in state else None for p in params]
            first = [buf is None for buf in bufs]
            if True in first:
                refuse_captured("SGD.step() that makes a parameter's momentum (let warm-up steps "
                                "make it)")
            for i, p in enumerate(params if True in first else ()):
                if first[i]:
                    bufs[i] = np.empty_like(p.data)
                    state[p] = {"momentum_buffer": bufs[i]}
        kernels(params[0]).sgd_step(
            [p.data for p in params], self._gradients(params, group), bufs, lr=group["lr"],
            momentum=group["momentum"], dampening=group["dampening"],
            weight_decay=group["weight_decay"], nesterov=group["nesterov"], first=first,
            plans=self._plans_of(group))
        bump(*params)
