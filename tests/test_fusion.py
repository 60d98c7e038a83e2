"""Modules side by side run as one op, and batch norm folds into weights: the same values."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import nn
from nbgrad.autograd import OPS
from nbgrad.testing import gradcheck


def names_of(y):
    """Ops of the recorded graph."""
    found, stack = [], [y.grad_fn]
    while stack:
        node = stack.pop()
        if hasattr(node, "edges"):
            found.append(node.name)
            stack += [e for e in node.edges if e is not None]
    return sorted(n for n in found)


def apart(model):
    """The same model with a hook that does nothing on every module: called one by one."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, y: None)
    return model


def values_of(model, x):
    return model(x).detach().numpy()


def trained(model, x, t, steps=3):
    optimizer = nbgrad.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh, None])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_takes_the_norm_and_the_activation(activation, bias):
    nbgrad.manual_seed(0)
    parts = [nn.Linear(7, 5, bias=bias), nn.BatchNorm1d(5)] + ([activation()] if activation else [])
    model = nn.Sequential(*parts, nn.Linear(5, 3))
    other = apart(model)
    x, t = nbgrad.randn(13, 7), nbgrad.randint(0, 3, (13,))
    assert names_of(model(x)) == ["linear", "linear_batch_norm"]
    assert "batch_norm" in names_of(other(x))
    (losses, state), (want_losses, want) = trained(model, x, t), trained(other, x, t)
    assert losses == want_losses                              # the same kernels in the same order
    for name, value in state.items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_a_batch_norm_takes_the_relu():
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                          nn.Linear(4 * 16, 3))
    other = apart(model)
    x, t = nbgrad.randn(9, 3, 6, 6), nbgrad.randint(0, 3, (9,))
    assert "relu" not in names_of(model(x))
    assert "relu" in names_of(other(x))
    (losses, state), (want_losses, want) = trained(model, x, t), trained(other, x, t)
    # the sums of the backward pass are the same numbers added in another order
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for name, value in state.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_hooks_and_other_forwards_are_honoured():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    x = nbgrad.randn(6, 4)
    seen = []
    handle = model[1].register_forward_hook(
        lambda module, args, y: seen.append(y.detach().numpy().min()))
    model(x)
    assert seen[0] < 0                                        # the norm's own output, before ReLU
    handle.remove()
    model[2].forward = lambda x: x * 0 + 7
    assert (values_of(model, x) == 7).all()


@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"affine": False},
                                      {"track_running_stats": False}])
def test_settings_of_the_norm_hold_in_the_fused_op(settings):
    nbgrad.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, **settings), nn.Tanh())
    other, x = apart(model), nbgrad.randn(6, 4)
    for training in (True, True, False):
        model.train(training)
        other.train(training)
        np.testing.assert_array_equal(values_of(model, x), values_of(other, x))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), other.state_dict()[name].numpy())


def test_bad_input_raises_as_the_parts_do():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    other = apart(model)
    for x in (nbgrad.randn(6, 5), nbgrad.randn(1, 4), nbgrad.randn(6, 4).double()):
        with pytest.raises((ValueError, RuntimeError)) as ours:
            model(x)
        with pytest.raises((ValueError, RuntimeError)) as want:
            other(x)
        assert str(ours.value) == str(want.value)
        assert model[1].num_batches_tracked.item() == 0
    with pytest.raises(ValueError, match="activation"):
        nbgrad.linear_batch_norm(nbgrad.randn(6, 4), nbgrad.randn(3, 4), None, None, None,
                                 activation="gelu")


def test_higher_orders():
    rng = np.random.default_rng(0)
    bias, *tensors = [nbgrad.tensor(rng.standard_normal(s), requires_grad=s != (1, 2))
                      for s in ((1, 2), (5, 3), (2, 3), (2,), (2,))]
    for act in ("sigmoid", "tanh", None):          # the bias has no gradient: the norm takes it out
        gradcheck(lambda x, w, g, s, act=act: nbgrad.linear_batch_norm(
            x, w, bias[0], None, None, g, s, eps=0.1, activation=act), tensors, order=3,
            mode="fast")


