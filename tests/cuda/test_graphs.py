"""Captured steps: replays are eager steps, bit by bit; what cannot be captured is said."""

import gc
import weakref
from collections import Counter
from functools import partial
from threading import Thread

import numpy as np
import pytest
from nbgrad.kernels import cuda as kernels
from nbgrad.kernels.cuda.simulator import fresh

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


def run(steps, captured, before=None, eagerly=(), **how):
    """Losses, the state after them and the optimizer's, and the graph. before(i, optimizer) runs
    ahead of step i; steps ``eagerly`` run without the graph."""
    step, model, optimizer, x, t = setup(**how)
    call = nbgrad.cuda.graph(step, warmup=2) if captured else step
    rng, losses = np.random.default_rng(1), []
    for i in range(steps):
        x.copy_(tensor(rng.standard_normal(x.shape).astype("f4")))
        t.copy_(tensor(rng.integers(0, 3, 4)))
        if before:
            before(i, optimizer)
        losses.append((step if i in eagerly else call)().item())
    state = {k: v.tolist() for k, v in model.state_dict().items()}
    moments = {i: {k: v if isinstance(v, int) else v.tolist() for k, v in own.items()}
               for i, own in optimizer.state_dict()["state"].items()}
    return losses, (state, moments), call


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_replays_are_eager_steps(momentum):
    """Losses, weights, running statistics and the count of batches, bit by bit."""
    want, got = (run(6, captured, momentum=momentum) for captured in (False, True))
    assert got[2].captured
    assert len(set(got[0])) == 6
    assert got[:2] == want[:2]
    assert got[1][0]["1.num_batches_tracked"] == 6


ADAMS = {"adam": partial(optim.Adam, lr=0.01, weight_decay=0.01),
         "adamw": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
         "climbing": partial(optim.Adam, lr=0.001, betas=(0.5, 0), maximize=True)}


@pytest.mark.parametrize(("name", "eagerly"), [("adam", ()), ("adamw", (4,)), ("climbing", ())])
def test_adams_replays_are_eager_steps(name, eagerly):
    """Bit by bit, with dropout's masks, whether steps are counted on the device or on the host, and
    where one between the replays is not captured."""
    make = partial(ADAMS[name], capturable=True)
    got = run(6, True, make=make, dropout=0.5, eagerly=eagerly)
    want = run(6, False, make=make, dropout=0.5)
    assert got[2].captured
    assert len(set(got[0])) == 6
    assert got[:2] == want[:2] == run(6, False, make=ADAMS[name], dropout=0.5)[:2]
    assert [own["step"] for own in got[1][1].values()] == [6] * 10


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
    def schedule(i, optimizer):
        optimizer.param_groups[0]["lr"] = 0.1 if i < 3 else 0.01
    for make in (None, partial(optim.Adam, lr=0.1, capturable=True)):
        want, got = (run(4, captured, schedule, make=make) for captured in (False, True))
        assert got[:2] == want[:2]
        assert got[1] != run(4, False, make=make)[1]


@pytest.mark.parametrize("make", [partial(optim.SGD, lr=0.1, momentum=0.9),
                                  partial(optim.AdamW, lr=0.01, capturable=True)])
def test_state_that_is_loaded_between_replays_is_used(make):
    """Saved after three steps and loaded before the sixth: a graph of the old arrays would go on
    with them."""
    saved = []

    def before(i, optimizer):
        if i == 3:
            state = optimizer.state_dict()
            saved[:] = [{"param_groups": state["param_groups"], "state": {
                k: {n: v if isinstance(v, int) else v.copy() for n, v in own.items()}
                for k, own in state["state"].items()}}]
        if i == 5:
            optimizer.load_state_dict(saved[0])
    want, got = (run(7, captured, before, make=make) for captured in (False, True))
    assert got[:2] == want[:2]
    assert got[2].captured
    assert {own.get("step", 5) for own in got[1][1].values()} == {5}         # 3 and 2 more


