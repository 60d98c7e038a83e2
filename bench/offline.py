"""``python -m bench.offline``: compile every CUDA kernel for several GPUs, without one.

One line per kernel and compute capability: registers, spills, shared memory, 128-bit accesses.
Exits with 1 where a kernel does not compile or keeps registers in memory. ``--keep`` puts the lines
into bench/results/offline.csv; ``--page`` writes the tables of docs/cuda.md from that file.
"""

import argparse
import gc
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

from . import ROOT, measure

__all__ = ["HOT", "LIMITS", "PAGE", "RESULTS", "keep", "main", "warps", "write"]

PAGE, RESULTS = ROOT / "docs" / "cuda.md", measure.RESULTS / "offline.csv"
PACKAGES = "nbgrad", "numba", "numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink"
COLUMNS = "registers", "spilled", "local", "shared", "wide_loads", "loads", "wide_stores", "stores"
SHARES = 32                  # of the kernels, among the processes
BLOCK = re.compile(r"<!-- table: (sm_\d+|run) -->\n.*?<!-- end -->", re.S)
# What training spends its time in: the page's rows, by kernels' names.
HOT = {
    "batch norm: statistics": "statistics_f4_4", "normalize": "normalize_f4_4",
    "sums of the backward": "sums_f4_4", "input's gradient": "gradient_f4_4",
    "single read": "single_f4_4", "backward, single read": "single_backward_f4_4",
    "bfloat16: statistics": "statistics_bf_8", "bfloat16: normalize": "normalize_bf_8",
    "bfloat16: sums of the backward": "sums_bf_8", "bfloat16: input's gradient": "gradient_bf_8",
    "bfloat16: single read": "single_bf_8",
    "bfloat16: backward, single read": "single_backward_bf_8",
    "layer norm, a warp a row": "rows_f4_4_32", "a block a row": "rows_f4_4_256",
    "its backward": "rows_backward_f4_4_256", "sums of γ and β": "column_sums_f4_4",
    "bfloat16: a block a row": "rows_bf_8_256",
    "bfloat16: its backward": "rows_backward_bf_8_256",
    "bfloat16: sums of γ and β": "column_sums_bf_8",
    "softmax": "softmax_f4_4_32", "cross entropy": "cross_entropy_f4_4_32",
    "matrix product, float32": "matmul_f4_128_ks_rows", "TF32": "matmul_f4_128_ks_rows_tf32",
    "3×TF32": "matmul_f4_128_ks_rows_3xtf32", "bfloat16": "matmul_u4_128_ks_ks_bf_bf",
    "convolution, float32": "conv_f4_128_11", "weight's gradient": "conv_weight_f4_128_11",
    "convolution, bfloat16": "conv_u4_128_11_bf_bf", "x + y": "add_f4",
    "GELU": "gelu_f4", "Adam": "adam_f4"}
LAYOUTS = {"_columns": "channels-last", "_segments_u4": "channels-first"}
OLDER = "_plain"             # ends the names of products that need no cp.async


class Limits(NamedTuple):
    """What a multiprocessor holds; its registers are 65536."""

    threads: int
    blocks: int
    shared: int              # bytes
    block: int               # bytes of shared memory that one block may use, at most
    own: int                 # bytes of it that the system takes for each block


def _limits(threads, blocks, shared, block, own=1):
    return Limits(threads, blocks, shared << 10, block << 10, own << 10)


# CUDA C++ Programming Guide 13, "Technical Specifications per Compute Capability"
LIMITS = {(7, 5): _limits(1024, 16, 64, 64, 0), (8, 0): _limits(2048, 32, 164, 163),
          (8, 6): _limits(1536, 16, 100, 99), (8, 9): _limits(1536, 24, 100, 99),
          (9, 0): _limits(2048, 32, 228, 227), (10, 0): _limits(2048, 32, 228, 227),
          (12, 0): _limits(1536, 24, 100, 99), (12, 1): _limits(1536, 24, 100, 99)}
REGISTERS, WARP = 1 << 16, 32


