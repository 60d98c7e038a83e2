"""Row, window, sum and elementwise kernels against the reference on shapes drawn at random."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from nbgrad.kernels import cpu, reference

DTYPES = [np.float32, np.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
some = settings(max_examples=25, deadline=None)
shapes = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)
seeds = st.integers(0, 1000)


def numbers(dtype, seed, *shape):
    return (np.random.default_rng(seed).standard_normal(shape) * 3).astype(dtype)


def reordered(x, seed):
    """The same values with the axes in another order in memory."""
    order = np.random.default_rng(seed).permutation(x.ndim)
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def close(got, want, terms):
    """To the rounding of sums of so many terms: an error of about √terms ulp of the largest."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    ulp = np.finfo(want.dtype).eps * max(1, np.abs(want).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * (2 + np.sqrt(terms)) * ulp)


@dtypes
@some
@given(shapes, st.integers(0, 3), seeds)
def test_softmax_of_any_axis_and_memory_order(dtype, shape, axis, seed):
    axis %= len(shape)
    x, dy = (reordered(numbers(dtype, seed + k, *shape), seed) for k in range(2))
    for name in ("softmax", "log_softmax"):
        y = getattr(reference, name)(x, axis=axis)
        close(getattr(cpu, name)(x, axis=axis), y, shape[axis])
        back = getattr(reference, f"{name}_backward")(dy, y, axis=axis)
        close(getattr(cpu, f"{name}_backward")(dy, y, axis=axis), back, shape[axis])


@dtypes
@some
@given(shapes, seeds, st.sampled_from([0.0, 0.2]))
def test_cross_entropy_of_rows_and_planes(dtype, shape, seed, smoothing):
    rng = np.random.default_rng(seed)
    x, C = reordered(numbers(dtype, seed, *shape), seed), shape[1]
    target = rng.integers(-1, C, (shape[0], *shape[2:]))              # −1 is ignored
    weight = [None, rng.random(C).astype(dtype)][seed % 2]
    how = {"ignore_index": -1, "label_smoothing": smoothing}
    losses, *sums, valid = cpu.cross_entropy(x, target, weight, **how)
    want, *totals, _ = reference.cross_entropy(x, target, weight, **how)
    assert valid
    close(losses, want, C)
    close(np.array(sums, dtype), np.array(totals, dtype), x.size)
    for dloss in (numbers(dtype, seed + 1, *target.shape), np.array(0.3, dtype)):
        close(cpu.cross_entropy_backward(dloss, x, target, weight, **how),
              reference.cross_entropy_backward(dloss, x, target, weight, **how), C)


@pytest.mark.parametrize("bad", [-1, 5, 1 << 40])
def test_a_target_that_is_no_class_is_reported(bad):
    x, target = numbers(np.float32, 0, 3, 5), np.array([0, bad, 4])
    how = {"ignore_index": -100, "label_smoothing": 0.0}
    assert [k.cross_entropy(x, target, None, **how)[3] for k in (cpu, reference)] == [False] * 2


@some
@given(shapes, st.sets(st.integers(0, 3), min_size=1), seeds, st.integers(1, 30))
def test_sums_over_any_axes_and_memory_order(shape, axes, seed, repeat):
    shape = (shape[0] * repeat, *shape[1:])                           # beyond where NumPy serves
    axes = tuple({a % len(shape) for a in axes})
    x = reordered(numbers(np.float32, seed, *shape), seed)
    for keepdims in (False, True):
        close(np.asarray(cpu.sum(x, axes=axes, keepdims=keepdims)),
              np.asarray(reference.sum(x, axes=axes, keepdims=keepdims)),
              np.prod([shape[a] for a in axes]))


@pytest.mark.parametrize("shape", [(3, 16_007), (16_007, 3), (40, 70, 8), (9, 1 << 17)])
@pytest.mark.parametrize("axis", [0, -1])
def test_sums_round_no_more_than_they_say(shape, axis):
    x = np.abs(numbers(np.float32, 0, *shape)) + np.float32(1000)     # all of one sign: Σ|x|
    want = np.sum(x, axis=axis, dtype=np.float64)
    error = np.abs(cpu.sum(x, axes=(axis,), keepdims=False) - want) / want
    assert error.max() <= 12 * 2.0**-24


@dtypes
@some
@given(shapes, st.sets(st.integers(0, 3), min_size=1), seeds, st.integers(1, 30))
def test_extremes_over_any_axes_and_memory_order(dtype, shape, axes, seed, repeat):
    shape = (shape[0] * repeat, *shape[1:])                           # beyond where NumPy serves
    axes = tuple({a % len(shape) for a in axes})
    x = reordered(numbers(dtype, seed, *shape), seed)
    x.flat[seed % x.size] = [np.nan, -np.inf, np.inf][seed % 3]
    for name in ("max", "min"):
        for keepdims in (False, True):
            np.testing.assert_array_equal(getattr(cpu, name)(x, axes=axes, keepdims=keepdims),
                                          getattr(reference, name)(x, axes=axes, keepdims=keepdims))


