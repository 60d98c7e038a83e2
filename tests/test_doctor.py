"""bn_doctor: every planted cause is named, and healthy models have no problem."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import models, nn, optim
from nbgrad.data import DataLoader, TensorDataset
from nbgrad.train import bn_doctor, evaluate, update_bn

TRAIN, TEST = nbgrad.data.load("digits", standardize=True)
X, Y = (t.data for t in TRAIN.tensors)


def loader(size=60, x=X, y=Y, **settings):
    """Shuffled batches of one size, from a generator of their own."""
    data = TensorDataset(nbgrad.tensor(x), nbgrad.tensor(y))
    settings = {"shuffle": True, "drop_last": True, "generator": nbgrad.Generator(3), **settings}
    return DataLoader(data, size, **settings)


def unseen(scale=1.0, shift=0.0):
    x, y = (t.data for t in TEST.tensors)
    return loader(60, x * np.float32(scale) + np.float32(shift), y)


def fit(model, steps=100, size=60, lr=0.1, decay=0.0, data=None):
    """SGD with momentum; gamma is decayed, too, if there is decay."""
    optimizer = optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    model.train()
    batches = data or loader(size)
    while steps:
        for x, target in batches:
            optimizer.zero_grad()
            nbgrad.cross_entropy(model(x), target).backward()
            optimizer.step()
            steps -= 1
            if not steps:
                break
    return optimizer


def network(**settings):
    nbgrad.manual_seed(0)
    model = models.mlp(hidden=(40, 40))
    for name in ("norm1", "norm2"):
        setattr(model, name, nn.BatchNorm1d(40, **settings))
    return model


@pytest.fixture(scope="module")
def trained():
    model = network()
    fit(model)
    return model


@pytest.fixture
def healthy(trained):
    return copy.deepcopy(trained)


def codes(report):
    return [f.code for f in report.problems]


def finding(report, code):
    (one,) = [f for f in report.findings if f.code == code]
    return one


# ----------------------------------------------------------------------------------- healthy models

@pytest.mark.parametrize(("name", "settings", "steps"), [
    ("mlp", {}, 100), ("mlp", {"activation": "sigmoid"}, 100), ("mlp", {"placement": "after"}, 100),
    ("mlp", {"norm": None}, 30), ("mlp", {"norm": "layer"}, 30), ("mlp", {"dropout": 0.1}, 120),
    ("lenet", {"image_size": 8}, 100), ("lenet", {"image_size": 8, "placement": "after"}, 100),
    ("resnet20", {"in_channels": 1, "width": 4, "image_size": 8}, 80)])
def test_healthy_models_have_no_problem(name, settings, steps):
    nbgrad.manual_seed(1)
    model = models.create(name, **settings)
    fit(model, steps, lr=0.05)
    optimizer = fit(model, 20, lr=0.005)
    report = bn_doctor(model, loader(), test=unseen(), optimizer=optimizer, batches=8)
    assert report.ok, str(report)
    assert "no problem found" in str(report)
    assert all(e.samples == 480 for e in report.evaluations.values())
    if settings.get("norm", "batch") == "batch":
        assert list(report.evaluations) == ["running", "batch", "population"]


def test_gammas_that_start_at_zero_are_healthy_for_a_while():
    model = network()
    for name in ("norm1", "norm2"):
        layer = nn.BatchNorm1d(40)
        layer.weight.data[...] = 0
        skip = nn.Sequential(nn.Linear(40, 40), layer)
        setattr(model, name, Beside(getattr(model, name), skip))
    optimizer = fit(model, 40, lr=0.01, decay=1e-4)
    report = bn_doctor(model, loader(), optimizer=optimizer)
    assert report.ok, str(report)
    noted = finding(report, "weight-decay-on-gamma")
    assert noted.evidence["median |gamma|"] < 0.1
    assert not noted.problem


class Beside(nn.Module):
    def __init__(self, norm, branch):
        super().__init__()
        self.norm, self.branch = norm, branch

    def forward(self, x):
        return self.norm(x) + self.branch(x)


@pytest.mark.parametrize("identical", [False, True])
@pytest.mark.parametrize("count", [1, 20])
def test_single_samples_say_nothing_of_the_statistics(identical, count):
    layer, rows = nn.BatchNorm1d(6, momentum=None), np.random.default_rng(5)
    for _ in range(20):
        layer(nbgrad.tensor((rows.standard_normal((50, 6)) + 3).astype(np.float32)))
    x = nbgrad.tensor((rows.standard_normal((count, 6)) + 3).astype(np.float32))
    batches = [x[:1] if identical else x[i:i + 1] for i in range(count)]
    assert codes(bn_doctor(nn.Sequential(layer), batches)) == ["tiny-batches"]


@pytest.mark.parametrize("settings", [
    {"momentum": 0.01}, {"momentum": None}, {"like": "keras"}, {"correction": 0},
    {"average": nn.DebiasedExponential(0.99)}, {"statistics": "population"},
    {"statistics": "prediction"}, {"update": "step"}, {"momentum": 0.3}])
def test_every_policy_can_be_healthy(settings):
    model = network(**settings)
    fit(model, 100)
    if settings.get("momentum", 0) in (None, 0.01) or {"like", "average"} & settings.keys():
        fit(model, 400, lr=1e-3)                          # long averages need long, calm training
    if settings.get("statistics") == "population":
        update_bn(model, loader())
    report = bn_doctor(model.eval(), loader(), test=unseen())
    assert report.ok, str(report)


def test_frozen_layers_that_fit_are_healthy(healthy):
    nn.freeze_batch_norm(healthy)
    assert bn_doctor(healthy, loader(), test=unseen()).ok
    by_mode = nn.unfreeze_batch_norm(healthy)
    by_mode.norm1.eval()
    by_mode.norm2.eval()
    assert bn_doctor(by_mode, loader()).ok


def test_a_model_without_batch_norm():
    report = bn_doctor(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), loader())
    assert report.ok
    assert str(report).startswith("no batch norm, training mode; 1,380 samples in 23 batches of 60")
    assert list(report.evaluations) == ["running"]


def test_nothing_is_changed_by_looking(healthy):
    healthy.norm2.eval()
    before = {k: v.data.copy() for k, v in healthy.state_dict().items()}
    modes = [m.training for m in healthy.modules()]
    batches, generator = loader(), nbgrad.default_generator.get_state()
    order = batches.generator.get_state()
    bn_doctor(healthy, batches, test=unseen())
    for name, value in before.items():
        np.testing.assert_array_equal(healthy.state_dict()[name].data, value)
    assert [m.training for m in healthy.modules()] == modes
    assert healthy.norm1.statistics == "batch"
    assert all(m._hooks is None for m in healthy.modules())
    assert nbgrad.default_generator.get_state() == generator
    assert batches.generator.get_state() == order


def test_no_state_of_other_layers_is_changed_by_looking():
    nbgrad.manual_seed(2)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
                          nn.LpBatchNorm(6), nn.NoisyBatchNorm(6, generator=nbgrad.Generator(4)),
                          nn.Unflatten(1, (3, 2)), nn.InstanceNorm1d(3, track_running_stats=True),
                          nn.Flatten(), nn.BatchNorm1d(6))
    batches = [(nbgrad.randn(8, 6) + 3, nbgrad.tensor(np.arange(8) % 6)) for _ in range(3)]
    before = {k: v.data.copy() for k, v in model.state_dict().items()}
    stream = model[2].generator.get_state()
    want = evaluate(model, batches)
    report = bn_doctor(model, batches, test=batches)
    assert report.evaluations["running"] == want        # by the statistics that it came with
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name].data, value, err_msg=name)
    assert model[2].generator.get_state() == stream


# ----------------------------------------------------------------------------------- planted causes

def test_too_few_steps_for_the_decay():
    model = network(momentum=0.01)
    fit(model, 40)
    report = bn_doctor(model, loader(), test=unseen())
    assert codes(report) == ["remembers-start"]
    found = finding(report, "remembers-start")
    assert set(found.layers) == {"norm1", "norm2"}
    assert found.evidence["share of the start"] == pytest.approx(0.99 ** 40)
    gap = report.evaluations
    assert gap["population"].accuracy > gap["running"].accuracy


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1, 50), (1, 9), (1, -5), (50, 5), (0.1, 0.5)])
def test_what_update_bn_wrote_remembers_no_start(scale, shift, forgets):
    model = nn.Sequential(nn.BatchNorm1d(3))
    batches = [nbgrad.randn(40, 3, generator=nbgrad.Generator(i)) for i in range(4)]
    update_bn(model, [x + 5 for x in batches])
    if forgets:
        model[0].num_batches_tracked.data[...] = 0        # a state without it
    report = bn_doctor(model, [x * scale + shift for x in batches])
    assert codes(report) == ["other-data"]
    assert "share of the start" not in finding(report, "other-data").evidence


def test_statistics_that_nothing_ever_moved(healthy):
    for layer in (healthy.norm1, healthy.norm2):
        layer.reset_running_stats()                       # loaded without its buffers
    report = bn_doctor(healthy, loader())
    assert codes(report) == ["never-updated"]
    assert finding(report, "never-updated").evidence["batches tracked"] == 0


def test_momentum_zero():
    model = network(momentum=0.0)
    fit(model, 30)
    assert codes(bn_doctor(model, loader())) == ["momentum-zero"]


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_momentum_in_the_sense_of_keras(momentum):
    model = network(momentum=momentum)
    fit(model, 100)
    report = bn_doctor(model, loader())
    assert codes(report) == ["last-batch-only"]
    found = finding(report, "last-batch-only")
    assert found.evidence["batches averaged"] == pytest.approx((2 - momentum) / momentum)
    assert "Keras" in found.cause


@pytest.mark.parametrize("size", [2, 4])
def test_tiny_batches(size):
    model = network()
    fit(model, 150, size, lr=0.01)
    report = bn_doctor(model, loader(size, X[:400], Y[:400]))
    assert codes(report) == ["tiny-batches"]
    assert finding(report, "tiny-batches").evidence["samples per batch (median)"] == size


def test_a_last_batch_of_one_sample(healthy):
    report = bn_doctor(healthy, loader(60, X[:721], Y[:721], drop_last=False))
    assert codes(report) == ["single-sample-batch"]
    assert report.evaluations["batch"].samples == 720


def test_batches_of_one_sample_in_a_layer_that_needs_two():
    report = bn_doctor(network(), loader(1, X[:9], Y[:9]))
    assert "tiny-batches" in codes(report)


class Shared(nn.Module):
    """Two inputs of different sizes through one batch norm."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Linear(20, 10)

    def forward(self, x):
        x = x.reshape((x.shape[0], -1))
        return self.out(nbgrad.relu(self.norm(self.fc(x)) + self.norm(self.fc(x * 4 + 3))))


