"""The tiles of a matrix product: sums that stay in registers while k runs.

LLVM's vectoriser does not keep such tiles in registers, so these loops are written in vectors.
``tile``: a's values, each broadcast, times rows of b; up to 12 × 2 vectors of sums with AVX-512,
of 32 registers. ``dots``: rows of a times rows of b, vectors along k; up to 4 × 4 sums, added up
across lanes at the end. Four sums keep the multipliers busy (one FMA of 64 bytes per cycle, latency
4, on Zen 4), so the lower tiles that an odd rest is cut into are nearly as fast: on one core with a
peak of 118 GFLOP/s, 12 × 2 reach 115, 6 × 2 113, 4 × 2 110, 2 × 2 97, 1 × 2 52; 4 × 4 dots of 784
reach 105. With two FMAs per cycle (Golden Cove, peak 179) the steps from row to row matter: LLVM
makes them a chain of twelve additions, as long as the sums take, unless it knows nothing of them:
12 × 2 then reach 170 instead of 160, 12 × 1 146 instead of 90.

Each is one LLVM function per dtype, called from everywhere: its registers are its own.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from .emit import I32, I64, Code, place
from .simd import VECTOR

__all__ = ["DOTS", "HEIGHTS", "ROWS", "SIDES", "WIDE", "dots", "tile", "transpose",
           "transpose_part"]

ROWS = 12 if VECTOR == 64 else 6
HEIGHTS = (ROWS, 6, 4, 3, 2, 1) if ROWS > 6 else (6, 4, 3, 2, 1)      # of tiles
DOTS = 4 if VECTOR == 64 else 2
WIDE = 6                                                              # vectors of one row
SIDES = tuple(n for n in (1, 2, 4) if n <= DOTS)                      # of dots


def _fetching(code, K, c, ldc, x, ask, values, run):
    """``run(values)``, the sums of one k, K times. Meanwhile outputs are asked for, then x, x +
    ask, …, line by line: a burst would keep the tile's own loads waiting. A step of a pointer may
    take a multiplier's turn, so there are two loops instead of one that selects, the second of two
    k: five such steps per k instead of 14 (Golden Cove, 165 -> 172 of 179 GFLOP/s)."""
    build = code.builder
    first = build.select(build.icmp_signed("<", K, I64(ROWS)), K, I64(ROWS))
    left = build.sub(K, first)

    def outputs(_, values):
        code.prefetch(values[0], False, 1)
        code.prefetch(code.at(values[0], 1), False, 1)
        return [code.at(values[0], ldc), *run(values[1:])]

    def lines(_, values):
        code.prefetch(values[0], False, 1)
        return [code.at(values[0], build.shl(ask, I64(1))), *run(run(values[1:]))]
    values = code.loop(first, [], [c, *values], outputs)
    values = code.some(build.ashr(left, I64(1)), [], [x, *values[1:]], lines)[1:]
    return code.some(build.and_(left, I64(1)), [], values, lambda _, values: run(values))


def _tile(code, rows, vectors, masked, m, n, K, a, row, step, b, ldb, s, lds, c, ldc, ahead, ask):
    """The sums of so many rows and vectors, half a vector being 0. The last ``masked`` vectors are
    parts."""
    if not vectors:
        code, vectors = Code(code.builder, code.real, VECTOR // 2), 1
    build, row = code.builder, code.builder.mul(row, I64(code.size))
    masks = [None if v < vectors - masked else code.first(build.sub(n, I64(v * code.lanes)))
             for v in range(vectors)]

    def places(base, ld):
        return [code.at(code.at(base, build.mul(ld, I64(r))), v)
                for r in range(rows) for v in range(vectors)]

    def products(values):
        (bt, *rest), sums = values[:4], values[4:]
        bs = [code.load(code.at(bt, v), mask) for v, mask in enumerate(masks)]
        first, one, three = map(code.hidden, rest)
        at, steps, out = first, [I64(0), one, build.shl(one, I64(1)), three], []
        for r in range(rows):
            if r and r % 4 == 0:
                at = code.bytes(at, build.shl(one, I64(2)))
            x = build.load(code.bytes(at, steps[r % 4]), align=code.size, typ=code.real)
            x = code.splat(x)
            out += [code.fma(x, bs[v], sums[r * vectors + v]) for v in range(vectors)]
        return [code.at(bt, ldb), code.at(first, step), one, three, *out]

    # targets are met when k has run; and s, for which sums that start with it would wait, is added
    targets = places(c, ldc)
    values = [b, a, row, build.mul(row, I64(3)), *[code.zero] * len(targets)]
    if (rows, vectors) == (ROWS, 2):
        values = _fetching(code, K, c, ldc, code.at(b, ahead), ask, values, products)
    else:
        for p in targets:
            code.prefetch(p, True)
        values = code.loop(K, [], values, lambda _, values: products(values))
    sums = values[4:]
    for total, at, target, mask in zip(sums, places(s, lds), targets, masks * rows):
        code.store(build.fadd(total, code.load(at, mask)), target, mask)


def _dots(code, rows, columns, m, n, K, a, lda, b, ldb, s, lds, c, ldc):
    """rows × columns sums along k: whole vectors, then a part of one."""
    build = code.builder
    whole = build.sdiv(K, I64(code.lanes))
    starts = ([code.at(a, build.mul(lda, I64(r))) for r in range(rows)]
              + [code.at(b, build.mul(ldb, I64(j))) for j in range(columns)])

    def body(pointers, sums, mask=None):
        xs = [code.load(p, mask) for p in pointers]
        return [code.fma(xs[i // columns], xs[rows + i % columns], old)
                for i, old in enumerate(sums)]

    sums = code.some(whole, [(p, I64(code.lanes)) for p in starts], [code.zero] * (rows * columns),
                     body)
    done = build.mul(whole, I64(code.lanes))
    sums = body([code.at(p, done) for p in starts], sums, code.first(build.sub(K, done)))
    for r, total in enumerate(_totals(code, sums, columns)):
        start = build.load(code.at(s, build.mul(lds, I64(r))), align=code.size, typ=total.type)
        place = build.bitcast(code.at(c, build.mul(ldc, I64(r))), total.type.as_pointer())
        build.store(build.fadd(start, total), place, align=code.size)


def _totals(code, sums, columns):
    """The sum over the lanes of each vector: halves of two become one, until it is full of sums.
    Vectors of so many columns."""
    build, n, count = code.builder, code.lanes, len(sums)
    kind, width = ir.VectorType(I32, n), n
    while width > 1:
        half = width // 2
        low = [i // half * width + i % half for i in range(n)]
        masks = [ir.Constant(kind, [i + s for i in low]) for s in (0, half)]
        pairs = zip(sums[::2], [*sums[1::2], sums[-1]])
        sums = [build.fadd(*(build.shuffle_vector(x, y, mask) for mask in masks))
                for x, y in pairs]
        width = half
    parts = [ir.Constant(ir.VectorType(I32, columns), list(range(i % n, i % n + columns)))
             for i in range(0, count, columns)]
    return [build.shuffle_vector(sums[r * columns // n], sums[0], part)
            for r, part in enumerate(parts)]


def _function(module, name, real, kinds, shapes, emit):
    """The LLVM function of that name: a switch over m and n to the loop for that shape."""
    name = f"nbgrad_{name}_{real}"
    function = module.globals.get(name)
    if function is not None:
        return function
    pointer = real.as_pointer()
    function = ir.Function(module, ir.FunctionType(
        ir.VoidType(), [pointer if kind == "p" else I64 for kind in kinds]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    build = ir.IRBuilder(function.append_basic_block("entry"))
    code = Code(build, real)
    index, bodies = shapes(code, *function.args[:2])
    last = build.append_basic_block("none")
    switch = build.switch(index, last)
    build.position_at_end(last)
    build.unreachable()
    for key, shape in bodies:
        block = build.append_basic_block("shape")
        switch.add_case(I64(key), block)
        build.position_at_end(block)
        emit(code, *shape, *function.args)
        build.ret_void()
    return function


def _tile_shapes(code, m, n):
    """Which loop: by rows, by half a vector, one, two or (for one row) WIDE, by whether the last is
    whole. AVX-512 masks at no cost: there the last is always a part."""
    build, lanes = code.builder, code.lanes
    over = [build.zext(build.icmp_signed(">", n, I64(limit)), I64)
            for limit in (lanes // 2, lanes, 2 * lanes)]
    whole = 0 if VECTOR == 64 else lanes - 1
    part = build.zext(build.icmp_signed("!=", build.and_(n, I64(whole)), I64(0)), I64)
    index = build.add(build.mul(m, I64(8)), part)
    for one in over:
        index = build.add(index, build.mul(one, I64(2)))
    shapes = [(rows, vectors, masked) for rows in HEIGHTS for vectors in (0, 1, 2)
              for masked in ((1,) if VECTOR == 64 or not vectors else (0, 1))]
    cases = [(8 * rows + 2 * vectors + (masked and whole > 0), (rows, vectors, masked))
             for rows, vectors, masked in shapes]
    return index, cases + [(14 + part, (1, WIDE, WIDE)) for part in {0, int(whole > 0)}]


def _dots_shapes(code, m, n):
    index = code.builder.add(code.builder.mul(m, I64(2 * DOTS)), n)
    return index, [(2 * DOTS * r + j, (r, j)) for r in SIDES for j in SIDES]


def _calling(name, kinds, shapes, emit):
    """The code of an intrinsic that calls the function of that name; "p" in ``kinds`` stands for an
    array and an offset."""
    def codegen(context, builder, signature, args):
        real = context.get_data_type(signature.args[kinds.index("p")].dtype)
        function = _function(builder.module, name, real, kinds, shapes, emit)
        values, i = [], 0
        for kind in kinds:
            values.append(args[i] if kind == "i" else
                          place(context, builder, signature.args[i], args[i], args[i + 1]))
            i += 1 if kind == "i" else 2
        builder.call(function, values)
        return context.get_dummy_value()
    return codegen


@intrinsic
def tile(typingctx, m, n, K, a, at, row, step, b, bt, ldb, s, st, lds, c, ct, ldc, ahead, ask):
    """c[ct + r ldc + j] = s[st + r lds + j] + Σ_k a[at + r row + k step] b[bt + k ldb + j]
    for m rows, one of HEIGHTS, and n columns: at most two vectors, WIDE for m = 1. K ≥ 1.
    Meanwhile a whole tile fetches its outputs and the lines of b[bt + ahead + k ask]."""
    i = types.intp
    return (types.void(i, i, i, a, i, i, i, b, i, i, s, i, i, c, i, i, i, i),
            _calling("tile", "iiipiipipipiii", _tile_shapes, _tile))


@intrinsic
def dots(typingctx, m, n, K, a, at, lda, b, bt, ldb, s, st, lds, c, ct, ldc):
    """c[ct + r ldc + j] = s[st + r lds + j] + Σ_k a[at + r lda + k] b[bt + j ldb + k]
    for m and n of SIDES."""
    i = types.intp
    return (types.void(i, i, i, a, i, i, b, i, i, s, i, i, c, i, i),
            _calling("dots", "iiipipipipi", _dots_shapes, _dots))


def _square(context, builder, signature, args, m=None, n=None):
    """Transposes n rows of m values (lanes of both without them). A row that is not there reads the
    last one, and is written over by it."""
    code = Code(builder, context.get_data_type(signature.args[0].dtype))
    ldx, ldy = args[2], args[5]
    source, target = (place(context, builder, signature.args[i], *args[i:i + 2]) for i in (0, 3))

    def line(base, ld, i, count):
        i = I64(i)
        if count is not None:
            last = builder.sub(count, I64(1))
            i = builder.select(builder.icmp_signed("<", i, last), i, last)
        return code.at(base, builder.mul(ld, i))
    mask = None if m is None else code.first(m)
    rows = [code.load(line(source, ldx, j, n), mask) for j in range(code.lanes)]
    for j, value in reversed(list(enumerate(_interleaved(builder, rows, code.lanes)))):
        code.store(value, line(target, ldy, j, m))
    return context.get_dummy_value()


@intrinsic
def transpose(typingctx, x, at, ldx, y, yt, ldy):
    """y[yt + k · ldy + j] = x[at + j · ldx + k] for a square of a vector's lanes, in registers."""
    n = types.intp
    return types.void(x, n, n, y, n, n), _square


