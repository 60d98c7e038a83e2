"""The norms of the literature: values against formulas in NumPy, derivatives to third order in
training and evaluation, float32 at extreme offsets and scales, running statistics, errors."""

import copy
import inspect
import math
import re

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, ops
from nbgrad.nn.utils.parametrizations import spectral_norm, weight_norm, weight_standardization
from nbgrad.testing import gradcheck

rng = np.random.default_rng(5)
C = 4
LAYERS = {
    "lp 1": lambda **k: nn.LpBatchNorm(C, p=1, **k),
    "lp 2": lambda **k: nn.LpBatchNorm(C, p=2, **k),
    "lp 2.5": lambda **k: nn.LpBatchNorm(C, p=2.5, **k),
    "lp 4": lambda **k: nn.LpBatchNorm(C, p=4, **k),
    "lp inf": lambda **k: nn.LpBatchNorm(C, p=math.inf, **k),
    "lp 1 not centered": lambda **k: nn.LpBatchNorm(C, p=1, centered=False, **k),
    "lp 2 not centered": lambda **k: nn.LpBatchNorm(C, p=2, centered=False, **k),
    "mean only": lambda **k: nn.MeanOnlyBatchNorm(C, **k),
    "decorrelated": lambda **k: nn.DecorrelatedBatchNorm(C, group_size=2, **k),
    "switchable": lambda **k: nn.SwitchableNorm(C, **k),
    "frn": lambda **k: nn.FilterResponseNorm(C, **k),
    "frn learned eps": lambda **k: nn.FilterResponseNorm(C, tlu=False, learn_eps=True, **k),
    "evonorm b0": lambda **k: nn.EvoNormB0(C, **k),
    "evonorm b0 linear": lambda **k: nn.EvoNormB0(C, activation=False, **k),
    "evonorm s0": lambda **k: nn.EvoNormS0(C, groups=2, **k),
    "grn": lambda **k: nn.GlobalResponseNorm(C, **k),
}
KINKED = {"lp 1", "lp 2.5", "lp inf"}          # no second derivative where a channel is constant
SAMPLEWISE = {"frn", "frn learned eps", "evonorm s0", "grn"}
RUNNING = sorted(set(LAYERS) - SAMPLEWISE)
every = pytest.mark.parametrize("name", sorted(LAYERS))


def make(name, dtype=np.float64, seed=0):
    """A layer whose parameters are not those it starts with."""
    layer, g = LAYERS[name](dtype=dtype), np.random.default_rng(seed)
    for p in layer.parameters():
        p.data[...] = g.uniform(0.3, 1.7, p.shape) * g.choice([-1, 1], p.shape)
    return layer


def hard(shape=(4, C, 3), constant=True):
    """A channel that is constant, and one with a mean of 10,000 standard deviations."""
    x = rng.standard_normal(shape)
    if constant:
        x[:, 1] = 0.7
    x[:, 2] += 1e4
    return x


def run(layer, x):
    return layer(nbgrad.tensor(x)).data


# -------------------------------------------------------------------------------------- derivatives

@pytest.mark.parametrize("training", [True, False])
@every
def test_derivatives_to_third_order(name, training):
    """Every element of the first, random directions of the others. gamma of one channel is 0. What
    a constant channel bends on is √eps: finite differences need it far from their step."""
    layer = make(name)
    layer.eps = 1e-2
    layer(nbgrad.tensor(hard()))
    layer.train(training)
    if layer.weight is not None:
        layer.weight.data[0] = 0
    x = nbgrad.tensor(hard(constant=name not in KINKED), requires_grad=True)
    gradcheck(layer, x)
    gradcheck(layer, x, order=3, mode="fast", eps=1e-5)


@every
def test_derivatives_with_one_element_per_sample(name):
    layer = make(name)
    x = nbgrad.tensor(rng.standard_normal((5, C, 1)), requires_grad=True)
    gradcheck(layer, x, order=2, mode="fast")


def test_derivatives_of_noisy_batch_norm():
    layer = nn.NoisyBatchNorm(C, generator=nbgrad.Generator(3), dtype=np.float64)

    def f(x, weight):
        layer.generator.manual_seed(3)
        layer.weight.data[...] = weight.data
        return layer(x) * weight.reshape(1, C, 1)
    x, w = nbgrad.tensor(hard(), requires_grad=True), nbgrad.tensor(np.ones(C))
    gradcheck(lambda x: f(x, w), x, order=3, mode="fast", eps=1e-5)


@pytest.mark.parametrize("cond", [1.0, 1e3, 1e8, 1e12])
def test_inverse_square_root(cond):
    q, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    values = np.geomspace(1, cond, 5)
    root = ops.inverse_sqrt(nbgrad.tensor(q * values @ q.T)).data
    # A itself is only known to 1e-16 cond
    np.testing.assert_allclose(root, q / np.sqrt(values) @ q.T, atol=3e-15 * cond ** 0.9 + 1e-13)
    if cond < 1e5:
        a = nbgrad.tensor(q * values @ q.T, requires_grad=True)
        gradcheck(lambda a: ops.inverse_sqrt(a + a.mT), a, order=3, mode="fast")


# ------------------------------------------------------------------------------------------- values

def per_channel(a, x):
    return np.reshape(a, (1, -1) + (1,) * (x.ndim - 2))


def root(square, eps):
    return np.sqrt(square + eps)


