"""What judges share: records by arm and seed, intervals of their pairs, curves with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.lab.intervals import Interval, bootstrap, paired, paired_ratio
from nbgrad.lab.study import Cell, Record, Series

__all__ = ["curve", "difference", "of_arm", "ratio", "text", "values"]

Value = float | None


def of_arm(records: Sequence[Record], cells: Sequence[Cell], **arm: Any) -> list[Record]:
    """The records of the cells that have these values, by seed."""
    found = [(cell["seed"], i) for i, cell in enumerate(cells)
             if all(cell.get(k) == v for k, v in arm.items())]
    return [records[i] for _, i in sorted(found)]


def values(records: Sequence[Record], cells: Sequence[Cell], name: str, **arm: Any) -> list[Value]:
    """One number of each record of an arm, by seed."""
    return [record[name] for record in of_arm(records, cells, **arm)]


def _both(a: Sequence[Value], b: Sequence[Value]) -> tuple[list[float], list[float]]:
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def ratio(a: Sequence[Value], b: Sequence[Value]) -> Interval | None:
    """Median of a/b over the seeds for which both are there; None for fewer than two.

    >>> ratio([2.0, None, 8.0], [1.0, 1.0, 2.0])
    Interval(estimate=3.0, low=2.0, high=4.0)
    """
    x, y = _both(a, b)
    return paired_ratio(x, y) if len(x) > 1 else None


def difference(a: Sequence[Value], b: Sequence[Value]) -> Interval | None:
    """As ``ratio``, of a − b."""
    x, y = _both(a, b)
    return paired(x, y) if len(x) > 1 else None


def text(found: Interval | Sequence[Value] | None, form: str = ".3g") -> str:
    """An interval, or that of the median of values, or "diverged" where there is none."""
    if found is not None and not isinstance(found, Interval):
        there = [v for v in found if v is not None]
        found = bootstrap(there) if len(there) > 1 else None
    return "diverged" if found is None else found.text(form)


def curve(label: str, x: Sequence[float | str], rows: Sequence[Sequence[Value]]) -> Series:
    """Medians and intervals at each x over the seeds, one row each; None where none has a value."""
    columns = [[row[i] for row in rows if i < len(row)] for i in range(len(x))]
    there = [[v for v in column if v is not None and np.isfinite(v)] for column in columns]
    found = [bootstrap(column) if column else None for column in there]
    return Series(label, list(x), [None if f is None else f.estimate for f in found],
                  [None if f is None else f.low for f in found],
                  [None if f is None else f.high for f in found])
