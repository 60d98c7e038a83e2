"""Group, instance, RMS and local response normalization: digits, derivatives, PyTorch."""

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference

import nbgrad
import nbgrad.nn.functional as F
from nbgrad import nn, ops
from nbgrad.autograd import as_tensor, grad
from nbgrad.testing import gradcheck

rng = np.random.default_rng(11)


def channels_last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, -1, *range(1, x.ndim - 1))


layouts = pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])


def both(x, dy, gamma, beta, groups, eps, center=True):
    """Forward and backward of the kernels and of the reference in float64, from x in float32."""
    found = []
    for k, dtype in ((cpu, np.float32), (reference, np.float64)):
        a, d, g, b = (v.astype(dtype) for v in (x, dy, gamma, beta))
        y, mean, invstd = k.group_norm(a, g, b, groups=groups, eps=eps, center=center)
        found.append((y, *k.group_norm_backward(d, a, g, mean, invstd, groups=groups,
                                                center=center)))
    return found


def worst(got, want):
    """The largest deviations of y, dx, dγ and dβ by the largest of their values."""
    return [np.abs(a - b).max() / max(np.abs(b).max(), 1e-300) for a, b in zip(got, want)]


# ------------------------------------------------------------------------------------------- digits

@layouts
@pytest.mark.parametrize(("shape", "groups"), [((4, 6, 9, 9), 3), ((4, 6, 9, 9), 6),
                                               ((3, 40, 31, 33), 8), ((6, 12, 2, 2), 4)])
@pytest.mark.parametrize("offset", [0, 1e3, 1e5, 1e6, 1e7])
def test_float32_at_offsets(layout, shape, groups, offset):
    """Issues 5410 and 8283 of PyTorch and what its batch norm loses: nothing is lost here. One
    rounding is 6e-8 of a value, and values reach 4.5 standard deviations."""
    x = (rng.standard_normal(shape) + offset).astype(np.float32)
    dy, gamma, beta = rng.standard_normal(shape), *rng.standard_normal((2, shape[1]))
    gamma, beta, dy = (a.astype(np.float32) for a in (gamma, beta, dy))
    y, dx, dgamma, dbeta = worst(*both(layout(x), layout(dy), gamma, beta, groups, 1e-5))
    assert y <= 1e-6
    assert dx <= 2e-6
    assert dgamma <= 1e-6
    assert dbeta <= 1e-6


@layouts
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e19, 1e25, 1e38])
def test_float32_at_scales(layout, scale, center):
    """Squares leave the range of float32 from 1e19 on (PyTorch 162489) and below 1e-23."""
    x = (rng.uniform(-1, 1, (3, 6, 5, 7)) * scale).astype(np.float32)
    dy, gamma, beta = rng.standard_normal(x.shape), *rng.standard_normal((2, 6))
    gamma, beta, dy = (a.astype(np.float32) for a in (gamma, beta, dy))
    for eps in (1e-5, 1e-70):
        got, want = both(layout(x), layout(dy), gamma, beta, 3, eps, center)
        dx_fits = np.abs(want[1]).max() < 3e38                     # 1e38 / 1e-30 has no float32
        assert all(np.isfinite(a).all() for a in got[:1] + got[1 + (not dx_fits):])
        errors = worst(got, want)
        denormal = np.abs(want[1]).max() < 1e-37
        assert errors[0] <= 1e-6
        assert errors[1] <= 2e-6 or denormal or not dx_fits
        assert max(errors[2:]) <= 1e-6


@layouts
@pytest.mark.parametrize("value", [0.1, 100, 1e7, 1e10])
def test_a_constant_group_gives_exactly_beta(layout, value):
    for shape, groups in (((2, 6, 5, 5), 2), ((2, 6, 5, 5), 6), ((3, 30, 7, 3), 10), ((4, 6), 2)):
        x = np.full(shape, value, np.float32)
        gamma, beta = rng.standard_normal((2, shape[1])).astype(np.float32)
        y = cpu.group_norm(layout(x) if x.ndim > 2 else x, gamma, beta, groups=groups, eps=1e-5)[0]
        assert (y == beta.reshape(1, -1, *[1] * (x.ndim - 2))).all()


