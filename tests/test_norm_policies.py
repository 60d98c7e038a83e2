"""How every layer with running statistics averages them: the same words, the same meaning."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import nn
from nbgrad.nn.statistics import step_taken
from nbgrad.train import update_bn

C, SHAPE = 4, (6, 4, 3, 2)
OTHERS = {"lp": lambda **s: nn.LpBatchNorm(C, p=3, **s),
          "mean": lambda **s: nn.MeanOnlyBatchNorm(C, **s),
          "decorrelated": lambda **s: nn.DecorrelatedBatchNorm(C, group_size=2, **s),
          "switchable": lambda **s: nn.SwitchableNorm(C, **s),
          "evonorm b0": lambda **s: nn.EvoNormB0(C, **s),
          "instance": lambda **s: nn.InstanceNorm2d(C, affine=True, track_running_stats=True, **s)}
BATCH = {"ghost": lambda **s: nn.GhostBatchNorm(C, ghost_size=3, **s),
         "renorm": lambda **s: nn.BatchRenorm(C, **s),
         "noisy": lambda **s: nn.NoisyBatchNorm(C, **s),
         "split": lambda **s: nn.SplitBatchNorm(C, num_splits=2, **s)}
ALL = {**OTHERS, **BATCH}
CORRECTED = ["switchable", "evonorm b0", "instance", *BATCH]


def batches(n, seed=0):
    rng = np.random.default_rng(seed)
    return [nbgrad.tensor(rng.standard_normal(SHAPE) * (i + 1) + i) for i in range(n)]


def running(layer):
    return {name: np.array(b.data) for name, b in layer.named_buffers()
            if name.startswith("running")}


def starts(make):
    return running(make(dtype=np.float64))


def of(make, x, **settings):
    """The batch's own statistics: where the running ones are after momentum 1."""
    layer = make(dtype=np.float64, momentum=1.0, **settings)
    layer(x)
    return running(layer)


def same(found, want, rtol=1e-12):
    assert found.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=rtol, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("average", [nn.Exponential(0.75), nn.DebiasedExponential(0.75),
                                     nn.Cumulative()])
def test_average(name, average):
    """running ← running + momentum(t) (batch's − running)."""
    layer, want = ALL[name](dtype=np.float64, average=average), starts(ALL[name])
    for t, x in enumerate(batches(4), start=1):
        layer(x)
        own, m = of(ALL[name], x), average.momentum(t)
        want = {key: (1 - m) * value + m * own[key] for key, value in want.items()}
        same(running(layer), want)
    assert layer.num_batches_tracked.item() == 4


