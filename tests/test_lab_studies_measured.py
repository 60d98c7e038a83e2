"""Studies that are mostly instruments: each runs at tiny scale, each judge has all its outcomes."""

import json
import math

import numpy as np
import pytest

from nbgrad.lab import Finding, Table
from nbgrad.lab.judging import difference, enough, few, ratio, text
from nbgrad.lab.networks import along, perceptron, problem
from nbgrad.lab.results import clean
from nbgrad.lab.studies import find
from nbgrad.nn import BatchNorm1d
from tests.test_lab_studies import check

NAMES = ("covariate-shift", "landscape-smoothness", "noisy-batch-norm", "statistics-at-inference",
         "gradient-growth", "rank-collapse", "scale-invariance", "hessian-eigenvalue")


@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_at_tiny_scale(name):
    study = find(name)
    cells = study.cells("tiny")
    records = [clean(study.run(cell)) for cell in cells]
    assert clean(study.run(cells[-1])) == records[-1]           # the same for the same cell
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    check(study.judge(records, cells))
    assert study.name == name


@pytest.mark.parametrize("name", NAMES)
def test_quick_and_full_have_paired_arms(name):
    study = find(name)
    for scale, least in (("quick", 5), ("full", 5)):
        cells = study.cells(scale)
        arms = {}
        for cell in cells:
            arms.setdefault(cell["seed"], []).append({k: v for k, v in cell.items() if k != "seed"})
        assert len(arms) >= least
        assert all(own == arms[0] for own in arms.values())     # every seed has the same arms


def verdict_of(name, record_of):
    """The judge's, on records that are made up from the cells at quick scale."""
    study = find(name)
    cells = study.cells("quick")
    finding = study.judge([clean(record_of(cell)) for cell in cells], cells)
    check(finding)
    return finding.verdict


@pytest.mark.parametrize("name", ["covariate-shift", "landscape-smoothness", "noisy-batch-norm",
                                  "hessian-eigenvalue"])
def test_diverged_runs_are_results(name):
    """The plain networks' learning rate is such that nothing is finite after the first step."""
    study = find(name)
    cells = study.cells("tiny")
    records = [study.run({**cell, "lr": 1e30} if cell["norm"] in ("none", "noise") else cell)
               for cell in cells]
    finding = study.judge(clean(records), cells)
    check(finding, values=False)
    if name != "noisy-batch-norm":                      # there they count as guessing from then on
        labels = [series.label for series in finding.figures[0].series]
        assert [label for label in labels if "(none of 2 runs to the end)" in label] == labels[:1]


# what batch norm multiplies a number of the (MLP, linear network) by
def covariate_shift(relative, papers=None, few=False):
    def record(cell):
        found = {}
        for name, factors in (("relative", relative), ("difference", papers or relative),
                              ("cosine", relative)):
            factor = dict(zip(("digits", "linear"), factors))[cell["network"]]
            found[name] = (factor if cell["norm"] == "batch" else 1) * (1 + 0.01 * cell["seed"])
        if few and cell["network"] == "linear" and cell["seed"] > 3:
            found["difference"] = None
        return {"step": [0], **{name: [value] for name, value in found.items()},
                "by_layer": [found["relative"]], "layer": [2],
                **{f"typical_{k}": v for k, v in found.items()}}
    return record


@pytest.mark.parametrize(("shifts", "expected"), [
    (((0.5, 0.5),), "supported"), (((1.5, 1.2),), "not supported"), (((0.5, 1.5),), "depends"),
    (((0.5, 0.5), (1.5, 1.5)), "depends"),          # relative to the gradient alone
    (((1.5, 1.2), (1.5, 1.2), True), "depends"),    # half of the seeds diverged
])
def test_verdicts_of_covariate_shift(shifts, expected):
    assert verdict_of("covariate-shift", covariate_shift(*shifts)) == expected


def test_what_differs_from_the_papers_covariate_shift():
    """Only its own measure can; seeds that are left out are counted."""
    study = find("covariate-shift")
    cells = study.cells("quick")
    for relative, papers, differs in (((0.5, 0.5), (1.5, 1.5), 0), ((1.5, 1.5), (0.5, 0.5), 2)):
        made = covariate_shift(relative, papers)
        notes = study.judge([made(cell) for cell in cells], cells).notes
        assert sum(note.startswith("Differs from the paper") for note in notes) == differs
        assert study.judge([made(cell) for cell in cells], cells).sentence.startswith(
            f"By the published definition in {differs} of 2 networks; relative to ‖G‖ in "
            f"{2 - differs} of 2")
    made = covariate_shift((1.5, 1.5), few=True)
    finding = study.judge([made(cell) for cell in cells], cells)
    assert "(4 of 8 seeds without a value)" in finding.sentence


