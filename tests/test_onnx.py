"""ONNX's node vectors on nbgrad; docs/onnx.md says which pass, and why the others do not."""

from collections import Counter

import numpy as np
import onnx
import pytest

from tests.onnx_adapter import GROUPS, OPERATORS, Unsupported, cases, not_passed, page

# all of the norms' cases that there are
NORMS = {"BatchNormalization": 4, "GroupNormalization": 2, "InstanceNormalization": 2, "LRN": 2,
         "LayerNormalization": 19, "LpNormalization": 6, "MeanVarianceNormalization": 1,
         "RMSNormalization": 19}
VERSION, ALL = "1.23.2", 1884


@pytest.fixture(scope="module")
def outcomes():
    """What came of each case: loading takes some seconds, running one, once compiled."""
    return cases.outcomes()


@pytest.fixture(scope="module")
def runnable(outcomes):
    """The cases whose operators are all there, and what came of them."""
    return {name: outcome for name, outcome in outcomes.items() if outcome.kind != "operator"}


@pytest.mark.parametrize("group", GROUPS)
def test_every_case_passes_or_is_listed(group, runnable):
    listed = not_passed.expected(runnable)
    found = {name: outcome.what for name, outcome in runnable.items()
             if outcome.kind and name not in listed
             and GROUPS[group].keys() & set(cases.load()[name].operators)}
    assert found == {}


def test_no_case_that_passes_is_listed(runnable):
    listed = not_passed.expected(runnable)
    assert {name for name in listed if not runnable[name].kind} == set()
    assert set(listed.values()) == set(not_passed.REASONS)      # a reason without a case
    for pattern in " ".join(not_passed.REASONS.values()).split():
        assert any(not_passed.fnmatchcase(name, pattern) for name in runnable), pattern


def test_listed_reasons_are_those_found(runnable):
    for name, reason in not_passed.expected(runnable).items():
        kind, what = runnable[name]
        assert (kind == "dtype") == (reason == not_passed.DTYPE), name
        if kind == "lacks":
            assert what == reason, name


def test_absent_operators_are_exactly_those_listed(outcomes):
    found = Counter(outcome.what for outcome in outcomes.values() if outcome.kind == "operator")
    assert found == not_passed.counts()
    assert not OPERATORS.keys() & found.keys()


def test_the_reference_kernels_pass_the_same_cases(outcomes):
    found = cases.outcomes("reference")
    differ = {name: found[name] for name in found if found[name].kind != outcomes[name].kind}
    assert differ == {}


def test_every_operator_of_the_table_has_a_case():
    used = {name for case in cases.load().values() for name in case.operators}
    assert OPERATORS.keys() <= used


def test_all_cases_of_norms_pass(outcomes):
    found = Counter()
    for name, case in cases.load().items():
        if not case.expanded and case.operators[0] in GROUPS["normalization"]:
            assert outcomes[name] == ("", ""), name
            found[case.operators[0]] += 1
    assert found == NORMS


def test_the_vectors_are_those_of_the_version_that_the_lists_are_for(outcomes):
    assert onnx.__version__ == VERSION
    assert len(outcomes) == ALL


def test_the_one_vector_with_four_digits_passes_at_onnx_own_tolerance():
    case = cases.load()["averagepool_2d_ceil_last_window_starts_on_pad"]
    (inputs, (want,)), = case.data
    (y,) = cases.run(case.graph, {"x": cases.nb.tensor(inputs[0])})
    assert np.all(want == np.round(want.astype(float), 4).astype(np.float32))
    np.testing.assert_allclose(y.data, want, rtol=1e-3)


def changed(case, change):
    """The case with its first output changed."""
    (inputs, (first, *others)), = case.data
    return case._replace(data=[(inputs, [change(first.copy()), *others])])


@pytest.mark.parametrize("change", [lambda y: y * np.float32(1 + 1e-4), lambda y: y[None],
                                    lambda y: y.astype(np.float64), lambda y: y * np.nan])
def test_a_wrong_value_shape_or_dtype_is_found(change):
    case = cases.load()["batchnorm_example"]
    assert cases.outcome(case) == ("", "")
    assert cases.outcome(changed(case, change)).kind == "differs"


def test_what_an_operator_raises_is_told(monkeypatch):
    case = cases.load()["relu"]

    def fails(x):
        raise error
    monkeypatch.setitem(OPERATORS, "Relu", fails)
    error = Unsupported("negative numbers")
    assert cases.outcome(case) == ("lacks", "negative numbers")
    error = ZeroDivisionError("none")
    assert cases.outcome(case) == ("differs", "ZeroDivisionError: none")
    monkeypatch.setitem(OPERATORS, "Relu", lambda x: x.zero_())
    assert "an input was modified" in cases.outcome(case).what
    monkeypatch.delitem(OPERATORS, "Relu")
    assert cases.outcome(case) == ("operator", "Relu")


def test_the_page_is_what_the_results_say(outcomes):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.write(text) == text
    assert all(f"<!-- table: {name} -->" in text for name in page.TABLES)
