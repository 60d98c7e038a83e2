"""Random arguments to the norm functions: a result or a documented exception, never a crash.

``NBGRAD_FUZZ=100000 pytest tests/test_norm_fuzz.py`` draws more of them.
"""

import os

import pytest

from bench import fuzz, measure

COUNT = int(os.environ.get("NBGRAD_FUZZ", "16000"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:input.s size at dim:UserWarning")
def test_random_arguments_give_a_result_or_a_documented_exception():
    found = fuzz.fuzz(COUNT)
    assert sum(map(sum, found.values())) == COUNT
    assert list(found) == [f.__name__ for f in fuzz.FUNCTIONS]
    for name, (results, errors) in found.items():
        share = results / (results + errors)
        assert 0.1 < share < 0.95, f"{name}: {share:.2f} of the calls gave a result"


@pytest.mark.slow
def test_random_arguments_with_bounds_checks():
    assert len(fuzz.apart(2000, 1, True)) == len(fuzz.FUNCTIONS)


def test_the_page_says_what_the_results_say():
    rows = measure.read(fuzz.RESULTS)
    assert fuzz.PAGE.read_text(encoding="utf-8") == fuzz.page(rows)
    counts = {bounds: sum(int(row["results"]) + int(row["exceptions"]) for row in rows
                          if row["bounds"] == bounds) for bounds in ("no", "yes")}
    assert counts["no"] >= 100_000
    assert counts["yes"] >= 1_000
    assert {row["function"] for row in rows} == {f.__name__ for f in fuzz.FUNCTIONS}
