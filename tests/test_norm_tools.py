"""Working with batch norms: population statistics, adaptation, conversion, freezing, folding."""

import copy
from functools import partial

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, optim
from nbgrad.data import DataLoader, TensorDataset
from nbgrad.nn.statistics import step_taken
from nbgrad.train import adapt, bn_doctor, evaluate, population_statistics, update_bn
from nbgrad.train.population import unchanged

rng = np.random.default_rng(5)
X = (3 + 2 * rng.standard_normal((50, 2, 6, 6))).astype(np.float32)
Y = (np.arange(50) % 3).astype(np.int64)


def network(**settings):
    nbgrad.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, **settings), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(0.5), nn.Linear(64, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def loader(size=8, x=X):
    return DataLoader(TensorDataset(nbgrad.tensor(x), nbgrad.tensor(Y[:len(x)])), size)


def state(model):
    """All values, modes and policies."""
    return ({k: t.data.copy() for k, t in model.state_dict().items()},
            [m.training for m in model.modules()],
            [(m.statistics, m._pending is None) for m in norms(model)])


def assert_same_state(model, before):
    now = state(model)
    assert now[1:] == before[1:]
    for name, value in before[0].items():
        np.testing.assert_array_equal(now[0][name], value, err_msg=name)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def values(model, x=X):
    with nbgrad.no_grad():
        return model(nbgrad.tensor(x)).data


# ---------------------------------------------------------------------- statistics of a population

@pytest.mark.parametrize("size", [1, 7, 50])
def test_evaluation_then_is_a_forward_pass_with_the_whole_set_as_one_batch(size):
    model = network()
    model[4].p = 0.0
    want = values(model)                                    # training mode: statistics of all of X
    update_bn(model, loader(size))
    assert [m.num_batches_tracked.item() for m in norms(model)] == [-(-50 // size)] * 2
    assert all(m.training for m in model.modules())
    # float32 of the running statistics, 6e-8, through two norms
    np.testing.assert_allclose(values(model.eval()), want, rtol=1e-5, atol=1e-5)


def test_one_pass_normalizes_by_each_batch():
    model = network()
    found = update_bn(model, loader(10), exact=False)
    fresh = network().eval()
    fresh[1].train()
    inputs = [values(fresh[:6], part) for part in np.split(X, 5)]
    np.testing.assert_allclose(found["6"][0], np.concatenate(inputs).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["6"][1], np.concatenate(inputs).var(0), rtol=1e-5)
    exact = update_bn(network(), loader(10))
    np.testing.assert_allclose(found["1"][0], exact["1"][0], rtol=1e-12)
    assert not np.allclose(found["6"][1], exact["6"][1], rtol=1e-3)


def test_offsets_do_not_cancel():
    """float32 data at 1e6 with standard deviation 1: E[x²] − E[x]² would have no correct digit."""
    x = (1e6 + rng.standard_normal((64, 3))).astype(np.float32)
    found = update_bn(nn.Sequential(nn.BatchNorm1d(3)), [nbgrad.tensor(p) for p in np.split(x, 8)])
    np.testing.assert_allclose(found["0"][1], x.astype(np.float64).var(0), rtol=1e-6)


def test_population_layers_evaluate_after_update_bn_only():
    model = network(statistics="population")
    with pytest.raises(RuntimeError, match="update_bn"):
        values(model.eval())
    update_bn(model, loader())
    assert np.isfinite(values(model)).all()


def test_masked_calls_count_what_is_there():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x, mask=x.data[:, 0] > 0)

    x = rng.standard_normal((20, 2, 3)).astype(np.float32)
    model = Masked()
    update_bn(model, [nbgrad.tensor(p) for p in np.split(x, 4)])
    there = x.transpose(0, 2, 1)[x[:, 0] > 0]
    np.testing.assert_allclose(model.norm.running_mean.data, there.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.norm.running_var.data, there.var(0), rtol=1e-6)


@pytest.mark.parametrize("prior", [None, 30])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_follows_the_layers_policy(bad, prior):
    def changed(on_nonfinite, x):
        model = nn.Sequential(nn.BatchNorm2d(2, on_nonfinite=on_nonfinite))
        model[0].running_mean.data[...] = 7
        model[0].running_var.data[...] = 5
        before = state(model)
        try:
            if prior is None:
                update_bn(model, loader(x=x))
            else:
                adapt(model, loader(x=x), prior=prior)
        except FloatingPointError:
            assert_same_state(model, before)
            raise
        return model[0].running_mean.data, model[0].running_var.data

    x = X.copy()
    x[30, 1, 2, 3] = bad
    with pytest.raises(FloatingPointError, match="'0' is not finite in channels 1"):
        changed("raise", x)
    finite = changed("raise", X)
    spread, kept = changed("propagate", x), changed("skip_update", x)
    for i, (want, old) in enumerate(zip(finite, (7, 5))):
        assert (spread[i][0], kept[i][0]) == (want[0], want[0])
        assert not np.isfinite(spread[i][1])
        assert kept[i][1] == old


def test_channels_of_which_nothing_is_counted_keep_theirs():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2, statistics="population")

        def forward(self, x):
            return self.norm(x, mask=np.zeros(len(x.data)))

    model = Masked()
    model.norm.running_mean.data[...] = 7
    for change in (update_bn, adapt):
        mean, var = change(model, [nbgrad.randn(4, 2)] * 3)["norm"]
        np.testing.assert_array_equal((mean, var), [[7, 7], [1, 1]])
        np.testing.assert_array_equal(model.norm.running_mean.data, 7)
        np.testing.assert_array_equal(model.norm.running_var.data, 1)
        assert model.norm.num_batches_tracked.item() == 0      # and evaluation asks for them still


@pytest.mark.parametrize("kind", [nn.EvoNormB0, nn.LpBatchNorm, nn.MeanOnlyBatchNorm,
                                  nn.SwitchableNorm, nn.DecorrelatedBatchNorm,
                                  partial(nn.InstanceNorm2d, track_running_stats=True)])
def test_norms_with_other_statistics_are_not_passed_over(kind):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(kind(2)))
    before = {k: t.data.copy() for k, t in model.state_dict().items()}
    for question in (update_bn, adapt, population_statistics):
        with pytest.raises(ValueError, match=r"those of 1\.0 cannot be found"):
            question(model, loader())
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name].data, value)


