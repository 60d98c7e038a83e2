"""The tile of a convolution: pixels × vectors of outputs stay in registers over a whole window,
and each output is written once.

Pixels stand anywhere, so that a tile fills up from several rows of a small image. With AVX-512 a
tile is 12 pixels × 2 vectors, or 24 × 1 where one vector holds all the outputs: 24 sums of 32
registers; 112 to 117 GFLOP/s on one core of Zen 4 (K = 16 … 576), which is its peak.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import Code, place
from .simd import VECTOR

__all__ = ["FEW", "PIXELS", "few", "few_half", "tile", "tile_half"]

FEW = 4
PIXELS = 12 if VECTOR == 64 else 4                 # and twice as many in a half tile


class _Tile:
    """Code of one tile: the loops over taps and over a tap's values, with the sums in phis."""

    def __init__(self, builder, real, size, vectors):
        self.builder, self.real, self.size = builder, real, size
        self.lanes = VECTOR // size
        self.vector = ir.VectorType(real, self.lanes)
        self.vectors = vectors

    def at(self, pointer, *offsets):
        for offset in offsets:
            pointer = self.builder.gep(pointer, [offset], source_etype=self.real)
        return pointer

    def load(self, pointer, v):
        i64 = ir.IntType(64)
        return self.builder.load(self.at(pointer, i64(v * self.lanes)), align=self.size,
                                 typ=self.vector)

    def store(self, values, targets, align, nontemporal=False):
        for value, target in zip(values, targets):
            target = self.builder.bitcast(target, self.vector.as_pointer())
            made = self.builder.store(value, target, align=align)
            if nontemporal:
                one = self.builder.module.add_metadata([ir.IntType(32)(1)])
                made.set_metadata("nontemporal", one)

    def loop(self, first, end, start, body):
        """body(i, values) → new values, for i = first … end − 1; there is at least one."""
        builder, i64 = self.builder, ir.IntType(64)
        before, inside = builder.block, builder.append_basic_block("loop")
        builder.branch(inside)
        builder.position_at_end(inside)
        i = builder.phi(i64)
        values = [builder.phi(v.type) for v in start]
        new = body(i, values)
        following = builder.add(i, i64(1))
        after = builder.append_basic_block("after")
        for phi, old, value in zip([i, *values], [first, *start], [following, *new]):
            phi.add_incoming(old, before)
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, end), inside, after)
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


def _tile(pixels, vectors):
    """The intrinsic of a tile of so many pixels and vectors."""
    @intrinsic
    def f(typingctx, a, at, g, taps, count, run, b, s, c, ct, past, x, ask):
        def codegen(context, builder, signature, args):
            real, i64 = context.get_data_type(a.dtype), ir.IntType(64)
            t = _Tile(builder, real, a.dtype.bitwidth // 8, vectors)
            data = {i: place(context, builder, signature.args[i], args[i], i64(0))
                    for i in (0, 1, 3, 6, 7, 8, 9, 11)}
            run, width = args[5], i64(2 * t.lanes)
            code = Code(builder, real)

            def places(base, table):
                offsets = [builder.gep(data[table], [builder.add(args[2], i64(r))])
                           for r in range(pixels)]
                return [t.at(data[base], builder.load(p)) for p in offsets]

            def step(k, values):
                code.prefetch(values[1], False, 1)
                following = [t.at(values[0], width), t.at(values[1], args[12])]
                return [*following, *t.step(sources, k, values[0], values[2:])]

            def tap(i, values):
                # k counts from the tap's offset: the pointers to the pixels stay as they are
                offset = builder.load(builder.gep(data[3], [i]))
                return t.loop(offset, builder.add(offset, run), values, step)

            sources = places(0, 1)
            start = [t.load(data[7], v) for v in range(vectors)] * pixels
            sums = t.loop(i64(0), args[4], [t.at(data[6]), t.at(data[11]), *start], tap)[2:]
            targets = [t.at(target, i64(v * t.lanes)) for target in places(8, 9)
                       for v in range(vectors)]
            with builder.if_else(args[10]) as (then, otherwise):
                with then:
                    t.store(sums, targets, VECTOR, nontemporal=True)
                with otherwise:
                    t.store(sums, targets, t.size)
            return context.get_dummy_value()

        n = types.intp
        return types.void(a, at, n, taps, n, n, b, s, c, ct, types.boolean, x, n), codegen
    return f


def _tile_in_numpy(pixels, vectors):
    """The same with the JIT off."""
    def f(a, at, g, taps, count, run, b, s, c, ct, past, x, ask):
        W = VECTOR // a.itemsize
        v, k, r = np.arange(vectors * W), np.arange(count * run), np.arange(g, g + pixels)
        window = a[at[r, None] + taps[k // run] + k % run]
        c[ct[r, None] + v] = s[v] + window @ b[k[:, None] * 2 * W + v]
    return f


# tile(a, at, g, taps, count, run, b, s, c, ct, past, x, ask), for each pixel r = g, g + 1, …:
#     c[ct[r] + v] = s[v] + Σ_{t < count} Σ_{k < run} a[at[r] + taps[t] + k] b[(t run + k) W + v]
# W = two vectors; past: c is written past the caches, all places are aligned vectors. Arrays are
# arrays or pointers. There is at least one tap, run is at least 1. Meanwhile the cache lines of x,
# and of ``ask`` values more for each k, are fetched, one at a time: in a burst they keep the loads
# of the tile waiting.
_make = _tile_in_numpy if config.DISABLE_JIT else _tile
tile, tile_half = _make(PIXELS, 2), _make(2 * PIXELS, 1)
few, few_half = _make(FEW, 2), _make(FEW, 1)