def test_a_count_is_on_the_device_and_its_state_a_number():
    w = nbgrad.ones(3, device="cuda").requires_grad_()
    w.grad = nbgrad.ones(3, device="cuda")
    optimizer = optim.Adam([w], capturable=True)
    optimizer.step()
    host = w.detach().cpu().requires_grad_()
    host.grad = nbgrad.ones(3)
    assert type(optimizer.state[w]["step"]) is kernels.memory.Array
    assert optimizer.state_dict()["state"][0]["step"] == 1
    elsewhere = optim.Adam([host], capturable=True)
    elsewhere.load_state_dict(optimizer.state_dict())
    elsewhere.step()
    assert type(elsewhere.state[host]["step"]) is int
    optimizer.param_groups[0]["capturable"] = False
    optimizer.step()
    assert optimizer.state[w]["step"] == elsewhere.state[host]["step"] == 2
    assert w.tolist() == host.tolist()
    back = optim.Adam([w])
    back.load_state_dict({**elsewhere.state_dict(), "param_groups": [
        {**back.param_groups[0], "params": [0], "capturable": True}]})
    assert back.state[w]["step"].item() == 2
    with pytest.raises(ValueError, match="capturable must be True or False, got 1"):
        optim.Adam([w], capturable=1)


@pytest.mark.parametrize("make", [partial(optim.SGD, momentum=0.9),
                                  partial(optim.Adam, capturable=True)])
def test_state_that_a_captured_step_would_make_at_every_replay_is_refused(make):
    """Of a parameter whose first gradient comes when warm-up is over."""
    a, b = (nbgrad.ones(2, device="cuda").requires_grad_() for _ in range(2))
    optimizer, both = make([a, b]), []

    def step():
        optimizer.zero_grad()
        ((a * b if both else a * 2).sum()).backward()
        optimizer.step()
    call = nbgrad.cuda.graph(step, warmup=1)
    call()
    both.append(True)
    with pytest.raises(RuntimeError, match=r"cuda graph: \w+\.step\(\) that makes a parameter's"):
        call()
    step()
    call()
    assert call.captured


def draws(captured, shapes, before=None):
    """Outputs of two dropouts of ones in each of several steps, and the generator after them."""
    own = nbgrad.Generator(5)
    nbgrad.manual_seed(3)
    xs, found = [nbgrad.ones(*shape, device="cuda") for shape in shapes], []

    def step():
        return (nn.functional.dropout(xs[0], 0.4), nn.functional.dropout(xs[1], 0.7),
                nbgrad.ops.random.dropout(xs[1], 0.2, generator=own))
    call = nbgrad.cuda.graph(step, warmup=1) if captured else step
    for i in range(5):
        if before:
            before(i)
        found.append([y.tolist() for y in call()])
    return found, nbgrad.get_rng_state(), own.get_state()


@pytest.mark.parametrize("shapes", [[(3, 5), (7,)], [(1,), (1100,)], [(4,), (2, 2)]], ids=str)
def test_replays_draw_what_eager_steps_draw(shapes):
    """Odd sizes leave half of a draw to the next one."""
    want, got = (draws(captured, shapes) for captured in (False, True))
    assert got == want
    assert len({str(y[1]) for y in got[0]}) > 1 + (shapes[1] != (2, 2))


@pytest.mark.parametrize("name", ["seed", "state", "draw"])
def test_a_generator_that_the_host_moves_between_replays(name):
    """Seeded anew, set back, or drawn from."""
    states, drawn = [], []

    def before(i):
        if name == "seed" and i in (2, 4):
            nbgrad.manual_seed(8)
        elif name == "draw" and i > 1:
            drawn.append(nbgrad.rand(3).tolist())
        elif name == "state" and i == 2:
            states.append(nbgrad.get_rng_state())
        elif name == "state" and i == 4:
            nbgrad.set_rng_state(states.pop())
    shapes = [(3, 5), (8,)]
    want, got = (draws(captured, shapes, before) for captured in (False, True))
    assert got == want
    if name == "draw":
        assert drawn[:3] == drawn[3:]
    else:
        assert got[0][4][:2] == got[0][2][:2] != got[0][3][:2]


def test_capturing_draws_nothing():
    x = nbgrad.ones(9, device="cuda")
    before = nbgrad.get_rng_state()
    recording, y = kernels.graphs.capture(lambda: nn.functional.dropout(x), kernels.memory.xp, True)
    assert nbgrad.get_rng_state() == before
    recording.replay()
    assert nbgrad.get_rng_state() != before
    assert set(y.tolist()) <= {0, 2}


def test_dropouts_gradient_has_the_mask_of_its_replay():
    x = nbgrad.ones(40, device="cuda").requires_grad_()

    def step():
        x.grad = None
        y = nn.functional.dropout(x, 0.5)
        y.sum().backward()
        return y
    call, seen = nbgrad.cuda.graph(step, warmup=1), set()
    call()
    for _ in range(3):
        y = call()
        assert x.grad.tolist() == y.tolist()
        seen.add(str(y.tolist()))
    assert len(seen) == 3


