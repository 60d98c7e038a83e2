"""Rows of depthwise convolution: four outputs and up to 3 × 3 taps at a time, along the channels.

Every vector of x is loaded once for all outputs and taps that it meets: 27 loads, with the weights,
for 36 multiply-adds. Memory is read in its order; copied to vectors of channels first, so that the
weights stay in registers, 8 images of 512 channels of 14×14 take 284 us of a core of Zen 5 instead
of 205, 128 of 56×56 1370 instead of 743. The 31 addresses of a tile have 15 registers: see _Steps.
Rows outside the image are read from zeros, columns outside under a mask. Weights lie by vectors of
channels, (vectors, taps, lanes): nine lines 2 KB apart would share two sets of L1.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import I64, Code
from .simd import VECTOR

__all__ = ["ROWS", "rows_of"]

OUTPUTS = 4
ROWS = 3                   # of taps, at most


def _odd(n):
    """n = odd · 2ᵏ: (odd, k)."""
    k = (n & -n).bit_length() - 1
    return n >> k, k


class _Steps:
    """Multiples of a step between vectors. An address is a register and 1, 2, 4 or 8 times another
    one: with a register for each odd multiple, two steps serve four outputs and three six pixels.
    LLVM, which knows that they are multiples, would keep 18 pointers, on the stack: its loop gets
    them as values of which it knows nothing."""

    def __init__(self, code, values, most):
        self.code, self.most = code, most
        self.odds = sorted({_odd(n)[0] for n in range(1, most)})
        step = code.builder.mul(values, I64(code.size))
        self.start = [code.builder.mul(step, I64(n)) for n in self.odds]

    def of(self, pointer, n, registers):
        """``pointer`` and n steps, with what the loop has of ``start``."""
        if not n:
            return pointer
        odd, k = _odd(n)
        offset = self.code.builder.shl(registers[self.odds.index(odd)], I64(k))
        return self.code.builder.gep(pointer, [offset], source_etype=ir.IntType(8))


class _Tile(NamedTuple):
    """So many outputs side by side: of each column of pixels a mask, or None, by whether it is
    there; steps from pixel to pixel, from tap to tap, from output to output."""

    outputs: int
    there: list
    pixels: _Steps
    taps: _Steps
    out: _Steps

    @property
    def registers(self):
        """What the loop has to keep of the steps, and where that of each ends."""
        steps = self.pixels, self.taps, self.out
        return [r for s in steps for r in s.start], np.cumsum([len(s.odds) for s in steps])

    def weights(self, line, registers):
        """Where those of a row are."""
        return [self.taps.of(line, j, registers[1]) for j in range(self.taps.most)]

    def places(self, y, registers):
        """Where the outputs are."""
        return [self.out.of(y, u, registers[2]) for u in range(self.outputs)]


class _Row:
    """The code of one row: b the builder, ``pieces`` whether some kernels need several, the rest as
    in the comment below."""

    writes = True              # y

    def __init__(self, code, shape, pieces, pointers, source, steps, places, first, target, n):
        self.pieces = pieces
        self.code, self.b, self.n = code, code.builder, n
        self.rows, self.taps, self.step = shape
        self.x, weight, bias, self.y, self.zeros = pointers
        self.at, self.h, self.w, self.H, self.W = source
        self.line, self.pixel, self.dh, self.dw = steps
        self.yt, self.out, self.count, asks = target
        self.asks = self.b.icmp_signed("!=", asks, I64(0))
        b, (wt, ldw, self.tap, self.packed), (whether, bt) = self.b, places, first
        self.bias = code.at(bias, bt)
        # LLVM reads y also where the mask is empty: what is one piece only must not
        self.adds = code.splat(b.icmp_signed("==", whether, I64(0))) if self.pieces else None
        self.weights = [code.at(weight, b.add(wt, b.mul(ldw, I64(r)))) for r in range(self.rows)]
        self.seen = [b.icmp_unsigned("<", b.add(self.h, b.mul(self.dh, I64(r))), self.H)
                     for r in range(self.rows)]

    def loop(self, count, values, body):
        """body(values) → values, ``count`` ≥ 1 times; the last ones."""
        b, before, block = self.b, self.b.block, self.b.append_basic_block("loop")
        b.branch(block)
        b.position_at_end(block)
        phis = [b.phi(v.type) for v in [count, *values]]
        new = [b.sub(phis[0], I64(1)), *body(phis[1:])]
        for phi, start, value in zip(phis, [count, *values], new):
            phi.add_incoming(start, before)
            phi.add_incoming(value, b.block)
        after = b.append_basic_block("after")
        b.cbranch(b.icmp_signed(">", new[0], I64(0)), block, after)
        b.position_at_end(after)
        return new[1:]

    def along(self, tile, pointers, moves):
        """The tile for all channels: as many as fill a vector, without a mask, then the rest. From
        one vector to the next, pointers move."""
        code, b, rows = self.code, self.b, self.rows
        registers, (first, second, _) = tile.registers

        def vector(p, r, mask):
            self.vector(tile, (p[:rows], p[rows:2 * rows], p[2 * rows:]),
                        (r[:first], r[first:second], r[second:]), mask)

        def each(values):
            values = [code.hidden(v) for v in values]
            moving, still = values[:len(pointers)], values[len(pointers):]
            vector(moving, still, None)
            return [code.at(p, by) for p, by in zip(moving, moves)] + still
        whole = b.lshr(self.n, I64(code.lanes.bit_length() - 1))
        with b.if_then(b.icmp_signed(">", whole, I64(0))):
            self.loop(whole, pointers + registers, each)
        rest = b.sub(self.n, b.mul(whole, I64(code.lanes)))
        with b.if_then(b.icmp_signed(">", rest, I64(0))):
            vector([code.at(p, b.mul(whole, by)) for p, by in zip(pointers, moves)], registers,
                   code.first(rest))

    def both(self, a, b):
        """Lanes of two masks, of which each may be all."""
        return b if a is None else a if b is None else self.b.and_(a, b)

    def columns(self, outputs):
        return (outputs - 1) * self.step + self.taps

    def met(self, tile, x, registers, mask):
        """(row, output, tap, pixel) of all products of a vector of channels; the pixels of rows
        begin at x."""
        for r, line in enumerate(x):
            for c, there in enumerate(tile.there):
                v = self.code.load(tile.pixels.of(line, c, registers[0]), self.both(mask, there))
                for u in range(tile.outputs):
                    if 0 <= c - u * self.step < self.taps:
                        yield r, u, c - u * self.step, v

    def vector(self, tile, pointers, registers, mask):
        """The sums of a vector of channels."""
        code, (weights, (y, bias)) = self.code, pointers[1:]
        bias, to = code.load(bias, mask), tile.places(y, registers)
        sums = [bias] * tile.outputs
        if self.pieces:                         # to what y holds, but for the first
            sums = [code.load(p, self.both(mask, self.adds), bias) for p in to]
        k = [[code.load(p) for p in tile.weights(line, registers)] for line in weights]
        for r, u, j, v in self.met(tile, pointers[0], registers, mask):
            sums[u] = code.fma(v, k[r][j], sums[u])
        for value, p in zip(sums, to):
            code.store(value, p, mask)

    def tile(self, u, w, outputs, inside):
        """Outputs u, u + 1, …, by whether all that they read is there."""
        b, code, columns, rows = self.b, self.code, self.columns(outputs), self.rows
        start = b.add(self.at, b.mul(u, b.mul(self.pixel, I64(self.step))))
        x = [code.at(self.x, b.add(start, b.mul(self.line, I64(r)))) for r in range(rows)]
        there = [None] * columns
        if not inside:
            x = [b.select(seen, p, self.zeros) for seen, p in zip(self.seen, x)]
            there = [code.splat(b.icmp_unsigned("<", b.add(w, b.mul(self.dw, I64(c))), self.W))
                     for c in range(columns)]
        y = code.at(self.y, b.add(self.yt, b.mul(u, self.out)))
        tile = _Tile(outputs, there, _Steps(code, self.pixel, columns),
                     _Steps(code, self.tap, self.taps), _Steps(code, self.out, outputs))
        one = I64(code.lanes)
        self.along(tile, [*x, *self.weights, y, self.bias],
                   [one] * rows + [self.packed] * rows + [one] * 2)

    def ahead(self, u):
        """Ask for the pixels that the next row of outputs reads first, below those of output u and
        the three after it, and for the places of that row: the hardware loses count of so many
        streams. Addresses may be outside. (128 channels of 56×56, one core beside busy ones: 2.9 ms
        without, 1.2 with it; 32 of 112×112, gradient of the weights: 3.4 and 1.1.)"""
        b, at, step = self.b, self.code.at, self.step
        first = b.add(self.at, b.mul(u, b.mul(self.pixel, I64(step))))
        for r in range(self.rows, self.rows + step):
            self.ask(at(self.x, b.add(first, b.mul(self.line, I64(r)))), OUTPUTS * step, self.pixel,
                     False)
        self.ask(at(self.y, b.add(self.yt, b.mul(b.add(u, self.count), self.out))), OUTPUTS,
                 self.out, self.writes)

    def ask(self, p, pixels, apart, write):
        """Fetch the channels of so many pixels to an L2."""
        code, b = self.code, self.b
        vectors = b.sdiv(b.add(self.n, I64(code.lanes - 1)), I64(code.lanes))

        def vector(values):
            code.prefetch(values[0], write)
            return [code.at(values[0], 1)]

        def pixel(values):
            self.loop(vectors, values, vector)
            return [code.at(values[0], apart)]
        self.loop(I64(pixels), [p], pixel)

    def column(self, u):
        """The column of output u's first tap."""
        return self.b.add(self.w, self.b.mul(u, self.b.mul(self.dw, I64(self.step))))

    def four(self, u):
        b, w, whole = self.b, self.column(u), self.seen[0]
        with b.if_then(self.asks):
            self.ahead(u)
        last = b.add(w, b.mul(self.dw, I64(self.columns(OUTPUTS) - 1)))
        for here in [*self.seen[1:], b.icmp_signed(">=", w, I64(0)),
                     b.icmp_signed("<", last, self.W)]:
            whole = b.and_(whole, here)
        with b.if_else(whole) as (then, otherwise):
            with then:
                self.tile(u, w, OUTPUTS, True)
            with otherwise:
                self.tile(u, w, OUTPUTS, False)

    def all(self):
        """Fours, then two and one of what is left: an output that is not there must not even be
        zero, since zero times Inf is NaN."""
        b, fours = self.b, self.b.sdiv(self.count, I64(OUTPUTS))

        def each(values):
            self.four(values[0])
            return [b.add(values[0], I64(OUTPUTS))]
        with b.if_then(b.icmp_signed(">", fours, I64(0))):
            self.loop(fours, [I64(0)], each)
        u = b.mul(fours, I64(OUTPUTS))
        for some in (2, 1):
            left = b.icmp_signed("!=", b.and_(self.count, I64(some)), I64(0))
            with b.if_then(left):
                self.tile(u, self.column(u), some, False)
            u = b.select(left, b.add(u, I64(some)), u)


