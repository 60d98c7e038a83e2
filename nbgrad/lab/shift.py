"""Internal covariate shift, as Santurkar et al. 2018 define and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, no_grad
from nbgrad.nn import Module
from nbgrad.nn.functional import cross_entropy
from nbgrad.train.population import generators_unchanged, unchanged

from .measuring import Batch, Loss, as_it_was, gradients, length, trained, write

__all__ = ["LayerShift", "covariate_shift"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LayerShift:
    """One layer: ‖G‖, ‖G − G'‖ and the cosine of the angle between G and G'."""

    layer: str
    norm: float
    difference: float
    cosine: float

    @property
    def relative(self) -> float:
        """‖G − G'‖ / ‖G‖: comparable between networks whose gradients differ in size."""
        return self.difference / self.norm if self.norm else float("nan")


def covariate_shift(model: Module, batch: Batch, optimizer: Any,
                    loss: Loss = cross_entropy) -> list[LayerShift]:
    """How the gradient of each layer changes when the layers below it are updated.

    G_i  = ∇_{W_i} L(W_1, …, W_k)                      all layers as they are
    G'_i = ∇_{W_i} L(W'_1, …, W'_{i−1}, W_i, …, W_k)   those below after the optimizer's step
    internal covariate shift of layer i: ‖G_i − G'_i‖₂      Santurkar et al. 2018, definition 2.1

    batch: (input, target).  W_i is the weight (of two or more dimensions) of the i-th layer in the
    order in which they run; norms and biases move with the layer that they follow. For the first
    layer G' = G. All passes are on this batch, with the same dropout masks and noise, in the
    model's mode. The step is the optimizer's own, with its momentum; afterwards model, optimizer,
    running statistics and random generators are as they were.

    Raises ValueError where no parameter requires a gradient.

    >>> import nbgrad
    >>> from nbgrad import nn, optim
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> batch = nbgrad.randn(6, 4), nbgrad.tensor([0, 1, 2, 0, 1, 2])
    >>> first, second = covariate_shift(model, batch, optim.SGD(model.parameters(), lr=0.1))
    >>> first.difference, second.difference > 0
    (0.0, True)
    """
    with as_it_was(model, optimizer):
        groups = _groups(model, batch)
        params = trained(model)
        _, before = gradients(model, batch, loss, params)
        now = [p.data.copy(order="K") for p in params]
        for p, g in zip(params, before):
            p.grad = Tensor(g)
        optimizer.step()
        after = {id(p): p.data.copy(order="K") for p in params}
        for p, value in zip(params, now):
            write(p, value)
        whole = {id(p): g for p, g in zip(params, before)}
        found = []
        for name, weight, others in groups:
            _, (g,) = gradients(model, batch, loss, [weight])
            found.append(_compare(name, whole[id(weight)], g))
            for p in (weight, *others):                 # the next layer sees this one updated
                write(p, after[id(p)])
    return found


def _compare(name: str, g: Array, other: Array) -> LayerShift:
    a, b = length([g]), length([other])
    dot = float(np.vdot(g.astype(np.float64), other.astype(np.float64)))
    difference = length([g.astype(np.float64) - other])
    return LayerShift(name, a, difference, dot / (a * b) if a and b else float("nan"))


def _groups(model: Module, batch: Batch) -> list[tuple[str, Tensor, list[Tensor]]]:
    """Each weight in order of use, with the parameters that move along. What stands before the
    first weight (such as a norm of the input) moves along with it."""
    groups: list[tuple[str, Tensor, list[Tensor]]] = []
    early: list[Tensor] = []
    for name, params in _in_order_of_use(model, batch):
        for p in params:
            if p.ndim >= 2:
                groups.append((name, p, early))
                early = []
            else:
                (groups[-1][2] if groups else early).append(p)
    return groups


def _in_order_of_use(model: Module, batch: Batch) -> list[tuple[str, Sequence[Tensor]]]:
    order: list[tuple[str, Sequence[Tensor]]] = []
    seen: set[int] = set()

    def note(name: str, module: Module) -> None:
        own = [p for p in module.parameters(recurse=False)
               if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        order.append((name, sorted(own, key=lambda p: -p.ndim)))

    with ExitStack() as hooks, unchanged(model), generators_unchanged(), no_grad():
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(
                    lambda m, _, name=name: note(name or "model", m)))
        model(batch[0])
    return order
