"""What goes into a case: the same values on every side."""

from math import prod

import numpy as np

__all__ = ["factors", "normal", "targets"]


def normal(shape, seed=0, dtype="float32"):
    """Standard normal values, C-ordered; a million of them again and again in a large array."""
    few = min(prod(shape), 1_000_003)            # a prime: neighbouring rows are not the same
    return np.resize(np.random.default_rng(seed).standard_normal(few, dtype), shape)


def factors(M, K, N, dtype, transposed):
    """a (M, K) and b (K, N); those named in ``transposed`` lie in memory as their transpose."""
    a = normal((K, M), 0, dtype).T if "a" in transposed else normal((M, K), 0, dtype)
    b = normal((N, K), 1, dtype).T if "b" in transposed else normal((K, N), 1, dtype)
    return a, b


def targets(N, C):
    """A class for each of N samples."""
    return np.random.default_rng(2).integers(0, C, N)
