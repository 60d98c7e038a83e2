"""Powers of deviations: kernels against their definition, and batch norm made of them."""

import math

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference
from nbgrad.kernels.cpu.jit import PARALLEL_BYTES

import nbgrad
from nbgrad import ops
from nbgrad.autograd import grad

rng = np.random.default_rng(5)
POWERS = [1, 2, 3, 7, 32, math.inf]
# planes in one task and in several, rows, more channels than a vector, nothing
SHAPES = [(3, 4, 5, 5), (2, 3, 150, 150), (9, 5), (700, 37), (2, 3, 1, 1), (0, 3, 2), (2, 0, 3)]


def last(x):
    """The same with channels last in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def drawn(shape, dtype):
    """Of quarters, so that several may be the largest."""
    return (np.round(rng.standard_normal(shape) * 4) / 4 + 1).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_maps_are_those_of_the_definition(shape, p, dtype):
    x, dy = drawn(shape, dtype), drawn(shape, dtype)
    pivot, unit, *constants = rng.random((5, shape[1])) + 0.5
    unit = np.ones_like(unit) if p == math.inf else unit
    pivot[:1] = x[:, :1] = 1                                # one channel is constant
    for a, d in ((x, dy), (last(x), dy), (x, last(dy)), (np.repeat(x, 2, -1)[..., ::2], dy)):
        found, known = (k.power_sums(a, pivot, unit, p=p) for k in (cpu, reference))
        for own, want in zip(found, known, strict=True):
            np.testing.assert_allclose(own, want, rtol=1e-12, atol=1e-12)
        found, known = (k.power_map(d, a, pivot, unit, *constants, known[0], p=p)
                        for k in (cpu, reference))
        assert found.dtype == dtype
        tol = 1e-6 if dtype == np.float32 else 1e-13        # rounded once, of terms that cancel
        size = np.abs(known).max(initial=1.0)
        np.testing.assert_allclose(found / size, known / size, rtol=0, atol=tol)


@pytest.mark.parametrize("p", POWERS)
def test_infinities_and_nan_are_as_in_the_definition(p):
    x, dy = rng.standard_normal((2, 6, 7, 5))
    x[2, 1], x[3, 2, 0], x[:, 3, 1], x[4, 4, 4], x[1, 4, 2] = (
        np.inf, -np.inf, np.nan, np.inf, -np.inf)
    for pivot in (np.zeros(7), np.where(np.arange(7) % 2, np.inf, 1.0)):
        unit, *constants = rng.random((4, 7)) + 0.5
        unit = np.ones(7) if p == math.inf else unit
        for a in (x, last(x)):
            found, known = (k.power_sums(a, pivot, unit, p=p) for k in (cpu, reference))
            for own, want in zip(found, known, strict=True):
                np.testing.assert_allclose(own, want, rtol=1e-12, atol=1e-13)
            found, known = (k.power_map(dy, a, pivot, unit, *constants, known[0], p=p)
                            for k in (cpu, reference))
            np.testing.assert_allclose(found, known, rtol=1e-12, atol=1e-13)


def test_what_is_behind_a_plane_adds_nothing():
    """A 0 there is 1e10 units off its channel's mean, and the power of that is infinite."""
    x = 1e10 + rng.standard_normal((2, 3, 13))
    found, known = (k.power_sums(x, np.full(3, 1e10), np.ones(3), p=32) for k in (cpu, reference))
    np.testing.assert_allclose(found, known, rtol=1e-12)


@pytest.mark.parametrize("p", [1, 3, 32, math.inf])
def test_a_channel_far_below_eps_is_divided_by_it(p):
    x = nbgrad.tensor(rng.standard_normal((50, 2)) * 1e-13, requires_grad=True)
    y, _, s = ops.lp_batch_norm(x, p=p)
    xc, want, _ = ops.lp_deviation(x, p)
    np.testing.assert_allclose(s, want.data[0], rtol=1e-13)
    np.testing.assert_allclose(y.data, ops.divide_channels(xc, want).data, rtol=1e-12)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 8, 1.5, math.inf])
def test_one_op_is_its_composition(p, centered):
    """Values, statistics and gradients of lp_deviation and divide_channels."""
    x, dy = (nbgrad.tensor(rng.standard_normal((5, 3, 4))) for _ in range(2))
    xs = [t.requires_grad_() for t in (x, *map(nbgrad.tensor, rng.standard_normal((2, 3))))]
    y, mean, scale = ops.lp_batch_norm(*xs, p, 0.1, centered=centered)
    xc, s, mu = ops.lp_deviation(x, p, 0.1, centered=centered)
    z = ops.divide_channels(xc, s, *(t.reshape((1, -1, 1)) for t in xs[1:]))
    found, known = ((t, *grad(t, xs, dy)) for t in (y, z))
    for a, b in zip(found, known):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(mean, mu.data, rtol=1e-14)
    np.testing.assert_allclose(scale, s.data.reshape(-1), rtol=1e-13)


@pytest.mark.parametrize("p", [1, 3, 32, math.inf])
@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1e-30), (np.float32, 1e38),
                                          (np.float64, 1e-150), (np.float64, 1e300)])
def test_no_power_leaves_the_range(p, dtype, scale):
    """y does not depend on the scale of x, where ε is as small."""
    x = rng.standard_normal((50, 2)).clip(-2, 2)
    eps = max((scale * 1e-9) ** 2, 5e-324) if scale < 1 else 1e-5
    y, _, s = ops.lp_batch_norm(nbgrad.tensor((x * scale).astype(dtype)), p=p, eps=eps)
    want, _, unit = ops.lp_batch_norm(nbgrad.tensor(x), p=p, eps=1e-18)
    tol = 1e-6 if dtype == np.float32 else 1e-8              # √ε is 1e-9 of the unit
    np.testing.assert_allclose(y.data, want.data, rtol=tol, atol=tol)
    np.testing.assert_allclose(s / scale, unit, rtol=tol)


@pytest.mark.parametrize(("settings", "message"), [
    ({"p": 0.5}, "p must be at least 1"), ({"p": math.nan}, "p must be at least 1"),
    ({"eps": 0.0}, "eps must be positive"), ({"weight": nbgrad.ones(2)}, "of shape")])
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"lp_batch_norm: .*{message}"):
        ops.lp_batch_norm(nbgrad.zeros(4, 3), **settings)


@pytest.mark.parametrize("p", [3, math.inf])
def test_threads_change_no_bit(p):
    x, dy = (rng.standard_normal((9, 20, 40, 40)).astype(np.float32) for _ in range(2))
    assert x.nbytes >= PARALLEL_BYTES
    constants, before, runs = rng.random((6, 20)), nbgrad.get_num_threads(), []
    try:
        for n in (1, 2):
            nbgrad.set_num_threads(n)
            runs.append([*cpu.power_sums(x, *constants[:2], p=p),
                         cpu.power_map(dy, x, *constants, p=p)])
    finally:
        nbgrad.set_num_threads(before)
    for a, b in zip(*runs):
        np.testing.assert_array_equal(a, b)
