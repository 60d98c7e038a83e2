"""A weight as a function of the parameters that are trained: ``torch.nn.utils.parametrize``.

A module that is parametrized gets a class of its own, whose attribute ``weight`` is computed when
it is read; what is trained is in ``module.parametrizations.weight``.
"""

# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from nbgrad.autograd import Tensor, bump, no_grad
from nbgrad.nn.container import ModuleDict
from nbgrad.nn.module import Module
from nbgrad.nn.parameter import Parameter
from nbgrad.nn.tree import MODULE

__all__ = ["ParametrizationList", "is_parametrized", "register_parametrization",
           "remove_parametrizations"]


class ParametrizationList(Module):
    """What one tensor is computed from: ``original``, or ``original0``, ``original1``, …, and the
    functions "0", "1", … of it. Calling it computes the tensor."""

    def __init__(self, parametrization: Module, tensor: Tensor) -> None:
        super().__init__()
        with no_grad():
            given = getattr(parametrization, "right_inverse", _same)(tensor)
        self.single = isinstance(given, Tensor)
        parts = {"original": given} if self.single else {
            f"original{i}": t for i, t in enumerate(given)}
        for name, t in parts.items():
            self._take(name, t, tensor)
        self.add_module("0", parametrization)

    def _take(self, name: str, value: Tensor, tensor: Tensor) -> None:
        """A parameter stays the same one, which an optimizer may already hold."""
        if self.single and isinstance(tensor, Parameter):
            tensor.data = value.data
            self.register_parameter(name, tensor)
        elif isinstance(tensor, Parameter):
            self.register_parameter(name, Parameter(value.data.copy(), tensor.requires_grad))
        else:
            self.register_buffer(name, value)

    def _functions(self) -> list[Module]:
        return [m for _, m in self._own(MODULE)]

    def _originals(self) -> list[Tensor]:
        return [t for _, t in self._own("parameter", "buffer")]

    def append(self, parametrization: Module) -> None:
        """One more function, of what the others return."""
        self.add_module(str(len(self._functions())), parametrization)

    def forward(self) -> Tensor:
        first, *others = self._functions()
        y = first(*self._originals())
        for f in others:
            y = f(y)
        return y

    def assign(self, value: Tensor) -> None:
        """Change the originals so that the tensor is ``value``, or as near as the functions can.
        Raises NotImplementedError if one of them has no ``right_inverse``."""
        given: Any = value
        with no_grad():
            for f in reversed(self._functions()):
                if not hasattr(f, "right_inverse"):
                    raise NotImplementedError(
                        f"{type(f).__name__} has no right_inverse: its tensor cannot be assigned")
                given = f.right_inverse(given)
        pairs = list(zip(self._originals(), (given,) if self.single else given, strict=True))
        for t, new in pairs:
            if t.shape != new.shape:
                raise ValueError(f"expected a value whose original is of shape {t.shape}, got "
                                 f"{new.shape}")
        for t, new in pairs:
            t.data[...] = new.data
            bump(t)


def _same(x: Tensor) -> Tensor:
    return x


@cache
def _class_of(base: Any, names: tuple[str, ...]) -> Any:
    """``base`` with these attributes computed. A class never changes: copies of a module share
    it."""
    def computed(name: str) -> property:
        return property(lambda self: getattr(self.parametrizations, name)(),
                        lambda self, value: getattr(self.parametrizations, name).assign(value))

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name in names:
            object.__setattr__(self, name, value)
        else:
            base.__setattr__(self, name, value)
    return type("Parametrized" + base.__name__, (base,), {
        "__module__": base.__module__, "__doc__": base.__doc__, "__setattr__": __setattr__,
        "_parametrized": (base, names), **{name: computed(name) for name in names}})


def _base_and_names(module: Module) -> tuple[Any, tuple[str, ...]]:
    return getattr(type(module), "_parametrized", (type(module), ()))


