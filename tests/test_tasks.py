"""Kernels made of tasks, and the device functions that they are compiled from."""

import numpy as np
import pytest
from nbgrad.kernels.cpu import simd, tasks
from nbgrad.kernels.cpu.jit import device, get_num_threads
from numba import config


@device
def _task(t, x, scale, y):
    room = np.empty(x.size, x.dtype)
    for i in range(x.size):
        room[i] = x[i] * scale
    y[t] = room[t % x.size] + t


@tasks.tasks
def _kernel(run, x, scale, y):
    tasks.share(_task, y.size, run, (x, scale, y))


@pytest.mark.parametrize("work", [0, 1 << 30])                       # serial, parallel
@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_every_task_runs_once(n, work):
    x, y = np.arange(5.0), np.full(n, np.nan)
    _kernel(x, 3.0, y, work=work)
    np.testing.assert_array_equal(y, 3 * x[np.arange(n) % 5] + np.arange(n))


@device
def _waiting(t, done, seen):
    """The first task ends when all others have, or after about ten seconds."""
    if t:
        tasks.taken(done)
    else:
        for asked in range(1 << 29):
            seen[0] = tasks.taken(done) - asked
            if seen[0] == 99:
                break


@tasks.tasks
def _uneven(run, done, seen):
    tasks.share(_waiting, 100, run, (done, seen))


@pytest.mark.skipif(config.DISABLE_JIT or get_num_threads() < 2, reason="needs two threads")
def test_who_is_done_helps_the_others():
    done, seen = np.zeros(1, np.int64), np.zeros(1, np.int64)
    _uneven(done, seen, work=1 << 30)
    assert seen[0] == 99


@device
def _large(t, bytes, y):
    y[t] = np.empty(bytes, np.uint8)[0]


@tasks.tasks
def _failing(run, bytes, y):
    tasks.share(_large, y.size, run, (bytes, y))


@pytest.mark.parametrize("work", [0, 1 << 30])
def test_a_task_without_memory_raises(work):
    with pytest.raises(MemoryError):
        _failing(1 << 60, np.zeros(3, np.uint8), work=work)


@device
def _plus(x, k):
    return x + k


@device
def _sums(t, y):
    p = simd.after(simd.pointer(y), 2)
    p[0], p[1] = _plus(t, 1), _plus(_plus(t, 2), t)
    simd.keep(y)


@tasks.tasks
def _constants(run, y):
    tasks.share(_sums, 1, run, (y,))


def test_constants_do_not_compile_a_function_again():
    y = np.zeros(5)
    _constants(y)
    np.testing.assert_array_equal(y, [0, 0, 1, 2, 0])
    if not config.DISABLE_JIT:
        assert len(_plus.overloads) == 1
