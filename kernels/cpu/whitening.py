"""Products of the channels of a group with each other, and sums of them by a matrix: what whitening
consists of.

A task takes so many positions of all channels. Of one group after the other it writes a chunk of
positions, centered, to float64 rows: one row for each channel in either memory format, zeros behind
the last position and the last channel. All arithmetic is on such rows, four by four channels, so
that a loaded value serves four products. Arithmetic is float64, rounded once.
"""

import numpy as np

from .columns import inlined, inner
from .memory import empty, empty_like
from .moments import u
from .norm import _dense, _flat, _flat_as
from .simd import (
    VECTOR,
    fill,
    fma,
    high,
    keep,
    lanes,
    load,
    load_part,
    low,
    narrow,
    pointer,
    store,
    store_part,
    total,
)
from .tasks import share, tasks

__all__ = ["channel_mix", "channel_products"]

L = VECTOR // 8            # numbers of a vector
TASK_BYTES = 1 << 17       # of x that a task reads
# A task's sums are d float64 of each channel: of 16 d positions, 1/8 of the float32 that it read.
# It has fewer where there would be fewer than 16 tasks.
POSITIONS, TASKS = 16, 16
ROWS_BYTES = 1 << 14       # of a chunk's rows: two of them, and the results, fit the first cache
BLOCK = 4                  # channels at once


@inner
def _pitch(P):
    """From row to row: a vector more, into which the last one of an array's dtype may run."""
    return P + 2 * L


@inner
def _pack(x, last_axis, C, S, c, d, q, m, mean, rows, r, P):
    """d channels from c on of m positions from q on, less their means, to the rows from r on."""
    p, out, W = pointer(x), pointer(rows), lanes(x)
    for j in range(m if last_axis else 0):       # row by row, memory would be read d times
        for i in range(d):
            rows[u((r + i) * _pitch(P) + j)] = (
                np.float64(x[u((q + j) * C + c + i)]) - mean[u(c + i)])
    for i in range(0 if last_axis else d):
        at, middle, k = (r + i) * _pitch(P), fill(out, mean[c + i]), 0
        while k < m:
            n, s = (q + k) // S, (q + k) % S
            stop, begin = min(m, k + S - s), (n * C + c + i) * S + s - k
            while k < stop:
                v = load_part(p, begin + k, stop - k)
                store(out, at + k, low(v) - middle)
                if W > L:
                    store(out, at + k + L, high(v) - middle)
                k += W
            k = stop
    for i in range(d):
        for j in range(m, P):
            rows[u((r + i) * _pitch(P) + j)] = 0.0


@inner
def _unpack(rows, last_axis, C, S, c, d, q, m, P, y):
    """The rows of d channels from c on to m positions of y."""
    p, out, W = pointer(rows), pointer(y), lanes(y)
    for j in range(m if last_axis else 0):
        for i in range(d):
            y[u((q + j) * C + c + i)] = rows[u(i * _pitch(P) + j)]
    for i in range(0 if last_axis else d):
        at, k = i * _pitch(P), 0
        while k < m:
            n, s = (q + k) // S, (q + k) % S
            stop, begin = min(m, k + S - s), (n * C + c + i) * S + s - k
            while k < stop:
                v = narrow(load(p, at + k), load(p, at + k + L), out)
                store_part(out, begin + k, v, stop - k)
                k += W
            k = stop


@inlined
def _times(u, v, s):
    return fma(u, v[0], s[0]), fma(u, v[1], s[1]), fma(u, v[2], s[2]), fma(u, v[3], s[3])


@inlined
def _four(p, at, step):
    return load(p, at), load(p, at + step), load(p, at + 2 * step), load(p, at + 3 * step)


@inlined
def _keep_four(p, at, step, v):
    store(p, at, v[0])
    store(p, at + step, v[1])
    store(p, at + 2 * step, v[2])
    store(p, at + 3 * step, v[3])


@inner
def _multiply(a, b, rows, P, sums, at):
    """Add the products of the rows of a and b to vectors of sums, (rows, rows, L), from ``at`` on.
    """
    p, q, out, step = pointer(a), pointer(b), pointer(sums), _pitch(P)
    for i in range(0, rows, BLOCK):
        for j in range(0, rows, BLOCK):
            o, line = at + (i * rows + j) * L, rows * L
            e, f = _four(out, o, L), _four(out, o + line, L)
            g, h = _four(out, o + 2 * line, L), _four(out, o + 3 * line, L)
            for k in range(0, P, L):
                u, v = _four(p, i * step + k, step), _four(q, j * step + k, step)
                e, f = _times(u[0], v, e), _times(u[1], v, f)
                g, h = _times(u[2], v, g), _times(u[3], v, h)
            _keep_four(out, o, L, e)
            _keep_four(out, o + line, L, f)
            _keep_four(out, o + 2 * line, L, g)
            _keep_four(out, o + 3 * line, L, h)
    keep(a)
    keep(b)


