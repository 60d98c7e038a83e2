"""Colours and dashes that all pictures share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from nbgrad.train.config import NORMS

__all__ = ["NORM_STYLES", "STYLES", "Style", "styles"]


class Style(NamedTuple):
    """Of a series: its colour on light and on dark paper; dashes in line widths, () is solid."""

    light: str
    dark: str
    dashes: tuple[float, ...]


# Okabe & Ito 2008: told apart with any colour vision, and in grey by the dashes. Made darker or
# lighter where their own colours have less than 3 : 1 against the paper.
STYLES = (
    Style("#0072B2", "#56B4E9", ()),
    Style("#D55E00", "#FF8F4D", (5, 1.5)),
    Style("#008F68", "#2FC9A0", (8, 1.5, 1.5, 1.5)),
    Style("#C0649B", "#E7A3CB", (3, 1)),
    Style("#B07A00", "#F0BE45", (1, 1)),
    Style("#3C91C2", "#B5DEF6", (6, 1, 1, 1, 1, 1)),
    Style("#6B6B6B", "#B8B8B8", (2, 2)),
    Style("#7A4FA3", "#BFA0E8", (10, 2)),
)
NORM_STYLES = dict(zip(("batch", "none", "layer", "group", "instance", "rms"), STYLES))
_KNOWN = {**{NORMS[norm]: i for i, norm in enumerate(NORM_STYLES)},
          **{norm: i for i, norm in enumerate(NORM_STYLES)}, "no norm": 1, "plain": 1, "without": 1}


def styles(labels: Sequence[str]) -> list[int]:
    """Which of STYLES each label has: a norm its own everywhere, the others what is left.

    >>> styles(["without norm, learning rate 3", "batch norm", "noisy"])
    [1, 0, 2]
    """
    known = [_KNOWN.get(re.split("[,(:]", label)[0].strip()) for label in labels]
    left = iter([i for i in range(len(STYLES)) if i not in known])
    return [i if i is not None and i not in known[:at] else next(left, at % len(STYLES))
            for at, i in enumerate(known)]
