"""Convolution with few outputs: the taps of a kernel row are outputs too, until they are added up.

A vector holds 16 outputs of float32, and where a convolution has 6 most of it is idle. Here every
column w of x makes all it contributes to any output of its row,
    S[p, w, (j, o)] = Σ_i Σ_c x[p·s + i, w, c] weight[o, c, i, j],
whose n_o · J values fill vectors, and y[p, q] is the sum of J short pieces of S, which is still in
L1: y[p, q, o] = Σ_j S[p, q + j, (j, o)]. Rows and columns of padding contribute nothing and are
left out. The gradient of an input with 6 channels (64 × 14 × 14, from 16 by 5 × 5) takes one core
0.5 ms, by windows 1.75.

A weight that is not finite spreads to outputs by products with padding, which the definition has
and this has not: such weights are not for this way.
"""

from functools import lru_cache

import numpy as np

from .convkernel import FEW
from .jit import device
from .padded import zeros
from .simd import VECTOR, after, keep, lanes, load, load_part, pointer, store_part
from .tasks import share, tasks
from .windows import aligned, cut, panel

__all__ = ["folded", "suits"]

PIXELS = 96                # of S at a time: 12 KB
GAIN = 1.2                 # least predicted, where the way is taken


def _panels(J, n_o, lanes):
    """Taps of a kernel row in a panel of two vectors, panels, and their vectors."""
    taps = max(1, 2 * lanes // n_o)
    whole, rest = divmod(J, taps)
    vectors = whole * -(-taps * n_o // lanes) + -(-rest * n_o // lanes)
    return taps, whole + (rest > 0), vectors


def _columns(s):
    """The first column of x that some window meets, how many, and columns of S."""
    V = s.Q + s.wide - 1
    first = max(0, -s.left)
    return first, min(s.W, V - s.left) - first, V


_columns_of = device(_columns)


def suits(s, taps, itemsize):
    """Whether this takes fewer cycles than windows: a multiply-add of vectors takes one, adding a
    piece of S a little more."""
    lanes, (I, J) = VECTOR // itemsize, taps
    if s.G > 1 or s.sw > 1 or J < 2 or s.n_o > lanes:
        return False
    (_, columns, _), row = _columns(s), I * s.n_c
    own = columns * _panels(J, s.n_o, lanes)[2] * (row + 2) + s.Q * (1.5 * J + 2)
    return columns > 0 and GAIN * own < s.Q * (row * J + 6)


@device
def _fold(S, rows, s, V, count, step, add, shift, y, yt):
    """Add ``count`` pieces of S, ``step`` apart, to each pixel of some rows of y; the first of them
    to the shift. A row of S has V columns."""
    L = lanes(S)
    start = load(shift, 0)
    for r in range(rows):
        to = yt + r * s.sp
        for q in range(s.Q):
            at, v = (r * V + q) * 2 * L, load_part(y, to, s.n_o) if add else start
            for _ in range(count):
                v = v + load(S, at)
                at += step
            store_part(y, to, v, s.n_o)
            to += s.sq


@device
def _places(rows, room, columns, line, pitch, V, width, at, ct):
    """Where each column of some rows lies in x, and in S. What is over repeats the last one."""
    r = 0
    for p in range(rows):
        for w in range(columns):
            at[r], ct[r] = p * line + w * pitch, (p * V + w) * width
            r += 1
    for i in range(r, room):
        at[i], ct[i] = at[r - 1], ct[r - 1]


@device
def _inside(p, s, rows):
    """The first of the kernel's rows that is inside x for row p of y, and how many are."""
    first, top = 0, p * s.sh - s.top
    while first < rows.size and top + rows[first] < 0:
        first += 1
    end = first
    while end < rows.size and top + rows[end] < s.H:
        end += 1
    return first, end - first


@device
def _alike(p, last, most, s, rows):
    """How many rows of y from p on, up to ``most``, have the same rows of the kernel inside x."""
    n, end = 1, min(last, p + most)
    while p + n < end and _inside(p + n, s, rows) == _inside(p, s, rows):
        n += 1
    return n


@device
def _task(task, x, weight, shift, rows, J, gap, s, block, y):
    """``block`` rows of an image. Columns of S that are outside x stay zero."""
    W, line, blocks = 2 * lanes(x), s.W * s.n_c, -(-s.P // block)
    image, p, (c0, columns, V) = task // blocks, task % blocks * block, _columns_of(s)
    last, few, each = min(s.P, p + block), max(1, PIXELS // columns), max(1, W // s.n_o)
    own, room = aligned((few * V + 2) * W, y), -(-few * columns // FEW) * FEW
    numbers, depth, known = np.empty(2 * room + rows.size, np.int64), rows.size * s.n_c * W, 0
    nothing, at, ct = pointer(own), pointer(numbers), after(pointer(numbers), room)
    S, taps = after(nothing, W), after(ct, room)
    zeros(nothing, 0, (few * V + 2) * W)
    while p < last:
        count, (i, inside) = _alike(p, last, few, s, rows), _inside(p, s, rows)
        if count != known:
            _places(count, room, columns, s.sh * line, s.n_c, V, W, at, ct)
            known = count
        for t in range(inside):
            taps[t] = (image * s.H + p * s.sh - s.top + rows[i + t]) * line + c0 * s.n_c
        for t0 in range(0, J, each):
            t1 = min(J, t0 + each)
            if inside:
                panel((t1 - t0) * s.n_o, pointer(x), at, -(-count * columns // FEW) * FEW, taps,
                      inside, s.n_c, after(pointer(weight), t0 // each * depth + i * s.n_c * W),
                      nothing, after(S, (c0 + s.left) * W), ct, False, nothing, 0)
            _fold(after(S, t0 * gap * W), count, s, V, t1 - t0 if inside else 0,
                  gap * W + s.n_o, t0 > 0, pointer(shift), pointer(y),
                  image * s.sn + p * s.sp + s.s0)
        p += count
    keep(own)
    keep(numbers)


@tasks
def _folded(run, x, weight, shift, rows, J, gap, s, block, y):
    """y from panels of weights (panels, rows of the kernel, C, two vectors) and a vector of
    shifts."""
    share(_task, s.N * -(-s.P // block), run, (x, weight, shift, rows, J, gap, s, block, y))


def _packed(weight, taps, panels, lanes):
    """weight (n_o, C, I, J) as (panels, I, C, two vectors): some of the J taps side by side."""
    n_o, C, I, _ = weight.shape
    out = np.zeros((panels, I, C, 2 * lanes), weight.dtype)
    for p in range(panels):
        some = weight[..., p * taps:(p + 1) * taps].transpose(2, 1, 3, 0)
        out[p, ..., :some.shape[2] * n_o] = some.reshape(I, C, -1)
    return out


@lru_cache(256)
def _plan(s, rows, columns, itemsize):
    """Panels; rows of the kernel, columns and the steps between, rows of a task; operations."""
    lanes = VECTOR // itemsize
    *panels, vectors = _panels(len(columns), s.n_o, lanes)
    block, _ = cut(s._replace(Q=s.W, n_o=vectors * lanes), s.W * s.n_c * itemsize, 1,
                   len(rows) * s.n_c, 2 * VECTOR)
    work = 2 * s.N * s.P * s.W * vectors * lanes * len(rows) * s.n_c
    how = np.array(rows, np.int64), len(columns), columns[1] - columns[0], s, block
    return panels, how, work


def folded(x, weight, bias, rows, columns, s, y):
    """y by windows s, whose taps stand in ``rows`` × ``columns`` of it; weight (n_o, C, rows,
    columns)."""
    lanes = VECTOR // x.itemsize
    panels, how, work = _plan(s, rows, columns, x.itemsize)
    shift = np.zeros(lanes, x.dtype)
    if bias is not None:
        shift[:s.n_o] = bias
    _folded(x, _packed(weight, *panels, lanes), shift, *how, y, work=work)
