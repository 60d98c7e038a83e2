"""Training on a simulated device: the CPU's numbers, step by step."""

import numpy as np
import pytest

import nbgrad
from nbgrad import backend, nn, optim, tensor
from nbgrad.models import lenet

OPTIMIZERS = {
    "sgd": lambda ps: optim.SGD(ps, 0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda ps: optim.AdamW(ps, 0.01, maximize=True)}


def train(device, make, steps=2, dropout=0.0):
    """Losses and parameters of lenet on 8 × 8 images."""
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 1, 8, 8)), rng.standard_normal((2, 10))
    nbgrad.manual_seed(1)
    model = lenet(image_size=8, norm=None, dropout=dropout).double().to(device)
    optimizer, losses = make(model.parameters()), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((model(tensor(x, device=device)) - tensor(target, device=device)) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lenet_learns_as_on_the_cpu(name):
    """float64, so that steps cannot drift apart by more than roundings."""
    dropout = 0.2 * (name == "sgd")
    losses, model, _ = train("cuda", OPTIMIZERS[name], dropout=dropout)
    with backend.use("reference"):
        want, reference, _ = train("cpu", OPTIMIZERS[name], dropout=dropout)
    np.testing.assert_allclose(losses, want, rtol=1e-10)
    for (key, p), q in zip(model.named_parameters(), reference.parameters()):
        assert p.device == "cuda", key
        np.testing.assert_allclose(p.detach().cpu().numpy(), q.detach().numpy(), rtol=1e-7,
                                   atol=1e-10)


def test_state_goes_from_device_to_device():
    """What was learnt on one continues on the other."""
    with backend.use("reference"):
        _, model, optimizer = train("cpu", OPTIMIZERS["adamw"], steps=1)
    model.to("cuda")
    for device in ("cpu", "cuda"):
        other = lenet(image_size=8, norm=None).double().to(device)
        assert not any(other.load_state_dict(model.state_dict()))
        for p, q in zip(model.parameters(), other.parameters()):
            assert q.device == device
            np.testing.assert_array_equal(p.tolist(), q.tolist())
        mine = OPTIMIZERS["adamw"](other.parameters())
        mine.load_state_dict(optimizer.state_dict())
        for p, q in zip(model.parameters(), other.parameters()):
            assert mine.state[q]["step"] == 1
            a, b = (tensor(o.state[r]["exp_avg"]) for o, r in ((optimizer, p), (mine, q)))
            assert (a.device, b.device, a.tolist()) == ("cpu", device, b.tolist())


def test_initial_values_are_the_cpus():
    for init in (nn.init.uniform_, nn.init.orthogonal_, nn.init.trunc_normal_, nn.init.ones_):
        values = []
        for device in ("cpu", "cuda"):
            nbgrad.manual_seed(0)
            values.append(init(nbgrad.zeros(3, 4, device=device)).tolist())
        assert values[0] == values[1]