def by_formula(name, layer, x):
    """What a layer computes in training, from its equation."""
    p = {n: per_channel(t.data, x) for n, t in layer.named_parameters() if t.shape == (C,)}
    g, b = p.get("weight", 1.0), p.get("bias", 0.0)
    batch, space, eps = (0, 2), 2, layer.eps
    xc = x - x.mean(batch, keepdims=True)
    kept = {"keepdims": True}
    if name.startswith("lp"):
        base = x if "not" in name else xc
        if layer.p == math.inf:
            n = x.size // C
            t = np.linspace(0, 12, 100001)
            tails = 1 - np.array([math.erf(v / math.sqrt(2)) for v in t]) ** n
            s = (np.abs(base).max(batch, **kept) + math.sqrt(eps)) / np.trapezoid(tails, t)
        else:
            z = np.linspace(-40, 40, 800001)
            density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            moment = np.trapezoid(np.abs(z) ** layer.p * density, z)
            s = ((np.abs(base) ** layer.p).mean(batch, **kept) + eps ** (layer.p / 2)) / moment
            s = s ** (1 / layer.p)
        return xc / s * g + b
    if name == "mean only":
        return xc + b
    if name == "decorrelated":
        y = np.empty_like(x)
        for i in range(0, C, 2):
            flat = xc[:, i:i + 2].transpose(1, 0, 2).reshape(2, -1)
            values, vectors = np.linalg.eigh(flat @ flat.T / flat.shape[1] + eps * np.eye(2))
            w = vectors / np.sqrt(values) @ vectors.T
            y[:, i:i + 2] = np.einsum("ij,njs->nis", w, xc[:, i:i + 2])
        return y * g + b
    if name == "switchable":
        a, c = (np.exp(t.data) / np.exp(t.data).sum() for t in (layer.mean_weight,
                                                               layer.var_weight))
        axes = [(2,), (1, 2), (0, 2)]
        mean = sum(w * x.mean(k, **kept) for w, k in zip(a, axes))
        var = sum(w * x.var(k, **kept) for w, k in zip(c, axes))
        return (x - mean) / root(var, eps) * g + b
    if name.startswith("frn"):
        learned = np.abs(p.get("learned_eps", 0.0))
        y = x / root((x * x).mean(space, **kept), eps + learned) * g + b
        return np.maximum(y, p["threshold"]) if "threshold" in p else y
    if name == "evonorm b0":
        own = p["v"] * x + root(x.var(space, **kept), eps)
        return x / np.maximum(root(x.var(batch, **kept), eps), own) * g + b
    if name == "evonorm b0 linear":
        return x / root(x.var(batch, **kept), eps) * g + b
    if name == "evonorm s0":
        var = x.reshape(len(x), 2, -1).var(2).repeat(2, 1)[:, :, None]
        return x / (1 + np.exp(-p["v"] * x)) / root(var, eps) * g + b
    assert name == "grn"
    norm = np.sqrt((x * x).sum(space, **kept))
    return g * x * norm / (norm.mean(1, **kept) + eps) + b + x


@every
def test_values_in_training(name):
    layer = make(name)
    for x in (rng.standard_normal((5, C, 6)), 3 * rng.standard_normal((3, C, 1)) + 2):
        np.testing.assert_allclose(run(layer, x), by_formula(name, layer, x), rtol=1e-8, atol=1e-9)


@every
def test_layout_and_dimensions_make_no_difference(name):
    layer, x = make(name), rng.standard_normal((3, C, 2, 5))
    want = run(layer, x.reshape(3, C, 10)).reshape(x.shape)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for form in (x, last, x.reshape(3, C, 1, 2, 5), np.repeat(x, 2, 3)[..., ::2]):
        np.testing.assert_allclose(run(layer, form).reshape(x.shape), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"switchable", "frn", "frn learned eps",
                                                       "grn"}))
def test_without_space(name):
    """(N, C) is (N, C, 1)."""
    layer, x = make(name), rng.standard_normal((6, C))
    np.testing.assert_allclose(run(layer, x), run(layer, x[..., None])[..., 0], rtol=1e-12)


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e3, 1), (1e5, 1), (1e7, 1), (0, 1e-30),
                                               (0, 1e-10), (0, 1e10), (0, 1e30), (0, 3e36)])
@every
def test_float32_is_float64_rounded(name, offset, scale):
    """The offset is that of two channels. dy has a mean: Σ ∂y x of a large offset is no small
    difference of large terms, which no float32 ∂y x could give."""
    x = rng.standard_normal((16, C, 8, 8)) * scale
    x[:, :2] += offset
    x, dy = x.astype(np.float32), (rng.standard_normal(x.shape) + 1).astype(np.float32)
    found = []
    for dtype in (np.float32, np.float64):
        layer, t = make(name, dtype), nbgrad.tensor(x.astype(dtype), requires_grad=True)
        for p, q in zip(layer.parameters(), make(name, np.float32).parameters()):
            p.data[...] = q.data
        y = layer(t)
        dx, *others = nbgrad.grad(y, (t, *layer.parameters()), nbgrad.tensor(dy.astype(dtype)))
        assert y.dtype == dx.dtype == dtype
        found.append((y, dx, *others))
    for i, (a, b) in enumerate(zip(*found)):
        axes = (0, 2, 3) if a.ndim == 4 and "switch" not in name and "grn" not in name else None
        size = np.abs(b.data).max(axes, keepdims=True)
        if a.ndim < 4:                           # of a sum of 1,024 terms: relative to the terms
            size = max(size.max(), np.abs(found[1][0].data * dy).sum() / C)
        bound = (1e-6, 2e-6)[i > 0]
        if name == "lp inf" and i == 1:          # one value's gradient is a sum of 1,024 terms
            bound = 5e-5
        assert (np.abs(a.data - b.data) <= bound * size).all(), (i, np.abs(a.data - b.data) / size)


