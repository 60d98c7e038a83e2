"""A study's figure as SVG: no script, no fonts, no colours of its own.

Colours are classes (``s1`` … of viz/page.css), so a picture is light or dark with its page. The
drawing is 400 wide: two beside each other on a desk, one on a phone, letters of about the size of
the text in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from html import escape

from nbgrad.lab.study import Figure
from nbgrad.viz.marks import Layout, describe, marks
from nbgrad.viz.palette import STYLES, styles
from nbgrad.viz.scale import Axis, axis, finite, names

__all__ = ["layout", "legend", "svg"]

_WIDTH, _HEIGHT = 400.0, 196.0      # of all; of the part between the axes
_TOP, _RIGHT = 26.0, 12.0
_LETTER = 6.2                       # width of a letter of 11.5 units, on average


def svg(figure: Figure, key: str) -> str:
    """The picture; ``key`` begins the ids in it, so it is unique on its page."""
    plan = layout(figure)
    x_label, y_label = figure.xlabel, figure.ylabel
    if plan.across:
        x_label, y_label = y_label, x_label
    parts = [(f'<svg class="plot" viewBox="0 0 {_WIDTH:g} {plan.height:g}" role="img" '
              f'aria-labelledby="{key}-title {key}-desc">'),
             f'<title id="{key}-title">{escape(figure.title)}</title>',
             f'<desc id="{key}-desc">{escape(describe(figure))}</desc>',
             *_ticks(plan),
             f'<text class="label" x="0" y="11">{escape(y_label)}</text>',
             (f'<text class="label end" x="{_WIDTH - _RIGHT:g}" y="{plan.height - 5:g}">'
              f'{escape(x_label)}</text>')]
    for series, style in zip(figure.series, styles([s.label for s in figure.series])):
        dashes = " ".join(f"{2 * d:g}" for d in STYLES[style].dashes)
        parts += [f'<g class="s{style + 1}">', *marks(figure, series, plan, dashes), "</g>"]
    if all(finite(y) is None for series in figure.series for y in series.y):
        parts.append(f'<text class="label" x="{plan.left + 10:g}" y="{_TOP + 20:g}">'
                     "no finite values</text>")
    return "\n".join([*parts, "</svg>"])


def legend(figure: Figure) -> str:
    """The series' names beside their lines, as an HTML list; nothing where there is one series."""
    if len(figure.series) < 2:
        return ""
    found = styles([s.label for s in figure.series])
    return '<ul class="legend">' + "".join(
        f'<li><svg class="key" viewBox="0 0 30 10" aria-hidden="true"><g class="s{style + 1}">'
        f"{_swatch(figure, STYLES[style].dashes)}</g></svg>{escape(series.label)}</li>"
        for series, style in zip(figure.series, found)) + "</ul>"


def _swatch(figure: Figure, dashes: tuple[float, ...]) -> str:
    if figure.kind == "line":
        pattern = " ".join(f"{2 * d:g}" for d in dashes)
        return f'<path class="line" stroke-dasharray="{pattern}" d="M1 5H29"/>'
    if figure.kind == "bar" and not _far_from_zero(figure):
        return '<rect class="bar" x="4" y="0" width="22" height="10"/>'
    return '<circle class="dot" cx="15" cy="5" r="4"/>'


# ------------------------------------------------------------------------------------------ layout

def layout(figure: Figure) -> Layout:
    """Where everything is: names that do not fit below the axis go beside it, one to a line."""
    xs = [x for series in figure.series for x in series.x]
    named = figure.kind == "bar" or any(isinstance(x, str) for x in xs)
    dots = figure.kind == "scatter" or (figure.kind == "bar" and _far_from_zero(figure))
    zero = figure.kind == "bar" and not dots
    y = axis(_extent(figure), log=figure.log_y, zero=zero and not figure.log_y, margin=0.05)
    x = _named(names(xs)) if named else axis(xs, log=figure.log_x, at=8)
    room = _WIDTH - _RIGHT - _widest(y.ticks) - 12
    across = named and figure.kind != "line" and not _fit(x.names, room)
    if across:
        step = max(20.0, 13.0 * len(figure.series) + 9)
        depth = step * len(x.names)
        x = _named(tuple(x.names), lines=True)
        return Layout(x, y, min(_widest(x.ticks) + 12, 0.45 * _WIDTH), _TOP,
                      _WIDTH - _RIGHT, _TOP + depth, True, dots, _TOP + depth + 38)
    return Layout(x, y, _widest(y.ticks) + 12, _TOP, _WIDTH - _RIGHT, _TOP + _HEIGHT, False,
                  dots, _TOP + _HEIGHT + 38)


