"""Whatever form an array has in memory, an op gives what it gives for a clean copy, and leaves it
as it was."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import nbgrad
from nbgrad import as_tensor, tensor

# Each takes a clean array and returns the memory it made and a view of it with the same values.

def c_order(a):
    return a, a


def fortran_order(a):
    memory = a.copy(order="F")
    return memory, memory


def permuted(a):
    """The last axis outermost in memory, the others as they were: channels first."""
    axes = (a.ndim - 1, *range(a.ndim - 1)) if a.ndim else ()
    memory = a.transpose(axes).copy()
    return memory, memory.transpose(np.argsort(axes))


def channels_last(a):
    memory = np.ascontiguousarray(np.moveaxis(a, 1, -1)) if a.ndim > 1 else a
    return memory, np.moveaxis(memory, -1, 1) if a.ndim > 1 else a


def stepped(a):
    memory = np.full([2 * n + 1 for n in a.shape], 7, a.dtype)
    view = memory[(..., *(slice(1, None, 2) for _ in a.shape))]
    view[...] = a
    return memory, view


def reversed_axes(a):
    flip = (..., *(slice(None, None, -1),) * a.ndim)
    memory = a[flip].copy()
    return memory, memory[flip]


def broadcast(a):
    """Every second axis has one value, at stride 0."""
    memory = a[(..., *(slice(0, 1) if i % 2 == 0 else slice(None) for i in range(a.ndim)))].copy()
    return memory, np.broadcast_to(memory, a.shape) if a.size else memory.reshape(a.shape)


def read_only(a):
    frozen = a.copy()
    frozen.flags.writeable = False
    return frozen, frozen


def misaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = memory[1:].view(a.dtype).reshape(a.shape) if a.size else a
    view[...] = a
    return memory, view


def row_of_a_matrix(a):
    """Size-1 axes with strides that fit nothing."""
    memory = np.zeros((3, *a.shape, 3), a.dtype)
    view = memory[1, ..., 1] if a.ndim else memory[1, 1:2].reshape(())
    view[...] = a
    return memory, view


FORMS = [c_order, fortran_order, permuted, channels_last, stepped, reversed_axes, broadcast,
         read_only, misaligned, row_of_a_matrix]
G = np.random.default_rng(0)
SHAPES = [(), (1,), (7,), (0,), (3, 4), (1, 1), (0, 3), (5, 1), (2, 3, 4), (2, 0, 3), (1, 3, 1),
          (2, 3, 4, 5), (129, 130)]
MATRICES = [(3, 4), (1, 4), (0, 4), (2, 3, 4), (2, 1, 3, 4), (2, 0, 4), (130, 4)]
BATCHES = [(4, 3), (5, 3, 1), (2, 3, 4, 5), (2, 3, 1, 1), (1, 3, 2, 2), (8, 3, 10, 11)]
IMAGES = [(2, 4, 5, 6), (1, 4, 3, 3), (0, 4, 4, 4), (2, 4, 3, 9), (3, 4, 12, 13)]
WEIGHT, BIAS = G.standard_normal((6, 2, 3, 3)), G.standard_normal(6)
OTHER, GAMMA = G.standard_normal((4, 5)), G.standard_normal(3)


def like(x, a):
    """A constant as a tensor of x's dtype."""
    return tensor(a).to(x.dtype)


CASES = {                                                 # name: (function of one tensor, shapes)
    "arithmetic": (lambda x: (x + 1) * x - x / 3, SHAPES),
    "broadcasting": (lambda x: x.unsqueeze(0) * like(x, GAMMA.reshape(3, *[1] * x.ndim)), SHAPES),
    "exp": (nbgrad.exp, SHAPES), "relu": (nbgrad.relu, SHAPES), "gelu": (nbgrad.gelu, SHAPES),
    "tanh": (nbgrad.tanh, SHAPES), "clamp": (lambda x: x.clamp(-0.5, 0.5), SHAPES),
    "sum": (lambda x: x.sum(), SHAPES), "sum 0": (lambda x: x.sum(0), SHAPES),
    "sum -1": (lambda x: x.sum(-1, keepdim=True), SHAPES), "norm": (lambda x: x.norm(), SHAPES),
    "mean of square": (lambda x: (x * x).mean(tuple(range(x.ndim - 1)) or None),
                       [s for s in SHAPES if 0 not in s]),
    "amax": (lambda x: x.amax(-1), [s for s in SHAPES if 0 not in s]),
    "cumsum": (lambda x: x.cumsum(0), SHAPES), "reshape": (lambda x: x.reshape(-1) * 2, SHAPES),
    "cat": (lambda x: nbgrad.cat([x, x.flip(0)], 0), [s for s in SHAPES if s]),
    "sort of index": (lambda x: x[tuple(slice(None, None, -1) for _ in x.shape)] * x, SHAPES),
    "matmul": (lambda x: x @ like(x, OTHER), MATRICES),
    "matmul left": (lambda x: x.mT @ x, MATRICES),
    "linear": (lambda x: nbgrad.linear(x, like(x, OTHER.T), like(x, OTHER[0])), MATRICES),
    "softmax": (lambda x: nbgrad.softmax(x, -1), [s for s in SHAPES if 0 not in s]),
    "log_softmax": (lambda x: nbgrad.log_softmax(x, 0), [s for s in SHAPES if 0 not in s]),
    "cross_entropy": (lambda x: nbgrad.cross_entropy(
        x, nbgrad.zeros(x.shape[0], *x.shape[2:], dtype=int)), BATCHES),
    "batch_norm": (lambda x: nbgrad.batch_norm(
        x, None, None, like(x, GAMMA), like(x, GAMMA), True, eps=0.1), BATCHES),
    "batch_norm eval": (lambda x: nbgrad.batch_norm(x, like(x, GAMMA), like(x, GAMMA**2), eps=0.1),
                        BATCHES),
    "layer_norm": (lambda x: nbgrad.layer_norm(x, x.shape[-1:], eps=0.1), BATCHES),
    "conv2d": (lambda x: nbgrad.conv2d(x, like(x, WEIGHT), like(x, BIAS), padding=1, groups=2),
               IMAGES),
    "conv2d strided": (lambda x: nbgrad.conv2d(x[:, :2], like(x, WEIGHT), stride=2), IMAGES),
    "max_pool2d": (lambda x: nbgrad.max_pool2d(x, 2, 1), IMAGES),
    "avg_pool2d": (lambda x: nbgrad.avg_pool2d(x, 3, 2, 1), IMAGES),
    "adaptive_avg_pool2d": (lambda x: nbgrad.adaptive_avg_pool2d(x, (2, 1)), IMAGES),
}


