"""What layers with running statistics are told of these, and the checks of that."""

from __future__ import annotations

import inspect
from typing import Any

from .statistics import PRESETS

__all__ = ["ON_NONFINITE", "UPDATES", "check_policies", "check_word", "imitate"]

UPDATES = ("forward", "step")
ON_NONFINITE = ("propagate", "skip_update", "raise")


def imitate(layer: Any, like: str, said: bool) -> None:
    """Set what a preset sets. Raises ValueError for other names, and where a part of it, or
    momentum (``said``), is given, too."""
    owner = type(layer).__name__
    if like not in PRESETS:
        raise ValueError(f"{owner}: expected like to be one of {', '.join(PRESETS)}, got {like!r}")
    kind = getattr(type(layer), "_becomes", type(layer))         # a lazy layer takes what that does
    known = inspect.signature(kind).parameters.get("eps")
    eps = layer.eps if known is None else known.default
    if said or (layer.eps, layer.average, layer.correction) != (eps, None, 1):
        raise ValueError(f"{owner}: like={like!r} sets eps, average (and with it momentum) and "
                         "correction: give either it or them")
    has = {"eps": known is not None, "correction": getattr(layer, "_corrects", True)}
    for name, value in PRESETS[like].items():
        if has.get(name, True):
            setattr(layer, name, value)


def check_word(layer: Any, name: str, words: tuple[str, ...]) -> None:
    if getattr(layer, name) not in words:
        raise ValueError(f"{type(layer).__name__}: expected {name} to be one of "
                         f"{', '.join(words)}, got {getattr(layer, name)!r}")


def check_policies(layer: Any) -> None:
    owner = type(layer).__name__
    average = layer.average
    if isinstance(average, type) or (average is not None and not hasattr(average, "momentum")):
        raise ValueError(f"{owner}: expected average to be an Exponential, DebiasedExponential "
                         f"or Cumulative, got {layer.average!r}")
    check_word(layer, "update", UPDATES)
    check_word(layer, "on_nonfinite", ON_NONFINITE)
    if layer.correction not in (0, 1):
        raise ValueError(f"{owner}: expected correction to be 0 or 1, got {layer.correction!r}")
