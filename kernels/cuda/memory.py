"""Device arrays are CuPy's: their pool, streams, views and exchange with other libraries.

In the simulator they are NumPy's, of a class of their own, so that an array's type says where it
lives and a kernel that leaves an output unwritten is seen.
"""

import math

import numpy as np
from numba import config

from . import graphs
from .simulator import fresh

__all__ = ["Array", "SIMULATED", "empty", "empty_like", "in_order", "order_of", "to_device",
           "to_host", "xp"]

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    from .simulated import Array, _wrapped, xp  # noqa: F401
else:
    import cupy as xp

    Array = xp.ndarray


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
    if x.flags.c_contiguous:
        return empty(x.shape, dtype or x.dtype)
    order = order_of(x)
    out = empty([x.shape[i] for i in order], dtype or x.dtype)
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


def to_device(x, number=0):
    """A copy of a NumPy array on a device."""
    graphs.refuse("a transfer to the device")
    if SIMULATED:
        return np.array(x, order="K").view(Array)
    with xp.cuda.Device(number):
        x = x if in_order(x).flags.c_contiguous else np.ascontiguousarray(x)
        out = empty_like(x)
        in_order(out).set(in_order(x))
        return out


def to_host(x):
    """A copy of a device array as NumPy's."""
    graphs.refuse("a transfer from the device (.item(), .cpu(), a printed loss)")
    return np.array(x.view(np.ndarray), order="K") if SIMULATED else xp.asnumpy(x, order="A")


def synchronize():
    """Wait for all that the device has been asked for; errors of kernels are raised here."""
    graphs.refuse("synchronize()")
    if not SIMULATED:
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