@layouts
def test_a_far_first_value_and_a_jump_lose_no_digits(layout):
    """The pivot of a chunk is the first value, or the mean so far."""
    x = rng.standard_normal((2, 4, 40, 173)).astype(np.float32)
    x[:, :, 0, 0] = 1e4
    x[1, :, 20:] += 1e4
    mean, invstd = cpu.group_norm(layout(x), None, None, groups=2, eps=1e-5)[1:]
    want = reference.group_norm(x, None, None, groups=2, eps=1e-5)
    np.testing.assert_allclose(mean, want[1], rtol=1e-6)
    np.testing.assert_allclose(invstd, want[2], rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 10, 1e4])
@pytest.mark.parametrize("D", [1, 16, 100, 5000])
def test_float32_rms_norm(D, offset):
    x = (rng.standard_normal((7, D)) + offset).astype(np.float32)
    dy, gamma = rng.standard_normal((7, D)).astype(np.float32), rng.standard_normal(D)
    results = []
    for k, dtype in ((cpu, np.float32), (reference, np.float64)):
        a, d, g = (v.astype(dtype) for v in (x, dy, gamma.astype(np.float32)))
        y, invrms = k.rms_norm(a, g, dims=1, eps=1e-5)
        results.append((y, *k.rms_norm_backward(d, a, g, invrms, dims=1)))
    got, want = results
    errors = worst(got, want)
    assert errors[0] <= 1e-6
    assert np.abs(got[1] - want[1]).max() <= 2e-6 * np.abs(gamma).max() * 5 / max(1, offset)
    assert errors[2] <= 1e-6


# ----------------------------------------------------------------------------- memory and isolation