def warps(cc, threads, registers, shared):
    """How many warps of blocks that take so much are on a multiprocessor at once, and how many
    there could be; 0 where a block has too much shared memory."""
    at_most = LIMITS[cc]
    of_block, taken = -(-threads // WARP), shared + at_most.own
    per_warp = -(-registers * WARP // 256) * 256               # given in pieces of 256
    by_registers = REGISTERS // max(per_warp, 256) // of_block
    by_shared = at_most.shared // taken if taken else at_most.blocks
    blocks = min(at_most.blocks, at_most.threads // threads, by_registers, by_shared)
    return blocks * of_block * (shared <= at_most.block), at_most.threads // WARP


def _some(first, pattern, ccs):
    """Reports, or errors as text, of every n-th kernel from ``first`` on, for compute capabilities.
    """
    from nbgrad.kernels.cuda import offline

    found = []
    for kernel in islice(offline.every_kernel(), first, None, SHARES):
        if re.search(pattern, kernel.name):
            try:
                found += offline.reports(kernel, ccs)
            except Exception as e:
                found.append(f"{kernel.name} {ccs}: {type(e).__name__}: {e}")
    return found


def _seldom_collects():
    """Numba's front end makes millions of objects, few of them garbage: looking for it at Python's
    own pace is a quarter of its time."""
    gc.set_threshold(100_000, 50, 1000)


def _cc(text):
    """A compute capability that is written without its dot."""
    return int(text[:-1]), int(text[-1])


def keep(reports, least, path=RESULTS):
    """Write reports into the file, in place of older ones of the same kernel and capability.
    ``least``: the capability that each kernel needs; lines of others go, and of lower ones."""
    run = measure.where_and_when(1, PACKAGES)
    run = {k: run[k] for k in ("date", "machine", "versions")}
    rows = [{**run, **r._asdict(), "cc": f"{r.cc[0]}{r.cc[1]}"} for r in reports]
    found = {(row["name"], row["cc"]): row
             for row in [*(measure.read(path) if path.exists() else []), *rows]
             if _cc(row["cc"]) >= least.get(row["name"], (99, 0))}
    measure.write(path, [found[key] for key in sorted(found)])


def hot(name, names):
    """(kernel, its layout) among ``names`` for one of HOT; without copies to shared memory on
    devices that have none."""
    found = [(name + end, layout) for end, layout in {"": "", **LAYOUTS}.items()
             if name + end in names]
    return found or [(name + OLDER, "")] * (name + OLDER in names)


def _line(label, row):
    n = {k: int(row[k]) for k in ("threads", *COLUMNS)}
    there, most = warps(_cc(row["cc"]), n["threads"], n["registers"], n["shared"])
    loads = f"{n['wide_loads']} of {n['loads']}"
    cells = (label, n["threads"], n["registers"], n["spilled"], f"{n['shared'] / 1024:.1f}", loads,
             f"{n['wide_stores']} of {n['stores']}", f"{there} of {most}" if there else "none fits")
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _table(rows, cc):
    """Markdown of the hot kernels on one compute capability."""
    rows = {row["name"]: row for row in rows if row["cc"] == cc}
    text = ("|  | threads | registers | bytes spilled | shared KiB | 128-bit loads | stores "
            "| warps |\n| --- " + "| --: " * 7 + "|\n")
    for label, name in HOT.items():
        for kernel, layout in hot(name, rows):
            where = f", {layout}" if layout else ""
            text += _line(f"{label}{where}", rows[kernel])
    return text


def write(text, rows):
    """The page with every table written anew from the rows of the results file."""
    last = max(rows, key=lambda row: row["date"])
    run = (f"{len({row['name'] for row in rows})} kernels, {len(rows)} times assembled, "
           f"{sum(int(row['spilled']) > 0 for row in rows)} of them with spilled registers: "
           f"{last['machine']}, no GPU; {last['versions']};\n{last['date'][:10]} "
           "(`python -m bench.offline --keep`). Nothing on this page was measured on a GPU.\n")

    def block(match):
        new = run if match[1] == "run" else _table(rows, match[1][3:])
        return f"<!-- table: {match[1]} -->\n{new}<!-- end -->"
    return BLOCK.sub(block, text)


def main(argv=None):
    """Print the table; how many kernels are not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", nargs="*", help="90, 120 …; by default four generations")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="write the lines into the results")
    parser.add_argument("--page", action="store_true", help="only write the page's tables")
    parser.add_argument("kernels", nargs="?", default="", help="a regular expression of names")
    args = parser.parse_args(argv)
    if args.page:
        text = write(PAGE.read_text(encoding="utf-8"), measure.read(RESULTS))
        PAGE.write_text(text, encoding="utf-8")
        return 0
    from nbgrad.kernels.cuda import offline

    ccs, bad, kept = [_cc(c) for c in args.cc or ()] or offline.capabilities(), 0, []
    print(f"{'kernel':40s} {'cc':>6s} " + " ".join(f"{c:>11s}" for c in COLUMNS))
    with ProcessPoolExecutor(args.processes, initializer=_seldom_collects) as pool:
        some = partial(_some, pattern=args.kernels, ccs=ccs)
        for found in pool.map(some, range(SHARES)):
            for r in found:
                bad += isinstance(r, str) or r.spilled > 0
                print(r if isinstance(r, str) else f"{r.name:40s} {r.cc[0]:>4d}.{r.cc[1]} "
                      + " ".join(f"{getattr(r, c):>11d}" for c in COLUMNS))
            kept += [r for r in found if not isinstance(r, str)]
    if args.keep:
        keep(kept, {kernel.name: kernel.least for kernel in offline.every_kernel()})
    print(f"{len(kept)} assembled; {bad} fail or spill")
    return bad


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
