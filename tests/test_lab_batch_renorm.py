"""The study of batch renorm: its batches are what it says, and its rule has three outcomes."""

import numpy as np
import pytest

from nbgrad.lab.studies import batch_renorm as study, find
from nbgrad.lab.training import configured, task_of
from nbgrad.models import mlp
from nbgrad.nn import BatchRenorm


def batches(kind, seed=0, model=None, n=5):
    cell = {"batches": kind, "seed": seed, "steps": n, "every": n}
    task = task_of(configured({}))
    return list(study._Batches(task.train.tensors, cell, model or mlp(norm=None)))


def test_batches_are_of_two_classes_or_random():
    for _, t in batches("classes"):
        counts = np.unique(t.data, return_counts=True)[1]
        assert counts.tolist() == [8, 8]
    assert len({tuple(np.unique(t.data)) for _, t in batches("classes")}) > 1
    for x, t in batches("random"):
        assert x.shape == (16, 1, 8, 8)
        assert len(np.unique(t.data)) > 4
        assert len(np.unique(x.data.reshape(16, -1), axis=0)) == 16


@pytest.mark.parametrize("kind", study.KINDS)
def test_batches_are_those_of_the_seed_whatever_the_network(kind):
    a, b, c = batches(kind), batches(kind, model=mlp(norm="renorm")), batches(kind, seed=1)
    for (xa, ta), (xb, tb) in zip(a, b):
        np.testing.assert_array_equal(xa.data, xb.data)
        np.testing.assert_array_equal(ta.data, tb.data)
    assert any((ta.data != tc.data).any() for (_, ta), (_, tc) in zip(a, c))


def test_the_limits_rise_from_those_of_batch_norm_to_the_papers():
    model = mlp(norm="renorm")
    layers = [m for m in model.modules() if isinstance(m, BatchRenorm)]
    seen = []
    cell = {"batches": "random", "seed": 0, "steps": 1000, "every": 1000}
    task = task_of(configured({}))
    for _ in study._Batches(task.train.tensors, cell, model):
        seen.append({(layer.r_max, layer.d_max) for layer in layers})
    assert len(layers) == 3
    assert all(len(limits) == 1 for limits in seen)
    r, d = zip(*(limits.pop() for limits in seen))
    assert (r[30], d[30]) == (1.0, 0.0)
    assert d[94] == pytest.approx(2.5, abs=0.05)        # half of the way from 3.1 % to 15.6 %
    assert (r[250], d[156]) == (3.0, 5.0)
    assert list(r) == sorted(r)
    assert list(d) == sorted(d)


def record(accuracy):
    return {"steps": [10, 20], "planned": 20, "test_accuracy": [accuracy / 2, accuracy],
            "train_accuracy": [0.9, 0.95], "final_accuracy": accuracy,
            "population_accuracy": accuracy, "diverged": False}


def judged(batch, renorm, noise=0.005):
    """The finding where batch norm has 95 % on random batches, and these on the others; from seed
    to seed, arms change places by twice the noise."""
    cells = study.cells("quick")
    level = {("batch", "classes"): batch, ("renorm", "classes"): renorm}
    records = [record(level.get((c["arm"], c["batches"]), 0.95) - (c["lr"] != 0.03) * 0.2
                      + noise * (-1) ** (c["seed"] + list(study.NORMS).index(c["arm"])))
               for c in cells]
    return study.judge(records, cells)


@pytest.mark.parametrize(("batch", "renorm", "verdict"), [
    (0.60, 0.93, "supported"), (0.60, 0.70, "depends"), (0.60, 0.60, "not supported"),
    (0.60, 0.50, "not supported"), (0.95, 0.95, "not supported"), (0.95, 0.99, "not supported")])
def test_the_rule_has_every_outcome(batch, renorm, verdict):
    finding = judged(batch, renorm)
    assert finding.verdict == verdict
    assert len(finding.table.rows) == 6
    assert [len(f.series) for f in finding.figures] == [2, 3]
    assert [row[2] for row in finding.table.rows] == ["0.03"] * 6


def test_a_gain_within_the_noise_is_none():
    assert judged(0.60, 0.602, noise=0.05).verdict == "not supported"


def test_the_sentence_has_the_numbers():
    assert judged(0.60, 0.93, noise=0).sentence.startswith(
        "On batches of 2 classes batch norm loses 35.0 [35.0, 35.0] points of test accuracy "
        "against random batches; batch renorm gains 33.0 [33.0, 33.0] over it there, and ends 2.0")


def test_it_runs_and_a_cell_has_one_result():
    one = find("batch-renorm")
    cells = [c for c in one.cells("tiny") if c["seed"] == 0]
    records = [one.run(cell) for cell in cells]
    again = one.run(next(c for c in cells if c["arm"] == "renorm" and c["batches"] == "classes"))
    assert again in records
    assert [r["steps"] for r in records] == [[10, 20]] * 6
    finding = one.judge(records, cells)
    assert finding.verdict in ("supported", "not supported", "depends")
    by_arm = dict(zip([(c["arm"], c["batches"]) for c in cells], records))
    # with r_max = 1 and d_max = 0 in its first step, renorm begins as batch norm
    assert by_arm["batch", "classes"] != by_arm["renorm", "classes"]
