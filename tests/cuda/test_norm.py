"""Batch normalization on CUDA against the reference: layouts, tails, large offsets, NaN."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import moments, single, single_backward
from nbgrad.kernels.cuda.memory import to_device, to_host

# Rounding of y is that of one float32 (or float64) value of size 5; sums are of float64.
CLOSE = {np.float32: {"rtol": 2e-6, "atol": 4e-6}, np.float64: {"rtol": 1e-12, "atol": 1e-13}}
ways = pytest.mark.parametrize("way", ["once", "twice"])      # how often memory is read
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def channels_last(x):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def drawn(dtype, *shape, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) + offset).astype(dtype)


def on_device(*arrays):
    return [None if a is None else to_device(a) for a in arrays]


def same(got, want, **close):
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            np.testing.assert_allclose(to_host(a), b, **close)


SHAPES = [(5, 3), (70, 8), (3, 4, 5), (2, 5, 2, 4), (1, 2, 3), (6, 1, 4), (1, 1, 1), (9, 17),
          (2, 3, 6, 6), (300, 2)]


@pytest.fixture(autouse=True)
def chosen(request, monkeypatch):
    way = request.node.callspec.params.get("way") if hasattr(request.node, "callspec") else None
    monkeypatch.setattr(single, "enabled", way != "twice")


@ways
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [np.ascontiguousarray, channels_last])
def test_forward_and_backward(shape, order, dtype, way):
    if order is channels_last and len(shape) < 3:
        pytest.skip("two axes have one order")
    C = shape[1]
    x, dy, z = (order(drawn(dtype, *shape, seed=i, offset=i / 2)) for i in range(3))
    gamma, beta = drawn(dtype, C, seed=3), drawn(dtype, C, seed=4)
    d = on_device(x, gamma, beta, z, dy)
    for relu, residual in ((False, False), (True, False), (True, True)):
        want = reference.batch_norm(x, gamma, beta, z if residual else None, eps=1e-5, relu=relu)
        got = cuda.batch_norm(*d[:3], d[3] if residual else None, eps=1e-5, relu=relu)
        same(got, want, **CLOSE[dtype])
        assert all(a == b or n == 1 for a, b, n in zip(got[0].strides, x.strides, shape))
        y = {"y": want[0]} if residual else {"beta": beta}
        back = reference.batch_norm_backward(dy, x, gamma, want[1], want[3], relu=relu,
                                             residual=residual, **y)
        y = {k: to_device(a) for k, a in y.items()}
        got = cuda.batch_norm_backward(d[4], d[0], d[1], *on_device(want[1], want[3]), relu=relu,
                                       residual=residual, **y)
        scale = max(1.0, float(np.abs(back[0]).max()))           # of two values: 1/√eps
        same([got[0]], [back[0]], rtol=1e-5 if dtype == np.float32 else 1e-11,
             atol=CLOSE[dtype]["atol"] * scale)
        same(got[1:], back[1:], rtol=2e-6, atol=CLOSE[dtype]["atol"] * x.size / C)


@pytest.mark.parametrize("shape", [(300, 8), (90, 3, 12), (110, 3, 5)])
def test_parts_and_the_block_that_merges_them(shape, either_order):
    """Several blocks per tile, whose last to arrive leaves the counters at 0."""
    x, dy = drawn(np.float32, *shape), drawn(np.float32, *shape, seed=1)
    d, dd = on_device(x, dy)
    sizes = shape[0], shape[1], int(np.prod(shape[2:]))
    plan = moments.cut(len(shape) == 2, 1, *sizes, x.dtype, d)
    assert plan.P > 1
    for _ in range(2):
        mean, var = cuda.batch_norm_stats(d)
        same((mean, var), reference.batch_norm_stats(x), rtol=2e-7, atol=1e-7)
        invstd = 1 / np.sqrt(to_host(var))
        sums = cuda.batch_norm_backward_reduce(dd, d, mean, to_device(invstd))
        same(sums, reference.batch_norm_backward_reduce(dy, x, to_host(mean), invstd), rtol=2e-6,
             atol=1e-5)
        assert not to_host(moments.tickets()).any()


# In blocks of 32 threads, 4 at once: (parts, groups, tiles), or nothing that fits.
GROUPS = [((300, 8), (4, 1, 1)), ((90, 3, 25), (4, 1, 3)), ((4, 3), (1, 1, 1)),
          ((2, 6, 300), (2, 2, 6)), ((4200, 2), None)]


@pytest.mark.parametrize(("shape", "want"), GROUPS)
def test_groups_of_blocks_that_wait_for_each_other(shape, want, either_order, monkeypatch):
    """Several tiles for a group, several parts of a tile; who leaves last makes the counters 0."""
    monkeypatch.setattr(single, "SHARED", 1 << 13)
    x, gamma = drawn(np.float32, *shape, offset=3.0), drawn(np.float32, shape[1])
    sizes = shape[0], shape[1], int(np.prod(shape[2:]))
    c = moments.cut(len(shape) == 2, 1, *sizes, x.dtype, to_device(x))
    how = single.plan.__wrapped__(c, 4, 4)
    assert (how and (*how[1:], c.tiles)) == want
    if how is None:
        return
    single.plan.cache_clear()
    d, want = on_device(x, gamma), reference.batch_norm(x, gamma, None, eps=1e-5, relu=True)
    for _ in range(2):
        same(cuda.batch_norm(*d, None, eps=1e-5, relu=True), want, **CLOSE[np.float32])
    assert not to_host(single.two_per_tile(c.tiles)).any()
    single.plan.cache_clear()


@pytest.mark.parametrize(("shape", "want"), GROUPS)
def test_groups_of_blocks_take_the_backward(shape, want, either_order, monkeypatch):
    """All masks; the residual's gradient, too. What does not fit is left to two passes."""
    monkeypatch.setattr(single, "SHARED", 1 << 13)
    single.plan.cache_clear()
    C, ways = shape[1], []
    x, dy, y = (drawn(np.float32, *shape, seed=i, offset=i / 2) for i in range(3))
    gamma, beta = drawn(np.float32, C, seed=3), drawn(np.float32, C, seed=4)
    mean, var = reference.batch_norm_stats(x)
    given = dy, x, gamma, mean, 1 / np.sqrt(var + 1e-5)
    run = single_backward.run
    monkeypatch.setattr(single_backward, "run", lambda *a: ways.append(run(*a)) or ways[-1])
    for settings in ({}, {"relu": True, "beta": beta}, {"relu": True, "residual": True, "y": y}):
        d = {k: to_device(v) if isinstance(v, np.ndarray) else v for k, v in settings.items()}
        same(cuda.batch_norm_backward(*on_device(*given), **d),
             reference.batch_norm_backward(*given, **settings), rtol=1e-5, atol=4e-5)
    assert len(ways) == 3
    assert all((way is None) == (want is None) for way in ways)
    assert want is None or not to_host(single.two_per_tile(want[2])).any()
    single.plan.cache_clear()


