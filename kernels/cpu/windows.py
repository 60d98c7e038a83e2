"""Direct convolution: every output is one sum over the taps of its window, in registers.

x (N, H, W, C) is channels-last. A task makes some output rows of one image: it copies the input
rows they read, with their padding, to a buffer that stays in L2 (or reads x where there is none),
and hands the output pixels in a row to the tiles of convkernel.py. The same loops make
the gradient of the input: there a window is the taps that meet in one pixel, and with a stride the
pixels of dx fall into stride² phases, each with its own taps.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .convkernel import FEW, PIXELS, few, few_half, tile, tile_half
from .epilogue import collect, merge, room_for
from .jit import device
from .memory import empty
from .microkernel import transpose
from .padded import padded, zeros
from .simd import (
    PAST_BYTES,
    VECTOR,
    after,
    keep,
    lanes,
    load,
    load_part,
    pointer,
    put,
    store,
    store_part,
)
from .tasks import share, tasks

__all__ = ["Windows", "aligned", "cut", "packed", "panel", "shifts", "spread", "square",
           "windows"]

TASK_FLOP = 6 << 20        # about 60 us of one core
SLOW, START = 2, 12         # pixels that take as long as FEW do more in a low tile, and as a task
TASK_PIXELS = 112          # at least: a panel of weights comes from L2 or L3 once per task
PIECES = 16                # of weights per task that packs them
TASKS = 16                 # at least, where there are panels to share out
BUFFER_BYTES = 1 << 18     # of input rows, a quarter of an L2
ASK_BYTES = 1 << 20        # of x and y, which are not all in an L2
# Bytes of weights of a task, where it reads x in place and where it copies rows, again for every
# part of the panels. (256 → 512 channels, 3×3, stride 2, 14×14, one core of Emerald Rapids: 7.6 ms
# with half as much, 7.0 so; 128 → 256 of 28×28 6.2 and 5.9.)
PANEL_BYTES, COPIED_BYTES = 1 << 19, 1 << 20


class Windows(NamedTuple):
    """y[n, p, q, o] = Σ_t Σ_c x[n, p sh − top + i_t, q sw − left + j_t, c] w[o, t, c] for (P, Q)
    pixels, written sp · p + sq · q + s0 behind each image's start of y; n_c and n_o per group."""

    N: int
    H: int
    W: int
    P: int
    Q: int
    sh: int
    sw: int
    top: int
    left: int
    high: int                      # rows and columns from a window's first to its last
    wide: int
    G: int
    n_c: int
    n_o: int
    sn: int
    sp: int
    sq: int
    s0: int

    @property
    def bare(self):
        """No window leaves x, which is read where it lies."""
        return (self.top <= 0 and self.left <= 0
                and (self.P - 1) * self.sh - self.top + self.high <= self.H
                and (self.Q - 1) * self.sw - self.left + self.wide <= self.W)


