"""From measurements to rows of a file, and from rows to tables: rates, ceilings, ratios."""

import importlib.util
from math import exp, log

from . import measure

__all__ = ["BEST", "COMPOSED", "FIELDS", "by_case", "ceiling", "details", "duration", "first_call",
           "geometric_mean", "megabytes",
           "percent", "print_table", "rate", "ratio", "ratios", "rows", "summary"]

# median, p20, p80 and first are seconds, peak is bytes; bound is the least number of seconds that
# the ceilings measured in the same run allow, and unit that of the ceiling which says so
FIELDS = ["date", "machine", "cores", "threads", "versions", "rounds", "group", "kind", "case",
          "side", "median", "p20", "p80", "flops", "bytes", "unit", "bound", "first", "peak"]
BEST, COMPOSED = "the best of them", "nbgrad composed"      # of elementary ops: no peer


def ceiling(case, found):
    """{"copy" or dtype: bytes or operations per second} of one of the machine's cases."""
    (numbers,) = found.values()
    key = "copy" if case.bytes else case.dtype
    return {key: (case.bytes or case.flops) / measure.summary(numbers["seconds"]).median}


def _bound(case, ceilings):
    """Unit and seconds of the ceiling that is reached first."""
    if case.group == "machine" or not (case.flops or case.bytes):
        return ("GB/s" if case.bytes else "GFLOP/s" if case.flops else ""), ""
    seconds = {"GFLOP/s": case.flops / ceilings[case.dtype],
               "GB/s": case.bytes / ceilings["copy"]}
    unit = max(seconds, key=seconds.get)
    return unit, f"{seconds[unit]:.4g}"


def rows(case, found, run_of, ceilings):
    """One case as rows of a CSV file."""
    unit, bound = _bound(case, ceilings)
    same = {**run_of, "group": case.group, "kind": case.kind, "case": case.name,
            "flops": f"{case.flops:.6g}", "bytes": f"{case.bytes:.6g}", "unit": unit,
            "bound": bound}
    made = []
    for side, numbers in found.items():
        times = {k: f"{v:.4g}" for k, v in measure.summary(numbers["seconds"])._asdict().items()}
        first = f"{numbers['first']:.3g}" if "first" in numbers else ""
        row = {**same, **times, "rounds": len(numbers["seconds"]), "side": side, "first": first,
               "peak": numbers.get("peak", "")}
        made.append({k: str(row[k]) for k in FIELDS})
    return made


def by_case(rows):
    """[(our row, {side: its row})] of what was compared, in the order of the file."""
    found = {}
    for row in rows:
        if row["group"] != "machine":
            found.setdefault((row["kind"], row["case"]), {})[row["side"]] = row
    return [(sides.pop("nbgrad"), sides) for sides in found.values() if "nbgrad" in sides]


def ratio(own, other):
    """How many times as fast as the other we are."""
    return float(other["median"]) / float(own["median"])


def ratios(rows):
    """{kind: {peer or BEST: [how many times as fast we are]}}."""
    found = {}
    for own, others in by_case(rows):
        kind = found.setdefault(own["kind"], {})
        times = {side: ratio(own, other) for side, other in others.items()}
        for side, value in times.items():
            kind.setdefault(side, []).append(value)
        peers = [value for side, value in times.items() if side != COMPOSED]
        if peers:
            kind.setdefault(BEST, []).append(min(peers))
    return found


def geometric_mean(values):
    return exp(sum(map(log, values)) / len(values))


def rate(row):
    """What a second does of what the nearer ceiling limits."""
    amount = {"GFLOP/s": row["flops"], "GB/s": row["bytes"]}.get(row["unit"])
    return f"{float(amount) / float(row['median']) / 1e9:.3g} {row['unit']}" if amount else ""


def percent(row):
    """Of the speed that the measured ceilings allow; over 100 where a cache serves the bytes."""
    return f"{100 * float(row['bound']) / float(row['median']):.0f} %" if row["bound"] else ""


def megabytes(row):
    return f"{int(row['peak']) / 1e6:.1f} MB" if row["peak"] else ""


def duration(seconds):
    """Three digits and a unit.

    >>> duration(1.9346e-6), duration("0.0999"), duration(12)
    ('1.93 µs', '99.9 ms', '12.0 s')
    """
    seconds = float(seconds)
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))
                        if seconds >= 0.9995 * s), (1e-9, "ns"))
    return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"


def time(row):
    """The median, with ± if the rounds differ too much to trust it."""
    return duration(row["median"]) + (" ±" if measure.unsteady([row]) else "")


def first_call(row):
    return duration(row["first"]) if row["first"] else ""


def _comparison(own, other, fresh):
    cells = [time(other), f"{ratio(own, other):.2f}"]
    return cells + ([first_call(other), megabytes(other)] if fresh else [])


def details(rows):
    """Header and lines of the whole table of one group."""
    pairs = by_case(rows)
    peers = list(dict.fromkeys(side for _, others in pairs for side in others))
    fresh = any(row["first"] for row in rows)
    more = ["first call", "peak"] if fresh else []
    header = ["case", "nbgrad", "rate", "ceiling", *more]
    for peer in peers:
        header += [peer, "×", *more]
    lines = [[own["side"] + " " + own["case"], time(own), rate(own)]
             for own in rows if own["group"] == "machine"]
    for own, others in pairs:
        line = [f"{own['kind']}, {own['case']}", time(own), rate(own), percent(own)]
        line += [first_call(own), megabytes(own)] if fresh else []
        for peer in peers:
            line += (_comparison(own, others[peer], fresh) if peer in others
                     else [""] * (2 + len(more)))
        lines.append(line)
    return header, [line + [""] * (len(header) - len(line)) for line in lines]


def summary(rows):
    """Header and lines: how many times as fast as each peer, by kind of case."""
    lines = []
    for kind, peers in ratios(rows).items():
        for peer, values in peers.items():
            if peer == BEST and len(peers) == 2:
                continue
            lines.append([kind, str(len(values)), peer, f"{geometric_mean(values):.2f}",
                          f"{min(values):.2f}"])
    return ["kind", "cases", "compared with", "geometric mean", "least"], lines


def _show(header, lines, title):
    """With rich where it is installed, else in columns of spaces."""
    if importlib.util.find_spec("rich"):
        from rich import box, console, table

        found = table.Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for i, name in enumerate(header):
            found.add_column(name, justify="right" if i else "left", no_wrap=True)
        for line in lines:
            found.add_row(*line)
        width = sum(max(map(len, column)) + 4 for column in zip(header, *lines))
        console.Console(width=max(width, 80), highlight=False).print(found)
        return
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    for line in (header, *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def print_table(rows):
    """The table of one group, then its geometric means."""
    first = rows[0]
    _show(*details(rows), f"{rows[-1]['group']}: {first['machine']}, {first['threads']} threads, "
          f"medians of {first['rounds']} rounds, {first['versions']}; × is how many times as fast "
          "nbgrad is, ± unsteady")
    header, lines = summary(rows)
    if lines:
        _show(header, lines, f"{rows[-1]['group']}: how many times as fast nbgrad is")
