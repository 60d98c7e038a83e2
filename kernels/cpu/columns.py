"""The vector loops of normalization, over columns: rows of memory whose column j has constants j.

Rows × channels memory is such a matrix as it is; a plane of one channel is one too, its rows four
vectors long and all its columns that channel's: its constants and sums stay in registers. Memory is
read in its order, row by row, for sums two at a time, which halves the traffic of the table; four
rows read memory at half the speed. The part of a vector at the end of a row has zeros behind it, in
constants as in data, and adds nothing. A whole vector is a part of L values: LLVM makes it one.

``table`` holds a column's sums and constants in lines of ``W`` values and more. Arrays come as
pointers: a function that takes three arrays compiles several times as long.
"""

from functools import partial

import numpy as np

from ..polynomials import device
from .simd import (
    fma,
    greater,
    lanes,
    load,
    load_part,
    pointer,
    prefetch,
    splat,
    store,
    store_part,
    stream,
    where,
)

__all__ = ["ADD", "BY_X", "BY_Y", "HI", "INV", "LO", "MEAN_DY", "PAST", "REST", "RELU", "SCALE",
           "SHIFT", "SLOPE", "WRITE", "add_product", "add_products", "add_squares", "inlined",
           "inner", "normalize", "normalize_backward", "normalize_backward_value",
           "normalize_value", "pitch", "planes", "put_part", "run", "zeros"]

AHEAD = 2048               # values in front of the loads at least: where memory is asked for
# Lines of a table: two sums, the forward's constants, the backward's.
HI, LO, SCALE, SHIFT, INV, MEAN_DY, SLOPE, REST = range(2, 10)
RELU, ADD, PAST = 1, 2, 4                  # forward: relu, a residual; both: stores past the caches
BY_X, BY_Y, WRITE = 1, 2, 8                # backward: relu's mask from x or from y; write masked dy

inner = device
# Per column: a call would cost more than its work.
inlined = partial(device, forceinline=True)


@inlined
def put_part(y, i, v, n, past):
    if past and n == lanes(y):
        stream(y, i, v)
    else:
        store_part(y, i, v, n)


