"""Batch norms with other statistics: ghosts, splits, workers, renormalized, frozen."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, ops
from nbgrad.testing import gradcheck

rng = np.random.default_rng(23)
SHAPES = [(8, 3), (8, 3, 5), (8, 3, 2, 3), (8, 3, 2, 1, 2)]


def random_affine(layer):
    for p in (layer.weight, layer.bias):
        p.data[...] = rng.standard_normal(p.shape)
    return layer


def plain(layer, x):
    return ops.batch_norm(x, None, None, layer.weight, layer.bias, True, eps=layer.eps)


def double(*shape, grad=False):
    return nbgrad.tensor(rng.standard_normal(shape), requires_grad=grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 3, 8, 50])
def test_each_ghost_is_a_batch_of_its_own(shape, size):
    layer = random_affine(nn.GhostBatchNorm(3, ghost_size=size, dtype=np.float64))
    x = double(*shape, grad=True)
    y = layer(x)
    parts = [plain(layer, x[i:i + size]) for i in range(0, 8, size)]
    want = ops.cat(parts)
    np.testing.assert_allclose(y.data, want.data, rtol=1e-12, atol=1e-13)
    dy = double(*shape)
    inputs = x, layer.weight, layer.bias
    for a, b in zip(nbgrad.grad(y, inputs, dy), nbgrad.grad(want, inputs, dy)):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-9, atol=1e-11)
    axes = (0, *range(2, x.ndim))
    np.testing.assert_allclose(layer.running_mean.data, 0.1 * x.data.mean(axes), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var.data, 0.9 + 0.1 * x.data.var(axes, ddof=1))
    whole = nn.BatchNorm(3, dtype=np.float64)
    whole.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(layer.eval()(x).data, whole.eval()(x).data)


def test_ghosts_of_one_value_and_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.GhostBatchNorm(3, ghost_size=1)(nbgrad.randn(4, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.GhostBatchNorm(3, ghost_size=2)(nbgrad.randn(5, 3))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        nn.GhostBatchNorm(3, ghost_size=0)


def test_splits_train_norms_of_their_own_and_evaluate_by_the_first():
    layer = nn.SplitBatchNorm(3, num_splits=2, dtype=np.float64)
    for bn in (layer, *layer.aux_bn):
        random_affine(bn)
    x = double(6, 3, 2)
    y = layer(x)
    for part, bn, got in zip((x[:3], x[3:]), (layer, layer.aux_bn[0]), (y[:3], y[3:])):
        np.testing.assert_allclose(got.data, plain(bn, part).data, rtol=1e-12)
        np.testing.assert_allclose(bn.running_mean.data, 0.1 * part.data.mean((0, 2)))
    alone = nn.BatchNorm1d(3, dtype=np.float64)
    alone.load_state_dict(layer.state_dict(), strict=False)
    np.testing.assert_array_equal(layer.eval()(x).data, alone.eval()(x).data)
    with pytest.raises(ValueError, match="2 equal parts"):
        layer.train()(double(5, 3))


def test_renorm_is_batch_norm_at_limits_1_and_0_and_evaluation_within_wide_ones():
    x = double(8, 3, 2)
    layer = random_affine(nn.BatchRenorm(3, r_max=1.0, d_max=0.0, dtype=np.float64))
    layer.running_mean.data[:], layer.running_var.data[:] = [0.1, -0.2, 0.3], [0.5, 1.5, 2.0]
    wide = copy.deepcopy(layer)
    wide.r_max, wide.d_max = 1e9, 1e9
    want = plain(layer, x)
    np.testing.assert_allclose(layer(x).data, want.data, rtol=1e-12, atol=1e-13)
    evaluated = copy.deepcopy(wide).eval()(x)
    np.testing.assert_allclose(wide(x).data, evaluated.data, rtol=1e-9, atol=1e-10)


def test_renorm_clips_each_channel_by_hand():
    layer = nn.BatchRenorm(2, r_max=1.5, d_max=0.5, dtype=np.float64)
    x = double(50, 2) * nbgrad.tensor(np.array([10.0, 0.1])) + 4.0
    mean, std = x.data.mean(0), np.sqrt(x.data.var(0) + 1e-3)
    r, d = std / np.sqrt(1 + 1e-3), mean / np.sqrt(1 + 1e-3)
    assert r[0] > 1.5
    assert r[1] < 1 / 1.5
    assert (d > 0.5).all()
    want = (x.data - mean) / std * [1.5, 1 / 1.5] + 0.5
    np.testing.assert_allclose(layer(x).data, want, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.running_mean.data, 0.01 * mean)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.5, 0.5), (1e9, 1e9)])
@pytest.mark.parametrize("gamma", [0.0, 1.3])
def test_gradients_of_renorm_to_third_order(limits, gamma):
    """r and d are constants of the gradient, so finite differences move x with r and d held."""
    layer = nn.BatchRenorm(2, r_max=limits[0], d_max=limits[1], dtype=np.float64)
    layer.running_mean.data[:], layer.running_var.data[:] = [0.4, -1], [0.3, 2.5]
    layer.weight.data[:] = gamma
    x = double(5, 2, 2, grad=True)
    r, d = layer._limits(ops.moments(x))
    layer._limits = lambda found: (r, d)

    def f(x, gamma, beta):
        return ops.weighted_batch_norm(x, gamma * r, beta + gamma * d, layer.eps)[0]
    assert gradcheck(f, (x, double(2, grad=True), double(2, grad=True)), order=3)
    y = layer(x)
    want = ops.weighted_batch_norm(x, layer.weight * r, layer.bias + layer.weight * d, layer.eps)[0]
    np.testing.assert_array_equal(y.data, want.data)


def test_frozen_uses_and_keeps_what_it_was_given():
    layer = nn.FrozenBatchNorm(3, dtype=np.float64)
    source = random_affine(nn.BatchNorm2d(3, dtype=np.float64))
    source(double(4, 3, 2, 2))
    layer.load_state_dict(source.state_dict())
    x = double(2, 3, 2, 2, grad=True)
    y = layer.train()(x)
    np.testing.assert_array_equal(y.data, source.eval()(x).data)
    assert layer.running_mean.tolist() == source.running_mean.tolist()
    assert [p.requires_grad for p in layer.parameters()] == [False, False]
    y.sum().backward()
    scale = layer.weight.data / np.sqrt(layer.running_var.data + 1e-5)
    np.testing.assert_allclose(x.grad.data, np.broadcast_to(scale.reshape(3, 1, 1), x.shape))


def test_sync_layers_share_statistics_and_parameters_gradients_add_up():
    x, dy = rng.standard_normal((2, 7, 3, 2))
    whole = random_affine(nn.BatchNorm1d(3, dtype=np.float64))
    start, t = whole.state_dict(), nbgrad.tensor(x, requires_grad=True)
    start = {k: nbgrad.tensor(v.data.copy()) for k, v in start.items()}
    whole(t).backward(nbgrad.tensor(dy))
    group, cuts = nn.InProcess(3), [0, 2]

    def work(worker):
        i, layer = worker.number, nn.SyncBatchNorm(3, workers=worker, dtype=np.float64)
        layer.load_state_dict(start)
        part = nbgrad.tensor(np.split(x, cuts)[i], requires_grad=True)
        layer(part).backward(nbgrad.tensor(np.split(dy, cuts)[i]))
        return layer, part.grad.data
    found = group.run(work)
    np.testing.assert_allclose(np.concatenate([dx for _, dx in found]), t.grad.data, rtol=1e-9,
                               atol=1e-12)
    for layer, _ in found:
        np.testing.assert_allclose(layer.running_var.data, whole.running_var.data, rtol=1e-12)
    for name in ("weight", "bias"):
        added = sum(getattr(layer, name).grad.data for layer, _ in found)
        np.testing.assert_allclose(added, getattr(whole, name).grad.data, rtol=1e-9, atol=1e-12)


def test_the_parts_of_a_split_are_those_of_all_workers():
    """Two workers have halves of each part; one layer with the whole batch says what is right."""
    x, dy = rng.standard_normal((2, 8, 3, 2))
    whole, t = nn.SplitBatchNorm(3, dtype=np.float64), nbgrad.tensor(x, requires_grad=True)
    y = whole(t)
    y.backward(nbgrad.tensor(dy))
    group, own = nn.InProcess(2, timeout=60), ([0, 1, 4, 5], [2, 3, 6, 7])

    def work(worker):
        layer, part = nn.SplitBatchNorm(3, dtype=np.float64), own[worker.number]
        for each in (layer, *layer.aux_bn):
            each.workers = worker
        t = nbgrad.tensor(x[part], requires_grad=True)
        y = layer(t)
        y.backward(nbgrad.tensor(dy[part]))
        return layer, y.data, t.grad.data
    for part, (layer, got, dx) in zip(own, group.run(work)):
        np.testing.assert_allclose(got, y.data[part], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(dx, t.grad.data[part], rtol=1e-9, atol=1e-12)
        for name, value in whole.state_dict().items():
            np.testing.assert_allclose(layer.state_dict()[name].data, value.data, rtol=1e-12)


def test_the_mean_alone_does_not_need_beta_again():
    layer, x = nn.MeanOnlyBatchNorm(3), nbgrad.randn(5, 3, requires_grad=True)
    y = layer(x)
    with nbgrad.no_grad():
        layer.bias.add_(1)
    y.backward(nbgrad.ones(5, 3))
    assert layer.bias.grad.tolist() == [5, 5, 5]
    np.testing.assert_allclose(x.grad.data, 0, atol=1e-7)


@pytest.mark.parametrize("make", [lambda: nn.GhostBatchNorm(3, ghost_size=4),
                                  lambda: nn.SplitBatchNorm(3), lambda: nn.BatchRenorm(3),
                                  lambda: nn.FrozenBatchNorm(3),
                                  lambda: nn.SyncBatchNorm(3)])
def test_residual_and_activation_are_what_follows(make):
    layer, x, r = make(), nbgrad.randn(8, 3, 4), nbgrad.randn(8, 3, 4)
    again = copy.deepcopy(layer)
    got = layer(x, residual=r, activation="relu")
    np.testing.assert_allclose(got.data, ops.relu(again(x) + r).data, rtol=1e-6, atol=1e-6)
    model = nn.Sequential(nn.Linear(3, 3), make(), nn.ReLU())
    assert model(nbgrad.randn(8, 3)).data.min() == 0
    assert type(layer).__name__ in repr(layer)


# ------------------------------------------------------------------------ what is refused, and when

class Alone:
    def merge(self, own):
        return own

    def sum(self, *own):
        return own


BARE = [lambda: nn.BatchNorm1d(4, affine=False, correction=0),
        lambda: nn.GhostBatchNorm(4, ghost_size=2, affine=False),
        lambda: nn.SplitBatchNorm(4, affine=False),
        lambda: nn.BatchRenorm(4, affine=False), lambda: nn.BatchRenorm(4),
        lambda: nn.SyncBatchNorm(4, affine=False, workers=Alone()),
        lambda: nn.BatchNorm1d(4, affine=False, statistics="running"),
        lambda: nn.BatchNorm1d(4, affine=False, statistics="prediction")]


@pytest.mark.parametrize("build", BARE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), [((6, 1), np.float32), ((6, 5), np.float32),
                                          ((6, 4), np.float64)])
def test_other_channels_and_dtypes_are_refused_without_gamma(build, training, shape, dtype):
    layer = build().train(training)
    with pytest.raises(ValueError, match=r"batch_norm: .*running_mean"):
        layer(nbgrad.tensor(rng.standard_normal(shape).astype(dtype)))
    assert not layer.running_mean.data.any()
    assert layer.num_batches_tracked.item() == 0


def test_other_channels_are_refused_with_a_mask():
    layer = nn.BatchNorm1d(4, affine=False)
    with pytest.raises(ValueError, match="should contain 1 elements"):
        layer(nbgrad.randn(6, 1), mask=np.ones(6))


@pytest.mark.parametrize("build", [lambda: nn.BatchNorm1d(3, statistics="running"),
                                   lambda: nn.BatchNorm1d(3, correction=0),
                                   lambda: nn.SplitBatchNorm(3, num_splits=2),
                                   lambda: nn.BatchRenorm(3),
                                   lambda: nn.GhostBatchNorm(3, ghost_size=2)])
@pytest.mark.parametrize(("wrong", "error"), [({"residual": nbgrad.zeros(4, 2)}, ValueError),
                                          ({"residual": 1.0}, TypeError),
                                          ({"activation": "tanh"}, ValueError)])
def test_nothing_moves_before_an_error(build, wrong, error):
    layer = build()
    with pytest.raises(error, match="batch_norm: expected"):
        layer(nbgrad.randn(4, 3) + 5, **wrong)
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value.data, build().state_dict()[key].data)


@pytest.mark.parametrize("build", [lambda: nn.BatchNorm1d(2, momentum=None),
                                   lambda: nn.BatchNorm1d(2, momentum=None, correction=0),
                                   lambda: nn.MeanOnlyBatchNorm(2, momentum=None)])
def test_an_empty_batch_does_not_count(build):
    layer, x = build(), nbgrad.randn(50, 2) + 10
    layer(x[:0])
    assert layer.num_batches_tracked.item() == 0
    layer(x)
    np.testing.assert_allclose(layer.running_mean.data, x.data.mean(0), rtol=1e-5)
