"""CUDA kernels against the reference, on small shapes: edges of vectors, blocks and grids."""

import inspect
import itertools

import numpy as np
import pytest
from nbgrad.kernels import cpu, cuda, reference
from nbgrad.kernels.cuda import elementwise, reduce
from nbgrad.kernels.cuda.memory import to_device, to_host

NUMBERS = {"elu": (0.7,), "leaky_relu": (0.1,), "softplus": (1.3, 2.0)}
EPS = {np.float32: 2.0**-23, np.float64: 2.0**-52}
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def normal():
    rng = np.random.default_rng(0)
    return lambda dtype, *shape: rng.standard_normal(shape).astype(dtype)


def functions(module):
    """What a kernel package shows, by name."""
    return {name: f for name, f in vars(module).items()
            if callable(f) and not name.startswith("_")}


@pytest.mark.parametrize("theirs", [reference, cpu], ids=["reference", "cpu"])
def test_names_and_signatures_are_the_others(theirs):
    """Of elementwise functions, which may be NumPy's, the number of parameters."""
    own, missing = functions(cuda), []
    for name, f in functions(theirs).items():
        if name not in own:
            missing.append(name)
        elif inspect.isfunction(f) and name not in elementwise.__all__:
            assert str(inspect.signature(own[name])) == str(inspect.signature(f)), name
        elif inspect.isfunction(f) and not hasattr(f, "__wrapped__"):
            assert len(inspect.signature(own[name]).parameters) == len(
                inspect.signature(f).parameters), name
    assert missing == []


@dtypes
@pytest.mark.parametrize("name", elementwise.__all__)
def test_each_function(name, dtype, normal):
    """Polynomials are within 3 ulp of a result; erf's and gelu's tails lose a few more."""
    two, numbers = name in elementwise._TWO, NUMBERS.get(name.removesuffix("_backward"), ())
    for n in (0, 1, 3, 8, 257, 600):
        inputs = [normal(dtype, n) for _ in range(1 + two)]
        if n >= 8:
            inputs[0][:4] = 0, np.inf, -np.inf, np.nan
        want = getattr(reference, name)(*inputs, *numbers)
        got = to_host(getattr(cuda, name)(*map(to_device, inputs), *numbers))
        assert got.dtype == want.dtype
        if name in ("sin", "cos"):
            want, got = (np.where(np.isfinite(inputs[0]), y, 0) for y in (want, got))
        np.testing.assert_allclose(got, want, rtol=30 * EPS[dtype], atol=8 * EPS[dtype])


SHAPES = [((2, 3, 4, 5), (3, 1, 1)), ((2, 3, 4, 5), (5,)), ((2, 3, 4, 4), (4,)), ((2, 3), ()),
          ((2, 8, 4, 4), (1, 8, 1, 1)), ((4, 1), (1, 5)), ((), ()), ((0, 3), (3,)),
          ((7, 1), (1, 0)), ((2, 1, 3, 1, 2, 1, 3), (1, 2, 1, 3, 1, 2, 1)), ((1, 4), (3, 1))]


@dtypes
@pytest.mark.parametrize("shapes", SHAPES)
def test_broadcasting(shapes, dtype, normal):
    a, b = (normal(dtype, *s) for s in shapes)
    for x, y in ((a, b), (b, a), (a.T, np.broadcast_to(b, np.broadcast_shapes(*shapes)).T)):
        if x.ndim and y.ndim > x.ndim and x is a.T:
            continue
        if x is a.T and a.shape != np.broadcast_shapes(*shapes):
            continue
        np.testing.assert_array_equal(to_host(cuda.sub(to_device(x), to_device(y))), x - y)


def test_views_and_memory_order(normal):
    x = normal(np.float32, 4, 6, 9)
    d = to_device(x)
    np.testing.assert_array_equal(to_host(cuda.add(d[:, ::-2, 1:], d[:, 1::2, :-1])),
                                  x[:, ::-2, 1:] + x[:, 1::2, :-1])
    np.testing.assert_array_equal(to_host(cuda.neg(d[1:, :, 3])), -x[1:, :, 3])
    nhwc = normal(np.float32, 2, 3, 4, 5).transpose(0, 3, 1, 2)
    bias = normal(np.float32, 5, 1, 1)
    y = cuda.add(to_device(nhwc), to_device(bias))
    assert y.strides == nhwc.strides == cuda.relu(y).strides
    np.testing.assert_array_equal(to_host(y), nhwc + bias)


def test_integers_and_mixed_dtypes_are_numpys():
    a, b = np.arange(6).reshape(2, 3), np.array([1, 2, 0])
    np.testing.assert_array_equal(to_host(cuda.mul(to_device(a), to_device(b))), a * b)
    np.testing.assert_array_equal(to_host(cuda.sum(to_device(a), axes=(1,), keepdims=False)),
                                  [3, 12])


REDUCED = [((3, 5, 7), None), ((2, 70, 3), None), ((3, 300), None), ((2, 3, 4, 5), (0, 3, 1, 2)),
           ((1, 40), None), ((3, 2, 150), (1, 0, 2)), ((2, 0, 3), None), ((), None),
           ((1300,), None)]


@dtypes
@pytest.mark.parametrize(("shape", "order"), REDUCED)
def test_reductions_over_any_axes(shape, order, dtype, normal, monkeypatch):
    """Sums within the rounding of 8 numbers in float32, products of as many as there are."""
    monkeypatch.setattr(reduce, "SEGMENT", 128)
    x = normal(dtype, *shape)
    x = x if order is None else x.transpose(order)
    d = to_device(x)
    for k in range(x.ndim + 1):
        for axes in itertools.combinations(range(x.ndim), k):
            name = "sum" if x.size == 0 else ("sum", "prod", "max", "min")[(k + sum(axes)) % 4]
            want = getattr(reference, name)(x, axes=axes if k < x.ndim else None, keepdims=k % 2)
            got = getattr(cuda, name)(d, axes=axes if k < x.ndim else None, keepdims=k % 2)
            assert to_host(got).dtype == want.dtype
            bound = 4 * EPS[dtype] * (np.abs(x).sum() if name == "sum" else 1)
            np.testing.assert_allclose(to_host(got), want, rtol=8 * EPS[dtype] * max(1, x.size / 8)
                                       if name == "prod" else EPS[dtype], atol=bound)


def test_reductions_with_either_order_of_threads(normal, either_order):
    x = normal(np.float32, 3, 500)
    x[1, 400] = np.nan
    d = to_device(x)
    np.testing.assert_array_equal(to_host(cuda.max(d, axes=(1,), keepdims=True)),
                                  x.max(1, keepdims=True))
    np.testing.assert_array_equal(to_host(cuda.min(d, axes=0, keepdims=False)), x.min(0))
    np.testing.assert_allclose(to_host(cuda.sum(d, axes=(1,), keepdims=False)),
                               x.astype(np.float64).sum(1), rtol=1e-6)


def test_gaps_and_negative_steps(normal):
    x = normal(np.float64, 4, 9, 6)
    d = to_device(x)
    for view in ((slice(None), slice(None, None, -2)), (slice(None), slice(1, None), slice(2, 5))):
        for axes in ((0,), (1,), (0, 2), (0, 1, 2)):
            np.testing.assert_allclose(to_host(cuda.sum(d[view], axes=axes, keepdims=False)),
                                       x[view].sum(axes), rtol=1e-13)


def test_a_maximum_of_nothing_raises():
    with pytest.raises(ValueError, match="zero-size array"):
        cuda.max(to_device(np.zeros((2, 0), np.float32)), axes=(1,), keepdims=False)
