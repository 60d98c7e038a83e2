"""What users reported about PyTorch's batch norm, by the number of its issue or pull request: each
must hold here. Without a test: 196699 (nested JVPs: there is no forward mode), and what only a
benchmark shows: 57033, 48919, 60620 and 28982 are shapes of ``python -m bench norm``, and 69525,
how often x is read, is its rate beside that of copying."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import graph, nn, ops
from nbgrad.testing import gradcheck

rng = np.random.default_rng(31)


def normalized(x, gamma=None, beta=None, eps=1e-5):
    return ops.batch_norm(x, None, None, gamma, beta, True, eps=eps)


def single(*shape, grad=False, scale=1.0, offset=0.0):
    x = rng.standard_normal(shape) * scale + offset
    return nbgrad.tensor(x.astype(np.float32), requires_grad=grad)


def exact(x, eps=1e-5):
    """x̂ in float64."""
    x = x.astype(np.float64)
    axes = (0, *range(2, x.ndim))
    xc = x - x.mean(axes, keepdims=True)
    return xc / np.sqrt((xc * xc).mean(axes, keepdims=True) + eps)


# ----------------------------------------------------------------------------- values and gradients

@pytest.mark.parametrize("value", [0.1, 100.0, 1e7, 1e10])
def test_pt_5410_8283_a_constant_channel_gives_exactly_beta(value):
    x = nbgrad.tensor(np.full((7, 2, 5, 3), value, np.float32))
    y = normalized(x, None, nbgrad.tensor(np.float32([0.5, -2])))
    np.testing.assert_array_equal(y.data, np.float32([0.5, -2]).reshape(2, 1, 1) + 0 * x.data)


def test_pt_57796_gamma_s_gradient_is_the_sum_of_xhat_dy():
    x, gamma = single(64, 3, 5, 5, offset=1e5), nbgrad.ones(3, requires_grad=True)
    dy = single(64, 3, 5, 5)
    normalized(x, gamma).backward(dy)
    want = (exact(x.data) * dy.data).sum((0, 2, 3))
    np.testing.assert_allclose(gamma.grad.data, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


def test_pt_82493_34546_the_gradient_of_a_plain_sum_is_zero():
    x = single(16, 4, 6, 6, grad=True, offset=10)
    normalized(x).sum().backward()
    assert np.abs(x.grad.data).max() < 1e-6


@pytest.mark.parametrize("scale", [1e19, 1e30, 1e38])
def test_pt_162489_178123_a_variance_beyond_float32_does_not_overflow(scale):
    x = nbgrad.tensor((rng.uniform(-1, 1, (32, 2, 4, 4)) * scale).astype(np.float32))
    np.testing.assert_allclose(normalized(x).data, exact(x.data), atol=1e-6)


def test_pt_40302_a_small_variance_at_an_offset_is_not_zero():
    x = single(1000, 2, scale=0.01, offset=100)
    np.testing.assert_allclose(normalized(x).data, exact(x.data), atol=1e-5)


@pytest.mark.parametrize("x", [rng.standard_normal((3, 2)), rng.standard_normal((2, 2, 2))])
def test_pt_186256_third_and_fourth_derivatives(x):
    x = nbgrad.tensor(x, requires_grad=True)
    gamma = nbgrad.tensor(rng.standard_normal(2), requires_grad=True)
    assert gradcheck(lambda x, g: normalized(x, g), (x, gamma), order=4)


STRIDED = {
    "permuted": lambda x: np.ascontiguousarray(x.transpose(1, 0, 3, 2)).transpose(1, 0, 3, 2),
    "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "stepped": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "backwards": lambda x: np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
}


@pytest.mark.parametrize("how", STRIDED)
def test_pt_63224_62967_64039_42588_strides_change_nothing(how):
    x, dy = rng.standard_normal((2, 4, 3, 6, 5)).astype(np.float32)
    found = []
    for f in (np.ascontiguousarray, STRIDED[how]):
        t, gamma = nbgrad.tensor(0), nbgrad.ones(3, requires_grad=True)
        t.data, t.requires_grad = f(x), True
        normalized(t, gamma).backward(nbgrad.Tensor(dy))
        found.append((normalized(t).data, t.grad.data, gamma.grad.data))
    for a, b in zip(*found):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6)


def both_ways(x, dy, gamma):
    """y, ∂x and ∂γ of arrays, in training."""
    t, gamma = nbgrad.Tensor(x), nbgrad.tensor(gamma, requires_grad=True)
    t.requires_grad = True
    y = normalized(t, gamma)
    return [a.data for a in (y, *nbgrad.grad(y, (t, gamma), nbgrad.Tensor(dy)))]


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
@pytest.mark.parametrize("shape", [(8, 5, 9, 7), (16, 64, 8, 8)])
def test_pt_121651_both_memory_formats_agree(shape, offset):
    """Statistics are merged in another order, in float64, and products are fused or not: last bits
    differ, two of the largest y and ∂x, and a few of sums over all of a channel's values."""
    x, dy = rng.standard_normal((2, *shape))
    x, gamma = x + offset, np.ones(shape[1])
    x, dy, gamma = (a.astype(np.float32) for a in (x, dy, gamma))
    first = both_ways(x, dy, gamma)
    last = both_ways(*(STRIDED["channels last"](a) for a in (x, dy)), gamma)
    for a, b, bits in zip(first, last, (2, 2, 8)):
        assert np.abs(a - b).max() <= bits * np.spacing(np.abs(a).max())


