"""The tile of a matrix product: ROWS × 2 vectors of C stay in registers while k runs.

LLVM's vectoriser does not keep such a tile in registers, so this loop is written in vectors. With
AVX-512: 12 × 2 sums, two vectors of b and a broadcast from memory, of 32 registers; 85 GFLOP/s on
one core of Zen 4 (K = 144).
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import VECTOR

__all__ = ["FEW", "ROWS", "add_few", "add_few_half", "add_half_tile", "add_row",
           "add_row_half", "add_tile", "transpose"]

ROWS = 12 if VECTOR == 64 else 6


def _step(builder, real, lanes, a, row, b, sums):
    """One k: sums[r][v] + a[r · row] b[v]."""
    vector, i32, i64 = ir.VectorType(real, lanes), ir.IntType(32), ir.IntType(64)
    nothing, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, lanes), None)
    size = VECTOR // lanes
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3),
                                         f"llvm.fma.v{lanes}f{8 * size}")
    bs = [builder.load(builder.gep(b, [i64(v * lanes)], source_etype=real), align=size, typ=vector)
          for v in range(len(sums[0]))]
    new = []
    for r in range(len(sums)):
        at = builder.gep(a, [builder.mul(row, i64(r))], source_etype=real)
        one = builder.insert_element(nothing, builder.load(at, align=size, typ=real), i32(0))
        splat = builder.shuffle_vector(one, nothing, first)
        new.append([builder.call(fma, [splat, v, old]) for v, old in zip(bs, sums[r])])
    return new


def _loop(builder, real, lanes, start, a, row, step, b, ldb, K):
    """start + the sums over k = 0 … K − 1, K ≥ 1, of a[r · row + k · step] b[k · ldb + v]."""
    vector, i64 = ir.VectorType(real, lanes), ir.IntType(64)
    before, body = builder.block, builder.append_basic_block("k")
    after = builder.append_basic_block("sums")
    builder.branch(body)
    builder.position_at_end(body)
    k = builder.phi(i64)
    sums = [[builder.phi(vector) for _ in row] for row in start]
    at_a = builder.gep(a, [builder.mul(k, step)], source_etype=real)
    at_b = builder.gep(b, [builder.mul(k, ldb)], source_etype=real)
    new = _step(builder, real, lanes, at_a, row, at_b, sums)
    following = builder.add(k, i64(1))
    builder.cbranch(builder.icmp_signed("<", following, K), body, after)
    k.add_incoming(i64(0), before)
    k.add_incoming(following, body)
    for old_row, start_row, new_row in zip(sums, start, new):
        for old, first, value in zip(old_row, start_row, new_row):
            old.add_incoming(first, before)
            old.add_incoming(value, body)
    builder.position_at_end(after)
    return new


def _pointers(context, builder, signature, args, real):
    """data(i, offset): where the array that is argument i has that element."""
    def data(i, offset):
        p = context.make_array(signature.args[i])(context, builder, args[i]).data
        return builder.gep(p, [offset], source_etype=real)
    return data


def _rows_of(data, i, at, ld, shape, lanes, builder):
    """Where each vector of the tile of c stands, c being argument i."""
    i64 = ir.IntType(64)
    return [[data(i, builder.add(at, builder.add(builder.mul(ld, i64(r)), i64(v * lanes))))
             for v in range(shape[1])] for r in range(shape[0])]


def _store(builder, sums, places, size):
    for row, row_places in zip(sums, places):
        for value, place in zip(row, row_places):
            builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=size)


def _adding(rows, vectors):
    """The intrinsic of a tile of so many rows and vectors that is added to c where it stands."""
    @intrinsic
    def add(typingctx, a, at, row, step, K, b, bt, ldb, c, ct, ldc):
        def codegen(context, builder, signature, args):
            real, size = context.get_data_type(a.dtype), a.dtype.bitwidth // 8
            lanes = VECTOR // size
            vector = ir.VectorType(real, lanes)
            data = _pointers(context, builder, signature, args, real)
            places = _rows_of(data, 8, args[9], args[10], (rows, vectors), lanes, builder)
            start = [[builder.load(p, align=size, typ=vector) for p in row] for row in places]
            sums = _loop(builder, real, lanes, start, data(0, args[1]), args[2], args[3],
                         data(5, args[6]), args[7], args[4])
            _store(builder, sums, places, size)
            return context.get_dummy_value()

        n = types.intp
        return types.void(a, n, n, n, n, b, n, n, c, n, n), codegen
    return add


def _adding_in_numpy(rows, vectors):
    """The same with the JIT off."""
    def add(a, at, row, step, K, b, bt, ldb, c, ct, ldc):
        r, k, v = np.arange(rows)[:, None], np.arange(K), np.arange(vectors * VECTOR // a.itemsize)
        c[ct + r * ldc + v] += a[at + r * row + k * step] @ b[bt + k[:, None] * ldb + v]
    return add


# add_tile(a, at, row, step, K, b, bt, ldb, c, ct, ldc):
#     c[ct + r · ldc + v] += Σ_k a[at + r · row + k · step] b[bt + k · ldb + v]
# for ROWS, 4 or 1 rows and two vectors or one: the rest of a matrix is cut into the smaller ones.
FEW = 4
_make = _adding_in_numpy if config.DISABLE_JIT else _adding
add_tile, add_half_tile = _make(ROWS, 2), _make(ROWS, 1)
add_few, add_few_half = _make(FEW, 2), _make(FEW, 1)
add_row, add_row_half = _make(1, 2), _make(1, 1)


@intrinsic
def transpose(typingctx, x, at, ldx, y, yt, ldy):
    """y[yt + k · ldy + j] = x[at + j · ldx + k] for a square of a vector's lanes, in registers."""
    def codegen(context, builder, signature, args):
        real, size, i64 = context.get_data_type(x.dtype), x.dtype.bitwidth // 8, ir.IntType(64)
        n = VECTOR // size
        data, vector = _pointers(context, builder, signature, args, real), ir.VectorType(real, n)
        rows = [builder.load(data(0, builder.add(args[1], builder.mul(args[2], i64(j)))),
                             align=size, typ=vector) for j in range(n)]
        places = [data(3, builder.add(args[4], builder.mul(args[5], i64(j)))) for j in range(n)]
        _store(builder, [_interleaved(builder, rows, n)], [places], size)
        return context.get_dummy_value()

    n = types.intp
    return types.void(x, n, n, y, n, n), codegen


def _interleaved(builder, rows, n):
    """A transpose is log2(n) rounds of merging row i with row i + n/2, element by element."""
    low = [i // 2 + n * (i % 2) for i in range(n)]
    lanes = ir.VectorType(ir.IntType(32), n)
    masks = [ir.Constant(lanes, [i + s for i in low]) for s in (0, n // 2)]
    for _ in range(n.bit_length() - 1):
        rows = [builder.shuffle_vector(rows[i // 2], rows[i // 2 + n // 2], masks[i % 2])
                for i in range(n)]
    return rows


if config.DISABLE_JIT:
    def transpose(x, at, ldx, y, yt, ldy):
        """The same in NumPy."""
        i = np.arange(VECTOR // x.itemsize)
        y[yt + i[:, None] * ldy + i] = x[at + i * ldx + i[:, None]]
