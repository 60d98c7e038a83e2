"""Training curves of a comparison as a picture."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from nbgrad.train.config import NORMS as LABELS
from nbgrad.viz.palette import NORM_STYLES

__all__ = ["draw"]

_STYLES: dict[str, dict[str, Any]] = {
    norm: {"color": style.light, "linestyle": (0, style.dashes) if style.dashes else "-"}
    for norm, style in NORM_STYLES.items()}
_GREY = "#555555"
Curve = npt.NDArray[np.float64]


def draw(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a PNG: test accuracy above training loss, one column per learning rate.

    Line: median over seeds; band: smallest to largest. ``results`` is what ``compare`` returns.
    Raises ModuleNotFoundError, with the command that installs it, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("the curves need matplotlib: pip install 'nbgrad[lab]'",
                                  name=e.name) from e
    lrs = results["lrs"]
    figure = Figure(figsize=(max(3.4 * len(lrs), 7.2) + 0.6, 7.0), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(lrs), squeeze=False, sharex=True, sharey="row")
    for column, lr in enumerate(lrs):
        _accuracy(panels[0, column], results, lr)
        _loss(panels[1, column], results, lr)
    for panel in panels.flat:
        _plain(panel)
    panels[0, 0].set_ylabel("test accuracy (%)")
    panels[1, 0].set_ylabel("training loss (log scale)")
    for panel in panels[1]:
        panel.set_xlabel("epoch")
    panels[0, -1].text(1.01, 95, "95 %", transform=panels[0, -1].get_yaxis_transform(),
                       va="center", fontsize="small", color=_GREY)
    _head(figure, panels[0, 0], results)
    figure.savefig(path)


def _head(figure: Any, panel: Any, results: dict[str, Any]) -> None:
    """Title, what was run, how to read it, and the legend, above the panels."""
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.86))
    median = f"line: median of {len(results['seeds'])} seeds, band: lowest to highest; "
    reading = (median if len(results["seeds"]) > 1 else "") + "dot: epoch that first reaches 95 %"
    figure.text(0.012, 0.955, results["title"], fontsize="large", weight="bold")
    figure.text(0.012, 0.926, results["details"], fontsize="small", color=_GREY)
    figure.text(0.988, 0.888, reading, fontsize="small", color=_GREY, ha="right")
    figure.legend(*panel.get_legend_handles_labels(), loc="center left", frameon=False, ncols=3,
                  bbox_to_anchor=(0.004, 0.893), handlelength=3)


def _accuracy(panel: Any, results: dict[str, Any], lr: float) -> None:
    from matplotlib.patheffects import withStroke

    for norm in results["norms"]:
        epochs, middle = _band(panel, results, norm, lr, "test/accuracy", 100.0)
        row = [r for r in results["summary"] if r["norm"] == norm and r["lr"] == lr]
        at = row[0]["epochs_to"]["0.95"] if row else None
        if at is not None:
            y, color = float(np.interp(at, epochs, middle)), _STYLES[norm]["color"]
            panel.plot(at, y, "o", color=color, markersize=6, markeredgecolor="white", zorder=4)
            panel.annotate(f"{at:g}", (at, y), xytext=(6, -14), textcoords="offset points",
                           color=color, weight="bold", zorder=5,
                           path_effects=[withStroke(linewidth=3, foreground="white")])
    panel.axhline(95.0, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
    panel.set(title=f"learning rate {lr:g}", ylim=(0, 102))


def _loss(panel: Any, results: dict[str, Any], lr: float) -> None:
    for row, norm in enumerate(results["norms"]):
        _band(panel, results, norm, lr, "train/loss", 1.0)
        runs = [r for r in results["runs"] if r["norm"] == norm and r["lr"] == lr]
        lost = sum(r["diverged"] for r in runs)
        if lost:
            panel.text(0.97, 0.95 - 0.09 * row, f"{LABELS[norm]}: {lost} of {len(runs)} diverged",
                       transform=panel.transAxes, ha="right", va="top", fontsize="small",
                       color=_STYLES[norm]["color"])
    panel.set_yscale("log")


def _band(panel: Any, results: dict[str, Any], norm: str, lr: float, name: str,
          scale: float) -> tuple[npt.NDArray[np.int64], Curve]:
    """Draw one arm; returns its epochs and median. A diverged run counts while it lasts."""
    curves = [r["curves"][name] for r in results["runs"] if r["norm"] == norm and r["lr"] == lr]
    length = max(map(len, curves), default=0)
    values = np.full((len(curves), length), np.nan)
    for row, curve in zip(values, curves):
        row[:len(curve)] = [np.nan if v is None else v * scale for v in curve]
    some = np.isfinite(values).any(axis=0)      # the median of nothing is a warning
    values, epochs = values[:, some], 1 + np.flatnonzero(some)
    if not len(epochs):
        panel.plot([], [], label=LABELS[norm], **_STYLES[norm])
        return epochs, np.empty(0)
    low, middle, high = np.nanmin(values, 0), np.nanmedian(values, 0), np.nanmax(values, 0)
    panel.fill_between(epochs, low, high, color=_STYLES[norm]["color"], alpha=0.18, linewidth=0)
    panel.plot(epochs, middle, label=LABELS[norm], linewidth=1.8, **_STYLES[norm])
    return epochs, middle


def _plain(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.xaxis.get_major_locator().set_params(integer=True)
