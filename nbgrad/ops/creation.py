"""New tensors of given values. float32 unless a dtype is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, checked_dtype
from nbgrad.ops.random import _made, _shape


def zeros(*size: Any, dtype: Any = np.float32, requires_grad: bool = False,
          device: Any = None) -> Tensor:
    """All 0."""
    return _made(np.zeros(_shape(size), checked_dtype(dtype)), dtype, requires_grad, device)


def ones(*size: Any, dtype: Any = np.float32, requires_grad: bool = False,
         device: Any = None) -> Tensor:
    """All 1."""
    return _made(np.ones(_shape(size), checked_dtype(dtype)), dtype, requires_grad, device)


def empty(*size: Any, dtype: Any = np.float32, requires_grad: bool = False,
          device: Any = None) -> Tensor:
    """Whatever was in memory."""
    return _made(np.empty(_shape(size), checked_dtype(dtype)), dtype, requires_grad, device)


def full(size: Any, fill_value: Any, dtype: Any = None, requires_grad: bool = False,
         device: Any = None) -> Tensor:
    """All ``fill_value``, whose kind decides the dtype unless one is given."""
    if dtype is None:
        dtype = {bool: np.bool_, int: np.int64}.get(type(fill_value), np.float32)
    return _made(np.full(_shape((size,)), fill_value, checked_dtype(dtype)), dtype, requires_grad,
                 device)


def zeros_like(input: Tensor, dtype: Any = None) -> Tensor:
    """All 0, of x's shape, dtype and memory order."""
    return _made(np.zeros_like(input.data, dtype), dtype or input.dtype, False)


def ones_like(input: Tensor, dtype: Any = None) -> Tensor:
    """All 1, of x's shape, dtype and memory order."""
    return _made(np.ones_like(input.data, dtype), dtype or input.dtype, False)


def empty_like(input: Tensor, dtype: Any = None) -> Tensor:
    """Whatever was in memory, of x's shape, dtype and memory order."""
    return _made(np.empty_like(input.data, dtype), dtype or input.dtype, False)


def full_like(input: Tensor, fill_value: Any, dtype: Any = None) -> Tensor:
    """All ``fill_value``, of x's shape, dtype and memory order."""
    return _made(np.full_like(input.data, fill_value, dtype), dtype or input.dtype, False)


def arange(start: Any, end: Any = None, step: Any = 1, dtype: Any = None,
           requires_grad: bool = False, device: Any = None) -> Tensor:
    """start, start + step, … below end; int64 if all are integers, else float32."""
    start, end = (0, start) if end is None else (start, end)
    if step == 0:
        raise ValueError("arange: step must be nonzero")
    if (end - start) * step < 0:
        raise ValueError("arange: upper bound and lower bound inconsistent with step sign")
    if dtype is None:
        whole = all(isinstance(v, (int, np.integer)) for v in (start, end, step))
        dtype = np.int64 if whole else np.float32
    return _made(np.arange(start, end, step), dtype, requires_grad, device)


def linspace(start: float, end: float, steps: int, dtype: Any = np.float32,
             requires_grad: bool = False, device: Any = None) -> Tensor:
    """``steps`` numbers from start to end, both included."""
    if steps < 0:
        raise ValueError(f"linspace: number of steps must be non-negative, got {steps}")
    return _made(np.linspace(start, end, steps), dtype, requires_grad, device)


def eye(n: int, m: int | None = None, dtype: Any = np.float32, device: Any = None) -> Tensor:
    """1 on the diagonal, 0 elsewhere."""
    if min(n, n if m is None else m) < 0:
        raise ValueError(f"eye: expected sizes >= 0, got {n} and {m}")
    return _made(np.eye(n, m), dtype, False, device)


def from_numpy(ndarray: np.ndarray[Any, Any]) -> Tensor:
    """A Tensor that shares the array's memory. Raises TypeError for anything else."""
    if not isinstance(ndarray, np.ndarray):
        raise TypeError(f"from_numpy: expected np.ndarray (got {type(ndarray).__name__})")
    return as_tensor(ndarray)


def is_tensor(obj: Any) -> bool:
    """Whether it is a Tensor."""
    return isinstance(obj, Tensor)


def _new(name: str, create: Any) -> Any:
    def f(self: Tensor, *args: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
        return create(*args, dtype=dtype or self.dtype, requires_grad=requires_grad,  # type: ignore[no-any-return]
                      device=self.device)
    f.__name__ = f.__qualname__ = "new_" + name
    f.__doc__ = f"``{name}`` of this tensor's dtype, where it lives."
    return f


for _name, _create in {"zeros": zeros, "ones": ones, "empty": empty, "full": full}.items():
    setattr(Tensor, f"new_{_name}", _new(_name, _create))

__all__ = ["arange", "empty", "empty_like", "eye", "from_numpy", "full", "full_like", "is_tensor",
           "linspace", "ones", "ones_like", "zeros", "zeros_like"]
