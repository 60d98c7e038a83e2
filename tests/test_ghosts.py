"""Ghost batch norm and filter response norm in one kernel: against a loop over ghosts, against the
definitions, and what neither threads nor bad values may change."""

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference

import nbgrad
from nbgrad import nn, ops
from nbgrad.testing import gradcheck

rng = np.random.default_rng(11)
# whole ghosts, a smaller last one, one ghost; in blocks (2 MB a ghost) and not
SHAPES = [((8, 3), 4), ((7, 3), 3), ((5, 4, 3, 3), 2), ((6, 3, 17, 5), 9), ((3, 5, 7), 1)]
LARGE = (10, 20, 40, 41), 4
LAYOUTS = ["NCHW", "channels-last"]


def made(shape, layout="NCHW", dtype=np.float32, offset=3.0):
    a = (rng.standard_normal(shape) * 2 + offset).astype(dtype)
    if layout == "channels-last":
        a = np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)
    return a


def both(k, x, dy, gamma, beta, size):
    y, mean, var, invstd = k.ghost_batch_norm(x, gamma, beta, size=size, eps=1e-5)
    return y, mean, var, invstd, *k.ghost_batch_norm_backward(dy, x, gamma, mean, invstd, size=size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "size"), [*SHAPES, LARGE])
def test_one_kernel_is_the_loop_to_the_bit(shape, size, dtype, layout):
    x, dy = made(shape, layout, dtype), made(shape, layout, dtype, 0)
    gamma, beta = made((2, shape[1]), dtype=dtype)
    got = both(cpu, x, dy, gamma, beta, size)
    assert got[0].strides == x.strides == got[4].strides
    sums = np.zeros((2, shape[1]))
    for g, i in enumerate(range(0, len(x), size)):
        part = slice(i, i + size)
        y, *stats = cpu.batch_norm(x[part], gamma, beta, eps=1e-5)
        dx, *own, _ = cpu.batch_norm_backward(dy[part], x[part], gamma, stats[0], stats[2])
        np.testing.assert_array_equal(got[0][part], y)
        np.testing.assert_array_equal([a[g] for a in got[1:4]], stats)
        np.testing.assert_array_equal(got[4][part], dx)
        sums += own
    # of at most 20,000 products of size 1, each ghost's rounded once in the loop
    np.testing.assert_allclose(got[5:], sums, rtol=1e-5, atol=1e-3 if dtype == np.float32 else 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_values_are_those_of_the_definition(shape, size, layout):
    x, dy = made(shape, layout), made(shape, layout, offset=0)
    gamma, beta = made((2, shape[1]))
    for got, want in zip(both(cpu, x, dy, gamma, beta, size),
                         both(reference, x, dy, gamma, beta, size)):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("eps", [1e-5, 0.25, 0.0])
@pytest.mark.parametrize("shape", [(5, 3, 0), (0, 3, 4), (0, 3), (4, 0, 2)])
def test_ghosts_of_nothing_have_mean_0_and_the_invstd_of_eps(shape, eps):
    x = np.zeros(shape, np.float32)
    with np.errstate(all="ignore"):
        got, want = (k.ghost_batch_norm(x, None, None, size=2, eps=eps) for k in (cpu, reference))
    ghosts = -(-len(x) // 2), shape[1]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert got[3].shape == ghosts
    assert (got[3] == (1 / np.sqrt(eps) if eps else np.inf)).all()
    back = [k.ghost_batch_norm_backward(x, x, None, got[1], got[3], size=2)
            for k in (cpu, reference)]
    for a, b in zip(*back, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_no_bit(layout):
    shape, size = LARGE
    x, dy = made(shape, layout), made(shape, layout)
    gamma, beta = made((2, shape[1]))
    before, runs = nbgrad.get_num_threads(), []
    try:
        for n in (1, 2):
            nbgrad.set_num_threads(n)
            runs.append(both(cpu, x, dy, gamma, beta, size))
    finally:
        nbgrad.set_num_threads(before)
    for a, b in zip(*runs):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_value_stays_in_its_channel_of_its_ghost(bad, layout):
    x, dy = made((7, 3, 4, 4), layout), made((7, 3, 4, 4), layout)
    gamma, beta = made((2, 3))
    clean = both(cpu, x, dy, gamma, beta, 3)
    x = x.copy(order="K")
    x[4, 1, 2, 2] = bad
    found = both(cpu, x, dy, gamma, beta, 3)
    for a, b in zip((found[0], found[4]), (clean[0], clean[4])):
        same = np.ones(x.shape, bool)
        same[3:6, 1] = False
        np.testing.assert_array_equal(a[same], b[same])
        assert np.isfinite(a[3:6, 1]).all() == (bad == 1e30)
    assert np.isfinite(found[5][[0, 2]]).all()
    if bad == 1e30:                  # x̂ of the one is √(n − 1), of the others −1/√(n − 1), n = 48
        xhat = (found[0][4, 1, 2, 2] - beta[1]) / gamma[1]
        np.testing.assert_allclose(xhat, np.sqrt(47), rtol=1e-6)


def test_layers_of_ghosts_follow_the_moments_of_the_whole_batch():
    x = nbgrad.tensor(made((10, 3, 4, 4)))
    layer, whole = nn.GhostBatchNorm(3, ghost_size=4), nn.BatchNorm2d(3)
    layer(x)
    whole(x)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(layer, name).data, getattr(whole, name).data, rtol=1e-6)


@pytest.mark.parametrize(("x", "size", "said"), [
    (nbgrad.ones(4, 3), 0, "ghost_size must be an int"), (nbgrad.ones(4, 3), 1.5, "ghost_size"),
    (nbgrad.ones(5, 3), 2, "Expected more than 1 value per channel"),
    (nbgrad.ones(5, 3), 1, "Expected more than 1 value per channel"),
    (nbgrad.ones(3), 2, "expected a floating")])
def test_what_ghosts_refuse(x, size, said):
    with pytest.raises(ValueError, match=said):
        ops.ghost_batch_norm(x, size)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 0), (4, 3, 0)])
