"""Device arrays are CuPy's: their pool, streams, views and exchange with other libraries.

In the simulator they are NumPy's, of a class of their own, so that an array's type says where it
lives and a kernel that leaves an output unwritten is seen.
"""

import math

import numpy as np
from numba import config

from .simulator import fresh

__all__ = ["Array", "SIMULATED", "empty", "empty_like", "to_device", "to_host", "xp"]

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    xp = np

    class Array(np.ndarray):
        """A simulated device array. Results stay on the device, also those without axes."""

        def __array_wrap__(self, array, context=None, return_scalar=False):
            return np.asarray(array).view(Array)

        def __getitem__(self, index):
            out = super().__getitem__(index)
            if isinstance(out, np.ndarray):
                return out
            index = index if isinstance(index, tuple) else (index,)
            return super().__getitem__((*index, ...))        # one element, too, is a view
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


def empty_like(x, dtype=None):
    """An uninitialised array of x's shape, in x's memory order where x is dense."""
    if x.flags.c_contiguous:
        return empty(x.shape, dtype or x.dtype)
    order = order_of(x)
    out = empty([x.shape[i] for i in order], dtype or x.dtype)
    return out.transpose([order.index(i) for i in range(x.ndim)])


def to_device(x):
    """A copy of a NumPy array on the current device."""
    if SIMULATED:
        return np.array(x, order="K").view(Array)
    out = empty_like(x)
    out.set(x)
    return out


def to_host(x):
    """A copy of a device array as NumPy's."""
    return np.array(x.view(np.ndarray), order="K") if SIMULATED else xp.asnumpy(x, order="A")


def synchronize():
    """Wait for all that the device has been asked for; errors of kernels are raised here."""
    if not SIMULATED:
        xp.cuda.Device().synchronize()


def empty_cache():
    """Give the pool's idle blocks back to the device."""
    if not SIMULATED:
        xp.get_default_memory_pool().free_all_blocks()
        xp.get_default_pinned_memory_pool().free_all_blocks()
