"""``python -m bench.cuda``: is what the CUDA kernels compute right, and how fast are they?

Parts: compile (every kernel, by all processors), verify (each function against the reference),
gradcheck, train (loss curves beside the CPU's), measure (times by device events, beside PyTorch's
where it has CUDA), sanitize (compute-sanitizer on small shapes). Each row goes to a CSV file when
it is known, so the command may be stopped at any time; a file that is there already is left as it
is, and the rows go to the next number (cuda.csv, cuda-2.csv …). Each part has its share of the time
that is left, and what is at work when the time has been over for SPARE seconds is stopped. At the
end come what was asked for beside what was found (cuda_targets.py), and
failures, which set the exit status and hide no later part. Without a GPU it exits with 2;
``--simulate`` runs verify, gradcheck and train in the simulator at tiny sizes, for which
NUMBA_ENABLE_CUDASIM=1 and NUMBA_DISABLE_JIT=1 must be set.
"""

import argparse
import csv
import importlib
import signal
import sys
import traceback
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from time import monotonic

from . import cuda_targets, measure

# and how the time is shared
PARTS = {"compile": 3.0, "verify": 3.0, "gradcheck": 1.0, "train": 1.5, "measure": 5.0,
         "sanitize": 1.5}
SPARE = 20                   # seconds, for a case that began before the time was over
FIELDS = ["date", "device", "driver", "versions", "part", "case", "status", "value", "unit",
          "of_copy", "of_torch", "note"]
PACKAGES = ("nbgrad", "numpy", "numba", "numba-cuda", "cupy-cuda13x", "cupy-cuda12x", "torch")


def created(path):
    """A new file for rows: of this name, or of the next number that is free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = (path if n == 1 else path.with_stem(f"{path.stem}-{n}") for n in count(1))
    own = next(name for name in names if not name.exists())
    with own.open("x", newline="", encoding="utf-8") as f:
        csv.DictWriter(f, FIELDS, lineterminator="\n").writeheader()
    return own


class Report:
    """Rows of one run: written when they come, and what of them failed. ``deadline`` is that of
    the part at hand; ``pooled``: arrays of ``verify`` are in CuPy's pool."""

    def __init__(self, path, about, deadline):
        self.path, self.about, self.deadline, self.rows = created(Path(path)), about, deadline, []
        self.end, self.pooled = deadline, True

    def share(self, parts):
        """Give the first of the parts that are left its share of the time."""
        now, weights = monotonic(), [PARTS[part] for part in parts]
        self.deadline = now + (self.end - now) * weights[0] / sum(weights)

    def add(self, part, case, status="ok", value="", unit="", **more):
        """One finding: on the screen, in the file."""
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        row = {**dict.fromkeys(FIELDS, ""), **self.about, "part": part, "case": case,
               "status": status, "value": text, "unit": unit,
               **{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in more.items()}}
        self.rows.append(row)
        with self.path.open("a", newline="", encoding="utf-8") as f:
            csv.DictWriter(f, FIELDS, lineterminator="\n").writerow(row)
        share = f"{100 * float(row['of_copy']):5.0f} %" if row["of_copy"] else ""
        ratio = f"{row['of_torch']:>6s} x" if row["of_torch"] else ""
        print(f"{part:9s} {status:7s} {case:52s} {text:>10s} {unit:5s} {share:>7s} {ratio:>8s} "
              f"{row['note']}".rstrip(), flush=True)

    def attempt(self, part, case, f):
        """``f()``, which adds its row; what it raises is a failure of that case alone."""
        if monotonic() > self.deadline:
            self.add(part, case, "skipped", note="out of time")
            return
        try:
            f()
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            said = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            self.add(part, case, "failed", note=f"{said} ({Path(where.filename).name}:"
                                                f"{where.lineno})")

    def failures(self):
        """Rows of what went wrong."""
        return [row for row in self.rows if row["status"] == "failed"]


def about():
    """What the rows have in common: date, device, driver, versions."""
    from nbgrad.kernels.cuda.memory import SIMULATED, xp

    found = measure.where_and_when(1, PACKAGES)
    found = {"date": found["date"], "versions": found["versions"]}
    if SIMULATED:
        return {**found, "device": "simulator", "driver": ""}
    runtime = xp.cuda.runtime
    name = runtime.getDeviceProperties(runtime.getDevice())["name"]
    return {**found, "device": name.decode() if isinstance(name, bytes) else str(name),
            "driver": f"CUDA {runtime.driverGetVersion()}"}


def missing(simulate):
    """Why nothing can be run here; "" if it can."""
    from numba import config

    if simulate and not config.ENABLE_CUDASIM:
        return "--simulate needs NUMBA_ENABLE_CUDASIM=1 and NUMBA_DISABLE_JIT=1"
    try:
        importlib.import_module("nbgrad").backend.checked_device("cuda")
    except RuntimeError as e:
        return str(e)
    return "" if simulate or not config.ENABLE_CUDASIM else "in the simulator: add --simulate"


def arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--case", default="", help="cases whose names contain this")
    parser.add_argument("--seconds", type=float, default=450, help="for all parts (450)")
    parser.add_argument("--out", default=measure.RESULTS / "cuda.csv", type=Path)
    parser.add_argument("--no-pool", action="store_true",
                        help="verify: each array in memory of its own, as for compute-sanitizer")
    parser.add_argument("--simulate", action="store_true", help="tiny sizes in the simulator")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if wrong := set(args.only) - set(PARTS):
        parser.error(f"--only: no part called {', '.join(sorted(wrong))}; there are "
                     f"{', '.join(PARTS)}")
    if args.simulate:
        args.only = [p for p in args.only if p in ("verify", "gradcheck", "train")]
    return args


def main(argv=None):
    """Run the parts; 0, 1 where something failed, 2 where nothing could run."""
    args = arguments(argv)
    if problem := missing(args.simulate):
        print(f"bench.cuda: {problem}")
        return 2
    report = Report(args.out, about(), monotonic() + args.seconds)
    report.pooled = not args.no_pool
    try:
        with stopping(args.seconds + SPARE):
            for i, part in enumerate(args.only):
                report.share(args.only[i:])
                run(report, part, args)
    except KeyboardInterrupt as e:
        print(str(e) or "stopped")
    return conclude(report)


@contextmanager
def stopping(seconds):
    """SIGTERM, and the end of the time, stop what is at work in the block as Ctrl-C does."""
    def over(number, frame):
        raise KeyboardInterrupt("stopped: out of time")
    before = [(number, signal.signal(number, handler)) for number, handler in (
        (signal.SIGTERM, signal.default_int_handler), (signal.SIGALRM, over))]
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before:
            signal.signal(number, handler)


def run(report, part, args):
    """The cases of a part whose names are asked for."""
    module = importlib.import_module(f"{__package__}.cuda_{part}")
    try:
        for case, f in module.cases(report, args.simulate):
            if args.case in case:
                report.attempt(part, case, f)
    except Exception as e:
        report.add(part, "its cases", "failed", note=f"{type(e).__name__}: {e}")


def conclude(report):
    """Print targets and failures; the exit status."""
    if any(row["part"] == "measure" for row in report.rows):
        print(cuda_targets.table(report.rows))
    failed = report.failures()
    print(f"{len(report.rows)} rows in {report.path}; {len(failed)} failed")
    for row in failed:
        print(f"  {row['part']} {row['case']}: {row['note']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
