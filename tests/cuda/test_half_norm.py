"""Batch norm of halves on CUDA: read and written as such, computed and summed up as float32 is."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import single
from nbgrad.kernels.cuda.memory import to_device, to_host

ml_dtypes = pytest.importorskip("ml_dtypes")
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
ways = pytest.mark.parametrize("way", ["once", "twice"])      # how often memory is read
F4 = np.dtype(np.float32)


def drawn(dtype, *shape, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + offset).astype(np.float32).astype(dtype)


def channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def on_device(*arrays):
    return [None if a is None else to_device(a) for a in arrays]


def exact(*arrays):
    """In float64, for the reference."""
    return [None if a is None else a.astype(np.float64) for a in arrays]


def near(got, want, dtype, scale=1.0):
    """One rounding to a half of a value near want: half a unit, and another where float32's own
    rounding, which is 2^-13 of it at the most, moves the value over the middle."""
    assert got.dtype == dtype
    unit = 2.0 ** (-10 if dtype == np.float16 else -7) if dtype.itemsize == 2 else 2.0**-18
    np.testing.assert_allclose(to_host(got).astype(np.float64), want, rtol=unit,
                               atol=2.0**-17 * scale)


@pytest.fixture(autouse=True)
def chosen(request, monkeypatch):
    way = request.node.callspec.params.get("way") if hasattr(request.node, "callspec") else None
    monkeypatch.setattr(single, "enabled", way != "twice")


# Vectors of eight and their tails; several parts and tiles; a channel to a block; one by one.
SHAPES = [(5, 8), (70, 16), (3, 4, 8), (2, 5, 2, 4), (3, 16, 3, 3), (90, 3, 8), (150, 40), (9, 17),
          (4, 3, 5), (1, 1, 1)]


@ways
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [np.ascontiguousarray, channels_last])
def test_batch_norm(shape, order, dtype, way):
    C = shape[1]
    x, dy, z = (order(drawn(dtype, *shape, seed=i, offset=i / 2)) for i in range(3))
    for params in (dtype, F4):
        gamma, beta = drawn(params, C, seed=3), drawn(params, C, seed=4)
        d = on_device(x, gamma, beta, z, dy)
        for relu, residual in ((False, False), (True, True)):
            want = reference.batch_norm(*exact(x, gamma, beta, z if residual else None), eps=1e-5,
                                        relu=relu)
            got = cuda.batch_norm(*d[:3], d[3] if residual else None, eps=1e-5, relu=relu)
            near(got[0], want[0], dtype)
            for a, b in zip(got[1:], want[1:], strict=True):
                assert a.dtype == np.float64
                np.testing.assert_allclose(to_host(a), b, rtol=1e-6, atol=1e-7)
            assert all(a == b or n == 1 for a, b, n in zip(got[0].strides, x.strides, shape))
            y = to_host(got[0]) if relu else None          # the mask is that of what is kept
            back = reference.batch_norm_backward(*exact(dy, x, gamma), want[1], want[3], relu=relu,
                                                 residual=residual, y=y)
            found = cuda.batch_norm_backward(d[4], d[0], d[1], *on_device(want[1], want[3]),
                                             relu=relu, residual=residual,
                                             y=got[0] if relu else None)
            scale = max(1.0, float(np.abs(back[0]).max()))         # of two values: 1/√eps
            near(found[0], back[0], dtype, scale)
            near(found[1], back[1], params, x.size / C)
            near(found[2], back[2], params, x.size / C)
            if residual:
                near(found[3], back[3], dtype)


@dtypes
@pytest.mark.parametrize(("shape", "size"), [((7, 5), 3), ((5, 4, 3, 3), 2), ((300, 2), 299)])
@pytest.mark.parametrize("order", [np.ascontiguousarray, channels_last])
def test_ghosts(shape, size, order, dtype):
    x, dy = (order(drawn(dtype, *shape, seed=i, offset=i)) for i in range(2))
    count = size * x[0].size // shape[1]
    for params in (dtype, F4):
        gamma, beta = drawn(params, shape[1], seed=2), drawn(params, shape[1], seed=3)
        want = reference.ghost_batch_norm(*exact(x, gamma, beta), size=size, eps=1e-5)
        d = on_device(x, gamma, beta, dy)
        got = cuda.ghost_batch_norm(*d[:3], size=size, eps=1e-5)
        near(got[0], want[0], dtype)
        for a, b in zip(got[1:], want[1:], strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(to_host(a), b, rtol=1e-6, atol=1e-7)
        for apart in (False, True):
            back = reference.ghost_batch_norm_backward(*exact(dy, x, gamma), want[1], want[3],
                                                       size=size, apart=apart)
            found = cuda.ghost_batch_norm_backward(d[3], *d[:2], *on_device(want[1], want[3]),
                                                   size=size, apart=apart)
            near(found[0], back[0], dtype, max(1.0, float(np.abs(back[0]).max())))
            near(found[1], back[1], params, count)
            near(found[2], back[2], params, count)


@dtypes
@pytest.mark.parametrize("shape", [(300, 8), (90, 3, 24), (2, 16, 40)])
def test_the_mask_of_x_and_groups_of_blocks(shape, dtype, either_order):
    x, dy = drawn(dtype, *shape), drawn(dtype, *shape, seed=1)
    gamma, beta = drawn(F4, shape[1], seed=3), drawn(F4, shape[1], seed=4)
    mean, var = reference.batch_norm_stats(x.astype(np.float64))
    given = *exact(dy, x, gamma), mean, 1 / np.sqrt(var + 1e-5)
    want = reference.batch_norm_backward(*given, beta=beta.astype(np.float64), relu=True)
    got = cuda.batch_norm_backward(*on_device(dy, x, gamma, *given[3:]), beta=to_device(beta),
                                   relu=True)
    near(got[0], want[0], dtype)
    for a, b in zip(got[1:3], want[1:3]):
        near(a, b, F4, x.size / shape[1])


@ways
@dtypes
def test_running_statistics_and_large_means(dtype, way):
    """A mean of 1000 spacings; the running ones are halves, too, or not."""
    x = drawn(dtype, 40, 8, offset=512.0 if dtype == np.float16 else 64.0)
    for params in (dtype, F4):
        mean, var = drawn(params, 8, seed=1), np.abs(drawn(params, 8, seed=2))
        moved = on_device(mean, var)
        want = [a.astype(np.float64) for a in (mean, var)]
        y, *_ = cuda.batch_norm(to_device(x), None, None, eps=1e-5, running=(*moved, 0.3))
        exactly = reference.batch_norm(x.astype(np.float64), None, None, eps=1e-5,
                                       running=(*want, 0.3))
        near(y, exactly[0], dtype)
        for a, b in zip(moved, want):
            near(a, b, params)


@dtypes
def test_parts_of_it(dtype):
    x, dy = drawn(dtype, 20, 8), drawn(dtype, 20, 8, seed=1)
    d, dd = on_device(x, dy)
    mean, var = cuda.batch_norm_stats(d)
    want = reference.batch_norm_stats(x.astype(np.float64))
    np.testing.assert_allclose(to_host(var), want[1], rtol=1e-6)
    invstd = 1 / np.sqrt(want[1])
    near(cuda.batch_norm_elemt(d, None, None, mean, to_device(invstd)),
         reference.batch_norm_elemt(x.astype(float), None, None, want[0], invstd), dtype)
    sums = cuda.batch_norm_backward_reduce(dd, d, mean, to_device(invstd))
    exactly = reference.batch_norm_backward_reduce(*exact(dy, x), want[0], invstd)
    for a, b in zip(sums, exactly):
        np.testing.assert_allclose(to_host(a), b, rtol=1e-5, atol=1e-5)
    near(cuda.batch_norm_backward_elemt(dd, d, None, mean, to_device(invstd), *sums),
         reference.batch_norm_backward_elemt(*exact(dy, x, None), want[0], invstd, *exactly), dtype)


@dtypes
def test_layers_of_a_network(dtype):
    """On the device a layer's running statistics move, its gradients have its parameters' dtype."""
    from nbgrad import nn, tensor

    x = tensor(drawn(F4, 6, 8, 4, 4, offset=2.0)).to(dtype)
    for make in (lambda: nn.BatchNorm2d(8), lambda: nn.GroupNorm(2, 8),
                 lambda: nn.LayerNorm([8, 4, 4])):
        there, here = make().to("cuda").to(dtype=dtype), make().to(dtype=dtype)
        y = there(x.to("cuda"))
        want = here(x)
        y.sum().backward()
        near(y.data, want.float().data, dtype, 2.0)
        assert there.weight.grad.dtype == there.bias.grad.dtype == dtype
        if isinstance(here, nn.BatchNorm2d):
            mean = x.float().data.mean((0, 2, 3))
            near(there.running_mean.data, 0.1 * mean, dtype)
