"""Python's operators and NumPy's functions of a Tensor, each the op of its name."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import ndarray

from .node import OPS
from .tensors import Tensor

__all__: list[str] = []


def _operator(name: str, reverse: bool = False) -> Any:
    """A method for Python's operator. Ops are filed after Tensor: its own is found at first use."""
    op: Any = None

    def forward(self: Tensor, other: Any) -> Any:
        nonlocal op
        if isinstance(other, _OPERANDS):
            if op is None:
                op = OPS[name]
            return op(self, other)
        return NotImplemented

    def backward(self: Tensor, other: Any) -> Any:
        return OPS[name](other, self) if isinstance(other, _OPERANDS) else NotImplemented
    return backward if reverse else forward


_OPERANDS = (Tensor, int, float, bool, ndarray, np.generic, list, tuple)
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow",
           "matmul": "matmul", "floordiv": "floor_divide", "mod": "remainder",
           "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
for _python, _name in _BINARY.items():
    setattr(Tensor, f"__{_python}__", _operator(_name))
    setattr(Tensor, f"__r{_python}__", _operator(_name, reverse=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tensor, f"__{_name}__", _operator(_name))
for _python, _name in {"neg": "neg", "abs": "abs", "invert": "bitwise_not"}.items():
    setattr(Tensor, f"__{_python}__", lambda self, _name=_name: OPS[_name](self))
Tensor.__getitem__ = lambda self, index: OPS["getitem"](self, index=index)  # type: ignore[method-assign]

_UFUNCS = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "power": "pow",
           "matmul": "matmul", "negative": "neg", "absolute": "abs", "exp": "exp", "log": "log",
           "log1p": "log1p", "expm1": "expm1", "sqrt": "sqrt", "square": "square", "sin": "sin",
           "cos": "cos", "tanh": "tanh", "maximum": "maximum", "minimum": "minimum", "sign": "sign",
           "reciprocal": "reciprocal", "equal": "eq", "not_equal": "ne", "less": "lt",
           "less_equal": "le", "greater": "gt", "greater_equal": "ge"}


def __array_ufunc__(self: Tensor, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
    name = _UFUNCS.get(ufunc.__name__)
    if method == "__call__" and isinstance(kwargs.get("out", (None,))[0], ndarray):
        return ufunc(*[x.numpy() if isinstance(x, Tensor) else x for x in inputs], **kwargs)
    if method != "__call__" or kwargs or name is None:
        raise TypeError(f"numpy.{ufunc.__name__} (method {method!r}) of a Tensor: use nbgrad's "
                        "ops, or tensor.detach().numpy()")
    return OPS[name](*inputs)


Tensor.__array_ufunc__ = __array_ufunc__  # type: ignore[attr-defined]
