"""Convolution on CUDA against the reference: strides, padding, dilation, groups, memory orders."""

import inspect

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import precision, tile
from nbgrad.kernels.cuda.memory import to_device, to_host
from nbgrad.kernels.shapes import Conv

TOLERANCE = {np.float32: 1e-5, np.float64: 1e-13}
# x, weight, stride, padding, dilation, groups
CASES = [
    ((2, 3, 6, 5), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),          # odd channels: one by one
    ((1, 4, 7, 6), (8, 4, 3, 2), (2, 1), (1, 0), (1, 2), 1),          # vectors
    ((2, 8, 5, 5), (8, 4, 3, 3), (2, 2), (0, 1), (1, 1), 2),          # groups of 4 by 4: direct
    ((1, 16, 5, 4), (24, 8, 2, 2), (1, 1), (1, 1), (1, 1), 2),        # groups in tiles
    ((2, 6, 5, 6), (6, 1, 3, 3), (1, 2), (1, 1), (2, 1), 6),          # depthwise
    ((1, 2, 9, 8), (70, 2, 1, 1), (3, 2), (0, 0), (1, 1), 1),         # pixels that no window reads
    ((1, 3, 4, 4), (5, 3, 4, 4), (4, 4), (0, 0), (1, 1), 1),          # patches
    ((1, 2, 12, 3), (3, 2, 3, 3), (3, 1), (2, 3), (2, 3), 1)]         # tall
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def close(got, want, terms):
    """Within the rounding of so many terms of about 1."""
    assert got.dtype == want.dtype
    np.testing.assert_allclose(to_host(got), want, rtol=TOLERANCE[want.dtype.type],
                               atol=TOLERANCE[want.dtype.type] * (1 + terms ** 0.5))


def both(name, *arrays, **settings):
    got = getattr(cuda, name)(*map(to_device, arrays), **settings)
    return got, getattr(reference, name)(*arrays, **settings)


def all_three(case, dtype, seed=0):
    size, weight, stride, padding, dilation, groups = case
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    g, rng = Conv.of(size, weight, stride, padding, dilation, groups), np.random.default_rng(seed)
    x, w, b, dy = (rng.standard_normal(s).astype(dtype) for s in (
        size, weight, g.O, (g.N, g.O, g.P, g.Q)))
    y, want = both("conv2d", x, w, b, **settings)
    close(y, want, g.depth)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    close(*both("conv2d_input", dy, w, input_size=size, **settings), g.depth)
    close(*both("conv2d_weight", dy, x, kernel_size=weight[2:], **settings), dy[:, 0].size)


def test_names_and_signatures_are_the_references():
    for name in ("conv2d", "conv2d_input", "conv2d_weight"):
        a, b = (inspect.signature(getattr(m, name)) for m in (reference, cuda))
        assert str(a) == str(b)


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_each_setting(case, dtype):
    all_three(case, dtype)


@pytest.mark.parametrize("seed", range(6))
def test_random_settings(seed):
    rng = np.random.default_rng(seed)
    groups, depth, columns = rng.integers(1, 4), rng.integers(1, 6), rng.integers(1, 10)
    pairs = [tuple(map(int, rng.integers(low, high, 2))) for low, high in
             ((1, 4), (1, 4), (0, 3), (1, 3))]
    kernel, stride, padding, dilation = pairs
    size = [int(d * (k - 1) + 1 + n) for d, k, n in zip(dilation, kernel, rng.integers(0, 6, 2))]
    weight = (int(groups * columns), int(depth), *kernel)
    all_three(((2, int(groups * depth), *size), weight, stride, padding, dilation, int(groups)),
              np.float64, seed)