@inner
def _products_task(t, a, b, one, last_axis, N, C, S, length, d, P, mean_a, mean_b, out):
    rows = -(-d // BLOCK) * BLOCK
    x, z = np.zeros(rows * _pitch(P)), np.zeros(1 if one else rows * _pitch(P))
    sums, groups = np.zeros(C // d * rows * rows * L), C // d
    last = min(N * S, t * length + length)
    for g in range(groups):
        for q in range(t * length, last, P):
            m = min(P, last - q)
            _pack(a, last_axis, C, S, g * d, d, q, m, mean_a, x, 0, P)
            if one:
                _multiply(x, x, rows, P, sums, g * rows * rows * L)
                continue
            _pack(b, last_axis, C, S, g * d, d, q, m, mean_b, z, 0, P)
            _multiply(x, z, rows, P, sums, g * rows * rows * L)
    p = pointer(sums)
    for g in range(groups):
        for i in range(d):
            for j in range(d):
                out[((t * groups + g) * d + i) * d + j] = total(
                    load(p, ((g * rows + i) * rows + j) * L))
    keep(sums)


@tasks
def _products(run, count, a, b, one, last_axis, N, C, S, length, d, P, mean_a, mean_b, out):
    """Each task's sums, (tasks, C / d, d, d)."""
    share(_products_task, count, run, (a, b, one, last_axis, N, C, S, length, d, P, mean_a, mean_b,
                                       out))


@inner
def _transform(rows, inputs, P, matrix, shift, at, c, d, y):
    """Rows of y from those of the inputs by a matrix (rows, inputs) from ``at`` on."""
    p, w, out, step = pointer(rows), pointer(matrix), pointer(y), _pitch(P)
    for i in range(0, d, BLOCK):
        first = (fill(w, shift[c + i]), fill(w, shift[c + min(i + 1, d - 1)]),
                 fill(w, shift[c + min(i + 2, d - 1)]), fill(w, shift[c + min(i + 3, d - 1)]))
        o = at + i * inputs
        for k in range(0, P, L):
            s = first
            for j in range(inputs):
                v = (fill(w, matrix[u(o + j)]), fill(w, matrix[u(o + j + inputs)]),
                     fill(w, matrix[u(o + j + 2 * inputs)]),
                     fill(w, matrix[u(o + j + 3 * inputs)]))
                s = _times(load(p, j * step + k), v, s)
            _keep_four(out, i * step + k, step, s)
    keep(rows)


@inner
def _mix_task(t, x, z, both, last_axis, N, C, S, length, d, P, mean, mean_z, matrix, shift, y):
    padded, inputs = -(-d // BLOCK) * BLOCK, 2 * d if both else d
    rows, made = np.zeros(inputs * _pitch(P)), np.zeros(padded * _pitch(P))
    last = min(N * S, t * length + length)
    for g in range(C // d):
        for q in range(t * length, last, P):
            m = min(P, last - q)
            _pack(x, last_axis, C, S, g * d, d, q, m, mean, rows, 0, P)
            if both:
                _pack(z, last_axis, C, S, g * d, d, q, m, mean_z, rows, d, P)
            _transform(rows, inputs, P, matrix, shift, g * padded * inputs, g * d, d, made)
            _unpack(made, last_axis, C, S, g * d, d, q, m, P, y)


@tasks
def _mix(run, count, x, z, both, last_axis, N, C, S, length, d, P, mean, mean_z, matrix, shift, y):
    share(_mix_task, count, run, (x, z, both, last_axis, N, C, S, length, d, P, mean, mean_z,
                                  matrix, shift, y))


def _cut(x, d, least=1):
    """x dense, its axes, how many tasks, and the numbers that these take; a task of at least so
    many positions, while there are TASKS."""
    x, (axes, *_) = _dense(x)
    N, C = x.shape[:2]
    S = x.size // (N * C)
    P = max(2 * L, ROWS_BYTES // (8 * d) // (2 * L) * 2 * L)
    length = max(1, TASK_BYTES // (C * x.itemsize), min(least, N * S // TASKS))
    length = -(-length // P) * P
    return x, axes, -(-N * S // length), (axes is not None or S == 1, N, C, S, length, d, P)


def channel_products(a, b, mean_a, mean_b, *, size):
    """Σ (a_i − ā_i) (b_j − b̄_j) of the channels i and j of each group."""
    groups = a.shape[1] // size
    if not a.size:
        return np.zeros((groups, size, size))
    x, axes, count, how = _cut(a, size, POSITIONS * size)
    flat = _flat(x, axes)
    out = empty((count, groups, size, size), np.float64)
    _products(count, flat, flat if b is a else _flat_as(b, x, axes), b is a, *how,
              np.ascontiguousarray(mean_a), np.ascontiguousarray(mean_b), out.reshape(-1),
              work=2 * a.nbytes)
    with np.errstate(all="ignore"):
        return out.sum(0)


def _matrix(w, v):
    """[W V], with rows of zeros behind each group's: those are computed four at a time."""
    groups, d, _ = w.shape
    matrix = np.zeros((groups, -(-d // BLOCK) * BLOCK, d if v is None else 2 * d))
    matrix[:, :d, :d] = w
    if v is not None:
        matrix[:, :d, d:] = v
    return matrix.reshape(-1)


def channel_mix(x, mean, w, shift=None, z=None, mean_z=None, v=None):
    """y = W (x − μ) [+ V (z − ζ)] [+ β] of each group of channels, in x's dtype; β: (C,)."""
    if not x.size:
        return empty_like(x)
    x, axes, count, how = _cut(x, w.shape[1])
    y, flat, C = empty_like(x), _flat(x, axes), x.shape[1]
    mean = np.ascontiguousarray(mean)
    beta = np.zeros(C) if shift is None else np.ascontiguousarray(shift, np.float64)
    _mix(count, flat, flat if z is None else _flat_as(z, x, axes), z is not None, *how, mean,
         mean if z is None else np.ascontiguousarray(mean_z), _matrix(w, v), beta, _flat(y, axes),
         work=(3 if z is None else 4) * x.nbytes)
    return y
