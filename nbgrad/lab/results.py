"""What studies found, on disk, as text that a person can read.

    DIR/NAME/cells.jsonl     a line per finished cell: see ``cells``
    DIR/NAME/finding.json    the study's texts, its finding, how and where it was measured
    DIR/verdicts.csv, .md    one row per study that has a finding
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbgrad.lab.study import Figure, Finding, Series, Study, Table

__all__ = ["Outcome", "Part", "clean", "load", "load_all", "markdown", "partition", "save",
           "text_table", "write_verdicts"]

FORMAT = "nbgrad-lab-1"
TEXTS = ("name", "question", "claim", "source", "published", "setup", "rule", "literature",
         "changed")
STATES = ("complete", "interrupted", "failed")
# what of ``nbgrad.backend.info()`` a cell's line keeps: where its numbers and seconds come from
FACTS = ("nbgrad", "python", "numpy", "numba", "cpu", "cores")


@dataclass(frozen=True)
class Part:
    """Cells that ran on one day, on one machine, with the same versions. Of cells in files of older
    versions, which do not say, date is "" and machine empty."""

    cells: int
    date: str                           # 2026-11-29
    machine: dict[str, Any]             # by FACTS

    def __str__(self) -> str:
        if not self.date:
            return "at a time and place that their file does not say"
        return f"on {self.date} on {', '.join(self.where)}"

    @property
    def where(self) -> list[str]:
        """The machine, its cores and the versions."""
        facts, cores = self.machine, self.machine.get("cores")
        versions = [f"{name} {facts[name]}" for name in ("nbgrad", "python", "numpy", "numba")
                    if facts.get(name)]
        return [str(facts.get("cpu", "")) or "unknown CPU",
                *([f"{cores} core{'s' * (cores != 1)}"] if cores else []), *versions]


@dataclass(frozen=True)
class Outcome:
    """One study's run. ``finding`` is None where it is not complete.

    study: its texts, by the names of Study's fields.  state: "complete", "interrupted" (cells are
    missing: the same command goes on) or "failed" (cells raised: ``errors``).  seconds: the CPU's,
    of all cells together, however many ran at a time.  date and machine
    (``nbgrad.backend.info()``, folders left out): of the run that ended it.  parts: when and where
    its cells ran; more than one where a run was resumed on another day or machine.
    """

    study: dict[str, str]
    scale: str
    data: str
    seeds: int
    cells: int                          # of these, `done` have a record
    done: int
    state: str
    seconds: float
    date: str                           # ISO 8601, with the zone
    command: str                        # that runs it again
    machine: dict[str, Any]
    finding: Finding | None = None
    errors: Sequence[str] = field(default=())
    parts: Sequence[Part] = field(default=())

    @property
    def name(self) -> str:
        return self.study["name"]

    @property
    def ran(self) -> Sequence[Part]:
        """Its parts; of results that have none, as older versions wrote them, the run's end."""
        return self.parts or [Part(self.done, self.date[:10], self.machine)]

    @property
    def verdict(self) -> str:
        """The finding's, or the state of a run that has none."""
        return self.state if self.finding is None else self.finding.verdict


def texts(study: Study) -> dict[str, str]:
    return {name: getattr(study, name) for name in TEXTS}


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def save(folder: Path, outcome: Outcome) -> Path:
    """Write DIR/NAME/finding.json; a reader sees the old file or the new one."""
    path = folder / outcome.name / "finding.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"format": FORMAT, **clean(dataclasses.asdict(outcome))}
    return replace(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def load(folder: Path, name: str) -> Outcome:
    """The inverse of ``save``. Raises FileNotFoundError, and ValueError for another file."""
    path = Path(folder) / name / "finding.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.pop("format") != FORMAT:
            raise KeyError("format")
        if value["finding"] is not None:
            value["finding"] = _finding(value["finding"])
        value["parts"] = [Part(**part) for part in value.get("parts", ())]
        return Outcome(**value)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: no finding of this version of nbgrad ({e})") from e


def partition(measured: Iterable[tuple[str | None, dict[str, Any] | None]]) -> list[Part]:
    """Cells' dates and machines, summed up, oldest first.

    >>> partition([("2026-11-29T09:00", {"cpu": "a"}), (None, None), ("2026-11-29T10:00",
    ...           {"cpu": "a"})])
    [Part(cells=1, date='', machine={}), Part(cells=2, date='2026-11-29', machine={'cpu': 'a'})]
    """
    counts = Counter((date[:10] if date else "", json.dumps(machine or {}))
                     for date, machine in measured)
    return [Part(n, date, json.loads(machine)) for (date, machine), n in sorted(counts.items())]


def load_all(folder: Path, names: Iterable[str] | None = None) -> list[Outcome]:
    """Every outcome below ``folder``, in the order of ``names`` (of the folders' names where it is
    None); names without one are left out."""
    there = {p.parent.name for p in Path(folder).glob("*/finding.json")}
    return [load(folder, name) for name in (sorted(there) if names is None else names)
            if name in there]


def write_verdicts(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """verdicts.csv and verdicts.md of these outcomes."""
    rows = [[o.name, o.study["question"], o.study["claim"], o.verdict,
             "" if o.finding is None else o.finding.sentence, o.study["source"], o.scale, o.data,
             str(o.seeds), f"{o.seconds:.1f}", o.date] for o in outcomes]
    columns = ["study", "question", "claim", "verdict", "finding", "source", "scale", "data",
               "seeds", "seconds", "date"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "verdicts.csv", text.getvalue())
    short = Table(["study", "claim", "verdict", "finding"],
                  [[row[0], row[2], f"**{row[3]}**", row[4]] for row in rows])
    replace(folder / "verdicts.md", markdown(short))


def markdown(table: Table) -> str:
    """The table in Markdown."""
    lines = [[str(c) for c in table.columns], ["---"] * len(table.columns),
             *([cell_text(v) for v in row] for row in table.rows)]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |\n"
                   for line in lines)


def text_table(table: Table) -> str:
    """The table for a terminal: aligned, numbers to the right."""
    rows = [[cell_text(v) for v in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *rows)]
    right = [all(isinstance(row[i], int | float | None) for row in table.rows)
             for i in range(len(widths))]
    lines = [list(table.columns), ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(c.rjust(w) if r else c.ljust(w)
                               for c, w, r in zip(line, widths, right)).rstrip() for line in lines)


def cell_text(value: Any) -> str:
    """A value as tables show it: at most four significant digits, "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def clean(value: Any) -> Any:
    """As JSON has it: tuples and arrays as lists, NumPy's numbers as Python's, NaN and Inf as None.

    >>> clean({"a": (1.5, float("nan"))})
    {'a': [1.5, None]}
    """
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if hasattr(value, "tolist"):            # NumPy's arrays and scalars
        return clean(value.tolist())
    if isinstance(value, list | tuple | range):
        return [clean(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"expected what JSON can hold, got {type(value).__name__}")


def replace(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + f".{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _finding(value: dict[str, Any]) -> Finding:
    figures = [Figure(**{**f, "series": [Series(**s) for s in f["series"]]})
               for f in value["figures"]]
    return Finding(**{**value, "table": Table(**value["table"]), "figures": figures})
