"""The weight gradient of convolution: a matrix product whose inner dimension is the pixels.

A task takes a block of rows (or of whole images) at a time: it copies the block of x, with its
padding, to where its windows are short steps apart in the second level of cache, and adds to its
sums tile by tile (sumtile.py), every tile over the whole block. A task has a part of the pixels and
a slice of the channels; where the gradient is large there is one part only. The parts are summed
while the result is turned into the weights' order. 3×3 kernels with stride 1 and channels enough
go by Winograd's products (winograd_weight.py).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..shapes import Conv
from . import pixelwise, thinweight, winograd_weight
from .depthweight import depthwise_weight
from .depthwise import repeated
from .groups import groups_together, parted
from .jit import device
from .layout import channels_last
from .memory import empty
from .microkernel import transpose
from .padded import copy, padded, zeros
from .simd import VECTOR, after, keep, lanes, load, load_part, pointer, store, store_part
from .sumtile import ROWS, TALL, by_windows, strip
from .tasks import share, spaces, taken, tasks

__all__ = ["conv2d_weight"]

TASKS = 16                 # at least, where there are pixels enough
BLOCK_BYTES = 1 << 18      # of x copied at a time: a quarter of the second level of cache
BLOCK_PIXELS = 1 << 10     # of dy, whose panel of two vectors is then half as much
PART_PIXELS = 1 << 7       # below, loading and storing a tile costs more than 3 % of its sums
# Sums of all parts that an L2 does not hold cost more than 5 % of the products of fewer pixels per
# part than this, to write and to add up; slices of LEAST rows of sums make more tasks at less.
LARGE_BYTES, LARGE_PIXELS, LEAST = 1 << 20, 1 << 10, 96
OWN = 48                   # rows of sums, from which on a panel of dy is worth a copy
SUM_BYTES = 1 << 19        # of the sums of one task
SUM_VALUES = 1 << 23       # of all parts


class _Cut(NamedTuple):
    """How the work is cut: by the shape alone, so that the sums are the same for all threads."""

    windows: bool          # x is copied window by window
    slice: int             # channels of a task
    slices: int
    parts: int
    share: int             # blocks of a part
    images: int            # of a block
    rows: int              # of each image, in a block
    blocks: int
    rows_c: int            # rows of sums that a pixel is copied for, in whole tiles
    n_o: int               # values in a row of sums, in whole vectors
    depth: int             # rows of sums of a group, in whole vectors
    room: int              # values: copy of x, padded rows, panel of dy
    aside: int
    own: int


def _up(n, step):
    return -(-n // step) * step


def _block(g, pixels, per_row):
    """Images and rows of each: as many whole images as there is room for, else equal bands."""
    rows = max(1, min(pixels // g.Q, BLOCK_BYTES // per_row))
    images = max(1, min(rows // g.P, g.N))
    return images, -(-g.P // -(-g.P // min(rows, g.P)))


@lru_cache(256)
def _cut(g, size):
    """Sizes of the tasks."""
    G, n_c, lanes = g.G, g.C // g.G, VECTOR // size
    n_o, taps, width = _up(g.O // g.G, lanes), g.I * g.J, g.W + 2 * g.pw
    windows = by_windows(n_c)
    cut = n_c if windows else min(n_c, max(16, SUM_BYTES // (taps * n_o * size) // 16 * 16))
    slices, rows_c = -(-n_c // cut), _up(g.depth if windows else cut, ROWS)
    depth = _up(rows_c if windows else _up(n_c, ROWS) * taps, lanes)
    pixels, few = g.N * g.P * g.Q, LARGE_BYTES // (G * depth * n_o * size)
    parts = max(1, min(-(-TASKS // (g.G * slices)), SUM_VALUES // (g.G * depth * n_o),
                       max(pixels // LARGE_PIXELS, min(pixels // PART_PIXELS, few))))
    if not windows and G * slices * parts < TASKS:
        slices = min(-(-TASKS // (G * parts)), -(-n_c * taps // LEAST))
        cut = _up(-(-n_c // slices), 16)
        slices = -(-n_c // cut)
        rows_c = _up(cut, ROWS)
    pixels = min(BLOCK_PIXELS, -(-pixels // parts))
    images, rows = _block(g, pixels, size * rows_c * (g.Q if windows else g.sh * width))
    high = (rows - 1) * g.sh + (g.I - 1) * g.dh + 1
    blocks = -(-g.N // images) * -(-g.P // rows)
    share = -(-blocks // parts)
    copied = rows * g.Q if windows else high * width
    return _Cut(windows, cut, slices, -(-blocks // share), share, images, rows, blocks, rows_c,
                n_o, depth, _up(images * copied * rows_c + 2 * lanes, lanes),
                _up(high * width * n_c + 2 * lanes, lanes) if windows else 0,
                images * rows * g.Q * 2 * lanes if g.O // g.G % lanes or taps * cut >= OWN else 0)


@device
def _windows(x, g, rows, n, y, yt, step):
    """The windows of rows of padded pixels of n values, one after the other."""
    L, width = lanes(x), (g.W + 2 * g.pw) * n
    across, run = (1, g.J * n) if g.dw == 1 else (g.J, n)
    for t in range(g.I * across):
        source, to = t // across * g.dh * width + t % across * g.dw * n, yt + t * run
        for k in range(0, run, L):
            left = min(L, run - k)
            for p in range(rows):
                at, pixel = source + p * g.sh * width + k, to + p * g.Q * step + k
                for q in range(g.Q):
                    store_part(y, pixel + q * step, load(x, at + q * g.sw * n), left)


@device
def _arrange(x, at, steps, g, cut, n, images, p0, rows, room, aside):
    """Copy n channels of the rows that rows p0 … of dy read. Steps of a pixel in the copy: by
    image, row and column of dy, and by row and column of the kernel."""
    high, width = (rows - 1) * g.sh + (g.I - 1) * g.dh + 1, g.W + 2 * g.pw
    y, step = (aside, n) if cut.windows else (room, -(-n // ROWS) * ROWS)
    for m in range(images):
        padded(x, at + m * steps[0], steps[1], steps[2], g.H, g.W, p0 * g.sh - g.ph, -g.pw, high,
               width, n, y, 0 if cut.windows else m * high * width * step, step)
        if cut.windows:
            _windows(aside, g, rows, n, room, m * rows * g.Q * cut.rows_c, cut.rows_c)
    if cut.windows:
        return (rows * g.Q * cut.rows_c, g.Q * cut.rows_c, cut.rows_c), 0, 0
    step_h = width * step
    return (high * step_h, g.sh * step_h, g.sw * step), g.dh * step_h, g.dw * step


@device
def _panels(room, steps, down, right, g, cut, n, dy, dt, images, rows, own, sums, st):
    """Add a block of pixels to all sums of a slice of channels."""
    L, n_o = lanes(dy), g.O // g.G
    flat = steps[0] == rows * steps[1] and steps[1] == g.Q * steps[2] and (
        images == 1 or rows == g.P)
    counts = (1, 1, images * rows * g.Q) if flat else (images, rows, g.Q)
    taps = 1 if cut.windows else g.I * g.J
    depth, ld = (cut.rows_c, cut.n_o) if cut.windows else (-(-n // ROWS) * ROWS, taps * cut.n_o)
    b, bt, by = dy, dt, (g.P * g.Q * g.O, g.Q * g.O, g.O)
    later = dt + images * rows * g.Q * g.O
    ask = -(-g.O * 2 * L * TALL // (n_o * depth * taps)) if g.G == 1 else 0
    for o in range(0, n_o, 2 * L):
        half = n_o - o <= L
        if cut.own:
            width, b, bt = (L if half else 2 * L), own, 0
            by = rows * g.Q * width, g.Q * width, width
            _panel(dy, dt + o, g, images, rows * g.Q, n_o - o, width, own)
        for t in range(taps):
            later = strip(half, room, t // g.J * down + t % g.J * right, steps, depth, b,
                          bt if cut.own else bt + o, by, counts, sums, st + o + t * cut.n_o, ld,
                          dy, later, ask)


@device
def _panel(dy, at, g, images, pixels, n, width, own):
    """Up to ``width`` values of each pixel, side by side; zeros where there are fewer."""
    L, pixel = lanes(dy), 0
    for m in range(images):
        for q in range(pixels):
            here = at + (m * g.P * g.Q + q) * g.O
            for v in range(0, width, L):
                store(own, pixel + v, load_part(dy, here + v, max(0, min(L, n - v))))
            pixel += width


@device
def _task(worker, dy, x, steps, g, cut, spaces, sums, next_task):
    """The tasks that a worker comes to."""
    n_c, bands, tasks = g.C // g.G, -(-g.P // cut.rows), cut.parts * g.G * cut.slices
    y, room = pointer(sums), after(pointer(spaces), worker * spaces.shape[1])
    aside, own = after(room, cut.room), after(room, cut.room + cut.aside)
    t = taken(next_task)
    while t < tasks:
        c, e = t % cut.slices * cut.slice, t // cut.slices % g.G
        part, n = t // (cut.slices * g.G), min(cut.slice, n_c - c)
        st = (part * g.G + e) * cut.depth + c * g.I * g.J
        last = cut.depth - c * g.I * g.J if c + n == n_c else n * g.I * g.J
        zeros(y, st * cut.n_o, last * cut.n_o)
        for b in range(part * cut.share, min((part + 1) * cut.share, cut.blocks)):
            n0, p0 = b // bands * cut.images, b % bands * cut.rows
            images, rows = min(cut.images, g.N - n0), min(cut.rows, g.P - p0)
            at, dt = n0 * steps[0] + e * n_c + c, (n0 * g.P + p0) * g.Q * g.O + e * (g.O // g.G)
            by, down, right = _arrange(pointer(x), at, steps, g, cut, n, images, p0, rows,
                                       room, aside)
            _panels(room, by, down, right, g, cut, n, pointer(dy), dt, images, rows, own, y,
                    st * cut.n_o)
        t = taken(next_task)


@tasks
def _weight(run, dy, x, steps, g, cut, spaces, sums):
    """sums (parts, G, depth, n_o) from dy (N, P, Q, O) and x of those steps."""
    next_task = np.zeros(1, np.int64)
    share(_task, spaces.shape[0], run, (dy, x, steps, g, cut, spaces, sums, next_task))


@device
def _finish_task(t, sums, n_o, out):
    """A vector of outputs."""
    parts, G, depth, ld = sums.shape
    K, L = out.shape[1], lanes(sums)
    size, tiles = G * depth * ld, ld // L
    e, o = t // tiles, t % tiles * L
    room = np.empty(2 * L * L, out.dtype)
    x, y, square = pointer(sums), pointer(out), pointer(room)
    turned = after(square, L * L)
    for k in range(0, depth, L):
        for r in range(L):
            at = (e * depth + k + r) * ld + o
            total = load(x, at)
            for b in range(1, parts):
                total = total + load(x, at + b * size)
            store(square, r * L, total)
        transpose(square, 0, L, turned, 0, L)
        for r in range(min(L, n_o - o)):
            copy(turned, r * L, max(0, min(L, K - k)), y, (e * n_o + o + r) * K + k)
    keep(room)


@tasks
def _finish(run, sums, n_o, out):
    """out (G · O/G, K) = Σ over the parts of sums (parts, G, depth, …), turned."""
    share(_finish_task, sums.shape[1] * (sums.shape[3] // lanes(sums)), run, (sums, n_o, out))


def _turn(sums, g):
    """The sum of the parts in the weights' order."""
    out = empty((g.O, g.depth), sums.dtype)
    _finish(sums, g.O // g.G, out, work=sums.nbytes + out.nbytes)
    return out


def _geometry(x, g):
    """Steps of x (N, H, W, C) in values. A kernel of one tap sees only the pixels it reads."""
    steps = g.H * g.W * g.C, g.W * g.C, g.C
    if g.I == g.J == 1 and g.ph == g.pw == 0:
        return (steps[0], g.sh * steps[1], g.sw * steps[2]), g._replace(H=g.P, W=g.Q, sh=1, sw=1)
    return steps, g


def _turned(g, lanes):
    """Whether a plain product dyᵀ x fills vectors better as the transpose of xᵀ dy."""
    plain = (g.I, g.J, g.sh, g.sw, g.ph, g.pw, g.G) == (1, 1, 1, 1, 0, 0, 1)
    return plain and _up(g.O, lanes) * g.C > _up(g.C, lanes) * g.O


def conv2d_weight(dy, x, *, kernel_size, stride, padding, dilation, groups):
    """dw[o,c,i,j] = Σ_{n,p,q} dy[n,o,p,q] x[n, c, p·s + i·d − pad, …]: conv2d's transpose in w."""
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    g = Conv.of(x.shape, shape, stride, padding, dilation, groups)
    if dy.size == 0 or 0 in shape:
        return np.zeros(shape, x.dtype)
    if g.G == g.C > 1:                      # a channel that serves several is read as several
        x = repeated(channels_last(x), g.O // g.C)
        return depthwise_weight(channels_last(dy), x, g._replace(C=g.O, G=g.O)).reshape(shape)
    if pixelwise.few_pixels(g, weights=True):
        return pixelwise.weight_gradient(channels_last(dy), channels_last(x), g)
    if _turned(g, VECTOR // x.itemsize):
        out = conv2d_weight(x, dy, kernel_size=kernel_size, stride=stride, padding=padding,
                            dilation=dilation, groups=groups)
        return np.ascontiguousarray(out.swapaxes(0, 1))
    together = groups_together(g, VECTOR // x.itemsize)
    if together > 1:
        out = conv2d_weight(dy, x, kernel_size=kernel_size, stride=stride, padding=padding,
                            dilation=dilation, groups=groups // together)
        return parted(out, g, together)
    if winograd_weight.suits(g, x.itemsize):
        out = winograd_weight.winograd_weight(channels_last(dy), channels_last(x), g)
        if out is not None:
            return out.reshape(shape)
    if thinweight.suits(g, x.itemsize):
        out = thinweight.thin_weight(dy, x, g)
        if np.isfinite(out).all():
            return out
    work = 2 * dy.size * g.depth
    steps, g = _geometry(x, g)
    cut = _cut(g, x.itemsize)
    sums = empty((cut.parts, g.G, cut.depth, cut.n_o), x.dtype)
    _weight(channels_last(dy), channels_last(x), steps, g, cut,
            spaces(cut.room + cut.aside + cut.own, x.dtype), sums, work=work)
    out = _turn(sums, g)
    if cut.windows:
        out = np.ascontiguousarray(out.reshape(g.O, g.I * g.J, g.C // g.G).transpose(0, 2, 1))
    return out.reshape(shape)
