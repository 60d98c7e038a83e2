"""What multiplies float32 matrices: the CUDA cores, or, if asked for, the tensor cores."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import fma, tensor
from .memory import SIMULATED, xp

__all__ = ["HALVES", "WAYS", "Way", "multiplies_halves", "use", "way"]


class Way(NamedTuple):
    """An arithmetic of tiles, the padding of rows side by side in shared memory, what it needs."""

    arithmetic: Any
    pad: int
    least: tuple[int, int]       # compute capability
    suffix: str                  # of kernels' names


WAYS = {"fma": Way(fma.arithmetic, 0, (0, 0), ""),
        "tf32": Way(tensor.fast, tensor.PAD, (8, 0), "_tf32"),
        "3xtf32": Way(tensor.exact, tensor.PAD, (8, 0), "_3xtf32")}
HALVES = {kind: Way(arithmetic, tensor.PAD, (8, 0), f"_{kind}")         # words of two of them
          for kind, arithmetic in tensor.halves.items()}
_chosen = "fma"


def use(name):
    """Multiply float32 by "fma" (the default), in "tf32" or in "3xtf32", where the device can.
    Raises ValueError for another name."""
    global _chosen
    if name not in WAYS:
        raise ValueError(f"use: expected one of {sorted(WAYS)}, got {name!r}")
    _chosen = name


def way(dtype):
    """The name of what multiplies this dtype on the current device."""
    if _chosen == "fma" or dtype != np.float32:
        return "fma"
    return _chosen if _current() >= WAYS[_chosen].least else "fma"


def multiplies_halves():
    """Whether the current device has tensor cores for float16 and bfloat16."""
    return _current() >= HALVES["bf"].least


def loads():
    """The name of how tiles come to the current device's shared memory: see ``tile.LOADS``."""
    return "ahead" if _current() >= (8, 0) else "plain"


def _current():
    return _capability(0 if SIMULATED else xp.cuda.runtime.getDevice())


@cache
def _capability(number):
    if SIMULATED:
        return 9, 0
    cc = xp.cuda.Device(number).compute_capability
    return int(cc[:-1]), int(cc[-1])
