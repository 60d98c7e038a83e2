"""The laboratory's instruments: values against independent computations, and nothing is moved."""

import copy
import csv

import numpy as np
import pytest

import nbgrad
from nbgrad import nn, optim
from nbgrad.autograd import Tensor, as_tensor, grad
from nbgrad.lab import (
    covariate_shift,
    effective_rank,
    hessian_vector_product,
    landscape,
    loss_slice,
    population_vs_running,
    random_direction,
    top_eigenvalue,
    variance_shift,
    watch,
    watching,
)
from nbgrad.nn.functional import cross_entropy, mse_loss
from nbgrad.ops import Generator, default_generator


def network(dropout=0.0, dtype=np.float32, seed=0):
    """6 inputs, 8 and 5 hidden units with batch norm, 3 classes."""
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout),
              nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)]
    model = nn.Sequential(*layers).to(dtype=dtype)
    for i, m in enumerate(model):
        if isinstance(m, nn.Linear):
            for p in m.parameters():
                nn.init.normal_(p, std=0.5, generator=Generator(100 * seed + i))
    return model


def batch_of(n=16, dtype=np.float32, seed=1):
    rng = np.random.default_rng(seed)
    return (as_tensor(rng.standard_normal((n, 6)).astype(dtype)),
            as_tensor(np.arange(n) % 3))


def sgd(model, lr=0.1, **options):
    return optim.SGD(model.parameters(), lr=lr, **options)


def everything(model, optimizer=None):
    """All that an instrument may not change, as bytes."""
    found = [p.data.tobytes() for p in model.parameters()]
    found += [None if p.grad is None else p.grad.data.tobytes() for p in model.parameters()]
    found += [b.data.tobytes() for b in model.buffers()]
    found += [m.training for m in model.modules()] + [m._hooks for m in model.modules()]
    found += [p._hooks or None for p in model.parameters()]
    found.append(str(default_generator.get_state()))
    if optimizer is not None:
        found += [(i, {k: np.asarray(v).tobytes() for k, v in own.items()})
                  for i, own in optimizer.state_dict()["state"].items()]
    return found


def train(model, optimizer, steps=3):
    for i in range(steps):
        optimizer.zero_grad()
        x, target = batch_of(seed=i)
        cross_entropy(model(x), target).backward()
        optimizer.step()


# -------------------------------------------------------------------------------- left as it was

INSTRUMENTS = {
    "covariate_shift": lambda m, b, o: covariate_shift(m, b, o),
    "landscape": lambda m, b, o: landscape(m, b, [0.1, 1.0]),
    "top_eigenvalue": lambda m, b, o: top_eigenvalue(m, b, iterations=4),
    "slice": lambda m, b, o: loss_slice(m, b, points=3),
    "variance_shift": lambda m, b, o: variance_shift(m, [b]),
    "normal inputs": lambda m, b, o: variance_shift(m),
    "population": lambda m, b, o: population_vs_running(m, [b, b]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", INSTRUMENTS)
def test_an_instrument_leaves_everything_as_it_was(name, training):
    model = network(dropout=0.3)
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    model.train(training)
    model[3].train()                                # a mode of its own
    before = everything(model, optimizer)
    INSTRUMENTS[name](model, batch_of(), optimizer)
    assert everything(model, optimizer) == before


def test_training_goes_on_as_if_nobody_had_measured():
    """Also the optimizer's state that did not exist before, and its kernels' notes."""
    found = []
    for measured in (False, True):
        default_generator.manual_seed(3)
        model = network(dropout=0.3)
        optimizer = sgd(model, momentum=0.9)
        for _ in range(2):
            if measured:
                covariate_shift(model, batch_of(), optimizer)
            train(model, optimizer)
        found.append(everything(model, optimizer))
    assert found[0] == found[1]


def test_a_measurement_between_micro_batches_does_not_count():
    """With update="step", the batches of one step are one; a measurement is none of them."""
    found = []
    for measured in (False, True):
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, update="step"), nn.Linear(4, 3))
        for i, p in enumerate(model.parameters()):
            nn.init.normal_(p, generator=Generator(i))
        optimizer = sgd(model)
        for step in range(2):
            for seed in (0, 1):
                x, target = batch_of(seed=10 * step + seed)
                cross_entropy(model(x), target).backward()
                if measured:
                    covariate_shift(model, (x, target), optimizer)
            optimizer.step()
        found.append([b.data.tobytes() for b in model.buffers()])
    assert found[0] == found[1]