def is_parametrized(module: Module, tensor_name: str | None = None) -> bool:
    """Whether the module has a parametrized tensor (of this name)."""
    names = _base_and_names(module)[1]
    return bool(names) if tensor_name is None else tensor_name in names


def register_parametrization(module: Any, tensor_name: str, parametrization: Module) -> Any:
    """Make ``module.tensor_name`` the value of ``parametrization(original)``, computed when it is
    read. Returns the module.

    Its ``right_inverse(value)``, if there is one, gives the original, or several, for a value; the
    first is called with the tensor as it is. A second parametrization of one tensor is applied to
    what the first returns: its original can only be one. The original is
    ``module.parametrizations.tensor_name.original``. A parametrization must keep shape and dtype:
    ValueError otherwise, and for names that are neither a parameter nor a buffer; TypeError for
    what is no module. The module stays as it was then.
    """
    if not isinstance(parametrization, Module):
        raise TypeError("register_parametrization: expected an nn.Module, got "
                        f"{type(parametrization).__name__}")
    parametrization.train(module.training)
    base, names = _base_and_names(module)
    if tensor_name in names:
        _check(parametrization, getattr(module, tensor_name), again=True)
        getattr(module.parametrizations, tensor_name).append(parametrization)
        return module
    tensor = dict(module._own("parameter", "buffer")).get(tensor_name)
    if tensor is None:
        raise ValueError(f"register_parametrization: {type(module).__name__} has no parameter or "
                         f"buffer {tensor_name!r}")
    _check(parametrization, tensor)
    entry = ParametrizationList(parametrization, tensor)
    if not names:
        module.add_module("parametrizations", ModuleDict())
    delattr(module, tensor_name)
    module.parametrizations[tensor_name] = entry
    object.__setattr__(module, "__class__", _class_of(base, tuple(sorted((*names, tensor_name)))))
    return module


def _check(parametrization: Any, tensor: Tensor, again: bool = False) -> None:
    inverse: Callable[..., Any] = getattr(parametrization, "right_inverse", _same)
    with no_grad():
        given = inverse(tensor)
        if again and not isinstance(given, Tensor):      # it is called with what the first returns
            raise ValueError(f"register_parametrization: {type(parametrization).__name__} is of "
                             f"{len(given)} tensors, and can only be the first of a tensor")
        y = parametrization(*((given,) if isinstance(given, Tensor) else given))
    if not isinstance(y, Tensor) or y.shape != tensor.shape or y.dtype != tensor.dtype:
        got = f"{y.dtype} of shape {y.shape}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"register_parametrization: {type(parametrization).__name__} must return "
                         f"{tensor.dtype} of shape {tensor.shape}, got {got}")


def remove_parametrizations(module: Any, tensor_name: str,
                            leave_parametrized: bool = True) -> Any:
    """Make ``module.tensor_name`` a parameter (or buffer) again, with the value it has now, or,
    with ``leave_parametrized=False``, that of its one original. Returns the module.

    Raises ValueError for what is not parametrized, and for several originals without
    leave_parametrized.
    """
    base, names = _base_and_names(module)
    if tensor_name not in names:
        raise ValueError(f"remove_parametrizations: {tensor_name!r} of {type(module).__name__} is "
                         "not parametrized")
    entry = getattr(module.parametrizations, tensor_name)
    if not entry.single and not leave_parametrized:
        raise ValueError(f"remove_parametrizations: {tensor_name!r} is made of several tensors, "
                         "which cannot be left in its place: use leave_parametrized=True")
    original = entry._originals()[0]
    with no_grad():
        value = entry() if leave_parametrized else original
    left = tuple(name for name in names if name != tensor_name)
    object.__setattr__(module, "__class__", _class_of(base, left) if left else base)
    del module.parametrizations[tensor_name]
    if not left:
        del module.parametrizations
    if not isinstance(original, Parameter):
        module.register_buffer(tensor_name, value)
        return module
    if entry.single:                              # the parameter that was there before
        original.data = value.data
    else:
        original = Parameter(value.data, original.requires_grad)
    module.register_parameter(tensor_name, original)
    return module
