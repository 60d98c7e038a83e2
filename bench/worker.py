"""One side of the benchmark: a process that prepares cases and times them when asked.

``python -m bench.worker nbgrad --group norm`` answers each line "side | label of a case" with JSON:
the seconds of one call, as a mean over enough of them, and a few sums over what it returned, for a
side that is fast because it computes something else would be worth nothing.
"""

import argparse
import importlib
import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np

from . import measure, suite

__all__ = ["Timer", "fresh", "main", "sums_of"]

SECONDS = 0.03         # of one measurement: the clock is exact to 1e-5 of that
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Timer:
    """Measures by name. Keeps the calls of one case ready, in each way that was asked for."""

    def __init__(self, module, cases, seconds=SECONDS):
        self.module, self.seconds = module, seconds
        self.cases = {case.label: case for case in cases}
        self.label, self.ready = None, {}

    def __getitem__(self, line):
        side, label = line.split(" | ")
        return partial(self.measure, side.partition(" ")[2], label)

    def measure(self, how, label):
        """{"seconds": per call, "sums": of |outputs| at first}, or {"error": what went wrong}."""
        if label != self.label:
            self.label, self.ready = label, {}
        try:
            return self._measure(how, self.cases[label])
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}".splitlines()[0]}

    def _measure(self, how, case):
        _use_threads(self.module, how)
        if how not in self.ready:
            self.ready[how] = self._prepare(case, how)
        call, calls, sums = self.ready[how]
        return {"seconds": measure.clock(call, calls) / calls, "sums": sums}

    def _prepare(self, case, how):
        call = self.module.build(case, how)
        sums = sums_of(call())                       # compiles
        calls = 1
        while (took := measure.clock(call, calls)) < self.seconds / 2:
            calls *= 2
        return call, max(1, round(calls * self.seconds / took)), sums


def sums_of(result):
    """Σ|x| of each array that a call returned, in order."""
    results = result if isinstance(result, tuple | list) else (result,)
    results = [r for r in results if r is not None]
    arrays = [r.detach().numpy() if hasattr(r, "detach") else np.asarray(r) for r in results]
    return [float(np.abs(a).sum(dtype=float)) for a in arrays]


def _use_threads(module, how):
    if hasattr(module, "set_num_threads"):
        module.set_num_threads(1 if how == "one thread" else int(os.environ["OMP_NUM_THREADS"]))


def _resident(what):
    """Bytes in memory: now (VmRSS) or at most so far (VmHWM)."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {what}")


def peak_memory(build, calls=3):
    """Most memory in use while the call runs, over what there was before it was prepared."""
    if not os.access(FORGET, os.W_OK):               # only a maximum that cannot be started anew
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        measure.clock(build(), calls)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return grown * (1 if sys.platform == "darwin" else 1024)
    before = _resident("VmRSS")
    call = build()
    FORGET.write_text("5")                           # the highest so far is what there is now
    measure.clock(call, calls)
    return _resident("VmHWM") - before


def fresh(module, case, how):
    """What only a new process can tell: seconds of the first call, bytes at most.

    What the library itself takes (its import, and what it loads with its first operation: 56 MB of
    Numba's tables) is not the call's memory, but its seconds are the first call's."""
    start = perf_counter()
    module.small()
    seconds, loaded = [], perf_counter() - start

    def build():
        call = module.build(case, how)
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
        return call
    peak = peak_memory(build)
    return {"first": loaded + seconds[0], "peak": peak}


def main(argv=None):
    """Serve on stdin and stdout, or answer one ``--fresh`` line."""
    parser = argparse.ArgumentParser(prog="python -m bench.worker", description=__doc__)
    parser.add_argument("library", choices=("nbgrad", "torch", "numpy"))
    parser.add_argument("--group", choices=("machine", *suite.GROUPS), required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fresh", metavar="LINE")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is for the process that asks
    module = importlib.import_module(f"bench.on_{args.library}")
    table = [*suite.MACHINE, *suite.table(args.group, args.limit)]
    if args.fresh:
        side, label = args.fresh.split(" | ")
        how = side.partition(" ")[2]
        _use_threads(module, how)
        case = next(case for case in table if case.label == label)
        print(json.dumps(fresh(module, case, how)))
    else:
        measure.serve(Timer(module, table, SECONDS if args.limit is None else 1e-4), sys.stdin,
                      sys.stdout)


if __name__ == "__main__":
    main()
