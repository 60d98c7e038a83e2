"""Reductions over any axes, in two steps whose order depends on the shape alone.

float32 is added in eights and beyond in float64; blocks are fixed by the shape and merged in index
order, so that a sum has the same bits in every run. NaN wins in ``max`` and ``min``, as in NumPy.
"""

import math

import numpy as np

from ..quiet import quiet
from .intrinsics import FULL, cuda, device, load, width
from .launch import Kernel, factory
from .layout import aligned
from .memory import SIMULATED, empty, order_of, xp

__all__ = ["max", "min", "prod", "sum"]

THREADS = 256 if not SIMULATED else 64
WARPS = THREADS // 32
SEGMENT = 1 << 15            # elements that a block adds up: 128 KB of float32
LINE = 32                    # columns of a block: 128 bytes of float32, what a fetch should be
LANES = THREADS // LINE      # rows that a block takes at once
_smaller, _larger = min, max
_OPS = {"sum": (np.add, 0), "prod": (np.multiply, 1), "max": (np.maximum, -math.inf),
        "min": (np.minimum, math.inf)}


def _combine(name):
    """How two values become one; a NaN is kept."""
    return device({"sum": lambda a, b: a + b, "prod": lambda a, b: a * b,
                   "max": lambda a, b: a if a > b or a != a else b,
                   "min": lambda a, b: a if a < b or a != a else b}[name])


def _wide(name, dtype):
    """What is accumulated in: float64 where values add up."""
    return np.dtype(np.float64) if name in ("sum", "prod") else dtype


def _of_vector(f, n):
    if n == 2:
        return device(lambda v: f(v[0], v[1]))
    return device(lambda v: f(f(v[0], v[1]), f(v[2], v[3])))


def across(f):
    """One value of each lane of a warp, combined; every lane gets the result."""
    @device
    def warp(v):
        for k in range(5):
            v = f(v, cuda.shfl_xor_sync(FULL, v, 16 >> k))
        return v
    return warp