def test_frozen_and_prediction_layers_stay():
    model = network(statistics="frozen")
    found = update_bn(model, loader())
    assert list(found) == ["6"]
    assert model[1].num_batches_tracked.item() == 0
    assert list(population_statistics(model, loader())) == ["1", "6"]      # a question, no change
    assert update_bn(nn.Linear(2, 2), loader()) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("exact", [True, False])
def test_interrupted_it_leaves_the_model_as_it_was(error, exact):
    class Stops:
        passes = 0

        def __iter__(self):
            self.passes += 1
            for i, batch in enumerate(loader()):
                if self.passes == (3 if exact else 2) and i == 3:    # one pass finds the order
                    raise error
                yield batch

    model = network(update="step")
    model(nbgrad.tensor(X))
    model[0].eval()
    before = state(model)
    with pytest.raises(error):
        update_bn(model, Stops(), exact=exact)
    assert_same_state(model, before)
    assert all(m._hooks is None for m in model.modules())


def test_what_has_no_population_is_refused():
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match="empty"):
        update_bn(model, [])
    with pytest.raises(ValueError, match="iterator ends after one pass"):
        update_bn(model, iter(loader()))
    shared = nn.BatchNorm2d(2)
    with pytest.raises(ValueError, match="runs twice"):
        update_bn(nn.Sequential(shared, nn.Sequential(shared)), loader())
    with pytest.raises(ValueError, match="keeps no running"):
        update_bn(network(track_running_stats=False), loader())
    assert_same_state(model, before)


def test_progress_is_told(capsys):
    update_bn(network(), loader(), progress=True)
    assert capsys.readouterr().err.splitlines() == [
        "statistics, pass 1 of 2", "statistics, pass 2 of 2"]
    update_bn(network(), loader())
    assert capsys.readouterr().err == ""


