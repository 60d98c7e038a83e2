"""Records grouped by arm, and what is said of a group: medians over seeds, curves, steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

from nbgrad.lab.intervals import LEVEL, Interval, bootstrap, paired_ratio
from nbgrad.lab.study import Cell, Record, Series

__all__ = ["GUESSING", "accuracies", "bars", "column", "curve", "edges", "goal", "grouped", "lost",
           "percent", "points", "reached", "speedup", "steps_to", "tuned"]

GUESSING = 0.1          # the accuracy of guessing: every data set has ten classes
# Test accuracies by data set: to which steps are counted, and with which a setting was usable. Both
# are within reach of an MLP in quick settings, which a common number is not.
_GOALS = {"steps": {"digits": 0.95, "mnist": 0.90, "fashion_mnist": 0.75, "cifar10": 0.30},
          "usable": {"digits": 0.90, "mnist": 0.85, "fashion_mnist": 0.70, "cifar10": 0.25}}


def grouped(records: Sequence[Record], cells: Sequence[Cell],
            *keys: str) -> dict[Any, list[Record]]:
    """Records by the values of these keys of their cells (of one key: by its value), in the order
    in which they come first; each group in the order of its seeds, so that groups are paired.

    >>> grouped([{"a": 1}, {"a": 2}], [{"lr": 3, "seed": 1}, {"lr": 3, "seed": 0}], "lr")
    {3: [{'a': 2}, {'a': 1}]}
    """
    groups: dict[Hashable, list[tuple[Any, int, Record]]] = {}
    for i, (record, cell) in enumerate(zip(records, cells, strict=True)):
        values = tuple(cell.get(key) for key in keys)
        key = values[0] if len(keys) == 1 else values
        groups.setdefault(key, []).append((cell.get("seed", 0), i, record))
    return {key: [r for *_, r in sorted(own, key=lambda x: x[:2])] for key, own in groups.items()}


def column(records: Iterable[Record], name: str, missing: float | None = None) -> list[float]:
    """One number of each record; what is None (it was not finite) counts as ``missing``."""
    found = [record[name] for record in records]
    if missing is None and any(v is None for v in found):
        raise ValueError(f"{name}: a run has none, and nothing says what that counts as")
    return [missing if v is None else v for v in found]        # type: ignore[misc]


def goal(cell: Cell, kind: Literal["steps", "usable"] = "steps") -> float:
    """The test accuracy that counts as arrived, or as learned, on the cell's data.

    >>> goal({"lr": 0.1}), goal({"data": "cifar10"}, "usable")
    (0.95, 0.25)
    """
    return _GOALS[kind][cell.get("data", "digits")]


def steps_to(record: Record, level: float) -> float:
    """The first evaluated step with a test accuracy of at least ``level``. A run that never gets
    there counts as one that would have with the next evaluation: a bound, in its favour.

    >>> steps_to({"steps": [10, 20], "test_accuracy": [0.5, 0.9]}, 0.9)
    20.0
    """
    for step, accuracy in zip(record["steps"], record["test_accuracy"]):
        if accuracy is not None and accuracy >= level:
            return float(step)
    return float(record.get("planned", record["steps"][-1]) + record["steps"][0])


def reached(record: Record, level: float) -> bool:
    return any(a is not None and a >= level for a in record["test_accuracy"])


def speedup(slow: Sequence[Record], fast: Sequence[Record], level: float,
            confidence: float = LEVEL) -> Interval:
    """How many times as many steps the first arm takes to a level: median of the seeds' ratios."""
    return paired_ratio([steps_to(r, level) for r in slow], [steps_to(r, level) for r in fast],
                        level=confidence)


def points(found: Interval) -> str:
    """An interval of a difference of shares, in percentage points: "+1.2 [0.3, 2.0] pt".

    >>> points(Interval(0.012, 0.003, 0.02))
    '+1.2 [+0.3, +2.0] pt'
    """
    return found.text("+.1f", 100) + " pt"


