"""Training runs of studies, and grids of them."""

import math
import re

import numpy as np
import pytest

from nbgrad import nn
from nbgrad.lab import ablate, ablation, arms, running
from nbgrad.lab.ablation import Arm
from nbgrad.lab.results import Outcome
from nbgrad.lab.running import Plan
from nbgrad.lab.training import configured, task_of, train
from nbgrad.train.config import Config
from nbgrad.train.progress import Silent
from nbgrad.train.setup import build_model, load_task, trainer

BASE = Config(activation="relu", init="kaiming", lr=0.1, width=20, depth=1)


def small(tmp_path, base=BASE, **settings):
    fixed = {"seeds": 2, "steps": 6, "every": 3, "processes": 0, "folder": tmp_path}
    return ablate(base, **{**fixed, **settings})


def test_so_many_steps_are_those_of_a_trainer():
    """30 steps, evaluated after each 10, over the end of an epoch of 23: the same losses and the
    same weights as Trainer's own loop over two epochs."""
    seen = []
    record = train(BASE, steps=30, every=10, look=lambda one: seen.append(one) or {"at": one.step})
    task = load_task(BASE)
    one, losses = trainer(BASE, task), []
    assert len(one.train) == 23
    for _ in range(2):
        for x, target in one.train:
            before = one.sums["loss"]
            if one.step < 30:
                one.train_step(x, target)
                losses.append((one.sums["loss"] - before) / 60)
    for a, b in zip(seen[-1].model.parameters(), one.model.parameters()):
        np.testing.assert_array_equal(a.data, b.data)
    assert record["steps"] == record["at"] == [10, 20, 30]
    assert record["planned"] == 30
    np.testing.assert_allclose(record["train_loss"], np.mean(np.reshape(losses, (3, 10)), 1),
                               rtol=1e-12)
    assert record["final_accuracy"] == record["test_accuracy"][-1] > 0.5


@pytest.mark.parametrize(("steps", "every", "ends"), [(7, 3, [3, 6, 7]), (4, 9, [4]), (1, 1, [1])])
def test_the_last_steps_are_trained_and_evaluated_too(steps, every, ends):
    """Seven steps are seven, whatever they are evaluated by."""
    record = train(BASE, steps=steps, every=every, look=lambda one: {"at": one.step})
    assert record["steps"] == record["at"] == ends
    assert record["planned"] == steps
    assert len(record["test_accuracy"]) == len(record["train_loss"]) == len(ends)


def test_a_run_that_diverges_is_a_record():
    record = train(BASE.but(norm="none", lr=1e30), steps=20, every=5, on_train=True,
                   evaluations=("running",))
    assert record["diverged"]
    assert record["steps"] == [5]
    assert arms.steps_to(record, 0.9) == 25


def test_accuracies_by_statistics():
    record = train(BASE.but(decay=0.9), steps=10, every=10, on_train=True,
                   evaluations=("running", "batch", "population"))
    assert record["accuracies"]["running"] == record["final_accuracy"]
    assert record["losses"]["population"] < record["losses"]["running"]
    assert 0.1 < record["fit_accuracy"] <= 1
    assert record["fit_loss"] > 0


def test_a_network_may_be_prepared_and_the_images_few():
    def prepare(model):
        return nn.convert_norm(model, lambda norm: nn.Identity())

    few = task_of(BASE, 70)
    assert (len(few.train), len(task_of(BASE).train)) == (70, 1437)
    record = train(BASE, steps=4, every=4, prepare=prepare, task=few)
    plain = train(BASE.but(norm="none"), steps=4, every=4, task=few)
    assert record["train_loss"] == plain["train_loss"]


def test_configured_takes_what_a_cell_says():
    config = configured({"norm": "layer", "lr": None, "arm": "x", "seed": 4}, lr=0.5, depth=2)
    assert (config.norm, config.lr, config.depth, config.seed) == ("layer", 0.5, 2, 4)


def test_seeds_are_paired_over_what_is_not_varied(tmp_path):
    found = small(tmp_path, norm=["none", "batch"])
    assert [arm.settings for arm in found.arms] == [{"norm": "none"}, {"norm": "batch"}]
    for arm in found.arms:
        for seed, record in enumerate(arm.records):
            alone = train(BASE.but(norm=arm.settings["norm"], seed=seed), steps=6, every=3)
            assert record["test_loss"] == alone["test_loss"]
    a, b = (arms.accuracies(arm.records) for arm in found.arms)
    difference = found.difference({"norm": "batch"}, {"norm": "none"})
    assert difference.estimate == np.median(np.subtract(b, a))
    assert str(found).splitlines()[0].startswith("norm   lr   final accuracy")
    assert str(found).splitlines()[-1].startswith(f"{found.finding.verdict}: Against norm none")
    assert str(found).endswith("Too few seeds for a verdict: 2, where it needs 5.")


