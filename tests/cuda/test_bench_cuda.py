"""``python -m bench.cuda`` without a GPU: its parts in the simulator, and what measures on a
clock and arrays that stand in for a device's."""

import csv
import os
import re
import signal
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import numpy as np
import pytest
from nbgrad.kernels import cuda as kernels, reference
from nbgrad.kernels.cuda import (
    elementwise,
    launch,
    memory,
    moments,
    offline,
    optim,
    simulator,
    single,
    single_backward,
    tile,
)

from bench import (
    cuda,
    cuda_compile,
    cuda_measure,
    cuda_sanitize,
    cuda_targets,
    cuda_verify,
)
from bench.cuda_clock import Clock, rotating


class Device:
    """A device that takes a millisecond for whatever is between two events."""

    def __init__(self):
        self.time, self.waits = 0, 0

    def record(self, event):
        self.time += 1
        event.at = self.time

    def event(self):
        device = self

        class Event:
            def record(self):
                device.record(self)
        return Event()

    def wait(self):
        self.waits += 1

    def clock(self):
        ticks = iter(range(10**6))
        return Clock(self.event, lambda a, b: float(b.at - a.at), self.wait, lambda: next(ticks), 1)


@pytest.fixture
def report(tmp_path):
    return cuda.Report(tmp_path / "rows.csv", cuda.about(), float("inf"))