def tuned(groups: dict[Any, list[Record]],
          by: str | Callable[[Record], float | None] = "final_accuracy", *,
          worst: float = GUESSING, highest: bool = True) -> dict[Any, tuple[Any, list[Record]]]:
    """Of groups keyed (arm, …, setting), the best setting for each (arm, …) (arm alone, where the
    key has two parts), and the records there; of equal ones, the first. By the mean over seeds of a
    number that records have, or of what ``by`` makes of a record: of a run that diverged, or has
    none, ``worst``. So a setting at which one of five runs diverges loses a fifth of what its runs
    are above guessing, where a median would look past two of them.

    All arms choose on the same grid and the same seeds; what is chosen by is what is reported, so
    that every arm looks a little better than it is, and the one with more settings near its best
    the most.

    >>> runs = {("a", 1): [{"v": 2}], ("a", 2): [{"v": 5}], ("b", 1): [{"v": None}]}
    >>> tuned(runs, "v")
    {'a': (2, [{'v': 5}]), 'b': (1, [{'v': None}])}
    """
    found: dict[Any, tuple[Any, list[Record]]] = {}
    scores: dict[Any, float] = {}
    for (*arm, setting), records in groups.items():
        key = arm[0] if len(arm) == 1 else tuple(arm)
        score = _mean(records, by, worst) * (1 if highest else -1)
        if key not in found or score > scores[key]:
            found[key], scores[key] = (setting, records), score
    return found


def _mean(records: Sequence[Record], by: str | Callable[[Record], float | None],
          worst: float) -> float:
    values = [None if r.get("diverged") else r[by] if isinstance(by, str) else by(r)
              for r in records]
    return statistics.fmean(worst if v is None else v for v in values)


def edges(best: dict[Any, tuple[Any, list[Record]]], settings: Iterable[Any]) -> list[str]:
    """A note on arms whose best setting is an end of the grid: a wider one might be kinder to them.
    None where there are no such, or no grid.

    >>> edges({("a", 1): (0.1, []), ("b", 2): (1.0, [])}, [0.01, 0.1, 1.0])
    ['Best at an end of the grid of learning rates: b 2 (1).']
    """
    grid = sorted(set(settings))
    found = [f"{key if isinstance(key, str) else ' '.join(map(str, key))} ({lr:g})"
             for key, (lr, _) in best.items() if len(grid) > 1 and lr in (grid[0], grid[-1])]
    return [f"Best at an end of the grid of learning rates: {'; '.join(found)}."] if found else []


def accuracies(records: Iterable[Record]) -> list[float]:
    """Final test accuracies."""
    return column(records, "final_accuracy")


def bars(label: str, names: Sequence[float | str], found: Sequence[Interval]) -> Series:
    """A series with intervals."""
    return Series(label, list(names), [f.estimate for f in found], [f.low for f in found],
                  [f.high for f in found])


def percent(values: Interval | Sequence[float]) -> str:
    """Of accuracies, their median and its interval: "93.1 [92.0, 94.2] %".

    >>> percent([0.9, 0.8, 0.95])
    '90.0 [80.0, 95.0] %'
    """
    found = values if isinstance(values, Interval) else bootstrap(values)
    return found.text(".1f", 100) + " %"


def curve(label: str, records: Sequence[Record], name: str, x: str = "steps",
          of: Callable[[Any], Any] = lambda v: v) -> Series:
    """Median over seeds of a column of equal length, with its interval. A run that has ended
    (diverged) is not in it from there on, and the label says how many are to the end.

    >>> runs = [{"steps": [1, 2], "loss": [3.0, 2.0]}, {"steps": [1], "loss": [9.0]}]
    >>> curve("plain", runs, "loss").label
    'plain (1 of 2 runs to the end)'
    """
    longest = max((r[x] for r in records), key=len)
    found: list[Interval | None] = []
    for i in range(len(longest)):
        values = [of(r[name][i]) for r in records if i < len(r[name]) and r[name][i] is not None]
        found.append(bootstrap(values) if values else None)
    ends = [[None if f is None else getattr(f, end) for f in found]
            for end in ("estimate", "low", "high")]
    return Series(label + _survivors(records, name, x, len(longest)), longest, *ends)


def _survivors(records: Sequence[Record], name: str, x: str, longest: int) -> str:
    """Nothing where all runs have a value at the last point that was planned."""
    there = sum(len(r[name]) == longest and r[name][-1] is not None and not _short(r, x)
                for r in records if r[name])
    return "" if there == len(records) else (
        f" ({there or 'none'} of {len(records)} run{'s' * (len(records) > 1)} to the end)")


def _short(record: Record, x: str) -> bool:
    """Whether its steps end before the last one that was planned, where it says which that is."""
    return x.startswith("step") and record[x][-1] < record.get("planned", 0)


def lost(records: Iterable[Record]) -> str:
    """How many runs diverged: "2/5".

    >>> lost([{"diverged": True}, {"diverged": False}])
    '1/2'
    """
    flags = [bool(r["diverged"]) for r in records]
    return f"{sum(flags)}/{len(flags)}"
