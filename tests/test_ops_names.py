"""PyTorch's names, keywords and settings: values against NumPy, then value and gradient against
PyTorch; what writes in place; the gradient of std where nothing varies."""

import numpy as np
import pytest

import nbgrad
from nbgrad import as_tensor, grad, tensor
from nbgrad.testing import gradcheck

RNG = np.random.default_rng(3)
X, A, M, V = (RNG.standard_normal(s) for s in ((3, 4), (3, 4), (4, 5), (4,)))
B1, B2 = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((2, 4, 5))
TIES = np.array([[2.0, 1, 2, 3], [0, 0, 0, -1]])
INTS, BY = np.array([-7, 7, -6, 5]), np.array([2, -2, 3, 3])
NAN = np.array([1.0, np.nan, -1, 3])


def rank(x, descending, axis=-1):
    """Stable; NaN largest."""
    key = np.where(np.isnan(x), np.inf, x)
    return np.argsort(-key if descending else key, axis, kind="stable")


CASES = {                                        # name: (nbgrad's function, NumPy's, inputs)
    "t": (lambda x: x.t(), np.transpose, X),
    "t of a vector": (lambda x: nbgrad.t(x), lambda x: x, V),
    "where method": (lambda x, a: x.where(x > 0, a), lambda x, a: np.where(x > 0, x, a), X, A),
    "mm": (lambda x, m: x.mm(m), np.matmul, X, M), "bmm": (nbgrad.bmm, np.matmul, B1, B2),
    "dot": (lambda a, b: a.dot(b), np.dot, V, A[0]),
    "outer": (lambda a, b: a.outer(b), np.outer, V, X[:, 0]),
    "expand_as": (lambda v, x: v.expand_as(x), lambda v, x: np.broadcast_to(v, x.shape), V, X),
    "view_as": (lambda x, y: x.view_as(y), lambda x, y: x.reshape(y.shape), X, X.reshape(2, 6)),
    "type_as": (lambda x, y: x.type_as(y), lambda x, y: x.astype(y.dtype), X, np.zeros(1, "f4")),
    "masked_select": (lambda x: x.masked_select(x > 0), lambda x: x[x > 0], X),
    "masked_select broadcast": (lambda x, v: x.masked_select(v > 0), lambda x, v: x[:, v > 0].ravel(
        ), X, V),
    "nonzero": (lambda x: x.nonzero(), np.argwhere, TIES),
    "nonzero of a number": (lambda x: x.nonzero(), np.argwhere, np.array(2.0)),
    "nonzero tuple": (lambda x: x.nonzero(as_tuple=True)[1], lambda x: x.nonzero()[1], TIES),
    "narrow": (lambda x: x.narrow(1, 1, 2), lambda x: x[:, 1:3], X),
    "narrow from behind": (lambda x: nbgrad.narrow(x, -1, -2, 2), lambda x: x[:, -2:], X),
    "select": (lambda x: x.select(1, -2), lambda x: x[:, -2], X),
    **{f"sort {name} {d} {dim}": (
        lambda x, d=d, dim=dim: x.sort(dim, d)[0] + x.sort(dim, d).indices * 10,
        lambda x, d=d, dim=dim: np.take_along_axis(x, rank(x, d, dim), dim) + rank(x, d, dim) * 10,
        array) for name, array in (("", X), ("ties", TIES), ("nan", NAN))
       for d in (False, True) for dim in {-1, 1 - array.ndim}},
    "argsort": (lambda x: x.argsort(0, descending=True), lambda x: rank(x, True, 0), X),
    "topk": (lambda x: x.topk(2).values, lambda x: np.sort(x, 1)[:, :1:-1], X),
    "topk indices": (lambda x: nbgrad.topk(x, 3, 0, largest=False)[1],
                     lambda x: np.argsort(x, 0)[:3], X),
    "sort of a number": (lambda x: x.sort()[0] + x.topk(1)[0] + x.sort()[1], lambda x: 2 * x,
                         np.array(2.0)),
    "concat": (lambda x, a: nbgrad.concat([x, a], dim=1), lambda x, a: np.concatenate([x, a], 1), X,
               A),
    "div trunc": (lambda x, a: x.div(a, rounding_mode="trunc"), lambda x, a: np.trunc(x / a), X, A),
    "div floor": (lambda x, a: nbgrad.div(x, a, rounding_mode="floor"), np.floor_divide, X, A),
    "div trunc of ints": (lambda x, y: x.div(y, rounding_mode="trunc"),
                          lambda x, y: np.trunc(x / y).astype(int), INTS, BY),
    "div floor of ints": (lambda x, y: x.div(y, rounding_mode="floor"), np.floor_divide, INTS, BY),
    "round decimals": (lambda x: x.round(decimals=1), lambda x: np.round(x, 1), X),
    "round to tens": (lambda x: nbgrad.round(x * 100, decimals=-1), lambda x: np.round(100 * x, -1),
                      X),
    "sum axis": (lambda x: x.sum(axis=1), lambda x: x.sum(1), X),
    "mean axis": (lambda x: x.mean(axis=(0, 1)), np.mean, X),
    "prod axis": (lambda x: x.prod(axis=0, keepdim=True), lambda x: x.prod(0, keepdims=True), X),
    **{f"{f} dtype": (lambda x, f=f: getattr(x, f)(dim=1, dtype=nbgrad.float64),
                      lambda x, f=f: getattr(x.astype("f8"), f)(1), X.astype("f4"))
       for f in ("sum", "mean", "prod")},
    **{f"{f} of ints dtype": (lambda x, f=f: getattr(x, f)(dtype=nbgrad.float32),
                              lambda x, f=f: getattr(x.astype("f4"), f)(), INTS)
       for f in ("sum", "mean", "prod")},
    "sum narrow ints": (lambda x: x.sum(dtype=nbgrad.int32), lambda x: x.sum(dtype="i4"), INTS),
    "softmax dtype": (lambda x: nbgrad.softmax(x, 1, dtype=nbgrad.float64), lambda x: np.exp(
        x.astype("f8")) / np.exp(x.astype("f8")).sum(1, keepdims=True), X.astype("f4")),
    "log_softmax dtype": (lambda x: x.log_softmax(0, dtype=nbgrad.float64), lambda x: x.astype(
        "f8") - np.log(np.exp(x.astype("f8")).sum(0)), X.astype("f4")),
    "softmax of ints": (lambda x: nbgrad.softmax(x, 0, dtype=nbgrad.float64),
                        lambda x: np.exp(x) / np.exp(x).sum(), INTS),
    "relu inplace": (lambda x: nbgrad.relu(x, inplace=True), lambda x: np.maximum(x, 0), X),
    "silu inplace": (lambda x: nbgrad.silu(x, inplace=False), lambda x: x / (1 + np.exp(-x)), X),
    "leaky_relu inplace": (lambda x: nbgrad.leaky_relu(x, 0.1, True),
                           lambda x: np.where(x > 0, x, 0.1 * x), X),
    "elu inplace": (lambda x: nbgrad.elu(x, 2.0, False),
                    lambda x: np.where(x > 0, x, 2 * np.expm1(x)), X),
    "dropout inplace": (lambda x: nbgrad.dropout(x, 0.0, True, True), lambda x: x, X),
    "std of a constant": (lambda x: x.std(1), lambda x: x.std(1, ddof=1), np.array([[3.0, 3, 3],
                                                                                   [1, 2, 4]])),
}


