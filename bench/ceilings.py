"""What this machine can do at best: bytes copied and multiply-adds per second, as two kernels."""

import numpy as np
from nbgrad.kernels.cpu import memory, simd
from nbgrad.kernels.cpu.jit import device, kernel, prange

__all__ = ["copy", "fma"]

CHAINS = 12            # 8 hide a latency of 4 cycles at 2 operations a cycle
PIECES = 32            # for any number of threads


@device
def _stream(x, y, start, stop):
    for i in range(start, stop, simd.lanes(x)):
        simd.stream(y, i, simd.load(x, i))


@kernel
def _copy(x, y):
    """y = x past the caches: a store that first reads its line would move half as much again."""
    block = 1 << 14
    for b in prange(x.size // block):
        _stream(x, y, b * block, (b + 1) * block)


@device
def _chains(x, rounds):
    """Twelve independent chains v = v a + b."""
    a, b = simd.load(x, 0), simd.load(x, 0)
    v0, v1, v2, v3, v4, v5 = a, a, a, a, a, a
    v6, v7, v8, v9, v10, v11 = a, a, a, a, a, a
    for _ in range(rounds):
        v0, v1, v2 = simd.fma(v0, a, b), simd.fma(v1, a, b), simd.fma(v2, a, b)
        v3, v4, v5 = simd.fma(v3, a, b), simd.fma(v4, a, b), simd.fma(v5, a, b)
        v6, v7, v8 = simd.fma(v6, a, b), simd.fma(v7, a, b), simd.fma(v8, a, b)
        v9, v10, v11 = simd.fma(v9, a, b), simd.fma(v10, a, b), simd.fma(v11, a, b)
    total = v0 + v1 + v2 + v3 + v4 + v5
    return simd.total(total + v6 + v7 + v8 + v9 + v10 + v11)


@kernel
def _fma(x, rounds, out):
    for p in prange(out.size):
        out[p] = _chains(x, rounds)


def copy(nbytes):
    """A call that copies so many bytes."""
    x, y = (memory.empty((nbytes // 4,), np.float32) for _ in range(2))
    x[:], y[:] = 1, 0

    def run():
        _copy(x, y, work=2 * nbytes)
        return y
    return run


def fma(dtype, flops):
    """A call that does so many additions and multiplications."""
    x, out = np.full(16, 0.5, dtype), np.zeros(PIECES, dtype)
    rounds = flops // (PIECES * CHAINS * 2 * (simd.VECTOR // x.itemsize))

    def run():
        _fma(x, rounds, out, work=1 << 30)
        return out
    return run
