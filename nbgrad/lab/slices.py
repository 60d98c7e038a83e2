"""The loss on a line or a plane through the point where a model stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from nbgrad.autograd import no_grad
from nbgrad.nn import Module
from nbgrad.nn.functional import cross_entropy
from nbgrad.ops import Generator
from nbgrad.train.population import generators_unchanged, unchanged

from .measuring import Batch, Loss, as_it_was, loss_on, trained, write

__all__ = ["LossSlice", "loss_slice", "random_direction"]

Array = np.ndarray[Any, Any]
Direction = Sequence[Array]                 # an array for each parameter that requires a gradient


@dataclass(frozen=True)
class LossSlice:
    """losses[i] at w + positions[i] d, or losses[i, j] at w + positions[i] d + positions[j] e."""

    positions: Array
    losses: Array
    directions: tuple[Direction, ...]


def random_direction(model: Module, *, filters: bool = True, seed: int = 0) -> list[Array]:
    """A normal direction d, an array for each parameter that requires a gradient.

    filters: ‖d_f‖ = ‖w_f‖ for every filter f (a row of a weight), and 0 for biases and what else
    has one dimension, so that a step means the same for networks whose weights differ in scale
    alone.      Li, Xu, Taylor, Studer & Goldstein 2018, section 4

    >>> from nbgrad import nn
    >>> layer = nn.Linear(5, 2)
    >>> d, _ = random_direction(layer)
    >>> bool(np.allclose(np.linalg.norm(d, axis=1), np.linalg.norm(layer.weight.data, axis=1)))
    True
    """
    rng = Generator(seed).numpy
    drawn = [(p.data, rng.standard_normal(p.shape)) for p in trained(model)]
    return [_by_filter(d, w) if filters else d for w, d in drawn]


def _by_filter(d: Array, w: Array) -> Array:
    if w.ndim < 2:
        return np.zeros_like(d)
    rows = d.reshape(len(d), -1)
    goal = np.linalg.norm(w.reshape(len(w), -1).astype(np.float64), axis=1)
    scaled: Array = rows * (goal / np.linalg.norm(rows, axis=1))[:, None]
    return scaled.reshape(d.shape)


def loss_slice(model: Module, batch: Batch, directions: int | Sequence[Direction] = 1, *,
               span: float = 1.0, points: int = 21, loss: Loss = cross_entropy,
               filters: bool = True, seed: int = 0) -> LossSlice:
    """The loss on a line (one direction) or a plane (two) around the model.      Goodfellow et al.
    2015, Li, Xu, Taylor, Studer & Goldstein 2018

    batch: (input, target).  directions: how many random ones, or the directions themselves, such as
    a gradient; ``filters`` and ``seed`` are ``random_direction``'s. positions: ``points`` from
    −span to span. In the model's mode, with the same noise at every point; the model is left as it
    was. Raises ValueError for other than one or two directions, shapes that do not fit, or
    ``points`` below 1.

    >>> from nbgrad import nn, tensor
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> loss_slice(model, (tensor([[1.0]]), tensor([[1.0]])), [[np.ones((1, 1))]], points=3,
    ...            loss=nn.functional.mse_loss).losses.tolist()
    [1.0, 0.0, 1.0]
    """
    if points < 1:
        raise ValueError(f"loss_slice: points must be at least 1, got {points}")
    along = ([random_direction(model, filters=filters, seed=seed + i) for i in range(directions)]
             if isinstance(directions, int) else [list(d) for d in directions])
    params = trained(model)
    shapes = [tuple(p.shape) for p in params]
    if not 1 <= len(along) <= 2 or any([np.shape(a) for a in d] != shapes for d in along):
        raise ValueError("loss_slice: expected one or two directions, each with an array for every "
                         f"parameter that requires a gradient, of shapes {shapes}")
    positions = np.linspace(-span, span, points)
    losses = np.empty((points,) * len(along))
    with as_it_was(model), no_grad(), np.errstate(all="ignore"):
        here = [p.data.astype(np.float64) for p in params]
        for at in product(range(points), repeat=len(along)):
            for i, p in enumerate(params):
                move = sum(positions[k] * d[i] for k, d in zip(at, along))
                write(p, (here[i] + move).astype(p.dtype))
            with unchanged(model), generators_unchanged():
                losses[at] = loss_on(model, batch, loss).item()
    return LossSlice(positions, losses, tuple(along))
