"""Random arguments to the norm functions: a result or a documented exception, never a crash.

    python -m bench.fuzz                 100,000 calls, some with bounds checks; docs/fuzzing.md
    python -m bench.fuzz --page          write the page from the results that are there
    python -m bench.fuzz --count 2500 --only whiten layers
                                         as many of these alone, beside the others' results

Calls run in a process of their own, so that a crash is seen as what it is.
"""

import argparse
import inspect
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

import nbgrad
from nbgrad import nn, ops
from nbgrad.nn import functional as F

from . import measure

__all__ = ["FUNCTIONS", "apart", "fuzz", "main", "page"]

PAGE = measure.RESULTS.parent.parent / "docs" / "fuzzing.md"
RESULTS = measure.RESULTS / "fuzz.csv"
FIELDS = ["date", "versions", "bounds", "seed", "function", "results", "exceptions"]
MEMORY = 8 << 30                     # that a run may take: arrays here have at most 3,125 elements
DOCUMENTED = ValueError, TypeError, RuntimeError, IndexError
DTYPES = (np.float32,) * 4 + (np.float64, np.int64, np.bool_)
NUMBERS = (1e-5, 0.1, 0.0, -1.0, 1.0, float("nan"), float("inf"), 1, 2, -3, 10**9, None, "1", [])


class Draw:
    """Arguments that mostly fit each other, and now and then do not."""

    def __init__(self, rng):
        self.rng = rng
        self.shape = tuple(rng.integers(0, 5, rng.integers(0, 6)).tolist())
        if rng.random() < 0.7:
            self.shape = tuple(rng.integers(1, 6, rng.integers(2, 5)).tolist())
        self.dtype = DTYPES[rng.integers(len(DTYPES))]

    def odd(self, chance=0.06):
        return self.rng.random() < chance

    def tensor(self, shape):
        if self.odd():
            return (None, 3.0, "x", np.ones(3, np.float32), [1.0])[self.rng.integers(5)]
        if self.odd():
            shape = (*shape, 2) if self.odd(0.5) else shape[1:]
        dtype = DTYPES[self.rng.integers(len(DTYPES))] if self.odd() else self.dtype
        with np.errstate(all="ignore"):
            x = (self.rng.standard_normal(shape) * 10.0 ** self.rng.integers(-3, 4)).astype(dtype)
        if x.ndim and self.odd(0.2):
            x = (x[::-1], np.asfortranarray(x), np.repeat(x, 2, -1)[..., ::2],
                 np.broadcast_to(x[:1], x.shape))[self.rng.integers(4)]
        if x.size and x.flags.writeable and x.dtype.kind == "f" and self.odd():
            x.reshape(-1)[0] = (np.nan, np.inf, -np.inf, 1e38)[self.rng.integers(4)]
        t = nbgrad.Tensor(x)
        t.requires_grad = bool(x.dtype.kind == "f" and self.rng.random() < 0.5)
        return t

    def x(self):
        return self.tensor(self.shape)

    def channels(self):
        return None if self.odd(0.3) else self.tensor(self.shape[1:2])

    def number(self, usual):
        return NUMBERS[self.rng.integers(len(NUMBERS))] if self.odd(0.15) else usual

    def flag(self):
        return bool(self.rng.integers(2))


def batch_norm(d):
    return F.batch_norm(d.x(), d.channels(), d.channels(), d.channels(), d.channels(), d.flag(),
                        d.number(0.1), d.number(1e-5),
                        residual=d.x() if d.odd(0.2) else None,
                        activation="relu" if d.odd(0.3) else d.number(None))


def weighted_batch_norm(d):
    mask = d.tensor(d.shape[:1] + d.shape[2:]) if d.flag() else None
    if isinstance(mask, nbgrad.Tensor) and d.flag():
        mask = abs(mask.data)
    return ops.weighted_batch_norm(d.x(), d.channels(), d.channels(), d.number(1e-5), mask=mask)[0]


