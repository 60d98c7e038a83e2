"""The command line, from arguments to files and exit status."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from nbgrad.cli import main
from nbgrad.data import load
from nbgrad.train import checkpoint
from nbgrad.train.predict import read_image, resize

pytest.importorskip("rich")
PYTHON = [sys.executable, "-m", "nbgrad"]


def ok(capsys, *argv):
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def fails(capsys, *argv):
    """The one line of an error, which leaves the status 2 and no traceback."""
    status = main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert status == 2
    assert err.count("\n") == 1, err
    assert err.startswith("nbgrad: error: ")
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = ["train", "--epochs", "2", "--dropout", "0.1", "--out", str(folder), "--quiet"]
    assert main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A small study: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    argv = ["compare", "--epochs", "3", "--seeds", "4", "7", "--lr", "1", "10", "--out", folder]
    text = subprocess.run([*PYTHON, *argv], capture_output=True, text=True, timeout=300)
    assert text.returncode == 0, text.stderr
    return folder, text


# ----------------------------------------------------------------------------------- compare

def test_compare_writes_results_curves_logs_and_the_best_network(compared):
    folder, _ = compared
    assert sorted(os.listdir(folder)) == ["best.safetensors", "curves.png", "results.json",
                                          "tensorboard"]
    assert sorted(os.listdir(folder / "tensorboard")) == [
        f"{norm}-lr{lr}-seed{seed}" for norm in ("batch", "none") for lr in (1, 10)
        for seed in (4, 7)]
    results = json.loads((folder / "results.json").read_text())
    assert [(r["norm"], r["lr"], r["seed"]) for r in results["runs"]] == [
        (norm, lr, seed) for lr in (1, 10) for seed in (4, 7) for norm in ("none", "batch")]
    for run in results["runs"]:
        accuracy = run["curves"]["test/accuracy"]
        assert len(accuracy) == 3
        assert run["final_accuracy"] == accuracy[-1]
        for level in ("0.9", "0.95"):
            reached = [i for i, a in enumerate(accuracy, 1) if a >= float(level)]
            assert run["epochs_to"][level] == (reached[0] if reached else None)
        assert run["diverged"] == (run["curves"]["train/loss"][-1] > np.log(10))
    assert results["machine"]["nbgrad"]
    assert results["config"]["batch_size"] == 60


def test_compare_prints_what_it_wrote(compared):
    folder, text = compared
    results = json.loads((folder / "results.json").read_text())
    lines = text.stdout.splitlines()
    assert lines[0] == results["title"] == "MLP on UCI digits, without and with batch norm"
    assert lines[1] == results["details"] == (
        "1,437 training and 360 test images, sigmoid, norm before the activation, sgd, "
        "batch size 60, normal initial weights")
    for row in results["summary"]:
        runs = [r for r in results["runs"] if (r["norm"], r["lr"]) == (row["norm"], row["lr"])]
        mean = np.mean([r["final_accuracy"] for r in runs])
        assert row["accuracy"] == pytest.approx(mean)
        assert any(f"{100 * mean:.1f} ± " in line for line in lines)
    assert results["finding"] in lines
    assert lines[-4:] == [str(folder / name) for name in ("results.json", "curves.png",
                                                         "tensorboard", "best.safetensors")]
    assert len(text.stderr.splitlines()) == len(results["runs"])    # a line each, in a pipe


def test_the_curves_are_a_picture_with_both_arms_in_it(compared):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    pixels = imread(compared[0] / "curves.png")[:, :, :3]
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 900
    for colour in ("#D55E00", "#0072B2"):
        assert (np.abs(pixels - to_rgb(colour)).max(-1) < 0.02).sum() > 500


def test_the_best_network_of_a_study_has_its_highest_accuracy(compared, capsys):
    folder, _ = compared
    results = json.loads((folder / "results.json").read_text())
    top = max(r["best_accuracy"] for r in results["runs"])
    assert f"accuracy {100 * top:.2f} %" in ok(capsys, "eval", folder)[0]


def test_paired_runs_see_the_same_batches_and_weights(compared):
    # Same seed, other learning rate: the loss of the very first step is the same number.
    folder, _ = compared
    runs = json.loads((folder / "results.json").read_text())["runs"]
    first = {(r["norm"], r["lr"], r["seed"]): r["curves"]["train/loss"][0] for r in runs}
    assert first["batch", 1, 4] != first["batch", 1, 7]
    assert len(set(first.values())) == 8


def test_results_are_never_overwritten(compared, capsys):
    before = (compared[0] / "results.json").read_bytes()
    assert "exists and is not an empty folder" in fails(capsys, "compare", "--out", compared[0])
    assert "exists and is not an empty folder" in fails(capsys, "train", "--out", compared[0])
    assert (compared[0] / "results.json").read_bytes() == before


def test_two_studies_in_one_second_get_two_folders(tmp_path, monkeypatch):
    from nbgrad.train.runs import new_folder

    monkeypatch.chdir(tmp_path)
    folders = {new_folder(None, "compare") for _ in range(4)}
    assert len(folders) == 4
    assert all(f.parts[0] == "runs" and f.name.startswith("compare-2") for f in folders)


def test_without_the_lab_extra_compare_still_gives_its_table(tmp_path, capsys, monkeypatch):
    for name in ("rich", "matplotlib", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    out, err = ok(capsys, "compare", "--epochs", "1", "--seeds", "1", "--lr", "1", "--out",
                  tmp_path / "c")
    assert "pip install 'nbgrad[lab]'" in err
    assert "batch norm" in out
    assert sorted(os.listdir(tmp_path / "c")) == ["best.safetensors", "results.json"]


# -------------------------------------------------------------------- train, resume, eval

def rows(path):
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(f)]


def test_a_resumed_run_is_the_uninterrupted_run(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    ok(capsys, "train", "--epochs", "1", "--dropout", "0.1", "--out", folder)
    out, err = ok(capsys, "train", "--resume", folder, "--epochs", "2")
    assert "epoch   2" in err
    assert out.splitlines()[-1] == str(folder)
    for name in ("best", "last"):
        a, b = (checkpoint.load(f / f"{name}.safetensors") for f in (trained, folder))
        assert {k: v.data.tobytes() for k, v in a["model"].items()} == {
            k: v.data.tobytes() for k, v in b["model"].items()}
    for name in ("epochs.csv", "steps.csv"):
        assert rows(trained / name) == rows(folder / name)
    assert json.loads((trained / "config.json").read_text())["dropout"] == 0.1


def test_resuming_takes_no_other_settings(trained, capsys):
    assert "leave out --lr, --model" in fails(capsys, "train", "--resume", trained, "--lr", "1",
                                             "--model", "lenet")


def test_another_number_of_epochs_needs_a_constant_schedule(tmp_path, capsys):
    ok(capsys, "train", "--epochs", "1", "--schedule", "cosine", "--out", tmp_path / "r")
    assert "laid out for 1" in fails(capsys, "train", "--resume", tmp_path / "r", "--epochs", "2")


@pytest.mark.parametrize(("epochs", "message"), [
    ("1", "--epochs: 1 are fewer than the 2 that the run has done"),
    ("0", "--epochs: expected a whole number of at least 1, got 0"),
])
def test_a_run_cannot_go_back_to_fewer_epochs(epochs, message, trained, capsys):
    before = (trained / "epochs.csv").read_bytes()
    assert message in fails(capsys, "train", "--resume", trained, "--epochs", epochs)
    assert (trained / "epochs.csv").read_bytes() == before


def test_a_loss_above_guessing_is_said_to_diverge_without_noise(tmp_path):
    argv = ["train", "--lr", "1e30", "--epochs", "1", "--quiet", "--out", tmp_path / "r"]
    text = subprocess.run([*PYTHON, *argv], capture_output=True, text=True, timeout=300)
    assert text.returncode == 0
    assert text.stderr == ""
    assert "after 1 epochs: diverged: the loss is" in text.stdout


def test_eval_compares_statistics(trained, capsys):
    out, _ = ok(capsys, "eval", trained / "last.safetensors", "--statistics", "running", "batch",
                "population", "--batch-size", "360")
    best = rows(trained / "epochs.csv")[-1]
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["running", "batch", "population"]
    assert f"accuracy {100 * float(best['test/accuracy']):.2f} %" in lines[0]
    assert f"loss {float(best['test/loss']):.4f}" in lines[0]
    assert len({line.split("loss")[1] for line in lines}) == 3


def test_eval_says_where_statistics_make_no_difference(tmp_path, capsys):
    ok(capsys, "train", "--norm", "none", "--epochs", "1", "--out", tmp_path / "r")
    out, _ = ok(capsys, "eval", tmp_path / "r", "--statistics", "population")
    assert out.startswith("the network has no batch norm")


def test_doctor_finds_nothing_wrong_with_a_healthy_run(trained, capsys):
    before = (trained / "last.safetensors").read_bytes()
    out, err = ok(capsys, "doctor", trained / "last.safetensors")
    lines = out.splitlines()
    assert lines[0] == ("3 batch norms, training mode; 1,380 samples in 23 batches of 60 to 60")
    assert [line.split()[0] for line in lines[4:7]] == ["running", "batch", "population"]
    assert "no problem found" in lines
    assert not err
    assert (trained / "last.safetensors").read_bytes() == before


def test_doctor_names_what_is_wrong_with_a_checkpoint(trained, tmp_path, capsys):
    state = checkpoint.load(trained / "last.safetensors")
    for name, value in state["model"].items():
        if name.startswith("norm2.running"):
            value.data[...] = name.endswith("var")
    path = checkpoint.save(tmp_path / "c.safetensors", state)
    out, _ = ok(capsys, "doctor", path, "--batches", "5")
    assert "problem: never-updated in norm2\n" in out
    assert "what to do: nbgrad.train.update_bn(model, loader)" in out
    assert "300 samples in 5 batches" in out
    assert "--batches: expected at least 1" in fails(capsys, "doctor", path, "--batches", "0")


def spread(state):
    """Statistics of data four times as wide."""
    state["norm1.running_var"].data[...] *= 16


PLANTED = {                   # what is done to the state: the cause, its layer, and the evidence
    "non-finite-statistics": (lambda state: state["norm2.running_var"].data.__setitem__(3, np.nan),
                              "norm2", "evidence: channels 1"),
    "constant-channels": (lambda state: state["fc3.weight"].data.__setitem__(slice(60), 0),
                          "norm3", "channels 60"),
    "dead-channels": (lambda state: (state["norm2.weight"].data.__setitem__(slice(70), 1e-6),
                                     state["norm2.bias"].data.__setitem__(slice(70), 1)),
                      "norm2", "gamma near 0 70"),
    "other-data": (spread, "norm1", "spread of the data / running 0.2"),
}


@pytest.mark.parametrize("code", PLANTED)
def test_doctor_names_each_planted_cause_with_its_layer_and_evidence(code, trained, tmp_path,
                                                                     capsys):
    plant, layer, evidence = PLANTED[code]
    state = checkpoint.load(trained / "last.safetensors")
    plant(state["model"])
    out, _ = ok(capsys, "doctor", checkpoint.save(tmp_path / "c.safetensors", state))
    lines = out.splitlines()
    assert "no problem found" not in lines
    at = next(i for i, line in enumerate(lines) if line.startswith(f"problem: {code} in {layer}"))
    assert lines[at + 2].startswith("  evidence: ")
    assert evidence in lines[at + 2]
    assert lines[at + 3].startswith("  what to do: ")


@pytest.mark.parametrize("damage", ["cut", "other", "missing", "fields"])
def test_a_damaged_checkpoint_is_one_line(damage, trained, tmp_path, capsys):
    path = tmp_path / "c.safetensors"
    whole = (trained / "last.safetensors").read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "other":
        path.write_bytes(b"PK\3\4" * 100)
    elif damage == "fields":
        state = checkpoint.load(trained / "last.safetensors")
        state["config"]["model"] = "lenet"
        checkpoint.save(path, state)
    for command in (["eval", path], ["doctor", path], ["train", "--resume", path],
                    ["predict", path, "x.png"]):
        assert "c.safetensors" in fails(capsys, *command)


@pytest.mark.parametrize("change", [
    {"mean": None}, {"mean": [0.1, 0.2, 0.3]}, {"mean": "a"}, {"std": [0.0]}, {"std": [1e-320]},
    {"mean": [float("nan")]}, {"config": {"dropout": 10**400}},
])
def test_a_crafted_checkpoint_predicts_nothing(change, trained, tmp_path, capsys):
    state = checkpoint.load(trained / "best.safetensors")
    path = checkpoint.save(tmp_path / "c.safetensors", {**state, **change})
    err = fails(capsys, "predict", path, png(tmp_path / "x.png", np.zeros((8, 8))))
    assert "c.safetensors" in err
    assert len(err) < 300 + len(str(path))


def test_a_network_without_a_finite_answer_predicts_nothing(trained, tmp_path, capsys):
    state = checkpoint.load(trained / "best.safetensors")
    next(iter(state["model"].values())).data[...] = np.nan
    path = checkpoint.save(tmp_path / "c.safetensors", state)
    err = fails(capsys, "predict", path, png(tmp_path / "x.png", np.zeros((8, 8))))
    assert "the network's answer is not finite" in err


@pytest.mark.parametrize("change", [
    {"progress": {"epoch": -5}}, {"progress": {"batch": 10**9}}, {"progress": {"step": 1.5}},
    {"progress": {"best": float("nan")}}, {"progress": {"epoch": 10**400}},
    {"history": {"test/accuracy": np.zeros((1000, 2))}}, {"history": {"seconds": np.zeros(3)}},
    {"history": None},
])
def test_progress_that_no_run_can_have_is_refused_with_the_files_name(change, trained, tmp_path,
                                                                     capsys):
    state = checkpoint.load(trained / "last.safetensors")
    for part, values in change.items():
        state[part] = {} if values is None else {**state[part], **values}
    path = checkpoint.save(tmp_path / "c.safetensors", state)
    err = fails(capsys, "train", "--resume", path)
    assert "c.safetensors: the checkpoint does not fit this run: " + part in err
    assert len(err) < 300 + len(str(path))


def finished(process, number):
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(number, status, tmp_path, capsys):
    folder = tmp_path / "run"
    process = subprocess.Popen([*PYTHON, "train", "--epochs", "100000", "--out", folder, "--quiet"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: (folder / "last.safetensors").exists())
        code, _, err = finished(process, number)
    finally:
        process.kill()
        process.wait()
    assert code == status
    assert err.strip() == (f"nbgrad: interrupted; go on with: nbgrad train --resume "
                           f"{folder / 'last.safetensors'}")
    done = checkpoint.load(folder / "last.safetensors")["progress"]["epoch"]
    out, _ = ok(capsys, "train", "--resume", folder / "last.safetensors", "--epochs", str(done + 1))
    assert f"after {done + 1} epochs" in out


def test_an_interrupted_study_keeps_its_finished_runs(tmp_path, capsys):
    folder = tmp_path / "study"
    argv = ["compare", "--epochs", "40", "--seeds", "500", "--out", folder]
    process = subprocess.Popen([*PYTHON, *argv],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        process.stderr.readline()       # the first finished run
        code, out, err = finished(process, signal.SIGINT)
    finally:
        process.kill()
        process.wait()
    assert code == 130, err
    results = json.loads((folder / "results.json").read_text())
    assert results["interrupted"] == signal.SIGINT
    assert results["finding"] == f"Interrupted after {len(results['runs'])} of 3000 runs."
    assert results["finding"] in out
    assert len(results["runs"]) >= 1
    assert "go on with: nbgrad train --resume" in err
    ok(capsys, "train", "--resume", folder, "--epochs", "40", "--quiet")


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------- predict

@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A network that reads digits well."""
    folder = tmp_path_factory.mktemp("runs") / "reader"
    assert main(["train", "--epochs", "12", "--out", str(folder), "--quiet"]) == 0
    return folder


