"""Ghost batch norm in the simulator: against the definition, in either memory format and order of
threads, and with values that leave the range."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import ghosts
from nbgrad.kernels.cuda.memory import order_of, to_device, to_host

from nbgrad import nn, tensor

# whole ghosts, a smaller last one, one, more channels than a block has, one value per channel
SHAPES = [((8, 3), 4), ((7, 3), 3), ((5, 4, 3, 3), 2), ((3, 2, 5), 1), ((4, 70), 3),
          ((2, 2, 9, 9), 5), ((3, 1, 4), 2), ((300, 2), 299), ((1, 3), 1)]
EPS = {np.float32: 2.0**-23, np.float64: 2.0**-52}


def drawn(dtype, *shape, layout="NCHW", seed=0, offset=0.0):
    a = (np.random.default_rng(seed).standard_normal(shape) + offset).astype(dtype)
    return np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) if layout == "channels-last" else a


def both(k, move, size, x, dy, gamma, beta):
    x, dy, gamma, beta = (None if a is None else move(a) for a in (x, dy, gamma, beta))
    y, mean, var, invstd = k.ghost_batch_norm(x, gamma, beta, size=size, eps=1e-5)
    return y, mean, var, invstd, *k.ghost_batch_norm_backward(dy, x, gamma, mean, invstd, size=size)


def agree(size, dtype, *arrays, rounded=16):
    """``rounded``: how many ulp of the largest are allowed."""
    got = both(cuda, to_device, size, *arrays)
    want = both(reference, lambda a: a, size, *arrays)
    for a, b in zip(map(to_host, got), want):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        close = rounded * EPS[dtype] * max(1, np.abs(b[np.isfinite(b)]).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=close, atol=close)
    return got


@pytest.mark.usefixtures("either_order")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_each_ghost_is_normalized_for_itself(shape, size, layout, dtype):
    x, dy = (drawn(dtype, *shape, layout=layout, seed=i) for i in range(2))
    gamma, beta = drawn(dtype, 2, shape[1], seed=2)
    y, *_, dx, _, _ = agree(size, dtype, x, dy, gamma, beta)
    assert order_of(y) == order_of(dx) == order_of(x)


def test_without_parameters_and_with_strided_memory():
    x, dy = drawn(np.float32, 6, 3, 4, 4)[::2, :, ::2], drawn(np.float32, 3, 4, 2, 3, seed=1)
    agree(2, np.float32, x, dy.transpose(0, 3, 2, 1)[:, :, :, :4], None, None)


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
def test_far_means_constant_channels_and_large_values(layout):
    x, dy = drawn(np.float32, 4, 3, 2, 2, layout=layout), drawn(np.float32, 4, 3, 2, 2, seed=1)
    x[:, 0] += 1e5                                   # spacing 8e-3: rounded before it comes here
    x[:, 1] = 3
    _, mean, var, *_ = agree(2, np.float32, x, dy, *drawn(np.float32, 2, 3, seed=2), rounded=64)
    np.testing.assert_array_equal(to_host(var)[:, 1], 0)
    np.testing.assert_array_equal(to_host(mean)[:, 1], 3)


def test_nan_and_infinity_stay_in_their_ghost():
    x = drawn(np.float32, 6, 2, 3)
    x[0, 0, 0], x[2, 1, 1] = np.nan, np.inf
    y, mean, _, _ = cuda.ghost_batch_norm(to_device(x), None, None, size=2, eps=1e-5)
    bad = ~np.isfinite(to_host(y)).all(2)
    np.testing.assert_array_equal(bad, [[1, 0]] * 2 + [[0, 1]] * 2 + [[0, 0]] * 2)
    assert np.isnan(to_host(mean)[0, 0])


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0), (3, 2, 0)])
def test_nothing(shape):
    agree(2, np.float32, drawn(np.float32, *shape), drawn(np.float32, *shape), None, None)


def test_blocks_have_fewer_channels_where_there_are_few():
    x = to_device(drawn(np.float32, 4, 64))
    assert ghosts._numbers(x, True, 4) == (4, (4, 64, 1, 4, 16, 4))      # of 2 multiprocessors
    assert ghosts._numbers(x, True, 1)[1][-2:] == (32, 2)
    assert ghosts._numbers(x, False, 1)[1][-2:] == (1, 64)


def test_the_layer_on_the_device_is_the_cpus():
    x, model = drawn(np.float32, 6, 3, 2, 2), nn.GhostBatchNorm(3, ghost_size=4)
    grads = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        model.to(device)
        y = model(t := tensor(x, device=device).requires_grad_())
        (y ** 3).sum().backward()
        grads.append([a.detach().cpu().numpy() for a in (y, t.grad, model.weight.grad)])
    for a, b in zip(*grads):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("either_order")
@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
@pytest.mark.parametrize(("shape", "size"), SHAPES[:5])
def test_every_ghost_may_have_parameters_of_its_own(shape, size, layout):
    """What a call for each ghost gives, whose blocks may be cut otherwise."""
    x, dy = (drawn(np.float32, *shape, layout=layout, seed=i) for i in range(2))
    gamma, beta = drawn(np.float32, 2, -(-shape[0] // size), shape[1], seed=2)
    on = [to_device(a) for a in (x, dy, gamma, beta)]
    y, mean, _, invstd = cuda.ghost_batch_norm(on[0], *on[2:], size=size, eps=1e-5)
    found = y, *cuda.ghost_batch_norm_backward(on[1], on[0], on[2], mean, invstd, size=size,
                                               apart=True)
    y, dx, dgamma, dbeta = map(to_host, found)
    for g, i in enumerate(range(0, len(x), size)):
        part = slice(i, i + size)
        args = [to_device(np.ascontiguousarray(a)) if a.ndim == 1 else to_device(a.copy(order="K"))
                for a in (x[part], dy[part], gamma[g], beta[g])]
        want = [to_host(a) for a in both(cuda, lambda a: a, size, *args)]
        for a, b in zip((y[part], dx[part], dgamma[g], dbeta[g]), want[:1] + want[4:]):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)      # 16 ulp
