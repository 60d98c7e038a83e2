"""Captured steps: replays are eager steps, bit by bit; what cannot be captured is said."""

from functools import partial
from threading import Thread

import numpy as np
import pytest
from nbgrad.kernels import cuda as kernels

import nbgrad
from nbgrad import nn, optim, tensor
from nbgrad.nn.utils.parametrizations import spectral_norm, weight_norm


def setup(momentum=0.9, make=None, dropout=0.0):
    """A step of a small CNN with batch norm, and all that it changes."""
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                          nn.Flatten(), nn.Dropout(dropout), nn.Linear(4, 6), nn.BatchNorm1d(6),
                          nn.Tanh(), nn.Linear(6, 3)).to("cuda")
    optimizer = make(model.parameters()) if make else optim.SGD(
        model.parameters(), 0.1, momentum=momentum, weight_decay=1e-3)
    x = nbgrad.zeros(4, 1, 4, 4, device="cuda")
    t = tensor(np.zeros(4, np.int64), device="cuda")

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        return loss
    return step, model, optimizer, x, t


def run(steps, captured, schedule=None, **how):
    """Losses, the state after them, and the graph."""
    step, model, optimizer, x, t = setup(**how)
    call = nbgrad.cuda.graph(step, warmup=2) if captured else step
    rng, losses = np.random.default_rng(1), []
    for i in range(steps):
        x.copy_(tensor(rng.standard_normal(x.shape).astype("f4")))
        t.copy_(tensor(rng.integers(0, 3, 4)))
        if schedule:
            optimizer.param_groups[0]["lr"] = schedule(i)
        losses.append(call().item())
    return losses, {k: v.tolist() for k, v in model.state_dict().items()}, call


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_replays_are_eager_steps(momentum):
    """Losses, weights, running statistics and the count of batches, bit by bit."""
    want, got = (run(6, captured, momentum=momentum) for captured in (False, True))
    assert got[2].captured
    assert len(set(got[0])) == 6
    assert got[:2] == want[:2]
    assert got[1]["1.num_batches_tracked"] == 6


def test_capturing_computes_nothing_and_results_stay_in_place():
    step, model, _, x, _ = setup()
    x.copy_(nbgrad.randn(*x.shape))
    call = nbgrad.cuda.graph(step, warmup=1)
    call()
    before = {k: v.tolist() for k, v in model.state_dict().items()}
    recording, loss = kernels.graphs.capture(step, kernels.memory.xp, True)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == before
    recording.replay()
    assert {k: v.tolist() for k, v in model.state_dict().items()} != before
    first = loss.item()
    recording.replay()
    assert loss.item() != first
    assert call() is call()


def test_a_new_learning_rate_is_captured_anew():
    def schedule(i):
        return 0.1 if i < 4 else 0.01
    want, got = (run(6, captured, schedule) for captured in (False, True))
    assert got[:2] == want[:2]
    assert got[:2] != run(6, False)[:2]


def test_gradients_add_up_over_replays():
    w, x = nbgrad.ones(3, device="cuda").requires_grad_(), nbgrad.ones(3, device="cuda")

    def step():
        (w * x).sum().backward()
    call = nbgrad.cuda.graph(step, warmup=1)
    for i in range(1, 5):
        x.fill_(i)
        call()
    assert w.grad.tolist() == [10.0] * 3


