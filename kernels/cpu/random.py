"""Dropout in one pass: the numbers that NumPy's generator would draw, drawn in parallel.

PCG64 is the step s ← s m + c in 128 bits, of which n at once are s ← s mⁿ + (1 + m + … + mⁿ⁻¹) c,
so that each task begins where it stands in the stream. O'Neill 2014.
"""

import math
from contextlib import contextmanager

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from ..polynomials import select
from ..reference import random as reference
from .jit import device
from .memory import empty
from .tasks import share, tasks

__all__ = ["dropout"]

FEW = 1 << 11              # elements up to here: reading and writing the state costs more (8 us)
DRAWS = 1 << 13            # of 64 bits, for two elements each, in one task
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
WORD = (1 << 64) - 1


@intrinsic
def _multiply_add(typingctx, a, b, c):
    """a b + c modulo 2^128 of pairs (high, low)."""
    pair = types.UniTuple(types.uint64, 2)

    def codegen(context, builder, sig, args):
        wide, shift = ir.IntType(128), ir.Constant(ir.IntType(128), 64)
        numbers = []
        for x in args:
            high, low = (builder.zext(builder.extract_value(x, i), wide) for i in (0, 1))
            numbers.append(builder.or_(builder.shl(high, shift), low))
        s = builder.add(builder.mul(*numbers[:2]), numbers[2])
        word = ir.IntType(64)
        return context.make_tuple(builder, sig.return_type, [
            builder.trunc(builder.lshr(s, shift), word), builder.trunc(s, word)])
    return pair(pair, pair, pair), codegen


@device
def _jump(state, multiplier, increment, n):
    """The state after n steps."""
    zero = (np.uint64(0), np.uint64(0))
    m, c = (np.uint64(0), np.uint64(1)), zero
    while n > 0:
        if n & 1:
            m, c = _multiply_add(m, multiplier, zero), _multiply_add(c, multiplier, increment)
        increment = _multiply_add(multiplier, increment, increment)
        multiplier = _multiply_add(multiplier, multiplier, zero)
        n >>= 1
    return _multiply_add(state, m, c)


@device
def _put(x, i, bits, limit, scale, y, kept):
    keep, zero = (bits >> np.uint64(8)) >= limit, x.dtype.type(0)
    y[i] = select(keep, x[i] * scale, zero)        # no branch: it would be mispredicted
    kept[i] = select(keep, scale, zero)


@device
def _dropout_task(t, draws, x, words, first, limit, scale, y, kept):
    m, c = (words[2], words[3]), (words[4], words[5])
    s = _jump((words[0], words[1]), m, c, t * DRAWS)
    for k in range(t * DRAWS, min(draws, t * DRAWS + DRAWS)):
        s = _multiply_add(s, m, c)
        v, r = s[0] ^ s[1], s[0] >> np.uint64(58)
        v = (v >> r) | (v << ((np.uint64(64) - r) & np.uint64(63)))
        i = first + 2 * k
        _put(x, i, v & np.uint64(0xFFFFFFFF), limit, scale, y, kept)
        if i + 1 < x.size:
            _put(x, i + 1, v >> np.uint64(32), limit, scale, y, kept)


@tasks
def _dropout(run, x, words, first, limit, scale, y, kept):
    """From element ``first`` on; words: state, multiplier and increment, high word first."""
    draws = (x.size - first + 1) // 2
    share(_dropout_task, (draws + DRAWS - 1) // DRAWS, run,
          (draws, x, words, first, limit, scale, y, kept))


def _words(*numbers):
    return np.array([w for n in numbers for w in (n >> 64, n & WORD)], np.uint64)


def _output(s):
    """The 64 bits of a state."""
    v, r = (s >> 64) ^ (s & WORD), s >> 122
    return (v >> r | v << (64 - r)) & WORD


@contextmanager
def stream(bits, size):
    """PCG64's words (state, multiplier, increment), how many of ``size`` float32 are left over from
    the last call (0 or 1), and that one's bits; behind it the stream stands after all of them."""
    with bits.lock:
        state = bits.state
        pcg, first = state["state"], state["has_uint32"]
        yield _words(pcg["state"], MULTIPLIER, pcg["inc"]), first, state["uinteger"]
        bits.advance((size - first + 1) // 2)
        state = bits.state
        if (size - first) % 2:
            state["has_uint32"], state["uinteger"] = 1, _output(state["state"]["state"]) >> 32
        else:
            state["has_uint32"] = 0
        bits.state = state


def limit_of(p):
    """Of 24 random bits, the least that are a float32 number of at least p."""
    return math.ceil(float(np.float32(p)) * 2**24)


def dropout(x, rng, p):
    """y = x / (1 − p) where rng.random(x.shape, float32) ≥ p, else 0; and what y / x is."""
    bits = rng.bit_generator
    if config.DISABLE_JIT or x.size <= FEW or type(bits) is not np.random.PCG64:
        return reference.dropout(x, rng, p)
    x = np.ascontiguousarray(x)
    y, kept = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
    scale, limit = x.dtype.type(0 if p == 1 else 1 / (1 - p)), limit_of(p)
    with stream(bits, x.size) as (words, first, left):
        flat, out, mask = x.reshape(-1), y.reshape(-1), kept.reshape(-1)
        if first:
            mask[0] = scale if left >> 8 >= limit else 0
            out[0] = flat[0] * scale if mask[0] else 0
        _dropout(flat, words, first, np.uint64(limit), scale, out, mask, work=8 * x.nbytes)
    return y, kept