@layouts
@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_stay_in_their_group(layout, groups, bad):
    """Other groups have the same bits as without the bad value."""
    shape = (3, 8, 6, 7)
    x, dy = (layout(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    gamma, beta = rng.standard_normal((2, 8)).astype(np.float32)
    worse = x.copy(order="K")
    worse[1, 3, 2, 2] = bad
    group, runs = 3 * groups // 8, []
    for a in (x, worse):
        with np.errstate(all="ignore"):
            y, *stats = cpu.group_norm(a, gamma, beta, groups=groups, eps=1e-5)
            runs.append((y, *cpu.group_norm_backward(dy, a, gamma, *stats, groups=groups)))
    clean = np.ones(shape, bool).reshape(3, groups, -1)
    clean[1, group] = False
    mask = clean.reshape(shape)
    for a, b in zip(*(run[:2] for run in runs)):
        np.testing.assert_array_equal(a[mask], b[mask])
        assert not np.isfinite(b[~mask]).all()
    others = np.arange(8) * groups // 8 != group
    for a, b in zip(*(run[2:] for run in runs)):
        np.testing.assert_array_equal(a[others], b[others])
    # dβ has no x; one is summed in float32, 126 values whose roundings add up: 2⁻²⁴ Σ|dy| is 6e-6
    np.testing.assert_allclose(runs[1][3], runs[0][3], rtol=1e-6, atol=1e-5)


@layouts
@pytest.mark.parametrize(("shape", "groups"), [((9, 16, 129, 112), 4), ((2, 48, 190, 180), 48),
                                               ((5, 1040, 9, 9), 8), ((40, 6, 5, 5), 3)])
def test_results_do_not_depend_on_the_number_of_threads(layout, shape, groups):
    """In one task and in blocks, past the caches, with more channels than a tile has."""
    if cpu.jit.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread")
    x, dy = (layout(rng.standard_normal(shape).astype(np.float32)) for _ in range(2))
    gamma, beta = rng.standard_normal((2, shape[1])).astype(np.float32)
    before, runs = cpu.jit.get_num_threads(), []
    try:
        for n in (1, 2):
            cpu.jit.set_num_threads(n)
            y, *stats = cpu.group_norm(x, gamma, beta, groups=groups, eps=1e-5)
            runs.append((y, *stats, *cpu.group_norm_backward(dy, x, gamma, *stats, groups=groups)))
    finally:
        cpu.jit.set_num_threads(before)
    for a, b in zip(*runs):
        np.testing.assert_array_equal(a, b)
    y, dx = runs[0][0], runs[0][3]
    assert y.strides == dx.strides == x.strides
    want = reference.group_norm(x, gamma, beta, groups=groups, eps=1e-5)
    np.testing.assert_allclose(y, want[0], atol=3e-6)
    want = reference.group_norm_backward(dy, x, gamma, *want[1:], groups=groups)
    np.testing.assert_allclose(dx, want[0], atol=3e-6)
    np.testing.assert_allclose(runs[0][4], want[1], atol=1e-6 * np.sqrt(x.size))


# -------------------------------------------------------------------------------------- derivatives

def composed(x, gamma, beta, groups, eps):
    N, C, *S = x.shape
    g = x.reshape((N, groups, -1))
    d = g - g.mean(2, True)
    y = (d * ((d * d).mean(2, True) + eps).rsqrt()).reshape(x.shape)
    one = (1, C) + (1,) * len(S)
    return y * gamma.reshape(one) + beta.reshape(one)


def composed_rms(x, gamma, eps):
    return x * ((x * x).mean(1, True) + eps).rsqrt() * gamma


def derivatives(f, x, gamma, directions):
    """Directional derivatives of Σ f c to order 4, each with respect to x or γ in turn."""
    x, gamma = (as_tensor(a.copy()).requires_grad_() for a in (x, gamma))
    y = f(x, gamma)
    y, found = (y * as_tensor(directions[0])).sum(), []
    for i, (dx, dgamma) in enumerate(directions[1:]):
        gx, gg = grad(y, (x, gamma), create_graph=True, allow_unused=True)
        y = (gx * as_tensor(dx)).sum()
        if gg is not None and i % 2 == 0:
            y = y + (gg * as_tensor(dgamma)).sum()
        found.append(float(y.data))
    return np.array(found)


def case(name):
    """x and γ, in which the third channel is the special one."""
    x, gamma = rng.standard_normal((2, 4, 3)), rng.standard_normal(4)
    if name == "gamma 0":
        gamma[2] = 0
    elif name == "constant channel":
        x[:, 2] = 0.7
    elif name == "far mean":
        x += 1e4
    elif name == "one spatial element":
        x = x[..., :1]
    return x, gamma


@pytest.mark.parametrize("name", ["plain", "gamma 0", "constant channel", "far mean",
                                  "one spatial element"])
@pytest.mark.parametrize("norm", ["group", "instance", "rms"])
def test_derivatives_to_fourth_order_equal_those_of_a_composition(norm, name):
    """PyTorch's are wrong from the third order on (186256). A mean of 1e4 standard deviations costs
    both sides 4 of float64's 16 digits; a constant channel has 1/√ε = 10 as its slope, and its
    fourth derivative 1e4 times that."""
    x, gamma = case(name)
    beta, eps = as_tensor(rng.standard_normal(4)), 1e-2
    groups = 4 if norm == "instance" else 2
    if norm == "instance" and x.shape[2] == 1:
        pytest.skip("one value per channel is refused")
    directions = [rng.standard_normal(x.shape),
                  *((rng.standard_normal(x.shape), rng.standard_normal(4)) for _ in range(4))]
    if norm == "rms":
        directions = [directions[0][..., 0], *((a[..., 0], b) for a, b in directions[1:])]
        pair = (lambda x, g: F.rms_norm(x, (4,), g, eps),
                lambda x, g: composed_rms(x, g, eps))
        x = x[..., 0]
    else:
        pair = (lambda x, g: F.group_norm(x, groups, g, beta, eps),
                lambda x, g: composed(x, g, beta, groups, eps))
    fused, plain = (derivatives(f, x, gamma, directions) for f in pair)
    scale = np.maximum(np.abs(plain), 10.0 ** np.arange(4))
    assert (np.abs(fused - plain) <= (1e-6 if name == "far mean" else 1e-9) * scale).all()


@pytest.mark.parametrize("f", [lambda x, g: F.group_norm(x, 2, g, eps=1e-2),
                               lambda x, g: F.instance_norm(x, weight=g, eps=1e-2),
                               lambda x, g: F.rms_norm(x, (3,), g[:3], 1e-2)])
def test_fourth_order_against_finite_differences_of_the_third(f):
    gradcheck(f, tuple(as_tensor(a).requires_grad_() for a in case("plain")), order=4, mode="fast")


# ------------------------------------------------------------------------------------------ PyTorch

def of_torch(torch, module, ours, x, dy):
    """y and gradients of both; ours has the state of PyTorch's module."""
    ours.load_state_dict({k: as_tensor(v.detach().numpy().copy())
                          for k, v in module.state_dict().items()})
    a, b = torch.tensor(x, requires_grad=True), as_tensor(x.copy()).requires_grad_()
    y, z = module(a), ours(b)
    y.backward(torch.tensor(dy))
    z.backward(as_tensor(dy))
    for t, n in ((y, z), (a.grad, b.grad),
                 *((p.grad, q.grad) for p, q in zip(module.parameters(), ours.parameters()))):
        np.testing.assert_allclose(n.data, t.detach().numpy(), rtol=1e-10, atol=1e-10)


LAYERS = {
    "GroupNorm(3, 6)": (5, 6, 4, 4), "GroupNorm(2, 6, eps=0.1, affine=False)": (5, 6, 7),
    "GroupNorm(6, 6, bias=False)": (2, 6, 3), "GroupNorm(2, 6)": (4, 6),
    "InstanceNorm1d(3)": (4, 3, 5), "InstanceNorm1d(3, affine=True)": (3, 5),
    "InstanceNorm2d(3, affine=True, track_running_stats=True)": (4, 3, 5, 2),
    "InstanceNorm3d(3, 1e-3, None, track_running_stats=True)": (2, 3, 2, 3, 2),
    "RMSNorm(6)": (4, 6), "RMSNorm((2, 3), eps=0.1)": (4, 2, 3),
    "RMSNorm(3, elementwise_affine=False)": (4, 2, 3),
    "LocalResponseNorm(3)": (2, 5, 4), "LocalResponseNorm(4, 0.5, 0.6, 2)": (2, 5, 3, 2),
    "LocalResponseNorm(9, 0.5)": (2, 5, 3, 2, 2),
}


@pytest.mark.parametrize("code", LAYERS)
def test_layers_equal_pytorchs(code):
    torch = pytest.importorskip("torch")
    module = eval(f"torch.nn.{code}", {"torch": torch}).double()
    ours = eval(f"nn.{code}", {"nn": nn})
    for name, p in ours.named_parameters():
        dtype_of(ours, name, p)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    x = rng.standard_normal(LAYERS[code]) * 2 + 1
    for t in (ours.running_mean, ours.running_var) if hasattr(ours, "running_mean") else ():
        if t is not None:
            t.data = t.data.astype(np.float64)
    assert list(ours.state_dict()) == list(module.state_dict())
    assert ours.extra_repr() == module.extra_repr()
    for mode in (True, False):
        module.train(mode)
        ours.train(mode)
        of_torch(torch, module, ours, x, rng.standard_normal(x.shape))
        for key, value in module.state_dict().items():
            np.testing.assert_allclose(ours.state_dict()[key].data, value, rtol=1e-10)


def dtype_of(module, name, p):
    p.data = p.data.astype(np.float64)


FUNCTIONS = {
    "normalize": (lambda F, x: F.normalize(x), lambda F, x: F.normalize(x, 3, -1),
                  lambda F, x: F.normalize(x * 1e-14, dim=0), lambda F, x: F.normalize(x, 1),
                  lambda F, x: F.normalize(x * 0, 3), lambda F, x: F.normalize(x.relu(), 0.5)),
    "group_norm": (lambda F, x: F.group_norm(x, 3), lambda F, x: F.group_norm(x, 1, eps=0.5)),
    "instance_norm": (lambda F, x: F.instance_norm(x),),
    "rms_norm": (lambda F, x: F.rms_norm(x, (4,)), lambda F, x: F.rms_norm(x, (6, 4), eps=0.5)),
    "local_response_norm": (lambda F, x: F.local_response_norm(x, 2, 0.3),),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_equal_pytorchs(name):
    torch = pytest.importorskip("torch")
    x, dy = rng.standard_normal((2, 3, 6, 4))
    for f in FUNCTIONS[name]:
        a, b = torch.tensor(x, requires_grad=True), as_tensor(x.copy()).requires_grad_()
        y, z = f(torch.nn.functional, a), f(F, b)
        y.backward(torch.tensor(dy))
        z.backward(as_tensor(dy))
        np.testing.assert_allclose(z.data, y.detach().numpy(), rtol=1e-10, atol=1e-12)
        scale = np.abs(a.grad.numpy()).max()
        np.testing.assert_allclose(b.grad.data, a.grad.numpy(), rtol=1e-9, atol=1e-10 * scale)


REFUSED = [
    (lambda F, r: F.group_norm(r(2, 8, 3), 3), "to be divisible by"),
    (lambda F, r: F.group_norm(r(8), 2), "Expected at least 2 dimensions"),
    (lambda F, r: F.group_norm(r(2, 8, 3), 2, r(4)), "Expected weight to be a vector of size"),
    (lambda F, r: F.group_norm(r(2, 8, 3), 2, r(8), r(3)), "Expected bias to be a vector of size"),
    (lambda F, r: F.group_norm(r(1, 8), 8), "Expected more than 1 value per channel"),
    (lambda F, r: F.instance_norm(r(2, 4, 1, 1)), "Expected more than 1 spatial element"),
    (lambda F, r: F.instance_norm(r(2, 4)), "Expected more than 1 spatial element"),
    (lambda F, r: F.instance_norm(r(2, 4, 3), use_input_stats=False), "Expected running_mean and"),
    (lambda F, r: F.instance_norm(r(2, 4, 3), r(4)), "must either both be None or neither"),
    (lambda F, r: F.rms_norm(r(2, 4), (3,)), "Given normalized_shape="),
    (lambda F, r: F.rms_norm(r(2, 4), (4,), r(3)), "Expected weight to be of same shape as norm"),
    (lambda F, r: F.local_response_norm(r(4, 4), 2), "Expected 3D or higher dimensionality"),
    (lambda F, r: F.normalize(r(2, 4), dim=5), "Dimension out of range"),
]


@pytest.mark.parametrize(("f", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_is_refused_is_what_pytorch_refuses(f, message):
    torch = pytest.importorskip("torch")
    with pytest.raises((RuntimeError, ValueError, IndexError), match=message) as theirs:
        f(torch.nn.functional, torch.ones)
    with pytest.raises((RuntimeError, ValueError, IndexError), match=message) as ours:
        f(F, lambda *s: nbgrad.ones(*s))
    assert type(ours.value) is type(theirs.value)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: nn.GroupNorm(3, 8), r"num_channels \(8\) must be divisible by num_groups \(3\)"),
    (lambda: nn.GroupNorm(0, 8), r"must be divisible by num_groups \(0\)"),
    (lambda: nn.GroupNorm(2, 8, eps=-1), "GroupNorm: eps must not be negative, got -1"),
    (lambda: nn.InstanceNorm2d(-1), "num_features must be an int of at least 0, got -1"),
    (lambda: nn.RMSNorm(2, eps=float("nan")), "RMSNorm: eps must not be negative, got nan"),
    (lambda: nn.InstanceNorm2d(4)(nbgrad.ones(4, 3)), r"expected 3D or 4D input \(got 2D input\)"),
    (lambda: nn.InstanceNorm1d(4, affine=True)(nbgrad.ones(2, 5, 3)),
     r"expected input's size at dim=1 to match num_features \(4\), but got: 5"),
    (lambda: ops.group_norm(nbgrad.ones(2, 4), 2, eps=-1.0), "eps must not be negative"),
    (lambda: ops.rms_norm(nbgrad.ones(2, 4), 4, eps=-1.0), "eps must not be negative"),
    (lambda: ops.local_response_norm(nbgrad.ones(2, 4, 3), 0), "size must be an int of at least 1"),
    (lambda: nn.create_norm("spooky", 3), "create_norm: expected None or one of batch, .*'spooky'"),
    (lambda: nn.create_norm("instance", 3, dims=0), "instance norm needs axes behind the channels"),
    (lambda: nn.create_norm("local", 3, dims=0), "local response norm needs axes behind the"),
    (lambda: nn.create_norm("rms", 3), "rms norm needs the size"),
    (lambda: nn.create_norm("layer", 3, dims=1, size=(2, 2)), "dims from 0 to 3 and as many sizes"),
    (lambda: nn.register_norm("batch"), "there is a norm 'batch' already"),
])
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_wrong_number_of_channels_without_parameters_is_a_warning():
    with pytest.warns(UserWarning, match="input's size at dim=1 does not match num_features"):
        nn.InstanceNorm1d(4)(nbgrad.ones(2, 5, 3))


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 0, 4), (2, 6, 0)])
def test_nothing_is_normalized_to_nothing(shape):
    x = nbgrad.ones(*shape, requires_grad=True)
    for y in (F.group_norm(x, 2 if shape[1] else 1), F.instance_norm(x), F.rms_norm(x, shape[1:]),
              F.local_response_norm(x, 3), F.normalize(x, dim=2) if shape[2] else x * 1):
        assert y.shape == shape
        y.sum().backward()
    assert x.grad.shape == shape


