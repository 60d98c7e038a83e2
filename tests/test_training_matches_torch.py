"""A hundred steps of training give PyTorch's losses: same weights, same batches, float64.

The twins are written out in torch and take the weights of nbgrad's models by key.
"""

from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest

import nbgrad
from nbgrad import data, models, optim

torch = pytest.importorskip("torch")
tnn = torch.nn

STEPS = 100


def mlp_twin():
    layers = OrderedDict(flatten=tnn.Flatten())
    for i, width in enumerate((64, 100, 100), 1):
        layers[f"fc{i}"] = tnn.Linear(width, 100)
        layers[f"norm{i}"] = tnn.BatchNorm1d(100)
        layers[f"act{i}"] = tnn.Sigmoid()
    return tnn.Sequential(OrderedDict(layers, fc4=tnn.Linear(100, 10)))


def lenet_twin():
    return tnn.Sequential(OrderedDict(
        conv1=tnn.Conv2d(1, 6, 3, padding=1), norm1=tnn.BatchNorm2d(6), act1=tnn.ReLU(),
        pool1=tnn.MaxPool2d(2),
        conv2=tnn.Conv2d(6, 16, 3, padding=1), norm2=tnn.BatchNorm2d(16), act2=tnn.ReLU(),
        pool2=tnn.MaxPool2d(2), flatten=tnn.Flatten(),
        fc3=tnn.Linear(64, 120), norm3=tnn.BatchNorm1d(120), act3=tnn.ReLU(),
        fc4=tnn.Linear(120, 84), norm4=tnn.BatchNorm1d(84), act4=tnn.ReLU(),
        fc5=tnn.Linear(84, 10)))


class BlockTwin(tnn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.stride, self.extra = stride, channels - in_channels
        self.conv1 = tnn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = tnn.BatchNorm2d(channels)
        self.conv2 = tnn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = tnn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        short = x[:, :, ::self.stride, ::self.stride]
        half = self.extra // 2
        return torch.relu(y + tnn.functional.pad(short, (0, 0, 0, 0, half, self.extra - half)))


class ResNetTwin(tnn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv1 = tnn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.stem = tnn.Sequential(OrderedDict(norm1=tnn.BatchNorm2d(width), act1=tnn.ReLU()))
        widths = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
        self.stages = tnn.Sequential(*(BlockTwin(a, b, 1 if a == b else 2)
                                       for a, b in pairwise(widths)))
        self.fc = tnn.Linear(4 * width, 10)

    def forward(self, x):
        return self.fc(self.stages(self.stem(self.conv1(x))).mean((2, 3)))


MODELS = {
    "mlp": (lambda: models.mlp(activation="sigmoid"), mlp_twin, 60),
    "lenet": (lambda: models.lenet(image_size=8), lenet_twin, 60),
    "resnet20": (lambda: models.resnet20(1, width=8, image_size=16), ResNetTwin, 16),
}
OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    "Adam": {"lr": 2e-3, "weight_decay": 1e-3},
}


def batches(name, size):
    """STEPS batches of training digits in float64, then one of test digits."""
    rng = np.random.default_rng(0)
    train, test = data.load("digits")
    for i in range(STEPS + 1):
        split, n = (train, size) if i < STEPS else (test, 200)
        x, t = (a.numpy() for a in split[rng.permutation(len(split))[:n]])
        x = x.astype(np.float64)
        if name == "resnet20":                        # 16 × 16, so that the last stage sees 4 × 4
            x = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)))
        yield np.ascontiguousarray(x), t


def losses(lib, model, optimizer, rows):
    """The loss of each step and, last, that of the test digits with the running statistics."""
    found = []
    for x, t in rows:
        last = len(found) == STEPS
        model.train(not last)
        loss = lib.nn.functional.cross_entropy(model(lib.as_tensor(x)), lib.as_tensor(t))
        found.append(loss.item())
        if not last:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return np.array(found)


@pytest.fixture
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize(("name", "method"), [("mlp", "SGD"), ("lenet", "SGD"), ("resnet20", "SGD"),
                                              ("mlp", "Adam"), ("lenet", "Adam")])
def test_training_curve_is_that_of_torch(name, method):
    build, build_twin, size = MODELS[name]
    nbgrad.manual_seed(0)
    model, twin = build().double(), build_twin().double()
    twin.load_state_dict({k: torch.tensor(v.numpy()) for k, v in model.state_dict().items()})
    settings = OPTIMIZERS[method]
    got = losses(nbgrad, model, getattr(optim, method)(model.parameters(), **settings),
                 batches(name, size))
    want = losses(torch, twin, getattr(torch.optim, method)(twin.parameters(), **settings),
                  batches(name, size))
    error = np.abs(got / want - 1)
    print(f"{name} {method}: relative error {error[:20].max():.1e} in the first 20 steps, "
          f"{error[20:100].max():.1e} up to step 100, {error[100]:.1e} on test digits")
    assert want[90:100].mean() < want[:10].mean() / 2      # it trains, or all agree
    np.testing.assert_allclose(got[:20], want[:20], rtol=1e-10)
    np.testing.assert_allclose(got[:100], want[:100], rtol=1e-6)
    np.testing.assert_allclose(got[100], want[100], rtol=1e-6)