def test_workers_find_the_population_of_all():
    from threading import Thread

    group, models = nn.InProcess(2, timeout=60), [network(), network()]
    for i, model in enumerate(models):
        for layer in norms(model):
            layer.workers = group.rank(i)
    threads = [Thread(target=update_bn, args=(m, loader(5, part)))
               for m, part in zip(models, (X[:20], X[20:]))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    want = update_bn(network(), loader())
    for i, (mean, var) in zip((1, 6), want.values()):
        for model in models:
            np.testing.assert_allclose(model[i].running_mean.data, mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(model[i].running_var.data, var, rtol=1e-5)


class Routed(nn.Module):
    """Large batches take another norm than small ones."""

    def __init__(self):
        super().__init__()
        self.last, self.small, self.large = (nn.BatchNorm1d(2) for _ in range(3))

    def forward(self, x):
        return self.last((self.large if len(x) > 5 else self.small)(x) * 2 + 3)


@pytest.mark.parametrize("exact", [True, False])
def test_norms_that_some_batches_reach_have_the_statistics_of_those(exact):
    small, large = (np.float32(rng.standard_normal((n, 2)) + 4) for n in (4, 9))
    found = update_bn(Routed(), [nbgrad.tensor(small), nbgrad.tensor(large)], exact=exact)
    assert sorted(found) == ["large", "last", "small"]
    for name, x in (("small", small), ("large", large)):
        np.testing.assert_allclose(found[name][0], x.mean(0), rtol=1e-6)
    # each is normalized by its own: mean 3 and variance 4 of all, but for eps
    np.testing.assert_allclose(found["last"], [[3, 3], [4, 4]], rtol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_a_worker_without_samples_finds_what_the_others_do(exact):
    group, parts = nn.InProcess(3, timeout=60), (X[:20], X[:0], X[20:])
    models = [network() for _ in parts]

    def work(worker):
        model = nn.convert_norm(models[worker.number], "sync", workers=worker)
        return update_bn(model, [nbgrad.tensor(parts[worker.number])], exact=exact)

    want = update_bn(network(), [nbgrad.tensor(X)], exact=exact)
    for found in group.run(work):
        for name in want:
            np.testing.assert_allclose(found[name], want[name], rtol=1e-5, atol=1e-6)


def test_workers_adapt_by_the_samples_of_all():
    group, models = nn.InProcess(2, timeout=60), [nn.Sequential(nn.BatchNorm2d(2))
                                                  for _ in range(2)]

    def work(worker):
        model = nn.convert_norm(models[worker.number], "sync", workers=worker)
        part = (X[:20], X[20:])[worker.number]
        return adapt(model, loader(5, part), prior=50)["0"]

    want = adapt(nn.Sequential(nn.BatchNorm2d(2)), loader(5), prior=50)["0"]
    for found, model in zip(group.run(work), models):
        np.testing.assert_allclose(found, want, rtol=1e-12)
        assert model[0].num_batches_tracked.item() == 10


@pytest.mark.parametrize("prior", [0, 25, 1000])
def test_adaptation_mixes_by_numbers_of_samples(prior):
    model = nn.Sequential(nn.BatchNorm2d(2))
    update_bn(model, loader())
    old = [b.data.astype(np.float64) for b in (model[0].running_mean, model[0].running_var)]
    shifted = X[:25] * 3 + 1
    adapt(model, loader(10, shifted), prior=prior)
    axes = (0, 2, 3)
    for before, new, now in zip(old, (shifted.mean(axes), shifted.var(axes)),
                                (model[0].running_mean, model[0].running_var)):
        np.testing.assert_allclose(now.data, (prior * before + 25 * new) / (prior + 25), rtol=1e-5)


def test_adaptation_recovers_what_another_contrast_costs():
    """A trained network on digits of a quarter of the contrast, darker: Schneider et al. 2020."""
    train, test = nbgrad.data.load("digits", standardize=True)
    nbgrad.manual_seed(0)
    model = nbgrad.models.mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for x, y in DataLoader(train, 60, shuffle=True, drop_last=True):
        optimizer.zero_grad()
        nbgrad.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = test.tensors
    other = DataLoader(TensorDataset(nbgrad.tensor(x.data * 0.25 - 2), y), 90)
    before = evaluate(model, other).accuracy
    adapt(model, other)
    assert evaluate(model, other).accuracy > before + 0.2


@pytest.mark.parametrize("prior", [-1, np.inf, np.nan])
def test_adaptation_refuses_a_prior_that_is_no_number_of_samples(prior):
    with pytest.raises(ValueError, match="prior must be"):
        adapt(network(), loader(), prior=prior)


def test_a_finished_block_can_be_kept_or_taken_back():
    model = network()
    before = state(model)
    with unchanged(model):
        model.eval()
        update_bn(model, loader())
    assert_same_state(model, before)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.LpBatchNorm, nn.MeanOnlyBatchNorm,
                                  nn.SwitchableNorm,
                                  lambda C, **s: nn.DecorrelatedBatchNorm(C, group_size=2, **s)])
def test_a_look_within_a_step_does_not_end_what_it_collected(make):
    """Also with a channel that has skipped a batch before."""
    parts = rng.standard_normal((3, 6, 4, 5))
    parts[0, :, 2:] = np.nan
    found = []
    for look in (False, True):
        layer = make(4, update="step", on_nonfinite="skip_update", average=nn.Cumulative(),
                     dtype=np.float64)
        layer(nbgrad.tensor(parts[0]))
        step_taken()
        layer(nbgrad.tensor(parts[1]))
        if look:
            with unchanged(layer):
                layer(nbgrad.tensor(parts[2] * 9))
                layer.reset_running_stats()
        layer(nbgrad.tensor(parts[2]))
        step_taken()
        layer(nbgrad.tensor(parts[1]))
        found.append({name: b.data for name, b in layer.named_buffers()})
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value, err_msg=name)


# --------------------------------------------------------------------------------------- conversion

