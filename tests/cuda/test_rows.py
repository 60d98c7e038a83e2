"""Layer, RMS and group norm on CUDA against the reference: float32, float64 and halves."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import rows
from nbgrad.kernels.cuda.memory import to_device, to_host
from nbgrad.kernels.half import is_half

ml_dtypes = pytest.importorskip("ml_dtypes")
F4, F8, F2, BF = map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
WIDE, HALVES = (F4, F8), (F2, BF)
# relative: float32 in both passes over a row, float64; a half is rounded once more, by half a unit,
# and where float32's own error moves it over the middle by another half
CLOSE = {F4: 1e-5, F8: 1e-12, F2: 2.0**-10, BF: 2.0**-7}
wide = pytest.mark.parametrize("dtype", WIDE, ids=str)


def drawn(dtype, *shape, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) + offset
    return x.astype(np.float32).astype(dtype) if is_half(np.dtype(dtype)) else x.astype(dtype)


def channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def on_device(*arrays):
    return [None if a is None else to_device(a) for a in arrays]


def exact(*arrays):
    """In float64, for the reference."""
    return [None if a is None else a.astype(np.float64) for a in arrays]


def same(got, want, **close):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(to_host(a), b, **close)


def near(got, want, dtypes):
    """Each of its dtype; near 0 by the terms of its sum, which are as large as its largest."""
    for a, b, dtype in zip(got, want, dtypes, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            to_host(a).astype(np.float64), b, rtol=CLOSE[dtype],
            atol=min(CLOSE[dtype], CLOSE[F4]) * max(1.0, np.abs(b).max(initial=0)))


def parameters(dtype):
    """What γ and β may be: none, of x's dtype, float32 beside halves."""
    return (None, dtype, F4) if is_half(dtype) else (None, dtype)


# A warp, two widths of blocks and a row that is read twice, each with tails; in vectors of four
# (two) or one by one, and of eight halves.
ROWS = [(3, 1), (2, 40), (5, 7), (1, 301), (2, 601), (1, 2, 6), (0, 4), (1, 901)]
HALF_ROWS = [(3, 8), (2, 160), (5, 7), (1, 1200), (1, 3088), (1, 2, 24), (0, 8), (1, 701)]


@pytest.mark.parametrize(("dtype", "shape"), [(d, s) for kinds, shapes in (
    (WIDE, ROWS), (HALVES, HALF_ROWS)) for d in kinds for s in shapes], ids=str)
def test_layer_and_rms_norm(shape, dtype):
    dims = len(shape) - 1
    x, dy = drawn(dtype, *shape, offset=0.5), drawn(dtype, *shape, seed=1)
    for kind in parameters(dtype) if x.size < 500 else parameters(dtype)[-1:]:
        gamma, beta = (kind and drawn(kind, *shape[1:], seed=i) for i in (2, 3))
        of, d, how = kind or dtype, on_device(dy, x, gamma, beta), {"dims": dims}
        want = reference.layer_norm(*exact(x, gamma, beta), **how, eps=1e-5)
        got = cuda.layer_norm(*d[1:], **how, eps=1e-5)
        near(got[:1], want[:1], [dtype])
        same(got[1:], want[1:], rtol=1e-6, atol=1e-7)
        near(cuda.layer_norm_backward(*d[:3], *got[1:], **how),
             reference.layer_norm_backward(*exact(dy, x, gamma), *want[1:], **how),
             [dtype, of, of])
        want = reference.rms_norm(*exact(x, gamma), **how, eps=1e-5)
        got = cuda.rms_norm(*d[1:3], **how, eps=1e-5)
        near(got[:1], want[:1], [dtype])
        same(got[1:], want[1:], rtol=1e-6)
        near(cuda.rms_norm_backward(*d[:3], got[1], **how),
             reference.rms_norm_backward(*exact(dy, x, gamma), want[1], **how), [dtype, of])


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


GROUPS = [((2, 6, 8), 3), ((3, 16, 2, 3), 2), ((2, 8), 2), ((2, 3, 5), 1), ((2, 3, 8), 3),
          ((1, 8, 70), 2), ((0, 4, 2), 2)]


@pytest.mark.parametrize("dtype", [*WIDE, *HALVES], ids=str)
@pytest.mark.parametrize(("shape", "groups"), GROUPS)
@pytest.mark.parametrize("order", [np.ascontiguousarray, channels_last])
def test_group_norm(shape, groups, order, dtype):
    """With and without means and parameters."""
    C = shape[1]
    x, dy = (order(drawn(dtype, *shape, seed=i, offset=i)) for i in range(2))
    for kind, center in zip((dtype, parameters(dtype)[-1], None), (True, False, True)):
        gamma, beta = (kind and drawn(kind, C, seed=i) for i in (2, 3))
        of, d, how = kind or dtype, on_device(dy, x, gamma, beta), {
            "groups": groups, "center": center}
        want = reference.group_norm(*exact(x, gamma, beta), eps=1e-5, **how)
        got = cuda.group_norm(*d[1:], eps=1e-5, **how)
        near(got[:1], want[:1], [dtype])
        same(got[1:], want[1:], rtol=1e-6, atol=1e-7)
        assert all(a == b or n == 1 for a, b, n in zip(got[0].strides, x.strides, shape))
        near(cuda.group_norm_backward(*d[:3], *got[1:], **how),
             reference.group_norm_backward(*exact(dy, x, gamma), *want[1:], **how),
             [dtype, of, of])


@pytest.mark.parametrize("dtype", [*WIDE, *HALVES], ids=str)
def test_group_norm_above_a_floor(dtype):
    """max(y, floor), where y is rounded before it is compared."""
    kind = parameters(dtype)[-1]
    x, dy = (drawn(dtype, 3, 4, 5, 2, seed=i) for i in range(2))
    gamma, beta, floor = (drawn(kind, 4, seed=i) for i in (2, 3, 4))
    d, how = on_device(dy, x, gamma, beta, floor), {"groups": 4, "center": False}
    y, *kept = cuda.group_norm(*d[1:4], eps=1e-5, **how)
    got, *_ = cuda.group_norm(*d[1:4], eps=1e-5, floor=d[4], **how)
    want = np.maximum(to_host(y).astype(F8), floor.astype(F8).reshape(4, 1, 1)).astype(dtype)
    np.testing.assert_array_equal(to_host(got), want)
    near(cuda.group_norm_backward(*d[:3], *kept, beta=d[3], floor=d[4], **how),
         reference.group_norm_backward(
             *exact(dy, x, gamma), *map(to_host, kept), beta=beta.astype(F8),
             floor=floor.astype(F8), **how), [dtype, kind, kind, kind])
