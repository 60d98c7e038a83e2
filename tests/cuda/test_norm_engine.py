"""Normalization layers and losses on simulated devices: what the CPU says, forward and backward."""

import copy
import math

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, tensor
from nbgrad.nn import functional as F
from nbgrad.ops import moments, weighted_batch_norm


def both(module, x, *more):
    """Output, the input's gradient, parameters' gradients and buffers, on the CPU and on CUDA."""
    found = []
    for device in ("cpu", "cuda"):
        m = copy.deepcopy(module).to(device)
        t = tensor(x, requires_grad=True, device=device)
        y = m(t, *(tensor(a, device=device) for a in more))
        assert y.device == device
        weights = np.cos(np.arange(y.data.size)).reshape(y.shape).astype(x.dtype)
        (y * tensor(weights, device=device)).sum().backward()
        tensors = [y, t.grad, *(p.grad for p in m.parameters() if p.requires_grad),
                   *m.buffers()]
        assert {a.device for a in tensors} == {device}
        found.append([a.detach().cpu().numpy() for a in tensors])
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def randomized(module):
    rng = np.random.default_rng(1)
    for p in module.parameters():
        p.data[...] = rng.standard_normal(p.shape)
    return module


LAYERS = [(nn.BatchNorm2d(3), (4, 3, 2, 3)), (nn.BatchNorm1d(5), (6, 5)),
          (nn.BatchNorm1d(2, momentum=None), (3, 2, 4)),
          (nn.BatchNorm2d(2, statistics="running"), (3, 2, 2, 2)),
          (nn.BatchNorm2d(2, average=nn.Cumulative(), on_nonfinite="skip_update"), (3, 2, 2, 2)),
          (nn.BatchNorm2d(3).eval(), (2, 3, 2, 2)), (nn.LayerNorm((3, 4)), (2, 3, 4)),
          (nn.GroupNorm(2, 4), (2, 4, 3)), (nn.InstanceNorm2d(3, affine=True), (2, 3, 2, 2)),
          (nn.InstanceNorm1d(3, track_running_stats=True), (2, 3, 4)), (nn.RMSNorm(6), (3, 6)),
          (nn.Softmax(1), (3, 5)), (nn.LogSoftmax(1), (2, 3, 4))]
LAYERS += [(nn.create_norm(name, 4), (6, 4, 2, 3)) for name in (
    "decorrelated", "evonorm_b0", "evonorm_s0", "filter_response", "frozen", "ghost",
    "global_response", "local", "lp", "mean_only", "renorm", "split", "switchable", "sync")]
LAYERS += [(nn.LpBatchNorm(4, p=3), (6, 4, 2)), (nn.LpBatchNorm(4, p=math.inf), (6, 4, 2)),
           (nn.DecorrelatedBatchNorm(4, group_size=2), (6, 4, 2)),
           (nn.FilterResponseNorm(4).eval(), (2, 4, 2, 3)),
           (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (5, 4)),
           (nn.utils.parametrizations.weight_standardization(nn.Conv2d(2, 3, 2)), (2, 2, 3, 3)),
           (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), (5, 4))]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_layers(layer, shape):
    both(randomized(layer), np.random.default_rng(0).standard_normal(shape).astype("f4") + 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses(reduction):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((4, 5)).astype("f4"), np.array([1, 4, -100, 0])
    weight = rng.uniform(0.5, 1, 5).astype("f4")

    class Loss(nn.Module):
        def __init__(self, f, **settings):
            super().__init__()
            self.f, self.settings = f, settings
            self.register_buffer("weight", tensor(weight))

        def forward(self, x, target):
            w = {} if self.f is F.mse_loss else {"weight": self.weight}
            return self.f(x, target, reduction=reduction, **w, **self.settings)
    both(Loss(F.cross_entropy), x, target)
    both(Loss(F.cross_entropy, label_smoothing=0.2), x, target)
    both(Loss(F.nll_loss), x, target)
    both(Loss(F.mse_loss), x, x[::-1].copy())


def test_fused_residual_and_moments():
    rng = np.random.default_rng(0)
    x, z = (rng.standard_normal((4, 3, 2)).astype("f4") for _ in range(2))
    found = []
    for device in ("cpu", "cuda"):
        a, b = (tensor(v, requires_grad=True, device=device) for v in (x, z))
        y, m = F.batch_norm(a, None, None, training=True, residual=b, activation="relu",
                            return_moments=True)
        (y * y).sum().backward()
        one = moments(a.detach())
        tensors = y.detach(), a.grad, b.grad, *map(tensor, (*m, *one))
        found.append([t.cpu().numpy() for t in tensors])
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_weighted_batch_norm():
    """Weights, and values that are not looked at."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((4, 3, 5)).astype("f4") for _ in range(2))
    w = rng.random((4, 1, 5)) * (rng.random((4, 1, 5)) < 0.6)
    x = np.where(w > 0, x, np.nan).astype("f4")
    found = []
    for device in ("cpu", "cuda"):
        t, g, b = (tensor(a, requires_grad=True, device=device)
                   for a in (x, np.ones(3, "f4"), np.zeros(3, "f4")))
        y, m = weighted_batch_norm(t, g, b, mask=tensor(w, device=device))
        y.backward(tensor(dy, device=device))
        found.append([a.detach().cpu().numpy()
                      for a in (y, t.grad, g.grad, b.grad, *map(tensor, m))])
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "rtol"), [("f8", 1e-9), ("f4", 1e-5)])
def test_second_derivatives(dtype, rtol):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((4, 3)).astype(dtype), np.array([0, 2, 1, 1])
    for f in (lambda t, c: F.layer_norm(t, (3,)).exp().sum(),
              lambda t, c: F.batch_norm(t, None, None, training=True).exp().sum(),
              lambda t, c: F.cross_entropy(t, c)):
        found = []
        for device in ("cpu", "cuda"):
            t = tensor(x, requires_grad=True, device=device)
            (g,) = nbgrad.grad(f(t, tensor(target, device=device)), t, create_graph=True)
            (g * g).sum().backward()
            found.append(t.grad.cpu().numpy())
        size = np.abs(found[0]).max()
        np.testing.assert_allclose(found[1], found[0], rtol=rtol, atol=rtol / 100 * size)


def test_what_is_wrong_is_said():
    x = tensor(np.ones((2, 3), "f4"), device="cuda")
    with pytest.raises(RuntimeError, match="cross_entropy: expected all tensors to be on the same "
                                           "device, but found at least two devices, cuda and cpu"):
        F.cross_entropy(x, tensor([0, 1]))
    with pytest.raises(IndexError, match="Target 3 is out of bounds for 3 classes"):
        F.cross_entropy(x, tensor([0, 3], device="cuda"))
    mean = nbgrad.zeros(1, device="cuda").expand(3)
    with pytest.raises(ValueError, match="running_mean is to be updated in training"):
        F.batch_norm(x, mean, nbgrad.ones(3, device="cuda"), training=True)


@pytest.mark.parametrize("layer", [nn.GhostBatchNorm(3, ghost_size=2), nn.DecorrelatedBatchNorm(3),
                                   nn.BatchNorm2d(3, average=nn.Cumulative())],
                         ids=lambda v: type(v).__name__)
def test_a_layer_that_has_trained_may_move(layer):
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype("f4")
    for device in ("cpu", "cuda", "cpu"):
        layer.to(device)(tensor(x, device=device))
    assert layer.num_batches_tracked.item() == 3
    assert layer.running_mean.device == "cpu"
    assert np.isfinite(layer.running_mean.numpy()).all()
