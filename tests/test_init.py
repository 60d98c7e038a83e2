"""Initial values: moments, bounds, PyTorch's formulas, reproducibility."""

import math

import numpy as np
import pytest

import nbgrad
from nbgrad import nn
from nbgrad.nn import init

SHAPE = (60, 40, 3, 3)                               # fan_in 360, fan_out 540
FAN_IN, FAN_OUT = 360, 540


@pytest.fixture(autouse=True)
def _seeded():
    nbgrad.manual_seed(7)


def std_of(fill, *args, **settings):
    t = nbgrad.zeros(*SHAPE)
    assert fill(t, *args, **settings) is t
    assert abs(t.data.mean(dtype=np.float64)) < 4 * t.data.std() / math.sqrt(t.numel())
    return t.data.std(dtype=np.float64), np.abs(t.data).max()


@pytest.mark.parametrize(("fill", "args", "std", "uniform"), [
    (init.xavier_uniform_, (2.0,), 2 * math.sqrt(2 / (FAN_IN + FAN_OUT)), True),
    (init.xavier_normal_, (), math.sqrt(2 / (FAN_IN + FAN_OUT)), False),
    (init.kaiming_uniform_, (math.sqrt(5),), math.sqrt(2 / 6 / FAN_IN), True),
    (init.kaiming_normal_, (0, "fan_out", "relu"), math.sqrt(2 / FAN_OUT), False),
    (init.normal_, (0.0, 3.0), 3.0, False),
    (init.uniform_, (-2.0, 2.0), 2 / math.sqrt(3), True),
])
def test_moments_and_bounds(fill, args, std, uniform):
    found, largest = std_of(fill, *args)
    assert found == pytest.approx(std, rel=0.02)          # 21,600 draws: σ of the estimate 0.5 %
    if uniform:
        assert 0.99 * math.sqrt(3) * std < largest <= math.sqrt(3) * std * (1 + 1e-6)


def test_default_layers_are_uniform_within_one_over_root_fan_in():
    for layer, fan_in in ((nn.Linear(400, 300), 400), (nn.Conv2d(40, 60, 3, groups=2), 180)):
        k = 1 / math.sqrt(fan_in)
        for p in layer.parameters():
            assert 0.9 * k < np.abs(p.data).max() <= k * (1 + 1e-6)
        assert layer.weight.data.std() == pytest.approx(k / math.sqrt(3), rel=0.02)


def test_default_layers_have_pytorchs_distribution():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    ours, theirs = nn.Linear(200, 400), torch.nn.Linear(200, 400)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        a, b = p.detach().numpy().ravel(), q.detach().numpy().ravel()
        quantiles = np.linspace(0, 1, 11)
        np.testing.assert_allclose(np.quantile(a, quantiles), np.quantile(b, quantiles),
                                   atol=0.3 / math.sqrt(a.size))       # 3 σ


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 2, 2), (2, 3, 2)])
def test_orthogonal(shape):
    q = init.orthogonal_(nbgrad.zeros(*shape, dtype=np.float64), 2.0).data.reshape(shape[0], -1)
    gram = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-12)


@pytest.mark.parametrize(("mean", "std", "a", "b"), [
    (0.0, 1.0, -2.0, 2.0), (0.0, 1.0, -0.01, 0.01), (0.0, 1.0, 1.0, 9.0), (3.0, 0.5, -1.0, 2.5)])
def test_trunc_normal_has_the_moments_of_the_conditional_normal(mean, std, a, b):
    t = init.trunc_normal_(nbgrad.zeros(20_000, dtype=np.float64), mean, std, a, b).data
    x = np.linspace(a, b, 200_001)
    w = np.exp(-0.5 * ((x - mean) / std) ** 2)
    w /= w.sum()
    m, s = (w * x).sum(), math.sqrt((w * (x - (w * x).sum()) ** 2).sum())
    assert a <= t.min() <= t.max() <= b
    assert t.mean() == pytest.approx(m, abs=4 * s / math.sqrt(t.size))
    assert t.std() == pytest.approx(s, rel=0.03)


def test_trunc_normal_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="too far from the mean"):
        init.trunc_normal_(nbgrad.zeros(3), a=40.0, b=90.0)
    with pytest.raises(ValueError, match="needs std > 0 and a < b"):
        init.trunc_normal_(nbgrad.zeros(3), std=0.0)


@pytest.mark.parametrize("name", ["linear", "conv2d", "sigmoid", "tanh", "relu", "leaky_relu",
                                  "selu"])
def test_gains_are_pytorchs(name):
    torch = pytest.importorskip("torch")
    assert init.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    assert init.calculate_gain("leaky_relu", 0.3) == torch.nn.init.calculate_gain("leaky_relu", 0.3)


def test_seed_and_generator_reproduce():
    def weights():
        return nn.Linear(3, 4).weight.data.copy()

    nbgrad.manual_seed(1)
    first = weights()
    assert not np.array_equal(first, weights())
    nbgrad.manual_seed(1)
    np.testing.assert_array_equal(first, weights())
    a, b = (init.normal_(nbgrad.zeros(5), generator=nbgrad.Generator(3)).data for _ in "ab")
    np.testing.assert_array_equal(a, b)
    nbgrad.manual_seed(1)
    init.normal_(nbgrad.zeros(5), generator=nbgrad.Generator(3))
    np.testing.assert_array_equal(first, weights())        # the default generator was left alone


def test_one_seed_gives_both_dtypes_the_same_weights():
    nbgrad.manual_seed(5)
    a = nn.Linear(3, 4).weight.data
    nbgrad.manual_seed(5)
    np.testing.assert_allclose(a, nn.Linear(3, 4, dtype=np.float64).weight.data, rtol=1e-7)


def test_constants_and_bad_arguments():
    t = nbgrad.zeros(2, 2)
    assert init.constant_(t, 3.0).tolist() == [[3.0, 3.0]] * 2
    assert init.ones_(t).tolist() == [[1.0, 1.0]] * 2
    assert init.zeros_(t).tolist() == [[0.0, 0.0]] * 2
    assert init.kaiming_normal_(nbgrad.zeros(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match="fewer than 2 dimensions"):
        init.xavier_normal_(nbgrad.zeros(3))
    with pytest.raises(ValueError, match="2 or more dimensions"):
        init.orthogonal_(nbgrad.zeros(3))
    with pytest.raises(ValueError, match="Mode fan not supported"):
        init.kaiming_normal_(t, mode="fan")
    with pytest.raises(ValueError, match="Unsupported nonlinearity swish"):
        init.calculate_gain("swish")
    with pytest.raises(ValueError, match="negative_slope True not a valid number"):
        init.calculate_gain("leaky_relu", True)
    with pytest.raises(TypeError, match="normal_: expected a floating point tensor, got int64"):
        init.normal_(nbgrad.tensor([1, 2]))
    before = t.tolist()
    with pytest.raises(ValueError, match="normal_: expected std >= 0, got -1"):
        init.normal_(t, std=-1)
    with pytest.raises(ValueError, match="uniform_: expected a <= b, got a=1 and b=0"):
        init.uniform_(t, 1, 0)
    assert t.tolist() == before


def test_filling_a_parameter_keeps_it_a_leaf_and_bumps_its_version():
    p = nn.Parameter(np.ones(2))
    y = (p * p).sum()
    init.ones_(p)
    assert p.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