def test_pt_115500_90342_96798_infinite_activations_need_not_stay_in_the_running_statistics():
    layer = nn.BatchNorm2d(3, on_nonfinite="skip_update")
    x = single(4, 3, 2, 2)
    x.data[0, 1] = np.inf
    layer(x)
    assert np.isfinite(layer.running_mean.data).all()
    assert np.isfinite(layer.eval()(single(4, 3, 2, 2)).data).all()


def test_pt_53691_2201_88718_runs_and_thread_counts_give_the_same_bits():
    x, dy = single(64, 16, 32, 32, grad=True), single(64, 16, 32, 32)
    before, found = nbgrad.get_num_threads(), []
    try:
        for n in (1, before, before):
            nbgrad.set_num_threads(n)
            x.grad = None
            y = normalized(x)
            y.backward(dy)
            found.append((y.data.copy(), x.grad.data.copy()))
    finally:
        nbgrad.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            np.testing.assert_array_equal(a, b)


def test_pt_19902_19916_biased_to_normalize_unbiased_to_remember():
    x = single(3, 2)
    layer = nn.BatchNorm1d(2, momentum=1.0)
    np.testing.assert_allclose(layer(x).data, exact(x.data), atol=1e-6)
    np.testing.assert_allclose(layer.running_var.data, x.data.var(0, ddof=1), rtol=1e-6)


def test_pt_15298_momentum_is_the_weight_of_the_new_value():
    x = single(50, 2, offset=3)
    torch, keras = nn.BatchNorm1d(2, momentum=0.1), nn.BatchNorm1d(2, average=nn.Exponential(0.9))
    for layer in (torch, keras):
        layer(x)
        np.testing.assert_allclose(layer.running_mean.data, 0.1 * x.data.mean(0), rtol=1e-5)


def test_pt_60624_1206_a_negative_running_variance_is_not_hidden():
    layer = nn.BatchNorm1d(2).eval()
    layer.running_var.data[:] = [-1.0, 1.0]
    y = layer(single(4, 2)).data
    assert np.isnan(y[:, 0]).all()
    assert np.isfinite(y[:, 1]).all()


