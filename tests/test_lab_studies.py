"""Every study runs at tiny scale, and its rule can return each of its verdicts."""

import json
import math

import pytest

from nbgrad.lab import Finding, judging, running
from nbgrad.lab.intervals import together
from nbgrad.lab.results import clean, text_table
from nbgrad.lab.running import Plan
from nbgrad.lab.studies import find, names
from tests.lab_records import RECORDS, divisors, sizes

VERDICTS = ("supported", "not supported", "depends")
OWN = [name for name in names() if name in RECORDS]


def check(finding, values=True):
    """What a report relies on; ``values``: every curve has one."""
    assert isinstance(finding, Finding)
    assert finding.verdict in VERDICTS
    assert finding.sentence.endswith(".")
    assert finding.table.rows
    assert all(len(row) == len(finding.table.columns) for row in finding.table.rows)
    assert finding.figures
    for figure in finding.figures:
        for s in figure.series:
            assert len(s.x) == len(s.y)
            assert not values or any(y is not None for y in s.y)
            for end in (s.low, s.high):
                assert end is None or len(end) == len(s.x)
    text_table(finding.table)
    json.dumps(clean({"rows": finding.table.rows}), allow_nan=False)


@pytest.mark.parametrize("name", OWN)
def test_it_runs_at_tiny_scale(name, tmp_path):
    """The verdict of so little means nothing; that it has a table and pictures does."""
    outcome, = running.run([find(name)], Plan("tiny", processes=0, folder=tmp_path))
    assert outcome.errors == []
    check(outcome.finding)


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("name", OWN)
def test_each_verdict_can_be_returned(name, verdict):
    study = find(name)
    cells = study.cells("quick")
    finding = study.judge([clean(RECORDS[name][verdict](cell)) for cell in cells], cells)
    check(finding)
    assert finding.verdict == verdict, finding.sentence
    differs = [note for note in finding.notes if note.startswith("Differs from")]
    if name in ("initialisation", "regularisation", "momentum", "divide-by-variance"):
        assert not differs                                      # nothing was measured there
    else:
        published = "depends" if name == "placement" else "supported"
        assert bool(differs) == (verdict != published)


def test_a_place_that_is_better_in_half_of_the_cases_is_not_the_right_one():
    study = find("placement")
    cells = study.cells("quick")

    def record(cell):
        wins = cell["network"] == "MLP" and cell["placement"] == "before"
        return {"final_accuracy": 0.9 + 0.001 * cell["seed"] + 0.02 * wins, "diverged": False}
    assert study.judge([record(cell) for cell in cells], cells).verdict == "depends"


def test_a_gain_of_group_norm_is_not_a_loss_of_batch_norm():
    study = find("batch-size")
    cells = study.cells("quick")
    for batch, group, noted in ((0.1, 0.05, False), (0.0, -0.05, True), (0.0, 0.05, False)):
        made = sizes(0.0, batch, group)
        finding = study.judge([made(cell) for cell in cells], cells)
        assert any("group norm gains" in note for note in finding.notes) == noted
        assert (finding.verdict == "depends") == (batch > 0)


def test_a_divisor_that_is_better_makes_a_difference_too():
    study = find("divide-by-variance")
    cells = study.cells("quick")
    for worse, verdict in (((0.1, 1.0, 10.0), "not supported"), ((10.0,), "depends")):
        made = divisors(*worse, by=-0.05)
        assert study.judge([made(cell) for cell in cells], cells).verdict == verdict


def test_what_differs_of_dropout_is_named():
    study = find("dropout")
    cells = study.cells("quick")
    for verdict, says in (("depends", "here statistics found again mend nothing clearly in MLP"),
                          ("not supported", "here it costs nothing clearly in MLP, CNN; stat")):
        made = RECORDS["dropout"][verdict]
        finding = study.judge([made(cell) for cell in cells], cells)
        assert says in finding.notes[0]


def test_runs_that_never_arrive_are_not_printed_as_if_they_had():
    study = find("cnn")
    cells = study.cells("quick")
    made = _never(RECORDS["cnn"]["supported"])
    rows = study.judge([made(cell) for cell in cells], cells).table.rows
    assert {row[3] for row in rows if row[1] == "none"} == {"> 400"}
    assert {row[3] for row in rows if row[1] == "batch"} == {"100 [100, > 400]"}


def _never(made):
    """Without a norm, no run arrives; with one, all but one do."""
    def record(cell):
        found = made(cell)
        if cell["norm"] == "none" or cell["seed"] == 0:
            found["test_accuracy"] = [0.5] * len(found["steps"])
        return found
    return record


@pytest.mark.parametrize("name", ["convergence-speed", "higher-learning-rates", "initialisation"])
def test_where_nobody_arrives_there_is_no_verdict(name):
    """What counts as arrived is other on other data: CIFAR-10's 30 % are enough there."""
    study = find(name)
    for data, verdict in (("digits", "depends"), ("cifar10", "supported")):
        cells = [{**cell, "data": data} for cell in study.cells("quick")]
        records = [scaled(RECORDS[name]["supported"](cell), 0.5) for cell in cells]
        finding = study.judge(clean(records), cells)
        assert finding.verdict == verdict
        assert ("No run" in finding.sentence or "no run" in finding.sentence
                or "at 0 without" in finding.sentence) == (data == "digits")


def scaled(record, factor):
    """The record of a run half as accurate."""
    return {k: [factor * v for v in r] if k == "test_accuracy" else factor * r
            if k == "final_accuracy" else r for k, r in record.items()}


