"""Random arguments to the norm functions: a result or a documented exception, never a crash.

    python -m bench.fuzz                 100,000 calls, some with bounds checks; docs/fuzzing.md
    python -m bench.fuzz --page          write the page from the results that are there
    python -m bench.fuzz --count 2500 --only whiten
                                         as many of these alone, beside the others' results

Calls run in a process of their own, so that a crash is seen as what it is.
"""

import argparse
import inspect
import json
import math
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

import nbgrad
from nbgrad import nn, ops
from nbgrad.backend import half_dtype, is_half
from nbgrad.nn import functional as F
from nbgrad.nn.statistics import step_taken

from . import measure

__all__ = ["FUNCTIONS", "apart", "fuzz", "main", "page"]

PAGE = measure.RESULTS.parent.parent / "docs" / "fuzzing.md"
RESULTS = measure.RESULTS / "fuzz.csv"
FIELDS = ["date", "versions", "bounds", "seed", "function", "results", "exceptions"]
PART = 20_000                        # calls of one process
MEMORY = 8 << 30                     # that a run may take: arrays here have at most 3,125 elements
DOCUMENTED = ValueError, TypeError, RuntimeError, IndexError, FloatingPointError
HALVES = tuple(half_dtype(name) for name in ("float16", "bfloat16"))
DTYPES = tuple(map(np.dtype, (np.float32,) * 6 + (np.float64,) * 2 + (np.int64, np.bool_))) + HALVES
POWERS = 1, 2, 3, 4, 1.5, 2.5, 7, math.inf
NUMBERS = (1e-5, 0.1, 0.0, -1.0, 1.0, float("nan"), float("inf"), 1, 2, -3, 10**9, None, "1", [])


class Draw:
    """Arguments that mostly fit each other, and now and then do not."""

    def __init__(self, rng):
        self.rng = rng
        self.shape = tuple(rng.integers(0, 5, rng.integers(0, 6)).tolist())
        if rng.random() < 0.7:
            self.shape = tuple(rng.integers(1, 6, rng.integers(2, 5)).tolist())
        if self.shape and self.odd(0.15):                    # nothing, or one of something
            at = rng.integers(len(self.shape))
            self.shape = tuple(int(rng.integers(2)) if i == at else n
                               for i, n in enumerate(self.shape))
        self.dtype = self.own = DTYPES[rng.integers(len(DTYPES))]
        if is_half(self.dtype) and self.odd(0.7):            # what parameters then usually are
            self.own = np.dtype(np.float32)

    def odd(self, chance=0.06):
        return self.rng.random() < chance

    def tensor(self, shape, dtype=None):
        if self.odd():
            return (None, 3.0, "x", np.ones(3, np.float32), [1.0])[self.rng.integers(5)]
        if self.odd():
            shape = (*shape, 2) if self.odd(0.5) else shape[1:]
        dtype = self.dtype if dtype is None else dtype
        if self.odd():
            dtype = self.choice(DTYPES)
        with np.errstate(all="ignore"):
            x = (self.rng.standard_normal(shape) * 10.0 ** self.rng.integers(-3, 4)).astype(dtype)
        if x.ndim and self.odd(0.2):
            x = (x[::-1], np.asfortranarray(x), np.repeat(x, 2, -1)[..., ::2],
                 np.broadcast_to(x[:1], x.shape))[self.rng.integers(4)]
        if x.size and x.flags.writeable and x.dtype.kind in "fV" and self.odd():
            with np.errstate(all="ignore"):
                x.reshape(-1)[0] = self.choice((np.nan, np.inf, -np.inf, 1e38))
        t = nbgrad.Tensor(x)
        t.requires_grad = bool(x.dtype.kind in "fV" and self.rng.random() < 0.5)
        return t

    def x(self):
        return self.tensor(self.shape)

    def channels(self):
        return None if self.odd(0.3) else self.tensor(self.shape[1:2], self.own)

    def scale(self, shape):
        """A parameter of another shape than (C,)."""
        return None if self.odd(0.3) else self.tensor(shape, self.own)

    def mask(self):
        """Booleans or weights of positions, in a shape that broadcasts, or an odd one; or None."""
        if self.odd(0.5):
            return None
        N, *S = self.shape[:1] + self.shape[2:] or (1,)
        shape = self.choice(((N, *S), (N,) + (1,) * len(S), (N, 1, *S), (*S,)))
        mask = self.rng.integers(0, 3, shape) * self.choice((0.5, 1, True))
        return self.choice((mask, mask > 0, mask.astype(np.float32) - self.odd(0.1),
                            nbgrad.tensor(mask.astype(np.float32)), self.number(mask)))

    def number(self, usual):
        return self.choice(NUMBERS) if self.odd(0.15) else usual

    def choice(self, of):
        return of[self.rng.integers(len(of))]

    def divisor(self, n):
        return self.choice([k for k in range(1, n + 1) if n % k == 0] or [1])

    def groups(self):
        return self.number(self.divisor(self.shape[1] if len(self.shape) > 1 else 1))

    def flag(self):
        return bool(self.rng.integers(2))


