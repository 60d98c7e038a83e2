"""The vector layer against NumPy, at every length of the last part."""

import numpy as np
import pytest
from nbgrad.kernels.cpu import simd
from nbgrad.kernels.cpu.jit import kernel
from nbgrad.kernels.cpu.memory import empty


@kernel
def _compute(a, b, y, sums):
    """y = |a b + a| where a > b, else max(a, b); sums of a, vector by vector."""
    W = simd.lanes(a)
    n = a.size // W * W
    acc = simd.splat(a.dtype.type(0))
    for i in range(0, n, W):
        p, q = simd.load(a, i), simd.load(b, i)
        simd.store(y, i, simd.where(simd.greater(p, q), simd.absolute(simd.fma(p, q, p)),
                                    simd.maximum(p, q)))
        acc = acc + p
    p, q = simd.load_part(a, n, a.size - n), simd.load_part(b, n, a.size - n)
    simd.store_part(y, n, p / (q * q) - p, a.size - n)
    sums[0] = simd.total(acc)
    sums[1] = simd.total(p)


@kernel
def _stream(a, y):
    p = simd.pointer(a)
    for i in range(0, a.size, simd.lanes(a)):
        simd.prefetch(p, i + 1024)                     # also behind the end
        simd.stream(simd.pointer(y), i, simd.load(p, i))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 16, 17, 31, 37])
def test_computes_what_numpy_does(dtype, n):
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((2, n)).astype(dtype)
    if n > 2:
        a[0], b[1] = np.nan, np.nan
    room = np.full(n + 40, 7, dtype)
    sums = np.zeros(2, dtype)
    _compute(a, b, room[:n], sums)
    m = n // simd.lanes(a) * simd.lanes(a)
    with np.errstate(invalid="ignore"):
        expected = np.where(a > b, np.abs(a * b + a), np.maximum(a, b))
    expected[m:] = a[m:] / (b[m:] * b[m:]) - a[m:]
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(room[:n], expected, rtol=4 * eps, atol=eps)   # fma rounds once
    assert (room[n:] == 7).all()
    np.testing.assert_allclose(sums, [a[:m].sum(), a[m:].sum()], rtol=16 * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_streams(dtype):
    a = np.arange(1 << 15, dtype=dtype)         # from the pool, which aligns
    y = empty(a.shape, a.dtype)
    _stream(a, y)
    np.testing.assert_array_equal(y, a)


@kernel
def _search(a, indices, y, found):
    """found: the largest lane of each vector; y: 3 where the index is 7, else −2."""
    x = simd.pointer(a)
    for i in range(0, a.size, simd.lanes(a)):
        m = min(simd.lanes(a), a.size - i)
        found[i // simd.lanes(a)] = simd.largest(simd.load_or(x, i, m, simd.fill(x, -np.inf)))
        mask = simd.points(x, indices, i, m, 7)
        three = simd.splat(simd.number(x, 3))
        simd.store_part(y, i, simd.where(mask, three, simd.fill(a, -2.0)), m)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 8, 15, 37])
def test_fills_points_and_finds_the_largest(dtype, n):
    rng = np.random.default_rng(n)
    a, indices = rng.standard_normal(n).astype(dtype), rng.integers(6, 9, n)
    indices[-1] = (1 << 32) + 7                  # all 64 bits count
    a[-1] = np.nan
    y, W = np.zeros(n, dtype), simd.lanes(a)
    found = np.zeros(-(-n // W), dtype)
    _search(a, indices, y, found)
    np.testing.assert_array_equal(y, np.where(indices == 7, 3, -2))
    np.testing.assert_array_equal(found, [a[i:i + W].max() for i in range(0, n, W)])
