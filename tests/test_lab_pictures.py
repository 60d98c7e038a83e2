"""Figures as SVG and PNG: every value is where its axis says, and nothing is drawn without one."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, strategies as st

from nbgrad.lab.study import Figure, Series
from nbgrad.viz.marks import Layout, marks
from nbgrad.viz.palette import NORM_STYLES, STYLES, styles
from nbgrad.viz.scale import axis, number
from nbgrad.viz.svg import layout, legend, svg

from . import lab_findings as findings

ALL = [findings.line(), findings.scales(), findings.bars(), findings.long_bars(),
       findings.scatter(), findings.many(), findings.nothing(), findings.hostile()]
PAPER = {"light": "#fdfdfc", "dark": "#14171a"}         # as in page.css


def tree(figure):
    return ElementTree.fromstring(svg(figure, "k"))


def shapes(figure, kind):
    """The path data or centres of a figure's marks of one class."""
    return [e for e in tree(figure).iter() if e.get("class") == kind]


def points(element):
    return [tuple(map(float, p.split())) for p in
            re.findall(r"(?<=[ML])[\d.]+ [\d.]+", element.get("d"))]


def one(y, x=None, **settings):
    given = {k: settings.pop(k) for k in ("low", "high") if k in settings}
    return Figure("t", "x", "y", [Series("s", x or list(range(len(y))), y, **given)], **settings)


@pytest.mark.parametrize("figure", ALL, ids=lambda f: f.title[:12])
def test_a_picture_is_well_formed_says_what_it_shows_and_holds_only_numbers(figure):
    root = tree(figure)
    assert root.find("title").text == figure.title
    for series in figure.series:
        assert series.label in root.find("desc").text
    named = root.get("aria-labelledby").split()
    assert named == [root.find(tag).get("id") for tag in ("title", "desc")]
    text = svg(figure, "k")
    assert "nan" not in re.sub(r">[^<]*<", "><", text)
    assert "inf" not in re.sub(r">[^<]*<", "><", text)
    tags = {"svg", "title", "desc", "g", "path", "text", "circle"}
    assert {e.tag for e in root.iter()} <= tags


@pytest.mark.parametrize("figure", ALL, ids=lambda f: f.title[:12])
def test_every_mark_is_inside_the_picture(figure):
    plan = layout(figure)
    for kind in ("line", "band", "bar", "whisker"):
        for mark in shapes(figure, kind):
            for x, y in points(mark):
                assert plan.left - 0.1 <= x <= plan.right + 0.1
                assert plan.top - 0.1 <= y <= plan.bottom + 0.1


def test_a_line_goes_through_its_values():
    figure = one([0.0, 5.0, 10.0], x=[0, 1, 4])
    (line,), plan = shapes(figure, "line"), layout(figure)
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3)   # coordinates have one decimal
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.5, abs=1e-3)
    for tick, text in plan.y.ticks:
        assert y0 + (y2 - y0) * float(text) / 10 == pytest.approx(plan.at(0, tick)[1], abs=0.2)


def test_a_value_that_is_not_there_interrupts_line_and_band():
    y = [1.0, 2.0, None, 2.0, 1.0, float("nan"), 3.0]
    figure = one(y, low=[v and v - 1 for v in y], high=[v and v + 1 for v in y])
    assert [len(points(p)) for p in shapes(figure, "line")] == [2, 2]
    assert [len(points(p)) for p in shapes(figure, "band")] == [4, 4]
    assert len(shapes(figure, "dot")) == 5              # the last stands alone


def test_on_a_log_axis_zero_has_no_place_and_an_interval_ends_at_the_axis():
    figure = one([0.0, 1.0, 10.0, 100.0], low=[0.0, -1.0, 5.0, 50.0], high=[1.0, 2.0, 20.0, 200.0],
                 log_y=True)
    plan = layout(figure)
    (line,) = shapes(figure, "line")
    (_, a), (_, b), (_, c) = points(line)
    assert a - b == pytest.approx(b - c, abs=0.2)
    (band,) = shapes(figure, "band")
    assert max(y for _, y in points(band)) == pytest.approx(plan.bottom, abs=0.1)


