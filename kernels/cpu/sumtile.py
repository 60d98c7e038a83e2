"""The tile of a weight gradient: a few rows × one or two vectors of sums over a block of pixels.

It is a matrix product whose inner dimension is the pixels of an image block, which lie in memory as
images of rows of pixels: three nested loops around one step, with the sums in registers
throughout. Eight sums are enough to hide the latency of a fused multiply-add (118 GFLOP/s of one
core of Zen 4 from the second level of cache, for every tile of 8 to 28 sums tried); what counts is
that they are loaded and stored once per block, not per row of an image.
"""

from itertools import chain

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import I64, Code, place
from .jit import device
from .simd import VECTOR

__all__ = ["LINES", "ROWS", "SHAPES", "by_windows", "line_tile", "strip", "sum_tile"]


def _step(builder, vector, row, a, b, sums, ask):
    """One pixel: sums[r][v] + a[r row] b[v]. ``ask``: the step of the pointer behind them, whose
    line is fetched."""
    i32, i64, real = ir.IntType(32), ir.IntType(64), vector.element
    nothing = ir.Constant(vector, ir.Undefined)
    first, size = ir.Constant(ir.VectorType(i32, vector.count), None), VECTOR // vector.count
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3),
                                         f"llvm.fma.v{vector.count}f{8 * size}")
    bs = [builder.load(builder.gep(b, [i64(v * vector.count)], source_etype=real), align=size,
                       typ=vector) for v in range(len(sums[0]))]
    new, behind = [], []
    if ask is not None:
        *sums, (q,) = sums
        Code(builder, real).prefetch(q, False, 1)
        behind = [[builder.gep(q, [ask], source_etype=real)]]
    for r, olds in enumerate(sums):
        at = builder.gep(a, [builder.mul(row, i64(r))], source_etype=real)
        one = builder.load(at, align=size, typ=real)
        one = builder.insert_element(nothing, one, i32(0))
        splat = builder.shuffle_vector(one, nothing, first)
        new.append([builder.call(fma, [splat, v, old]) for v, old in zip(bs, olds)])
    return new + behind


def _nest(builder, vector, levels, row, a, b, sums, ask=None):
    """The sums after loops of (count ≥ 1, step of a, step of b), outermost first."""
    if not levels:
        return _step(builder, vector, row, a, b, sums, ask)
    (count, step_a, step_b), i64 = levels[0], ir.IntType(64)
    before, body = builder.block, builder.append_basic_block("loop")
    after = builder.append_basic_block("sums")
    builder.branch(body)
    builder.position_at_end(body)
    i, at_a, at_b = builder.phi(i64), builder.phi(a.type), builder.phi(b.type)
    old = [[builder.phi(value.type) for value in line] for line in sums]
    new = _nest(builder, vector, levels[1:], row, at_a, at_b, old, ask)
    following = [builder.add(i, i64(1)), builder.gep(at_a, [step_a], source_etype=vector.element),
                 builder.gep(at_b, [step_b], source_etype=vector.element)]
    phis = [i, at_a, at_b, *chain(*old)]
    starts, nexts = [i64(0), a, b, *chain(*sums)], [*following, *chain(*new)]
    for phi, start, value in zip(phis, starts, nexts):
        phi.add_incoming(start, before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following[0], count), body, after)
    builder.position_at_end(after)
    return new


ROWS = 4                   # of the smallest tile
TALL, TALL_HALF = (12, 16) if VECTOR == 64 else (6, 12)      # of two vectors and of one
SHAPES = tuple((rows, vectors) for vectors, tall in ((2, TALL), (1, TALL_HALF))
               for rows in (tall, 8, 4) if rows <= tall)
LINES = tuple((rows, vectors) for vectors in (3, 2, 1) for rows in (7, 5, 3, 1))


