"""One dtype for what meets in an op, by PyTorch's rules."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import ndarray

from nbgrad import backend

from .arrays import Array
from .tensors import Tensor, as_tensor, wrap

__all__ = ["constant", "promoted"]


def constant(x: Any, like: Tensor | None, op_name: str) -> Tensor:
    """A Python number takes the dtype of its neighbour where its kind allows, as in PyTorch."""
    if isinstance(x, (bool, int, float)) and like is not None:
        dtype = like.data.dtype
        if isinstance(x, float) and dtype.kind not in "fV":
            dtype = np.dtype(np.float32)
        elif not isinstance(x, bool) and dtype.kind == "b":
            dtype = np.dtype(np.int64)
        array: Array = backend.constant(x, dtype, like.data)
        return wrap(array)
    if isinstance(x, (bool, int, float, ndarray, np.generic, list, tuple)):
        return as_tensor(x)
    raise TypeError(f"{op_name}: expected a Tensor, an array or a number, got {type(x).__name__}")


def promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their result, by PyTorch's rule: a float beats an int whatever its
    width, and within a kind a 0-d tensor does not widen one that has dimensions. float16 and
    bfloat16 give float32."""
    p, q = a.data.dtype, b.data.dtype
    if p == q:
        return a, b
    rank = "biuf".replace("u", "")
    kinds = [rank.index(d.kind.replace("u", "i").replace("V", "f")) for d in (p, q)]
    if kinds[0] != kinds[1]:
        dtype = p if kinds[0] > kinds[1] else q
    elif bool(a.data.ndim) != bool(b.data.ndim):
        dtype = p if a.data.ndim else q
    elif p.itemsize == q.itemsize == 2 and kinds == [2, 2]:
        dtype = np.dtype(np.float32)
    else:
        dtype = np.promote_types(p, q)
    return a.to(dtype), b.to(dtype)
