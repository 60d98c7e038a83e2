"""Cells run in processes: kept, skipped, crashed, interrupted."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from nbgrad.lab import Finding, Study, Table, judging, results, running
from nbgrad.lab.cells import Cells
from nbgrad.lab.running import Plan
from nbgrad.lab.studies import find, names
from nbgrad.train.progress import Silent

STUDIES = '''
import os, signal, sys, time
from nbgrad.lab import Finding, Study, Table

def run(cell):
    if "seed" not in cell:
        return {}
    with open(cell["log"], "a") as f:
        f.write(f"{cell['seed']}\\n")
    print("noise on stdout, which is for answers")
    how = cell.get("how")
    if how == "raise":
        raise ValueError("a bad\\ncell")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "leave":
        print("last words", file=sys.stderr)
        os._exit(3)
    if how == "slow":
        time.sleep(30)
    alone = os.environ.get("OMP_NUM_THREADS")
    return {"value": 10 * cell["seed"], "nan": float("nan"), "alone": alone}

def judge(records, cells):
    total = sum(r["value"] for r in records)
    return Finding("supported", f"total {total}", Table(["seed"], [[c["seed"]] for c in cells]))

def study(cells, name="made-up", **settings):
    texts = dict.fromkeys(("question", "claim", "source", "published", "setup", "rule"), "-")
    return Study(name=name, **texts, run=run, judge=judge, **settings,
                 cells=lambda scale: [{"tiny": 1}] if scale == "tiny" else cells)
'''


@pytest.fixture
def made(tmp_path, monkeypatch):
    """study(cells): where another process can import it from; its `runs` are those that began."""
    (tmp_path / "made_up_studies.py").write_text(STUDIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cache").mkdir()
    info = {**running.backend.info(), "kernel cache": str(tmp_path / "cache")}
    monkeypatch.setattr(running.backend, "info", lambda: info)
    monkeypatch.setattr(judging, "SEEDS", 1)
    import made_up_studies

    log = tmp_path / "log"

    def study(*how, **settings):
        cells = [{"seed": i, "log": str(log), **({"how": h} if h else {})}
                 for i, h in enumerate(how)]
        return made_up_studies.study(cells, **settings)
    study.runs = lambda: sorted(map(int, log.read_text().split())) if log.exists() else []
    yield study
    del sys.modules["made_up_studies"]


def made_of(study, cells):
    return Study(**{**vars(study), "cells": lambda scale: cells})


def plan(tmp_path, **settings):
    return Plan(**{"folder": tmp_path / "lab", "processes": 1, **settings})


def test_cells_run_in_processes_with_one_thread_and_are_kept(made, tmp_path):
    done = []
    outcome, = running.run([made(None, None, None)], plan(tmp_path, processes=2), done=done.append)
    assert outcome.finding.sentence == "total 30"
    assert (outcome.state, outcome.verdict, outcome.seeds, outcome.cells, outcome.done) == (
        "complete", "supported", 3, 3, 3)
    assert done == [outcome]
    assert results.load(tmp_path / "lab", "made-up").finding.sentence == "total 30"
    lines = [json.loads(line) for line in
             (tmp_path / "lab" / "made-up" / "cells.jsonl").read_text().splitlines()]
    assert sorted(line["record"]["value"] for line in lines) == [0, 10, 20]
    assert {(line["record"]["alone"], line["record"]["nan"]) for line in lines} == {("1", None)}
    assert [p.name[:19] for p in (tmp_path / "cache").iterdir()] == ["lab-made-up-digits-"]


class Heard(Silent):
    def __init__(self):
        self.texts, self.lines = [], []

    def update(self, done, text=""):
        self.texts.append((done, text))

    def say(self, line):
        self.lines.append(line)


def test_a_folder_called_nbgrad_is_not_taken_for_the_package(tmp_path, monkeypatch):
    """Beside a checkout: what Python finds in the working directory are folders of its name."""
    wrong = tmp_path / "nbgrad" / "kernels" / "__init__.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    outcome, = running.run([find("rank-collapse")], Plan("tiny", folder=tmp_path / "out",
                                                         processes=2))
    assert (outcome.state, outcome.errors) == ("complete", [])


def test_kernels_are_compiled_before_and_once(made, tmp_path):
    """The smallest cells of all studies, in the processes that then run the others."""
    studies = [made(None, None, name=name) for name in ("one", "two", "three")]
    first, again = Heard(), Heard()
    running.run(studies, plan(tmp_path, processes=2), first)
    assert first.lines == ["compiling kernels for this CPU that are not there yet"]
    assert first.texts[:3] == [(0, f"compiling kernels {i}/3") for i in (1, 2, 3)]
    assert [done for done, _ in first.texts[3:]] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert {text for _, text in first.texts[3:]} == {
        f"{name} {i}/2" for name in ("one", "two", "three") for i in (1, 2)}
    assert sorted(p.name[:10] for p in (tmp_path / "cache").iterdir()) == [
        "lab-one-di", "lab-three-", "lab-two-di"]
    running.run(studies, plan(tmp_path, processes=2, again=True), again)
    assert again.lines == []
    assert [text for done, text in again.texts if "compiling" in text] == []
    assert made.runs() == [0] * 6 + [1] * 6


def test_finished_cells_are_not_run_again(made, tmp_path):
    running.run([made(None, None)], plan(tmp_path, processes=0))
    outcome, = running.run([made(None, None, None)], plan(tmp_path, processes=0))
    assert made.runs() == [0, 1, 2]
    assert outcome.finding.sentence == "total 30"
    running.run([made(None, None, None)], plan(tmp_path, processes=0, again=True))
    assert made.runs() == [0, 0, 1, 1, 2, 2]


def test_what_is_interrupted_leaves_what_was_found(made, tmp_path, monkeypatch):
    """Run again, stopped after the first of three cells: the old finding and all records stay, and
    the new record is the one that counts."""
    study = made(None, None, None)
    running.run([study], plan(tmp_path, processes=0))
    real = running.pool.run_all

    def stopped(cells, processes, answered, stopped_):
        answered(0, {"record": {"value": 7}, "seconds": 0.1})
    monkeypatch.setattr(running.pool, "run_all", stopped)
    monkeypatch.setattr(running, "Signals", lambda: contextlib.nullcontext(
        types.SimpleNamespace(caught=2)))
    outcome, = running.run([study], plan(tmp_path, processes=0, again=True))
    assert (outcome.state, outcome.done, outcome.finding) == ("interrupted", 1, None)
    assert results.load(tmp_path / "lab", "made-up").finding.sentence == "total 30"
    monkeypatch.undo()
    assert running.pool.run_all is real
    monkeypatch.setattr(judging, "SEEDS", 1)
    outcome, = running.run([study], plan(tmp_path, processes=0))
    assert (made.runs(), outcome.finding.sentence) == ([0, 1, 2], "total 37")
    assert len((tmp_path / "lab" / "made-up" / "cells.jsonl").read_text().splitlines()) == 3


def test_a_line_that_was_cut_short_is_run_again(made, tmp_path):
    running.run([made(None, None)], plan(tmp_path, processes=0))
    path = tmp_path / "lab" / "made-up" / "cells.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])
    outcome, = running.run([made(None, None)], plan(tmp_path, processes=0))
    assert made.runs() == [0, 1, 1]
    assert outcome.finding.sentence == "total 10"
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [
        json.loads(line)["key"] for line in whole.splitlines()]


def test_a_run_that_went_on_elsewhere_says_where_each_part_ran(made, tmp_path, monkeypatch):
    """Cells know their day and machine; those in files of older versions do not say."""
    real, path = running.backend.info(), tmp_path / "lab" / "made-up" / "cells.jsonl"

    def on(cpu, date):
        monkeypatch.setattr(running.backend, "info", lambda: {**real, "cpu": cpu, "cores": 4})
        monkeypatch.setattr(running, "now", lambda: f"{date}T23:59:59+00:00")
    on("znver4", "2026-11-28")
    outcome, = running.run([made(None, None)], plan(tmp_path, processes=0))
    assert [(p.cells, p.date, p.machine["cpu"]) for p in outcome.parts] == [
        (2, "2026-11-28", "znver4")]
    assert "kernel cache" not in path.read_text()
    on("haswell", "2026-11-29")
    outcome, = running.run([made(None, None, None)], plan(tmp_path, processes=0))
    assert made.runs() == [0, 1, 2]
    assert [(p.cells, p.date, p.machine["cpu"]) for p in outcome.parts] == [
        (2, "2026-11-28", "znver4"), (1, "2026-11-29", "haswell")]
    versions = f"4 cores, nbgrad {real['nbgrad']}, python {real['python']}"
    assert str(outcome.parts[1]).startswith(f"on 2026-11-29 on haswell, {versions}")
    assert results.load(tmp_path / "lab", "made-up").parts == outcome.parts
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k not in ("date", "machine")} for line in lines[:1]]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*old, *lines[1:]]))
    outcome, = running.run([made(None, None, None)], plan(tmp_path, processes=0))
    assert (made.runs(), outcome.finding.sentence) == ([0, 1, 2], "total 30")
    assert [(p.cells, p.date) for p in outcome.parts] == [
        (1, ""), (1, "2026-11-28"), (1, "2026-11-29")]
    assert str(outcome.parts[0]) == "at a time and place that their file does not say"


def test_records_of_other_code_are_dropped(tmp_path):
    old = Cells(tmp_path, "one", "v1")
    old.add({"seed": 0}, {"loss": 1.0}, 0.1)
    again = Cells(tmp_path, "one", "v1")
    assert again.get({"seed": 0, "root": "elsewhere"}) == ({"loss": 1.0}, 0.1)
    assert Cells(tmp_path, "one", "v2").get({"seed": 0}) is None
    assert (tmp_path / "one" / "cells.jsonl").read_text() == ""


@pytest.mark.parametrize(("how", "says"), [
    ("raise", "ValueError: a bad cell"), ("die", "ended by SIGKILL"), ("leave", "status 3")])
def test_a_crash_is_named_and_the_others_go_on(made, tmp_path, how, says):
    failed, = running.run([made(None, how, None)], plan(tmp_path))
    assert made.runs() == [0, 1, 2]
    assert (failed.state, failed.verdict, failed.done) == ("failed", "failed", 2)
    error, = failed.errors
    assert error.startswith("seed=1")
    assert says in error.splitlines()[0]
    if how == "leave":
        assert "last words" in error
    mended, = running.run([made(None, None, None)], plan(tmp_path))
    assert (mended.state, made.runs()) == ("complete", [0, 1, 1, 2])


def test_a_rule_that_raises_fails_its_study_alone(made, tmp_path, monkeypatch):
    import made_up_studies

    def judge(records, cells):
        raise ZeroDivisionError("no")
    bad = Study(**{**vars(made(None, name="bad")), "judge": judge})
    outcomes = running.run([bad, made(None)], plan(tmp_path, processes=0))
    assert [o.state for o in outcomes] == ["failed", "complete"]
    assert outcomes[0].errors[0].startswith("judge: ZeroDivisionError: no")
    assert made_up_studies


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import made_up_studies
from nbgrad.lab import running
cells = json.loads(sys.argv[2])
done = running.run([made_up_studies.study(cells)], running.Plan(folder=Path("lab"), processes=2))
print(done[0].state, done[0].done)
"""


