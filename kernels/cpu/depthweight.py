"""The weight gradient of depthwise convolution: rows of outputs, as in the convolution itself.

A task adds what some bands of rows of dy make with x to sums of some channels (depthtile.py); the
sums of the tasks are added up at the end.
"""

from functools import cache

import numpy as np

from .depthwise import axis, gather, lines_of, plan_of, plane_of, reach
from .jit import device
from .memory import empty
from .padded import zeros
from .simd import after, lanes, pointer
from .tasks import share, spaces, tasks

__all__ = ["depthwise_weight"]

TASKS = 16                 # at least


@cache
def _kernel_of(shapes):
    """The loop over all bands, from pieces of those shapes."""
    lines = lines_of(shapes, True)

    @device
    def band(dy, dt, x, at, size, J, down, downs, right, rights, n, p0, p1, room, own):
        """What rows p0 … p1 − 1 of n channels of an image of dy, which begins at dt, add."""
        Q, C = dy.shape[2:]
        (top, rows), (left, width) = reach(downs, p0, p1), reach(rights, 0, Q)
        gather(x, at, size, C, n, top, rows, left, width, room)
        to = (p0 * down.step + down.start - top) * width * lanes(room)
        lines(room, to, plane_of(x, rows, width), width, down, right, own, J, C, n, own,
              pointer(dy), (dt + p0 * Q * C, C, Q, Q * C, p1 - p0))

    @device
    def task(worker, dy, x, J, downs, rights, cut, spaces, sums):
        """The share of a worker."""
        (N, P, Q, C), H, W = dy.shape, x.shape[1], x.shape[2]
        parts, K, workers, blocks = sums.shape[0], sums.shape[1], spaces.shape[0], N * cut.bands
        room = after(pointer(spaces), worker * spaces.shape[1])
        down, right, count = axis(downs, 0), axis(rights, 0), parts * cut.chunks
        for t in range(count * worker // workers, count * (worker + 1) // workers):
            part, c = t // cut.chunks, t % cut.chunks * cut.some
            n, own = min(cut.some, C - c), after(pointer(sums), part * K * C + c)
            for k in range(K):
                zeros(own, k * C, n)
            for b in range(blocks * part // parts, blocks * (part + 1) // parts):
                image, p0 = b // cut.bands, b % cut.bands * cut.rows
                band(dy, image * P * Q * C + c, pointer(x), image * H * W * C + c, (H, W), J,
                     down, downs, right, rights, n, p0, min(p0 + cut.rows, P), room, own)

    def loop(run, dy, x, J, downs, rights, cut, spaces, sums):
        """sums (parts, I·J, C)."""
        share(task, spaces.shape[0], run, (dy, x, J, downs, rights, cut, spaces, sums))
    return tasks(loop, "weights " + " ".join(map(str, shapes)))


def depthwise_weight(dy, x, g):
    """dw (C, I·J) from dy (N, P, Q, C) and x (N, H, W, C)."""
    downs, rights, shapes, cut = plan_of(g, x.itemsize)
    sums = empty((min(g.N * cut.bands, -(-TASKS // cut.chunks)), g.I * g.J, g.C), x.dtype)
    _kernel_of(shapes)(dy, x, g.J, downs, rights, cut, spaces(cut.room, x.dtype), sums,
                       work=x.nbytes + dy.nbytes)
    return np.ascontiguousarray(sums.sum(0).T)
