"""Studies run cell by cell, in parallel processes; what is finished is kept, and not run again."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nbgrad import backend, data
from nbgrad.lab import pool
from nbgrad.lab.cells import Cells, fingerprint
from nbgrad.lab.judging import enough
from nbgrad.lab.results import FACTS, Outcome, clean, load, now, partition, save, texts
from nbgrad.lab.study import SCALES, Cell, Record, Study
from nbgrad.train.config import DATA
from nbgrad.train.loop import Signals
from nbgrad.train.progress import Silent

__all__ = ["Plan", "cells_of", "extent", "run"]


@dataclass(frozen=True)
class Plan:
    """How studies are run: their size, data and repetitions, and where the results go.

    data and root: as ``nbgrad train`` has them; studies that do not offer these data use their own.
    sizes: how many training and test images these data are; ``run`` finds out.
    seeds: how many repetitions, if not the study's own number.  processes: at a time (one per
    core); 0 runs everything in this process.  again: run finished cells, too.
    """

    scale: str = "quick"
    data: str | None = None
    root: str | None = None
    seeds: int | None = None
    processes: int | None = None
    folder: Path = Path("runs/lab")
    again: bool = False
    sizes: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale: expected one of {', '.join(SCALES)}, got {self.scale!r}")
        for name, low in (("seeds", 1), ("processes", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")

    def data_of(self, study: Study) -> str:
        """The data set that it runs on; "" where it needs none."""
        if self.data is not None and self.data in study.data:
            return self.data
        return study.data[0] if study.data else ""

    def chosen(self, study: Study) -> bool:
        """Whether it runs on other data than its own."""
        return self.data_of(study) in study.data[1:]


@dataclass
class _Run:
    """A study under way: its cells, and what came of them. ``old``: keys of cells whose record is
    to be measured again; until it is, the old one stays on the disk."""

    study: Study
    cells: list[Cell]
    kept: Cells
    plan: Plan
    old: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if self._get(cell) is None]

    def _get(self, cell: Cell) -> tuple[Record, float] | None:
        return None if self.kept.key(cell) in self.old else self.kept.get(cell)

    def answered(self, cell: Cell, answer: pool.Answer) -> None:
        if "record" in answer:
            self.kept.add(cell, answer["record"], answer["seconds"], date=now(),
                          machine={name: backend.info().get(name) for name in FACTS})
            self.old.discard(self.kept.key(cell))
        else:
            self.errors.append(f"{describe(cell)}: {answer['error']}\n{answer['trace']}".strip())

    def _texts(self) -> dict[str, str]:
        """The study's, with what differs here from its set-up: the data, the size of the run."""
        found, own = texts(self.study), []
        if self.plan.chosen(self.study):
            train, test = self.plan.sizes or (0, 0)
            own.append(f"on {DATA[self.plan.data_of(self.study)]} ({train:,} training and {test:,} "
                       "test images) instead of the digits")
        if self.plan.scale != "quick" or self.plan.seeds is not None:
            own.append(f"with {extent(self.cells)}")
        if own:
            found["setup"] = f"Here {', '.join(own)}; otherwise: {found['setup']}"
        return found

    def outcome(self, stopped: bool) -> Outcome:
        measured = [cell for cell in self.cells if self._get(cell) is not None]
        there = [f for cell in measured if (f := self._get(cell)) is not None]
        state, finding = "interrupted" if stopped else "failed", None
        if len(there) == len(self.cells):
            try:
                finding = enough(self.study.judge([record for record, _ in there], self.cells),
                                 self.cells, self.study.comparisons)
                state = "complete"
            except Exception as e:          # of a rule: the other studies go on
                self.errors.append(f"judge: {type(e).__name__}: {e}\n{traceback.format_exc()}")
                state = "failed"
        seeds = {cell["seed"] for cell in self.cells if "seed" in cell}
        machine = {k: v for k, v in backend.info().items() if k != "kernel cache"}
        return Outcome(
            self._texts(), self.plan.scale, self.plan.data_of(self.study),
            max(len(seeds), 1), len(self.cells), len(there), state,
            sum(seconds for _, seconds in there), now(), _command(self.study, self.plan), machine,
            finding, self.errors, partition(map(self.kept.measured, measured)))


