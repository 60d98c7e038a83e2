"""Write docs/limits.md: what memory allows batch norm, from the newest run of the norms.

    python -m bench.limits             from bench/results/norm.csv
"""

import sys

from . import ROOT, measure, report, tables

__all__ = ["main", "page", "rows_of"]

PAGE = ROOT / "docs" / "limits.md"
LEAST = 8e6                # bytes of an array, below which caches serve it
# {kind: (what must be moved, what two passes move, in arrays)}: read x and write y, or read it
# twice; dy as well; x, r, y and dy, x, the signs of y, dx, dr, or two passes and dr written between
MOVED = {"forward": (2, 3), "backward": (3, 5), "+ add + relu, both ways,": (7.25, 11)}

TEXT = """# What memory allows batch norm

Written by `python -m bench.limits` from `bench/results/norm.csv`: arrays of 8 MB and more.
Statistics need all of a channel before its first result is known, so an array that no cache keeps
is read twice: two passes move 3 arrays forward (x, x, y), 5 backward, 11 where a residual and ReLU
go with them both ways. Nothing can move less than each array once: 2, 3 and 7.25 (of y, only the
signs are needed again).

"of copying" is the rate at which nbgrad's two passes would have moved their arrays, over that of a
copy in the same run: above 100 %, caches kept a part. The last two columns are what "times as fast"
would be if memory were moved at the copy's speed, by two passes or each array once: no kernel whose
arrays come from memory can be faster than the last one says.

"""


def _sizes(row):
    """(bytes once, bytes by two passes) of a case, or None where it is not one of these."""
    for kind, (once, passes) in MOVED.items():
        if row["kind"].removesuffix(" NCHW").removesuffix(" channels-last") == kind:
            size = float(row["bytes"]) / once
            return (size * once, size * passes) if size >= LEAST else None
    return None


def rows_of(rows):
    """Lines of the table: a case, and numbers as text. Cases without PyTorch have none."""
    lines = []
    for own, others in tables.by_case(rows):
        sizes = _sizes(own)
        peers = [float(r["median"]) for r in others.values() if r["side"].startswith("torch")]
        if sizes is None or not peers:
            continue
        time, peer, (once, passes) = float(own["median"]), min(peers), sizes
        bandwidth = float(own["bytes"]) / float(own["bound"])          # of the copy in its run
        lines.append([f"{own['kind']}, {own['case']}", tables.duration(time),
                      f"{100 * passes / bandwidth / time:.0f} %", tables.duration(peer),
                      *(f"{peer / t:.2f}" for t in (time, passes / bandwidth, once / bandwidth))])
    return lines


def page(rows):
    """The page as Markdown."""
    header = ["", "nbgrad", "of copying", "fastest of PyTorch's", "times as fast", "two passes",
              "each array once"]
    table = "".join("| " + " | ".join(line) + " |\n"
                    for line in (header, ["---"] + ["--:"] * 6, *rows_of(rows)))
    first = max(rows, key=lambda row: row["date"])
    return (f"{TEXT}{table}\nMedians of {first['rounds']} interleaved rounds, each library in its "
            f"own process: {first['machine']}, {first['cores']} cores, {first['threads']} threads;"
            f"\n{first['versions']}; {first['date'][:10]}.\n")


def main():
    runs = report.groups_in(measure.RESULTS)["norm"]           # most threads first
    PAGE.write_text(page(next(iter(runs.values()))), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
