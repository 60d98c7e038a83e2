"""Finished cells on disk: a line of JSON each, written when the cell is done.

A line counts for as long as the code that measured it is what it was; a line that a crash cut short
does not count. A line says when and where its cell ran, those of older files do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nbgrad.lab.results import replace
from nbgrad.lab.study import Cell, Record

__all__ = ["Cells", "fingerprint"]

# sources that change no record: pictures, texts and machinery; a study's own file counts apart
_NO_NUMBERS = ("viz/", "cli.py", "lab/studies/", "lab/results.py", "lab/cells.py", "lab/pool.py",
               "lab/running.py", "lab/commands.py", "lab/intervals.py", "lab/judging.py",
               "lab/ablation.py", "lab/__init__.py", "lab/study.py")


class Cells:
    """The finished cells of one study in ``folder``. Lines of other code are dropped.

    >>> import tempfile
    >>> cells = Cells(Path(tempfile.mkdtemp()), "one", "v1")
    >>> cells.add({"seed": 0}, {"loss": 0.5}, seconds=1.0)
    >>> cells.get({"seed": 0}), cells.get({"seed": 1})
    (({'loss': 0.5}, 1.0), None)
    """

    _FACTS = ("date", "machine")

    def __init__(self, folder: Path, name: str, code: str) -> None:
        self.path, self.name, self.code = Path(folder) / name / "cells.jsonl", name, code
        self._found: dict[str, tuple[Record, float]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        lines, whole = self._lines()
        # of a cell that was run again, the last line
        kept = list({line["key"]: line for line in lines if line["code"] == code}.values())
        for line in kept:
            self._found[line["key"]] = line["record"], line["seconds"]
            self._facts[line["key"]] = {name: line.get(name) for name in self._FACTS}
        if len(kept) < len(lines) or not whole:
            replace(self.path, "".join(_text(line) for line in kept))

    def get(self, cell: Cell) -> tuple[Record, float] | None:
        """A finished cell's record and the seconds that it took."""
        return self._found.get(self.key(cell))

    def measured(self, cell: Cell) -> tuple[str | None, dict[str, Any] | None]:
        """When and on which machine a finished cell ran, as ``add`` was told; None: not known."""
        facts = self._facts[self.key(cell)]
        return facts["date"], facts["machine"]

    def add(self, cell: Cell, record: Record, seconds: float, *, date: str | None = None,
            machine: dict[str, Any] | None = None) -> None:
        """Keep a record, in the place of an older one: it is on the disk when this returns. date:
        ISO 8601, of its end; machine: what of it a report names."""
        key, facts = self.key(cell), {"date": date, "machine": machine}
        self._found[key], self._facts[key] = (record, seconds), facts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"key": key, "code": self.code, "cell": cell, "record": record, "seconds": seconds,
                **facts}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(_text(line))
            f.flush()
            os.fsync(f.fileno())

    def key(self, cell: Cell) -> str:
        """Of the study's name, its code and the cell; where the data are does not matter."""
        own = {k: v for k, v in cell.items() if k != "root"}
        text = json.dumps([self.name, self.code, own], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _lines(self) -> tuple[list[dict[str, Any]], bool]:
        """Those that are whole, and whether all are."""
        if not self.path.exists():
            return [], True
        lines, whole = [], True
        for text in self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
            try:
                line = json.loads(text)
                _ = line["key"], line["code"], line["record"], line["seconds"]
                lines.append(line)
            except (ValueError, KeyError, TypeError):
                whole = False
        return lines, whole and self.path.read_bytes()[-1:] in (b"", b"\n")


def fingerprint(run: Callable[..., Any]) -> str:
    """Of all sources that a study's records depend on: nbgrad's, and the file of its ``run``."""
    file = getattr(sys.modules.get(run.__module__), "__file__", None)
    own = Path(file).read_bytes() if file else b""
    return hashlib.sha256(_package() + own).hexdigest()[:16]


@cache
def _package() -> bytes:
    found = hashlib.sha256(f"{version('nbgrad')} {version('numba')}".encode())
    kernels: Any = find_spec("nbgrad.kernels")
    for root in (Path(__file__).resolve().parent.parent, Path(kernels.origin).parent):
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(_NO_NUMBERS):
                found.update(name.encode() + path.read_bytes())
    return found.digest()


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n"