@pytest.mark.parametrize("value", [0.1, 100.0, 1e7, 1e10])
@pytest.mark.parametrize("name", sorted(n for n in RUNNING if "evo" not in n and n != "switchable"
                                        and "not" not in n))
def test_a_constant_channel_gives_beta(name, value):
    layer, x = make(name, np.float32), rng.standard_normal((8, C, 9)).astype(np.float32)
    x[:, 1] = value
    y = run(layer, x)
    if name != "decorrelated":                   # which mixes it with its neighbour
        np.testing.assert_array_equal(y[:, 1], layer.bias.data[1])
    np.testing.assert_allclose(y[:, 1], layer.bias.data[1], atol=1e-4)


@every
def test_a_bad_value_stays_where_it_is(name):
    """In its channel; in its sample where statistics are of samples; in its group of channels."""
    x = rng.standard_normal((5, C, 6))
    layer = make(name)
    want = run(copy.deepcopy(layer), x)
    x[3, 0, 2] = np.nan
    y = run(layer, x)
    clean = np.ones(x.shape, bool)
    if name in SAMPLEWISE:
        clean[3] = False
    elif name == "decorrelated":
        clean[:, :2] = False
    elif name == "switchable":
        clean[3] = clean[:, 0] = False
    else:
        clean[:, 0] = False
    # whitening takes as many steps as the worst group needs
    rtol = 1e-12 if name == "decorrelated" else 0
    np.testing.assert_allclose(y[clean], want[clean], rtol=rtol)
    assert np.isnan(y[3, 0, 2])


# --------------------------------------------------------------------------------------- identities

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("matrix", [
    [[1, 2], [2, 4]], [[0, 0], [0, 0]], [[-1, 0], [0, -1]], [[3, 0], [0, -1]],
    [[1, 1, 1], [1, 1, 1], [1, 1, 1]]])
def test_what_has_no_inverse_square_root_is_refused(matrix, dtype):
    matrix = np.array(matrix, dtype)
    with pytest.raises(ValueError, match="expected positive definite"):
        ops.inverse_sqrt(nbgrad.tensor(matrix))
    with pytest.raises(ValueError, match="expected positive definite"):        # beside a good one
        ops.inverse_sqrt(nbgrad.tensor(np.stack([np.eye(len(matrix), dtype=dtype), matrix])))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_spoils_no_other(bad):
    both = np.stack([np.diag([4.0, 16.0]), np.diag([bad, 1.0])])
    good, spoiled = ops.inverse_sqrt(nbgrad.tensor(both)).data
    np.testing.assert_allclose(good, np.diag([0.5, 0.25]), rtol=1e-12)
    assert np.isnan(spoiled).all()


def test_channels_that_are_one_channel_are_refused_without_eps():
    x = np.repeat([[1.0], [3.0], [-4.0]], 2, 1)         # whole numbers: the covariance is exact
    with pytest.raises(ValueError, match="positive definite"):
        ops.whiten(nbgrad.tensor(x), 2, 0.0)


def test_whitened_channels_are_uncorrelated():
    x = rng.standard_normal((40, 6, 5))
    x[:, 1] += 0.9 * x[:, 0]
    x[:, 4] = 1e3 * x[:, 4] + x[:, 3]
    x += rng.standard_normal((1, 6, 1)) * 100
    y = run(nn.DecorrelatedBatchNorm(6, group_size=3, eps=0.0, dtype=np.float64), x)
    for group in (y[:, :3], y[:, 3:]):
        flat = group.transpose(1, 0, 2).reshape(3, -1)
        np.testing.assert_allclose(flat @ flat.T / flat.shape[1], np.eye(3), atol=1e-10)
        np.testing.assert_allclose(flat.mean(1), 0, atol=1e-10)


def test_whitening_regularizes_by_eps():
    """W (Σ + eps) Wᵀ = I with a constant channel, one far larger, and two that are equal."""
    x, eps = hard((50, 4, 3)), 1e-5
    x[:, 3], x[:, 0] = x[:, 0], 1e3 * x[:, 0]
    layer = nn.DecorrelatedBatchNorm(4, group_size=4, eps=eps, momentum=1.0, dtype=np.float64)
    layer(nbgrad.tensor(x))
    xc = (x - x.mean((0, 2), keepdims=True)).transpose(1, 0, 2).reshape(4, -1)
    w = layer.running_whitening.data[0]
    whitened = w @ (xc @ xc.T / xc.shape[1] + eps * np.eye(4)) @ w.T
    np.testing.assert_allclose(whitened, np.eye(4), atol=1e-7)        # condition 1e11
    np.testing.assert_allclose(w, w.T, rtol=1e-6, atol=1e-9)


def test_groups_of_one_channel_are_batch_norm():
    x = rng.standard_normal((6, C, 5))
    y = run(nn.DecorrelatedBatchNorm(C, group_size=1, dtype=np.float64), x)
    np.testing.assert_allclose(y, run(nn.BatchNorm1d(C, dtype=np.float64), x), rtol=1e-10)


