"""Lazy layers: what PyTorch's do, and a state dict that says the sizes."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, optim

LAYERS = [(lambda lib: lib.LazyBatchNorm1d(), (4, 3)),
          (lambda lib: lib.LazyBatchNorm1d(), (4, 3, 5)),
          (lambda lib: lib.LazyBatchNorm2d(1e-3, 0.2), (4, 3, 2, 2)),
          (lambda lib: lib.LazyBatchNorm3d(affine=False), (4, 3, 2, 2, 1)),
          (lambda lib: lib.LazyBatchNorm1d(track_running_stats=False), (4, 3)),
          (lambda lib: lib.LazyInstanceNorm1d(affine=True), (4, 3, 5)),
          (lambda lib: lib.LazyInstanceNorm2d(track_running_stats=True), (4, 3, 5, 2)),
          (lambda lib: lib.LazyInstanceNorm2d(affine=False), (4, 3, 5, 2)),
          (lambda lib: lib.LazyInstanceNorm3d(), (4, 3, 5, 2, 1)),
          (lambda lib: lib.LazyLinear(2), (4, 3)),
          (lambda lib: lib.LazyLinear(2, bias=False), (4, 3)),
          (lambda lib: lib.LazyConv2d(6, 3, padding=1, groups=3), (2, 3, 4, 4)),
          (lambda lib: lib.LazyConv1d(6, 3, padding=1, groups=3), (2, 3, 4)),
          (lambda lib: lib.LazyConvTranspose2d(6, 3, 2, groups=3), (2, 3, 4, 4)),
          (lambda lib: lib.LazyConvTranspose1d(2, 3, bias=False), (2, 3, 4))]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_first_batch_makes_the_layer_that_pytorch_makes(make, shape):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    own, other = make(nn), make(torch.nn)
    own(nbgrad.as_tensor(x))
    other(torch.tensor(x))
    assert type(own).__name__ == type(other).__name__
    assert type(own) in vars(nn).values()
    assert not type(own).__name__.startswith("Lazy")
    state, theirs = own.state_dict(), other.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
    for key in state:
        if "running" in key or "num" in key:
            np.testing.assert_allclose(state[key].numpy(), theirs[key].numpy(), rtol=1e-5,
                                       atol=1e-6)
    own.load_state_dict({k: v.numpy() for k, v in theirs.items()})
    y = own.eval()(nbgrad.as_tensor(x))
    np.testing.assert_allclose(y.detach().numpy(), other.eval()(torch.tensor(x)).detach().numpy(),
                               rtol=1e-4, atol=1e-5)      # sums of at most 27 products of O(1)


def test_instance_norm_of_one_sample():
    """PyTorch takes the height for the channels here."""
    layer = nn.LazyInstanceNorm2d()
    assert layer(nbgrad.randn(3, 5, 2)).shape == (3, 5, 2)
    assert layer.num_features == 3
    layer = nn.LazyInstanceNorm1d(affine=False, track_running_stats=False)
    assert layer(nbgrad.randn(2, 3, 5)).shape == (2, 3, 5)      # without a warning
    assert (type(layer), layer.num_features) == (nn.InstanceNorm1d, 3)


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))


def test_optimizer_built_before_the_first_batch_trains_the_parameters():
    nbgrad.manual_seed(0)
    model, x = lazy(), nbgrad.randn(8, 5)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()                                       # nothing has a gradient
    before = [*model.parameters()]
    model(x).sum().backward()
    assert all(a is b for a, b in zip(before, model.parameters()))
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, w in zip(model.parameters(), weights):
        np.testing.assert_allclose(p.detach().numpy(),
                                   w.numpy() - 0.1 * p.grad.numpy(), rtol=1e-6, atol=1e-7)


def test_same_values_as_the_layers_of_that_size():
    nbgrad.manual_seed(3)
    model = lazy()
    y = model(nbgrad.ones(4, 5))
    nbgrad.manual_seed(3)
    other = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    assert repr(model) == repr(other)
    assert y.tolist() == other(nbgrad.ones(4, 5)).tolist()


def test_what_works_before_the_first_batch():
    model = lazy().double().requires_grad_(False).train()
    copied = copy.deepcopy(model)
    model.zero_grad()
    assert model[1].has_uninitialized_params()
    assert "LazyBatchNorm1d(0, eps=1e-05" in repr(model)
    for m in (model, copied):
        m(nbgrad.randn(4, 5, dtype=np.float64))
        assert {p.dtype for p in m.parameters()} == {np.dtype(np.float64)}
        assert not any(p.requires_grad for p in m.parameters())
    assert model[0].weight is not copied[0].weight


@pytest.mark.parametrize("use", [
    lambda m: m[1].weight.shape, lambda m: m[0].weight + 1, lambda m: nn.fuse(m.eval()),
    lambda m: m[1].running_mean.tolist(),
    lambda m: nn.init.ones_(m[1].weight)])
def test_what_needs_data_says_what_to_do(use):
    with pytest.raises(RuntimeError, match="run a batch through the model, or load a state dict"):
        use(lazy())


def test_refused_batches_change_nothing():
    layer = nn.LazyBatchNorm2d()
    for x, error in ((nbgrad.ones(4, 3), ValueError), (np.ones((1, 2, 3, 4)), TypeError)):
        with pytest.raises(error):
            layer(x)
        assert layer.has_uninitialized_params()
    for bad in ({"momentum": "a", "average": 3}, {"eps": -1}):
        with pytest.raises(ValueError, match="BatchNorm1d"):
            nn.LazyBatchNorm1d(**bad)
    assert layer(nbgrad.randn(4, 3, 2, 2)).shape == (4, 3, 2, 2)


def test_a_state_dict_says_the_sizes():
    trained = lazy()
    trained(nbgrad.randn(6, 5))
    model = lazy()
    parameters = [*model.parameters()]
    assert model.load_state_dict(trained.state_dict()) == ([], [])
    assert repr(model) == repr(trained)
    assert all(a is b for a, b in zip(parameters, model.parameters()))
    for key, value in trained.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[key].numpy(), value.numpy())


def test_state_dicts_that_do_not_fit_change_nothing():
    trained = lazy()
    trained(nbgrad.randn(6, 5))
    state = trained.state_dict()
    wrong = {**state, "1.running_mean": nbgrad.ones(7)}
    model = lazy()
    with pytest.raises(RuntimeError, match=r"size mismatch for 1\.running_mean"):
        model.load_state_dict(wrong)
    assert model[0].has_uninitialized_params()
    with pytest.raises(RuntimeError, match="nothing says how large it is"):
        trained.load_state_dict(lazy().state_dict())
    with pytest.raises(RuntimeError, match=r'"0\.bias" of the model belongs to a lazy layer'):
        model.load_state_dict({"0.bias": nbgrad.ones(4)}, strict=False)
    assert model.load_state_dict(lazy().state_dict()) == ([], [])
    assert model[0].has_uninitialized_params()
    model(nbgrad.randn(6, 3))
    assert model[0].in_features == 3


def test_hooks_and_settings_stay():
    layer, seen = nn.LazyBatchNorm1d(), []
    layer.register_forward_hook(lambda m, args, y: seen.append(type(m).__name__))
    layer.momentum, layer.statistics = 0.5, "prediction"
    layer(nbgrad.randn(4, 3))
    assert seen == ["BatchNorm1d"]
    assert (layer.momentum, layer.statistics) == (0.5, "prediction")
