"""The vector loops of normalization, over columns: rows of memory whose column j has constants j.

Rows × channels memory is such a matrix as it is; a plane of one channel is one too, its rows four
vectors long and all its columns that channel's. Four rows are taken per column, so that constants
and sums of a column are loaded once for four vectors of data. The part of a vector at the end of a
row has zeros behind it, in constants as in data, and adds nothing.

``table`` holds a column's sums and constants in lines of ``W`` values. Arrays come as pointers: a
function that takes three arrays compiles several times as long.
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

ROWS = 2
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


def _over(make):
    """The loop over segments first … last of so many channels from c on. Of the matrix that they
    are, ``column`` does one column in up to ROWS rows."""
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
            r, many = 0, rows if end == width else rows - 1
            while r < rows:
                count = ROWS if r + ROWS <= many else 1
                columns = end if r == rows - 1 else width
                for j in range(0, columns, L):
                    i = at + r * step + j
                    if columns - j >= L:
                        whole(x, b, z, y, i, step, count, t, j, line, L, ahead, zero, option)
                    else:
                        part(x, b, z, y, i, step, count, t, j, line, columns - j, ahead, zero,
                             option)
                r += count
    return over


@_over
def add_squares(take, put):
    """Lines 0 and 1: sums of d and of d², d = x − HI."""
    def column(x, _b, _z, _y, at, step, count, t, j, W, n, ahead, zero,
               option):
        s, q, pivot = take(t, j, n), take(t, W + j, n), take(t, HI * W + j, n)
        for k in range(count):
            i = at + k * step
            prefetch(x, i + ahead)
            d = take(x, i, n) - pivot
            s = s + d
            q = fma(d, d, q)
        put(t, j, s, n, False)
        put(t, W + j, q, n, False)
    return column


@_over
def normalize(take, put):
    """y = ((x − HI) − LO) · SCALE + SHIFT [+ residual], not below zero with RELU."""
    def column(x, residual, _z, y, at, step, count, t, j, W, n, ahead, zero,
               option):
        hi, lo = take(t, HI * W + j, n), take(t, LO * W + j, n)
        scale, shift, floor = take(t, SCALE * W + j, n), take(t, SHIFT * W + j, n), splat(zero)
        for k in range(count):
            i = at + k * step
            prefetch(x, i + ahead)
            v = fma((take(x, i, n) - hi) - lo, scale, shift)
            if option & ADD:
                prefetch(residual, i + ahead)
                v = v + take(residual, i, n)
            if option & RELU:
                v = where(greater(floor, v), floor, v)
            put(y, i, v, n, option & PAST)
    return column


@inlined
def _masked(dy, d, y, scale, shift, floor, option):
    """dy where relu let its input pass."""
    if option & BY_X:
        return where(greater(fma(d, scale, shift), floor), dy, floor)
    if option & BY_Y:
        return where(greater(y, floor), dy, floor)
    return dy


@_over
def add_products(take, put):
    """Lines 0 and 1: sums of the masked dy and of it times x̂. It is written to z with WRITE."""
    def column(x, dy, z, y, at, step, count, t, j, W, n, ahead, zero,
               option):
        s, p, inv = take(t, j, n), take(t, W + j, n), take(t, INV * W + j, n)
        hi, lo = take(t, HI * W + j, n), take(t, LO * W + j, n)
        scale, shift, floor = take(t, SCALE * W + j, n), take(t, SHIFT * W + j, n), splat(zero)
        for k in range(count):
            i = at + k * step
            prefetch(x, i + ahead)
            prefetch(dy, i + ahead)
            d = (take(x, i, n) - hi) - lo
            g = _masked(take(dy, i, n), d, take(y, i, n), scale, shift, floor, option)
            if option & WRITE:
                put(z, i, g, n, False)
            s = s + g
            p = fma(g, d * inv, p)
        put(t, j, s, n, False)
        put(t, W + j, p, n, False)
    return column


@_over
def normalize_backward(take, put):
    """z = dx = (dy − MEAN_DY) · SCALE + x̂ · SLOPE + REST with the masked dy."""
    def column(x, dy, dx, y, at, step, count, t, j, W, n, ahead, zero,
               option):
        hi, lo, inv = take(t, HI * W + j, n), take(t, LO * W + j, n), take(t, INV * W + j, n)
        scale, shift, floor = take(t, SCALE * W + j, n), take(t, SHIFT * W + j, n), splat(zero)
        mean_dy, slope = take(t, MEAN_DY * W + j, n), take(t, SLOPE * W + j, n)
        rest = take(t, REST * W + j, n)
        for k in range(count):
            i = at + k * step
            prefetch(x, i + ahead)
            prefetch(dy, i + ahead)
            d = (take(x, i, n) - hi) - lo
            g = _masked(take(dy, i, n), d, take(y, i, n), scale, shift, floor, option)
            put(dx, i, fma(scale, g - mean_dy, fma(d * inv, slope, rest)), n, option & PAST)
    return column
