"""compute-sanitizer over small shapes: reads and writes out of bounds, races in shared memory."""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from time import monotonic

TOOLS = ("memcheck", "racecheck")
# runs under the sanitizer are some 50 times as long: a small case of each kernel family
PATTERNS = ("(3, 4, 3, 3)", "(3, 40)", "5x7x3", "uneven everything")


def _run(report, tool, pattern):
    case = f"{tool} {pattern}"
    with tempfile.TemporaryDirectory() as folder:
        command = [shutil.which("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9",
                   sys.executable, "-m", "bench.cuda", "--only", "verify", "--case", pattern,
                   "--out", os.path.join(folder, "rows.csv")]
        left = max(1.0, min(120.0, report.deadline - monotonic()))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=left,
                                  check=False)
        except subprocess.TimeoutExpired:
            report.add("sanitize", case, "skipped", note=f"not done within {left:.0f} s")
            return
    said = [line for line in done.stdout.splitlines() if "=====" in line]
    assert done.returncode == 0, "; ".join(said[:6]) or done.stderr[-300:]
    report.add("sanitize", case, note=said[-1].strip("= ") if said else "")


def cases(report, simulate):
    """(name, run)."""
    if shutil.which("compute-sanitizer") is None:
        report.add("sanitize", "compute-sanitizer", "skipped", note="that program is not installed")
        return
    for tool in TOOLS:
        for pattern in PATTERNS:
            yield f"{tool} {pattern}", partial(_run, report, tool, pattern)
