"""Dropout in one pass, with the numbers that NumPy's generator draws for the CPU (cpu/random.py):
a thread jumps to where it stands in the stream, then on by a block's width at once."""

import math

import numpy as np

from ..cpu.random import MULTIPLIER, limit_of, stream
from ..quiet import quiet
from .intrinsics import cuda, device, multiply_add
from .launch import Kernel, factory
from .memory import SIMULATED, device_of, empty, to_device, xp

__all__ = ["dropout"]

THREADS = 256 if not SIMULATED else 32
DRAWS = 16                   # of 64 bits, for two elements each, of a thread
WORD = (1 << 64) - 1


@device
def _jump(state, m, c, n):
    """The state after n steps s ← s m + c."""
    zero = (np.uint64(0), np.uint64(0))
    by, plus = (np.uint64(0), np.uint64(1)), zero
    while n > 0:
        if n & 1:
            by, plus = multiply_add(by, m, zero), multiply_add(plus, m, c)
        c = multiply_add(m, c, c)
        m = multiply_add(m, m, zero)
        n >>= 1
    return multiply_add(state, by, plus)


@device
def _put(x, i, bits, limit, scale, zero, y, kept):
    keep = bits >> np.uint64(8) >= limit
    v = x[i]
    y[i] = v * scale if keep else zero
    kept[i] = scale if keep else zero


@factory
def _dropout(dtype):
    """words: the state, its multiplier and increment, and those of THREADS steps at once."""
    kind, zero = dtype.str[1:], dtype.type(0)

    def body(x, y, kept, n, first, left, limit, scale, s0, s1, m0, m1, c0, c1, w0, w1, d0, d1):
        draws = (n - first + 1) // 2
        k = cuda.blockIdx.x * (THREADS * DRAWS) + cuda.threadIdx.x
        if first and k == 0:
            _put(x, 0, np.uint64(left), np.uint64(limit), scale, zero, y, kept)
        s = _jump((s0, s1), (m0, m1), (c0, c1), k + 1)
        for _ in range(DRAWS):
            if k < draws:
                v, r = s[0] ^ s[1], s[0] >> np.uint64(58)
                v = (v >> r) | (v << ((np.uint64(64) - r) & np.uint64(63)))
                i = first + 2 * k
                _put(x, i, v & np.uint64(0xFFFFFFFF), np.uint64(limit), scale, zero, y, kept)
                if i + 1 < n:
                    _put(x, i + 1, v >> np.uint64(32), np.uint64(limit), scale, zero, y, kept)
            s = multiply_add(s, (w0, w1), (d0, d1))
            k += THREADS
    return Kernel(body, f"*{kind} *{kind} *{kind} i8 i8 u8 u8 {kind}" + " u8" * 10,
                  threads=THREADS, name=f"dropout_{kind}")


def every():
    """The kernels of float32 and float64, for those who compile them ahead."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        yield _dropout(dtype)


def _stride(increment):
    """Multiplier and increment of THREADS steps, as words."""
    m, c = 1, 0
    for _ in range(THREADS):
        m, c = m * MULTIPLIER % 2**128, (c * MULTIPLIER + increment) % 2**128
    return [np.uint64(w) for n in (m, c) for w in (n >> 64, n & WORD)]


def _drawn_by_numpy(x, rng, p, scale):
    keep = to_device((rng.random(x.shape, np.float32) >= p).astype(x.dtype), device_of(x))
    return xp.where(keep > 0, x * scale, keep), keep * scale


@quiet
def dropout(x, rng, p):
    """y = x / (1 − p) where rng.random(x.shape, float32) ≥ p, else 0; and what y / x is."""
    bits, scale = rng.bit_generator, x.dtype.type(0 if p == 1 else 1 / (1 - p))
    if type(bits) is not np.random.PCG64:
        return _drawn_by_numpy(x, rng, p, scale)
    x = xp.ascontiguousarray(x)
    y, kept = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
    if not x.size:
        return y, kept
    with stream(bits, x.size) as (words, first, left):
        draws = max(1, math.ceil((x.size - first) / 2))
        _dropout(x.dtype)(-(-draws // (THREADS * DRAWS)), x, y, kept, x.size, first, left,
                          limit_of(p), scale, *words, *_stride(int(words[4]) << 64 | int(words[5])))
    return y, kept
