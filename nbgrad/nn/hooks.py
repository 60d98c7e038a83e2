"""Forward and backward hooks of a Module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from nbgrad.autograd import Tensor

if TYPE_CHECKING:
    from .module import Module

__all__ = ["Handle", "Hooks", "call", "input_of"]

Hook = Callable[..., Any]
_number = count()


@dataclass
class Hooks:
    """What is registered on one module; the flag says whether a hook also takes the keywords."""

    pre: dict[int, tuple[Hook, bool]] = field(default_factory=dict)
    post: dict[int, tuple[Hook, bool]] = field(default_factory=dict)
    backward: dict[int, tuple[Hook, bool]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.pre or self.post or self.backward)


class Handle:
    """Removes one hook: ``handle.remove()``, or at the end of a ``with`` block."""

    def __init__(self, module: Module, kind: str, hook: Hook, *, keywords: bool = False,
                 first: bool = False) -> None:
        if not callable(hook):
            raise TypeError(f"{type(module).__name__}: expected a function as hook, got {hook!r}")
        self.module, self.kind, self.id = module, kind, next(_number)
        hooks = module._hooks or Hooks()
        old = getattr(hooks, kind)
        new = {self.id: (hook, keywords)}
        setattr(hooks, kind, {**new, **old} if first else {**old, **new})
        vars(module)["_hooks"] = hooks

    def remove(self) -> None:
        hooks = self.module._hooks
        if hooks is not None:
            getattr(hooks, self.kind).pop(self.id, None)
            if not hooks:                              # back to the direct call
                vars(self.module)["_hooks"] = None

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The x of a layer's call, given by place or by name."""
    return args[0] if args else kwargs["x"]


def call(module: Module, hooks: Hooks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """pre hooks, forward, post hooks; backward hooks see the gradients at this boundary."""
    for hook, keywords in tuple(hooks.pre.values()):
        args, kwargs = _pre(hook, keywords, module, args, kwargs)
    boundary = _Boundary(module, hooks) if hooks.backward else None
    if boundary is not None:
        args = boundary.enter(args)
    y = module.forward(*args, **kwargs)
    for hook, keywords in tuple(hooks.post.values()):
        new = hook(module, args, kwargs, y) if keywords else hook(module, args, y)
        y = y if new is None else new
    if boundary is not None:
        boundary.leave(y)
    return y


def _pre(hook: Hook, keywords: bool, module: Module, args: tuple[Any, ...],
         kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    new = hook(module, args, kwargs) if keywords else hook(module, args)
    if new is None:
        return args, kwargs
    if not keywords:
        return new if isinstance(new, tuple) else (new,), kwargs
    if not isinstance(new, tuple) or len(new) != 2:
        raise RuntimeError("forward pre-hook must return None or a tuple of (new_args, "
                           f"new_kwargs), but got {new!r}.")
    return new


class _Boundary:
    """Collects the gradients of one call's outputs and inputs, then runs the backward hooks."""

    def __init__(self, module: Module, hooks: Hooks) -> None:
        self.module, self.hooks = module, hooks
        self.dxs: list[Tensor | None] = []
        self.dys: list[Tensor | None] = []
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.arrived = 0

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """An identity op per input, so that its gradient is this module's alone: the input itself
        also collects the gradients of its other uses."""
        new = list(args)
        self.dxs = [None] * len(args)
        for i in _differentiable(args):
            new[i] = args[i].clone()
            new[i].register_hook(lambda dx, i=i: self._input(i, dx))
            self.inputs.append(i)
        return tuple(new)

    def leave(self, y: Any) -> None:
        ys = y if isinstance(y, (tuple, list)) else (y,)
        self.dys = [None] * len(ys)
        for i in _differentiable(ys):
            ys[i].register_hook(lambda dy, i=i: self._output(i, dy))
            self.outputs.append(i)

    def _output(self, i: int, dy: Tensor) -> None:
        self.dys[i] = dy
        if not self.inputs and all(self.dys[j] is not None for j in self.outputs):
            self._run()

    def _input(self, i: int, dx: Tensor) -> Tensor | None:
        self.dxs[i] = dx
        self.arrived += 1
        return self._run() if self.arrived == len(self.inputs) else None

    def _run(self) -> Tensor | None:
        dxs, dys = tuple(self.dxs), tuple(self.dys)
        self.dxs, self.dys, self.arrived = [None] * len(dxs), [None] * len(dys), 0
        for hook, _ in tuple(self.hooks.backward.values()):
            new = hook(self.module, dxs, dys)
            if new is not None:
                if len(self.inputs) != 1:
                    raise RuntimeError("full backward hook: a new grad_input needs a module with "
                                       f"one differentiable input, got {len(self.inputs)}")
                dxs = new if isinstance(new, tuple) else (new,)
        return dxs[self.inputs[0]] if len(self.inputs) == 1 else None


def _differentiable(values: Iterable[Any]) -> list[int]:
    return [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
