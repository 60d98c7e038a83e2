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
from numba.extending import intrinsic, lower_builtin, overload, register_model

from ..polynomials import POLICY, _llvm, device, select

__all__ = ["PAST_BYTES", "VECTOR", "absolute", "after", "far", "fill", "fma", "greater", "high",
           "keep", "lanes", "largest", "load", "load_or", "load_part", "low", "maximum", "narrow",
           "number", "peak", "places", "pointer", "points", "prefetch", "put", "splat", "store",
           "store_part", "store_places", "stream", "total", "where"]

PAST_BYTES = 1 << 24       # results above, half of a usual last-level cache, are written past it
# Arrays of more together are asked for ahead where loops have many streams. (One core of Zen 5,
# depthwise convolutions of 8 images: 128 channels of 56×56, 26 MB, 743 us so and 1527 without; 512
# of 14×14, 6 MB, 232 and 205.)
FAR_BYTES = 1 << 23
VECTOR = 64 if binding.get_host_cpu_features().get("avx512f") else 32


def far(x, y):
    """Whether two arrays are more than a cache has at hand."""
    return x.nbytes + y.nbytes > FAR_BYTES


class Vector(types.Type):
    """So many values of ``real``; or, for each of such, a truth value ("mask") or a position."""

    def __init__(self, real, kind="value"):
        self.real, self.kind = real, kind
        self.lanes = VECTOR * 8 // real.bitwidth
        super().__init__(name=f"Vector({real}, {self.lanes}, {kind})")


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _ir(fe_type))


def _ir(vector):
    bits = vector.real.bitwidth
    lane = {"value": {32: ir.FloatType(), 64: ir.DoubleType()}[bits], "mask": ir.IntType(1),
            "place": ir.IntType(bits)}[vector.kind]
    return ir.VectorType(lane, vector.lanes)


def _every(builder, vector, s):
    """The scalar s in every lane of an LLVM vector."""
    i32 = ir.IntType(32)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), s, i32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, vector.count), None))


def _values(args):
    """The vector type of operands that are such vectors or scalars of its dtype, else None."""
    found = [a for a in args if isinstance(a, Vector)]
    if not found or any(a != found[0] and a != found[0].real for a in args):
        return None
    return found[0]


def _wide(builder, vector, args):
    return [a if isinstance(a.type, ir.VectorType) else _every(builder, _ir(vector), a)
            for a in args]


def _operator(f, emit, takes, gives, count):
    """The operator f on vectors of the kind ``takes``, or on such and scalars."""
    @infer_global(f)
    class _(AbstractTemplate):
        def generic(self, args, kws):
            vector = _values(args)
            if len(args) != count or vector is None or vector.kind != takes:
                return None
            return signature(Vector(vector.real, gives), *args)

    def lower(context, builder, sig, args):
        return emit(builder, *_wide(builder, _values(sig.args), args))

    kinds = [(Vector, Vector), (Vector, types.Float), (types.Float, Vector)]
    for k in kinds if count == 2 else [(Vector,)]:
        lower_builtin(f, *k)(lower)


for _f, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                  (operator.truediv, "fdiv")):
    _operator(_f, lambda builder, a, b, name=_name: getattr(builder, name)(
        a, b, flags=("contract",)), "value", "value", 2)
_operator(operator.neg, lambda builder, a: builder.fneg(a), "value", "value", 1)
_operator(abs, lambda builder, a: _llvm(builder, "fabs", a), "value", "value", 1)
for _f, _name in ((operator.gt, ">"), (operator.lt, "<")):
    _operator(_f, lambda builder, a, b, name=_name: builder.fcmp_ordered(name, a, b),
              "value", "mask", 2)
_operator(operator.ne, lambda builder, a, b: builder.fcmp_unordered("!=", a, b),
          "value", "mask", 2)
_operator(operator.or_, lambda builder, a, b: builder.or_(a, b), "mask", "mask", 2)


@overload(select, inline="never", jit_options=POLICY)
def _select(mask, a, b):
    if isinstance(mask, Vector):
        return lambda mask, a, b: where(mask, a, b)
    return None


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
def keep(typingctx, x):
    """Nothing. An array made in a kernel is freed after its last mention, and a pointer to it is
    none: mention it once more behind the last use of the pointer."""
    def codegen(context, builder, sig, args):
        return context.get_dummy_value()
    return types.void(x), codegen


@intrinsic
def pointer(typingctx, x):
    """Where x begins, for load, store and prefetch: functions that take arrays compile slower."""
    def codegen(context, builder, sig, args):
        return context.make_array(x)(context, builder, args[0]).data
    return types.CPointer(x.dtype)(x), codegen


@intrinsic
def after(typingctx, p, n):
    """The pointer n values behind p."""
    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])
    return p(p, types.intp), codegen


def _first(builder, vector, n):
    """Mask of the first n lanes."""
    i32 = ir.IntType(32)
    count = ir.VectorType(i32, vector.lanes)
    every = _every(builder, count, builder.trunc(n, i32))
    return builder.icmp_signed("<", ir.Constant(count, list(range(vector.lanes))), every)