class Pool:
    """What CuPy's pool does: blocks that are free again serve the next array of their size."""

    def __init__(self):
        self.asked, self.blocks, self.idle = 0, 0, Counter()

    def fresh(self, shape, dtype):
        array = fresh(shape, dtype)
        size = -(-array.nbytes // 512)                           # CuPy's unit
        self.asked += 1
        self.blocks += not self.idle[size]
        self.idle[size] -= self.idle[size] > 0
        weakref.finalize(array, self.idle.update, {size: 1})
        return array


def test_replays_allocate_nothing_and_eager_steps_what_the_pool_has(monkeypatch):
    """Of what nbgrad's own kernels take. Eagerly each op asks the pool, which gets new memory from
    the device in the first steps alone; a replay asks for none, neither for dropout's generator nor
    for Adam's counts."""
    pool = Pool()
    monkeypatch.setattr(kernels.memory, "fresh", pool.fresh)
    step, *_ = setup(make=partial(optim.Adam, capturable=True), dropout=0.5)
    call, asked, blocks = nbgrad.cuda.graph(step, warmup=4), [], []
    for _ in range(7):
        before = pool.asked, pool.blocks
        call()
        asked.append(pool.asked - before[0])
        blocks.append(pool.blocks - before[1])
        gc.collect()
    assert call.captured
    assert asked[1] == asked[2] == asked[3] > 20
    assert blocks[2:4] == [0, 0]
    assert asked[5:] == [0, 0]


def test_gradients_add_up_over_replays():
    w, x = nbgrad.ones(3, device="cuda").requires_grad_(), nbgrad.ones(3, device="cuda")

    def step():
        (w * x).sum().backward()
    call = nbgrad.cuda.graph(step, warmup=1)
    for i in range(1, 5):
        x.fill_(i)
        call()
    assert w.grad.tolist() == [10.0] * 3


@pytest.mark.parametrize("p", [2.0, 1.0, np.inf])
def test_gradients_are_clipped_in_replays(p):
    """The norm stays on the device, and is that of each replay."""
    w, x = nbgrad.zeros(3, device="cuda", requires_grad=True), nbgrad.zeros(3, device="cuda")

    def step():
        w.grad = None
        (w * x).sum().backward()
        return nn.utils.clip_grad_norm_([w], 1.0, p), w.grad
    call = nbgrad.cuda.graph(step, warmup=1)
    for values in ([3.0, 0.0, -4.0], [30.0, 0.0, 40.0], [0.25, 0.0, 0.5], [3.0, 0.0, np.nan]):
        x.copy_(nbgrad.tensor(values))
        norm, grad = call()
        want = np.linalg.norm(values, p)
        np.testing.assert_allclose(norm.item(), want, rtol=1e-12)
        scaled = np.array(values) / max(want, 1.0) if want == want else np.full(3, np.nan)
        np.testing.assert_allclose(grad.tolist(), scaled, rtol=2e-6)      # norm + 1e-6, float32
    assert norm.device == "cuda"
    assert call.captured


REFUSED = {"adam": ({"make": lambda ps: optim.Adam(ps)}, r"Adam\.step\(\) without capturable=True"),
           "adamw": ({"make": lambda ps: optim.AdamW(ps)}, r"AdamW\.step\(\) without capturable")}


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


ONES = nbgrad.ones(2, device="cuda")
DRAWS = {"rand": lambda: nbgrad.rand(2, device="cuda"), "randn": lambda: nbgrad.randn(2),
         "dropout of a tensor on the CPU": lambda: nn.functional.dropout(nbgrad.ones(2)),
         "PCG64": lambda: kernels.dropout(
             ONES.data, np.random.Generator(np.random.Philox(1)), 0.5)}


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_that_the_host_draws_are_refused(name):
    call = nbgrad.cuda.graph(DRAWS[name], warmup=1)
    call()
    with pytest.raises(RuntimeError, match=f"cuda graph: .*{name}.* cannot be part of a captured"):
        call()


def test_a_replay_inside_of_a_capture_is_refused():
    x = nbgrad.ones(2, device="cuda")
    inner = nbgrad.cuda.graph(lambda: x * 2, warmup=1)
    inner(), inner()
    outer = nbgrad.cuda.graph(inner, warmup=1)
    outer()
    with pytest.raises(RuntimeError, match="a replay of another step cannot be part of"):
        outer()


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
