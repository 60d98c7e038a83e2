"""Rows of depthwise convolution: four outputs and up to 3 × 3 taps at a time, of one vector of
channels.

The pixels of that vector lie side by side, with zeros around them (depthwise.py copies them there):
every address of a tile is a pointer and a constant, the weights stay in registers, and 18 loads
serve 36 multiply-adds. Of pixels read where they lie a tile needs 18 pointers, which come from the
stack. (Two cores of Zen 1, 8 images, so and now: 32 channels of 112×112 21 and 3.1 ms, 512 of
14×14 3.1 and 1.0 ms.) Channels that do not fill a vector are masked, in code of their own where
that costs: AVX2 stores so in 20 cycles.
"""

from functools import cache

import numpy as np
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import I64, Code
from .simd import VECTOR

__all__ = ["ROWS", "rows_of"]

OUTPUTS = 4
ROWS = 3                   # of taps, at most
PARTS = (1,) if VECTOR == 64 else (0, 1)     # whether channels are masked


class _Rows:
    """The code of rows of outputs; the names as in the comment below."""

    def __init__(self, code, shape, pointers, source, places, first, target, mask):
        self.code, self.b, self.mask = code, code.builder, mask
        self.high, self.taps, self.step = shape
        x, weight, bias, y = pointers
        self.line, self.across, self.down = source[1:]
        self.out, self.count, self.below, self.rows = target[1:]
        b, at = self.b, code.at
        if self.taps > 1:
            self.across = I64(self.step * code.lanes)
        self.first, self.bias = b.icmp_signed("!=", first[0], I64(0)), at(bias, first[1])
        self.x, self.y = at(x, source[0]), at(y, target[0])
        start = at(weight, places[0])
        self.places = [at(at(start, b.mul(places[1], I64(r))), b.mul(places[2], I64(j)))
                       for r in range(self.high) for j in range(self.taps)]
        self.weights = [code.load(p, mask) for p in self.places]

    def met(self, x, outputs):
        """(output, number of the tap, pixel) of all products, those of one tap side by side: sums
        that wait for one another stand as far apart as can be."""
        for r in range(self.high):
            line = self.code.at(x, self.b.mul(self.line, I64(r)))
            columns = (outputs - 1) * self.step + self.taps
            aparts = (c if self.taps > 1 else self.b.mul(self.across, I64(c))
                      for c in range(columns))
            pixels = [self.code.load(self.code.at(line, apart)) for apart in aparts]
            for j in range(self.taps):
                for u in range(outputs):
                    yield u, r * self.taps + j, pixels[u * self.step + j]

    def tile(self, x, y, outputs, nothing):
        code, b = self.code, self.b
        places = [code.at(y, b.mul(self.out, I64(u))) for u in range(outputs)]
        sums = [code.load(b.select(self.first, self.bias, p), self.mask) for p in places]
        for u, k, v in self.met(x, outputs):
            sums[u] = code.fma(v, self.weights[k], sums[u])
        for value, p in zip(sums, places):
            code.store(value, p, self.mask)
        return nothing

    def loop(self, count, each, x, y, by, values, body):
        """body(x, y, values) → values while ``each`` of ``count`` are left, x and y moving ``by``:
        what is left of all four."""
        b, before = self.b, self.b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        start = [count, x, y, *values]
        phis = [b.phi(v.type) for v in start]
        b.cbranch(b.icmp_signed(">=", phis[0], I64(each)), inside, after)
        b.position_at_end(inside)
        new = body(*phis[1:3], phis[3:])
        following = [b.sub(phis[0], I64(each)),
                     *(self.code.at(p, b.mul(step, I64(each))) for p, step in zip(phis[1:], by)),
                     *new]
        for phi, old, value in zip(phis, start, following):
            phi.add_incoming(old, before)
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis

    def row(self, x, y, values):
        left, by = self.count, (self.across, self.out)
        for each in (OUTPUTS, 1):
            left, x, y, *values = self.loop(
                left, each, x, y, by, values,
                lambda x, y, values, each=each: self.tile(x, y, each, values))
        return values

    def all(self, values=()):
        return self.loop(self.rows, 1, self.x, self.y, (self.down, self.below), values,
                         self.row)[3:]