@pytest.mark.parametrize("name", CASES)
def test_value(name):
    f, formula, *arrays = CASES[name]
    before = [a.copy() for a in arrays]
    y, expected = f(*map(as_tensor, arrays)), np.asarray(formula(*arrays))
    np.testing.assert_allclose(y.data, expected, rtol=1e-6 if y.dtype == "f4" else 1e-12)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    for a, b in zip(arrays, before):
        np.testing.assert_array_equal(a, b)


TORCH = {                                        # the same expression for both
    "input= of ops": lambda F, x, a: F.mul(input=F.add(input=x, other=a, alpha=2), other=a),
    "input= of reductions": lambda F, x, a: F.sum(input=x, dim=1) + F.mean(input=a, dim=1)
    + F.std(input=x, dim=1) + F.logsumexp(input=a, dim=1) + F.norm(input=x, p=2, dim=1),
    "input= of shapes": lambda F, x, a: F.cat(tensors=[F.transpose(input=x, dim0=0, dim1=1),
                                                       F.flatten(input=a).reshape(4, 3)], dim=1),
    "tensor= of split": lambda F, x, a: F.split(tensor=x, split_size_or_sections=2, dim=1)[0],
    "where": lambda F, x, a: F.where(condition=x > 0, input=x, other=a),
    "input= of activations": lambda F, x, a: F.relu(input=x) + F.gelu(input=a) + F.clamp(
        input=x, min=-1) + F.softmax(input=a, dim=1),
    "mm": lambda F, x, a: F.mm(input=x, mat2=a.t()), "dot": lambda F, x, a: F.dot(x[0], a[1]),
    "bmm": lambda F, x, a: x.unsqueeze(0).bmm(a.t().unsqueeze(0)),
    "outer": lambda F, x, a: F.outer(x[0], a[:, 1]),
    "where method": lambda F, x, a: x.where(x > 0, a) * x,
    "masked_select": lambda F, x, a: F.masked_select(x, a > 0),
    "narrow select": lambda F, x, a: F.narrow(x, 1, 1, 2).sum(1) * F.select(a, 1, -1),
    "sort": lambda F, x, a: F.sort(x, dim=0, descending=True).values * a,
    "topk": lambda F, x, a: F.topk(x, 2, dim=1)[0] + a.topk(2, largest=False)[0],
    "rounded div": lambda F, x, a: x.div(a, rounding_mode="floor") * x + F.div(
        a, x, rounding_mode="trunc"),
    "round": lambda F, x, a: x.round(decimals=1) * a,
    "reductions as another dtype": lambda F, x, a: x.sum(1, dtype=F.float32) * x.mean(
        1, dtype=F.float32) + a.prod(1, dtype=F.float32),
    "softmax as another dtype": lambda F, x, a: F.softmax(
        x, dim=0, dtype=F.float32) * F.log_softmax(a, dim=1, dtype=F.float32),
    "axis": lambda F, x, a: x.sum(axis=1) + a.mean(axis=1) + x.prod(axis=1),
    "std of a constant": lambda F, x, a: (x * 0 + a[:, :1]).std(1) + x.std(1),
    "losses": lambda F, x, a: F.cross_entropy(input=x, target=a.argmax(1)) + F.mse_loss(
        input=x, target=a) + F.nll_loss(input=x, target=a.argmax(1)),
    "norms": lambda F, x, a: F.batch_norm(input=x, running_mean=None, running_var=None,
                                          training=True) + F.layer_norm(input=a,
                                                                        normalized_shape=(4,)),
    "in place": lambda F, x, a: (x * 1).exp_() + (a * 1).relu_() + (x * 2).masked_fill_(a > 0, 3.0)
    + (a * 3).sin_().square_() + (x * a).abs_().log_() * (x * 1).pow_(2)
    + (x.abs() + 0.1).pow_(a),
    "written over": lambda F, x, a: (x * 2).fill_(1.0) * a,
}


