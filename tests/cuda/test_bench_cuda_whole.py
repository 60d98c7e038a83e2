"""``python -m bench.cuda`` from its first part to its last on a stand-in for a device: everything
that a device runs, on few and small cases; then with a failure, and with Ctrl-C, inside each part.
"""

import csv
import signal
from concurrent.futures import Executor, Future
from functools import partial, partialmethod
from itertools import islice
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
from nbgrad.kernels.cuda import elementwise, launch, memory, offline

from bench import (
    cuda,
    cuda_compile,
    cuda_gradcheck,
    cuda_measure,
    cuda_sanitize,
    cuda_targets,
    cuda_train,
    cuda_verify,
)
from bench.cuda_clock import Clock, nbgrad_clock

SMALL = {"images": [(2, 3, 2, 2)], "rows": ([2], [20]), "convolutions": [(2, 3, 4, 3, 2)],
         "batch": 1, "side": 4}


class Event:
    """Each is recorded a millisecond after the one before."""

    now = 0

    def record(self):
        Event.now += 1
        self.at = Event.now


class Pool(Executor):
    """Does at once what it is given."""

    shut = 0

    def __init__(self, processes, context):
        assert context.get_start_method() == "spawn"

    def submit(self, f, *args):
        done = Future()
        done.set_result(f(*args))
        return done

    def shutdown(self, wait, cancel_futures):
        assert cancel_futures
        Pool.shut += 1


class Device:
    """What the parts ask of CuPy, beside arrays; ``allocators``: those that were set."""

    def __init__(self, arrays):
        self.arrays, self.allocators = arrays, []
        self.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(compute_capability="90", attributes={"L2CacheSize": 1}),
            Event=Event, get_elapsed_time=lambda a, b: float(b.at - a.at),
            set_allocator=self.allocators.append, memory=None)
        self.pool = SimpleNamespace(malloc=lambda size: None)

    def get_default_memory_pool(self):
        return self.pool

    def __getattr__(self, name):
        return getattr(self.arrays, name)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Each part as it is, of one or a few small cases."""
    device, one = Device(memory.xp), np.ones(3, "f4")
    monkeypatch.setattr(memory, "xp", device)
    monkeypatch.setattr(cuda, "missing", lambda simulate: "")
    monkeypatch.setattr(launch.Kernel, "machine_code", lambda self, cc: b"")
    monkeypatch.setattr(cuda_compile, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(offline, "every_kernel",
                        lambda: iter([elementwise.binary("maximum", np.dtype("f4"))]))
    monkeypatch.setattr(cuda_verify, "calls", lambda simulate: [
        ("maximum f4", lambda k, x: k.maximum(x, x), [one], "f4")])
    monkeypatch.setattr(cuda_gradcheck, "FUNCTIONS", {"square": (lambda x: x * x, [(2,)])})
    monkeypatch.setattr(cuda_gradcheck, "_network", lambda report: report.add("gradcheck", "net"))
    monkeypatch.setattr(cuda_train, "losses",
                        lambda name, image, batch, steps, *_: 1.0 / np.arange(1, steps + 1))
    monkeypatch.setattr(cuda_train, "replayed", lambda captured, steps, width: np.ones(steps))
    monkeypatch.setattr(cuda_measure, "find_spec", lambda name: None)
    monkeypatch.setattr(cuda_measure, "table",
                        lambda make=cuda_measure.table: islice(make(**SMALL), 1))
    monkeypatch.setattr(cuda_measure.Bench, "copies",
                        partialmethod(cuda_measure.Bench.copies, nbytes=1 << 10))
    monkeypatch.setattr(cuda_measure, "nbgrad_clock",
                        lambda deadline: partial(nbgrad_clock(deadline), seconds=0, most=1))
    monkeypatch.setattr(Clock, "__init__", partialmethod(Clock.__init__, least=1))
    monkeypatch.setattr(cuda_measure, "step", lambda b, name, captured: b.report.add(
        "measure", name, value=1e3 * b.clock([lambda: None])))       # test_bench_cuda.py has it
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho ===== ERROR SUMMARY: 0 errors\n")
    tool.chmod(0o755)
    monkeypatch.setattr(cuda_sanitize.shutil, "which", lambda name: str(tool))
    return device


def whole(tmp_path, *args):
    """The command's exit status and its rows."""
    path = tmp_path / "rows.csv"
    status = cuda.main(["--out", str(path), *args])
    with path.open(newline="") as f:
        return status, list(csv.DictReader(f))


