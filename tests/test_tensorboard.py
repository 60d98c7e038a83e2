"""The real TensorBoard reads what nbgrad logs."""

import math

import numpy as np
import pytest

from nbgrad import manual_seed, nn, optim, randn
from nbgrad.cli import main
from nbgrad.lab.watching import watch
from nbgrad.train.metrics import TensorBoardLog

pytest.importorskip("tensorboardX")


def read(folder):
    """{name: [(step, value)]} of the scalars in a folder, by TensorBoard's own reader."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder), size_guidance={reader.SCALARS: 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)]
            for name in events.Tags()["scalars"]}


def test_every_finite_value_of_every_step_is_there(tmp_path):
    log = TensorBoardLog(tmp_path)
    values = np.random.default_rng(0).standard_normal(500)
    for step, value in enumerate(values):
        log.write({"step": step, "epoch": 1, "train/loss": value,
                   "train/lr": math.nan if step % 7 == 0 else 1e-30})
    log.close()
    found = read(tmp_path)
    assert set(found) == {"train/loss", "train/lr"}
    assert [step for step, _ in found["train/loss"]] == list(range(500))
    assert [v for _, v in found["train/loss"]] == [float(v) for v in values.astype(np.float32)]
    assert [step for step, _ in found["train/lr"]] == [s for s in range(500) if s % 7]


def test_a_log_that_goes_on_replaces_the_steps_after_its_checkpoint(tmp_path):
    for upto, steps, value in ((None, range(10), 1.0), (5, range(6, 12), 2.0)):
        log = TensorBoardLog(tmp_path, upto=upto)
        for step in steps:
            log.write({"step": step, "loss": value})
        log.close()
    assert read(tmp_path)["loss"] == [(s, 1.0 if s <= 5 else 2.0) for s in range(12)]


def test_a_training_run_is_on_the_board(tmp_path):
    folder = tmp_path / "run"
    assert main(["train", "--epochs", "2", "--out", str(folder), "--quiet"]) == 0
    found = read(folder / "tensorboard")
    rows = np.genfromtxt(folder / "epochs.csv", delimiter=",", names=True, deletechars="")
    names = [name for name in rows.dtype.names if name not in ("step", "epoch")]
    assert set(names) == set(found)
    for name in names:
        assert [s for s, _ in found[name]] == rows["step"].astype(int).tolist()
        np.testing.assert_allclose([v for _, v in found[name]], rows[name], rtol=1e-6)


def test_what_watch_saw_is_on_the_board(tmp_path):
    manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, tensorboard=tmp_path) as seen:
        for _ in range(4):
            optimizer.zero_grad()
            (model(randn(16, 8)) ** 2).mean().backward()
            optimizer.step()
    found = read(tmp_path)
    for name in ("0/mean", "0/effective_lr", "1/divergence", "2/dead", "3/grad_norm"):
        assert [step for step, _ in found[name]] == [row["step"] for row in seen.rows]
        np.testing.assert_allclose([v for _, v in found[name]], [row[name] for row in seen.rows],
                                   rtol=1e-6)
