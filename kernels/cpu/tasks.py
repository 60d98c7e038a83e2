"""Kernels whose loop is many calls of one task, compiled once for serial and parallel runs.

Numba compiles the body of a ``prange`` three times over: as the loop, with the loop's wrapper, and
into the function around it, besides the serial kernel: the weight gradient of a convolution took
5.1 s serial and 5.4 s in parallel, and takes 2.4 s for both as a task. Here the task is machine
code behind a pointer. One loop over a pointer and a number is compiled for all kernels: it is what
runs in parallel.
"""

from functools import cache, cached_property, partial

import numpy as np
from llvmlite import ir
from numba import config, prange, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from ..polynomials import POLICY
from .jit import Kernel, _Cache, _compile, cache_dir, get_num_threads
from .memory import empty
from .simd import VECTOR

__all__ = ["share", "spaces", "taken", "tasks"]

LINE = 128                 # bytes between counts: no two cores' caches share any
RANGES = 64                # of tasks, at most


@intrinsic
def _call(typingctx, function, t, data):
    """function(t, data) of addresses."""
    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [i64, i64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()
    n = types.intp
    return types.void(n, n, n), codegen


def _one_more(builder, place):
    return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")


@intrinsic
def _taken(typingctx, address):
    """``taken`` for the integer there."""
    def codegen(context, builder, signature, args):
        return _one_more(builder, builder.inttoptr(args[0], ir.IntType(64).as_pointer()))
    return types.intp(types.intp), codegen


@intrinsic
def taken(typingctx, counts):
    """counts[0], which goes up by one, whoever else asks."""
    def codegen(context, builder, signature, args):
        return _one_more(builder, context.make_array(counts)(context, builder, args[0]).data)
    return types.intp(counts), codegen


def _every(function, n, data, threads, counts):
    """Each thread has a range of the tasks, so that the next kernel finds in a core's cache what
    this one left there; whoever is done helps the others. Cores are not equally fast: some are made
    so, others also run somebody else's work (products of 1024 on two busy cores: 163 GFLOP/s where
    each has its half, 198 so). ``counts`` are 0."""
    count, ranges = abs(n), min(threads, RANGES)
    for w in prange(threads):
        for other in range(w, w + ranges):
            v = other % ranges
            first, end = v * count // ranges, (v + 1) * count // ranges
            i = _taken(counts + v * LINE)
            while i < end - first:
                _call(function, first + i if n > 0 else end - 1 - i, data)
                i = _taken(counts + v * LINE)


@cache
def _loop():
    """The parallel loop's address and the number of threads, and where compiled code finds them."""
    n = types.intp
    loop = CFunc(_every, ((n,) * 5, types.void), {}, {"parallel": True, **POLICY})
    if cache_dir() is not None:
        loop._cache = _Cache(_every, "tasks._every")
    loop.compile()
    values = np.array([loop.address, get_num_threads()])
    return values, values.ctypes.data


def _driver():
    values, address = _loop()
    values[1] = get_num_threads()
    return address


def _trampoline(context, module, task, signature, data):
    """The function (t, address of ``data``) that calls the task with the values there; the last of
    them, a byte, is set where it raises."""
    i64 = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64, i64]),
                           module.get_unique_name("task"))
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    place = b.inttoptr(function.args[1], data.as_pointer())
    values = cgutils.unpack_tuple(b, b.load(b.gep(place, [i64(0), ir.IntType(32)(0)])))
    status, _ = context.call_internal_no_propagate(
        b, task.fndesc, signature, [function.args[0], *values])
    with b.if_then(status.is_error, likely=False):
        b.store(ir.IntType(8)(1), b.gep(place, [i64(0), ir.IntType(32)(1)]))
    b.ret_void()
    return function


def _lent(context, builder, kind, value):
    """An argument whose arrays belong to nobody: who counts them up and down, per task, waits for
    the line of the counts that the other threads write, too (max pool, 1 us per task of 1)."""
    if isinstance(kind, types.BaseTuple):
        items = cgutils.unpack_tuple(builder, value)
        return context.make_tuple(builder, kind, [
            _lent(context, builder, k, v) for k, v in zip(kind.types, items)])
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    return array._getvalue()


