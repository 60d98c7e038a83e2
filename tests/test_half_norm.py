"""Norms of float16 and bfloat16 with parameters in float32, as mixed precision has them: computed
in float32 and rounded once, statistics and parameters stay float32."""

import copy

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, ops
from nbgrad.nn import functional as F
from nbgrad.train import update_bn

ml_dtypes = pytest.importorskip("ml_dtypes")
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
C, SHAPE = 4, (6, 4, 3, 2)

LAYERS = {
    "batch": lambda: nn.BatchNorm2d(C), "batch, no affine": lambda: nn.BatchNorm2d(C, affine=False),
    "batch, no bias": lambda: nn.BatchNorm2d(C, bias=False),
    "batch, step": lambda: nn.BatchNorm2d(C, update="step"),
    "sync": lambda: nn.SyncBatchNorm(C, workers=nn.InProcess(1).rank(0)),
    "ghost": lambda: nn.GhostBatchNorm(C, ghost_size=3), "split": lambda: nn.SplitBatchNorm(C),
    "renorm": lambda: nn.BatchRenorm(C), "frozen": lambda: nn.FrozenBatchNorm(C),
    "layer": lambda: nn.LayerNorm(SHAPE[1:]), "group": lambda: nn.GroupNorm(2, C),
    "instance": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
    "instance, counted": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True,
                                                   average=nn.Cumulative()),
    "rms": lambda: nn.RMSNorm(SHAPE[1:]), "lp": lambda: nn.LpBatchNorm(C, p=3),
    "mean only": lambda: nn.MeanOnlyBatchNorm(C),
    "decorrelated": lambda: nn.DecorrelatedBatchNorm(C, group_size=2),
    "switchable": lambda: nn.SwitchableNorm(C),
    "filter response": lambda: nn.FilterResponseNorm(C),
    "filter response, ε": lambda: nn.FilterResponseNorm(C, learn_eps=True, affine=False),
    "evonorm b0": lambda: nn.EvoNormB0(C), "evonorm s0": lambda: nn.EvoNormS0(C, groups=2),
    "global response": lambda: nn.GlobalResponseNorm(C),
}


def drawn(dtype, shape=SHAPE, seed=0, scale=1.0, offset=0.5):
    x = np.random.default_rng(seed).standard_normal(shape) * scale + offset
    return nbgrad.tensor(x.astype(np.float32)).to(dtype)


def built(name):
    """The layer with parameters that are not what they start as."""
    layer = LAYERS[name]()
    for i, p in enumerate(layer.parameters()):
        p.data += 0.1 * np.random.default_rng(i).standard_normal(p.shape).astype(np.float32)
        p.requires_grad_()
    return layer


def both_ways(layer, x, dy):
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy)
    return y, x.grad, [p.grad for p in layer.parameters() if p.grad is not None]


@dtypes
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", LAYERS)
def test_float32_s_results_rounded_once(name, training, dtype):
    """Of the same x and ∂y, bit by bit; what is float32 stays so."""
    x, dy = drawn(dtype), drawn(dtype, seed=1)
    halves, singles = (built(name).train(training) for _ in range(2))
    y, dx, grads = both_ways(halves, x, dy)
    want, want_dx, want_grads = both_ways(singles, x.float(), dy.float())
    assert y.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(y.data, want.data.astype(dtype))
    np.testing.assert_array_equal(dx.data, want_dx.data.astype(dtype))
    unused = 2 if name == "split" and not training else 0             # those of the second part
    assert len(grads) == len(list(halves.parameters())) - unused
    for got, exact in zip(grads, want_grads, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got.data, exact.data)
    for (key, got), exact in zip(halves.named_buffers(), singles.buffers()):
        assert got.dtype == exact.dtype
        np.testing.assert_array_equal(got.data, exact.data, err_msg=key)


@dtypes
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_halves_throughout(name, dtype):
    layer = built(name).to(dtype=dtype)
    y, dx, grads = both_ways(layer, drawn(dtype), drawn(dtype, seed=1))
    assert {y.dtype, dx.dtype, *(g.dtype for g in grads)} == {dtype}
    want = both_ways(built(name), drawn(dtype).float(), drawn(dtype, seed=1).float())[0]
    unit = 2.0 ** (-10 if dtype == np.float16 else -7)           # parameters are rounded, too
    np.testing.assert_allclose(y.float().data, want.data, rtol=8 * unit, atol=8 * unit)


