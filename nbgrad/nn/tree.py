"""Tree: the names of parameters, buffers and submodules."""

# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nbgrad.autograd import Tensor

from .parameter import Parameter

if TYPE_CHECKING:
    from .module import Module

__all__ = ["BUFFER", "MODULE", "PARAMETER", "TRANSIENT", "Tree"]

PARAMETER, BUFFER, TRANSIENT, MODULE = "parameter", "buffer", "transient buffer", "module"
_TYPES: dict[str, type] = {BUFFER: Tensor, TRANSIENT: Tensor, PARAMETER: Parameter}
_NEEDS = {PARAMETER: "nn.Parameter", BUFFER: "Tensor", TRANSIENT: "Tensor", MODULE: "nn.Module"}


class Tree:
    """What a Module knows of its parts. Their values are ordinary attributes, read at native speed;
    ``_kinds`` maps each registered name to what it is, in order of registration. (PyTorch keeps the
    values in three dicts behind ``__getattr__``, which costs about 1 µs per access.)"""

    _kinds: dict[str, str]

    def __init__(self) -> None:
        vars(self)["_kinds"] = {}

    # ------------------------------------------------------------------------------- registration

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Parameter):
            self._register(PARAMETER, name, value)
        elif isinstance(value, Tree):
            self._register(MODULE, name, value)
        else:
            kind = vars(self).get("_kinds", {}).get(name)
            if kind and value is not None and not isinstance(value, _TYPES.get(kind, Tree)):
                raise TypeError(f"cannot assign '{type(value).__name__}' as {kind.split()[-1]} "
                                f"'{name}' ({_NEEDS[kind]} or None expected)")
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)
        self._kinds.pop(name, None)

    def _register(self, kind: str, name: str, value: Any) -> None:
        kinds = vars(self).get("_kinds")
        if kinds is None:
            raise AttributeError(f"cannot assign {kind} before Module.__init__() call")
        if kinds.get(name, kind) != kind:
            del kinds[name]
        kinds[name] = kind
        object.__setattr__(self, name, value)

    def _register_new(self, kind: str, name: str, value: Any) -> None:
        word = kind.split()[-1]
        if not isinstance(name, str):
            raise TypeError(f"{word} name should be a string. Got {type(name).__name__}")
        if "." in name or not name:
            what = 'contain "."' if name else 'be empty string ""'
            raise KeyError(f"{word} name can't {what}, got {name!r}")
        registered = self._kinds.get(name, "")
        if hasattr(self, name) and _NEEDS.get(registered) != _NEEDS[kind]:
            raise KeyError(f"attribute '{name}' already exists")
        if value is not None and not isinstance(value, _TYPES.get(kind, Tree)):
            raise TypeError(f"cannot assign '{type(value).__name__}' object to {word} '{name}' "
                            f"({_NEEDS[kind]} or None required)")
        self._register(kind, name, value)

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Register under a name, ``None`` for "this module has none"."""
        self._register_new(PARAMETER, name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a Tensor that is state and not trained; ``persistent``: part of
        ``state_dict``."""
        self._register_new(BUFFER if persistent else TRANSIENT, name, tensor)

    def add_module(self, name: str, module: Module | None) -> None:
        """Register a submodule under a name."""
        self._register_new(MODULE, name, module)

    register_module = add_module

    # ---------------------------------------------------------------------------------- traversal

    def _own(self, *kinds: str) -> list[tuple[str, Any]]:
        values = vars(self)
        return [(name, values[name]) for name, kind in self._kinds.items()
                if kind in kinds and values[name] is not None]

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Direct submodules, a shared one once."""
        seen: set[int] = set()
        for name, module in self._own(MODULE):
            if id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        return (module for _, module in self.named_children())

    def named_modules(self, memo: set[Module] | None = None, prefix: str = "",
                      remove_duplicate: bool = True) -> Iterator[tuple[str, Module]]:
        """This module and all below it, depth first, with dotted names."""
        memo = set() if memo is None else memo
        this: Any = self
        if this in memo:
            return
        if remove_duplicate:
            memo.add(this)
        yield prefix, this
        for name, module in self._own(MODULE):
            yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name,
                                            remove_duplicate)

    def modules(self) -> Iterator[Module]:
        return (module for _, module in self.named_modules())

    def _named(self, kinds: tuple[str, ...], prefix: str, recurse: bool,
               remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        found = self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)
        for path, module in found if recurse else [(prefix, self)]:
            for name, value in module._own(*kinds):
                if id(value) not in seen:
                    if remove_duplicate:
                        seen.add(id(value))
                    yield f"{path}.{name}" if path else name, value

    def named_parameters(self, prefix: str = "", recurse: bool = True,
                         remove_duplicate: bool = True) -> Iterator[tuple[str, Parameter]]:
        """Parameters with dotted names, a shared one once."""
        return self._named((PARAMETER,), prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        return (p for _, p in self.named_parameters(recurse=recurse))

    def named_buffers(self, prefix: str = "", recurse: bool = True,
                      remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Buffers with dotted names, a shared one once."""
        return self._named((BUFFER, TRANSIENT), prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return (b for _, b in self.named_buffers(recurse=recurse))

    def get_submodule(self, target: str) -> Module:
        """The submodule with this dotted name; the module itself for ``""``."""
        module: Any = self
        for name in target.split(".") if target else ():
            parent, module = module, getattr(module, name, None)
            if module is None:
                raise AttributeError(f"{type(parent).__name__} has no attribute `{name}`")
            if not isinstance(module, Tree):
                raise AttributeError(f"`{name}` is not an nn.Module")
        return module

    def get_parameter(self, target: str) -> Parameter:
        """The Parameter with this dotted name."""
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        param = getattr(module, name, None)
        if not isinstance(param, Parameter):
            raise AttributeError(f"`{name}` is not an nn.Parameter of {type(module).__name__}")
        return param

    def get_buffer(self, target: str) -> Tensor:
        """The buffer with this dotted name."""
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        buffer = getattr(module, name, None)
        if buffer is None or module._kinds.get(name) not in (BUFFER, TRANSIENT):
            raise AttributeError(f"`{name}` is not a buffer of {type(module).__name__}")
        return buffer