def test_pt_586_590_4284_2278_derivatives_in_evaluation():
    mean, var = nbgrad.tensor(np.array([0.3, -1.0])), nbgrad.tensor(np.array([0.5, 2.0]))
    inputs = [nbgrad.tensor(rng.standard_normal(s), requires_grad=True)
              for s in ((3, 2, 2), (2,), (2,))]
    assert gradcheck(lambda x, g, b: ops.batch_norm(x, mean, var, g, b), inputs, order=3)


def test_pt_4422_4569_2268_double_backward_and_backward_inside_a_forward():
    x = nbgrad.tensor(rng.standard_normal((4, 3)), requires_grad=True)

    def penalty(x):
        y = normalized(x)
        (dx,) = nbgrad.grad((y ** 3).sum(), x, create_graph=True)
        return dx * dx
    assert gradcheck(penalty, (x,), order=2)


def test_pt_1866_603_an_expanded_gradient():
    x, whole = (single(4, 3, 2, 2, grad=True) for _ in range(2))
    whole.data[...] = x.data
    row = single(1, 3, 1, 1)
    normalized(x).backward(row.expand(4, 3, 2, 2))
    normalized(whole).backward(nbgrad.tensor(np.broadcast_to(row.data, (4, 3, 2, 2)).copy()))
    np.testing.assert_allclose(x.grad.data, whole.grad.data, atol=1e-6)


# ---------------------------------------------------------------------------- interface, robustness

@pytest.mark.parametrize(("layer", "shape"), [
    (nn.BatchNorm1d, (1, 3)), (nn.BatchNorm1d, (1, 3, 1)), (nn.BatchNorm2d, (1, 3, 1, 1))])
def test_pt_4534_13223_a_batch_of_one_value(layer, shape):
    bn = layer(3)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, "
                                         r"got input size \[1, 3"):
        bn(single(*shape))
    assert bn.num_batches_tracked.item() == 0
    assert bn.eval()(single(*shape)).shape == shape


def test_pt_12013_29578_63299_an_empty_batch_leaves_the_statistics():
    bn = nn.BatchNorm2d(3)
    x = nbgrad.zeros(0, 3, 4, 4, requires_grad=True)
    y = bn(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 4, 4)
    np.testing.assert_array_equal(bn.running_mean.data, 0)
    np.testing.assert_array_equal(bn.running_var.data, 1)
    np.testing.assert_array_equal(bn.weight.grad.data, 0)
    assert bn.num_batches_tracked.item() == 0        # or the next would be half of an average


@pytest.mark.parametrize("bad", [
    {"running_mean": nbgrad.zeros(2)}, {"running_var": nbgrad.zeros(4)},
    {"weight": nbgrad.zeros(1)}, {"bias": nbgrad.zeros(0)}, {"running_mean": nbgrad.zeros(3, 1)},
    {"weight": nbgrad.zeros(3, dtype=nbgrad.float64)}, {"running_mean": None},
    {"running_mean": np.zeros(3, np.float32)}])
@pytest.mark.parametrize("training", [True, False])
def test_pt_85217_141203_169208_194014_194798_378_137172_wrong_statistics_raise(bad, training):
    given = {"running_mean": nbgrad.zeros(3), "running_var": nbgrad.ones(3),
             "weight": nbgrad.ones(3), "bias": nbgrad.zeros(3), **bad}
    with pytest.raises((ValueError, TypeError), match="batch_norm"):
        ops.batch_norm(single(4, 3, 2), training=training, **given)