class Block(nn.Module):
    """Layers that are no neighbours in a Sequential; one of them is used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.twice, self.after = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        h = nbgrad.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.after(self.twice(h)) + self.twice(h)


def test_fuse_folds_neighbours():
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(48, 5, bias=False), nn.BatchNorm1d(5, affine=False))
    x = nbgrad.randn(8, 2, 6, 6)
    for _ in range(3):
        model(x + 2)
    model.eval()
    before = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    fused = nbgrad.fuse(model)
    assert [type(m).__name__ for m in fused] == ["Conv2d", "Identity", "ReLU", "Flatten", "Linear",
                                                 "Identity"]
    want = values_of(model, x)
    # two roundings of float32 per product of up to 48 terms
    np.testing.assert_allclose(values_of(fused, x), want, rtol=1e-5, atol=2e-5)
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name].numpy(), value)


def test_fuse_finds_pairs_by_running_an_example():
    nbgrad.manual_seed(0)
    model, x = Block(), nbgrad.randn(4, 2, 5, 5)
    model(x)
    model.eval()
    assert isinstance(nbgrad.fuse(model).norm, nn.BatchNorm2d)           # nothing says they are one
    fused = nbgrad.fuse(model, x)
    assert isinstance(fused.norm, nn.Identity)
    assert isinstance(fused.after, nn.BatchNorm1d)                       # its layer is used twice
    np.testing.assert_allclose(values_of(fused, x), values_of(model, x), rtol=1e-5, atol=1e-5)


def test_fuse_refuses_what_would_change_the_model():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"1 normalizes with the batch's statistics"):
        nbgrad.fuse(model)
    untracked = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="statistics"):
        nbgrad.fuse(untracked.eval())

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            z = self.fc(x)
            return self.norm(z) * z

    model, x = Both(), nbgrad.randn(6, 4)
    model(x * 3 + 1)
    with pytest.raises(RuntimeError, match="used elsewhere"):
        nbgrad.fuse(model.eval(), x)


def test_resnet_blocks_are_fused_and_fold():
    nbgrad.manual_seed(0)
    model = nbgrad.models.resnet20(width=4, image_size=8)
    x = nbgrad.randn(4, 3, 8, 8)
    ops = names_of(model(x))
    assert "relu" not in ops
    assert ops.count("add") == 0
    model.eval()
    fused = nbgrad.fuse(model, x)
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    np.testing.assert_allclose(values_of(fused, x), values_of(model, x), rtol=1e-4, atol=1e-5)


def test_the_fused_op_is_in_the_registry():
    assert {"linear_batch_norm", "linear_batch_norm_backward"} <= set(OPS)


def test_fuse_leaves_what_is_watched_or_used_twice():
    twice = nn.Linear(3, 3)
    hooked = nn.BatchNorm1d(3)
    hooked.register_forward_hook(lambda module, args, y: y * 2)

    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    x = nbgrad.randn(5, 3)
    for model in (nn.Sequential(twice, nn.BatchNorm1d(3), twice),
                  nn.Sequential(nn.Linear(3, 3), Own(3)),
                  nn.Sequential(nn.Linear(3, 3), hooked)):
        model(x * 2 + 1)
        model.eval()
        for fused in (nbgrad.fuse(model), nbgrad.fuse(model, x)):
            np.testing.assert_array_equal(values_of(fused, x), values_of(model, x))


def test_fuse_compares_what_a_model_returns():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

        def forward(self, x):
            y = self.norm(self.fc(x))
            return {"y": y, "label": y.argmax(1)}

    model, x = Two(), nbgrad.randn(5, 3)
    model(x * 3)
    fused = nbgrad.fuse(model.eval(), x)
    assert isinstance(fused.norm, nn.Identity)
    np.testing.assert_allclose(fused(x)["y"].detach().numpy(), model(x)["y"].detach().numpy(),
                               rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------- values made again

def block(seed=0):
    """Convolution of a ReLU behind a batch norm, of 1 MB: its input is made again for backward."""
    rng = np.random.default_rng(seed)
    z = nbgrad.tensor(rng.standard_normal((8, 4, 96, 96)).astype(np.float32), requires_grad=True)
    w = nbgrad.tensor(rng.standard_normal((2, 4, 3, 3)).astype(np.float32), requires_grad=True)
    gamma, beta = (nbgrad.tensor(np.full(4, v, np.float32), requires_grad=True) for v in (1.5, 0.1))
    z = z * 1
    y = nbgrad.batch_norm(z, None, None, gamma, beta, True, activation="relu")
    return z, w, gamma, y


def test_a_relu_behind_a_batch_norm_is_made_again():
    z, w, _, y = block()
    out = nbgrad.conv2d(y, w)
    (dw,) = nbgrad.grad((out * out).mean(), w, retain_graph=True)
    held = nbgrad.conv2d(y.detach(), w)
    (want,) = nbgrad.grad((held * held).mean(), w)
    np.testing.assert_array_equal(dw.data, want.data)
    assert "x made again" in nbgrad.graph.text(out)
    assert nbgrad.graph.saved_bytes(out) < 1.2 * z.nbytes


def test_a_write_to_what_it_is_made_from_raises():
    for which in (0, 2):
        parts = block()
        out = nbgrad.conv2d(parts[3], parts[1])
        with nbgrad.no_grad():
            parts[which].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            nbgrad.grad((out * out).mean(), parts[1])


def test_a_value_or_source_written_to_before_use_is_held():
    _, w, gamma, y = block()
    expected = y.data.copy()
    with nbgrad.no_grad():
        gamma.mul_(2)
    out = nbgrad.conv2d(y, w)
    assert "made again" not in nbgrad.graph.text(out)
    (dw,) = nbgrad.grad((out * out).mean(), w)
    held = nbgrad.conv2d(nbgrad.as_tensor(expected), w)
    np.testing.assert_array_equal(dw.data, nbgrad.grad((held * held).mean(), w)[0].data)
