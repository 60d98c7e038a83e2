"""What multiplies float32 matrices: the CUDA cores, or, if asked for, the tensor cores."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import fma, tensor
from .memory import SIMULATED, xp

__all__ = ["HALVES", "WAYS", "Way", "multiplies_halves", "use", "way"]


class Way(NamedTuple):
    """An arithmetic of tiles, the padding of their rows in shared memory, and what it needs."""

    arithmetic: Any
    pad: int
    least: tuple[int, int]       # compute capability
    suffix: str                  # of kernels' names


WAYS = {"fma": Way(fma.arithmetic, 4, (0, 0), ""),
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
    number = 0 if SIMULATED else xp.cuda.runtime.getDevice()
    return _chosen if _capability(number) >= WAYS[_chosen].least else "fma"


def multiplies_halves():
    """Whether the current device has tensor cores for float16 and bfloat16."""
    number = 0 if SIMULATED else xp.cuda.runtime.getDevice()
    return _capability(number) >= HALVES["bf"].least


@cache
def _capability(number):
    if SIMULATED:
        return 9, 0
    cc = xp.cuda.Device(number).compute_capability
    return int(cc[:-1]), int(cc[-1])
