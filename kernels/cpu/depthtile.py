"""Rows of depthwise convolution: four outputs and up to 3 × 3 taps at a time, along the channels.

Every vector of x is loaded once for all outputs and taps that it meets: 27 loads, with the weights,
for 36 multiply-adds, one of which a core of Zen 4 begins per cycle. Where four outputs read outside
the image the addresses are chosen one by one, once for all channels.
"""

from functools import cache

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import I32, I64, Code

__all__ = ["OUTPUTS", "ROWS", "rows_of"]

OUTPUTS = 4
ROWS = 3                   # of taps, at most


class _Row:
    """The code of one row: b the builder, the rest as in the comment below."""

    writes = 1                 # y is written

    def __init__(self, code, shape, pointers, source, steps, places, first, target, n):
        self.code, self.b, self.n = code, code.builder, n
        self.rows, self.taps, self.step = shape
        self.columns = (OUTPUTS - 1) * self.step + self.taps
        self.x, weight, bias, self.y, self.zeros = pointers
        self.at, self.h, self.w, self.H, self.W = source
        self.line, self.pixel, self.dh, self.dw = steps
        self.yt, self.out, self.count = target
        b, (wt, ldw, tap), (whether, bt) = self.b, places, first
        self.first, self.bias = b.icmp_signed("!=", whether, I64(0)), code.at(bias, bt)
        self.weights = [[code.at(weight, b.add(b.add(wt, b.mul(ldw, I64(r))), b.mul(tap, I64(j))))
                         for j in range(self.taps)] for r in range(self.rows)]
        self.seen = [b.icmp_unsigned("<", b.add(self.h, b.mul(self.dh, I64(r))), self.H)
                     for r in range(self.rows)]

    def loop(self, end, step, body):
        """body(i) for i = 0, step, … below end; once at least."""
        b, before, block = self.b, self.b.block, self.b.append_basic_block("loop")
        b.branch(block)
        b.position_at_end(block)
        i = b.phi(I64)
        body(i)
        following = b.add(i, I64(step))
        i.add_incoming(I64(0), before)
        i.add_incoming(following, b.block)
        after = b.append_basic_block("after")
        b.cbranch(b.icmp_signed("<", following, end), block, after)
        b.position_at_end(after)

    def mask(self, i):
        """The channels from i on."""
        b, left = self.b, self.b.sub(self.n, i)
        some = b.sub(b.shl(I64(1), left), I64(1))
        bits = b.select(b.icmp_signed("<", left, I64(self.code.lanes)), some, I64(-1))
        return b.bitcast(b.trunc(bits, ir.IntType(self.code.lanes)),
                         ir.VectorType(ir.IntType(1), self.code.lanes))

    def vector(self, i, x, outputs):
        """The sums of channels i …; outputs: (where they begin, where they end)."""
        code, mask = self.code, self.mask(i)
        sums = [code.load(code.at(p, i), mask) for p, _ in outputs]
        for pixels, taps in zip(x, self.weights):
            taps = [code.load(code.at(p, i), mask) for p in taps]
            for c, pixel in enumerate(pixels):
                v = code.load(code.at(pixel, i), mask)
                for u in range(OUTPUTS):
                    if 0 <= c - u * self.step < self.taps:
                        sums[u] = code.fma(v, taps[c - u * self.step], sums[u])
        for value, (_, p) in reversed(list(zip(sums, outputs))):
            code.store(value, code.at(p, i), mask)

    def pixels(self, u, w, inside, columns):
        """Where the pixels are that outputs from u on read; zeros for those outside."""
        b, at = self.b, self.code.at
        start = at(self.x, b.add(self.at, b.mul(u, b.mul(self.pixel, I64(self.step)))))
        pixels = [[at(at(start, b.mul(self.line, I64(r))), b.mul(self.pixel, I64(c)))
                   for c in range(columns)] for r in range(self.rows)]
        if inside:
            return pixels
        there = [b.icmp_unsigned("<", b.add(w, b.mul(self.dw, I64(c))), self.W)
                 for c in range(columns)]
        return [[b.select(b.and_(row, column), p, self.zeros) for column, p in zip(there, line)]
                for row, line in zip(self.seen, pixels)]

    def tile(self, u, w, inside):
        """Outputs u … u + 3. Outputs behind the last are the last, whose own value is stored after
        theirs."""
        b, at, last = self.b, self.code.at, self.b.sub(self.count, I64(1))
        pixels = self.pixels(u, w, inside, self.columns)
        numbers = [b.add(u, I64(i)) for i in range(OUTPUTS)]
        if not inside:
            numbers = [b.select(b.icmp_signed("<", i, last), i, last) for i in numbers]
        places = [at(self.y, b.add(self.yt, b.mul(i, self.out))) for i in numbers]
        outputs = [(b.select(self.first, self.bias, p), p) for p in places]
        self.loop(self.n, self.code.lanes, lambda i: self.vector(i, pixels, outputs))

    def ahead(self, u):
        """Ask for the pixels that the next row of outputs reads first, below those of output u and
        the three after it, and for the places of that row: the hardware loses count of so many
        streams. Addresses may be outside. (128 channels of 56×56, one core beside busy ones: 2.9 ms
        without, 1.2 with it; 32 of 112×112, gradient of the weights: 3.4 and 1.1.)"""
        b, at, step = self.b, self.code.at, self.step
        first = b.add(self.at, b.mul(u, b.mul(self.pixel, I64(step))))
        for r in range(self.rows, self.rows + step):
            self.ask(at(self.x, b.add(first, b.mul(self.line, I64(r)))),
                     b.mul(self.pixel, I64(OUTPUTS * step)), 0)
        self.ask(at(self.y, b.add(self.yt, b.mul(b.add(u, self.count), self.out))),
                 b.mul(self.out, I64(OUTPUTS)), self.writes)

    def ask(self, p, n, write):
        """Fetch n values from p on to an L2."""
        kind = ir.FunctionType(ir.VoidType(), [p.type, *[I32] * 3])
        fetch = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        self.loop(n, self.code.lanes, lambda i: self.b.call(
            fetch, [self.code.at(p, i), I32(write), I32(2), I32(1)]))

    def column(self, u):
        """The column of output u's first tap."""
        return self.b.add(self.w, self.b.mul(u, self.b.mul(self.dw, I64(self.step))))

    def four(self, u, full=None):
        """Outputs u … u + 3, by whether all that they read is there."""
        b, w, whole = self.b, self.column(u), self.seen[0]
        self.ahead(u)
        last = b.add(w, b.mul(self.dw, I64(self.columns - 1)))
        for here in [*self.seen[1:], b.icmp_signed(">=", w, I64(0)),
                     b.icmp_signed("<", last, self.W), *([] if full is None else [full])]:
            whole = b.and_(whole, here)
        with b.if_else(whole) as (then, otherwise):
            with then:
                self.tile(u, w, True)
            with otherwise:
                self.tile(u, w, False)

    def all(self):
        b = self.b
        self.loop(self.count, OUTPUTS, lambda u: self.four(
            u, b.icmp_signed("<=", b.add(u, I64(OUTPUTS)), self.count)))


