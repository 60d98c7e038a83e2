"""Layers and losses against formulas and against PyTorch with the same weights."""

import numpy as np
import pytest

import nbgrad
from nbgrad import nn

F64 = np.float64

LAYERS = [                                      # (class, arguments, settings, input shape)
    ("Linear", (5, 3), {}, (4, 5)),
    ("Linear", (5, 3), {"bias": False}, (2, 4, 5)),
    ("Conv2d", (2, 3, 3), {}, (2, 2, 7, 6)),
    ("Conv2d", (4, 6, (3, 2)), {"stride": (2, 1), "padding": 1, "groups": 2}, (2, 4, 7, 6)),
    ("Conv2d", (2, 3, 3), {"padding": "same", "dilation": 2, "bias": False}, (2, 2, 7, 6)),
    ("Conv2d", (2, 3, 4), {"padding": "valid"}, (1, 2, 7, 6)),
    ("Conv1d", (4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 7)),
    ("Conv1d", (2, 3, 3), {"padding": "same", "dilation": 3, "bias": False}, (2, 2, 7)),
    ("Conv1d", (2, 3, (2,)), {}, (2, 7)),
    ("ConvTranspose2d", (2, 3, 3), {}, (2, 2, 4, 5)),
    ("ConvTranspose2d", (4, 6, (3, 2)), {"stride": (2, 3), "padding": 1, "groups": 2,
                                         "output_padding": (0, 1)}, (2, 4, 4, 5)),
    ("ConvTranspose2d", (2, 3, 2), {"dilation": 3, "output_padding": 2, "bias": False}, (2, 4, 5)),
    ("ConvTranspose1d", (4, 2, 3), {"stride": 2, "output_padding": 1, "groups": 2}, (2, 4, 5)),
    ("ConvTranspose1d", (4, 2, 3), {}, (4, 5)),
    ("MaxPool2d", (2,), {}, (2, 3, 7, 6)),
    ("MaxPool2d", (3,), {"stride": 2, "padding": 1, "ceil_mode": True}, (2, 3, 8, 6)),
    ("AvgPool2d", (2,), {}, (2, 3, 7, 6)),
    ("AvgPool2d", (3,), {"stride": 2, "padding": 1, "count_include_pad": False}, (2, 3, 7, 6)),
    ("AdaptiveAvgPool2d", (1,), {}, (2, 3, 7, 6)),
    ("AdaptiveAvgPool2d", ((3, None),), {}, (2, 3, 7, 6)),
    ("BatchNorm1d", (3,), {}, (6, 3)),
    ("BatchNorm1d", (3,), {"momentum": None}, (4, 3, 5)),
    ("BatchNorm2d", (3,), {"affine": False}, (4, 3, 5, 2)),
    ("BatchNorm2d", (3,), {"track_running_stats": False}, (4, 3, 5, 2)),
    ("BatchNorm2d", (3,), {"bias": False, "eps": 0.1}, (4, 3, 5, 2)),
    ("BatchNorm3d", (3,), {"momentum": 0.5}, (2, 3, 2, 2, 3)),
    ("LayerNorm", (4,), {}, (3, 2, 4)),
    ("LayerNorm", ((2, 4),), {"bias": False}, (3, 2, 4)),
    ("LayerNorm", ((2, 4),), {"elementwise_affine": False}, (3, 2, 4)),
    ("Flatten", (), {}, (2, 3, 4)),
    ("Identity", (), {}, (2, 3)),
    ("ReLU", (), {}, (3, 4)),
    ("ReLU", (True,), {}, (3, 4)),
    ("LeakyReLU", (0.2,), {}, (3, 4)),
    ("ELU", (), {"alpha": 0.5}, (3, 4)),
    ("GELU", (), {}, (3, 4)),
    ("GELU", ("tanh",), {}, (3, 4)),
    ("SiLU", (), {}, (3, 4)),
    ("Sigmoid", (), {}, (3, 4)),
    ("Tanh", (), {}, (3, 4)),
    ("Softplus", (), {"beta": 2.0, "threshold": 1.5}, (3, 4)),
    ("Softmax", (1,), {}, (3, 4)),
    ("LogSoftmax", (-1,), {}, (3, 4)),
    ("Dropout", (0.0,), {}, (3, 4)),
]


