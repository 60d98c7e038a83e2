"""The training loop: what it computes, what it records, and that a resumed run is the same run."""

import csv
import math
import os
import signal
import struct

import numpy as np
import pytest

from nbgrad import nn, optim
from nbgrad.autograd import Tensor, as_tensor, no_grad
from nbgrad.data import DataLoader, TensorDataset, load
from nbgrad.nn.functional import cross_entropy
from nbgrad.ops.random import Generator, default_generator, manual_seed
from nbgrad.train import checkpoint
from nbgrad.train.config import CHOICES, Config, defaults
from nbgrad.train.evaluation import evaluate
from nbgrad.train.loop import Interrupted, Trainer
from nbgrad.train.metrics import CsvLog, TensorBoardLog, grad_norm, norm_statistics
from nbgrad.train.population import population_statistics
from nbgrad.train.progress import Lines, Silent, progress
from nbgrad.train.report import epochs_to, finding, summarize, table
from nbgrad.train.setup import build_model, load_task, loader, trainer

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, size=(70, 6)).astype(np.float32)
Y = (X[:, 0] * X[:, 1] > 4).astype(np.int64)
DATA = TensorDataset(as_tensor(X), as_tensor(Y))


def network(dropout=0.0, seed=0):
    manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 2))


def batches(seed=1, size=16, shuffle=True):
    return DataLoader(DATA, size, shuffle, generator=Generator(seed), drop_last=shuffle)


def run(optimizer="sgd", dropout=0.0, generator=True, **settings):
    model = network(dropout)
    opt = {"sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
           "adam": lambda p: optim.Adam(p, lr=0.01)}[optimizer](model.parameters())
    train = batches() if generator else DataLoader(DATA, 16, True, drop_last=True)
    schedule = optim.schedule.CosineAnnealingLR(opt, 12)
    manual_seed(5)
    return Trainer(model, opt, train, batches(shuffle=False), schedule=schedule, **settings)


def arrays(one):
    """Everything that the rest of a run depends on, as comparable values."""
    state = one.state_dict()
    history = {k: v for k, v in one.history.items() if k != "seconds"}
    return {
        **{k: v.data.copy() for k, v in state["model"].items()},
        **{f"{i}.{k}": np.array(v) for i, s in state["optimizer"]["state"].items()
           for k, v in s.items()},
        "groups": [dict(g) for g in state["optimizer"]["param_groups"]],
        "schedule": state["schedule"], "generator": state["generator"], "loader": state["loader"],
        "history": history, "step": one.step, "epoch": one.epoch, "best": one.best,
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], np.ndarray):
            assert a[key].tobytes() == np.asarray(b[key]).tobytes(), key
        else:
            assert a[key] == b[key], key


