"""Intervals of pairs in which a run may have no number, because it diverged; a common note."""

from __future__ import annotations

from collections.abc import Sequence

from nbgrad.lab.intervals import Interval, bootstrap, paired, paired_ratio
from nbgrad.lab.study import Cell

__all__ = ["difference", "ratio", "shorter", "text"]

Value = float | None


def ratio(a: Sequence[Value], b: Sequence[Value],
          missing: float | None = None) -> Interval | None:
    """Median of a/b over the seeds for which both are there; None for fewer than two. With
    ``missing``, that is what a value counts as where only the other is there.

    >>> ratio([2.0, None, 8.0], [1.0, 1.0, 2.0])
    Interval(estimate=3.0, low=2.0, high=4.0)
    """
    x, y = _both(a, b, missing)
    return paired_ratio(x, y) if len(x) > 1 else None


def difference(a: Sequence[Value], b: Sequence[Value]) -> Interval | None:
    """As ``ratio``, of a − b."""
    x, y = _both(a, b, None)
    return paired(x, y) if len(x) > 1 else None


def shorter(cells: Sequence[Cell]) -> list[str]:
    """A note where training is shorter than Santurkar et al. 2018 train."""
    steps = max(cell["steps"] for cell in cells)
    return [] if steps >= 10000 else [
        f"Training is {steps} steps long; the paper's is 15,000, or 10,000 of the linear network."]


def text(found: Interval | Sequence[Value] | None, form: str = ".3g") -> str:
    """An interval, or that of the median of values, or "diverged" where there is none."""
    if found is not None and not isinstance(found, Interval):
        there = [v for v in found if v is not None]
        found = bootstrap(there) if len(there) > 1 else None
    return "diverged" if found is None else found.text(form)


def _both(a: Sequence[Value], b: Sequence[Value],
          missing: float | None) -> tuple[list[float], list[float]]:
    known = [(x, y) for x, y in zip(a, b, strict=True) if x is not None or y is not None]
    pairs = [(missing if x is None else x, missing if y is None else y) for x, y in known]
    there = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in there], [y for _, y in there]