@pytest.mark.parametrize("name", TORCH)
def test_value_and_gradient_as_in_pytorch(name):
    torch = pytest.importorskip("torch")

    class Torch:
        def __getattr__(self, key):
            home = torch if hasattr(torch, key) else torch.nn.functional
            return getattr(torch.nn.functional, key, None) or getattr(home, key)

    def run(F, make):
        x, a = (make(v).requires_grad_() for v in (X, A))
        y = TORCH[name](F, x, a)
        w = np.cos(np.arange(y.numel()).reshape(y.shape)).astype(y.detach().numpy().dtype)
        (y * make(w)).sum().backward()
        return y.detach().numpy(), [None if t.grad is None else t.grad.numpy() for t in (x, a)]

    (y, grads), (expected, slopes) = run(nbgrad, tensor), run(Torch(), torch.tensor)
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if y.dtype == "f4" else {"rtol": 1e-10, "atol": 1e-12}
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(y, expected, **tolerance)
    for got, slope in zip(grads, slopes):
        zero = np.zeros(X.shape)
        np.testing.assert_allclose(zero if got is None else got, zero if slope is None else slope,
                                   **tolerance)


# ----------------------------------------------------------------------------------- std's gradient

def test_gradient_of_std_is_zero_where_nothing_varies_and_exact_elsewhere():
    x = tensor(np.array([[2.0, 2, 2, 2], X[0]]), requires_grad=True)
    (dx,) = grad(x.std(1).sum(), x, create_graph=True)
    centred = X[0] - X[0].mean()
    np.testing.assert_allclose(dx.data, [[0] * 4, centred / (3 * X[0].std(ddof=1))], rtol=1e-12)
    (ddx,) = grad((dx * tensor(A[:2])).sum(), x)
    np.testing.assert_array_equal(ddx.data[0], 0)
    s, a = X[0].std(ddof=1), A[1]
    np.testing.assert_allclose(ddx.data[1], (a - a.mean()) / (3 * s)
                               - centred * (centred @ a) / (9 * s**3), rtol=1e-10)
    constant = tensor([3.0] * 5, requires_grad=True)
    constant.std(correction=0).backward()
    assert constant.grad.tolist() == [0] * 5


