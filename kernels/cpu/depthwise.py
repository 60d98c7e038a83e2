"""Depthwise convolution, channels-last: rows of outputs from up to 3 × 3 taps (depthtile.py).

x (N, H, W, C), weight (taps, C), g the geometry (shapes.Conv). A task copies what a band of rows
reads, one vector of channels after the other with the padding around it, to the second level of
cache. Larger kernels add piece by piece to y. The input gradient is a convolution too: for each
phase of the stride, a sum over the taps that meet it, of consecutive pixels of dy. So it is the
same loop, over axes that say which pixel a tap reads.
"""

import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from .depthtile import ROWS, rows_of
from .epilogue import collect, merge, room_for
from .jit import device
from .memory import empty
from .padded import zeros
from .simd import VECTOR, after, keep, lanes, load, load_part, pointer, store
from .tasks import share, spaces, tasks

__all__ = ["axis", "depthwise", "depthwise_input", "gather", "lines_of", "plan_of", "plane_of",
           "reach", "repeated"]


BLOCK_BYTES = 1 << 17      # of pixels copied at a time: in an L2 still
CHUNK = 1 << 10            # bytes of channels at a time


class _Axis(NamedTuple):
    """Output u · period + phase reads pixel u · step + start + m · apart by the kernel's
    tap first + m · by, for m = 0 … taps − 1; apart > 0."""

    period: int
    step: int
    start: int
    apart: int
    taps: int
    first: int
    by: int


def _forward(k, stride, pad, dilation):
    return np.array([_Axis(1, stride, -pad, dilation, k, 0, 1)])


