"""W numbers that lie side by side, as a tuple: a vector of 16 bytes, or one number (W = 1).

Eight halves are eight numbers of float32 in registers: what is done to them is done to two fours.
"""

from functools import cache
from importlib import import_module

import numpy as np

from ..half import named
from .intrinsics import device, load, store, width

__all__ = ["HALVES", "dtypes", "each", "filled", "gather", "of_lanes", "picker", "reader",
           "scatter", "wide_reader", "writer"]

HALVES = "f2", "bf"
_EACH = {
    (1, 1): lambda f: lambda a: (f(a[0]),),
    (1, 2): lambda f: lambda a: (f(a[0]), f(a[1])),
    (1, 3): lambda f: lambda a: (f(a[0]), f(a[1]), f(a[2])),
    (1, 4): lambda f: lambda a: (f(a[0]), f(a[1]), f(a[2]), f(a[3])),
    (1, 8): lambda f: lambda a: f(a[:4]) + f(a[4:]),
    (2, 1): lambda f: lambda a, b: (f(a[0], b[0]),),
    (2, 2): lambda f: lambda a, b: (f(a[0], b[0]), f(a[1], b[1])),
    (2, 3): lambda f: lambda a, b: (f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2])),
    (2, 4): lambda f: lambda a, b: (f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])),
    (2, 8): lambda f: lambda a, b: f(a[:4], b[:4]) + f(a[4:], b[4:]),
    (3, 1): lambda f: lambda a, b, c: (f(a[0], b[0], c[0]),),
    (3, 2): lambda f: lambda a, b, c: (f(a[0], b[0], c[0]), f(a[1], b[1], c[1])),
    (3, 3): lambda f: lambda a, b, c: (f(a[0], b[0], c[0]), f(a[1], b[1], c[1]),
                                       f(a[2], b[2], c[2])),
    (3, 4): lambda f: lambda a, b, c: (f(a[0], b[0], c[0]), f(a[1], b[1], c[1]),
                                       f(a[2], b[2], c[2]), f(a[3], b[3], c[3])),
    (3, 8): lambda f: lambda a, b, c: f(a[:4], b[:4], c[:4]) + f(a[4:], b[4:], c[4:]),
    (4, 1): lambda f: lambda a, b, c, d: (f(a[0], b[0], c[0], d[0]),),
    (4, 2): lambda f: lambda a, b, c, d: (f(a[0], b[0], c[0], d[0]), f(a[1], b[1], c[1], d[1])),
    (4, 3): lambda f: lambda a, b, c, d: (f(a[0], b[0], c[0], d[0]), f(a[1], b[1], c[1], d[1]),
                                          f(a[2], b[2], c[2], d[2])),
    (4, 4): lambda f: lambda a, b, c, d: (f(a[0], b[0], c[0], d[0]), f(a[1], b[1], c[1], d[1]),
                                          f(a[2], b[2], c[2], d[2]), f(a[3], b[3], c[3], d[3])),
    (4, 8): lambda f: lambda a, b, c, d: (f(a[:4], b[:4], c[:4], d[:4])
                                          + f(a[4:], b[4:], c[4:], d[4:])),
}


def dtypes():
    """What norms have kernels for: float32, float64 and the halves."""
    import_module("ml_dtypes")                           # tells NumPy of bfloat16
    return [np.dtype(np.float32), np.dtype(np.float64), *map(named, HALVES)]


@cache
def each(f, arrays, W):
    """The function of so many tuples of W that is f of their numbers."""
    return device(_EACH[arrays, W](each(f, arrays, 4) if W == 8 else f))


@cache
def filled(W):
    """W times the same."""
    return device({1: lambda v: (v,), 2: lambda v: (v, v), 3: lambda v: (v, v, v),
                   4: lambda v: (v, v, v, v),
                   8: lambda v: (v, v, v, v, v, v, v, v)}[W])


@cache
def picker(n):
    """a[t] of n, a power of 2: choices, since a tuple with an index that is not known lies in
    memory."""
    if n == 1:
        return device(lambda t, a: a[0])
    half, of_half = n // 2, picker(n // 2)
    return device(lambda t, a: of_half(t, a[:half]) if t < half else of_half(t - half, a[half:]))


@cache
def of_lanes(f, W, same=False):
    """(f(0, *args), …, f(W − 1, *args)); ``same``: the first of them W times."""
    if same:
        whole = filled(W)
        return device(lambda *a: whole(f(0, *a)))
    return device({1: lambda *a: (f(0, *a),), 2: lambda *a: (f(0, *a), f(1, *a)),
                   4: lambda *a: (f(0, *a), f(1, *a), f(2, *a), f(3, *a)),
                   8: lambda *a: (f(0, *a), f(1, *a), f(2, *a), f(3, *a), f(4, *a), f(5, *a),
                                  f(6, *a), f(7, *a))}[W])


@cache
def gather(W):
    """W numbers from p[i] on, one by one: whatever their alignment and type."""
    return of_lanes(device(lambda k, p, i: p[i + k]), W)


@cache
def scatter(W):
    """The opposite of ``gather``."""
    def one(p, i, v):
        p[i] = v[0]

    def two(p, i, v):
        p[i], p[i + 1] = v[0], v[1]

    def four(p, i, v):
        p[i], p[i + 1], p[i + 2], p[i + 3] = v[0], v[1], v[2], v[3]

    def eight(p, i, v):
        half(p, i, v[:4])
        half(p, i + 4, v[4:])
    half = scatter(4) if W == 8 else None
    return device({1: one, 2: two, 4: four, 8: eight}[W])


def reader(W):
    """How W elements at p[i] are read: at once, if there are more than one."""
    return gather(1) if W == 1 else load


def writer(W):
    """How they are written."""
    return scatter(1) if W == 1 else store


@cache
def wide_reader(dtype, W):
    """``reader`` of an array of another dtype: of as many vectors as W of its numbers are."""
    if W in (1, width(dtype)):
        return reader(W)
    return device(lambda p, i: load(p, i) + load(p, i + 4))
