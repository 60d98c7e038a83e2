"""A study's figure as a PNG, for pages that show no SVG with their own colours."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nbgrad.lab.study import Figure, Series
from nbgrad.viz.marks import FEW, Layout, share
from nbgrad.viz.palette import STYLES, Style, styles
from nbgrad.viz.svg import layout

__all__ = ["png"]

_GREY = "#555555"


def png(figure: Figure, path: str | os.PathLike[str], *, width: float = 6.4) -> Path:
    """Write the figure; ``width`` in inches, at 150 dots each.

    Raises ModuleNotFoundError, with the command that installs it, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure as Canvas
        from PIL import Image  # matplotlib needs it, too
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'nbgrad[lab]'",
                                  name=e.name) from e
    plan = layout(figure)
    canvas = Canvas(figsize=(width, 0.9 * width * plan.height / 400 + 0.4), dpi=150,
                    layout="constrained")
    panel = canvas.subplots()
    for series, at in zip(figure.series, styles([s.label for s in figure.series])):
        _series(panel, figure, series, plan, STYLES[at])
    _axes(panel, figure, plan)
    if len(figure.series) > 1:
        _legend(canvas)
    _title(canvas, panel, figure.title)
    drawn = io.BytesIO()
    canvas.savefig(drawn, format="png")
    # 256 colours: at most 7 of 255 off, in 0.37 of the bytes (64: bands of another hue, off by 16)
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        path, format="PNG", optimize=True)
    return Path(path)


def _title(canvas: Any, panel: Any, text: str) -> None:
    """Above the panel, in as many lines as it takes to end where the picture does."""
    title = panel.set_title(text, loc="left", fontsize="medium", weight="bold")
    canvas.draw_without_rendering()                     # now the panel is where it will be
    space = (canvas.bbox.x1 - panel.bbox.x0) / title.get_window_extent().width
    if space < 1:
        title.set_text(textwrap.fill(text, int(0.95 * space * len(text))))


def _legend(canvas: Any) -> None:
    """Below the panel, in as many columns as fit its width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(canvas).get_renderer()   # type: ignore[no-untyped-call]
    for columns in (3, 2, 1):
        legend = canvas.legend(loc="outside lower left", frameon=False, ncols=columns,
                               fontsize="small", handlelength=3)
        if columns == 1 or legend.get_window_extent(renderer).width <= canvas.bbox.width:
            return
        legend.remove()


def _series(panel: Any, figure: Figure, series: Series, plan: Layout, style: Style) -> None:
    """In places on the axes, 0 to 1: the scales and the ticks are those of the SVG."""
    x, y = _places(map(plan.x.place, series.x)), _places(map(plan.y.place, series.y))
    ends = series.low is not None and series.high is not None
    low, high = (_places(map(plan.y.clipped, bound or ())) if ends else y
                 for bound in (series.low, series.high))
    if figure.kind == "line":
        panel.plot(x, y, linestyle=(0, style.dashes) if style.dashes else "-", linewidth=1.8,
                   marker="o" if len(x) <= FEW else None, markersize=4, color=style.light,
                   label=series.label)
        if ends:
            panel.fill_between(x, low, high, color=style.light, alpha=0.16, linewidth=0)
        return
    shift, width = share(figure, series, plan)
    error = np.abs(np.stack([y - low, high - y])) if ends else None
    settings = {("xerr" if plan.across else "yerr"): error, "capsize": 2.5, "color": style.light,
                "label": series.label}
    if plan.dots:
        panel.errorbar(*((y, x + shift) if plan.across else (x + shift, y)), fmt="o", markersize=5,
                       **settings)
    else:
        zero = plan.y.clipped(0.0) or 0.0
        draw, base = (panel.barh, "left") if plan.across else (panel.bar, "bottom")
        draw(x + shift, y - zero, width, **settings, **{base: zero},
             error_kw={"elinewidth": 1, "ecolor": "#222222"})


def _places(found: Iterable[float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if place is None else place for place in found])


def _axes(panel: Any, figure: Figure, plan: Layout) -> None:
    across = plan.across
    for axis, ticks, label in ((panel.yaxis if across else panel.xaxis, plan.x.ticks,
                                figure.xlabel),
                               (panel.xaxis if across else panel.yaxis, plan.y.ticks,
                                figure.ylabel)):
        axis.set_ticks([place for place, _ in ticks], [text for _, text in ticks])
        axis.set_label_text(label, color=_GREY, fontsize="small")
        axis.set_tick_params(labelsize="small", labelcolor=_GREY, color=_GREY)
    panel.set(xlim=(0, 1), ylim=(1, 0) if across else (0, 1))
    panel.spines[["top", "right", "bottom" if across else "left"]].set_visible(False)
    panel.grid(axis="x" if across else "y", color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
