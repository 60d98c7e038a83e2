"""Moments, how they merge, and the policies of batch-norm layers over them."""

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, ops, optim
from nbgrad.ops import Moments, moments
from nbgrad.testing import gradcheck

rng = np.random.default_rng(11)


def tensor(*shape, dtype=np.float64, grad=False):
    return nbgrad.tensor(rng.standard_normal(shape).astype(dtype), requires_grad=grad)


def same(a, b, rtol=1e-12, atol=1e-12):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------ moments

@pytest.mark.parametrize("offset", [0, 1e4, 1e7])
def test_parts_in_any_split_merge_to_the_whole(offset):
    x = rng.standard_normal((40, 3, 2, 2)) + offset
    parts = np.split(x, [0, 1, 7, 7, 30])
    first, *others = map(moments, parts)
    whole = first.merge(*others)
    np.testing.assert_array_equal(whole.count, 160)
    np.testing.assert_allclose(whole.mean, x.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(whole.var(), x.var((0, 2, 3)), rtol=1e-8)      # of x: 1e-9 at 1e7
    np.testing.assert_allclose(whole.var(1), x.var((0, 2, 3), ddof=1), rtol=1e-8)


def test_an_empty_part_far_from_the_rest_changes_nothing():
    x = moments(rng.standard_normal((5, 2)) + 1e300)
    for merged in (x.merge(moments(np.zeros((0, 2)))), moments(np.zeros((0, 2))).merge(x)):
        for a, b in zip(merged, x):
            np.testing.assert_array_equal(a, b)
    assert np.isnan(moments(np.zeros((0, 2))).var()).all()
    assert np.isnan(moments(np.ones((1, 2))).var(1)).all()


def test_ghosts_and_groups_are_the_moments_of_slices():
    x = rng.standard_normal((7, 6, 3))
    ghosts = moments(x, ghost_size=3)
    assert ghosts.count.shape == (3, 6)
    same(Moments(*(a[2] for a in ghosts)), moments(x[6:]))
    same(ghosts.over(0), moments(x))
    groups = moments(x, groups=2)
    assert groups.mean.shape == (7, 2)
    np.testing.assert_allclose(groups.mean[4, 1], x[4, 3:].mean())
    np.testing.assert_allclose(groups.var()[4, 1], x[4, 3:].var())


def test_weights_count_as_repetitions_and_zero_is_not_looked_at():
    x = rng.standard_normal((5, 2, 3))
    w = rng.integers(0, 3, (5, 3)).astype(float)
    repeated = np.repeat(x.transpose(0, 2, 1).reshape(15, 2), w.reshape(-1).astype(int), axis=0)
    same(moments(x, mask=w), moments(repeated))
    x[w[:, None].repeat(2, 1) == 0] = np.nan
    same(moments(x, mask=w), moments(repeated))
    same(moments(x, mask=w, groups=1).over(0), Moments(*(
        np.asarray([a]) for a in (2 * w.sum(), repeated.mean(), repeated.var() * repeated.size))))


@pytest.mark.parametrize(("settings", "said"), [
    ({"mask": np.ones((4, 3))}, "broadcasts against"), ({"mask": -np.ones(5)}, "not negative"),
    ({"mask": np.full(5, np.nan)}, "not negative"), ({"groups": 4}, "divide the 6 channels"),
    ({"ghost_size": 0}, "at least 1"), ({"groups": 2, "ghost_size": 2}, "no ghost")])
def test_bad_arguments_of_moments(settings, said):
    with pytest.raises(ValueError, match=said):
        moments(np.ones((5, 6)), **settings)


# ------------------------------------------------------------------------------ weighted batch norm

def test_without_mask_and_workers_it_is_batch_norm():
    x, g, b = tensor(6, 3, 2, 2, grad=True), tensor(3, grad=True), tensor(3, grad=True)
    dy = tensor(*x.shape)
    y, found = ops.weighted_batch_norm(x, g, b)
    want, told = ops.batch_norm(x, None, None, g, b, True, return_moments=True)
    same([y.data, *found], [want.data, *told])
    same([d.data for d in nbgrad.grad(y, (x, g, b), dy)],
         [d.data for d in nbgrad.grad(want, (x, g, b), dy)])


@pytest.mark.parametrize("mask", [(np.arange(24).reshape(6, 2, 2) % 3 > 0),
                                  rng.uniform(0.2, 2, (6, 1, 2, 2)), np.array([1, 0, 1, 1, 0, 1])])
def test_gradients_with_a_mask(mask):
    inputs = tensor(6, 3, 2, 2, grad=True), tensor(3, grad=True), tensor(3, grad=True)
    assert gradcheck(lambda *xs: ops.weighted_batch_norm(*xs, mask=mask)[0], inputs, order=3)


def test_the_gradient_of_a_mask_is_refused_and_not_dropped():
    x, mask = nbgrad.randn(4, 2), nbgrad.ones(4, requires_grad=True)
    for call in (lambda: ops.moments(x, mask=mask), lambda: nn.BatchNorm1d(2)(x, mask=mask),
                 lambda: ops.weighted_batch_norm(x, mask=mask)):
        with pytest.raises(ValueError, match=r"mask without gradient.*mask\.detach\(\)"):
            call()
        with nbgrad.no_grad():
            call()


def test_what_is_masked_out_is_not_there():
    x, w = rng.standard_normal((6, 3)), np.array([1, 1, 0, 1, 0, 1], bool)
    bad = x.copy()
    bad[~w] = np.nan
    t, g = nbgrad.tensor(bad, requires_grad=True), tensor(3, grad=True)
    y, _ = ops.weighted_batch_norm(t, g, mask=w)
    want = ops.batch_norm(nbgrad.tensor(x[w]), None, None, g, None, True)
    np.testing.assert_allclose(y.data[w], want.data, rtol=1e-12)
    np.testing.assert_array_equal(y.data[~w], 0)
    dx, dg = nbgrad.grad(y.sum() * 3 + (y * y * y).sum(), (t, g))
    np.testing.assert_array_equal(dx.data[~w], 0)
    assert np.isfinite(dx.data).all()
    assert np.isfinite(dg.data).all()


@pytest.mark.parametrize("cuts", [[4], [1, 5], [0, 3, 3, 7]])
@pytest.mark.parametrize("masked", [False, True])
def test_workers_compute_what_one_process_does(cuts, masked):
    """Equal, unequal and empty parts: values, gradients, and gradients of gradients."""
    x, dy, ddx = rng.standard_normal((3, 8, 3, 2))
    g, mask = rng.standard_normal(3), rng.integers(0, 2, (8, 2)) if masked else None

    def work(x, dy, ddx, mask, workers):
        x, gamma = nbgrad.tensor(x, requires_grad=True), nbgrad.tensor(g, requires_grad=True)
        y, found = ops.weighted_batch_norm(x, gamma, None, mask=mask, workers=workers)
        dx, dg = nbgrad.grad(y, (x, gamma), nbgrad.tensor(dy), create_graph=True)
        second = nbgrad.grad(dx, (x, gamma), nbgrad.tensor(ddx))
        return [y.data, dx.data, second[0].data], [dg.data, second[1].data], found
    want = work(x, dy, ddx, mask, None)
    n = len(cuts) + 1
    group = nn.InProcess(n, timeout=60)
    parts = [np.split(a, cuts) if a is not None else [None] * n for a in (x, dy, ddx, mask)]
    found = group.run(lambda worker: work(*(p[worker.number] for p in parts), worker))
    for j in range(3):
        np.testing.assert_allclose(np.concatenate([f[0][j] for f in found]), want[0][j],
                                   rtol=1e-9, atol=1e-11)
    for j in range(2):
        np.testing.assert_allclose(sum(f[1][j] for f in found), want[1][j], rtol=1e-9, atol=1e-11)
    for f in found:
        same(f[2], want[2])


def test_a_worker_that_does_not_come_is_an_error_not_a_hang():
    with pytest.raises(RuntimeError, match="not all of 2 workers"):
        ops.weighted_batch_norm(tensor(4, 3), workers=nn.InProcess(2, timeout=0.1).rank(0))


# ----------------------------------------------------------------------------------------- policies

def test_averages_are_the_weighted_means_they_say():
    values, decay = rng.standard_normal(6), 0.8
    for average, weights in ((nn.Cumulative(), np.ones(6)),
                             (nn.DebiasedExponential(decay), decay ** np.arange(5, -1, -1.0))):
        running = 0.0
        for t, value in enumerate(values, 1):
            running += average.momentum(t) * (value - running)
        assert running == pytest.approx((weights * values).sum() / weights.sum(), rel=1e-12)
    with pytest.raises(ValueError, match="decay must be"):
        nn.Exponential(1.0)


@pytest.mark.parametrize("average", [nn.Exponential(0.75), nn.DebiasedExponential(0.75),
                                     nn.Cumulative()])
@pytest.mark.parametrize("settings", [{}, {"correction": 0}, {"on_nonfinite": "raise"}])
def test_running_statistics_follow_the_average_and_the_correction(average, settings):
    layer = nn.BatchNorm1d(3, average=average, dtype=np.float64, **settings)
    mean, var = np.zeros(3), np.ones(3)
    for t in range(1, 5):
        x, m = rng.standard_normal((5, 3)) + t, average.momentum(t)
        layer(nbgrad.tensor(x))
        mean = (1 - m) * mean + m * x.mean(0)
        var = (1 - m) * var + m * x.var(0, ddof=settings.get("correction", 1))
    same((layer.running_mean.data, layer.running_var.data), (mean, var))
    assert layer.num_batches_tracked.item() == 4


def test_presets_say_what_they_set():
    keras, torch = nn.BatchNorm2d(4, like="keras"), nn.BatchNorm2d(4, like="torch")
    assert (keras.eps, keras.average, keras.correction) == (1e-3, nn.Exponential(0.99), 0)
    assert (torch.eps, torch.average, torch.correction) == (1e-5, nn.Exponential(0.9), 1)
    assert "eps=0.001, average=Exponential(decay=0.99), affine" in repr(keras)
    assert repr(keras).endswith("correction=0)")
    with pytest.raises(ValueError, match="either it or them"):
        nn.BatchNorm2d(4, eps=1e-4, like="keras")
    with pytest.raises(ValueError, match="like to be one of torch, keras"):
        nn.BatchNorm2d(4, like="jax")


@pytest.mark.parametrize(("word", "training", "evaluation", "moves"), [
    ("batch", "batch", "running", True), ("running", "running", "running", True),
    ("frozen", "running", "running", False), ("prediction", "batch", "batch", True)])
def test_which_statistics_normalize(word, training, evaluation, moves):
    layer = nn.BatchNorm1d(3, statistics=word, dtype=np.float64)
    layer.running_mean.data[:], layer.running_var.data[:] = [1, 2, 3], [4, 5, 6]
    x = rng.standard_normal((6, 3))
    by = {"batch": (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5),
          "running": (x - [1, 2, 3]) / np.sqrt(np.array([4, 5, 6]) + 1e-5)}
    np.testing.assert_allclose(layer.eval()(nbgrad.tensor(x)).data, by[evaluation], rtol=1e-9)
    np.testing.assert_allclose(layer.train()(nbgrad.tensor(x)).data, by[training], rtol=1e-9)
    want = 0.9 * np.array([1, 2, 3]) + 0.1 * x.mean(0) if moves else [1, 2, 3]
    np.testing.assert_allclose(layer.running_mean.data, want, rtol=1e-12)
    assert layer.num_batches_tracked.item() == moves


def test_the_population_has_to_be_known_before_evaluation():
    layer = nn.BatchNorm1d(3, statistics="population")
    layer(tensor(4, 3, dtype=np.float32))
    np.testing.assert_array_equal(layer.running_mean.data, 0)
    with pytest.raises(RuntimeError, match="update_bn"):
        layer.eval()(tensor(4, 3, dtype=np.float32))


def test_batches_between_two_steps_count_as_one():
    """Four micro-batches give the running statistics, and a recomputed forward those, of one."""
    x = rng.standard_normal((8, 3))
    layers = [nn.BatchNorm1d(3, update=update, dtype=np.float64) for update in ("step", "forward")]
    optimizer = optim.SGD(layers[0].parameters(), lr=0.1)
    for scale in (1, 5):
        for part in np.split(x * scale, 4):
            layers[0](nbgrad.tensor(part))
        optimizer.step()
        layers[1](nbgrad.tensor(x * scale))
    for name, a in layers[0].state_dict().items():
        np.testing.assert_allclose(a.data, layers[1].state_dict()[name].data, rtol=1e-12)
    before = layers[0].running_mean.data.copy()
    twice = [layers[0](nbgrad.tensor(x)) for _ in range(2)]
    np.testing.assert_array_equal(twice[0].data, twice[1].data)
    np.testing.assert_allclose(layers[0].running_mean.data, 0.9 * before + 0.1 * x.mean(0))


@pytest.mark.parametrize("word", ["propagate", "skip_update", "raise"])
def test_one_bad_value_touches_its_own_channel_only(word):
    x = rng.standard_normal((6, 3)).astype(np.float32)
    clean = nn.BatchNorm1d(3)
    want = clean(nbgrad.tensor(x))
    x[2, 1] = np.inf
    layer = nn.BatchNorm1d(3, on_nonfinite=word)
    if word == "raise":
        with pytest.raises(FloatingPointError, match="channels 1"):
            layer(nbgrad.tensor(x))
        np.testing.assert_array_equal(layer.running_mean.data, 0)
        assert layer.num_batches_tracked.item() == 0
        return
    y = layer(nbgrad.tensor(x))
    others = [0, 2]
    np.testing.assert_array_equal(y.data[:, others], want.data[:, others])
    assert not np.isfinite(y.data[:, 1]).all()
    for name in ("running_mean", "running_var"):
        got, expected = getattr(layer, name).data, getattr(clean, name).data
        np.testing.assert_allclose(got[others], expected[others], rtol=1e-6)
        assert np.isfinite(got[1]) == (word == "skip_update")
    assert layer.running_mean.data[1] == 0 or word == "propagate"


def test_a_mask_in_the_layer_moves_by_what_is_there():
    layer, x = nn.BatchNorm1d(3, dtype=np.float64), rng.standard_normal((4, 3, 5))
    lengths = np.array([5, 2, 0, 3])
    mask = np.arange(5) < lengths[:, None]
    layer(nbgrad.tensor(x), mask=mask)
    there = x.transpose(0, 2, 1)[mask]
    np.testing.assert_allclose(layer.running_mean.data, 0.1 * there.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.running_var.data, 0.9 + 0.1 * there.var(0, ddof=1))
    layer(nbgrad.tensor(x), mask=np.zeros((4, 5)))
    np.testing.assert_allclose(layer.running_mean.data, 0.1 * there.mean(0), rtol=1e-12)


@pytest.mark.parametrize("settings", [
    {"statistics": "median"}, {"update": "epoch"}, {"on_nonfinite": "ignore"}, {"correction": 2},
    {"statistics": "frozen", "track_running_stats": False}])
def test_bad_policies_are_refused_at_construction(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        nn.BatchNorm2d(3, **settings)


def layer_of(values, **settings):
    layer = nn.BatchNorm1d(1, dtype=np.float64, **settings)
    for column in values:
        layer(nbgrad.tensor(np.array(column, float)[:, None]))
    return layer


def test_batches_that_move_nothing_do_not_count():
    layer = layer_of([[np.nan, 1], [9, 11]], average=nn.Cumulative(), on_nonfinite="skip_update")
    assert (layer.running_mean.item(), layer.num_batches_tracked.item()) == (10.0, 1)


def test_a_refused_batch_leaves_the_step_as_it_was():
    layer = nn.BatchNorm1d(1, momentum=1.0, update="step", on_nonfinite="raise", dtype=np.float64)
    layer(nbgrad.tensor([[1.0], [2.0]]).double())
    with pytest.raises(FloatingPointError):
        layer(nbgrad.tensor([[np.nan], [2.0]]).double())
    layer(nbgrad.tensor([[3.0], [4.0]]).double())
    assert layer.running_mean.item() == 2.5


def test_statistics_that_are_loaded_within_a_step_are_where_it_goes_on_from():
    layer = layer_of([[1, 3]], momentum=0.5, update="step")
    state = {**layer.state_dict(), "running_mean": nbgrad.tensor(np.array([100.0]))}
    layer.load_state_dict(state)
    layer(nbgrad.tensor(np.array([[1.0], [3.0]])))
    assert layer.running_mean.item() == 51.0


@pytest.mark.parametrize("make", [lambda w: nn.SyncBatchNorm(2, workers=w, statistics="running"),
                                  lambda w: with_workers(nn.GhostBatchNorm(2, ghost_size=2), w)])
def test_workers_move_the_running_statistics_together(make):
    x = rng.standard_normal((8, 2)).astype(np.float32)

    def work(worker):
        layer = make(worker)
        layer(nbgrad.tensor(x[worker.number * 4:][:4]))
        return layer.running_mean.data
    for found in nn.InProcess(2).run(work):
        np.testing.assert_allclose(found, 0.1 * x.mean(0), rtol=1e-5, atol=1e-7)


def with_workers(layer, workers):
    layer.workers = workers
    return layer


def test_the_first_error_of_a_worker_is_the_one_that_is_raised():
    def work(worker):
        if worker.number:
            raise KeyError("lost")
        worker.sum(np.ones(1))
    group = nn.InProcess(2)
    with pytest.raises(KeyError, match="lost"):
        group.run(work)
    assert group.run(lambda worker: worker.number) == [0, 1]


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(1).eval(), nn.BatchNorm1d(1, statistics="frozen"),
                                   nn.NoisyBatchNorm(1)])
