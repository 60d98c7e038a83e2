"""Tasks of a matrix product: what one thread computes between two meetings of all.

Tiles: each value of a times a row of b; a is read where it lies, with any steps, b in panels of two
vectors, in place if it is row-major. Dots: where both are contiguous along k, rows of a times
columns of b, vectors along k; nothing is packed and no column is too few.
"""


from .jit import device
from .microkernel import DOTS, ROWS, dots
from .simd import VECTOR, load, load_part, store, store_part
from .tiles import copy, pack, strip

__all__ = ["ALIAS", "ALONE", "BLOCK", "DEPTH", "IN_PLACE", "LINES", "TASK", "TASKS", "apart_task",
           "as_bytes", "column_sums", "dots_block", "dots_shares", "dots_task", "heap_task",
           "pack_pieces", "pack_task", "prefers_dots", "sums_between", "tiles_shares", "tiles_task"]

DEPTH = 2048            # bytes of k per pass of tiles: a block of a and a panel, 450 KB, stay in L2
LONG = 2048             # k per pass of dots
BLOCK = 16 * ROWS       # rows of y per task, fewer where that makes too few tasks to share out
TASKS, TASK = 32, 17    # tasks of 2^TASK multiply-adds (2.3 us of one core), but no more than TASKS
CHUNK = 128             # k per task of packing
TOGETHER = 4            # panels that are packed at once: longer pieces of a row are read faster
ALONE = 1 << 15         # values that one thread packs; beyond, all threads do (not tuned)
IN_PLACE = 1 << 18      # bytes of a row-major b that are read where they are: a quarter of L2
ALIAS = 2048            # bytes: rows that lie a multiple of this apart share a few sets of L1
LINES = 32              # rows per task of copying them to where they do not


def as_bytes(macs):
    """Multiply-adds of a layer as a Kernel's work: it does two in the time of a byte. ((60, 100) ×
    (100, 100)ᵀ took 7.8 us in one thread, 17.5 in two; four times that 22.6 and 14.4.)"""
    return macs // 2