class _Gradient(_Row):
    """The same for the gradient of the weights: what a row adds to it. y is read and the weights
    are written. A tile loads and stores the sums, for 36 multiply-adds 31 loads and 9 stores; rows
    of the image are read as they lie."""

    writes = False

    def vector(self, tile, pointers, registers, mask):
        code, (weights, (y, _)) = self.code, pointers[1:]
        dy = [code.load(p, mask) for p in tile.places(y, registers)]
        places = [tile.weights(line, registers) for line in weights]
        sums = [[code.load(p) for p in line] for line in places]
        for r, u, j, v in self.met(tile, pointers[0], registers, mask):
            sums[r][j] = code.fma(v, dy[u], sums[r][j])
        for line, to in zip(sums, places):
            for value, p in zip(line, to):
                code.store(value, p)


def _rows(shapes, pieces, gradient=False):
    """The intrinsic of a row of one of the shapes, its first argument."""
    kind = _Gradient if gradient else _Row

    @intrinsic
    def row(typingctx, shape, x, source, steps, weight, places, bias, first, y, target, zeros, n):
        def codegen(context, builder, signature, args):
            code = Code(builder, context.get_data_type(x.dtype))
            shape, source, steps, places, first, target = (
                cgutils.unpack_tuple(builder, args[i]) for i in (0, 2, 3, 5, 7, 9))
            pointers = [args[i] for i in (1, 4, 6, 8, 10)]
            after, number = builder.append_basic_block("after"), shape[0]
            for k in shape[1:]:
                number = builder.add(builder.mul(number, I64(8)), k)
            switch = builder.switch(number, after)
            for rows, taps, step in shapes:
                block = builder.append_basic_block("row")
                switch.add_case(I64(64 * rows + 8 * taps + step), block)
                builder.position_at_end(block)
                kind(code, (rows, taps, step), pieces, pointers, source, steps, places,
                     first, target, args[11]).all()
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        k, several = types.intp, lambda n: types.UniTuple(types.intp, n)
        return types.void(several(3), x, several(5), several(4), weight, several(4), bias,
                          several(2), y, several(4), zeros, k), codegen
    return row


