"""Depthwise convolution, channels-last: rows of outputs from up to 3 × 3 taps (depthtile.py).

x (N, H, W, C), weight (O, 1, I, J), g the geometry (shapes.Conv). x is read where it lies. Larger
kernels add piece by piece to y. The input gradient is a convolution too: for each phase of the
stride, a sum over the taps that meet it, of consecutive pixels of dy. So it is the same loop, over
axes that say which pixel a tap reads.
"""

import itertools
import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from .depthtile import ROWS, rows_of
from .epilogue import collect, merge, room_for
from .jit import device
from .memory import empty
from .padded import zeros as clear
from .simd import VECTOR, far, keep, lanes, pointer
from .tasks import share, tasks

__all__ = ["axis", "depthwise", "depthwise_input", "line_of", "plan_of", "repeated"]

BLOCK_BYTES = 1 << 17      # of rows whose statistics are taken together: in an L2 still


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
# gradient, and all others, also those of several pieces. A shape costs 0.1 s of compiling.
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
    """The first of SHAPES that has all that are needed; the last where y is added to."""
    found, pieces = set(), 0
    for down, right in itertools.product(downs, rights):
        down, right, j, number = _Axis(*down), _Axis(*right), 0, 0
        while j < right.taps:
            taps, step = _piece(down, right, j)
            heights = [min(ROWS, down.taps - i) for i in range(0, down.taps, ROWS)]
            found.update((high, taps, step) for high in heights)
            j, number = j + taps, number + len(heights)
        pieces = max(pieces, number)
    return SHAPES[-1] if pieces > 1 else next(s for s in SHAPES if found.issubset(s))


def _packed(weight):
    """weight (O, 1, I, J) as (vectors, taps, lanes), with zeros at the end."""
    C, _, I, J = weight.shape
    L = VECTOR // weight.itemsize
    whole = weight.reshape(C, I * J)
    if C % L:
        whole = np.pad(whole, ((0, -C % L), (0, 0)))
    return np.ascontiguousarray(whole.reshape(-1, L, I * J).transpose(0, 2, 1))


class Plan(NamedTuple):
    """Axes of rows and of columns, shapes, and what tiles read in place of a row outside the image:
    nine pixels (3 taps, stride 2), or four outputs' single pixels."""

    downs: np.ndarray
    rights: np.ndarray
    shapes: tuple
    zeros: np.ndarray


@lru_cache(256)
def plan_of(g, dtype, backward=False):
    """Of a convolution (N, P, Q, O), or of its gradient in x (N, H, W, O)."""
    axes = _backward if backward else _forward
    downs, rights = axes(g.I, g.sh, g.ph, g.dh), axes(g.J, g.sw, g.pw, g.dw)
    pixels = max(9, 3 * int(rights[:, 1].max()) + 1)
    return Plan(downs, rights, _shapes(downs, rights), np.zeros(g.O * pixels, dtype))


def line_of(shapes, gradient=False):
    """A row of outputs from pieces of those shapes; n of C channels."""
    row = rows_of(shapes, shapes is SHAPES[-1], gradient)

    @device
    def line(x, at, h, size, down, right, weight, K, J, C, n, bias, y, target, zeros):
        (H, W), L = size, lanes(x)
        first = 1
        for i in range(0, down.taps, ROWS):
            rows, j = min(ROWS, down.taps - i), 0
            while j < right.taps:
                taps, step = _piece_device(down, right, j)
                dw = right.step if taps == 1 else 1
                h0, w0 = h + i * down.apart, right.start + j * right.apart
                tap = (down.first + i * down.by) * J + right.first + j * right.by
                row((rows, taps, step), x, (at + (h0 * W + w0) * C, h0, w0, H, W),
                    (down.apart * W * C, dw * C, down.apart, dw), weight,
                    (tap * L, down.by * J * L, right.by * L, K * L), bias, (first, 0), y, target,
                    zeros, n)
                first, j = 0, j + taps
    return line


@cache
def _kernel_of(shapes):
    """The loop over all rows, from pieces of those shapes."""
    line = line_of(shapes)

    @device
    def whole(t, x, weight, K, bias, J, downs, rights, zeros, asks, y):
        """A row of y."""
        P, Q, C = y.shape[1:]
        H, W = x.shape[1], x.shape[2]
        image, p = t // P, t % P
        down = axis(downs, p % downs.shape[0])
        h = p // down.period * down.step + down.start
        for r in range(min(rights.shape[0], Q)):
            right = axis(rights, r)
            to, count, out = (t * Q + r) * C, (Q - 1 - r) // right.period + 1, right.period * C
            if down.taps == 0 or right.taps == 0:
                for u in range(count):          # no output reads them: not in a convolution itself
                    clear(pointer(y), to + u * out, C)
            else:
                line(pointer(x), image * H * W * C, h, (H, W), down, right, pointer(weight), K, J,
                     C, C, pointer(bias), pointer(y), (to, out, count, asks), pointer(zeros))

    @device
    def task(t, x, weight, bias, J, downs, rights, zeros, asks, block, y, table):
        """``block`` rows."""
        rows, (Q, C) = y.shape[0] * y.shape[1], y.shape[2:]
        first, last = t * block, min((t + 1) * block, rows)
        for row in range(first, last):
            whole(row, x, weight, weight.shape[1], bias, J, downs, rights, zeros, asks, y)
        if table.size:
            numbers = np.arange(first * Q * C, last * Q * C, C)
            collect(pointer(y), pointer(numbers), numbers.size, C, table, t, 0)
            keep(numbers)

    def loop(run, x, weight, bias, J, downs, rights, zeros, asks, block, y, room):
        """y (N, P, Q, C)."""
        share(task, -(-y.shape[0] * y.shape[1] // block), run,
              (x, weight, bias, J, downs, rights, zeros, asks, block, y, room.table))
        if room.table.size:
            merge(run, room.table, room.mean, room.m2)
    return tasks(loop, "rows " + " ".join(map(str, shapes)))


def _sums(x, weight, bias, g, y, backward=False, work=0, moments=None):
    N, P, Q, C = y.shape
    plan = plan_of(g, x.dtype, backward)
    block = max(1, BLOCK_BYTES // (Q * C * x.itemsize))
    room = room_for(y, -(-N * P // block), moments)
    _kernel_of(plan.shapes)(x, _packed(weight), bias, g.J, plan.downs, plan.rights, plan.zeros,
                            int(far(x, y)), block if room.table.size else 1, y, room, work=work)


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
    _sums(repeated(x, g.O // g.C), weight, bias, g, y, work=work, moments=moments)


def depthwise_input(dy, weight, g, dx, work=0):
    """dx (N, H, W, C)."""
    times = g.O // g.C
    out = dx if times == 1 else empty((*dx.shape[:3], g.O), dx.dtype)
    _sums(dy, weight, np.zeros(g.O, dy.dtype), g, out, True, work)
    if times > 1:
        _merge(out.reshape(-1, g.O), times, dx.reshape(-1, g.C), work=out.nbytes)
