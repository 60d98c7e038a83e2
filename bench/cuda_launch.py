"""``python -m bench.cuda_launch``: what the host spends on a launch and a whole op, without a GPU.

Arrays are CuPy's, of memory that is not there; CUDA's driver is a function that returns at once.
So nothing runs, and what is left is Python: checks, packing, plans, CuPy's making of arrays. The
least of many short runs, in microseconds. Prints a table; needs nbgrad[cuda], for which any
machine will do.
"""

import sys
import timeit
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np

ADDRESS = 1 << 28
HOPPER = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 227 << 10}


def _stand_in(cupy):
    """CuPy whose device is none: what is not named here is its own."""
    class Cupy:
        def __getattr__(self, name):
            return getattr(cupy, name)
    stream, found = SimpleNamespace(ptr=0), Cupy()
    found.cuda = SimpleNamespace(
        driver=SimpleNamespace(launchKernel=lambda *a: None,
                               launchCooperativeKernel=lambda *a: None),
        runtime=SimpleNamespace(getDevice=int), get_current_stream=lambda: stream,
        memory=cupy.cuda.memory,
        Device=lambda number=0: SimpleNamespace(attributes=HOPPER, compute_capability="90"))
    return found


@contextmanager
def no_device():
    """Kernels are launched on nothing, and ``make(dtype, *shape)`` makes arrays."""
    import cupy
    from nbgrad.kernels.cuda import launch, memory, moments, single

    block = cupy.cuda.MemoryPointer(
        cupy.cuda.UnownedMemory(ADDRESS, 1 << 40, None, device_id=0), 0)

    def make(dtype, *shape):
        return cupy.ndarray(shape, dtype, block)
    loaded, counters = SimpleNamespace(ptr=1), make(np.int32, 1 << 20)
    with (patch.object(launch, "xp", _stand_in(cupy)), patch.object(memory, "xp", launch.xp),
          patch.object(single, "xp", launch.xp), patch.object(moments, "xp", launch.xp),
          patch.object(moments, "_tickets", lambda *of: counters),
          patch.object(single, "_counters", lambda *of: counters),
          patch.object(launch.Kernel, "_on", lambda self, number: (
              loaded, 1, 264 if self.together else None)),
          patch.object(launch.Kernel, "resident", lambda self: 264),
          cupy.cuda.using_allocator(lambda size: block)):
        yield make


def least(call, number=100, repeat=200):
    """Microseconds of a call."""
    call()
    return 1e6 * min(timeit.repeat(call, number=number, repeat=repeat)) / number


def launches(make):
    """(name, call): one launch each, from arrays and numbers that are there."""
    from nbgrad.kernels.cuda import elementwise, passes

    f4 = np.dtype(np.float32)
    x, d, c = make(f4, 64), make(np.float64, 64), make(np.int32, 64)
    relu, add, sums = (elementwise.unary("relu", f4), elementwise.binary("add", f4),
                       passes.sums(f4, f4, 4, True, "u4"))
    yield "launch: 2 arrays, 4 numbers", lambda: relu(1, x, x, 64, 64, 0, 0)
    yield "launch: 3 arrays, 4 numbers", lambda: add(1, x, x, x, 64, 64, 0, 0)
    yield "launch: 14 arrays, 11 numbers", lambda: sums(
        1, x, x, x, x, x, d, d, d, d, d, d, c, x, x, *range(10), 3)


def ops(make):
    """(name, call): whole kernel functions, with what they allocate."""
    from nbgrad.kernels import cuda

    f4 = np.dtype(np.float32)
    x, g, b = make(f4, 64, 64, 56, 56), make(f4, 64), make(f4, 64, 1, 1)
    last, stats = make(f4, 64, 56, 56, 64).transpose(0, 3, 1, 2), make(np.float64, 64)
    yield "an empty array", lambda: cuda.memory.empty((64, 64), f4)
    for name, a in (("", x), (", channels-last", last)):
        yield f"relu{name}", lambda a=a: cuda.relu(a)
        yield f"add{name}", lambda a=a: cuda.add(a, a)
        yield f"add, broadcast{name}", lambda a=a: cuda.add(a, b)
        yield f"batch_norm{name}", lambda a=a: cuda.batch_norm(a, g, g, eps=1e-5)
        yield f"batch_norm_backward{name}", lambda a=a: cuda.batch_norm_backward(
            a, a, g, stats, stats)


def main(number=100, repeat=200):
    """Print the table."""
    with no_device() as make:
        for table in (launches, ops):
            for name, call in table(make):
                print(f"{name:40s} {least(call, number, repeat):7.2f} us", flush=True)


if __name__ == "__main__":
    sys.exit(main())