def test_what_is_masked_out_is_zero_whatever_normalizes(layer):
    x = nbgrad.tensor([[5.0], [np.nan], [1.0]], requires_grad=True)
    y = layer(x, mask=[1, 0, 1])
    assert y.data[1] == 0
    y.sum().backward()
    assert np.isfinite(x.grad.data).all()


def test_one_value_has_no_variance_whatever_its_weight():
    two, one = nbgrad.randn(2, 3), nbgrad.randn(1, 3)
    assert np.isfinite(ops.weighted_batch_norm(two, mask=[0.5, 0.5])[0].data).all()
    with pytest.raises(ValueError, match="one value in the mask"):
        ops.weighted_batch_norm(one, mask=[2.0])


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.GhostBatchNorm(2, ghost_size=2),
                                   nn.BatchRenorm(2), nn.SplitBatchNorm(2)])
def test_activations_and_residuals_that_do_not_fit_are_refused_everywhere(layer):
    x, mask = nbgrad.randn(4, 2), {"mask": [1, 1, 1, 1]} if type(layer) is nn.BatchNorm1d else {}
    with pytest.raises(ValueError, match="activation"):
        layer(x, activation="gelu", **mask)
    with pytest.raises(ValueError, match="residual"):
        layer(x, residual=nbgrad.zeros(4, 2, 1), **mask)


