"""What users reported about PyTorch's batch norm, by the number of its issue or pull request: each
must hold here. Reports about CUDA, half precision and mixed dtypes have no counterpart on this CPU
engine (62034, 62594, 147303, 156513, 61924, 126525, 70901, 195701, 196699 needs forward mode)."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, ops
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
def test_pt_162489_a_variance_beyond_float32_does_not_overflow(scale):
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


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
def test_pt_121651_both_memory_formats_agree(offset):
    x = (rng.standard_normal((8, 5, 9, 7)) + offset).astype(np.float32)
    first, last = (normalized(nbgrad.Tensor(f(x))).data
                   for f in (np.ascontiguousarray, STRIDED["channels last"]))
    np.testing.assert_allclose(first, last, atol=5e-7)


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


def test_pt_4422_2268_double_backward_and_backward_inside_a_forward():
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


def test_pt_110361_8430_state_dicts_without_the_count():
    bn = nn.BatchNorm1d(3)
    bn(single(4, 3))
    old = {k: v for k, v in bn.state_dict().items() if k != "num_batches_tracked"}
    fresh = nn.BatchNorm1d(3)
    fresh.load_state_dict(old)
    bn.load_state_dict({}, strict=False)
    assert bn.num_batches_tracked.item() == 1


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


def test_pt_36382_36530_74944_38874_unequal_and_empty_workers():
    x = rng.standard_normal((9, 2)).astype(np.float32)
    group = nn.InProcess(3)

    def work(worker):
        part = nbgrad.tensor(np.split(x, [0, 2])[worker.number])
        return nn.SyncBatchNorm(2, workers=worker)(part).data
    np.testing.assert_allclose(np.concatenate(group.run(work)), exact(x), atol=1e-6)


# ---------------------------------------------------------------------------- shapes that were slow

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