@ways
def test_the_same_bits_in_every_order_of_threads(monkeypatch, way):
    from nbgrad.kernels.cuda import simulator

    x, dy = on_device(drawn(np.float32, 100, 12), drawn(np.float32, 100, 12, seed=1))
    found = []
    for order in (1, -1):
        monkeypatch.setattr(simulator, "order", order)
        y, mean, var, invstd = cuda.batch_norm(x, None, None, eps=1e-5)
        back = cuda.batch_norm_backward(dy, x, None, mean, invstd)[:3]
        found.append([to_host(a).tobytes() for a in (y, mean, var, invstd, *back)])
    assert found[0] == found[1]


@ways
@pytest.mark.parametrize("shape", [(64, 4), (4, 2, 40)])
def test_large_offsets_of_the_backward(shape, way):
    """x̂ of two words of the mean is right to the rounding of float32 whatever x is about."""
    dy = drawn(np.float32, *shape, seed=1)
    for offset in (1e4, 1e6):
        x = drawn(np.float32, *shape, offset=offset)
        mean, var = reference.batch_norm_stats(x)
        given = dy, x, None, mean, 1 / np.sqrt(var)
        exact = reference.batch_norm_backward(dy.astype(float), x.astype(float), *given[2:])
        got = cuda.batch_norm_backward(*on_device(*given))
        for a, b in zip(got[:3], exact[:3]):
            np.testing.assert_allclose(to_host(a), b, rtol=1e-5, atol=1e-5)


@ways
@pytest.mark.parametrize("shape", [(64, 4), (4, 2, 40)])
def test_large_offsets(shape, way):
    """A mean of 1e4 and 1e6 standard deviations costs float32's variance nothing but the rounding
    of x."""
    for offset in (1e4, 1e6):
        x = drawn(np.float32, *shape, offset=offset)
        y, mean, var, _ = cuda.batch_norm(to_device(x), None, None, eps=1e-5)
        want = reference.batch_norm(x, None, None, eps=1e-5)
        np.testing.assert_allclose(to_host(mean), want[1], rtol=1e-13)
        np.testing.assert_allclose(to_host(var), want[2], rtol=1e-6)
        np.testing.assert_allclose(to_host(y), want[0], rtol=2e-6, atol=2e-6)


