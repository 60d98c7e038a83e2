"""Convolution by windows and by Winograd's products, on shapes drawn at random."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from nbgrad.kernels import cpu, reference
from nbgrad.kernels.cpu import convkernel, jit, simd, windows, winograd, winograd_weight

import nbgrad

DTYPES = [np.float32, np.float64]
# Rounding of a direct float32 sum is below 1e-6 of the largest output here, Winograd's 3e-6.
BOUND = {np.float32: 1e-5, np.float64: 2e-14}
drawn = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


@pytest.fixture(params=[False, True], ids=["", "deep"])
def always(monkeypatch, request):
    """Winograd's products wherever they can be used, of either kind."""
    monkeypatch.setattr(winograd, "suits", lambda s: True)
    monkeypatch.setattr(winograd, "deep", lambda s, itemsize: request.param)
    monkeypatch.setattr(winograd_weight, "suits", lambda g, itemsize: True)


def same(got, want, dtype):
    assert got.shape == want.shape
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want, rtol=0,
                               atol=BOUND[dtype] * max(1, np.abs(want).max(initial=0)))


def check(dtype, x, weight, how, seed=0):
    """Both directions against float64."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal(x).astype(dtype), rng.standard_normal(weight).astype(dtype)
    b = rng.standard_normal(weight[0]).astype(dtype)
    want = reference.conv2d(*(v.astype(float) for v in (x, w, b)), **how)
    same(cpu.conv2d(x, w, b, **how), want, dtype)
    dy = rng.standard_normal(want.shape).astype(dtype)
    want = reference.conv2d_input(dy.astype(float), w.astype(float), input_size=x.shape, **how)
    same(cpu.conv2d_input(dy, w, input_size=x.shape, **how), want, dtype)


def check_weight(dtype, N, C, O, size, padding):
    rng = np.random.default_rng(0)
    how = {**PLAIN, "padding": padding, "kernel_size": (3, 3)}
    x = rng.standard_normal((N, C, *size)).astype(dtype)
    dy = rng.standard_normal((N, O, *(n + 2 * p - 2 for n, p in zip(size, padding)))).astype(dtype)
    want = reference.conv2d_weight(dy.astype(float), x.astype(float), **how)
    same(cpu.conv2d_weight(dy, x, **how), want, dtype)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
channels = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40])


@drawn
@given(st.sampled_from(DTYPES), st.integers(0, 3), st.integers(1, 3), channels, channels,
       st.tuples(st.integers(1, 15), st.integers(1, 15)), st.tuples(st.integers(1, 4),
                                                                    st.integers(1, 4)),
       pairs, st.tuples(st.integers(0, 4), st.integers(0, 4)), pairs)
def test_direct_sums(dtype, N, groups, C, O, size, window, stride, padding, dilation):
    size = tuple(max(n, d * (k - 1) + 1 - 2 * p)
                 for n, k, p, d in zip(size, window, padding, dilation))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    nbgrad.set_winograd(False)
    try:
        check(dtype, (N, groups * C, *size), (groups * O, C, *window), how)
    finally:
        nbgrad.set_winograd(True)


@drawn
@given(st.sampled_from(DTYPES), st.integers(0, 3), channels, channels,
       st.tuples(st.integers(1, 14), st.integers(1, 14)),
       st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_products(always, dtype, N, C, O, size, padding):
    size = tuple(max(n, 3 - 2 * p) for n, p in zip(size, padding))
    check(dtype, (N, C, *size), (O, C, 3, 3), {**PLAIN, "padding": padding})
    check_weight(dtype, N, C, O, size, padding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "O", "size"), [
    (5, 70, 130, (9, 8)),               # slices of channels, the last ones narrow
    (40, 16, 3, (21, 17)),              # parts of tiles, several blocks of each
])
def test_weights_by_products(always, N, C, O, size, dtype):
    check_weight(dtype, N, C, O, size, (1, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_outputs_past_the_caches(monkeypatch, stride, dtype):
    monkeypatch.setattr(windows, "PAST_BYTES", 0)
    monkeypatch.setattr(winograd, "enabled", False)
    check(dtype, (2, 64, 20, 23), (96, 64, 3, 3), {**PLAIN, "stride": (stride, stride)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    (1, 70, 1, 1), (2, 64, 7, 7), (1, 256, 5, 6),       # a row of V is spread over the L1
    (30, 16, 9, 8),                                     # several blocks of tiles
])
def test_products_of_many_channels(always, shape, dtype):
    check(dtype, shape, (48, shape[1], 3, 3), PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_spread_over_the_cache(dtype):
    check(dtype, (2, 512, 4, 5), (20, 512, 1, 1), {**PLAIN, "padding": (0, 0)})
    check(dtype, (2, 512, 4, 5), (20, 512, 2, 2), {**PLAIN, "stride": (2, 2)})


def bits(n, f, *arrays, **how):
    before = jit.get_num_threads()
    jit.set_num_threads(n)
    try:
        return f(*arrays, **how).copy()
    finally:
        jit.set_num_threads(before)


def test_the_bits_of_products_do_not_depend_on_threads(always):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((5, n, 17, 18)).astype(np.float32) for n in (90, 70))
    w = rng.standard_normal((70, 90, 3, 3)).astype(np.float32)
    for f, arrays, how in ((cpu.conv2d, (x, w), PLAIN),
                           (cpu.conv2d_input, (dy, w), {**PLAIN, "input_size": x.shape}),
                           (cpu.conv2d_weight, (dy, x), {**PLAIN, "kernel_size": (3, 3)})):
        np.testing.assert_array_equal(bits(1, f, *arrays, **how), bits(2, f, *arrays, **how))


@pytest.mark.parametrize(("C", "O", "window"), [(16, 40, 3), (24, 33, 5), (64, 160, 3),
                                                (48, 32, 1)])
def test_the_bits_do_not_depend_on_threads(C, O, window):
    rng = np.random.default_rng(0)
    how = {**PLAIN, "padding": (window // 2,) * 2}
    x = rng.standard_normal((9, C, 17, 18)).astype(np.float32)
    w = rng.standard_normal((O, C, window, window)).astype(np.float32)
    dy = rng.standard_normal((9, O, 17, 18)).astype(np.float32)
    for f, args, more in ((cpu.conv2d, (x, w), {}),
                          (cpu.conv2d_input, (dy, w), {"input_size": x.shape}),
                          (cpu.conv2d_weight, (dy, x), {"kernel_size": (window, window)})):
        one, all_ = (bits(n, f, *args, **how, **more)
                     for n in (1, jit.config.NUMBA_NUM_THREADS))
        np.testing.assert_array_equal(one, all_)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_nan_and_inf_reach_exactly_their_windows(always, bad):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 16, 9, 10)).astype(np.float32)
    w = rng.standard_normal((20, 16, 3, 3)).astype(np.float32)
    clean = cpu.conv2d(x, w, **PLAIN)
    x[1, 3, 4, 5], x[3, 0, 0, 0] = bad, bad
    with np.errstate(all="ignore"):
        got, want = (f.conv2d(x, w, **PLAIN) for f in (cpu, reference))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    untouched = np.isfinite(want) & (np.abs(want) < 1e4)
    np.testing.assert_allclose(got[untouched], want[untouched], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got[[0, 2, 4]], clean[[0, 2, 4]])    # other images' bits stay
    w[7, 2, 1, 1] = np.nan if bad == 3e38 else bad    # where huge products cancel, order decides
    with np.errstate(all="ignore"):
        got, want = (f.conv2d(x, w, **PLAIN) for f in (cpu, reference))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_weights_of_values_that_are_not_finite_are_direct_sums(always, bad):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 16, 9, 10)).astype(np.float32)
    dy = rng.standard_normal((5, 20, 9, 10)).astype(np.float32)
    x[1, 3, 0, 0] = bad                            # of tap (2, 2) no output sees the corner
    how = {**PLAIN, "kernel_size": (3, 3)}
    with np.errstate(all="ignore"):
        got, want = (f.conv2d_weight(dy, x, **how) for f in (cpu, reference))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    assert np.isfinite(want[:, 3, 2, 2]).all()
    fine = np.isfinite(want) & (np.abs(want) < 1e4)
    np.testing.assert_allclose(got[fine], want[fine], rtol=0, atol=1e-4)


def test_the_switch():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 64, 16, 16)).astype(np.float32)
    w = rng.standard_normal((64, 64, 3, 3)).astype(np.float32)
    on = cpu.conv2d(x, w, **PLAIN)
    nbgrad.set_winograd(False)
    try:
        off = cpu.conv2d(x, w, **PLAIN)
    finally:
        nbgrad.set_winograd(True)
    exact = reference.conv2d(x.astype(float), w.astype(float), **PLAIN)
    assert (on != off).any()                      # 64 channels are enough to be worth it
    same(on, exact, np.float32)
    same(off, exact, np.float32)
    np.testing.assert_array_equal(cpu.conv2d(x, w, **PLAIN), on)


def test_the_switch_for_weights():
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((8, 32, 16, 16)).astype(np.float32) for _ in range(2))
    how = {**PLAIN, "kernel_size": (3, 3)}
    on = cpu.conv2d_weight(dy, x, **how)
    nbgrad.set_winograd(False)
    try:
        off = cpu.conv2d_weight(dy, x, **how)
    finally:
        nbgrad.set_winograd(True)
    exact = reference.conv2d_weight(dy.astype(float), x.astype(float), **how)
    assert (on != off).any()
    same(on, exact, np.float32)
    same(off, exact, np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("O", "C", "window"), [(1, 1, 1), (5, 3, 3), (40, 33, 1), (33, 20, 3)])
def test_weights_are_packed(O, C, window, transposed, dtype):
    w = np.random.default_rng(0).standard_normal((2 * O, C, window, window)).astype(dtype)
    taps = list(range(window * window))[::-2]
    got = windows.packed(w, taps, 2, transposed)
    W = 2 * simd.VECTOR // w.itemsize
    grouped = w.reshape(2, O, C, -1)[..., taps]
    grouped = grouped.transpose((0, 3, 1, 2) if transposed else (0, 3, 2, 1))   # g, t, k, n
    n = grouped.shape[3]
    flat = got.transpose(0, 2, 3, 1, 4).reshape(*grouped.shape[:3], -1)
    np.testing.assert_array_equal(flat[..., :n], grouped)
    assert not flat[..., n:].any()
    assert got.shape[1] == -(-n // W)


@jit.kernel
def _tiles(a, at, taps, run, b, s, c, ct):
    convkernel.tile(a, at, 0, taps, taps.size, run, b, s, c, ct, False, a, 1)
    convkernel.few(a, at, 1, taps, taps.size, run, b, s, c, ct, False, a, 1)


@jit.kernel
def _half_tiles(a, at, taps, run, b, s, c, ct):
    convkernel.tile_half(a, at, 0, taps, taps.size, run, b, s, c, ct, False, a, 1)
    convkernel.few_half(a, at, 1, taps, taps.size, run, b, s, c, ct, False, a, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "vectors"), [(_tiles, 2), (_half_tiles, 1)])
@pytest.mark.parametrize("run", [1, 2, 5])
def test_tiles(kernel, vectors, run, dtype):
    rng, W = np.random.default_rng(0), simd.VECTOR // np.dtype(dtype).itemsize
    pixels = max(convkernel.PIXELS * 2 // vectors, 1 + convkernel.FEW)     # few begins at 1
    a, taps = rng.standard_normal(300).astype(dtype), np.array([7, 0, 31])
    b, s = (rng.standard_normal(n).astype(dtype) for n in (3 * run * 2 * W, 2 * W))
    at, ct = rng.integers(0, 250, pixels), rng.permutation(pixels) * 2 * W
    c = np.zeros(pixels * 2 * W, dtype)
    kernel(a, at, taps, run, b, s, c, ct)
    window = at[:, None] + (taps[:, None] + np.arange(run)).reshape(-1)
    want = np.zeros((pixels, 2 * W))
    want[:, :vectors * W] = (s + a[window].astype(float) @ b.reshape(-1, 2 * W))[:, :vectors * W]
    got = c.reshape(pixels, -1)[ct // (2 * W)]
    np.testing.assert_allclose(got, want, rtol=0, atol=32 * np.finfo(dtype).eps)
