"""What becomes an array, and of which dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import ndarray

from nbgrad.backend import adopted, half_dtype, is_array

__all__ = ["Array", "checked_dtype", "to_array"]

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

# One object per dtype, so that ops can compare dtypes with `is`.
_DTYPES = {d: d for d in map(np.dtype, ["f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8",
                                        "?"])}


def checked_dtype(dtype: Any) -> np.dtype[Any]:
    """A supported dtype; Python's float is float32 and int is int64, as in PyTorch. The kind of
    floating dtypes is "f", that of bfloat16 "V"."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        return _half(dtype)
    dtype = np.dtype(np.float32) if dtype is float else np.dtype(dtype).newbyteorder("=")
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype.name not in ("float16", "bfloat16"):
        raise TypeError(f"dtype {dtype} is not supported: use float32, float64, float16, bfloat16, "
                        "an integer or bool")
    return _half(dtype.name)


def _half(name: str) -> np.dtype[Any]:
    dtype = half_dtype(name)
    return _DTYPES.setdefault(dtype, dtype)


def to_array(data: Any, dtype: Any = None, copy: bool | None = None) -> Array:
    if type(data) is not ndarray and hasattr(data, "__cuda_array_interface__"):
        data = data if is_array(data) else adopted(data)
    if is_array(data) and type(data) is not ndarray:           # on a device already
        return data.astype(checked_dtype(dtype or data.dtype), copy=bool(copy))  # type: ignore[no-any-return]
    typed = isinstance(data, (ndarray, np.generic)) or hasattr(data, "__array_interface__")
    try:
        array = np.asarray(data)
    except ValueError as e:
        raise ValueError(f"tensor: expected a rectangular array of numbers: {e}") from None
    if dtype is None:
        dtype = np.float32 if array.dtype == np.float64 and not typed else array.dtype
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise TypeError(f"tensor: expected numbers or bools, got {type(data).__name__} of dtype "
                        f"{array.dtype}")
    dtype = checked_dtype(dtype)
    fit = array.dtype is dtype and array.flags.aligned     # kernels are compiled for aligned memory
    return np.array(array, dtype, order="K", copy=copy if fit else True)
