"""``python -m bench.offline``: compile every CUDA kernel for several GPUs, without one.

One line per kernel and compute capability: registers, spills, shared memory, 128-bit accesses.
Exits with 1 where a kernel does not compile or keeps registers in memory.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

COLUMNS = "registers", "spilled", "local", "shared", "wide_loads", "loads", "wide_stores", "stores"


def _all_of(cc, pattern):
    """Reports, or errors as text, of all kernels for one compute capability."""
    from nbgrad.kernels.cuda import offline

    found = []
    for kernel in offline.every_kernel():
        if pattern in kernel.name and cc >= kernel.least:
            try:
                found.append(offline.report(kernel, cc))
            except Exception as e:
                found.append(f"{kernel.name} sm_{cc[0]}{cc[1]}: {type(e).__name__}: {e}")
    return found


def main(argv=None):
    """Print the table; how many kernels are not as they should be."""
    from nbgrad.kernels.cuda import offline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", nargs="*", help="90, 120 …; by default four generations")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("kernels", nargs="?", default="", help="a part of their names")
    args = parser.parse_args(argv)
    ccs = [(int(c[:-1]), int(c[-1])) for c in args.cc or ()] or offline.capabilities()
    bad = 0
    print(f"{'kernel':40s} {'cc':>6s} " + " ".join(f"{c:>11s}" for c in COLUMNS))
    with ProcessPoolExecutor(args.processes) as pool:
        for found in pool.map(partial(_all_of, pattern=args.kernels), ccs):
            for r in found:
                bad += isinstance(r, str) or r.spilled > 0
                print(r if isinstance(r, str) else f"{r.name:40s} {r.cc[0]:>4d}.{r.cc[1]} "
                      + " ".join(f"{getattr(r, c):>11d}" for c in COLUMNS))
    print(f"{bad} of them fail or spill")
    return bad


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