@pytest.mark.parametrize("name", CORRECTED)
def test_correction(name):
    """Of the running variance: m values over m − 1, or over m."""
    x, = batches(1)
    one, zero = (of(ALL[name], x, correction=n) for n in (1, 0))
    m = x.data.size // C / {"split": 2, "instance": len(x)}.get(name, 1)
    np.testing.assert_allclose(one["running_var"], zero["running_var"] * m / (m - 1), rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_like(name):
    for word, eps, decay, correction in (("torch", 1e-5, 0.9, 1), ("keras", 1e-3, 0.99, 0)):
        layer = ALL[name](like=word)
        assert layer.average == nn.Exponential(decay)
        assert layer.eps == (0.0 if name == "mean" else eps)
        assert layer.correction == (correction if name in CORRECTED else 1)
    if name == "renorm":
        return
    x, = batches(1)
    layer, known = ALL[name](like="torch", dtype=np.float64), ALL[name](dtype=np.float64)
    for one in (layer, known):
        one(x)
    same(running(layer), running(known))


@pytest.mark.parametrize("name", OTHERS)
def test_batches_between_two_steps_count_as_one(name):
    first, second, third = batches(3)
    make = OTHERS[name]
    layer = make(dtype=np.float64, update="step", momentum=0.25)
    for x in (first, second):
        layer(x)
    both, start = [of(make, x) for x in (first, second)], starts(make)
    mean = {key: (both[0][key] + both[1][key]) / 2 for key in start}
    want = {key: 0.75 * start[key] + 0.25 * mean[key] for key in start}
    same(running(layer), want)
    assert layer.num_batches_tracked.item() == 1
    step_taken()
    layer(third)
    own = of(make, third)
    same(running(layer), {key: 0.75 * want[key] + 0.25 * own[key] for key in want})
    assert layer.num_batches_tracked.item() == 2
    layer.reset_running_stats()
    layer(third)
    same(running(layer), {key: 0.75 * start[key] + 0.25 * own[key] for key in start})


@pytest.mark.parametrize("name", BATCH)
def test_batch_norms_between_two_steps(name):
    """Chan's merge: the same batch twice is a batch of twice as many."""
    x, = batches(1)
    layer = BATCH[name](dtype=np.float64, update="step", correction=0, momentum=0.25)
    for _ in range(2):
        layer(x)
    once = BATCH[name](dtype=np.float64, correction=0, momentum=0.25)
    once(x)
    same(running(layer), running(once))
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("make", [BATCH["renorm"],
                                  lambda **s: nn.BatchNorm2d(C, statistics="running", **s)])
def test_a_recomputed_forward_pass_gives_what_it_gave(make):
    """By the statistics with which the step began; the next step reads what it moved."""
    first, second = batches(2)
    layer, forward = (make(dtype=np.float64, update=word) for word in ("step", "forward"))
    y = layer(first)
    np.testing.assert_array_equal(layer(first).data, y.data)
    np.testing.assert_array_equal(y.data, forward(first).data)
    at_evaluation = layer.eval()(first).data
    step_taken()
    np.testing.assert_array_equal(layer(first).data, at_evaluation)
    layer.train()
    other = make(dtype=np.float64)
    other.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(layer(second).data, other(second).data)
    layer.load_state_dict(make(dtype=np.float64).state_dict())     # within a step: from there on
    np.testing.assert_array_equal(layer(first).data, y.data)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("more", [{}, {"average": nn.Cumulative()}, {"like": "keras"},
                                  {"on_nonfinite": "skip_update"}])
def test_every_layer_can_be_recomputed_within_a_step(name, more):
    """Activation checkpointing: the second pass returns the bits of the first, and moves nothing
    twice. (A batch that comes again changes what correction 1 makes of it, so 0.)"""
    if "like" not in more and name in CORRECTED:
        more = {**more, "correction": 0}
    settings = {"dtype": np.float64, "update": "step", **more}
    if name == "noisy":
        settings |= {"mean_range": 0, "scale_range": 1, "mean_jitter": 0, "scale_jitter": 0}
    layer = ALL[name](**settings)
    for x in batches(3):
        y = layer(x).data
        once = running(layer)
        with nbgrad.no_grad():
            np.testing.assert_array_equal(layer(x).data, y)
        same(running(layer), once)
        step_taken()
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("name", OTHERS)
def test_frozen_statistics_normalize_in_training_and_stay(name):
    layer, (first, second) = OTHERS[name](dtype=np.float64), batches(2)
    layer(first)
    before = running(layer)
    want = layer.eval()(second).data
    nn.freeze_batch_norm(layer)
    assert not any(p.requires_grad for p in layer.parameters())
    np.testing.assert_array_equal(layer.train()(second).data, want)
    same(running(layer), before, rtol=0)
    assert "statistics='frozen'" in repr(layer)
    nn.unfreeze_batch_norm(layer)
    assert all(p.requires_grad for p in layer.parameters())
    layer(second)
    for key, value in running(layer).items():
        assert (value != before[key]).any()
    with pytest.raises(ValueError, match="expected statistics to be one of batch, frozen"):
        OTHERS[name](statistics="running")


def test_a_model_of_all_of_them_is_frozen_and_released():
    model = nn.Sequential(*(make() for make in ALL.values()))
    assert nn.convert_norm(model, "frozen") is model
    assert all(layer.statistics == "frozen" for layer in model)
    nn.convert_norm(model, "batch")
    assert all(layer.statistics == "batch" for layer in model)
    alone = nn.InstanceNorm2d(C)                 # by the sample in evaluation, too: nothing to keep
    assert nn.freeze_batch_norm(alone).statistics == "batch"
    with pytest.raises(ValueError, match="needs track_running_stats=True"):
        nn.InstanceNorm2d(C, statistics="frozen")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.LpBatchNorm, nn.GhostBatchNorm])
def test_a_word_that_is_none_is_refused_whenever_it_is_set(kind, training):
    layer = kind(4).train(training)
    layer.statistics = "Frozen"
    with pytest.raises(ValueError, match=r"expected statistics to be one of batch.*got 'Frozen'"):
        layer(nbgrad.randn(8, 4, 3))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.EvoNormB0, nn.LpBatchNorm])
