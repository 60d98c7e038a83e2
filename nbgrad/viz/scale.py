"""Axes of a picture: where a value lies between the two ends, the ticks, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Axis", "axis", "finite", "names", "number"]

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: object) -> float | None:
    """The value as a float, None where it is none or not finite.

    >>> finite(2), finite(None), finite(float("nan")), finite("1")
    (2.0, None, None, None)
    """
    good = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if good else None      # type: ignore[arg-type]


def number(value: float) -> str:
    """A number as it is read: four digits, powers of ten for the very large and very small.

    >>> number(0.93456), number(-12000.0), number(1e-5), number(2.5e7), number(60)
    ('0.9346', '−12,000', '10⁻⁵', '2.5×10⁷', '60')
    """
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size and (size >= 1e6 or size < 1e-3):
        mantissa, exponent = f"{value:.3e}".split("e")
        digits = mantissa.rstrip("0").rstrip(".")
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
        text = {"1": power, "-1": "-" + power}.get(digits, f"{digits}×{power}")
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−")


@dataclass(frozen=True)
class Axis:
    """From values to places: 0 is the low end, 1 the high end. Ticks are (place, text).

    Where ``names`` are given, a name lies in the middle of its share of the axis.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]
    names: tuple[str, ...] = ()

    def place(self, value: object) -> float | None:
        """Where a value or a name lies; None where it has no place (NaN; on a log axis, 0)."""
        if self.names:
            return (self.names.index(_name(value)) + 0.5) / len(self.names)
        x = finite(value)
        return None if x is None or (self.log and x <= 0) else self._fraction(x)

    def clipped(self, value: object) -> float | None:
        """The same, but what lies below a log axis or beyond an end is at that end."""
        x = finite(value)
        if x is None:
            return None
        return min(max(self._fraction(x), 0.0), 1.0) if x > 0 or not self.log else 0.0

    def _fraction(self, x: float) -> float:
        if self.log:
            return math.log(x / self.low) / math.log(self.high / self.low)
        return (x - self.low) / (self.high - self.low)


def names(values: Iterable[object]) -> tuple[str, ...]:
    """The different values as text, in order of appearance."""
    return tuple(dict.fromkeys(map(_name, values)))


def _name(value: object) -> str:
    x = finite(value)
    return str(value) if x is None else number(x)


def axis(values: Iterable[object], *, log: bool = False, zero: bool = False,
         margin: float = 0.03, at: int = 0) -> Axis:
    """An axis that holds all values that have a place on it, and 0 if asked for.

    Ticks are at the values themselves where these are ``at`` different ones or fewer.

    >>> [text for _, text in axis([0.12, 0.98]).ticks]
    ['0.2', '0.4', '0.6', '0.8', '1.0']
    >>> [text for _, text in axis([1e-4, 5.0], log=True).ticks]
    ['10⁻⁴', '0.001', '0.01', '0.1', '1']
    """
    found = [x for v in values if (x := finite(v)) is not None and (x > 0 or not log)]
    found = found or [1.0, 10.0]
    own = sorted(set(found)) if len(set(found)) <= at else []
    if log:
        return _log_axis(min(found), max(found), margin, own)
    low, high = min(found + [0.0] * zero), max(found + [0.0] * zero)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    room = (high - low) * margin
    bottom = low if zero and low == 0 else low - room
    top = high if zero and high == 0 else high + room
    return _with_ticks(bottom, top, False, own or _linear_ticks(bottom, top))


def _log_axis(low: float, high: float, margin: float, own: Sequence[float]) -> Axis:
    if low == high:
        low, high = low / 2, high * 2
    room = (high / low) ** margin
    low, high = max(low / room, 1e-300), high * room
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits, step in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), *(((1,), n) for n in (2, 3, 5))):
        ticks = [d * 10.0 ** e for e in range(first, last + 1) if e % step == 0 for d in digits]
        inside = [t for t in ticks if low <= t <= high]
        if len(inside) <= 6:
            break
    if len(inside) < 2:                     # less than a factor of two: as if it were linear
        inside = [t for t in _linear_ticks(low, high) if t > 0]
    return _with_ticks(low, high, True, own or inside)


def _linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def _with_ticks(low: float, high: float, log: bool, ticks: Sequence[float]) -> Axis:
    bare = Axis(low, high, log, ())
    texts = [number(t) for t in ticks] if log else _texts(ticks)
    return Axis(low, high, log, tuple((bare._fraction(t), text) for t, text in zip(ticks, texts)))


def _texts(ticks: Sequence[float]) -> list[str]:
    """All with the same number of decimals, unless they are very large or very small."""
    texts = [number(t) for t in ticks]
    if max(map(abs, ticks), default=0) >= 1e6 or any("⁻" in text for text in texts):
        return texts
    decimals = max((len(f"{t:.10g}".partition(".")[2]) for t in ticks), default=0)
    return [f"{t:,.{decimals}f}".replace("-", "−") for t in ticks]
