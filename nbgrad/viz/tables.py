"""Tables and figures of findings as text: cells, Markdown, CSV."""

from __future__ import annotations

import csv
import io
import re

from nbgrad.lab.study import Figure, Table
from nbgrad.viz.scale import number

__all__ = ["cell", "csv_text", "figure_table", "is_value", "markdown", "markdown_code",
           "markdown_text"]

Value = str | float | int | None
_VALUE = re.compile(r"[−–+<>≤≥≈~]?\s*[\d.,]+(e[+-]?\d+)?\s*(%|×|s|ms|pt)?"
                    r"(\s*[\[(±].*[\])\d%])?|\d+ ?/ ?\d+(, \d+ ?/ ?\d+)*|\d+, \d+ of \d+|never|–|")


def cell(value: Value) -> str:
    """As a table shows it.

    >>> cell(0.93456), cell(None), cell(1200), cell("0.9 [0.8, 1]")
    ('0.9346', '–', '1,200', '0.9 [0.8, 1]')
    """
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    return str(value) if isinstance(value, str | bool) else number(value)


def is_value(value: Value) -> bool:
    """Whether this is a number or a text that stands for one, perhaps with an interval.

    >>> [is_value(v) for v in (1.5, None, "0.93 [0.91, 0.95]", "12 % (3/5)", "batch norm", "a 2")]
    [True, True, True, True, False, False]
    """
    return not isinstance(value, str) or _VALUE.fullmatch(value.strip()) is not None


def figure_table(figure: Figure) -> Table:
    """All points of a figure, a row each."""
    ends = any(s.low is not None and s.high is not None for s in figure.series)
    rows: list[list[Value]] = []
    for series in figure.series:
        low = series.low or [None] * len(series.y)
        high = series.high or [None] * len(series.y)
        rows += [[series.label, x, y, *((a, b) if ends else ())]
                 for x, y, a, b in zip(series.x, series.y, low, high)]
    return Table(["", figure.xlabel, figure.ylabel, *(("low", "high") if ends else ())], rows)


def csv_text(table: Table) -> str:
    """With all digits; what is missing is empty."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue()


def markdown(table: Table) -> str:
    """The table in Markdown; columns of values to the right."""
    right = [all(is_value(row[i]) for row in table.rows) for i in range(len(table.columns))]
    rows = [[markdown_text(str(c)) for c in table.columns],
            ["--:" if r else "---" for r in right],
            *([markdown_text(cell(v)) for v in row] for row in table.rows)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def markdown_text(text: str) -> str:
    """So that Markdown shows the text as it is, in one line.

    >>> print(markdown_text("a|b <i> *x* & &amp;"))
    a\\|b &lt;i> \\*x\\* & &amp;amp;
    """
    line = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split())).replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", line)


def markdown_code(text: str) -> str:
    """As code, in one line, whatever is in it.

    >>> print(markdown_code("nbgrad lab"), markdown_code("a `b`"))
    `nbgrad lab` `` a `b` ``
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * (longest > 0)
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"
