"""Measure nbgrad beside PyTorch and NumPy: each library in its own process, in turns, by medians.

    python -m bench                            every group
    python -m bench norm conv --only resnet20  cases whose "group kind, name" matches
    python -m bench matmul --threads 1

Prints a table for each group and keeps it in results/GROUP.csv, with a roofline plot beside it.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from . import ROOT, ladder, measure, suite, tables

__all__ = ["main"]

PACKAGES = ("nbgrad", "numpy", "numba", "torch")
TOLERANCE = 1e-3               # float32 sums of a million values differ by less than 1e-4
FRESH = ("step",)              # groups whose first call and peak memory are measured by default


class Sides:
    """The processes of one group, started when first needed, and what they answer."""

    def __init__(self, group, threads, limit, stack):
        self.command = ["--group", group, *(["--limit", str(limit)] if limit else [])]
        self.env = measure.threads_environment(threads)
        self.stack, self.workers, self.errors, self.sums = stack, {}, {}, {}

    def _worker(self, library, *more, **env):
        command = [sys.executable, "-m", "bench.worker", library, *self.command, *more]
        return command, {"cwd": ROOT, "env": {**self.env, **env}}

    def seconds(self, side, case):
        """One measurement; None after an error, which is kept to be shown."""
        library = side.split()[0]
        try:
            if library not in self.workers:
                command, options = self._worker(library)
                worker = measure.Worker(command, **options)
                self.workers[library] = self.stack.enter_context(worker)
            answer = self.workers[library](f"{side} | {case.label}")
        except RuntimeError as e:                    # it died; the next case gets a new one
            self.workers.pop(library)
            answer = {"error": str(e)}
        error = answer.get("error") or self._other(side, case, answer["sums"])
        if error:
            self.errors[f"{case.label}, {side}"] = error
            return None
        return answer["seconds"]

    def _other(self, side, case, sums):
        """What is wrong with a side whose results are not those of the first one, if so."""
        first, expected = self.sums.setdefault(case.label, (side, sums))
        if case.random or all(abs(a - b) <= TOLERANCE * abs(b) for a, b in zip(sums, expected)):
            return None
        return f"other results than {first}: not comparable"

    def fresh(self, side, case):
        """Seconds of the first call with nothing compiled, bytes of memory with all of it cached.

        Two processes: compiling needs more memory than most cases.
        """
        library = side.split()[0]
        with tempfile.TemporaryDirectory() as folder:
            command, options = self._worker(library, "--fresh", f"{side} | {case.label}",
                                            NUMBA_CACHE_DIR=folder, TORCHINDUCTOR_CACHE_DIR=folder)
            first, second = (json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True,
                                                       text=True, **options).stdout)
                             for _ in range(2))
        return {"first": first["first"], "peak": second["peak"]}


def measured(case, ask, n, fresh, progress):
    """{side: {"seconds": […], "first": …, "peak": …}} of those sides that work."""
    sides = {side: partial(ask.seconds, side, case) for side in case.sides
             if importlib.util.find_spec(side.split()[0])}
    sides = {side: once for side, once in sides.items() if once() is not None}
    seconds = measure.rounds(sides, n, progress)
    found = {side: {"seconds": s} for side, s in seconds.items() if None not in s}
    for side in found if fresh else ():
        found[side].update(ask.fresh(side, case))
    return found


def run(group, chosen, args, bar):
    """Rows of one group, the machine's ceilings first; an interrupt ends it early."""
    run_of, rows, ceilings = measure.where_and_when(args.threads, PACKAGES), [], {}
    fresh = group in FRESH if args.fresh is None else args.fresh
    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)     # both end it early
        stack.callback(signal.signal, signal.SIGTERM, before)
        ask = Sides(group, args.threads, args.limit, stack)
        try:
            for case in [*suite.MACHINE, *chosen]:
                told = partial(bar.step, f"{group} {case.label}")
                ours = case.group == "machine"
                found = measured(case, ask, args.rounds, fresh and not ours, told)
                if ours:
                    ceilings |= tables.ceiling(case, found)
                rows += tables.rows(case, found, run_of, ceilings)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
            for worker in ask.workers.values():
                worker.process.kill()
    for where, error in ask.errors.items():
        print(f"{group} {where}: {error}", file=sys.stderr)
    return rows, interrupted


class Steps:
    """A progress bar that counts measurements."""

    def __init__(self, bar):
        self.bar, self.done = bar, 0

    def step(self, case, side, i):
        self.done += 1
        self.bar.update(self.done, f"{case}: {side}, round {i + 1}")


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", default=[],
                        help=", ".join((*suite.GROUPS, "overhead")) + " (all but the last)")
    parser.add_argument("--rounds", type=int, default=20, help="of which medians are taken (20)")
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    parser.add_argument("--threads", type=int, default=measure.machine()["cores"],
                        help="of every library (all cores)")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, metavar="FOLDER",
                        help="for GROUP.csv and GROUP-THREADS.png (bench/results)")
    parser.add_argument("--fresh", action=argparse.BooleanOptionalAction,
                        help="first call and peak memory, each in new processes (step only)")
    parser.add_argument("--list", action="store_true", help="print the cases and exit")
    parser.add_argument("--limit", type=int, help="cut every length to that, to try things out")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads: expected at least 1")
    unknown = set(args.groups) - {*suite.GROUPS, "overhead"}
    if unknown:
        parser.error(f"no such group: {', '.join(sorted(unknown))}")
    if args.limit and args.out == measure.RESULTS:
        parser.error("--limit: results of cut cases need their own --out")
    try:
        re.compile(args.only)
    except re.error as e:
        parser.error(f"--only: {args.only!r} is no regular expression: {e}")
    return args


def main(argv=None):
    """Run the chosen groups; 130 if interrupted, with what was measured until then kept."""
    from nbgrad.train.progress import progress

    args = parse(argv)
    groups = args.groups or list(suite.GROUPS)
    chosen = {group: [case for case in suite.table(group, args.limit)
                      if re.search(args.only, f"{group} {case.label}")]
              for group in groups if group != "overhead"}
    if args.list:
        print("\n".join(f"{group} {case.label}" for group in chosen for case in chosen[group]))
        return 0
    chosen = {group: found for group, found in chosen.items() if found}
    total = sum(len(case.sides) for found in chosen.values() for case in [*suite.MACHINE, *found])
    with progress(total * args.rounds) as bar:
        steps = Steps(bar)
        for group, found in chosen.items():
            rows, interrupted = run(group, found, args, steps)
            show(group, rows, args.out)
            if interrupted:
                return 130
    if "overhead" in groups:
        from . import overhead

        overhead.main(["--threads", str(args.threads)])
    return 0


def show(group, rows, folder):
    """Print the table of one group and keep it."""
    if not any(row["group"] == group for row in rows):
        return
    (ladder if group == "ladder" else tables).print_table(rows)
    path = folder / f"{group}.csv"
    measure.replace(path, rows)
    print(os.path.relpath(path))
    if group != "ladder" and importlib.util.find_spec("matplotlib"):
        from .roofline import draw

        threads = rows[0]["threads"]
        picture = folder / f"{group}-{threads}.png"
        if draw([row for row in measure.read(path) if row["threads"] == threads], picture):
            print(os.path.relpath(picture))


if __name__ == "__main__":
    sys.exit(main())
