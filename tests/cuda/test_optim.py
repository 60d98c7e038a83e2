"""Optimizer steps on CUDA against the reference."""

import inspect

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda.memory import to_device, to_host
from nbgrad.kernels.cuda.optim import CHUNK

SHAPES = [(3, 4), (300,), (0, 2), (1,), (257,), (2, 2, 3, 3), (5,), (6,), (7,), (8,), ()]
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def lists():
    rng = np.random.default_rng(0)
    return lambda dtype, count: [[np.asarray(np.abs(rng.standard_normal(s)).astype(dtype))
                                  for s in SHAPES] for _ in range(count)]


def steps(name, arrays, settings):
    """The same step by both, in place."""
    mine = [None if a is None else [to_device(x) for x in a] for a in arrays]
    getattr(cuda, name)(*mine, **settings)
    getattr(reference, name)(*arrays, **settings)
    for got, want in zip(mine, arrays):
        for a, b in zip(got or [], want or []):
            rtol = 1e-5 if b.dtype == np.float32 else 1e-13    # a few roundings
            np.testing.assert_allclose(to_host(a), b, rtol=rtol, atol=rtol / 10)


def test_signatures_are_the_references():
    for name in ("sgd_step", "adam_step"):
        a, b = (inspect.signature(getattr(m, name)) for m in (reference, cuda))
        assert str(a) == str(b)


@dtypes
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(dtype, momentum, nesterov, lists):
    ps, gs, bufs = lists(dtype, 3)
    settings = {"lr": 0.1, "momentum": momentum, "dampening": 0 if nesterov else 0.1,
                "weight_decay": 0.01, "nesterov": nesterov and momentum > 0,
                "first": [i % 3 == 0 for i in range(len(ps))]}
    steps("sgd_step", [ps, gs, bufs if momentum else None], settings)


@dtypes
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam(dtype, decoupled, lists):
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
                "decoupled": decoupled, "steps": [1 + i % 2 for i in range(len(SHAPES))]}
    steps("adam_step", lists(dtype, 4), settings)


@dtypes
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_memory_off_the_vectors_and_tails_have_the_same_bits(name, dtype):
    """Sizes around a thread's two vectors, a block's and two blocks' values; whichever of the
    arrays begins off a vector, all are walked one by one."""
    rng, settings = np.random.default_rng(0), {
        "sgd": {"lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0.01, "nesterov": False,
                "first": [False]},
        "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01,
                     "nesterov": False, "first": [False]},
        "adam": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1,
                 "decoupled": True, "steps": [3]}}[name]
    f, count = (cuda.adam_step, 4) if name == "adam" else (cuda.sgd_step, 2 + (name == "momentum"))
    for n in (3, 8, 129, 131, 132, 135, CHUNK, CHUNK + 7, 2 * CHUNK - 1):
        values, found = np.abs(rng.standard_normal((count, n))).astype(dtype), []
        for off in (None, *range(count)):
            arrays = []
            for i, a in enumerate(values):
                whole = to_device(np.zeros(n + 1, dtype))
                arrays.append(whole[i == off:n + (i == off)])
                arrays[-1][...] = to_device(a)
            f(*[[a] for a in arrays], *[None] * (name == "sgd"), **settings)
            found.append([to_host(a) for a in arrays])
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
        assert (found[0][0] != values[0]).all()


def test_counts_on_the_device_are_the_hosts():
    """Of 70 parameters, one of which has gaps and one no values: three launches count them."""
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1,
                "decoupled": False}
    rng, at = np.random.default_rng(0), [i * i for i in range(70)]
    sizes = [0 if i == 3 else 1 + i % 5 for i in range(70)]
    values = [[np.abs(rng.standard_normal(n)).astype("f4") for n in sizes] for _ in range(4)]
    host, device = ([[to_device(a) for a in arrays] for arrays in values] for _ in range(2))
    for arrays in (host, device):
        arrays[0][4] = to_device(np.repeat(values[0][4], 2))[::2]
    counts = [to_device(np.array(t)) for t in at]
    for i in range(1, 3):
        cuda.adam_step(*host, **settings, steps=[t + i for t in at])
        cuda.adam_step(*device, **settings, steps=counts)
        assert [int(t) for t in counts] == [t + i for t in at]
    for a, b in zip(device, host):
        for k, (x, y) in enumerate(zip(a, b)):
            if k == 4:           # its step size is float64's; the host's is rounded to float32
                np.testing.assert_allclose(to_host(x), to_host(y), rtol=1e-6)
            else:
                np.testing.assert_array_equal(to_host(x), to_host(y))


def test_memory_orders_gaps_and_dtypes(lists):
    """A gradient in another order than its parameter; a parameter with gaps; mixed dtypes."""
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((6, 4)), rng.standard_normal((4, 6)).T
    q, single = rng.standard_normal((5, 6)), rng.standard_normal(9).astype(np.float32)
    device = [to_device(x) for x in (p, q, single)]
    grads = [to_device(x) for x in (g, q[:, ::2] + 1, single.astype(np.float64))]
    settings = {"lr": 0.5, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False,
                "first": [False] * 3}
    cuda.sgd_step([device[0], device[1][:, ::2], device[2]], grads, None, **settings)
    np.testing.assert_allclose(to_host(device[0]), p - 0.5 * g, rtol=1e-14)
    np.testing.assert_allclose(to_host(device[2]), 0.5 * single, rtol=1e-6)
    want = q.copy()
    want[:, ::2] -= 0.5 * (q[:, ::2] + 1)
    np.testing.assert_allclose(to_host(device[1]), want, rtol=1e-14)
