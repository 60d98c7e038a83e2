"""What must hold exactly for a network with batch norm, whatever its weights (float64)."""

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, ops

rng = np.random.default_rng(41)


def network(eps=1e-300):
    """A linear layer and a convolution, each before a batch norm whose ε does not count."""
    return {
        "linear": (nn.Sequential(nn.Linear(5, 4, dtype=np.float64),
                                 nn.BatchNorm1d(4, eps=eps, dtype=np.float64), nn.Tanh(),
                                 nn.Linear(4, 3, dtype=np.float64)), (12, 5)),
        "conv": (nn.Sequential(nn.Conv2d(2, 4, 3, dtype=np.float64),
                               nn.BatchNorm2d(4, eps=eps, dtype=np.float64), nn.Tanh(),
                               nn.Flatten(), nn.Linear(36, 3, dtype=np.float64)), (6, 2, 5, 5)),
    }


def loss_of(model, x):
    t = nbgrad.tensor(np.arange(len(x)) % 3)
    return nn.functional.cross_entropy(model(x), t)


def gradients(model, x):
    model.zero_grad()
    loss = loss_of(model, x)
    loss.backward()
    return loss.item(), [p.grad.data.copy() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("scale", [0.1, 2.0, 10.0])
def test_weights_before_batch_norm_have_a_direction_only(kind, scale):
    """L(a w) = L(w), so ⟨w, ∇L⟩ = 0 and ∇L(a w) = ∇L(w) / a."""
    model, shape = network()[kind]
    x = nbgrad.tensor(rng.standard_normal(shape))
    loss, (dw, *_) = gradients(model, x)
    w = model[0].weight
    assert abs(np.vdot(w.data, dw)) <= 1e-12 * np.linalg.norm(w.data) * np.linalg.norm(dw)
    w.data *= scale
    if model[0].bias is not None:
        model[0].bias.data *= scale
    scaled, (again, *_) = gradients(model, x)
    assert scaled == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(again, dw / scale, rtol=1e-9, atol=1e-12 * np.abs(dw).max())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_bias_before_batch_norm_has_no_gradient(kind):
    model, shape = network()[kind]
    _, (dw, db, *_) = gradients(model, nbgrad.tensor(rng.standard_normal(shape)))
    assert np.abs(db).max() <= 1e-12 * np.abs(dw).max()


def of_batch_norm(gamma):
    x = nbgrad.tensor(rng.standard_normal((7, 3, 4)) * 2 + 1, requires_grad=True)
    dy = rng.standard_normal(x.shape)
    y = ops.batch_norm(x, None, None, nbgrad.tensor(gamma), None, True, eps=1e-300)
    (dx,) = nbgrad.grad(y, x, dy)
    xhat = (x.data - x.data.mean((0, 2), keepdims=True)) / x.data.std((0, 2), keepdims=True)
    return dx.data, dy, xhat, x.data.std((0, 2))


def test_gradients_of_a_channel_add_up_to_zero_and_are_orthogonal_to_it():
    dx, _, xhat, _ = of_batch_norm(np.array([0.5, -2.0, 1.0]))
    assert np.abs(dx.sum((0, 2))).max() < 1e-13
    assert np.abs((dx * xhat).sum((0, 2))).max() < 1e-12


def test_the_norm_of_the_gradient_as_santurkar_et_al_2018_state_it():
    """‖∂x‖² = γ²/σ² (‖g‖² − ⟨1, g⟩²/m − ⟨g, x̂⟩²/m), g = ∂y, per channel."""
    gamma = np.array([0.5, -2.0, 1.0])
    dx, g, xhat, std = of_batch_norm(gamma)
    axes, m = (0, 2), 28
    want = (gamma / std) ** 2 * ((g * g).sum(axes) - g.sum(axes) ** 2 / m
                                 - (g * xhat).sum(axes) ** 2 / m)
    np.testing.assert_allclose((dx * dx).sum(axes), want, rtol=1e-11)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_before_batch_norm_shifts_the_variance_by_what_it_keeps(p):
    """Li et al. 2019: x of mean 0 and variance v has v/(1 − p) in training and v in evaluation."""
    nbgrad.manual_seed(5)
    model = nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(1, momentum=None, dtype=np.float64))
    x = nbgrad.tensor(rng.standard_normal((200_000, 1)))
    model(x)
    ratio = x.data.var() / model[1].running_var.item()
    assert ratio == pytest.approx(1 - p, abs=0.01)       # 1/√n of a fourth moment: 0.004


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_hessian_vector_products_match_differences_of_gradients(kind):
    model, shape = network(eps=1e-5)[kind]
    x, parameters = nbgrad.tensor(rng.standard_normal(shape)), list(model.parameters())
    vs = [rng.standard_normal(p.shape) for p in parameters]
    grads = nbgrad.grad(loss_of(model, x), parameters, create_graph=True)
    product = sum((g * nbgrad.tensor(v)).sum() for g, v in zip(grads, vs))
    hvp = [h.data for h in nbgrad.grad(product, parameters)]
    h, found = 1e-5, []
    for sign in (1, -1):
        for p, v in zip(parameters, vs):
            p.data += sign * h * v
        found.append(gradients(model, x)[1])
        for p, v in zip(parameters, vs):
            p.data -= sign * h * v
    largest = max(np.abs(a).max() for a in hvp)
    for a, up, down in zip(hvp, *found):
        np.testing.assert_allclose(a, (up - down) / (2 * h), atol=1e-7 * largest, rtol=1e-6)
