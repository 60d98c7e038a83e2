"""Layer, RMS and group normalization on CUDA against the reference."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import rows
from nbgrad.kernels.cuda.memory import to_device, to_host

CLOSE = {np.float32: {"rtol": 3e-6, "atol": 4e-6}, np.float64: {"rtol": 1e-12, "atol": 1e-13}}
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def drawn(dtype, *shape, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + offset).astype(dtype)


def channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def on_device(*arrays):
    return [None if a is None else to_device(a) for a in arrays]


def same(got, want, **close):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(to_host(a), b, **close)


# A warp, two widths of blocks and a row that is read twice, each with tails; W is 4 (2) or 1.
ROWS = [(3, 1), (2, 40), (5, 7), (1, 301), (2, 601), (1, 2, 6), (0, 4), (1, 901)]


@dtypes
@pytest.mark.parametrize("shape", ROWS)
def test_layer_and_rms_norm(shape, dtype):
    dims, affine = len(shape) - 1, shape[-1] != 7
    x, dy = drawn(dtype, *shape, offset=0.5), drawn(dtype, *shape, seed=1)
    gamma, beta = (drawn(dtype, *shape[1:], seed=i) if affine else None for i in (2, 3))
    d = on_device(dy, x, gamma, beta)
    want = reference.layer_norm(x, gamma, beta, dims=dims, eps=1e-5)
    got = cuda.layer_norm(d[1], d[2], d[3], dims=dims, eps=1e-5)
    same(got, want, **CLOSE[dtype])
    back = reference.layer_norm_backward(dy, x, gamma, *want[1:], dims=dims)
    same(cuda.layer_norm_backward(*d[:3], *got[1:], dims=dims), back, rtol=1e-5,
         atol=CLOSE[dtype]["atol"])
    want = reference.rms_norm(x, gamma, dims=dims, eps=1e-5)
    got = cuda.rms_norm(d[1], d[2], dims=dims, eps=1e-5)
    same(got, want, **CLOSE[dtype])
    back = reference.rms_norm_backward(dy, x, gamma, want[1], dims=dims)
    same(cuda.rms_norm_backward(*d[:3], got[1], dims=dims), back, rtol=1e-5,
         atol=CLOSE[dtype]["atol"])


def test_every_way_to_hold_a_row_is_taken():
    ways = {rows.plan(shape[-1], 1, 8) for shape in ROWS}
    assert ways == {(32, True), *((T, True) for T in rows.WIDE), (rows.WIDE[-1], False)}


def test_sums_over_many_rows(either_order):
    x, dy = drawn(np.float32, 300, 8), drawn(np.float32, 300, 8, seed=1)
    mean, invstd = x.mean(1, dtype=np.float64), 1 / x.std(1, dtype=np.float64)
    d = on_device(dy, x, None, mean, invstd)
    for _ in range(2):
        same(cuda.layer_norm_backward(*d, dims=1),
             reference.layer_norm_backward(dy, x, None, mean, invstd, dims=1), rtol=1e-5,
             atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 72), (1, 601), (1, 1100), (1, 901)])
def test_large_offsets_and_constants(shape):
    for offset in (1e4, 1e6):
        x = drawn(np.float32, *shape, offset=offset)
        y, mean, invstd = cuda.layer_norm(to_device(x), None, None, dims=1, eps=1e-5)
        want = reference.layer_norm(x, None, None, dims=1, eps=1e-5)
        np.testing.assert_allclose(to_host(mean), want[1], rtol=1e-13)
        np.testing.assert_allclose(to_host(invstd), want[2], rtol=1e-6)
        np.testing.assert_allclose(to_host(y), want[0], rtol=2e-6, atol=2e-6)
    for dtype in (np.float32, np.float64):
        y = cuda.layer_norm(to_device(np.full(shape, 12345.1, dtype)), None, None, dims=1, eps=0.1)
        assert (to_host(y[0]) == 0).all()


def test_nan_stays_in_its_row_and_large_values_are_right():
    x = drawn(np.float32, 4, 40)
    x[1, 5], x[2] = np.nan, x[2] * np.float32(1e25)
    y, _, invstd = cuda.layer_norm(to_device(x), None, None, dims=1, eps=1e-5)
    want = reference.layer_norm(x, None, None, dims=1, eps=1e-5)
    np.testing.assert_allclose(to_host(y), want[0], rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(to_host(invstd), want[2], rtol=1e-6)


GROUPS = [((2, 6, 4), 3), ((3, 4, 2, 3), 2), ((2, 4), 2), ((2, 3, 5), 1), ((2, 3, 8), 3),
          ((1, 8, 70), 2), ((0, 4, 2), 2)]


@dtypes
@pytest.mark.parametrize(("shape", "groups"), GROUPS)
@pytest.mark.parametrize("order", [np.ascontiguousarray, channels_last])
def test_group_norm(shape, groups, order, dtype):
    C = shape[1]
    x, dy = (order(drawn(dtype, *shape, seed=i, offset=i)) for i in range(2))
    for affine, center in ((True, True), (False, True), (True, False)):
        gamma, beta = (drawn(dtype, C, seed=i) if affine else None for i in (2, 3))
        d, how = on_device(dy, x, gamma, beta), {"groups": groups, "center": center}
        want = reference.group_norm(x, gamma, beta, eps=1e-5, **how)
        got = cuda.group_norm(d[1], d[2], d[3], eps=1e-5, **how)
        same(got, want, **CLOSE[dtype])
        assert all(a == b or n == 1 for a, b, n in zip(got[0].strides, x.strides, shape))
        back = reference.group_norm_backward(dy, x, gamma, *want[1:], **how)
        same(cuda.group_norm_backward(*d[:3], *got[1:], **how), back, rtol=1e-5,
             atol=2 * CLOSE[dtype]["atol"])


@dtypes
def test_group_norm_above_a_floor(dtype):
    dy, x, gamma, beta, floor = (drawn(dtype, *shape, seed=i) for i, shape in
                                 enumerate([(3, 4, 5, 2)] * 2 + [(4,)] * 3))
    d, how = on_device(dy, x, gamma, beta, floor), {"groups": 4, "center": False}
    want = reference.group_norm(x, gamma, beta, eps=1e-5, floor=floor, **how)
    got = cuda.group_norm(*d[1:4], eps=1e-5, floor=d[4], **how)
    same(got, want, rtol=1e-5, atol=1e-5)
    back = reference.group_norm_backward(dy, x, gamma, *want[1:], beta=beta, floor=floor, **how)
    same(cuda.group_norm_backward(*d[:3], *got[1:], beta=d[3], floor=d[4], **how), back, rtol=1e-5,
         atol=1e-5)
