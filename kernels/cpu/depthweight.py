"""The weight gradient of depthwise convolution: rows of outputs, as in the convolution itself.

A task adds what some rows of dy make with x to sums of some channels (depthtile.py); the sums of
the tasks are added up at the end.
"""

from functools import cache

import numpy as np

from .depthwise import axis, line_of, plan_of
from .jit import device
from .memory import empty
from .padded import zeros as clear
from .simd import VECTOR, after, far, pointer
from .tasks import share, tasks

__all__ = ["depthwise_weight"]

VECTORS = 16               # of channels in a task: 9 KB of sums stay in L1
TASKS = 16                 # about: each adds up its products in the dtype of x


@cache
def _kernel_of(shapes):
    """The loop over all rows, from pieces of those shapes."""
    line = line_of(shapes, True)

    @device
    def task(t, dy, x, J, downs, rights, zeros, asks, rows, some, sums):
        """``rows`` rows of dy, ``some`` channels."""
        N, P, Q, C = dy.shape
        H, W = x.shape[1], x.shape[2]
        (parts, V, K, L), down, right = sums.shape, axis(downs, 0), axis(rights, 0)
        part, c = t % parts, t // parts * some
        n, own = min(some, C - c), after(pointer(sums), (part * V + c // L) * K * L)
        clear(own, 0, (n + L - 1) // L * K * L)
        for r in range(part * rows, min((part + 1) * rows, N * P)):
            line(after(pointer(x), c), r // P * H * W * C, r % P * down.step + down.start, (H, W),
                 down, right, own, K, J, C, n, own, after(pointer(dy), c), (r * Q * C, C, Q, asks),
                 pointer(zeros))

    def loop(run, dy, x, J, downs, rights, zeros, asks, rows, some, sums):
        """sums (parts, vectors, I·J, lanes)."""
        share(task, sums.shape[0] * -(-dy.shape[3] // some), run,
              (dy, x, J, downs, rights, zeros, asks, rows, some, sums))
    return tasks(loop, "weights " + " ".join(map(str, shapes)))


def depthwise_weight(dy, x, g):
    """dw (C, I·J) from dy (N, P, Q, C) and x (N, H, W, C)."""
    plan, L = plan_of(g, x.dtype), VECTOR // x.itemsize
    some = VECTORS * L
    rows = -(-g.N * g.P // min(g.N * g.P, -(-TASKS // -(-g.C // some))))
    sums = empty((-(-g.N * g.P // rows), -(-g.C // L), g.I * g.J, L), x.dtype)
    _kernel_of(plan.shapes)(dy, x, g.J, plan.downs, plan.rights, plan.zeros, int(far(x, dy)),
                            rows, some, sums, work=x.nbytes + dy.nbytes)
    return np.ascontiguousarray(sums.sum(0).transpose(0, 2, 1).reshape(-1, g.I * g.J)[:g.C])