def batch_norm(d):
    return F.batch_norm(d.x(), d.channels(), d.channels(), d.channels(), d.channels(), d.flag(),
                        d.number(0.1), d.number(1e-5),
                        residual=d.x() if d.odd(0.2) else None,
                        activation="relu" if d.odd(0.3) else d.number(None))


def weighted_batch_norm(d):
    workers = nn.InProcess(1).rank(0) if d.odd(0.3) else None
    return ops.weighted_batch_norm(d.x(), d.channels(), d.channels(), d.number(1e-5),
                                   mask=d.mask(), workers=workers)[0]


def moments(d):
    return ops.moments(d.x(), groups=d.groups() if d.odd(0.3) else d.number(None),
                       ghost_size=int(d.rng.integers(1, 5)) if d.odd(0.3) else d.number(None),
                       mask=d.mask())


def layer_norm(d):
    dims = int(d.rng.integers(0, 4))
    own = d.shape[len(d.shape) - dims:]
    return F.layer_norm(d.x(), own if not d.odd() else d.number(own),
                        d.scale(own), d.scale(own), d.number(1e-5))


def rms_norm(d):
    dims = int(d.rng.integers(0, 4))
    own = d.shape[len(d.shape) - dims:]
    return F.rms_norm(d.x(), own if not d.odd() else d.number(own),
                      d.scale(own), d.number(None))


def group_norm(d):
    return F.group_norm(d.x(), d.groups(), d.channels(), d.channels(), d.number(1e-5))


def instance_norm(d):
    return F.instance_norm(d.x(), d.channels(), d.channels(), d.channels(), d.channels(), d.flag(),
                           d.number(0.1), d.number(1e-5))


def local_response_norm(d):
    return F.local_response_norm(d.x(), d.number(int(d.rng.integers(1, 4))), d.number(1e-4),
                                 d.number(0.75), d.number(1.0))


def filter_response_norm(d):
    return ops.filter_response_norm(d.x(), d.channels(), d.channels(), d.channels(),
                                    d.number(1e-6), d.channels() if d.odd(0.3) else None)


def ghost_batch_norm(d):
    return ops.ghost_batch_norm(d.x(), d.number(int(d.rng.integers(1, 5))), d.channels(),
                                d.channels(), d.number(1e-5))[0]


def normalize(d):
    return F.normalize(d.x(), d.number(int(d.rng.integers(1, 4))),
                       d.number(int(d.rng.integers(-2, 3))), d.number(1e-12))


def global_response_norm(d):
    return ops.global_response_norm(d.x(), d.channels(), d.channels(), d.number(1e-6))


def evonorm_s0(d):
    return ops.evonorm_s0(d.x(), d.groups(), d.channels(), d.channels(), d.channels(),
                          d.number(1e-5))


def weight_standardization(d):
    return ops.weight_standardization(d.x(), d.number(1e-5), d.number(int(d.rng.integers(0, 2))))


def lp_deviation(d):
    return ops.lp_deviation(d.x(), d.number(d.choice(POWERS)), d.number(1e-5),
                            centered=d.flag())[1]


def whiten(d):
    return ops.whiten(d.x(), d.groups(), d.number(1e-3))[0]


def evonorm_b0(d):
    std = d.tensor((1, *d.shape[1:2], *[1] * (len(d.shape) - 2)), d.own)
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


BATCH = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GhostBatchNorm, nn.SplitBatchNorm,
         nn.SyncBatchNorm, nn.BatchRenorm, nn.FrozenBatchNorm, nn.NoisyBatchNorm]
RUNNING = [nn.LpBatchNorm, nn.MeanOnlyBatchNorm, nn.DecorrelatedBatchNorm, nn.SwitchableNorm,
           nn.EvoNormB0, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d]
OTHERS = [nn.EvoNormS0, nn.FilterResponseNorm, nn.GlobalResponseNorm, nn.LayerNorm, nn.RMSNorm,
          nn.LocalResponseNorm, nn.GroupNorm]


