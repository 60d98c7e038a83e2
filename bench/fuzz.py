"""Random arguments to the norm functions: a result or a documented exception, never a crash.

    python -m bench.fuzz                 100,000 calls, and as many with bounds checks;
                                         docs/fuzzing.md
    python -m bench.fuzz --page          write the page from the results that are there
    python -m bench.fuzz --count 2500 --only whiten
                                         as many of these alone, beside the others' results

Calls run in a process of their own, so that a crash is seen as what it is.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

import nbgrad

from . import draws, measure
from .draws import DOCUMENTED, FUNCTIONS, Draw

__all__ = ["FUNCTIONS", "apart", "fuzz", "main", "page"]

PAGE = measure.RESULTS.parent.parent / "docs" / "fuzzing.md"
RESULTS = measure.RESULTS / "fuzz.csv"
FIELDS = ["date", "versions", "bounds", "seed", "function", "results", "exceptions"]
PART = 20_000                        # calls of one process
LONGEST = 3600                       # seconds of one, 10 where kernels are compiled: none may hang
MEMORY = 8 << 30                     # that a run may take: arrays here have under 20,000 elements
def fuzz(count, seed=0, only=()):
    """How many results and how many documented exceptions there were, by function. Any other
    exception, one that says nothing, and one of a gradient, is raised."""
    rng, found = np.random.default_rng(seed), {}
    functions = [f for f in FUNCTIONS if not only or f.__name__ in only]
    for i in range(count):
        f = functions[i % len(functions)]
        results, errors = found.get(f.__name__, (0, 0))
        try:
            draw = Draw(rng)
            out = f(draw)
        except DOCUMENTED as e:
            if not str(e):
                raise
            found[f.__name__] = results, errors + 1
            continue
        differentiate(draw, out)
        found[f.__name__] = results + 1, errors
    return found


def differentiate(d, out):
    """The gradients of what a call returns, for a dy of any memory; now and then those of these."""
    ys = [y for y in (out if isinstance(out, tuple) else (out,))
          if isinstance(y, nbgrad.Tensor) and y.requires_grad]
    leaves = [t for t in d.leaves if t.requires_grad]
    for y in ys[:1]:
        dy = nbgrad.Tensor(d.memory(d.rng.standard_normal(y.shape).astype(y.dtype)))
        if not leaves or not d.some(0.1):
            y.backward(dy)
            continue
        grads = nbgrad.grad(y, leaves, dy, create_graph=True, allow_unused=True)
        again = [g for g in grads if g is not None and g.requires_grad]
        if again:
            d.choice(again).sum().backward()


def in_parts(count, seed, bounds, only=()):
    """``apart`` as often as makes so many calls, with seeds from 1000 ``seed`` on; the sums."""
    found = {}
    for i, first in enumerate(range(0, count, PART)):
        own = apart(min(PART, count - first), 1000 * seed + i, bounds, only)
        for name, pair in own.items():
            found[name] = [a + b for a, b in zip(pair, found.get(name, (0, 0)))]
    return found


def apart(count, seed, bounds, only=()):
    """``fuzz`` in a process of its own, with or without bounds checks in the kernels."""
    env = {**os.environ, "NUMBA_BOUNDSCHECK": "1" if bounds else "0"}
    done = subprocess.run([sys.executable, "-m", "bench.fuzz", "--run", str(count), str(seed),
                           "--only", *only],
                          capture_output=True, text=True, env=env, check=False,
                          timeout=LONGEST)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode} (negative: a signal)\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def page(rows):
    """docs/fuzzing.md from the rows of the results file."""
    runs = list(dict.fromkeys(row["bounds"] for row in rows))
    counts = {run: {row["function"]: (int(row["results"]), int(row["exceptions"]))
                    for row in rows if row["bounds"] == run} for run in runs}
    header = ["function", *(f"{word}{'' if run == 'no' else ', bounds checked'}" for run in runs
                            for word in ("results", "exceptions"))]
    lines = [[name, *(f"{n:,}" for run in runs for n in counts[run].get(name, (0, 0)))]
             for name in counts[runs[0]]]
    lines.append(["all", *(f"{sum(pair[i] for pair in counts[run].values()):,}" for run in runs
                           for i in (0, 1))])
    table = [header, ["---"] + ["--:"] * (len(header) - 1), *lines]
    return TEXT.format(table="".join("| " + " | ".join(row) + " |\n" for row in table),
                       runs=_runs(rows), sane=draws.SANE, long=draws.LONG - 1)


def _runs(rows):
    """With what each function's calls were made, and when; once where that is the same for all."""
    names = {}
    for row in rows:
        by = names.setdefault(f"{row['versions']}; {row['date'][:10]}", [])
        by += [] if row["function"] in by else [row["function"]]
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(functions)}: {when}" for when, functions in names.items())


TEXT = """# Random arguments to the norms

Written by `python -m bench.fuzz` from `bench/results/fuzz.csv`: every public norm, function and
layer. In {sane:.0%} of the calls all arguments fit each other, so that kernels run; in the others
each of them may be a wrong size, a wrong type, None, a negative or a huge number. Shapes of 0 to 5
dimensions with lengths 0 to 5, and now and then one of up to {long}; float32, float64, float16 and
bfloat16 (most with parameters in float32), integers and booleans; reversed, strided, transposed,
expanded and read-only memory, of gradients too; NaN, infinities and 1e38; masks and weights. Layers
are called one to three times, in training and evaluation, with every policy: averages, corrections,
presets, what normalizes, when the running statistics move, and what becomes of non-finite values.
Every call gave a result, and its gradient where one was asked for (of some of these the second), or
one of the exceptions that are documented, with a message. None ended the process.

{table}
Bounds checked: with `NUMBA_BOUNDSCHECK=1`, kernels check every index into an array; whole vectors
are read and written by address, which nothing checks.

{runs}.
"""


def main(argv=None):
    """Run, keep the counts, write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--bounds", type=int, default=100_000, help="calls with bounds checks")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--only", nargs="*", default=[], choices=[f.__name__ for f in FUNCTIONS],
                        help="these functions; the others' results stay")
    parser.add_argument("--run", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))      # a MemoryError, not the end
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(json.dumps(fuzz(*args.run, args.only)))
        return
    if not args.page:
        run = measure.where_and_when(1, ("nbgrad", "numpy", "numba"))
        rows = [row for row in measure.read(RESULTS) if row["function"] not in args.only
                ] if args.only else []
        for bounds, count, seed in (("no", args.count, 0), ("yes", args.bounds, 1)):
            found = in_parts(count, seed, bounds == "yes", args.only)
            for name, (results, errors) in found.items():
                rows.append(dict(zip(FIELDS, (run["date"], run["versions"], bounds, seed, name,
                                              results, errors))))
        measure.write(RESULTS, rows)
    PAGE.write_text(page(measure.read(RESULTS)), encoding="utf-8")
    print(Path(PAGE).name)


if __name__ == "__main__":
    main()
