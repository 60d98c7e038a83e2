"""The engine with tensors on a simulated device."""

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference

import nbgrad
from nbgrad import backend, nn, no_grad, optim, tensor
from nbgrad.nn import functional as F


@pytest.fixture
def borrowed(monkeypatch):
    """Kernels that CUDA has not yet are the reference's, on device arrays."""
    def on_device(f):
        def run(*args, **settings):
            y = f(*args, **settings)
            return tuple(map(cuda.memory._wrapped, y)) if isinstance(y, tuple) else (
                cuda.memory._wrapped(y))
        return run
    for name, f in vars(reference).items():
        if callable(f) and not hasattr(cuda, name):
            monkeypatch.setattr(cuda, name, on_device(f), raising=False)


def step(model, x, target):
    loss = ((model(x) - target) ** 2).mean()
    loss.backward()
    return loss, [p.grad for p in model.parameters()]


def test_a_network_on_the_device_is_the_cpus(borrowed):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((5, 6)).astype("f4"), rng.standard_normal((5, 3)).astype("f4")
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
    with backend.use("reference"):
        want = step(model, tensor(x), tensor(target))
    model.zero_grad()
    model.to("cuda")
    assert {p.device for p in model.parameters()} == {"cuda"}
    got = step(model, tensor(x, device="cuda"), tensor(target, device="cuda"))
    assert {g.device for g in got[1]} == {"cuda"}
    np.testing.assert_allclose(got[0].item(), want[0].item(), rtol=1e-6)
    for g, w in zip(got[1], want[1]):
        np.testing.assert_allclose(g.cpu().numpy(), w.numpy(), rtol=1e-4, atol=1e-6)
    assert model.cpu() is model
    assert {p.device for p in model.parameters()} == {"cpu"}


def test_moving_is_differentiated():
    x = tensor([1.0, 2.0], requires_grad=True)
    (x.to("cuda") * 3).sum().backward()
    assert (x.grad.device, x.grad.tolist()) == ("cpu", [3.0, 3.0])
    assert x.cuda().cpu().device == "cpu"
    assert x.to("cuda:0").device == "cuda"
    assert x.to(tensor([1.0], dtype=np.float64, device="cuda")).dtype == np.float64


def test_devices_do_not_mix():
    a, b = tensor([1.0, 2.0], device="cuda"), tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="mul: expected all tensors to be on the same device, "
                                           "but found at least two devices, cuda and cpu"):
        a * b
    with pytest.raises(RuntimeError, match="cpu and cuda"):
        b + a
    with pytest.raises(RuntimeError, match=r"'cuda:1' is not there: 1 CUDA devices"):
        b.to("cuda:1")
    with pytest.raises(RuntimeError, match="'tpu' is not there"):
        b.to("tpu")
    half = tensor(0.5, requires_grad=True)             # one number of the CPU's is welcome
    (a * half).sum().backward()
    assert (half.grad.item(), half.grad.device) == (3.0, "cpu")
    a.copy_(b * 2)
    assert a.tolist() == [2.0, 4.0]


def test_conditions_and_running_statistics_do_not_mix_devices():
    """They are no inputs of an op; numbers go where the condition is."""
    a, yes = tensor([1.0, 2.0], device="cuda"), tensor([True, False])
    x, mean = nbgrad.ones(3, 2, device="cuda"), nbgrad.zeros(2)
    for name, call in (("where", lambda: nbgrad.where(yes, a, a)),
                       ("where", lambda: a.masked_fill(yes, 0.0)),
                       ("batch_norm", lambda: F.batch_norm(x, mean, mean + 1, training=True)),
                       ("batch_norm", lambda: F.batch_norm(x, mean, mean + 1)),
                       ("linear_batch_norm", lambda: nbgrad.ops.linear_batch_norm(
                           x, x[:2], None, mean, mean + 1))):
        with pytest.raises(RuntimeError, match=f"^{name}: expected all tensors to be on the same "
                                               "device, but found at least two devices, "):
            call()
    assert mean.tolist() == [0.0, 0.0]
    y = nbgrad.where(yes.to("cuda"), 1.0, 0.5)
    assert (y.device, y.tolist()) == ("cuda", [1.0, 0.5])
    assert nbgrad.where(tensor(True), a, -a).tolist() == [1.0, 2.0]


def test_order_of_one_number_stays_on_the_device():
    assert tensor(3.0, device="cuda").argsort().device == "cuda"


def test_numbers_of_either_kind_are_the_cpus():
    """Drawn on the host and compared where the probabilities are."""
    p = np.linspace(0, 1, 50, dtype="f4")
    here, there = (nbgrad.bernoulli(tensor(p, device=d), generator=nbgrad.Generator(3))
                   for d in ("cpu", "cuda"))
    assert there.device == "cuda"
    assert there.tolist() == here.tolist()
    assert 0 < sum(here.tolist()) < 50


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam], ids=lambda f: f.__name__)
@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
def test_a_step_of_two_devices_changes_nothing(make, what):
    p, q = (tensor([1.0, 2.0], device="cuda", requires_grad=True) for _ in range(2))
    if what == "parameter":
        q = q.detach().cpu().requires_grad_()
    optimizer = make([p, q], 0.5, **{"momentum": 0.5} if make is optim.SGD else {})
    for t in (p, q):
        t.grad = nbgrad.ones(2, device=t.device)
    if what == "gradient":
        q.grad = q.grad.cpu()
    elif what == "state":
        optimizer.step()
        for name in optimizer._buffers:
            optimizer.state[q][name] = np.zeros(2, "f4")
    before = p.tolist(), [own.get("step") for own in optimizer.state.values()]
    with pytest.raises(RuntimeError, match="expected a group's parameters, their gradients and "
                                           "state to be on the same device, but found at least"):
        optimizer.step()
    assert before == (p.tolist(), [own.get("step") for own in optimizer.state.values()])