def test_an_error_on_the_way_leaves_everything_as_it_was():
    model = network()
    optimizer = sgd(model, momentum=0.9)
    train(model, optimizer)
    before, calls = everything(model, optimizer), []

    def loss(y, target):
        calls.append(0)
        if len(calls) == 3:
            raise ArithmeticError("stop")
        return cross_entropy(y, target)

    with pytest.raises(ArithmeticError):
        covariate_shift(model, batch_of(), optimizer, loss)
    assert everything(model, optimizer) == before


# ----------------------------------------------------------------------------------------- watch

def test_watch_records_what_numpy_finds():
    model, (x, target) = network(), batch_of()
    optimizer, seen = sgd(model, lr=0.25), {}
    expected = copy.deepcopy(model)                 # hooked, so that it runs layer by layer too
    for name, m in expected.named_children():
        m.register_forward_hook(lambda m, args, y, name=name: seen.__setitem__(name, (args[0], y)))
    cross_entropy(expected(x), target).backward()
    with watch(model, optimizer) as w:
        y = model(x)
        cross_entropy(y, target).backward()
    row, = w.rows
    for name, m in expected.named_children():
        y = seen[name][1].data.astype(np.float64)
        assert row[f"{name}/mean"] == pytest.approx(y.mean(), rel=1e-6, abs=1e-7)
        assert row[f"{name}/var"] == pytest.approx(y.var(), rel=1e-5)
        assert row[f"{name}/p15"] == pytest.approx(np.percentile(y, 15), rel=1e-6, abs=1e-7)
        p = np.linalg.svd(y, compute_uv=False)
        p = p[p > 1e-6 * p[0]] / p.sum()
        assert row[f"{name}/rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
        own = list(m.parameters(recurse=False))
        if own:
            square = sum((q.grad.data.astype(np.float64) ** 2).sum() for q in own)
            # the gradient of a bias before batch norm is rounding alone
            assert row[f"{name}/grad_norm"] == pytest.approx(np.sqrt(square), rel=1e-4)
            norm = np.linalg.norm(own[0].data)
            assert row[f"{name}/effective_lr"] == pytest.approx(0.25 / norm ** 2, rel=1e-5)
        else:
            assert f"{name}/grad_norm" not in row
    into = seen["1"][0].data.astype(np.float64)     # running mean 0 and var 1, before the batch
    by_batch = (into - into.mean(0)) / np.sqrt(into.var(0) + 1e-5)
    off = into / np.sqrt(1 + 1e-5) - by_batch
    assert row["1/divergence"] == pytest.approx(np.sqrt((off ** 2).mean()), rel=1e-5)


def test_watch_sees_the_gradient_of_outputs_and_dead_units():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[0].weight.data[...] = [[1, 0], [0, 1]]
    model[0].bias.data[...] = [0, -100]             # the second is never above 0
    with watch(model) as w:
        model(as_tensor(np.array([[1, 1], [2, 3]], np.float32))).sum().backward()
        assert w.rows[0]["1/dead"] == 0.5
        assert w.rows[0]["0/dead"] == 0.0
    assert w.rows[0]["1/signal_norm"] == 2.0        # four ones
    assert w.rows[0]["0/signal_norm"] == pytest.approx(np.sqrt(2))


def test_watch_sees_a_norm_that_is_called_by_keyword_and_with_a_mask():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(1)

        def forward(self, x):
            return self.bn(x=x, mask=[1, 1, 0])

    model = ByName()
    with watch(model) as w:
        model(as_tensor(np.array([[4], [6], [1000]], np.float32))).sum().backward()
    # of running mean 0 and var 1, those of 4 and 6 are 5 and 1: 5 standard deviations
    assert w.rows[0]["bn/divergence"] == pytest.approx(5, rel=1e-5)


def test_watch_measures_every_nth_training_step_of_some_layers():
    model = network()
    optimizer = sgd(model)
    with watch(model, optimizer, every=3, layers=["4", nn.BatchNorm1d], unit=0) as w:
        train(model, optimizer, 4)
        model.eval()(batch_of()[0])                                 # no step
        with nbgrad.no_grad():
            model.train()(batch_of()[0])                            # nor this
        train(model, optimizer, 4)
        assert [m._hooks for m in model.children()] == [None] * 8   # between measured steps
    assert w.layers == ("1", "4", "5")
    assert w.series("4", "mean")[0] == [0, 3, 6]
    assert w.steps == 8
    assert 0 < w.seconds < w.elapsed
    assert 0 < w.overhead < 1
    assert sum(row["seconds"] for row in w.rows) <= w.seconds
    with pytest.raises(KeyError, match="nothing was recorded as '0/mean'"):
        w.series("0", "mean")


def test_watch_takes_its_hooks_away_also_after_an_error():
    model = network()
    before = everything(model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), watch(model):
        model(as_tensor(np.ones((4, 7), np.float32)))
    assert everything(model) == before
    w = watch(model)

    def diverge():
        cross_entropy(model(batch_of()[0]), batch_of()[1]).backward()
        raise ArithmeticError
    with pytest.raises(ArithmeticError), w:
        diverge()
    assert [m._hooks for m in model.modules()] == [None] * 9
    assert not any(p._hooks for p in model.parameters())


def test_watch_does_not_change_what_is_learned():
    models = [network(), network()]
    train(models[0], sgd(models[0]), 5)
    with watch(models[1], every=2):
        train(models[1], sgd(models[1]), 5)
    for a, b in zip(*(m.state_dict().values() for m in models)):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-4, atol=1e-6)    # fused or not: rounding