def test_std_next_to_a_constant_row_to_second_order():
    const = np.zeros((2, 1)) + np.array([[1.0], [0]])
    gradcheck(lambda x: (x * tensor(const) + tensor(1 - const) * 3).std(1).sum(),
              (as_tensor(A[:2].copy()).requires_grad_(),), order=2)


# ------------------------------------------------------------------------------------------ windows

def test_an_image_without_a_batch_dim_gives_what_a_batch_of_one_gives():
    x, w, b = (tensor(RNG.standard_normal(s)) for s in ((2, 6, 5), (3, 2, 3, 3), (3,)))
    for f in (lambda x: nbgrad.conv2d(input=x, weight=w, bias=b, padding="same"),
              lambda x: nbgrad.max_pool2d(input=x, kernel_size=2),
              lambda x: nbgrad.max_pool2d(x, 2, return_indices=True)[1],
              lambda x: nbgrad.avg_pool2d(input=x, kernel_size=2, padding=1),
              lambda x: nbgrad.adaptive_avg_pool2d(input=x, output_size=(2, None))):
        one, batch = f(x), f(x.unsqueeze(0))
        assert (1, *one.shape) == batch.shape
        np.testing.assert_array_equal(one.data, batch.data[0])
    centre = (slice(None), slice(1, 4), slice(1, 4))
    y = nbgrad.conv2d(x, w, b)
    np.testing.assert_allclose(y.data[:, 1, 1], np.einsum("cij,ocij->o", x.data[centre], w.data)
                               + b.data, rtol=1e-12)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    gradcheck(lambda x, w, b: nbgrad.avg_pool2d(nbgrad.conv2d(x, w, b), 2), leaves)


def test_windows_of_one_image_as_in_pytorch():
    torch = pytest.importorskip("torch")
    x, w = RNG.standard_normal((2, 6, 5)), RNG.standard_normal((3, 2, 3, 3))
    for f in (lambda F, x, w: F.conv2d(x, w, stride=np.int64(2) if F is nbgrad else 2),
              lambda F, x, w: F.max_pool2d(x, 2, return_indices=True)[1],
              lambda F, x, w: F.avg_pool2d(x, 2), lambda F, x, w: F.adaptive_avg_pool2d(x, 1)):
        y, expected = (f(F, make(x), make(w)) for F, make in (
            (nbgrad, tensor), (torch.nn.functional, torch.tensor)))
        np.testing.assert_allclose(y.data, expected.numpy(), rtol=1e-12)
        assert y.shape == tuple(expected.shape)


# -------------------------------------------------------------------------------- made and compared

