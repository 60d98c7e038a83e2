"""Writes to a tensor, each of which takes the value and the history of an op's result."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.backend import check_index, writable

from .mode import state
from .node import OPS
from .promotion import constant
from .tensors import Tensor, as_tensor
from .versions import bump

__all__: list[str] = []


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


def _write(self: Tensor, new: Tensor, name: str) -> Tensor:
    """Take new's value and history."""
    if new.shape != self.shape:
        raise RuntimeError(f"{name}: output with shape {self.shape} doesn't match the "
                           f"broadcast shape {new.shape}")
    if not np.can_cast(new.dtype, self.dtype, "same_kind"):
        raise RuntimeError(f"{name}: result type {new.dtype} can't be cast to the desired "
                           f"output type {self.dtype}")
    if new.requires_grad:
        retained, self._retained = self._retained, None
        self.grad_fn, self.requires_grad = new.grad_fn, True
        if retained is not None:             # it follows the tensor to its new value
            retained.remove()
            self.retain_grad()
    elif state.recording and self.grad_fn is not None:     # nothing of the old value is left
        self.grad_fn, self.requires_grad = None, False
    np.copyto(self.data, new.data, casting="same_kind")
    bump(self)
    return self


def _writable(self: Tensor, name: str, *others: Any) -> None:
    """In-place writes are recorded on interior tensors that share memory with no other."""
    if not writable(self.data):
        raise RuntimeError(f"{name}: the tensor is a read-only array or an expanded view")
    if not state.recording:
        return
    if self.requires_grad and self.is_leaf:
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place "
                           "operation.")
    grads = self.requires_grad or any(isinstance(o, Tensor) and o.requires_grad for o in others)
    seen = [r() for r in (self._version or ())[2:]]
    if grads and any(t is not None and t is not self for t in seen):
        raise RuntimeError(f"{name}: this tensor shares memory with a view, and an in-place "
                           "write that requires grad would not reach the other; use the "
                           "out-of-place op")


def _in_place(self: Tensor, name: str, *args: Any) -> Tensor:
    self._writable(name + "_", *args)
    return self._write(OPS[name](self, *args), name + "_")


def add_(self: Tensor, other: Any, alpha: Any = 1) -> Tensor:
    return self._in_place("add", other if alpha == 1 else other * alpha)


def sub_(self: Tensor, other: Any, alpha: Any = 1) -> Tensor:
    return self._in_place("sub", other if alpha == 1 else other * alpha)


def mul_(self: Tensor, other: Any) -> Tensor:
    return self._in_place("mul", other)


def div_(self: Tensor, other: Any) -> Tensor:
    return self._in_place("div", other)


def clamp_(self: Tensor, min: Any = None, max: Any = None) -> Tensor:
    self._writable("clamp_", min, max)
    x = OPS["clone"](self) if state.recording else self     # the vjp looks at what x was
    return self._write(OPS["clamp"](x, min, max), "clamp_")


def zero_(self: Tensor) -> Tensor:
    return self.fill_(0)


def fill_(self: Tensor, value: Any) -> Tensor:
    self._writable("fill_", value)
    self.data.fill(value.item() if isinstance(value, Tensor) else value)
    bump(self)
    if self.grad_fn is not None:
        self.grad_fn, self.requires_grad = None, False
    return self


def copy_(self: Tensor, src: Any, non_blocking: bool = False) -> Tensor:
    self._writable("copy_", src)
    src = src if isinstance(src, Tensor) else as_tensor(src)
    # what comes to the host is read below, so it must be there
    src = src.to(self.dtype, device=self.device, non_blocking=non_blocking and self.device != "cpu")
    if src.shape != self.shape:
        src = OPS["broadcast_to"](src, shape=self.shape)
    return self._write(src, "copy_")


def __setitem__(self: Tensor, index: Any, value: Any) -> None:
    self._writable("__setitem__", value)
    recorded = state.recording and (
        self.requires_grad or (isinstance(value, Tensor) and value.requires_grad))
    if recorded:
        value = value if isinstance(value, Tensor) else constant(value, self, "__setitem__")
        self._write(OPS["index_put"](self, value, index=index), "__setitem__")
    else:
        index = tuple(map(_plain, index)) if isinstance(index, tuple) else _plain(index)
        check_index(self.data, index)
        self.data[index] = _plain(value)
        bump(self)


for _f in (_write, _writable, _in_place, add_, sub_, mul_, div_, clamp_, zero_, fill_, copy_,
           __setitem__):
    setattr(Tensor, _f.__name__, _f)
for _name in ("add", "sub", "mul", "div"):         # x += y writes to x's memory, as in PyTorch
    _python = "truediv" if _name == "div" else _name
    setattr(Tensor, f"__i{_python}__", getattr(Tensor, _name + "_"))