class At:
    """A step log that sends a signal to this process at one step."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def write(self, row):
        if row["step"] == self.step:
            os.kill(os.getpid(), self.number)

    def flush(self):
        pass

    def close(self):
        pass


# -------------------------------------------------------------------------------------- the loop

def test_an_epoch_is_the_steps_written_out():
    one = run()
    history = one.fit(1)
    model = network()
    opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    total, hits, norm = 0.0, 0, 0.0
    for step, (x, target) in enumerate(batches()):
        y = model(x)
        loss = cross_entropy(y, target)
        opt.zero_grad()
        loss.backward()
        if step == 0:
            norm = math.sqrt(sum((p.grad.data.astype(np.float64) ** 2).sum()
                                 for p in model.parameters()))
        opt.step()
        opt.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * (step + 1) / 12)) / 2
        total += loss.item() * 16
        hits += (y.data.argmax(1) == target.data).sum()
    for p, q in zip(one.model.parameters(), model.parameters()):
        assert p.data.tobytes() == q.data.tobytes()
    assert history["train/loss"] == [total / 64]
    assert history["train/accuracy"] == [hits / 64]
    assert history["grad_norm"][0] == pytest.approx(norm, rel=1e-6)
    assert history["step"] == [4]
    assert history["lr"][0] == pytest.approx(0.1 * (1 + math.cos(math.pi / 3)) / 2)


def test_training_learns():
    history = run("adam").fit(40)
    assert history["train/loss"][-1] < 0.5 * history["train/loss"][0]


@pytest.mark.parametrize("generator", [True, False], ids=["own generator", "default generator"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("step", [0, 3, 5, 10])     # 4 steps per epoch: first, last, middle
def test_a_run_resumed_at_any_step_is_bitwise_the_uninterrupted_run(step, optimizer, generator,
                                                                  tmp_path):
    whole = run(optimizer, 0.3, generator, log_every=1)
    whole.fit(3)
    first = run(optimizer, 0.3, generator, folder=tmp_path, step_logs=[At(step)], log_every=1)
    with pytest.raises(Interrupted) as caught:
        first.fit(3)
    assert caught.value.path == tmp_path / "last.safetensors"
    assert first.step == step + 1
    manual_seed(99)
    second = run(optimizer, 0.3, generator, folder=tmp_path, log_every=1)
    second.load_state_dict(checkpoint.load(tmp_path / "last.safetensors"))
    second.fit(3)
    assert_same(arrays(whole), arrays(second))


def test_a_run_resumed_between_epochs_is_bitwise_the_uninterrupted_run(tmp_path):
    whole = run("adam", 0.3)
    whole.fit(3)
    run("adam", 0.3, folder=tmp_path).fit(1)
    second = run("adam", 0.3, folder=tmp_path)
    second.load_state_dict(checkpoint.load(tmp_path / "last.safetensors"))
    assert second.epoch == 1
    second.fit(3)
    assert_same(arrays(whole), arrays(second))


def test_sigterm_is_told_from_ctrl_c_and_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    one = run(folder=tmp_path, step_logs=[At(2, signal.SIGTERM)], log_every=1)
    with pytest.raises(Interrupted) as caught:
        one.fit(2)
    assert caught.value.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_without_a_folder_an_interrupted_run_keeps_its_state_in_memory():
    one = run(step_logs=[At(5)], log_every=1)
    with pytest.raises(Interrupted) as caught:
        one.fit(3)
    assert caught.value.path is None
    one.step_logs = ()
    whole = run(log_every=1)
    whole.fit(3)


def test_a_checkpoint_of_another_network_is_refused_and_nothing_changes(tmp_path):
    run(folder=tmp_path).fit(1)
    state = checkpoint.load(tmp_path / "last.safetensors")
    parameter = Tensor(np.zeros(1), requires_grad=True)
    other = Trainer(nn.Linear(6, 2), optim.SGD([parameter]), batches())
    weight = other.model.weight.data.copy()
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this run"):
        other.load_state_dict(state)
    np.testing.assert_array_equal(other.model.weight.data, weight)
    with pytest.raises(checkpoint.CheckpointError, match="does not fit this run"):
        run().load_state_dict({"model": state["model"]})


@pytest.mark.parametrize("part", ["optimizer", "schedule", "loader", "generator", "progress",
                                  "history"])
def test_a_state_of_which_one_part_does_not_fit_changes_nothing(part):
    other, one = run("adam"), run("adam")
    other.fit(2)
    one.fit(1)
    before, state = arrays(one), other.state_dict()
    for broken in ({k: v for k, v in state.items() if k != part}, {**state, part: {"x": 1}}):
        with pytest.raises(checkpoint.CheckpointError, match="does not fit this run"):
            one.load_state_dict(broken)
        assert_same(before, arrays(one))
    one.fit(2)
    assert one.history["train/loss"] == other.history["train/loss"]     # and it goes on


def test_best_is_the_highest_test_accuracy(tmp_path):
    one = run(folder=tmp_path)
    history = one.fit(6)
    best = checkpoint.load(tmp_path / "best.safetensors")
    top = max(history["test/accuracy"])
    assert best["progress"]["best"] == one.best == top
    assert best["progress"]["epoch"] == 1 + history["test/accuracy"].index(top)
    model = network()
    model.load_state_dict(best["model"])
    assert evaluate(model, batches(shuffle=False)).accuracy == top


def test_a_loss_that_is_not_finite_ends_the_run_and_is_recorded():
    one = run()
    one.optimizer.param_groups[0]["lr"] = 1e30
    one.schedule = None
    history = one.fit(50)
    assert one.diverged
    assert one.epoch == len(history["step"]) < 50
    assert math.isnan(history["train/loss"][-1])
    assert one.fit(50) is history       # and it stays ended
    assert one.epoch < 50


def test_clipped_gradients_are_no_longer_than_allowed():
    one = run(clip_grad=0.01)
    one.optimizer = optim.SGD(one.model.parameters(), lr=1.0)
    one.schedule = None
    before = [p.data.astype(np.float64) for p in one.model.parameters()]
    one.train_step(*next(iter(batches())))
    pairs = zip(one.model.parameters(), before)
    moved = math.sqrt(sum(((p.data - q) ** 2).sum() for p, q in pairs))
    assert moved == pytest.approx(0.01, rel=1e-3)


# ----------------------------------------------------------------------------------- metrics

def test_the_norm_of_all_gradients_together():
    a, b, c = (Tensor(np.zeros(n), requires_grad=True) for n in (2, 1, 3))
    a.grad, b.grad = Tensor([[3.0], [4.0]]), Tensor([12.0])
    assert grad_norm([a, b, c]) == 13.0


def test_batch_norm_statistics_are_norms_of_its_state():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    layer = model[1]
    for name, values in (("running_mean", [3, 4]), ("running_var", [6, 8]), ("weight", [0, 2]),
                         ("bias", [-1, 0])):
        getattr(layer, name).data[...] = values
    assert norm_statistics(model) == {"norm/1/running_mean": 5.0, "norm/1/running_var": 10.0,
                                      "norm/1/gamma": 2.0, "norm/1/beta": 1.0}
    bare = nn.BatchNorm1d(2, affine=False)
    assert list(norm_statistics(bare)) == ["norm/model/running_mean", "norm/model/running_var"]


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def test_csv_files_hold_the_history(tmp_path):
    epochs, steps = CsvLog(tmp_path / "e.csv"), CsvLog(tmp_path / "s.csv", flush_every=3)
    one = run(logs=[epochs], step_logs=[steps], log_every=2)
    history = one.fit(2)
    for log in (epochs, steps):
        log.close()
    table = rows(tmp_path / "e.csv")
    assert list(table[0]) == list(history)
    for name, column in history.items():
        assert [float(r[name]) for r in table] == column
    assert [int(r["step"]) for r in rows(tmp_path / "s.csv")] == [0, 2, 4, 6]


def test_a_resumed_csv_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "s.csv"
    log = CsvLog(path)
    for step in range(4):
        log.write({"step": step, "v": step / 3})
    log.close()
    path.write_text(path.read_text() + "4,")      # killed in the middle of a row
    log = CsvLog(path, upto=1)
    log.write({"step": 2, "v": -1.0})
    log.close()
    found = [(int(r["step"]), float(r["v"])) for r in rows(path)]
    assert found == [(0, 0.0), (1, 1 / 3), (2, -1.0)]


def scalars(folder):
    """(step, tag) → value from a folder's TensorBoard event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        blob, at = path.read_bytes(), 0
        while at < len(blob):
            (length,) = struct.unpack_from("<Q", blob, at)
            event = Event.FromString(blob[at + 12:at + 12 + length])
            found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
            at += 12 + length + 4
    return found