def test_ghosts_of_nothing(shape):
    x = nbgrad.ones(*shape).requires_grad_()
    y, found = ops.ghost_batch_norm(x, 2)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert found.mean.shape == (-(-shape[0] // 2), shape[1])


# -------------------------------------------------------------------------- filter response norm

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("floor", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (2, 6, 3, 3), (2, 33, 17, 16), (1, 20, 130, 131)])
def test_filter_response_with_a_threshold_is_its_definition(shape, floor, layout):
    x, dy, C = made(shape, layout, offset=0.5), made(shape, layout, offset=0), shape[1]
    gamma, beta, tau = made((3, C), offset=0)
    how = {"groups": C, "center": False, "floor": tau if floor else None}
    found = []
    for k in (cpu, reference):
        y, mean, invrms = k.group_norm(x, gamma, beta, eps=1e-5, **how)
        found.append((y, mean, invrms, *k.group_norm_backward(dy, x, gamma, mean, invrms,
                                                              beta=beta, **how)))
    assert len(found[0]) == 7 if floor else 6
    for got, want in zip(*found):
        # sums of up to 17,000 products of size 1 in float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(1, np.abs(want).max()))


def test_what_lies_below_the_threshold_stays_there():
    x, tau = nbgrad.tensor([[[3.0, -3.0, np.nan]]]), nbgrad.tensor([0.5])
    y = ops.filter_response_norm(x[:, :, :2], None, None, tau, 0.0).requires_grad_()
    np.testing.assert_array_equal(y.data, [[[1.0, 0.5]]])
    assert np.isnan(ops.filter_response_norm(x, None, None, tau).data).all()
    with pytest.raises(ValueError, match="eps must not be negative"):
        ops.filter_response_norm(x, eps=-1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "size"), [*SHAPES, LARGE])
def test_every_ghost_may_have_parameters_of_its_own(shape, size, layout):
    """As ghosts that are batches for themselves; dγ and dβ are each ghost's."""
    x, dy = made(shape, layout), made(shape, layout, offset=0)
    gamma, beta = made((2, -(-shape[0] // size), shape[1]))
    for k in (cpu, reference):
        y, mean, _, invstd = k.ghost_batch_norm(x, gamma, beta, size=size, eps=1e-5)
        dx, *sums = k.ghost_batch_norm_backward(dy, x, gamma, mean, invstd, size=size, apart=True)
        for g, i in enumerate(range(0, len(x), size)):
            part = slice(i, i + size)
            want = both(k, x[part], dy[part], gamma[g], beta[g], size)
            for a, b in zip((y[part], dx[part], sums[0][g], sums[1][g]), want[:1] + want[4:]):
                np.testing.assert_array_equal(a, b)


def test_ghosts_with_parameters_of_their_own_to_third_order():
    x = nbgrad.tensor(rng.standard_normal((5, 2, 3)), requires_grad=True)
    gamma, beta = (nbgrad.tensor(rng.standard_normal((3, 2)), requires_grad=True) for _ in range(2))
    gradcheck(lambda *a: ops.ghost_batch_norm(a[0], 2, *a[1:], eps=0.1)[0],
              (x, gamma, beta), order=3)


@pytest.mark.parametrize(("gamma", "message"), [
    (nbgrad.ones(2, 3), r"expected weight of shape \(3, 2\), one of each ghost"),
    (nbgrad.ones(3, 2, dtype=np.float64), "one of each ghost, and float32")])
def test_parameters_of_their_own_that_do_not_fit_are_refused(gamma, message):
    with pytest.raises(ValueError, match=message):
        ops.ghost_batch_norm(nbgrad.zeros(5, 2, 3), 2, gamma)
