"""What a model consists of, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, no_grad

from .module import Module

__all__ = ["Row", "Summary", "summary"]


@dataclass(frozen=True)
class Row:
    """One module; parameters and bytes are its own, without those of modules inside it."""

    name: str
    kind: str
    depth: int
    output_shape: tuple[int, ...] | None        # None: not called, or no Tensor
    parameters: int
    nbytes: int                                 # of parameters and buffers


@dataclass(frozen=True)
class Summary:
    """The rows, and totals over all of them; ``str`` is the table."""

    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    nbytes: int

    def __str__(self) -> str:
        cells = [("layer", "output shape", "parameters", "bytes")]
        cells += [("  " * r.depth + ": ".join(filter(None, (r.name, r.kind))),
                   "-" if r.output_shape is None else str(r.output_shape),
                   f"{r.parameters:,}", f"{r.nbytes:,}") for r in self.rows]
        cells += [("total", "", f"{self.parameters:,}", f"{self.nbytes:,}")]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join((a.ljust(widths[0]), b.ljust(widths[1]), c.rjust(widths[2]),
                            d.rjust(widths[3]))) for a, b, c, d in cells]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1],
                          f"trainable parameters: {self.trainable:,}"])


def summary(model: Module, input: Any) -> Summary:
    """Layers of ``model`` with the shapes they return for ``input``: a Tensor, an array, a tuple of
    these, or a shape, for which zeros of the parameters' dtype are used.

    Runs once in evaluation mode without recording; modes are restored, also after an error.

    >>> from nbgrad import nn
    >>> print(summary(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (2, 4)))
    layer        output shape  parameters  bytes
    --------------------------------------------
    Sequential   (2, 3)                 0      0
      0: Linear  (2, 3)                15     60
      1: ReLU    (2, 3)                 0      0
    --------------------------------------------
    total                              15     60
    trainable parameters: 15
    """
    shapes: dict[int, tuple[int, ...]] = {}
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(partial(_note, shapes)))
        stack.enter_context(_evaluating(model))
        stack.enter_context(no_grad())
        model(*_inputs(model, input))
    seen: set[int] = set()
    rows = tuple(_row(path, module, shapes, seen) for path, module in model.named_modules())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Summary(rows, sum(r.parameters for r in rows), trainable, sum(r.nbytes for r in rows))


def _note(shapes: dict[int, tuple[int, ...]], module: Module, args: Any, y: Any) -> None:
    if isinstance(y, Tensor):
        shapes.setdefault(id(module), y.shape)


def _row(path: str, module: Module, shapes: dict[int, tuple[int, ...]], seen: set[int]) -> Row:
    parameters = [p for p in module.parameters(recurse=False) if id(p) not in seen]
    buffers = [b for b in module.buffers(recurse=False) if id(b) not in seen]
    seen.update(map(id, [*parameters, *buffers]))
    return Row(path.rpartition(".")[2], type(module).__name__, path.count(".") + bool(path),
               shapes.get(id(module)), sum(p.numel() for p in parameters),
               sum(t.nbytes for t in [*parameters, *buffers]))


def _inputs(model: Module, input: Any) -> tuple[Tensor, ...]:
    if isinstance(input, (Tensor, np.ndarray)):
        return (as_tensor(input),)
    if not isinstance(input, (tuple, list)) or not input:
        raise TypeError(f"summary: expected a Tensor, an array or a shape, got {input!r}")
    if all(isinstance(n, (int, np.integer)) for n in input):
        dtype = next((p.dtype for p in model.parameters()), np.dtype(np.float32))
        return (as_tensor(np.zeros(tuple(input), dtype)),)
    return tuple(as_tensor(x) for x in input)


@contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