def test_a_copy_within_a_step_goes_on_with_the_step(kind):
    layer = kind(3, update="step", momentum=0.5)
    first, second = nbgrad.randn(8, 3), nbgrad.randn(4, 3) + 2
    layer(first)
    copied = copy.deepcopy(layer)
    for each in (layer, copied):
        each(second)
        assert each.num_batches_tracked.item() == 1
    for a, b in zip(layer.buffers(), copied.buffers()):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize("update", ["forward", "step"])
def test_statistics_that_were_taken_away_do_not_move(update):
    layer = nn.BatchNorm1d(4, update=update)
    layer.running_mean = layer.running_var = None
    x = nbgrad.randn(8, 4)
    want = layer(x).data
    np.testing.assert_allclose(layer.eval()(x).data, want, rtol=1e-6)


def test_an_instance_norm_without_policies_counts_nothing():
    """As PyTorch's, and momentum=None moves nothing; with an average it is that."""
    x, = batches(1)
    layer = OTHERS["instance"](dtype=np.float64)
    layer(x)
    assert layer.num_batches_tracked.item() == 0
    np.testing.assert_allclose(layer.running_mean.data, 0.1 * x.data.mean((0, 2, 3)), rtol=1e-12)
    layer = OTHERS["instance"](momentum=None)
    layer(x.float())
    same(running(layer), starts(OTHERS["instance"]))
    kept = nn.InstanceNorm2d(C, average=nn.Cumulative())         # without running statistics
    assert not list(kept.buffers())
    np.testing.assert_allclose(kept(x).data, layer.double()(x).data, rtol=1e-12)


def test_samples_of_other_sizes_count_alike_in_an_instance_norm():
    """The mean over the samples of a step, whatever the sizes of their maps."""
    rng = np.random.default_rng(3)
    small, large = (nbgrad.tensor(rng.standard_normal((n, C, s, s))) for n, s in ((2, 3), (5, 4)))
    layer = OTHERS["instance"](dtype=np.float64, update="step", momentum=1.0)
    for x in (small, large):
        layer(x)
    each = np.concatenate([x.data.mean((2, 3)) for x in (small, large)])
    np.testing.assert_allclose(layer.running_mean.data, each.mean(0), rtol=1e-12)


def spoiled():
    x, = batches(1)
    y = np.array(x.data)
    y[1, 2, 0, 1] = np.nan
    return x, nbgrad.tensor(y)