@intrinsic
def _share(typingctx, task, n, run, args):
    inner = typingctx.resolve_function_type(task, (types.intp, *args.types), {})

    def codegen(context, builder, signature, values):
        made = task.dispatcher.get_compile_result(inner)
        context.active_code_library.add_linking_library(made.library)
        i64, i8 = ir.IntType(64), ir.IntType(8)
        data = ir.LiteralStructType([values[3].type, i8])
        place = cgutils.alloca_once(builder, data)
        failed = builder.gep(place, [i64(0), ir.IntType(32)(1)])
        lent = _lent(context, builder, args, values[3])
        builder.store(lent, builder.gep(place, [i64(0), ir.IntType(32)(0)]))
        builder.store(i8(0), failed)
        function = _trampoline(context, builder.module, made, inner, data)
        at = builder.ptrtoint(place, i64)
        with builder.if_else(builder.icmp_signed("!=", values[2], i64(0))) as (then, otherwise):
            with then:
                kind = ir.FunctionType(ir.VoidType(), [i64] * 5)
                loop = builder.inttoptr(values[2], i64.as_pointer())
                address, threads = (builder.load(builder.gep(loop, [i64(i)])) for i in (0, 1))
                # of bytes: it stores a 0 of its type, which takes LLVM 6 s if that is an array
                counts = cgutils.alloca_once(builder, i8, RANGES * LINE)
                counts.align = LINE
                cgutils.memset(builder, counts, i64(RANGES * LINE), 0)
                builder.call(builder.inttoptr(address, kind.as_pointer()),
                             [builder.ptrtoint(function, i64), values[1], at, threads,
                              builder.ptrtoint(counts, i64)])
            with otherwise:
                n, zero = values[1], i64(0)
                back = builder.icmp_signed("<", n, zero)
                count = builder.select(back, builder.neg(n), n)
                with cgutils.for_range(builder, count) as loop:
                    last = builder.sub(builder.sub(count, i64(1)), loop.index)
                    builder.call(function, [builder.select(back, last, loop.index), at])
        with builder.if_then(builder.icmp_signed("!=", builder.load(failed), i8(0)), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, ("a task of a kernel failed",))
        return context.get_dummy_value()

    return types.void(task, types.intp, types.intp, args), codegen


def _share_in_python(task, n, run, args):
    for t in range(n) if n > 0 else reversed(range(-n)):
        task(t, *args)


def _taken_in_python(counts):
    counts[0] += 1
    return counts[0] - 1


if config.DISABLE_JIT:
    taken = _taken_in_python
# share(task, n, run, args): task(t, *args) for t < n, one by one or by the loop that run leads to;
# for n < 0, t < −n, each thread's last first: what it had last may still be in its core's cache
share = _share_in_python if config.DISABLE_JIT else _share


class _Parallel:
    """A compiled kernel with the loop that runs its tasks."""

    def __init__(self, compiled):
        self.compiled = compiled

    def __call__(self, *args):
        return self.compiled(_driver(), *args)

    @property
    def overloads(self):
        return self.compiled.overloads


class _Tasks(Kernel):
    """A kernel that takes what it hands to ``share`` as its first argument."""

    @cached_property
    def compiled(self):
        return _compile(self.loop, self.name, False, self.options)

    @cached_property
    def serial(self):
        return partial(self.compiled, 0)

    @cached_property
    def parallel(self):
        return _Parallel(self.compiled)


def tasks(loop, name=None):
    """Decorator: a kernel of (run, *args) that shares out its tasks; it is called with the args."""
    return _Tasks(loop, name)


def spaces(values, dtype):
    """Memory for each thread to work in: allocated by the tasks, its pages would be new to each."""
    lanes = VECTOR // dtype.itemsize
    return empty((get_num_threads(), -(-values // lanes) * lanes), dtype)
