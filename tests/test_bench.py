"""What the benches rest on: fair turns, medians, and tables that are what the files say."""

import csv
import io
import itertools
import json
import sys

import numpy as np
import pytest

from bench import measure, overhead, report


def fake(values):
    return iter(values).__next__


def test_sides_take_turns_and_each_starts_every_other_round():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert measure.rounds(sides, 3) == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert "".join(calls) == "abbaab"


def test_progress_is_told_side_and_round():
    told = []
    measure.rounds({"a": fake([1, 2]), "b": fake([3, 4])}, 2, lambda *at: told.append(at))
    assert told == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]


@pytest.mark.parametrize("n", [1, 2, 5, 7, 10])
def test_summary_is_the_quantiles_of_numpy(n):
    seconds = np.random.default_rng(n).exponential(size=n).tolist()
    want = np.quantile(seconds, [0.5, 0.2, 0.8])
    np.testing.assert_allclose(measure.summary(seconds), want, rtol=1e-14)


def test_one_slow_run_does_not_move_the_median():
    assert measure.summary([1.0, 1.0, 900.0, 1.0, 1.0]).median == 1


def test_seconds_per_call_is_the_median_run_after_a_warm_up(monkeypatch):
    clock, cost = [0.0], itertools.chain([5.0], itertools.repeat(0.25))     # the first one compiles

    def call():
        clock[0] += next(cost)
    monkeypatch.setattr(measure, "perf_counter", lambda: clock[0])
    assert measure.seconds_per_call(call, seconds=50, chunks=5) == 0.25     # runs of 64 calls: 16 s
    assert clock[0] == 5 + 0.25 * (1 + 2 + 4 + 8 + 16 + 32 + 64 - 1) + 5 * 16


def test_a_worker_is_one_warm_process_that_answers_by_name():
    code = ("import sys; from bench.measure import serve\nn = [0]\n"
            "def count(): n[0] += 1; return n[0]\n"
            "serve({'count': count}, sys.stdin, sys.stdout)")
    root = str(report.README.parent)
    with measure.Worker([sys.executable, "-c", code], cwd=root) as worker:
        assert [worker("count"), worker("count"), worker("count")] == [1, 2, 3]
    assert worker.process.returncode == 0


def test_a_worker_that_dies_says_which_case_it_was():
    with measure.Worker([sys.executable, "-c", "input(); raise SystemExit(7)"]) as worker, \
            pytest.raises(RuntimeError, match="add: the process ended with status 7"):
        worker("add")


def test_serve_answers_each_line_with_json():
    out = io.StringIO()
    measure.serve({"a": fake([0.5, 0.25]), "b": lambda: {"x": 1}}, ["a\n", "b\n", "a\n"], out)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [0.5, {"x": 1}, 0.25]


def test_a_run_is_added_to_the_file_with_where_and_when(tmp_path):
    path = tmp_path / "new" / "folder.csv"
    measured = {"case": {"ours": [3.0, 1.0, 2.0], "theirs": [4.0, 5.0, 6.0]}}
    rows = measure.result_rows(measured, threads=2, packages=["numpy", "no-such-package"])
    measure.append(path, rows)
    measure.append(path, measure.result_rows({"case": {"ours": [7.0]}}, threads=1, packages=[]))
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found[:2] == rows
    assert [row["median"] for row in found] == ["2", "5", "7"]
    numbers = {key: rows[0][key] for key in ("p20", "p80", "rounds", "threads")}
    assert numbers == {"p20": "1.4", "p80": "2.6", "rounds": "3", "threads": "2"}
    assert rows[0]["versions"].endswith(f", numpy {np.__version__}")
    assert int(rows[0]["cores"]) >= 1
    assert path.read_text().count("date,machine") == 1


def test_rows_that_spread_are_found():
    rows = measure.result_rows({"case": {"steady": [1.0, 1.1, 9.0, 1.0, 1.1, 1.0, 1.0],
                                         "shaken": [1.0, 5.0, 9.0, 1.0, 5.0, 1.0, 1.0]}},
                               threads=1, packages=[])
    assert [row["side"] for row in measure.unsteady(rows)] == ["shaken"]


MADE_UP = """date,machine,cores,threads,versions,rounds,case,side,median,p20,p80
2031-01-01T00:00:00+00:00,Old CPU,1,1,python 1,3,add,nbgrad,9,9,9
2031-02-03T04:05:06+00:00,Some CPU,4,2,"python 3.12.1, nbgrad 9",7,add,nbgrad,2e-06,1e-06,3e-06
2031-02-03T04:05:06+00:00,Some CPU,4,2,"python 3.12.1, nbgrad 9",7,add,torch,3.004e-06,1e-06,3e-06
2031-02-03T04:05:06+00:00,Some CPU,4,2,"python 3.12.1, nbgrad 9",7,help,nbgrad,0.12345,0.1,0.2
"""
EXPECTED = """before
<!-- table: speed -->
| | nbgrad | compared with | times as fast |
|---|--:|--:|--:|
| add | 2.00 µs | torch 3.00 µs | 1.50 |
| help | 123 ms |  |  |

Medians of 7 interleaved rounds, each side in its own process: Some CPU, 4 cores, 2 threads;
python 3.12.1, nbgrad 9; 2031-02-03 (`python -m bench.speed`).
<!-- end: speed -->
between
<!-- table: unmeasured -->
<!-- end: unmeasured -->
"""


def test_report_writes_the_newest_run_once_and_again(tmp_path):
    (tmp_path / "speed.csv").write_text(MADE_UP)
    text = ("before\n<!-- table: speed -->\n<!-- end: speed -->\nbetween\n"
            "<!-- table: unmeasured -->\n<!-- end: unmeasured -->\n")
    once = report.write(text, tmp_path)
    assert once == EXPECTED
    assert report.write(once, tmp_path) == once
    assert report.write(once.replace("2.00 µs", "1.00 µs"), tmp_path) == once


@pytest.mark.parametrize(("seconds", "text"), [
    (0.2e-9, "0.200 ns"), (123.4e-9, "123 ns"), (999.7e-9, "1.00 µs"), (1.9346e-6, "1.93 µs"),
    (0.0999, "99.9 ms"), (0.9994, "999 ms"), (0.9996, "1.00 s"), ("12", "12.0 s")])
def test_durations_have_three_digits(seconds, text):
    assert report.duration(seconds) == text


def test_the_table_in_the_readme_is_what_the_committed_file_says():
    text = report.README.read_text(encoding="utf-8")
    assert report.write(text) == text
    assert len(report.newest(measure.RESULTS / "overhead.csv")) >= 4
    assert len(measure.read(measure.RESULTS / "conv.csv")) >= 100
    assert "times as fast" in text


@pytest.mark.parametrize("name", overhead.SIDES)
def test_what_is_timed_does_its_work(name):
    lib = pytest.importorskip(name)
    z = overhead.recorded_add(lib)()
    assert z.requires_grad
    np.testing.assert_array_equal(z.detach().numpy(), np.full(64, 2, np.float32))
    x = overhead.square_sum(lib)()
    np.testing.assert_array_equal(x.grad.numpy(), np.full(64, 2, np.float32))
    step = overhead.training_step(lib)
    losses = [step().item() for _ in range(100)]
    assert 2 < losses[0] < 3                     # about ln 10
    assert losses[-1] < 0.5                      # 60 random images learned by heart
