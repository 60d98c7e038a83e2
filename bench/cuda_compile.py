"""Every kernel as machine code for this device, into the disk cache, by all processors at once: the
parts that follow do not wait for the compiler."""

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from time import monotonic, time
from unittest.mock import patch

import numpy as np

from . import cuda_verify

SHARE = 8                    # kernels that a process takes at a time


def _compile(recipes, cc, until):
    """The kernels of some recipes; how many of them are in the cache when the time, by the clock
    that processes share, is over, and what failed."""
    done, failed = 0, []
    for module, make, args, settings in recipes:
        if time() > until:
            break
        kernel = getattr(importlib.import_module(module), make)(*args, **settings)
        if cc >= kernel.least:
            try:
                kernel.machine_code(cc)
                done += 1
            except Exception as e:
                failed.append(f"{kernel.name}: {type(e).__name__}: {e}")
    return done, failed


def _empty(x):
    """Arrays as ``cuda_verify.moved`` makes them, without their values."""
    from nbgrad.kernels.cuda.memory import empty_like

    if isinstance(x, list):
        return [_empty(a) for a in x]
    return empty_like(x) if isinstance(x, np.ndarray) else x


def rehearsed(until):
    """By name the kernels that the cases of ``verify`` launch: these run on memory without values,
    and the kernels do nothing."""
    from nbgrad.kernels import cuda
    from nbgrad.kernels.cuda.launch import Kernel

    found = {}

    def noted(self, blocks, *args):
        found[self.name] = self
    with patch.object(Kernel, "__call__", noted), patch.object(
            cuda_verify, "drawn", lambda dtype, *shape, seed=0: np.empty(
                shape, cuda_verify.named(dtype))), np.errstate(all="ignore"):
        for _, call, inputs, dtype in cuda_verify.calls(False):
            if time() > until:
                break
            try:
                call(cuda_verify.kernels_for(cuda, dtype), *map(_empty, inputs))
            except Exception:    # from here on values matter: what is launched then compiles then
                continue
    return found


def everything(report, cc, processes):
    """One row: how many kernels are in the cache. While those of ``every_kernel`` are made, this
    process looks for others that ``verify`` will need."""
    from nbgrad.kernels.cuda import offline

    until = time() + report.deadline - monotonic()
    # "spawn": a fork of a process that uses the device could not
    pool, parts = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")), []

    def give(kernels):
        """Let the processes make kernels."""
        recipes = [kernel.recipe for kernel in kernels]
        parts.extend(pool.submit(_compile, recipes[i:i + SHARE], cc, until)
                     for i in range(0, len(recipes), SHARE))
    try:
        every = {kernel.name: kernel for kernel in offline.every_kernel()}
        give([kernel for kernel in every.values() if kernel.together])
        for part in parts:       # how many blocks of them fit, the rehearsal asks of the device
            part.result()
        give([kernel for kernel in every.values() if not kernel.together])
        more = rehearsed(until)
        give([kernel for name, kernel in more.items() if name not in every])
        found = [part.result() for part in parts]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    done, failed = sum(n for n, _ in found), [e for _, errors in found for e in errors]
    assert not failed, "; ".join(failed)
    report.add("compile", "kernels", value=done, unit="", note=f"of {len({*every, *more})}, "
               f"sm_{cc[0]}{cc[1]}, by {processes} processes")


def cases(report, simulate):
    """(name, what compiles)."""
    from nbgrad.kernels.cuda.memory import xp

    cc = xp.cuda.Device().compute_capability
    processes = max(1, min(16, len(os.sched_getaffinity(0))))
    yield "kernels", partial(everything, report, (int(cc[:-1]), int(cc[-1])), processes)