def test_either_order_large_tiles_and_parts_of_sums(either_order, monkeypatch):
    monkeypatch.setattr(tile, "DEEP", 16)
    all_three(((1, 4, 7, 7), (4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1), np.float32)
    all_three(((1, 16, 3, 4), (16, 8, 2, 2), (1, 2), (1, 0), (1, 1), 2), np.float32)
    monkeypatch.setattr(tile, "SMALL", tile.LARGE)
    all_three(((1, 4, 4, 3), (4, 4, 2, 2), (1, 1), (1, 1), (1, 1), 1), np.float32)


def test_by_registers_into_shared_memory(monkeypatch, either_order):
    monkeypatch.setattr(precision, "loads", lambda: "plain")
    all_three(((1, 4, 7, 7), (4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1), np.float32)
    all_three(((1, 3, 5, 7), (5, 3, 2, 3), (1, 2), (1, 1), (1, 1), 1), np.float64)


def test_memory_orders_and_views():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, 6, 4)), rng.standard_normal((8, 2, 3, 4))
    d, e = to_device(x).transpose(0, 3, 1, 2), to_device(w).transpose(0, 3, 2, 1)
    settings = {"stride": (1, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 1}
    want = reference.conv2d(x.transpose(0, 3, 1, 2), w.transpose(0, 3, 2, 1), **settings)
    close(cuda.conv2d(d, e, **settings), want, 24)
    want = reference.conv2d(x.transpose(0, 3, 1, 2)[:, 1:3, ::-1],
                            w.transpose(0, 3, 2, 1)[::2, ::2], **settings)
    close(cuda.conv2d(d[:, 1:3, ::-1], e[::2, ::2], **settings), want, 24)


def test_images_beyond_32_bits_are_refused():
    x = np.broadcast_to(to_device(np.ones(1, np.float32)), (1, 1, 1 << 16, 1 << 15))
    with pytest.raises(ValueError, match=r"images of \(1, 65536, 32768\) on CUDA"):
        cuda.conv2d(x, x[:, :, :1, :1], stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)


def test_nothing():
    settings = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    for size, weight in (((0, 2, 4, 4), (3, 2, 2, 2)), ((2, 0, 4, 4), (3, 0, 2, 2)),
                         ((1, 2, 4, 4), (0, 2, 2, 2))):
        x, w = np.ones(size, np.float32), np.ones(weight, np.float32)
        y, want = both("conv2d", x, w, np.ones(weight[0], np.float32), **settings)
        close(y, want, 1)
        close(*both("conv2d_input", want, w, input_size=size, **settings), 1)
        close(*both("conv2d_weight", want, x, kernel_size=(2, 2), **settings), 1)


def test_tensor_cores(monkeypatch):
    """Two numbers of TF32 each: float32's tolerance."""
    monkeypatch.setattr(precision, "_chosen", "3xtf32")
    all_three(((1, 4, 4, 4), (8, 4, 3, 3), (2, 1), (1, 1), (1, 1), 1), np.float32)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", [
    *CASES[:3], ((1, 16, 4, 3), (16, 8, 2, 2), (1, 2), (1, 0), (1, 1), 2)])
def test_halves(name, case, monkeypatch):
    """Exact products, sums in float32, in parts or not, and one rounding."""
    pytest.importorskip("ml_dtypes")
    size, weight, stride, padding, dilation, groups = case
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    g, rng = Conv.of(size, weight, stride, padding, dilation, groups), np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype(np.float32).astype(name) for s in (
        size, weight, (g.O,), (g.N, g.O, g.P, g.Q))]
    x, w, b, dy = (a.astype(np.float64) for a in arrays)
    unit = 2.0**-11 if name == "float16" else 2.0**-8

    def check(got, f, *operands, **how):
        want, sizes = f(*operands, **how), f(*map(np.abs, operands), **how)
        bound = unit * np.abs(want) + (g.depth * w.size + 2) * 2.0**-23 * sizes + 2.0**-25
        assert got.dtype == np.dtype(name)
        assert (np.abs(to_host(got).astype(np.float64) - want) <= bound).all()
    dx, dw, db, ddy = map(to_device, arrays)
    for deep in (tile.DEEP, 4):
        monkeypatch.setattr(tile, "DEEP", deep)
        check(cuda.conv2d(dx, dw, db, **settings), reference.conv2d, x, w, b, **settings)
        check(cuda.conv2d_input(ddy, dw, input_size=size, **settings), reference.conv2d_input, dy,
              w, input_size=size, **settings)