def test_bars_are_as_long_as_their_values_and_whiskers_as_their_intervals():
    figure = one([10.0, 5.0, -2.0], x=["a", "b", "c"], kind="bar", low=[8, 4, -3], high=[12, 6, -1])
    heights = [(lambda p: p[0][1] - float(re.search(r"V([\d.]+)", e.get("d"))[1]))(points(e))
               for e in shapes(figure, "bar")]
    assert np.array(heights) / heights[0] == pytest.approx([1.0, 0.5, -0.2], abs=3e-3)
    ends = [[y for _, y in points(e)] for e in shapes(figure, "whisker")]
    assert [(a - b) / heights[0] for a, *_, b in ends] == pytest.approx([0.4, 0.2, 0.2], abs=3e-3)


@pytest.mark.parametrize(("y", "kind"), [([0.90, 0.93], "dot"), ([0.2, 0.9], "bar"),
                                         ([-0.93, -0.90], "dot"), ([0.0, 0.93], "bar")])
def test_values_far_from_zero_are_dots_because_bars_begin_at_zero(y, kind):
    figure = one(y, x=["a", "b"], kind="bar")
    assert len(shapes(figure, kind)) == 2
    if kind == "bar":
        assert layout(figure).y.clipped(0.0) in (0.0, pytest.approx(0.0))


def test_names_too_long_to_stand_below_stand_beside_their_bars():
    assert layout(findings.long_bars()).across
    assert not layout(findings.bars()).across
    dots = shapes(findings.long_bars(), "dot")
    assert [float(a.get("cx")) < float(b.get("cx"))        # running, population: as measured
            for a, b in zip(dots[:4], dots[4:])] == [True, False, False, True]


@pytest.mark.parametrize("found", [
    ("all parameters", "gamma and beta", "two weights per channel"), ("a", "b" * 30),
    ("a" * 20,) * 3, ("none", "before", "after", "before and after", "each"), tuple("abcdefgh")])
def test_every_bar_has_its_name(found):
    """Names of neighbours do not touch, so none is left out."""
    found = [f"{name}{i}" for i, name in enumerate(found)]
    figure = Figure("t", "x", "y", [Series("s", found, [1.0 + i for i in range(len(found))])],
                    kind="bar")
    texts = re.findall(r'class="tick (?:mid|end)" [^>]*>([^<]*)<', svg(figure, "k"))
    assert " ".join(found) in " ".join(texts)


def test_a_bar_without_a_value_is_a_dash():
    assert len(shapes(findings.bars(), "bar")) == 5
    assert [e.text for e in tree(findings.bars()).iter("text")].count("–") == 1


def test_a_long_line_is_thinned_but_keeps_its_extremes_and_gaps():
    y = [math.sin(i / 50) for i in range(10_000)]
    y[5003], y[7001] = 9.0, None
    figure = one(y)
    lines = shapes(figure, "line")
    assert len(lines) == 2
    assert sum(len(points(e)) for e in lines) < 1000
    plan = layout(figure)
    assert min(v for e in lines for _, v in points(e)) == pytest.approx(
        plan.at(0, plan.y.place(9.0))[1], abs=0.1)


def test_a_norm_has_its_colour_in_every_picture():
    assert styles(["batch norm", "without norm"]) == [0, 1]
    assert styles(["without norm", "batch norm"]) == [1, 0]
    assert styles(["a", "batch norm", "b"]) == [1, 0, 2]
    assert len(set(styles([f"arm {i}" for i in range(8)]))) == 8
    assert len(styles([f"arm {i}" for i in range(12)])) == 12
    assert NORM_STYLES["batch"] is STYLES[0]
    assert legend(findings.line()).index("s1") < legend(findings.line()).index("s2")


