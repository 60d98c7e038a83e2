"""Which kernels serve an array. The only module that imports ``nbgrad.kernels``."""

from __future__ import annotations

import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["empty_cache", "get_num_threads", "set_num_threads",      # what `import nbgrad` shows
           "set_winograd"]

_collects = gc.isenabled()
gc.disable()              # looking for garbage among all that Numba imports takes 25 ms
try:
    from nbgrad.kernels import cpu
except ModuleNotFoundError as e:  # the checkout's kernels/ folder becomes nbgrad.kernels on install
    if e.name is None or not e.name.startswith("nbgrad.kernels"):
        raise
    raise ModuleNotFoundError(
        "nbgrad is not installed: run `pip install -e .` in the checkout", name=e.name) from None
finally:
    if not gc.get_freeze_count():
        gc.freeze()       # and back: what is there now counts as old
        gc.unfreeze()
    if _collects:
        gc.enable()

_serving: dict[type, ModuleType] = {np.ndarray: cpu}


def kernels(x: Any) -> Any:
    """The kernel module for where the tensor ``x`` lives."""
    try:
        return _serving[type(x.data)]
    except KeyError:
        raise TypeError(f"Tensor.data must be a NumPy array, got {type(x.data).__name__}: assign "
                        "other.data, or use x.copy_(other) under no_grad()") from None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Serve NumPy arrays with the ``"cpu"`` or the ``"reference"`` kernels inside the block.

    >>> from nbgrad import backend, tensor
    >>> with backend.use("reference"):
    ...     print((tensor([1.0, 2.0]) * 2).tolist())
    [2.0, 4.0]
    """
    if name not in ("cpu", "reference"):
        raise ValueError(f"use: expected 'cpu' or 'reference', got {name!r}")
    module = import_module(f"nbgrad.kernels.{name}")
    before, _serving[np.ndarray] = _serving[np.ndarray], module
    try:
        yield
    finally:
        _serving[np.ndarray] = before


def get_num_threads() -> int:
    """Number of threads that parallel kernels use."""
    return int(cpu.jit.get_num_threads())


def set_num_threads(n: int) -> None:
    """Use ``n`` threads in parallel kernels. Results do not depend on ``n``."""
    cpu.jit.set_num_threads(n)


def set_winograd(on: bool) -> None:
    """Let 3×3 convolutions with stride 1 use Winograd's products where they are faster (the
    default), or never.

    They take a quarter of the multiplications and change the rounding: in float32 the largest error
    is 1 to 2 times that of the direct sum (1 to 6e-6 of the largest output). An error spreads
    over a tile of 4×4 outputs, and in the gradient of the weights over a channel's nine: beside one
    huge pixel, small ones lose digits that the direct sum keeps. NaN and Inf reach exactly the
    results that they are part of, either way.
    """
    cpu.winograd.enabled = bool(on)


def notify(on: bool = True) -> None:
    """Say on stderr when kernels are compiled, also where it is no terminal."""
    cpu.jit.notify(on)


def empty_cache() -> None:
    """Give the buffer pool's idle memory back to the system."""
    cpu.memory.empty_cache()


def info() -> dict[str, Any]:
    """Facts about this machine and installation: versions, CPU, threads, cache, devices."""
    import importlib.metadata as md

    return {
        "nbgrad": md.version("nbgrad"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": md.version("numba"),
        "llvmlite": md.version("llvmlite"),
        **cpu.jit.machine(),
        "threads": get_num_threads(),
        "threading layer": cpu.jit.threading_layer() or "chosen at the first parallel kernel",
        "kernel cache": str(cpu.jit.cache_dir() or "none (no writable folder)"),
        "devices": ["cpu"],
    }
