"""All that is no plain arithmetic: threads, warps, vectors of memory, the machine's functions.

The only module with LLVM or PTX in it, so that another compiler changes this one. Each has a plain
form for the simulator. ``cuda`` is numba.cuda, or the simulator's.
"""

import numpy as np

from .memory import SIMULATED
from .simulator import Pointer, pause

__all__ = ["FULL", "address", "arrive", "cuda", "device", "libm", "load", "quotient", "store",
           "wait_for", "width"]

FULL = 0xFFFFFFFF            # every lane of a warp
WARP = 32
VECTOR = 16                  # bytes: the widest load and store


def width(dtype):
    """Elements of a vector."""
    return VECTOR // np.dtype(dtype).itemsize


if SIMULATED:
    from .simulator import cuda

    def device(function):
        return function

    def address(array):
        return Pointer.of(array)

    def load(p, i):
        n = width(p.memory.dtype)
        first = p.at(i, n)
        return tuple(p.memory[first:first + n])

    def store(p, i, values):
        first = p.at(i, len(values))
        p.memory[first:first + len(values)] = values

    def quotient(n, d):
        return n // d

    def arrive(p, i):
        p[i] = p[i] + 1
        return p[i] - 1

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

    def device(function):
        return cuda.jit(device=True, forceinline=True)(function)

    def _vector(context, builder, pointer, p, i):
        """The address of element i, as that of a vector; its length."""
        n = VECTOR * 8 // pointer.dtype.bitwidth
        element = context.get_value_type(pointer.dtype)
        at = builder.gep(p, [i])
        return builder.bitcast(at, ir.VectorType(element, n).as_pointer()), n

    @intrinsic
    def address(typingctx, array):
        """The address of an array's first element."""
        def codegen(context, builder, sig, args):
            return context.make_array(sig.args[0])(context, builder, args[0]).data
        return types.CPointer(array.dtype)(array), codegen

    @intrinsic
    def load(typingctx, p, i):
        """16 bytes from element i on, as a tuple; i is a multiple of their number."""
        kind = types.UniTuple(p.dtype, VECTOR * 8 // p.dtype.bitwidth)

        def codegen(context, builder, sig, args):
            at, n = _vector(context, builder, sig.args[0], *args)
            v = builder.load(at, align=VECTOR)
            return context.make_tuple(builder, kind, [
                builder.extract_element(v, ir.Constant(ir.IntType(32), k)) for k in range(n)])
        return kind(p, i), codegen

    @intrinsic
    def store(typingctx, p, i, values):
        """Write 16 bytes from element i on."""
        def codegen(context, builder, sig, args):
            at, n = _vector(context, builder, sig.args[0], *args[:2])
            v = ir.Constant(at.type.pointee, ir.Undefined)
            for k in range(n):
                v = builder.insert_element(v, builder.extract_value(args[2], k),
                                           ir.Constant(ir.IntType(32), k))
            builder.store(v, at, align=VECTOR)
            return context.get_dummy_value()
        return types.void(p, i, values), codegen

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
    def _seen(typingctx, p, i):
        """The int32 p[i] as all blocks see it, and after it what they wrote before."""
        def codegen(context, builder, sig, args):
            at = builder.ptrtoint(builder.gep(args[0], [args[1]]), ir.IntType(64))
            kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
            return builder.asm(kind, "ld.acquire.gpu.u32 $0, [$1];", "=r,l,~{memory}", [at], True)
        return types.int32(p, i), codegen

    @device
    def wait_for(p, i, n):
        """Until the int32 p[i] is n; whoever adds to it must be running, or come to run."""
        while _seen(p, i) < n:
            pass

    def libm(name, dtype):
        """libdevice's function of a number of that dtype."""
        return getattr(libdevice, name + ("f" if np.dtype(dtype) == np.float32 else ""))