@pytest.mark.parametrize("name", ALL)
def test_values_that_are_not_finite(name):
    good, bad = spoiled()
    hit = [2, 3] if name == "decorrelated" else [2]          # its group
    rest = [c for c in range(C) if c not in hit]
    for word in ("propagate", "skip_update"):
        layer, known = (ALL[name](dtype=np.float64, on_nonfinite=w) for w in (word, "propagate"))
        before = running(layer)
        layer(bad)
        known(good)
        after, want = running(layer), running(known)
        for key in ("running_mean", "running_var", "running_scale"):
            if key not in after or (name == "switchable" and word == "propagate"):
                continue
            np.testing.assert_allclose(after[key][rest], want[key][rest], rtol=1e-12)
            if word == "skip_update":
                np.testing.assert_array_equal(after[key][hit], before[key][hit])
            else:
                assert np.isnan(after[key][2])
        if name == "decorrelated" and word == "skip_update":
            np.testing.assert_array_equal(after["running_whitening"][1], np.eye(2))
            np.testing.assert_allclose(after["running_whitening"][0], want["running_whitening"][0],
                                       rtol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_raise(name):
    good, bad = spoiled()
    layer = ALL[name](dtype=np.float64, on_nonfinite="raise")
    layer(good)
    before = running(layer)
    with pytest.raises(FloatingPointError, match=r"not finite in channels .*2"):
        layer(bad)
    same(running(layer), before, rtol=0)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("name", ALL)
def test_words_and_contradictions(name):
    for settings, message in (
            ({"update": "never"}, "expected update to be one of forward, step"),
            ({"on_nonfinite": "hide"}, "expected on_nonfinite to be one of propagate"),
            ({"average": 0.9}, "expected average to be an Exponential"),
            ({"average": nn.Cumulative(), "momentum": 0.1}, "momentum or average, not both"),
            ({"like": "jax"}, "expected like to be one of torch, keras"),
            ({"like": "keras", "momentum": 0.1}, "sets eps, average"),
            ({"correction": 2} if name in CORRECTED else {"correction": 1}, "correct")):
        with pytest.raises(ValueError, match=message):
            ALL[name](**settings)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_unusual_is_told(name):
    text = repr(OTHERS[name](average=nn.Cumulative(), update="step", on_nonfinite="raise"))
    assert "average=Cumulative(), update='step', on_nonfinite='raise'" in text


def moved(name, update, average, batches):
    layer = ALL[name](dtype=np.float64, on_nonfinite="skip_update", update=update, average=average)
    for x in batches:
        layer(x)
        step_taken()
    return layer


@pytest.mark.parametrize("update", ["forward", "step"])
@pytest.mark.parametrize("average", [nn.Cumulative(), nn.DebiasedExponential(0.75)])
@pytest.mark.parametrize("name", ALL)
def test_a_channel_averages_the_batches_that_it_has(name, average, update):
    """As if there had been no others: the start values of a channel that skipped are forgotten."""
    _, bad = spoiled()
    second, third = batches(2)
    hit = np.array([2, 3] if name == "decorrelated" else [2])             # its group
    got = running(moved(name, update, average, [bad, second, bad, third]))
    own = running(moved(name, update, average, [second, third]))
    every = running(moved(name, update, average, [spoiled()[0], second, spoiled()[0], third]))
    for key in own:
        whole = key == "running_whitening"
        at, rest = (1, 0) if whole else (hit, np.setdiff1d(np.arange(C), hit))
        np.testing.assert_allclose(got[key][at], own[key][at], rtol=1e-10)
        np.testing.assert_allclose(got[key][rest], every[key][rest], rtol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_which_nothing_is_counted_is_no_batch(name):
    layer = ALL[name](dtype=np.float64, on_nonfinite="skip_update", average=nn.Cumulative())
    before = running(layer)
    layer(nbgrad.tensor(np.full(SHAPE, np.nan)))
    same(running(layer), before, rtol=0)
    assert layer.num_batches_tracked.item() == 0


def too_large():
    x, = batches(1)
    y = np.array(x.data, np.float32)
    y[:, 2] *= np.float32(1e25)                     # a variance of 1e50 is no float32
    return nbgrad.tensor(y)


@pytest.mark.parametrize("name", CORRECTED)
def test_statistics_that_only_float64_holds_are_not_finite(name):
    x = too_large()
    layer = ALL[name](on_nonfinite="skip_update")
    layer(x)
    assert all(np.isfinite(value).all() for value in running(layer).values())
    assert layer.running_var.data[2] == 1
    assert (layer.running_var.data[[0, 1, 3]] != 1).all()
    layer = ALL[name](on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"not finite in channels 2"):
        layer(x)
    assert (layer.running_var.data == 1).all()
    assert layer.num_batches_tracked.item() == 0


def test_the_correction_counts_for_what_is_finite():
    """Of two values the variance that is kept is twice the batch's, and that is no float32."""
    x = nbgrad.tensor(np.array([[-1.5e19], [1.5e19]], np.float32))         # 2.25e38, and 4.5e38
    for correction in (0, 1):
        layer = nn.BatchNorm1d(1, on_nonfinite="skip_update", correction=correction)
        layer(x)
        assert (layer.running_var.item() == 1) == bool(correction)


def test_statistics_of_a_data_set_that_only_float64_holds_are_not_finite():
    model = nn.Sequential(nn.BatchNorm2d(C, on_nonfinite="skip_update"))
    update_bn(model, [too_large()])
    np.testing.assert_array_equal(model[0].running_var.data == 1, np.arange(C) == 2)
    model[0].on_nonfinite = "raise"
    with pytest.raises(FloatingPointError, match="channels 2"):
        update_bn(model, [too_large()])


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("settings", [{"update": "step"}, {"correction": 0},
                                      {"on_nonfinite": "raise"}], ids=str)
def test_a_residual_has_its_gradient_under_every_policy(settings, activation):
    """Where statistics are returned and nothing is clipped, there was no gradient."""
    values = np.random.default_rng(3).standard_normal((2, 6, 3, 2)).astype(np.float32)
    x, r = (nbgrad.tensor(v, requires_grad=True) for v in values)
    own, plain = (nbgrad.grad((layer(x, residual=r, activation=activation) ** 2).sum(), (x, r))
                  for layer in (nn.BatchNorm1d(3, **settings), nn.BatchNorm1d(3)))
    for got, want in zip(own, plain):
        np.testing.assert_array_equal(got.data, want.data)
    assert activation or (own[1].data != 0).all()
