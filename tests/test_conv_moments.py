"""Statistics that a convolution takes of its own output, and the batch norm that uses them."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from nbgrad.kernels import cpu, reference
from nbgrad.kernels.cpu import epilogue, jit, windows, winograd

import nbgrad
from nbgrad import models, nn, ops
from nbgrad.backend import use
from nbgrad.testing import gradcheck

DTYPES = [np.float32, np.float64]
# Against float64 on the kernel's own output. float32 sums of 256 pixels by four accumulators, about
# a pivot within 2 standard deviations of the mean: at most 64 · 2 · 6e-8, as a rule 1e-7; an offset
# of 1e6 standard deviations leaves the mean its two words, and m2 the rounding of y − pivot.
BOUND = {np.float32: 4e-6, np.float64: 1e-12}
drawn = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 65])
PLAIN = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


@pytest.fixture
def always(monkeypatch):
    """Moments of every output that there is code for."""
    monkeypatch.setattr(epilogue, "LEAST_BYTES", 0)
    monkeypatch.setattr(epilogue, "SHARE", 0)


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def check(y, found, bound, spread=0.0):
    """count, mean and M2 are those of y to ``bound`` standard deviations."""
    count, mean, m2 = found
    want, var = reference.batch_norm_stats(y)
    sigma = np.sqrt(var) + spread
    np.testing.assert_array_equal(count, y.size / y.shape[1])
    assert [a.dtype for a in found] == [np.float64] * 3
    assert (abs(mean - want) <= bound * sigma).all()
    assert (abs(m2 / count - var) <= bound * sigma * sigma).all()


def convolved(cpu_or_reference, x, w, b=None, **how):
    moments = []
    return cpu_or_reference.conv2d(x, w, b, **how, moments=moments), moments


@drawn
@given(st.sampled_from(DTYPES), st.integers(1, 5), sizes, sizes,
       st.tuples(st.integers(1, 13), st.integers(1, 13)), st.integers(1, 3), st.integers(1, 2),
       st.sampled_from([0.0, 100.0]), st.booleans(), st.booleans())
def test_of_random_shapes(always, dtype, N, C, O, size, k, stride, offset, past, deep):
    """Direct (whole vectors and parts, through the caches and past them) and Winograd, of either
    kind."""
    x, w, b = normal((N, C, *size), dtype), normal((O, C, k, k), dtype, 1), normal(O, dtype, 2)
    how = {**PLAIN, "stride": (stride, stride), "padding": (k // 2, k // 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "deep", lambda s, itemsize: deep)
        plain = cpu.conv2d(x, w, b + dtype(offset), **how)
        patch.setattr(windows, "PAST_BYTES", 0 if past else 1 << 60)
        y, found = convolved(cpu, x, w, b + dtype(offset), **how)
    np.testing.assert_array_equal(y, plain)                      # asking changes nothing
    if found:
        check(y, found, BOUND[dtype] * (1 + offset / 10), spread=1e-2 * (O > 0))


@drawn
@given(st.sampled_from(DTYPES), st.integers(1, 3), sizes, st.sampled_from([1, 2]),
       st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(1, 3), st.integers(1, 2))
def test_of_depthwise_and_grouped(always, dtype, N, G, each, size, k, stride):
    how = {**PLAIN, "stride": (stride, stride), "padding": (k // 2, k // 2), "groups": G}
    x, w = normal((N, G, *size), dtype), normal((G * each, 1, k, k), dtype, 1)
    y, found = convolved(cpu, x, w, **how)
    if found:
        check(y, found, BOUND[dtype], spread=1e-2)
    x, w = normal((N, 4 * G, *size), dtype), normal((4 * G, 4, k, k), dtype, 1)
    y, found = convolved(cpu, x, w, **how)
    if found:
        check(y, found, BOUND[dtype], spread=1e-2)


CASES = {
    "direct": ((8, 3, 40, 40), (64, 3, 3, 3), {**PLAIN, "stride": (2, 2)}),
    "direct, parts of vectors": ((16, 3, 64, 64), (19, 3, 5, 5), PLAIN),
    "1x1": ((16, 32, 32, 32), (64, 32, 1, 1), {**PLAIN, "padding": (0, 0)}),
    "several panels": ((8, 16, 32, 32), (200, 16, 1, 1), {**PLAIN, "padding": (0, 0)}),
    "Winograd": ((64, 16, 33, 31), (20, 16, 3, 3), PLAIN),
    "depthwise": ((8, 64, 56, 56), (64, 1, 3, 3), {**PLAIN, "groups": 64}),
    "groups together": ((16, 32, 40, 40), (32, 4, 3, 3), {**PLAIN, "groups": 8}),
}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    monkeypatch.setattr(epilogue, "LEAST_BYTES", 1 << 16)
    monkeypatch.setattr(epilogue, "SHARE", 0)
    return CASES[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_path_is_taken_with_the_same_bits_for_any_number_of_threads(case, dtype):
    x_shape, w_shape, how = case
    x, w = normal(x_shape, dtype), normal(w_shape, dtype, 1)
    before, results = jit.get_num_threads(), []
    try:
        for n in range(1, before + 1):            # 3 and 8: test_threads.py
            jit.set_num_threads(n)
            results.append(convolved(cpu, x, w, **how))
    finally:
        jit.set_num_threads(before)
    (y, first), *others = results
    check(y, first, BOUND[dtype])
    for _, found in others:
        for a, b in zip(first, found, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_constant_channel_is_exact_and_an_offset_costs_no_digits(case):
    """A channel of equal values: no variance at all. One far from zero: as batch_norm_stats."""
    x_shape, w_shape, how = case
    x, w, b = normal(x_shape, np.float32), normal(w_shape, np.float32, 1), normal(w_shape[0], "f4")
    w[0], b[0], b[1:3] = 0, 1e6 + 0.3, 1e6
    y, (count, mean, m2) = convolved(cpu, x, w, b, **how)
    assert mean[0] == b[0]
    assert m2[0] == 0
    check(y, (count, mean, m2), BOUND[np.float32])


def test_pivots_that_mislead_are_found(monkeypatch):
    """The four pixels that a task takes its pivot from are far away from all others."""
    monkeypatch.setattr(epilogue, "LEAST_BYTES", 0)
    monkeypatch.setattr(epilogue, "SHARE", 0)
    x = normal((4, 16, 16, 16), np.float32)
    x[:, :, ::4] *= 1e4
    x[:, :, 0] += 1e6
    how = {**PLAIN, "padding": (0, 0)}
    w = np.eye(16, dtype=np.float32)[..., None, None]
    y, found = convolved(cpu, x, w, **how)
    check(y, found, BOUND[np.float32])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_gives_what_batch_norm_gives(case, bad):
    x_shape, w_shape, how = case
    x, w = normal(x_shape, np.float32), normal(w_shape, np.float32, 1)
    x[1, 0, 5, 7] = bad
    y, found = convolved(cpu, x, w, **how)
    want = cpu.batch_norm(y, None, None, eps=1e-5)
    known = (found[1], found[2] / found[0]) if found else None
    for a, b in zip(cpu.batch_norm(y, None, None, eps=1e-5, known=known), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_and_batch_norm_with_known_statistics(dtype):
    x, w = normal((3, 4, 6, 5), dtype), normal((5, 4, 3, 3), dtype, 1)
    y, found = convolved(reference, x, w, **PLAIN)
    check(y, found, 1e-14)
    known, r = (found[1], found[2] / found[0]), normal(y.shape, dtype, 3)
    for k in (cpu, reference):
        running = [np.zeros(5, dtype), np.ones(5, dtype), 0.1], [np.zeros(5, dtype),
                                                                np.ones(5, dtype), 0.1]
        got = k.batch_norm(y, None, None, r, eps=1e-5, relu=True, running=running[0], known=known)
        want = reference.batch_norm(y, None, None, r, eps=1e-5, relu=True, running=running[1])
        for a, b in zip((*got, *running[0][:2]), (*want, *running[1][:2]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6 if dtype == np.float32 else 1e-12, atol=1e-6)
    known[1][2] = np.inf                                        # float32 was not enough: done again
    got = cpu.batch_norm(y, None, None, eps=1e-5, known=known)
    if dtype == np.float32:
        for a, b in zip(got, cpu.batch_norm(y, None, None, eps=1e-5), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_where_it_does_not_pay_there_are_none():
    small = convolved(cpu, normal((2, 16, 8, 8), "f4"), normal((16, 16, 3, 3), "f4"), **PLAIN)
    few = convolved(cpu, normal((64, 1, 64, 64), "f4"), normal((6, 1, 5, 5), "f4"), **PLAIN)
    nothing = convolved(cpu, normal((0, 16, 8, 8), "f4"), normal((16, 16, 3, 3), "f4"), **PLAIN)
    assert small[1] == few[1] == nothing[1] == []


# ------------------------------------------------------------------------------------------- layers

def apart(model):
    """A hook that does nothing on every module: called one by one."""
    for module in model.modules():
        module.register_forward_hook(lambda module, args, y: None)
    return model


def steps(make, x, t, watched, n=2):
    """Loss, gradients, parameters and buffers of a model after some steps."""
    nbgrad.manual_seed(0)
    model = (make() if watched else apart(make())).double()
    optimizer = nbgrad.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return losses, grads, {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("placement", ["before", "after", "preact"])
def test_a_resnet20_step_with_and_without(always, placement, monkeypatch):
    asked = []
    conv2d = cpu.conv2d

    def counting(*args, moments=None, **how):
        asked.append(moments is not None)
        return conv2d(*args, moments=moments, **how)
    monkeypatch.setattr(cpu, "conv2d", counting)
    x, t = nbgrad.as_tensor(normal((8, 3, 16, 16), "f8")), nbgrad.as_tensor(np.arange(8) % 10)

    def make():
        return models.resnet20(image_size=16, placement=placement)
    losses, grads, state = steps(make, x, t, True)
    taken = sum(asked)
    assert taken == 2 * {"before": 19, "after": 0, "preact": 9}[placement]
    want_losses, want_grads, want_state = steps(make, x, t, False)
    assert sum(asked) == taken
    # float64: in float32 a rounding flips a ReLU and two steps later all digits are others
    np.testing.assert_allclose(losses, want_losses, rtol=1e-9)
    for got, want in ((grads, want_grads), (state, want_state)):
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=0, err_msg=name,
                                       atol=1e-9 * max(np.abs(value).max(), 1e-3))


def test_sequential_hands_them_on_and_moves_the_running_statistics(always):
    def make():
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                             nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.Tanh())
    x = nbgrad.as_tensor(normal((4, 3, 9, 9), "f4"))
    nbgrad.manual_seed(0)
    fused = make()
    nbgrad.manual_seed(0)
    other = apart(make())
    np.testing.assert_allclose(fused(x).detach().numpy(), other(x).detach().numpy(), rtol=0,
                               atol=2e-6)
    for name, value in other.state_dict().items():
        np.testing.assert_allclose(fused.state_dict()[name].numpy(), value.numpy(), rtol=1e-6,
                                   atol=1e-7, err_msg=name)
    fused.eval()
    other.eval()
    np.testing.assert_allclose(fused(x).detach().numpy(), other(x).detach().numpy(), rtol=0,
                               atol=2e-6)
    node = fused.train()(x).grad_fn
    while node is not None:                                      # nothing of it stays in the graph
        assert not {"moments", "known", "running"} & set(node.settings)
        node = next((e for e in node.edges if hasattr(e, "settings")), None)


def test_gradients_of_every_order(always):
    def f(x, w, gamma, beta):
        y, moments = ops.conv2d(x, w, padding=1, return_moments=True)
        assert moments is not None
        return ops.batch_norm(y, None, None, gamma, beta, True, activation="relu", moments=moments)

    inputs = [nbgrad.as_tensor(normal(s, "f8", i)).requires_grad_()
              for i, s in enumerate([(2, 9, 3, 3), (9, 9, 3, 3), (9,), (9,)])]
    assert gradcheck(f, inputs)
    first = nbgrad.grad(f(*inputs).sum() * 1.0 + (f(*inputs) ** 2).sum(), inputs, create_graph=True)
    with use("reference"):
        again = nbgrad.grad((f(*inputs) ** 2).sum() + f(*inputs).sum(), inputs, create_graph=True)
        want = nbgrad.grad(sum((g * g).sum() for g in again), inputs)
    for a, b in zip(nbgrad.grad(sum((g * g).sum() for g in first), inputs), want, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-8, atol=1e-8)


def test_winograd_off_takes_them_too(always, monkeypatch):
    monkeypatch.setattr(winograd, "enabled", False)
    y, found = convolved(cpu, normal((4, 16, 9, 9), "f4"), normal((16, 16, 3, 3), "f4", 1), **PLAIN)
    check(y, found, BOUND[np.float32])
