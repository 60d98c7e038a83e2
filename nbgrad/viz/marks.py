"""What stands between the axes of a picture: lines with bands, bars and dots with whiskers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from nbgrad.lab.study import Figure, Series
from nbgrad.viz.scale import Axis, finite, number

__all__ = ["FEW", "Layout", "describe", "marks", "share"]

FEW, _MOST = 24, 400        # points of a line that are drawn as dots, too; that are drawn at all
Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """The part of a picture between its axes. ``across``: names run down, values to the right."""

    x: Axis
    y: Axis
    left: float
    top: float
    right: float
    bottom: float
    across: bool
    dots: bool
    height: float

    def at(self, x: float, y: float) -> Point:
        """From places on the axes to places in the picture."""
        if self.across:
            return (self.left + y * (self.right - self.left),
                    self.top + x * (self.bottom - self.top))
        return (self.left + x * (self.right - self.left),
                self.bottom - y * (self.bottom - self.top))


def marks(figure: Figure, series: Series, layout: Layout, dashes: str) -> Iterator[str]:
    """One series: what it shows, over its interval."""
    if figure.kind == "line":
        yield from _line(series, layout, dashes)
        return
    shift, width = share(figure, series, layout)
    for i, (x, y) in enumerate(zip(series.x, series.y)):
        at, value = layout.x.place(x), layout.y.place(y)
        if at is None:
            continue
        if value is None:
            yield from _missing(series, layout, at + shift)
        elif layout.dots:
            yield from _whisker(series, i, layout, at + shift)
            yield _dot(series, i, layout.at(at + shift, value), 3.6)
        else:
            a = layout.at(at + shift - width / 2, layout.y.clipped(0.0) or 0.0)
            b = layout.at(at + shift + width / 2, value)
            yield (f'<path class="bar" d="{_box(a, b)}"><title>{escape(_said(series, i))}</title>'
                   "</path>")
            yield from _whisker(series, i, layout, at + shift)


def _dot(series: Series, i: int, at: Point, radius: float) -> str:
    return (f'<circle class="dot" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}">'
            f"<title>{escape(_said(series, i))}</title></circle>")


def _missing(series: Series, layout: Layout, at: float) -> Iterator[str]:
    """A dash where a bar would stand: no value is not zero."""
    if layout.x.names:
        px, py = layout.at(at, 0.0)
        dx, dy = (9, 4) if layout.across else (0, -5)
        yield f'<text class="tick mid" x="{px + dx:.1f}" y="{py + dy:.1f}">–</text>'


def share(figure: Figure, series: Series, layout: Layout) -> tuple[float, float]:
    """How far from a name's middle this series' bars are, and how wide, as shares of the axis."""
    if not layout.x.names:
        return 0.0, 0.0
    slot, n = 0.76 / len(layout.x.names), len(figure.series)
    at = next(i for i, other in enumerate(figure.series) if other is series)
    width = min(slot / n, 0.14)
    return (at - (n - 1) / 2) * width, 0.92 * width


def _box(a: Point, b: Point) -> str:
    return f"M{a[0]:.1f} {a[1]:.1f}H{b[0]:.1f}V{b[1]:.1f}H{a[0]:.1f}Z"


def _whisker(series: Series, i: int, layout: Layout, at: float) -> Iterator[str]:
    ends = [layout.y.clipped(bound[i]) for bound in (series.low, series.high) if bound is not None]
    if len(ends) < 2 or ends[0] is None or ends[1] is None:
        return
    (ax, ay), (bx, by) = (layout.at(at, end) for end in ends if end is not None)
    cap = "v6m0 -3" if layout.across else "h6m-3 0"
    back = "m0 -3" if layout.across else "m-3 0"
    yield (f'<path class="whisker" d="M{ax:.1f} {ay:.1f}{back}{cap}'
           f'L{bx:.1f} {by:.1f}{back}{cap}"/>')


# ------------------------------------------------------------------------------------------- lines

def _line(series: Series, layout: Layout, dashes: str) -> Iterator[str]:
    kept = _thinned(series)
    yield from _band(series, kept, layout)
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    for run in _runs(series, kept, layout):
        points = [layout.at(x, y) for _, x, y in run]
        if len(points) > 1:
            yield f'<path class="line"{pattern} d="{_path(points)}"/>'
        if len(kept) <= FEW or len(points) == 1:
            for (i, _, _), at in zip(run, points):
                yield _dot(series, i, at, 2.8)


def _band(series: Series, kept: Sequence[int], layout: Layout) -> Iterator[str]:
    if series.low is None or series.high is None:
        return
    ends = [(layout.x.place(series.x[i]), layout.y.clipped(series.low[i]),
             layout.y.clipped(series.high[i])) for i in kept]
    for there, group in groupby(ends, key=lambda end: None not in end):
        run = [(x, a, b) for x, a, b in group if x is not None and a is not None and b is not None]
        if there and len(run) > 1:
            edge = [layout.at(x, b) for x, _, b in run] + [layout.at(x, a) for x, a, _ in run[::-1]]
            yield f'<path class="band" d="{_path(edge)}Z"/>'


def _runs(series: Series, kept: Sequence[int],
          layout: Layout) -> Iterator[list[tuple[int, float, float]]]:
    """Points without a gap between them: a value that is not there interrupts the line."""
    places = [(i, layout.x.place(series.x[i]), layout.y.place(series.y[i])) for i in kept]
    for there, group in groupby(places, key=lambda p: p[1] is not None and p[2] is not None):
        if there:
            yield [(i, x, y) for i, x, y in group if x is not None and y is not None]


def _thinned(series: Series) -> Sequence[int]:
    """Which points to draw: all, or of every stretch the lowest, the highest and one gap."""
    n = min(len(series.x), len(series.y))
    if n <= _MOST:
        return range(n)
    kept = {0, n - 1}
    for start in range(0, n, -(-2 * n // _MOST)):
        stretch = range(start, min(start + -(-2 * n // _MOST), n))
        there = [i for i in stretch if finite(series.y[i]) is not None]
        gap = [i for i in stretch if finite(series.y[i]) is None][:1]
        there.sort(key=lambda i: finite(series.y[i]) or 0.0)
        kept.update(there[:1], there[-1:], gap)
    return sorted(kept)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# ------------------------------------------------------------------------------------------- words

def describe(figure: Figure) -> str:
    """The picture in words, for those who cannot see it."""
    parts = [f"{figure.ylabel} over {figure.xlabel}."]
    for series in figure.series:
        there = [i for i, y in enumerate(series.y) if finite(y) is not None]
        if figure.kind == "line" and len(there) > 2:
            there = [there[0], there[-1]]
        said = ", ".join(_pair(series, i) for i in there[:12])
        parts.append(f"{series.label}: {said or 'no values'}.")
    return " ".join(parts)


def _pair(series: Series, i: int) -> str:
    x, y = series.x[i], finite(series.y[i])
    return f"{number(y or 0.0)} at {x if isinstance(x, str) else number(x)}"


def _said(series: Series, i: int) -> str:
    """One point in words: what shows when the mouse rests on it."""
    ends = [finite(bound[i]) for bound in (series.low, series.high) if bound is not None]
    interval = f" [{', '.join(number(e) for e in ends if e is not None)}]" if ends else ""
    return f"{series.label}: {_pair(series, i)}{interval}"