def test_all_parts_one_after_the_other(device, tmp_path, capsys):
    status, rows = whole(tmp_path)
    assert status == 0
    found = [(row["part"], row["case"]) for row in rows]
    assert list(dict.fromkeys(part for part, _ in found)) == list(cuda.PARTS)
    assert {row["status"] for row in rows if row["case"] != "torch"} == {"ok"}
    assert ("verify", "kernels that no case ran") in found
    assert [case for part, case in found if part == "measure"] == [
        "torch", "copy bandwidth", "resnet20 step, batch 128, eager",
        "resnet20 step, batch 128, captured", "batch_norm forward 2x3x2x2 NCHW"]
    assert len([part for part, _ in found if part == "sanitize"]) == (
        len(cuda_sanitize.TOOLS) * len(cuda_sanitize.PATTERNS))
    assert device.allocators[-1] is device.pool.malloc
    out = capsys.readouterr().out
    assert all(target.what in out for target in cuda_targets.TARGETS)
    assert f"{len(rows)} rows in" in out


# what of a part is at work when something goes wrong
INSIDE = {"compile": (cuda_compile, "rehearsed"), "verify": (cuda_verify, "furthest"),
          "gradcheck": (cuda_gradcheck, "gradcheck"), "train": (cuda_train, "losses"),
          "measure": (cuda_measure.Bench, "measure"), "sanitize": (cuda_sanitize, "_said")}


def failing(error):
    def f(*args, **settings):
        raise error
    return f


@pytest.mark.parametrize("part", cuda.PARTS)
def test_a_failure_inside_a_part_hides_no_other(part, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*INSIDE[part], failing(RuntimeError("no such luck")))
    status, rows = whole(tmp_path)
    assert status == 1
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(cuda.PARTS)
    failed = [row for row in rows if row["status"] == "failed"]
    # a kernel that did not run to its end is missing among those that did, too
    assert {row["part"] for row in failed} == {part}
    assert all("no such luck" in row["note"] or row["case"].startswith("kernels that no")
               for row in failed)
    assert f"{len(failed)} failed\n" in capsys.readouterr().out


@pytest.mark.parametrize("part", cuda.PARTS)
def test_stopped_inside_a_part_it_concludes(part, device, tmp_path, monkeypatch, capsys):
    """What was found is in the file, what was set is set back, and no process is left."""
    shut, before = Pool.shut, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(*INSIDE[part], failing(KeyboardInterrupt()))
    status, rows = whole(tmp_path)
    assert status == 0
    parts = list(cuda.PARTS)
    want = parts[:parts.index(part)] + ["measure"] * (part == "measure")
    assert list(dict.fromkeys(row["part"] for row in rows)) == want
    assert {row["status"] for row in rows} <= {"ok", "skipped"}
    assert "stopped\n" in capsys.readouterr().out
    assert Pool.shut == shut + 1
    assert not device.allocators or device.allocators[-1] is device.pool.malloc
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("part", cuda.PARTS)
def test_a_part_that_cannot_list_its_cases_hides_no_other(part, device, tmp_path, monkeypatch):
    module = {"compile": cuda_compile, "verify": cuda_verify, "gradcheck": cuda_gradcheck,
              "train": cuda_train, "measure": cuda_measure, "sanitize": cuda_sanitize}[part]
    monkeypatch.setattr(module, "cases", failing(ImportError("not installed")))
    status, rows = whole(tmp_path)
    assert status == 1
    assert [(row["part"], row["case"]) for row in rows if row["status"] == "failed"] == [
        (part, "its cases")]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(cuda.PARTS)


def test_out_of_time_each_part_says_so_and_does_nothing(device, tmp_path):
    status, rows = whole(tmp_path, "--seconds", "0")
    assert status == 0
    assert {row["part"] for row in rows} == set(cuda.PARTS)
    assert {row["note"] for row in rows if row["case"] != "torch"} <= {
        "out of time", "not all cases ran"}


def test_a_case_that_takes_too_long_is_stopped(device, tmp_path, monkeypatch, capsys):
    """However long it would take: the whole is below 8 minutes."""
    assert cuda.arguments([]).seconds + cuda.SPARE <= 8 * 60 - 10
    monkeypatch.setattr(cuda, "SPARE", 0.2)
    monkeypatch.setattr(cuda_train, "losses", lambda *args: sleep(60))
    status, rows = whole(tmp_path, "--only", "compile,train", "--seconds", "0.5")
    assert status == 0
    assert {row["part"] for row in rows} == {"compile"}
    assert "stopped: out of time\n1 rows in" in capsys.readouterr().out
