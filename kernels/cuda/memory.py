"""Device arrays are CuPy's: their pool, streams, views and exchange with other libraries.

In the simulator they are NumPy's, of a class of their own, so that an array's type says where it
lives and a kernel that leaves an output unwritten is seen.

Host memory is NumPy's. Where it is pinned, the device copies from and to it while the host goes on;
arrays of such copies are kept until their events have passed, since CuPy's pool would hand their
memory out again before.
"""

import math
import threading

import numpy as np
from numba import config

from . import graphs
from .simulator import fresh

__all__ = ["Array", "SIMULATED", "empty", "empty_like", "in_order", "is_pinned", "order_of", "pin",
           "to_device", "to_host", "xp"]

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    from .simulated import Array, _wrapped, xp  # noqa: F401
else:
    import cupy as xp

    Array = xp.ndarray

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
    """An uninitialised C-ordered array. Raises MemoryError with sizes where even an emptied pool
    has no room."""
    dtype = np.dtype(dtype)
    if SIMULATED:
        return fresh(shape, dtype).view(Array)
    try:
        return xp.empty(shape, dtype)
    except xp.cuda.memory.OutOfMemoryError:
        empty_cache()
    try:
        return xp.empty(shape, dtype)
    except xp.cuda.memory.OutOfMemoryError as e:
        raise _sized(shape, dtype, e) from None


def order_of(x):
    """x's axes from the outermost in memory to the innermost."""
    return sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]) if x.shape[i] > 1 else 0)


def in_order(x):
    """x seen with its axes from the outermost in memory to the innermost."""
    return x if x.flags.c_contiguous else x.transpose(order_of(x))


def empty_like(x, dtype=None):
    """An uninitialised array of x's shape, in x's memory order where x is dense."""
    return _laid_out(empty, x, dtype or x.dtype)


def _laid_out(make, x, dtype):
    if x.flags.c_contiguous:
        return make(x.shape, dtype)
    order = order_of(x)
    out = make([x.shape[i] for i in order], dtype)
    return out.transpose([order.index(i) for i in range(x.ndim)])


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
    with _lock:
        _flying[:] = [pair for pair in _flying if not pair[0].done]
        _flying.append((event, arrays))


def to_device(x, number=0, non_blocking=False):
    """A copy of a NumPy array on a device. ``non_blocking``: pinned memory may be read after this
    returns."""
    graphs.refuse("a transfer to the device")
    if SIMULATED:
        return np.array(x, order="K").view(Array)
    with xp.cuda.Device(number):
        x = x if in_order(x).flags.c_contiguous else np.ascontiguousarray(x)
        out = empty_like(x)
        in_order(out).set(in_order(x))
        if is_pinned(x):
            _hold(x) if non_blocking else xp.cuda.get_current_stream().synchronize()
        return out


def to_host(x, non_blocking=False):
    """A copy of a device array as NumPy's. ``non_blocking``: in pinned memory, whose values are
    there after ``synchronize()``."""
    graphs.refuse("a transfer from the device (.item(), .cpu(), a printed loss)")
    if non_blocking and x.size:
        return _later(x)
    if SIMULATED:
        _arrive()
        return np.array(x.view(np.ndarray), order="K")
    return xp.asnumpy(x, order="A")


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