def test_tensorboard_files_hold_the_history(tmp_path):
    pytest.importorskip("tensorboardX")
    log = TensorBoardLog(tmp_path)
    history = run(logs=[log]).fit(2)
    log.close()
    found = scalars(tmp_path)
    expected = {(history["step"][i], name): np.float32(column[i])
                for name, column in history.items() for i in range(2)
                if name not in ("epoch", "step")}
    assert found == expected


def test_tensorboard_gets_finite_values_only(tmp_path, capfd):
    pytest.importorskip("tensorboardX")
    log = TensorBoardLog(tmp_path)
    log.write({"step": 1, "a": math.nan, "b": math.inf, "c": 2.0})
    log.close()
    assert scalars(tmp_path) == {(1, "c"): 2.0}
    assert capfd.readouterr().err == ""


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'nbgrad\[lab\]'"):
        TensorBoardLog(tmp_path)


# -------------------------------------------------------------------------------- evaluation

def test_running_statistics_are_those_of_evaluation_mode():
    one = run(dropout=0.5)
    one.fit(2)
    one.model.eval()
    y = one.model(as_tensor(X))
    result = evaluate(one.model, batches(size=9, shuffle=False))
    assert result.samples == 70
    assert result.accuracy == (y.data.argmax(1) == Y).mean()
    assert result.loss == pytest.approx(cross_entropy(y, as_tensor(Y)).item(), rel=1e-6)