def _fit(found: Sequence[str], room: float) -> bool:
    """Whether names stand beside each other: all of them, and any two neighbours in their places,
    which are of one width."""
    widths, slot = [_letters(name) for name in found], room / max(len(found), 1)
    return (sum(widths) + 12 * len(widths) <= room
            and all((a + b) / 2 + 6 <= slot for a, b in itertools.pairwise(widths)))


def _named(found: tuple[str, ...], lines: bool = False) -> Axis:
    places = [(i + 0.5) / len(found) for i in range(len(found))]
    texts = ["\n".join(_wrapped(name)) if lines else name for name in found]
    return Axis(0.0, 1.0, False, tuple(zip(places, texts)), found)


def _wrapped(name: str, most: int = 26) -> list[str]:
    """In one line or two, cut at the space nearest to the middle."""
    spaces = [i for i, letter in enumerate(name) if letter == " "]
    if len(name) <= most or not spaces:
        return [name]
    middle = min(spaces, key=lambda i: abs(i - len(name) / 2))
    return [name[:middle], name[middle + 1:]]


def _extent(figure: Figure) -> Iterator[float | None]:
    """All values of y and the ends of their intervals."""
    for series in figure.series:
        yield from itertools.chain(series.y, series.low or (), series.high or ())


def _far_from_zero(figure: Figure) -> bool:
    """Whether bars from zero would be all alike: then values are dots, which need no zero."""
    found = [y for value in _extent(figure) if (y := finite(value)) is not None]
    return (not figure.log_y and bool(found)
            and (min(found) > 0.6 * max(found) > 0 or max(found) < 0.6 * min(found) < 0))


def _letters(text: str) -> float:
    return _LETTER * max(map(len, text.split("\n")))


def _widest(ticks: tuple[tuple[float, str], ...]) -> float:
    return max((_letters(text) for _, text in ticks), default=0.0)


# ------------------------------------------------------------------------------------------- ticks

def _ticks(layout: Layout) -> Iterator[str]:
    """Grid lines for values, a line where the plot stands, and what stands beside both axes."""
    left, top, right, bottom = layout.left, layout.top, layout.right, layout.bottom
    for place, text in layout.y.ticks:
        px, py = layout.at(0, place)
        if layout.across:
            yield f'<path class="grid" d="M{px:.1f} {top:g}V{bottom:g}"/>'
            yield _text(text, px, bottom + 16, "mid")
        else:
            yield f'<path class="grid" d="M{left:.1f} {py:.1f}H{right:g}"/>'
            yield _text(text, left - 7, py + 4, "end")
    base = f"{left:.1f} {top:g}V{bottom:g}" if layout.across else f"{left:.1f} {bottom:g}H{right:g}"
    yield f'<path class="axis" d="M{base}"/>'
    yield from _across_ticks(layout) if layout.across else _down_ticks(layout)


def _across_ticks(layout: Layout) -> Iterator[str]:
    for place, text in layout.x.ticks:
        _, py = layout.at(place, 0)
        lines = text.split("\n")
        for i, line in enumerate(lines):
            yield _text(line, layout.left - 8, py + 4 + 12 * (i - (len(lines) - 1) / 2), "end")


def _down_ticks(layout: Layout) -> Iterator[str]:
    """Those that would touch the one before are left out."""
    free = 0.0
    for place, text in layout.x.ticks:
        px, _ = layout.at(place, 0)
        half = _letters(text) / 2
        px_text = min(max(px, half), _WIDTH - half)
        if not layout.x.names:
            yield f'<path class="axis" d="M{px:.1f} {layout.bottom:g}v4"/>'
        if px_text - half >= free:
            yield _text(text, px_text, layout.bottom + 17, "mid")
            free = px_text + half + 5


def _text(text: str, x: float, y: float, anchor: str) -> str:
    return f'<text class="tick {anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
