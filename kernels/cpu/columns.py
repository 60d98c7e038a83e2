"""The vector loops of normalization, over columns: rows of memory whose column j has constants j.

Rows × channels memory is such a matrix as it is; a plane of one channel is one too, its rows four
vectors long and all its columns that channel's. Memory is read in its order, row by row: four rows
at once would load the constants of a column once for four vectors, but read memory at half the
speed. The part of a vector at the end of a row has zeros behind it, in constants as in data, and
adds nothing.

``table`` holds a column's sums and constants in lines of ``W`` values and more. Arrays come as
pointers: a function that takes three arrays compiles several times as long.
"""

from numba import njit

from ..polynomials import POLICY
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
           "SHIFT", "SLOPE", "WRITE", "add_products", "add_squares", "inner", "normalize",
           "normalize_backward", "pitch"]

AHEAD = 1024               # values in front of the loads at least: where memory is asked for
# Lines of a table: two sums, the forward's constants, the backward's.
HI, LO, SCALE, SHIFT, INV, MEAN_DY, SLOPE, REST = range(2, 10)
RELU, ADD, PAST = 1, 2, 4                  # forward: relu, a residual; both: stores past the caches
BY_X, BY_Y, WRITE = 1, 2, 8                # backward: relu's mask from x or from y; write masked dy

# Functions that only kernels call: the wrapper for Python is a third of what compiling them costs.
inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **POLICY)
# Per column: a call would cost more than its work.
inlined = njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **POLICY)


@inlined
def _take(x, i, n):
    return load(x, i)


@inlined
def _put(y, i, v, n, past):
    if past:
        stream(y, i, v)
    else:
        store(y, i, v)


@inlined
def _take_part(x, i, n):
    return load_part(x, i, n)


@inlined
def _put_part(y, i, v, n, past):
    store_part(y, i, v, n)


@inner
def pitch(W, L):
    """From line to line of a table: at W = 1024 all lines would fall into one set of the cache."""
    return (W + L - 1) // L * L + L


@inlined
def _no_rows(x, b, z, y, at, rows, t, line, L, ahead, zero, option):
    return 0


def _over(make, four=_no_rows):
    """The loop over segments first … last of so many channels from c on; ``column`` does one
    vector of the matrix that they are, ``four`` whole rows of four vectors."""
    whole, part = inlined(make(_take, _put)), inlined(make(_take_part, _put_part))

    @inner
    def over(x, b, z, y, plan, first, last, back, c, channels, table, option):
        W, L, stride, t = plan.W, lanes(table), plan.C * plan.S, pointer(table)
        line = pitch(W, L)
        zero = table.dtype.type(0)
        planes = plan.inner == W
        for k in range(last - first if planes else 1):
            m = last - 1 - k if planes and back else first + k
            before = m % plan.pieces * plan.length
            at, length = m // plan.pieces * stride + c * plan.S + before, (last - first) * stride
            if planes:
                length = min(plan.length, plan.S - before)
            rows, step, width, ahead = (length + W - 1) // W, W, W, max(AHEAD, 2 * W)
            end = length - (rows - 1) * W
            if channels < plan.C and not planes:
                rows, step, width = last - first, stride, channels * plan.S
                end, ahead = width, max(AHEAD, 2 * stride)
            if planes and plan.pieces == 1:
                ahead = -stride if back else stride            # the same place of the next segment
            done = 0
            if W == 4 * L and step == W:
                done = four(x, b, z, y, at, rows if end == W else rows - 1, t, line, L, ahead, zero,
                            option)
                at += done * W
            for r in range(done, rows):
                columns = end if r == rows - 1 else width
                for j in range(0, columns - L + 1, L):
                    whole(x, b, z, y, at + j, t, j, line, L, ahead, zero, option)
                if columns % L:
                    j = columns // L * L
                    part(x, b, z, y, at + j, t, j, line, columns - j, ahead, zero, option)
                at += step
    return over