CALLS = {
    "batch": lambda x, g, b: F.batch_norm(x, None, None, g, b, True),
    "layer": lambda x, g, b: F.layer_norm(x.reshape((6, 6, 4)), (4,), g, b),
    "group": lambda x, g, b: F.group_norm(x, 2, g, b),
    "instance": lambda x, g, b: F.instance_norm(x, None, None, g, b),
    "evaluation": lambda x, g, b: F.batch_norm(x, b.detach(), (g * g).detach() + 1, g, b),
    "masked": lambda x, g, b: ops.weighted_batch_norm(x, g, b, mask=np.arange(6) > 0)[0],
    "ghost": lambda x, g, b: ops.ghost_batch_norm(x, 3, g, b)[0],
    "filter response": lambda x, g, b: ops.filter_response_norm(x, g, b, b),
    "evonorm s0": lambda x, g, b: ops.evonorm_s0(x, 2, g, b, b),
}


@dtypes
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name, dtype):
    """Of float32's, rounded where a half is passed on: dtypes stay what they are."""
    found = []
    for kind in (dtype, np.float32):
        x = drawn(dtype).to(kind).requires_grad_()
        g, b = (drawn(np.float32, (C,), seed).requires_grad_() for seed in (2, 3))
        y = CALLS[name](x, g, b)
        dx, dg = nbgrad.grad(y, (x, g), drawn(dtype, seed=1).to(kind).reshape(y.shape),
                             create_graph=True)
        twice = nbgrad.grad((dx * dx).sum() + (dg * dg).sum(), (x, g))
        assert (dx.dtype, dg.dtype) == (twice[0].dtype, twice[1].dtype) == (kind, np.float32)
        found.append([t.float().data for t in twice])
    unit = 2.0 ** (-10 if dtype == np.float16 else -7)
    for got, want in zip(*found):
        np.testing.assert_allclose(got, want, rtol=0, atol=16 * unit * np.abs(want).max())


@dtypes
def test_beta_alone_keeps_its_dtype_in_the_gradient(dtype):
    x, b, dy = drawn(dtype), drawn(np.float32, (C,)).requires_grad_(), drawn(dtype, seed=1)
    for f in (lambda: F.batch_norm(x, None, None, None, b, True),
              lambda: F.group_norm(x, 2, None, b),
              lambda: F.instance_norm(x, bias=b), lambda: ops.ghost_batch_norm(x, 3, None, b)[0],
              lambda: ops.weighted_batch_norm(x, None, b)[0]):
        db, = nbgrad.grad(f(), b, dy)
        assert db.dtype == np.float32
        np.testing.assert_allclose(db.data, dy.double().data.sum((0, 2, 3)), rtol=1e-6, atol=1e-6)


@dtypes
def test_what_is_left_of_the_exact_result(dtype):
    """At most the rounding of the float64 answer, but for one in a thousand, which lies so near the
    middle of two halves that float32 rounds it to the other; and no infinity of finite answers."""
    x, g, b = drawn(dtype, (32, 4, 9, 9), offset=3.0), drawn(np.float32, (4,), 2), nbgrad.zeros(4)
    exact = [t.detach().to(np.float64) for t in (x, g, b)]
    for name in ("batch", "group", "instance", "evaluation"):
        y, want = CALLS[name](x, g, b).data, CALLS[name](*exact).data.astype(dtype)
        assert (y == want).mean() > 0.999
        assert np.isfinite(y.astype(np.float32)).all()
    top = float(ml_dtypes.finfo(dtype).max)
    x.data[...] = np.where(np.arange(81).reshape(9, 9) % 2, top, -top).astype(dtype)
    for name in ("batch", "group", "instance"):
        y = CALLS[name](x, g, b)
        assert np.isfinite(y.float().data).all()
        assert abs(y.float().data).max() > 0


def mixed(dtype, seed=0):
    """Convolutions and a linear layer in halves, the norms between them in float32."""
    nbgrad.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2),
                          nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 8), nn.BatchNorm1d(8),
                          nn.ReLU(), nn.Linear(8, 5))
    for layer in model:
        if not isinstance(layer, nn.BatchNorm):
            layer.to(dtype=dtype)
    return model


@dtypes
def test_a_network_of_halves_with_norms_in_float32(dtype):
    """The fused paths give what the modules give one by one, and train what they train."""
    unit = 2.0 ** (-10 if dtype == np.float16 else -7)
    x, t = drawn(dtype, (8, 2, 6, 6)), nbgrad.tensor(np.arange(8) % 5)
    fused, single, exact = mixed(dtype), mixed(dtype), mixed(dtype).to(dtype=np.float32)
    for layer in single:
        layer.register_forward_hook(lambda *_: None)              # called one by one
    found = []
    for model, at in ((fused, x), (single, x), (exact, x.float())):
        nbgrad.cross_entropy(model(at).float(), t).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all(g.dtype == p.dtype for g, p in zip(grads.values(), model.parameters()))
        found.append({name: g.float().data for name, g in grads.items()})
        assert all(b.dtype in (np.float32, np.int64) for b in model.buffers())
    for name in found[0]:
        size = np.abs(found[2][name]).max() + 0.05
        for got in found[:2]:
            np.testing.assert_allclose(got[name], found[2][name], rtol=0, atol=32 * unit * size)


