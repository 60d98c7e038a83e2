"""Matrices and outer products in one pass."""

import numpy as np

from .columns import inner
from .memory import empty
from .simd import fill, fma, lanes, load, load_part, pointer, store, store_part
from .tasks import share, tasks

__all__ = ["add_outer"]

TASK_BYTES = 1 << 16


@inner
def _rows(t, x, u, v, a, b, N, rows, y):
    p, q, out, L = pointer(x), pointer(v), pointer(y), lanes(x)
    scale, rest = fill(p, a), N % L
    for i in range(t * rows, min(u.size, t * rows + rows)):
        s, at = fill(p, b * u[i]), i * N
        for j in range(0, N - rest, L):
            store(out, at + j, fma(load(p, at + j), scale, s * load(q, j)))
        if rest:
            j = N - rest
            z = fma(load_part(p, at + j, rest), scale, s * load_part(q, j, rest))
            store_part(out, at + j, z, rest)


@tasks
def _add(run, count, x, u, v, a, b, N, rows, y):
    share(_rows, count, run, (x, u, v, a, b, N, rows, y))


def add_outer(x, u, v, *, a, b):
    """y = a x + b u vᵀ.      x, y: (M, N)  u: (M,)  v: (N,), of one dtype"""
    M, N = x.shape
    y = empty(x.shape, x.dtype)
    if x.size:
        rows = max(1, TASK_BYTES // (N * x.itemsize))
        _add(-(-M // rows), x.ravel(), np.ascontiguousarray(u, x.dtype),
             np.ascontiguousarray(v, x.dtype), float(a), float(b), N, rows, y.ravel(),
             work=2 * x.nbytes)
    return y
