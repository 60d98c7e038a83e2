"""``python -m tests.onnx_adapter.page`` runs ONNX's node cases and writes docs/onnx.md."""

import re
from collections import Counter
from pathlib import Path

from . import COMPOSED, GROUPS, OPERATORS
from .cases import ATOL, MAIN, RTOL, SEED, load, outcomes
from .not_passed import ABSENT, DTYPE, expected

PAGE = Path(__file__).resolve().parents[2] / "docs" / "onnx.md"
BLOCK = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end -->", re.S)


def _table(header, rows):
    """Markdown; columns whose last entry is a number to the right."""
    sides = ["--:" if isinstance(cell, int) else "---" for cell in rows[-1]]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in (header, sides, *rows))


def _passed(cases):
    """How many there are, and how many passed."""
    found = outcomes()
    return len(cases), sum(not found[case.name].kind for case in cases)


def _main(cases):
    """Those of float32, float64, int32, int64 and bool alone."""
    return [case for case in cases if set(case.dtypes) <= set(MAIN)]


def _row(name, cases):
    return [name, *_passed(cases), *_passed(_main(cases))]


def summary():
    """Cases and passed, by group of operators."""
    cases = list(load().values())
    plain = [case for case in cases if not case.expanded]
    rows = [_row(name, [case for case in plain if case.operators[0] in group])
            for name, group in GROUPS.items()]
    rows.append(_row("definitions of operators by simpler ones",
                     [case for case in cases if case.expanded]))
    rows.append(_row("operators that nbgrad does not have",
                     [case for case in plain if case.operators[0] not in OPERATORS]))
    rows.append(_row("**all**", cases))
    return _table(["", "cases", "passed", f"of {', '.join(MAIN)}", "passed"], rows)


def norms():
    """Each normalization: its cases, and the graphs that define it."""
    cases, rows = load(), []
    for operator in GROUPS["normalization"]:
        own = [case for case in cases.values() if case.operators == (operator,)]
        names = {case.name for case in own}
        defined = [case for case in cases.values()
                   if case.expanded and case.name.partition("_expanded")[0] in names]
        rows.append([operator, *_passed(own), *_passed(defined)])
    return _table(["", "cases", "passed", "definitions", "passed"], rows)


def absent():
    """Operators that nbgrad does not have, with the number of cases that use them."""
    return _table(["", "operators, and the cases that use them"],
                  [[subject, " ".join(names.split())] for subject, names in ABSENT.items()])


def reasons():
    """The other cases that do not pass, each named."""
    found, listed = {}, expected(load())
    for name, outcome in outcomes().items():
        if outcome.kind and outcome.kind != "operator":
            reason = listed.get(name, outcome.what)
            if reason == DTYPE:
                reason = f"{DTYPE}: {outcome.what}"
            found.setdefault(reason, []).append(name)
    return _table(["reason", "cases", ""],
                  [[reason, len(names), " ".join(f"`{name}`" for name in names)]
                   for reason, names in found.items()])


def how():
    """What was run, and how it was compared."""
    import onnx

    kinds = Counter(outcome.kind for outcome in outcomes().values())
    total = sum(kinds.values())
    composed = ", ".join(sorted(COMPOSED))
    return (f"**{kinds['']} of {total}** cases of onnx {onnx.__version__} pass: same dtype, same "
            f"shape, and values within rtol {RTOL:g}\nand atol {ATOL:g} (ONNX itself asks for "
            f"1e-3), with the data that `np.random.seed({SEED})` gives. {kinds['operator']} use "
            f"operators\nthat nbgrad does not have, {kinds['dtype']} types that the adapter does "
            f"not run (nbgrad's float16\nand bfloat16, which compute in float32, among them), "
            f"{kinds['lacks'] + kinds['differs']} fail for other reasons; all are listed below.\n\n"
            f"Made in the adapter of several functions, since nbgrad has none of that name: "
            f"{composed}.\n")


TABLES = {"how": how, "summary": summary, "norms": norms, "absent": absent, "reasons": reasons}


def write(text):
    """The page with every table written anew."""
    return BLOCK.sub(lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]]()}<!-- end -->", text)


def main():
    """Rewrite the page."""
    PAGE.write_text(write(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
