"""Convolution of random shapes against its definition: sizes of 1, primes, tails of vectors and
tiles, strides, dilation, groups, depthwise with and without a multiplier, empty batches."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from nbgrad.kernels.cpu import conv as cpu
from nbgrad.kernels.cpu.jit import get_num_threads, set_num_threads
from nbgrad.kernels.cpu.layout import channels_first, channels_last
from nbgrad.kernels.reference import conv as definition

CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 17, 24, 33, 37])


@st.composite
def convolutions(draw):
    """(x, dy, weight, settings) in float32 or float64."""
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel, dilation = pair(1, 5), pair(1, 3)
    stride, padding = pair(1, 4), pair(0, 4)
    need = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    H, W = (max(1, n) + draw(st.integers(0, 17)) for n in need)
    groups, C, O = 1, draw(CHANNELS), draw(CHANNELS)
    kind = draw(st.sampled_from(["dense", "groups", "depthwise", "multiplier"]))
    if kind == "groups":
        groups = draw(st.integers(2, 5))
        C, O = groups * draw(st.integers(1, 9)), groups * draw(st.integers(1, 20))
    elif kind != "dense":
        groups, O = C, C * (1 if kind == "depthwise" else draw(st.integers(2, 3)))
    N = draw(st.sampled_from([0, 1, 2, 5]))
    P, Q = ((n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip((H, W), padding, dilation, kernel, stride, strict=True))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    shapes = (N, C, H, W), (N, O, P, Q), (O, C // groups, *kernel)
    return *(rng.standard_normal(s).astype(dtype) for s in shapes), {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def _close(a, b, terms):
    """Sums of so many products of standard normals: errors of rounding grow with their root."""
    eps = np.finfo(a.dtype).eps
    np.testing.assert_allclose(a, b, rtol=16 * eps, atol=16 * eps * (1 + terms ** 0.5))


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_weight_gradient(case):
    x, dy, w, how = case
    got = cpu.conv2d_weight(dy, x, kernel_size=w.shape[2:], **how)
    wide = definition.conv2d_weight(dy.astype(float), x.astype(float), kernel_size=w.shape[2:],
                                    **how)
    assert got.dtype == x.dtype
    assert got.flags.c_contiguous
    _close(got, wide, dy[:, 0].size)


@settings(max_examples=30, deadline=None)
@given(convolutions().filter(lambda case: case[3]["groups"] > 1))
def test_grouped_forward_and_input_gradient(case):
    x, dy, w, how = case
    wide = [v.astype(float) for v in (x, dy, w)]
    _close(cpu.conv2d(x, w, **how), definition.conv2d(wide[0], wide[2], **how), w[0].size)
    _close(cpu.conv2d_input(dy, w, input_size=x.shape, **how),
           definition.conv2d_input(wide[1], wide[2], input_size=x.shape, **how), w[:, 0].size)


SHAPES = [(6, 3, 40, 16, 3, 1, 1), (7, 16, 33, 40, 3, 2, 1), (3, 96, 31, 24, 1, 1, 1),
          (4, 64, 37, 64, 3, 1, 64), (4, 64, 37, 64, 3, 2, 64), (2, 160, 14, 640, 3, 1, 1)]


def _case(N, C, H, O, k, s, groups):
    rng, P = np.random.default_rng(0), (H - 1) // s + 1
    x, dy, w = (rng.standard_normal(shape, np.float32) for shape in (
        (N, C, H, H), (N, O, P, P), (O, C // groups, k, k)))
    return x, dy, w, {"stride": (s, s), "padding": (k // 2,) * 2, "dilation": (1, 1),
                      "groups": groups}


def _all(x, dy, w, how):
    return (cpu.conv2d(x, w, **how), cpu.conv2d_input(dy, w, input_size=x.shape, **how),
            cpu.conv2d_weight(dy, x, kernel_size=w.shape[2:], **how))


@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_for_every_number_of_threads(shape):
    case, threads = _case(*shape), get_num_threads()
    try:
        set_num_threads(1)
        alone = _all(*case)
    finally:
        set_num_threads(threads)
    for a, b in zip(alone, _all(*case)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_reach_what_they_reach_by_definition(shape, bad):
    x, dy, w, how = _case(*shape)
    x[1, 1, 3, 4], dy[0, 2, 1, 2] = bad, bad
    wrong = [np.isfinite(a) for a in _all(x, dy, w, how)]
    with np.errstate(invalid="ignore"):
        right = (definition.conv2d(x, w, **how),
                 definition.conv2d_input(dy, w, input_size=x.shape, **how),
                 definition.conv2d_weight(dy, x, kernel_size=w.shape[2:], **how))
    for a, b in zip(wrong, right):
        np.testing.assert_array_equal(a, np.isfinite(b))


@pytest.mark.parametrize("shape", [(2, 64, 24, 23), (1, 3, 128, 260), (9, 9, 33, 41),
                                   (1, 2, 1, 40000), (70, 513, 1, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_images_turn_to_channels_last_memory_value_by_value(shape, dtype):
    x = (np.arange(np.prod(shape)) % 2039).reshape(shape).astype(dtype)
    y = channels_last(x)
    assert y.flags.c_contiguous
    assert y.dtype == dtype
    assert np.array_equal(y, np.moveaxis(x, 1, -1))
    assert channels_first(y).shape == shape
    assert np.shares_memory(channels_last(channels_first(y)), y) or not y.size
    sliced = x[:, ::-1]                     # neither format: copied as NumPy does
    assert np.array_equal(channels_last(sliced), np.moveaxis(sliced, 1, -1))
