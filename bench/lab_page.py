"""Write docs/lab.md, its pictures and the README's verdicts from the laboratory's results.

    python -m bench.lab_page           from bench/results/lab
    python -m bench.lab_page DIR       the same, after taking over the findings of `nbgrad lab run`
                                       in DIR; studies that have none there keep the old one
"""

import dataclasses
import re
import shutil
import sys
from pathlib import Path

from nbgrad.lab import results, studies
from nbgrad.viz import outcomes as reading, page
from nbgrad.viz.picture import png
from nbgrad.viz.report import markdown_page, verdicts
from nbgrad.viz.tables import markdown_text

from . import ROOT, report

__all__ = ["keep", "main", "pictures", "shown", "write"]

KEPT, PAGE = report.measure.RESULTS / "lab", ROOT / "docs" / "lab.md"
BLOCK = re.compile(r"<!-- table: lab -->\n.*?<!-- end: lab -->", re.S)
# By number, in this order; the README shows the first figure of the first two that have one:
# convergence, covariate shift, landscape, learning rates.
SHOWN = (1, 5, 6, 2)


def keep(folder, kept=KEPT):
    """Copy the findings of a folder of results, without the paths of the machine.

    Raises ValueError for a folder that has none, or some of other settings, data or seeds than the
    study's own, which the page would show among these as if they were; then nothing is copied.
    """
    found = [o for o in results.load_all(Path(folder)) if o.finding is not None]
    if not found:
        raise ValueError(f"{folder}: holds no finding of `nbgrad lab run`")
    other = [o.name for o in found if o.scale != "quick" or o.data not in ("", "digits")
             or "--seeds" in o.command.split()]
    if other:
        raise ValueError(f"{folder}: expected quick runs on the digits with the studies' own seeds,"
                         f" got others of {', '.join(other)}")
    for outcome in found:
        machine = {k: v for k, v in outcome.machine.items() if k != "kernel cache"}
        results.save(kept, dataclasses.replace(outcome, machine=machine))
    return found


def load(kept=KEPT):
    """What was kept, in the order of ``nbgrad lab list``."""
    there = {o.name: o for o in results.load_all(kept)}
    names = [name for name in studies.names() if name in there]
    return [there[name] for name in [*names, *(n for n in there if n not in names)]]


def pictures(outcomes, folder):
    """Draw all figures into an emptied folder; {study: file names}."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {o.name: [png(figure, folder / f"{o.name}-{i}.png").name
                     for i, figure in enumerate(o.finding.figures, 1)] for o in outcomes}


def shown(outcomes):
    """The two figures of the README: (study, figure)."""
    found = {o.name: o for o in outcomes if o.finding.figures}
    names = [name for number in SHOWN if (name := reading.named(number)) in found]
    names += [name for name in found if name not in names]
    return [(name, found[name].finding.figures[0]) for name in names[:2]]


def write(text, outcomes):
    """The README's text with its verdicts and two plots written anew."""
    plots = "\n".join(f"![{markdown_text(figure.title)}](docs/lab/{name}-1.png)"
                      for name, figure in shown(outcomes))
    versions = ", ".join(outcomes[0].ran[-1].where[2:])
    block = (f"<!-- table: lab -->\n{verdicts(outcomes, 'docs/lab.md')}\n"
             f"{markdown_text(page.VERDICTS)}\n\n"
             f"{markdown_text(reading.heading(outcomes))}\n{markdown_text(versions)} "
             f"(`nbgrad lab run --all`, `python -m bench.lab_page`).\n\n{plots}\n"
             "<!-- end: lab -->")
    return BLOCK.sub(lambda match: block, text)


def main(argv=None):
    """Write everything; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        print(__doc__)
        return 2
    if argv:
        keep(argv[0])
    outcomes = load()
    if not outcomes:
        print(f"{KEPT} holds no findings: run `nbgrad lab run --all`, then "
              "`python -m bench.lab_page lab`", file=sys.stderr)
        return 2
    files = pictures(outcomes, PAGE.with_suffix(""))
    links = {name: [f"lab/{file}" for file in own] for name, own in files.items()}
    PAGE.write_text(markdown_page(outcomes, links), encoding="utf-8")
    report.README.write_text(write(report.README.read_text(encoding="utf-8"), outcomes),
                             encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