def test_new_tensors_of_a_tensors_dtype():
    x = tensor(X)
    for y, expected in ((x.new_zeros(2, 3), np.zeros((2, 3))), (x.new_ones((2,)), np.ones(2)),
                        (x.new_full((2, 2), 3), np.full((2, 2), 3.0)),
                        (x.new_zeros(2, dtype=nbgrad.int64), np.zeros(2, int))):
        np.testing.assert_array_equal(y.data, expected)
        assert y.dtype == expected.dtype
    assert x.new_empty(3).shape == (3,)
    assert x.new_ones(2, requires_grad=True).requires_grad


def test_random_tensors_like_another():
    x = tensor(X)
    for like, plain in ((nbgrad.rand_like, nbgrad.rand), (nbgrad.randn_like, nbgrad.randn)):
        y = like(x, generator=nbgrad.Generator(1))
        expected = plain(3, 4, dtype=nbgrad.float64, generator=nbgrad.Generator(1))
        np.testing.assert_array_equal(y.data, expected.data)
        assert like(x, dtype=nbgrad.float32).dtype == np.float32


def test_randint_of_high_and_size():
    y = nbgrad.randint(3, (200,), generator=nbgrad.Generator(0))
    assert sorted(set(y.tolist())) == [0, 1, 2]
    named = nbgrad.randint(high=3, size=(200,), generator=nbgrad.Generator(0))
    assert named.tolist() == y.tolist()
    assert set(nbgrad.randint(2, 4, (50,)).tolist()) == {2, 3}


def test_from_numpy_shares_memory_and_is_tensor_knows_tensors():
    a = X.copy()
    t = nbgrad.from_numpy(a)
    a[0, 0] = 7
    assert t[0, 0].item() == 7
    assert nbgrad.is_tensor(t)
    assert not nbgrad.is_tensor(a)


def test_equal_and_allclose():
    x = tensor([1.0, np.nan, 2.0])
    assert x[::2].equal(tensor([1.0, 2.0]))
    assert not nbgrad.equal(x, x)                            # NaN equals nothing
    assert not nbgrad.equal(nbgrad.zeros(2), nbgrad.zeros(2, 1))
    assert not nbgrad.allclose(x, x)
    assert x.allclose(x, equal_nan=True)
    assert nbgrad.allclose(tensor([1.0]), tensor([1.0 + 1e-6]))
    assert not nbgrad.allclose(tensor([1.0]), tensor([1.01]))
    assert nbgrad.allclose(tensor([1.0]), tensor([1.01]), rtol=0.1)


# ----------------------------------------------------------------------------------------- in place

@pytest.mark.parametrize("name", ["abs", "ceil", "cos", "exp", "expm1", "floor", "log", "log1p",
                                  "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sin",
                                  "sqrt", "square", "tanh", "trunc"])
def test_in_place_ops_write_what_the_op_returns(name):
    x = tensor(np.abs(X) + 0.1)
    memory, expected = x.data, getattr(nbgrad, name)(x).data.copy()
    assert getattr(x, name + "_")() is x
    assert x.data is memory
    np.testing.assert_array_equal(memory, expected)
    leaf = tensor(X, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        getattr(leaf, name + "_")()


def test_masked_fill_and_pow_in_place():
    x = tensor(X)
    x.masked_fill_(x > 0, -1.0).pow_(2)
    np.testing.assert_array_equal(x.data, np.where(X > 0, -1, X)**2)


def test_random_numbers_in_place():
    x = nbgrad.zeros(4000).double()
    memory = x.data
    assert x.normal_(3, 0.5, generator=nbgrad.Generator(0)) is x
    expected = nbgrad.normal(3, 0.5, (4000,), nbgrad.Generator(0), nbgrad.float64).data
    np.testing.assert_array_equal(memory, expected)
    assert abs(memory.mean() - 3) < 0.03
    x.uniform_(-2, -1, generator=nbgrad.Generator(0))
    assert -2 <= memory.min() < -1.99
    assert -1.01 < memory.max() < -1
    a = tensor([1.0, 2.0], requires_grad=True)
    assert not (a * 2).normal_().requires_grad              # nothing of a is left
    saved = (a * 2)
    y = saved * saved
    saved.uniform_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