def test_placements_dropouts_and_evaluations_are_axes(tmp_path):
    """Settings that come to the same run are one arm: without a norm, placement is nothing."""
    found = small(tmp_path, seeds=1, placement=["none", "before", "after"],
                  dropout=["none", "before"], evaluation=["running", "population"])
    assert len(found.arms) == 12
    assert {arm.name for arm in found.arms} >= {
        "placement none, dropout before, evaluation running",
        "placement after, dropout none, evaluation population"}
    axes = {"norm": ["none", "batch"], "placement": ["before", "after"]}
    grid = ablation._Grid(BASE, axes, False)
    assert [s for s, _ in grid._points] == [
        [{"norm": "none", "placement": "before"}, {"norm": "none", "placement": "after"}],
        [{"norm": "batch", "placement": "before"}], [{"norm": "batch", "placement": "after"}]]


@pytest.mark.parametrize(("axes", "compared"), [
    ({"placement": ["none", "before", "after"], "norm": ["batch", "layer"]},
     [f"placement {p}, norm {n}" for p in ("before", "after") for n in ("batch", "layer")]),
    ({"norm": ["none", "batch"], "placement": ["before", "after"]},
     ["norm batch, placement before", "norm batch, placement after"]),
    ({"placement": ["before", "none"], "norm": ["batch", "layer"]},
     ["placement none, norm batch", "placement none, norm layer"])])
def test_every_arm_is_compared_with_what_its_baseline_comes_to(axes, compared):
    """Though that was asked for under another name: no norm has no placement."""
    grid = ablation._Grid(BASE, axes, False)
    cells = [{**cell, "seed": seed} for seed in range(5) for cell in grid.cells()]
    level = {"none": 0.5, "batch": 0.7, "layer": 0.8}
    made = ablation._judged(grid.arms([
        run_of(level[c["config"]["norm"]] + 0.1 * (c["config"]["placement"] == "after"))
        for c in cells], cells))
    said = made.finding.sentence.split(": ", 1)[1].rstrip(".").split("; ")
    assert [re.split(" [+-]", part)[0] for part in said] == compared
    assert len(list(ablation._against(grid.settings()))) == len(compared)
    assert {row[-2] for row in made.finding.table.rows} == {"> 4"}
    first = {"placement": "none", "norm": "layer"}
    if axes["placement"][0] == "none":
        found = made.difference({"placement": "after", "norm": "layer"}, first)
        assert found.estimate == pytest.approx(0.4, rel=1e-12)
        assert "placement after, norm layer +40.0 [+40.0, +40.0] pt" in made.finding.sentence


def test_the_learning_rate_may_be_chosen_for_each_arm(tmp_path):
    found = small(tmp_path, norm=["none", "batch"], lr=[1e-6, 0.1], tune=True)
    assert [arm.settings for arm in found.arms] == [{"norm": "none"}, {"norm": "batch"}]
    assert [arm.lr for arm in found.arms] == [0.1, 0.1]
    note = "Best at an end of the grid of learning rates: norm none (0.1); norm batch (0.1)."
    assert found.finding.notes == [note]
    assert str(found).endswith(note)
    inside = small(tmp_path, norm=["none", "batch"], lr=[1e-6, 0.1, 1e-7, 1e9], tune=True)
    assert not inside.finding.notes


def test_as_a_default_there_are_as_many_seeds_as_a_verdict_needs(tmp_path, monkeypatch):
    """Of a sign that may be either: 2k/2ⁿ ≤ 6.25 %."""
    seen = []

    def run(studies, plan, progress):
        seen.append((len(studies[0].cells("quick")), studies[0].comparisons))
        raise KeyboardInterrupt
    monkeypatch.setattr(ablation, "run", run)
    for axes, seeds, comparisons in (
            ({"norm": ["none", "batch"]}, 5, 1), ({"norm": ["none", "batch", "layer"]}, 6, 2),
            ({"norm": ["none", "batch"], "depth": [1, 2, 3, 4]}, 7, 4), ({"depth": 2}, 5, 1)):
        with pytest.raises(KeyboardInterrupt):
            ablate(BASE, folder=tmp_path, **axes)
        arms_ = len(axes.get("norm", "x")) * (4 if comparisons == 4 else 1)
        assert seen[-1] == (seeds * arms_, comparisons)


def test_it_shows_how_far_it_is(tmp_path, monkeypatch):
    """In a bar of its own as a default; in the one that is given otherwise, which stays open."""
    class Heard(Silent):
        def __init__(self, total=1):
            self.total, self.done, self.open = total, [], True

        def __exit__(self, *error):
            self.open = False

        def update(self, done, text=""):
            self.done.append(done)
    own, given = Heard(), Heard()
    monkeypatch.setattr(ablation, "bar", lambda total: own if total == 1 else None)
    small(tmp_path, norm=["none", "batch"])
    small(tmp_path, norm=["none", "layer"], progress=given)
    assert (own.done, own.open) == ([0.25, 0.5, 0.75, 1.0], False)
    assert (given.done, given.open) == ([0.25, 0.5, 0.75, 1.0], True)


