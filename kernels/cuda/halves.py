"""Addresses of halves for Numba: float16 and bfloat16 in memory, float32 wherever they are used.

``p[i]`` of such an address is a float32, ``p[i] = v`` rounds to nearest even, and so do ``load``
and ``store`` of intrinsics.py, which alone imports this module. No kernel computes in 16 bits.
"""

import operator

from llvmlite import ir
from numba import types
from numba.cuda.extending import lower_builtin, models, register_model

from . import ptx

__all__ = ["HALVES", "HalfPointer", "narrow", "pair", "split", "widen"]

_HALF, _WORD, _SINGLE = ir.IntType(16), ir.IntType(32), ir.FloatType()


class HalfPointer(types.CPointer):
    """The address of numbers of one kind of half, which are typed as float32."""

    def __init__(self, kind):
        super().__init__(types.float32)
        self.kind, self.name = kind, f"{kind}*"

    @property
    def key(self):
        return self.kind


HALVES = {kind: HalfPointer(kind) for kind in ("f2", "bf")}


@register_model(HalfPointer)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _HALF.as_pointer())


def widen(builder, pointer, bits):
    """16 bits as a float32; exact."""
    if pointer.kind == "f2":
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), _SINGLE)
    return builder.bitcast(builder.shl(builder.zext(bits, _WORD), ir.Constant(_WORD, 16)), _SINGLE)


def narrow(builder, pointer, x):
    """A float32 in 16 bits, rounded to nearest even. bfloat16 needs compute capability 8.0."""
    if pointer.kind == "f2":
        return builder.bitcast(builder.fptrunc(x, ir.HalfType()), _HALF)
    return ptx.bf16(builder, x)


def split(builder, pointer, word):
    """The two halves of 32 bits as numbers of float32, the lower first."""
    high = builder.lshr(word, ir.Constant(_WORD, 16))
    return [widen(builder, pointer, builder.trunc(x, _HALF)) for x in (word, high)]


def pair(builder, pointer, low, high):
    """Two numbers of float32 as halves in 32 bits; see ``narrow``."""
    if pointer.kind == "f2":
        low, high = (builder.zext(narrow(builder, pointer, x), _WORD) for x in (low, high))
        return builder.or_(low, builder.shl(high, ir.Constant(_WORD, 16)))
    return ptx.bf16_pair(builder, high, low)


@lower_builtin(operator.getitem, HalfPointer, types.Integer)
def _read(context, builder, sig, args):
    return widen(builder, sig.args[0], builder.load(builder.gep(args[0], [args[1]])))


@lower_builtin(operator.setitem, HalfPointer, types.Integer, types.Any)
def _write(context, builder, sig, args):
    x = context.cast(builder, args[2], sig.args[2], types.float32)
    builder.store(narrow(builder, sig.args[0], x), builder.gep(args[0], [args[1]]))
    return context.get_dummy_value()