@pytest.mark.parametrize("name", OWN)
def test_diverged_runs_are_results(name):
    """Runs without batch norm, or half of the arms, that end at once with a loss that is not finite
    do not stop the rule."""
    study = find(name)
    cells = study.cells("quick")
    records = [lost(RECORDS[name]["supported"](cell)) if i % 2 == 0 else
               RECORDS[name]["supported"](cell) for i, cell in enumerate(cells)]
    check(study.judge(clean(records), cells), values=False)


def lost(record):
    """The record of the same run, had it diverged in its first steps."""
    found = {}
    for key, value in record.items():
        if isinstance(value, list):
            found[key] = value[:1] if key == "steps" else [
                0.1 if "accuracy" in key else math.nan]
        else:
            found[key] = math.nan if key.endswith("loss") else value
    return {**found, "final_accuracy": 0.1, "diverged": True}


@pytest.mark.parametrize("name", names())
def test_its_texts_say_what_was_asked(name):
    study = find(name)
    assert study.name == name
    for text in (study.question, study.claim, study.source, study.published, study.setup,
                 study.rule, study.literature):
        assert len(text) > 10
    assert study.question.endswith("?")
    for word in ("supported", "depends", "not supported"):
        assert word in study.rule.lower()
    assert study.changed == "" or "after a first run" in study.changed.lower()


@pytest.mark.parametrize("name", names())
def test_the_rule_names_the_level_of_its_intervals_and_has_the_seeds_for_it(name):
    study = find(name)
    if study.comparisons > 1:
        percents = f"{100 * together(study.comparisons):.1f}".removesuffix(".0")
        assert f"{percents} %" in study.rule
        assert f"{percents.removesuffix('.0')}" in study.changed
        assert "Bonferroni" in study.changed
    for scale in ("quick", "full"):
        seeds = {cell["seed"] for cell in study.cells(scale)}
        assert len(seeds) >= judging.needed(study.comparisons)


# These do not ask how well networks end, or compare what is read of one network; initialisation
# tunes at the usual scale of weights.
UNTUNED = {"covariate-shift", "landscape-smoothness", "hessian-eigenvalue", "gradient-growth",
           "rank-collapse", "scale-invariance", "statistics-at-inference"}


@pytest.mark.parametrize("name", names())
def test_where_the_claim_is_about_quality_the_learning_rate_is_tuned(name):
    """For each arm, of three or more; where it is not, nothing is trained, or the set-up says why.
    """
    study = find(name)
    rates = {cell.get("lr") for cell in study.cells("quick") if cell.get("network") != "linear"}
    if name in UNTUNED:
        assert len(rates) == 1
        assert None in rates or "tune" in study.setup or "identities" in study.setup
    else:
        assert len(rates) >= 3


def test_studies_that_were_changed_after_a_first_run_say_so():
    assert {name for name in names() if find(name).changed} >= {
        "batch-size", "placement", "covariate-shift", "landscape-smoothness", "hessian-eigenvalue",
        "noisy-batch-norm", "statistics-at-inference", "batch-renorm", "cnn", "initialisation",
        "gamma-beta-only", "regularisation"}


# Steps of `--full`, where the paper counts steps of a network that is not larger than a laptop's.
PAPERS = {"convergence-speed": {50_000},        # Ioffe & Szegedy 2015, section 4.1
          "covariate-shift": {15_000, 10_000}, "landscape-smoothness": {15_000, 10_000},
          "noisy-batch-norm": {15_000},         # Santurkar et al. 2018: VGG, linear network
          "hessian-eigenvalue": {15_000}}


@pytest.mark.parametrize("name", names())
def test_full_has_the_papers_steps_and_five_seeds(name):
    """Where the paper's steps are those of ImageNet's epochs, ten times as many as the default."""
    study = find(name)
    quick, full = study.cells("quick"), study.cells("full")
    assert len({cell["seed"] for cell in full}) >= 5
    steps, few = ({cell["steps"] for cell in cells if "steps" in cell} for cells in (full, quick))
    if name in PAPERS:
        assert steps == PAPERS[name]
    elif steps:
        assert min(steps) >= 10 * min(few)
        assert max(steps) >= 10 * max(few)
    else:
        assert any(max(cell[size] for cell in full) > max(cell[size] for cell in quick)
                   for size in ("images", "depth", "width") if size in full[0])
    if name == "gradient-growth":               # Yang et al. 2019
        assert {cell["width"] for cell in full} == {1000}
    if name == "batch-size":                    # as many as 67 epochs of the digits
        assert {cell["images"] for cell in full} == {24 * cell["images"] for cell in quick}


@pytest.mark.parametrize("name", OWN)
def test_arms_are_paired_and_full_has_more_of_all(name):
    """Every seed has the same arms, and there are at least five."""
    study = find(name)
    for scale in ("tiny", "quick", "full"):
        cells = study.cells(scale)
        assert len({json.dumps(clean(c), sort_keys=True) for c in cells}) == len(cells)
        by_seed = {}
        for c in cells:
            rest = json.dumps(clean({k: v for k, v in c.items() if k != "seed"}), sort_keys=True)
            by_seed.setdefault(c["seed"], []).append(rest)
        assert len({tuple(arms) for arms in by_seed.values()}) == 1
        assert scale == "tiny" or len(by_seed) >= 5
    assert len(study.cells("full")) > len(study.cells("quick")) > len(study.cells("tiny"))