def moments(d):
    return ops.moments(d.x(), groups=d.number(None), ghost_size=d.number(None))


def layer_norm(d):
    dims = int(d.rng.integers(0, 4))
    own = d.shape[len(d.shape) - dims:]
    return F.layer_norm(d.x(), own if not d.odd() else d.number(own),
                        None if d.odd(0.3) else d.tensor(own),
                        None if d.odd(0.3) else d.tensor(own), d.number(1e-5))


def rms_norm(d):
    dims = int(d.rng.integers(0, 4))
    own = d.shape[len(d.shape) - dims:]
    return F.rms_norm(d.x(), own if not d.odd() else d.number(own),
                      None if d.odd(0.3) else d.tensor(own), d.number(None))


def group_norm(d):
    C = d.shape[1] if len(d.shape) > 1 else 1
    groups = [n for n in range(1, C + 1) if C % n == 0] or [1]
    return F.group_norm(d.x(), d.number(int(d.rng.choice(groups))), d.channels(), d.channels(),
                        d.number(1e-5))


def instance_norm(d):
    return F.instance_norm(d.x(), d.channels(), d.channels(), d.channels(), d.channels(), d.flag(),
                           d.number(0.1), d.number(1e-5))


def local_response_norm(d):
    return F.local_response_norm(d.x(), d.number(int(d.rng.integers(1, 4))), d.number(1e-4),
                                 d.number(0.75), d.number(1.0))


def filter_response_norm(d):
    return ops.filter_response_norm(d.x(), d.channels(), d.channels(), d.channels(),
                                    d.number(1e-6))


def ghost_batch_norm(d):
    return ops.ghost_batch_norm(d.x(), d.number(int(d.rng.integers(1, 5))), d.channels(),
                                d.channels(), d.number(1e-5))[0]


def normalize(d):
    return F.normalize(d.x(), d.number(int(d.rng.integers(1, 4))),
                       d.number(int(d.rng.integers(-2, 3))), d.number(1e-12))


def global_response_norm(d):
    return ops.global_response_norm(d.x(), d.channels(), d.channels(), d.number(1e-6))


def evonorm_s0(d):
    C = d.shape[1] if len(d.shape) > 1 else 1
    groups = [n for n in range(1, C + 1) if C % n == 0] or [1]
    return ops.evonorm_s0(d.x(), d.number(int(d.rng.choice(groups))), d.channels(), d.channels(),
                          d.channels(), d.number(1e-5))


def weight_standardization(d):
    return ops.weight_standardization(d.x(), d.number(1e-5), d.number(int(d.rng.integers(0, 2))))


def lp_deviation(d):
    return ops.lp_deviation(d.x(), d.number(int(d.rng.integers(1, 4))), d.number(1e-5))[1]


def whiten(d):
    return ops.whiten(d.x(), d.number(1), d.number(1e-3))[0]


def evonorm_b0(d):
    std = d.tensor((1, *d.shape[1:2], *[1] * (len(d.shape) - 2)))
    return ops.evonorm_b0(d.x(), d.channels(), d.channels(), d.channels(), std, d.number(1e-5))


def switchable_norm(d):
    return ops.switchable_norm(d.x(), d.tensor((3,)), d.tensor((3,)), d.channels(), d.channels(),
                               d.number(1e-5))[0]


def weight_norm(d):
    dim = int(d.rng.integers(0, 3))
    g = tuple(n if i == dim else 1 for i, n in enumerate(d.shape))
    return ops.weight_norm(d.x(), d.tensor(g), d.number(dim))


def inverse_sqrt(d):
    n = int(d.rng.integers(0, 5))
    a = d.tensor((n, n))
    if isinstance(a, nbgrad.Tensor) and a.shape == (n, n) and not d.odd():
        a = a @ a.T
    return ops.inverse_sqrt(a)


