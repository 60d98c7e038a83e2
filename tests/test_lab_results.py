"""What a study leaves on disk comes back as it was."""

import csv
import json
import math

import numpy as np
import pytest

from nbgrad.lab import Figure, Finding, Series, Table, results
from nbgrad.lab.results import Outcome, Part

TEXTS = {name: f"the {name}" for name in results.TEXTS}
FINDING = Finding("depends", "2.1 times | as fast",
                  Table(["arm", "steps"], [["a|b", 3], ["c", None]]),
                  [Figure("t", "x", "y", [Series("s", [1.0, 2.0], [0.5, None], [0.1, None])],
                          log_y=True)], ["a note"])


def outcome(name="one", finding=FINDING, **settings):
    fields = {"scale": "quick", "data": "digits", "seeds": 5, "cells": 10, "done": 10,
              "state": "complete", "seconds": 1.5, "date": results.now(),
              "command": f"nbgrad lab run {name}", "machine": {"cpu": "x", "threads": 2},
              "errors": [], "parts": [Part(10, "2026-11-29", {"cpu": "x"})]}
    return Outcome({**TEXTS, "name": name}, **{**fields, **settings}, finding=finding)


def test_an_outcome_comes_back(tmp_path):
    before = outcome()
    path = results.save(tmp_path, before)
    after = results.load(tmp_path, "one")
    assert path == tmp_path / "one" / "finding.json"
    assert after == before
    assert after.verdict == "depends"
    assert [p.name for p in path.parent.iterdir()] == ["finding.json"]


def test_findings_of_older_versions_ran_where_their_run_ended(tmp_path):
    path = results.save(tmp_path, outcome(date="2026-11-29T10:00:00+00:00"))
    value = json.loads(path.read_text())
    assert value.pop("parts") == [{"cells": 10, "date": "2026-11-29", "machine": {"cpu": "x"}}]
    path.write_text(json.dumps(value))
    one, = results.load(tmp_path, "one").ran
    assert (one.cells, one.date, one.where) == (10, "2026-11-29", ["x"])


def test_without_a_finding_the_state_is_the_verdict(tmp_path):
    results.save(tmp_path, outcome(finding=None, state="interrupted", done=3, errors=["boom"]))
    after = results.load(tmp_path, "one")
    assert (after.verdict, after.finding, after.done, after.errors) == (
        "interrupted", None, 3, ["boom"])


def test_all_of_a_folder_in_the_order_asked_for(tmp_path):
    for name in ("one", "two", "three"):
        results.save(tmp_path, outcome(name))
    (tmp_path / "four").mkdir()
    assert [o.name for o in results.load_all(tmp_path)] == ["one", "three", "two"]
    assert [o.name for o in results.load_all(tmp_path, ["two", "four", "one"])] == ["two", "one"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}',
                                  '{"format": "nbgrad-lab-1", "finding": null}'])
def test_other_files_are_refused_by_name(tmp_path, text):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "finding.json").write_text(text)
    with pytest.raises(ValueError, match=r"one/finding.json: no finding"):
        results.load(tmp_path, "one")


def test_the_verdicts_are_a_table_for_people_and_one_for_programs(tmp_path):
    results.write_verdicts(tmp_path / "new", [outcome(), outcome("two", None, state="failed")])
    rows = list(csv.DictReader((tmp_path / "new" / "verdicts.csv").read_text().splitlines()))
    assert [r["verdict"] for r in rows] == ["depends", "failed"]
    assert rows[0]["finding"] == FINDING.sentence
    lines = (tmp_path / "new" / "verdicts.md").read_text().splitlines()
    assert lines[2] == r"| one | the claim | **depends** | 2.1 times \| as fast |"
    assert len(lines) == 4


def test_tables_of_text():
    table = Table(["arm", "steps", "at"], [["plain", 1234, 0.123456], ["bn", None, 7.0]])
    assert results.text_table(table).splitlines() == [
        "arm    steps      at", "-----  -----  ------", "plain   1234  0.1235",
        "bn         –       7"]
    assert results.markdown(FINDING.table).splitlines()[2:] == [r"| a\|b | 3 |", "| c | – |"]


def test_numbers_that_json_has_not_are_none():
    value = {"a": np.float32(0.5), 1: (math.nan, -math.inf, np.int64(3)),
             "b": np.array([[1.0, np.inf]]), "c": [True, None, "x"], "d": range(2)}
    found = results.clean(value)
    assert found == {"a": 0.5, "1": [None, None, 3], "b": [[1.0, None]], "c": [True, None, "x"],
                     "d": [0, 1]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(TypeError, match="got object"):
        results.clean([object()])
