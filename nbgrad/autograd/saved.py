"""What a node's vjp keeps: its values by name, whether they are unmodified, and what is made again.

A vjp keeps what it mentions, in the cells of its closure, and, where the op says so, its output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import numpy as np

from nbgrad.backend import is_array

from .arrays import Array
from .node import Node
from .tensors import Tensor

__all__ = ["Remade", "check_unmodified", "kept", "saved_tensors"]

REMAKE_BYTES = 1 << 20      # a smaller value costs less to keep than to make again


def saved_tensors(node: Node) -> Iterator[tuple[str, Any]]:
    """Names and values (Tensors and arrays) that a node's vjp keeps alive."""
    functions = node.vjp if type(node.vjp) in (tuple, list) else (node.vjp,)
    seen: set[int] = set()
    stack = [f for f in functions if f is not None][::-1]
    while stack:
        f = stack.pop()
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ()):
            values = cell.cell_contents
            for value in values if type(values) in (list, tuple) else (values,):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if isinstance(value, Tensor) or is_array(value):
                    yield name, value
                elif inspect.isfunction(value):
                    stack.append(value)
    if node.output is not None:
        yield "y", node.output


def _unmodified(node: Node) -> bool:
    """Whether no tensor in the vjp's own closure is newer than the node: the quick half of the
    check. Batch norm writes to its running statistics in every step: this runs for most nodes."""
    vjp = node.vjp
    for f in vjp if type(vjp) in (tuple, list) else (vjp,):
        for cell in (f.__closure__ or ()) if f is not None else ():
            value = cell.cell_contents
            if isinstance(value, Tensor):
                if value._version is not None and value._version[0] > node.clock:
                    return False
            elif type(value) is FunctionType or (type(value) in (list, tuple) and any(
                    isinstance(v, (Tensor, FunctionType)) for v in value)):
                return False
    y = node.output
    return y is None or y._version is None or y._version[0] <= node.clock


def check_unmodified(node: Node) -> None:
    if _unmodified(node):
        return
    for name, t in saved_tensors(node):
        if isinstance(t, Tensor) and t._version is not None and t._version[0] > node.clock:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {name!r} of shape {t.shape}, saved by {node.op.name}")


class Remade(Tensor):
    """What a vjp holds of a value that is not kept: its op makes it again when it is asked for."""

    def __init__(self, x: Tensor, remake: Callable[[], Array], sources: list[Tensor]) -> None:
        self.remake, self.sources = remake, sources
        self.requires_grad, self.grad_fn = x.requires_grad, x.grad_fn
        self._shape, self._dtype = x.data.shape, x.data.dtype

    @property
    def data(self) -> Array:  # type: ignore[override]
        return self.remake()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def _version(self) -> list[Any] | None:  # type: ignore[override]
        """Of what it is made from: the last in-place write to any of them."""
        clocks = [s._version[0] for s in self.sources if s._version is not None]
        return [max(clocks)] if clocks else None


def kept(x: Tensor) -> Tensor:
    """x, for a vjp to hold: itself, or what makes it again from what its own op keeps anyway, where
    that op's vjp has a function ``remake``.

    A ReLU behind a batch norm is one pass over memory, and its value is as large as the rest that
    the layer keeps. Values that have been written to in place, or whose sources have, are held
    themselves; a later write to a source raises at backward. (Writes to ``x.data``, which nothing
    counts, do not reach what is made again.)
    """
    node = x.grad_fn
    remake = getattr(node.vjp, "remake", None) if node is not None else None
    if remake is None or x._version is not None or x.data.nbytes < REMAKE_BYTES:
        return x
    cells = [cell.cell_contents for cell in remake.__closure__]
    sources = [value for value in cells if isinstance(value, Tensor)]
    if any(s._version is not None and s._version[0] > node.clock for s in sources):  # type: ignore[union-attr]
        return x
    return Remade(x, remake, sources)