def build(case):
    """The layer in float64 with random weights, ours and PyTorch's, and an input."""
    torch = pytest.importorskip("torch")
    name, args, settings, shape = case
    rng = np.random.default_rng(3)
    ours, theirs = getattr(nn, name)(*args, **settings).double(), None
    theirs = getattr(torch.nn, name)(*args, **settings).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.as_tensor(rng.normal(size=tuple(p.shape))))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    return torch, ours, theirs, rng.normal(size=shape), rng


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: f"{c[0]}-{c[1:3]}")
def test_layer_equals_pytorch(case):
    torch, ours, theirs, x, rng = build(case)
    assert repr(ours) == repr(theirs)
    for mode in (True, True, False):
        ours.train(mode)
        theirs.train(mode)
        a = nbgrad.tensor(x, requires_grad=True)
        b = torch.tensor(x, requires_grad=True)
        y, z = ours(a), theirs(b.clone())         # a leaf has no inplace ReLU there
        dy = rng.normal(size=y.shape)
        np.testing.assert_allclose(y.detach().numpy(), z.detach().numpy(), rtol=1e-10, atol=1e-11)
        y.backward(nbgrad.tensor(dy))
        z.backward(torch.tensor(dy))
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-9, atol=1e-10)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-9, atol=1e-10)
        for p, q in zip(ours.buffers(), theirs.buffers()):
            np.testing.assert_allclose(p.numpy(), q.numpy(), rtol=1e-12, atol=1e-12)


def test_linear_is_x_wt_plus_b():
    layer = nn.Linear(2, 3, dtype=F64)
    x = np.array([[1.0, 2.0], [3.0, -4.0]])
    np.testing.assert_allclose(layer(nbgrad.tensor(x)).detach().numpy(),
                               x @ layer.weight.data.T + layer.bias.data, rtol=1e-14)


@pytest.mark.parametrize("kernel", [2, 3, 4, (1, 4)])
def test_same_padding_keeps_the_size_with_the_odd_zero_below_and_right(kernel):
    conv = nn.Conv2d(1, 1, kernel, padding="same", bias=False, dtype=F64)
    conv.weight.data[:] = 0
    kh, kw = conv.kernel_size
    conv.weight.data[0, 0, (kh - 1) // 2, (kw - 1) // 2] = 1     # the tap that lies on the pixel
    x = np.random.default_rng(0).normal(size=(1, 1, 5, 6))
    np.testing.assert_array_equal(conv(nbgrad.tensor(x)).detach().numpy(), x)


@pytest.mark.parametrize(("settings", "message"), [
    ({"groups": 0}, "groups must be a positive integer"),
    ({"groups": 3}, "in_channels must be divisible by groups, got 2 and 3"),
    ({"padding_mode": "reflect"}, "padding_mode must be 'zeros', got 'reflect'"),
    ({"padding": "full"}, "invalid padding string 'full'"),
    ({"padding": "same", "stride": 2}, "not supported for strided convolutions"),
    ({"stride": 0}, "stride must be an int or two ints, at least 1, got 0"),
    ({"padding": (1, 2, 3)}, "padding must be an int or two ints"),
])
def test_bad_conv2d_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        nn.Conv2d(2, 3, 3, **settings)


def test_batch_norm_normalizes_and_tracks():
    x = np.random.default_rng(1).normal(3.0, 2.0, size=(16, 2))
    norm = nn.BatchNorm1d(2, dtype=F64)
    y = norm(nbgrad.tensor(x)).detach().numpy()
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.1 * x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(norm.running_var.numpy(), 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-12)
    assert norm.num_batches_tracked.item() == 1
    assert norm.num_batches_tracked.dtype == np.int64
    norm.reset_running_stats()
    assert norm.running_var.tolist() == [1.0, 1.0]
    assert norm.num_batches_tracked.item() == 0


def test_momentum_none_averages_all_batches():
    rng = np.random.default_rng(2)
    batches = [rng.normal(size=(8, 3)) for _ in range(5)]
    norm = nn.BatchNorm1d(3, momentum=None, dtype=F64)
    for x in batches:
        norm(nbgrad.tensor(x))
    np.testing.assert_allclose(norm.running_mean.numpy(), np.mean([b.mean(0) for b in batches], 0))
    np.testing.assert_allclose(norm.running_var.numpy(),
                               np.mean([b.var(0, ddof=1) for b in batches], 0))


@pytest.mark.parametrize(("layer", "shape", "message"), [
    (nn.BatchNorm1d, (3,), r"expected 2D or 3D input \(got 1D input\)"),
    (nn.BatchNorm2d, (2, 3), r"expected 4D input \(got 2D input\)"),
    (nn.BatchNorm3d, (2, 3, 4, 4), r"expected 5D input \(got 4D input\)"),
    (nn.BatchNorm1d, (1, 3), "Expected more than 1 value per channel when training"),
])
def test_rejected_batch_is_not_counted(layer, shape, message):
    norm = layer(3)
    with pytest.raises(ValueError, match=message):
        norm(nbgrad.zeros(*shape))
    assert norm.num_batches_tracked.item() == 0
    assert norm.running_mean.tolist() == [0.0] * 3


def test_old_state_dicts_without_num_batches_tracked_load():
    model = nn.Sequential(nn.BatchNorm1d(2))
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    model[0].num_batches_tracked.data[...] = 4
    assert model.load_state_dict(state).missing_keys == []
    assert model[0].num_batches_tracked.item() == 4


def test_layer_norm_normalizes_each_sample():
    x = np.random.default_rng(4).normal(size=(3, 2, 5))
    y = nn.LayerNorm((2, 5), dtype=F64)(nbgrad.tensor(x)).detach().numpy()
    mean, var = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-12)