def test_a_layer_used_twice():
    nbgrad.manual_seed(0)
    model = Shared()
    fit(model)
    report = bn_doctor(model, loader())
    assert codes(report) == ["used-twice"]
    found = finding(report, "used-twice")
    assert found.layers == ("norm",)
    assert found.evidence["calls per forward pass"] == 2


def test_dropout_right_before_batch_norm():
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.BatchNorm1d(40), nn.Tanh(),
                          nn.Dropout(0.5), nn.BatchNorm1d(40), nn.Linear(40, 10))
    fit(model)
    report = bn_doctor(model, loader())
    assert codes(report) == ["dropout-before-norm"]
    found = finding(report, "dropout-before-norm")
    assert found.layers == ("5",)
    assert found.evidence["variance, evaluation / training"] == pytest.approx(0.5, abs=0.03)


def test_weight_decay_that_wins_over_gamma():
    model = network()
    optimizer = fit(model, 150, decay=0.2)
    report = bn_doctor(model, loader(), optimizer=optimizer)
    assert "weight-decay-on-gamma" in codes(report)
    assert finding(report, "weight-decay-on-gamma").evidence["weight decay"] == 0.2
    mild = bn_doctor(network(), loader(), optimizer=optim.SGD(
        (model := network()).parameters(), lr=0.1, weight_decay=1e-4))
    assert "weight-decay-on-gamma" not in [f.code for f in mild.findings]     # not this model's
    fit(model)
    noted = bn_doctor(model, loader(), optimizer=optim.SGD(model.parameters(), lr=0.1,
                                                           weight_decay=1e-4))
    assert noted.ok
    assert not finding(noted, "weight-decay-on-gamma").problem
    spared = optim.SGD(optim.param_groups(model, 1e-4), lr=0.1)
    assert not bn_doctor(model, loader(), optimizer=spared).findings