class _Gradient(_Row):
    """The same for the gradient of the weights: what a row adds to it. y is read and the weights
    are written. A tile loads and stores the sums, for 36 multiply-adds 31 loads and 9 stores; rows
    of the image are read as they lie."""

    writes = 0

    def vector(self, i, x, outputs):
        code, mask = self.code, self.mask(i)
        dy = [code.load(code.at(p, i), mask) for p in outputs]
        for pixels, taps in zip(x, self.weights):
            sums = [code.load(code.at(p, i), mask) for p in taps]
            for c, pixel in enumerate(pixels):
                v = code.load(code.at(pixel, i), mask)
                for u, d in enumerate(dy):
                    j = c - u * self.step
                    if 0 <= j < self.taps:
                        sums[j] = code.fma(v, d, sums[j])
            for value, p in zip(sums, taps):
                code.store(value, code.at(p, i), mask)

    def tile(self, u, w, inside, outputs=OUTPUTS):
        b, at = self.b, self.code.at
        pixels = self.pixels(u, w, inside, (outputs - 1) * self.step + self.taps)
        places = [at(self.y, b.add(self.yt, b.mul(b.add(u, I64(i)), self.out)))
                  for i in range(outputs)]
        self.loop(self.n, self.code.lanes, lambda i: self.vector(i, pixels, places))

    def all(self):
        """Fours, then one tile of what is left: an output that is not there must not even be zero,
        since zero times Inf is NaN."""
        b = self.b
        whole = b.and_(self.count, I64(-OUTPUTS))
        with b.if_then(b.icmp_signed(">", whole, I64(0))):
            self.loop(whole, OUTPUTS, self.four)
        end = b.append_basic_block("end")
        switch = b.switch(b.sub(self.count, whole), end)
        for left in range(1, OUTPUTS):
            block = b.append_basic_block("left")
            switch.add_case(I64(left), block)
            b.position_at_end(block)
            self.tile(whole, self.column(whole), False, left)
            b.branch(end)
        b.position_at_end(end)


def _rows(shapes, gradient=False):
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
                kind(code, (rows, taps, step), pointers, source, steps, places, first, target,
                     args[11]).all()
                builder.branch(after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        k, several = types.intp, lambda n: types.UniTuple(types.intp, n)
        return types.void(several(3), x, several(5), several(4), weight, several(3), bias,
                          several(2), y, several(3), zeros, k), codegen
    return row


def _rows_in_numpy(shapes, gradient=False):
    """The same with the JIT off."""
    def row(shape, x, source, steps, weight, places, bias, first, y, target, zeros, n):
        (rows, taps, step), (at, h, w, H, W), (line, pixel, dh, dw) = shape, source, steps
        (wt, ldw, tap), (yt, out, count), c = places, target, np.arange(n)
        for u in range(count):
            total, to = 0, yt + u * out + c
            for r, j in np.ndindex(rows, taps):
                k, column = wt + r * ldw + j * tap + c, u * step + j
                there = 0 <= h + r * dh < H and 0 <= w + column * dw < W
                v = x[at + r * line + column * pixel + c] if there else zeros[c]
                if gradient:
                    weight[k] += v * y[to]
                else:
                    total = total + v * weight[k]
            if not gradient:
                y[to] = (bias[first[1] + c] if first[0] else y[to]) + total
    return row


# rows_of(shapes) → row(shape, x, (at, h, w, H, W), (line, pixel, dh, dw), weight, (wt, ldw, tap),
#     bias, (first, bt), y, (yt, out, count), zeros, n), with shape (rows, taps, step) one of the
# shapes: for u < count and n channels c,
#     y[yt + u · out + c] = b + Σ_r Σ_j x[at + r · line + (u · step + j) · pixel + c]
#                                       weight[wt + r · ldw + j · tap + c]
# All arrays are pointers; b is bias[bt + c] or, not ``first``, what y holds. The tap reads pixel
# (h + r · dh, w + (u · step + j) · dw) of an image (H, W): where there is none, n zeros. With
# rows_of(shapes, True), y is dy and weight[…] += Σ_u x[…] y[…] of the same places.
rows_of = cache(_rows_in_numpy if config.DISABLE_JIT else _rows)
