"""What a small step costs: ops on a few elements, a training step of a small network, imports.

``python -m bench.overhead`` measures, adds the run to ``results/overhead.csv`` and prints it;
``python -m bench.report`` then writes it into the README.
"""

import argparse
import importlib
import importlib.util
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from . import measure, report

__all__ = ["main"]

SIDES = ("nbgrad", "torch")
PACKAGES = ("nbgrad", "numpy", "numba", "torch")

_IMPORT = "from time import perf_counter\nt = perf_counter()\n{}\nprint(perf_counter() - t)"
IMPORTS = {
    "nbgrad": _IMPORT.format("import nbgrad\nnbgrad.Tensor, nbgrad.nn, nbgrad.optim"),
    "numba": _IMPORT.format("import numba"),
}


# A case is a function of the library, which is nbgrad or torch: the same lines run on both.
def recorded_add(lib):
    """z = x + y, both of 64 float32 elements with requires_grad."""
    x, y = lib.ones(64, requires_grad=True), lib.ones(64, requires_grad=True)
    return lambda: x + y


def square_sum(lib):
    """(x * x).sum() and its gradient, 64 float32 elements."""
    x = lib.ones(64, requires_grad=True)

    def run():
        x.grad = None
        (x * x).sum().backward()
        return x
    return run


def training_step(lib, batch=60):
    """A step of SGD on the MLP of Ioffe & Szegedy 2015, section 4.1."""
    nn, rng = lib.nn, np.random.default_rng(0)
    lib.manual_seed(0)
    layers, width = [], 784
    for _ in range(3):
        layers += [nn.Linear(width, 100), nn.BatchNorm1d(100), nn.Sigmoid()]
        width = 100
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    optimizer = lib.optim.SGD(model.parameters(), lr=0.1)
    x = lib.as_tensor(rng.standard_normal((batch, 784)).astype(np.float32))
    t = lib.as_tensor(rng.integers(0, 10, batch))

    def run():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        return loss
    return run


# {case: (function of the library, threads or None for all)}; at this size a second thread can cost
# more than it brings, so the step is measured with one too
STEP = "training step, 784-100-100-100-10 with batch norm, batch 60"
CASES = {
    "recorded `x + y`, 64 elements": (recorded_add, None),
    "`(x * x).sum()` and backward, 64 elements": (square_sum, None),
    STEP: (training_step, None),
    f"{STEP}, one thread": (training_step, 1),
}


def serve(name, threads):
    """Be one side: answer on stdout with the seconds per call of the case that stdin names."""
    lib = importlib.import_module(name)

    def seconds(call, n):
        lib.set_num_threads(n or threads)
        return measure.seconds_per_call(call)
    measure.serve({case: partial(seconds, build(lib), n) for case, (build, n) in CASES.items()},
                  sys.stdin, sys.stdout)


def import_seconds(code, env):
    """Seconds that a fresh process takes for an import, without the start of Python."""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout)


def sides(names, workers, env):
    """{case: {side: function that measures once}}, ours first."""
    found = {case: {name: partial(workers[name], case) for name in names} for case in CASES}
    found["import with `Tensor`, `nn` and `optim`"] = {
        name: partial(import_seconds, code, env) for name, code in IMPORTS.items()}
    command = [sys.executable, "-m", "nbgrad", "--help"]
    found["`nbgrad --help`, whole process"] = {
        "nbgrad": partial(measure.run_seconds, command, env=env)}
    return found


def run(rounds, threads):
    """{case: {side: seconds of each round}}."""
    names = [name for name in SIDES if importlib.util.find_spec(name)]
    env = measure.threads_environment(threads)
    measured = {}
    with ExitStack() as stack:
        workers = {}
        for name in names:
            command = [sys.executable, "-m", "bench.overhead", "--side", name,
                       "--threads", str(threads)]
            workers[name] = stack.enter_context(measure.Worker(command, env=env))
        for case, both in sides(names, workers, env).items():
            for measure_once in both.values():
                measure_once()                # first use: compile, fill caches of files
            measured[case] = measure.rounds(both, rounds, partial(progress, case, rounds))
    print(file=sys.stderr)
    return measured


def progress(case, n, side, i):
    """One line on stderr, written over."""
    print(f"\r\033[Kround {i + 1}/{n}  {case}: {side}", end="", file=sys.stderr, flush=True)


def main(argv=None):
    """Run all cases, or be one side of them."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=measure.machine()["cores"])
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "overhead.csv")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        return serve(args.side, args.threads)
    rows = measure.result_rows(run(args.rounds, args.threads), threads=args.threads,
                               packages=PACKAGES)
    print(report.render(rows, "overhead"))
    if shaky := measure.unsteady(rows):
        names = "; ".join(f"{row['case']} ({row['side']})" for row in shaky)
        raise SystemExit(f"not kept, the machine was busy: p80 is over 1.5 × p20 in {names}")
    return measure.append(args.out, rows)


if __name__ == "__main__":
    main()