@intrinsic
def transpose_part(typingctx, x, at, ldx, y, yt, ldy, m, n):
    """The same for n rows of m values; whole vectors are written, anything behind n."""
    def codegen(context, builder, signature, args):
        return _square(context, builder, signature, args[:6], *args[6:])
    i = types.intp
    return types.void(x, i, i, y, i, i, i, i), codegen


def _interleaved(builder, rows, n):
    """A transpose is log2(n) rounds of merging row i with row i + n/2, element by element."""
    low = [i // 2 + n * (i % 2) for i in range(n)]
    lanes = ir.VectorType(I32, n)
    masks = [ir.Constant(lanes, [i + s for i in low]) for s in (0, n // 2)]
    for _ in range(n.bit_length() - 1):
        rows = [builder.shuffle_vector(rows[i // 2], rows[i // 2 + n // 2], masks[i % 2])
                for i in range(n)]
    return rows


if config.DISABLE_JIT:                            # the same in NumPy
    def tile(m, n, K, a, at, row, step, b, bt, ldb, s, st, lds, c, ct, ldc, ahead, ask):
        r, k, j = np.arange(m)[:, None], np.arange(K), np.arange(n)
        c[ct + r * ldc + j] = (s[st + r * lds + j]
                               + a[at + r * row + k * step] @ b[bt + k[:, None] * ldb + j])

    def dots(m, n, K, a, at, lda, b, bt, ldb, s, st, lds, c, ct, ldc):
        r, k, j = np.arange(m)[:, None], np.arange(K), np.arange(n)
        c[ct + r * ldc + j] = (s[st + r * lds + j]
                               + a[at + r * lda + k] @ b[bt + j * ldb + k[:, None]])

    def transpose(x, at, ldx, y, yt, ldy):
        i = np.arange(VECTOR // x.itemsize)
        y[yt + i[:, None] * ldy + i] = x[at + i * ldx + i[:, None]]

    def transpose_part(x, at, ldx, y, yt, ldy, m, n):
        j, k = np.arange(n), np.arange(m)[:, None]
        y[yt + k * ldy + j] = x[at + j * ldx + k]