def _backward(k, stride, pad, dilation):
    """One axis per phase of the stride; the pixels are dy's, the last tap reads the first."""
    by, axes = stride // math.gcd(stride, dilation), []
    for phase in range(stride):
        met = [j for j in range(k) if (phase + pad - j * dilation) % stride == 0]
        last = met[-1] if met else 0
        axes.append(_Axis(stride, 1, (phase + pad - last * dilation) // stride,
                          by * dilation // stride, len(met), last, -by))
    return np.array(axes)


@device
def axis(axes, i):
    a = axes[i]
    return _Axis(a[0], a[1], a[2], a[3], a[4], a[5], a[6])


# (rows of taps, taps, step) that a kernel is made of: 3 × 3 with stride 1, with stride 2, its input
# gradient, and all others. A shape costs 0.1 s of compiling.
SHAPES = (((3, 3, 1),), ((3, 3, 2),), tuple((i, j, 1) for i in (1, 2) for j in (1, 2)),
          tuple((i, j, 1) for i in (1, 2, 3) for j in (1, 2, 3)))


def _piece(down, right, j):
    """How many taps of a row from tap j on go together, and by which step."""
    apart = right.apart == 1 or right.taps == 1
    if apart and right.step == 1:
        return min(3, right.taps - j), 1
    if apart and right.step == 2 and down.taps == 3 and right.taps == 3:
        return 3, 2
    return 1, 1


_piece_device = device(_piece)


def _shapes(downs, rights):
    """The first of SHAPES that has all that are needed."""
    found = set()
    for down in downs:
        for right in rights:
            down, right, j = _Axis(*down), _Axis(*right), 0
            while j < right.taps:
                taps, step = _piece(down, right, j)
                found.update((min(ROWS, down.taps - i), taps, step)
                             for i in range(0, down.taps, ROWS))
                j += taps
    return next(shapes for shapes in SHAPES if found.issubset(shapes))


@device
def reach(axes, first, last):
    """Of the pixels that outputs first … last − 1 read: the first, and how many to the last."""
    low, high = 1 << 30, -1 << 30
    for i in range(first, last):
        a = axis(axes, i % axes.shape[0])
        if a.taps:
            at = i // a.period * a.step + a.start
            low, high = min(low, at), max(high, at + (a.taps - 1) * a.apart)
    return (low, high - low + 1) if low <= high else (0, 0)


class _Bands(NamedTuple):
    """How rows of y are cut into bands, of each image, and channels into some at a time; values in
    the copy of the pixels that a band reads. By the shape alone."""

    rows: int
    some: int
    bands: int
    chunks: int
    room: int


def _bands(P, Q, C, downs, rights, size):
    def most(axes, count):
        """Pixels that so many outputs, one after the other, read at most."""
        used = [_Axis(*a) for a in axes.tolist() if a[4]]
        if not used:
            return 0
        spread = max(a.start + (a.taps - 1) * a.apart for a in used) - min(a.start for a in used)
        return (count + used[0].period - 2) // used[0].period * used[0].step + spread + 1
    lanes = VECTOR // size
    some = min(C, CHUNK // size)
    line, vectors, rows = most(rights, Q) * lanes, -(-some // lanes), P
    while rows > 1 and most(downs, rows) * line * vectors * size > BLOCK_BYTES:
        rows = -(-rows // 2)
    room = vectors * (most(downs, rows) * line + 3 * 64 // size)
    return _Bands(rows, some, -(-P // rows), -(-C // some), room)


@device
def plane_of(x, rows, width):
    """Values from one vector of channels to the next: an odd number of cache lines, so that those
    of a pixel do not share sets of L1."""
    line = 64 // VECTOR * lanes(x)
    return rows * width * lanes(x) // (2 * line) * (2 * line) + 3 * line


@device
def gather(x, at, size, C, n, top, rows, left, width, room):
    """n channels of rows top … and columns left … of an image of that size, C values a pixel, to
    room (vectors of channels, rows, width, lanes), planes of plane_of; zeros outside."""
    (H, W), L, plane = size, lanes(x), plane_of(x, rows, width)
    first = max(0, min(width, -left))
    last, whole = max(first, min(width, W - left)), n // L * plane
    for r in range(rows):
        h, line = top + r, r * width * L
        if h < 0 or h >= H:
            for v in range(0, n, L):
                zeros(room, line + v // L * plane, width * L)
            continue
        for v in range(0, n, L):
            zeros(room, line + v // L * plane, first * L)
            zeros(room, line + v // L * plane + last * L, (width - last) * L)
        for w in range(first, last):
            source = at + (h * W + left + w) * C
            for to in range(line + w * L, whole, plane):
                store(room, to, load(x, source))
                source += L
            if n % L:
                store(room, whole + line + w * L, load_part(x, source, n % L))


def lines_of(shapes, gradient=False):
    """Rows of outputs from pieces of those shapes, from pixels as ``gather`` lays them: planes of
    rows of ``width``, at ``to`` the one that the first output reads first. n of C channels."""
    some = rows_of(shapes, gradient)

    @device
    def lines(room, to, plane, width, down, right, weight, J, C, n, bias, y, target):
        L = lanes(room)
        yt, out, count, below, many = target
        for v in range(0, n, L):
            first = 1
            for i in range(0, down.taps, ROWS):
                high, j = min(ROWS, down.taps - i), 0
                while j < right.taps:
                    taps, step = _piece_device(down, right, j)
                    tap = (down.first + i * down.by) * J + right.first + j * right.by
                    at = to + v // L * plane + (i * down.apart * width + j * right.apart) * L
                    some((high, taps, step), room,
                         (at, down.apart * width * L, right.step * L, down.step * width * L),
                         weight, (tap * C + v, down.by * J * C, right.by * C), bias, (first, v), y,
                         (yt + v, out, count, below, many), min(L, n - v))
                    first, j = 0, j + taps
    return lines


@device
def phase(axis, number, first, last):
    """Of the outputs first … last − 1: the first one of that phase, and how many there are."""
    start = first + (number - first) % axis.period
    return start, max(0, (last - 1 - start) // axis.period + 1)


@cache
def _kernel_of(shapes):
    """The loop over all bands, from pieces of those shapes."""
    lines = lines_of(shapes)

    @device
    def band(x, at, size, weight, bias, J, downs, rights, n, p0, p1, room, y, yt):
        """Rows p0 … p1 − 1 of n channels of an image of y, which begins at yt."""
        Q, C = y.shape[2:]
        (top, rows), (left, width) = reach(downs, p0, p1), reach(rights, 0, Q)
        gather(x, at, size, C, n, top, rows, left, width, room)
        for i in range(downs.shape[0]):
            down = axis(downs, i)
            p, many = phase(down, i, p0, p1)
            h = p // down.period * down.step + down.start - top
            for r in range(rights.shape[0]):
                right = axis(rights, r)
                q, count = phase(right, r, 0, Q)
                to, out, below = yt + (p * Q + q) * C, right.period * C, down.period * Q * C
                if down.taps == 0 or right.taps == 0:       # not in a convolution itself
                    for k in range(many * count):
                        zeros(pointer(y), to + k // count * below + k % count * out, n)
                else:
                    lines(room, (h * width + right.start - left) * lanes(room),
                          plane_of(x, rows, width), width,
                          down, right, weight, J, C, n, bias, pointer(y),
                          (to, out, count, below, many))

    @device
    def task(worker, x, weight, bias, J, downs, rights, cut, spaces, y, table):
        """The share of a worker."""
        N, P, Q, C = y.shape
        H, W = x.shape[1], x.shape[2]
        workers, count = spaces.shape[0], N * cut.bands * cut.chunks
        room = after(pointer(spaces), worker * spaces.shape[1])
        for t in range(count * worker // workers, count * (worker + 1) // workers):
            image, c = t // cut.chunks // cut.bands, t % cut.chunks * cut.some
            p0 = t // cut.chunks % cut.bands * cut.rows
            p1, n = min(p0 + cut.rows, P), min(cut.some, C - c)
            band(pointer(x), image * H * W * C + c, (H, W), after(pointer(weight), c),
                 after(pointer(bias), c), J, downs, rights, n, p0, p1, room, y,
                 image * P * Q * C + c)
            if table.size:
                first = (image * P + p0) * Q
                numbers = np.arange(first, first + (p1 - p0) * Q) * C + c
                collect(pointer(y), pointer(numbers), numbers.size, n, table, t // cut.chunks, c)
                keep(numbers)

    def loop(run, x, weight, bias, J, downs, rights, cut, spaces, y, room):
        """y (N, P, Q, C)."""
        share(task, spaces.shape[0], run,
              (x, weight, bias, J, downs, rights, cut, spaces, y, room.table))
        if room.table.size:
            merge(run, room.table, room.mean, room.m2)
    return tasks(loop, "rows " + " ".join(map(str, shapes)))


@lru_cache(256)
def plan_of(g, size, backward=False):
    """(axes of rows, of columns, shapes, bands) of a convolution (N, P, Q, O), or of its gradient
    in x (N, H, W, O)."""
    axes, (P, Q) = (_backward, (g.H, g.W)) if backward else (_forward, (g.P, g.Q))
    downs, rights = axes(g.I, g.sh, g.ph, g.dh), axes(g.J, g.sw, g.pw, g.dw)
    return downs, rights, _shapes(downs, rights), _bands(P, Q, g.O, downs, rights, size)


def _sums(x, weight, bias, g, plan, y, work=0, moments=None):
    downs, rights, shapes, cut = plan
    _kernel_of(shapes)(x, weight, bias, g.J, downs, rights, cut, spaces(cut.room, x.dtype), y,
                       room_for(y, g.N * cut.bands, moments), work=work)


@device
def _repeat_task(t, x, times, out):
    source, target = x[t], out[t]
    for c in range(source.size):
        for m in range(times):
            target[c * times + m] = source[c]


@tasks
def _repeat(run, x, times, out):
    """out (pixels, C · times): every channel several times."""
    share(_repeat_task, x.shape[0], run, (x, times, out))


@device
def _merge_task(t, x, times, out):
    source, target = x[t], out[t]
    for c in range(target.size):
        total = source[c * times]
        for m in range(1, times):
            total += source[c * times + m]
        target[c] = total


@tasks
def _merge(run, x, times, out):
    """out (pixels, C) = the sums of ``times`` neighbours."""
    share(_merge_task, out.shape[0], run, (x, times, out))


def repeated(x, times):
    """x (N, H, W, C) with every channel several times: what serves several outputs is read as
    several channels."""
    if times == 1:
        return x
    out = empty((*x.shape[:3], x.shape[3] * times), x.dtype)
    _repeat(x.reshape(-1, x.shape[3]), times, out.reshape(-1, out.shape[3]), work=out.nbytes)
    return out


def depthwise(x, weight, bias, g, y, work=0, moments=None):
    """y (N, P, Q, O). Moments as of conv2d."""
    _sums(repeated(x, g.O // g.C), weight, bias, g, plan_of(g, x.itemsize), y, work, moments)


def depthwise_input(dy, weight, g, dx, work=0):
    """dx (N, H, W, C)."""
    times = g.O // g.C
    out = dx if times == 1 else empty((*dx.shape[:3], g.O), dx.dtype)
    _sums(dy, weight, np.zeros(g.O, dy.dtype), g, plan_of(g, dy.itemsize, True), out, work)
    if times > 1:
        _merge(out.reshape(-1, g.O), times, dx.reshape(-1, g.C), work=out.nbytes)
