"""Device arrays are CuPy's: their pool, streams, views and exchange with other libraries.

In the simulator they are NumPy's, of a class of their own, so that an array's type says where it
lives and a kernel that leaves an output unwritten is seen.

Host memory is NumPy's. Where it is pinned, the device copies from and to it while the host goes on;
arrays of such copies are kept until their events have passed, since CuPy's pool would hand their
memory out again before.
"""

import gc
import math
import threading
from contextlib import nullcontext
from functools import lru_cache

import numpy as np
from numba import config

from ..half import is_half
from . import graphs
from .simulator import fresh

__all__ = ["Array", "SIMULATED", "add_at", "adopt", "contiguous", "empty", "empty_like", "gapless",
           "in_order", "is_pinned", "order_of", "pin", "queue", "to_device", "to_host", "xp"]

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    from .simulated import Array, _wrapped, xp  # noqa: F401
else:
    import cupy as xp

    Array = xp.ndarray

OWN = 2                      # cudaStreamPerThread
_lock = threading.Lock()
_flying = []                 # (event, arrays) of copies that may not be done


class PinnedBytes(bytearray):
    """The simulator's pinned memory."""


def _sized(shape, dtype, error):
    size = math.prod(shape) * dtype.itemsize
    free, total = xp.cuda.Device().mem_info
    return MemoryError(f"out of device memory: {size:,} bytes for shape {tuple(shape)} of {dtype}, "
                       f"{free:,} of {total:,} free: {error}")


def empty(shape, dtype):
    """An uninitialised C-ordered array. Raises MemoryError with sizes where there is no room even
    without what nobody reaches any more and the pool's idle blocks."""
    dtype = np.dtype(dtype)
    if SIMULATED:
        return fresh(shape, dtype).view(Array)
    try:
        return xp.empty(shape, dtype)
    except xp.cuda.memory.OutOfMemoryError:
        _sweep()
        gc.collect()                     # graphs whose tensors know each other
        empty_cache()
    try:
        return xp.empty(shape, dtype)
    except xp.cuda.memory.OutOfMemoryError as e:
        raise _sized(shape, dtype, e) from None


def contiguous(x):
    """Whether x is C-ordered and without gaps. CuPy makes flags in 0.3 us; this takes 0.05."""
    return x.flags.c_contiguous if isinstance(x, np.ndarray) else x._c_contiguous


def order_of(x):
    """x's axes from the outermost in memory to the innermost."""
    return _axes(x.shape, x.strides)[0]


@lru_cache(1 << 12)
def _axes(shape, strides):
    """Axes from the outermost in memory to the innermost, sizes in that order, and the way back."""
    order = tuple(sorted(range(len(shape)), key=lambda i: -abs(strides[i]) if shape[i] > 1 else 0))
    return order, tuple(shape[i] for i in order), tuple(order.index(i) for i in range(len(shape)))


@lru_cache(1 << 12)
def gapless(shape, strides, itemsize):
    """Whether elements fill their memory, in whatever order of the axes."""
    step = itemsize
    for n, s in sorted(zip(shape, strides), key=lambda axis: abs(axis[1])):
        if n != 1:
            if s != step and 0 not in shape:
                return False
            step *= n
    return True


def in_order(x):
    """x seen with its axes from the outermost in memory to the innermost."""
    return x if contiguous(x) else x.transpose(order_of(x))


def empty_like(x, dtype=None):
    """An uninitialised array of x's shape, in x's memory order where x is dense."""
    return _laid_out(empty, x, dtype or x.dtype)


def _laid_out(make, x, dtype):
    if contiguous(x):
        return make(x.shape, dtype)
    _, shape, back = _axes(x.shape, x.strides)
    return make(shape, dtype).transpose(back)


def adopt(x):
    """The device array in whatever has ``__cuda_array_interface__``, without a copy."""
    return np.asarray(x).view(Array) if SIMULATED else xp.asarray(x)


def problem():
    """What keeps kernels from running here, or ""."""
    if SIMULATED:
        return "" if config.DISABLE_JIT else (
            "NUMBA_ENABLE_CUDASIM runs kernels in Python: set NUMBA_DISABLE_JIT=1, too")
    try:
        return "" if count() else "no GPU"
    except Exception as e:
        return f"no GPU that CUDA can use: {e}"


def count():
    """Number of devices."""
    return 1 if SIMULATED else xp.cuda.runtime.getDeviceCount()


def current():
    """Number of the device that kernels run on and arrays are made on."""
    return 0 if SIMULATED else xp.cuda.runtime.getDevice()


