"""Compare two sides: each in a process of its own, in interleaved rounds, by their medians.

A machine drifts (clock, neighbours), so sides take turns within every round and the one that starts
changes from round to round; the medians over rounds are compared, never single runs.
"""

import csv
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from datetime import datetime
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import NamedTuple

__all__ = ["FIELDS", "RESULTS", "Worker", "append", "clock", "machine", "read", "replace",
           "result_rows", "rounds", "run_seconds", "seconds_per_call", "serve", "settle",
           "summary", "threads_environment", "unsteady", "versions", "where_and_when"]

RESULTS = Path(__file__).resolve().parent / "results"
# median, p20 and p80 are seconds
FIELDS = ["date", "machine", "cores", "threads", "versions", "rounds", "case", "side", "median",
          "p20", "p80"]


class Summary(NamedTuple):
    """Quantiles of a list of seconds, linear between its values."""

    median: float
    p20: float
    p80: float


def summary(seconds):
    """Median, 20th and 80th percentile of at least one number."""
    if len(seconds) == 1:
        return Summary(*seconds * 3)
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Summary(statistics.median(seconds), p20, p80)


def seconds_per_call(f, seconds=0.2, chunks=5):
    """Median over ``chunks`` runs that last ``seconds`` together, after as long a warm-up.

    The number of calls in a run is doubled until one run is long enough: that is the warm-up.
    """
    calls = 1
    while clock(f, calls) < seconds / chunks:
        calls *= 2
    return statistics.median(clock(f, calls) / calls for _ in range(chunks))


def clock(f, calls):
    start = perf_counter()
    for _ in range(calls):
        f()
    return perf_counter() - start


def rounds(sides, n, progress=None):
    """{name: n measurements}, from {name: function that measures once}, taking turns."""
    found = {name: [] for name in sides}
    for i in range(n):
        for name in sides if i % 2 == 0 else reversed(sides):
            found[name].append(sides[name]())
            if progress:
                progress(name, i)
    return found


class Worker:
    """A warm process that answers a line naming a case with a line of JSON; see ``serve``."""

    def __init__(self, command, **options):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, **options)

    def __call__(self, case):
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{case}: the process ended with status {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is not None:
            self.process.kill()
        self.process.communicate()


def serve(cases, lines, out):
    """The worker's side: {name: function that measures}; call the one that each line names."""
    for line in lines:
        answer = json.dumps(cases[line.strip()]())
        settle()
        print(answer, file=out, flush=True)


def settle(window=0.012, longest=0.3):
    """Wait until this process is idle: only then is it the other's turn.

    Threads that have nothing to do spin before they sleep, and on two cores a spinning pool takes
    half of the machine from the next side: OpenMP's (nbgrad's and torch's) spin for 8 ms,
    OpenBLAS's for as long as ``measure.threads_environment`` lets them. Waiting leaves OpenMP its
    default, which is what users run. The clock of other threads moves every 4 ms.
    """
    end = perf_counter() + longest
    while perf_counter() < end:
        before = process_time()
        sleep(window)
        if process_time() - before < 1e-3:
            return


def run_seconds(command, **options):
    """Seconds from starting a command to its end."""
    start = perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return perf_counter() - start


def threads_environment(n):
    """This environment with every library of threads told to use n."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    env = {**os.environ, **dict.fromkeys(names, str(n))}
    env["OPENBLAS_THREAD_TIMEOUT"] = "24"          # spin for 2^24 cycles (7 ms), not for 107 ms
    env.pop("PYTHONDONTWRITEBYTECODE", None)       # an import would compile every source again
    return env


def machine():
    """Name of the CPU, with its generation as LLVM calls it (servers may say "AMD EPYC" only), and
    the number of cores that this process may use."""
    from llvmlite import binding

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines()
                 if line.startswith("model name")]
        name = found[0] if found else name
    affinity = getattr(os, "sched_getaffinity", None)
    return {"machine": f"{name} ({binding.get_host_cpu_name()})",
            "cores": len(affinity(0)) if affinity else os.cpu_count()}


def versions(*packages):
    """One line: Python and those of the packages that are installed."""
    found = [f"python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def where_and_when(threads, packages):
    """What the rows of one run have in common."""
    return {"date": datetime.now().astimezone().isoformat(timespec="seconds"), **machine(),
            "threads": threads, "versions": versions(*packages)}


def result_rows(measured, *, threads, packages):
    """One run as rows of a CSV file, from {case: {side: seconds of each round}}."""
    run = where_and_when(threads, packages)
    rows = []
    for case, sides in measured.items():
        for side, seconds in sides.items():
            numbers = {k: f"{v:.4g}" for k, v in summary(seconds)._asdict().items()}
            row = {**run, "rounds": len(seconds), "case": case, "side": side, **numbers}
            rows.append({k: str(v) for k, v in row.items()})
    return rows


def unsteady(rows, limit=1.5):
    """The rows whose 80th percentile is over ``limit`` times the 20th: something else was running.

    Idle OpenMP threads spin; beside one busy process a step of 0.8 ms was seen to take 390 ms.
    """
    return [row for row in rows if float(row["p80"]) > limit * float(row["p20"])]


def append(path, rows):
    """Add rows to a CSV file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path):
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def replace(path, rows):
    """Write rows to a CSV file in place of those of the same machine, threads and case.

    A file holds the newest measurement of everything; the history is version control's.
    """
    found = {}
    for source in (read(path) if path.exists() else [], rows):
        cases = {}
        for row in source:
            key = tuple(row[k] for k in ("machine", "threads", "kind", "case"))
            cases.setdefault(key, []).append(row)
        found |= cases
    write(path, [row for case in found.values() for row in case])


def write(path, rows):
    """A new CSV file of dicts with the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