LAYERS = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GhostBatchNorm, nn.SplitBatchNorm,
          nn.SyncBatchNorm, nn.BatchRenorm, nn.FrozenBatchNorm, nn.NoisyBatchNorm, nn.LpBatchNorm,
          nn.MeanOnlyBatchNorm, nn.DecorrelatedBatchNorm, nn.SwitchableNorm, nn.EvoNormB0,
          nn.EvoNormS0, nn.FilterResponseNorm, nn.GlobalResponseNorm, nn.LayerNorm, nn.RMSNorm,
          nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm]


def layers(d):
    kind = LAYERS[d.rng.integers(len(LAYERS))]
    at = -1 if kind in (nn.LayerNorm, nn.RMSNorm) else 1
    size = d.shape[at] if len(d.shape) > 1 else 1
    usual = {"eps": 1e-5, "momentum": 0.1, "affine": d.flag(), "track_running_stats": d.flag(),
             "ghost_size": 2, "num_splits": 2, "p": 2, "groups": 1, "group_size": 1, "r_max": 3.0,
             "d_max": 5.0, "correction": 0, "statistics": "batch", "like": None, "workers": None,
             "average": None, "generator": None, "mean_range": 0.5, "alpha": 1e-4}
    known = inspect.signature(kind).parameters
    own = {name: d.number(value) for name, value in usual.items()
           if name in known and (not d.odd(0.5) or name in ("groups", "group_size"))}
    size = d.number(size)
    size = -3 if size == 10**9 else size             # which is right, and takes 4 GB
    return kind(size, **own).train(d.flag())(d.x())


FUNCTIONS = [batch_norm, weighted_batch_norm, moments, layer_norm, rms_norm, group_norm,
             instance_norm, local_response_norm, filter_response_norm, ghost_batch_norm, normalize,
             global_response_norm, evonorm_s0, weight_standardization, lp_deviation, whiten,
             evonorm_b0, switchable_norm, weight_norm, inverse_sqrt, layers]


def fuzz(count, seed=0, only=()):
    """How many results and how many documented exceptions there were, by function. Any other
    exception, and one that says nothing, is raised."""
    rng, found = np.random.default_rng(seed), {}
    functions = [f for f in FUNCTIONS if not only or f.__name__ in only]
    for i in range(count):
        f = functions[i % len(functions)]
        results, errors = found.get(f.__name__, (0, 0))
        try:
            y = f(Draw(rng))
            if isinstance(y, nbgrad.Tensor) and y.requires_grad:
                y.sum().backward()
            found[f.__name__] = results + 1, errors
        except DOCUMENTED as e:
            if not str(e):
                raise
            found[f.__name__] = results, errors + 1
    return found


def apart(count, seed, bounds, only=()):
    """``fuzz`` in a process of its own, with or without bounds checks in the kernels."""
    env = {**os.environ, "NUMBA_BOUNDSCHECK": "1" if bounds else "0"}
    done = subprocess.run([sys.executable, "-m", "bench.fuzz", "--run", str(count), str(seed),
                           "--only", *only],
                          capture_output=True, text=True, env=env, check=False)
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
                       runs=_runs(rows))


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

Written by `python -m bench.fuzz` from `bench/results/fuzz.csv`. Shapes of 0 to 5 dimensions with
lengths 0 to 5, float32, float64, integers and booleans; reversed, strided, expanded and read-only
memory; NaN, infinities and 1e38; wrong sizes, wrong types, None, negative and huge numbers. Every
call gave a result, and its gradient where one was asked for, or one of the exceptions that are
documented, with a message. None ended the process.

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
    parser.add_argument("--bounds", type=int, default=20_000, help="calls with bounds checks")
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
            found = apart(count, seed, bounds == "yes", args.only)
            for name, (results, errors) in found.items():
                rows.append(dict(zip(FIELDS, (run["date"], run["versions"], bounds, seed, name,
                                              results, errors))))
        measure.write(RESULTS, rows)
    PAGE.write_text(page(measure.read(RESULTS)), encoding="utf-8")
    print(Path(PAGE).name)


if __name__ == "__main__":
    main()
