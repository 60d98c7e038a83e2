"""Matrix products of every shape and layout against float64."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from nbgrad.kernels import cpu, reference
from nbgrad.kernels.cpu import jit, tiles
from nbgrad.kernels.cpu.simd import VECTOR

SIZES = [1, 2, 3, 5, 7, 8, 12, 13, 15, 16, 17, 24, 25, 31, 32, 33, 47, 61, 64, 97, 100, 130]
LAYOUTS = ["rows", "columns", "steps", "offset", "reversed"]
sizes, layouts, dtypes = (st.sampled_from(x) for x in (SIZES, LAYOUTS, [np.float32, np.float64]))


def matrix(rng, shape, dtype, layout="rows"):
    """Random values in that layout."""
    *lead, m, n = shape
    x = rng.standard_normal((*lead, n, m) if layout == "columns" else shape).astype(dtype)
    if layout == "columns":
        return x.swapaxes(-1, -2)
    if layout == "steps":
        wide = np.zeros((*lead, 2 * m, 3 * n), dtype)
        wide[..., ::2, ::3] = x
        return wide[..., ::2, ::3]
    if layout == "offset":                         # contiguous, one value behind an aligned one
        room = np.zeros(x.size + 1, dtype)
        room[1:] = x.ravel()
        return room[1:].reshape(shape)
    return x[..., ::-1, :] if layout == "reversed" else x


def check(y, a, b, bias=0.0):
    """Each y is a sum of K products, rounded K times: at most K eps Σ|a b|; by chance about √K, of
    which 4 is never met here."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    exact, scale = a @ b + bias, np.abs(a) @ np.abs(b) + np.abs(bias)
    assert y.shape == exact.shape
    bound = 4 * np.sqrt(a.shape[-1] + 1) * np.finfo(y.dtype).eps
    assert (np.abs(y - exact) <= bound * scale).all()


@settings(max_examples=100, deadline=None)
@given(M=sizes, K=sizes, N=sizes, left=layouts, right=layouts, dtype=dtypes)
def test_matmul(M, K, N, left, right, dtype):
    rng = np.random.default_rng(M + 7 * K + 31 * N)
    a, b = matrix(rng, (M, K), dtype, left), matrix(rng, (K, N), dtype, right)
    before = a.copy(), b.copy()
    y = cpu.matmul(a, b)
    assert y.dtype == dtype
    check(y, a, b)
    np.testing.assert_array_equal(a, before[0])
    np.testing.assert_array_equal(b, before[1])


