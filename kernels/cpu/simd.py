"""The tile of a matrix product: ROWS × 2 vectors of C stay in registers while k runs.

LLVM's vectoriser does not keep such a tile in registers, so this loop is written in vectors. With
AVX-512: 12 × 2 sums, two vectors of b and a broadcast from memory, of 32 registers; 85 GFLOP/s on
one core of Zen 4 (K = 144).
"""

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["ROWS", "VECTOR", "half_tile", "panels", "tile"]

VECTOR, ROWS = (64, 12) if binding.get_host_cpu_features().get("avx512f") else (32, 6)


def panels(b):
    """b (G, K, n) cut into tile columns: (G, ⌈n/W⌉, K, W), W = two vectors, zeros behind n."""
    G, K, n = b.shape
    W = 2 * VECTOR // b.itemsize
    out = np.zeros((G, -(-n // W), K, W), b.dtype)
    for p in range(out.shape[1]):
        out[:, p, :, :min(W, n - p * W)] = b[:, :, p * W:(p + 1) * W]
    return out


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
    for r in range(ROWS):
        at = builder.gep(a, [builder.mul(row, i64(r))], source_etype=real)
        one = builder.insert_element(nothing, builder.load(at, align=size, typ=real), i32(0))
        splat = builder.shuffle_vector(one, nothing, first)
        new.append([builder.call(fma, [splat, v, old]) for v, old in zip(bs, sums[r])])
    return new


def _loop(builder, real, lanes, vectors, a, row, step, b, K):
    """The sums over k = 0 … K − 1, K ≥ 1, of a[r · row + k · step] b[k, v]."""
    vector, i64 = ir.VectorType(real, lanes), ir.IntType(64)
    before, body = builder.block, builder.append_basic_block("k")
    after = builder.append_basic_block("sums")
    builder.branch(body)
    builder.position_at_end(body)
    k = builder.phi(i64)
    sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(ROWS)]
    at_a = builder.gep(a, [builder.mul(k, step)], source_etype=real)
    at_b = builder.gep(b, [builder.mul(k, i64(2 * lanes))], source_etype=real)
    new = _step(builder, real, lanes, at_a, row, at_b, sums)
    following = builder.add(k, i64(1))
    builder.cbranch(builder.icmp_signed("<", following, K), body, after)
    k.add_incoming(i64(0), before)
    k.add_incoming(following, body)
    for old_row, new_row in zip(sums, new):
        for old, value in zip(old_row, new_row):
            old.add_incoming(ir.Constant(vector, None), before)
            old.add_incoming(value, body)
    builder.position_at_end(after)
    return new


def _tile(vectors, a, b, c):
    """Signature and code of a tile of so many vectors."""
    def codegen(context, builder, signature, args):
        real = context.get_data_type(a.dtype)
        size = a.dtype.bitwidth // 8
        lanes = VECTOR // size

        def data(i, kind, offset):
            p = context.make_array(kind)(context, builder, args[i]).data
            return builder.gep(p, [offset], source_etype=real)

        sums = _loop(builder, real, lanes, vectors, data(0, a, args[1]), args[2], args[3],
                     data(5, b, args[6]), args[4])
        for r, row in enumerate(sums):
            for v, value in enumerate(row):
                out = data(7, c, ir.IntType(64)((2 * r + v) * lanes))
                builder.store(value, builder.bitcast(out, value.type.as_pointer()), align=size)
        return context.get_dummy_value()

    n = types.intp
    return types.void(a, n, n, n, n, b, n, c), codegen


@intrinsic
def tile(typingctx, a, at, row, step, K, b, bt, c):
    """c[r, :] = Σ_k a[at + r · row + k · step] b[bt + k W : …] for the ROWS rows of c (ROWS, W).

    a and b are contiguous with one axis; nothing is checked: all that is named must exist.
    """
    return _tile(2, a, b, c)


@intrinsic
def half_tile(typingctx, a, at, row, step, K, b, bt, c):
    """The left half of `tile`, for panels that are at most half full."""
    return _tile(1, a, b, c)


if config.DISABLE_JIT:
    def tile(a, at, row, step, K, b, bt, c):
        """The same in NumPy."""
        index = at + np.arange(c.shape[0])[:, None] * row + np.arange(K) * step
        c[...] = a[index] @ b[bt:bt + K * c.shape[1]].reshape(K, -1)

    half_tile = tile
