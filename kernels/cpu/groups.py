"""Narrow groups of a convolution, several computed as one.

A group of a few channels leaves most of a vector empty. Several together, with weights of zero
between them, multiply more (of 4 channels a group 4 times as much), but in whole vectors.
"""

import numpy as np

from .jit import device
from .simd import after, fill, fma, lanes, load_part, pointer, total
from .tasks import share, tasks

__all__ = ["groups_together", "joined", "parted", "spoiled_images"]


def groups_together(g, lanes):
    """How many groups to compute as one: 1 where one fills more than half a vector."""
    most = max(g.C, g.O) // g.G
    if 2 * most > lanes:
        return 1
    return next((n for n in range(2, g.G) if g.G % n == 0 and n * most >= lanes), g.G)


def _blocks(weight, g, n):
    """Weights of n groups as one, (O, n C/G, I, J), as (…, group, o, group, c, I, J)."""
    return weight.reshape(g.G // n, n, g.O // g.G, n, g.C // g.G, g.I, g.J)


def joined(weight, g, n):
    """The weights (O, C/G, I, J) of n groups as one, zero between the groups."""
    out = np.zeros((g.O, n * (g.C // g.G), g.I, g.J), weight.dtype)
    blocks = _blocks(out, g, n)
    own = weight.reshape(g.G // n, n, g.O // g.G, g.C // g.G, g.I, g.J)
    for i in range(n):
        blocks[:, i, :, i] = own[:, i]
    return out


def parted(weight, g, n):
    """The weights within the groups: the inverse of joined."""
    blocks = _blocks(weight, g, n)
    own = np.stack([blocks[:, i, :, i] for i in range(n)], axis=1)
    return own.reshape(g.O, g.C // g.G, g.I, g.J)


@device
def _mark_task(t, y, spoiled):
    """An image's row."""
    rows, size = y.shape[1], y.shape[2]
    x, zero = after(pointer(y), t * size), fill(y, 0)
    sums = zero
    for i in range(0, size, lanes(y)):
        sums = fma(load_part(x, i, min(lanes(y), size - i)), zero, sums)
    if total(sums) != 0:
        spoiled[t // rows] = True


@tasks
def _mark(run, y, spoiled):
    """spoiled[n] is set where a value of y (N, rows, values) is not finite."""
    share(_mark_task, y.shape[0] * y.shape[1], run, (y, spoiled))


def spoiled_images(y):
    """The numbers of the images of y (N, …) in which a value is not finite: zeros spread it to
    the groups beside."""
    spoiled = np.zeros(y.shape[0], np.bool_)
    _mark(y.reshape(*y.shape[:2], -1), spoiled, work=y.nbytes)
    return np.flatnonzero(spoiled)