@factory
def _rows(name, source, target):
    """out[a, k] = the k-th segment of row a of x (A, R), combined; P segments a row."""
    f, wide, W = _combine(name), _wide(name, source).type, width(source)
    g, warp, start = _of_vector(f, W), across(f), wide(_OPS[name][1])
    result = target.type

    def body(x, out, R, segment, P, vectors):
        cells = cuda.shared.array(WARPS, wide)
        a, k = cuda.blockIdx.x // P, cuda.blockIdx.x % P
        first, t = a * R + k * segment, cuda.threadIdx.x
        n = _smaller(segment, R - k * segment)
        v, whole = start, n // (2 * W) * (2 * W) if vectors else 0
        for i in range(first + 2 * W * t, first + whole, 2 * W * THREADS):
            v = f(v, wide(f(g(load(x, i)), g(load(x, i + W)))))
        for i in range(first + whole + t, first + n, THREADS):
            v = f(v, wide(x[i]))
        v = warp(v)
        if t % 32 == 0:
            cells[t // 32] = v
        cuda.syncthreads()
        if t == 0:
            for w in range(1, WARPS):
                v = f(v, cells[w])
            out[a * P + k] = result(v)
    kinds = source.str[1:], target.str[1:]
    return Kernel(body, f"*{kinds[0]} *{kinds[1]} i8 i8 i8 i4", threads=THREADS,
                  name=f"{name}_rows_{kinds[0]}_{kinds[1]}")


@factory
def _columns(name, source, target):
    """out[a, k, b] = x[a, r, b] combined over the k-th segment of r; x (A, R, B), P segments."""
    f, wide = _combine(name), _wide(name, source).type
    start, result = wide(_OPS[name][1]), target.type

    def body(x, out, R, B, segment, P):
        cells = cuda.shared.array(THREADS, wide)
        t, groups = cuda.threadIdx.x, (B + LINE - 1) // LINE
        group, rest = cuda.blockIdx.x % groups, cuda.blockIdx.x // groups
        a, k = rest // P, rest % P
        lane, b = t // LINE, group * LINE + t % LINE
        v, end = start, _smaller(R, k * segment + segment)
        if b < B:
            r = k * segment + lane
            while r + 3 * LANES < end:
                i = (a * R + r) * B + b
                p, q = x[i], x[i + LANES * B]
                p, q = f(p, x[i + 2 * LANES * B]), f(q, x[i + 3 * LANES * B])
                v = f(v, wide(f(p, q)))
                r += 4 * LANES
            while r < end:
                v = f(v, wide(x[(a * R + r) * B + b]))
                r += LANES
        cells[t] = v
        cuda.syncthreads()
        if lane == 0 and b < B:
            for w in range(1, LANES):
                v = f(v, cells[w * LINE + t])
            out[(a * P + k) * B + b] = result(v)
    kinds = source.str[1:], target.str[1:]
    return Kernel(body, f"*{kinds[0]} *{kinds[1]} i8 i8 i8 i8", threads=THREADS,
                  name=f"{name}_columns_{kinds[0]}_{kinds[1]}")


def every():
    """The kernels of float32 and float64, for those who compile them ahead."""
    for source in map(np.dtype, (np.float32, np.float64)):
        for name in _OPS:
            wide = _wide(name, source)
            for a, b in {(source, source), (source, wide), (wide, source)}:
                yield _rows(name, a, b)
                yield _columns(name, a, b)


def _run(name, x, shape, target):
    """x (A, R, B) in shape's numbers, combined over R: (A, B) of dtype ``target``."""
    A, R, B = shape
    segment = SEGMENT if B == 1 else _larger(4 * LANES, SEGMENT // LINE)
    P = _larger(1, -(-R // segment))
    wide = _wide(name, x.dtype)
    out = empty((A, P, B), wide if P > 1 else target)
    if B == 1:
        vectors = aligned(x) and R % width(x.dtype) == 0
        _rows(name, x.dtype, out.dtype)(A * P, x, out, R, segment, P, vectors)
    else:
        _columns(name, x.dtype, out.dtype)(A * P * -(-B // LINE), x, out, R, B, segment, P)
    return out if P == 1 else _run(name, out, (A, P, B), target)


def reduced(name, x, axes, target):
    """x combined over a set of axes, without them: the last run of axes in memory, then the
    others."""
    order = order_of(x)
    t = x.transpose(order)
    if not t.flags.c_contiguous:                  # gaps or negative steps: what is kept, then what
        order = [i for i in range(x.ndim) if i not in axes] + sorted(axes)        # goes, in a copy
        t = xp.ascontiguousarray(x.transpose(order))
    end = order.index(next(i for i in reversed(order) if i in axes)) + 1
    first = end - 1
    while first and order[first - 1] in axes:
        first -= 1
    left = order[:first] + order[end:]
    rest = {left.index(i) for i in left if i in axes}
    shape = [math.prod(t.shape[p:q]) for p, q in ((0, first), (first, end), (end, t.ndim))]
    part = _run(name, t, shape, _wide(name, x.dtype) if rest else target)
    part = part.reshape([x.shape[i] for i in left])
    if rest:
        part = reduced(name, part, rest, target)
        left = [i for i in left if i not in axes]
    if left != sorted(left):
        part = part.transpose(sorted(range(len(left)), key=left.__getitem__))
    return part


def _reduce(name, x, axes, keepdims):
    ufunc, start = _OPS[name]
    axes = range(x.ndim) if axes is None else axes if isinstance(axes, tuple) else (axes,)
    axes = {a % x.ndim for a in axes}
    if x.dtype.kind != "f":
        dtype = np.int64 if name == "sum" else None
        f = {"sum": xp.sum, "prod": xp.prod, "max": xp.max, "min": xp.min}[name]
        y = f(x, axis=tuple(axes), keepdims=keepdims, **({"dtype": dtype} if dtype else {}))
        return xp.asarray(y) if not SIMULATED else x[:0].__class__(np.shape(y), y.dtype, y)
    out = [1 if i in axes else n for i, n in enumerate(x.shape)]
    shape = out if keepdims else [n for i, n in enumerate(x.shape) if i not in axes]
    if not x.size:
        if math.isinf(start) and math.prod(shape):
            raise ValueError(f"zero-size array to reduction operation {ufunc.__name__} which has "
                             "no identity")
        y = empty(shape, x.dtype)
        y.fill(start)
        return y
    return (reduced(name, x, axes, x.dtype) if axes else x.copy()).reshape(shape)


@quiet
def sum(x, *, axes, keepdims):
    """Σ over axes."""
    return _reduce("sum", x, axes, keepdims)


@quiet
def prod(x, *, axes, keepdims):
    """Π over axes."""
    return _reduce("prod", x, axes, keepdims)


def max(x, *, axes, keepdims):
    """Largest element over axes; NaN if there is one."""
    return _reduce("max", x, axes, keepdims)


def min(x, *, axes, keepdims):
    """Smallest element over axes; NaN if there is one."""
    return _reduce("min", x, axes, keepdims)