@pytest.mark.parametrize(("factors", "expected"), [
    ((0.1, 0.1), "supported"), ((1.5, 1.2), "not supported"), ((0.5, 1.5), "depends"),
])
def test_verdicts_of_landscape_smoothness(factors, expected):
    def record(cell):
        factor = dict(zip(("digits", "linear"), factors))[cell["network"]]
        r = (factor if cell["norm"] == "batch" else 1) * (1 + 0.01 * cell["seed"])
        names = ("range", "smoothness", "change")
        return {"step": [0], **{n: [r] for n in names},
                **{f"{when}_{n}": r for when in ("early", "all") for n in names}}
    assert verdict_of("landscape-smoothness", record) == expected


@pytest.mark.parametrize(("noisy", "instability", "expected"), [
    (0.80, 2.0, "supported"),           # noise costs ten points
    (0.89, 2.0, "not supported"),       # it costs one, though distributions are less stable
    (0.89, 0.5, "depends"),             # … but here they are not
])
def test_verdicts_of_noisy_batch_norm(noisy, instability, expected):
    def record(cell):
        average = {"none": 0.7, "batch": 0.9, "noisy": noisy, "noise": 0.1}[cell["norm"]]
        return {"step": [0, 2], "accuracy": [0.1, average], "average": average, "final": average,
                "instability": instability if cell["norm"] == "noisy" else 1.0}
    assert verdict_of("noisy-batch-norm", record) == expected


@pytest.mark.parametrize(("early", "trained", "corrupted", "expected"), [
    (0.0, 0.005, -0.1, "supported"), (0.1, 0.02, 0.3, "not supported"), (0.1, 0.0, 0.3, "depends"),
])
def test_verdicts_of_statistics_at_inference(early, trained, corrupted, expected):
    gains = {"early": early, "trained": trained}

    def record(cell):
        def situation(gain):
            others = ("population", "batch", "small", "adapted", "clean")
            return {"running": 0.6, **dict.fromkeys(others, 0.6 + gain)}
        found = {name: situation(gains.get(name, corrupted)) for name in (
            "early", "trained", "noise", "contrast", "brightness", "blur", "corrupted")}
        return {"step": [1], "running": [0.5], "population": [0.6], "lag": [0.1], **found}
    assert verdict_of("statistics-at-inference", record) == expected


@pytest.mark.parametrize(("batch", "expected"), [
    (lambda scale: 1.01, "supported"),              # steady at every scale
    (lambda scale: 5.0, "not supported"),           # grows more than without at every scale
    (lambda scale: 1.467, "depends"),               # the literature's: nearer to 1 at some scales
])
def test_verdicts_of_gradient_growth(batch, expected):
    def record(cell):
        factor = batch(cell["scale"]) if cell["norm"] == "batch" else cell["scale"] ** 2
        return {"factor": factor, "layer": [1, 2], "log10": [math.log10(factor), 0.0]}
    assert verdict_of("gradient-growth", record) == expected


@pytest.mark.parametrize(("ranks", "expected"), [
    # plain and batch norm of the linear and of the ReLU network; √8/2 is 1.41
    ({True: (1.0, 3.0), False: (1.1, 4.0)}, "supported"),
    ({True: (1.0, 1.0), False: (2.0, 1.5)}, "not supported"),
    ({True: (1.0, 3.0), False: (2.0, 1.5)}, "depends"),
])
def test_verdicts_of_rank_collapse(ranks, expected):
    def record(cell):
        rank = ranks[cell["linear"]][cell["norm"] == "batch"]
        return {"layer": [1], "rank": [rank], "last": rank, "last_effective": rank}
    assert verdict_of("rank-collapse", record) == expected


@pytest.mark.parametrize(("error", "compensated", "expected"), [
    (1e-9, 1e-6, "supported"), (1e-2, 1e-6, "not supported"), (1e-9, 0.05, "depends"),
    (1e-9, None, "not supported"),                  # diverged
])
def test_verdicts_of_scale_invariance(error, compensated, expected):
    def record(cell):
        return {"identities": {"L(αw) = L(w)": error}, "step": [0], "rate_step": [0, 1],
                "deviation": {"base": 0.0, "same lr": 0.2, "lr × α²": compensated}, "usual": 0.1,
                "base": [1], "same lr": [1], "lr × α²": [1], "no decay": [1, 1], "decay": [1, 2]}
    assert verdict_of("scale-invariance", record) == expected


@pytest.mark.parametrize(("plain", "expected"), [
    ((9, 8, 7), "supported"), ((0.9, 0.8, 0.7), "not supported"), ((9, 8, 0.7), "depends"),
    ((9, 8, None), "depends"),
])
def test_verdicts_of_hessian_eigenvalue(plain, expected):
    def record(cell):
        tops = plain if cell["arm"] == "none" else (1, 1, 1)
        return {"step": [0], "top": [tops[0]], **dict(zip(("start", "typical", "end"), tops))}
    assert verdict_of("hessian-eigenvalue", record) == expected


# --------------------------------------------------------------------------------- what they share