def on(number):
    """A block of code whose current device is that one."""
    return nullcontext() if SIMULATED else xp.cuda.Device(number)


def queue():
    """What kernels run on one after the other: device and stream, and the thread where each has a
    stream of its own by the same name."""
    if SIMULATED:
        return 0, 0, 0
    stream = xp.cuda.get_current_stream().ptr
    return xp.cuda.runtime.getDevice(), stream, threading.get_ident() if stream == OWN else 0


def device_of(x):
    """Number of the device that an array is on."""
    return 0 if SIMULATED else x.device.id


# --------------------------------------------------------------------------------------- transfers

def _empty_pinned(shape, dtype):
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes:
        return np.empty(shape, dtype)
    block = PinnedBytes(nbytes) if SIMULATED else xp.cuda.alloc_pinned_memory(nbytes)
    return np.ndarray(tuple(shape), dtype, block)


def is_pinned(x):
    """Whether a NumPy array's memory is pinned."""
    while isinstance(x, np.ndarray):
        x = x.base
    return isinstance(x, PinnedBytes if SIMULATED else xp.cuda.PinnedMemoryPointer)


def pin(x):
    """A copy of a NumPy array in pinned memory."""
    out = _laid_out(_empty_pinned, x, x.dtype)
    np.copyto(out, x)
    return out


def _hold(*arrays):
    """Keep arrays alive until the current stream has done what it has been asked for."""
    event = xp.cuda.Event(disable_timing=True)
    event.record()
    _sweep()
    with _lock:
        _flying.append((event, arrays))


def _sweep():
    """Let go of arrays whose copies are done."""
    with _lock:
        _flying[:] = [pair for pair in _flying if not pair[0].done]


def to_device(x, number=0, non_blocking=False):
    """A copy of a NumPy array on a device. ``non_blocking``: pinned memory may be read after this
    returns."""
    graphs.refuse("a transfer to the device")
    if SIMULATED:
        return np.array(x, order="K").view(Array)
    with on(number):
        x = x if in_order(x).flags.c_contiguous else np.ascontiguousarray(x)
        out = empty_like(x)
        in_order(out).set(in_order(x))
        if is_pinned(x):
            _hold(x) if non_blocking else xp.cuda.get_current_stream().synchronize()
        return out


def add_at(x, index, values):
    """x[index] += values; where indices repeat, CuPy adds atomically, in no fixed order."""
    if is_half(x.dtype):
        sums = x.astype(np.float32)
        xp.add.at(sums, index, values.astype(np.float32))
        x[...] = sums.astype(x.dtype)
    else:
        xp.add.at(x, index, values)


def to_host(x, non_blocking=False):
    """A copy of a device array as NumPy's. ``non_blocking``: in pinned memory, whose values are
    there after ``synchronize()``."""
    graphs.refuse("a transfer from the device (.item(), .cpu(), a printed loss)")
    if non_blocking and x.size:
        return _later(x)
    if SIMULATED:
        _arrive()
        return np.array(x.view(np.ndarray), order="K")
    if contiguous(x):
        return xp.asnumpy(x)
    return xp.asnumpy(in_order(x)).transpose(_axes(x.shape, x.strides)[2])


def _later(x):
    if SIMULATED:
        now = np.array(x.view(np.ndarray), order="K")
        out = pin(now)
        out[...] = fresh(now.shape, now.dtype)
        _flying.append((now, out))
        return out
    with x.device:
        x = x if in_order(x).flags.c_contiguous else xp.ascontiguousarray(x)
        out = _laid_out(_empty_pinned, x, x.dtype)
        in_order(x).get(out=in_order(out), blocking=False)
        _hold(x, out)
    return out


def _arrive():
    """The simulator's copies to the host, which are seen when somebody waits for them."""
    for now, out in _flying:
        np.copyto(out, now)
    _flying.clear()


def synchronize():
    """Wait for all that the device has been asked for; errors of kernels are raised here."""
    graphs.refuse("synchronize()")
    if SIMULATED:
        _arrive()
        return
    xp.cuda.Device().synchronize()


def empty_cache():
    """Give the pool's idle blocks back to the device; not while a step is captured."""
    if not SIMULATED and graphs.state.capture is None:
        xp.get_default_memory_pool().free_all_blocks()
        xp.get_default_pinned_memory_pool().free_all_blocks()


def used():
    """Bytes of the pool that arrays take; the simulator has none."""
    return 0 if SIMULATED else xp.get_default_memory_pool().used_bytes()


def reserved():
    """Bytes that the pool has from the device."""
    return 0 if SIMULATED else xp.get_default_memory_pool().total_bytes()
