"""Pooling on CUDA against the reference."""

import inspect

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import pool
from nbgrad.kernels.cuda.memory import to_device, to_host

# size, kernel, stride, padding, dilation, ceil mode
CASES = [((2, 3, 6, 5), (2, 2), (2, 2), (0, 0), (1, 1), False),
         ((1, 5, 7, 9), (3, 2), (2, 1), (1, 1), (1, 2), True),
         ((2, 1, 4, 4), (3, 3), (1, 1), (1, 1), (1, 1), False),
         ((1, 34, 5, 2), (2, 2), (3, 2), (1, 1), (1, 1), True),
         ((0, 2, 4, 4), (2, 2), (2, 2), (0, 0), (1, 1), False)]
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def on_device(name, *arrays, **settings):
    y = getattr(cuda, name)(*map(to_device, arrays), **settings)
    return tuple(map(to_host, y)) if isinstance(y, tuple) else to_host(y)


def test_names_and_signatures_are_the_references():
    for name in pool.__all__:
        a, b = (inspect.signature(getattr(m, name)) for m in (reference, cuda))
        assert str(a) == str(b)


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_maxima(case, dtype):
    size, kernel, stride, padding, dilation, ceil_mode = case
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, size).astype(dtype)                 # with ties
    x.reshape(-1)[3:5] = np.nan
    settings = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    want = reference.max_pool2d(x, **settings, ceil_mode=ceil_mode)
    got = on_device("max_pool2d", x, **settings, ceil_mode=ceil_mode)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
        assert a.strides == b.strides
    dy = rng.standard_normal(want[0].shape).astype(dtype)
    dx = reference.max_pool2d_backward(dy, want[1], input_size=size)
    for known in ({}, settings):
        a = on_device("max_pool2d_backward", dy, want[1], input_size=size, **known)
        np.testing.assert_array_equal(a, dx)                   # in the same order
        assert a.strides == dx.strides or not a.size
    np.testing.assert_array_equal(on_device("max_pool2d_gather", x, want[1]),
                                  reference.max_pool2d_gather(x, want[1]))


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_means(case, dtype):
    """float64 sums, rounded once: equal but for the order of the sums."""
    size, kernel, stride, padding, _, ceil_mode = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal(size).astype(dtype)
    for include, override in ((True, None), (False, None), (True, 3)):
        settings = {"kernel_size": kernel, "stride": stride, "padding": padding,
                    "ceil_mode": ceil_mode, "count_include_pad": include,
                    "divisor_override": override}
        want = reference.avg_pool2d(x, **settings)
        np.testing.assert_allclose(on_device("avg_pool2d", x, **settings), want, rtol=1e-6)
        dy = rng.standard_normal(want.shape).astype(dtype)
        np.testing.assert_allclose(
            on_device("avg_pool2d_backward", dy, input_size=size, **settings),
            reference.avg_pool2d_backward(dy, input_size=size, **settings), rtol=1e-6, atol=1e-15)
    for out in ((1, 1), (3, 4), (0, 2)):
        want = reference.adaptive_avg_pool2d(x, output_size=out)
        got = on_device("adaptive_avg_pool2d", x, output_size=out)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-15)
        dy = rng.standard_normal(want.shape).astype(dtype)
        np.testing.assert_allclose(
            on_device("adaptive_avg_pool2d_backward", dy, input_size=size),
            reference.adaptive_avg_pool2d_backward(dy, input_size=size), rtol=1e-6, atol=1e-15)