@device
def tiles_shares(G, M, K, N, W):
    """Blocks of rows and groups of panels that each y is cut into, by its shape alone. Two blocks
    at least: rows are cut evenly, panels may differ in width."""
    P, most = (N + W - 1) // W, (M + ROWS - 1) // ROWS
    tasks = (min(TASKS, max(1, (G * M * N * K) >> (TASK if M > 1 else TASK + 2))) + G - 1) // G
    blocks = (M + BLOCK - 1) // BLOCK
    if tasks > 1:
        blocks = min(most, blocks + (blocks & 1))
    groups = min(P, (tasks + blocks - 1) // blocks)
    return max(blocks, min(most, (tasks + groups - 1) // groups)), groups


@device
def _first(i, parts, M):
    """Where part i begins: with a whole tile."""
    return min(M, i * ((M + ROWS - 1) // ROWS) // parts * ROWS)


@device
def apart_task(t, x, n, y, ld):
    """Task t of copying x's lines of n values to where they lie ld apart: LINES of them."""
    first = t * LINES
    copy(x, first * n, n, min(LINES, x.size // n - first), n, y, first * ld, ld)


@device
def heap_task(t, x, M, K, y):
    """Task t of copying x (G, K, M) to heaps (G, M / ROWS, K, ROWS): LINES of x, which are of one
    matrix. Behind M, anything."""
    lanes, chunks, heaps = VECTOR // x.itemsize, (K + LINES - 1) // LINES, (M + ROWS - 1) // ROWS
    g, k0 = t // chunks, t % chunks * LINES
    for h in range(heaps):
        for k in range(k0, min(K, k0 + LINES)):
            at, to = (g * K + k) * M + h * ROWS, ((g * heaps + h) * K + k) * ROWS
            for j in range(0, ROWS, lanes):
                n = min(lanes, ROWS - j)
                store_part(y, to + j, load_part(x, at + j, max(0, min(n, M - h * ROWS - j))), n)


@device
def _next_panel(p, p0, p1, k0, k, K, ldp, ldb):
    """From k0 in panel p to what is read next: of the group the next panel, or the first for the
    next k; then a group behind."""
    if p + 1 < p1:
        return ldp
    return (p0 - p) * ldp + k * ldb if k0 + k < K else ldp - k0 * ldb


@device
def tiles_task(t, blocks, groups, M, K, N, W, a, ga, row, step, heap, b, gb, ldp, ldb, s, sj, y):
    """Task t of y (G, M, N) = a b + s: a block of rows and a group of panels of W columns, which
    lie ldp apart in b, their rows ldb. a's heaps of ROWS lie ``heap`` apart, if not 0."""
    g, r0, m, p0, p1 = t, 0, M, 0, (N + W - 1) // W
    if blocks * groups > 1:                       # divisions cost more than a tiny product
        i, q, P = t // groups, t % groups, p1
        g, i = i // blocks, i % blocks
        r0, p0, p1 = _first(i, blocks, M), q * P // groups, (q + 1) * P // groups
        m = _first(i + 1, blocks, M) - r0
    at, yt = g * ga + r0 // ROWS * heap, (g * M + r0) * N
    rows, depth = ROWS, DEPTH // a.itemsize
    if heap == 0:
        at, rows = at + r0 * row, m
    ask = (W * ROWS + m - 1) // m if ldb == W else 0      # of what lies packed, all in m rows
    for k0 in range(0, K, depth):
        k, xt = min(depth, K - k0), at + k0 * step
        for p in range(p0, p1):
            n, panel = min(W, N - p * W), g * gb + p * ldp + k0 * ldb
            ahead = _next_panel(p, p0, p1, k0, k, K, ldp, ldb)
            for r in range(0, m, rows):
                h, x, to = min(rows, m - r), xt + r // ROWS * heap, yt + r * N + p * W
                later = ahead + r // ROWS * k * ask
                if k0:
                    strip(h, n, k, a, x, row, step, b, panel, ldb, y, to, N, y, to, N, later, ask)
                else:
                    strip(h, n, k, a, x, row, step, b, panel, ldb, s, p * W * sj, 0, y, to, N,
                          later, ask)


@device
def pack_pieces(K, N, itemsize):
    """Tasks of packing a matrix."""
    W = 2 * VECTOR // itemsize * TOGETHER
    return (N + W - 1) // W * ((K + CHUNK - 1) // CHUNK)


@device
def pack_task(t, K, N, b, gb, ldk, ldn, packed):
    """Task t of packing: CHUNK values of k of TOGETHER panels."""
    W = 2 * VECTOR // b.itemsize
    P, chunks = (N + W - 1) // W, (K + CHUNK - 1) // CHUNK
    groups = (P + TOGETHER - 1) // TOGETHER
    i, k0 = t // chunks, t % chunks * CHUNK
    g, p0 = i // groups, i % groups * TOGETHER
    p1, k1, at = min(P, p0 + TOGETHER), min(K, k0 + CHUNK), g * gb + p0 * W * ldn
    to = (g * P + p0) * K * W
    if ldn == 1 and p1 * W <= N:
        for k in range(k0, k1):
            for p in range(p1 - p0):
                for j in range(0, W, VECTOR // b.itemsize):
                    store(packed, to + (p * K + k) * W + j, load(b, at + k * ldk + p * W + j))
    else:
        for p in range(p1 - p0):
            pack(b, at + p * W * ldn + k0 * ldk, ldk, ldn, min(W, N - (p0 + p) * W), k1 - k0,
                 packed, to + (p * K + k0) * W)


@device
def _side(left):
    return DOTS if left >= DOTS else 2 if left >= 2 else 1


def prefers_dots(M, N, K, itemsize):
    """By cycles: a multiply-add of vectors takes one, adding up a dot's lanes 6, packing a value of
    w a half."""
    lanes = VECTOR // itemsize
    with_dots = M * N * ((K + lanes - 1) // lanes + 6)
    return with_dots < K * max(M, 2) * ((N + lanes - 1) // lanes) + K * N // 2


@device
def dots_shares(M, N, K):
    """Rows of dots, and groups of columns that each is cut into."""
    rows, columns = (M + DOTS - 1) // DOTS, (N + DOTS - 1) // DOTS
    tasks = min(TASKS, max(1, (M * N * K) >> TASK))
    return rows, min(columns, (tasks + rows - 1) // rows)


@device
def dots_block(r0, end, first, last, N, K, x, w, s, sj, y):
    """Rows r0 … end and columns first … last, a multiple of DOTS, of y = x wᵀ + s."""
    for k0 in range(0, K, LONG):
        k, j = min(LONG, K - k0), first
        while j < last:
            r, n = r0, _side(last - j)
            while r < end:
                m, at, wt, to = _side(end - r), r * K + k0, j * K + k0, r * N + j
                if k0:
                    dots(m, n, k, x, at, K, w, wt, K, y, to, N, y, to, N)
                else:
                    dots(m, n, k, x, at, K, w, wt, K, s, j * sj, 0, y, to, N)
                r += m
            j += n


@device
def dots_task(t, groups, M, N, K, x, w, s, sj, y):
    """Task t of y = x wᵀ + s: DOTS rows and a group of columns."""
    columns, r0, q = (N + DOTS - 1) // DOTS, t // groups * DOTS, t % groups
    dots_block(r0, min(M, r0 + DOTS), q * columns // groups * DOTS,
               min(N, (q + 1) * columns // groups * DOTS), N, K, x, w, s, sj, y)


@device
def column_sums(i, parts, dy, M, N, db):
    """Those of block i of the columns."""
    sums_between(_first(i, parts, N), _first(i + 1, parts, N), dy, M, N, db)


@device
def sums_between(first, end, dy, M, N, db):
    """Sums of columns first … end, a vector at a time, in partial sums of 64 rows."""
    for j in range(first, end, VECTOR // dy.itemsize):
        n = min(VECTOR // dy.itemsize, end - j)
        whole = load_part(dy, 0, 0)               # zeros
        for r0 in range(0, M, 64):
            part = load_part(dy, r0 * N + j, n)
            for r in range(r0 + 1, min(M, r0 + 64)):
                part = part + load_part(dy, r * N + j, n)
            whole = whole + part
        store_part(db, j, whole, n)
