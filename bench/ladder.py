"""The ladders in docs/: one kernel from naive to fast, every rung measured and shown.

``python -m bench ladder`` measures them; ``python -m bench.ladder`` writes into the pages what
stands between ``<!-- code: … -->`` or ``<!-- table: … -->`` and ``<!-- end -->``: source by module
and names, tables by what the files of results say.
"""

import ast
import importlib
import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT, measure

__all__ = ["DOCS", "ERRORS", "LADDERS", "SHIPPED", "build", "code", "errors", "main", "markdown",
           "print_table", "write"]

DOCS = ROOT / "docs"
ERRORS = "ladder_errors.csv"
BLOCK = re.compile(r"<!-- (code|table): (.+?) -->\n.*?<!-- end -->", re.S)
OFFSET, SMALL = 1e4, (8, 16, 56, 56)           # of x whose errors are shown
SHIPPED = ("one thread", "")                   # the worker runs the first on one thread
ALL_THREADS = ("", "threads", "numpy")
NAMES = {"": "nbgrad", "one thread": "nbgrad, one thread", "numpy": "NumPy: OpenBLAS",
         "numpy formula": "NumPy"}


class Ladder(NamedTuple):
    """Rungs are functions of a module; underscores are spaces."""

    module: str
    rungs: tuple[str, ...]
    sizes: tuple[int, ...]
    ceiling: dict[str, Any]

    @property
    def text(self):
        """The sizes, for people."""
        return " × ".join(map(str, self.sizes))


def _ladders(shape=(32, 128, 56, 56), n=768):
    """51 MB, which no cache here holds; a product of whole tiles whose naive form ends."""
    copy = {"op": "copy", "nbytes": 4 * prod(shape)}
    return {
        "batch norm, NCHW": Ladder("ladder_norm", (
            "numpy formula", "one pass", "two passes", "vectors", "chunks", "pooled", "together",
            "streamed", "threads", *SHIPPED), shape, copy),
        "batch norm, channels-last": Ladder("ladder_rows", (
            "numpy formula", "columns", "rows", "pooled", "streamed", "threads", *SHIPPED), shape,
            copy),
        "matmul": Ladder("ladder_matmul", (
            "dots", "rows", "four rows", "tiles", "panels", "threads", *SHIPPED, "numpy"), (n,) * 3,
            {"op": "fma", "dtype": "float32", "flops": 2 * n ** 3})}


LADDERS = _ladders()


def table(limit=None):
    """(kind, name, op, settings, sides, flops, bytes) of every case of the suite."""
    ladders = LADDERS if limit is None else _ladders((4, 32, min(limit, 56), min(limit, 56)), 96)
    for kind, ladder in ladders.items():
        n = prod(ladder.sizes)
        cost = (2 * n, 12 * ladder.sizes[0] ** 2) if kind == "matmul" else (8 * n, 8 * n)
        sides = ("nbgrad", *(f"nbgrad {rung}" for rung in ladder.rungs if rung))
        yield kind, "ceiling", "ladder", ladder.ceiling, ("nbgrad", "nbgrad one thread"), *cost
        yield kind, ladder.text, "ladder", {"op": kind, "sizes": ladder.sizes}, sides, *cost


def rung_of(ladder, how):
    """The function of a rung."""
    module = importlib.import_module(f"bench.{ladder.module}")
    return getattr(module, "shipped" if how in (*SHIPPED, "reference") else how.replace(" ", "_"))


def arguments(kind, sizes):
    """What the rungs of a ladder are functions of, in memory as nbgrad's own outputs have it."""
    from .on_nbgrad import some

    if kind == "matmul":
        return some(sizes[:2]), some(sizes[1:], 1)
    return some(sizes, 0, kind.endswith("channels-last")), some(sizes[1:2], 3), some(sizes[1:2], 4)


def build(how, op, **settings):
    """The call of a case."""
    if op in ("copy", "fma"):
        from . import ceilings

        return getattr(ceilings, op)(**settings)
    rung, args = rung_of(LADDERS[op], how), arguments(op, **settings)
    if how == "reference":
        return lambda: exact(op, *args)
    return lambda: rung(*args)


def exact(kind, *args):
    """What every rung should return, in float64."""
    from nbgrad.kernels import reference

    x, *others = (a.astype(float) for a in args)
    if kind == "matmul":
        return reference.matmul(x, *others)
    return reference.batch_norm(x, *others, eps=1e-5)[0]


def errors():
    """Rows of largest |y − exact y| where mean / standard deviation is 10⁴, γ = 1 and β = 0."""
    import numpy as np

    rows = []
    for kind, ladder in LADDERS.items():
        if kind == "matmul":
            continue
        x, gamma, beta = arguments(kind, SMALL)
        x += OFFSET
        gamma[:], beta[:] = 1, 0
        want = exact(kind, x, gamma, beta)
        for how in ladder.rungs:
            y = rung_of(ladder, how)(x, gamma, beta)
            rows.append({"kind": kind, "side": how, "error": f"{np.abs(y - want).max():.1e}"})
    return rows


