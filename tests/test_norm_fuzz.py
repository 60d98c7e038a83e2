"""Random arguments to the norm functions: a result or a documented exception, never a crash.

``NBGRAD_FUZZ=100000 pytest tests/test_norm_fuzz.py`` draws more of them.
"""

import os
from importlib import import_module

import numpy as np
import pytest

from bench import draws, fuzz, measure
from nbgrad import nn

COUNT = int(os.environ.get("NBGRAD_FUZZ", "16000"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:input.s size at dim:UserWarning")
def test_random_arguments_give_a_result_or_a_documented_exception():
    found = fuzz.fuzz(COUNT)
    assert sum(map(sum, found.values())) == COUNT
    assert list(found) == [f.__name__ for f in fuzz.FUNCTIONS]
    for name, (results, errors) in found.items():
        share = results / (results + errors)
        assert 0.4 < share < 0.97, f"{name}: {share:.2f} of the calls gave a result"


def test_every_public_norm_is_drawn():
    names = {f.__name__ for f in fuzz.FUNCTIONS}
    assert set(import_module("nbgrad.ops.norm").__all__) <= names
    layers = {name for name, kind in vars(nn).items()
              if isinstance(kind, type) and issubclass(kind, nn.Normalization)}
    assert layers - names == {"BatchNorm", "Normalization"}, "bases, which others stand for"


def test_most_draws_fit_and_none_is_to_take_all_the_memory():
    rng = np.random.default_rng(0)
    of = [draws.Draw(rng) for _ in range(4000)]
    assert {d.dtype.kind for d in of if d.sane} == {"f", "V"}
    assert 0.6 < sum(d.sane for d in of) / len(of) < 0.7
    assert all(d.number(4) == 4 for d in of if d.sane)
    assert max(n for n in (d.size(4) for d in of) if isinstance(n, int)) == 4
    assert any(d.number(4) == 10**9 for d in of)


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