def lanes(x):
    """Values of an array's dtype in one vector."""
    return VECTOR // x.itemsize


@overload(lanes, jit_options=POLICY)
def _lanes(x):
    """A constant: x.itemsize is read from the array and makes each n // lanes(x) a division."""
    n = VECTOR * 8 // x.dtype.bitwidth
    return lambda x: n


@intrinsic
def load(typingctx, x, i):
    """x[i], x[i + 1], …: one vector of a contiguous axis."""
    def codegen(context, builder, sig, args):
        place = _place(context, builder, x, args[0], args[1])
        return builder.load(place, align=x.dtype.bitwidth // 8, typ=_ir(sig.return_type))
    return Vector(x.dtype)(x, types.intp), codegen


def _masked_load(context, builder, sig, x, i, n, rest):
    vector = sig.return_type
    align = ir.Constant(ir.IntType(32), vector.real.bitwidth // 8)
    return _call(builder, f"llvm.masked.load.{_suffix(vector)}.p0", _ir(vector),
                 [_place(context, builder, sig.args[0], x, i), align, _first(builder, vector, n),
                  rest])


@intrinsic
def load_part(typingctx, x, i, n):
    """The first n lanes of load(x, i), zeros behind; reads nothing else. n may be below 0 (none) or
    above the number of lanes (all)."""
    def codegen(context, builder, sig, args):
        zero = _constant(_ir(sig.return_type), 0.0)
        return _masked_load(context, builder, sig, *args, zero)
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


@intrinsic
def load_or(typingctx, x, i, n, rest):
    """The first n lanes of load(x, i), those of ``rest`` behind; reads nothing else."""
    def codegen(context, builder, sig, args):
        return _masked_load(context, builder, sig, *args)
    return rest(x, types.intp, types.intp, rest), codegen


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


@device
def put(y, i, v, past):
    """store, or stream where ``past``: y is larger than PAST_BYTES and i is a vector's place."""
    if past:
        stream(y, i, v)
    else:
        store(y, i, v)


@intrinsic
def store_part(typingctx, y, i, v, n):
    """The first n lanes of store(y, i, v); writes nothing else. n as for load_part."""
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
        return _every(builder, _ir(sig.return_type), args[0])
    return Vector(s)(s), codegen


@intrinsic
def fill(typingctx, x, s):
    """The number s in every lane of a vector of x's dtype; x is an array or a pointer."""
    def codegen(context, builder, sig, args):
        number = context.cast(builder, args[1], s, x.dtype)
        return _every(builder, _ir(sig.return_type), number)
    return Vector(x.dtype)(x, s), codegen


@intrinsic
def number(typingctx, x, s):
    """The number s in x's dtype; x is an array or a pointer."""
    def codegen(context, builder, sig, args):
        return context.cast(builder, args[1], s, x.dtype)
    return x.dtype(x, s), codegen


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
    return Vector(a.real, "mask")(a, b), codegen


@intrinsic
def where(typingctx, mask, a, b):
    """a where the mask is true, else b; one of them may be a scalar."""
    vector = a if isinstance(a, Vector) else b
    def codegen(context, builder, sig, args):
        return builder.select(args[0], *_wide(builder, vector, args[1:]))
    return vector(mask, a, b), codegen


@intrinsic
def maximum(typingctx, a, b):
    """The larger of a and b; NaN where either is."""
    def codegen(context, builder, sig, args):
        return _larger(builder, *args)
    return a(a, b), codegen


def _fold(name, doc, emit):
    @intrinsic
    def f(typingctx, a):
        def codegen(context, builder, sig, args):
            v, n, i32 = args[0], a.lanes, ir.IntType(32)
            while n > 1:
                n //= 2
                first = ir.Constant(ir.VectorType(i32, n), list(range(n)))
                last = ir.Constant(ir.VectorType(i32, n), list(range(n, 2 * n)))
                v = emit(builder, *(builder.shuffle_vector(v, v, half) for half in (first, last)))
            return builder.extract_element(v, i32(0))
        return a.real(a), codegen
    f.__name__, f.__doc__ = name, doc
    return f


total = _fold("total", "The sum of the lanes, halves first: one order for each width.",
              lambda builder, a, b: builder.fadd(a, b))
peak = _fold("peak", "The largest lane; one of them where a lane is NaN.",
             lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


def _larger(builder, x, y):
    larger = builder.select(builder.fcmp_ordered(">", x, y), x, y)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, larger)


largest = _fold("largest", "The largest lane; NaN if there is one.", _larger)


def _half(name, doc, upper):
    """One half of a float32 vector as float64; of a float64 vector, all and nothing."""
    @intrinsic
    def f(typingctx, a):
        double, i32 = Vector(types.float64), ir.IntType(32)

        def codegen(context, builder, sig, args):
            if a == double:
                return _constant(_ir(double), 0.0) if upper else args[0]
            n = double.lanes
            lanes = ir.Constant(ir.VectorType(i32, n), list(range(n * upper, n * upper + n)))
            return builder.fpext(builder.shuffle_vector(args[0], args[0], lanes), _ir(double))
        return double(a), codegen
    f.__name__, f.__doc__ = name, doc
    return f


low = _half("low", "The first half of the lanes in float64; a float64 vector itself.", False)
high = _half("high", "The second half of the lanes in float64; zeros of float64.", True)


@intrinsic
def narrow(typingctx, a, b, y):
    """low(v) and high(v) back as a vector of y's dtype."""
    def codegen(context, builder, sig, args):
        if y.dtype == types.float64:
            return args[0]
        i32 = ir.IntType(32)
        every = ir.Constant(ir.VectorType(i32, 2 * a.lanes), list(range(2 * a.lanes)))
        both = builder.shuffle_vector(args[0], args[1], every)
        return builder.fptrunc(both, _ir(sig.return_type))
    return Vector(y.dtype)(a, b, y), codegen


@intrinsic
def places(typingctx, x, n):
    """The integer n for each lane of a vector of x's dtype."""
    def codegen(context, builder, sig, args):
        vector = _ir(sig.return_type)
        return _every(builder, vector, builder.trunc(args[1], vector.element)
                      if vector.element.width < 64 else args[1])
    return Vector(x.dtype, "place")(x, types.intp), codegen


@intrinsic
def points(typingctx, x, indices, i, n, here):
    """Mask, for vectors of x's dtype, of the n int64 from indices[i] on that are ``here``; what
    lanes behind them say is left open."""
    def codegen(context, builder, sig, args):
        _, indices_, i_, n_, here_ = args
        i64, vector = ir.IntType(64), sig.return_type
        wide = ir.VectorType(i64, vector.lanes)
        found = _call(builder, f"llvm.masked.load.v{vector.lanes}i64.p0", wide,
                      [_place(context, builder, indices, indices_, i_),
                       ir.Constant(ir.IntType(32), 8), _first(builder, vector, n_),
                       ir.Constant(wide, [0] * vector.lanes)])
        return builder.icmp_signed("==", found, _every(builder, wide, here_))
    return Vector(x.dtype, "mask")(x, indices, types.intp, types.intp, types.intp), codegen


@intrinsic
def store_places(typingctx, y, i, v, n):
    """The first n lanes of v as int64 in y[i], y[i + 1], …."""
    def codegen(context, builder, sig, args):
        wide = ir.VectorType(ir.IntType(64), v.lanes)
        value = args[2] if v.real.bitwidth == 64 else builder.sext(args[2], wide)
        _call(builder, f"llvm.masked.store.v{v.lanes}i64.p0", ir.VoidType(),
              [value, _place(context, builder, y, args[0], args[1]),
               ir.Constant(ir.IntType(32), 8), _first(builder, v, args[3])])
        return context.get_dummy_value()
    return types.void(y, types.intp, v, types.intp), codegen


if config.DISABLE_JIT:                            # the same in NumPy
    def keep(x):
        pass

    def load(x, i):
        return x.reshape(-1)[i:i + lanes(x)].copy()

    def load_part(x, i, n):
        v, n = np.zeros(lanes(x), x.dtype), min(max(n, 0), lanes(x))
        v[:n] = x.reshape(-1)[i:i + n]
        return v

    def load_or(x, i, n, rest):
        return np.concatenate([x.reshape(-1)[i:i + n], rest[n:]])

    def store_part(y, i, v, n):
        n = min(max(n, 0), v.size)
        y.reshape(-1)[i:i + n] = v[:n]

    def store(y, i, v):
        y.reshape(-1)[i:i + v.size] = v

    store_places = store_part

    stream = store

    def pointer(x):
        return x.reshape(-1)

    def after(p, n):
        return p[n:]

    def fill(x, s):
        return np.full(lanes(x), s, x.dtype)

    def number(x, s):
        return x.dtype.type(s)

    def points(x, indices, i, n, here):
        mask = np.zeros(lanes(x), bool)
        mask[:n] = indices.reshape(-1)[i:i + n] == here
        return mask

    def prefetch(x, i):
        pass

    def splat(s):
        return np.full(lanes(s), s)

    def fma(a, b, c):
        return (a.astype(np.longdouble) * b + c).astype(a.dtype)

    absolute, greater, maximum, where = np.abs, np.greater, np.maximum, np.where

    def _halves(f):
        def fold(a):
            while a.size > 1:
                a = f(a[:a.size // 2], a[a.size // 2:])
            return a[0]
        return fold

    largest = _halves(np.maximum)
    total, peak = _halves(np.add), _halves(lambda a, b: np.where(a > b, a, b))

    def low(a):
        return a if a.dtype == np.float64 else a[:a.size // 2].astype(np.float64)

    def high(a):
        return a * 0 if a.dtype == np.float64 else a[a.size // 2:].astype(np.float64)

    def narrow(a, b, y):
        return a if y.dtype == np.float64 else np.concatenate([a, b]).astype(y.dtype)

    def places(x, n):
        return np.full(lanes(x), n)