def code(module, names):
    """Source of functions and constants of a module, in the order asked for."""
    text = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(text).body:
        targets = [node] if hasattr(node, "name") else getattr(node, "targets", [])
        for target in targets:
            for name in getattr(target, "elts", [target]):
                first = min([d.lineno for d in getattr(node, "decorator_list", [])] + [node.lineno])
                lines = text.splitlines()[first - 1:node.end_lineno]
                found[getattr(name, "name", getattr(name, "id", ""))] = "\n".join(lines)
    return "\n\n".join(found[name] for name in names)


def markdown(rows, kind, wrong=()):
    """The table of one ladder, from the newest machine's rows, and what was measured."""
    last = max(rows, key=lambda row: row["date"])
    rows = [row for row in rows if row["kind"] == kind
            and (row["machine"], row["threads"]) == (last["machine"], last["threads"])]
    sides = {(row["case"] == "ceiling", row["side"].partition(" ")[2]): row for row in rows}
    wrong = {row["side"]: row["error"] for row in wrong if row["kind"] == kind}
    rungs = [how for how in LADDERS[kind].rungs if (False, how) in sides]
    unit = "GFLOP/s" if kind == "matmul" else "GB/s"
    header = ["", "time", unit, "of the ceiling", "× the rung before"] + ["error"] * bool(wrong)
    lines = [header, ["---"] + ["--:"] * (len(header) - 1)]
    for i, how in enumerate(rungs):
        cells = _cells(sides, how, _before(rungs, i), "flops" if kind == "matmul" else "bytes")
        cells += [wrong.get(how, "")] * bool(wrong)
        lines.append([f"{i + 1}. {NAMES.get(how, how)}", *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n" + _where(rows)


def _before(rungs, i):
    """What a rung is compared with; ours with the last rung of as many threads."""
    if rungs[i] in SHIPPED and "threads" in rungs:
        return rungs[rungs.index("threads") - (rungs[i] == "one thread")]
    return rungs[i - 1] if i else None


def _cells(sides, how, before, amount):
    from .report import duration  # which imports the suite, and so this module

    row = sides[False, how]
    seconds = float(row["median"])
    ceiling = float(sides[True, "" if how in ALL_THREADS else "one thread"]["median"])
    ratio = "" if before is None else f"{float(sides[False, before]['median']) / seconds:.2f}"
    return [duration(seconds), f"{float(row[amount]) / seconds / 1e9:.3g}",
            f"{100 * ceiling / seconds:.0f} %", ratio]


def _where(rows):
    """Sizes, ceilings and machine, for below a table."""
    first = next(row for row in rows if row["case"] != "ceiling")
    amount, unit = (("flops", "GFLOP/s of multiply-adds") if rows[0]["kind"] == "matmul" else
                    ("bytes", "GB/s of copying"))
    rates = {row["side"]: f"{float(row[amount]) / float(row['median']) / 1e9:.3g}" for row in rows
             if row["case"] == "ceiling"}
    return (f"{first['case']}, float32. Ceilings: {rates['nbgrad one thread']} {unit} with one "
            f"thread, {rates['nbgrad']} with {first['threads']}.\nMedians of {first['rounds']} "
            f"interleaved rounds: {first['machine']}, {first['cores']} cores;\n"
            f"{first['versions']}; {first['date'][:10]} (`python -m bench ladder`).\n")


def print_table(rows):
    """Every ladder that was measured."""
    for kind in dict.fromkeys(row["kind"] for row in rows if row["group"] == "ladder"):
        print(f"{kind}\n\n{markdown(rows, kind)}")


def write(text, results=measure.RESULTS):
    """A page with its code and those tables that there are results for written anew."""
    rows, wrong = (measure.read(path) if path.exists() else []
                   for path in (results / "ladder.csv", results / ERRORS))

    def block(match):
        what, name = match[1], match[2]
        if what == "code":
            module, *names = name.split()
            new = f"```python\n{code(module, names)}\n```\n"
        elif name in {row["kind"] for row in rows}:
            new = markdown(rows, name, wrong)
        else:
            return match[0]
        return f"<!-- {what}: {name} -->\n{new}<!-- end -->"
    return BLOCK.sub(block, text)


def main():
    """Measure the errors, then write the pages."""
    with (measure.RESULTS / ERRORS).open("w", encoding="utf-8") as file:
        file.write("kind,side,error\n")
        file.writelines(f'"{row["kind"]}",{row["side"]},{row["error"]}\n' for row in errors())
    for page in sorted(DOCS.glob("*-ladder.md")):
        page.write_text(write(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
