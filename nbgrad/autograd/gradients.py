"""How users and ops start the engine: ``Tensor.backward``, ``grad``, ``composition``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .engine import accumulate, propagate
from .mode import enable_grad, state
from .node import OPS
from .tensors import Tensor, as_tensor, wrap

__all__ = ["composition", "grad"]


def backward(self: Tensor, gradient: Any = None, retain_graph: bool | None = None,
             create_graph: bool = False, inputs: Any = None) -> None:
    """Add ∂self/∂leaf, contracted with ``gradient`` (1 for a scalar), to the leaves' ``.grad``;
    with ``inputs`` (a Tensor or several) only to theirs.

    The graph is freed unless ``retain_graph`` (default: ``create_graph``); ``create_graph``
    records the gradients themselves. Raises RuntimeError on a second call without it, and if
    a tensor that is needed has been modified in place.
    """
    retain = create_graph if retain_graph is None else retain_graph
    dy = cotangent_of(self, gradient, "backward")
    if self.grad_fn is None and gradient is not None and not create_graph:
        dy = wrap(dy.data.copy())
    wanted = (inputs,) if isinstance(inputs, Tensor) else inputs
    targets = None if wanted is None else {x.grad_fn or x for x in wanted}
    found = propagate((self,), (dy,), targets, retain=retain, record=create_graph)
    for x in wanted or ():
        if (x.grad_fn or x) in found:
            accumulate(x, found[x.grad_fn or x], create_graph)


def grad(outputs: Tensor | Sequence[Tensor], inputs: Tensor | Sequence[Tensor],
         grad_outputs: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
         allow_unused: bool = False) -> tuple[Tensor | None, ...]:
    """∂outputs/∂inputs contracted with ``grad_outputs`` (1 for scalars); leaves ``.grad`` alone.

    Raises RuntimeError if an input is not in the graph, unless ``allow_unused`` (then None).

    >>> from nbgrad import grad, tensor
    >>> x = tensor(3.0, requires_grad=True)
    >>> (dx,) = grad(x ** 3, x, create_graph=True)
    >>> dx.item(), grad(dx, x)[0].item()
    (27.0, 18.0)
    """
    ys = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    xs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    listed = isinstance(grad_outputs, (list, tuple)) or not isinstance(outputs, Tensor)
    dys = tuple(grad_outputs) if listed and grad_outputs is not None else (grad_outputs,)
    dys = dys * len(ys) if len(dys) == 1 and dys[0] is None else dys
    if len(dys) != len(ys):
        raise ValueError(f"grad: got {len(ys)} outputs and {len(dys)} grad_outputs")
    for x in xs:
        if not x.requires_grad:
            raise RuntimeError("grad: one of the differentiated Tensors does not require grad")
    targets = {x.grad_fn or x for x in xs}
    retain = create_graph if retain_graph is None else retain_graph
    found = propagate(ys, [cotangent_of(y, dy, "grad") for y, dy in zip(ys, dys)], targets,
                      retain=retain, record=create_graph)
    dxs = tuple(found.get(x.grad_fn or x) for x in xs)
    if None in [dx if dx is None else 0 for dx in dxs] and not allow_unused:
        raise RuntimeError("grad: One of the differentiated Tensors appears to not have been used "
                           "in the graph. Set allow_unused=True if this is the desired behavior.")
    return dxs


def cotangent_of(y: Tensor, given: Any, where: str) -> Tensor:
    if not y.requires_grad:
        raise RuntimeError(f"{where}: element 0 of tensors does not require grad and does not have "
                           "a grad_fn")
    if given is None:
        if y.data.size != 1:
            raise RuntimeError(f"{where}: grad can be implicitly created only for scalar outputs, "
                               f"got shape {y.shape}; pass a gradient of that shape")
        one = np.empty_like(y.data)
        one.fill(1)
        return wrap(one)
    dy = given if isinstance(given, Tensor) else as_tensor(np.asarray(given, y.data.dtype))
    if dy.data.shape != y.data.shape:
        raise RuntimeError(f"{where}: mismatch in shape: gradient has shape {dy.shape}, the output "
                           f"has shape {y.shape}")
    return dy if dy.data.dtype is y.data.dtype else dy.to(y.dtype)


def composition(f: Callable[..., Any], *xs: Tensor | None,
                dtype: Any = np.float32) -> Callable[..., Any]:
    """The vjp of ``f`` at ``xs``, found by recording ``f`` when it is asked for.

    For a fused op whose own gradient is rarely needed: ``f`` is the same function in elementary
    ops. It recomputes everything from ``xs``, so the gradient is exact at every order; in ``dtype``
    where that is wider than theirs, rounded once.
    """
    width = np.dtype(dtype).itemsize

    def vjp(*dys: Tensor | None) -> list[Tensor | None]:
        again = state.recording
        with enable_grad():
            at = [x if x is None or not x.requires_grad else
                  OPS["alias"](x) if again else x.detach().requires_grad_() for x in xs]
            ys = f(*(x.to(dtype) if x is not None and x.dtype.itemsize < width else x for x in at))
            ys = ys if isinstance(ys, tuple) else (ys,)
            pairs = [(y, dy.to(y.dtype)) for y, dy in zip(ys, dys)
                     if dy is not None and y.requires_grad]
            targets = {x.grad_fn or x for x in at if x is not None and x.requires_grad}
            found = propagate([y for y, _ in pairs], [dy for _, dy in pairs], targets,
                              retain=again, record=again, stop=True) if pairs else {}
        return [found.get(x.grad_fn or x) if x is not None and x.requires_grad else None
                for x in at]
    return vjp


Tensor.backward = backward  # type: ignore[method-assign]