def _rows_in_numpy(shapes, pieces, gradient=False):
    """The same with the JIT off."""
    def row(shape, x, source, steps, weight, places, bias, first, y, target, zeros, n):
        (rows, taps, step), (at, h, w, H, W), (line, pixel, dh, dw) = shape, source, steps
        (wt, ldw, tap, packed), (yt, out, count, _), c = places, target, np.arange(n)
        lanes = VECTOR // x.itemsize
        for u in range(count):
            total, to = 0, yt + u * out + c
            for r, j in np.ndindex(rows, taps):
                k = wt + r * ldw + j * tap + c // lanes * packed + c % lanes
                column = u * step + j
                there = 0 <= h + r * dh < H and 0 <= w + column * dw < W
                v = x[at + r * line + column * pixel + c] if there else zeros[c]
                if gradient:
                    weight[k] += v * y[to]
                else:
                    total = total + v * weight[k]
            if not gradient:
                y[to] = (bias[first[1] + c] if first[0] else y[to]) + total
    return row


# rows_of(shapes, pieces) → row(shape, x, (at, h, w, H, W), (line, pixel, dh, dw), weight,
#     (wt, ldw, tap, packed), bias, (first, bt), y, (yt, out, count, asks), zeros, n), with shape
# (rows, taps, step) one of the shapes: for u < count and n channels c, L to a vector,
#     y[yt + u · out + c] = b + Σ_r Σ_j x[at + r · line + (u · step + j) · pixel + c]
#         weight[wt + r · ldw + j · tap + c // L · packed + c % L]
# All arrays are pointers; b is bias[bt + c] or, of ``pieces`` not the ``first``, what y holds. The
# tap reads pixel (h + r · dh, w + (u · step + j) · dw) of an image (H, W): where there is none, 0
# of ``zeros``, which are as many as a row of a tile reads. With rows_of(shapes, pieces, True), y is
# dy and weight[…] += Σ_u x[…] y[…] of the same places. ``asks``: whether to ask for memory of the
# next row.
rows_of = cache(_rows_in_numpy if config.DISABLE_JIT else _rows)
