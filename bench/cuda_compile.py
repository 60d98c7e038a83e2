"""Every kernel as machine code for this device, into the disk cache, by all processors at once: the
parts that follow do not wait for the compiler."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from time import monotonic, time


def _compile(first, step, cc, until):
    """Every ``step``-th kernel from ``first`` on; how many there are in the cache when the time,
    by the clock that processes share, is over, and what failed."""
    from nbgrad.kernels.cuda import offline

    done, failed = 0, []
    for kernel in list(offline.every_kernel())[first::step]:
        if time() > until:
            break
        if cc >= kernel.least:
            try:
                kernel.machine_code(cc)
                done += 1
            except Exception as e:
                failed.append(f"{kernel.name}: {type(e).__name__}: {e}")
    return done, failed


def everything(report, cc, processes):
    """One row: how many kernels are in the cache."""
    until = time() + report.deadline - monotonic()
    # "spawn": a fork of a process that uses the device could not
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        parts = list(pool.map(partial(_compile, step=processes, cc=cc, until=until),
                              range(processes)))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    done, failed = sum(n for n, _ in parts), [e for _, errors in parts for e in errors]
    assert not failed, "; ".join(failed)
    report.add("compile", "kernels", value=done, unit="", note=f"sm_{cc[0]}{cc[1]}, by {processes} "
                                                               "processes")


def cases(report, simulate):
    """(name, what compiles)."""
    from nbgrad.kernels.cuda.memory import xp

    cc = xp.cuda.Device().compute_capability
    processes = max(1, min(16, len(os.sched_getaffinity(0))))
    yield "kernels", partial(everything, report, (int(cc[:-1]), int(cc[-1])), processes)
