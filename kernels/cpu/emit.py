"""What intrinsics are written with: a builder of LLVM code with the vectors of one dtype."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .simd import VECTOR

__all__ = ["I32", "I64", "Code", "place"]

I32, I64 = ir.IntType(32), ir.IntType(64)


class Code:
    """A builder with the vectors of one dtype, of so many bytes."""

    def __init__(self, builder, real, width=VECTOR):
        self.builder, self.real = builder, real
        self.size = 4 if isinstance(real, ir.FloatType) else 8
        self.lanes = width // self.size
        self.vector = ir.VectorType(real, self.lanes)
        self.zero = ir.Constant(self.vector, [0.0] * self.lanes)
        self.suffix = f"v{self.lanes}f{8 * self.size}"

    def call(self, name, result, args):
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name),
                                 args)

    def at(self, pointer, offset):
        """pointer + offset values; a number is counted in vectors."""
        offset = I64(offset * self.lanes) if isinstance(offset, int) else offset
        return self.builder.gep(pointer, [offset], source_etype=self.real)

    def bytes(self, pointer, offset):
        """pointer + offset bytes."""
        return self.builder.gep(pointer, [offset], source_etype=ir.IntType(8))

    def load(self, pointer, mask=None, rest=None):
        """The vector there; where there is a mask, elsewhere ``rest`` or zeros, and no memory."""
        if mask is None:
            return self.builder.load(pointer, align=self.size, typ=self.vector)
        return self.call(f"llvm.masked.load.{self.suffix}.p0", self.vector,
                         [pointer, ir.Constant(I32, self.size), mask, rest or self.zero])

    def store(self, value, pointer, mask=None):
        if mask is None:
            pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
            self.builder.store(value, pointer, align=self.size)
        else:
            self.call(f"llvm.masked.store.{self.suffix}.p0", ir.VoidType(),
                      [value, pointer, ir.Constant(I32, self.size), mask])

    def prefetch(self, pointer, write, level=2):
        """Fetch the cache line there, which may lie outside of all arrays, to an L2, or an L1. A
        line that is asked for several times is to go to an L1: only there they are one request."""
        self.call("llvm.prefetch.p0", ir.VoidType(),
                  [pointer, I32(int(write)), I32(4 - level), I32(1)])

    def hidden(self, value):
        """An integer or a pointer of which LLVM knows nothing: in a loop it is not taken apart."""
        kind = ir.FunctionType(value.type, [value.type])
        return self.builder.call(ir.InlineAsm(kind, "", "=r,0"), [value])

    def splat(self, scalar):
        """A scalar in every lane of a vector."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.builder.shuffle_vector(one, one,
                                           ir.Constant(ir.VectorType(I32, self.lanes), None))

    def first(self, n):
        """Mask of the first n lanes."""
        every = self.splat(self.builder.trunc(n, I32))
        counts = ir.Constant(every.type, list(range(self.lanes)))
        return self.builder.icmp_signed("<", counts, every)

    def fma(self, a, b, c):
        return self.call(f"llvm.fma.{self.suffix}", self.vector, [a, b, c])

    def loop(self, count, steps, sums, body):
        """``body(pointers, sums)`` → sums, count ≥ 1 times; steps: (pointer, values per step)."""
        b, before = self.builder, self.builder.block
        block, after = b.append_basic_block("k"), b.append_basic_block("sums")
        b.branch(block)
        b.position_at_end(block)
        k = b.phi(I64)
        olds = [b.phi(start.type) for start in [p for p, _ in steps] + sums]
        pointers, now = olds[:len(steps)], olds[len(steps):]
        news = [b.gep(p, [step], source_etype=self.real)
                for p, (_, step) in zip(pointers, steps)] + body(pointers, now)
        left = b.sub(k, I64(1))
        b.cbranch(b.icmp_signed(">", left, I64(0)), block, after)
        for old, start, new in zip([k, *olds], [count, *[p for p, _ in steps], *sums],
                                   [left, *news]):
            old.add_incoming(start, before)
            old.add_incoming(new, block)
        b.position_at_end(after)
        return news[len(steps):]

    def some(self, count, steps, sums, body):
        """``loop`` where the count may be 0."""
        b, before = self.builder, self.builder.block
        some, rest = b.append_basic_block("some"), b.append_basic_block("rest")
        b.cbranch(b.icmp_signed(">", count, I64(0)), some, rest)
        b.position_at_end(some)
        news = self.loop(count, steps, sums, body)
        behind = b.block
        b.branch(rest)
        b.position_at_end(rest)
        merged = [b.phi(new.type) for new in news]
        for phi, old, new in zip(merged, sums, news):
            phi.add_incoming(old, before)
            phi.add_incoming(new, behind)
        return merged


def place(context, builder, array_type, array, at):
    """Where array[at] stands; of a pointer likewise."""
    if not isinstance(array_type, types.CPointer):
        array = context.make_array(array_type)(context, builder, array).data
    return builder.gep(array, [at])
