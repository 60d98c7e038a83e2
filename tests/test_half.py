"""float16 and bfloat16: names, promotion, and on the CPU float32's results, rounded once."""

import numpy as np
import pytest
from nbgrad.kernels import cpu, half

import nbgrad
from nbgrad import nn, tensor

pytest.importorskip("ml_dtypes")
HALVES = [nbgrad.float16, nbgrad.bfloat16]
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])


def test_names():
    x = tensor([1.0, 2.5])
    assert x.half().dtype == nbgrad.float16 == np.float16
    assert x.bfloat16().dtype == x.to("bfloat16").dtype == x.to(nbgrad.bfloat16).dtype
    assert x.bfloat16().dtype.name == "bfloat16"
    assert repr(x.half()) == "tensor([1. , 2.5], dtype=float16)"
    assert x.bfloat16().is_floating_point()
    assert x.bfloat16().tolist() == [1.0, 2.5]
    assert nbgrad.zeros(2, dtype=nbgrad.bfloat16).dtype == tensor([1.0], "bfloat16").dtype
    with pytest.raises(TypeError, match="dtype complex64 is not supported"):
        x.to(np.complex64)


def test_rounding_is_to_nearest_even():
    near = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0, 65520.0]
    assert tensor(near).bfloat16().float().tolist() == [1, 1 + 2.0**-6, 1, 1, 65536, 65536]
    want = [near[0], near[1], 1, 1 + 2.0**-9, 65504, np.inf]
    assert tensor(near).half().float().tolist() == want


def test_promotion_is_pytorchs():
    """What meets float32 becomes it, and so do the two halves."""
    f, b, s, d = (tensor([1.5], dtype) for dtype in (*HALVES, np.float32, np.float64))
    for x in (f, b):
        assert (x + s).dtype == (s * x).dtype == np.float32
        assert (x * d).dtype == np.float64
        assert (x + 1).dtype == (x * 2.0).dtype == (x + tensor([1])).dtype == x.dtype
        assert (x * tensor(2.0)).dtype == x.dtype               # one without dimensions
    assert (f + b).dtype == (b @ f).dtype == np.float32
    assert (f + b).tolist() == [3.0]


@dtypes
def test_ops_round_once(dtype):
    """Each is what float32's kernel gives, rounded."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32).astype(dtype) for s in ((5, 40), (40, 3)))
    x, y = tensor(a), tensor(b)
    wide = tensor(a.astype(np.float32)), tensor(b.astype(np.float32))
    for f in (lambda x, y: x @ y, lambda x, y: x.exp(), lambda x, y: y.sum(0),
              lambda x, y: x.mean(), lambda x, y: nbgrad.softmax(x, 1), lambda x, y: x * x,
              lambda x, y: nn.functional.layer_norm(x, (40,)), lambda x, y: x.max()):
        got, want = f(x, y), f(*wide)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.data, want.data.astype(dtype))


@dtypes
def test_running_statistics_move(dtype):
    """By float32's rule, rounded once."""
    x = np.random.default_rng(2).standard_normal((6, 3, 5, 5)) + 2
    layers = [nn.BatchNorm2d(3).to(dtype=kind) for kind in (np.float32, dtype)]
    for layer in layers:
        layer(tensor(x).to(dtype).to(layer.weight.dtype))
    for name in ("running_mean", "running_var"):
        want, got = (getattr(layer, name).data for layer in layers)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want.astype(dtype))
        assert (want != (name == "running_var")).all()


@dtypes
def test_a_network_and_its_gradients(dtype):
    """Within some roundings of float32's gradients, in the dtype of each parameter."""
    rng = np.random.default_rng(1)
    x, t = rng.standard_normal((4, 3, 6, 6)).astype(np.float32), np.arange(4) % 3
    grads = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Linear(16, 3))
    for kind in (np.float32, dtype):
        model.zero_grad()
        model.to(dtype=kind)
        nbgrad.cross_entropy(model(tensor(x).to(kind)), tensor(t)).backward()
        assert all(p.grad.dtype == p.dtype == kind for p in model.parameters())
        grads.append([p.grad.float().data for p in model.parameters()])
    unit = 2.0**-11 if dtype == np.float16 else 2.0**-8
    for a, b in zip(*grads):
        assert np.abs(a - b).max() <= 64 * unit * (np.abs(a).max() + 0.1)


def test_the_sum_of_a_mean_may_leave_the_range():
    assert nbgrad.full((4,), 60000.0, dtype=np.float16).mean().item() == 60000 - 60000 % 32


def test_no_optimizer_on_halves():
    p = nn.Parameter(np.ones(2, np.float16))
    p.grad = tensor([1.0, 1.0], np.float16)
    with pytest.raises(TypeError, match="sgd_step: parameters in float16 or bfloat16 would lose"):
        nbgrad.optim.SGD([p], lr=0.1).step()
    assert p.tolist() == [1, 1]


def test_what_has_its_own_kernel_is_not_converted():
    served = half.through(cpu)
    assert served is half.through(cpu)
    x = np.array([1.0, 3.0], np.float32)
    assert served.add(x, x).dtype == np.float32                # no half: as it is
