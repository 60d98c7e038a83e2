"""Optimizers: formulas, PyTorch's trajectories, state, errors."""

import numpy as np
import pytest
from nbgrad.kernels.cpu import optim as kernels_optim

import nbgrad
from nbgrad import nn, optim

SHAPES = [(3, 4), (4,), ()]
SETTINGS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.5, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.1}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3, "maximize": True}),
]


def start():
    rng = np.random.default_rng(0)
    return [rng.normal(size=s) for s in SHAPES]


def gradients(step):
    rng = np.random.default_rng(100 + step)
    return [rng.normal(size=s) for s in SHAPES]


def ours(values=None, dtype=np.float64):
    return [nn.Parameter(np.array(v, dtype)) for v in values or start()]


def run(params, optimizer, steps, make=nbgrad.tensor):
    for step in steps:
        for p, g in zip(params, gradients(step)):
            p.grad = make(g)
        optimizer.step()


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_twenty_steps_equal_pytorch(name, settings):
    torch = pytest.importorskip("torch")
    a = ours()
    b = [torch.tensor(v, requires_grad=True) for v in start()]
    run(a, getattr(optim, name)(a, **settings), range(20))
    run(b, getattr(torch.optim, name)(b, **settings), range(20), torch.tensor)
    for p, q in zip(a, b):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_sgd_is_its_formula():
    p, b = 2.0, 0.0
    param = nn.Parameter(np.array([p]))
    sgd = optim.SGD([param], lr=0.5, momentum=0.9, weight_decay=0.1)
    for t, g in enumerate([1.0, -2.0, 0.5]):
        param.grad = nbgrad.tensor(np.array([g]))
        sgd.step()
        d = g + 0.1 * p
        b = d if t == 0 else 0.9 * b + d
        p -= 0.5 * b
        assert param.data[0] == pytest.approx(p, rel=1e-14)
    assert sgd.state[param]["momentum_buffer"][0] == pytest.approx(b, rel=1e-14)


def test_adamw_is_its_formula():
    p, m, v = 2.0, 0.0, 0.0
    param = nn.Parameter(np.array([p]))
    adam = optim.AdamW([param], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    for t, g in enumerate([1.0, -2.0, 0.5], 1):
        param.grad = nbgrad.tensor(np.array([g]))
        adam.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        p = p * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
        assert param.data[0] == pytest.approx(p, rel=1e-13)
    assert adam.state[param]["step"] == 3


def test_float32_stays_float32_and_close_to_float64():
    a, b = ours(dtype=np.float32), ours()
    run(a, optim.AdamW(a, lr=0.01), range(10), lambda g: nbgrad.tensor(np.float32(g)))
    run(b, optim.AdamW(b, lr=0.01), range(10))
    for p, q in zip(a, b):
        assert p.dtype == np.float32
        np.testing.assert_allclose(p.data, q.data, rtol=1e-5, atol=1e-6)


def test_groups_have_options_of_their_own_and_no_gradient_means_no_step():
    a, b, c = ours([np.ones(2)] * 3)
    sgd = optim.SGD([{"params": [a]}, {"params": b, "lr": 0.1}], lr=1.0)
    sgd.add_param_group({"params": [c], "lr": 5.0})
    a.grad, b.grad = nbgrad.tensor(np.ones(2)), nbgrad.tensor(np.ones(2))
    sgd.step()
    assert a.tolist() == [0.0, 0.0]
    assert b.tolist() == [0.9, 0.9]
    assert c.tolist() == [1.0, 1.0]
    sgd.param_groups[0]["lr"] = 2.0
    sgd.step()
    assert a.tolist() == [-2.0, -2.0]


def test_step_writes_in_place_bumps_the_version_and_leaves_the_gradient():
    p = nn.Parameter(np.ones(2))
    data = p.data
    y = (p * p).sum()
    p.grad = nbgrad.tensor(np.ones(2))
    optim.SGD([p], lr=0.5, momentum=0.9, weight_decay=0.1).step()
    assert p.data is data
    assert p.grad.tolist() == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_momentum_buffer_is_not_the_gradient():
    p = nn.Parameter(np.ones(2))
    sgd = optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = nbgrad.tensor(np.ones(2))
    sgd.step()
    p.grad.data[:] = 100.0
    assert sgd.state[p]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_a_buffer_that_a_state_dict_leaves_out_starts_at_the_first_step():
    """PyTorch writes momentum_buffer=None for parameters that had no gradient yet."""
    p = nbgrad.tensor([1.0, 2.0], requires_grad=True)
    optimizer = optim.SGD([p], lr=0.5, momentum=0.9)
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": {0: {"momentum_buffer": None}}})
    for _ in range(2):
        p.grad = nbgrad.tensor([1.0, -1.0])
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), [1 - 0.5 - 0.95, 2 + 0.5 + 0.95], rtol=1e-6)