@pytest.mark.parametrize("how", ["closed", "gamma"])
def test_dead_channels(healthy, how):
    if how == "closed":
        healthy.norm1.bias.data[:25] = -50
    else:
        healthy.norm1.weight.data[:25] = 1e-6
        healthy.norm1.bias.data[:25] = 1
    report = bn_doctor(healthy, loader())
    assert "dead-channels" in codes(report)
    found = finding(report, "dead-channels")
    assert found.layers == ("norm1",)
    assert found.evidence["closed by the ReLU" if how == "closed" else "gamma near 0"] == 25


def test_constant_channels(healthy):
    healthy.fc1.weight.data[:25] = 0
    report = bn_doctor(healthy, loader())
    assert "constant-channels" in codes(report)
    assert finding(report, "constant-channels").evidence["channels"] == 25


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_non_finite_or_negative_statistics(healthy, value):
    healthy.norm2.running_var.data[3:5] = value
    report = bn_doctor(healthy, loader())
    assert codes(report) == ["non-finite-statistics"]
    assert finding(report, "non-finite-statistics").layers == ("norm2",)


def test_non_finite_data(healthy):
    x = X.copy()
    x[5, 0, 2, 2] = np.nan
    assert "non-finite-data" in codes(bn_doctor(healthy, loader(x=x)))