def run(f, x):
    """f(x), and the gradient of a fixed projection of it."""
    x.requires_grad_()
    y = f(x)
    dy = np.cos(np.arange(y.numel())).reshape(y.shape)
    y.backward(as_tensor(dy.astype(y.dtype)))
    return y.data, x.grad.data


def tolerance(dtype, reference, n):
    """Rounding of n terms of the size of the largest value: √n ulp, eight times that for the ops'
    own steps."""
    scale = max(1.0, np.abs(reference).max(initial=0.0))
    return 8 * np.finfo(dtype).eps * scale * math.sqrt(max(n, 1))


def compare(f, x, clean):
    expected = run(f, as_tensor(clean.astype(np.float64)))
    for got, want in zip(run(f, x), expected):
        assert got.shape == want.shape
        assert got.dtype == x.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance(x.dtype, want, clean.size))


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow])
def test_memory_form_does_not_matter(name, data):
    f, shapes = CASES[name]
    shape, form = data.draw(st.sampled_from(shapes)), data.draw(st.sampled_from(FORMS))
    real = [np.float32] if form is read_only else [np.float32, np.float64]   # each is a compilation
    dtype = data.draw(st.sampled_from(real))
    clean = np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal(shape).astype(dtype)
    memory, view = form(clean)
    before = memory.tobytes()
    compare(f, as_tensor(view), view.copy())
    assert memory.tobytes() == before


@pytest.mark.parametrize("name", CASES)
def test_big_endian_input(name):
    f, shapes = CASES[name]
    a = G.standard_normal(shapes[-1]).astype(">f4")
    before = a.tobytes()
    compare(f, tensor(a), a.astype(np.float64))
    compare(f, as_tensor(a), a.astype(np.float64))
    assert a.tobytes() == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["conv2d", "linear", "batch_norm", "layer_norm", "cross_entropy",
                                  "matmul"])
def test_memory_form_of_the_other_inputs_does_not_matter(name, form):
    arrays = {"conv2d": [(2, 4, 5, 6), (6, 4, 3, 3), (6,)], "linear": [(3, 4), (5, 4), (5,)],
              "batch_norm": [(4, 3, 5), (3,), (3,)], "layer_norm": [(2, 3, 4), (3, 4), (3, 4)],
              "cross_entropy": [(4, 3, 2), (4, 3, 2)], "matmul": [(2, 3, 4), (4, 5)]}[name]
    f = {"batch_norm": lambda x, g, b: nbgrad.batch_norm(x, None, None, g, b, True),
         "layer_norm": lambda x, g, b: nbgrad.layer_norm(x, (3, 4), g,
                                                         b)}.get(name, getattr(nbgrad, name))
    pairs = [form(G.standard_normal(s)) for s in arrays]
    before = [memory.tobytes() for memory, _ in pairs]
    xs = [as_tensor(view).requires_grad_() for _, view in pairs]
    clean = [tensor(view.copy(), requires_grad=True) for _, view in pairs]
    y, expected = f(*xs), f(*clean)
    np.testing.assert_allclose(y.data, expected.data, rtol=1e-12, atol=1e-12)
    dy = form(np.asarray(G.standard_normal(y.shape)))[1]
    y.backward(as_tensor(dy))
    expected.backward(tensor(dy.copy()))
    for x, c in zip(xs, clean):
        np.testing.assert_allclose(x.grad.data, c.grad.data, rtol=1e-10, atol=1e-11)
    assert [memory.tobytes() for memory, _ in pairs] == before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, bool])
def test_integers_in_every_form(form, dtype):
    a = (np.arange(24).reshape(2, 3, 4) % 3).astype(dtype)
    memory, view = form(a)
    before, x = memory.tobytes(), as_tensor(view)
    b = np.array(view)
    for f, g in ((lambda t: t.sum(1), lambda t: t.sum(1)), (lambda t: t + 1, lambda t: t + 1),
                 (lambda t: t.amax(2), lambda t: t.max(2)),
                 (lambda t: t.flip(0), lambda t: t[::-1]),
                 (lambda t: t == 1, lambda t: t == 1),
                 (lambda t: t.argmax(0), lambda t: t.argmax(0)),
                 (lambda t: t.cumsum(1), lambda t: t.cumsum(1)),
                 (lambda t: t.float(), lambda t: t)):
        np.testing.assert_array_equal(f(x).data, g(b))
    assert memory.tobytes() == before
