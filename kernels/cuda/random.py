"""Dropout in one pass, with the numbers that NumPy's generator draws for the CPU (cpu/random.py):
a thread jumps to where it stands in the stream, then on by a block's width at once. The generator
stays on the host: where it stands is in a launch's parameters, or, in a captured step, is sent
ahead of each replay, so that replays draw what eager steps would have drawn."""

import numpy as np

from ..cpu.random import MULTIPLIER, limit_of, stream
from ..quiet import quiet
from . import graphs
from .intrinsics import cuda, device, multiply_add
from .launch import Kernel, factory
from .memory import SIMULATED, device_of, empty, to_device, xp
from .vectors import picker

__all__ = ["dropout"]

THREADS = 256 if not SIMULATED else 32
DRAWS = 16                   # of 64 bits, for two elements each, of a thread
WORDS = 8                    # that say where a generator stands
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
    """m and w: multipliers of one step and of THREADS at once. words: how many of 32 bits are left
    over and that one, the state, its increment and that of THREADS steps; or ``sent`` has them."""
    kind, zero = dtype.str[1:], dtype.type(0)

    def body(x, y, kept, n, limit, scale, m0, m1, w0, w1, words, sent, captured):
        if captured:
            words = (sent[0], sent[1], sent[2], sent[3], sent[4], sent[5], sent[6], sent[7])
        over, left, s0, s1, c0, c1, d0, d1 = words
        first = np.int64(over)
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
    return Kernel(body, f"*{kind} *{kind} *{kind} i8 u8 {kind} u8 u8 u8 u8 {WORDS}xu8 *u8 i4",
                  threads=THREADS, name=f"dropout_{kind}")


@factory
def _send():
    """Numbers of the host into memory, by a launch: a copy would have to wait for its source."""
    pick = picker(WORDS)

    def body(words, sent):
        sent[cuda.threadIdx.x] = pick(cuda.threadIdx.x, words)
    return Kernel(body, f"{WORDS}xu8 *u8", threads=WORDS, name="dropout_words")


def every():
    """The kernels of float32 and float64, for those who compile them ahead."""
    yield _send()
    for dtype in map(np.dtype, (np.float32, np.float64)):
        yield _dropout(dtype)


def _split(n):
    return np.uint64(n >> 64), np.uint64(n & WORD)


STRIDE = pow(MULTIPLIER, THREADS, 1 << 128)


def _words(bits, size):
    """Where a generator stands; behind it are ``size`` numbers of 32 bits when this returns."""
    with stream(bits, size) as (words, first, left):
        increment, c = int(words[4]) << 64 | int(words[5]), 0
        for _ in range(THREADS):
            c = (c * MULTIPLIER + increment) % 2**128
        return np.uint64(first), np.uint64(left), words[0], words[1], words[4], words[5], *_split(c)


def _drawn_by_numpy(x, rng, p, scale):
    graphs.refuse("dropout by a generator other than PCG64")
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
    size, sent = x.size, None
    if graphs.state.capture is None:
        words = _words(bits, size)
    else:
        words = [0] * WORDS
        sent = graphs.ahead(lambda: empty((WORDS,), np.uint64),
                            lambda sent: _send()(1, *_words(bits, size), sent))
    blocks = -(-size // (2 * THREADS * DRAWS))
    _dropout(x.dtype)(blocks, x, y, kept, size, limit_of(p), scale, *_split(MULTIPLIER),
                      *_split(STRIDE), *words, sent, sent is not None)
    return y, kept