def test_training_mode_left_on_in_validation(healthy):
    for _ in range(10):
        for x, _y in unseen(3.0, 2.0):
            healthy(x)
    report = bn_doctor(healthy, loader(), test=unseen(3.0, 2.0))
    assert codes(report)[0] == "moved-in-validation"
    assert "norm1" in finding(report, "moved-in-validation").layers


def test_a_layer_left_in_training_mode(healthy):
    healthy.eval()
    healthy.norm2.train()
    report = bn_doctor(healthy, loader())
    assert codes(report) == ["left-in-training-mode"]
    assert finding(report, "left-in-training-mode").layers == ("norm2",)


def test_inputs_smaller_than_eps():
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40, bias=False), nn.BatchNorm1d(40),
                          nn.ReLU(), nn.Linear(40, 10))
    model[1].weight.data[...] *= 1e-3
    fit(model, 100, lr=0.0)
    report = bn_doctor(model, loader())
    assert codes(report) == ["eps-dominates"]
    assert finding(report, "eps-dominates").evidence["median variance"] < 1e-5


@pytest.mark.parametrize(("scale", "shift"), [(255.0, 0.0), (0.1, 0.0), (1.0, 3.0)])
def test_inputs_prepared_differently(healthy, scale, shift):
    report = bn_doctor(healthy, loader(x=X * np.float32(scale) + np.float32(shift)))
    assert codes(report)[0] == "other-data"
    found = finding(report, "other-data")
    assert found.layers[0] == "norm1"
    assert ("vary about" in found.cause) == (shift == 0)
    if not shift:
        assert found.evidence["spread of the data / running"] == pytest.approx(scale, rel=0.1)


def test_test_data_prepared_differently(healthy):
    report = bn_doctor(healthy, loader(), test=unseen(0.2, 1.0))
    assert codes(report) == ["test-data-differ"]


@pytest.mark.parametrize("how", ["frozen", "eval"])
def test_frozen_layers_whose_statistics_are_stale(how, healthy):
    if how == "frozen":
        nn.freeze_batch_norm(healthy)
    else:
        healthy.norm1.eval()
        healthy.norm2.eval()
    with nbgrad.no_grad():
        healthy.fc1.weight.mul_(4)                        # the layer before was trained on
    report = bn_doctor(healthy, loader())
    assert codes(report)[0] == "stale-frozen"
    assert finding(report, "stale-frozen").layers[0] == "norm1"


def test_weights_moved_on_after_the_first_layer(healthy):
    with nbgrad.no_grad():
        healthy.fc2.weight.mul_(3)
        healthy.fc2.bias.add_(nbgrad.tensor(np.linspace(-9, 9, 40, dtype=np.float32)))
    report = bn_doctor(healthy, loader())
    assert codes(report) == ["lagging"]
    assert finding(report, "lagging").layers == ("norm2",)


def test_a_lag_that_costs_nothing_is_a_note(healthy):
    with nbgrad.no_grad():
        healthy.fc2.weight.mul_(3)                        # larger outputs of the same order
    report = bn_doctor(healthy, loader())
    assert report.ok
    assert [f.code for f in report.findings] == ["lagging"]
    assert str(report).index("no problem found") < str(report).index("note: lagging in norm2")


def test_sorted_by_class(healthy):
    order = np.argsort(Y, kind="stable")
    report = bn_doctor(healthy, loader(x=X[order], y=Y[order], shuffle=False))
    assert codes(report) == ["unshuffled"]


def test_statistics_of_the_batch_at_evaluation_are_a_note():
    for settings in ({"track_running_stats": False}, {"statistics": "prediction"}):
        report = bn_doctor(network(**settings), loader(), batches=3)
        assert report.ok
        assert [f.code for f in report.findings] == ["batch-statistics-at-evaluation"]


