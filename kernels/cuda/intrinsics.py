"""All that is no plain arithmetic: threads, warps, vectors of memory, the machine's functions.

The only module with LLVM in it, beside halves.py and ptx.py, which has all PTX: another compiler
changes these.
Each has a plain form for the simulator. ``cuda`` is numba.cuda, or the simulator's.
"""

from functools import cache

import numpy as np

from ..half import is_half, kind as kind_of, named as half_of
from .memory import SIMULATED
from .simulator import Pointer, pause

__all__ = ["FULL", "HALVES", "address", "address_of", "aligned", "arrive", "commit", "copy",
           "couple", "crossed", "cuda", "device", "libm", "load", "load_raw", "matrices", "mma",
           "mma_of_halves", "multiply_add", "outer", "quotient", "rounded", "store", "store_raw",
           "tf32", "wait", "wait_for", "width"]

FULL = 0xFFFFFFFF            # every lane of a warp
WARP = 32
VECTOR = 16                  # bytes: the widest load and store


def width(dtype):
    """Elements of a vector."""
    return VECTOR // np.dtype(dtype).itemsize


if SIMULATED:
    from .simulator import arrived, committed, cuda, exchange, later

    HALVES = {"f2": None, "bf": None}

    def device(function):
        return function

    def address(array):
        return Pointer.of(array)

    def address_of(dtype):
        return lambda array: Pointer.of(array.view(dtype))

    def aligned(pointers):
        return not any((p.address + p.origin * p.step) % VECTOR for p in pointers)

    def load_raw(p, i):
        n = VECTOR // p.step
        first = p.at(i, n)
        return p.memory[first:first + n]

    def load(p, i):
        values = load_raw(p, i)
        return tuple(values.astype(np.float32) if p.half else values)

    def store(p, i, values):
        first = p.at(i, len(values))
        p.memory[first:first + len(values)] = values

    store_raw = store

    def quotient(n, d):
        return n // d

    def arrive(p, i):
        p[i] = p[i] + 1
        return p[i] - 1

    def multiply_add(a, b, c):
        a, b, c = ((int(high) << 64) + int(low) for high, low in (a, b, c))
        s = a * b + c
        return np.uint64(s >> 64 & (1 << 64) - 1), np.uint64(s & (1 << 64) - 1)

    def tf32(x):
        if x != x:
            return np.float32(x)
        bits = np.float32(x).view(np.uint32)
        return np.uint32((int(bits) + 0x1000) & 0xFFFFE000).view(np.float32)

    def couple(p, i):
        if i % 2:
            raise ValueError(f"two elements at {i}: not aligned")
        return p[i], p[i + 1]

    def copy(n):
        def run(s, i, p, at, there):
            to, first = s.at(i, n), p.at(at, n) if there else 0

            def move():
                s.memory[to:to + n] = p.memory[first:first + n] if there else 0
            later(move)
        return run

    def commit():
        committed()

    def wait(n):
        return lambda: arrived(n)

    def matrices(p, i):
        rows = [i for _, i in sorted(exchange(i, None).items())]
        group, t = cuda.threadIdx.x % WARP // 4, cuda.threadIdx.x % 4
        return tuple(p.memory[p.at(rows[8 * k + group], 4) + t] for k in range(4))

    def crossed(p, i):
        rows = [i for _, i in sorted(exchange(i, None).items())]
        group, t = cuda.threadIdx.x % WARP // 4, cuda.threadIdx.x % 4

        def half(matrix, row):
            word = int(p.memory[p.at(rows[8 * matrix + row], 4) + group // 2])
            return word >> group % 2 * 16 & 0xFFFF
        return tuple(np.uint32(half(k, 2 * t) | half(k, 2 * t + 1) << 16) for k in range(4))

    def mma(sums, a, b):
        lanes = [v for _, v in sorted(exchange((a, b), None).items())]
        lane = next(i for i, v in enumerate(lanes) if v[0] is a)
        group, t = lane // 4, lane % 4
        left = [[lanes[4 * g + k % 4][0][2 * (k // 4) + h] for k in range(8)]
                for g, h in ((group, 0), (group, 1))]
        right = [[lanes[4 * n + k % 4][1][k // 4] for k in range(8)] for n in (2 * t, 2 * t + 1)]
        products = np.array(left) @ np.array(right).T
        return tuple(np.float32(s + p) for s, p in zip(sums, products.ravel()))

    def mma_of_halves(name):
        dtype = half_of(name)

        def multiply(sums, a, b):
            lanes = [v for _, v in sorted(exchange((a, b), None).items())]
            lane = next(i for i, v in enumerate(lanes) if v[0] is a)
            group, t = lane // 4, lane % 4

            def line(words):
                return np.array(words, np.uint32).view(dtype).astype(np.float32)
            left = [line([lanes[4 * group + k % 4][0][2 * (k // 4) + h] for k in range(8)])
                    for h in (0, 1)]
            right = [line([lanes[4 * n + k % 4][1][k // 4] for k in range(8)])
                     for n in (2 * t, 2 * t + 1)]
            products = np.array(left) @ np.array(right).T
            return tuple(np.float32(s + p) for s, p in zip(sums, products.ravel()))
        return multiply

    def rounded(name):
        kind = np.float32 if name == "f4" else half_of(name).type
        return lambda x: np.float32(kind(x))

    def outer(sums, a, b):
        return np.asarray(sums) + np.multiply.outer(np.asarray(a), np.asarray(b))

    def wait_for(p, i, n):
        while p[i] < n:
            pause()

    def libm(name, dtype):
        return getattr(np, {"fabs": "abs", "pow": "power"}.get(name, name))
else:
    from llvmlite import ir
    from numba import cuda, types
    from numba.cuda import libdevice
    from numba.cuda.extending import intrinsic

    from . import ptx
    from .halves import HALVES, HalfPointer, narrow, pair, split, widen

    def device(function):
        return cuda.jit(device=True, forceinline=True)(function)

    def _vector(context, builder, pointer, p, i):
        """The address of element i, as that of a vector; its length. Halves by twos, in words."""
        at, element = builder.gep(p, [i]), p.type.pointee
        if isinstance(pointer, HalfPointer):
            element = ir.IntType(32)
        n = VECTOR // context.get_abi_sizeof(element)
        return builder.bitcast(at, ir.VectorType(element, n).as_pointer()), n

    @intrinsic
    def address(typingctx, array):
        """The address of an array's first element."""
        def codegen(context, builder, sig, args):
            return context.make_array(sig.args[0])(context, builder, args[0]).data
        return types.CPointer(array.dtype)(array), codegen

    def address_of(dtype):
        """``address`` of an array of words of a dtype's size, in which numbers of it lie."""
        if not is_half(dtype):
            return address

        @intrinsic
        def of_halves(typingctx, array):
            def codegen(context, builder, sig, args):
                return context.make_array(array)(context, builder, args[0]).data
            return HALVES[kind_of(dtype)](array), codegen
        return of_halves

    @intrinsic
    def aligned(typingctx, pointers):
        """Whether each of a tuple of addresses begins a vector."""
        def codegen(context, builder, sig, args):
            word = ir.IntType(64)
            bits = ir.Constant(word, 0)
            for k in range(len(pointers)):
                bits = builder.or_(bits, builder.ptrtoint(builder.extract_value(args[0], k), word))
            return builder.icmp_unsigned("==", builder.and_(bits, ir.Constant(word, VECTOR - 1)),
                                         ir.Constant(word, 0))
        return types.boolean(pointers), codegen

    def _loaded(p, i, kind, half):
        def codegen(context, builder, sig, args):
            at, n = _vector(context, builder, sig.args[0], *args)
            v = builder.load(at, align=VECTOR)
            values = [builder.extract_element(v, ir.Constant(ir.IntType(32), k)) for k in range(n)]
            if half:
                values = [x for word in values for x in split(builder, p, word)]
            return context.make_tuple(builder, kind, values)
        return kind(p, i), codegen

    @intrinsic
    def load(typingctx, p, i):
        """16 bytes from element i on, as a tuple; i is a multiple of their number. Halves become
        eight numbers of float32."""
        half = isinstance(p, HalfPointer)
        return _loaded(p, i, types.UniTuple(p.dtype, VECTOR * 8 // (
            16 if half else p.dtype.bitwidth)), half)

    @intrinsic
    def load_raw(typingctx, p, i):
        """The same as they are, halves as four words, for ``store_raw``."""
        dtype = types.uint32 if isinstance(p, HalfPointer) else p.dtype
        return _loaded(p, i, types.UniTuple(dtype, VECTOR * 8 // dtype.bitwidth), False)

    def _stored(p, i, values, half):
        def codegen(context, builder, sig, args):
            xs = [builder.extract_value(args[2], k) for k in range(len(values))]
            if half:
                xs = [pair(builder, p, *xs[k:k + 2]) for k in range(0, len(xs), 2)]
            kind = ir.VectorType(xs[0].type, len(xs))
            v = ir.Constant(kind, ir.Undefined)
            for k, x in enumerate(xs):
                v = builder.insert_element(v, x, ir.Constant(ir.IntType(32), k))
            at = builder.bitcast(builder.gep(args[0], [args[1]]), kind.as_pointer())
            builder.store(v, at, align=len(xs) * context.get_abi_sizeof(xs[0].type))
            return context.get_dummy_value()
        return types.void(p, i, values), codegen

    @intrinsic
    def store(typingctx, p, i, values):
        """Write a tuple, 16 bytes or a part, from a multiple of its length on; numbers of float32
        are rounded to halves."""
        return _stored(p, i, values, isinstance(p, HalfPointer))

    @intrinsic
    def store_raw(typingctx, p, i, values):
        """Write what ``load_raw`` has read."""
        return _stored(p, i, values, False)

    @intrinsic
    def quotient(typingctx, n, d):
        """⌊n / d⌋ of unsigned numbers of one type, in that type: Numba would take 64 bits, which
        is ten times as long."""
        return n(n, n), lambda context, builder, sig, args: builder.udiv(*args)

    @intrinsic
    def arrive(typingctx, p, i):
        """Add 1 to the integer p[i], at once for all blocks; what it was before."""
        def codegen(context, builder, sig, args):
            at = builder.gep(args[0], [args[1]])
            return builder.atomic_rmw("add", at, ir.Constant(at.type.pointee, 1), "monotonic")
        return p.dtype(p, i), codegen

    @intrinsic
    def multiply_add(typingctx, a, b, c):
        """a b + c modulo 2^128 of pairs (high, low) of 64 bits."""
        def codegen(context, builder, sig, args):
            wide, word = ir.IntType(128), ir.IntType(64)
            shift, numbers = ir.Constant(wide, 64), []
            for x in args:
                high, low = (builder.zext(builder.extract_value(x, i), wide) for i in (0, 1))
                numbers.append(builder.or_(builder.shl(high, shift), low))
            s = builder.add(builder.mul(*numbers[:2]), numbers[2])
            return context.make_tuple(builder, sig.return_type, [
                builder.trunc(builder.lshr(s, shift), word), builder.trunc(s, word)])
        return a(a, b, c), codegen

    @intrinsic
    def couple(typingctx, p, i):
        """Two elements from an even one on."""
        kind = types.UniTuple(p.dtype, 2)

        def codegen(context, builder, sig, args):
            at = builder.gep(args[0], [args[1]])
            size = context.get_abi_sizeof(at.type.pointee)
            v = builder.load(builder.bitcast(at, ir.VectorType(at.type.pointee, 2).as_pointer()),
                             align=2 * size)
            return context.make_tuple(builder, kind, [
                builder.extract_element(v, ir.Constant(ir.IntType(32), k)) for k in (0, 1)])
        return kind(p, i), codegen

    def _in(builder, p, i, space, bits):
        """The address of element i in shared memory (3) or the device's (1), as a number."""
        at = builder.gep(p, [i])
        return builder.ptrtoint(builder.addrspacecast(at, at.type.pointee.as_pointer(space)),
                                ir.IntType(bits))

    @cache
    def copy(n):
        """n elements of p from ``at`` on to shared memory, s from i on, or zeros unless ``there``,
        without a thread to wait for them: see ``wait``. Needs 8.0."""
        @intrinsic
        def run(typingctx, s, i, p, at, there):
            def codegen(context, builder, sig, args):
                word, size = ir.IntType(32), n * context.get_abi_sizeof(args[0].type.pointee)
                ptx.copied(builder, size, _in(builder, *args[:2], 3, 32),
                           _in(builder, *args[2:4], 1, 64), builder.select(
                               args[4], ir.Constant(word, size), ir.Constant(word, 0)))
                return context.get_dummy_value()
            return types.void(s, i, p, at, types.boolean), codegen
        return run

    @intrinsic
    def commit(typingctx):
        """What this thread has copied since the last time is a group. Needs 8.0."""
        def codegen(context, builder, sig, args):
            ptx.commit_group(builder)
            return context.get_dummy_value()
        return types.void(), codegen

    @cache
    def wait(n):
        """Until all but the last n groups of this thread have arrived."""
        @intrinsic
        def run(typingctx):
            def codegen(context, builder, sig, args):
                ptx.wait_group(builder, n)
                return context.get_dummy_value()
            return types.void(), codegen
        return run

    def _matrices(how, text):
        @intrinsic
        def run(typingctx, p, i):
            kind = types.UniTuple(p.dtype, 4)

            def codegen(context, builder, sig, args):
                element = args[0].type.pointee
                v = ptx.matrices(builder, how, _in(builder, *args, 3, 32))
                return context.make_tuple(builder, kind, [
                    builder.bitcast(builder.extract_value(v, k), element) for k in range(4)])
            return kind(p, i), codegen
        run.__doc__ = text
        return run

    matrices = _matrices("", """Four matrices of 8 rows of 4 elements of 32 bits in shared memory,
        whose rows are where i of 32 lanes says: lane 4 g + t gets element t of row g of each.""")
    crossed = _matrices(".trans", """The same of 8 rows of 8 halves, transposed: lane 4 g + t gets
        halves g of rows 2 t and 2 t + 1.""")

    @intrinsic
    def tf32(typingctx, x):
        """x rounded to TF32's 11 bits. Needs compute capability 8.0."""
        def codegen(context, builder, sig, args):
            return builder.bitcast(ptx.tf32(builder, *args), ir.FloatType())
        return x(x), codegen

    @intrinsic
    def mma(typingctx, sums, a, b):
        """A warp's sums + a b on the tensor cores, (16, 8) + (16, 8) (8, 8), in TF32. Lane 4 g + t
        has rows g and g + 8: of a columns t and t + 4 (two rows of one, two of the other), of b
        rows t and t + 4 of column g, of the sums columns 2 t and 2 t + 1. Needs 8.0."""
        def codegen(context, builder, sig, args):
            word, part = ir.IntType(32), builder.extract_value
            inputs = [builder.bitcast(part(v, i), word) for v, n in zip(args[1:], (4, 2))
                      for i in range(n)] + [part(args[0], i) for i in range(4)]
            result = ptx.multiplied(builder, "m16n8k8", "tf32", inputs)
            return context.make_tuple(builder, sums, [part(result, i) for i in range(4)])
        return sums(sums, a, b), codegen

    def mma_of_halves(name):
        """As ``mma``, (16, 16) (16, 8) of halves, "f2" or "bf": a word is two of neighbouring k,
        else lanes have what they have there. Products are exact, sums float32. Needs 8.0."""
        kind = {"f2": "f16", "bf": "bf16"}[name]

        @intrinsic
        def multiply(typingctx, sums, a, b):
            def codegen(context, builder, sig, args):
                part = builder.extract_value
                inputs = [part(v, i) for v, n in zip((*args[1:], args[0]), (4, 2, 4))
                          for i in range(n)]
                result = ptx.multiplied(builder, "m16n8k16", kind, inputs)
                return context.make_tuple(builder, sums, [part(result, i) for i in range(4)])
            return sums(sums, a, b), codegen
        return multiply

    def rounded(name):
        """A number of float32 as it is read again where it was written as "f4", "f2" or "bf"."""
        if name == "f4":
            return device(lambda x: x)
        pointer = HALVES[name]

        @intrinsic
        def there_and_back(typingctx, x):
            return x(x), lambda context, builder, sig, args: widen(
                builder, pointer, narrow(builder, pointer, args[0]))
        return there_and_back

    @intrinsic
    def outer(typingctx, sums, a, b):
        """sums[i][j] + a[i] b[j], each rounded once: a rank-1 step of tuples in registers."""
        def codegen(context, builder, sig, args):
            part, rows = builder.extract_value, []
            for i in range(len(a)):
                row = part(args[0], i)
                rows.append(context.make_tuple(builder, sums.dtype, [
                    builder.fma(part(args[1], i), part(args[2], j), part(row, j))
                    for j in range(len(b))]))
            return context.make_tuple(builder, sums, rows)
        return sums(sums, a, b), codegen

    @intrinsic
    def _seen(typingctx, p, i):
        """The int32 p[i] as all blocks see it, and after it what they wrote before."""
        def codegen(context, builder, sig, args):
            at = builder.ptrtoint(builder.gep(args[0], [args[1]]), ir.IntType(64))
            return ptx.acquired(builder, at)
        return types.int32(p, i), codegen

    @device
    def wait_for(p, i, n):
        """Until the int32 p[i] is n; whoever adds to it must be running, or come to run."""
        while _seen(p, i) < n:
            pass

    def libm(name, dtype):
        """libdevice's function of a number of that dtype."""
        return getattr(libdevice, name + ("f" if np.dtype(dtype) == np.float32 else ""))
