"""What the instruments share: a loss on a batch, its gradient, and a model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, bump, enable_grad, grad
from nbgrad.nn import Module
from nbgrad.train.population import generators_unchanged, unchanged

__all__ = ["Batch", "Loss", "as_it_was", "gradients", "length", "loss_on", "trained", "write"]

Array = np.ndarray[Any, Any]
Batch = Sequence[Any]                               # input and target
Loss = Callable[[Any, Any], Tensor]                 # of the model's output and the target


@contextmanager
def as_it_was(model: Module, optimizer: Any = None) -> Iterator[None]:
    """Put parameters, gradients, modes, buffers, the optimizer's state and random generators (the
    default one, too) back as they were, bit by bit, also after an error."""
    values = [(p, p.data.copy(order="K"), p.grad) for p in model.parameters()]
    with unchanged(model), generators_unchanged(), _state_of(optimizer):
        try:
            yield
        finally:
            for p, value, gradient in values:
                write(p, value)
                p.grad = gradient


@contextmanager
def _state_of(optimizer: Any) -> Iterator[None]:
    if optimizer is None:
        yield
        return
    saved = {p: {name: (value, np.array(value, copy=True)) for name, value in own.items()}
             for p, own in optimizer.state.items()}
    try:
        yield
    finally:
        optimizer.state.clear()
        for p, own in saved.items():
            optimizer.state[p] = {name: _back(value, copy) for name, (value, copy) in own.items()}
        optimizer._plans.clear()                    # they name arrays that may be gone


def _back(value: Any, copy: Array) -> Any:
    """An array is filled again, so that whoever holds it sees it; a number is its own copy."""
    if isinstance(value, np.ndarray):
        value[...] = copy
    return value


def write(p: Tensor, value: Array) -> None:
    """p ← value, where the value differs: a graph that holds p stays usable otherwise."""
    if p.data.tobytes() != value.tobytes():
        p.data[...] = value
        bump(p)


def trained(model: Module) -> list[Tensor]:
    """The parameters that want gradients. Raises ValueError where there are none."""
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError(f"{type(model).__name__}: no parameter requires a gradient")
    return params


def loss_on(model: Module, batch: Batch, loss: Loss) -> Tensor:
    """loss(model(x), target)"""
    x, target = batch
    return loss(model(x), target)


def gradients(model: Module, batch: Batch, loss: Loss,
              params: Sequence[Tensor]) -> tuple[float, list[Array]]:
    """The loss, and its gradients with respect to ``params`` (0 where it does not depend on one).
    Every call draws the same noise and starts from the same running statistics."""
    with unchanged(model), generators_unchanged(), enable_grad():
        value = loss_on(model, batch, loss)
        found = grad(value, list(params), allow_unused=True)
    return float(value.item()), [np.zeros_like(p.data) if g is None else g.data
                                 for p, g in zip(params, found)]


def length(arrays: Sequence[Array]) -> float:
    """‖·‖₂ of all arrays together, in float64."""
    return float(np.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays)))
