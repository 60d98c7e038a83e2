"""Studies on MNIST, Fashion-MNIST and CIFAR-10, read from files of these formats."""

import numpy as np
import pytest

from nbgrad.lab import running
from nbgrad.lab.running import Plan
from nbgrad.lab.studies import find, names
from nbgrad.train.config import DATA
from tests.test_data_files import MNIST, write_cifar, write_mnist
from tests.test_lab_studies import check

SIZES = {"mnist": "(360 training and 120 test images)", "cifar10": "(360 training and 72 test"}
FREE = ("gradient-growth", "rank-collapse")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the files of all three, of random images. Fashion-MNIST's are MNIST's."""
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, "train", 360, 0)
    write_mnist(folder, "t10k", 120, 1)
    write_cifar(folder / "cifar-10-batches-bin", 72)
    return str(folder)


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
@pytest.mark.parametrize("name", names())
def test_it_runs_on(name, data, root, tmp_path):
    """Of random images there is nothing to learn: that it runs, and says on what, is all."""
    plan = Plan("tiny", data, root, seeds=1, processes=0, folder=tmp_path)
    outcome, = running.run([find(name)], plan)
    assert outcome.errors == []
    check(outcome.finding)
    own = name in FREE
    assert outcome.data == ("" if own else data)
    assert ("--data" in outcome.command) == (not own)
    said = f"Here on {DATA[data]} {SIZES[data]}"
    assert outcome.study["setup"].startswith(said) != own


def test_every_study_runs_on_all_data_or_on_none():
    assert {name: tuple(find(name).data) for name in names()} == {
        name: () if name in FREE else tuple(DATA) for name in names()}


def test_a_cell_is_of_its_data_and_of_their_size(root, tmp_path):
    """MNIST's t10k pair alone, say, is another data set: its records are not those of all of it."""
    study = find("momentum")
    for data, sizes in (("mnist", (360, 120)), ("mnist", (96, 24)), ("fashion_mnist", (360, 120))):
        folder = root
        if sizes == (96, 24):
            folder = str(tmp_path)
            write_mnist(tmp_path, "t10k", 120, 1)
        plan = Plan("tiny", data, folder, seeds=1, processes=0, folder=tmp_path / "lab")
        outcome, = running.run([study], plan)
        assert outcome.study["setup"].startswith(
            f"Here on {DATA[data]} ({sizes[0]} training and ")
        assert outcome.done == outcome.cells
    lines = (tmp_path / "lab" / "momentum" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 3 * outcome.cells


@pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST here (NBGRAD_MNIST names its folder)")
def test_real_mnist_is_learned(tmp_path):
    """Two arms of convergence-speed: after 200 steps, batch norm is well above guessing."""
    study, plan = find("convergence-speed"), Plan(data="mnist", root=str(MNIST), seeds=1)
    cell = {**running.cells_of(study, plan)[5], "steps": 200, "every": 100}
    assert (cell["norm"], cell["lr"], cell["data"]) == ("batch", 1.0, "mnist")
    record = study.run(cell)
    assert record["final_accuracy"] > 0.8       # guessing has 0.1; seeds 0 to 2 had 0.88 to 0.9
    assert np.isfinite(record["p50"]).all()
