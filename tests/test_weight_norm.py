"""Normalized weights: what they are, their derivatives, that PyTorch computes the same and reads
the same state, and the modules that parametrization makes."""

import copy

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference

import nbgrad
from nbgrad import nn, ops, optim
from nbgrad.backend import half_dtype
from nbgrad.nn.utils import parametrize
from nbgrad.nn.utils.parametrizations import spectral_norm, weight_norm, weight_standardization
from nbgrad.testing import gradcheck

rng = np.random.default_rng(8)
NORMS = {"weight": weight_norm, "spectral": spectral_norm, "standardized": weight_standardization}
every = pytest.mark.parametrize("name", sorted(NORMS))


def tensor(*shape):
    return nbgrad.tensor(rng.standard_normal(shape), requires_grad=True)


def conv(dtype=np.float64):
    return nn.Conv2d(4, 6, 3, dtype=dtype)


# ----------------------------------------------------------------------------- values, derivatives

@pytest.mark.parametrize(("dim", "axes", "shape"), [
    (0, (1, 2), (3, 1, 1)), (1, (0, 2), (1, 2, 1)), (-2, (0, 2), (1, 2, 1)), (None, (0, 1, 2), ()),
    (-1, (0, 1, 2), ())])
def test_weight_norm_is_its_formula(dim, axes, shape):
    v, g = tensor(3, 2, 4), tensor(*shape)
    want = g.data * v.data / np.sqrt((v.data ** 2).sum(axes, keepdims=True))
    np.testing.assert_allclose(ops.weight_norm(v, g, dim).data, want, rtol=1e-14)
    gradcheck(lambda v, g: ops.weight_norm(v, g, dim), (v, g))
    gradcheck(lambda v, g: ops.weight_norm(v, g, dim), (v, g), order=3, mode="fast")


def test_weight_norm_of_a_vector_has_a_length_per_element():
    v, g = nbgrad.tensor([3.0, -4.0], requires_grad=True), nbgrad.tensor([2.0, 2.0])
    assert ops.weight_norm(v, g, 0).tolist() == [2.0, -2.0]
    layer = nn.Linear(3, 2)
    before = layer.bias.data.copy()
    np.testing.assert_allclose(weight_norm(layer, "bias").bias.data, before, rtol=1e-6)
    gradcheck(lambda v, g: ops.weight_norm(v, g, 0), (tensor(3), tensor(3)), allow_zero=True)


@pytest.mark.parametrize(("dtype", "scale"), [
    *((np.float32, s) for s in (1e-38, 1e-25, 1e25, 1e38)),
    *((np.float64, s) for s in (1e-307, 1e-160, 1e-156, 1e155, 1e307))])
def test_weights_whose_squares_leave_the_range(dtype, scale):
    """Squares of 1e-160 are no zeros, but have few digits."""
    v = rng.uniform(0.5, 3, (4, 5)).astype(dtype)
    w = ops.weight_norm(nbgrad.tensor(v * dtype(scale)), nbgrad.ones(4, 1, dtype=dtype)).data
    np.testing.assert_allclose(w, v / np.linalg.norm(v, axis=1, keepdims=True),
                               rtol=1e-6 if dtype == np.float32 else 1e-14)


def test_a_weight_of_zeros_has_no_direction():
    v, g = nbgrad.tensor(np.zeros((2, 3)), requires_grad=True), tensor(2, 1)
    w = ops.weight_norm(v, g)
    np.testing.assert_array_equal(w.data, 0)
    np.testing.assert_array_equal(nbgrad.grad(w.sum(), v)[0].data,
                                  np.broadcast_to(g.data, (2, 3)))
    layer = spectral_norm(nn.Linear(3, 2))
    layer.parametrizations.weight.original.data[:] = 0
    np.testing.assert_array_equal(layer.weight.data, 0)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_spectral_norm_of_halves(name):
    dtype = half_dtype(name)
    layer = spectral_norm(nn.Linear(6, 5, dtype=dtype), n_power_iterations=20)
    w = layer.weight
    assert w.dtype == dtype
    # σ is 1 up to what rounding each of 30 values to 2⁻¹¹ or 2⁻⁸ of it may change
    largest = np.linalg.norm(w.data.astype(np.float64), 2)
    assert abs(largest - 1) < {"float16": 4e-3, "bfloat16": 3e-2}[name]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("offset", [0, 1e4])
