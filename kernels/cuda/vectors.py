"""W numbers that lie side by side, as a tuple: a vector of 16 bytes, or one number (W = 1)."""

from functools import cache

from .intrinsics import device, load, store

__all__ = ["each", "filled", "gather", "of_lanes", "reader", "scatter", "writer"]

_EACH = {
    (1, 1): lambda f: lambda a: (f(a[0]),),
    (1, 2): lambda f: lambda a: (f(a[0]), f(a[1])),
    (1, 4): lambda f: lambda a: (f(a[0]), f(a[1]), f(a[2]), f(a[3])),
    (2, 1): lambda f: lambda a, b: (f(a[0], b[0]),),
    (2, 2): lambda f: lambda a, b: (f(a[0], b[0]), f(a[1], b[1])),
    (2, 4): lambda f: lambda a, b: (f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])),
    (3, 1): lambda f: lambda a, b, c: (f(a[0], b[0], c[0]),),
    (3, 2): lambda f: lambda a, b, c: (f(a[0], b[0], c[0]), f(a[1], b[1], c[1])),
    (3, 4): lambda f: lambda a, b, c: (f(a[0], b[0], c[0]), f(a[1], b[1], c[1]),
                                       f(a[2], b[2], c[2]), f(a[3], b[3], c[3])),
    (4, 1): lambda f: lambda a, b, c, d: (f(a[0], b[0], c[0], d[0]),),
    (4, 2): lambda f: lambda a, b, c, d: (f(a[0], b[0], c[0], d[0]), f(a[1], b[1], c[1], d[1])),
    (4, 4): lambda f: lambda a, b, c, d: (f(a[0], b[0], c[0], d[0]), f(a[1], b[1], c[1], d[1]),
                                          f(a[2], b[2], c[2], d[2]), f(a[3], b[3], c[3], d[3])),
}


@cache
def each(f, arrays, W):
    """The function of so many tuples of W that is f of their numbers."""
    return device(_EACH[arrays, W](f))


@cache
def filled(W):
    """W times the same."""
    return device({1: lambda v: (v,), 2: lambda v: (v, v), 4: lambda v: (v, v, v, v)}[W])


@cache
def of_lanes(f, W, same=False):
    """(f(0, *args), …, f(W − 1, *args)); ``same``: the first of them W times."""
    if same:
        whole = filled(W)
        return device(lambda *a: whole(f(0, *a)))
    return device({1: lambda *a: (f(0, *a),), 2: lambda *a: (f(0, *a), f(1, *a)),
                   4: lambda *a: (f(0, *a), f(1, *a), f(2, *a), f(3, *a))}[W])


@cache
def gather(W):
    """W numbers from p[i] on, one by one: whatever their alignment and type."""
    return device({1: lambda p, i: (p[i],), 2: lambda p, i: (p[i], p[i + 1]),
                   4: lambda p, i: (p[i], p[i + 1], p[i + 2], p[i + 3])}[W])


@cache
def scatter(W):
    """The opposite of ``gather``."""
    def one(p, i, v):
        p[i] = v[0]

    def two(p, i, v):
        p[i], p[i + 1] = v[0], v[1]

    def four(p, i, v):
        p[i], p[i + 1], p[i + 2], p[i + 3] = v[0], v[1], v[2], v[3]
    return device({1: one, 2: two, 4: four}[W])


def reader(W):
    """How W elements at p[i] are read: at once, if there are more than one."""
    return gather(1) if W == 1 else load


def writer(W):
    """How they are written."""
    return scatter(1) if W == 1 else store