def test_what_is_run_to_compile_is_short(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ablation, "run", lambda studies, plan, progress: seen.extend(
        running.cells_of(studies[0], Plan("tiny", seeds=1))) or [Outcome(
            {}, "", "", 0, 0, 0, "failed", 0.0, "", "", {}, None, ["seen"])])
    with pytest.raises(RuntimeError, match="seen"):
        small(tmp_path, norm=["none", "batch"], steps=600)
    assert [(cell["seed"], cell["steps"], cell["every"]) for cell in seen] == [(0, 2, 1)] * 2


def run_of(accuracy):
    return {"final_accuracy": accuracy, "accuracies": {"running": accuracy}, "diverged": False,
            "planned": 4, "steps": [2, 4], "test_accuracy": [accuracy / 2, accuracy]}


def arm(accuracies, **settings):
    return Arm(settings, 0.1, [run_of(a) for a in accuracies])


@pytest.mark.parametrize(("gains", "verdict"), [
    ((0.1, 0.0), "supported"), ((-0.1, 0.0), "supported"), ((0.1, -0.1), "depends"),
    ((0.0, 0.0), "not supported")])
def test_a_verdict_needs_the_interval(gains, verdict):
    """The first axis against its first value, everything else equal."""
    base = [0.5, 0.6, 0.7]
    wavering = [0.6, 0.5, 0.7]          # the mean is the base's, the differences go both ways
    found = ablation._judged([
        arm(base, norm="none", lr=0.1), arm(base, norm="none", lr=1.0),
        *(arm([a + gain for a in (base if gain else wavering)], norm="batch", lr=lr)
          for lr, gain in zip((0.1, 1.0), gains))])
    assert found.finding.verdict == verdict
    assert found.finding.sentence.startswith("Against norm none: norm batch, lr 0.1 ")


def test_what_an_ablation_refuses(tmp_path):
    for axes, says in (({"norm": ["none", "spooky"]}, "norm: expected one of"),
                       ({"colour": ["red"]}, "unexpected keyword argument 'colour'"),
                       ({"evaluation": ["none"]}, "evaluation: expected running, batch, pop"),
                       ({"dropout": "under"}, "dropout: expected a probability, or none"),
                       ({"lr": []}, "lr: expected one or more different values"),
                       ({"lr": [0.1], "tune": True}, "tune: expected lr with the values"),
                       ({"seed": [1, 2]}, "seed: no axis, .* seeds is how many"),
                       ({"seeds": 0}, "seeds: expected at least 1, got 0"),
                       ({"steps": 0}, "steps: expected at least 1, got 0"),
                       ({"every": 0}, "every: expected at least 1, got 0"),
                       ({"level": 95}, "level: expected a test accuracy, such as 0.95, got 95")):
        with pytest.raises(ValueError, match=says):
            small(tmp_path, **axes)
    found = small(tmp_path, seeds=1, steps=1, every=1)
    assert found.arms[0].name == "the base"
    with pytest.raises(ValueError, match="expected settings of one arm, got those of 0"):
        found.difference({"norm": "x"}, {})


def test_a_failing_cell_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"a cell failed: config=.*FileNotFoundError"):
        small(tmp_path, BASE.but(data="mnist", root=str(tmp_path)), seeds=1)


def test_finished_cells_of_an_ablation_are_kept(tmp_path, monkeypatch):
    first = small(tmp_path, lr=[0.1, 0.2])
    monkeypatch.setattr(ablation, "train", None)
    again = small(tmp_path, lr=[0.1, 0.2])
    assert [a.records for a in again.arms] == [a.records for a in first.arms]


# --------------------------------------------------------------------- the knobs that studies turn

@pytest.mark.parametrize(("settings", "layers"), [
    ({"dropout_at": "each"}, "fc1 norm1 act1 dropout1 fc2 norm2 act2 dropout2 fc3"),
    ({"dropout_at": "before"}, "fc1 dropout1 norm1 act1 fc2 dropout2 norm2 act2 fc3"),
    ({"dropout_at": "last"}, "fc1 norm1 act1 fc2 norm2 act2 dropout2 fc3"),
    ({"dropout_at": "before", "placement": "after"},
     "fc1 act1 dropout1 norm1 fc2 act2 dropout2 norm2 fc3"),
    ({"dropout_at": "before", "norm": "none"}, "fc1 dropout1 act1 fc2 dropout2 act2 fc3"),
    ({"dropout": 0.0, "dropout_at": "before"}, "fc1 norm1 act1 fc2 norm2 act2 fc3"),
])
def test_places_of_dropout(settings, layers):
    model = build_model(Config(**{"depth": 2, "width": 5, "dropout": 0.3, **settings}))
    assert [name for name, _ in model.named_children()][1:] == layers.split()


