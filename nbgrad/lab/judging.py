"""Intervals of pairs in which a run may have no number, because it diverged; how many seeds a
verdict needs; a common note."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from nbgrad.lab.arms import reached, steps_to
from nbgrad.lab.intervals import (
    LEVEL,
    Interval,
    bootstrap,
    paired,
    paired_ratio,
    plainly,
    together,
)
from nbgrad.lab.study import Cell, Finding, Record, Verdict

__all__ = ["BY_MEAN", "NOBODY_ARRIVED", "SEEDS", "Pairs", "arrival", "corrected", "difference",
           "differs", "enough", "few", "many", "needed", "ratio", "shorter", "text"]

SEEDS = 5               # of fewer, an interval of 95 % cannot be had: see ``intervals``
_DIFFERS = "Differs from"
NOBODY_ARRIVED = (
    "After a first run on MNIST, where no run got to the test accuracy that counts on the digits, "
    "each data set was given its own, and where no run arrives the verdict is \"depends\". This "
    "changed nothing of what is found on the digits.")
BY_MEAN = (
    "Later, learning rates are chosen by the mean over seeds, in which a diverged run counts as "
    "one that guesses; the median, by which they had been chosen, looks past two such runs of "
    "five.")
Value = float | None


@dataclass(frozen=True)
class Pairs(Interval):
    """An interval over so many pairs, of so many seeds; the others have no value, because a run
    diverged. Of fewer pairs than ``least`` it is neither above nor below anything."""

    pairs: int
    seeds: int
    least: int = SEEDS

    def text(self, form: str = ".3g", scale: float = 1.0) -> str:
        """As an interval's, a lone value as itself; with the number of seeds that are left out."""
        found = (plainly(scale * self.estimate, form) if self.pairs == 1 else
                 super().text(form, scale))
        return found + _left_out(self.seeds - self.pairs, self.seeds)

    def above(self, limit: float) -> bool:
        return self.pairs >= self.least and super().above(limit)

    def below(self, limit: float) -> bool:
        return self.pairs >= self.least and super().below(limit)


def ratio(a: Sequence[Value], b: Sequence[Value], missing: float | None = None,
          comparisons: int = 1) -> Pairs | None:
    """Median of a/b over the seeds for which both are there; None where there is no such seed. With
    ``missing``, that is what a value counts as where only the other is there. comparisons: of so
    many, of which the rule takes any.

    >>> str(ratio([2.0, None, 8.0], [1.0, 1.0, 2.0]))
    '3 [2, 4] (1 of 3 seeds without a value)'
    """
    x, y = _both(a, b, missing)
    return _pairs(paired_ratio(x, y, level=together(comparisons)), x, a, comparisons) if x else None


def difference(a: Sequence[Value], b: Sequence[Value], comparisons: int = 1) -> Pairs | None:
    """As ``ratio``, of a − b."""
    x, y = _both(a, b, None)
    return _pairs(paired(x, y, level=together(comparisons)), x, a, comparisons) if x else None


def few(found: Pairs | None) -> bool:
    """Whether there are too few pairs to judge by."""
    return found is None or found.pairs < found.least


def needed(comparisons: int = 1) -> int:
    """How many seeds a verdict needs that takes any of so many comparisons. By chance, n paired
    differences are all above 0 in 1 of 2ⁿ, which no level of an interval can make rarer: with as
    many seeds as this, one of k comparisons has such in k/2ⁿ ≤ 6.25 %. (A rule that takes either
    sign has 2k.)

    >>> [needed(k) for k in (1, 2, 3, 4, 6, 8)]
    [5, 5, 6, 6, 7, 7]
    """
    return max(SEEDS, SEEDS - 1 + math.ceil(math.log2(comparisons)))


def enough(finding: Finding, cells: Sequence[Cell], comparisons: int = 1) -> Finding:
    """The finding of these cells, with a note on its comparisons; of fewer seeds than a verdict
    needs, it says so and has none, and differs from nothing."""
    seeds = len({cell["seed"] for cell in cells if "seed" in cell})
    least, notes = needed(comparisons), [*finding.notes, *many(comparisons)]
    finding = dataclasses.replace(finding, notes=notes)
    if not 0 < seeds < least:
        return finding
    sentence = f"{finding.sentence} Too few seeds for a verdict: {seeds}, where it needs {least}."
    return dataclasses.replace(finding, verdict="depends", sentence=sentence, notes=[
        note for note in notes if not note.startswith(_DIFFERS)])


