"""Which kernels serve an array. The only module that imports ``nbgrad.kernels``."""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["empty_cache", "get_float32_matmul_precision",            # what `import nbgrad` shows
           "get_num_threads", "set_float32_matmul_precision", "set_num_threads", "set_winograd"]

_collects = gc.isenabled()
gc.disable()              # looking for garbage among all that Numba imports takes 25 ms
try:
    from nbgrad.kernels import cpu, half
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

_serving: dict[type, ModuleType] = {np.ndarray: cpu}       # the types of arrays that there are
_cuda: Any = None            # nbgrad.kernels.cuda, once a device has been asked for
several: list[str] = []      # device types other than "cpu" in use: empty costs ops nothing
_WAYS = {"highest": "fma", "3xtf32": "3xtf32", "high": "tf32", "medium": "tf32"}   # of precision.py
_precision = "highest"       # what was asked for, maybe before there was a device
_halves: set[np.dtype[Any]] = set()          # of float16 and bfloat16, those in use; as above


def kernels(x: Any) -> Any:
    """The kernel module for where the tensor ``x`` lives."""
    try:
        module = _serving[type(x.data)]
        return half.through(module) if _halves and x.data.dtype in _halves else module
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


def half_dtype(name: str) -> np.dtype[Any]:
    """"float16" or "bfloat16", which ops take from now on. Raises TypeError where bfloat16 needs
    ml_dtypes."""
    if name == "bfloat16":
        try:
            import_module("ml_dtypes")                     # tells NumPy of it
        except ImportError:
            raise TypeError("bfloat16 needs ml_dtypes: run `pip install ml_dtypes`") from None
    dtype = np.dtype(name)
    _halves.add(dtype)
    return dtype


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return bool(half.is_half(dtype))


def serves(own: np.dtype[Any], dtype: np.dtype[Any]) -> bool:
    """Whether a norm's parameters and running statistics may be of dtype ``own`` beside an input of
    another: the same, or float32 where the input is a half."""
    return own == dtype or (own == np.float32 and half.is_half(dtype))


# ------------------------------------------------------------------------------------------ devices

def is_array(x: Any) -> bool:
    """Whether x is an array as tensors have them, on any device."""
    return type(x) in _serving


def device_of(array: Any) -> str:
    """Where an array lives: "cpu", "cuda" for the first GPU, "cuda:1" for the next."""
    if _cuda is None or type(array) is not _cuda.memory.Array:
        return "cpu"
    number = _cuda.memory.device_of(array)
    return f"cuda:{number}" if number else "cuda"


def checked_device(device: Any) -> str:
    """A device by the name that ``device_of`` gives it; None is the CPU. Raises RuntimeError with
    what is missing."""
    kind, _, number = ("cpu" if device is None else str(device)).partition(":")
    if kind == "cpu" and number in ("", "0"):
        return "cpu"
    if kind != "cuda" or not (number or "0").isdecimal():
        raise RuntimeError(f"device {device!r} is not there: expected 'cpu', 'cuda' or 'cuda:0'")
    _enable_cuda(device)
    if int(number or 0) >= _cuda.memory.count():
        raise RuntimeError(f"device {device!r} is not there: {_cuda.memory.count()} CUDA devices")
    return f"cuda:{number}" if int(number or 0) else "cuda"


def _enable_cuda(device: Any) -> None:
    global _cuda
    if _cuda is not None:
        return
    try:
        cuda = import_module("nbgrad.kernels.cuda")
    except ImportError as e:
        if (e.name or "").startswith("nbgrad"):
            raise
        # without a name: something is there that does not load, as CuPy of another CUDA
        what = f"needs {e.name}" if e.name else f"cannot be used: {e}"
        raise RuntimeError(f"device {device!r} {what}: run `pip install 'nbgrad[cuda]'`") from (
            None if e.name else e)
    problem = cuda.memory.problem()
    if problem:
        raise RuntimeError(f"device {device!r} is not there: {problem}")
    if _precision != "highest":
        cuda.precision.use(_WAYS[_precision])
    _cuda = cuda
    _serving[cuda.memory.Array] = cuda
    several.append("cuda")


def move(array: Any, device: str, non_blocking: bool = False) -> Any:
    """The array itself, or a copy of it on another device; ``non_blocking``: maybe there later."""
    here = device_of(array)
    if here == device:
        return array
    if here != "cpu":
        array = _cuda.memory.to_host(array, non_blocking and device == "cpu")
    if device != "cpu":
        array = _cuda.memory.to_device(array, int(device.partition(":")[2] or 0), non_blocking)
    return array


def pinned(array: Any) -> Any:
    """The array itself if it is in pinned memory, or a copy of it there. Raises RuntimeError with
    what is missing, and for arrays on a device."""
    if device_of(array) != "cpu":
        raise RuntimeError(f"cannot pin a tensor on {device_of(array)!r}: only dense CPU tensors "
                           "can be pinned")
    checked_device("cuda")
    return array if _cuda.memory.is_pinned(array) else _cuda.memory.pin(array)