def test_p_2_is_batch_norm():
    x = rng.standard_normal((6, C, 5)) * 3 + 1
    np.testing.assert_allclose(run(nn.LpBatchNorm(C, p=2, dtype=np.float64), x),
                               run(nn.BatchNorm1d(C, dtype=np.float64), x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("p", "n"), [(1, 4000), (1.5, 4000), (2, 4000), (3, 4000), (6, 4000),
                                      (math.inf, 4000), (1, 40), (math.inf, 40)])
def test_scales_estimate_the_standard_deviation(p, n):
    """Of n normal values; what the mean takes out is 1/(2 n) of it."""
    x = rng.standard_normal((n, 200_000 // n)) * 3
    s = ops.lp_deviation(nbgrad.tensor(x), p, 1e-12)[1].data
    assert s.mean() == pytest.approx(3, rel=0.02)


@pytest.mark.parametrize("k", range(3))
def test_one_weight_of_switchable_is_one_norm(k):
    x = rng.standard_normal((6, C, 5)) * [[[1], [2], [3], [4]]] + 2
    layer = nn.SwitchableNorm(C, dtype=np.float64)
    layer.mean_weight.data[:] = layer.var_weight.data[:] = np.where(np.arange(3) == k, 0, -800)
    axes = [(2,), (1, 2), (0, 2)][k]
    want = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    np.testing.assert_allclose(run(layer, x), want, rtol=1e-10, atol=1e-12)


def test_grn_starts_as_the_identity_and_frn_forgets_scale():
    x = rng.standard_normal((3, C, 6))
    np.testing.assert_array_equal(run(nn.GlobalResponseNorm(C, dtype=np.float64), x), x)
    layer = make("frn")
    layer.eps = 0.0
    np.testing.assert_allclose(run(layer, x * 1e5), run(layer, x), rtol=1e-12)


def test_noise_is_new_in_every_step_and_of_the_size_it_says():
    x = nbgrad.tensor(rng.standard_normal((4000, C)))
    layer = nn.NoisyBatchNorm(C, generator=nbgrad.Generator(0), mean_jitter=0.1, scale_jitter=0.05,
                              dtype=np.float64)
    clean, noise = nn.BatchNorm1d(C, dtype=np.float64)(x).data, []
    for _ in range(60):
        design = np.stack([clean, np.ones_like(clean)], -1)            # y = s clean + m
        fitted = [np.linalg.lstsq(design[:, c], y, rcond=None)[0]
                  for c, y in enumerate(layer(x).data.T)]
        noise.append(fitted)
    s, m = np.moveaxis(np.array(noise), -1, 0)
    assert (s > 0.98).all()
    assert (s < 1.27).all()
    assert (np.abs(m) < 0.52).all()
    assert s.std() == pytest.approx(0.25 / math.sqrt(12), rel=0.15)
    assert m.std() == pytest.approx(1 / math.sqrt(12), rel=0.15)
    y = layer(x).data
    rest = y - clean * s[-1]                       # samples of a channel differ, too
    assert rest.std(0).min() > 0.05
    np.testing.assert_array_equal(layer.eval()(x).data.shape, x.shape)
    quiet = nn.NoisyBatchNorm(C, mean_range=0, scale_range=1, mean_jitter=0, scale_jitter=0,
                              dtype=np.float64)
    np.testing.assert_array_equal(quiet(x).data, clean)


def test_noise_is_that_of_the_seed_and_none_in_evaluation():
    x = nbgrad.tensor(rng.standard_normal((6, C)).astype(np.float32))
    a, b = (nn.NoisyBatchNorm(C, generator=nbgrad.Generator(7)) for _ in range(2))
    np.testing.assert_array_equal(a(x).data, b(x).data)
    assert not np.array_equal(a(x).data, a(x).data)
    plain = nn.BatchNorm1d(C)
    plain.load_state_dict(a.state_dict())
    np.testing.assert_array_equal(a.eval()(x).data, plain.eval()(x).data)


# ------------------------------------------------------------------------------ running statistics

def found(name, layer, x):
    """The statistics of a batch that running ones move towards."""
    flat = x.transpose(1, 0, 2).reshape(C, -1)
    mean, xc = flat.mean(1), flat - flat.mean(1, keepdims=True)
    if name.startswith("lp"):
        y = by_formula(name, layer, x)
        s = (xc / ((y - layer.bias.data[:, None]).transpose(1, 0, 2).reshape(C, -1)
                   / layer.weight.data[:, None]))[:, 0]
        return {"running_mean": mean, "running_scale": s}
    if name == "mean only":
        return {"running_mean": mean}
    if name == "decorrelated":
        w = [np.linalg.inv(_sqrt(a @ a.T / a.shape[1] + layer.eps * np.eye(2)))
             for a in (xc[:2], xc[2:])]
        return {"running_mean": mean, "running_whitening": np.array(w)}
    if name == "switchable":
        return {"running_mean": mean, "running_var": flat.var(1, ddof=1)}
    return {"running_var": flat.var(1, ddof=1)}


def _sqrt(a):
    values, vectors = np.linalg.eigh(a)
    return vectors * np.sqrt(values) @ vectors.T


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", RUNNING)
def test_running_statistics_move_in_training_only(name, momentum):
    layer = make(name)
    layer.momentum = momentum
    layer.reset_running_stats()
    want = {n: b.data.copy() for n, b in layer.named_buffers() if n != "num_batches_tracked"}
    for t in range(1, 4):
        x, m = rng.standard_normal((5, C, 6)) * t + t, 1 / t if momentum is None else momentum
        layer(nbgrad.tensor(x))
        for n, new in found(name, layer, x).items():
            want[n] = (1 - m) * want[n] + m * new
    layer.eval()(nbgrad.tensor(x))
    for n, value in want.items():
        np.testing.assert_allclose(getattr(layer, n).data, value, rtol=1e-8, atol=1e-10)
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("name", RUNNING)
def test_evaluation_is_of_the_running_statistics(name):
    """With momentum 1 they are the batch's: evaluation of that batch is what training said, but for
    the correction of the variance."""
    layer, x = make(name), rng.standard_normal((5, C, 6)) * 2 + 1
    layer.momentum = 1.0
    y = run(layer, x)
    if hasattr(layer, "running_var"):
        layer.running_var.data *= (5 * 6 - 1) / (5 * 6)
    np.testing.assert_allclose(run(layer.eval(), x), y, rtol=1e-9, atol=1e-10)
    half = run(layer, x[2:3])                        # of one sample alone, the same
    np.testing.assert_allclose(half, y[2:3], rtol=1e-9, atol=1e-10)


@every
def test_state_round_trip(name):
    layer, other, x = make(name), LAYERS[name](dtype=np.float64), rng.standard_normal((5, C, 6))
    layer(nbgrad.tensor(x))
    state = {key: t.data.copy() for key, t in layer.state_dict().items()}
    other.load_state_dict(state)
    np.testing.assert_array_equal(run(other.eval(), x), run(layer.eval(), x))
    other.reset_parameters()
    fresh = LAYERS[name](dtype=np.float64).state_dict()
    for key, t in other.state_dict().items():
        np.testing.assert_array_equal(t.data, fresh[key].data)
    assert copy.deepcopy(layer).state_dict().keys() == state.keys()


@every
def test_parameters_are_not_decayed(name):
    groups = nbgrad.optim.param_groups(LAYERS[name](), 0.1)
    assert [g["weight_decay"] for g in groups] == [0.0]


@every
def test_nothing_of_no_samples(name):
    layer = make(name)
    before = {n: b.data.copy() for n, b in layer.named_buffers()}
    x = nbgrad.tensor(np.zeros((0, C, 3)), requires_grad=True)
    y = layer(x)
    assert y.shape == (0, C, 3)
    assert nbgrad.grad(y.sum(), x)[0].shape == x.shape
    for n, b in layer.named_buffers():
        if n != "num_batches_tracked":
            np.testing.assert_array_equal(b.data, before[n])


OTHERS = {
    "batch": lambda **k: nn.BatchNorm(C, **k), "noisy": lambda **k: nn.NoisyBatchNorm(C, **k),
    "split": lambda **k: nn.SplitBatchNorm(C, **k), "renorm": lambda **k: nn.BatchRenorm(C, **k),
    "ghost": lambda **k: nn.GhostBatchNorm(C, ghost_size=2, **k),
    "group": lambda **k: nn.GroupNorm(2, C, **k),
    "instance": lambda **k: nn.InstanceNorm1d(C, affine=True, **k),
}


@pytest.mark.parametrize("shape", [(0, C, 3), (2, C, 0)])
@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_parameters_have_no_gradient_of_no_values(name, shape):
    """At both orders: zeros, which an optimizer can take, and no NaN from means of nothing."""
    layer = {**LAYERS, **OTHERS}[name](dtype=np.float64)
    x = nbgrad.tensor(np.zeros(shape), requires_grad=True)
    leaves = [x, *layer.parameters()]
    found = nbgrad.autograd.grad((layer(x) ** 2).sum(), leaves, create_graph=True,
                                 allow_unused=True)
    slopes = [(g * g).sum() for g in found if g is not None and g.requires_grad]
    if slopes:
        found += nbgrad.autograd.grad(slopes, leaves, allow_unused=True)
    for g in found:
        assert g is None or not g.detach().numpy().any()


# ------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("name", RUNNING)
def test_one_value_per_channel_is_refused_in_training(name):
    layer = make(name)
    before = [b.data.copy() for b in layer.buffers()]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(nbgrad.tensor(np.zeros((1, C, 1))))
    for b, old in zip(layer.buffers(), before):
        np.testing.assert_array_equal(b.data, old)
    assert layer.eval()(nbgrad.tensor(np.zeros((1, C, 1)))).shape == (1, C, 1)


@every
def test_wrong_inputs_are_refused(name):
    layer = make(name)
    for x in (np.zeros((2, C + 1, 3)), np.zeros(C), np.zeros((2, C, 3), np.int64)):
        with pytest.raises(ValueError, match=type(layer).__name__):
            layer(nbgrad.tensor(x))
    with pytest.raises(TypeError, match="expected a Tensor"):
        layer(np.zeros((2, C, 3)))


@pytest.mark.parametrize(("build", "said"), [
    (lambda: nn.LpBatchNorm(4, p=0.5), "p must be at least 1, or inf, got 0.5"),
    (lambda: nn.LpBatchNorm(4, p=2, eps=0.0), "eps must be positive"),
    (lambda: nn.LpBatchNorm(4, momentum=1.5), "momentum must be from 0 to 1"),
    (lambda: nn.LpBatchNorm(-1), "num_features must be"),
    (lambda: nn.MeanOnlyBatchNorm(2.5), "num_features must be"),
    (lambda: nn.DecorrelatedBatchNorm(6, group_size=4),
     "group_size must divide the 6 channels, got 4"),
    (lambda: nn.DecorrelatedBatchNorm(6, eps=-1), "eps must not be negative"),
    (lambda: nn.NoisyBatchNorm(4, mean_range=-1), "mean_range must be finite and at least 0"),
    (lambda: nn.NoisyBatchNorm(4, mean_range=math.inf), "mean_range must be finite"),
    (lambda: nn.NoisyBatchNorm(4, scale_range=0.5), "scale_range must be finite and at least 1"),
    (lambda: nn.NoisyBatchNorm(4, mean_jitter=None), "mean_jitter must be finite .*, got None"),
    (lambda: nn.BatchRenorm(4, r_max=None), "r_max of at least 1 .*, got None"),
    (lambda: nn.BatchRenorm(4, d_max="5"), "d_max of at least 0, got 3.0 and '5'"),
    (lambda: nn.LpBatchNorm(4, None), "eps must be positive, got None"),
    (lambda: nn.DecorrelatedBatchNorm(None), "num_features must be an int of at least 0, got None"),
    (lambda: nn.EvoNormS0(4, groups=3), "groups must divide the 4 channels"),
    (lambda: nn.FilterResponseNorm(4, eps=math.nan), "eps must not be negative"),
    (lambda: ops.whiten(nbgrad.zeros(4, 6), 4), "group_size must divide"),
    (lambda: ops.whiten(nbgrad.zeros(4, 6), 3, -1.0), "eps must not be"),
    (lambda: ops.inverse_sqrt(nbgrad.zeros(4, 6)), "square matrices"),
    (lambda: ops.evonorm_s0(nbgrad.zeros(4, 6), 4), "groups must divide"),
    (lambda: ops.lp_deviation(nbgrad.zeros(4, 6), -1), "p must be at least 1"),
    (lambda: ops.filter_response_norm(nbgrad.zeros(4, 6)), "at least one S"),
    (lambda: ops.switchable_norm(nbgrad.zeros(4, 6, 2), nbgrad.zeros(2), nbgrad.zeros(3)),
     "of instance, layer and batch"),
    (lambda: ops.filter_response_norm(nbgrad.zeros(4, 6, 2), nbgrad.zeros(5)), "one value per"),
])
def test_bad_arguments_are_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()


X = nbgrad.ones(3, 4)
BESIDE_X = [                                     # what a kernel would read behind the end of
    (lambda: ops.center(X, nbgrad.ones(1)), ValueError, "center: expected parameters of shape (4"),
    (lambda: ops.center(X, nbgrad.ones(4).double()), ValueError, "center: expected parameters"),
    (lambda: ops.divide_channels(X, nbgrad.ones(1, 1)), ValueError, "divide_channels: expected"),
    (lambda: ops.divide_channels(X, nbgrad.ones(1, 4), nbgrad.ones(4)), ValueError, "(1, 4)"),
    (lambda: ops.divide_channels(X, None), TypeError, "expected s to be a Tensor, got NoneType"),
    (lambda: ops.channel_sums(X, X, nbgrad.ones(1, 3)), ValueError, "shape (1, 4)"),
    (lambda: ops.channel_sums(X, nbgrad.ones(2, 4), nbgrad.ones(1, 4)), ValueError, "(2, 4)"),
    (lambda: ops.channel_dot(X, nbgrad.ones(3, 3)), ValueError, "of one shape and dtype"),
    (lambda: ops.channel_dot(X, X.double()), ValueError, "float32 and float64"),
    (lambda: ops.at_least(X, nbgrad.ones(3, 1)), ValueError, "at_least: expected parameters"),
    (lambda: ops.at_least(X, None), TypeError, "expected t to be a Tensor"),
    (lambda: ops.channel_std(nbgrad.ones(3)), ValueError, "channel_std: expected a floating (N, C"),
    (lambda: ops.channel_rms(X > 0), ValueError, "channel_rms: expected a floating (N, C"),
    (lambda: ops.channel_rms(X, eps=-1.0), ValueError, "channel_rms: eps must not be negative"),
    (lambda: ops.channel_size(nbgrad.tensor([[1, 2]])), ValueError, "channel_size: expected a fl"),
    (lambda: ops.batch_norm(X, None, None, training=True, moments=ops.moments(X[:, :3])),
     ValueError, "batch_norm: expected moments of shape (4,)"),
    (lambda: ops.batch_norm(X, None, None, training=True, moments=3.0), TypeError,
     "batch_norm: expected moments to be Moments, got float"),
    (lambda: ops.linear_batch_norm(X, "w", None, None, None), TypeError, "linear_batch_norm"),
    (lambda: ops.linear_batch_norm(X, nbgrad.ones(2, 4), "b", None, None), TypeError,
     "linear_batch_norm"),
    (lambda: ops.linear_batch_norm(1.0, nbgrad.ones(2, 4), None, None, None), ValueError,
     "expected x of shape (N, K), got ()"),
    (lambda: ops.norm("x"), TypeError, "norm"),
    (lambda: ops.local_response_norm(nbgrad.ones(1, 2, 3), 2, k=[]), TypeError,
     "local_response_norm: expected k to be a number, got list"),
    (lambda: ops.normalize(X, eps=[]), TypeError, "normalize: expected eps to be a number, got l"),
    (lambda: nn.DecorrelatedBatchNorm(0, group_size=10**9), ValueError, "must divide the 0"),
    (lambda: nn.DecorrelatedBatchNorm(4.0, group_size=2), ValueError, "num_features must be"),
]


@pytest.mark.parametrize(("call", "error", "said"), BESIDE_X)
def test_what_does_not_fit_x_never_reaches_a_kernel(call, error, said):
    with pytest.raises(error, match=re.escape(said)):
        call()


def test_numbers_of_groups_may_be_numpys():
    x, two = nbgrad.randn(6, 4, 3), np.int64(2)
    for make in (lambda n: nn.EvoNormS0(4, groups=n), lambda n: nn.GroupNorm(n, 4),
                 lambda n: nn.DecorrelatedBatchNorm(4, group_size=n),
                 lambda n: nn.SplitBatchNorm(4, num_splits=n),
                 lambda n: nn.GhostBatchNorm(4, ghost_size=n)):
        np.testing.assert_array_equal(make(two)(x).data, make(2)(x).data)


@pytest.mark.parametrize("word", ["momemtum", "tracked", "running_mean"])
@pytest.mark.parametrize("name", [*LAYERS, "instance"])
def test_words_that_no_layer_knows_are_refused(name, word):
    build = LAYERS.get(name, lambda **k: nn.InstanceNorm1d(C, **k))
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{word}'"):
        build(**{word: 0.5})


def test_parameters_of_another_dtype_are_refused():
    for name in LAYERS:
        with pytest.raises(ValueError, match="and float32"):
            LAYERS[name](dtype=np.float64)(nbgrad.zeros(3, C, 2))


def test_any_input_gives_a_result_or_says_why():
    """Shapes of 0 to 5 dimensions and 0 to 4 elements each, scales of 1e±30, NaN and infinity."""
    g, results = np.random.default_rng(1), 0
    for _ in range(600):
        layer = LAYERS[g.choice(sorted(LAYERS))](dtype=np.float32).train(bool(g.integers(2)))
        shape = list(g.integers(0, 5, g.integers(0, 6)))
        shape[1:2] = [C] if len(shape) > 1 and g.integers(8) else shape[1:2]
        x = (g.standard_normal(shape) * 10.0 ** g.integers(-30, 30)).astype(np.float32)
        if x.size and not g.integers(4):
            x.flat[g.integers(x.size)] = g.choice([np.nan, np.inf, 0])
        x = nbgrad.tensor(x, requires_grad=True)
        try:
            y = layer(x)
        except ValueError as e:
            assert str(e).startswith(type(layer).__name__) or "(N, C, *S)" in str(e)  # noqa: PT017
            continue
        assert y.shape == x.shape
        assert nbgrad.grad(y.sum(), x)[0].shape == x.shape
        results += 1
    assert results > 200


def test_group_size_by_default_divides():
    assert [nn.DecorrelatedBatchNorm(c).group_size for c in (3, 16, 24, 64, 17)] == [3, 16, 12, 16,
                                                                                     1]
    assert nn.DecorrelatedBatchNorm(0)(nbgrad.zeros(3, 0)).shape == (3, 0)


def test_tlu():
    layer, x = nn.TLU(2, dtype=np.float64), rng.standard_normal((3, 2, 4))
    layer.threshold.data[:] = [0.5, -0.5]
    np.testing.assert_array_equal(run(layer, x), np.maximum(x, [[[0.5], [-0.5]]]))
    gradcheck(layer, nbgrad.tensor(x, requires_grad=True))
    with pytest.raises(ValueError, match="TLU: expected parameters"):
        layer(nbgrad.zeros(2, 3))


@every
def test_it_trains(name):
    """A layer between two linear ones lowers a loss."""
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, C, 3), LAYERS[name](), nn.Flatten(), nn.Linear(C * 16, 1))
    x, t = nbgrad.randn(32, 1, 6, 6), nbgrad.randn(32, 1)
    optimizer, losses = nbgrad.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("call", [
    lambda x, w, eps: ops.evonorm_b0(x, None, None, w, nbgrad.ones(1, 4, 1), eps),
    lambda x, w, eps: ops.evonorm_s0(x, 2, eps=eps),
    lambda x, w, eps: ops.global_response_norm(x, w, w, eps),
    lambda x, w, eps: ops.switchable_norm(x, w[:3], w[:3], eps=eps)])
@pytest.mark.parametrize("eps", [-1.0, float("nan"), None, "1"])
def test_a_negative_eps_is_refused(call, eps):
    with pytest.raises(ValueError, match="eps must not be negative, got"):
        call(nbgrad.randn(2, 4, 3), nbgrad.ones(4), eps)


def switched(x, weight=None, batch=None):
    weight = nbgrad.ones(3) if weight is None else weight
    return ops.switchable_norm(x, weight, weight, batch=batch)


@pytest.mark.parametrize(("call", "error", "said"), [
    (lambda x: ops.evonorm_b0(x, None, None, None, None), TypeError, "expected std to be a Tensor"),
    (lambda x: ops.evonorm_b0(x, None, None, None, nbgrad.ones(4)), ValueError, "std of shape"),
    (lambda x: ops.switchable_norm(x, None, nbgrad.ones(3)), TypeError, "expected mean_weight to"),
    (lambda x: ops.switchable_norm(x, nbgrad.ones(3), 2.0), TypeError, "expected var_weight to be"),
    (lambda x: switched(x, nbgrad.ones(3, dtype=np.int64)), ValueError, "floating weights"),
    (lambda x: switched(x, batch=nbgrad.ones(1, 4, 1)), TypeError, "a mean and a variance"),
    (lambda x: switched(x, batch=(None, nbgrad.ones(1, 4, 1))), TypeError, "batch's mean to be a"),
    (lambda x: switched(x, batch=(nbgrad.ones(1, 4, 1), nbgrad.ones(4))), ValueError, "variance"),
    (lambda x: switched(x, batch=(nbgrad.ones(1, 4, 1, dtype=np.float64), nbgrad.ones(1, 4, 1))),
     ValueError, "batch's mean of shape .* and float32"),
    (lambda x: ops.weight_norm(x, None), TypeError, "expected g to be a Tensor, got NoneType"),
    (lambda x: ops.weight_norm(None, x), TypeError, "expected v to be a Tensor, got NoneType"),
    (lambda x: ops.weight_norm(x, nbgrad.ones(2, 1, 1, dtype=np.float64)), TypeError, "one float"),
    (lambda x: ops.inverse_sqrt(None), TypeError, "expected matrix to be a Tensor, got NoneType")])
def test_what_is_no_tensor_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call(nbgrad.randn(2, 4, 3))


# --------------------------------------------------------------------- what every layer looks like

PYTORCHS = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "GroupNorm",
            "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "RMSNorm", "LocalResponseNorm"}
KINDS = [getattr(nn, name) for name in (*sorted(PYTORCHS), "BatchRenorm", "DecorrelatedBatchNorm",
                                        "EvoNormB0", "EvoNormS0", "FilterResponseNorm",
                                        "FrozenBatchNorm", "GhostBatchNorm", "GlobalResponseNorm",
                                        "LpBatchNorm", "MeanOnlyBatchNorm", "NoisyBatchNorm",
                                        "SplitBatchNorm", "SwitchableNorm", "TLU")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_docstring_has_equation_shapes_what_is_kept_and_source(kind):
    text = kind.__doc__
    assert re.match(r"y(_i)? = |Batch norm, and", text)           # noise is added to a batch norm
    assert re.search(r"x: \(", text)
    assert re.search(r"\bKeeps\b", text)
    assert re.search(r"\b(19|20)\d\d\b", text)


FUNCTIONS = [ops.batch_norm, ops.weighted_batch_norm, ops.ghost_batch_norm, ops.layer_norm,
             ops.group_norm, ops.instance_norm, ops.rms_norm, ops.local_response_norm,
             ops.normalize, ops.filter_response_norm, ops.evonorm_b0, ops.evonorm_s0,
             ops.global_response_norm, ops.switchable_norm, ops.whiten, ops.inverse_sqrt,
             ops.lp_batch_norm, ops.lp_deviation, ops.weight_norm, ops.weight_standardization,
             weight_norm, spectral_norm, weight_standardization]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_each_function_has_equation_shapes_what_is_kept_and_source(function):
    text = function.__doc__
    assert re.search(r"\b[ysw] = |ŵ = |A\^\(−1/2\)", text)
    assert re.search(r"\b[xvw](, y)?: |matri|``dim``", text)
    assert re.search(r"\bKeeps\b|; keeps x", text)
    if function is not ops.normalize:                 # which nobody claims
        assert re.search(r"\b(19|20)\d\d\b", text)


NAMES = ["batch", "ghost", "split", "sync", "renorm", "frozen", "noisy", "lp", "decorrelated",
         "switchable", "evonorm_b0", "evonorm_s0", "filter_response", "layer", "group", "instance",
         "rms", "mean_only"]


@pytest.mark.parametrize("size", [None, (3, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_gamma_and_beta_are_left_out_by_the_same_words(name, size):
    if name == "rms" and size is None:
        return
    words = [] if name == "mean_only" else ["affine"]             # which has beta alone
    for word in words + ["bias"] * (name != "rms"):
        layer = nn.create_norm(name, 8, size=size, **{word: False})
        assert getattr(layer, "bias", None) is None
        assert (layer.weight is None) == (word == "affine" or name == "mean_only")
        assert layer(nbgrad.randn(4, 8, 3, 3)).shape == (4, 8, 3, 3)


@pytest.mark.parametrize("build", [nn.EvoNormS0, nn.FilterResponseNorm])
def test_no_beta_is_a_beta_of_zero(build):
    settings = {"groups": 2} if build is nn.EvoNormS0 else {}
    x = rng.standard_normal((4, 6, 5))
    with_beta, without = (build(6, bias=b, dtype=np.float64, **settings) for b in (True, False))
    np.testing.assert_array_equal(run(with_beta, x), run(without, x))
    assert list(without.state_dict()) == [n for n in with_beta.state_dict() if n != "bias"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_signature_is_channels_eps_momentum_and_then_keywords(kind):
    """PyTorch's where it has the layer; what a layer does not have is left out."""
    parameters = inspect.signature(kind).parameters.values()
    order = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if kind.__name__ in PYTORCHS:
        torch = pytest.importorskip("torch")
        theirs = list(inspect.signature(getattr(torch.nn, kind.__name__)).parameters)
        theirs = ["workers" if name == "process_group" else name for name in theirs]
        assert order == theirs[:len(order)]
        return
    assert order == [name for name in ("num_features", "eps", "momentum") if name in order]
    assert order[0] == "num_features"
    assert all(p.kind is not p.VAR_POSITIONAL for p in parameters)
