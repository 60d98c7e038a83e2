"""What the doctor says: one Finding per cause, and the words that all checks share.

Thresholds come with their reasons; "healthy" are the MLP, LeNet and ResNet-20 of nbgrad.models on
digits after 40 to 400 steps: 130 combinations of activation, placement, dropout, optimizer,
learning rate and batch size.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .examination import Array, Examination, Layer

__all__ = ["DEAD", "OFF", "SHARE", "Finding", "Hits", "evaluated_by_running", "found", "graded",
           "momentum", "share", "some", "tracked", "upper"]

# Output standard deviations by which a quarter of the channels is off. Healthy: 0.41 at most, most
# of them below 0.2, unless the weights still move fast (0.97), which is told apart as lagging.
OFF = 0.5
SHARE = 0.25            # of channels, with which something is a property of the layer
DEAD = 0.5              # of channels; healthy with a ReLU before the norm: up to 0.42
LATE = 10 ** 9          # a batch so late that the averaging rule has settled

Hits = dict[str, dict[str, float]]      # evidence by layer


@dataclass(frozen=True)
class Finding:
    """One cause, in words, with the numbers of the first of ``layers``.

    problem: False for what is worth knowing and does not yet cost anything."""

    code: str
    layers: tuple[str, ...]             # worst or first one first; empty: the model or the data
    cause: str
    evidence: dict[str, float]
    advice: str
    problem: bool = True

    def __str__(self) -> str:
        where = f" in {self.layers[0]}" if self.layers else ""
        more = len(self.layers) - 1
        where += f" and {more} more layer{'s' * (more > 1)}" if more > 0 else ""
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return (f"{'problem' if self.problem else 'note'}: {self.code}{where}\n"
                f"  {self.cause}\n  evidence: {numbers}\n  what to do: {self.advice}")


def found(code: str, hits: Hits, cause: str, advice: str, problem: bool = True,
          by: str | None = None) -> Iterator[Finding]:
    """A Finding if there are hits; the worst has the largest ``by``."""
    if hits:
        order = sorted(hits, key=lambda name: -hits[name][by]) if by else list(hits)
        yield Finding(code, tuple(order), cause, hits[order[0]], advice, problem)


def graded(code: str, hits: Hits, limit: float, by: str, cause: str,
           advice: str, excused: Container[str] = ()) -> Iterator[Finding]:
    """A problem where evidence ``by`` is at least ``limit``, else, or if excused, a note."""
    bad = {name: h for name, h in hits.items() if h[by] >= limit and name not in excused}
    yield from found(code, bad, cause, advice, True, by)
    mild = {name: h for name, h in hits.items() if name not in bad}
    yield from found(code, mild, cause, advice, False, by)


def evaluated_by_running(e: Examination) -> Iterator[tuple[Layer, Array, Array]]:
    """The layers whose running mean and var matter, with these."""
    for layer in e.layers:
        if layer.running is not None and layer.norm.statistics != "prediction":
            yield layer, *layer.running


def upper(d: Array | None) -> float:
    """What a quarter of the channels exceeds; channels without a number do not count."""
    d = np.zeros(0) if d is None else d[np.isfinite(d)]
    return float(np.quantile(d, 1 - SHARE)) if d.size else 0.0


def share(channels: Array) -> float:
    """Of channels for which it is so."""
    return float(np.mean(channels)) if channels.size else 0.0


def momentum(norm: Any, t: int = LATE) -> float:
    """Weight of the t-th batch when it came."""
    if norm.average is not None:
        return float(norm.average.momentum(t))
    return 1 / t if norm.momentum is None else float(norm.momentum)


def some(e: Examination, layer: Layer) -> bool:
    """Whether it got batches that say what data vary: of one sample each, nothing does."""
    return max(e.sizes) > 1 and any((found.count > 1).any() for found in layer.inputs)


def tracked(layer: Layer) -> int:
    """Batches that the running statistics have seen."""
    t = layer.norm.num_batches_tracked
    return 0 if t is None else int(t.data)