def test_weight_standardization_is_its_formula(dim, offset):
    w = tensor(3, 4, 2)
    w.data += offset
    w.data[1], w.data[:, 1], w.data[..., 1] = 0.5, 0.5, 0.5         # one channel is constant
    axes = tuple(i for i in range(3) if i != dim % 3)
    want = (w.data - w.data.mean(axes, keepdims=True)) / np.sqrt(
        w.data.var(axes, keepdims=True) + 1e-2)
    found = ops.weight_standardization(w, 1e-2, dim)
    np.testing.assert_allclose(found.data, want, rtol=1e-7, atol=1e-9)
    gradcheck(lambda w: ops.weight_standardization(w, 1e-2, dim), w)
    gradcheck(lambda w: ops.weight_standardization(w, 1e-2, dim), w, order=3, mode="fast")


@pytest.mark.parametrize("dim", [0, 1])
def test_spectral_norm_divides_by_the_largest_singular_value(dim):
    layer = spectral_norm(conv(), n_power_iterations=300, dim=dim)
    v = layer.parametrizations.weight.original.data
    sigma = np.linalg.svd(np.moveaxis(v, dim, 0).reshape(v.shape[dim], -1), compute_uv=False)[0]
    np.testing.assert_allclose(layer.weight.data, v / sigma, rtol=1e-9)


