"""Ops against NumPy: values, result dtypes, NaN and inf, large arrays, running statistics."""

import math

import numpy as np
import pytest

import nbgrad
from nbgrad import backend, tensor

F32, F64, I64, I32, U8, BOOL = map(np.dtype, ("f4", "f8", "i8", "i4", "u1", "?"))
INF, NAN = math.inf, math.nan
RNG = np.random.default_rng(0)


def normal(*shape, dtype=F64):
    return RNG.standard_normal(shape).astype(dtype)


def positive(*shape):
    return RNG.uniform(0.2, 3, shape)


def softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def windows(x, k, s):
    """(N, C, P, Q, k, k)"""
    return np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3))[:, :, ::s, ::s]


def conv2d(x, w, b, s, p, d):
    x = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    I, J = w.shape[2:]
    view = np.lib.stride_tricks.sliding_window_view(x, (d * (I - 1) + 1, d * (J - 1) + 1), (2, 3))
    return np.einsum("ncpqij,ocij->nopq", view[:, :, ::s, ::s, ::d, ::d], w) + b.reshape(-1, 1, 1)


def normalized(x, axes, gamma=1.0, beta=0.0, eps=1e-5):
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * gamma + beta


def erf(x):
    return np.vectorize(math.erf)(x)


X, A, B, P = normal(3, 4, 5), normal(4, 1), positive(5), positive(3, 4, 5)
IMAGE = normal(2, 3, 7, 6)
CASES = [                                                 # (nbgrad's function, NumPy's, inputs)
    (nbgrad.add, np.add, X, A), (nbgrad.sub, np.subtract, X, A), (nbgrad.mul, np.multiply, X, A),
    (nbgrad.div, np.divide, X, B), (nbgrad.pow, np.power, P, A),
    (nbgrad.maximum, np.maximum, X, A), (nbgrad.minimum, np.minimum, X, A),
    (nbgrad.floor_divide, np.floor_divide, X, B), (nbgrad.remainder, np.remainder, X, B),
    *[(getattr(nbgrad, f), getattr(np, f), X) for f in
      ("exp", "expm1", "square", "sin", "cos", "tanh", "abs", "sign", "floor", "ceil", "round",
       "trunc", "isnan", "isfinite", "isinf")],
    *[(getattr(nbgrad, f), getattr(np, f), P) for f in ("log", "log1p", "sqrt", "reciprocal")],
    *[(getattr(nbgrad, f), getattr(np, g), np.round(X), np.round(A)) for f, g in (
        ("eq", "equal"), ("ne", "not_equal"), ("lt", "less"), ("le", "less_equal"),
        ("gt", "greater"),
        ("ge", "greater_equal"), ("logical_and",) * 2, ("logical_or",) * 2, ("logical_xor",) * 2)],
    *[(getattr(nbgrad, f), getattr(np, f), np.arange(12).reshape(3, 4), np.array([3, 5, 1, 8]))
      for f in ("bitwise_and", "bitwise_or", "bitwise_xor")],
    (nbgrad.logical_not, np.logical_not, np.round(X)),
    (nbgrad.bitwise_not, np.invert, np.arange(4)),
    (nbgrad.neg, np.negative, X), (nbgrad.rsqrt, lambda x: 1 / np.sqrt(x), P), (nbgrad.erf, erf, X),
    (lambda x: x.clamp(-0.5, 1), lambda x: np.clip(x, -0.5, 1), X),
    (lambda x: nbgrad.where(x > 0, x, -1), lambda x: np.where(x > 0, x, -1), X),
    (nbgrad.relu, lambda x: np.maximum(x, 0), X),
    (lambda x: nbgrad.leaky_relu(x, 0.2), lambda x: np.where(x > 0, x, 0.2 * x), X),
    (lambda x: nbgrad.elu(x, 0.5), lambda x: np.where(x > 0, x, 0.5 * np.expm1(x)), X),
    (nbgrad.sigmoid, lambda x: 1 / (1 + np.exp(-x)), X),
    (nbgrad.silu, lambda x: x / (1 + np.exp(-x)), X),
    (nbgrad.gelu, lambda x: x * (1 + erf(x / math.sqrt(2))) / 2, X),
    (lambda x: nbgrad.gelu(x, "tanh"), lambda x: x * (1 + np.tanh(
        math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2, X),
    (lambda x: nbgrad.softplus(x, 2.0), lambda x: np.log1p(np.exp(2 * x)) / 2, X),
    *[(getattr(nbgrad, f), getattr(np, f), X) for f in
      ("sum", "mean", "amax", "amin", "prod", "argmax", "argmin", "all", "any")],
    *[(lambda x, f=f: getattr(x, f)(-2, keepdim=True),
       lambda x, f=f: getattr(np, f)(x, axis=-2, keepdims=True), X) for f in
      ("sum", "mean", "amax", "amin", "prod", "argmax", "argmin", "all", "any")],
    *[(lambda x, f=f: getattr(x, f)((0, -1)), lambda x, f=f: getattr(np, f)(x, axis=(0, -1)), X)
      for f in ("sum", "mean", "amax", "amin", "all", "any")],
    (lambda x: x.var(1), lambda x: x.var(axis=1, ddof=1), X),
    (lambda x: x.std((0, 2), correction=0), lambda x: x.std(axis=(0, 2)), X),
    (lambda x: nbgrad.logsumexp(x, 1), lambda x: np.log(np.exp(x).sum(axis=1)), X),
    (lambda x: x.norm(), lambda x: np.sqrt((x * x).sum()), X),
    (lambda x: x.norm(3, dim=0), lambda x: (np.abs(x)**3).sum(axis=0)**(1 / 3), X),
    (lambda x: x.norm(INF, dim=0), lambda x: np.abs(x).max(axis=0), X),
    (lambda x: x.cumsum(1), lambda x: np.cumsum(x, axis=1), X),
    (lambda x: nbgrad.softmax(x, 1), lambda x: softmax(x, 1), X),
    (lambda x: nbgrad.log_softmax(x, -1), lambda x: np.log(softmax(x, -1)), X),
    (lambda x: x.reshape(2, -1), lambda x: x.reshape(2, -1), X),
    (lambda x: x.permute(2, 0, 1), lambda x: x.transpose(2, 0, 1), X),
    (lambda x: x.transpose(0, -1), lambda x: x.swapaxes(0, -1), X),
    (lambda x: nbgrad.cat([x, x], 1), lambda x: np.concatenate([x, x], 1), X),
    (lambda x: nbgrad.stack([x, x], -1), lambda x: np.stack([x, x], -1), X),
    (lambda x: x.repeat(2, 1, 1, 3), lambda x: np.tile(x, (2, 1, 1, 3)), X),
    (lambda x: x.flip((0, 2)), lambda x: np.flip(x, (0, 2)), X),
    (lambda x: x.roll((1, -2), (0, 2)), lambda x: np.roll(x, (1, -2), (0, 2)), X),
    (lambda x: x.tril(1), lambda x: np.tril(x, 1), X),
    (lambda x: x.triu(-1), lambda x: np.triu(x, -1), X),
    (lambda x: nbgrad.pad(x, (1, 2, 0, 3), value=9), lambda x: np.pad(
        x, ((0, 0), (0, 3), (1, 2)), constant_values=9), X),
    (lambda x: x.gather(1, tensor(X[:, :2].argsort(1))),
     lambda x: np.take_along_axis(x, X[:, :2].argsort(1), 1), X),
    (lambda x: x.index_select(-1, tensor([4, 0, 4])), lambda x: x[..., [4, 0, 4]], X),
    (lambda x: x.masked_fill(x > 0, 7), lambda x: np.where(x > 0, 7, x), X),
    (nbgrad.matmul, np.matmul, normal(2, 3, 4), normal(4, 5)),
    (nbgrad.matmul, np.matmul, A[:, 0], normal(4)),
    (nbgrad.linear, lambda x, w, b: x @ w.T + b, normal(2, 3, 4), normal(5, 4), normal(5)),
    (lambda x, w, b: nbgrad.conv2d(x, w, b, 2, 1, 2), lambda x, w, b: conv2d(x, w, b, 2, 1, 2),
     IMAGE, normal(4, 3, 2, 3), normal(4)),
    (lambda x: nbgrad.max_pool2d(x, 2), lambda x: windows(x, 2, 2).max((-1, -2)), IMAGE),
    (lambda x: nbgrad.avg_pool2d(x, 3, 1), lambda x: windows(x, 3, 1).mean((-1, -2)), IMAGE),
    (lambda x: nbgrad.adaptive_avg_pool2d(x, 1), lambda x: x.mean((2, 3), keepdims=True), IMAGE),
    (lambda x, g, b: nbgrad.batch_norm(x, None, None, g, b, True), lambda x, g, b: normalized(
        x, (0, 2, 3), g.reshape(-1, 1, 1), b.reshape(-1, 1, 1)), IMAGE, normal(3), normal(3)),
    (lambda x, g: nbgrad.layer_norm(x, (4, 5), g, eps=0.1),
     lambda x, g: normalized(x, (1, 2), g, eps=0.1), X, normal(4, 5)),
    (lambda x: nbgrad.cross_entropy(x, tensor([1, 0, 3])),
     lambda x: -np.log(softmax(x, 1))[range(3), [1, 0, 3]].mean(), normal(3, 4)),
    (lambda x: nbgrad.nll_loss(x, tensor([1, 0, 3])), lambda x: -x[range(3), [1, 0, 3]].mean(),
     normal(3, 4)),
    (nbgrad.mse_loss, lambda x, t: ((x - t)**2).mean(), normal(3, 4), normal(3, 4)),
]


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_value(case, kernels):
    f, formula, *arrays = CASES[case]
    expected = np.asarray(formula(*arrays))
    with backend.use(kernels):
        y = f(*map(tensor, arrays))
    np.testing.assert_allclose(y.data, expected, rtol=1e-12, atol=1e-13)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype


# ------------------------------------------------------------------------------------------- dtypes

def zeros(dtype, *shape):
    return nbgrad.ones(*shape, dtype=dtype)


PROMOTION = [                                             # operands of "+", result: PyTorch's rule
    ((F32, 2), 1, F32), ((F32, 2), 2.5, F32), ((F32, 2), True, F32), ((F64, 2), 2.5, F64),
    ((I64, 2), 1, I64), ((I64, 2), 2.5, F32), ((I32, 2), 1, I32), ((U8, 2), 1, U8),
    ((U8, 2), 2.5, F32), ((BOOL, 2), 1, I64), ((BOOL, 2), 2.5, F32), ((BOOL, 2), True, BOOL),
    ((F32, 2), (F64, 2), F64), ((F32, 2), (F64,), F32), ((F32,), (F64,), F64),
    ((F32,), (F64, 2), F64),
    ((F32, 2), (I64, 2), F32), ((I64, 2), (F64,), F64), ((I32, 2), (I64, 2), I64),
    ((I32, 2), (I64,), I32),
    ((U8, 2), (I32, 2), I32), ((BOOL, 2), (U8, 2), U8), ((BOOL, 2), (F32, 2), F32),
    ((BOOL, 2), (I64,), I64),
    ((F32, 2), np.float32(2), F32), ((F32, 2), np.float64(2), F32), ((I64, 2), np.float64(2), F32),
    ((F32, 2), np.int64(2), F32), ((F32, 2), np.ones(2), F64), ((F32, 2), np.ones(2, F32), F32),
    ((F32, 2), np.ones(2, I64), F32), ((F32, 2), np.array(2.0), F32), ((F32, 2), [1.0, 2.0], F32),
]


def operand(x):
    return nbgrad.ones(*x[1:], dtype=x[0]) if isinstance(x, tuple) else x


@pytest.mark.parametrize(("a", "b", "dtype"), PROMOTION)
def test_result_dtype(a, b, dtype):
    a, b = operand(a), operand(b)
    for y in (a + b, b + a, nbgrad.maximum(a, b)):
        assert y.dtype == dtype
        assert isinstance(y, nbgrad.Tensor)
    assert (a < b).dtype == BOOL
    assert nbgrad.where(nbgrad.ones(2, dtype=BOOL), a, b).dtype == dtype


@pytest.mark.parametrize(("a", "b", "dtype"), PROMOTION)
def test_result_dtype_is_pytorchs(a, b, dtype):
    torch = pytest.importorskip("torch")

    def of(x):
        if isinstance(x, tuple):
            return torch.ones(x[1:], dtype=getattr(torch, x[0].name))
        return torch.tensor(x) if isinstance(x, (np.ndarray, list)) else x.item() if isinstance(
            x, np.generic) else x
    assert str((of(a) + of(b)).dtype) == f"torch.{dtype.name}"


@pytest.mark.parametrize(("f", "dtype"), [
    (lambda x: x / 2, F32), (lambda x: x / x, F32), (nbgrad.exp, F32), (nbgrad.sqrt, F32),
    (nbgrad.sigmoid, F32),
    (lambda x: x // 2, I32), (lambda x: x % 2, I32), (lambda x: x ** 2, I32),
    (lambda x: x ** 0.5, F32),
    (nbgrad.sum, I64), (lambda x: x.sum(0), I64), (nbgrad.prod, I64), (lambda x: x.cumsum(0), I64),
    (nbgrad.amax, I32), (nbgrad.abs, I32), (lambda x: x.clamp(0.5), F32),
    (lambda x: x.clamp(0, 1), I32),
    (lambda x: x @ x, I32), (nbgrad.argmax, I64), (nbgrad.all, BOOL), (lambda x: -x, I32),
    (lambda x: nbgrad.cat([x, x.double()]), F64)])
def test_integers(f, dtype):
    torch = pytest.importorskip("torch")
    y = f(tensor([1, 2, 3], I32))
    assert y.dtype == dtype
    if f.__name__ == "<lambda>" and dtype != F64:
        expected = f(torch.tensor([1, 2, 3], dtype=torch.int32)).numpy()
        np.testing.assert_allclose(y.data, expected, rtol=1e-6)


def test_integer_division_by_zero_raises_and_float_division_does_not():
    with pytest.raises(ZeroDivisionError, match="floor_divide"):
        tensor([1, 2]) // 0
    with pytest.raises(ZeroDivisionError, match="remainder"):
        tensor([1, 2]) % tensor([1, 0])
    np.testing.assert_array_equal((tensor([-1.0, 0.0]) // 0).data, [-INF, NAN])
    np.testing.assert_array_equal((tensor([-1.0, 0.0]) % 0).data, [NAN, NAN])


# --------------------------------------------------------------------------- NaN and inf are silent

SPECIAL = np.array([NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1.0, 1e-45])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", [
    "exp", "expm1", "square", "sin", "cos", "tanh", "abs", "floor", "ceil", "round", "trunc", "log",
    "log1p", "sqrt", "rsqrt", "reciprocal", "neg", "relu", "leaky_relu", "elu", "sigmoid", "silu",
    "softplus", "erf", "isnan", "isinf", "isfinite", "sum", "mean", "amax", "amin", "prod",
    "argmax", "var", "std", "norm"])
def test_special_values_as_in_pytorch(name, dtype):
    torch = pytest.importorskip("torch")
    x = SPECIAL.astype(dtype)
    leaf = tensor(x, requires_grad=True)
    y = getattr(nbgrad, name)(leaf)
    home = torch if hasattr(torch, name) else torch.nn.functional
    np.testing.assert_allclose(y.data, getattr(home, name)(torch.tensor(x)).numpy(), rtol=1e-6,
                               atol=1e-44)
    if y.requires_grad:
        y.backward(np.ones(y.shape, dtype))


@pytest.mark.parametrize("f", [
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b,
    lambda a, b: a ** b, lambda a, b: a // b, lambda a, b: a % b, lambda a, b: a < b,
    lambda a, b: a == b, lambda a, b: a @ b])
def test_special_values_of_two_operands_as_in_pytorch(f):
    torch = pytest.importorskip("torch")
    a, b = (g.astype(F32) for g in np.meshgrid(SPECIAL[:8], SPECIAL[:8]))
    x, z = tensor(a, requires_grad=True), tensor(b, requires_grad=True)
    y = f(x, z)
    np.testing.assert_allclose(y.data, f(torch.tensor(a), torch.tensor(b)).numpy(), rtol=1e-6)
    if y.requires_grad:
        y.backward(np.ones(y.shape))


def test_special_values_of_gelu_and_sign():
    np.testing.assert_array_equal(nbgrad.gelu(tensor([NAN, INF, 3e38, -3e38, 0.0])).data,
                                  np.array([NAN, INF, 3e38, 0, 0], F32))
    np.testing.assert_array_equal(nbgrad.sign(tensor([NAN, INF, -INF, 0.0])).data, [NAN, 1, -1, 0])


def test_large_logits_and_minus_infinity():
    x = tensor([[1e4, -1e4, 0], [-INF, 0, -INF]], F64)
    np.testing.assert_array_equal(nbgrad.softmax(x, 1).data, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(nbgrad.log_softmax(x, 1).data, [[0, -2e4, -1e4], [-INF, 0, -INF]])
    np.testing.assert_array_equal(nbgrad.logsumexp(x, 1).data, [1e4, 0])
    assert nbgrad.logsumexp(tensor([-INF, -INF]), 0).item() == -INF
    assert nbgrad.logsumexp(tensor([INF, 1.0]), 0).item() == INF
    assert math.isnan(nbgrad.logsumexp(tensor([NAN, 1.0]), 0).item())


@pytest.mark.parametrize(("f", "expected"), [
    (lambda x: nbgrad.cumsum(x, 0), [np.float32(3e38), INF]), (lambda x: x.prod(), INF),
    (lambda x: x.sum(), INF),
    (lambda x: nbgrad.add(x, x, alpha=2), [INF, INF]),
    (lambda x: nbgrad.sub(x, x, alpha=-2), [INF, INF]),
    (lambda x: nbgrad.dropout(x, 0.9, generator=nbgrad.Generator(4)), [0, INF]),
    (lambda x: nbgrad.batch_norm(x.reshape(1, 2), nbgrad.ones(2), -nbgrad.ones(2))[0], [NAN, NAN]),
    (lambda x: nbgrad.mse_loss(x, -x), INF), (lambda x: nbgrad.matmul(x, x), INF)])
def test_overflow_is_silent(f, expected):
    np.testing.assert_array_equal(f(tensor([3e38, 3e38])).data, expected)


def test_pooling_propagates_nan():
    x = np.zeros((1, 1, 4, 4), F32)
    x[0, 0, 1, 2] = NAN
    np.testing.assert_array_equal(nbgrad.max_pool2d(tensor(x), 2).data[0, 0], [[0, NAN], [0, 0]])


def test_argmax_takes_the_first_of_equal_ones():
    assert tensor([1, 3, 3, 0]).argmax().item() == 1
    assert tensor([1.0, 0.0, 0.0]).argmin().item() == 1
    assert tensor([[2, 2], [1, 1]]).max(1).indices.tolist() == [0, 0]
    assert tensor([1.0, NAN, 3.0]).argmax().item() == 1


def test_empty_reductions():
    e = nbgrad.zeros(0, 3)
    assert e.sum().item() == 0
    assert e.prod(0).tolist() == [1, 1, 1]
    assert np.isnan(e.mean(0).data).all()
    assert e.sum(1).shape == (0,)
    assert nbgrad.logsumexp(nbgrad.zeros(3, 0), 1).tolist() == [-INF] * 3
    for f in (nbgrad.amax, nbgrad.amin, nbgrad.argmax, nbgrad.max):
        with pytest.raises(IndexError, match=r"non-zero|numel"):
            f(e)


# -------------------------------------------------------------------- large arrays take other code

N = 20_000                                                # above the 16384 up to which NumPy serves
UNARY = ["exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "sin", "tanh", "abs", "neg", "relu",
         "elu", "leaky_relu", "sigmoid", "silu", "gelu", "softplus", "erf", "log1p", "expm1",
         "round"]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", UNARY)
def test_large_arrays_equal_small_ones(name, dtype):
    x = np.abs(normal(N, dtype=dtype)) + dtype.type(0.1)
    f = getattr(nbgrad, name)
    whole, pieces = f(tensor(x)).data, [f(tensor(p)).data for p in np.split(x, 20)]
    np.testing.assert_allclose(whole, np.concatenate(pieces), rtol=4 * np.finfo(dtype).eps)
    f(tensor(np.full(N, 1e30, F32)))                      # silent, too


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("f", [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b,
                               lambda a, b: a / b])
@pytest.mark.parametrize("shapes", [((200, 100), (200, 100)), ((200, 100), (100,)),
                                    ((200, 1), (100,)), ((200, 100), ())])
def test_large_arithmetic(f, shapes, dtype):
    a, b = (normal(*s, dtype=dtype) for s in shapes)
    expected = f(a.astype(F64), b.astype(F64))
    for x in (a, np.asfortranarray(a)):
        y = f(tensor(x), tensor(b))
        assert y.dtype == dtype
        np.testing.assert_allclose(y.data, expected, rtol=2 * np.finfo(dtype).eps)
    f(tensor(a), tensor(np.zeros_like(b)))


@pytest.mark.parametrize("axes", [None, 0, 1, 2, 3, (0, 2, 3), (1, 2), (0, 3)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_large_sums_in_every_memory_order(axes, order):
    x = normal(8, 20, 33, 7, dtype=F32) + 1000
    x = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    y = tensor(x).sum(axes)
    np.testing.assert_allclose(y.data, x.astype(F64).sum(axis=axes),
                               rtol=12 * 2.0**-24)             # what kernels/cpu/reduce.py promises
    np.testing.assert_allclose(tensor(x[::-1, :, ::2]).mean(axes, True).data,
                               x[::-1, :, ::2].astype(F64).mean(axis=axes, keepdims=True),
                               rtol=2e-7)


def test_sum_of_ten_million_ones_is_exact():
    x = nbgrad.ones(10_000_000)
    assert x.sum().item() == 10_000_000
    assert x.mean().item() == 1
    assert (x * 0.5).reshape(2, -1).sum(1).tolist() == [2_500_000] * 2


@pytest.mark.parametrize("f", [
    lambda x: nbgrad.relu(x), lambda x: x + x, lambda x: x * 2, lambda x: nbgrad.exp(x),
    lambda x: nbgrad.gelu(x),
    lambda x: nbgrad.batch_norm(x, None, None, training=True), lambda x: nbgrad.max_pool2d(x, 2),
    lambda x: nbgrad.avg_pool2d(x, 2), lambda x: nbgrad.conv2d(x, nbgrad.ones(4, 16, 3, 3))])
def test_channels_last_memory_gives_the_same_values_and_is_kept(f):
    x = normal(2, 16, 30, 30, dtype=F32)
    last = tensor(np.ascontiguousarray(x.transpose(0, 2, 3, 1))).permute(0, 3, 1, 2)
    y = f(last)
    assert y.data.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_allclose(y.data, f(tensor(x)).data, rtol=1e-5, atol=2e-5)


# ---------------------------------------------------------------------------- running statistics

def test_batch_norm_moves_the_running_statistics_and_uses_them():
    x = normal(6, 3, 4) * 2 + 5
    mean, var = tensor(np.zeros(3)), tensor(np.ones(3))
    address = mean.data.ctypes.data
    nbgrad.batch_norm(tensor(x), mean, var, training=True, momentum=0.3)
    np.testing.assert_allclose(mean.data, 0.3 * x.mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(var.data, 0.7 + 0.3 * x.var((0, 2), ddof=1), rtol=1e-12)
    assert mean.data.ctypes.data == address
    before = mean.data.copy()
    y = nbgrad.batch_norm(tensor(x), mean, var, tensor([1.0, 2, 3], F64), tensor([0.0, 1, 2], F64),
                          eps=0.1)
    column = (slice(None), None)
    expected = (x - mean.data[column]) / np.sqrt(var.data[column] + 0.1)
    gamma, beta = np.array([1, 2, 3])[column], np.arange(3)[column]
    np.testing.assert_allclose(y.data, expected * gamma + beta)
    np.testing.assert_array_equal(mean.data, before)


def test_batch_norm_updates_nothing_when_it_refuses():
    mean, var = nbgrad.zeros(3), nbgrad.ones(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nbgrad.batch_norm(nbgrad.ones(1, 3), mean, var, training=True)
    with pytest.raises(ValueError, match="weight should contain 3"):
        nbgrad.batch_norm(nbgrad.ones(4, 3), mean, var, nbgrad.ones(4), training=True)
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]


def test_dropout_scales_what_it_keeps():
    x = nbgrad.ones(200, 100, requires_grad=True)
    y = nbgrad.dropout(x, 0.2, generator=nbgrad.Generator(0))
    assert set(np.unique(y.data)) == {0, np.float32(1.25)}
    assert abs((y.data == 0).mean() - 0.2) < 0.01
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.data, y.data)
    assert nbgrad.dropout(x, 0.2, training=False) is x
    assert nbgrad.dropout(x, 1.0).sum().item() == 0


def test_padding_and_slices_keep_the_order_of_axes_in_memory():
    """Channels-last goes through, forward and backward."""
    last = np.arange(2 * 4 * 5 * 3.0).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    x = nbgrad.as_tensor(last).requires_grad_()
    y = nbgrad.pad(x[:, :, ::2], (0, 1, 0, 0, 2, 0), value=7.0)
    want = np.pad(last[:, :, ::2], [(0, 0), (2, 0), (0, 0), (0, 1)], constant_values=7.0)
    np.testing.assert_array_equal(y.data, want)
    assert y.data.transpose(0, 2, 3, 1).flags.c_contiguous
    dy = np.random.default_rng(0).standard_normal(y.shape[:1] + y.shape[2:] + y.shape[1:2])
    (dx,) = nbgrad.grad(y, x, nbgrad.as_tensor(dy.transpose(0, 3, 1, 2)))
    expected = np.zeros(last.shape)
    expected[:, :, ::2] = dy.transpose(0, 3, 1, 2)[:, 2:, :, :-1]
    np.testing.assert_array_equal(dx.data, expected)
    assert dx.data.transpose(0, 2, 3, 1).flags.c_contiguous


def test_evaluation_of_nothing_and_backward_of_nan():
    mean, var, gamma = (nbgrad.tensor(np.full(4, v, np.float32)) for v in (0.5, 2.0, 3.0))
    empty = nbgrad.batch_norm(nbgrad.zeros(0, 4, 5, 5), mean, var, gamma, None, False)
    assert empty.shape == (0, 4, 5, 5)
    x = nbgrad.tensor(normal(6, 4, dtype=F32), requires_grad=True)
    dy = np.ones((6, 4), F32)
    dy[2, 1] = np.nan
    y = nbgrad.batch_norm(x, mean, var, gamma, None, False, eps=0.25)
    (dx,) = nbgrad.grad(y, x, nbgrad.tensor(dy))
    np.testing.assert_allclose(dx.data, dy * np.float32(3 / 1.5), rtol=1e-6)
