"""Tiles of depthwise convolution: some outputs of a row × the taps of up to three kernel rows.

A tile goes along the channels. Where each pixel of x lies is worked out once per tile: pixels
outside read zeros; then every vector of x is loaded once, for all taps and outputs that it meets:
for 3×3 taps and four outputs 27 loads and 36 multiply-adds, one of which a core of Zen 4 begins per
cycle, as many as loads.
"""

import numpy as np
from numba import config, types
from numba.extending import intrinsic

from .emit import I64, Code
from .simd import fma, lanes, load_part, store_part

__all__ = ["OUTPUTS", "ROWS", "tiles"]

OUTPUTS = 4
ROWS = 3                   # of taps, at most


def _columns(taps, step):
    """How many pixels of a row a tile reads."""
    return (OUTPUTS - 1) * step + taps


class _Tile:
    """The code of one tile: pointers to all it reads and writes, then a loop over channels."""

    def __init__(self, code, rows, taps, step):
        self.code, self.rows, self.taps, self.step = code, rows, taps, step

    def pixels(self, x, zeros, source, steps):
        """A pointer for each row and column."""
        b = self.code.builder
        (at, h, w, H, W), (line, pixel, dh, dw) = source, steps
        columns = range(_columns(self.taps, self.step))
        seen = [b.icmp_unsigned("<", b.add(w, b.mul(dw, I64(c))), W) for c in columns]
        result = []
        for r in range(self.rows):
            there = b.icmp_unsigned("<", b.add(h, b.mul(dh, I64(r))), H)
            row = self.code.at(x, b.add(at, b.mul(line, I64(r))))
            result.append([b.select(b.and_(there, seen[c]),
                                    self.code.at(row, b.mul(pixel, I64(c))), zeros)
                           for c in columns])
        return result

    def outputs(self, y, target):
        """A pointer for each output; the last one's for those beyond the row."""
        b, (yt, out, count) = self.code.builder, target
        last = b.sub(count, I64(1))
        numbers = [b.select(b.icmp_signed("<", I64(u), last), I64(u), last)
                   for u in range(OUTPUTS)]
        return [self.code.at(y, b.add(yt, b.mul(out, u))) for u in numbers]

    def weights(self, weight, taps):
        b, (wt, ldw, tap) = self.code.builder, taps
        rows = [b.add(wt, b.mul(ldw, I64(r))) for r in range(self.rows)]
        return [[self.code.at(weight, b.add(row, b.mul(tap, I64(j)))) for j in range(self.taps)]
                for row in rows]

    def vector(self, i, x, weight, starts, outputs, mask=None):
        """The sums of channels i …."""
        code = self.code
        sums = [code.load(code.at(p, i), mask) for p in starts]
        for pixels, taps in zip(x, weight):
            w = [code.load(code.at(p, i), mask) for p in taps]
            for c, pixel in enumerate(pixels):
                v = code.load(code.at(pixel, i), mask)
                for u in range(OUTPUTS):
                    if 0 <= c - u * self.step < self.taps:
                        sums[u] = code.fma(v, w[c - u * self.step], sums[u])
        for value, p in reversed(list(zip(sums, outputs))):
            code.store(value, code.at(p, i), mask)


def _tile(rows, taps, step):
    """The intrinsic of a tile."""
    @intrinsic
    def tile(typingctx, x, source, steps, weight, places, bias, first, y, target, zeros, n):
        def codegen(context, builder, signature, args):
            code = Code(builder, context.get_data_type(x.dtype))
            t, data = _Tile(code, rows, taps, step), {
                i: context.make_array(signature.args[i])(context, builder, args[i]).data
                for i in (0, 3, 5, 7, 9)}

            def several(i):
                return [builder.extract_value(args[i], k) for k in range(len(signature.args[i]))]

            pixels = t.pixels(data[0], data[9], several(1), several(2))
            weights, outputs = t.weights(data[3], several(4)), t.outputs(data[7], several(8))
            shift = code.at(data[5], several(6)[1])
            starts = [builder.select(builder.icmp_signed("!=", several(6)[0], I64(0)), shift, p)
                      for p in outputs]
            whole = builder.and_(args[10], I64(-code.lanes))
            with builder.if_then(builder.icmp_signed(">", whole, I64(0))):
                before, body = builder.block, builder.append_basic_block("channels")
                builder.branch(body)
                builder.position_at_end(body)
                i = builder.phi(I64)
                t.vector(i, pixels, weights, starts, outputs)
                following = builder.add(i, I64(code.lanes))
                i.add_incoming(I64(0), before)
                i.add_incoming(following, body)
                after = builder.append_basic_block("rest")
                builder.cbranch(builder.icmp_signed("<", following, whole), body, after)
                builder.position_at_end(after)
            with builder.if_then(builder.icmp_signed("<", whole, args[10])):
                mask = code.first(builder.sub(args[10], whole))
                t.vector(whole, pixels, weights, starts, outputs, mask)
            return context.get_dummy_value()

        k, several = types.intp, lambda n: types.UniTuple(types.intp, n)
        return types.void(x, several(5), several(4), weight, several(3), bias, several(2), y,
                          several(3), zeros, k), codegen
    return tile


def _tile_in_numpy(rows, taps, step):
    """The same with the JIT off."""
    def tile(x, source, steps, weight, places, bias, first, y, target, zeros, n):
        (at, h, w, H, W), (line, pixel, dh, dw) = source, steps
        (wt, ldw, tap), (yt, out, count) = places, target
        for c in range(0, n, lanes(x)):
            k = min(lanes(x), n - c)
            for u in range(min(count, OUTPUTS)):
                to = yt + u * out + c
                total = load_part(bias, first[1] + c, k) if first[0] else load_part(y, to, k)
                for r in range(rows):
                    for j in range(taps):
                        there = 0 <= h + r * dh < H and 0 <= w + (u * step + j) * dw < W
                        v = load_part(x, at + r * line + (u * step + j) * pixel + c, k) \
                            if there else np.zeros(lanes(x), x.dtype)
                        total = fma(v, load_part(weight, wt + r * ldw + j * tap + c, k), total)
                store_part(y, to, total, k)
    return tile


# tile(x, (at, h, w, H, W), (line, pixel, dh, dw), weight, (wt, ldw, tap), bias, (first, bt), y,
#      (yt, out, count), zeros, n): for u < count and n channels c,
#     y[yt + u · out + c] = b + Σ_r Σ_j x[at + r · line + (u · step + j) · pixel + c]
#                                       weight[wt + r · ldw + j · tap + c]
# b is bias[bt + c] or, not ``first``, what y holds. The tap reads pixel (h + r · dh,
# w + (u · step + j) · dw) of an image (H, W); outside it is zero, read from n ``zeros``.
_make = _tile_in_numpy if config.DISABLE_JIT else _tile
tiles = {(rows, *shape): _make(rows, *shape) for rows in range(1, ROWS + 1)
         for shape in ((1, 1), (2, 1), (3, 1), (3, 2))}