# ------------------------------------------------------------------------------------- what is said

def test_what_the_doctor_advises_cures():
    model = network(momentum=0.01)
    fit(model, 40)
    assert "update_bn" in finding(bn_doctor(model, loader()), "remembers-start").advice
    before = evaluate(model, loader()).accuracy
    update_bn(model, loader())
    for layer in (model.norm1, model.norm2):
        layer.momentum = 0.1
    assert bn_doctor(model, loader()).ok
    assert evaluate(model, loader()).accuracy > before


def test_the_report_in_words(healthy):
    healthy.norm1.reset_running_stats()
    text = str(bn_doctor(healthy, loader()))
    lines = text.splitlines()
    assert lines[0] == "2 batch norms, training mode; 1,380 samples in 23 batches of 60 to 60"
    assert lines[2].split() == ["statistics", "accuracy", "loss"]
    assert [line.split()[0] for line in lines[4:7]] == ["running", "batch", "population"]
    assert any(line.startswith("norm1  0 ") for line in lines)
    at = lines.index("problem: never-updated in norm1")
    assert [line.split(":")[0].strip() for line in lines[at + 2:at + 4]] == ["evidence",
                                                                            "what to do"]
    assert "no problem found" not in text


def test_losses_of_other_kinds_and_bare_inputs_have_no_evaluation(healthy):
    inputs = [x for x, _ in loader()]
    report = bn_doctor(healthy, inputs)
    assert report.ok
    assert report.evaluations == {}


class Elsewhere(nn.Module):
    """Batch norm whose output has another form."""

    def __init__(self, form):
        super().__init__()
        self.norm, self.form = nn.BatchNorm1d(4), form

    def forward(self, x):
        return self.form(self.norm(x))


@pytest.mark.parametrize(("form", "classes"), [
    (lambda y: y, 9), (lambda y: {"y": y}, 2), (lambda y: (y, y), 2), (lambda y: y.data, 2),
    (lambda y: None, 2), (lambda y: y.sum(1), 2), (lambda y: y.reshape(-1, 2, 2), 2)])
def test_labels_that_do_not_belong_to_the_output_have_no_evaluation(form, classes):
    x, target = nbgrad.randn(8, 4), nbgrad.tensor(np.arange(8) % classes)
    report = bn_doctor(Elsewhere(form), [(x, target)] * 3)
    assert report.evaluations == {}
    assert [layer.name for layer in report.examination.layers] == ["norm"]


def test_loaders_that_cannot_be_looked_at(healthy):
    with pytest.raises(ValueError, match="no samples"):
        bn_doctor(healthy, [])
    with pytest.raises(ValueError, match="iterator ends"):
        bn_doctor(healthy, iter(loader()))
    with pytest.raises(ValueError, match="batches must be"):
        bn_doctor(healthy, loader(), batches=0)


# ------------------------------------------------------------------- norms with other statistics

OTHERS = [nn.LpBatchNorm, nn.MeanOnlyBatchNorm, nn.DecorrelatedBatchNorm,
          lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True)]


def other(kind, batches=0):
    """A model of one such norm, after some batches in training mode; and a loader."""
    model = nn.Sequential(nn.Unflatten(1, (4, 5)), kind(4), nn.Flatten(), nn.Linear(20, 2))
    data = [(nbgrad.randn(16, 20) + 2, nbgrad.tensor(np.arange(16) % 2)) for _ in range(3)]
    for i in range(batches):
        model(data[i % 3][0])
    return model, data


@pytest.mark.parametrize("kind", OTHERS)
def test_other_norms_that_are_healthy_are_named_in_a_note(kind):
    report = bn_doctor(*other(kind, 60))
    assert report.ok
    assert [(f.code, f.layers) for f in report.findings] == [("other-statistics", ("1",))]
    assert "no problem found" in str(report)


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_wrong_with_other_norms(kind):
    model, data = other(kind)
    assert codes(bn_doctor(model, data)) == ["never-updated"]
    model, data = other(kind, 60)
    model.eval()[1].train()
    assert codes(bn_doctor(model, data)) == ["left-in-training-mode"]
    model.eval()
    next(b for b in model[1].buffers() if b.dtype.kind == "f").data[...] = np.nan
    assert codes(bn_doctor(model, data)) == ["non-finite-statistics"]
