"""The kernels that do a linear layer, its batch norm and the activation in one call: against the
reference in float64, and against the three kernels in turn."""

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference
from nbgrad.kernels.cpu import fused

ACTIVATIONS = [None, "relu", "sigmoid", "tanh"]
# N, K, C: dots and tiles, k in several passes of either, rows in several passes, tails of vectors,
# one of each, several tasks
SHAPES = [(60, 784, 100), (60, 100, 100), (2, 3, 5), (2, 1, 1), (9, 4, 1), (33, 1, 47),
          (70, 600, 33), (3, 2100, 20), (600, 40, 21), (128, 300, 256)]
# float32 keeps 24 bits; sums of N or K terms lose some of them
EPSILON = {np.float32: 2e-6, np.float64: 4e-15}
dtypes = pytest.mark.parametrize("dtype", EPSILON, ids=lambda t: t.__name__)


def inputs(N, K, C, dtype):
    """x, w, b, γ, β and dy."""
    rng = np.random.default_rng((N, K, C))
    shapes = (N, K), (C, K), (C,), (C,), (C,), (N, C)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def wide(*arrays):
    return [a.astype(np.float64) for a in arrays]


def close(got, want, size, dtype):
    """Equal up to rounding in sums of terms of that size."""
    assert got.dtype == dtype
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=EPSILON[dtype] * 8, atol=EPSILON[dtype] * size)


def check_forward(out, x, w, b, gamma, beta, dtype, activation, eps=1e-5):
    """z is the product, and the rest what the reference says of that z."""
    y, z, mean, invstd = out
    size = (np.abs(x.astype(np.float64)) @ np.abs(w.T.astype(np.float64))).max() + np.abs(b).max()
    close(z, reference.linear(*wide(x, w, b)), size, dtype)
    want, mu, _, r = reference.batch_norm(*wide(z, gamma, beta), eps=eps, relu=activation == "relu")
    if activation in ("sigmoid", "tanh"):
        want = getattr(reference, activation)(want)
    close(y, want, 4 * max(1, np.abs(want).max()), dtype)
    np.testing.assert_allclose(mean, mu, rtol=1e-6, atol=1e-6 / r.max())
    np.testing.assert_allclose(invstd, r, rtol=1e-5)


def check_backward(grads, dy, x, w, gamma, out, dtype, activation):
    y, z, mean, invstd = out
    want = reference.linear_batch_norm_backward(
        *wide(dy, x, w, gamma, z, y), mean, invstd, activation=activation, input_gradient=True)
    N, (C, _), slope = len(x), w.shape, np.abs(gamma * invstd).max() * np.abs(dy).max()
    xhat = np.abs((z - mean) * invstd).max()
    of_sum = N * np.abs(dy).max() * max(1, xhat)
    sizes = C * slope * np.abs(w).max(), N * slope * np.abs(x).max(), of_sum, of_sum, N * slope
    for got, expected, size in zip(grads, want, sizes):
        close(got, expected, 4 * size, dtype)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_and_gradients(shape, dtype):
    x, w, b, gamma, beta, dy = inputs(*shape, dtype)
    for activation in ACTIVATIONS:
        out = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation=activation)
        check_forward(out, x, w, b, gamma, beta, dtype, activation)
        grads = of(dy, x, w, gamma, out, activation)
        check_backward(grads, dy, x, w, gamma, out, dtype, activation)


def of(dy, x, w, gamma, out, activation, input_gradient=True):
    y, z, mean, invstd = out
    return cpu.linear_batch_norm_backward(dy, x, w, gamma, z, y, mean, invstd,
                                          activation=activation, input_gradient=input_gradient)


@pytest.mark.parametrize("shape", [(60, 100, 100), (13, 7, 5), (70, 600, 33)])
def test_the_same_as_the_three_kernels(shape, monkeypatch):
    x, w, b, gamma, beta, dy = inputs(*shape, np.float32)
    out = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="tanh")
    grads = of(dy, x, w, gamma, out, "tanh")
    monkeypatch.setattr(fused, "_in_one", lambda *size: None)
    want = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="tanh")
    for got, expected in zip((*out, *grads), (*want, *of(dy, x, w, gamma, want, "tanh"))):
        size = max(np.abs(expected).max(), 0.1)       # the bias's gradient is 0 but for rounding
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5 * size)


def test_large_layers_and_other_dtypes_take_the_three_kernels():
    assert fused._in_one(60, 784, 100, np.dtype(np.float32)) is not None
    assert fused._in_one(4096, 1024, 1024, np.dtype(np.float32)) is None
    x, w, b, gamma, beta, dy = inputs(1100, 260, 16, np.float32)
    assert fused._in_one(1100, 260, 16, x.dtype) is None
    out = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="sigmoid")
    check_forward(out, x, w, b, gamma, beta, np.float32, "sigmoid")
    check_backward(of(dy, x, w, gamma, out, "sigmoid"), dy, x, w, gamma, out, np.float32, "sigmoid")


