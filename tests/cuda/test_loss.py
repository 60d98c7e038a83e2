"""Softmax and cross-entropy on CUDA against the reference."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda.memory import to_device, to_host
from nbgrad.kernels.cuda.softmax import way

# The exponential is within 2 ulp, a sum of float32 within 4, and |log softmax| here below 12.
CLOSE = {np.float32: {"rtol": 4e-6, "atol": 2e-6}, np.float64: {"rtol": 1e-14, "atol": 1e-14}}
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def drawn(dtype, *shape, seed=0):
    return (2 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def same(got, want, **close):
    assert got.dtype == want.dtype
    np.testing.assert_allclose(to_host(got), want, **close)


def channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


SHAPES = [((3, 5), 1), ((3, 40), -1), ((1, 301), 1), ((1, 601), 1), ((1, 901), 1), ((4, 3), 0),
          ((2, 3, 5), 1), ((2, 3, 4), 2), ((0, 3), 1), ((3,), 0), ((2, 1), 1)]


@dtypes
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_softmax(shape, axis, dtype):
    x, dy = drawn(dtype, *shape), drawn(dtype, *shape, seed=1)
    for name in ("softmax", "log_softmax"):
        y = getattr(reference, name)(x, axis=axis)
        same(getattr(cuda, name)(to_device(x), axis=axis), y, **CLOSE[dtype])
        dx = getattr(reference, name + "_backward")(dy, y, axis=axis)
        got = getattr(cuda, name + "_backward")(to_device(dy), to_device(y), axis=axis)
        same(got, dx, rtol=CLOSE[dtype]["rtol"], atol=10 * CLOSE[dtype]["atol"])


def test_softmax_of_channels_last_memory_and_views():
    x = channels_last(drawn(np.float32, 2, 3, 4, 5))
    y = cuda.softmax(to_device(x), axis=1)
    same(y, reference.softmax(x, axis=1), **CLOSE[np.float32])
    assert y.strides == x.strides
    same(cuda.softmax(to_device(x)[:, ::2], axis=2), reference.softmax(x[:, ::2], axis=2),
         **CLOSE[np.float32])


def test_what_is_not_finite():
    x = drawn(np.float32, 5, 40)
    x[0, 3], x[1, 4], x[2], x[3, 5] = np.nan, np.inf, -np.inf, -np.inf
    x[4] += 1e30
    for name in ("softmax", "log_softmax"):
        same(getattr(cuda, name)(to_device(x), axis=1), getattr(reference, name)(x, axis=1),
             **CLOSE[np.float32])


def test_every_way_to_hold_a_row_is_taken():
    ways = {way(shape[-1], 1, np.dtype(np.float32), 8, to_device(np.zeros(4, "f4")))
            for shape, _ in SHAPES}
    assert {how[1:] for how in ways} == {(32, True), (64, True), (96, True), (96, False)}


TARGETS = [(3, 5), (4, 8), (1, 301), (2, 3, 4), (2, 4, 2, 3), (0, 3), (9, 2)]


@dtypes
@pytest.mark.parametrize("shape", TARGETS)
@pytest.mark.parametrize("order", [np.ascontiguousarray, channels_last])
def test_cross_entropy(shape, order, dtype):
    N, C, *S = shape
    x, rng = order(drawn(dtype, *shape)), np.random.default_rng(1)
    target = rng.integers(0, C, (N, *S))
    target.reshape(-1)[1:2] = -100
    weight = rng.uniform(0, 2, C).astype(dtype)
    weight[0] = 0
    dloss = drawn(dtype, N, *S, seed=2)
    for w, smoothing in ((None, 0.0), (weight, 0.0), (None, 0.2), (weight, 0.3)):
        how = {"ignore_index": -100, "label_smoothing": smoothing}
        d = to_device(x), to_device(target), None if w is None else to_device(w)
        want, got = reference.cross_entropy(x, target, w, **how), cuda.cross_entropy(*d, **how)
        same(got[0], want[0], **CLOSE[dtype])
        np.testing.assert_allclose(got[1:3], want[1:3], **CLOSE[dtype])
        assert got[3] is want[3] is True
        for g in (dloss, np.array(0.5, dtype)):
            same(cuda.cross_entropy_backward(to_device(g), *d, **how),
                 reference.cross_entropy_backward(g, x, target, w, **how),
                 rtol=CLOSE[dtype]["rtol"], atol=3 * CLOSE[dtype]["atol"])


def test_cross_entropy_of_what_is_no_class():
    x, how = drawn(np.float32, 3, 4), {"ignore_index": -1, "label_smoothing": 0.0}
    for target in (4, -2):
        t = np.array([1, target, -1], np.int32)
        losses, total, weights, valid = cuda.cross_entropy(to_device(x), to_device(t), None, **how)
        assert valid is False
        assert (weights, to_host(losses)[1], to_host(losses)[2]) == (1.0, 0.0, 0.0)
        np.testing.assert_allclose(total, to_host(losses)[0], rtol=1e-6)


def test_cross_entropy_of_minus_infinity_and_nan():
    x, how = drawn(np.float32, 3, 4), {"ignore_index": -1, "label_smoothing": 0.0}
    x[0, 1], x[1, 2], x[2] = -np.inf, np.nan, np.nan
    t = np.array([0, 1, -1])
    want = reference.cross_entropy(x, t, None, **how)
    got = cuda.cross_entropy(to_device(x), to_device(t), None, **how)
    same(got[0], want[0], **CLOSE[np.float32])
    one = np.array(1, np.float32)
    same(cuda.cross_entropy_backward(to_device(one), to_device(x), to_device(t), None, **how),
         reference.cross_entropy_backward(one, x, t, None, **how), **CLOSE[np.float32])