def _sums(make):
    """The loop for two sums per column, lines 0 and 1. Those of four vectors stay in registers: to
    store a sum and load it for the next row again takes 20 cycles."""
    one = inlined(make(_take, _put))

    def columns(take, put):
        add = inlined(make(take, put))

        def column(x, b, z, y, i, t, j, W, n, ahead, zero, option):
            s, q = add(x, b, z, y, i, t, j, W, n, ahead, zero, option, take(t, j, n),
                       take(t, W + j, n))
            put(t, j, s, n, False)
            put(t, W + j, q, n, False)
        return column

    @inlined
    def four(x, b, z, y, at, rows, t, W, L, ahead, zero, option):
        s, q = load(t, 0), load(t, W)
        u, v = load(t, L), load(t, W + L)
        e, f = load(t, 2 * L), load(t, W + 2 * L)
        g, h = load(t, 3 * L), load(t, W + 3 * L)
        for i in range(at, at + 4 * L * rows, 4 * L):
            s, q = one(x, b, z, y, i, t, 0, W, L, ahead, zero, option, s, q)
            u, v = one(x, b, z, y, i + L, t, L, W, L, ahead, zero, option, u, v)
            e, f = one(x, b, z, y, i + 2 * L, t, 2 * L, W, L, ahead, zero, option, e, f)
            g, h = one(x, b, z, y, i + 3 * L, t, 3 * L, W, L, ahead, zero, option, g, h)
        store(t, 0, s)
        store(t, W, q)
        store(t, L, u)
        store(t, W + L, v)
        store(t, 2 * L, e)
        store(t, W + 2 * L, f)
        store(t, 3 * L, g)
        store(t, W + 3 * L, h)
        return rows
    return _over(columns, four)


@_sums
def add_squares(take, put):
    """Sums of d and of d², d = x − HI."""
    def add(x, _b, _z, _y, i, t, j, W, n, ahead, zero, option, s, q):
        prefetch(x, i + ahead)
        d = take(x, i, n) - take(t, HI * W + j, n)
        return s + d, fma(d, d, q)
    return add


@_over
def normalize(take, put):
    """y = ((x − HI) − LO) · SCALE + SHIFT [+ residual], not below zero with RELU."""
    def column(x, residual, _z, y, i, t, j, W, n, ahead, zero, option):
        hi, lo = take(t, HI * W + j, n), take(t, LO * W + j, n)
        scale, shift, floor = take(t, SCALE * W + j, n), take(t, SHIFT * W + j, n), splat(zero)
        prefetch(x, i + ahead)
        v = fma((take(x, i, n) - hi) - lo, scale, shift)
        if option & ADD:
            prefetch(residual, i + ahead)
            v = v + take(residual, i, n)
        if option & RELU:
            v = where(greater(floor, v), floor, v)
        put(y, i, v, n, option & PAST)
    return column


def _masked(take):
    """dy where relu let its input pass."""
    @inlined
    def masked(dy, y, i, d, t, j, W, n, zero, option):
        g, floor = take(dy, i, n), splat(zero)
        if option & BY_X:                       # as normalize does, to the bit
            v = fma(d, take(t, SCALE * W + j, n), take(t, SHIFT * W + j, n))
            g = where(greater(v, floor), g, floor)
        elif option & BY_Y:
            g = where(greater(take(y, i, n), floor), g, floor)
        return g
    return masked


@_sums
def add_products(take, put):
    """Sums of the masked dy and of it times x̂. It is written to z with WRITE."""
    masked = _masked(take)

    def add(x, dy, z, y, i, t, j, W, n, ahead, zero, option, s, p):
        prefetch(x, i + ahead)
        prefetch(dy, i + ahead)
        d = (take(x, i, n) - take(t, HI * W + j, n)) - take(t, LO * W + j, n)
        g = masked(dy, y, i, d, t, j, W, n, zero, option)
        if option & WRITE:
            put(z, i, g, n, False)
        return s + g, fma(g, d * take(t, INV * W + j, n), p)
    return add


@_over
def normalize_backward(take, put):
    """z = dx = (dy − MEAN_DY) · SCALE + x̂ · SLOPE + REST with the masked dy."""
    masked = _masked(take)

    def column(x, dy, dx, y, i, t, j, W, n, ahead, zero, option):
        hi, lo, inv = take(t, HI * W + j, n), take(t, LO * W + j, n), take(t, INV * W + j, n)
        scale, rest = take(t, SCALE * W + j, n), take(t, REST * W + j, n)
        mean_dy, slope = take(t, MEAN_DY * W + j, n), take(t, SLOPE * W + j, n)
        prefetch(x, i + ahead)
        prefetch(dy, i + ahead)
        d = (take(x, i, n) - hi) - lo
        g = masked(dy, y, i, d, t, j, W, n, zero, option)
        put(dx, i, fma(scale, g - mean_dy, fma(d * inv, slope, rest)), n, option & PAST)
    return column