def run(studies: Sequence[Study], plan: Plan | None = None, progress: Silent | None = None,
        done: Callable[[Outcome], None] | None = None) -> list[Outcome]:
    """Run studies; returns their outcomes, which are also in ``plan.folder``, see ``results``.

    ``progress`` counts studies. ``done`` is called with each outcome when it is there. Ctrl-C and
    SIGTERM end it soon, with outcomes "interrupted"; the next call runs the cells that are missing.
    An interrupted study's older finding, and older records that it has not replaced, stay.
    A cell that raises or kills its process is named in its study's ``errors``, and the rest goes
    on.
    """
    plan, bar = _sized(plan or Plan(), studies), progress or Silent()
    runs = [_begun(study, plan) for study in studies]
    processes = pool.cores() if plan.processes is None else plan.processes
    with Signals() as signals:
        session = _Session(runs, bar, done, lambda: signals.caught != 0)
        _compile(runs, bar, session.stopped, processes)
        with _one_thread() if processes == 0 else nullcontext():
            session.go(processes)
    return session.outcomes


class _Session:
    """All missing cells of all studies in one queue; a study is judged when its last one is done,
    so that no process waits for another between two studies."""

    def __init__(self, runs: Sequence[_Run], bar: Silent,
                 done: Callable[[Outcome], None] | None, stopped: Callable[[], bool]) -> None:
        self.runs, self.bar, self.done, self.stopped = runs, bar, done, stopped
        self.requests = [(one, cell) for one in runs for cell in one.missing]
        self.left = {one.study.name: len(one.missing) for one in runs}
        self.outcomes: list[Outcome] = []

    def go(self, processes: int) -> None:
        for one in self.runs:
            if not self.left[one.study.name]:
                self._finish(one)
        if self.requests:
            cells = [(one.study.run, cell) for one, cell in self.requests]
            pool.run_all(cells, processes, self._answered, self.stopped)
        for one in self.runs:
            if self.left[one.study.name]:
                self._finish(one)

    def _answered(self, i: int, answer: pool.Answer) -> None:
        one, cell = self.requests[i]
        one.answered(cell, answer)
        self.left[one.study.name] -= 1
        done = len(one.cells) - self.left[one.study.name]
        self.bar.update(sum(1 - self.left[r.study.name] / len(r.cells) for r in self.runs),
                        f"{one.study.name} {done}/{len(one.cells)}")
        if not self.left[one.study.name]:
            self._finish(one)

    def _finish(self, one: _Run) -> None:
        outcome = one.outcome(self.stopped())
        if outcome.state != "interrupted" or not _has_finding(one.plan.folder, one.study.name):
            save(one.plan.folder, outcome)
        self.outcomes.append(outcome)
        if self.done is not None:
            self.done(outcome)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in the processes: small runs are slower with several."""
    before = backend.get_num_threads()
    backend.set_num_threads(1)
    try:
        yield
    finally:
        backend.set_num_threads(before)


def cells_of(study: Study, plan: Plan) -> list[Cell]:
    """The study's cells with the plan's data and number of seeds."""
    cells: list[Cell] = clean(study.cells(plan.scale))
    if not cells:
        raise ValueError(f"{study.name}: no cells at scale {plan.scale}")
    if plan.seeds is not None:
        one = next((cell["seed"] for cell in cells if "seed" in cell), None)
        first = [cell for cell in cells if cell.get("seed", one) == one]
        cells = [{**cell, "seed": seed} if "seed" in cell else cell
                 for seed in range(plan.seeds) for cell in first if seed == 0 or "seed" in cell]
    if plan.chosen(study):
        own = {"data": plan.data, "root": plan.root, "sizes": clean(plan.sizes)}
        cells = [{**cell, **own} for cell in cells]
    return cells


def extent(cells: Sequence[Cell]) -> str:
    """How much is run.

    >>> extent([{"seed": s, "lr": r, "steps": 500 * r} for s in range(5) for r in (1, 3)])
    '5 seeds, 500 to 1,500 steps, 2 learning rates, 10 runs'
    """
    parts = []
    for key, name in (("seed", "seed"), ("steps", "step"), ("lr", "learning rate")):
        values = sorted({cell[key] for cell in cells if key in cell})
        if key == "steps" and values:
            low, high = f"{values[0]:,}", f"{values[-1]:,}"
            parts.append(f"{low if low == high else f'{low} to {high}'} steps")
        elif values:
            parts.append(f"{len(values)} {name}{'s' * (len(values) > 1)}")
    return ", ".join([*parts, f"{len(cells)} run{'s' * (len(cells) > 1)}"])


def describe(cell: Cell) -> str:
    """A cell in a line: batch_size=60, lr=1.0, seed=0."""
    return ", ".join(f"{k}={v}" for k, v in cell.items() if v is not None)


def _sized(plan: Plan, studies: Sequence[Study]) -> Plan:
    """With the number of images: a folder may hold a part of the data, whose records are others."""
    if not any(plan.chosen(study) for study in studies):
        return plan
    train, test = data.load(str(plan.data), plan.root)
    return replace(plan, sizes=(len(train), len(test)))


def _begun(study: Study, plan: Plan) -> _Run:
    kept, cells = Cells(plan.folder, study.name, fingerprint(study.run)), cells_of(study, plan)
    return _Run(study, cells, kept, plan, set(map(kept.key, cells)) if plan.again else set())


def _has_finding(folder: Path, name: str) -> bool:
    """Whether there is a finding on the disk: what was interrupted leaves it there."""
    try:
        return load(folder, name).finding is not None
    except (FileNotFoundError, ValueError):
        return False


def _compile(runs: Iterable[_Run], bar: Silent, stopped: Callable[[], bool],
             processes: int) -> None:
    """Compile what cells need before they run: each study's smallest cells, and a mark beside the
    compiled kernels that this has been done.

    Studies from the front and from the middle of the list, whose networks differ most, take turns,
    so that processes compile different kernels; one that two need, the first compiles.
    What goes wrong here goes wrong again, and is then said, when the cell itself runs.
    """
    cache = Path(backend.info()["kernel cache"])
    if processes < 2 or not cache.is_dir():
        return
    cells = [(mark, one.study.run, cell) for one in runs
             if one.missing and not (mark := _mark(cache, one)).exists()
             for cell in cells_of(one.study, Plan("tiny", one.plan.data, one.plan.root, seeds=1))]
    half = (len(cells) + 1) // 2
    mixed = [c for pair in zip_longest(cells[:half], cells[half:]) for c in pair if c is not None]
    left = Counter(mark for mark, *_ in cells)

    def answered(i: int, answer: pool.Answer) -> None:
        mark = mixed[i][0]
        left[mark] -= 1
        if not left[mark]:
            mark.touch()
        bar.update(0, f"compiling kernels {len(cells) - left.total()}/{len(cells)}")
    if mixed:
        bar.say("compiling kernels for this CPU that are not there yet")
        pool.run_all([(run, cell) for _, run, cell in mixed], processes, answered, stopped)


def _mark(cache: Path, one: _Run) -> Path:
    return cache / f"lab-{one.study.name}-{one.plan.data_of(one.study)}-{one.kept.code}"


def _command(study: Study, plan: Plan) -> str:
    words: list[Any] = ["nbgrad lab run", study.name]
    words += ["--full"] if plan.scale == "full" else []
    words += ["--data", plan.data, "--root FOLDER"] if plan.chosen(study) else []
    words += ["--seeds", plan.seeds] if plan.seeds is not None else []
    return " ".join(map(str, words))