def is_pinned(array: Any) -> bool:
    """Whether an array is in pinned memory."""
    return _cuda is not None and device_of(array) == "cpu" and bool(_cuda.memory.is_pinned(array))


def capturing() -> bool:
    """Whether a step is being captured for ``nbgrad.cuda.graph``."""
    return _cuda is not None and _cuda.graphs.state.capture is not None


def refuse_captured(what: str) -> None:
    """Raise RuntimeError if a step is being captured, of which ``what`` cannot be a part."""
    if _cuda is not None:
        _cuda.graphs.refuse(what)


def watch_captured(get: Callable[[], Any]) -> None:
    """While a step is captured: what ``get()`` returns is part of it."""
    if _cuda is not None:
        _cuda.graphs.watch(get)


def cuda_kernels() -> Any:
    """nbgrad.kernels.cuda. Raises RuntimeError with what is missing."""
    checked_device("cuda")
    return _cuda


def constant(value: Any, dtype: np.dtype[Any], like: Any) -> Any:
    """A 0-d array where ``like`` lives. On a device it is made once: to send a number takes longer
    than a kernel. Nobody writes to it."""
    array = np.array(value, dtype)
    device = device_of(like)
    return array if device == "cpu" else _constant(array.tobytes(), dtype, device)


@lru_cache(1024)
def _constant(value: bytes, dtype: np.dtype[Any], device: str) -> Any:
    return move(np.frombuffer(value, dtype).reshape(()), device)


def full(shape: Any, value: Any, dtype: Any, like: Any) -> Any:
    """A new array of one value where ``like`` lives."""
    if type(like) is np.ndarray:
        return np.full(shape, value, dtype)
    array = _cuda.memory.empty(tuple(shape), dtype)     # CuPy's full_like takes () for no shape
    array.fill(value)
    return array


def check_index(array: Any, index: Any) -> None:
    """Raise IndexError for an index out of range that the array itself would take (CuPy's wrap)."""
    if type(array) is not np.ndarray:
        _cuda.indices.check(array.shape, index)


def adopted(array: Any) -> Any:
    """The array of a device that ``__cuda_array_interface__`` describes, as tensors have them, in
    the same memory. Raises RuntimeError where there is no device."""
    return cuda_kernels().memory.adopt(array)


def add_at(array: Any, index: Any, values: Any) -> None:
    """array[index] += values, also where indices repeat (on a device in no fixed order)."""
    if type(array) is np.ndarray:
        np.add.at(array, index, values)
    else:
        _cuda.memory.add_at(array, index, values)


def greatest(array: Any, axes: Any = None, keepdims: bool = False, least: float = 0.0) -> Any:
    """The largest element over axes, or ``least`` of none. (CuPy's max takes no initial value.)"""
    if array.size:
        return array.max(axes, keepdims=keepdims)
    return array.sum(axes, keepdims=keepdims) + least


def writable(array: Any) -> bool:
    """Whether an array may be written to: it is not read-only, and no two of its elements are one.
    (CuPy has no read-only arrays.)"""
    if type(array) is np.ndarray:
        return array.flags.writeable
    return not any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape))


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


def set_float32_matmul_precision(precision: str) -> None:
    """How CUDA devices multiply float32 in matrix products and convolutions, forward and backward.

    ``"highest"`` (the default): on the CUDA cores, each product and sum rounded to float32's 24
    bits. ``"high"``: on the tensor cores in TF32, whose numbers are rounded to 11 bits before they
    are multiplied and added up in float32: a relative error of up to 2⁻¹⁰ of the sum of the
    products' sizes. ``"medium"``: here the same (PyTorch may take bfloat16). ``"3xtf32"`` (nbgrad's
    own): on the tensor cores, each number as the sum of two of TF32, of whose four products the
    least is left out: an error of up to 2⁻²⁰ of that sum instead of 2⁻¹⁰, at a third of the rate;
    numbers from 2¹²⁸ (1 − 2⁻¹²) on become Inf. NaN and Inf spread as in float32, always. Devices
    below compute capability 8.0 stay with the CUDA cores. The CPU, float64, float16 and bfloat16
    are not concerned. May be said before a device is used. Raises ValueError for other names.

    >>> import nbgrad
    >>> nbgrad.set_float32_matmul_precision("high")
    >>> nbgrad.get_float32_matmul_precision()
    'high'
    >>> nbgrad.set_float32_matmul_precision("highest")
    """
    global _precision
    if precision not in _WAYS:
        raise ValueError("set_float32_matmul_precision: expected 'highest', '3xtf32', 'high' or "
                         f"'medium', got {precision!r}")
    _precision = precision
    if _cuda is not None:
        _cuda.precision.use(_WAYS[precision])


def get_float32_matmul_precision() -> str:
    """What ``set_float32_matmul_precision`` has been given last; "highest" at first."""
    return _precision


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
        "devices": ["cpu", *several],
    }
