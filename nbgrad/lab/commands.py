"""What ``nbgrad lab list`` and ``nbgrad lab run`` do; ``cli`` prints."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from nbgrad.lab import results
from nbgrad.lab.results import Outcome
from nbgrad.lab.running import Plan, run
from nbgrad.lab.studies import STUDIES, find, names
from nbgrad.lab.study import Study, Table
from nbgrad.train.config import DATA
from nbgrad.train.progress import progress

__all__ = ["FOLDER", "listed", "run_studies", "said"]

FOLDER = Path("runs/lab")               # as a default, for results
_WIDTH = 100


def listed() -> str:
    """All studies by number: name and question."""
    return results.text_table(Table(["", "study", "question"], [
        [number, name, find(name).question] for number, name in zip(sorted(STUDIES), names())]))


def run_studies(chosen: Sequence[str], plan: Plan, quiet: bool = False) -> list[Outcome]:
    """Run studies by name or by number (none: all of them); after each, write the verdicts of all
    that the folder holds.

    Studies that do not run on the plan's data say so, and run as they do without. Raises ValueError
    for names that there are not, data that none of the studies runs on and a folder that cannot be
    written, and what reading the data raises, before anything runs.
    """
    numbers = dict(zip(map(str, sorted(STUDIES)), names()))
    studies = [find(name) for name in dict.fromkeys(
        numbers.get(name, name) for name in chosen or names())]
    others = [study for study in studies if plan.data is not None and plan.data not in study.data]
    if len(others) == len(studies):
        raise ValueError(f"--data: {plan.data} is not for {studies[0].name}: {_others(studies[0])}")
    _prepare(plan.folder)
    with progress(len(studies), quiet=quiet) as bar:
        for study in others:
            bar.say(f"{study.name}: {_others(study)}: runs without --data {plan.data}")
        return run(studies, plan, bar, done=partial(_kept, plan, bar.say))


def _prepare(folder: Path) -> None:
    """Make the folder: better said now than when the first cell is to be kept."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out: {folder} is a file; expected a folder, or a name for a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"--out: {folder} cannot be made: {e.strerror}") from e
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out: {folder} cannot be written to")


def said(outcomes: Sequence[Outcome], plan: Plan) -> Iterator[str]:
    """The outcomes as text: verdict, sentence, table and notes of each; all verdicts; what makes a
    page of them."""
    for outcome in outcomes:
        yield _one(outcome)
    if len(outcomes) > 1:
        yield results.text_table(Table(["study", "data", "verdict", "seconds"], [
            [o.name, DATA.get(o.data), o.verdict, round(o.seconds, 1)] for o in outcomes])) + "\n"
    where = "" if plan.folder == FOLDER else f" --out {shlex.quote(str(plan.folder))}"
    yield f"{plan.folder}/verdicts.md\nA page with the pictures: nbgrad lab report{where}"


def _one(outcome: Outcome) -> str:
    head = f"{outcome.name}: {outcome.verdict}"
    lines = [head, "=" * len(head),
             *textwrap.wrap(f"claim: {outcome.study['claim']}", _WIDTH, subsequent_indent="  "),
             f"data: {DATA.get(outcome.data, 'none')}",
             *(f"{part.cells} of the cells {part}" for part in outcome.ran if len(outcome.ran) > 1),
             ""]
    if outcome.finding is None:
        lines += [f"{outcome.done} of {outcome.cells} cells are done"]
        lines += [error.splitlines()[0] for error in outcome.errors[:3]]
        more = len(outcome.errors) - 3
        lines += [f"and {more} more"] if more > 0 else []
    else:
        found = outcome.finding
        lines += [*textwrap.wrap(found.sentence, _WIDTH), "", results.text_table(found.table), ""]
        lines += [line for note in found.notes
                  for line in textwrap.wrap(note, _WIDTH, initial_indent="- ",
                                            subsequent_indent="  ")]
    return "\n".join(lines).rstrip() + "\n"


def _kept(plan: Plan, say: Callable[[str], None], outcome: Outcome) -> None:
    cells = f"{outcome.cells} cells" if outcome.done == outcome.cells else \
        f"{outcome.done} of {outcome.cells} cells"
    say(f"{outcome.name}: {outcome.verdict} ({cells}, {outcome.seconds:.0f} s)")
    results.write_verdicts(plan.folder, results.load_all(plan.folder, names()))


def _others(study: Study) -> str:
    return f"it runs on {', '.join(study.data)}" if study.data else "it needs no data"