def test_intervals_of_pairs_with_missing_values():
    assert difference([1.0, None, 4.0], [0.0, 0.0, 1.0]).estimate == 2.0
    assert ratio([1.0, None, None], [1.0, 2.0, None], missing=math.inf).high == math.inf
    assert ratio([None, None], [1.0, 2.0]) is None
    assert text(ratio([1.0, None], [2.0, 2.0])) == "0.5 (1 of 2 seeds without a value)"
    assert text(None) == text([None, None]) == "diverged"
    assert text([3.0]) == "3"
    assert text([1.0, 2.0, 3.0]) == "2 [1, 3]"


def test_fewer_than_five_pairs_show_nothing():
    for n in (4, 5):
        found = difference([1.0] * n + [None], [0.0] * (n + 1))
        assert (found.above(0.0), (few(found))) == (n == 5, n == 4)
        assert difference([0.0] * n, [1.0] * n).below(0.0) == (n == 5)
    assert few(None)


def test_fewer_than_five_seeds_have_no_verdict():
    finding = Finding("supported", "So it is.", Table([], []))
    for n, verdict in ((1, "depends"), (4, "depends"), (5, "supported")):
        found = enough(finding, [{"seed": i % n} for i in range(8)])
        assert found.verdict == verdict
        assert found.sentence.startswith("So it is.")
        assert ("Too few seeds for a verdict" in found.sentence) == (n < 5)
    assert enough(finding, [{"arm": 1}]).verdict == "supported"     # nothing random in it


def test_a_rule_that_takes_any_of_several_needs_more_seeds_and_says_so():
    finding = Finding("supported", "So it is.", Table([], []), notes=["A note."])
    for k, least, level in ((2, 5, "97.5"), (4, 6, "98.8"), (6, 7, "99.2")):
        for n in (least - 1, least):
            found = enough(finding, [{"seed": i} for i in range(n)], k)
            assert (found.verdict == "supported") == (n == least)
            assert (f"verdict: {n}, where it needs {least}." in found.sentence) == (n < least)
            assert found.notes[0] == "A note."
            assert found.notes[1].startswith(
                f"The rule takes any of {k} comparisons: their intervals are of {level} %, so")


def test_pairs_of_several_comparisons_are_wider_and_need_more():
    """99.2 % of 7 values: P(median = smallest) = P(Binomial(7, 1/7) ≥ 4) = 0.95 %, above 0.42."""
    a, zero = [1.0, 2, 3, 4, 5, 6, 7], [0.0] * 7
    assert (difference(a, zero).low, difference(a, zero, 6).low) == (2.0, 1.0)
    assert difference(a, zero, 6).above(0)
    some = [1.0] * 6 + [None]
    assert difference(some, zero).above(0)
    assert not difference(some, zero, 6).above(0)
    assert (few(difference(some, zero)), few(difference(some, zero, 6))) == (False, True)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_is_shown_as_it_is(name):
    """Nothing diverged, so nothing says so."""
    study = find(name)
    cells = [cell for cell in study.cells("tiny") if cell["seed"] == 0]
    finding = study.judge([clean(study.run(cell)) for cell in cells], cells)
    check(finding)
    assert "diverged" not in finding.sentence


def test_arms_differ_in_the_norm_alone():
    plain, normed = (problem({"network": "digits", "norm": norm, "seed": 3, "lr": 0.1, "depth": 2,
                              "width": 4}) for norm in ("none", "batch"))
    a, b = ([p.data for p in one.model.parameters() if p.ndim == 2] for one in (plain, normed))
    for v, w in zip(a, b, strict=True):
        np.testing.assert_array_equal(v, w)
    for _ in range(30):                             # more than an epoch of 22
        (x, t), (y, u) = next(plain.batches), next(normed.batches)
        np.testing.assert_array_equal(x.data, y.data)
        np.testing.assert_array_equal(t.data, u.data)
    layers = [type(layer).__name__ for layer in perceptron([2, 3], BatchNorm1d, last=True)]
    assert layers == ["Linear", "BatchNorm1d", "ReLU"]


def test_the_linear_network_is_santurkars():
    p = problem({"network": "linear", "norm": "none", "seed": 0, "lr": 1e-6, "samples": 50})
    (x, target), weights = next(p.batches), [w.data for w in p.model.parameters() if w.ndim == 2]
    assert [w.shape for w in weights] == [(10, 10)] * 25
    assert x.shape == (50, 10)
    y = x.data
    for w in weights:
        y = y @ w.T
    assert p.step((x, target)) == pytest.approx(((y - target.data) ** 2).sum(), rel=1e-12)
    A, *_ = np.linalg.lstsq(x.data, target.data, rcond=None)
    np.testing.assert_allclose(x.data @ A, target.data, atol=1e-10)     # a linear map reaches it


def test_training_that_diverges_ends_with_what_was_measured():
    p = problem({"network": "linear", "norm": "none", "seed": 0, "lr": 1.0, "samples": 50})
    rows = along(p, {"steps": 50, "every": 1}, lambda p, batch: {"n": len(batch[0])})
    assert 1 <= len(rows) < 50
    assert rows[0]["n"] == 50
    assert all(math.isfinite(row["loss"]) for row in rows)
