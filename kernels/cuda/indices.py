"""Indices that are out of range, which CuPy wraps around without a word."""

import numpy as np

from . import graphs, launch
from .memory import Array

__all__ = ["check"]


def check(shape, index):
    """Raise NumPy's IndexError for an integer of ``index`` that is out of range. Arrays of the host
    are looked at always; those of the device, for whose values it would have to wait, in debug mode
    only, and not while a step is captured."""
    parts = index if isinstance(index, tuple) else (index,)
    parts = [np.asarray(part) if isinstance(part, list) else part for part in parts]
    axis, taken = 0, sum(map(_axes, parts))
    for part in parts:
        if part is Ellipsis:
            axis += len(shape) - taken
        elif isinstance(part, np.ndarray | Array) and part.dtype.kind in "iu" and part.size and (
                not isinstance(part, Array) or (launch.debug and graphs.state.capture is None)):
            for i in (int(part.min()), int(part.max())):
                if not -shape[axis] <= i < shape[axis]:
                    raise IndexError(f"index {i} is out of bounds for axis {axis} with size "
                                     f"{shape[axis]}")
        axis += _axes(part)


def _axes(part):
    """How many axes of the array a part of an index is for."""
    if part is None or part is Ellipsis or isinstance(part, bool | np.bool_):
        return 0
    return part.ndim if getattr(part, "dtype", None) == np.bool_ else 1