def test_batch_statistics_are_those_of_the_evaluated_batch():
    one = run()
    one.fit(2)
    before = arrays(one)
    result = evaluate(one.model, batches(size=70, shuffle=False), statistics="batch")
    assert_same(before, arrays(one))
    one.model.train()
    assert result.loss == pytest.approx(
        cross_entropy(one.model(as_tensor(X)), as_tensor(Y)).item(), rel=1e-6)


@pytest.mark.parametrize("size", [1, 7, 70])
def test_population_statistics_are_those_of_the_whole_set_as_one_batch(size):
    one = run(dropout=0.5)
    one.fit(2)
    before, mode = arrays(one), [m.training for m in one.model.modules()]
    found = population_statistics(one.model, batches(size=size))
    result = evaluate(one.model, [(as_tensor(X), as_tensor(Y))], statistics="population",
                      train=batches(size=size, shuffle=False))
    assert_same({k: v for k, v in before.items() if k != "loader"},
                {k: v for k, v in arrays(one).items() if k != "loader"})
    assert mode == [m.training for m in one.model.modules()]
    if size != 7:   # 70 = 10 · 7 and drop_last drops nothing for 1, 7 and 70
        assert list(found) == ["1", "5"]
    x = X.astype(np.float64)
    layers = list(one.model.children())
    for i, layer in enumerate(layers):      # the same network in float64, written out
        w = {k: v.data.astype(np.float64) for k, v in layer.state_dict().items()}
        if isinstance(layer, nn.Linear):
            x = x @ w["weight"].T + w["bias"]
        elif isinstance(layer, nn.BatchNorm1d):
            mean, var = x.mean(0), x.var(0)
            np.testing.assert_allclose(found[str(i)][0], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found[str(i)][1], var, rtol=1e-5)
            x = (x - mean) / np.sqrt(var + layer.eps) * w["weight"] + w["bias"]
        elif isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
        elif isinstance(layer, nn.Sigmoid):
            x = 1 / (1 + np.exp(-x))
    loss = (np.log(np.exp(x).sum(1)) - x[np.arange(70), Y]).mean()
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_population_statistics_of_images_average_over_pixels():
    manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    x = RNG.normal(5.0, 1.0, size=(10, 2, 6, 6)).astype(np.float32)
    train = DataLoader(TensorDataset(as_tensor(x), as_tensor(np.zeros(10, np.int64))), 4)
    mean, var = population_statistics(model, train)["1"]
    with no_grad():
        y = model[0](as_tensor(x)).data.astype(np.float64)
    np.testing.assert_allclose(mean, y.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(var, y.var((0, 2, 3)), rtol=1e-5)


def test_evaluation_refuses_what_it_cannot_do():
    model, data = network(), batches(shuffle=False)
    with pytest.raises(ValueError, match="statistics must be one of running, batch, population"):
        evaluate(model, data, statistics="exact")
    with pytest.raises(ValueError, match="pass it as train="):
        evaluate(model, data, statistics="population")
    with pytest.raises(ValueError, match="no samples"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="training set is empty"):
        population_statistics(model, [])
    shared = nn.BatchNorm1d(6)
    with pytest.raises(ValueError, match="runs twice"):
        population_statistics(nn.Sequential(shared, nn.Sequential(shared)), data)
    untracked = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False))
    with pytest.raises(ValueError, match="keeps no running statistics"):
        population_statistics(untracked, data)


def test_the_model_is_put_back_after_an_error():
    one = run()
    one.fit(1)
    before = arrays(one)

    def broken():
        yield as_tensor(X[:20]), as_tensor(Y[:20])
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        evaluate(one.model, broken(), statistics="batch")
    assert_same(before, arrays(one))
    assert all(m.training == one.model.training for m in one.model.modules())


# ------------------------------------------------------------------------- one run's settings

