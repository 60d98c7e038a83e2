"""Kernels over samples and channels against their definition in NumPy."""

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference

import nbgrad

rng = np.random.default_rng(0)
SHAPES = [(3, 5, 4, 5), (4, 20, 9, 9), (7, 3), (300, 37), (2, 3, 50, 50), (1, 1, 9000), (2, 9, 3),
          (2, 0, 3), (0, 3, 2), (2, 3, 0)]
FORMULAS = {"affine": 3, "gated": 3, "bounded": 5}


def last(x):
    """The same with channels last in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def normal(shape, dtype, mean=0.0):
    return (rng.standard_normal(shape) + mean).astype(dtype)


def weights_of(shape):
    whole = shape[0], 1, *shape[2:]
    return rng.random(whole) * (rng.random(whole) < 0.6)


def close(found, wanted, dtype):
    """float32: sums of terms of size 1 that cancel, and exp of float32, 1e-7 each."""
    size = float(np.abs(wanted).max(initial=1.0))
    tol = 2e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(found / size, wanted / size, rtol=0, atol=tol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape, weighted, dtype):
    w = weights_of(shape) if weighted else None
    x = normal(shape, dtype, 10)
    x = x if w is None else np.where(w > 0, x, np.nan).astype(dtype)
    for a in (x, last(x), np.repeat(x, 2, -1)[..., ::2]):
        for together in (False, True):
            found = cpu.sample_moments(a, w, together=together)
            for own, known in zip(found, reference.sample_moments(x, w, together=together)):
                assert own.shape == ((1 if together else len(x)), x.shape[1])
                np.testing.assert_allclose(own, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("shape", SHAPES)
def test_formulas(shape, name, weighted, dtype):
    w = weights_of(shape) if weighted else None
    x, dy = (normal(shape, dtype) for _ in range(2))
    if w is not None:
        x, dy = (np.where(w > 0, a, np.nan).astype(dtype) for a in (x, dy))
    for rows in {1, len(x)} - {0}:
        constants = [rng.random((rows, x.shape[1])) + 0.5 for _ in range(FORMULAS[name])]
        slopes = [rng.random((rows, x.shape[1])) for _ in range(3)]
        want = (reference.sample_map(name, x, constants, w),
                *reference.sample_sums(name, dy, x, constants, w),
                reference.sample_map_backward(name, dy, x, constants, w, *slopes))
        for a, d in ((x, dy), (last(x), dy), (x, last(dy))):
            found = (cpu.sample_map(name, a, constants, w),
                     *cpu.sample_sums(name, d, a, constants, w),
                     cpu.sample_map_backward(name, d, a, constants, w, *slopes))
            for own, known in zip(found, want):
                assert own.dtype == known.dtype
                assert own.shape == known.shape
                close(own, known, dtype)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_slopes_are_those_of_the_values(name):
    """The definition, against central differences of its own values."""
    x, dy = normal((2, 3, 4), float), normal((2, 3, 4), float)
    constants, step = [rng.random((2, 3)) + 0.5 for _ in range(FORMULAS[name])], 1e-6
    zero = np.zeros((2, 3))

    def y(x, constants):
        return reference.sample_map(name, x, constants)
    dx = reference.sample_map_backward(name, dy, x, constants, None, zero, zero, zero)
    near = (y(x + step, constants) - y(x - step, constants)) / (2 * step) * dy
    np.testing.assert_allclose(dx, near, rtol=1e-7, atol=1e-8)
    for i, found in enumerate(reference.sample_sums(name, dy, x, constants)):
        ends = [y(x, [a + sign * step * (j == i) for j, a in enumerate(constants)])
                for sign in (1, -1)]
        near = ((ends[0] - ends[1]) / (2 * step) * dy).sum(2)
        np.testing.assert_allclose(found, near, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("value", [0.1, 100.0, 1e7, 1e10])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_equal_values_the_mean_is_exactly_that(value, dtype):
    w = weights_of((3, 2, 40, 41))
    for x in (np.full((3, 2, 40, 41), value, dtype), last(np.full((3, 2, 40, 41), value, dtype))):
        for given in (None, w):
            for together in (False, True):
                _, mean, m2 = cpu.sample_moments(x, given, together=together)
                np.testing.assert_array_equal(mean, np.float64(dtype(value)))
                np.testing.assert_array_equal(m2, 0.0)


def test_the_ends_of_float32():
    x = normal((2, 3, 400), np.float64)
    for scale in (1e-30, 1e38 / np.abs(x).max()):
        _, mean, m2 = cpu.sample_moments((x * scale).astype(np.float32))
        _, known, known2 = reference.sample_moments((x * scale).astype(np.float32))
        np.testing.assert_allclose(mean, known, rtol=1e-11)
        np.testing.assert_allclose(m2, known2, rtol=1e-11)


def test_bits_do_not_depend_on_threads():
    x, dy = normal((8, 16, 70, 70), np.float32), normal((8, 16, 70, 70), np.float32)
    constants = [rng.random((8, 16)) for _ in range(3)]
    for a in (x, last(x)):
        runs = []
        for n in (1, nbgrad.get_num_threads()):
            before = nbgrad.get_num_threads()
            nbgrad.set_num_threads(n)
            try:
                runs.append((*cpu.sample_moments(a, together=True),
                             cpu.sample_map("affine", a, constants),
                             *cpu.sample_sums("gated", dy, a, constants)))
            finally:
                nbgrad.set_num_threads(before)
        for one, other in zip(*runs):
            np.testing.assert_array_equal(one, other)
