"""Convolutions with few outputs: taps of a kernel row, or phases of an input, side by side."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from nbgrad.kernels import cpu, reference
from nbgrad.kernels.cpu import conv, folded, jit, phases, simd, thinweight
from nbgrad.kernels.shapes import Conv

DTYPES = [np.float32, np.float64]
PLAIN = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


@pytest.fixture
def always(monkeypatch):
    """Both ways wherever they can be used. What was decided before is forgotten."""
    monkeypatch.setattr(folded, "GAIN", 0)
    monkeypatch.setattr(thinweight, "GAIN", 0)
    conv._windows_of.cache_clear()
    conv._phases.cache_clear()
    yield
    conv._windows_of.cache_clear()
    conv._phases.cache_clear()


def all_three(k, x, w, b, dy, how):
    return (k.conv2d(x, w, b, **how), k.conv2d_input(dy, w, input_size=x.shape, **how),
            k.conv2d_weight(dy, x, kernel_size=w.shape[2:], **how))


def example(dtype, x, weight, how):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal(x).astype(dtype), rng.standard_normal(weight).astype(dtype)
    b = rng.standard_normal(weight[0]).astype(dtype)
    shape = reference.conv2d(x, w, **how).shape
    return x, w, b, rng.standard_normal(shape).astype(dtype), how


def check(dtype, x, weight, how):
    """All three against float64. Sums of n standard normals have roots of n in them, and round so
    each time: errors grow with n."""
    x, w, b, dy, how = example(dtype, x, weight, how)
    exact = all_three(reference, *(a.astype(float) for a in (x, w, b, dy)), how)
    for got, want, terms in zip(all_three(cpu, x, w, b, dy, how), exact,
                                (w[0].size, w[:, 0].size, dy[:, 0].size)):
        assert (got.shape, got.dtype) == (want.shape, dtype)
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(got, want, rtol=16 * eps, atol=2 * eps * (16 + terms))


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(DTYPES), st.integers(1, 3), st.sampled_from([1, 2, 3, 6, 13, 16, 17]),
       st.sampled_from([1, 2, 3, 5, 6, 8, 11, 16]),
       st.tuples(st.integers(1, 15), st.integers(1, 15)),
       st.tuples(st.integers(1, 8), st.integers(1, 9)), st.tuples(pairs, pairs),
       st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_values(always, dtype, N, C, O, size, window, steps, padding):
    stride, dilation = steps
    size = tuple(max(n, d * (k - 1) + 1 - 2 * p)
                 for n, k, p, d in zip(size, window, padding, dilation))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 1}
    check(dtype, (N, C, *size), (O, C, *window), how)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_and_panels(always, dtype):
    check(dtype, (2, 1, 70, 40), (15, 1, 3, 11), {**PLAIN, "padding": (1, 5)})
    check(dtype, (1, 3, 11, 130), (16, 3, 9, 5), {**PLAIN, "padding": (0, 2)})


def suits(x, weight, padding=(0, 0), stride=(1, 1)):
    """Whether the forward, the input's gradient and the weights' gradient go this way."""
    g = Conv.of(x, weight, stride, padding, (1, 1), 1)
    few, direct, _ = conv._phases(g, 4)
    return conv._windows_of(g, 4)[3], len(few) == len(direct) > 0, thinweight.suits(g, 4)


@pytest.mark.skipif(simd.VECTOR != 64, reason="the choice is by cycles of 64-byte vectors")
def test_which_convolutions_go_this_way():
    assert suits((64, 1, 28, 28), (6, 1, 5, 5), (2, 2)) == (True, True, True)
    assert suits((64, 6, 14, 14), (16, 6, 5, 5)) == (False, True, True)
    assert suits((128, 3, 32, 32), (16, 3, 3, 3), (1, 1))[2]
    assert not suits((128, 16, 32, 32), (16, 16, 3, 3), (1, 1))[2]
    assert suits((8, 3, 32, 32), (8, 3, 5, 5)) == (False, True, True)
    assert suits((8, 32, 16, 16), (32, 32, 3, 3), (1, 1)) == (False, False, False)
    assert suits((8, 3, 64, 64), (64, 3, 7, 7), (3, 3), (2, 2))[::2] == (False, False)
    assert suits((8, 16, 9, 9), (4, 16, 1, 1)) == (False, False, False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["x", "weight", "dy"])
@pytest.mark.parametrize("padding", [0, 2])
def test_nan_and_inf_reach_what_they_reach_by_definition(always, place, bad, padding):
    x, w, b, dy, how = example(np.float32, (2, 3, 8, 9), (6, 3, 5, 4),
                               {**PLAIN, "padding": (padding, padding)})
    {"x": x, "weight": w, "dy": dy}[place][1, 2, 1, 0] = bad
    with np.errstate(invalid="ignore"):
        got, want = (all_three(k, x, w, b, dy, how) for k in (cpu, reference))
    # a bad weight of an input's gradient meets zeros around dy by every way, not by definition
    for f in (0,) if place == "weight" else range(3):
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(got[f]), kind(want[f]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_do_not_depend_on_threads(always, dtype):
    case = example(dtype, (19, 3, 33, 31), (6, 3, 5, 5), PLAIN)
    threads = jit.get_num_threads()
    try:
        jit.set_num_threads(1)
        alone = all_three(cpu, *case)
    finally:
        jit.set_num_threads(threads)
    for a, b in zip(alone, all_three(cpu, *case)):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def together(monkeypatch):
    """All phases of a strided convolution's input at once."""
    monkeypatch.setattr(phases, "GAIN", 0)
    monkeypatch.setattr(folded, "GAIN", 1e9)
    caches = phases.plan, conv._windows_of, conv._phases
    for f in caches:
        f.cache_clear()
    yield
    for f in caches:
        f.cache_clear()


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(DTYPES), st.integers(1, 3), st.sampled_from([1, 2, 3, 5, 9, 17]),
       st.sampled_from([1, 3, 16, 17]), st.tuples(st.integers(1, 15), st.integers(1, 15)),
       st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(pairs, pairs),
       st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_phases_together(together, dtype, N, C, O, size, window, steps, padding):
    stride, dilation = steps
    size = tuple(max(n, d * (k - 1) + 1 - 2 * p)
                 for n, k, p, d in zip(size, window, padding, dilation))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 1}
    check(dtype, (N, C, *size), (O, C, *window), how)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["weight", "dy"])