# ------------------------------------------------------------------------------------------ by name

@pytest.mark.parametrize(("made", "expected"), [
    (("batch", 6, {"dims": 0}), nn.BatchNorm1d(6)), (("batch", 6), nn.BatchNorm2d(6)),
    (("batch", 6, {"dims": 3, "eps": 0.1}), nn.BatchNorm3d(6, eps=0.1)),
    (("layer", 6, {"size": (4, 4)}), nn.LayerNorm((6, 4, 4))), (("layer", 6), nn.GroupNorm(1, 6)),
    (("layer", 6, {"dims": 0}), nn.LayerNorm(6)), (("group", 6), nn.GroupNorm(1, 6)),
    (("group", 100, {"dims": 0}), nn.GroupNorm(25, 100)), (("group", 512), nn.GroupNorm(32, 512)),
    (("group", 8, {"groups": 4, "affine": False}), nn.GroupNorm(4, 8, affine=False)),
    (("instance", 6, {"size": 9}), nn.InstanceNorm1d(6, affine=True)),
    (("instance", 6, {"affine": False}), nn.InstanceNorm2d(6)),
    (("rms", 6, {"size": (4, 4)}), nn.RMSNorm((6, 4, 4))), (("rms", 6, {"dims": 0}), nn.RMSNorm(6)),
    (("local", 6, {"window": 3, "alpha": 0.1}), nn.LocalResponseNorm(3, alpha=0.1)),
    ((None, 6), nn.Identity()),
])
def test_norms_by_name(made, expected):
    name, channels, *settings = made
    module = nn.create_norm(name, channels, **(settings[0] if settings else {}))
    assert type(module) is type(expected)
    assert repr(module) == repr(expected)