def test_spectral_norm_iterates_in_training_only():
    layer = spectral_norm(nn.Linear(6, 5))
    entry = layer.parametrizations.weight
    entry.original.data[...] = rng.standard_normal((5, 6))
    u, v, w = (t.data.astype(np.float64) for t in (*entry.buffers(), entry.original))
    layer.eval()
    before = layer.weight.data
    np.testing.assert_array_equal(layer.weight.data, before)
    sigma = u @ w @ v                              # of terms that cancel: u and v are another w's
    np.testing.assert_allclose(before, w / sigma, rtol=1e-6 * (1 + np.linalg.norm(w) / abs(sigma)))
    layer.train()
    u = w @ v / np.linalg.norm(w @ v)
    v = w.T @ u / np.linalg.norm(w.T @ u)
    np.testing.assert_allclose(layer.weight.data, w / (u @ w @ v), rtol=1e-5)
    for have, want in zip(entry.buffers(), (u, v)):
        np.testing.assert_allclose(have.data, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@every
def test_derivatives_of_a_layer(name, training):
    """Of the output by input and originals. Spectral norm's gradient is that of constant singular
    vectors: exact where they have converged to first order, in evaluation to every."""
    layer = NORMS[name](nn.Linear(4, 3, dtype=np.float64))
    if name == "spectral" and training:
        spectral = dict(layer.parametrizations.weight.named_children())["0"]
        spectral.n_power_iterations = 500
        gradcheck(layer, tensor(2, 4), nondet_tol=1e-12)
        return
    layer.train(training)
    gradcheck(layer, tensor(2, 4))
    gradcheck(layer, tensor(2, 4), order=3, mode="fast")


@every
def test_scale_before_batch_norm_makes_no_difference(name):
    """⟨v, ∂L/∂v⟩ = 0 for a normalized weight, and for any weight before batch norm without eps."""
    layer = NORMS[name](nn.Linear(6, 4, dtype=np.float64), **(
        {"eps": 0.0} if name == "standardized" else {}))
    v = list(layer.parametrizations.weight.parameters())[-1]
    layer.eval()
    layer(tensor(5, 6)).backward(rng.standard_normal((5, 4)))
    inner = (v.data * v.grad.data).sum()
    assert abs(inner) < 1e-12 * np.linalg.norm(v.data) * np.linalg.norm(v.grad.data)


@pytest.mark.parametrize("norm", [
    lambda: nn.LpBatchNorm(4, p=1, eps=1e-30, dtype=np.float64),
    lambda: nn.DecorrelatedBatchNorm(4, group_size=2, eps=0.0, dtype=np.float64),
    lambda: nn.BatchNorm1d(4, eps=1e-30, dtype=np.float64)])
def test_a_weight_before_a_norm_of_the_batch_is_scale_invariant(norm):
    layer, x, dy = nn.Linear(6, 4, dtype=np.float64), tensor(9, 6), rng.standard_normal((9, 4))
    norm()(layer(x)).backward(dy)
    w, bias = layer.weight, layer.bias
    size = np.linalg.norm(w.data) * np.linalg.norm(w.grad.data)
    assert abs((w.data * w.grad.data).sum()) < 1e-11 * size
    assert np.abs(bias.grad.data).max() < 1e-11 * np.abs(w.grad.data).max()


# ------------------------------------------------------------------------------------------ PyTorch

@pytest.mark.parametrize("settings", [{}, {"dim": 1}, {"dim": None}, {"name": "bias", "dim": None}])
@pytest.mark.parametrize("name", ["weight", "spectral"])
def test_pytorch_computes_the_same_and_reads_the_same_state(name, settings):
    torch = pytest.importorskip("torch")
    if name == "spectral" and settings.get("name"):
        settings = {"name": "bias"}
    theirs = getattr(torch.nn.utils.parametrizations, f"{name}_norm")(
        torch.nn.Conv2d(4, 6, 3), **settings)
    ours = NORMS[name](nn.Conv2d(4, 6, 3), **settings)
    state = {key: t.detach().numpy() for key, t in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape
                                                                 for k, v in state.items()}
    ours.load_state_dict(state)
    x, dy = rng.standard_normal((2, 4, 5, 5)), rng.standard_normal((2, 6, 3, 3))
    for _ in range(3):
        for p in (*theirs.parameters(), *ours.parameters()):
            p.grad = None
        y = theirs(torch.tensor(x, dtype=torch.float32))
        y.backward(torch.tensor(dy, dtype=torch.float32))
        mine = ours(nbgrad.tensor(x.astype(np.float32)))
        mine.backward(dy.astype(np.float32))
        np.testing.assert_allclose(mine.data, y.detach().numpy(), rtol=2e-5, atol=2e-5)
        grads = dict(theirs.named_parameters())
        for key, p in ours.named_parameters():
            np.testing.assert_allclose(p.grad.data, grads[key].grad.numpy(), rtol=1e-4, atol=1e-4)
    back = {key: torch.tensor(t.data) for key, t in ours.state_dict().items()}
    assert str(theirs.load_state_dict(back)) == "<All keys matched successfully>"
    theirs.eval(), ours.eval()
    y = theirs(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(ours(nbgrad.tensor(x.astype(np.float32))).data, y, rtol=2e-5,
                               atol=2e-5)


def test_pytorch_prints_the_same():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    assert repr(weight_norm(nn.Linear(3, 2))) == repr(theirs)


# ---------------------------------------------------------------------------------- parametrization

@every
def test_adding_and_removing(name):
    layer = conv(np.float32)
    before, bias = layer.weight.data.copy(), layer.bias
    x = nbgrad.randn(2, 4, 5, 5)
    assert NORMS[name](layer) is layer
    assert isinstance(layer, nn.Conv2d)
    assert parametrize.is_parametrized(layer)
    assert parametrize.is_parametrized(layer, "weight")
    assert not parametrize.is_parametrized(layer, "bias")
    if name == "weight":
        np.testing.assert_allclose(layer.weight.data, before, rtol=1e-6)
    layer.eval()
    y = layer(x).data
    twin = copy.deepcopy(layer)
    assert parametrize.remove_parametrizations(layer, "weight") is layer
    assert type(layer) is nn.Conv2d
    assert not parametrize.is_parametrized(layer)
    assert layer.bias is bias
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert isinstance(layer.weight, nn.Parameter)
    np.testing.assert_array_equal(layer(x).data, y)
    np.testing.assert_array_equal(twin(x).data, y)           # a copy keeps its own
    assert parametrize.is_parametrized(twin, "weight")


@every
def test_state_round_trip_and_dtype(name):
    layer, other, x = NORMS[name](conv()), NORMS[name](conv()), tensor(2, 4, 5, 5)
    layer(x)
    other.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(other.eval()(x).data, layer.eval()(x).data)
    single = layer.float()
    assert {t.dtype for t in single.state_dict().values()} == {np.dtype(np.float32)}
    assert single.weight.dtype == np.float32


@every
def test_training_moves_the_originals(name):
    nbgrad.manual_seed(2)
    layer = nn.Linear(6, 3)
    weight = layer.weight
    model = nn.Sequential(NORMS[name](layer), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    if name != "weight":                         # the same parameter, which an optimizer may hold
        assert layer.parametrizations.weight.original is weight
    x, t = nbgrad.randn(40, 6), nbgrad.randn(40, 1)
    optimizer, losses = optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_assigning_a_weight_sets_its_originals():
    layer, w = weight_norm(nn.Linear(3, 2)), rng.standard_normal((2, 3)).astype(np.float32)
    layer.weight = nn.Parameter(w)
    np.testing.assert_allclose(layer.weight.data, w, rtol=1e-6)
    np.testing.assert_allclose(layer.parametrizations.weight.original0.data[:, 0],
                               np.linalg.norm(w, axis=1), rtol=1e-6)
    assert sorted(dict(layer.named_parameters())) == [
        "bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]
    with pytest.raises(ValueError, match="original is of shape"):
        layer.weight = nbgrad.zeros(5, 3)
    with pytest.raises(NotImplementedError, match="no right_inverse"):
        weight_standardization(nn.Linear(3, 2)).weight = nn.Parameter(w)


def test_one_after_the_other_and_two_of_one_module():
    layer = weight_standardization(nn.Linear(8, 4, dtype=np.float64))
    standardized = layer.weight.data
    spectral_norm(layer, n_power_iterations=200)
    weight_norm(layer, "bias", dim=None)
    np.testing.assert_allclose(layer.weight.data, standardized / np.linalg.norm(standardized, 2),
                               rtol=1e-7)
    assert list(layer.state_dict()) == [
        "parametrizations.weight.original", "parametrizations.weight.1._u",
        "parametrizations.weight.1._v", "parametrizations.bias.original0",
        "parametrizations.bias.original1"]
    bias = layer.bias.data
    parametrize.remove_parametrizations(layer, "weight")
    assert parametrize.is_parametrized(layer, "bias")
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear
    np.testing.assert_array_equal(layer.bias.data, bias)


def test_leaving_the_original():
    layer = conv()
    before = layer.weight.data.copy()
    weight_standardization(layer)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    np.testing.assert_array_equal(layer.weight.data, before)
    weight_norm(layer)
    with pytest.raises(ValueError, match="several tensors"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def test_a_buffer_can_be_parametrized():
    class Double(nn.Module):
        def forward(self, x):
            return x * 2
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "running_var", Double())
    np.testing.assert_array_equal(layer.running_var.data, 2)
    parametrize.remove_parametrizations(layer, "running_var")
    assert "running_var" in dict(layer.named_buffers())
    np.testing.assert_array_equal(layer.running_var.data, 2)


@pytest.mark.parametrize("first", [weight_norm, spectral_norm])
def test_what_is_of_two_tensors_can_only_come_first(first):
    layer = first(nn.Linear(3, 2))
    keys = list(layer.state_dict())
    with pytest.raises(ValueError, match="_WeightNorm is of 2 tensors, and can only be the first"):
        weight_norm(layer)
    assert list(layer.state_dict()) == keys
    assert layer.weight.shape == (2, 3)                # it is still computed


class Wider(nn.Module):
    def forward(self, x):
        return ops.cat([x, x])


@pytest.mark.parametrize(("change", "error", "said"), [
    (lambda m: weight_norm(m, "wait"), ValueError, "no parameter or buffer 'wait'"),
    (lambda m: weight_norm(m, dim=2), IndexError, "out of range"),
    (lambda m: spectral_norm(m, dim=2), IndexError, "out of range"),
    (lambda m: spectral_norm(m, n_power_iterations=0), ValueError, "to be positive"),
    (lambda m: spectral_norm(m, eps=-1.0), ValueError, "spectral_norm: eps must not be negative"),
    (lambda m: weight_standardization(m, "bias"), ValueError, "more than 1 weight per output"),
    (lambda m: weight_standardization(m, eps=-1.0), ValueError, "eps must not be negative"),
    (lambda m: parametrize.register_parametrization(m, "weight", Wider()), ValueError,
     "must return float32 of shape"),
    (lambda m: parametrize.register_parametrization(m, "weight", abs), TypeError, "nn.Module"),
    (lambda m: parametrize.register_parametrization(m, "in_features", nn.ReLU()), ValueError,
     "no parameter or buffer"),
    (lambda m: parametrize.remove_parametrizations(m, "weight"), ValueError, "not parametrized"),
    (lambda m: ops.weight_norm(m.weight, nbgrad.ones(3)), ValueError, "expected g of shape"),
])
def test_bad_arguments_change_nothing(change, error, said):
    layer = nn.Linear(3, 2)
    before = {key: t.data.copy() for key, t in layer.state_dict().items()}
    with pytest.raises(error, match=said):
        change(layer)
    assert type(layer) is nn.Linear
    for key, t in layer.state_dict().items():
        np.testing.assert_array_equal(t.data, before[key])


def test_a_value_that_does_not_fit_changes_no_original():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    before = [p.data.copy() for p in layer.parameters()]
    with pytest.raises(ValueError, match="of shape"):
        layer.weight = nbgrad.ones(2, 5)
    for p, old in zip(layer.parameters(), before):
        np.testing.assert_array_equal(p.data, old)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 70), (200, 300), (1, 1), (0, 3), (3, 0)])
def test_a_matrix_and_an_outer_product(shape, dtype):
    x, u, v = (rng.standard_normal(n).astype(dtype) for n in (shape, shape[0], shape[1]))
    for a in (x, np.asfortranarray(x)):
        found, want = (k.add_outer(a, u, v, a=0.3, b=-2.0) for k in (cpu, reference))
        assert found.dtype == dtype
        tol = 4 * np.finfo(dtype).eps                        # of numbers up to 10 that cancel
        np.testing.assert_allclose(found, want, rtol=tol, atol=10 * tol)


@pytest.mark.parametrize("dim", [0, 1, 3, None])
def test_weight_norm_keeps_the_memory_format(dim):
    v = nbgrad.tensor(rng.standard_normal((4, 3, 2, 2)))
    last = v.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    axes = tuple(i for i in range(4) if i != dim)
    g = nbgrad.tensor(np.linalg.norm(v.data.reshape(-1)) if dim is None else np.sqrt(
        (v.data ** 2).sum(axes, keepdims=True)))
    for t in (v, last):
        w = ops.weight_norm(t, g, dim)
        np.testing.assert_allclose(w.data, v.data, rtol=1e-14)
        assert w.data.strides == t.data.strides