# One past and one before what a pass over k, a block of rows, a packed b, a copied a and a tiny
# product are limited to; each with both operands in both layouts.
EDGES = [(1, 3000, 300), (1, 40, 9000), (9000, 40, 1), (2, 4100, 70), (70, 4100, 2), (300, 7, 300),
         (13, 2049, 33), (200, 513, 160), (193, 512, 544), (96, 1024, 550), (256, 1024, 320),
         (5, 1, 30000), (30000, 1, 5), (1500, 30, 4), (64, 64, 32), (65, 64, 32)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", EDGES)
def test_matmul_at_the_edges(shape, dtype):
    (M, K, N), rng = shape, np.random.default_rng(0)
    for left in ("rows", "columns"):
        for right in ("rows", "columns"):
            a, b = matrix(rng, (M, K), dtype, left), matrix(rng, (K, N), dtype, right)
            check(cpu.matmul(a, b), a, b)


@settings(max_examples=40, deadline=None)
@given(G=st.sampled_from([1, 2, 5, 40]), M=sizes, K=sizes, N=sizes, right=layouts, dtype=dtypes,
       kind=st.sampled_from(["both", "left", "right", "one", "spread"]))
def test_batches(G, M, K, N, right, dtype, kind):
    rng = np.random.default_rng(G + M + K + N)
    lead = {"both": [(G,), (G,)], "left": [(2, G), ()], "right": [(), (G,)], "one": [(1,), (G,)],
            "spread": [(2, 1), (1, G)]}[kind]
    a, b = matrix(rng, (*lead[0], M, K), dtype), matrix(rng, (*lead[1], K, N), dtype, right)
    check(cpu.matmul(a, b), a, b)


@pytest.mark.parametrize("layouts", [("columns", "rows"), ("columns", "columns"), ("rows", "rows")])
def test_batches_of_large_matrices(layouts):
    """a laid out anew, as heaps and with its rows apart, of several matrices and of one for all."""
    rng = np.random.default_rng(0)
    for lead in ((3,), (3,)), ((3,), (2, 1)), ((), (3,)), ((3,), ()):
        a, b = (matrix(rng, (*axes, *shape), np.float32, layout)
                for axes, shape, layout in zip(lead, ((133, 512), (512, 270)), layouts))
        check(cpu.matmul(a, b), a, b)


@settings(max_examples=100, deadline=None)
@given(M=sizes, K=sizes, N=sizes, layout=layouts, other=layouts, dtype=dtypes,
       with_bias=st.booleans(), with_dx=st.booleans())
def test_linear(M, K, N, layout, other, dtype, with_bias, with_dx):
    rng = np.random.default_rng(M + K + N)
    x, w, dy = (matrix(rng, (M, K), dtype, layout), matrix(rng, (N, K), dtype, other),
                matrix(rng, (M, N), dtype, layout))
    bias = matrix(rng, (1, 2 * N), dtype)[0, ::2] if with_bias else None
    check(cpu.linear(x, w, bias), x, w.T, bias if with_bias else 0.0)
    dx, dw, db = cpu.linear_backward(dy, x, w, input_gradient=with_dx)
    if with_dx:
        check(dx, dy, w)
    else:
        assert dx.shape == ()
        assert dx == 0
    check(dw, dy.T, x)
    check(db[None], np.ones((1, M), dtype), dy)


@pytest.mark.parametrize("shape", [(2, 3, 70), (70,), (2, 150, 70)])
def test_linear_keeps_leading_axes(shape):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(shape).astype(np.float32), matrix(rng, (90, 70), np.float32)
    y = cpu.linear(x, w)
    assert y.shape == (*shape[:-1], 90)
    check(y.reshape(-1, 90), x.reshape(-1, 70), w.T)
    dx, dw, _ = cpu.linear_backward(y, x, w, input_gradient=True)
    assert dx.shape == shape
    check(dx.reshape(-1, 70), y.reshape(-1, 90), w)
    check(dw, y.reshape(-1, 90).T, x.reshape(-1, 70))


def test_large_gradients_take_another_way():
    """A w or x that is packed into panels first."""
    rng = np.random.default_rng(0)
    x, w, dy = (matrix(rng, s, np.float32) for s in ((250, 300), (310, 300), (250, 310)))
    dx, dw, db = cpu.linear_backward(dy, x, w, input_gradient=True)
    check(dx, dy, w)
    check(dw, dy.T, x)
    check(db[None], np.ones((1, 250)), dy)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing(shape):
    M, K, N = shape
    a, b, bias = np.ones((M, K), np.float32), np.ones((K, N), np.float32), np.ones(N, np.float32)
    np.testing.assert_array_equal(cpu.matmul(a, b), np.zeros((M, N)))
    np.testing.assert_array_equal(cpu.matmul(a[None], b[None]), np.zeros((1, M, N)))
    np.testing.assert_array_equal(cpu.linear(a, b.T, bias), np.ones((M, N)))
    ours = cpu.linear_backward(np.ones((M, N), np.float32), a, b.T, input_gradient=True)
    exact = reference.linear_backward(np.ones((M, N), np.float32), a, b.T, input_gradient=True)
    for x, y in zip(ours, exact):
        assert x.shape == y.shape
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("shape", [(3, 4, 5), (70, 60, 100), (60, 784, 90), (1, 500, 300)])
def test_nan_and_inf_go_where_numpy_puts_them(shape):
    (M, K, N), rng = shape, np.random.default_rng(0)
    a, b = matrix(rng, (M, K), np.float32), matrix(rng, (K, N), np.float32)
    a[M // 2, K // 3], a[M - 1, 0], b[K - 1, N - 1] = np.nan, np.inf, -np.inf
    for right in (b, np.asfortranarray(b)):
        y, exact = cpu.matmul(a, right), reference.matmul(a.astype(np.float64), b)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(exact))
        np.testing.assert_array_equal(np.isinf(y), np.isinf(exact))


def test_read_only_and_mixed_inputs():
    rng = np.random.default_rng(0)
    a, b = matrix(rng, (70, 60), np.float32), matrix(rng, (60, 50), np.float32)
    a.flags.writeable = b.flags.writeable = False
    check(cpu.matmul(a, b), a, b)
    check(cpu.linear(a, b.T), a, b)
    check(cpu.matmul(a, b.astype(np.float64)), a, b)
    whole = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(cpu.matmul(whole, whole.T), whole @ whole.T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_do_not_change_a_bit(dtype):
    rng, threads = np.random.default_rng(0), jit.get_num_threads()
    shapes = [(60, 784, 100), (100, 61, 784), (300, 600, 310), (1, 3000, 1000), (3000, 40, 10)]

    def results():
        for M, K, N in shapes:
            a, b, w = (matrix(rng, s, dtype) for s in ((M, K), (K, N), (N, K)))
            yield from (cpu.matmul(a, b), cpu.matmul(a.T.copy().T, b), cpu.linear(a, w),
                        *cpu.linear_backward(cpu.linear(a, w), a, w, input_gradient=True))
    try:
        jit.set_num_threads(1)
        one = list(results())
    finally:
        jit.set_num_threads(threads)
    rng = np.random.default_rng(0)
    for x, y in zip(one, results()):
        np.testing.assert_array_equal(x, y)


def test_strips_of_any_size():
    """What products build on: y += a b where rows of b lie as far apart as they are long."""
    rng, W = np.random.default_rng(0), VECTOR // 2                  # two vectors at most
    for m, n, K in [(1, 1, 1), (13, W, 9), (25, W // 2 + 4, 40), (7, W // 2, 17), (30, 5, 33)]:
        a, b = matrix(rng, (m, K), np.float32), matrix(rng, (K, n), np.float32)
        y = np.ones((m, n), np.float32)
        _strip(a.ravel(), b.ravel(), y.ravel(), m, n, K)
        check(y, a, b, 1.0)


def _strip(a, b, y, m, n, K):
    from numba import njit

    @njit
    def run(a, b, y, m, n, K):
        tiles.strip(m, n, K, a, 0, K, 1, b, 0, n, y, 0, n, y, 0, n, 0, 0)
    run(a, b, y, m, n, K)


CODE = """
import numpy as np
from nbgrad.kernels import cpu
rng = np.random.default_rng(0)
for M, K, N in ((1, 300, 40), (65, 70, 50), (60, 300, 20), (200, 20, 400)):
    x, w, dy = (rng.standard_normal(s) for s in ((M, K), (N, K), (M, N)))
    for y, exact in ((cpu.linear(x, w), x @ w.T), (cpu.matmul(x, w.T.copy()), x @ w.T),
                     (cpu.linear_backward(dy, x, w, input_gradient=True)[1], dy.T @ x)):
        np.testing.assert_allclose(y, exact, rtol=1e-10, atol=1e-10)
"""


def test_without_the_jit():
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