REFUSED = {
    "dropout": ({"dropout": 0.5}, "random numbers"),
    "adam": ({"make": lambda ps: optim.Adam(ps)}, r"Adam\.step\(\), whose step count"),
    "adamw": ({"make": lambda ps: optim.AdamW(ps)}, r"AdamW\.step\(\)")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_on_the_host_is_refused(name):
    how, message = REFUSED[name]
    step, model, *_ = setup(**how)
    call = nbgrad.cuda.graph(step, warmup=1)
    call()
    before = {k: v.tolist() for k, v in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"cuda graph: .*{message}.* cannot be part of"):
            call()
    assert {k: v.tolist() for k, v in model.state_dict().items()} == before
    assert not call.captured
    step()                                                       # eager steps go on
    assert {k: v.tolist() for k, v in model.state_dict().items()} != before


TRANSFERS = {"item": lambda y: y.sum().item(), "cpu": lambda y: y.cpu(), "if": lambda y: bool(y[0]),
             "tolist": lambda y: y.tolist(), "repr": repr, "float": lambda y: float(y.sum()),
             "to": lambda y: y + tensor([1.0, 2.0]).to("cuda"),
             "synchronize": lambda y: nbgrad.cuda.synchronize(),
             "graph": lambda y: kernels.graphs.capture(lambda: None, None, True)}


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_are_refused(name):
    x = nbgrad.ones(2, device="cuda")
    call = nbgrad.cuda.graph(lambda: TRANSFERS[name](x * 2), warmup=1)
    if name != "graph":
        call()
    else:
        call._left = 0
    with pytest.raises(RuntimeError, match=r"cuda graph: .* cannot be part of a captured step"):
        call()
    assert (x * 2).tolist() == [2.0, 2.0]


def test_averages_that_count_batches_are_refused():
    layer, x = nn.BatchNorm1d(2, momentum=None).to("cuda"), nbgrad.randn(3, 2, device="cuda")
    call = nbgrad.cuda.graph(lambda: layer(x), warmup=1)
    call()
    with pytest.raises(RuntimeError, match="__int__, which waits for a value of the device"):
        call()


def test_arrays_that_numpy_makes_are_made_again():
    """What stands for CuPy's kernels: copies, indexing, sums, writes, functions with out."""
    x = nbgrad.arange(6, dtype=nbgrad.float32, device="cuda").reshape(2, 3)
    i = tensor(np.array([1, 0]), device="cuda")

    def step():
        a = x.data
        out = np.empty_like(a)
        np.negative(a, out)
        out[0] += a[i.data][1]                                   # a view, and a gathered row
        b = np.where(a > 2, a.T.copy().T, out).astype(np.float64)
        np.copyto(out, b[:, ::-1])
        out.fill(1) if False else out.sort()
        return nbgrad.as_tensor(out + a.cumsum(0)), nbgrad.as_tensor(a.argmax())
    call = nbgrad.cuda.graph(step, warmup=1)
    call()
    for k in range(3):
        x.copy_(nbgrad.as_tensor(np.roll(np.arange(6.0, dtype="f4"), k).reshape(2, 3)))
        got, want = call(), step()
        for a, b in zip(got, want):
            assert a.tolist() == b.tolist()
    assert call.captured


def test_other_threads_run_while_one_captures():
    """What they ask for happens at once, is no part of the graph, and may wait for the device."""
    x, found = nbgrad.ones(2, device="cuda"), []

    def beside():
        found.append((x * 2 + len(found)).tolist())

    def step():
        if kernels.graphs.state.capture is not None:
            thread = Thread(target=beside)
            thread.start()
            thread.join()
        return x * 3
    call = nbgrad.cuda.graph(step, warmup=1)
    call()
    assert found == []
    y = call()
    assert found == [[2.0, 2.0]]
    x.fill_(5)
    call()
    assert y.tolist() == [15.0, 15.0]
    assert len(found) == 1


def test_bad_arguments():
    with pytest.raises(TypeError, match="expected a function"):
        nbgrad.cuda.graph(3)
    with pytest.raises(ValueError, match="warmup of at least 1"):
        nbgrad.cuda.graph(lambda: None, warmup=0)
    assert nbgrad.cuda.is_available()
    assert nbgrad.cuda.device_count() == 1
    assert nbgrad.cuda.memory_allocated() == nbgrad.cuda.memory_reserved() == 0
    nbgrad.cuda.empty_cache()


POLICIES = [partial(nn.BatchNorm2d, 3, correction=0), partial(nn.BatchNorm2d, 3, like="keras"),
            partial(nn.BatchNorm2d, 3, statistics="running"),
            partial(nn.BatchNorm2d, 3, on_nonfinite="skip_update"),
            partial(nn.MeanOnlyBatchNorm, 3), partial(nn.LpBatchNorm, 3),
            partial(nn.LpBatchNorm, 3, p=np.inf)]
WAITING = [partial(nn.BatchNorm2d, 3, momentum=None), partial(nn.BatchNorm2d, 3, update="step"),
           partial(nn.BatchNorm2d, 3, average=nn.DebiasedExponential(0.9), correction=0),
           partial(nn.BatchNorm2d, 3, on_nonfinite="raise"),
           partial(nn.MeanOnlyBatchNorm, 3, momentum=None), partial(nn.LpBatchNorm, 3, p=3),
           partial(nn.DecorrelatedBatchNorm, 3)]


def by_policy(make, captured, values):
    """Outputs of a layer for one batch after another, and its state."""
    layer, x = make().to("cuda"), nbgrad.zeros(4, 3, 2, 2, device="cuda")
    call = nbgrad.cuda.graph(lambda: layer(x), warmup=1) if captured else lambda: layer(x)
    outputs = []
    for value in values:
        x.copy_(tensor(value))
        outputs.append(call().tolist())
    return outputs, {k: v.tolist() for k, v in layer.state_dict().items()}, call


@pytest.mark.parametrize("make", POLICIES)
def test_statistics_that_need_no_count_are_captured(make):
    """One batch has nothing finite in a channel, and by "skip_update" does not move that one."""
    values = np.random.default_rng(0).standard_normal((5, 4, 3, 2, 2)).astype("f4")
    if make.keywords.get("on_nonfinite"):
        values[3, :, 1] = np.inf
    want, got = (by_policy(make, captured, values) for captured in (False, True))
    assert got[2].captured
    np.testing.assert_array_equal(got[0], want[0])
    assert got[1] == want[1]
    assert got[1]["num_batches_tracked"] == 5
    assert np.isfinite(got[1]["running_mean"]).all()


@pytest.mark.parametrize("make", WAITING)
def test_statistics_that_wait_for_the_device_are_refused_and_run_eagerly(make):
    layer, x = make().to("cuda"), nbgrad.randn(4, 3, 2, 2, device="cuda")
    call = nbgrad.cuda.graph(lambda: layer(x), warmup=1)
    call()
    with pytest.raises(RuntimeError, match=r"cuda graph: .* cannot be part of a captured step"):
        call()
    assert layer.num_batches_tracked.item() == 1
    layer(x)
    assert layer.num_batches_tracked.item() == (1 if layer.update == "step" else 2)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_whose_norms_are_looked_at_are_refused(norm):
    layer, x = norm(nn.Linear(3, 2)).to("cuda"), nbgrad.randn(4, 3, device="cuda")
    call = nbgrad.cuda.graph(lambda: layer(x), warmup=1)
    call()
    with pytest.raises(RuntimeError, match=r"cuda graph: .* cannot be part of a captured step"):
        call()
