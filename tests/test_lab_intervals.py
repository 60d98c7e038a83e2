"""Bootstrap intervals against cases that are known in closed form."""

import itertools
import math

import numpy as np
import pytest

from nbgrad.lab import intervals
from nbgrad.lab.intervals import Interval, bootstrap, paired, paired_ratio, share, together
from nbgrad.lab.judging import needed


def test_the_median_of_five_has_their_range_as_its_interval():
    """P(median of a resample = smallest) = P(Binomial(5, 1/5) ≥ 3) = 5.8 %, above 2.5 %."""
    assert bootstrap([3.0, 1.0, 5.0, 2.0, 4.0]) == Interval(3.0, 1.0, 5.0)


def test_seven_values_leave_the_extremes_out():
    """P(median = smallest) = P(Binomial(7, 1/7) ≥ 4) = 0.95 %, of the two smallest 10 %."""
    assert bootstrap(range(1, 8)) == Interval(4.0, 2.0, 6.0)


def test_small_samples_are_enumerated():
    x = np.array([0.0, 1.0, 4.0, 10.0])
    means = sorted(np.mean(c) for c in itertools.product(x, repeat=4))
    found = bootstrap(x, np.mean, level=0.8)
    assert found == Interval(3.75, means[math.floor(0.1 * 255)], means[math.ceil(0.9 * 255)])
    assert bootstrap(x, np.mean, seed=1) == bootstrap(x, np.mean, seed=2)


def test_of_a_mean_it_is_the_normal_interval():
    """x̄ ± 1.96 s/√n for many values: the bootstrap's s is biased, n = 400 hides it; 10,000 draws
    place a 2.5 % quantile to about ± 3 % of the half width."""
    x = np.random.default_rng(5).standard_normal(400)
    found, half = bootstrap(x, np.mean), 1.96 * x.std() / 20
    assert found.estimate == pytest.approx(x.mean(), abs=1e-12)
    assert found.low == pytest.approx(x.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.08 * half)


def test_it_covers_what_it_says():
    """Of 400 samples of 20 normals, the 95 % interval of the mean covers 0 in 90 to 96 %: the
    percentile bootstrap is a little narrow at n = 20 (92.5 % expected, standard error 1.3 %)."""
    rng = np.random.default_rng(11)
    hits = [not (i.above(0) or i.below(0)) for i in
            (bootstrap(rng.standard_normal(20), np.mean, draws=800) for _ in range(400))]
    assert 0.90 <= np.mean(hits) <= 0.96


def test_the_same_values_give_the_same_interval():
    x = np.random.default_rng(0).standard_normal(30)
    assert bootstrap(x) == bootstrap(x)
    assert bootstrap(x, seed=1) != bootstrap(x, np.mean, seed=1)


def test_pairs_see_what_means_hide():
    """Seeds that differ by 100 and arms by 1: the differences are sure of it."""
    b = [100.0, 200.0, 300.0, 400.0, 500.0]
    a = [v + d for v, d in zip(b, (1.0, 1.5, 1.0, 0.5, 1.0))]
    assert paired(a, b) == Interval(1.0, 0.5, 1.5)
    assert paired(b, a) == Interval(-1.0, -1.5, -0.5)
    assert paired_ratio([2.0, 8.0], [1.0, 2.0]) == Interval(3.0, 2.0, 4.0)


def test_infinity_is_a_value_and_nan_is_not():
    """A run that never gets there is later than all others."""
    assert bootstrap([1.0, 2.0, math.inf]) == Interval(2.0, 1.0, math.inf)
    with pytest.raises(ValueError, match="a value is NaN"):
        bootstrap([1.0, math.nan])


def test_counting_and_drawing_agree():
    """Nine values, drawn, against all 9⁹ resamples, counted up to their order (24,310): the draws
    place a 2.5 % quantile of the mean to about 0.03 of its standard deviations."""
    x = np.random.default_rng(3).standard_normal(9)
    drawn = bootstrap(x, np.mean)
    intervals._resamples.cache_clear()
    before, intervals._COUNTED = intervals._COUNTED, 9
    try:
        counted = bootstrap(x, np.mean)
    finally:
        intervals._COUNTED = before
        intervals._resamples.cache_clear()
    assert drawn != counted
    assert (drawn.low, drawn.high) == pytest.approx((counted.low, counted.high),
                                                    abs=0.15 * x.std() / 3)


def test_one_value_is_its_own_interval():
    assert bootstrap([7.0]) == Interval(7.0, 7.0, 7.0)


@pytest.mark.parametrize("k", range(1, 9))
def test_of_several_comparisons_one_is_above_by_chance_in_6_percent_at_most(k):
    """With the seeds that a verdict needs, the interval is the range of the differences, so that
    one comparison is above 0 by chance in 2⁻ⁿ: 3.1 % alone, 6.2 of two, 4.7 of six. At 95 % and
    five seeds for each it would be 17 % of six."""
    n = needed(k)
    found = bootstrap(range(1, n + 1), level=together(k))
    assert (found.low, found.high) == (1, n)
    assert 1 - (1 - 2.0 ** -n) ** k <= 0.0625


@pytest.mark.parametrize(("n", "k", "least"), [(5, 2, 0.875), (6, 4, 0.875), (7, 5, 0.92),
                                               (7, 6, 0.905), (8, 4, 0.919), (10, 2, 0.937),
                                               (10, 4, 0.897)])
def test_of_few_seeds_all_intervals_hold_in_87_to_94_percent(n, k, least):
    """1 − k P(one fails), as ``intervals`` and every report say; 1,000 samples of normals: the
    standard error is k √(0.03 / 1000)."""
    rng = np.random.default_rng(n * k)
    fails = [i.above(0) or i.below(0) for i in
             (bootstrap(rng.standard_normal(n), level=together(k), draws=2000)
              for _ in range(1000))]
    assert 1 - k * np.mean(fails) == pytest.approx(least, abs=2.5 * k * (0.03 / 1000) ** 0.5)


def test_shares():
    """Wilson 1927: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n); 0 of 10: [0, 0.2775]."""
    zero, half = share([False] * 10), share([True, False] * 50)
    assert (zero.estimate, zero.low) == (0.0, 0.0)
    assert zero.high == pytest.approx(0.2775, abs=5e-5)
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert half.text(".0f", 100) == "50 [40, 60]"


@pytest.mark.parametrize(("call", "says"), [
    (lambda: bootstrap([]), "expected a row of values"),
    (lambda: bootstrap([[1.0]]), "expected a row of values"),
    (lambda: bootstrap([1.0], level=1.0), "between 0 and 1"),
    (lambda: paired([1.0], [1.0, 2.0]), "as many values in both, got 1 and 2"),
    (lambda: paired_ratio([0.0], [1.0]), "above 0"),
    (lambda: share([]), "one or more"),
])
def test_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
