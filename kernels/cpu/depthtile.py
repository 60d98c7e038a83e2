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

from .emit import I64, Code
from .jit import device
from .simd import fma, lanes, load_part, store_part

__all__ = ["OUTPUTS", "ROWS", "rows_of"]

OUTPUTS = 4
ROWS = 3                   # of taps, at most


class _Row:
    """The code of one row: b the builder, the rest as in the comment below."""

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

    def tile(self, u, w, inside):
        """Outputs u … u + 3. Pixels outside are zeros, outputs behind the last are the last, whose
        own value is stored after theirs."""
        b, at, last = self.b, self.code.at, self.b.sub(self.count, I64(1))
        start = at(self.x, b.add(self.at, b.mul(u, b.mul(self.pixel, I64(self.step)))))
        pixels = [[at(at(start, b.mul(self.line, I64(r))), b.mul(self.pixel, I64(c)))
                   for c in range(self.columns)] for r in range(self.rows)]
        numbers = [b.add(u, I64(i)) for i in range(OUTPUTS)]
        if not inside:
            columns = [b.icmp_unsigned("<", b.add(w, b.mul(self.dw, I64(c))), self.W)
                       for c in range(self.columns)]
            pixels = [[b.select(b.and_(row, column), p, self.zeros)
                       for column, p in zip(columns, line)]
                      for row, line in zip(self.seen, pixels)]
            numbers = [b.select(b.icmp_signed("<", i, last), i, last) for i in numbers]
        places = [at(self.y, b.add(self.yt, b.mul(i, self.out))) for i in numbers]
        outputs = [(b.select(self.first, self.bias, p), p) for p in places]
        self.loop(self.n, self.code.lanes, lambda i: self.vector(i, pixels, outputs))

    def all(self):
        b, whole = self.b, self.seen[0]
        for seen in self.seen[1:]:
            whole = b.and_(whole, seen)

        def body(u):
            w = b.add(self.w, b.mul(u, b.mul(self.dw, I64(self.step))))
            last = b.add(w, b.mul(self.dw, I64(self.columns - 1)))
            full = b.icmp_signed("<=", b.add(u, I64(OUTPUTS)), self.count)
            inside = b.and_(b.and_(whole, full), b.and_(
                b.icmp_signed(">=", w, I64(0)), b.icmp_signed("<", last, self.W)))
            with b.if_else(inside) as (then, otherwise):
                with then:
                    self.tile(u, w, True)
                with otherwise:
                    self.tile(u, w, False)
        self.loop(self.count, OUTPUTS, body)


def _row(*shape):
    """The intrinsic of a row."""
    @intrinsic
    def row(typingctx, x, source, steps, weight, places, bias, first, y, target, zeros, n):
        def codegen(context, builder, signature, args):
            code = Code(builder, context.get_data_type(x.dtype))
            source, steps, places, first, target = (
                cgutils.unpack_tuple(builder, args[i]) for i in (1, 2, 4, 6, 8))
            pointers = [args[i] for i in (0, 3, 5, 7, 9)]
            _Row(code, shape, pointers, source, steps, places, first, target, args[10]).all()
            return context.get_dummy_value()

        k, several = types.intp, lambda n: types.UniTuple(types.intp, n)
        return types.void(x, several(5), several(4), weight, several(3), bias, several(2), y,
                          several(3), zeros, k), codegen
    return row


def _row_in_numpy(rows, taps, step):
    """The same with the JIT off."""
    def row(x, source, steps, weight, places, bias, first, y, target, zeros, n):
        (at, h, w, H, W), (line, pixel, dh, dw) = source, steps
        (wt, ldw, tap), (yt, out, count) = places, target

        def vector(u, c, k):
            to = yt + u * out + c
            total = load_part(bias, first[1] + c, k) if first[0] else load_part(y, to, k)
            for r, j in np.ndindex(rows, taps):
                column = u * step + j
                there = 0 <= h + r * dh < H and 0 <= w + column * dw < W
                v = load_part(x, at + r * line + column * pixel + c, k) if there \
                    else load_part(zeros, c, k)
                total = fma(v, load_part(weight, wt + r * ldw + j * tap + c, k), total)
            store_part(y, to, total, k)

        for u in range(count):
            for c in range(0, n, lanes(x)):
                vector(u, c, min(lanes(x), n - c))
    return row


# row(x, (at, h, w, H, W), (line, pixel, dh, dw), weight, (wt, ldw, tap), bias, (first, bt), y,
#     (yt, out, count), zeros, n): for u < count and n channels c,
#     y[yt + u · out + c] = b + Σ_r Σ_j x[at + r · line + (u · step + j) · pixel + c]
#                                       weight[wt + r · ldw + j · tap + c]
# All arrays are pointers; b is bias[bt + c] or, not ``first``, what y holds. The tap reads pixel
# (h + r · dh, w + (u · step + j) · dw) of an image (H, W): where there is none, n zeros.
_make = cache(_row_in_numpy if config.DISABLE_JIT else _row)


def rows_of(shapes):
    """The rows of some shapes (rows, taps, step), as one function of the shape."""
    if not shapes:
        return None
    row, others, (rows, taps, step) = _make(*shapes[0]), rows_of(shapes[1:]), shapes[0]
    if others is None:
        @device
        def any_row(shape, x, source, steps, weight, places, bias, first, y, target, zeros, n):
            row(x, source, steps, weight, places, bias, first, y, target, zeros, n)
    else:
        @device
        def any_row(shape, x, source, steps, weight, places, bias, first, y, target, zeros, n):
            if shape[0] == rows and shape[1] == taps and shape[2] == step:
                row(x, source, steps, weight, places, bias, first, y, target, zeros, n)
            else:
                others(shape, x, source, steps, weight, places, bias, first, y, target, zeros, n)
    return any_row
