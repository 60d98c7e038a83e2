"""The three models: structure, sizes from their papers, and that every form computes and learns."""

from collections import OrderedDict

import numpy as np
import pytest

import nbgrad
from nbgrad import models, nn, optim

FORMS = [("batch", "before"), ("batch", "after"), ("layer", "before"), ("layer", "after"),
         (None, "before")]


def count(model):
    return sum(p.numel() for p in model.parameters())


def kinds(model):
    return [type(m).__name__ for m in model.children()]


def test_mlp_structure_follows_placement():
    model = models.mlp(4, (3,), 2)
    assert kinds(model) == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert list(model.state_dict())[:4] == ["fc1.weight", "fc1.bias", "norm1.weight", "norm1.bias"]
    model = models.mlp(4, (3,), 2, placement="after", norm="layer", activation="gelu", dropout=0.5)
    assert kinds(model) == ["Flatten", "Linear", "GELU", "LayerNorm", "Dropout", "Linear"]
    assert kinds(models.mlp(4, (3,), 2, norm=None)) == ["Flatten", "Linear", "ReLU", "Linear"]
    assert count(models.mlp()) == 64 * 100 + 100 + 2 * (100 * 100 + 100) + 3 * 200 + 100 * 10 + 10


def test_parameter_counts_of_the_papers():
    assert count(models.lenet(norm=None)) == 61_706
    assert count(models.resnet20()) == 269_722
    assert count(models.resnet20(norm=None)) == 269_722 - 2 * (7 * 16 + 6 * 32 + 6 * 64)


@pytest.mark.parametrize("size", [4, 8, 15, 16, 28, 32])
def test_lenet_adapts_to_the_image(size):
    model = models.lenet(image_size=size, norm="layer").eval()
    assert model(nbgrad.zeros(2, 1, size, size)).shape == (2, 10)
    assert model.conv1.kernel_size == ((3, 3) if size < 16 else (5, 5))


@pytest.mark.parametrize(("norm", "placement"), [*FORMS, ("batch", "preact"), ("layer", "preact")])
def test_resnet_of_zero_convolutions_is_its_shortcuts(norm, placement):
    model = models.resnet20(1, 3, width=4, image_size=8, norm=None, placement=placement).eval()
    built = models.resnet20(1, 3, width=4, image_size=8, norm=norm, placement=placement).eval()
    x = nbgrad.as_tensor(np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32))
    assert built(x).shape == (2, 3)
    for p in model.stages.parameters():
        nn.init.zeros_(p)
    h = np.maximum(model.conv1(x).detach().numpy(), 0)
    padded = np.zeros((2, 16, 2, 2), np.float32)
    padded[:, 6:10] = h[:, :, ::4, ::4]                  # 4 → 8 (2 before) → 16 (4 before)
    expected = padded.mean((2, 3)) @ model.fc.weight.data.T + model.fc.bias.data
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_resnet_blocks_order_their_layers_by_placement():
    order = {}
    for placement in ("before", "after", "preact"):
        block = models.BasicBlock(2, 2, 1, 4, activation="relu", norm="batch", placement=placement)
        calls = order[placement] = []
        for name, module in block.named_children():
            module.register_forward_hook(lambda m, a, y, name=name, calls=calls: calls.append(name))
        block(nbgrad.randn(2, 2, 4, 4))
    assert order == {
        "before": ["conv1", "norm1", "act", "conv2", "norm2", "act"],
        "after": ["conv1", "act", "norm1", "conv2", "act", "norm2"],
        "preact": ["norm1", "act", "conv1", "norm2", "act", "conv2"],
    }