@device
def aligned(n, x):
    """Room for n values of x's dtype that begins on a vector's boundary: stores that straddle two
    cache lines cost a quarter of the time of a transform."""
    room = np.empty(n + VECTOR // x.itemsize, x.dtype)
    first = -room.ctypes.data % VECTOR // x.itemsize
    return room[first:first + n]


@device
def _pack_task(task, weight, lane, count, step, size, places, n, out):
    """A half panel; where its rows come in pieces, all half panels of some pieces."""
    G, P, T, K, W = out.shape
    L, taps, group = lanes(weight), places.size, weight.size // G
    halves, deep = (1, 1) if count == 1 else (P * 2, PIECES)
    across, down = P * 2 // halves, -(-count // deep)
    e, half, i = task // (across * down), task // down % across, task % down * deep
    own = aligned(L * L, out)
    turned, where, y = pointer(own), pointer(places), pointer(out)
    for piece in range(i, min(count, i + deep)):
        for h in range(half, half + halves):
            at = e * group + h * L * lane + piece * step
            to = (e * P + h // 2) * T * K * W + h % 2 * L
            k, t = piece * (size // taps), 0
            for m in range(0, size, L):
                square(pointer(weight), weight.size, at + m, lane, min(L, n - h * L),
                        min(L, size - m), turned)
                for r in range(min(L, size - m)):
                    if where[t] >= 0:
                        store(y, to + (where[t] * K + k) * W, load(turned, r * L))
                    t += 1
                    if t == taps:
                        k, t = k + 1, 0
    keep(own)


@tasks
def _pack(run, weight, lane, count, step, size, places, n, out):
    """out (G, panels, T, K, W): lane j of panel p is a row of weight, (p W + j) · lane from its
    group's start, of ``count`` pieces that lie ``step`` apart, each ``size`` values; in a row all
    taps of k = 0, 1, … follow each other, and tap t goes to places[t], or nowhere."""
    some = out.shape[1] * 2 if count == 1 else -(-count // PIECES)
    share(_pack_task, out.shape[0] * some, run,
          (weight, lane, count, step, size, places, n, out))


@device
def square(x, size, at, ld, m, n, own):
    """own (n, lanes) = the transpose of m rows of n of the ``size`` values of x, zeros behind."""
    L = lanes(x)
    if m == L and ld == 1 and n == 1:
        store(own, 0, load(x, at))
    elif m == L and at + (L - 1) * ld + L <= size:
        transpose(x, at, ld, own, 0, L)
    else:
        zeros(own, 0, n * L)
        for j in range(m):
            for r in range(n):
                own[r * L + j] = x[at + j * ld + r]


@lru_cache(256)
def _numbers(size, taps):
    """Of each tap of the kernel its number in ``taps``, or −1."""
    places = np.full(size, -1, np.int64)
    places[list(taps)] = range(len(taps))
    return places


def packed(weight, taps, groups, transposed=False):
    """Panels (G, panels, T, K, W) of the weights (O, C/G, I, J): k over c and the panels over o, or
    the other way round; taps are indices into I · J."""
    weight = np.ascontiguousarray(weight)
    O, n_c, I, J = weight.shape
    n_o, size, W = O // groups, I * J, 2 * VECTOR // weight.itemsize
    places = _numbers(size, tuple(taps))
    n, K = (n_c, n_o) if transposed else (n_o, n_c)
    rows = (size, n_o, n_c * size, size) if transposed else (n_c * size, 1, 0, n_c * size)
    out = empty((groups, -(-n // W), len(taps), K, W), weight.dtype)
    _pack(weight.reshape(-1), *rows, places, n, out, work=4 * out.nbytes)
    return out


@device
def _copy(aside, W, count, n, y, ct, past):
    """n values of each pixel, from tiles of their own to y."""
    L = W // 2
    for r in range(count):
        at, to = r * W, ct[r]
        for j in range(0, n - L + 1, L):
            put(y, to + j, load(aside, at + j), past)
        if n % L:
            j = n - n % L
            store_part(y, to + j, load_part(aside, at + j, n % L), n % L)


@device
def panel(n, a, at, pixels, taps, count, run, weight, shift, c, ct, past, x, ask):
    """n outputs, of one vector or two, for the pixels that begin at ``at``, to ct; a multiple of
    FEW. All are pointers; ``past`` as for a tile. Meanwhile x, which the next task reads, is
    fetched, ``ask`` values for each k of a tile, as 12 pixels side by side are more streams than
    the hardware follows; returns where that ended. (One core of Emerald Rapids, 128 → 128 channels
    of 56×56, 1×1: 103 GFLOP/s without, 119 in a burst before each tile, 131 if x were in L2; two of
    Zen 4, 64 → 32 of 112×112: 203 without, 270 with bursts.)"""
    g, half = 0, n <= lanes(a)
    tall = 2 * PIXELS if half else PIXELS
    while g + tall <= pixels:
        if half:
            tile_half(a, at, g, taps, count, run, weight, shift, c, ct, past, x, ask)
        else:
            tile(a, at, g, taps, count, run, weight, shift, c, ct, past, x, ask)
        g, x = g + tall, after(x, count * run * ask)
    while g < pixels:
        if half:
            few_half(a, at, g, taps, count, run, weight, shift, c, ct, past, x, 0)
        else:
            few(a, at, g, taps, count, run, weight, shift, c, ct, past, x, 0)
        g += FEW
    return x


@device
def _places(s, rows, room, first, width, pitch, yt, at, ct):
    """Where each pixel reads the buffer and writes y. What is over repeats the last one, to the
    same bits."""
    r = 0
    for p in range(rows):
        source, target = first + p * s.sh * width * pitch, yt + p * s.sp
        for _ in range(s.Q):
            at[r], ct[r] = source, target
            source, target, r = source + s.sw * pitch, target + s.sq, r + 1
    for i in range(r, room):
        at[i], ct[i] = at[r - 1], ct[r - 1]


@device
def _block_of(task, s, block, blocks):
    """The image, first row and number of rows of a task."""
    p0 = task % blocks * block
    return task % (s.N * blocks) // blocks, p0, min(block, s.P - p0)


@device
def _rows_of(task, s, block, blocks):
    """The rows of x, of all images, that a task reads: the first and how many."""
    image, p0, rows = _block_of(task, s, block, blocks)
    top = p0 * s.sh - s.top
    first = max(0, top)
    return image * s.H + first, max(0, min(s.H, top + (rows - 1) * s.sh + s.high) - first)


@device
def _task(task, x, weight, step, shift, taps, run, s, pitch, block, parts, bare, asks, past, y,
          table):
    """``block`` rows of an image × 1/parts of the panels."""
    G, P, W = shift.shape
    L, C, blocks, shared = lanes(x), G * s.n_c, -(-s.P // block), -(-P // parts)
    width = s.W if bare else (s.Q - 1) * s.sw + s.wide
    part, (image, p0, rows) = task // (s.N * blocks), _block_of(task, s, block, blocks)
    top, tall = p0 * s.sh - s.top, (rows - 1) * s.sh + s.high
    room = -(-rows * s.Q // FEW) * FEW
    first = ((image * s.H + top) * width - s.left) * C if bare else 0
    buffer = 0 if bare else -(-tall * width * pitch // L) * L
    beside = room if s.n_o % L or (past and table.size) else 0
    own, numbers = aligned(buffer + beside * W, y), np.empty(2 * room + beside, np.int64)
    a, at = pointer(own), pointer(numbers)
    aside, ct, tight = after(a, buffer), after(at, room), after(at, 2 * room)
    if bare:
        a = pointer(x)
    else:
        padded(pointer(x), image * s.H * s.W * C, s.W * C, C, s.H, s.W, top, -s.left, tall, width,
               C, a, 0, pitch)
    _places(s, rows, room, first, width, pitch, image * s.sn + p0 * s.sp + s.s0, at, ct)
    for r in range(beside):
        tight[r] = r * W
    next_row, ask = _rows_of(task + 1, s, block, blocks)
    later, first_panel, last_panel = pointer(x), part * shared, min((part + 1) * shared, P)
    if asks:                                      # spread over the values that all tiles take
        steps = (room // PIXELS) * G * (last_panel - first_panel) * taps.size * run
        later, ask = after(later, next_row * s.W * C), -(-ask * s.W * C // max(1, steps))
    else:
        ask = 0
    for e in range(G):
        for p in range(first_panel, last_panel):
            n, i = min(W, s.n_o - p * W), e * P + p
            whole, out = n % L == 0 and beside == 0, after(pointer(y), e * s.n_o + p * W)
            made, places = out if whole else aside, ct if whole else tight
            later = panel(n, after(a, e * s.n_c), at, room, pointer(taps), taps.size, run,
                          after(pointer(weight), i * step), after(pointer(shift), i * W), made,
                          places, past and whole, later, ask)
            if table.size:
                collect(made, places, rows * s.Q, n, table, task % (s.N * blocks),
                        e * s.n_o + p * W)
            if not whole:
                _copy(aside, W, rows * s.Q, n, out, ct, past)
    keep(own)
    keep(numbers)


@tasks
def _windows(way, x, weight, step, shift, taps, run, s, pitch, block, parts, bare, asks, past, y,
             room):
    """y from weight panels that lie ``step`` apart and shifts (G, panels, W); taps are places in
    the buffer, whose pixels are ``pitch`` apart; run values are contiguous there. ``asks``:
    tiles ask for the pixels of the next one, see ``panel``."""
    share(_task, parts * s.N * -(-s.P // block), way,
          (x, weight, step, shift, taps, run, s, pitch, block, parts, bare, asks, past, y,
           room.table))
    if room.table.size:
        merge(way, room.table, room.mean, room.m2)


def shifts(bias, groups, n, dtype):
    """The bias, or zeros, as (G, panels, W)."""
    W = 2 * VECTOR // np.dtype(dtype).itemsize
    out = np.zeros((groups, -(-n // W) * W), dtype)
    if bias is not None:
        out[:, :n] = bias.reshape(groups, n)
    return out.reshape(groups, -1, W)


def spread(C, step, itemsize):
    """Values from pixel to pixel in a buffer: C, or more where every ``step``-th pixel would fall
    in the same few sets of an L1 (4 KB apart are in one; a tile reads 12 pixels or 24)."""
    return C + VECTOR // itemsize if C * step * itemsize % 2048 == 0 else C


@lru_cache(256)
def _plan(s, places, panels, itemsize):
    """From pixel to pixel in the buffer, taps as places there and values that are contiguous from
    each on; rows of a task and parts of the panels; whether x is the buffer."""
    C, T, run = s.G * s.n_c, len(places), s.n_c
    pitch = spread(C, s.sw, itemsize)
    bare = s.bare and pitch == C
    width = s.W if bare else (s.Q - 1) * s.sw + s.wide
    taps = [(i * width + j) * pitch for i, j in places]
    if pitch == run and all(b - a == C for row in _lines(places, taps) for a, b in pairwise(row)):
        taps = [row[0] for row in _lines(places, taps)]
        run *= T // len(taps)
    block, parts = cut(s, width * pitch * itemsize, panels, T * s.n_c, 2 * VECTOR)
    return np.array(taps, np.int64), run, pitch, block, parts, bare


def windows(x, weight, shift, places, s, y, t0=0, moments=None):
    """y for taps t0 … of weight panels (G, panels, T, K, W); places are the taps' (i, j). Moments
    as of conv2d."""
    _, P, T, n_c, W = weight.shape
    step, first = T * n_c * W, t0 * n_c * W
    taps, run, pitch, block, parts, bare = _plan(s, places, P, x.itemsize)
    # 32 → 64 channels of 112×112 pixels, 1×1: 4.7 ms through the caches, 2.6 past them
    past = (y.nbytes > PAST_BYTES and s.n_o * y.itemsize % VECTOR == 0
            and y.ctypes.data % VECTOR == 0)
    room = room_for(y, s.N * -(-s.P // block), moments)
    asks = bare and x.nbytes + y.nbytes > ASK_BYTES and s.high >= s.sh and s.wide >= s.sw
    _windows(x, weight.reshape(-1)[first:], step, shift, taps, run, s, pitch, block, parts, bare,
             asks, past, y, room, work=2 * y.size * len(places) * n_c)


def _lines(places, taps):
    """The taps of each kernel row; one line per tap where rows are not of one length."""
    rows = {}
    for (i, _), at in zip(places, taps):
        rows.setdefault(i, []).append(at)
    lines = list(rows.values())
    return lines if len({len(row) for row in lines}) == 1 else [[at] for at in taps]


def _even(P, Q, most):
    """Of so many rows at most, or a half, as many per task as leave the fewest pixels to low tiles,
    FEW of which take the time of SLOW more. (512 → 512 channels of 14×14, 1×1, in tasks of 32
    pixels: low tiles had a quarter of the pixels and a third of the time.)"""
    def cost(rows):
        tiles, rest = divmod(rows * Q, PIXELS)
        return tiles * PIXELS + -(-rest // FEW) * (FEW + SLOW) + START
    least = -(-P // most)
    return min((-(-P // n) for n in range(least, 2 * least)),
               key=lambda rows: P // rows * cost(rows) + (cost(P % rows) if P % rows else 0))


def cut(s, line, panels, K, width):
    """Rows of y per task, and parts that the panels are cut into, of the sizes alone. ``line`` is
    the bytes of a row of the buffer, ``width`` of a row of a panel."""
    flop = 2 * s.Q * K * s.G * s.n_o
    fits = (BUFFER_BYTES // line - s.high) // s.sh + 1
    rows = min(TASK_FLOP // flop, s.N * s.P // TASKS)
    rows = min(max(rows, TASK_PIXELS // s.Q), fits)
    block = _even(s.P, s.Q, max(1, min(rows, s.P)))
    share = max(1, (PANEL_BYTES if s.bare else COPIED_BYTES) // (K * width * s.G))
    tasks = s.N * -(-s.P // block)
    parts = min(panels, max(-(-panels // share), -(-TASKS // tasks)))
    even = [d for d in range(parts, 2 * parts) if panels % d == 0]
    return block, even[0] if even else parts
