"""Direct convolution: every output is one sum over the taps of its window, in registers.

x (N, H, W, C) is channels-last. A task makes some output rows of one image: it copies the input
rows they read, with their padding, to a buffer that stays in L2 (or reads x where there is none),
and hands the output pixels in a row to the tiles of convkernel.py. The same loops make
the gradient of the input: there a window is the taps that meet in one pixel, and with a stride the
pixels of dx fall into stride² phases, each with its own taps.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .convkernel import FEW, PIXELS, few, few_half, tile, tile_half
from .jit import device, kernel, prange
from .memory import empty
from .microkernel import transpose
from .simd import VECTOR, lanes, load, load_part, store, store_part

__all__ = ["Windows", "aligned", "half_panel", "packed", "panel", "shifts", "spread",
           "windows"]

TASK_FLOP = 6 << 20        # about 60 us of one core
TASK_PIXELS = 48           # at least: a panel of weights comes from L2 or L3 once per task
PIECES = 16                # of weights per task that packs them
TASKS = 16                 # at least, where there are panels to share out
BUFFER_BYTES = 1 << 18     # of input rows, a quarter of an L2
PANEL_BYTES = 1 << 19      # of weights, half an L2


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


@kernel
def _pack(weight, lane, count, step, size, places, n, out):
    """out (G, panels, T, K, W): lane j of panel p is a row of weight, (p W + j) · lane from its
    group's start, of ``count`` pieces that lie ``step`` apart, each ``size`` values; in a row all
    taps of k = 0, 1, … follow each other, and tap t goes to places[t], or nowhere."""
    G, P, T, K, W = out.shape
    L, taps, group = lanes(weight), places.size, weight.size // G
    # a task is a half panel; where its rows come in pieces, all half panels of some pieces
    halves, deep = (1, 1) if count == 1 else (P * 2, PIECES)
    across, down = P * 2 // halves, -(-count // deep)
    out = out.reshape(-1)
    for task in prange(G * across * down):
        e, half, i = task // (across * down), task // down % across, task % down * deep
        own = aligned(L * L, out)
        for piece in range(i, min(count, i + deep)):
            for h in range(half, half + halves):
                at = e * group + h * L * lane + piece * step
                to = (e * P + h // 2) * T * K * W + h % 2 * L
                k, t = piece * (size // taps), 0
                for m in range(0, size, L):
                    _square(weight, at + m, lane, min(L, n - h * L), min(L, size - m), own)
                    for r in range(min(L, size - m)):
                        if places[t] >= 0:
                            store(out, to + (places[t] * K + k) * W, load(own, r * L))
                        t += 1
                        if t == taps:
                            k, t = k + 1, 0


@device
def _square(x, at, ld, m, n, own):
    """own (n, lanes) = the transpose of m rows of n values, zeros behind."""
    L = lanes(x)
    if m == L and ld == 1 and n == 1:
        store(own, 0, load(x, at))
    elif m == L and at + (L - 1) * ld + L <= x.size:
        transpose(x, at, ld, own, 0, L)
    else:
        for j in range(m):
            for r in range(n):
                own[r * L + j] = x[at + j * ld + r]
        for j in range(max(0, m), L):
            for r in range(n):
                own[r * L + j] = 0


def packed(weight, taps, groups, transposed=False):
    """Panels (G, panels, T, K, W) of the weights (O, C/G, I, J): k over c and the panels over o, or
    the other way round; taps are indices into I · J."""
    weight = np.ascontiguousarray(weight)
    O, n_c, I, J = weight.shape
    n_o, size, W = O // groups, I * J, 2 * VECTOR // weight.itemsize
    places = np.full(size, -1, np.int64)
    places[taps] = range(len(taps))
    n, K = (n_c, n_o) if transposed else (n_o, n_c)
    rows = (size, n_o, n_c * size, size) if transposed else (n_c * size, 1, 0, n_c * size)
    out = empty((groups, -(-n // W), len(taps), K, W), weight.dtype)
    _pack(weight.reshape(-1), *rows, places, n, out, work=4 * out.nbytes)
    return out


@device
def _gather(x, n, row, rows, s, C, pitch, width, out):
    """out (rows, width, pitch) = rows ``row`` − top … of image n, zeros outside x."""
    j0 = max(0, min(width, s.left))
    j1 = max(j0, min(width, s.W + s.left))
    pieces, size = (1, (j1 - j0) * C) if pitch == C else (j1 - j0, C)
    for r in range(rows):
        h, line = row + r - s.top, out[r * width * pitch:(r + 1) * width * pitch]
        if h < 0 or h >= s.H:
            line[:] = 0
            continue
        line[:j0 * pitch] = 0
        for i in range(pieces):
            target = line[(j0 + i) * pitch:(j0 + i) * pitch + size]
            at = ((n * s.H + h) * s.W + j0 + i - s.left) * C
            source = x[at:at + size]
            for c in range(size):
                target[c] = source[c]
        line[j1 * pitch:] = 0


@device
def _copy(aside, W, count, n, y, ct):
    """n values of each pixel, from tiles of their own to y."""
    L = W // 2
    for r in range(count):
        at, to = r * W, ct[r]
        if n >= L:
            store(y, to, load(aside, at))
            at, to = at + L, to + L
        store_part(y, to, load_part(aside, at, n % L), n % L)


@device
def half_panel(a, at, taps, run, weight, shift, c, ct):
    """One vector of outputs for the pixels that begin at ``at``, to ct; a multiple of FEW."""
    g = 0
    while g + 2 * PIXELS <= at.size:
        tile_half(a, at, g, taps, run, weight, shift, c, ct)
        g += 2 * PIXELS
    while g < at.size:
        few_half(a, at, g, taps, run, weight, shift, c, ct)
        g += FEW


@device
def panel(a, at, taps, run, weight, shift, c, ct):
    """Two vectors of outputs."""
    g = 0
    while g + PIXELS <= at.size:
        tile(a, at, g, taps, run, weight, shift, c, ct)
        g += PIXELS
    while g < at.size:
        few(a, at, g, taps, run, weight, shift, c, ct)
        g += FEW


@device
def _places(s, rows, first, width, pitch, yt, at, ct):
    """Where each pixel reads the buffer and writes y. What is over repeats the last one, to the
    same bits."""
    r = 0
    for p in range(rows):
        source, target = first + p * s.sh * width * pitch, yt + p * s.sp
        for _ in range(s.Q):
            at[r], ct[r] = source, target
            source, target, r = source + s.sw * pitch, target + s.sq, r + 1
    for i in range(r, at.size):
        at[i], ct[i] = at[r - 1], ct[r - 1]


@kernel
def _windows(x, weight, step, shift, taps, run, s, pitch, block, parts, bare, y):
    """y from weight panels that lie ``step`` apart and shifts (G, panels, W); taps are places in
    the buffer, whose pixels are ``pitch`` apart; run values are contiguous there. A task is
    ``block`` rows of an image × 1/parts of the panels."""
    G, P, W = shift.shape
    C, blocks, share = G * s.n_c, -(-s.P // block), -(-P // parts)
    width = s.W if bare else (s.Q - 1) * s.sw + s.wide
    shift = shift.reshape(-1)
    for task in prange(parts * s.N * blocks):
        part, image = task // (s.N * blocks), task % (s.N * blocks) // blocks
        p0 = task % blocks * block
        rows = min(block, s.P - p0)
        count, tall = rows * s.Q, (rows - 1) * s.sh + s.high
        first = ((image * s.H + p0 * s.sh - s.top) * width - s.left) * C if bare else 0
        own = np.empty(0 if bare else tall * width * pitch, x.dtype)
        if not bare:
            _gather(x, image, p0 * s.sh, tall, s, C, pitch, width, own)
        a = x if bare else own
        room = -(-count // FEW) * FEW
        at, ct = np.empty(room, np.int64), np.empty(room, np.int64)
        _places(s, rows, first, width, pitch, image * s.sn + p0 * s.sp + s.s0, at, ct)
        beside = 0 if s.n_o % (W // 2) == 0 else room
        aside, tight = aligned(beside * W, x), np.empty(beside, np.int64)
        for r in range(beside):
            tight[r] = r * W
        for ep in range(G * P):
            e, p = ep // P, ep % P
            if part * share <= p < (part + 1) * share:
                n, out = min(W, s.n_o - p * W), y[e * s.n_o + p * W:]
                whole = n % (W // 2) == 0
                c, to = (out, ct) if whole else (aside, tight)
                if 2 * n > W:
                    panel(a[e * s.n_c:], at, taps, run, weight[ep * step:], shift[ep * W:], c, to)
                else:
                    half_panel(a[e * s.n_c:], at, taps, run, weight[ep * step:], shift[ep * W:],
                               c, to)
                if not whole:
                    _copy(aside, W, count, n, out, ct)


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


def windows(x, weight, shift, places, s, y, t0=0):
    """y for taps t0 … of weight panels (G, panels, T, K, W); places are the taps' (i, j)."""
    G, P, T, n_c, W = weight.shape
    step, first, T = T * n_c * W, t0 * n_c * W, len(places)
    C = G * n_c
    pitch = spread(C, s.sw, x.itemsize)
    bare = s.bare and pitch == C
    width = s.W if bare else (s.Q - 1) * s.sw + s.wide
    taps, run = [(i * width + j) * pitch for i, j in places], n_c
    if pitch == n_c and all(b - a == C for row in _lines(places, taps) for a, b in pairwise(row)):
        taps = [row[0] for row in _lines(places, taps)]
        run *= T // len(taps)
    block, parts = _tasks(s, width * pitch * x.itemsize, P, T * n_c, W * x.itemsize)
    _windows(x.reshape(-1), weight.reshape(-1)[first:], step, shift, np.array(taps, np.int64), run,
             s, pitch, block, parts, bare, y.reshape(-1), work=2 * y.size * T * n_c)


def _lines(places, taps):
    """The taps of each kernel row; one line per tap where rows are not of one length."""
    rows = {}
    for (i, _), at in zip(places, taps):
        rows.setdefault(i, []).append(at)
    lines = list(rows.values())
    return lines if len({len(row) for row in lines}) == 1 else [[at] for at in taps]


def _tasks(s, line, panels, K, width):
    """Rows of y per task, and parts that the panels are cut into, of the sizes alone. ``line`` is
    the bytes of a row of the buffer, ``width`` of a row of a panel."""
    flop = 2 * s.Q * K * s.G * s.n_o
    fits = (BUFFER_BYTES // line - s.high) // s.sh + 1
    rows = min(TASK_FLOP // flop, s.N * s.P // TASKS)
    rows = min(max(rows, TASK_PIXELS // s.Q), fits)
    block = -(-s.P // -(-s.P // max(1, min(rows, s.P))))
    share = max(1, PANEL_BYTES // (K * width * s.G))
    tasks = s.N * -(-s.P // block)
    parts = min(panels, max(-(-panels // share), -(-TASKS // tasks)))
    even = [d for d in range(parts, 2 * parts) if panels % d == 0]
    return block, even[0] if even else parts