@dtypes
@pytest.mark.parametrize(("k", "s"), [(1, 1), (2, 2), (3, 2), (3, 1), (2, 3)])
def test_max_pool_backward_past_the_caches(dtype, k, s, monkeypatch):
    monkeypatch.setattr(importlib.import_module("nbgrad.kernels.cpu.pool"), "PAST_BYTES", 0)
    x = numbers(dtype, 0, 2, 32, 33, 32)
    how = {"kernel_size": (k, k), "stride": (s, s), "padding": (k // 2, k // 2), "dilation": (1, 1)}
    y, at = reference.max_pool2d(x, ceil_mode=False, **how)
    dy = numbers(dtype, 1, *y.shape)
    np.testing.assert_array_equal(cpu.max_pool2d_backward(dy, at, input_size=x.shape, **how),
                                  reference.max_pool2d_backward(dy, at, input_size=x.shape))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_infinite_gradient_of_the_loss(smoothing):
    x, target = numbers(np.float32, 0, 4, 20), np.array([0, 7, 19, 16])
    how = {"ignore_index": -1, "label_smoothing": smoothing}
    dloss = np.array(np.inf, np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(
            cpu.cross_entropy_backward(dloss, x, target, None, **how),
            reference.cross_entropy_backward(dloss, x, target, None, **how))


@dtypes
@some
@given(st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(3, 12)] * 2), st.integers(1, 3),
       st.integers(1, 3), st.integers(1, 2), seeds, st.sampled_from([1, 5]))
def test_pools_of_any_window(dtype, shape, k, s, d, seed, wider):
    shape = (shape[0], shape[1] * wider, *shape[2:])                  # beyond a vector of channels
    if d * (k - 1) >= min(shape[2:]):
        return
    x = reordered(np.round(numbers(dtype, seed, *shape)), seed)       # with ties
    x.flat[seed % x.size] = [np.nan, -np.inf, 0][seed % 3]
    how = {"kernel_size": (k, k), "stride": (s, s), "padding": (k // 2, k // 2), "ceil_mode": False}
    y, at = cpu.max_pool2d(x, dilation=(d, d), **how)
    want, where = reference.max_pool2d(x, dilation=(d, d), **how)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(at, where)
    dy = numbers(dtype, seed + 1, *y.shape)
    want = reference.max_pool2d_backward(dy, at, input_size=shape)
    windows = {name: how[name] for name in ("kernel_size", "stride", "padding")}
    for known in ({}, windows | {"dilation": (d, d)}):
        np.testing.assert_array_equal(
            cpu.max_pool2d_backward(dy, at, input_size=shape, **known), want)
    x = numbers(dtype, seed, *shape)
    how |= {"count_include_pad": bool(seed % 2), "divisor_override": None}
    y = reference.avg_pool2d(x, **how)
    close(cpu.avg_pool2d(x, **how), y, k * k)
    close(cpu.avg_pool2d_backward(y, input_size=shape, **how),
          reference.avg_pool2d_backward(y, input_size=shape, **how), k * k)


@pytest.mark.parametrize("shape", [(1,), (17,), (40, 70), (3, 50_001)])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_broadcasting_in_any_direction(name, shape):
    a = reordered(numbers(np.float32, 0, 60, 5, 8, 40), len(shape))  # above where a ufunc serves
    for other in [(1,), (40,), (8, 40), (5, 1, 1), (60, 5, 1, 1), (60, 1, 8, 1), (5, 8, 40)]:
        b = numbers(np.float32, 1, *other)
        for p, q in ((a, b), (b, a)):
            np.testing.assert_array_equal(getattr(cpu, name)(p, q), getattr(reference, name)(p, q))
    x, y = numbers(np.float32, 2, 2, *shape)
    np.testing.assert_array_equal(getattr(cpu, name)(x, y), getattr(reference, name)(x, y))


@dtypes
@pytest.mark.parametrize("name", ["erf", "exp", "gelu", "gelu_tanh", "sigmoid", "silu", "tanh"])
def test_functions_over_their_whole_range(name, dtype):
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0, 1e-30, 60, -60, np.inf, np.nan]])
    x = x.astype(dtype)
    got, want = getattr(cpu, name)(x), getattr(reference, name)(x)
    eps = np.finfo(dtype).eps                    # of what is added to or multiplied with x
    np.testing.assert_allclose(got, want, rtol=8 * eps, atol=8 * eps * 12)


@pytest.mark.parametrize("n", [1, 2048, 2049, 40_001])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_draws_what_numpy_draws(p, n):
    ours, theirs = (np.random.Generator(np.random.PCG64(7)) for _ in range(2))
    x = numbers(np.float32, 0, n)
    x[0] = np.inf
    for _ in range(3):                           # odd sizes leave half a draw to the next call
        for got, want in zip(cpu.dropout(x, ours, p), reference.dropout(x, theirs, p)):
            np.testing.assert_array_equal(got, want)
        assert ours.random(3, np.float32).tolist() == theirs.random(3, np.float32).tolist()
    assert ours.integers(1 << 60) == theirs.integers(1 << 60)
