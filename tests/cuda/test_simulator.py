"""The simulator finds what a GPU would do wrong in silence."""

import numpy as np
import pytest
from nbgrad.kernels.cuda import memory
from nbgrad.kernels.cuda.intrinsics import FULL, cuda, load, store
from nbgrad.kernels.cuda.launch import KERNELS, Kernel


@pytest.fixture
def kernel():
    """Makes kernels of the name "test", for this test only."""
    def make(body, parameters, **settings):
        return Kernel(body, parameters, name="test", **{"threads": 64, **settings})
    yield make
    KERNELS.pop("test", None)


def test_a_missing_barrier_shows_in_one_of_the_two_orders(kernel, monkeypatch):
    from nbgrad.kernels.cuda import simulator

    def body(out):
        cells, t = cuda.shared.array(64, np.float32), cuda.threadIdx.x
        cells[t] = t
        out[t] = cells[63 - t]
    k, wrong = kernel(body, "*f4"), 0
    for order in (1, -1):
        monkeypatch.setattr(simulator, "order", order)
        out = memory.empty((64,), np.float32)
        k(1, out)
        wrong += np.isnan(memory.to_host(out)).sum()
    assert wrong == 64                      # each order sees the half that is not there yet


def test_barriers_and_shuffles(kernel, either_order):
    def body(out):
        cells, t = cuda.shared.array(64, np.float32), cuda.threadIdx.x
        cells[t] = t
        cuda.syncthreads()
        v = cells[63 - t]
        for k in range(5):
            v = v + cuda.shfl_xor_sync(FULL, v, 16 >> k)
        out[cuda.blockIdx.x * 64 + t] = v + cuda.ballot_sync(FULL, t % 32 < 2)
    out = memory.empty((128,), np.float32)
    kernel(body, "*f4")(2, out)
    sums = np.repeat([np.arange(32, 64).sum(), np.arange(32).sum()], 32)
    np.testing.assert_array_equal(memory.to_host(out), np.tile(sums + 3, 2))


def test_threads_that_never_meet(kernel):
    def body(out):
        if cuda.threadIdx.x % 2:
            cuda.syncthreads()
        else:
            cuda.syncwarp()
    with pytest.raises(RuntimeError, match="wait for each other for ever"):
        kernel(body, "*f4")(1, memory.empty((1,), np.float32))


def test_reads_outside_and_off_the_alignment(kernel):
    def outside(x):
        x[cuda.threadIdx.x + 1] = 0
    k = kernel(outside, "*f4")
    with pytest.raises(IndexError, match="1 elements at 64: there are 64"):
        k(1, memory.empty((64,), np.float32))
    KERNELS.pop("test")

    def shifted(x):
        store(x, 1, load(x, 0))
    with pytest.raises(ValueError, match="4 elements at 1: not aligned"):
        kernel(shifted, "*f4")(1, memory.empty((64,), np.float32))


def test_more_blocks_than_a_grid_has_in_y(kernel):
    """65,535 is the limit of the grid's other axes; kernels use the first alone."""
    def body(out, n):
        i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if i < n:
            out[i] = i
    n = 3 * 65_536 - 1
    out = memory.empty((n,), np.int32)
    kernel(body, "*i4 i8", threads=2)(-(-n // 2), out, n)
    np.testing.assert_array_equal(memory.to_host(out), np.arange(n))


def test_kernels_are_strict_about_what_they_get(kernel):
    k = kernel(lambda x, n: None, "*f4 i8")
    with pytest.raises(TypeError, match="test: parameter 1: expected an array of f4, got float64"):
        k(1, memory.empty((1,), np.float64), 1)
    with pytest.raises(TypeError, match="test: 2 parameters, got 1"):
        k(1, None)
    with pytest.raises(TypeError, match="on the device and one of NumPy's"):
        memory.empty((1,), np.float32) + np.zeros(1)