@pytest.mark.parametrize("norm", ["group", "rms"])
def test_models_train_with_every_norm(norm):
    from nbgrad import models
    from nbgrad.optim import SGD

    net = models.mlp(64, (8, 8), 3, norm=norm)
    x, target = nbgrad.randn(6, 1, 8, 8), nbgrad.tensor([0, 1, 2, 0, 1, 2])
    optimizer, losses = SGD(net.parameters(), lr=0.05), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.data))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e-9, 1.0, 1e6])
def test_running_variances_far_below_eps(scale, dtype):
    x = (np.random.default_rng(1).standard_normal((4, 3, 20)) * scale).astype(dtype)
    mean, var = nbgrad.zeros(3, dtype=dtype), nbgrad.ones(3, dtype=dtype)
    ops.instance_norm(nbgrad.tensor(x), mean, var, momentum=1.0)
    wide = x.astype(np.float64)
    tolerance = 4 * np.finfo(dtype).eps              # one rounding, and sums in another order
    np.testing.assert_allclose(var.data, wide.var(2, ddof=1).mean(0), rtol=tolerance)
    np.testing.assert_allclose(mean.data, wide.mean(2).mean(0), rtol=tolerance,
                               atol=tolerance * scale)


@pytest.mark.parametrize("k", [0.0, 1e-35, 1e-20, 1.0])
@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-20, 1e-10, 1.0, 1e10, 1e30])
def test_local_response_norm_at_any_scale(scale, k):
    """float32 against float64: what is finite there, and a float32, is right."""
    rng = np.random.default_rng(0)
    x, dy = ((rng.standard_normal((2, 6, 5)) * s).astype("f4") for s in (scale, 1.0))
    found = []
    for dtype in (np.float32, np.float64):
        t = nbgrad.tensor(x, dtype=dtype, requires_grad=True)
        y = ops.local_response_norm(t, 3, 1e-4, 0.75, k)
        y.backward(nbgrad.tensor(dy, dtype=dtype))
        found.append((y.data, t.grad.data))
    padded = np.pad(x.astype(float) ** 2, ((0, 0), (1, 1), (0, 0)))
    total = sum(padded[:, i:i + 6] for i in range(3))
    np.testing.assert_allclose(found[1][0], x / (k + 1e-4 / 3 * total) ** 0.75, rtol=1e-12)
    for got, want in zip(*found):
        if abs(want).max() < 3e38:
            largest = max(np.abs(want).max(), np.finfo("f4").tiny)     # denormals have fewer digits
            assert np.abs(got - want).max() <= 1e-6 * largest