def test_a_config_survives_json():
    config = Config(model="lenet", lr=0.3, root="/x", clip_grad=1.0, schedule="cosine", warmup=2)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": "svhn"}, "data: expected one of digits, mnist, fashion_mnist, cifar10, got 'svhn'"),
    ({"lr": 0}, "lr: expected a number above 0, got 0"),
    ({"lr": math.nan}, "lr: expected a number above 0, got nan"),
    ({"lr": "0.1"}, "lr: expected a number above 0, got '0.1'"),
    ({"momentum": 1.0}, "momentum: expected a number from 0 to 1"),
    ({"batch_size": 1}, "batch norm needs two samples"),
    ({"batch_size": True}, "batch_size: expected a whole number"),
    ({"epochs": 0}, "epochs: expected a whole number of at least 1, got 0"),
    ({"seed": -1}, "seed: expected a whole number of at least 0"),
    ({"warmup": 31}, "warmup: 31 epochs are more than the run's 30"),
    ({"warmup": 1, "schedule": "onecycle"}, "one-cycle schedule has a warm-up of its own"),
    ({"placement": "preact"}, "'preact' is resnet20's"),
    ({"clip_grad": 0.0}, "clip_grad: expected a number above 0"),
    ({"root": 3}, "root: expected the path of a folder"),
    ({"dropout": 10**400}, r"dropout: expected a number from 0 .*, got 10{56}\.\.\.$"),
    ({"lr": 10**400}, r"lr: expected a number above 0, got 10{56}\.\.\.$"),
    ({"epochs": 10**400}, r"epochs: expected a whole number of at least 1, got 10{56}\.\.\.$"),
    ({"data": "x" * 1000}, r"got 'x{56}\.\.\.$"),
])
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
    with pytest.raises(ValueError, match=message):
        Config.from_dict(changes)


@pytest.mark.parametrize("fields", [{"unknown": 1}, [1], None, 3])
def test_a_config_of_other_fields_is_refused(fields):
    with pytest.raises(ValueError, match="unknown fields"):
        Config.from_dict(fields)


def test_every_model_has_valid_defaults():
    for model in CHOICES["model"]:
        for optimizer in CHOICES["optimizer"]:
            fields = {k: v for k, v in defaults(model, optimizer).items() if k != "lrs"}
            Config(model=model, optimizer=optimizer, **fields)


@pytest.mark.parametrize("init", CHOICES["init"])
@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_runs_of_one_seed_differ_in_nothing_but_the_norm(model, init):
    config = Config(model=model, init=init, seed=3)
    weighted = {norm: [m for m in build_model(config.but(norm=norm)).modules()
                       if isinstance(m, nn.Linear | nn.Conv2d)]
                for norm in ("none", "batch", "layer")}
    for layers in zip(*weighted.values()):
        for p in (layer.state_dict() for layer in layers):
            for key, value in p.items():
                np.testing.assert_array_equal(value.data, layers[0].state_dict()[key].data)
    task = load_task(config)
    orders = [[y.tolist() for _, y in loader(config.but(norm=norm, lr=lr), task)]
              for norm in ("none", "batch") for lr in (0.1, 1.0)]
    assert orders[0] == orders[1] == orders[2] == orders[3]
    assert orders[0] != [y.tolist() for _, y in loader(config.but(seed=4), task)]


def test_images_are_standardised_by_the_training_images():
    task = load_task(Config())
    x = task.train.tensors[0].data
    assert abs(x.mean(dtype=np.float64)) < 1e-6
    assert abs(x.std(dtype=np.float64) - 1) < 1e-6
    raw_train, raw_test = (d.tensors[0].data.astype(np.float64) for d in load("digits"))
    assert task.mean[0] == pytest.approx(raw_train.mean(), rel=1e-9)
    assert task.std[0] == pytest.approx(raw_train.std(), rel=1e-9)
    expected = (raw_test - task.mean) / task.std
    np.testing.assert_allclose(task.test.tensors[0].data, expected, rtol=1e-6)


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [1.0] * 6), ("step", [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]),
    ("cosine", [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]),
])
def test_the_learning_rate_follows_the_schedule(schedule, expected):
    config = Config(schedule=schedule, batch_size=700, epochs=3)       # two steps per epoch
    one = trainer(config, load_task(config))
    rates = []
    for _ in range(3):
        for x, y in one.train:
            rates.append(one.optimizer.param_groups[0]["lr"])
            one.train_step(x, y)
    assert rates == pytest.approx(expected)