def test_dropout_scales_what_it_keeps_and_does_nothing_in_evaluation():
    nbgrad.manual_seed(0)
    layer, x = nn.Dropout(0.25), nbgrad.ones(10_000)
    y = layer(x).numpy()
    assert set(np.unique(y)) == {np.float32(0.0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.03                       # σ = √(p / (1 − p) / n) = 0.006
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match=r"has to be between 0 and 1, but got 1\.5"):
        nn.Dropout(1.5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_equal_pytorch(reduction):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(6, 4)), rng.uniform(0.5, 2, 4)
    t, target = np.array([0, 3, -100, 1, 2, 2]), rng.normal(size=(6, 4))
    pairs = [
        ("MSELoss", {}, target), ("NLLLoss", {"weight": w}, t), ("CrossEntropyLoss", {}, t),
        ("CrossEntropyLoss", {"weight": w, "label_smoothing": 0.1}, t),
    ]
    for name, settings, goal in pairs:
        ours = {k: nbgrad.tensor(v) if k == "weight" else v for k, v in settings.items()}
        theirs = {k: torch.tensor(v) if k == "weight" else v for k, v in settings.items()}
        a, b = getattr(nn, name)(reduction=reduction, **ours), getattr(torch.nn, name)(
            reduction=reduction, **theirs)
        assert list(a.state_dict()) == list(b.state_dict())
        assert repr(a) == repr(b)
        np.testing.assert_allclose(a(nbgrad.tensor(x), nbgrad.tensor(goal)).numpy(),
                                   b(torch.tensor(x), torch.tensor(goal)).numpy(), rtol=1e-12)


def test_loss_values_and_bad_settings():
    x, t = nbgrad.tensor([[0.0, 0.0], [1.0, 1.0]]), nbgrad.tensor([0, 1])
    assert nn.CrossEntropyLoss()(x, t).item() == pytest.approx(np.log(2))
    assert nn.MSELoss(reduction="sum")(x, nbgrad.zeros(2, 2)).item() == 2.0
    with pytest.raises(ValueError, match="average is not a valid value for reduction"):
        nn.MSELoss("average")
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
        nn.CrossEntropyLoss(label_smoothing=1.5)
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh'"):
        nn.GELU("fast")


def grads(*values):
    ps = []
    for v in values:
        ps.append(nn.Parameter(np.zeros_like(v)))
        ps[-1].grad = nbgrad.tensor(v)
    return ps


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_clip_grad_norm_scales_to_the_norm_of_all(p):
    values = np.array([3.0, -4.0]), np.array([[12.0]])
    ps = grads(*values)
    norm = np.linalg.norm(np.concatenate([v.ravel() for v in values]), p)
    assert nn.utils.clip_grad_norm_(ps, 1.0, p).item() == pytest.approx(norm)
    np.testing.assert_allclose(ps[1].grad.numpy(), values[1] / (norm + 1e-6), rtol=1e-12)
    ps = grads(*values)
    nn.utils.clip_grad_norm_(ps, 100.0, p)
    np.testing.assert_array_equal(ps[0].grad.numpy(), values[0])


def test_clip_of_nan_and_by_value():
    ps = grads(np.array([np.nan, 1.0]))
    with pytest.raises(RuntimeError, match="non-finite"):
        nn.utils.clip_grad_norm_(ps, 1.0, error_if_nonfinite=True)
    assert ps[0].grad.numpy()[1] == 1.0
    ps = grads(np.array([-3.0, 0.5, 7.0]))
    nn.utils.clip_grad_value_(ps[0], 1.0)
    assert ps[0].grad.tolist() == [-1.0, 0.5, 1.0]
    assert nn.utils.clip_grad_norm_([nn.Parameter(np.ones(1))], 1.0).item() == 0.0


def test_parameters_to_vector_and_back():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert vector.shape == (13,)
    nn.utils.vector_to_parameters(vector.detach() * 2, model.parameters())
    np.testing.assert_allclose(nn.utils.parameters_to_vector(model.parameters()).detach().numpy(),
                               2 * vector.detach().numpy())
    with pytest.raises(ValueError, match=r"need a vector of shape \(13,\), got \(12,\)"):
        nn.utils.vector_to_parameters(vector[1:], model.parameters())
    with pytest.raises(ValueError, match="no parameters"):
        nn.utils.parameters_to_vector([])


def test_functional_names_are_the_ops():
    for name in nn.functional.__all__:
        if name != "one_hot":
            assert getattr(nn.functional, name) is getattr(nbgrad.ops, name)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: nn.Linear(-1, 4), "Linear: in_features must be an int of at least 0, got -1"),
    (lambda: nn.Linear(2, 1.5), "Linear: out_features must be an int of at least 0, got 1.5"),
    (lambda: nn.Conv2d(-3, 2, 1), "Conv2d: in_channels must be an int of at least 0, got -3"),
    (lambda: nn.Conv2d(3, -2, 1), "Conv2d: out_channels must be an int of at least 0, got -2"),
    (lambda: nn.BatchNorm1d(-3), "BatchNorm1d: num_features must be an int of at least 0, got -3"),
    (lambda: nn.LayerNorm((2, -3)), "LayerNorm: normalized_shape must be an int of at least 0"),
    (lambda: nn.LayerNorm(2.5), "LayerNorm: normalized_shape must be an int of at least 0"),
    (lambda: nn.BatchNorm1d(3, eps=-1), "BatchNorm1d: eps must not be negative, got -1"),
    (lambda: nn.BatchNorm2d(3, eps=float("nan")), "BatchNorm2d: eps must not be negative, got nan"),
    (lambda: nn.LayerNorm(3, eps=None), "LayerNorm: eps must not be negative, got None"),
])
def test_bad_sizes_and_eps_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("layer", "name"), [
    (nn.Linear(2, 2), "linear"), (nn.Conv2d(1, 1, 1), "conv2d"), (nn.LayerNorm(2), "layer_norm"),
    (nn.BatchNorm1d(2), "BatchNorm1d"),
])
def test_a_layer_of_no_tensor_says_so(layer, name):
    with pytest.raises(TypeError, match=f"{name}: expected .*Tensor.*None"):
        layer(None)


