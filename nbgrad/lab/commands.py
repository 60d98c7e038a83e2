"""What ``nbgrad lab list`` and ``nbgrad lab run`` do; ``cli`` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from nbgrad.lab import results
from nbgrad.lab.results import Outcome
from nbgrad.lab.running import Plan, run
from nbgrad.lab.studies import STUDIES, find, names
from nbgrad.lab.study import Study, Table
from nbgrad.train.config import Config
from nbgrad.train.progress import progress
from nbgrad.train.setup import load_task

__all__ = ["listed", "run_studies", "said"]

_WIDTH = 100


def listed() -> str:
    """All studies by number: name and question."""
    return results.text_table(Table(["", "study", "question"], [
        [number, name, find(name).question] for number, name in zip(sorted(STUDIES), names())]))


def run_studies(chosen: Sequence[str], plan: Plan, quiet: bool = False) -> list[Outcome]:
    """Run studies by name (none: all of them); after each, write the verdicts of all that the
    folder holds.

    Raises ValueError for names that there are not, data that a named study, or of all of them
    none, offers, and what reading the data raises, before anything runs.
    """
    studies = [find(name) for name in dict.fromkeys(chosen or names())]
    if chosen and plan.data not in (None, "digits"):
        for study in studies:
            _check_data(study, plan)
    offered = {"digits", *(data for study in studies for data in study.options)}
    if plan.data is not None and plan.data not in offered:
        raise ValueError(f"--data: no study runs on {plan.data}; there is one for each of "
                         f"{', '.join(sorted(offered))}")
    if plan.data is not None:
        load_task(Config(data=plan.data, root=plan.root))
    with progress(len(studies), quiet=quiet) as bar:
        return run(studies, plan, bar, done=partial(_kept, plan, bar.say))


def said(outcomes: Sequence[Outcome], plan: Plan) -> Iterator[str]:
    """The outcomes as text: verdict, sentence, table and notes of each; then all verdicts."""
    for outcome in outcomes:
        yield _one(outcome)
    if len(outcomes) > 1:
        yield results.text_table(Table(["study", "verdict", "seconds"], [
            [o.name, o.verdict, round(o.seconds, 1)] for o in outcomes])) + "\n"
    yield f"{plan.folder}/verdicts.md"


def _one(outcome: Outcome) -> str:
    head = f"{outcome.name}: {outcome.verdict}"
    lines = [head, "=" * len(head), f"claim: {outcome.study['claim']}", ""]
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
    say(f"{outcome.name}: {outcome.verdict} ({outcome.cells} cells, {outcome.seconds:.0f} s)")
    results.write_verdicts(plan.folder, results.load_all(plan.folder, names()))


def _check_data(study: Study, plan: Plan) -> None:
    if plan.data not in study.options:
        offered = ", ".join(("digits", *study.options))
        raise ValueError(f"--data: {study.name} runs on {offered}, not on {plan.data}")
