"""Vectors: one register of float32 or float64, as a value that kernels compute with.

LLVM's vectoriser neither reassociates sums nor keeps several of them in registers, so loops that
live on either are written in vectors: ``load``, ``store``, ``+ - * /``, ``fma``, ``where``. A loop
over n values takes whole vectors and one ``load_part`` … ``store_part`` for the rest. The width is
the host's: 64 bytes with AVX-512, else 32; LLVM splits a vector that is wider than the machine's.

Vectors live in registers: they are locals of a device function, never arguments of a ``prange``.
They are values: ``a = a + b``, not ``+=``, which would change other names of an array with the JIT
off.
"""

import operator

import numpy as np
from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

from ..formulas import device

__all__ = ["VECTOR", "absolute", "fma", "greater", "lanes", "load", "load_part", "maximum",
           "pointer", "prefetch", "splat", "store", "store_part", "stream", "total", "where"]

VECTOR = 64 if binding.get_host_cpu_features().get("avx512f") else 32


class Vector(types.Type):
    """So many values of ``real``, or of truth values about such."""

    def __init__(self, real, mask=False):
        self.real, self.mask = real, mask
        self.lanes = VECTOR * 8 // real.bitwidth
        super().__init__(name=f"Vector({real}, {self.lanes}, mask={mask})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _ir(fe_type))


def _ir(vector):
    real = {32: ir.FloatType(), 64: ir.DoubleType()}[vector.real.bitwidth]
    return ir.VectorType(ir.IntType(1) if vector.mask else real, vector.lanes)


def _operator(f, emit):
    """The operator f between two vectors of one kind."""
    @infer_global(f)
    class _(AbstractTemplate):
        def generic(self, args, kws):
            a = args[0]
            if len(args) == 2 and isinstance(a, Vector) and not a.mask and a == args[1]:
                return signature(a, *args)
            return None

    @lower_builtin(f, Vector, Vector)
    def _(context, builder, sig, args):
        return emit(builder, *args)


for _f, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                  (operator.truediv, "fdiv")):
    _operator(_f, lambda builder, a, b, name=_name: getattr(builder, name)(a, b))


def _constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _call(builder, name, result, args):
    """The LLVM intrinsic of that name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _suffix(vector):
    return f"v{vector.lanes}f{vector.real.bitwidth}"


def _place(context, builder, array_type, array, index):
    if not isinstance(array_type, types.CPointer):
        array = context.make_array(array_type)(context, builder, array).data
    return builder.gep(array, [index])


@intrinsic
def _lanes(typingctx, x):
    """A constant: with x.itemsize, which is read from memory, n % lanes(x) would be a division."""
    def codegen(context, builder, sig, args):
        return ir.Constant(ir.IntType(64), VECTOR * 8 // x.dtype.bitwidth)
    return types.int64(x), codegen


@device
def lanes(x):
    """Values of an array's dtype in one vector."""
    return _lanes(x)


@intrinsic
def pointer(typingctx, x):
    """Where x begins, for load, store and prefetch: functions that take arrays compile slower."""
    def codegen(context, builder, sig, args):
        return context.make_array(x)(context, builder, args[0]).data
    return types.CPointer(x.dtype)(x), codegen


def _first(builder, vector, n):
    """Mask of the first n lanes."""
    i32 = ir.IntType(32)
    count = ir.VectorType(i32, vector.lanes)
    n = builder.trunc(n, i32)
    one = builder.insert_element(ir.Constant(count, ir.Undefined), n, i32(0))
    every = builder.shuffle_vector(one, one, ir.Constant(count, None))
    return builder.icmp_signed("<", ir.Constant(count, list(range(vector.lanes))), every)


