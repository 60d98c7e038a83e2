"""What the fused normalization kernels promise beyond agreeing with the reference."""

import math

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference
from nbgrad.kernels.cpu import norm_plan

EPS = 1e-5
rng = np.random.default_rng(3)


def channels_last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, -1, *range(1, x.ndim - 1))


layouts = pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])


@layouts
@pytest.mark.parametrize("shape", [(64, 5), (8, 5, 7, 7), (4, 5, 16, 17)])
def test_the_mask_that_is_computed_again_is_the_forwards(layout, shape):
    """x takes few values, and β is minus γ x̂ of one of them in float64: what relu is given is zero
    up to rounding in a fifth of all places."""
    x = layout(rng.integers(0, 5, shape).astype(np.float32) + 1000)
    gamma = rng.uniform(0.5, 2, 5).astype(np.float32)
    _, mean, _, invstd = reference.batch_norm(x, gamma, None, eps=EPS)
    beta = -((1002 - mean) * invstd * gamma).astype(np.float32)
    y, mean, _, invstd = cpu.batch_norm(x, gamma, beta, eps=EPS, relu=True)
    dy = layout(rng.standard_normal(shape).astype(np.float32))
    near = cpu.batch_norm(x, gamma, beta, eps=EPS)[0][x == 1002]
    assert np.abs(near).max() < 1e-5
    again = cpu.batch_norm_backward(dy, x, gamma, mean, invstd, beta=beta, relu=True)
    kept = cpu.batch_norm_backward(dy, x, gamma, mean, invstd, beta=beta, y=y, relu=True)
    for a, b in zip(again, kept):
        np.testing.assert_array_equal(a, b)


@layouts
def test_sizes_that_run_in_blocks_and_store_past_the_caches(layout):
    """18 MB: sums of many blocks, the second pass backwards, streaming stores."""
    x, dy, r = (layout(rng.standard_normal((9, 40, 113, 112)).astype(np.float32)) for _ in range(3))
    gamma, beta = rng.standard_normal((2, 40)).astype(np.float32)
    y, mean, var, invstd = cpu.batch_norm(x, gamma, beta, r, eps=EPS, relu=True)
    want = reference.batch_norm(x, gamma, beta, r, eps=EPS, relu=True)
    for a, b in zip((y, mean, var, invstd), want):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    grads = cpu.batch_norm_backward(dy, x, gamma, mean, invstd, y=y, relu=True, residual=True)
    want = reference.batch_norm_backward(dy, x, gamma, mean, invstd, y=y, relu=True, residual=True)
    for a, b, size in zip(grads, want, (1, 300, 300, 1)):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 64, 8, 8), (300, 2, 41), (3, 5, 17), (2, 7, 16, 16),
                                   (8, 3, 4, 4), (30, 2, 32, 16), (64, 9, 25, 40)])
def test_short_planes_whose_sums_stay_in_registers(shape, dtype):
    """Tails of vectors, more planes than one accumulator takes, long ones; by several tasks or one.
    A channel of equal values gives exactly β, and one far from 0 loses no digits."""
    x, dy, r = rng.standard_normal((3, *shape)).astype(dtype)
    x[:, 0], x[:, 1] = 1e7, x[:, 1] + 1e4
    gamma, beta = rng.standard_normal((2, shape[1])).astype(dtype)
    plan = norm_plan.plan(shape[0], shape[1], x[0, 0].size, x.itemsize)
    assert norm_plan.Plan(*plan).chunk == 0               # by channels.py
    got = cpu.batch_norm(x, gamma, beta, r, eps=EPS, relu=True)
    want = reference.batch_norm(*(a.astype(np.float64) for a in (x, gamma, beta, r)), eps=EPS,
                                relu=True)
    assert_close(got, want, np.finfo(dtype).eps)
    np.testing.assert_array_equal(got[0][:, 0], np.maximum(beta[0] + r[:, 0], 0))
    y, mean, _, invstd = got
    how = {"y": y, "relu": True, "residual": True}
    got = cpu.batch_norm_backward(dy, x, gamma, mean, invstd, **how)
    want = reference.batch_norm_backward(*(a.astype(np.float64) for a in (dy, x, gamma)), mean,
                                         invstd, **how)
    assert_close(got, want, np.finfo(dtype).eps)


def assert_close(got, want, eps):
    """To 8 roundings of the largest value, or of √n for the sums over a channel's n values of size
    1, some of which cancel."""
    n = want[0].size // want[1].size
    for a, b in zip(got, want):
        size = max(np.abs(b).max(), math.sqrt(n) if b.ndim == 1 else 0)
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * eps * size)


