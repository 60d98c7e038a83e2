"""From runs to what is said about them: medians over seeds, a table, one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from nbgrad.train.config import NORMS

__all__ = ["LEVELS", "epochs_to", "finding", "summarize", "table"]

LEVELS = (0.90, 0.95)


def epochs_to(accuracy: Sequence[float], level: float) -> int | None:
    """The first epoch, counted from 1, whose accuracy is at least ``level``; None if there is none.

    >>> epochs_to([0.5, 0.9, 0.97], 0.9), epochs_to([0.5], 0.9)
    (2, None)
    """
    return next((i for i, a in enumerate(accuracy, 1) if a >= level), None)


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per learning rate and norm: over seeds, the median of epochs and the mean of the rest.

    A run that never reaches a level counts as later than all others: the median is None ("never")
    where half of the runs or more did not reach it.
    """
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["lr"], run["norm"]), []).append(run)
    return [_row(lr, norm, own) for (lr, norm), own in groups.items()]


def _row(lr: float, norm: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    final = [r["final_accuracy"] for r in runs]
    reached = {f"{level:g}": [r["epochs_to"][f"{level:g}"] for r in runs] for level in LEVELS}
    return {
        "lr": lr, "norm": norm, "runs": len(runs),
        "epochs_to": {level: _median(epochs) for level, epochs in reached.items()},
        "reached": {level: len(runs) - epochs.count(None) for level, epochs in reached.items()},
        "accuracy": statistics.fmean(final),
        "spread": statistics.stdev(final) if len(final) > 1 else None,
        "diverged": sum(r["diverged"] for r in runs),
        "seconds": statistics.fmean(r["seconds"] for r in runs),
    }


def _median(epochs: Iterable[int | None]) -> float | None:
    middle = statistics.median(math.inf if e is None else e for e in epochs)
    return middle if math.isfinite(middle) else None


def table(summary: Sequence[dict[str, Any]]) -> str:
    """The summary as aligned text, one block per learning rate."""
    head = ["learning rate", "", *(f"to {100 * level:.0f} %" for level in LEVELS),
            "final accuracy", "diverged", "seconds"]
    cells = [[f"{row['lr']:g}", NORMS[row["norm"]],
              *(_epochs(row, f"{level:g}") for level in LEVELS), _accuracy(row),
              f"{row['diverged']}/{row['runs']}", f"{row['seconds']:.2f}"] for row in summary]
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip()
             for row in [head, ["-" * w for w in widths], *cells]]
    blocks = groupby(zip(summary, lines[2:]), key=lambda pair: pair[0]["lr"])
    body = "\n\n".join("\n".join(line for _, line in block) for _, block in blocks)
    return "\n".join([*lines[:2], body, "", *_NOTES])


_NOTES = ("to 90 %, to 95 %  epochs to that test accuracy, median (n/m: reached by n of m runs)",
          "final accuracy    mean ± standard deviation over seeds",
          "diverged          loss not finite, or at the end no better than guessing",
          "seconds           of training alone, per run")


def _accuracy(row: dict[str, Any]) -> str:
    spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread} %"


def _epochs(row: dict[str, Any], level: str) -> str:
    middle, reached, runs = row["epochs_to"][level], row["reached"][level], row["runs"]
    text = "never" if middle is None else f"{middle:g}"
    return text if reached == runs or not reached else f"{text} ({reached}/{runs})"


def finding(summary: Sequence[dict[str, Any]], epochs: int) -> str:
    """What the numbers say about reaching 95 %, in one sentence."""
    level, norms = "0.95", list(dict.fromkeys(row["norm"] for row in summary))
    lrs = {row["lr"] for row in summary}
    by_arm = [[row for row in summary if row["norm"] == norm] for norm in norms]
    best = [min(rows, key=lambda row: (row["epochs_to"][level] or math.inf, -row["accuracy"]))
            for rows in by_arm]
    if all(row["epochs_to"][level] is None for row in best):
        best = [max(rows, key=lambda row: row["accuracy"]) for rows in by_arm]
        parts = [f"{_SUBJECTS[row['norm']]} ended at {100 * row['accuracy']:.1f} % "
                 f"(learning rate {row['lr']:g})" for row in best]
        return f"Nothing reached 95 % in {epochs} epochs; {_and(parts)}."
    top = [_reached(row, level, epochs) for row in summary if row["lr"] == max(lrs)]
    sentence = f"At {'the highest ' if len(lrs) > 1 else ''}learning rate {max(lrs):g}, {_and(top)}"
    if len(lrs) > 1:
        parts = [_reached(row, level, epochs) + f" (at {row['lr']:g})" for row in best]
        sentence += f"; at the best one for each, {_and(parts)}"
    return sentence + "."


_SUBJECTS = {**NORMS, "none": "the plain network"}


def _reached(row: dict[str, Any], level: str, epochs: int) -> str:
    at = row["epochs_to"][level]
    if at is None:
        return f"{_SUBJECTS[row['norm']]} did not reach 95 % in {epochs} epochs"
    return f"{_SUBJECTS[row['norm']]} took {at:g} epoch{'s' * (at != 1)} to 95 %"


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