def _tile(code, rows, vectors, row, a, a_steps, b, b_steps, counts, c, ldc, q=None, ask=None):
    """The code of a tile of so many rows and vectors, that fetches lines from q on meanwhile."""
    builder, vector = code.builder, code.vector
    places = [[code.at(code.at(c, builder.mul(ldc, I64(r))), v) for v in range(vectors)]
              for r in range(rows)]
    start = [[code.load(p) for p in line] for line in places]
    sums = _nest(builder, vector, list(zip(counts, a_steps, b_steps)), row, a, b,
                 start if q is None else [*start, [q]], ask)
    for value, p in zip(chain(*sums), chain(*places)):       # and not the pointer
        code.store(value, p)


def _choice(shapes, a):
    """The code of an intrinsic: a switch over rows and vectors to the tile of that shape."""
    def codegen(context, builder, signature, args):
        code = Code(builder, context.get_data_type(a.dtype))
        steps = [cgutils.unpack_tuple(builder, args[i]) for i in (5, 8, 9)]
        x, y, z, *q = (place(context, builder, signature.args[i], *args[i:i + 2])
                       for i in (2, 6, 10, 13) if i < len(args))
        after = builder.append_basic_block("after")
        switch = builder.switch(builder.add(builder.mul(args[0], I64(4)), args[1]), after)
        for shape in shapes:
            block = builder.append_basic_block("tile")
            switch.add_case(I64(4 * shape[0] + shape[1]), block)
            builder.position_at_end(block)
            _tile(code, *shape, args[4], x, steps[0], y, steps[1], steps[2], z, args[12], *q,
                  *args[15:])
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()
    return codegen


def _arguments(a, b, c, loops, *x):
    n, steps = types.intp, types.UniTuple(types.intp, loops)
    return types.void(n, n, a, n, n, steps, b, n, steps, steps, c, n, n, *(x and (*x, n, n)))


@intrinsic
def sum_tile(typingctx, rows, vectors, a, at, row, a_steps, b, bt, b_steps, counts, c, ct, ldc,
             x, xt, ask):
    """c[ct + r · ldc + v] += Σ a[at + p + r · row] b[bt + q + v], with p, q the offsets of a pixel
    in three loops: a tile of one of the SHAPES (rows, vectors). The cache lines of x[xt], and of
    ``ask`` values more for each pixel, are fetched meanwhile."""
    return _arguments(a, b, c, 3, x), _choice(SHAPES, a)


@intrinsic
def line_tile(typingctx, rows, vectors, a, at, row, a_steps, b, bt, b_steps, counts, c, ct, ldc):
    """The same in two loops, in one of the LINES."""
    return _arguments(a, b, c, 2), _choice(LINES, a)


if config.DISABLE_JIT:                            # the same in NumPy
    def sum_tile(rows, vectors, a, at, row, a_steps, b, bt, b_steps, counts, c, ct, ldc, *_):
        r, v = np.arange(rows)[:, None], np.arange(vectors * VECTOR // a.itemsize)
        pixel = np.indices(counts).reshape(len(counts), -1)
        p, q = (np.asarray(steps) @ pixel for steps in (a_steps, b_steps))
        c[ct + r * ldc + v] += a[at + r * row + p] @ b[bt + q[:, None] + v]

    line_tile = sum_tile


def by_windows(n_c):
    """Whether tiles take values of the window as rows: a tile has 4 rows at least, which few
    channels of one pixel do not fill."""
    return n_c < 12 and n_c % ROWS != 0


@device
def _height(left, most):
    """Rows of the next tile: rather two of middle height than a tall one and a low one."""
    middle = 8 if most > 8 else 4
    if left >= most and (left != 2 * middle or left == most):
        return most
    return middle if left >= middle else ROWS


@device
def strip(half, a, at, a_steps, n, b, bt, b_steps, counts, c, ct, ldc, x, xt, ask):
    """n rows of sums, in fours, of one vector or two. From x[xt] on, ``ask`` values per pixel and
    tile are fetched meanwhile; returns where that ended."""
    most, r = TALL_HALF if half else TALL, 0
    each = counts[0] * counts[1] * counts[2] * ask
    while r < n:
        rows = _height(n - r, most)
        sum_tile(rows, 1 if half else 2, a, at + r, 1, a_steps, b, bt, b_steps, counts, c,
                 ct + r * ldc, ldc, x, xt, ask)
        r, xt = r + rows, xt + each
    return xt
