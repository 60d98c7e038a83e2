"""Optimizer steps on CUDA against the reference."""

import inspect

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda.memory import to_device, to_host

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
