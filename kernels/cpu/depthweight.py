"""The weight gradient of depthwise convolution: rows of outputs, as in the convolution itself.

A task adds what some rows of dy make with x to sums of some channels (depthtile.py); the sums of
the tasks are added up at the end.
"""

from functools import cache

import numpy as np

from .depthwise import axes_of, axis, line_of, shapes_of
from .jit import device
from .memory import empty
from .padded import zeros as clear
from .simd import VECTOR, after, pointer
from .tasks import share, tasks

__all__ = ["depthwise_weight"]

VECTORS = 16               # of channels in a task: 9 KB of sums stay in L1
TASKS = 16                 # at least


@cache
def _kernel_of(shapes):
    """The loop over all rows, from pieces of those shapes."""
    line = line_of(shapes, True)

    @device
    def task(t, dy, x, J, downs, rights, zeros, rows, some, sums):
        """``rows`` rows of dy, ``some`` channels."""
        N, P, Q, C = dy.shape
        H, W = x.shape[1], x.shape[2]
        parts, K, down, right = sums.shape[0], sums.shape[1], axis(downs, 0), axis(rights, 0)
        part, c = t % parts, t // parts * some
        n, own = min(some, C - c), after(pointer(sums), part * K * C + c)
        for k in range(K):
            clear(own, k * C, n)
        for r in range(part * rows, min((part + 1) * rows, N * P)):
            line(after(pointer(x), c), r // P * H * W * C, r % P * down.step + down.start, (H, W),
                 down, right, own, J, C, n, own, after(pointer(dy), c), (r * Q * C, C, Q),
                 pointer(zeros))

    def loop(run, dy, x, J, downs, rights, zeros, rows, some, sums):
        """sums (parts, I·J, C)."""
        share(task, sums.shape[0] * -(-sums.shape[2] // some), run,
              (dy, x, J, downs, rights, zeros, rows, some, sums))
    return tasks(loop, "weights " + " ".join(map(str, shapes)))


def depthwise_weight(dy, x, g):
    """dw (C, I·J) from dy (N, P, Q, C) and x (N, H, W, C)."""
    downs, rights = axes_of(g.I, g.sh, g.ph, g.dh), axes_of(g.J, g.sw, g.pw, g.dw)
    some = VECTORS * VECTOR // x.itemsize
    rows = -(-g.N * g.P // min(g.N * g.P, -(-TASKS // -(-g.C // some))))
    sums = empty((-(-g.N * g.P // rows), g.I * g.J, g.C), x.dtype)
    _kernel_of(shapes_of(downs, rights))(dy, x, g.J, downs, rights, np.zeros(g.C, x.dtype), rows,
                                         some, sums, work=x.nbytes + dy.nbytes)
    return np.ascontiguousarray(sums.sum(0).T)
