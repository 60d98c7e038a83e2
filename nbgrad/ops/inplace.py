"""Ops that write their result to their first input: ``x.exp_()`` and so on, methods only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbgrad.autograd import OPS, Tensor, bump, is_grad_enabled
from nbgrad.ops.indexing import masked_fill
from nbgrad.ops.random import Generator, normal, uniform


def _in_place(name: str) -> Callable[..., Tensor]:
    op = OPS[name]

    def f(self: Tensor, *args: Any, **settings: Any) -> Tensor:
        self._writable(name + "_", *args)
        keeps_input = not op.saves_output and is_grad_enabled()
        x = self.clone() if keeps_input else self        # what is kept must not be overwritten
        return self._write(op(x, *args, **settings), name + "_")
    f.__name__ = f.__qualname__ = name + "_"
    f.__doc__ = f"``{name}``, written to this tensor."
    return f


def masked_fill_(self: Tensor, mask: Any, value: Any) -> Tensor:
    """``value`` where mask, written to this tensor."""
    self._writable("masked_fill_", value)
    return self._write(masked_fill(self, mask, value), "masked_fill_")


def _drawn(self: Tensor, name: str, draw: Callable[..., Tensor], *settings: Any) -> Tensor:
    if self.dtype.kind not in "fV":
        raise TypeError(f"{name}: expected a floating tensor, got {self.dtype}")
    self._writable(name)
    np.copyto(self.data, draw(*settings, dtype=self.dtype).data)
    bump(self)
    if self.grad_fn is not None:                     # what was computed is gone
        self.grad_fn, self.requires_grad = None, False
    return self


def normal_(self: Tensor, mean: float = 0, std: float = 1, *,
            generator: Generator | None = None) -> Tensor:
    """Normal random numbers, written to this tensor."""
    return _drawn(self, "normal_", normal, mean, std, self.shape, generator)


def uniform_(self: Tensor, low: float = 0, high: float = 1, *,
             generator: Generator | None = None) -> Tensor:
    """Uniform random numbers on [low, high), written to this tensor."""
    return _drawn(self, "uniform_", uniform, low, high, self.shape, generator)


_NAMES = ("abs", "ceil", "cos", "exp", "expm1", "floor", "log", "log1p", "neg", "pow", "reciprocal",
          "relu", "round", "rsqrt", "sigmoid", "sin", "sqrt", "square", "tanh", "trunc")
for _f in (masked_fill_, normal_, uniform_, *map(_in_place, _NAMES)):
    setattr(Tensor, _f.__name__, _f)

__all__: list[str] = []