@dtypes
def test_any_strides_and_read_only_arrays(dtype):
    arrays = inputs(24, 18, 20, dtype)
    x, w, b, gamma, beta, dy = arrays
    out = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="sigmoid")
    want = of(dy, x, w, gamma, out, "sigmoid")

    def stepped(a):
        room = np.full([2 * n for n in a.shape], 7, a.dtype)[(slice(None, None, -2),) * a.ndim]
        room[...] = a
        return room

    shut = arrays[0].copy()
    shut.flags.writeable = False
    for given in (map(stepped, arrays), map(np.asfortranarray, arrays), [shut, *arrays[1:]]):
        x, w, b, gamma, beta, dy = given
        got = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="sigmoid")
        for a, e in zip((*got, *of(dy, x, w, gamma, got, "sigmoid")), (*out, *want)):
            np.testing.assert_array_equal(a, e)
    for a, e in zip(arrays, inputs(24, 18, 20, dtype)):
        np.testing.assert_array_equal(a, e)                     # nothing was written to


def test_without_bias_gamma_beta_or_input_gradient():
    x, w, _, _, _, dy = inputs(24, 18, 384, np.float32)        # as many channels as zeros are ready
    zeros, ones = np.zeros(384, np.float32), np.ones(384, np.float32)
    out = cpu.linear_batch_norm(x, w, None, None, None, eps=1e-5)
    for got, want in zip(out, cpu.linear_batch_norm(x, w, zeros, ones, zeros, eps=1e-5)):
        np.testing.assert_array_equal(got, want)
    dx, *grads = of(dy, x, w, None, out, None, input_gradient=False)
    assert dx.shape == ()
    for got, want in zip(grads, of(dy, x, w, ones, out, None)[1:]):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("step", [1, 2])
def test_running_statistics_move_once(step):
    x, w, b, gamma, beta, _ = inputs(24, 18, 20, np.float32)
    own = [np.full(40, v, np.float32)[::step][:20] for v in (0.5, 2)]
    want = [a.astype(np.float64) for a in own]
    for scale in (1, np.float32(1e25)):                         # float32's squares overflow
        how = {"eps": 1e-5, "activation": "relu"}
        y, *_ = cpu.linear_batch_norm(x * scale, w, b, gamma, beta, running=(*own, 0.25), **how)
        expected, *_ = reference.linear_batch_norm(*wide(x * scale, w, b, gamma, beta), **how,
                                                   running=(*want, 0.25))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own[0], want[0], rtol=1e-4, atol=1e-5 * scale)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(own[1], want[1].astype(np.float32), rtol=1e-5)


def test_gradients_where_float32_is_not_enough():
    x, w, b, gamma, beta, dy = inputs(24, 18, 20, np.float32)
    out = cpu.linear_batch_norm(x * np.float32(1e25), w, b, gamma, beta, eps=1e-5)
    dx, dw, *_ = of(dy * np.float32(1e25), x, w, gamma, out, None)
    y, z, mean, invstd = out
    want = reference.linear_batch_norm_backward(
        *wide(dy * np.float32(1e25), x, w, gamma, z, y), mean, invstd, input_gradient=True)
    np.testing.assert_allclose(dx, want[0], rtol=1e-4, atol=1e-5 * np.abs(want[0]).max())
    np.testing.assert_allclose(dw, want[1], rtol=1e-4, atol=1e-5 * np.abs(want[1]).max())


def test_a_channel_far_from_zero():
    """z is 1e4 of its deviations away: of it float32 keeps 3 digits, and all of them count."""
    x, w, b, gamma, beta, dy = inputs(60, 50, 40, np.float32)
    b = b + np.float32(1e4 * np.sqrt(50))
    out = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5)
    check_forward(out, x, w, b, gamma, beta, np.float32, None)
    check_backward(of(dy, x, w, gamma, out, None), dy, x, w, gamma, out, np.float32, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_channels(bad):
    x, w, b, gamma, beta, dy = inputs(24, 18, 40, np.float32)
    clean = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="sigmoid")
    w[7, 3] = bad
    out = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="sigmoid")
    others = np.arange(40) != 7
    assert np.isnan(out[0][:, 7]).all()
    np.testing.assert_allclose(out[0][:, others], clean[0][:, others], rtol=1e-5)
    dx, dw, dgamma, dbeta, _ = of(dy, x, w, gamma, out, "sigmoid")
    assert np.isnan(dx).all()
    for grad in (dw, dgamma, dbeta):
        assert np.isnan(grad[7]).all()
        assert np.isfinite(grad[others]).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing(shape):
    x, w, b, gamma, beta, dy = inputs(*shape, np.float32)
    out = cpu.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="relu")
    want = reference.linear_batch_norm(x, w, b, gamma, beta, eps=1e-5, activation="relu")
    for got, expected in zip(out, want):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    y, z, mean, invstd = out
    grads = of(dy, x, w, gamma, out, "relu")
    expected = reference.linear_batch_norm_backward(dy, x, w, gamma, z, y, mean, invstd,
                                                    activation="relu", input_gradient=True)
    for got, want in zip(grads, expected):                      # with K = 0, 1/σ is 316
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * 3 * invstd.max(initial=1))