def png(path, pixels):
    from matplotlib.image import imsave

    imsave(path, pixels, cmap="gray", vmin=0, vmax=1)
    return path


def test_images_of_any_size_colour_and_polarity_are_read_as_the_digits_they_show(reader, tmp_path,
                                                                              capsys):
    _, test = load("digits")
    images, labels = (t.data for t in test.tensors)
    n = 20
    files = {"plain": [], "large": [], "dark": [], "array": []}
    for i in range(n):
        x = images[i, 0]
        files["plain"].append(png(tmp_path / f"p{i}.png", x))
        files["large"].append(png(tmp_path / f"l{i}.png", np.kron(x, np.ones((5, 5)))))
        files["dark"].append(png(tmp_path / f"d{i}.png", 1 - x))
        np.save(tmp_path / f"a{i}.npy", (255 * x).round().astype(np.uint8))
        files["array"].append(tmp_path / f"a{i}.npy")
    for kind, paths in files.items():
        out, _ = ok(capsys, "predict", reader, *paths, *(["--invert"] if kind == "dark" else []))
        lines = out.splitlines()
        assert [line.split(": ")[0] for line in lines] == [str(p) for p in paths]
        right = sum(int(line.split(": ")[1][0]) == y for line, y in zip(lines, labels))
        assert right >= n - 2, (kind, right)