def test_watch_writes_csv_and_tensorboard(tmp_path):
    model = network()
    optimizer = sgd(model)
    with watch(model, optimizer, layers="0", csv=tmp_path / "w.csv",
               tensorboard=tmp_path / "board") as w:
        train(model, optimizer)
    with open(tmp_path / "w.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == w.rows
    assert len(list((tmp_path / "board").glob("events.out.tfevents.*"))) == 1


def test_watch_says_what_is_wrong():
    with pytest.raises(ValueError, match="every must be at least 1"):
        watch(network(), every=0)
    with pytest.raises(ValueError, match=r"no layer is 'fc\*'; there are model, 0, 1"):
        watch(network(), layers="fc*")
    model = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 3))
    with watch(model, unit=5), pytest.raises(ValueError, match="layer '1' has 3 units, none is 5"):
        model(nbgrad.randn(4, 2))
    with watch(model, unit=5, layers="0") as w:
        model(nbgrad.randn(4, 2))
    assert len(w.rows) == 1


def test_the_time_of_watching_is_counted_once_that_of_writing_included(monkeypatch):
    """A clock that stands still but for a second to each row that is written."""
    clock = [0.0]

    class Slow:
        def write(self, row):
            clock[0] += 1.0

        def close(self):
            pass
    monkeypatch.setattr(watching, "perf_counter", lambda: clock[0])
    model = nn.Linear(2, 2)
    with watch(model) as w:
        w._logs.append(Slow())
        for _ in range(3):
            model(nbgrad.randn(4, 2)).sum().backward()
    assert w.seconds == 3.0
    assert [row["seconds"] for row in w.rows] == [0.0] * 3


def test_searches_of_nothing_are_refused():
    batch = nbgrad.randn(4, 2), nbgrad.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        top_eigenvalue(nn.Linear(2, 2), batch, iterations=0)
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        loss_slice(nn.Linear(2, 2), batch, points=0)


def test_watch_keeps_a_layer_that_runs_twice_apart_and_values_that_are_not_finite():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    with watch(model, layers=nn.Linear) as w:
        model(as_tensor(np.full((3, 2), np.nan, np.float32))).sum().backward()
    row, = w.rows
    assert {"0/mean", "0:2/mean"} <= set(row)
    assert np.isnan([row["0/mean"], row["0:2/rank"]]).all()