def _known(kind):
    """The arguments of a layer's constructor, also those that it hands on."""
    return {name for k in kind.__mro__ if "__init__" in vars(k)
            for name in inspect.signature(k.__init__).parameters}


def _settings(d, size):
    """A constructor's arguments: half of them as they are without being named, policies mixed."""
    averages = nn.Exponential(0.5), nn.DebiasedExponential(0.9), nn.Cumulative()
    always = {"ghost_size": int(d.rng.integers(1, 5)), "num_splits": d.choice((2, 2, 3)),
              "p": d.choice(POWERS), "groups": d.divisor(size), "group_size": d.divisor(size),
              "dtype": d.own if d.own.kind in "fV" else np.dtype(np.float32)}
    policies = {"statistics": d.choice(("batch", "running", "frozen", "population", "prediction")),
                "correction": d.choice((0, 1)), "update": d.choice(("forward", "step")),
                "on_nonfinite": d.choice(("propagate", "skip_update", "raise")),
                d.choice(("like", "average", "momentum")): None}
    for name, of in (("like", ("torch", "keras")), ("average", averages), ("momentum", (0.1, 1))):
        if name in policies:
            policies[name] = d.choice(of)
    others = {"affine": d.flag(), "bias": d.flag(), "track_running_stats": d.flag(),
              "centered": d.flag(), "learn_eps": d.flag(), "r_max": 3.0, "d_max": 5.0,
              "workers": nn.InProcess(1).rank(0), "generator": nbgrad.Generator(0),
              "mean_range": 0.5, "alpha": 1e-4}
    if "like" not in policies:
        others["eps"] = 1e-5
    return always, {name: value for name, value in {**policies, **others}.items() if d.odd(0.3)}


def _layer(d, kinds):
    """One to three calls of a layer, the earlier ones in the same step of an optimizer or not."""
    fit = [k for k in kinds if len(d.shape) in getattr(k, "_ndims", (len(d.shape),))]
    kind = d.choice(fit if fit and not d.odd() else kinds)
    size = d.shape[-1 if kind in (nn.LayerNorm, nn.RMSNorm) else 1] if len(d.shape) > 1 else 1
    own = {name: value if name == "dtype" and not d.odd(0.02) else d.number(value)
           for part in _settings(d, size) for name, value in part.items() if name in _known(kind)}
    groups, size = d.groups(), d.number(size)
    size = -3 if size == 10**9 else size             # which is right, and takes 4 GB,
    if own.get("num_splits") == 10**9:               # or all there are
        own["num_splits"] = -3
    layer = kind(*([groups] if kind is nn.GroupNorm else []), size, **own).train(d.flag())
    masked = "mask" in inspect.signature(layer.forward).parameters and d.flag()
    for _ in range(d.rng.integers(0, 3)):
        layer(d.x())
        if d.flag():
            step_taken()
        layer.train(d.flag())
    return layer(d.x(), mask=d.mask()) if masked else layer(d.x())


def batch_layers(d):
    return _layer(d, BATCH)


def running_layers(d):
    return _layer(d, RUNNING)


def other_layers(d):
    return _layer(d, OTHERS)


FUNCTIONS = [batch_norm, weighted_batch_norm, moments, layer_norm, rms_norm, group_norm,
             instance_norm, local_response_norm, filter_response_norm, ghost_batch_norm, normalize,
             global_response_norm, evonorm_s0, weight_standardization, lp_deviation, whiten,
             evonorm_b0, switchable_norm, weight_norm, inverse_sqrt, batch_layers,
             running_layers, other_layers]


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
lengths 0 to 5, float32, float64, float16 and bfloat16 (most with parameters in float32), integers
and booleans; reversed, strided, expanded and read-only memory; NaN, infinities and 1e38; masks and
weights; wrong sizes, wrong types, None, negative and huge numbers. Layers are called one to three
times, in training and evaluation, with every policy: averages, corrections, presets, what
normalizes, when the running statistics move, and what becomes of non-finite values. Every call
gave a result, and its gradient where one was asked for, or one of the exceptions that are
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
            found = in_parts(count, seed, bounds == "yes", args.only)
            for name, (results, errors) in found.items():
                rows.append(dict(zip(FIELDS, (run["date"], run["versions"], bounds, seed, name,
                                              results, errors))))
        measure.write(RESULTS, rows)
    PAGE.write_text(page(measure.read(RESULTS)), encoding="utf-8")
    print(Path(PAGE).name)


if __name__ == "__main__":
    main()