def test_pt_173337_eps_0_in_evaluation_only():
    x, mean, var = single(4, 2), nbgrad.zeros(2), nbgrad.ones(2)
    np.testing.assert_array_equal(ops.batch_norm(x, mean, var, eps=0.0).data, x.data)
    with pytest.raises(ValueError, match="eps must be positive"):
        ops.batch_norm(x, mean, var, training=True, eps=0.0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_pt_110361_8430_state_dicts_without_the_count(momentum):
    """What is not in a state dict stays: the count, too, by which a cumulative average goes on."""
    bn = nn.BatchNorm1d(3, momentum=momentum)
    bn(single(4, 3))
    old = {k: v for k, v in bn.state_dict().items() if k != "num_batches_tracked"}
    fresh = nn.BatchNorm1d(3, momentum=momentum)
    assert fresh.load_state_dict(old) == ([], [])
    for name, value in old.items():
        np.testing.assert_array_equal(fresh.state_dict()[name].data, value.data)
    assert fresh.num_batches_tracked.item() == 0
    before = bn.running_mean.data.copy()
    missing, unexpected = bn.load_state_dict({}, strict=False)
    assert (set(missing), unexpected) == (set(old), [])
    assert bn.num_batches_tracked.item() == 1
    x = single(4, 3, offset=5)
    bn(x)
    weight = 0.5 if momentum is None else momentum
    np.testing.assert_allclose(bn.running_mean.data, (1 - weight) * before
                               + weight * x.data.mean(0), rtol=1e-5)
    assert bn.num_batches_tracked.item() == 2


def test_pt_96136_62471_46516_recomputed_and_accumulated_batches_count_once():
    x = single(8, 3)
    bn, plain = nn.BatchNorm1d(3, update="step"), nn.BatchNorm1d(3)
    bn(x)
    with nbgrad.no_grad():
        bn(x)                                          # what a checkpoint does in backward
    plain(x)
    np.testing.assert_allclose(bn.running_mean.data, plain.running_mean.data, rtol=1e-6)
    assert bn.num_batches_tracked.item() == 1


def test_pt_46808_33867_moved_statistics_are_noticed_by_a_graph_that_needs_the_old_ones():
    bn = nn.BatchNorm1d(3).eval()
    x = single(4, 3, grad=True)
    product = (bn.running_mean * x).sum()
    bn.train()(x)
    with pytest.raises(RuntimeError, match="modified"):
        product.backward()


@pytest.mark.parametrize("x", [np.ones((4, 3))[::-1], np.broadcast_to(np.ones(3), (4, 3))])
def test_pt_188023_dlpack_of_negative_and_zero_strides_is_a_copy(x):
    got = np.from_dlpack(nbgrad.Tensor(x))
    np.testing.assert_array_equal(got, x)
    assert got.flags.forc
    assert not np.shares_memory(got, x)


def test_pt_192668_the_output_has_the_input_s_memory_order():
    x = STRIDED["channels last"](rng.standard_normal((2, 3, 4, 5)).astype(np.float32))
    assert normalized(nbgrad.Tensor(x)).data.strides == x.strides


def test_pt_70529_padded_positions_do_not_count():
    x, lengths = single(3, 2, 6), np.array([6, 2, 4])
    mask = np.arange(6) < lengths[:, None]
    y = nn.BatchNorm1d(2)(x, mask=mask)
    there = x.data.transpose(0, 2, 1)[mask].T[None]
    np.testing.assert_allclose(y.data.transpose(0, 2, 1)[mask].T[None], exact(there), atol=1e-6)


def synchronized(x, dy, cuts, group):
    """y, ∂x, ∂γ and the running variance of each worker, whose parts of x lie between cuts."""
    def work(worker):
        part = nbgrad.tensor(np.split(x, cuts)[worker.number], requires_grad=True)
        layer = nn.SyncBatchNorm(2, workers=worker, dtype=x.dtype)
        y = layer(part)
        y.backward(nbgrad.tensor(np.split(dy, cuts)[worker.number]))
        return y.data, part.grad.data, layer.weight.grad.data, layer.running_var.data
    return list(zip(*group.run(work)))


@pytest.mark.parametrize("cuts", [[2], [1, 3], [1, 8], [0, 2], [4, 4], [9]])
def test_pt_36382_36530_74944_unequal_and_empty_workers(cuts):
    """Values, gradients and statistics are those of one process that has the whole batch; each
    worker's ∂γ is its own part of the sum."""
    x, dy = rng.standard_normal((2, 9, 2)) + 3
    layer, whole = nn.BatchNorm1d(2, dtype=np.float64), nbgrad.tensor(x, requires_grad=True)
    want = layer(whole)
    want.backward(nbgrad.tensor(dy))
    y, dx, dgamma, var = synchronized(x, dy, cuts, nn.InProcess(len(cuts) + 1))
    np.testing.assert_allclose(np.concatenate(y), want.data, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(np.concatenate(dx), whole.grad.data, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(sum(dgamma), layer.weight.grad.data, rtol=1e-12)
    for own in var:
        np.testing.assert_allclose(own, layer.running_var.data, rtol=1e-12)


def test_pt_38874_each_group_of_workers_has_its_own_statistics():
    """Two groups at the same time, of data that lie apart: neither sees the other's."""
    x = rng.standard_normal((8, 2))
    x[4:] += 100
    outer = nn.InProcess(4)
    groups = nn.InProcess(2), nn.InProcess(2)

    def work(worker):
        own = groups[worker.number // 2].rank(worker.number % 2)
        layer = nn.SyncBatchNorm(2, momentum=1.0, workers=own, dtype=np.float64)
        y = layer(nbgrad.tensor(x[2 * worker.number:2 * worker.number + 2]))
        return y.data, layer.running_mean.data
    found = outer.run(work)
    y = np.concatenate([one for one, _ in found])
    for half in (slice(0, 4), slice(4, 8)):
        np.testing.assert_allclose(y[half], exact(x[half]), atol=1e-12)
    for i, (_, mean) in enumerate(found):
        np.testing.assert_allclose(mean, x[i // 2 * 4:i // 2 * 4 + 4].mean(0), rtol=1e-12)


# -------------------------------------------------------------------------------- float16, bfloat16

def halves():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def near_halves(got, want, dtype):
    """Within two roundings of the largest."""
    unit = 2.0 ** (-11 if dtype == np.float16 else -8)
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=2 * unit,
                               atol=2 * unit * np.abs(want).max())


def test_pt_62594_float16_gives_the_same_in_both_memory_formats():
    x = (rng.standard_normal((4, 8, 10, 10)) * 3 + 5).astype(np.float16)
    dy, gamma = rng.standard_normal(x.shape).astype(np.float16), np.linspace(1, 2, 8, dtype="f4")
    first = both_ways(x, dy, gamma)
    last = both_ways(*(STRIDED["channels last"](a) for a in (x, dy)), gamma)
    assert last[0].strides == STRIDED["channels last"](x).strides
    for a, b in zip(first, last):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), rtol=2.0 ** -10, atol=1e-6)


def test_pt_147303_float16_channels_last_backward_is_finite():
    x = STRIDED["channels last"](rng.standard_normal((16, 3, 224, 224)).astype(np.float16))
    gamma = np.float32([0.5, 1, 2])
    y, dx, dgamma = both_ways(x, x, gamma)
    assert y.dtype == dx.dtype == np.float16
    assert dgamma.dtype == np.float32
    wide = x.astype(np.float64)
    np.testing.assert_allclose(dgamma, (exact(wide) * wide).sum((0, 2, 3)), rtol=1e-5)
    assert np.isfinite(y).all()
    # ∂y = x is removed by the projection, but for ε and the rounding of x̂'s scale
    assert np.abs(dx).max() < 1e-3


def test_pt_156513_bfloat16_with_float32_parameters_has_the_right_gradients():
    _, dtype = halves()
    x, dy = (rng.standard_normal((6, 5, 4, 4)).astype("f4").astype(dtype) for _ in range(2))
    gamma = np.linspace(-1, 2, 5, dtype="f4")
    y, dx, dgamma = both_ways(x, dy, gamma)
    want = both_ways(x.astype(np.float64), dy.astype(np.float64), gamma.astype(np.float64))
    assert dgamma.dtype == np.float32
    near_halves(y, want[0], dtype)
    near_halves(dx, want[1], dtype)
    np.testing.assert_allclose(dgamma, want[2], rtol=1e-5, atol=1e-5)


def test_pt_61924_61962_float16_without_affine_and_with_float32_statistics():
    x = nbgrad.tensor((rng.standard_normal((8, 3, 4, 4)) + 2).astype(np.float16))
    bn = nn.BatchNorm2d(3, affine=False, momentum=1.0)
    near_halves(bn(x).data, exact(x.data), x.dtype)
    wide = x.data.astype(np.float64)
    assert bn.running_mean.dtype == bn.running_var.dtype == np.float32
    np.testing.assert_allclose(bn.running_mean.data, wide.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(bn.running_var.data, wide.var((0, 2, 3)) * 128 / 127, rtol=1e-6)
    y = bn.eval()(x)
    assert y.dtype == np.float16
    near_halves(y.data, exact(x.data) * np.sqrt(127 / 128), x.dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_pt_126525_70901_195701_sums_and_counts_of_halves_do_not_overflow(which):
    """70,000 values (more than float16 holds, and more than bfloat16 counts to) of 200 each: their
    sum, their squares' and ∂y's are far beyond 65,504."""
    dtype = halves()[which]
    x = (rng.standard_normal((70_000, 2)) * 200 + 100).astype("f4").astype(dtype)
    dy = (rng.standard_normal((70_000, 2)) + 5).astype("f4").astype(dtype)
    bn = nn.BatchNorm1d(2, momentum=1.0)
    t = nbgrad.Tensor(x)
    t.requires_grad = True
    y = bn(t)
    y.backward(nbgrad.Tensor(dy))
    wide, up = x.astype(np.float64), dy.astype(np.float64)
    np.testing.assert_allclose(bn.running_mean.data, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(bn.running_var.data, wide.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(bn.bias.grad.data, up.sum(0), rtol=1e-6)
    xhat = exact(wide)
    np.testing.assert_allclose(bn.weight.grad.data, (xhat * up).sum(0), rtol=0,   # terms cancel
                               atol=1e-7 * np.abs(xhat * up).sum())
    near_halves(y.data, xhat, dtype)
    dx = (up - up.mean(0) - xhat * (xhat * up).mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    near_halves(t.grad.data, dx, dtype)


def test_pt_62034_a_large_gradient_keeps_its_digits():
    """(1, 1, 64, 32), ∂y of 1e7 everywhere: of it nothing is to be left. cuDNN's median was 4, and
    all mantissas were zeros. Less than half a spacing of 1e7, over σ, is what rounding x̂ leaves."""
    x = rng.random((1, 1, 64, 32), np.float32)
    dx = both_ways(x, np.full_like(x, 1e7), np.ones(1, np.float32))[1]
    assert np.abs(dx).max() < 0.5 * np.spacing(np.float32(1e7)) / x.std()
    assert len(np.unique(np.frexp(dx)[0])) > 100
    wide = x.astype(np.float64)
    assert np.abs(both_ways(wide, np.full_like(wide, 1e7), np.ones(1))[1]).max() < 1e-7


# ---------------------------------------------------------------------------- shapes that were slow

def test_pt_38915_rows_are_images_of_one_pixel():
    """12 to 18 times slower there. The same bits here, from the same kernel (bench: norm, rows)."""
    x = single(4096, 256)
    image = x.reshape((4096, 256, 1, 1))
    np.testing.assert_array_equal(normalized(image).data.reshape(4096, 256), normalized(x).data)


@pytest.mark.parametrize("N", [8, 32])
@pytest.mark.parametrize("C", [8, 24, 96, 768])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_pt_60063_channels_last_over_a_grid_of_sizes(N, C, size):
    x, dy = rng.standard_normal((2, N, C, size, size)).astype(np.float32)
    x, dy = STRIDED["channels last"](x + 3), STRIDED["channels last"](dy)
    y, dx, dgamma = both_ways(x, dy, np.ones(C, np.float32))
    want = both_ways(x.astype(np.float64), dy.astype(np.float64), np.ones(C))
    np.testing.assert_allclose(y, want[0], rtol=0, atol=1e-6 * max(1, np.abs(want[0]).max()))
    np.testing.assert_allclose(dx, want[1], rtol=0, atol=2e-6 * max(1, np.abs(want[1]).max()))
    np.testing.assert_allclose(dgamma, want[2], rtol=0, atol=1e-6 * max(1, np.abs(want[2]).max()))


def test_pt_52011_evaluation_is_the_same_on_one_thread_and_on_all():
    """There it ran on one, slower than training. The same bits (bench: norm, evaluation)."""
    x, bn = single(5, 64, 112, 112), nn.BatchNorm2d(64)
    y = bn.eval()(x).data.copy()
    before = nbgrad.get_num_threads()
    try:
        nbgrad.set_num_threads(1)
        np.testing.assert_array_equal(bn(x).data, y)
    finally:
        nbgrad.set_num_threads(before)


def test_pt_27926_30440_counting_batches_is_no_op_of_the_graph():
    """There it was one, and as long as the batch norm of a tiny batch."""
    x, counted = single(4, 8), nn.BatchNorm1d(8)
    for _ in range(50):
        y = counted(x)
    assert counted.num_batches_tracked.item() == 50
    assert not counted.num_batches_tracked.requires_grad
    counted.num_batches_tracked = None
    np.testing.assert_array_equal(counted(x).data, y.data)


def test_pt_26288_92884_nothing_of_x_s_size_is_kept_beside_x():
    """In place there: y over x. Here the graph keeps x itself and two numbers per channel, and no
    mask of a ReLU: y is made anew from x."""
    x = single(8, 16, 12, 12, grad=True)
    gamma, beta = nbgrad.ones(16, requires_grad=True), nbgrad.zeros(16, requires_grad=True)
    for activation in (None, "relu"):
        y = ops.batch_norm(x, None, None, gamma, beta, True, activation=activation)
        large = [a for _, a in graph.saved(y.grad_fn) if np.size(a) >= x.data.size]
        assert len(large) == 1
        assert np.shares_memory(large[0], x.data)
        assert graph.saved_bytes(y) <= x.data.nbytes + 16 * 40


def test_pt_81486_181555_elements_that_lie_more_than_two_to_the_31_apart():
    """(256, 128, 294, 294) takes 11 GB, and twice more for y and ∂x. Its addresses, without its
    memory: of a file of zeros, only the pages that are written are there."""
    whole = np.zeros(2 ** 31 + 2 ** 20, np.float32)
    x = np.lib.stride_tricks.as_strided(whole, (2, 3, 8, 8), (2 ** 33, 4 * 64, 4 * 8, 4))
    x[...] = rng.standard_normal(x.shape)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    for a, b in zip(both_ways(x, dy, np.ones(3, np.float32)),
                    both_ways(x.copy(), dy, np.ones(3, np.float32))):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(140_000, 1), (131_072, 1), (100_000, 32), (5, 256, 8), (2, 1)])
def test_pt_2917_3038_16998_61587_12006_long_and_thin_shapes_are_right(shape):
    x = single(*shape, offset=2)
    np.testing.assert_allclose(normalized(x).data, exact(x.data), atol=2e-6)


def test_a_copied_layer_shares_nothing():
    bn = nn.BatchNorm1d(3, update="step")
    bn(single(4, 3))
    twin = copy.deepcopy(bn)
    twin(single(4, 3, offset=9))
    assert not np.shares_memory(bn.running_mean.data, twin.running_mean.data)
    assert np.abs(bn.running_mean.data).max() < 0.3 < np.abs(twin.running_mean.data).max()
