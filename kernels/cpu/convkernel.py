"""The tile of a convolution: groups of four pixels × vectors of outputs stay in registers over a
whole window, and each output is written once.

Pixels of a group are evenly spaced; groups stand anywhere, so that a tile fills up from several
rows of a small image. With AVX-512 a tile is 3 groups × 2 vectors, or 6 × 1 where one vector holds
all the outputs: 24 sums of 32 registers.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import VECTOR

__all__ = ["GROUP", "HALF_GROUPS", "GROUPS", "few", "few_half", "tile", "tile_half"]

GROUP = 4                                          # pixels
GROUPS, HALF_GROUPS = (3, 6) if VECTOR == 64 else (1, 2)


class _Tile:
    """Code of one tile: the loops over taps and over a tap's values, with the sums in phis."""

    def __init__(self, builder, real, size, groups, vectors):
        self.builder, self.real, self.size = builder, real, size
        self.lanes = VECTOR // size
        self.vector = ir.VectorType(real, self.lanes)
        self.groups, self.vectors = groups, vectors

    def at(self, pointer, *offsets):
        for offset in offsets:
            pointer = self.builder.gep(pointer, [offset], source_etype=self.real)
        return pointer

    def load(self, pointer, v):
        i64 = ir.IntType(64)
        return self.builder.load(self.at(pointer, i64(v * self.lanes)), align=self.size,
                                 typ=self.vector)

    def loop(self, count, start, body):
        """body(i, values) → new values, for i = 0 … count − 1, count ≥ 1."""
        builder, i64 = self.builder, ir.IntType(64)
        before, inside = builder.block, builder.append_basic_block("loop")
        builder.branch(inside)
        builder.position_at_end(inside)
        i = builder.phi(i64)
        values = [builder.phi(v.type) for v in start]
        new = body(i, values)
        following = builder.add(i, i64(1))
        after = builder.append_basic_block("after")
        for phi, first, value in zip([i, *values], [i64(0), *start], [following, *new]):
            phi.add_incoming(first, before)
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
        builder.position_at_end(after)
        return new

    def step(self, pixels, k, b, sums):
        """sums[r][v] + pixels[r][k] b[v], flat."""
        builder, i32 = self.builder, ir.IntType(32)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.vector, [self.vector] * 3),
            f"llvm.fma.v{self.lanes}f{8 * self.size}")
        bs, new = [self.load(b, v) for v in range(self.vectors)], []
        none = ir.Constant(self.vector, ir.Undefined)
        first = ir.Constant(ir.VectorType(i32, self.lanes), None)
        for pixel in pixels:
            value = builder.load(self.at(pixel, k), align=self.size, typ=self.real)
            one = builder.insert_element(none, value, i32(0))
            splat = builder.shuffle_vector(one, none, first)
            new += [builder.call(fma, [splat, v, sums[len(new) + i]]) for i, v in enumerate(bs)]
        return new


def _tile(groups, vectors):
    """The intrinsic of a tile of so many groups and vectors."""
    @intrinsic
    def f(typingctx, a, at, row, taps, T, run, b, bt, s, st, c, ct, ldc):
        def codegen(context, builder, signature, args):
            real, i64 = context.get_data_type(a.dtype), ir.IntType(64)
            t = _Tile(builder, real, a.dtype.bitwidth // 8, groups, vectors)
            data = {i: context.make_array(signature.args[i])(context, builder, args[i]).data
                    for i in (0, 3, 6, 8, 10)}
            pixels = [t.at(data[0], first, builder.mul(args[2], i64(r)))
                      for first in cgutils.unpack_tuple(builder, args[1], groups)
                      for r in range(GROUP)]
            run, width = args[5], i64(2 * t.lanes)
            b0, s0 = t.at(data[6], args[7]), t.at(data[8], args[9])
            start = [t.load(s0, v) for v in range(vectors)] * (groups * GROUP)

            def tap(i, sums):
                # the pointers of the 12 or 24 pixels stay as they are from tap to tap: k moves
                offset = builder.load(builder.gep(data[3], [i]))
                b_tap = t.at(b0, builder.mul(i, builder.mul(run, width)))
                return t.loop(run, sums, lambda k, values: t.step(
                    pixels, builder.add(k, offset), t.at(b_tap, builder.mul(k, width)), values))

            sums = t.loop(args[4], start, tap)
            for g, first in enumerate(cgutils.unpack_tuple(builder, args[11], groups)):
                for r in range(GROUP):
                    place = t.at(data[10], first, builder.mul(args[12], i64(r)))
                    for v in range(vectors):
                        value = sums[(g * GROUP + r) * vectors + v]
                        there = builder.bitcast(t.at(place, i64(v * t.lanes)),
                                                t.vector.as_pointer())
                        builder.store(value, there, align=t.size)
            return context.get_dummy_value()

        n, many = types.intp, types.UniTuple(types.intp, groups)
        return types.void(a, many, n, taps, n, n, b, n, s, n, c, many, n), codegen
    return f


def _tile_in_numpy(groups, vectors):
    """The same with the JIT off."""
    def f(a, at, row, taps, T, run, b, bt, s, st, c, ct, ldc):
        W = VECTOR // a.itemsize
        v, k = np.arange(vectors * W), np.arange(T * run)
        window = taps[k // run] + k % run
        weight = b[bt + k[:, None] * 2 * W + v]
        for g in range(groups):
            r = np.arange(GROUP)[:, None]
            c[ct[g] + r * ldc + v] = s[st + v] + a[at[g] + r * row + window] @ weight
    return f


# tile(a, at, row, taps, T, run, b, bt, s, st, c, ct, ldc), for each group g and r = 0 … 3:
#     c[ct[g] + r · ldc + v] = s[st + v]
#         + Σ_{t < T} Σ_{k < run} a[at[g] + r · row + taps[t] + k] b[bt + (t · run + k) · W + v]
# W = two vectors. T and run are at least 1.
_make = _tile_in_numpy if config.DISABLE_JIT else _tile
tile, tile_half = _make(GROUPS, 2), _make(HALF_GROUPS, 1)
few, few_half = _make(1, 2), _make(1, 1)