def test_effective_rank():
    x = np.random.default_rng(0).standard_normal((7, 4))
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert effective_rank(x.T) == pytest.approx(effective_rank(x), rel=1e-12)
    assert effective_rank(np.outer(x[:, 0], x[0])) == pytest.approx(1, abs=1e-5)
    assert effective_rank(as_tensor(np.zeros((3, 2)))) == 0
    assert effective_rank(np.eye(3)[:, :2]) == pytest.approx(2)


# ------------------------------------------------------------------------------- covariate shift

def test_covariate_shift_is_the_change_of_the_gradient_when_layers_below_have_moved():
    model, batch = network(dtype=np.float64), batch_of(dtype=np.float64)
    found = covariate_shift(model, batch, sgd(model, lr=0.5))
    assert [s.layer for s in found] == ["0", "4", "7"]

    def gradient(m, layer):
        return grad(cross_entropy(m(batch[0]), batch[1]), m[layer].weight)[0].data

    stepped = copy.deepcopy(model)
    cross_entropy(stepped(batch[0]), batch[1]).backward()
    for p in stepped.parameters():
        p.data -= 0.5 * p.grad.data
    for shift, layer in zip(found, (0, 4, 7)):
        mixed = copy.deepcopy(model)
        for below in range(layer):
            for p, new in zip(mixed[below].parameters(), stepped[below].parameters()):
                p.data[...] = new.data
        g, other = gradient(model, layer), gradient(mixed, layer)
        assert shift.norm == pytest.approx(np.linalg.norm(g), rel=1e-10)
        assert shift.difference == pytest.approx(np.linalg.norm(g - other), rel=1e-8, abs=1e-14)
        assert shift.cosine == pytest.approx(
            (g * other).sum() / np.linalg.norm(g) / np.linalg.norm(other), rel=1e-10)
    assert found[0].difference == 0
    assert found[1].relative == found[1].difference / found[1].norm


def test_covariate_shift_uses_the_optimizers_own_step_and_one_noise():
    model, batch = network(dropout=0.5), batch_of()
    still = covariate_shift(model, batch, sgd(model, lr=0.0))
    assert [s.difference for s in still] == [0, 0, 0]           # the same masks
    optimizer = sgd(model, lr=0.1, momentum=0.9)
    first = covariate_shift(model, batch, optimizer)
    train(model, optimizer)
    model.load_state_dict(network(dropout=0.5).state_dict())
    assert covariate_shift(model, batch, optimizer)[2].difference != first[2].difference


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        landscape(nn.Sequential(nn.ReLU()), batch_of(), [1.0])


# ----------------------------------------------------------------------------- landscape, slices

def quadratic(curvatures):
    """A model whose loss is ½ Σ a w², w starting at 1."""
    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(np.ones(len(curvatures)))

        def forward(self, x):
            return self.w
    a = as_tensor(np.array(curvatures, np.float64))
    return Bowl(), (None, None), lambda w, _: (w * w * a).sum() * 0.5


def test_landscape_of_a_quadratic():
    model, batch, loss = quadratic([1.0, 4.0])
    etas = np.array([0.1, 0.5])
    around = landscape(model, batch, etas, loss)
    a = np.array([1.0, 4.0])
    w = 1 - etas[:, None] * a                       # g = a
    np.testing.assert_allclose(around.losses, 0.5 * (a * w * w).sum(1), rtol=1e-12)
    np.testing.assert_allclose(around.changes, etas * np.linalg.norm(a * a), rtol=1e-12)
    np.testing.assert_allclose(around.cosines, (a * a * w).sum(1) / np.linalg.norm(a)
                               / np.linalg.norm(a * w, axis=1), rtol=1e-12)
    assert around.loss == 2.5
    assert around.norm == pytest.approx(np.sqrt(17))
    assert around.smoothness == pytest.approx(np.linalg.norm(a * a) / np.linalg.norm(a))
    assert around.loss_range == (around.losses.min(), around.losses.max())
    assert around.predictiveness == (around.changes[0], around.changes[1])
    with pytest.raises(ValueError, match="numbers above 0"):
        landscape(model, batch, [0.0], loss)