def torch_twin(torch, model):
    """The same stack in PyTorch, from the classes' names and reprs of our layers."""
    layers = {}
    for name, m in model.named_children():
        if isinstance(m, nn.Conv2d):
            layers[name] = torch.nn.Conv2d(m.in_channels, m.out_channels, m.kernel_size,
                                           padding=m.padding)
        elif isinstance(m, nn.Linear):
            layers[name] = torch.nn.Linear(m.in_features, m.out_features)
        elif isinstance(m, nn.Normalization):
            size = m.normalized_shape if isinstance(m, nn.LayerNorm) else m.num_features
            layers[name] = getattr(torch.nn, type(m).__name__)(size)
        else:
            args = (2,) if isinstance(m, nn.MaxPool2d) else ()
            layers[name] = getattr(torch.nn, type(m).__name__)(*args)
    twin = torch.nn.Sequential(OrderedDict(layers)).double()
    twin.load_state_dict({k: torch.tensor(v.numpy()) for k, v in model.state_dict().items()})
    return twin


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_training_equals_pytorch(name, form):
    torch = pytest.importorskip("torch")
    norm, placement = form
    nbgrad.manual_seed(0)
    size = {"in_features": 64, "hidden": (20, 10)} if name == "mlp" else {"image_size": 8}
    model = models.create(name, norm=norm, placement=placement, activation="tanh", **size).double()
    twin = torch_twin(torch, model)
    assert repr(model) == repr(twin)
    rng = np.random.default_rng(1)
    a, b = optim.SGD(model.parameters(), 0.05, 0.9), torch.optim.SGD(twin.parameters(), 0.05, 0.9)
    for _ in range(5):
        x, t = rng.normal(size=(12, 1, 8, 8)), rng.integers(0, 10, 12)
        for optimizer in (a, b):
            optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(nbgrad.tensor(x)), nbgrad.tensor(t))
        other = torch.nn.functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(t))
        loss.backward()
        other.backward()
        assert loss.item() == pytest.approx(other.item(), rel=1e-9)
        a.step()
        b.step()
    for (key, p), q in zip(model.state_dict().items(), twin.state_dict().values()):
        np.testing.assert_allclose(p.numpy(), q.numpy(), rtol=1e-6, atol=1e-8, err_msg=key)


@pytest.mark.parametrize("form", [*FORMS, ("batch", "preact"), ("layer", "preact")])
def test_every_parameter_of_resnet_gets_a_gradient(form):
    norm, placement = form
    nbgrad.manual_seed(0)
    model = models.resnet20(1, 3, width=4, image_size=8, norm=norm, placement=placement,
                            activation="tanh").double()
    x = nbgrad.randn(4, 1, 8, 8, dtype=np.float64)
    loss = nn.functional.cross_entropy(model(x), nbgrad.tensor([0, 1, 2, 0]))
    loss.backward()
    w = model.stages[4].conv1.weight                    # against a central difference
    dw, h = w.grad.data.flat[5], 1e-6
    losses = []
    for step in (h, -2 * h):
        w.data.flat[5] += step
        losses.append(nn.functional.cross_entropy(model(x), nbgrad.tensor([0, 1, 2, 0])).item())
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(dw, rel=1e-4, abs=1e-8)
    assert all(np.abs(p.grad.data).max() > 0 for p in model.parameters())


def test_bad_names_list_the_good_ones():
    with pytest.raises(ValueError, match="create: name must be one of 'mlp', 'cnn', 'lenet', "
                       "'resnet20'"):
        models.create("vgg")
    with pytest.raises(ValueError, match=r"expected None or one of batch, .*, got 'spooky'"):
        models.mlp(norm="spooky")
    with pytest.raises(ValueError, match="instance norm needs axes behind the channels"):
        models.mlp(norm="instance")
    with pytest.raises(ValueError, match="activation must be one of 'relu'"):
        models.lenet(activation="swish")
    with pytest.raises(ValueError, match="mlp: placement must be one of 'before', 'after'"):
        models.mlp(placement="preact")
    with pytest.raises(ValueError, match="resnet: placement must be one of"):
        models.resnet20(placement="middle")
    with pytest.raises(ValueError, match="image_size must be at least 4, got 3"):
        models.lenet(image_size=3)