class _Gradient(_Rows):
    """The same for the gradient of the weights, whose sums stay in registers throughout: y is read
    and the weights are written."""

    def tile(self, x, y, outputs, sums):
        code, b, sums = self.code, self.b, list(sums)
        dy = [code.load(code.at(y, b.mul(self.out, I64(u))), self.mask) for u in range(outputs)]
        for u, k, v in self.met(x, outputs):
            sums[k] = code.fma(v, dy[u], sums[k])
        return sums

    def all(self):
        for value, p in zip(super().all(self.weights), self.places):
            self.code.store(value, p, self.mask)


def _rows(shapes, gradient=False):
    """The intrinsic of rows of one of the shapes, its first argument."""
    kind = _Gradient if gradient else _Rows

    @intrinsic
    def rows(typingctx, shape, x, source, weight, places, bias, first, y, target, n):
        def codegen(context, builder, signature, args):
            code = Code(builder, context.get_data_type(x.dtype))
            shape, source, places, first, target = (
                cgutils.unpack_tuple(builder, args[i]) for i in (0, 2, 4, 6, 8))
            pointers = [args[i] for i in (1, 3, 5, 7)]
            after, number = builder.append_basic_block("after"), shape[0]
            for k in shape[1:]:
                number = builder.add(builder.mul(number, I64(8)), k)
            part = builder.icmp_signed("<", args[9], I64(code.lanes))
            number = builder.add(builder.mul(number, I64(2)),
                                 builder.zext(part, I64) if len(PARTS) > 1 else I64(1))
            switch = builder.switch(number, after)
            for *shape, part in ((*shape, part) for shape in shapes for part in PARTS):
                block = builder.append_basic_block("row")
                switch.add_case(I64(2 * (64 * shape[0] + 8 * shape[1] + shape[2]) + part), block)
                builder.position_at_end(block)
                kind(code, shape, pointers, source, places, first, target,
                     code.first(args[9]) if part else None).all()
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        k, several = types.intp, lambda n: types.UniTuple(types.intp, n)
        return types.void(several(3), x, several(4), weight, several(3), bias, several(2), y,
                          several(5), k), codegen
    return rows


def _rows_in_numpy(shapes, gradient=False):
    """The same with the JIT off."""
    def rows(shape, x, source, weight, places, bias, first, y, target, n):
        (high, taps, _), (at, line, across, down), (wt, ldw, tap) = shape, source, places
        (yt, out, count, below, many), c, lanes = target, np.arange(n), VECTOR // x.itemsize
        for p, u in np.ndindex(many, count):
            total, to, pixel = 0, yt + p * below + u * out + c, at + p * down + u * across
            for r, j in np.ndindex(high, taps):
                k, v = wt + r * ldw + j * tap + c, x[pixel + r * line + j * lanes + c]
                if gradient:
                    weight[k] += v * y[to]
                else:
                    total = total + v * weight[k]
            if not gradient:
                y[to] = (bias[first[1] + c] if first[0] else y[to]) + total
    return rows


# rows_of(shapes) → rows(shape, x, (at, line, across, down), weight, (wt, ldw, tap), bias,
#     (first, bt), y, (yt, out, count, below, many), n), with shape (high, taps, step) one of the
# shapes, across ``step`` vectors unless taps = 1: for p < many, u < count and n channels c, at most
# a vector of L,
#     y[yt + p · below + u · out + c] = b + Σ_r Σ_j
#         x[at + p · down + u · across + r · line + j · L + c] weight[wt + r · ldw + j · tap + c]
# All arrays are pointers; x has whole vectors; b is bias[bt + c] or, not ``first``, what y holds.
# With rows_of(shapes, True), y is dy and weight[…] += Σ x[…] y[…] of the same places.
rows_of = cache(_rows_in_numpy if config.DISABLE_JIT else _rows)