def test_landscape_of_a_network_by_moving_a_copy():
    model, batch = network(), batch_of()
    around = landscape(model, batch, [0.3])
    cross_entropy(model(batch[0]), batch[1]).backward()
    moved = copy.deepcopy(model)
    moved.zero_grad()
    for p, q in zip(moved.parameters(), model.parameters()):
        p.data -= np.float32(0.3) * q.grad.data
    value = cross_entropy(moved(batch[0]), batch[1])
    value.backward()
    change = np.sqrt(sum(((p.grad.data - q.grad.data) ** 2).sum()
                         for p, q in zip(moved.parameters(), model.parameters())))
    assert around.losses[0] == pytest.approx(value.item(), rel=1e-6)
    assert around.changes[0] == pytest.approx(change, rel=1e-5)


def test_slices():
    model, batch, loss = quadratic([1.0, 4.0])
    line = loss_slice(model, batch, [[np.array([1.0, 0.0])]], span=2, points=5, loss=loss)
    np.testing.assert_allclose(line.losses, 0.5 * (1 + line.positions) ** 2 + 2)
    plane = loss_slice(model, batch, [[np.array([1.0, 0.0])], [np.array([0.0, 1.0])]], points=3,
                       loss=loss)
    s = plane.positions
    np.testing.assert_allclose(plane.losses,
                               0.5 * (1 + s[:, None]) ** 2 + 2 * (1 + s[None]) ** 2)
    with pytest.raises(ValueError, match="one or two directions"):
        loss_slice(model, batch, 3, loss=loss)
    with pytest.raises(ValueError, match="of shapes"):
        loss_slice(model, batch, [[np.zeros(3)]], loss=loss)


def test_directions_by_filter():
    model = network()
    d, plain = random_direction(model), random_direction(model, filters=False)
    for a, p, b in zip(d, model.parameters(), plain):
        if p.ndim == 2:
            np.testing.assert_allclose(np.linalg.norm(a, axis=1),
                                       np.linalg.norm(p.data, axis=1), rtol=1e-6)
            assert np.linalg.matrix_rank(np.stack([a[0], b[0]])) == 1
        else:
            assert not a.any()
            assert b.all()
    conv = nn.Conv2d(2, 3, 3)
    w, bias = random_direction(conv, seed=1)
    np.testing.assert_allclose((w ** 2).sum((1, 2, 3)), (conv.weight.data ** 2).sum((1, 2, 3)),
                               rtol=1e-5)
    assert not bias.any()


def test_a_slice_does_not_see_the_scale_of_weights_before_a_norm():
    """What filters are for: y does not depend on it, and neither does the picture."""
    batch, pictures = batch_of(dtype=np.float64), []
    for scale in (1, 10):
        model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.BatchNorm1d(3, eps=1e-12))
        nn.init.normal_(model[0].weight, generator=Generator(7))
        model = model.double()
        model[0].weight.data *= scale
        pictures.append(loss_slice(model, batch, points=5).losses)
    np.testing.assert_allclose(*pictures, rtol=1e-9)     # eps is 1e-12 of a variance of 1


# ------------------------------------------------------------------------------------ curvature

def dense_hessian(model, batch, loss=cross_entropy, h=1e-5):
    """By central differences of the gradient: error O(h²) + 1e-16/h, about 1e-9."""
    params = list(model.parameters())

    def gradient():
        found = grad(loss(model(batch[0]), batch[1]), params)
        return np.concatenate([g.data.ravel() for g in found])
    columns = []
    for p in params:
        for i in np.ndindex(p.shape):
            old = p.data[i]
            p.data[i] = old + h
            up = gradient()
            p.data[i] = old - h
            columns.append((up - gradient()) / (2 * h))
            p.data[i] = old
    return np.stack(columns, 1)