def test_shrinking_averages_over_area_and_growing_is_linear():
    x = np.arange(16.0).reshape(4, 4)
    np.testing.assert_allclose(resize(x, 4, 4), x)
    assert resize(x, 1, 1)[0, 0] == pytest.approx(x.mean())
    line = resize(np.array([[0.0, 1.0]]), 1, 4)[0]
    np.testing.assert_allclose(line, [0, 0.25, 0.75, 1])
    np.testing.assert_allclose(resize(np.ones((7, 5)), 3, 9), 1)


def test_every_layout_of_an_image_is_understood(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.random((5, 6, 3))
    for name, array, expected in (
            ("grey", x[:, :, 0], x[:, :, :1]), ("hwc", x, x), ("chw", np.moveaxis(x, 2, 0), x),
            ("rgba", np.dstack([x, np.ones((5, 6))]), x), ("f32", x.astype(np.float32), x),
            ("bool", x[:, :, 0] > 0.5, (x[:, :, :1] > 0.5))):
        np.save(tmp_path / f"{name}.npy", array)
        np.testing.assert_allclose(read_image(str(tmp_path / f"{name}.npy")), expected, atol=1e-7)


def bad_image(kind, path):
    if kind == "cut.png":
        path.write_bytes(png(path, np.zeros((40, 40))).read_bytes()[:90])
    elif kind == "bomb.png":
        blob = bytearray(png(path, np.zeros((4, 4))).read_bytes())
        blob[16:24] = b"\0\1\0\0" * 2
        path.write_bytes(blob)
    elif kind == "text.png":
        path.write_text("not a picture")
    elif kind == "pickle.npy":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "promise.npy":
        np.save(path, np.zeros((2, 2)))
        path.write_bytes(path.read_bytes().replace(b"(2, 2)", b"(99999, 99999)"))
    elif kind == "range.npy":
        np.save(path, np.full((3, 3), 7.0))
    elif kind == "nan.npy":
        np.save(path, np.full((3, 3), np.nan))
    elif kind == "ints.npy":
        np.save(path, np.ones((3, 3), int))
    elif kind == "shape.npy":
        np.save(path, np.zeros(9))
    elif kind == "empty.npy":
        np.save(path, np.zeros((0, 3)))
    elif kind != "missing.png":
        path.write_bytes(b"GIF89a")
    return path


@pytest.mark.parametrize("kind", ["cut.png", "bomb.png", "text.png", "pickle.npy", "promise.npy",
                                 "range.npy", "nan.npy", "ints.npy", "shape.npy", "empty.npy",
                                 "missing.png", "picture.gif"])
def test_what_is_no_image_is_one_line_that_names_it(kind, trained, tmp_path, capsys):
    assert kind in fails(capsys, "predict", trained, bad_image(kind, tmp_path / kind))


def test_a_png_without_matplotlib_says_what_to_install(trained, tmp_path, capsys, monkeypatch):
    path = png(tmp_path / "x.png", np.zeros((8, 8)))
    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    assert "pip install 'nbgrad[lab]'" in fails(capsys, "predict", trained, path)


# ---------------------------------------------------------------------- graph, info, errors

def test_graph_prints_the_ops_of_the_model(capsys):
    out, _ = ok(capsys, "graph", "--model", "lenet", "--data", "mnist")
    for name in ("conv2d", "batch_norm", "max_pool2d", "linear", "cross_entropy"):
        assert name in out
    assert "batch_norm" not in ok(capsys, "graph", "--norm", "none")[0]
    for norm in ("group", "rms"):
        assert f"{norm}_norm" in ok(capsys, "graph", "--norm", norm)[0]


def test_info_tells_versions_and_machine(capsys):
    out, _ = ok(capsys, "info")
    facts = dict(line.split(":", 1) for line in out.splitlines())
    assert facts["numpy"].strip() == np.__version__
    assert facts["python"].strip() == ".".join(map(str, sys.version_info[:3]))
    assert facts["kernel cache"].endswith(" MB)")
    assert {"nbgrad", "numba", "llvmlite", "threads", "threading layer", "devices"} <= facts.keys()


@pytest.mark.parametrize(("argv", "message"), [
    ([], "the following arguments are required: COMMAND"),
    (["fly"], "invalid choice: 'fly'"),
    (["compare", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["compare", "--lr", "-1"], "error: --lr: expected a number above 0, got -1.0"),
    (["compare", "--seeds", "0"], "error: --seeds: expected how many, at least 1, or which ones"),
    (["compare", "--seeds", "-1"], "which ones, got -1"),
    (["compare", "--seeds", "3", "3"], "error: --seeds: expected one or more different values"),
    (["compare", "--lr", "1", "1"], "error: --lr: expected one or more different values"),
    (["compare", "--weight-decay", "-1"], "error: --weight-decay: expected a number"),
    (["compare", "--data", "mnist"], "root"),
    (["compare", "--data", "mnist", "--root", "/nonexistent"], "'/nonexistent'"),
    (["train", "--batch-size", "1"], "batch norm needs two samples"),
    (["train", "--norm", "instance"], "'instance' needs images; mlp has layers of units"),
    (["train", "--resume", "/nonexistent/x"], "no checkpoint at /nonexistent/x"),
    (["train", "--threads", "0"], "error: --threads: expected 1 to"),
    (["train", "--lr", "1e999"], "error: --lr: expected a number above 0, got inf"),
    (["eval", "/nonexistent"], "no checkpoint at"),
    (["eval", "/nonexistent", "--batch-size", "0"], "error: --batch-size: expected at least 1"),
    (["graph", "--samples", "1"], "error: --samples: expected at least 2"),
    (["info", "--what"], "unrecognized arguments: --what"),
])
def test_bad_input_is_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *argv)
    assert os.listdir(tmp_path) == []


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("NBGRAD_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["eval", "/nonexistent"])


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option):
    code = ("import sys\nfrom nbgrad.cli import main\n"
            f"try:\n    main([{option!r}])\nexcept SystemExit as e:\n    assert e.code == 0\n"
            "heavy = {'numpy', 'numba', 'safetensors', 'rich', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nbgrad" in done.stdout


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    with contextlib.closing(os.fdopen(write, "w")) as pipe:
        done = subprocess.run([*PYTHON, "info"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert done.returncode == 141


def test_the_installed_command_is_this_one():
    done = subprocess.run([*PYTHON, "train", "--lr", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("nbgrad: error: argument --lr: invalid float value: 'x' "
                           "(see nbgrad train --help)\n")
    assert done.stdout == ""
