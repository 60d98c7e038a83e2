"""``nbgrad lab report``: a folder of results as a page, as Markdown and as CSV files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbgrad.lab.results import Outcome, replace, write_verdicts
from nbgrad.lab.study import Table
from nbgrad.viz import page
from nbgrad.viz.outcomes import again, authors, conditions, heading, machine, read, state
from nbgrad.viz.tables import csv_text, figure_table, markdown, markdown_code, markdown_text

__all__ = ["markdown_page", "verdicts", "write"]

Path_ = str | os.PathLike[str]


def write(folder: Path_, out: Path_ | None = None) -> list[Path]:
    """Write the report of a folder of results; returns what was written, the page first.

    ``out``: a file that ends in .html for the page alone; a folder (as a default, the results'
    own) for ``report.html``, ``report.md``, ``verdicts.csv`` and, in ``tables/``, a CSV file for
    every study's table and every figure. Raises as ``outcomes.read`` does.
    """
    outcomes = read(Path(folder))
    target = Path(folder if out is None else out)
    if target.suffix.lower() in (".html", ".htm"):
        target.parent.mkdir(parents=True, exist_ok=True)
        return [replace(target, page.html(outcomes))]
    target.mkdir(parents=True, exist_ok=True)
    write_verdicts(target, [o for o in outcomes if o.done])
    return [replace(target / "report.html", page.html(outcomes)),
            replace(target / "report.md", markdown_page(outcomes)),
            target / "verdicts.csv", *_tables(target / "tables", outcomes)]


def _tables(folder: Path, outcomes: Sequence[Outcome]) -> Iterator[Path]:
    for outcome in outcomes:
        if outcome.finding is not None:
            folder.mkdir(exist_ok=True)
            yield _written(folder / f"{outcome.name}.csv", outcome.finding.table)
            for i, figure in enumerate(outcome.finding.figures, 1):
                yield _written(folder / f"{outcome.name}-figure-{i}.csv", figure_table(figure))


def _written(path: Path, table: Table) -> Path:
    path.write_text(csv_text(table), encoding="utf-8")
    return path


def verdicts(outcomes: Sequence[Outcome], link: str | None = None) -> str:
    """The table of claims and verdicts in Markdown: with what was measured, or, where ``link`` is
    the page that says it, with who made the claim."""
    rows = [f"| [{markdown_text(o.study['claim'])}]({link or ''}#{o.name}) | **{state(o)}** | "
            f"{markdown_text(_answer(o) if link is None else authors(o.study['source']))} |\n"
            for o in outcomes]
    third = "what was measured" if link is None else "source"
    return "".join([f"| claim | verdict | {third} |\n| --- | --- | --- |\n", *rows])


def _answer(outcome: Outcome) -> str:
    return conditions(outcome) if outcome.finding is None else outcome.finding.sentence


def markdown_page(outcomes: Sequence[Outcome], pictures: dict[str, Sequence[str]] | None = None
                  ) -> str:
    """The whole report in Markdown. ``pictures``: files of a study's figures, by its name."""
    parts = [f"# {page.TITLE}", markdown_text(heading(outcomes)), verdicts(outcomes),
             markdown_text(page.VERDICTS)]
    for outcome in outcomes:
        parts += _section(outcome, (pictures or {}).get(outcome.name, ()))
    parts.append(markdown_text(page.INTERVALS))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _section(outcome: Outcome, pictures: Sequence[str]) -> Iterator[str]:
    study, finding = outcome.study, outcome.finding
    yield f'<a id="{outcome.name}"></a>\n\n## {markdown_text(study["question"])}'
    yield f"**{state(outcome)}**: {markdown_text(_answer(outcome))}"
    yield "".join(f"- {name}: {markdown_text(text)}\n" for name, text in (
        ("Claim", f'{study["claim"]} ({study["source"]})'), ("Published", study["published"]),
        ("Set-up", study["setup"]), ("Rule", study["rule"])) if text)
    if finding is not None:
        for figure, file in zip(finding.figures, pictures):
            yield f"![{markdown_text(figure.title)}]({file})"
        yield markdown(finding.table)
        if finding.notes:
            yield "Notes:"
            yield "".join(f"- {markdown_text(note)}\n" for note in finding.notes)
    for name, key in (("Others found", "literature"), ("Changed", "changed")):
        if study.get(key):
            yield f"{name}: {markdown_text(study[key])}"
    measured = markdown_text(", ".join(machine(outcome)))
    yield f"Run it again: {markdown_code(again(outcome))}. {measured}"
