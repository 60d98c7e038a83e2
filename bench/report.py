"""Write the README's tables from measured files.

``python -m bench.report`` replaces what stands between ``<!-- table: NAME -->`` and
``<!-- end: NAME -->`` by the newest run in ``bench/results/NAME.csv``, for every such pair.
"""

import re
from pathlib import Path

from . import measure

__all__ = ["main", "newest", "render", "write"]

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end: \1 -->", re.S)


def newest(path):
    """The rows of the last run in a CSV file of results."""
    rows = measure.read(path)
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def render(rows, name):
    """Markdown of one run: a row for each case, our side first, and where it was measured."""
    cases = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    ours = rows[0]["side"]
    lines = [f"| | {ours} | compared with | times as fast |", "|---|--:|--:|--:|"]
    for case, (own, *others) in cases.items():
        for other in others or [None]:
            lines.append(_line(case, own, other))
    first = rows[0]
    where = f"{first['machine']}, {first['cores']} cores, {first['threads']} threads"
    return "\n".join([
        *lines, "",
        f"Medians of {first['rounds']} interleaved rounds, each side in its own process: {where};",
        f"{first['versions']}; {first['date'][:10]} (`python -m bench.{name}`).", ""])


def _line(case, own, other):
    cells = [case, duration(own["median"]), "", ""]
    if other:
        cells[2] = f"{other['side']} {duration(other['median'])}"
        cells[3] = f"{float(other['median']) / float(own['median']):.2f}"
    return "| " + " | ".join(cells) + " |"


def duration(seconds):
    """Three digits and a unit.

    >>> duration(1.9346e-6), duration("0.0999"), duration(12)
    ('1.93 µs', '99.9 ms', '12.0 s')
    """
    seconds = float(seconds)
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
                        if seconds >= 0.9995 * s), (1e-9, "ns"))
    return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"


def write(text, results=measure.RESULTS):
    """The text with every table that has a file of results written anew."""
    def block(match):
        name, path = match[1], results / f"{match[1]}.csv"
        if not path.exists():
            return match[0]
        table = render(newest(path), name)
        return f"<!-- table: {name} -->\n{table}<!-- end: {name} -->"
    return BLOCK.sub(block, text)


def main():
    """Rewrite the README."""
    README.write_text(write(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