def test_sizes_ghosts_decay_and_gain():
    cnn = build_model(Config(model="cnn", depth=5, width=4, ghost=8, decay=0.75))
    shapes = [m.weight.shape for m in cnn.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(4, 1, 3, 3), (4, 4, 3, 3), (8, 4, 3, 3), (8, 8, 3, 3), (16, 8, 3, 3)]
    assert (cnn.norm1.ghost_size, cnn.norm1.momentum) == (8, 0.25)
    assert build_model(Config(model="cnn", norm="group", groups=2)).norm3.num_groups == 2
    one, two = (build_model(Config(gain=gain)).fc2.weight.data for gain in (1.0, 2.0))
    np.testing.assert_array_equal(two, 2 * one)
    assert [m.weight.shape[0] for m in build_model(Config(depth=1, width=7)).modules()
            if isinstance(m, nn.Linear)] == [7, 10]
    for settings, says in (({"ghost": 8, "norm": "layer"}, "ghost: layer norm has none"),
                           ({"depth": 3, "model": "lenet"}, "depth: lenet's is fixed"),
                           ({"dropout_at": "last", "model": "resnet20"}, "dropout_at: resnet"),
                           ({"gain": 0.0}, "gain: expected a number above 0"),
                           ({"width": 0}, "width: expected a whole number of at least 1")):
        with pytest.raises(ValueError, match=says):
            Config(**settings)


def test_steps_and_ratios_of_runs_that_never_arrive():
    never = {"steps": [10, 20], "planned": 20, "test_accuracy": [0.1, None]}
    early = {"steps": [10, 20], "planned": 20, "test_accuracy": [0.99, 0.9]}
    assert (arms.steps_to(never, 0.9), arms.steps_to(early, 0.9)) == (30, 10)
    assert (arms.reached(never, 0.9), arms.reached(early, 0.9)) == (False, True)
    assert arms.speedup([never] * 3, [early] * 3, 0.9).estimate == 3
    with pytest.raises(ValueError, match="loss: a run has none"):
        arms.column([{"loss": None}], "loss")
    assert arms.column([{"loss": None}], "loss", math.inf) == [math.inf]


def test_curves_go_on_where_a_run_has_ended_and_say_so():
    runs = [{"steps": [1, 2], "loss": [1.0, 3.0]}, {"steps": [1], "loss": [2.0]},
            {"steps": [1, 2], "loss": [6.0, None]}]
    found = arms.curve("x", runs, "loss")
    assert (found.x, found.y, found.low, found.high) == ([1, 2], [2, 3], [1, 3], [6, 3])
    assert found.label == "x (1 of 3 runs to the end)"
    assert arms.curve("x", runs[:1] * 2, "loss").label == "x"
    ended = [{**run, "planned": 9} for run in runs]
    assert arms.curve("x", ended, "loss").label == "x (none of 3 runs to the end)"
    assert arms.curve("x", ended[1:2], "loss").label == "x (none of 1 run to the end)"
    layers = [{"planned": 9, "layer": [2, 3], "loss": [1.0, 2.0]}]      # an x that has no end
    assert arms.curve("x", layers, "loss", "layer").label == "x"


def test_a_rate_at_which_runs_diverge_is_not_best_for_its_median():
    """Two of five are lost at 3, which a median does not see; one costs a fifth of what the runs
    are above guessing, so that it is best only where the others are that much worse."""
    def runs(*values, lost=0):
        flags = [i < lost for i in range(len(values))]
        return [{"final_accuracy": v, "loss": None if flag else 1 - v, "diverged": flag}
                for v, flag in zip(values, flags)]
    steady, fragile = runs(*[0.90] * 5), runs(*[0.96] * 5, lost=2)
    groups = {("a", 1.0): steady, ("a", 3.0): fragile}
    assert arms.tuned(groups)["a"] == (1.0, steady)
    assert arms.tuned(groups, "loss", worst=2.3, highest=False)["a"] == (1.0, steady)
    weak, once = runs(*[0.75] * 5), runs(*[0.96] * 5, lost=1)      # 0.8 · 0.96 + 0.2 · 0.1 = 0.788
    assert arms.tuned({("a", 1.0): weak, ("a", 3.0): once})["a"] == (3.0, once)
    equal = {("a", 3.0): steady, ("a", 1.0): steady}
    assert arms.tuned(equal)["a"][0] == 3.0                        # of equal ones, the first
    late = arms.tuned(groups, lambda r: 100 - r["final_accuracy"], worst=200.0, highest=False)
    assert late["a"] == (1.0, steady)