def rows(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def test_the_command_in_the_simulator(tmp_path, capsys):
    """A part of each; rows are in the file, and nothing fails."""
    for i, (part, case) in enumerate([
            ("verify", "batch_norm (3, 4, 3, 3)"), ("verify", "matmul"), ("verify", "sgd_step"),
            ("verify", "(5, 3) parameters f4"), ("verify", "softmax, both ways (3, 40)"),
            ("verify", "cross_entropy, both ways (4, 6, 5)"), ("verify", "pool2d uneven"),
            ("verify", "above a floor (2, 4, 4, 4)"), ("verify", "adaptive"), ("verify", "argmax"),
            ("gradcheck", "softmax"), ("train", "lenet"), ("train", "captured"),
            ("verify", "adam_step"), ("verify", "dropout")], 1):
        out = tmp_path / "rows.csv"
        assert cuda.main(["--simulate", "--only", part, "--case", case, "--out", str(out)]) == 0
        found = rows(out if i == 1 else tmp_path / f"rows-{i}.csv")      # none is written over
        assert found
        assert {(r["part"], r["status"], r["device"]) for r in found} == {(part, "ok", "simulator")}
    assert "0 failed" in capsys.readouterr().out


class Anew(dict):
    """Kernels by name, of which none is there: the simulator's tiles share names."""

    def __contains__(self, name):
        return False


def test_every_function_and_kernel_is_verified(monkeypatch, report):
    """The cases of a device, on memory without values and with kernels that do nothing: together
    they run all that the assembler is given, and every function that the reference has."""
    monkeypatch.setattr(simulator, "run", lambda *args: None)
    monkeypatch.setattr(tile, "SIMULATED", False)              # which has no large tiles
    monkeypatch.setattr(launch, "KERNELS", Anew())
    monkeypatch.setattr(cuda_verify, "drawn", lambda dtype, *shape, seed=0: np.zeros(
        shape, cuda_verify.named(dtype)))
    k = Noted(kernels)
    with cuda_verify.launches() as ran, np.errstate(all="ignore"):
        for _, call, inputs, dtype in cuda_verify.calls(False):
            call(cuda_verify.kernels_for(k, dtype), *map(cuda_verify.moved, inputs))
    used = k.used | {"batch_norm_update"}                      # tests/cuda alone has it
    cuda_verify.covered(report, ran)
    assert report.rows[-1]["value"] == "0"
    ran.remove("add_f4")
    with pytest.raises(AssertionError, match=r"^1 kernels: add_f4"):
        cuda_verify.covered(report, ran)
    names = {n for n, f in vars(reference).items() if callable(f) and not n.startswith("_")}
    assert {n for n in names - used if "adaptive" not in n} == set()         # these are CuPy's


class Noted:
    """A kernel package that notes what is asked of it."""

    def __init__(self, module):
        self.module, self.used, self.HALF = module, set(), module.HALF

    def __getattr__(self, name):
        self.used.add(name)
        return getattr(self.module, name)


def test_what_is_wrong_is_found_and_hides_nothing(tmp_path, monkeypatch, capsys):
    right = kernels.sub
    monkeypatch.setattr(kernels, "sub", lambda a, b: right(right(a, b), b * 0 + 1e-3))
    monkeypatch.setattr(kernels, "sin", lambda a: a[:1])
    out = tmp_path / "rows.csv"
    assert cuda.main(["--simulate", "--only", "verify", "--case", " 37 ", "--seconds", "60",
                      "--out", str(out)]) == 1
    status = {r["case"]: r["status"] for r in rows(out)}
    assert {c for c, s in status.items() if s == "failed"} == {
        "sub 37 f4", "sub 37 f8", *(f"sin 37 {dtype}" for dtype in cuda_verify.CLOSE)}
    assert "ok" in status.values()
    assert "times as far off" in capsys.readouterr().out.rpartition("6 failed")[2]


def test_out_of_time_is_said(tmp_path):
    out = tmp_path / "rows.csv"
    assert cuda.main(["--simulate", "--only", "verify", "--case", "sgd", "--seconds", "0",
                      "--out", str(out)]) == 0
    assert {r["note"] for r in rows(out)} == {"out of time"}


def test_the_median_of_calls_that_take_turns():
    device, asked = Device(), []
    seconds = device.clock()([partial(asked.append, i) for i in range(3)], seconds=4)
    assert seconds == 1e-3
    assert asked == [0, 1, 2] * (len(asked) // 3)
    assert device.waits == len(asked) // 3                       # one for each turn and the first
    assert [rotating(n, 1000) for n in (100, 1000, 1 << 20)] == [8, 3, 2]


SMALL = {"images": [(2, 3, 2, 2)], "rows": ([2], [20]), "convolutions": [(2, 3, 4, 3, 2)],
         "batch": 1, "side": 4}


class Torch:
    """Records that it was asked."""

    class no_grad:
        def __enter__(self): ...
        def __exit__(self, *error): ...

    bfloat16 = "bfloat16"

    def from_numpy(self, a):
        assert isinstance(a, np.ndarray)
        assert a.dtype.name != "bfloat16"
        return self

    def view(self, dtype):
        assert dtype == "bfloat16"
        return self

    def cuda(self):
        return self

    def __getattr__(self, name):                     # what is made ahead of the clock
        return lambda *args, **settings: self

    def __getitem__(self, index):
        return self

    def __iter__(self):
        return iter([self] * 5)

    backends = SimpleNamespace(cudnn=SimpleNamespace(enabled=True))


def test_measuring_on_a_stand_in(report):
    """Every case runs once with small arrays; each takes a millisecond, torch's 2."""
    from nbgrad.kernels.cuda.memory import empty, to_device, xp

    def once(calls):
        return Device().clock()(calls[:1], seconds=0)
    b = cuda_measure.Bench(report, once, 1, to_device, Torch(), lambda calls: 2e-3)
    b.copies(lambda n: empty((n // 4,), np.float32), xp.copyto, 1 << 10)
    assert report.rows[-1]["value"] == f"{2 * 1024 / 1e-3 / 1e9:.4g}"
    for make in cuda_measure.table(**SMALL):
        case = make()
        b.measure(case)
        row = report.rows[-1]
        assert (row["case"], float(row["value"])) == (case.name, 1.0)
        assert row["of_torch"] == "2"
        assert bool(row["of_copy"]) == bool(case.nbytes)
        if re.search("norm.* backward|conv2d", case.name):   # torch is not timed making it ready
            assert case.ready is not None
    names = {r["case"] for r in rows(report.path)}
    assert {n.split()[0] for n in names} == {"copy", "batch_norm", "layer_norm", "rms_norm",
                                             "softmax", "matmul", "conv2d", "conv2d_input",
                                             "conv2d_weight"}
    assert not report.failures()


def test_a_step_on_a_stand_in(report):
    b = cuda_measure.Bench(report, Device().clock(), 1, None)
    for captured in (False, True):
        b.clock = lambda calls: Device().clock()(calls, seconds=0)
        cuda_measure.step(b, f"step {captured}", captured, "mlp", (2, 1, 2, 2), in_features=4,
                          hidden=[3])
    assert [r["value"] for r in report.rows] == ["1", "1"]


def test_the_step_beside_torchs():
    """Of the same network: as many parameters; and the ratio is in the row."""
    torch = pytest.importorskip("torch")
    once = cuda_measure.torch_step(torch, (2, 3, 32, 32), "cpu")
    before, after = once().item(), once().item()
    assert 0 < after < before
    from bench.on_torch import resnet20
    from nbgrad import models

    assert sum(p.numel() for p in resnet20().parameters()) == sum(
        p.numel() for p in models.resnet20().parameters())


def found(case, **ratios):
    row = {"part": "measure", "status": "ok", "case": case, "of_copy": "", "of_torch": ""}
    return {**row, **ratios}


def test_targets_are_judged_by_their_worst_case():
    rows = [found("batch_norm forward 64x64x56x56 NCHW", of_copy="0.9", of_torch="1.6"),
            found("batch_norm forward 64x64x56x56 channels-last", of_copy="0.8", of_torch="1.2"),
            found("batch_norm forward 64x64x56x56 NCHW f2", of_copy="0.1"),       # none is asked of
            found("matmul 4096x4096x4096 3xtf32", of_torch="1.1"),
            {**found("layer_norm forward 64x256", of_copy="0.1"), "status": "failed"}]
    lines = {line[:38].strip(): line[38:] for line in cuda_targets.table(rows).splitlines()}
    assert len(lines) == len(cuda_targets.TARGETS) + 1
    assert lines["batch norm forward, of copy"].split()[:3] == ["0.85", "0.80", "missed"]
    assert "channels-last (of 2)" in lines["batch norm forward, of copy"]
    assert lines["forward, NCHW, of PyTorch"].split()[:3] == ["1.50", "1.60", "met"]
    assert lines["3xTF32, of cuBLAS float32"].split()[:3] == ["1.00", "1.10", "met"]
    assert "not measured" in lines["layer norm, of copy"]


def test_every_target_has_cases_that_are_measured():
    """By the names that the table of cases has, at the sizes of the test."""
    names = [make().name for make in cuda_measure.table(**SMALL)]
    names += [f"resnet20 step, batch 128, {how}" for how in ("captured", "eager")]
    for target in cuda_targets.TARGETS:
        rows = [found(name, **{target.column: "1"}) for name in names]
        assert cuda_targets.judged(rows, target) is not None, target.what


def test_clocks_stop_at_the_deadline():
    device = Device()
    clock = Clock(device.event, lambda a, b: 1.0, device.wait, iter(range(10**6)).__next__, 50, 7)
    asked = []
    clock([partial(asked.append, 0)], seconds=100)
    assert len(asked) == 1 + 7                                   # one to warm up


def test_parts_share_the_time_that_is_left(report, monkeypatch):
    monkeypatch.setattr(cuda, "monotonic", lambda: 100.0)
    report.end = 100.0 + cuda.PARTS["verify"] + cuda.PARTS["train"]
    report.share(["verify", "train"])
    assert report.deadline == pytest.approx(100.0 + cuda.PARTS["verify"])
    report.share(["train"])
    assert report.deadline == report.end


def test_stopped_by_a_signal_it_concludes(tmp_path, monkeypatch, capsys):
    def stopped(self, part, case, f):
        self.add(part, case)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(cuda.Report, "attempt", stopped)
    out = tmp_path / "rows.csv"
    assert cuda.main(["--simulate", "--only", "gradcheck,train", "--out", str(out)]) == 0
    assert len(rows(out)) == 1
    assert "stopped\n1 rows in" in capsys.readouterr().out


def test_kernels_are_compiled_into_the_cache(report, monkeypatch, tmp_path):
    """By the processes' function: kernels by turns, failures by name, nothing after the time."""
    made = []

    def machine_code(self, cc):
        made.append(self.name)
        return 1 / len(self.name[:-1])                       # a kernel called by one letter fails
    monkeypatch.setattr(launch.Kernel, "machine_code", machine_code)
    every = {k.name: k for module in (elementwise, moments, optim) for k in module.every()}
    recipes = [every[n].recipe for n in ("add_f4", "settled_bf", "sgd_f8")]
    assert cuda_compile._compile(recipes, (7, 5), float("inf")) == (2, [])
    assert made == ["add_f4", "sgd_f8"]
    assert cuda_compile._compile(recipes, (8, 0), float("inf")) == (3, [])
    assert cuda_compile._compile(recipes, (9, 0), 0) == (0, [])
    monkeypatch.setattr(every["sgd_f8"], "name", "a")
    assert cuda_compile._compile(recipes, (9, 0), float("inf")) == (
        2, ["a: ZeroDivisionError: division by zero"])


def test_what_is_verified_is_compiled_ahead(report, monkeypatch):
    """Kernels that wait for each other, then all others, then what the rehearsal has found."""
    class Pool(Executor):
        def __init__(self, processes, context):
            self.shutdown = lambda wait, cancel_futures: None

        def submit(self, f, recipes, cc, until):
            done = Future()
            done.set_result((len(recipes), []))
            given.extend(recipes)
            return done
    given = []
    every = [k for module in (elementwise, single, optim, single_backward) for k in module.every()]
    monkeypatch.setattr(offline, "every_kernel", lambda: iter(every))
    asked = elementwise.spread("add", np.dtype("f4"), "u8", True)
    monkeypatch.setattr(cuda_compile, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(cuda_verify, "calls", lambda simulate: [
        ("one", lambda k, x: k.add(x, x), [np.ones(3, "f4")], "f4"),
        ("fails", lambda k, x: 1 / 0, [np.ones(3, "f4")], "f4"),
        ("other", lambda k, x: asked(1, x), [[np.ones(3, "f4")]], "f4")])
    report.deadline = monotonic() + 1000
    cuda_compile.everything(report, (9, 0), 2)
    assert report.rows[-1]["value"] == str(len(every) + 1)
    assert report.rows[-1]["note"] == f"of {len(every) + 1}, sm_90, by 2 processes"
    together = [k.recipe for k in every if k.together]
    assert given[:len(together)] == together
    assert given[-1] == asked.recipe
    assert {make for _, make, _, _ in together} == {"single", "gradients"}


def test_peers_get_the_same_values():
    """torch, on the CPU here, and the kernels agree on what each case means."""
    torch = pytest.importorskip("torch")
    from nbgrad.kernels.cuda.memory import to_device, to_host

    for make in cuda_measure.table(**SMALL):
        case = make()
        if "rms_norm backward" in case.name:                     # whose native form is CUDA's
            continue
        if case.name.split()[-1] in cuda_measure.HALVES and re.match("batch_norm|.* backward",
                                                                     case.name):
            continue               # torch rounds before it adds; its backward is CUDA's for halves
        got = case.call(*map(to_device, case.arrays))
        want = case.theirs(torch, [cuda_measure.to_torch(torch, a) for a in case.arrays])()
        got = [to_host(a) for a in (got if isinstance(got, tuple) else [got]) if a is not None]
        want = [w for w in (want if isinstance(want, tuple) else [want]) if w is not None]
        close = {"tf32": 2e-2, "f2": 4e-3, "bf": 3e-2}.get(case.name.split()[-1], 1e-4)
        for a, b in zip(got[:len(want)], want):
            np.testing.assert_allclose(a.astype(np.float64), b.double().numpy(), rtol=close,
                                       atol=close)


def test_without_the_sanitizer_it_says_so(report, monkeypatch):
    monkeypatch.setattr(cuda_sanitize.shutil, "which", lambda name: None)
    assert list(cuda_sanitize.cases(report, False)) == []
    assert report.rows[0]["note"] == "that program is not installed"


def test_the_sanitizers_findings_fail(report, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(cuda_sanitize.shutil, "which", lambda name: str(tool))
    for text, status in (('echo "===== $* ERROR SUMMARY: 0 errors"', "ok"),
                         ("echo '===== Invalid write'; exit 9", "failed")):
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        name, f = next(iter(cuda_sanitize.cases(report, False)))
        report.deadline = float("inf")
        report.attempt("sanitize", name, f)
        assert report.rows[-1]["status"] == status
    assert "--only verify --no-pool --case" in report.rows[-2]["note"]
    assert "Invalid write" in report.rows[-1]["note"]


def test_what_is_not_done_in_time_is_gone_with_all_that_it_started(tmp_path):
    number = tmp_path / "pid"
    assert cuda_sanitize._said(["sh", "-c", f"sleep 100 & echo $! > {number}; wait"], 1) is None
    state = Path("/proc") / number.read_text().strip() / "stat"
    until = monotonic() + 20
    while state.exists() and state.read_text().split()[2] != "Z" and monotonic() < until:
        sleep(0.01)
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert cuda_sanitize._said(["sh", "-c", "echo a; echo b >&2; exit 3"], 20) == (3, "a\n", "b\n")


@pytest.mark.parametrize("pooled", [True, False])
def test_memory_is_poisoned_in_the_pool_or_out_of_it(pooled, monkeypatch):
    class Memory:
        def __init__(self, size):
            self.size, self.filled = size, None

        def memset_async(self, value, size, stream):
            self.filled = value, size
    own = []
    pool = SimpleNamespace(malloc=Memory)
    stand_in = SimpleNamespace(get_default_memory_pool=lambda: pool, cuda=SimpleNamespace(
        set_allocator=own.append, get_current_stream=lambda: None, memory=SimpleNamespace(
            Memory=Memory, MemoryPointer=lambda memory, offset: (own.append(memory), memory)[1])))
    monkeypatch.setattr(memory, "xp", stand_in)
    with cuda_verify.poisoned(pooled):
        found, nothing = own[0](12), own[0](0)
    assert (found.size, found.filled, nothing.filled) == (12, (0xFF, 12), None)
    assert (found in own) is not pooled
    assert own[-1] is pool.malloc


def test_arguments(capsys):
    with pytest.raises(SystemExit):
        cuda.main(["--only", "verfy"])
    assert "no part called verfy" in capsys.readouterr().err
    assert cuda.main([]) == 2
    assert "add --simulate" in capsys.readouterr().out
