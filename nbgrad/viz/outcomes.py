"""What reports say about a study's run, in words, and which runs a folder holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nbgrad.lab import results, studies
from nbgrad.lab.results import Outcome
from nbgrad.train.config import DATA

__all__ = ["USUAL", "again", "authors", "conditions", "heading", "machine", "minutes", "named",
           "read", "state"]

# What every article says about batch norm, and the number of the study that measures it.
USUAL = {"Converges faster": 1, "Allows higher learning rates": 2, "Forgives initialisation": 3,
         "Regularises": 4, "Reduces internal covariate shift": 5}
_STATES = {"failed": "failed", "interrupted": "interrupted", "absent": "not run"}


def read(folder: Path) -> list[Outcome]:
    """Every study's outcome, those that have not run too, in the order of ``nbgrad lab list``.

    Raises FileNotFoundError for a folder that is not there, ValueError where it holds no study's
    results or a file that is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `nbgrad lab run` makes one")
    there = {o.name: o for o in results.load_all(folder)}
    begun = {p.parent.name for p in folder.glob("*/cells.jsonl")}
    if not there and not begun:
        raise ValueError(f"{folder}: holds no results of `nbgrad lab run`")
    listed = studies.names()
    return [*(there.get(name) or _absent(name, name in begun) for name in listed),
            *(o for name, o in there.items() if name not in listed)]


def _absent(name: str, begun: bool) -> Outcome:
    """A study without a result, so that it can be listed."""
    return Outcome(study=results.texts(studies.find(name)), scale="", data="", seeds=0, cells=0,
                   done=0, state="interrupted" if begun else "absent", seconds=0.0, date="",
                   command=f"nbgrad lab run {name}", machine={})


def named(number: int) -> str | None:
    """The name of a study by its number in ``nbgrad lab list``."""
    module = studies.STUDIES.get(number)
    return None if module is None else module.replace("_", "-")


def state(outcome: Outcome) -> str:
    """The verdict, or why there is none."""
    if outcome.finding is not None:
        return outcome.finding.verdict
    return _STATES.get(outcome.state, outcome.state)


def conditions(outcome: Outcome) -> str:
    """Why there is no finding, in a sentence."""
    if outcome.state == "absent":
        return "This study has not run."
    first = outcome.errors[0].splitlines()[0] if outcome.errors and outcome.errors[0] else ""
    if outcome.state == "failed":
        lost = outcome.cells - outcome.done
        what = f"{lost} of {outcome.cells} cells failed" if lost else "Its verdict failed"
        return f"{what}: {first}." if first else f"{what}."
    done = f"{outcome.done} of {outcome.cells} cells are done" if outcome.cells else \
        "some of its cells are done"
    return f"Interrupted: {done}. The same command goes on from there."


def authors(source: str) -> str:
    """Who said it and when, without where.

    >>> authors("Ba, Kiros & Hinton 2016, section 6.6 (figure 6)"), authors("a tutorial, x / y")
    ('Ba, Kiros & Hinton 2016', 'a tutorial')
    """
    first = re.split("[;(]", source)[0]
    found = re.match(r".*?\b(19|20)\d\d\b", first)
    return (found[0] if found else first.split(",")[0]).strip()


def again(outcome: Outcome) -> str:
    """The command that runs it."""
    return outcome.command or f"nbgrad lab run {outcome.name}"


def machine(outcome: Outcome) -> list[str]:
    """How, where and when it was measured."""
    if not outcome.done:
        return []
    said = [f"{outcome.scale} settings", DATA.get(outcome.data, outcome.data or "no data"),
             f"{outcome.seeds} seed{'s' * (outcome.seeds != 1)}", f"{outcome.done} cells",
             f"{minutes(outcome.seconds)} of one core"]
    one, *others = outcome.ran
    if others or not one.date:
        said += [f"{part.cells} of the cells {part}" for part in outcome.ran]
    else:
        said += [*one.where, one.date]
    return [text for text in said if text]


def minutes(seconds: float) -> str:
    """A duration as one reads it.

    >>> minutes(4.21), minutes(74), minutes(3700)
    ('4.2 s', '74 s', '62 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def heading(outcomes: Sequence[Outcome]) -> str:
    """How much was measured, how and when, in a line."""
    done = [o for o in outcomes if o.finding is not None]
    count = f"{len(done)} of {len(outcomes)} studies" if len(done) < len(outcomes) else \
        f"{len(done)} studies"
    if not done:
        return f"{count} have a result."
    scales = sorted({o.scale for o in done})
    measured = [part for o in done for part in o.ran]
    dates = sorted({part.date for part in measured if part.date})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "at an unknown date"
    places = list(dict.fromkeys(" with ".join(part.where[:2]) for part in measured if part.date))
    total = minutes(sum(o.seconds for o in done))
    data = list(dict.fromkeys(DATA.get(o.data, o.data) for o in done if o.data))
    on = f" on {' and '.join(data)}" if data else ""
    return (f"{count}, {' and '.join(scales)} settings{on}, {total} of one core together; "
            f"{'; '.join([*places, when])}.")
