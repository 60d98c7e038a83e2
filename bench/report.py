"""Write the README's tables from measured files.

``python -m bench.report`` replaces what stands between ``<!-- table: NAME -->`` and
``<!-- end: NAME -->``, for every such pair: "summary", "headlines", "steps" and "scaling" by
what the groups' files say, any other by the newest run in ``bench/results/NAME.csv``.
"""

import re
from pathlib import Path

from . import measure, suite, tables
from .tables import duration

__all__ = ["duration", "groups_in", "headlines", "main", "newest", "render", "scaling", "steps",
           "summary", "write"]

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


def _table(header, lines):
    """Markdown; all columns but the first to the right."""
    rows = [header, ["---"] + ["--:"] * (len(header) - 1), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def groups_in(results):
    """{group: {threads: rows}} of the files there are, most threads first."""
    found = {}
    for group in suite.GROUPS:
        path = results / f"{group}.csv"
        for row in measure.read(path) if path.exists() else []:
            found.setdefault(group, {}).setdefault(row["threads"], []).append(row)
    return {group: dict(sorted(runs.items(), key=lambda run: -int(run[0])))
            for group, runs in found.items()}


def _where(groups):
    """When and where, for below the tables."""
    rows = [row for runs in groups.values() for rows in runs.values() for row in rows]
    last = max(rows, key=lambda row: row["date"])
    counts = sorted({int(row["rounds"]) for row in rows})
    return (f"Medians of {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} interleaved rounds, "
            f"each library in its own process: {last['machine']}, {last['cores']} cores;\n"
            f"{last['versions']}; {last['date'][:10]} (`python -m bench`).\n")


def summary(groups):
    """How many times as fast as each peer: geometric mean and least, by kind of case."""
    peers = ["numpy", "torch", "torch channels-last", tables.COMPOSED, tables.BEST]
    lines, composed = [], any(row["side"] == tables.COMPOSED for runs in groups.values()
                              for rows in runs.values() for row in rows)
    if not composed:
        peers.remove(tables.COMPOSED)
    for group in ("matmul", "conv", "norm", "elementwise"):
        for threads, rows in groups.get(group, {}).items():
            if group == "elementwise":                # a kind for each op: too many for a page
                rows = [{**row, "case": f"{row['kind']} {row['case']}", "kind": "all"}
                        for row in rows if row["group"] != "machine"]
            for kind, found in tables.ratios(rows).items():
                cells = [_mean_and_least(found.get(peer)) for peer in peers]
                count = str(max(map(len, found.values())))
                lines.append([f"{group}: {kind}", threads, count, *cells])
    note = f"{tables.COMPOSED}: in its own elementary ops, for norms without a peer.\n\n"
    return (_table(["", "threads", "cases", *peers], lines) + "\n" + (note if composed else "")
            + _where(groups))


def _mean_and_least(values):
    return f"{tables.geometric_mean(values):.2f} ({min(values):.2f})" if values else ""


HEADLINES = [
    ("matmul", "float32, 1024"), ("conv", "forward, resnet20 16->16 3x3 @32"),
    ("conv", "input gradient, resnet18 128->128 3x3 @28"),
    ("conv", "weight gradient, resnet18 128->128 3x3 @28"),
    ("conv", "forward, mobilenet 128->128 3x3 @56 depthwise"),
    ("norm", "forward channels-last, 32x256x28x28"),
    ("norm", "backward channels-last, 32x256x28x28"),
    ("norm", "+ add + relu, both ways, channels-last, 32x256x28x28"),
    ("elementwise", "gelu, 6144x1024"), ("elementwise", "softmax, 6144x1024"),
]


def headlines(groups):
    """Single cases with all threads, beside the fastest of the others."""
    lines = []
    for group, label in HEADLINES:
        for own, others in tables.by_case(next(iter(groups.get(group, {"": []}).values()))):
            if f"{own['kind']}, {own['case']}" == label and others:
                best = min(others.values(), key=lambda row: float(row["median"]))
                lines.append([f"{group} {label}", duration(own["median"]), tables.rate(own),
                              tables.percent(own), f"{best['side']} {duration(best['median'])}",
                              f"{tables.ratio(own, best):.2f}"])
    return _table(["", "nbgrad", "rate", "of the ceiling", "fastest other", "times as fast"], lines)


def steps(groups):
    """Whole training steps: time, first call and memory beside each other side."""
    lines = []
    for threads, rows in groups.get("step", {}).items():
        for own, others in tables.by_case(rows):
            for row in (own, *others.values()):
                memory = float(row["peak"] or "nan") / float(own["peak"] or "nan")
                lines.append([own["case"], threads, row["side"], duration(row["median"]),
                              f"{tables.ratio(own, row):.2f}", tables.first_call(row),
                              tables.megabytes(row), "" if memory != memory else f"{memory:.2f}"])
    return _table(["training step", "threads", "", "time", "time / nbgrad's", "first step",
                   "peak memory", "memory / nbgrad's"], lines)


def scaling(groups):
    """One thread beside all of them, on work that the caches hold."""
    lines = []
    for threads, rows in groups.get("scaling", {}).items():
        for own, others in tables.by_case(rows):
            alone = others.get("nbgrad one thread", own)
            theirs = [others.get("torch" + how) for how in ("", " one thread")]
            lines.append([own["case"], threads, duration(alone["median"]), duration(own["median"]),
                          f"{tables.ratio(own, alone):.2f}",
                          f"{tables.ratio(*theirs):.2f}" if all(theirs) else ""])
    return _table(["", "threads", "nbgrad, one", "nbgrad, all", "times as fast", "torch's"], lines)


SUITE = {"summary": summary, "headlines": headlines, "steps": steps, "scaling": scaling}


def write(text, results=measure.RESULTS):
    """The text with every table that has a file of results written anew."""
    groups = groups_in(results)

    def block(match):
        name, path = match[1], results / f"{match[1]}.csv"
        if name in SUITE and groups:
            table = SUITE[name](groups)
        elif path.exists():
            table = render(newest(path), name)
        else:
            return match[0]
        return f"<!-- table: {name} -->\n{table}<!-- end: {name} -->"
    return BLOCK.sub(block, text)


def main():
    """Rewrite the README."""
    README.write_text(write(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