def test_transposed_parameters_and_gradients():
    rng = np.random.default_rng(0)
    p = nn.Parameter(rng.normal(size=(4, 3)).T)
    before, g = p.data.copy(), rng.normal(size=(3, 4))
    p.grad = nbgrad.as_tensor(np.asfortranarray(g))
    optim.SGD([p], lr=0.1, momentum=0.9).step()
    np.testing.assert_allclose(p.data, before - 0.1 * g, rtol=1e-14)


def test_closure_records_and_its_loss_is_returned():
    p = nn.Parameter(np.array(3.0))
    sgd = optim.SGD([p], lr=0.25)

    def closure():
        sgd.zero_grad()
        loss = p * p
        loss.backward()
        return loss

    with nbgrad.no_grad():
        assert sgd.step(closure).item() == 9.0
    assert p.item() == 1.5


def test_zero_grad():
    p = nn.Parameter(np.ones(2))
    p.grad = nbgrad.tensor(np.ones(2))
    sgd = optim.SGD([p])
    sgd.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0.0, 0.0]
    sgd.zero_grad()
    assert p.grad is None


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(name, settings):
    whole, half = ours(), ours()
    run(whole, getattr(optim, name)(whole, **settings), range(6))
    first = getattr(optim, name)(half, **settings)
    run(half, first, range(3))
    state = first.state_dict()
    rest = ours([p.data for p in half])
    second = getattr(optim, name)(rest, lr=99.0)
    second.load_state_dict(state)
    run(half, first, range(3, 6))               # the loaded state is a copy
    run(rest, second, range(3, 6))
    for p, q in zip(whole, rest):
        np.testing.assert_array_equal(p.data, q.data)