@inner
def zeros(x, n):
    """n zeros of x's dtype, the first at a vector's place: a vector in two lines of the cache costs
    twice as much, and more where it was stored just before."""
    room, L = np.zeros(n + lanes(x), x.dtype), lanes(x)
    first = -(room.ctypes.data // x.itemsize) % L
    return room[first:first + n]


@inner
def pitch(W, L):
    """From line to line of a table: at W = 1024 all lines would fall into one set of the cache."""
    return (W + L - 1) // L * L + L


@inner
def planes(plan, L):
    """Whether rows are pieces of one channel's plane."""
    return plan.inner == plan.W and plan.W == 4 * L


@inner
def run(plan, m, c):
    """Where segment m of channel c begins, and its length."""
    before = m % plan.pieces * plan.length
    at = (m // plan.pieces * plan.C + c) * plan.S + before
    return at, min(plan.length, plan.S - before)


@inner
def lattice(plan, first, last, channels):
    """Segments first … last of so many channels as rows: how many, from row to row, the width of a
    row and of the last one."""
    stride = plan.C * plan.S
    if channels < plan.C:
        return last - first, stride, channels * plan.S, channels * plan.S
    length, W = (last - first) * stride, plan.W
    rows = (length + W - 1) // W
    return rows, W, W, length - (rows - 1) * W


def _over(constants, column):
    """The loop over segments first … last of so many channels from c on; ``column`` does n columns
    of a vector with the ``constants`` of those."""
    constants, column = inlined(constants), inlined(column)

    @inlined
    def row(x, b, z, y, at, columns, t, line, L, ahead, zero, option):
        for j in range(0, columns - L + 1, L):
            column(x, b, z, y, at + j, L, constants(t, j, line, L), ahead, zero, option)
        n = columns % L
        if n:
            j = columns - n
            column(x, b, z, y, at + j, n, constants(t, j, line, n), ahead, zero, option)

    @inlined
    def plane(x, b, z, y, at, length, t, line, L, ahead, zero, option):
        k, end = constants(t, 0, line, L), at + length // L * L
        for i in range(at, end, L):
            column(x, b, z, y, i, L, k, ahead, zero, option)
        if length % L:
            column(x, b, z, y, end, length % L, k, 0, zero, option)

    @inner
    def over(x, b, z, y, plan, first, last, back, c, channels, table, option):
        L, t, zero = lanes(table), pointer(table), table.dtype.type(0)
        line = pitch(plan.W, L)
        if planes(plan, L):
            ahead = plan.S if plan.blocks == 1 and plan.C > 1 else 0
            for m in range(first, last):
                at, length = run(plan, first + last - 1 - m if back else m, c)
                plane(x, b, z, y, at, length, t, line, L, ahead, zero, option)
            return
        rows, step, width, end = lattice(plan, first, last, channels)
        at, _ = run(plan, first, c)
        ahead = max(AHEAD, 2 * step)
        for r in range(rows):
            row(x, b, z, y, at, end if r == rows - 1 else width, t, line, L, ahead, zero, option)
            at += step
    return over


def _sums(constants, add):
    """The same loop for two sums per column, lines 0 and 1 of the table."""
    constants, add = inlined(constants), inlined(add)

    @inlined
    def one(x, b, z, y, i, second, t, j, W, n, ahead, zero, option):
        k, s, q = constants(t, j, W, n), load_part(t, j, n), load_part(t, W + j, n)
        s, q = add(x, b, z, y, i, n, k, ahead, zero, option, s, q)
        if second:
            s, q = add(x, b, z, y, i + second, n, k, ahead, zero, option, s, q)
        store_part(t, j, s, n)
        store_part(t, W + j, q, n)

    @inlined
    def row(x, b, z, y, at, second, columns, t, line, L, ahead, zero, option):
        for j in range(0, columns - L + 1, L):
            one(x, b, z, y, at + j, second, t, j, line, L, ahead, zero, option)
        n = columns % L
        if n:
            one(x, b, z, y, at + columns - n, second, t, columns - n, line, n, ahead, zero, option)

    @inlined
    def plane(x, b, z, y, at, length, t, W, L, ahead, zero, option):
        k = constants(t, 0, W, L)
        s, q = load(t, 0), load(t, W)
        u, v = load(t, L), load(t, W + L)
        e, f = load(t, 2 * L), load(t, W + 2 * L)
        g, h = load(t, 3 * L), load(t, W + 3 * L)
        four = at + length // (4 * L) * (4 * L)
        end = at + length // L * L
        for i in range(at, four, 4 * L):
            s, q = add(x, b, z, y, i, L, k, ahead, zero, option, s, q)
            u, v = add(x, b, z, y, i + L, L, k, ahead, zero, option, u, v)
            e, f = add(x, b, z, y, i + 2 * L, L, k, ahead, zero, option, e, f)
            g, h = add(x, b, z, y, i + 3 * L, L, k, ahead, zero, option, g, h)
        store(t, L, u)
        store(t, W + L, v)
        store(t, 2 * L, e)
        store(t, W + 2 * L, f)
        store(t, 3 * L, g)
        store(t, W + 3 * L, h)
        for i in range(four, end, L):
            s, q = add(x, b, z, y, i, L, k, ahead, zero, option, s, q)
        store(t, 0, s)
        store(t, W, q)
        if length % L:
            one(x, b, z, y, end, 0, t, 0, W, length % L, ahead, zero, option)

    @inner
    def over(x, b, z, y, plan, first, last, c, channels, table, option):
        L, t, zero = lanes(table), pointer(table), table.dtype.type(0)
        line = pitch(plan.W, L)
        if planes(plan, L):
            ahead = plan.C * plan.S if plan.pieces == 1 and plan.C > 1 else AHEAD
            for m in range(first, last):
                at, length = run(plan, m, c)
                plane(x, b, z, y, at, length, t, line, L, ahead, zero, option)
            return
        rows, step, width, end = lattice(plan, first, last, channels)
        at, _ = run(plan, first, c)
        ahead, pairs = max(AHEAD, 2 * step), rows // 2 if end == width else (rows - 1) // 2
        for _ in range(pairs):
            row(x, b, z, y, at, step, width, t, line, L, ahead, zero, option)
            at += 2 * step
        for r in range(2 * pairs, rows):
            row(x, b, z, y, at, 0, end if r == rows - 1 else width, t, line, L, ahead, zero, option)
            at += step
    return over


def _center(t, j, W, n):
    return load_part(t, HI * W + j, n)


def _add_squares(x, _b, _z, _y, i, n, hi, ahead, zero, option, s, q):
    if ahead:
        prefetch(x, i + ahead)
    d = load_part(x, i, n) - hi
    return s + d, fma(d, d, q)


def _affine(t, j, W, n):
    return (load_part(t, HI * W + j, n), load_part(t, LO * W + j, n),
            load_part(t, SCALE * W + j, n), load_part(t, SHIFT * W + j, n))


def normalize_value(x, residual, _z, y, i, n, lines, ahead, zero, option):
    hi, lo, scale, shift = lines
    floor = splat(zero)
    if ahead:
        prefetch(x, i + ahead)
    v = fma((load_part(x, i, n) - hi) - lo, scale, shift)
    if option & ADD:
        if ahead:
            prefetch(residual, i + ahead)
        v = v + load_part(residual, i, n)
    if option & RELU:
        v = where(greater(floor, v), floor, v)
    put_part(y, i, v, n, option & PAST)


@inlined
def _masked(dy, y, i, n, d, scale, shift, zero, option):
    """dy where relu let its input pass."""
    g, floor = load_part(dy, i, n), splat(zero)
    if option & BY_X:                       # as normalize does, to the bit
        g = where(greater(fma(d, scale, shift), floor), g, floor)
    elif option & BY_Y:
        g = where(greater(load_part(y, i, n), floor), g, floor)
    return g


def _centered(t, j, W, n):
    return (load_part(t, HI * W + j, n), load_part(t, LO * W + j, n),
            load_part(t, SCALE * W + j, n), load_part(t, SHIFT * W + j, n),
            load_part(t, INV * W + j, n))


def add_product(x, dy, z, y, i, n, lines, ahead, zero, option, s, p):
    hi, lo, scale, shift, inv = lines
    if ahead:
        prefetch(x, i + ahead)
        prefetch(dy, i + ahead)
    d = (load_part(x, i, n) - hi) - lo
    g = _masked(dy, y, i, n, d, scale, shift, zero, option)
    if option & WRITE:
        put_part(z, i, g, n, option & PAST)
    return s + g, fma(g, d * inv, p)


def _slopes(t, j, W, n):
    return (load_part(t, HI * W + j, n), load_part(t, LO * W + j, n),
            load_part(t, SCALE * W + j, n), load_part(t, SHIFT * W + j, n),
            load_part(t, INV * W + j, n), load_part(t, MEAN_DY * W + j, n),
            load_part(t, SLOPE * W + j, n), load_part(t, REST * W + j, n))


def normalize_backward_value(x, dy, dx, y, i, n, lines, ahead, zero, option):
    hi, lo, scale, shift, inv, mean_dy, slope, rest = lines
    if ahead:
        prefetch(x, i + ahead)
        prefetch(dy, i + ahead)
    d = (load_part(x, i, n) - hi) - lo
    g = _masked(dy, y, i, n, d, scale, shift, zero, option)
    put_part(dx, i, fma(scale, g - mean_dy, fma(d * inv, slope, rest)), n, option & PAST)


# Sums of d and of d², d = x − HI.
add_squares = _sums(_center, _add_squares)
# y = ((x − HI) − LO) · SCALE + SHIFT [+ residual], not below zero with RELU.
normalize = _over(_affine, normalize_value)
# Sums of the masked dy and of it times x̂. It is written to z with WRITE.
add_products = _sums(_centered, add_product)
# z = dx = (dy − MEAN_DY) · SCALE + x̂ · SLOPE + REST with the masked dy.
normalize_backward = _over(_slopes, normalize_backward_value)