@dtypes
@pytest.mark.parametrize("throughout", [False, True])
def test_folded_converted_and_with_exact_statistics(throughout, dtype):
    unit = 2.0 ** (-10 if dtype == np.float16 else -7)
    model = mixed(dtype).to(dtype=dtype) if throughout else mixed(dtype)
    batches = [drawn(dtype, (8, 2, 6, 6), seed) for seed in range(3)]
    own = dtype if throughout else np.float32
    update_bn(model, batches)
    with nbgrad.no_grad():
        first = nbgrad.cat([model[0](x) for x in batches]).double().data
    assert model[1].running_mean.dtype == own
    np.testing.assert_allclose(model[1].running_mean.double().data, first.mean((0, 2, 3)),
                               rtol=2 * unit if throughout else 1e-5, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var.double().data, first.var((0, 2, 3)),
                               rtol=unit if throughout else 1e-5)
    model.eval()
    y = model(batches[0])
    folded = nn.fold(model, batches[0])
    assert folded.layers == ("1", "4", "7")
    assert {p.dtype for p in folded.model.parameters()} == {dtype}
    assert folded.deviation <= 16 * unit * np.abs(y.float().data).max()
    group = nn.convert_norm(copy.deepcopy(model), "group", groups=1)
    assert type(group[1]) is nn.GroupNorm
    assert group[1].weight.dtype == own
    assert group(batches[0]).dtype == dtype
    frozen = nn.freeze_batch_norm(copy.deepcopy(model)).train()
    np.testing.assert_array_equal(frozen(batches[0]).data, y.data)


def test_rms_norm_s_own_eps_is_float32_s():
    """As in PyTorch: that of the dtype in which halves are computed."""
    for dtype in HALVES:
        x = nbgrad.full((1, 2), 2.0 ** -12, dtype=np.float32).to(dtype)
        want = 2.0 ** -12 / np.sqrt(2.0 ** -24 + 2.0 ** -23)
        assert F.rms_norm(x, (2,)).float().data[0, 0] == pytest.approx(want, rel=2.0 ** -8)


@pytest.mark.parametrize("call", [
    lambda x, g, b: F.batch_norm(x, None, None, g, b, True),
    lambda x, g, b: F.group_norm(x, 2, g, b), lambda x, g, b: F.layer_norm(x, (4,), g, b),
    lambda x, g, b: F.instance_norm(x, weight=g, bias=b),
    lambda x, g, b: ops.filter_response_norm(x, g, b)])
def test_dtypes_that_do_not_go_together(call):
    """Parameters narrower than x, of the other half, of float64, or of two dtypes."""
    half, single, double = (nbgrad.ones(4, dtype=d) for d in (np.float16, np.float32, np.float64))
    x = nbgrad.ones((2, 4, 4))
    for at, g, b in ((x, half, half), (x.half(), double, double), (x.half(), single, half),
                     (x.bfloat16(), half, half), (x.double(), single, single)):
        with pytest.raises((ValueError, RuntimeError), match=r"dtype|float"):
            call(at, g, b)


def test_pytorch_gives_the_same():
    torch = pytest.importorskip("torch")
    for name, kind in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        dtype = np.dtype(np.float16) if name == "float16" else HALVES[1]
        x, g, b = drawn(dtype), drawn(np.float32, (C,), 2), drawn(np.float32, (C,), 3)
        tx = torch.tensor(x.float().data).to(kind)
        tg, tb = torch.tensor(g.data), torch.tensor(b.data)
        T = torch.nn.functional
        for ours, theirs in (
                (F.batch_norm(x, None, None, g, b, True),
                 T.batch_norm(tx, None, None, tg, tb, True)),
                (F.group_norm(x, 2, g, b), T.group_norm(tx, 2, tg, tb)),
                (F.layer_norm(x.permute(0, 2, 3, 1), (C,), g, b),
                 T.layer_norm(tx.permute(0, 2, 3, 1), (C,), tg, tb)),
                (F.instance_norm(x, weight=g, bias=b), T.instance_norm(tx, weight=tg, bias=tb))):
            assert (str(theirs.dtype), ours.dtype) == (f"torch.{name}", dtype)
            unit = 2.0 ** (-10 if name == "float16" else -7)      # theirs may round twice
            np.testing.assert_allclose(ours.float().data, theirs.float().numpy(), rtol=2 * unit,
                                       atol=unit)