def tiny(norm, training=True):
    layers = [nn.Linear(6, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.Tanh(), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.7, generator=Generator(i))
    return model.train(training)


@pytest.mark.parametrize(("norm", "training"), [(True, True), (True, False), (False, True)])
def test_the_hessian_is_that_of_finite_differences(norm, training):
    model, batch = tiny(norm, training), batch_of(12, np.float64)
    dense = dense_hessian(model, batch)
    v = np.random.default_rng(2).standard_normal(len(dense))
    parts = np.split(v, np.cumsum([p.numel() for p in model.parameters()])[:-1])
    hv = hessian_vector_product(model, batch,
                                [a.reshape(p.shape) for a, p in zip(parts, model.parameters())])
    np.testing.assert_allclose(np.concatenate([a.ravel() for a in hv]), dense @ v, atol=1e-7)
    top = top_eigenvalue(model, batch, tolerance=1e-8)
    assert top.value == pytest.approx(np.linalg.eigvalsh((dense + dense.T) / 2)[-1], rel=1e-7)
    assert np.linalg.norm(dense @ top.vector - top.value * top.vector) < 1e-6
    assert np.linalg.norm(top.vector) == pytest.approx(1)
    assert top.residual <= 1e-8 * top.value


def test_the_top_eigenvalue_of_known_hessians():
    model, batch, loss = quadratic([3.0, -7.0, 5.0])
    top = top_eigenvalue(model, batch, loss)        # the largest, not the largest in size
    assert top.value == pytest.approx(5, rel=1e-9)
    np.testing.assert_allclose(np.abs(top.vector), [0, 0, 1], atol=1e-7)
    assert top.products <= 3
    flat = top_eigenvalue(model, batch, lambda w, _: w.sum())
    assert (flat.value, flat.products) == (0, 1)
    assert np.isnan(top_eigenvalue(model, batch, lambda w, _: (w * w).sum() * np.nan).value)
    early = top_eigenvalue(*quadratic(list(range(1, 40))), iterations=5)
    assert early.products == 5
    assert abs(early.value - 39) <= early.residual


# ------------------------------------------------------------------------------------- inference

@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_dropout_before_batch_norm_shifts_its_variance_by_what_it_keeps(p):
    """Inputs of mean 0 and a dropout that keeps 1 − p: var in evaluation / training = 1 − p. The
    ratio of two variances over 8,192 samples is known to 2 %; its median over channels to less."""
    default_generator.manual_seed(0)
    model = nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 50),
                          nn.BatchNorm1d(50))
    x = [nbgrad.randn(2048, 50) for _ in range(4)]
    first, second = variance_shift(model, x)
    assert first.ratio == pytest.approx(1 - p, rel=0.02)
    whole = np.concatenate([b.data for b in x])
    np.testing.assert_allclose(first.evaluation, whole.var(0), rtol=1e-4)
    assert (first.layer, second.layer) == ("1", "4")
    np.testing.assert_array_equal(first.running, np.ones(50))
    assert variance_shift(model[1:])[0].ratio == 1


def test_variance_shift_says_when_it_needs_data():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match="pass a loader"):
        variance_shift(model)
    assert variance_shift(model, [nbgrad.randn(4, 1, 6, 6)])[0].ratio == 1
    with pytest.raises(ValueError, match="gave no samples"):
        variance_shift(model, [])


def test_population_against_running():
    model = network()
    data = [batch_of(seed=i)[0] for i in range(3)]
    for x in data:
        model(x)
    first, second = population_vs_running(model, data)
    into = model[0](as_tensor(np.concatenate([x.data for x in data]))).data.astype(np.float64)
    np.testing.assert_allclose(first.mean, into.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first.var, into.var(0), rtol=1e-5)
    mean, var = (t.data.astype(np.float64) for t in (model[1].running_mean, model[1].running_var))
    off = ((into - mean) / np.sqrt(var + 1e-5)
           - (into - into.mean(0)) / np.sqrt(into.var(0) + 1e-5))
    np.testing.assert_allclose(first.distance, np.sqrt((off ** 2).mean(0)), rtol=1e-4)
    assert first.typical == pytest.approx(np.sqrt((off ** 2).mean()), rel=1e-4)
    assert (first.layer, second.layer) == ("1", "5")


def test_instruments_take_other_losses_and_models():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8, 1))
    batch = nbgrad.randn(5, 1, 4, 4), nbgrad.randn(5, 1)
    shifts = covariate_shift(model, batch, sgd(model), mse_loss)
    assert [s.layer for s in shifts] == ["0", "4"]
    assert landscape(model, batch, [0.01], mse_loss).smoothness > 0
    assert isinstance(batch[0], Tensor)