# x, weight, stride, padding, dilation, groups; pixels: 40, 90 (a whole half of a tile, and some)
MOMENTS = [((2, 4, 5, 4), (8, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1),
           ((1, 4, 9, 10), (70, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
           ((1, 16, 11, 7), (32, 8, 2, 2), (2, 1), (1, 0), (1, 1), 2),
           ((1, 3, 1, 1), (5, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1)]


def moments_of(y):
    y = to_host(y).astype(np.float64).transpose(1, 0, 2, 3).reshape(y.shape[1], -1)
    return y.mean(1), ((y - y.mean(1, keepdims=True)) ** 2).sum(1)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", MOMENTS)
def test_moments(name, case, either_order):
    """Of y as it is written; squares of float32 about the mean, merged in float64. An offset of
    1000 costs nothing, a constant channel's mean is exact and its M2 is 0."""
    pytest.importorskip("ml_dtypes")
    size, weight, stride, padding, dilation, groups = case
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(name) for s in (size, weight))
    bias = np.array([0, 1000, -3, 0.1, 7] * 14)[:weight[0]].astype(name)
    w[4] = 0
    found, want = [], []
    y = cuda.conv2d(*map(to_device, (x, w, bias)), moments=found, **settings)
    reference.conv2d(*(a.astype(np.float64) for a in (x, w, bias)), moments=want, **settings)
    count, mean, m2 = map(to_host, found)
    assert [a.dtype for a in (count, mean, m2)] == [np.float64] * 3
    np.testing.assert_array_equal(count, want[0])
    exact, squares = moments_of(y)
    deviation = (squares / count) ** 0.5
    assert (np.abs(mean - exact) <= 8 * 2.0**-24 * deviation).all()    # 32 sums of float32
    np.testing.assert_allclose(m2, squares, rtol=1e-6)
    assert (mean[4], m2[4]) == (float(bias[4]), 0.0)
    again = []
    plain = cuda.conv2d(*map(to_device, (x, w, bias)), moments=again, **settings)
    np.testing.assert_array_equal(to_host(plain), to_host(y))
    for a, b in zip(again, found):
        np.testing.assert_array_equal(to_host(a), to_host(b))


def test_moments_of_large_and_small_numbers_and_infinity():
    """Squares that float32 does not hold are taken again in float64."""
    settings = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    x = np.random.default_rng(0).standard_normal((1, 4, 6, 7)).astype(np.float32)
    w = np.eye(4, dtype=np.float32)[..., None, None] * np.float32([1e30, 1e-30, 1, 1]).reshape(
        4, 1, 1, 1)
    x[0, 3, 2, 2], w[3, 3] = 3e38, 10
    found = []
    y = cuda.conv2d(to_device(x), to_device(w), moments=found, **settings)
    _, mean, m2 = map(to_host, found)
    exact, squares = moments_of(y[:, :3])
    np.testing.assert_allclose(mean[:3], exact, rtol=1e-6)
    np.testing.assert_allclose(m2[:3], squares, rtol=1e-6)
    assert not np.isfinite(mean[3])
    assert np.isnan(m2[3])


def test_parts_of_moments_are_merged():
    """13 parts of 5 rows of 11 channels and one of 2, as of all rows at once."""
    from nbgrad.kernels.cuda.epilogue import merged

    y = np.random.default_rng(0).standard_normal((67, 11)) + 100
    parts = [y[i:i + 5] for i in range(0, 67, 5)]
    means = to_device(np.array([p.mean(0) for p in parts]))
    squares = to_device(np.array([((p - p.mean(0)) ** 2).sum(0) for p in parts]))
    count, mean, m2 = map(to_host, merged(means, squares, 67, 5))
    np.testing.assert_array_equal(count, np.full(11, 67.0))
    np.testing.assert_allclose(mean, y.mean(0), rtol=1e-14)
    np.testing.assert_allclose(m2, ((y - y.mean(0)) ** 2).sum(0), rtol=1e-12)


def test_moments_of_what_blocks_do_not_see_whole(monkeypatch):
    """Parts of k, few channels in groups, float64: y is as ever, and nothing is said of it."""
    for case, dtype, deep in ((CASES[1], np.float32, 4), (CASES[4], np.float32, 256),
                              (CASES[1], np.float64, 256)):
        monkeypatch.setattr(tile, "DEEP", deep)
        size, weight, stride, padding, dilation, groups = case
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        x, w = (np.ones(s, dtype) for s in (size, weight))
        found = []
        y = cuda.conv2d(to_device(x), to_device(w), moments=found, **settings)
        close(y, reference.conv2d(x, w, **settings), 1)
        assert not found