@pytest.mark.parametrize(("dim", "sizes"), [(1, (2, 3)), (-1, (3, -1)), (0, [2, 2]), (1, (1, 6))])
def test_unflatten_equals_pytorch(dim, sizes):
    torch = pytest.importorskip("torch")
    x = np.arange(24.0).reshape(4, 6)
    expected = torch.nn.Unflatten(dim, tuple(sizes))(torch.tensor(x)).numpy()
    np.testing.assert_array_equal(nn.Unflatten(dim, sizes)(nbgrad.tensor(x)).data, expected)


def test_unflatten_refuses_what_does_not_multiply_up():
    x = nbgrad.zeros(2, 6)
    assert nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 2, 3)))(x).shape == (2, 1, 2, 3)
    for sizes in ((4, -1), (2, 2), (0, -1), (5,)):
        with pytest.raises(RuntimeError, match=r"don't multiply up to the size of dim 1 \(6\)"):
            nn.Unflatten(1, sizes)(x)
    with pytest.raises(IndexError, match="dim 2 is out of range"):
        nn.Unflatten(2, (2, 3))(x)
    with pytest.raises(TypeError, match="must be a tuple of ints"):
        nn.Unflatten(1, 6)
    with pytest.raises(ValueError, match="one of which may be -1"):
        nn.Unflatten(1, (-1, -1))


@pytest.mark.parametrize("classes", [-1, 4, 7])
def test_one_hot_equals_pytorch(classes):
    torch = pytest.importorskip("torch")
    x = np.array([[0, 3], [1, 1], [2, 0]])
    y = nn.functional.one_hot(nbgrad.tensor(x), classes)
    expected = torch.nn.functional.one_hot(torch.tensor(x), classes).numpy()
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y.data, expected)


def test_one_hot_refuses_what_is_no_class():
    one_hot = nn.functional.one_hot
    assert one_hot(nbgrad.zeros(0, dtype=nbgrad.int64), 3).shape == (0, 3)
    for x, classes in (([-1, 0], 3), ([3], 3), ([-1], -1)):
        with pytest.raises(ValueError, match="Class values must be from 0 to num_classes - 1"):
            one_hot(nbgrad.tensor(x), classes)
    with pytest.raises(ValueError, match="from empty tensor"):
        one_hot(nbgrad.zeros(0, dtype=nbgrad.int64))
    with pytest.raises(TypeError, match="expected a tensor of integers, got float32"):
        one_hot(nbgrad.tensor([1.0]))