def test_a_chunk_far_from_the_mean_so_far_loses_no_digits():
    """Statistics jump from 0 to 1e4 in the middle of a channel: the pivot is off by 1e4 there."""
    x = rng.standard_normal((2, 3, 40_000)).astype(np.float32)
    x[1] += 1e4
    for layout in (np.ascontiguousarray, channels_last):
        mean, var = cpu.batch_norm_stats(layout(x))
        want = reference.batch_norm_stats(x)
        np.testing.assert_allclose(mean, want[0], rtol=1e-7)
        np.testing.assert_allclose(var, want[1], rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_gradients_where_squares_leave_the_range_of_float32(scale):
    x = (rng.standard_normal((50, 3)) * scale).astype(np.float32)
    dy, gamma = rng.standard_normal((50, 3)).astype(np.float32), np.ones(3, np.float32)
    for relu in (False, True):
        got = cpu.batch_norm(x, gamma, None, eps=1e-60, relu=relu)
        want = reference.batch_norm(x, gamma, None, eps=1e-60, relu=relu)
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 if a is got[0] else 0)
        mean, invstd = want[1], want[3]
        got = cpu.batch_norm_backward(dy, x, gamma, mean, invstd, relu=relu)
        want = reference.batch_norm_backward(dy, x, gamma, mean, invstd, relu=relu)
        for a, b in zip(got[:3], want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_layer_norm_where_squares_leave_the_range_of_float32(scale):
    x = (rng.standard_normal((5, 70)) * scale).astype(np.float32)
    dy, gamma = rng.standard_normal((5, 70)).astype(np.float32), np.ones(70, np.float32)
    got = cpu.layer_norm(x, gamma, None, dims=1, eps=1e-60)
    want = reference.layer_norm(x, gamma, None, dims=1, eps=1e-60)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 if a is got[0] else 0)
    got = cpu.layer_norm_backward(dy, x, gamma, *want[1:], dims=1)
    for a, b in zip(got, reference.layer_norm_backward(dy, x, gamma, *want[1:], dims=1)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_huge_cotangents():
    x, dy = rng.standard_normal((2, 40, 3)).astype(np.float32)
    dy *= np.float32(1e37)
    _, mean, _, invstd = reference.batch_norm(x, None, None, eps=EPS)
    got = cpu.batch_norm_backward(dy, x, None, mean, invstd, relu=True)
    want = reference.batch_norm_backward(dy, x, None, mean, invstd, relu=True)
    for a, b in zip(got[:3], want):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e32)


@pytest.mark.parametrize("strided", [False, True])
def test_running_statistics_move_with_the_forward(strided):
    x = rng.standard_normal((20, 6)).astype(np.float32)
    sets = []
    for kernels in (cpu, reference):
        room = np.ones((2, 12), np.float32)
        mean, var = room[:, ::2] if strided else room[:, :6]
        y, *_ = kernels.batch_norm(x, None, None, eps=EPS, running=(mean, var, 0.3))
        sets.append((y, room))
    for a, b in zip(*sets):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert (sets[0][1][:, 1::2] == 1).all() or not strided


@pytest.mark.parametrize("D", [1, 3, 16, 100, 4096, 5000, 70_001])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_float32_layer_norm_at_any_length_and_offset(D, offset):
    """As for batch norm: 1e-6 at an offset of 1e6. A row of one value gives exactly β."""
    x = (rng.standard_normal((7, D)) + offset).astype(np.float32)
    y = cpu.layer_norm(x, None, None, dims=1, eps=EPS)[0]
    want = reference.layer_norm(x.astype(np.float64), None, None, dims=1, eps=EPS)[0]
    assert np.abs(y - want).max() <= 1.2e-6          # values of 5 have an ulp of 4.8e-7


@layouts
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 7), (64, 3, 40, 40)])
def test_a_bad_channel_leaves_the_bits_of_the_others(layout, shape, value):
    """Such channels are computed again in float64; the others neither move nor wait for them."""
    x, dy, r = (layout(rng.standard_normal(shape).astype(np.float32)) for _ in range(3))
    gamma, beta = rng.standard_normal((2, 3)).astype(np.float32)
    others, bad = [0, 2], x.copy(order="K")
    bad[0, 1] = value
    found = []
    for a in (x, bad):
        running = np.zeros(3, np.float32), np.ones(3, np.float32)
        y, mean, var, invstd = cpu.batch_norm(a, gamma, beta, r, eps=EPS, relu=True,
                                              running=(*running, 0.1))
        grads = cpu.batch_norm_backward(dy, a, gamma, mean, invstd, y=y, relu=True, residual=True)
        found.append((y, *grads, mean, var, invstd, *running))
    for a, b in zip(*found):
        if a.ndim == 1:
            np.testing.assert_array_equal(a[others], b[others])
        else:
            np.testing.assert_array_equal(a[:, others], b[:, others])
    want = reference.batch_norm(bad, gamma, beta, r, eps=EPS, relu=True)
    for a, b in zip((found[1][0], *found[1][5:8]), want):
        finite = np.isfinite(b)             # blocks with an infinite mean merge to NaN
        np.testing.assert_array_equal(np.isfinite(a), finite)
        np.testing.assert_allclose(a[finite], b[finite], rtol=1e-6, atol=1e-6)