def test_a_split_that_is_refused_moves_none_of_the_parts():
    layer = nn.SplitBatchNorm(1, on_nonfinite="raise")
    with pytest.raises(FloatingPointError):
        layer(nbgrad.tensor([[1.0], [3.0], [np.nan], [1.0]]))
    assert layer.running_mean.item() == layer.num_batches_tracked.item() == 0


def test_renorm_of_no_samples_has_finite_gradients_and_takes_presets():
    layer = nn.BatchRenorm(2)
    layer(nbgrad.zeros(0, 2)).sum().backward()
    assert layer.weight.grad.tolist() == [0.0, 0.0]
    assert nn.BatchRenorm(2, like="keras").correction == 0


@pytest.mark.parametrize(("limits", "got"), [((0.5, 5), "0.5 and 5"), ((3, None), "3 and None")])
def test_limits_of_renorm_are_looked_at_whenever_they_change(limits, got):
    layer = nn.BatchRenorm(2)
    layer.r_max, layer.d_max = limits
    with pytest.raises(ValueError, match=f"at least 0, got {got}"):
        layer(nbgrad.randn(4, 2))
    assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e40, 1e300])
def test_the_size_of_weights_makes_no_difference(scale):
    """To second order, in float32, which does not hold them."""
    x, w = nbgrad.randn(6, 3, 4), np.random.default_rng(2).uniform(0.1, 1, (6, 4))

    def found(w):
        at = x.detach().requires_grad_()
        y, _ = ops.weighted_batch_norm(at, mask=w)
        dx, = nbgrad.autograd.grad((y * y * y).sum(), (at,), create_graph=True)
        return y.detach(), dx.detach(), nbgrad.autograd.grad((dx * dx).sum(), at)[0]
    for a, b in zip(found(w * scale), found(w)):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-5, atol=1e-5)


def test_averages_that_are_none_and_both_ways_at_once_are_refused():
    for average in (0.9, nn.Cumulative):              # a class is no average yet
        with pytest.raises(ValueError, match="expected average"):
            nn.BatchNorm1d(2, average=average)
    for decay in (1.0, None, "0.9"):
        with pytest.raises(ValueError, match=f"from 0 to below 1, got {decay!r}"):
            nn.Exponential(decay)
    with pytest.raises(ValueError, match="not both"):
        nn.BatchNorm1d(2, momentum=0.5, average=nn.Cumulative())
