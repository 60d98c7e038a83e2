"""Sequential, ModuleList, ModuleDict, ParameterList."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from operator import index
from typing import Any, Self

from . import fusion
from .module import Module, _indent
from .parameter import Parameter
from .tree import MODULE, PARAMETER

__all__ = ["ModuleDict", "ModuleList", "ParameterList", "Sequential"]


class _List(Module):
    """Submodules under the names "0", "1", …"""

    def __init__(self, values: Iterable[Any] | None = None) -> None:
        super().__init__()
        self.extend(values or ())

    def _values(self) -> list[Any]:
        return [m for _, m in self._own(MODULE)]

    def _name(self, i: Any) -> str:
        """The name of the i-th entry; negative numbers count from the end."""
        names = list(self._kinds)
        if not -len(names) <= index(i) < len(names):
            raise IndexError(f"index {i} is out of range for {type(self).__name__} "
                             f"of length {len(names)}")
        return names[index(i)]

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values())

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return type(self)(self._values()[i])
        return vars(self)[self._name(i)]

    def __setitem__(self, i: int, value: Any) -> None:
        self._register_new(MODULE, self._name(i), value)

    def __delitem__(self, i: Any) -> None:
        names = list(self._kinds)
        for name in names[i] if isinstance(i, slice) else [self._name(i)]:
            delattr(self, name)
        self._renumber()

    def _renumber(self) -> None:
        self._refill(self._values())

    def _refill(self, values: Iterable[Any]) -> None:
        for name in list(self._kinds):
            delattr(self, name)
        for value in values:
            self.append(value)

    def append(self, module: Any) -> Self:
        """Add at the end."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Any]) -> Self:
        """Add several at the end."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, i: int, module: Any) -> None:
        """Add before position i."""
        if not isinstance(module, Module):
            raise TypeError(f"{type(self).__name__}: expected a Module, "
                            f"got {type(module).__name__}")
        values = self._values()
        values.insert(i, module)
        self._refill(values)


class Sequential(_List):
    """y = fₙ(… f₂(f₁(x))). Built from modules, or from one dict of them.

    >>> from nbgrad import nn
    >>> nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): ReLU()
    )
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            for name, module in modules[0].items():
                self.add_module(name, module)
        else:
            self.extend(modules)

    def forward(self, x: Any) -> Any:
        own = self.__dict__
        return fusion.run([own[name] for name in self._kinds], x)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return type(self)(dict(self._own(MODULE)[i]))
        return super().__getitem__(i)

    def _renumber(self) -> None:
        if all(name.isdigit() for name in self._kinds):         # given names stay
            super()._renumber()


class ModuleList(_List):
    """A list of submodules; call them yourself."""

    def _child_lines(self) -> list[str]:
        """Runs of equal entries as one: ``(0-2): 3 x ReLU()``."""
        runs: list[tuple[int, int, str]] = []
        for i, module in enumerate(self._values()):
            text = repr(module)
            if runs and runs[-1][2] == text:
                runs[-1] = (runs[-1][0], i, text)
            else:
                runs.append((i, i, text))
        return [_indent(f"({a}): {text}" if a == b else f"({a}-{b}): {b - a + 1} x {text}")
                for a, b, text in runs]


class ModuleDict(Module):
    """A dict of submodules; call them yourself."""

    def __init__(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]] = ()) -> None:
        super().__init__()
        self.update(modules)

    def _dict(self) -> dict[str, Module]:
        return dict(self._own(MODULE))

    def __getitem__(self, key: str) -> Module:
        return self._dict()[key]

    def __setitem__(self, key: str, module: Module) -> None:
        self.add_module(key, module)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[str]:
        return iter(self._dict())

    def __contains__(self, key: object) -> bool:
        return key in self._kinds

    def keys(self) -> KeysView[str]:
        return self._dict().keys()

    def items(self) -> ItemsView[str, Module]:
        return self._dict().items()

    def values(self) -> ValuesView[Module]:
        return self._dict().values()

    def update(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]]) -> None:
        """Add or replace several."""
        for key, module in dict(modules).items():
            self[key] = module

    def pop(self, key: str) -> Module:
        """Remove and return."""
        module = self[key]
        delattr(self, key)
        return module

    def clear(self) -> None:
        """Remove all."""
        for key in list(self):
            del self[key]


class ParameterList(_List):
    """A list of Parameters. Tensors and arrays become Parameters."""

    def _values(self) -> list[Any]:
        return [p for _, p in self._own(PARAMETER)]

    def __setitem__(self, i: int, value: Any) -> None:
        setattr(self, self._name(i), _parameter(value))

    def append(self, value: Any) -> Self:
        """Add at the end."""
        self.register_parameter(str(len(self)), _parameter(value))
        return self

    def insert(self, i: int, value: Any) -> None:
        """Add before position i."""
        values = self._values()
        values.insert(i, _parameter(value))
        self._refill(values)

    def extra_repr(self) -> str:
        return "\n".join(f"({i}): Parameter containing: [{p.dtype} of size {_by(p.shape)}]"
                         for i, p in enumerate(self._values()))


def _parameter(value: Any) -> Parameter:
    return value if isinstance(value, Parameter) else Parameter(value)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
