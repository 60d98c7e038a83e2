"""What a study of the laboratory is: cells that run apart, and a rule that judges their records.

A study asks one question. Its file states the claim, its source and what was published, lays out
cells (one training run or one measurement each), runs one cell, and judges all records by a rule
that was fixed before there were any; what was changed after a first run, it says. Nothing here
draws or prints: ``nbgrad lab report`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nbgrad.train.config import DATA

__all__ = ["SCALES", "Figure", "Finding", "Series", "Study", "Table"]

SCALES = ("tiny", "quick", "full")      # of a test; the default, under 90 s; the paper's
Verdict = Literal["supported", "not supported", "depends"]
Cell = dict[str, Any]                   # JSON-able; what one run needs and no other run has
Record = dict[str, Any]                 # JSON-able; what one run found. NaN and Inf as None


@dataclass(frozen=True)
class Series:
    """One curve, or one colour of bars: y over x, with an interval where low and high are given.

    x may hold names; y may hold None where there is no value.
    """

    label: str
    x: Sequence[float | str]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Figure:
    """A picture as data. kind: "line", "bar" or "scatter"."""

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    kind: Literal["line", "bar", "scatter"] = "line"
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; an interval is a text like "0.93 [0.91, 0.95]"."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True)
class Finding:
    """What the records say. ``sentence``: the answer in a line, with its numbers and intervals.

    A verdict needs five seeds, or more (``judging.needed``); of fewer, ``running`` makes it
    "depends", and the sentence says so.
    """

    verdict: Verdict
    sentence: str
    table: Table
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()           # where and why the result differs from the published one


@dataclass(frozen=True)
class Study:
    """A question, and how it is answered by measuring.

    cells(scale) -> every cell, arms of one seed side by side; run(cell) -> its record, in a process
    with one thread, the same for the same cell; judge(records, cells) -> Finding, without running
    anything: records[i] belongs to cells[i], and diverged runs are records, too.

    Three keys of a cell mean the same in every study. "seed": the repetition; `--seeds N` repeats
    the cells of the first seed with 0 … N − 1. "data" and "root": what `--data` and `--root` set,
    where ``data`` names that data set; a cell without them is about the first of these.
    """

    name: str                           # as in `nbgrad lab run NAME`
    question: str
    claim: str
    source: str                         # of the claim: author, year, where in it
    published: str                      # what was measured there
    setup: str                          # ours, in a sentence or two
    rule: str                           # the verdict rule, in words
    cells: Callable[[str], list[Cell]]
    run: Callable[[Cell], Record]
    judge: Callable[[Sequence[Record], Sequence[Cell]], Finding]
    literature: str = ""                # what others found since
    changed: str = ""                   # of set-up or rule after a first run, and why
    comparisons: int = 1                # of which the rule takes any: see ``intervals.together``
    data: Sequence[str] = tuple(DATA)   # that it can run on, its own first; () where it needs none