def luminance(color):
    channels = [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", PAPER)
def test_every_colour_stands_out_from_the_paper(scheme):
    """3 : 1, as WCAG 2.2 wants of graphics."""
    paper = luminance(PAPER[scheme])
    for style in STYLES:
        own = luminance(getattr(style, scheme))
        low, high = sorted((paper, own))
        assert (high + 0.05) / (low + 0.05) >= 3.0, style


SIZES = st.floats(-1e9, 1e9).filter(lambda v: v == 0 or abs(v) > 1e-9)


@given(SIZES, SIZES)
def test_a_linear_axis_holds_its_values_and_has_ticks_that_differ(a, b):
    if 0 < abs(a - b) < 1e-6 * max(abs(a), abs(b)):
        b = a
    made = axis([a, b])
    assert 0 <= made.place(min(a, b)) <= made.place(max(a, b)) <= 1
    places = [place for place, _ in made.ticks]
    assert 2 <= len(places) <= 8
    assert places == sorted(places)
    assert places[0] >= 0
    assert places[-1] <= 1


@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_a_log_axis_holds_its_values_and_has_ticks_that_differ(a, b):
    made = axis([a, b], log=True)
    assert 0 <= made.place(min(a, b)) <= made.place(max(a, b)) <= 1
    assert made.ticks
    for place, text in made.ticks:
        assert 0 <= place <= 1
        assert text


@given(st.floats(-1e12, 1e12))
def test_numbers_are_written_with_four_digits(value):
    text = number(value).replace("−", "-").replace(",", "")
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    if "10" in text and re.search("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]", text):
        mantissa, exponent = re.fullmatch(r"(-?(?:[\d.]+×)?)10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text).groups()
        lead = {"": "1", "-": "-1"}.get(mantissa, mantissa.rstrip("×"))
        text = f"{lead}e{exponent.translate(superscripts)}"
    assert float(text) == pytest.approx(value, rel=6e-4, abs=1e-300)


@pytest.mark.parametrize("figure", [*ALL[:2], *ALL[3:5]], ids=lambda f: f.title[:12])
def test_a_png_is_a_picture_of_the_same_figure(figure, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    from nbgrad.viz.picture import png

    first, second = png(figure, tmp_path / "a.png"), png(figure, tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()
    pixels = np.rint(255 * image.imread(first)[:, :, :3]).astype(int)
    assert pixels.shape[1] == 960
    shown = [s for s in figure.series if any(v is not None for v in s.y)]
    for style in styles([s.label for s in figure.series])[:len(shown)]:
        color = [int(STYLES[style].light[i:i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - color).max(-1) < 8).sum() > 20


def test_one_mark_of_a_series_has_its_words():
    figure = findings.bars()
    said = "".join(marks(figure, figure.series[0], layout(figure), ""))
    assert "<title>ReLU: 900 at none [800, 1,000]</title>" in said
    assert isinstance(layout(figure), Layout)


@pytest.mark.parametrize("words", [1, 6, 12])
def test_the_legend_of_a_png_lies_inside(words, tmp_path):
    """Three long names do not fit one line: behind the last letter there is paper."""
    image = pytest.importorskip("matplotlib.image")
    from nbgrad.viz.picture import png

    names = [f"{k} " + "longer " * words for k in range(3)]
    figure = Figure("t", "x", "y", [Series(name, [0, 1], [0.0, 1.0]) for name in names])
    pixels = image.imread(png(figure, tmp_path / "a.png"))[..., :3]
    below = pixels[int(0.94 * len(pixels)):]             # the last line of the legend
    assert (below < 0.5).any()
    assert (below[:, -8:] > 0.99).all()


@pytest.mark.parametrize("names", [[0, 1], ["a name that takes a part of the width", "b"]])
@pytest.mark.parametrize("words", [1, 12, 24])
def test_the_title_of_a_png_lies_inside(words, names, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    from nbgrad.viz.picture import png

    figure = Figure("longer " * words, "x", "y", [Series("one", names, [0.2, 1.0])],
                    kind="line" if names == [0, 1] else "bar")
    pixels = image.imread(png(figure, tmp_path / "a.png"))[..., :3]
    assert (pixels[:20] < 0.5).any()                    # the first line of the title
    assert (pixels[:80, -4:] > 0.99).all()