@ways
def test_a_constant_channel_is_exactly_beta(way):
    for n in (1, 3, 7, 64, 129):
        x = np.full((n, 2, 3), np.float32(0.1) * 12345, np.float32)
        y, mean, var, _ = cuda.batch_norm(to_device(x), None, to_device(np.ones(2, "f4")), eps=0.1)
        assert (to_host(y) == 1).all()
        assert (to_host(mean) == x[0, 0, 0]).all()
        assert (to_host(var) == 0).all()


def test_what_leaves_the_range_of_float32():
    for scale in (1e25, 1e-25):
        x = drawn(np.float32, 40, 4) * np.float32(scale)
        mean, var = cuda.batch_norm_stats(to_device(x))
        want = reference.batch_norm_stats(x)
        np.testing.assert_allclose(to_host(mean), want[0], rtol=1e-12)
        np.testing.assert_allclose(to_host(var), want[1], rtol=1e-12)


@ways
def test_nan_and_inf_stay_in_their_channel(way):
    x = drawn(np.float32, 20, 4)
    x[3, 1], x[5, 2] = np.nan, np.inf
    y, *_ = cuda.batch_norm(to_device(x), None, None, eps=1e-5, relu=True)
    y, want = to_host(y), reference.batch_norm(x, None, None, eps=1e-5, relu=True)[0]
    assert np.isnan(y[:, 1]).all()
    assert np.isnan(y[:, 2]).all()
    np.testing.assert_allclose(y[:, ::3], want[:, ::3], rtol=2e-6, atol=2e-6)


@ways
def test_running_statistics(way):
    x = drawn(np.float32, 6, 3, 4)
    for dtype in (np.float32, np.float64):               # every second: moved after the kernel
        mean, var = drawn(dtype, 6), np.abs(drawn(dtype, 6))
        moved = [a[::2] for a in on_device(mean, var)]
        reference.batch_norm(x, None, None, eps=1e-5, running=(mean[::2], var[::2], 0.3))
        cuda.batch_norm(to_device(x), None, None, eps=1e-5, running=(*moved, 0.3))
        same(moved, (mean[::2], var[::2]), rtol=1e-6, atol=1e-7)
    mean, var = drawn(np.float32, 3), np.abs(drawn(np.float32, 3))
    moved = on_device(mean, var)
    reference.batch_norm(x, None, None, eps=1e-5, running=(mean, var, 0.3))
    cuda.batch_norm(to_device(x), None, None, eps=1e-5, running=(*moved, 0.3))
    same(moved, (mean, var), rtol=1e-6, atol=1e-7)


def test_given_statistics_views_and_nothing():
    x = drawn(np.float32, 5, 6, 4)[:, ::2]
    dy, mean, invstd = drawn(np.float32, 5, 3, 4, seed=1), np.ones(3), np.full(3, 2.0)
    d, dd, m, i = on_device(x, dy, mean, invstd)
    same([cuda.batch_norm_elemt(d, None, None, m, i)],
         [reference.batch_norm_elemt(x, None, None, mean, invstd)], rtol=1e-6)
    for sums in ((None, None), (np.arange(3.0), np.ones(3))):
        want = reference.batch_norm_backward_elemt(dy, x, None, mean, invstd, *sums)
        got = cuda.batch_norm_backward_elemt(dd, d, None, m, i, *on_device(*sums))
        same([got], [want], rtol=2e-6, atol=1e-6)
    empty = np.empty((0, 3, 2), np.float32)
    same(cuda.batch_norm(to_device(empty), None, None, eps=0.25),
         reference.batch_norm(empty, None, None, eps=0.25))
    none = on_device(empty, empty, np.zeros(3), np.ones(3))
    same(cuda.batch_norm_backward(*none[:2], None, *none[2:], residual=True),
         reference.batch_norm_backward(empty, empty, None, np.zeros(3), np.ones(3), residual=True))


@pytest.mark.parametrize("moving", [False, True])
def test_known_statistics(moving):
    """Those of x give what x gives; others are taken as they are."""
    x, mean, var = drawn(np.float32, 5, 6, 7), np.linspace(-1, 1, 6), np.linspace(0.5, 2, 6)
    for known in (reference.batch_norm_stats(x), (mean, var)):
        running = [np.zeros(6, np.float32), np.ones(6, np.float32)] if moving else []
        moved = [to_device(a) for a in running]
        want = reference.batch_norm(x, None, None, eps=1e-5, known=known,
                                    running=(*running, 0.3) if moving else None)
        got = cuda.batch_norm(to_device(x), None, None, eps=1e-5, known=[*map(to_device, known)],
                              running=(*moved, 0.3) if moving else None)
        for a, b in zip((*got, *moved), (*want, *running)):
            np.testing.assert_allclose(to_host(a), b, rtol=2e-6, atol=2e-6)