def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(made, tmp_path):
    """Ctrl-C reaches the whole process group, so the workers get it as well."""
    log = tmp_path / "log"
    cells = [{"seed": i, "log": str(log), "how": how}
             for i, how in enumerate([None, None, "slow", "slow"])]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(cells)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while made.runs() != [0, 1, 2, 3] and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=20)
    assert said.split() == ["interrupted", "2"]
    assert results.load(tmp_path / "lab", "made-up").verdict == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    outcome, = running.run([made(None, None, None, None)], plan(tmp_path, processes=0))
    assert outcome.finding.sentence == "total 60"


def test_seeds_and_data_of_a_plan(made, tmp_path):
    study = made(None, None)
    cells = running.cells_of(study, plan(tmp_path, seeds=3, data="mnist", root="/there"))
    assert [(c["seed"], c["data"], c["root"]) for c in cells] == [
        (s, "mnist", "/there") for s in range(3)]
    cells = running.cells_of(made(None, data=()), plan(tmp_path, data="mnist", root="/there"))
    assert "data" not in cells[0]
    cells = [{"arm": "alone"}, {"seed": 4, "arm": "a"}, {"seed": 4, "arm": "b"}, {"seed": 5}]
    mixed = running.cells_of(made_of(study, cells), plan(tmp_path, seeds=2))
    assert mixed == [{"arm": "alone"}, {"seed": 0, "arm": "a"}, {"seed": 0, "arm": "b"},
                     {"seed": 1, "arm": "a"}, {"seed": 1, "arm": "b"}]
    outcome, = running.run([made(None)], plan(tmp_path, processes=0, seeds=2))
    assert outcome.command == "nbgrad lab run made-up --seeds 2"
    assert outcome.study["setup"] == "Here with 2 seeds, 2 runs; otherwise: -"
    full, = running.run([made(None)], plan(tmp_path, processes=0, scale="full"))
    assert full.study["setup"] == "Here with 1 seed, 1 run; otherwise: -"
    quick, = running.run([made(None)], plan(tmp_path, processes=0))
    assert quick.study["setup"] == "-"


def test_what_cannot_be_run(made, tmp_path):
    with pytest.raises(ValueError, match="scale: expected one of tiny, quick, full"):
        Plan("huge")
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        Plan(seeds=0)
    with pytest.raises(ValueError, match="made-up: no cells at scale quick"):
        running.cells_of(made(), Plan())
    texts = dict.fromkeys(("question", "claim", "source", "published", "setup", "rule"), "-")
    local = Study("local", **texts, cells=lambda scale: [{"seed": 0}], run=lambda cell: {},
                  judge=lambda r, c: Finding("depends", "", Table([], [])))
    with pytest.raises(ValueError, match="run must be a function of a module"):
        running.run([local], plan(tmp_path))
    assert running.run([local], plan(tmp_path, processes=0))[0].verdict == "depends"
    assert Path(tmp_path / "lab" / "local" / "finding.json").exists()


def test_the_registry_knows_what_is_meant():
    assert len(set(names())) == len(names())
    with pytest.raises(ValueError, match="do you mean 'convergence-speed'"):
        find("convergence-sped")
    with pytest.raises(ValueError, match="`nbgrad lab list` shows them"):
        find("xyz")