class Scaled(nn.Module):
    """A normalization of another name, with gamma, beta and nothing that runs."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(np.ones(channels, np.float32))
        self.bias = nn.Parameter(np.zeros(channels, np.float32))
        self.other = nn.Parameter(np.full(3, 7, np.float32))

    def forward(self, x):
        column = (1, -1) + (1,) * (x.ndim - 2)
        return x * self.weight.reshape(column) + self.bias.reshape(column)


def test_conversion_replaces_in_place_and_copies_what_fits():
    model = network().double()
    model[1].weight.data[...] = [1, 2, 3, 4]
    model[1].bias.requires_grad_(False)
    model[6].eval()
    seen = []
    model[1].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    converted = nn.convert_norm(model, lambda bn: Scaled(bn.num_features))
    assert converted is model
    assert [type(m) for m in (model[1], model[6])] == [Scaled, Scaled]
    assert list(model.state_dict())[2:5] == ["1.weight", "1.bias", "1.other"]
    np.testing.assert_array_equal(model[1].weight.data, [1, 2, 3, 4])
    np.testing.assert_array_equal(model[1].other.data, 7)
    assert model[1].other.dtype == np.float64
    assert (model[1].weight.requires_grad, model[1].bias.requires_grad) == (True, False)
    assert (model[1].training, model[6].training) == (True, False)
    values(model, X.astype(np.float64))
    assert seen == [Scaled]


def test_a_norm_with_two_names_stays_one():
    shared = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    nn.convert_norm(model, lambda bn: Scaled(4))
    assert model[1] is model[3]
    assert isinstance(model[1], Scaled)
    alone = nn.convert_norm(nn.BatchNorm1d(4), lambda bn: Scaled(4))
    assert isinstance(alone, Scaled)


def test_blocks_with_their_own_forward_are_converted():
    model = nbgrad.models.resnet20(width=4, image_size=8)
    nn.convert_norm(model, lambda bn: nn.Identity())
    assert not norms(model)
    assert values(model, rng.standard_normal((2, 3, 8, 8)).astype(np.float32)).shape == (2, 10)


def test_by_the_names_that_the_library_knows(monkeypatch):
    asked = []

    def create_norm(name, channels, **settings):
        asked.append((name, channels, settings))
        return nn.GroupNorm(3, channels) if name == "group" else Scaled(channels)

    monkeypatch.setattr(nn.conversion, "create_norm", create_norm)
    nn.convert_norm(nn.BatchNorm2d(6, eps=0.5, bias=False), "group", groups=3)
    nn.convert_norm(nn.BatchNorm1d(4), "scaled", dims=1)
    nn.convert_norm(nn.BatchNorm3d(4), "scaled")
    assert asked == [
        ("group", 6, {"dims": 2, "groups": 3}),     # and what such a layer has, besides
        ("group", 6, {"dims": 2, "eps": 0.5, "affine": True, "bias": False, "groups": 3}),
        ("scaled", 4, {"dims": 1}), ("scaled", 4, {"dims": 3})]


def test_to_group_norm():
    model = nn.convert_norm(network(), "group")
    assert [type(model[i]).__name__ for i in (1, 6)] == ["GroupNorm"] * 2
    np.testing.assert_array_equal(values(model[:1]), values(model.eval()[:1]))


@pytest.mark.parametrize(("to", "options", "becomes"), [
    ("instance", {}, "InstanceNorm1d"), ("layer", {"size": 7}, "LayerNorm"),
    ("layer", {}, "GroupNorm"), ("instance", {"dims": 2}, "InstanceNorm2d")])
def test_a_norm_of_sequences_is_converted_to_one_of_sequences(to, options, becomes):
    """4 samples of 4 channels: what took (C, H, W) would take (N, C, L), too, and err."""
    layer = nn.convert_norm(nn.BatchNorm1d(4), to, **options)
    assert type(layer).__name__ == becomes
    if becomes == "InstanceNorm1d":
        y = layer(nbgrad.randn(4, 4, 7)).detach().numpy()
        np.testing.assert_allclose(y.mean(2), 0, atol=1e-6)         # roundings of float32


def test_a_conversion_that_fails_changes_nothing():
    model = network()
    kinds = [type(m) for m in model]
    with pytest.raises(TypeError, match="expected a Module in place of 6, got int"):
        nn.convert_norm(model, lambda bn: Scaled(4) if bn.num_features == 4 else 1)
    with pytest.raises(ValueError, match=r"expected None or one of .* got 'median'"):
        nn.convert_norm(model, "median")
    with pytest.raises(ValueError, match="takes no options"):
        nn.convert_norm(model, lambda bn: bn, groups=2)
    assert [type(m) for m in model] == kinds


def test_to_layers_that_share_statistics_and_back():
    model = network()
    for workers in (nn.InProcess(1).rank(0), None):
        assert nn.convert_norm(model, "sync", workers=workers) is model
        assert all(m.workers is workers for m in norms(model))
        assert np.isfinite(values(model)).all()
    before = state(model)
    for to, options, said in (("sync", {}, "needs workers="),
                              ("batch", {"affine": 1}, "no options"),
                              ("frozen", {"workers": None}, "takes affine, got workers")):
        with pytest.raises(ValueError, match=said):
            nn.convert_norm(model, to, **options)
    assert_same_state(model, before)


@pytest.mark.parametrize("to", ["frozen", "sync"])
def test_layers_that_stay_are_those_asked_for(to):
    model, worker = network(), nn.InProcess(1).rank(0)
    options = {"workers": worker} if to == "sync" else {}
    nn.convert_norm(model, to, of=nn.BatchNorm1d, **options)
    assert [(m.statistics, m.workers) for m in norms(model)] == [
        ("batch", None), ("frozen", None) if to == "frozen" else ("batch", worker)]
    nn.convert_norm(model, "batch", of=nn.BatchNorm2d)
    assert model[6].statistics == ("frozen" if to == "frozen" else "batch")
    other = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="changes batch norms, and 1 is GroupNorm"):
        nn.convert_norm(other, to, of=(nn.BatchNorm2d, nn.GroupNorm), **options)
    assert (other[0].statistics, other[0].workers) == ("batch", None)


def test_other_norms_are_converted_by_name():
    model = nn.Sequential(nn.GroupNorm(2, 4, eps=0.5, affine=False), nn.LayerNorm(4))
    nn.convert_norm(model, "group", of=nn.GroupNorm, groups=4)
    assert (model[0].num_groups, model[0].eps, model[0].weight) == (4, 0.5, None)
    nn.convert_norm(model, "renorm", of=nn.GroupNorm)
    assert (type(model[0]), model[0].eps, model[0].weight) == (nn.BatchRenorm, 0.5, None)
    with pytest.raises(ValueError, match="LayerNorm does not say its number of channels"):
        nn.convert_norm(model, "group", of=nn.LayerNorm)


def test_every_split_starts_as_the_layer():
    layer = nn.BatchNorm2d(3)
    layer(nbgrad.randn(8, 3, 2, 2) * 3 + 1)
    nn.init.uniform_(layer.weight)
    split = nn.convert_norm(nn.Sequential(layer), "split", num_splits=3)[0]
    for part in (split, *split.aux_bn):
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(part.state_dict()[name].data, value.data)
    x = nbgrad.randn(6, 3, 2, 2)
    want = [layer(x[i:i + 2]).data for i in (0, 2, 4)]
    np.testing.assert_allclose(split(x).data, np.concatenate(want), rtol=1e-6, atol=1e-6)


def test_what_stays_in_place_changes_the_parts_of_a_split_too():
    model, workers = nn.Sequential(nn.SplitBatchNorm(3)), nn.InProcess(1).rank(0)
    nn.convert_norm(model, "sync", of=nn.SplitBatchNorm, workers=workers)
    assert [layer.workers for layer in (model[0], *model[0].aux_bn)] == [workers] * 2
    nn.convert_norm(model, "frozen", of=nn.SplitBatchNorm)
    assert [layer.statistics for layer in (model[0], *model[0].aux_bn)] == ["frozen"] * 2


@pytest.mark.parametrize("to", ["ghost", "split", "renorm", "noisy"])
@pytest.mark.parametrize("settings", [
    {"eps": 0.5}, {"affine": False}, {"bias": False}, {"momentum": None}, {"like": "keras"},
    {"statistics": "population"}, {"statistics": "prediction"}, {"update": "step"}])
def test_to_other_batch_norms_evaluation_stays(to, settings):
    model = network(**settings)
    values(model)
    update_bn(model, loader())
    model[1].running_var.data[...] = [0.1, 1, 2, 3]
    want, old = values(model.eval()), model[1]
    nn.convert_norm(model, to, **({"ghost_size": 64} if to == "ghost" else {}))
    assert type(model[1]) is not type(old)
    np.testing.assert_array_equal(values(model), want)
    for name in ("momentum", "average", "correction", "update", "statistics", "on_nonfinite"):
        assert getattr(model[1], name) == getattr(old, name)


def test_options_win_over_the_settings_of_the_layer():
    old = nn.BatchNorm2d(4, average=nn.Cumulative(), eps=0.5)
    new = nn.convert_norm(old, "ghost", momentum=0.3, affine=False, ghost_size=2)
    assert (new.momentum, new.average, new.eps, new.weight) == (0.3, None, 0.5, None)
    new = nn.convert_norm(old, "ghost", like="keras")
    assert (new.eps, new.average) == (1e-3, nn.Exponential(0.99))


def test_a_frozen_layer_stays_frozen_and_can_be_released():
    layer = nn.freeze_batch_norm(nn.BatchNorm2d(2, statistics="population"))
    new = nn.convert_norm(layer, "ghost")
    assert (new.statistics, new.weight.requires_grad) == ("frozen", False)
    nn.unfreeze_batch_norm(new)
    assert (new.statistics, new.weight.requires_grad) == ("population", True)
    with pytest.raises(ValueError, match="track_running_stats"):
        nn.convert_norm(nn.BatchNorm2d(2, track_running_stats=False), "renorm")


def test_hooks_of_a_layer_that_stays_inside_run_once():
    model, seen = network(), []
    model[1].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    nn.convert_norm(model, lambda bn: nn.Sequential(bn, nn.ReLU()), of=nn.BatchNorm2d)
    values(model)
    assert seen == [nn.BatchNorm2d]


# ----------------------------------------------------------------------------------------- freezing

@pytest.mark.parametrize("affine", [True, False])
def test_frozen_layers_train_by_running_statistics_and_stay(affine):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3))
    update_bn(model, loader())
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(state(model)[0])
    assert nn.freeze_batch_norm(model, affine=affine) is model
    nn.freeze_batch_norm(model, affine=affine)        # once more changes nothing to come back to
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    want = values(model.eval()[0])
    model.train()
    np.testing.assert_array_equal(values(model[0]), want)
    nbgrad.cross_entropy(model(nbgrad.tensor(X)), nbgrad.tensor(Y)).backward()
    optimizer.step()
    now = model.state_dict()
    for name in ("0.bias", "0.running_mean", "0.running_var"):
        np.testing.assert_array_equal(now[name].data, before[name])
    assert np.array_equal(now["0.weight"].data, before["0.weight"]) == affine
    assert not np.array_equal(now["2.weight"].data, before["2.weight"])
    assert nn.unfreeze_batch_norm(model) is model
    assert model[0].statistics == "batch"
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)
    values(model, 2 * X)
    assert not np.array_equal(model[0].running_mean.data, before["0.running_mean"])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"affine": False}])
def test_a_layer_that_was_built_frozen_trains_once_it_is_not(settings, affine):
    layer = nn.FrozenBatchNorm(2, **settings)
    for released in (nn.unfreeze_batch_norm(copy.deepcopy(layer)),
                     nn.unfreeze_batch_norm(nn.freeze_batch_norm(layer, affine=affine)),
                     nn.unfreeze_batch_norm(nn.convert_norm(nn.FrozenBatchNorm(2, **settings),
                                                            "ghost"))):
        assert released.statistics == "batch"
        assert all(p.requires_grad for p in released.parameters())
    frozen = nn.freeze_batch_norm(layer)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_the_words_of_evaluate_win_over_a_layers_policy():
    model = network()
    update_bn(model, loader())
    model[1].running_var.data *= 2
    for word in ("running", "batch", "population"):
        found = [evaluate(m, loader(), statistics=word, train=loader())
                 for m in (model, nn.freeze_batch_norm(copy.deepcopy(model)))]
        assert found[0] == found[1]
    assert evaluate(model, loader()) != evaluate(model, loader(), statistics="batch")


def test_freezing_by_name_of_a_conversion():
    model = network(statistics="population")
    nn.convert_norm(model, "frozen", affine=False)
    assert [m.statistics for m in norms(model)] == ["frozen", "frozen"]
    assert model[1].weight.requires_grad
    nn.convert_norm(copy.deepcopy(model), "batch")
    assert model[1].statistics == "frozen"                # of the copy only
    nn.convert_norm(model, "batch")
    assert [m.statistics for m in norms(model)] == ["population", "batch"]
    built = nn.unfreeze_batch_norm(nn.BatchNorm1d(2, statistics="frozen"))
    assert built.statistics == "batch"


def test_without_running_statistics_nothing_is_frozen():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="1 keeps no running statistics"):
        nn.freeze_batch_norm(model)
    assert model[0].statistics == "batch"


# ------------------------------------------------------------------------------------------ folding

def trained(**settings):
    model = network(**settings)
    update_bn(model, loader())
    model[1].weight.data[...] = [0.5, -3, 0, 1]
    return model.eval()


def test_fold_says_how_far_it_is():
    model, x = trained(), nbgrad.tensor(X)
    folded, deviation, condition, layers, left = nbgrad.fold(model, x)
    assert (layers, left) == (("1", "6"), ())
    assert [type(folded[i]) for i in (1, 6)] == [nn.Identity, nn.Identity]
    assert deviation == np.abs(values(folded) - values(model)).max()
    assert 0 < deviation < 1e-5
    scales = [np.abs(m.weight.data) / np.sqrt(m.running_var.data + m.eps) for m in norms(model)]
    assert condition == pytest.approx(max(s.max() for s in scales))
    exact = nbgrad.fold(model.double(), nbgrad.tensor(X.astype(np.float64)))
    assert exact.deviation < 1e-13


def test_the_condition_foretells_the_deviation():
    model, x = trained(), nbgrad.tensor(X)
    model[1].running_var.data[1] = 1e-8
    worse = nbgrad.fold(model, x)
    assert worse.condition == pytest.approx(3 / np.sqrt(1e-8 + 1e-5), rel=1e-4)
    model[1].running_var.data[1] = 1
    assert worse.deviation > 10 * nbgrad.fold(model, x).deviation


def test_fold_without_norms_or_without_an_example():
    model = nn.Linear(2, 2)
    assert nn.fold(model, nbgrad.randn(3, 2))[1:] == (0.0, 0.0, (), ())
    with pytest.raises(TypeError, match="example"):
        nn.fold(model)


VARIANTS = [nn.BatchNorm, nn.FrozenBatchNorm, nn.SyncBatchNorm, nn.GhostBatchNorm, nn.BatchRenorm,
            nn.SplitBatchNorm, nn.NoisyBatchNorm]


def with_variant(kind, **settings):
    """A convolution and a norm of that kind, with statistics and gamma that are no start."""
    nbgrad.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), kind(4, **settings), nn.ReLU())
    model[1].running_mean.data[...] = [1, -1, 0.5, 0]
    model[1].running_var.data[...] = [0.5, 1, 2, 4]
    if model[1].weight is not None:
        model[1].weight.data[...] = [0.5, -3, 0, 1]
    return model


@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"bias": False}])
@pytest.mark.parametrize("kind", VARIANTS)
def test_every_norm_that_evaluates_as_batch_norm_folds(kind, settings):
    model, x = with_variant(kind, **settings).eval(), nbgrad.tensor(X)
    want = values(model)
    folded = nbgrad.fold(model, x)
    assert (folded.layers, folded.left) == (("1",), ())
    assert folded.condition == pytest.approx(3 if model[1].weight is not None else 2 ** 0.5,
                                             rel=3e-3)                     # eps of up to 1e-3
    for new in (folded.model, nbgrad.fuse(model)):
        assert type(new[1]) is nn.Identity
        # float32 with |w x| of up to 20 and scales of up to 3
        np.testing.assert_allclose(values(new), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_mode_of_a_frozen_norm_matters_only_where_it_does_something(kind):
    model, x = nn.freeze_batch_norm(with_variant(kind)).train(), nbgrad.tensor(X)
    if kind in (nn.SplitBatchNorm, nn.NoisyBatchNorm):
        with pytest.raises(ValueError, match=r"1 is in training mode; call model\.eval"):
            nbgrad.fold(model, x)
        return
    want = values(model)
    folded = nbgrad.fold(model, x)
    assert folded.layers == ("1",)
    np.testing.assert_allclose(values(folded.model), want, rtol=1e-5, atol=1e-5)
    model[1].statistics = "running"
    with pytest.raises(ValueError, match="is in training mode"):
        nbgrad.fold(model, x)


def test_fold_says_what_it_left():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda module, args, y: y * 2)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), hooked, nn.Conv2d(4, 4, 1), Own(4),
                          nn.Conv2d(4, 4, 1), nn.SplitBatchNorm(4), nn.SplitBatchNorm(4),
                          nn.Conv2d(4, 4, 1), nn.EvoNormB0(4), nn.LayerNorm(6)).eval()
    want = values(model)
    folded = nbgrad.fold(model, nbgrad.tensor(X))
    assert folded.layers == ("5",)
    assert folded.left == ("1", "3", "6", "8")
    np.testing.assert_allclose(values(folded.model), want, rtol=1e-5, atol=1e-5)


class Called(nn.Module):
    """A block whose layers are called by keyword, the batch norm with more than x."""

    def __init__(self, **settings):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()
        self.settings = settings

    def forward(self, x):
        given = {name: x if value == "x" else value for name, value in self.settings.items()}
        return self.act(x=self.bn(x=self.conv(x=x), **given))


@pytest.mark.parametrize("settings", [
    {}, {"activation": "relu"}, {"residual": "x"}, {"residual": "x", "activation": "relu"},
    {"mask": None}, {"mask": [0, 0, 0, 1, 1, 1], "residual": "x"}])
def test_tools_see_norms_that_are_called_by_keyword(settings):
    """update_bn, the doctor and fold, which keeps what comes behind the norm."""
    model, x = Called(**settings), nbgrad.tensor(X[:6])
    found = update_bn(model, [x])["bn"][0]
    there = X[3:6] if settings.get("mask") is not None else X[:6]
    np.testing.assert_allclose(found, values(model.conv, there).mean((0, 2, 3)), atol=1e-6)
    assert bn_doctor(model, [x]).ok
    folded = nbgrad.fold(model.eval(), x)
    assert folded.layers == ("bn",)
    np.testing.assert_allclose(values(folded.model, X[:6]), values(model, X[:6]), atol=1e-5)


@pytest.mark.parametrize("norm", [
    lambda: nn.LpBatchNorm(4, p=1), lambda: nn.LpBatchNorm(4, p=np.inf, affine=False),
    lambda: nn.MeanOnlyBatchNorm(4), lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)])
def test_norms_with_other_statistics_fold_where_they_are_affine(norm):
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), norm(), nn.ReLU()), nbgrad.tensor(X)
    for _ in range(5):
        model(x)
    with pytest.raises(ValueError, match="1 is in training mode"):
        nbgrad.fold(model, x)
    model.eval()
    folded = nbgrad.fold(model, x)
    assert (folded.layers, folded.left) == (("1",), ())
    np.testing.assert_allclose(values(folded.model), values(model), rtol=1e-5, atol=1e-5)
    next(model[1].buffers()).data[1] = np.nan
    with pytest.raises(ValueError, match="1 cannot normalize"):
        nbgrad.fold(model, x)


def test_instance_norm_of_single_samples_is_not_folded():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4)).eval()
    assert nbgrad.fold(model, nbgrad.tensor(X))[3:] == ((), ())


@pytest.mark.parametrize(("change", "said"), [
    (lambda bn: bn.train(), "batch's statistics"),
    (lambda bn: setattr(bn, "statistics", "prediction"), "batch's statistics"),
    (lambda bn: bn.running_var.data.__setitem__(2, np.nan), "cannot normalize channel 2.*var nan"),
    (lambda bn: bn.running_mean.data.__setitem__(0, np.inf), "channel 0: running mean inf"),
    (lambda bn: bn.running_var.data.__setitem__(slice(1, 3), -1e-3), "channel 1.*1 more"),
    (lambda bn: (setattr(bn, "eps", 0.0), bn.running_var.data.__setitem__(1, 0)), "channel 1"),
    (lambda bn: (setattr(bn, "statistics", "population"), bn.num_batches_tracked.data.fill(0)),
     "update_bn"),
])
def test_what_cannot_be_folded_is_refused(change, said):
    model = trained()
    change(model[1])
    for attempt in (nbgrad.fold, nbgrad.fuse):
        with pytest.raises(ValueError, match=said):
            attempt(model, nbgrad.tensor(X))
    assert [type(m) for m in model][::5] == [nn.Conv2d, nn.Linear]
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(("to", "options"), [
    ("layer", {}), ("layer", {"size": (2, 2)}), ("instance", {}), ("lp", {}), ("evonorm_b0", {}),
    ("evonorm_s0", {}), ("rms", {"size": (2, 2)}), ("group", {}), ("switchable", {}),
    ("mean_only", {}), ("filter_response", {}), ("decorrelated", {})])
def test_other_norms_get_what_settings_they_have(to, options):
    old = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3, affine=False)
    new = nn.convert_norm(old, to, **options)
    assert new.eps == (0 if to == "mean_only" else 1e-3)
    assert getattr(new, "momentum", 0.3) == 0.3
    assert new.weight is None
    assert getattr(new, "bias", None) is None
    usual = nn.convert_norm(nn.BatchNorm2d(4, average=nn.Cumulative()), to, **options)
    assert getattr(usual, "momentum", 0.1) == 0.1
    assert (usual.weight is None) == (to == "mean_only")
    own = nn.convert_norm(old, to, **options, **({} if to == "mean_only" else {"eps": 0.5}))
    assert own.eps == (0 if to == "mean_only" else 0.5)


# ------------------------------------------------------------------------------ refused at the door

MOVING = [nn.BatchNorm1d, nn.GhostBatchNorm, nn.SplitBatchNorm, nn.SyncBatchNorm, nn.BatchRenorm,
          nn.NoisyBatchNorm, nn.InstanceNorm1d, nn.LpBatchNorm]


@pytest.mark.parametrize("kind", MOVING)
@pytest.mark.parametrize("momentum", [float("nan"), -1, 5, "x"])
def test_momentum_is_a_share(kind, momentum):
    with pytest.raises(ValueError, match=f"{kind.__name__}: momentum must be from 0 to 1, or None"):
        kind(3, momentum=momentum)


@pytest.mark.parametrize("kind", MOVING[:6])
def test_of_momentum_and_average_only_one_is_said(kind):
    for settings in ({"like": "keras"}, {"average": nn.Cumulative()}):
        layer = kind(3, **settings)
        assert "momentum=" not in repr(layer)
        assert layer.extra_repr().count("average=") == 1
        for momentum in (0.1, 0.01, 0.5, None):
            with pytest.raises(ValueError, match="give"):
                kind(3, momentum=momentum, **settings)
    assert "momentum=0.2, affine" in repr(kind(3, momentum=0.2))
    assert type(kind(3).momentum) is float
    assert nn.FrozenBatchNorm(3, like="keras").eps == 1e-3
    assert nn.LazyBatchNorm1d(like="keras")(nbgrad.randn(4, 3)).shape == (4, 3)


@pytest.mark.parametrize("channels", [2.5, None, "8", -1, True])
@pytest.mark.parametrize("name", ["batch", "group", "local", "decorrelated", "evonorm_s0"])
def test_channels_are_a_number(name, channels):
    with pytest.raises(ValueError, match="create_norm: channels must be an int of at least 0"):
        nn.create_norm(name, channels)


@pytest.mark.parametrize(("build", "error", "said"), [
    (lambda: nn.LocalResponseNorm(0), ValueError, "LocalResponseNorm: size must be at least 1"),
    (lambda: nn.LocalResponseNorm(2.5), ValueError, "LocalResponseNorm: size must be an int"),
    (lambda: nn.SyncBatchNorm(3, workers=3), TypeError, "SyncBatchNorm: expected workers with"),
    (lambda: nn.convert_norm(nn.BatchNorm1d(3), "sync", workers=3), TypeError,
     "convert_norm: expected workers with"),
    (lambda: nn.NoisyBatchNorm(3, generator=3), TypeError, "expected generator to be"),
    (lambda: nn.convert_norm(nn.BatchNorm1d(3), None), TypeError, "expected a name or a function")])
def test_wrong_arguments_are_refused_by_the_constructor(build, error, said):
    with pytest.raises(error, match=said):
        build()


@pytest.mark.parametrize("batch", [{"x": 1}, (), [], [{}], 3, "x", (np.zeros((4, 3)),)])
def test_batches_that_hold_no_input(batch):
    model = nn.Sequential(nn.BatchNorm1d(3))
    for work in (update_bn, bn_doctor):
        with pytest.raises(TypeError, match="expected batches that are a Tensor, or a tuple or"):
            work(model, [batch])


@pytest.mark.parametrize("x", [np.full((4, 2), np.nan), np.zeros((0, 2))])
def test_an_example_that_shows_nothing(x):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    for work in (nn.fold, nn.fuse):
        with pytest.raises(ValueError, match="it shows nothing"):
            work(model, nbgrad.tensor(x.astype(np.float32)))


def test_the_doctor_of_an_instance_norm_that_never_moves():
    model = nn.Sequential(nn.InstanceNorm1d(3, momentum=None, track_running_stats=True))
    (said,) = bn_doctor(model, [nbgrad.randn(8, 3, 4)]).problems[-1:]
    assert said.code == "never-updated"
    assert "nan" not in str(said)
    assert said.evidence == {"batches tracked": 0}


@pytest.mark.parametrize(("name", "call"), [
    ("convert_norm", lambda m: nn.convert_norm(m, "group")),
    ("freeze_batch_norm", nn.freeze_batch_norm), ("unfreeze_batch_norm", nn.unfreeze_batch_norm),
    ("fold", lambda m: nn.fold(m, nbgrad.ones(2, 3))), ("update_bn", lambda m: update_bn(m, [])),
    ("adapt", lambda m: adapt(m, [])), ("bn_doctor", lambda m: bn_doctor(m, []))])
def test_a_model_that_is_none_is_named(name, call):
    with pytest.raises(TypeError, match=f"{name}: expected the model as an nn.Module, got f"):
        call(lambda x: x)


@pytest.mark.parametrize("batches", [0, 1.5, "2"])
def test_the_doctor_looks_at_a_whole_number_of_batches(batches):
    with pytest.raises(ValueError, match=f"a whole number of at least 1, got {batches}"):
        bn_doctor(nn.BatchNorm1d(3), [nbgrad.randn(4, 3)], batches=batches)