@pytest.mark.parametrize(("name", "settings"), SETTINGS[1:3] + SETTINGS[5:8])
def test_pytorch_state_dict_loads(name, settings):
    torch = pytest.importorskip("torch")
    b = [torch.tensor(v, requires_grad=True) for v in start()]
    theirs = getattr(torch.optim, name)(b, **settings)
    run(b, theirs, range(3), torch.tensor)
    a = ours([q.detach().numpy() for q in b])
    mine = getattr(optim, name)(a)
    mine.load_state_dict(theirs.state_dict())
    saved = mine.state_dict()
    assert set(saved["state"][0]) == set(theirs.state_dict()["state"][0])
    assert saved["param_groups"][0]["params"] == [0, 1, 2]
    run(a, mine, range(3, 6))
    run(b, theirs, range(3, 6), torch.tensor)
    for p, q in zip(a, b):
        np.testing.assert_allclose(p.data, q.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_state_that_does_not_fit_is_refused_and_changes_nothing():
    a = ours()
    adam = optim.Adam(a)
    run(a, adam, range(1))
    state, groups = adam.state, adam.param_groups

    def refused(message, **change):
        with pytest.raises(ValueError, match=message):
            adam.load_state_dict({**adam.state_dict(), **change})
        assert adam.state is state
        assert adam.param_groups is groups

    own = adam.state_dict()["param_groups"][0]
    refused("different number of parameter groups", param_groups=[])
    refused("doesn't match the size", param_groups=[{**own, "params": [0, 1]}])
    refused("Invalid learning rate: -1", param_groups=[{**own, "lr": -1}])
    good = adam.state_dict()["state"][0]
    refused(r"exp_avg has shape \(2,\)", state={0: {**good, "exp_avg": np.ones(2)}})
    refused("state for parameter 7", state={7: good})
    refused("Adam needs .'exp_avg', 'exp_avg_sq'. for parameter 0", state={0: {"step": 1}})
    with pytest.raises(ValueError, match="the keys 'state' and 'param_groups'"):
        adam.load_state_dict({"state": {}})


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda p: optim.SGD([], lr=0.1), ValueError, "empty parameter list"),
    (lambda p: optim.SGD(p, lr=0.1), TypeError, "iterable of Tensors or dicts, but got Parameter"),
    (lambda p: optim.SGD([p, p], lr=0.1), ValueError, "some parameters appear in more than one"),
    (lambda p: optim.SGD([{"params": [p]}, {"params": [p]}]), ValueError, "some parameters appear"),
    (lambda p: optim.SGD([{"params": {p}}]), TypeError, "ordered collections"),
    (lambda p: optim.SGD([{"lr": 1.0}]), TypeError, "the key 'params'"),
    (lambda p: optim.SGD([np.ones(2)]), TypeError, "can only optimize Tensors.*ndarray"),
    (lambda p: optim.SGD([p * 2]), ValueError, "non-leaf"),
    (lambda p: optim.SGD([nbgrad.tensor([1])]), ValueError, "dtype int64"),
    (lambda p: optim.SGD([nn.Parameter(np.broadcast_to(1.0, (2,)))]), ValueError, "read-only"),
    (lambda p: optim.SGD([p], lr=-1), ValueError, "Invalid learning rate: -1"),
    (lambda p: optim.SGD([p], lr=float("nan")), ValueError, "Invalid learning rate: nan"),
    (lambda p: optim.SGD([p], momentum=-1), ValueError, "Invalid momentum value: -1"),
    (lambda p: optim.SGD([p], weight_decay=-1), ValueError, "Invalid weight_decay value: -1"),
    (lambda p: optim.SGD([p], nesterov=True), ValueError, "Nesterov momentum requires a momentum"),
    (lambda p: optim.Adam([p], betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1"),
    (lambda p: optim.Adam([p], betas=(0.9,)), ValueError, "betas must be two numbers"),
    (lambda p: optim.AdamW([p], eps=-1), ValueError, "Invalid epsilon value: -1"),
])
def test_bad_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make(nn.Parameter(np.ones(2)))


def bad_gradient(p, sgd):
    p.grad = nbgrad.tensor(np.ones(2))


def array_gradient(p, sgd):
    p.grad = np.ones(4000)


def other_data(p, sgd):
    p.data = np.ones(9000)
    p.grad = nbgrad.tensor(np.ones(9000))


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=1.0, momentum=0.9), optim.Adam],
                         ids=["sgd", "adam"])
@pytest.mark.parametrize(("breaks", "error", "message"), [
    (bad_gradient, ValueError, r"gradient of a parameter of shape \(4000,\) has shape \(2,\)"),
    (array_gradient, TypeError, r"a Tensor as the gradient .* \(4000,\), got ndarray"),
    (other_data, ValueError, r"of a parameter of shape \(9000,\) has shape \(4000,\)"),
])
def test_what_does_not_fit_a_parameter_is_refused_before_any_step(make, breaks, error, message):
    first, p = nn.Parameter(np.ones(3)), nn.Parameter(np.ones(4000))
    optimizer = make([{"params": [first]}, {"params": [p]}])
    for q in (first, p):
        q.grad = nbgrad.ones_like(q)
    optimizer.step()
    breaks(p, optimizer)
    before = [first.data.copy(), p.data.copy()]
    with pytest.raises(error, match=message):
        optimizer.step()
    np.testing.assert_array_equal(first.data, before[0])
    np.testing.assert_array_equal(p.data, before[1])


