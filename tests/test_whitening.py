"""Products of the channels of a group, and sums of them by a matrix: kernels against their
definition; whitening as one op against its composition."""

import importlib
import tracemalloc

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference

import nbgrad
from nbgrad import graph, nn, ops
from nbgrad.autograd import grad
from nbgrad.ops.norm.channels import affine

rng = np.random.default_rng(6)
whitening = importlib.import_module("nbgrad.ops.norm.whitening")
# groups of full blocks and of parts, planes cut across tasks, rows, long and short planes, nothing
SHAPES = [((3, 8, 5, 5), 4), ((5, 6, 3, 5), 3), ((40, 10), 5), ((3, 32, 50, 3), 16),
          ((2, 5, 1, 7), 1), ((2, 12, 70, 70), 6), ((2, 96, 53, 53), 96), ((0, 4, 2), 2),
          ((2, 4, 0), 2)]


def last(x):
    """The same with channels last in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "d"), SHAPES)
def test_products_and_mixes_are_those_of_the_definition(shape, d, dtype):
    x, z = ((rng.standard_normal(shape) + 1).astype(dtype) for _ in range(2))
    C, tol = shape[1], 1e-6 if dtype == np.float32 else 1e-13
    mean, other, shift = rng.standard_normal((3, C))
    w, v = rng.standard_normal((2, C // d, d, d))
    for a, b in ((x, z), (last(x), z), (x, last(z)), (np.repeat(x, 2, -1)[..., ::2], z)):
        for args in ((a, a, mean, mean), (a, b, mean, other)):
            found, known = (k.channel_products(*args, size=d) for k in (cpu, reference))
            np.testing.assert_allclose(found, known, rtol=1e-12, atol=1e-10)
        for args in ((a, mean, w), (a, mean, w, shift), (a, mean, w, shift, b, other, v)):
            found, known = (k.channel_mix(*args) for k in (cpu, reference))
            assert found.dtype == dtype
            size = np.abs(known).max(initial=1.0)            # rounded once
            np.testing.assert_allclose(found / size, known / size, rtol=0, atol=tol)
    products = cpu.channel_products(x, x, mean, mean, size=d)
    np.testing.assert_array_equal(products, np.moveaxis(products, 1, 2))


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("gains", [True, False])
def test_one_op_is_its_composition(d, gains):
    x, dy = (nbgrad.tensor(rng.standard_normal((6, 4, 3))) for _ in range(2))
    parameters = list(map(nbgrad.tensor, rng.standard_normal((2, 4)))) if gains else []
    xs = [t.requires_grad_() for t in (x, *parameters)]
    y, mean, w = ops.whiten(x, d, 0.1, *parameters)
    z = affine(whitening._whitened(x, d, 0.1), *(parameters or (None, None)))
    for a, b in zip(*((t, *grad(t, xs, dy)) for t in (y, z))):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(mean.data, x.data.mean((0, 2)), rtol=1e-13)
    assert w.shape == (4 // d, d, d)


def test_the_slope_of_the_root_with_equal_eigenvalues():
    """∂A of ⟨∂W, A^(−1/2)⟩ at A = 4 I is −∂W / 16."""
    dw = rng.standard_normal((2, 3, 3))
    found = whitening._slope_of_root(np.broadcast_to(np.eye(3) / 2, (2, 3, 3)), dw)
    np.testing.assert_allclose(found, -(dw + np.moveaxis(dw, 1, 2)) / 32, rtol=1e-13)


def test_sums_of_large_groups_take_little_memory():
    """2 MB of each of 16 tasks, and 17 MB of vectors in the one that runs."""
    x, mean = rng.standard_normal((1, 512, 56, 56)).astype(np.float32), np.zeros(512)
    before = nbgrad.get_num_threads()
    nbgrad.set_num_threads(1)
    tracemalloc.start()
    try:
        cpu.channel_products(x, x, mean, mean, size=512)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        nbgrad.set_num_threads(before)
    assert peak < 80e6


@pytest.mark.parametrize("d", [4, 20])
def test_threads_change_no_bit(d):
    x, z = (rng.standard_normal((8, 20, 40, 40)).astype(np.float32) for _ in range(2))
    mean, other = rng.standard_normal((2, 20))
    w, before, runs = rng.standard_normal((20 // d, d, d)), nbgrad.get_num_threads(), []
    try:
        for n in (1, 2):
            nbgrad.set_num_threads(n)
            runs.append([cpu.channel_products(x, z, mean, other, size=d),
                         cpu.channel_mix(x, mean, w, None, z, other, w)])
    finally:
        nbgrad.set_num_threads(before)
    for a, b in zip(*runs):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
def test_evaluation_keeps_the_order_in_memory_and_x_alone(layout):
    """As training does: what may be viewed as rows there may be here."""
    x = rng.standard_normal((5, 6, 3, 4))
    if layout == "channels-last":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    layer = nn.DecorrelatedBatchNorm(6, group_size=3, dtype=np.float64)
    layer(nbgrad.as_tensor(x))
    layer.running_whitening.data[...] = rng.standard_normal((2, 3, 3))
    at = nbgrad.as_tensor(x).requires_grad_()
    y = layer.eval()(at)
    assert y.data.strides == x.strides
    assert graph.saved_bytes(y) < x.nbytes + 600         # and gamma, mean and W
    xc = (x - layer.running_mean.data[:, None, None]).reshape(5, 2, 3, 12)
    want = np.einsum("gij,ngjs->ngis", layer.running_whitening.data, xc).reshape(x.shape)
    np.testing.assert_allclose(y.data, want, rtol=1e-12, atol=1e-13)
