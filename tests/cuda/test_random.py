"""Dropout on CUDA has the CPU's bits, and leaves the generator where the CPU leaves it."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda.memory import to_device, to_host


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.Philox])
def test_the_bits_of_numpys_generator(dtype, bits):
    a, b = (np.random.Generator(bits(3)) for _ in range(2))
    for shape in ((5,), (), (0, 2), (1,), (2, 3, 7), (1100,), (2100,)):   # odd ones leave half
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        x.reshape(-1)[:1] = np.inf
        for p in (0.3, 1):
            want = reference.dropout(x, a, p)
            got = cuda.dropout(to_device(x), b, p)
            for y, z in zip(got, want):
                np.testing.assert_array_equal(to_host(y), z)
                assert y.dtype == z.dtype
        assert a.random() == b.random()


def test_memory_order():
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).transpose(2, 0, 1)
    want = reference.dropout(x, np.random.default_rng(1), 0.5)[0]
    np.testing.assert_array_equal(
        to_host(cuda.dropout(to_device(x), np.random.default_rng(1), 0.5)[0]), want)
