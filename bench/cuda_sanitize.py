"""compute-sanitizer over small shapes: reads and writes out of bounds, races in shared memory.

Arrays are given memory of their own: in CuPy's pool, an access behind one is inside of another.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from time import monotonic

TOOLS = ("memcheck", "racecheck")
# runs under the sanitizer are some 50 times as long: a small case of each kernel family
PATTERNS = ("(3, 4, 3, 3)", "(3, 40)", "5x7x3", "uneven everything")


def _said(command, seconds):
    """(exit status, output, errors) of a command; None where it is not done in time. Then, or where
    this is interrupted, it is gone and so is whatever it started."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as e:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(e, subprocess.TimeoutExpired):
                return None
            raise
    return process.returncode, out, err


def _run(report, tool, pattern):
    case, left = f"{tool} {pattern}", max(1.0, min(120.0, report.deadline - monotonic()))
    with tempfile.TemporaryDirectory() as folder:
        found = _said([shutil.which("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9",
                       sys.executable, "-m", "bench.cuda", "--only", "verify", "--no-pool",
                       "--case", pattern, "--out", os.path.join(folder, "rows.csv")], left)
    if found is None:
        report.add("sanitize", case, "skipped", note=f"not done within {left:.0f} s")
        return
    status, out, err = found
    said = [line for line in out.splitlines() if "=====" in line]
    assert status == 0, "; ".join(said[:6]) or err[-300:]
    report.add("sanitize", case, note=said[-1].strip("= ") if said else "")


def cases(report, simulate):
    """(name, run)."""
    if shutil.which("compute-sanitizer") is None:
        report.add("sanitize", "compute-sanitizer", "skipped", note="that program is not installed")
        return
    for tool in TOOLS:
        for pattern in PATTERNS:
            yield f"{tool} {pattern}", partial(_run, report, tool, pattern)
