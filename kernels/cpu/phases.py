"""The input gradient of a strided convolution of few channels: all phases as outputs of one.

With stride 2 the pixels of dx fall into four phases that meet different taps, and of 3 channels
each fills 3 of a vector's 16 lanes. Here the 2 × 2 pixels of all phases are the outputs of one
convolution with stride 1, whose window holds the windows of all, with weights of zero where a phase
has no tap; a second pass takes them apart. (8 images of 224×224, 3 → 32 channels, 3×3, one core of
Emerald Rapids: 11.8 ms by phases, 5.6 so; of which taking them apart is 1.0.)

Zeros spread a value that is not finite: images that have one are reported.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .jit import device
from .memory import empty
from .simd import VECTOR, fill, fma, lanes, load_part, pointer, store_part, total
from .tasks import share, tasks
from .windows import Windows, packed, shifts, windows

__all__ = ["joined", "meeting", "plan"]

GAIN = 1.2                 # least predicted, where the way is taken
APART = 8                  # multiply-adds of vectors that an output's way to its place takes


def meeting(h0, size, k, s, p, d):
    """Positions h0, h0 + s, … of x: their number, and (tap, step) for the taps that read them, the
    last first: position number n meets tap i in output n + step."""
    taps = [(i, (h0 + p - i * d) // s) for i in range(k - 1, -1, -1) if (h0 + p - i * d) % s == 0]
    return -(-(size - h0) // s), taps


class _Axis(NamedTuple):
    """Taps (phase, tap, place in the window) along an axis; the window's first place and size."""

    taps: list[tuple[int, int, int]]
    first: int
    size: int


def _axis(size, k, s, p, d):
    taps = [(r, i, at) for r in range(s) for i, at in meeting(r, size, k, s, p, d)[1]]
    first = min(at for _, _, at in taps)
    return _Axis([(r, i, at - first) for r, i, at in taps], first,
                 max(at for _, _, at in taps) - first + 1)


@lru_cache(256)
def plan(g, itemsize):
    """The windows of all phases and their taps along both axes; None where single phases are
    faster."""
    lanes = VECTOR // itemsize
    n = -(-g.sh * g.sw * g.C // lanes) * lanes         # whole vectors, that tiles write themselves
    if g.G > 1 or g.sh * g.sw == 1:
        return None
    down, right = _axis(g.H, g.I, g.sh, g.ph, g.dh), _axis(g.W, g.J, g.sw, g.pw, g.dw)
    own = down.size * right.size * g.O * n // lanes + APART
    if GAIN * own > g.I * g.J * g.O * -(-g.C // lanes):
        return None
    P, Q = -(-g.H // g.sh), -(-g.W // g.sw)
    return Windows(g.N, g.P, g.Q, P, Q, 1, 1, -down.first, -right.first, down.size, right.size,
                   1, g.O, n, P * Q * n, Q * n, n, 0), down, right


def _weights(weight, g, n, down, right):
    """weight (O, C, I, J) as (n ≥ sh · sw · C, O, rows, columns of the window)."""
    out = np.zeros((n, g.O, down.size, right.size), weight.dtype)
    for h, i, p in down.taps:
        for w, j, q in right.taps:
            c = (h * g.sw + w) * g.C
            out[c:c + g.C, :, p, q] = weight[:, :, i, j].T
    return out


@device
def _apart_task(t, z, g, P, Q, size, dx, spoiled):
    """A row of z."""
    n, run, line = t // P, g.sw * g.C, g.W * g.C
    x, y, bad = pointer(z), pointer(dx), fill(z, 0)
    for h in range(min(g.sh, g.H - t % P * g.sh)):
        at, to = t * Q * size + h * run, (n * g.H + t % P * g.sh + h) * line
        for q in range(0, line, run):
            for k in range(0, min(run, line - q), lanes(z)):
                some = min(lanes(z), run - k, line - q - k)
                v = load_part(x, at + k, some)
                store_part(y, to + q + k, v, some)
                bad = fma(v, fill(z, 0), bad)
            at += size
    if total(bad) != 0:
        spoiled[n] = True


@tasks
def _apart(run, z, g, P, Q, size, dx, spoiled):
    """dx (N, H, W, C) from z (N, P, Q, size ≥ sh · sw · C). spoiled[n] is set where a value of
    image n is not finite."""
    share(_apart_task, g.N * P, run, (z, g, P, Q, size, dx, spoiled))


def joined(dy, weight, g, s, down, right, dx):
    """dx (N, H, W, C), or the numbers of the images in which a value is not finite."""
    z, spoiled = empty((s.N, s.P, s.Q, s.n_o), dy.dtype), np.zeros(g.N, np.bool_)
    places = tuple((i, j) for i in range(down.size) for j in range(right.size))
    windows(dy, packed(_weights(weight, g, s.n_o, down, right), range(len(places)), 1),
            shifts(None, 1, s.n_o, dy.dtype), places, s, z)
    _apart(z.reshape(-1), g, s.P, s.Q, s.n_o, dx.reshape(-1), spoiled, work=2 * z.nbytes)
    return np.flatnonzero(spoiled)
