"""Rows of depthwise convolution: one vector of channels, four outputs at a time.

A row keeps up to 3 × 3 taps in registers; every vector of x that four outputs meet is loaded once
for all of them: 18 loads for 36 multiply-adds, of which a core of Zen 4 begins one per cycle.
Where a tap reads outside the image, or channels fill no vector, a tile's loads are masked.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from .emit import I64, Code
from .simd import fma, lanes, load_part, store_part

__all__ = ["OUTPUTS", "ROWS", "tiles"]

OUTPUTS = 4
ROWS = 3                   # of taps, at most


class _Row:
    """The code of one row: b the builder, the rest as in the comment below."""

    def __init__(self, code, shape, pointers, source, steps, places, target, n):
        self.code, self.b, self.n = code, code.builder, n
        self.rows, self.taps, self.step = shape
        self.columns = (OUTPUTS - 1) * self.step + self.taps
        self.x, self.weight, self.start, self.y, self.first = pointers
        self.at, self.h, self.w, self.H, self.W = source
        self.line, self.pixel, self.dh, self.dw = steps
        self.yt, self.out, self.count = target
        b, (wt, ldw, tap) = self.b, places
        bits = ir.IntType(code.lanes)
        whole = b.icmp_signed(">=", n, I64(code.lanes))
        some = b.sub(b.shl(I64(1), n), I64(1))
        self.mask = b.trunc(b.select(whole, I64(-1), some), bits)
        self.weights = [[self.load(b.add(b.add(wt, b.mul(ldw, I64(r))), b.mul(tap, I64(j))),
                                   self.weight, self.mask) for j in range(self.taps)]
                        for r in range(self.rows)]
        self.seen = [b.icmp_unsigned("<", b.add(self.h, b.mul(self.dh, I64(r))), self.H)
                     for r in range(self.rows)]
        self.plain = whole
        for seen in self.seen:
            self.plain = b.and_(self.plain, seen)

    def load(self, offset, data, mask=None):
        pointer = self.code.at(data, offset)
        return self.code.load(pointer, None if mask is None else self.lanes(mask))

    def lanes(self, mask):
        return self.b.bitcast(mask, ir.VectorType(ir.IntType(1), self.code.lanes))

    def where(self, *conditions):
        """The mask where all are true, else no lane."""
        mask = self.mask
        for c in conditions:
            mask = self.b.and_(mask, self.b.sext(c, mask.type))
        return mask

    def tile(self, u, inside):
        """Outputs u … u + 3."""
        b, masked = self.b, not inside
        w = b.add(self.w, b.mul(u, b.mul(self.dw, I64(self.step))))
        at = b.add(self.at, b.mul(u, b.mul(self.pixel, I64(self.step))))
        left, to = b.sub(self.count, u), b.add(self.yt, b.mul(u, self.out))
        outputs = [b.add(to, b.mul(self.out, I64(i))) for i in range(OUTPUTS)]
        masks = [self.where(b.icmp_signed("<", I64(i), left)) if masked else None
                 for i in range(OUTPUTS)]
        sums = [self.code.load(b.select(self.first, self.start, self.code.at(self.y, p)),
                               self.lanes(m) if masked else None)
                for p, m in zip(outputs, masks)]
        columns = [b.icmp_unsigned("<", b.add(w, b.mul(self.dw, I64(c))), self.W)
                   for c in range(self.columns)] if masked else []
        for r, taps in enumerate(self.weights):
            row = b.add(at, b.mul(self.line, I64(r)))
            for c in range(self.columns):
                mask = self.where(self.seen[r], columns[c]) if masked else None
                v = self.load(b.add(row, b.mul(self.pixel, I64(c))), self.x, mask)
                for i in range(OUTPUTS):
                    if 0 <= c - i * self.step < self.taps:
                        sums[i] = self.code.fma(v, taps[c - i * self.step], sums[i])
        for value, p, m in zip(sums, outputs, masks):
            self.code.store(value, self.code.at(self.y, p), self.lanes(m) if masked else None)

    def all(self):
        """A loop over the tiles of the row."""
        b = self.b
        before, body = b.block, b.append_basic_block("tile")
        b.branch(body)
        b.position_at_end(body)
        u = b.phi(I64)
        w = b.add(self.w, b.mul(u, b.mul(self.dw, I64(self.step))))
        last = b.add(w, b.mul(self.dw, I64(self.columns - 1)))
        full = b.icmp_signed("<=", b.add(u, I64(OUTPUTS)), self.count)
        inside = b.and_(b.and_(self.plain, full), b.and_(
            b.icmp_signed(">=", w, I64(0)), b.icmp_signed("<", last, self.W)))
        with b.if_else(inside) as (then, otherwise):
            with then:
                self.tile(u, True)
            with otherwise:
                self.tile(u, False)
        following = b.add(u, I64(OUTPUTS))
        u.add_incoming(I64(0), before)
        u.add_incoming(following, b.block)
        after = b.append_basic_block("row")
        b.cbranch(b.icmp_signed("<", following, self.count), body, after)
        b.position_at_end(after)


def _row(*shape):
    """The intrinsic of a row."""
    @intrinsic
    def row(typingctx, x, source, steps, weight, places, bias, first, y, target, n):
        def codegen(context, builder, signature, args):
            code = Code(builder, context.get_data_type(x.dtype))

            def several(i):
                return [builder.extract_value(args[i], k) for k in range(len(signature.args[i]))]

            whether, bt = several(6)
            pointers = (args[0], args[3], code.at(args[5], bt), args[7],
                        builder.icmp_signed("!=", whether, I64(0)))
            _Row(code, shape, pointers, several(1), several(2), several(4), several(8),
                 args[9]).all()
            return context.get_dummy_value()

        k, several = types.intp, lambda n: types.UniTuple(types.intp, n)
        return types.void(x, several(5), several(4), weight, several(3), bias, several(2), y,
                          several(3), k), codegen
    return row


def _row_in_numpy(rows, taps, step):
    """The same with the JIT off."""
    def row(x, source, steps, weight, places, bias, first, y, target, n):
        (at, h, w, H, W), (line, pixel, dh, dw) = source, steps
        (wt, ldw, tap), (yt, out, count) = places, target
        for u in range(count):
            to = yt + u * out
            total = load_part(bias, first[1], n) if first[0] else load_part(y, to, n)
            for r in range(rows):
                for j in range(taps):
                    c = u * step + j
                    there = 0 <= h + r * dh < H and 0 <= w + c * dw < W
                    v = load_part(x, at + r * line + c * pixel, n) if there \
                        else np.zeros(lanes(x), x.dtype)
                    total = fma(v, load_part(weight, wt + r * ldw + j * tap, n), total)
            store_part(y, to, total, n)
    return row


# row(x, (at, h, w, H, W), (line, pixel, dh, dw), weight, (wt, ldw, tap), bias, (first, bt), y,
#     (yt, out, count), n): for u < count, in each of n channels (at most a vector),
#     y[yt + u · out] = b + Σ_r Σ_j x[at + r · line + (u · step + j) · pixel]
#                                   weight[wt + r · ldw + j · tap]
# x, weight, bias and y are pointers; b is bias[bt] or, not ``first``, what y holds. The tap reads
# pixel (h + r · dh, w + (u · step + j) · dw) of an image (H, W): zero where there is none.
_make = _row_in_numpy if config.DISABLE_JIT else _row
tiles = {(rows, *shape): _make(rows, *shape) for rows in range(1, ROWS + 1)
         for shape in ((1, 1), (2, 1), (3, 1), (3, 2))}