def test_warm_up_rises_to_the_learning_rate_and_one_cycle_ends_near_zero():
    task = load_task(Config())
    config = Config(batch_size=700, epochs=3, warmup=1)
    one = trainer(config, task)
    rates = one.fit(3)["lr"]
    assert rates[0] == rates[2] == 1.0
    one = trainer(config, task)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    one = trainer(Config(batch_size=700, epochs=3, schedule="onecycle", momentum=0.9), task)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    assert one.fit(3)["lr"][-1] < 1e-4


# ----------------------------------------------------------------------- what is said of runs

def record(norm, lr, epochs90, epochs95, accuracy, diverged=False):
    return {"norm": norm, "lr": lr, "epochs_to": {"0.9": epochs90, "0.95": epochs95},
            "final_accuracy": accuracy, "diverged": diverged, "seconds": 1.0}


def test_epochs_to_a_level():
    assert epochs_to([0.2, 0.95, 0.94], 0.95) == 2
    assert epochs_to([0.2], 0.95) is None


def test_a_summary_counts_runs_that_never_arrive_as_last():
    runs = [record("batch", 1.0, 2, 8, 0.96), record("batch", 1.0, 4, None, 0.94),
            record("batch", 1.0, 3, 10, 0.98), record("none", 1.0, 9, None, 0.9),
            record("none", 1.0, None, None, 0.1, True), record("none", 1.0, 11, 29, 0.95)]
    batch, none = summarize(runs)
    assert batch["epochs_to"] == {"0.9": 3, "0.95": 10}
    assert batch["reached"] == {"0.9": 3, "0.95": 2}
    assert batch["accuracy"] == pytest.approx(0.96)
    assert batch["spread"] == pytest.approx(0.02)
    assert none["epochs_to"] == {"0.9": 11, "0.95": None}
    assert none["diverged"] == 1
    assert table([batch, none]).splitlines() == [
        "learning rate                to 90 %   to 95 %      final accuracy  diverged  seconds",
        "-------------  ------------  --------  -----------  --------------  --------  -------",
        "1              batch norm    3         10 (2/3)     96.0 ± 2.0 %    0/3       1.00",
        "1              without norm  11 (2/3)  never (1/3)  65.0 ± 47.7 %   1/3       1.00",
        "",
        "to 90 %, to 95 %  epochs to that test accuracy, median (n/m: reached by n of m runs)",
        "final accuracy    mean ± standard deviation over seeds",
        "diverged          loss not finite, or at the end no better than guessing",
        "seconds           of training alone, per run",
    ]


def test_the_finding_says_what_the_numbers_say():
    slow, fast = summarize([record("none", 1.0, 9, 17, 0.96), record("batch", 1.0, 2, 4, 0.97)])
    dead, high = summarize([record("none", 10.0, None, None, 0.1),
                            record("batch", 10.0, 2, 8, 0.98)])
    assert finding([slow, fast, dead, high], 30) == (
        "At the highest learning rate 10, the plain network did not reach 95 % in 30 epochs and "
        "batch norm took 8 epochs to 95 %; at the best one for each, the plain network took 17 "
        "epochs to 95 % (at 1) and batch norm took 4 epochs to 95 % (at 1).")
    assert finding([slow, fast], 30) == (
        "At learning rate 1, the plain network took 17 epochs to 95 % and batch norm took 4 "
        "epochs to 95 %.")
    assert finding([dead], 30) == (
        "Nothing reached 95 % in 30 epochs; the plain network ended at 10.0 % (learning rate 10).")


# ---------------------------------------------------------------------------------- progress

class Terminal:
    def __init__(self, tty):
        self.text, self.tty = "", tty

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.tty


def test_progress_is_lines_in_a_pipe_a_bar_on_a_terminal_and_nothing_if_quiet(monkeypatch):
    pipe, terminal = Terminal(False), Terminal(True)
    for stream in (pipe, terminal):
        with progress(2.0, stream=stream) as bar:
            bar.update(1.0, "half")
            bar.say("epoch 1 done")
    assert pipe.text == "epoch 1 done\n"
    assert "half" in terminal.text
    assert "50%" in terminal.text
    assert "epoch 1 done" in terminal.text
    assert type(progress(1.0, quiet=True, stream=terminal)) is Silent
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    assert type(progress(1.0, stream=terminal)) is Lines


def test_the_default_generator_is_what_manual_seed_seeds():
    manual_seed(3)
    assert default_generator.get_state() == Generator(3).get_state()