def differs(verdict: Verdict, published: Verdict, what: str) -> list[str]:
    """A note where the verdict is not that of what was published.

    >>> differs("depends", "supported", "there it trains faster")
    ['Differs from the paper: there it trains faster; the verdict here is "depends".']
    """
    return [] if verdict == published else [
        f'{_DIFFERS} the paper: {what}; the verdict here is "{verdict}".']


def many(comparisons: int) -> list[str]:
    """A note where a rule takes any of several comparisons. What it says of few seeds: see
    ``intervals``.

    >>> many(1), many(6)[0][:72]
    ([], 'The rule takes any of 6 comparisons: their intervals are of 99.2 %, so t')
    """
    return [] if comparisons < 2 else [
        (f"The rule takes any of {comparisons} comparisons: their intervals are of "
         f"{100 * together(comparisons):.1f} %, so that {100 * LEVEL:g} % would hold for all at "
         "once (Bonferroni); of 5 to 10 seeds 87 to 94 % do.")]


def corrected(comparisons: int, before: int | None = None, now: int | None = None) -> str:
    """What a study says of its rule, which had taken any of so many comparisons at 95 % each.

    >>> corrected(2)[:64]
    'The last change after a first run: the intervals of the 2 compar'
    """
    seeds = "" if before is None else f", and seeds rose from {before} to {now}"
    return (f"The last change after a first run: the intervals of the {comparisons} comparisons of "
            f"which the rule takes any, {100 * LEVEL:g} % each before, became those of "
            f"{100 * together(comparisons):.1f} % (Bonferroni){seeds}.")


def shorter(cells: Sequence[Cell]) -> list[str]:
    """A note where training is shorter than Santurkar et al. 2018 train."""
    steps = max(cell["steps"] for cell in cells)
    return [] if steps >= 10000 else [
        f"Training is {steps} steps long; the paper's is 15,000, or 10,000 of the linear network."]


def text(found: Interval | Sequence[Value] | None, form: str = ".3g") -> str:
    """An interval, or that of the median of values (a lone one is shown as itself), with the number
    of seeds that have none; "diverged" where no seed has one.

    >>> text([1.0, 2.0, None]), text([None])
    ('1.5 [1, 2] (1 of 3 seeds without a value)', 'diverged')
    """
    if found is not None and not isinstance(found, Interval):
        there = [v for v in found if v is not None]
        found = _pairs(bootstrap(there), there, found, 1) if there else None
    return "diverged" if found is None else found.text(form)


def arrival(records: Sequence[Record], level: float) -> str:
    """Median and interval of the steps to a test accuracy; a run that never gets there is later
    than its last step, whatever that is.

    >>> run = {"planned": 300, "steps": [100, 200, 300], "test_accuracy": [0.1, 0.9, 0.9]}
    >>> arrival([run] * 5, 0.9), arrival([run] * 5, 0.95)
    ('200 [200, 200]', '> 300')
    """
    found = bootstrap([steps_to(r, level) if reached(r, level) else math.inf for r in records])
    never = f"> {records[0]['planned']:,}"
    if math.isinf(found.low):
        return never
    middle, low, high = (never if math.isinf(v) else plainly(v, ".0f")
                         for v in (found.estimate, found.low, found.high))
    return f"{middle} [{low}, {high}]"


def _pairs(found: Interval, there: Sequence[float], seeds: Sequence[Value],
           comparisons: int) -> Pairs:
    return Pairs(found.estimate, found.low, found.high, len(there), len(seeds),
                 needed(comparisons))


def _left_out(n: int, seeds: int) -> str:
    return f" ({n} of {seeds} seeds without a value)" if n else ""


def _both(a: Sequence[Value], b: Sequence[Value],
          missing: float | None) -> tuple[list[float], list[float]]:
    known = [(x, y) for x, y in zip(a, b, strict=True) if x is not None or y is not None]
    pairs = [(missing if x is None else x, missing if y is None else y) for x, y in known]
    there = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in there], [y for _, y in there]