def test_nan_and_inf_stay_in_their_phase(together, place, bad):
    how = {**PLAIN, "stride": (2, 2)}
    x, w, _, dy, how = example(np.float32, (3, 3, 8, 9), (6, 3, 3, 3), how)
    {"weight": w, "dy": dy}[place][1, 2, 1, 1] = bad
    with np.errstate(invalid="ignore"):
        got, want = (k.conv2d_input(dy, w, input_size=x.shape, **how) for k in (cpu, reference))
    assert np.isfinite(want).any()
    if place == "dy":
        for kind in (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(kind(got), kind(want))
        fine = np.isfinite(want)
        np.testing.assert_allclose(got[fine], want[fine], atol=1e-5)
    else:                                         # other phases do not meet that tap
        assert np.isfinite(got[:, :, 1::2]).all()


@pytest.mark.skipif(simd.VECTOR != 64, reason="the choice is by cycles of 64-byte vectors")
def test_which_phases_go_together():
    def plan(x, weight, stride=2):
        return phases.plan(Conv.of(x, weight, (stride,) * 2, (1, 1), (1, 1), 1), 4) is not None
    assert plan((8, 3, 224, 224), (32, 3, 3, 3))
    assert plan((8, 4, 64, 64), (64, 4, 4, 4))
    assert not plan((8, 3, 32, 32), (16, 3, 3, 3), 1)
    assert not plan((8, 16, 32, 32), (32, 16, 3, 3))