def test_what_a_tensor_on_the_device_says():
    x = nbgrad.full((2,), 1.5, device="cuda")
    assert repr(x) == "tensor([1.5, 1.5], device='cuda')"
    assert (x.device, x.tolist(), x[1].item(), x.sum().item()) == ("cuda", [1.5, 1.5], 1.5, 3.0)
    with pytest.raises(TypeError, match="can't convert cuda device type tensor to numpy"):
        x.numpy()
    assert nbgrad.zeros_like(x).device == x.new_ones(3).device == nbgrad.rand_like(x).device
    for make in (nbgrad.zeros, nbgrad.ones, nbgrad.empty, nbgrad.rand, nbgrad.randn):
        assert make(2, 3, device="cuda").device == "cuda"
    assert nbgrad.arange(3, device="cuda").tolist() == [0, 1, 2]
    a = nbgrad.rand(3, generator=nbgrad.Generator(1), device="cuda")
    assert a.tolist() == nbgrad.rand(3, generator=nbgrad.Generator(1)).tolist()


METHODS = {
    "exp": (), "log": (), "sqrt": (), "abs": (), "erf": (), "relu": (), "sigmoid": (), "tanh": (),
    "sum": (1,), "mean": (0,), "var": (1,), "std": (), "amax": (1,), "amin": (), "prod": (1,),
    "logsumexp": (1,), "norm": (), "cumsum": (0,), "clamp": (0.4, 0.9), "argmax": (1,),
    "reshape": (3, 2), "transpose": (0, 1), "contiguous": (), "flatten": (), "unsqueeze": (0,),
    "expand": (4, 2, 3), "clone": (), "sign": (), "floor": (), "double": (), "max": (1,), "any": ()}


@pytest.mark.parametrize("name", METHODS)
def test_methods_stay_on_the_device(name):
    data = np.random.default_rng(0).uniform(0.3, 1.4, (2, 3)).astype("f4")
    results = []
    for device in ("cpu", "cuda"):
        x = tensor(data, requires_grad=True, device=device)
        y = getattr(x, name)(*METHODS[name])
        y = y[0] if isinstance(y, tuple) else y
        assert y.device == device
        if y.requires_grad:
            y.sum().backward()
            assert x.grad.device == device
        results.append([t.detach().cpu().numpy() for t in (y, x.grad) if t is not None])
    for want, got in zip(*results):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_in_place_writes_and_second_derivatives():
    x = tensor([1.0, 2.0], device="cuda", requires_grad=True)
    y = (x * 2).exp()
    with no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    (dx,) = nbgrad.grad((x ** 3).sum(), x, create_graph=True)
    (ddx,) = nbgrad.grad(dx.sum(), x)
    assert ddx.tolist() == [6.0, 12.0]
    with no_grad():
        with pytest.raises(RuntimeError, match="expanded view"):
            x.expand(2, 2).add_(1)
        x[0] = 5
        x.mul_(2).clamp_(max=9)
    assert x.tolist() == [9.0, 4.0]


def test_what_cupy_has_another_way():
    """Repeated indices, triangles, shapes of (), a product with a zero: the CPU's values."""
    def of(device):
        x = tensor(X, requires_grad=True, device=device)
        rows = nbgrad.tensor([0, 2, 0], device=device)
        y = (x[:, rows].sum() + x.max(1)[0].sum() + x.tril().sum() + x.index_select(0, rows).mean()
             + (x * 0 + x.round()).prod(1).sum() + nn.functional.cross_entropy(
                 x, nbgrad.tensor([1, 0, 3], device=device)))
        y.backward()
        assert y.shape == ()
        one_hot = nn.functional.one_hot(nbgrad.tensor([1, 0], device=device), 3)
        return [a.detach().cpu().numpy() for a in (y, x.grad, one_hot, x.view(-1))]
    X = np.array([[0.2, -1.4, 2.0, 0.6], [1.0, 3.0, -2.0, 0.7], [0.9, 1.2, -1.1, 1.8]], "f4")
    for want, got in zip(of("cpu"), of("cuda"), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_a_convolutions_statistics_reach_batch_norm_on_a_device(monkeypatch):
    """Where its output is large; the same step as without, to the rounding of sums."""
    from nbgrad.kernels.cuda import norm

    from nbgrad.ops import conv

    known, found = [], {}
    plain = norm.batch_norm
    monkeypatch.setattr("nbgrad.kernels.cuda.batch_norm", lambda *a, **k: (
        known.append("known" in k), plain(*a, **k))[1])
    for least in (0, 1 << 30):
        monkeypatch.setattr(conv, "DEVICE_BYTES", least)
        nbgrad.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to("cuda")
        x = nbgrad.randn(3, 2, 6, 6).to("cuda")
        (model(x) ** 2).sum().backward()
        found[least] = [a.detach().cpu().numpy() for a in (
            *(p.grad for p in model.parameters()), *model.buffers())]
    assert known == [True, False]
    for a, b in zip(*found.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
