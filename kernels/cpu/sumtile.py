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

from .simd import VECTOR

__all__ = ["sum_tiles"]


def _step(builder, vector, a, b, sums):
    """One pixel: sums[r][v] + a[r] b[v]."""
    i32, i64, real = ir.IntType(32), ir.IntType(64), vector.element
    nothing = ir.Constant(vector, ir.Undefined)
    first, size = ir.Constant(ir.VectorType(i32, vector.count), None), VECTOR // vector.count
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3),
                                         f"llvm.fma.v{vector.count}f{8 * size}")
    bs = [builder.load(builder.gep(b, [i64(v * vector.count)], source_etype=real), align=size,
                       typ=vector) for v in range(len(sums[0]))]
    new = []
    for r, row in enumerate(sums):
        one = builder.load(builder.gep(a, [i64(r)], source_etype=real), align=size, typ=real)
        one = builder.insert_element(nothing, one, i32(0))
        splat = builder.shuffle_vector(one, nothing, first)
        new.append([builder.call(fma, [splat, v, old]) for v, old in zip(bs, row)])
    return new


def _nest(builder, vector, levels, a, b, sums):
    """The sums after loops of (count ≥ 1, step of a, step of b), outermost first."""
    if not levels:
        return _step(builder, vector, a, b, sums)
    (count, step_a, step_b), i64 = levels[0], ir.IntType(64)
    before, body = builder.block, builder.append_basic_block("loop")
    after = builder.append_basic_block("sums")
    builder.branch(body)
    builder.position_at_end(body)
    i, at_a, at_b = builder.phi(i64), builder.phi(a.type), builder.phi(b.type)
    old = [[builder.phi(vector) for _ in row] for row in sums]
    new = _nest(builder, vector, levels[1:], at_a, at_b, old)
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


def _tile(rows, vectors):
    """The intrinsic of a tile of so many rows and vectors."""
    @intrinsic
    def tile(typingctx, a, at, a_steps, b, bt, b_steps, counts, c, ct, ldc):
        def codegen(context, builder, signature, args):
            real, size, i64 = context.get_data_type(a.dtype), a.dtype.bitwidth // 8, ir.IntType(64)
            vector = ir.VectorType(real, VECTOR // size)

            def place(i, offset):
                data = context.make_array(signature.args[i])(context, builder, args[i]).data
                return builder.gep(data, [offset], source_etype=real)

            def triple(i):
                return [builder.extract_value(args[i], k) for k in range(3)]

            places = [[place(7, builder.add(builder.add(args[8], builder.mul(args[9], i64(r))),
                                            i64(v * vector.count)))
                       for v in range(vectors)] for r in range(rows)]
            start = [[builder.load(p, align=size, typ=vector) for p in row] for row in places]
            levels = list(zip(triple(6), triple(2), triple(5)))
            sums = _nest(builder, vector, levels, place(0, args[1]), place(3, args[4]), start)
            for value, p in zip(chain(*sums), chain(*places)):
                builder.store(value, builder.bitcast(p, vector.as_pointer()), align=size)
            return context.get_dummy_value()

        n, three = types.intp, types.UniTuple(types.intp, 3)
        return types.void(a, n, three, b, n, three, three, c, n, n), codegen
    return tile


def _tile_in_numpy(rows, vectors):
    """The same with the JIT off."""
    def tile(a, at, a_steps, b, bt, b_steps, counts, c, ct, ldc):
        r, v = np.arange(rows)[:, None], np.arange(vectors * VECTOR // a.itemsize)
        pixel = np.indices(counts).reshape(3, -1)
        p, q = (np.asarray(steps) @ pixel for steps in (a_steps, b_steps))
        c[ct + r * ldc + v] += a[at + r + p] @ b[bt + q[:, None] + v]
    return tile


# tile(a, at, a_steps, b, bt, b_steps, counts, c, ct, ldc): with p, q the offsets of a pixel,
#     c[ct + r · ldc + v] += Σ a[at + p + r] b[bt + q + v]
_make = _tile_in_numpy if config.DISABLE_JIT else _tile
sum_tiles = {shape: _make(*shape) for shape in ((12, 2), (8, 2), (4, 2), (16, 1), (8, 1), (4, 1))}