@intrinsic
def load(typingctx, x, i):
    """x[i], x[i + 1], …: one vector of a contiguous axis."""
    def codegen(context, builder, sig, args):
        place = _place(context, builder, x, args[0], args[1])
        return builder.load(place, align=x.dtype.bitwidth // 8, typ=_ir(sig.return_type))
    return Vector(x.dtype)(x, types.intp), codegen


@intrinsic
def load_part(typingctx, x, i, n):
    """The first n lanes of load(x, i), zeros behind; reads nothing else."""
    def codegen(context, builder, sig, args):
        vector = sig.return_type
        place = _place(context, builder, x, args[0], args[1])
        align = ir.Constant(ir.IntType(32), x.dtype.bitwidth // 8)
        return _call(builder, f"llvm.masked.load.{_suffix(vector)}.p0", _ir(vector),
                     [place, align, _first(builder, vector, args[2]), _constant(_ir(vector), 0.0)])
    return Vector(x.dtype)(x, types.intp, types.intp), codegen


@intrinsic
def prefetch(typingctx, x, i):
    """Fetch the cache line of x[i], which may lie outside x. A loop that only reads memory runs at
    43 GB/s with it and at 30 without (Zen 4); one that also writes has the hardware's."""
    def codegen(context, builder, sig, args):
        i32 = ir.IntType(32)                      # a read, to be used soon, of data
        _call(builder, "llvm.prefetch.p0", ir.VoidType(),
              [_place(context, builder, x, args[0], args[1]), i32(0), i32(2), i32(1)])
        return context.get_dummy_value()
    return types.void(x, types.intp), codegen


def _storing(name, **metadata):
    @intrinsic
    def f(typingctx, y, i, v):
        def codegen(context, builder, sig, args):
            place = _place(context, builder, y, args[0], args[1])
            place = builder.bitcast(place, _ir(v).as_pointer())
            made = builder.store(args[2], place,
                                 align=VECTOR if metadata else y.dtype.bitwidth // 8)
            for key, value in metadata.items():
                made.set_metadata(key, builder.module.add_metadata([ir.IntType(32)(value)]))
            return context.get_dummy_value()
        return types.void(y, types.intp, v), codegen
    f.__name__ = name
    return f


store = _storing("store")                         # y[i], y[i + 1], … = v
stream = _storing("stream", nontemporal=1)        # the same past the caches; y + i is aligned


@intrinsic
def store_part(typingctx, y, i, v, n):
    """The first n lanes of store(y, i, v); writes nothing else."""
    def codegen(context, builder, sig, args):
        place = _place(context, builder, y, args[0], args[1])
        align = ir.Constant(ir.IntType(32), y.dtype.bitwidth // 8)
        _call(builder, f"llvm.masked.store.{_suffix(v)}.p0", ir.VoidType(),
              [args[2], place, align, _first(builder, v, args[3])])
        return context.get_dummy_value()
    return types.void(y, types.intp, v, types.intp), codegen


@intrinsic
def splat(typingctx, s):
    """The scalar s in every lane."""
    def codegen(context, builder, sig, args):
        vector, i32 = _ir(sig.return_type), ir.IntType(32)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[0], i32(0))
        return builder.shuffle_vector(one, one,
                                      ir.Constant(ir.VectorType(i32, vector.count), None))
    return Vector(s)(s), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a b + c, rounded once."""
    def codegen(context, builder, sig, args):
        return _call(builder, f"llvm.fma.{_suffix(a)}", args[0].type, args)
    return a(a, a, a), codegen


@intrinsic
def absolute(typingctx, a):
    """|a|."""
    def codegen(context, builder, sig, args):
        return _call(builder, f"llvm.fabs.{_suffix(a)}", args[0].type, args)
    return a(a), codegen


@intrinsic
def greater(typingctx, a, b):
    """a > b in each lane; false for NaN."""
    def codegen(context, builder, sig, args):
        return builder.fcmp_ordered(">", *args)
    return Vector(a.real, True)(a, b), codegen


@intrinsic
def where(typingctx, mask, a, b):
    """a where the mask is true, else b."""
    def codegen(context, builder, sig, args):
        return builder.select(*args)
    return a(mask, a, b), codegen


@intrinsic
def maximum(typingctx, a, b):
    """The larger of a and b; NaN where either is."""
    def codegen(context, builder, sig, args):
        x, y = args
        larger = builder.select(builder.fcmp_ordered(">", x, y), x, y)
        return builder.select(builder.fcmp_unordered("uno", x, x), x, larger)
    return a(a, b), codegen


@intrinsic
def total(typingctx, a):
    """The sum of the lanes, halves first: the same order on every machine of this width."""
    def codegen(context, builder, sig, args):
        v, n, i32 = args[0], a.lanes, ir.IntType(32)
        while n > 1:
            n //= 2
            halves = [ir.Constant(ir.VectorType(i32, n), list(range(at, at + n))) for at in (0, n)]
            v = builder.fadd(*(builder.shuffle_vector(v, v, half) for half in halves))
        return builder.extract_element(v, i32(0))
    return a.real(a), codegen


if config.DISABLE_JIT:                            # the same in NumPy
    def _lanes(x):
        return VECTOR // x.itemsize

    def load(x, i):
        return x[i:i + lanes(x)].copy()

    def load_part(x, i, n):
        v = np.zeros(lanes(x), x.dtype)
        v[:n] = x[i:i + n]
        return v

    def store_part(y, i, v, n):
        y[i:i + n] = v[:n]

    def store(y, i, v):
        y[i:i + v.size] = v

    stream = store

    def pointer(x):
        return x

    def prefetch(x, i):
        pass

    def splat(s):
        return np.full(lanes(s), s)

    def fma(a, b, c):
        return (a.astype(np.longdouble) * b + c).astype(a.dtype)

    absolute, greater, maximum, where = np.abs, np.greater, np.maximum, np.where

    def total(a):
        while a.size > 1:
            a = a[:a.size // 2] + a[a.size // 2:]
        return a[0]