def test_named_parameters_are_the_parameters():
    model = nn.Linear(2, 1)
    sgd = optim.SGD(model.named_parameters(), lr=0.5)
    assert sgd.param_groups[0]["param_names"] == ["weight", "bias"]
    assert sgd.param_groups[0]["params"] == [model.weight, model.bias]
    weight = model.weight.data.copy()
    model.weight.grad = nbgrad.ones(1, 2)
    sgd.step()
    np.testing.assert_array_equal(model.weight.data, weight - np.float32(0.5))
    sgd.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match="some param names are missing"):
        optim.SGD([("weight", model.weight), model.bias])


@pytest.mark.parametrize("change", [{"exp_avg": 1.0}, {"exp_avg": None}, {"step": -1},
                                    {"step": np.ones(2)}])
def test_hostile_state_of_adam_is_refused(change):
    p = nn.Parameter(np.ones(2))
    adam = optim.Adam([p])
    p.grad = nbgrad.tensor(np.ones(2))
    adam.step()
    state = adam.state_dict()
    state["state"][0].update(change)
    with pytest.raises(ValueError, match="loaded state dict"):
        adam.load_state_dict(state)


def test_param_groups_exempt_biases_and_normalization():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3),
                          nn.LayerNorm((1, 3)))
    decayed, exempt = optim.param_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[3].weight)]
    assert decayed["weight_decay"] == 0.1
    assert exempt["weight_decay"] == 0.0
    assert len(exempt["params"]) == 6
    optim.SGD(optim.param_groups(nn.ReLU(), 0.1) + [decayed, exempt])


def test_training_lowers_the_loss():
    nbgrad.manual_seed(0)
    x = nbgrad.randn(64, 3)
    t = (x.sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    adam, losses = optim.Adam(model.parameters(), lr=0.05), []
    for _ in range(60):
        adam.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 0.5 < losses[0]


def test_repr_lists_options():
    text = repr(optim.SGD([nn.Parameter(np.ones(1))], lr=0.5))
    assert text.startswith("SGD (\nParameter Group 0\n    dampening: 0\n    lr: 0.5\n")


@pytest.mark.parametrize("make", [lambda p: optim.SGD(p, lr=0.5), optim.Adam])
def test_what_changes_between_steps_is_noticed(make):
    """Other parameters with a gradient, more parameters, momentum from now on: each step is that of
    the parameters it finds."""
    def run(alone):
        ps = [nbgrad.tensor(np.full(3, i, np.float32), requires_grad=True) for i in range(4)]
        optimizer = make(ps[:3])
        kept = []
        for step, which in enumerate([(0, 1, 2), (1,), (0, 2), (0, 1, 2, 3)]):
            if step == 2 and "momentum" in optimizer.param_groups[0]:
                optimizer.param_groups[0]["momentum"] = 0.9
            if step == 3:
                optimizer.param_groups[0]["params"].append(ps[3])
            for i, p in enumerate(ps):
                p.grad = nbgrad.ones(3) * (i + 1) if i in which else None
            if alone:
                optimizer._plans = {}                  # as if every step were the first
            optimizer.step()
            kept.append([p.detach().numpy().copy() for p in ps])
        return kept

    for a, b in zip(run(False), run(True)):
        np.testing.assert_array_equal(a, b)
    assert run(False)[0][3].tolist() == [3, 3, 3]
    assert run(False)[1][0].tolist() == run(False)[0][0].tolist()


def test_tasks_cut_every_array_in_the_same_proportion():
    sizes = [78400, 100, 10000, 0, 1, 300_000]
    pieces, spans = kernels_optim._pieces(sizes)
    for t, n in enumerate(sizes):
        own = pieces[pieces[:, 0] == t]
        assert own[:, 2].sum() == n
        assert (np.diff(own[:, 1]) == own[:-1, 2]).all()
    assert spans[0, 0] == 0
    assert spans[-1, 1] == len(pieces)
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    first = pieces[:spans[len(spans) // 2, 0]]
    for t, n in enumerate(sizes):             # an edge of a piece is rounded up to a unit
        done = first[first[:, 0] == t, 2].sum()
        part = n * (len(spans) // 2) / len(spans)
        assert part <= done <= min(n, part + kernels_optim.UNIT)
