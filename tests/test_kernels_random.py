"""Every family of CPU kernels against the reference in float64: random shapes, settings, memory
layouts and dtypes, with finite values and with NaN and infinities among them.

The examples are the same in every run. NBGRAD_EXAMPLES sets how many each test makes,
NBGRAD_DTYPES of which dtypes.
"""

import math
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from nbgrad.kernels import cpu, reference

EXAMPLES = int(os.environ.get("NBGRAD_EXAMPLES", "40"))
DTYPES = os.environ.get("NBGRAD_DTYPES", "float32 float64").split()
# nothing, one, primes, the vector widths (4 to 16 values) and their multiples ± 1, some long ones
SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 61, 63, 64, 65, 97, 127, 128, 129, 257,
         509, 1031, 4099]
SMALL = [s for s in SIZES if s <= 33]
BAD = [np.nan, np.inf, -np.inf]
FINITE = [np.isfinite]         # where NaN may stand for an infinity and the other way round


# Layouts: the same values in other memory.

def c_order(a):
    return a


def channels_last(a):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) if a.ndim > 2 else a


def fortran_order(a):
    return np.asfortranarray(a) if a.ndim else a


def stepped(a):
    wide = np.full([3 * n for n in a.shape], 7, a.dtype)
    view = wide[(..., *(slice(1, None, 3),) * a.ndim)]
    view[...] = a
    return view


def backwards(a):
    flip = (..., *(slice(None, None, -1),) * a.ndim)
    return a[flip].copy()[flip]


def one_behind(a):
    """Begins one value behind a cache line: no vector is aligned."""
    room = np.empty(a.size + 65, a.dtype)
    start = -room.ctypes.data % 64 // a.itemsize + 1
    view = room[start:start + a.size].reshape(a.shape)
    view[...] = a
    return view


def part_of_rows(a):
    """Rows with a gap behind each, as in a slice of a wider matrix."""
    wide = np.full((*a.shape[:-1], a.shape[-1] + 3), 7, a.dtype) if a.ndim else a
    view = wide[..., 2:-1] if a.ndim else a
    view[...] = a
    return view


LAYOUTS = [c_order, channels_last, fortran_order, stepped, backwards, one_behind, part_of_rows]


class Example:
    """The random choices of one example."""

    def __init__(self, data, special):
        self.draw, self.special = data.draw, special
        self.dtype = np.dtype(self.pick(DTYPES))
        self.eps = np.finfo(self.dtype).eps
        self.random = np.random.default_rng(self.draw(st.integers(0, 2**32 - 1)))

    def pick(self, values):
        return self.draw(st.sampled_from(values))

    def shape(self, dims, most, sizes=SIZES):
        """So many sizes, whose product is at most ``most``."""
        out, left = [], most
        for _ in range(dims):
            out.append(self.pick([s for s in sizes if s <= left]))
            left //= max(out[-1], 1)
        return tuple(self.draw(st.permutations(out)))

    def array(self, *shape, scale=1.0, shift=0.0, special=True):
        """Normal values, in special examples up to two bad ones among them, in some layout."""
        a = np.asarray(self.random.standard_normal(shape) * scale + shift, self.dtype)
        if self.special and special and a.size:
            for bad in self.draw(st.lists(st.sampled_from(BAD), max_size=2)):
                a.flat[self.random.integers(a.size)] = bad
        return self.pick(LAYOUTS)(a)

    def maybe(self, *shape, **how):
        return self.array(*shape, **how) if self.draw(st.booleans()) else None

    def check(self, name, *arrays, terms=1, scale=None, which=None, **settings):
        """What the kernel gives, after comparing it with the reference."""
        before = [a.tobytes() if a is not None else None for a in arrays]
        got = getattr(cpu, name)(*arrays, **settings)
        want = getattr(reference, name)(*map(wide, arrays), **settings)
        for a, bits in zip(arrays, before):
            assert a is None or a.tobytes() == bits
        outputs = [(got, want)] if not isinstance(want, tuple) else list(zip(got, want))
        assert np.asarray(outputs[0][0]).dtype == self.dtype
        for a, b in outputs:
            self.compare(a, b, terms, scale, which)
        return got

    def compare(self, got, want, terms=1, scale=None, which=None):
        """Bad values where the reference has them; elsewhere, sums of so many rounded terms of at
        most ``scale`` in all, on average √terms roundings apart; 8 for the luckless ones."""
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape
        if want.dtype.kind != "f":
            np.testing.assert_array_equal(got, want)
            return
        for test in which or (np.isnan, np.isposinf, np.isneginf):
            np.testing.assert_array_equal(test(got), test(want), test.__name__)
        good = np.isfinite(want)
        got, want = got[good].astype(np.float64), want[good]
        if scale is None:
            scale = max(1.0, np.abs(want).max(initial=0))
        atol = 8 * (2 + math.sqrt(terms)) * self.eps * scale
        np.testing.assert_allclose(got, want, rtol=8 * self.eps, atol=atol)


def wide(a):
    return a.astype(np.float64) if a is not None and a.dtype.kind == "f" else a


def magnitude(name, *arrays, **settings):
    """The largest Σ |terms| of any output: what the rounding errors of sums are measured by."""
    sizes = [None if a is None else np.abs(np.where(np.isfinite(a), a, 0))
             for a in map(wide, arrays)]
    out = getattr(reference, name)(*sizes, **settings)
    return max(1.0, *(np.max(o, initial=0) for o in (out if isinstance(out, tuple) else (out,))))


def largest(*arrays):
    return math.prod(np.abs(a[np.isfinite(a)]).max(initial=1.0) for a in arrays if a is not None)


def random_examples(test):
    """Run the test on examples of finite values, and on examples with NaN and infinities."""
    @pytest.mark.parametrize("special", [False, True], ids=["finite", "nan and inf"])
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(special, data):
        with np.errstate(all="ignore"):
            test(Example(data, special))
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def product(e, name, *arrays, terms, **settings):
    return e.check(name, *arrays, terms=terms, scale=magnitude(name, *arrays, **settings),
                   **settings)


@random_examples
def test_matmul(e):
    M, K, N = e.shape(3, e.pick([1 << 12, 1 << 21]))
    batch = [e.shape(e.pick([0, 0, 0, 1, 2]), 4, SMALL) for _ in range(2)]
    shapes = batch if e.draw(st.booleans()) else [batch[0], ()]
    try:
        np.broadcast_shapes(*shapes)
    except ValueError:
        shapes = [batch[0], (1,)]
    product(e, "matmul", e.array(*shapes[0], M, K), e.array(*shapes[1], K, N), terms=K)


@random_examples
def test_linear(e):
    M, K, N = e.shape(3, e.pick([1 << 12, 1 << 21]))
    lead = e.pick([(M,), (1, M), (2, M), (M, 3), ()])
    x, weight, bias = e.array(*lead, K), e.array(N, K), e.maybe(N)
    y = product(e, "linear", x, weight, bias, terms=K)
    dy = e.array(*y.shape)
    product(e, "linear_backward", dy, x, weight, terms=max(N, math.prod(lead)),
            input_gradient=e.draw(st.booleans()))


def convolution(e):
    """Shapes and settings: any, depthwise, or 3×3 with stride 1 and many channels."""
    kind = e.pick(["any", "depthwise", "common"])
    some = [1, 1, 2, 3]
    G, c, o = (1, e.pick(SMALL[1:]), e.pick(SMALL[1:])) if kind == "common" else (
        e.pick(SMALL[2:]), 1, 1) if kind == "depthwise" else (
        e.pick(some), e.pick(SMALL[1:13]), e.pick(SMALL[1:13]))
    I, J = (3, 3) if kind == "common" else (e.pick([1, 2, 3, 5]), e.pick([1, 2, 3, 5]))
    how = {"stride": (1, 1) if kind == "common" else (e.pick(some), e.pick(some)),
           "padding": (e.pick([0, 1, 2, 3]), e.pick([0, 1, 2, 3])),
           "dilation": (1, 1) if kind == "common" else (e.pick(some), e.pick([1, 1, 2])),
           "groups": G}
    H, W = (max(e.pick([1, 3, 4, 5, 8, 9, 13, 17]), d * (k - 1) + 1 - 2 * p)
            for k, p, d in zip((I, J), how["padding"], how["dilation"]))
    return (e.pick([0, 1, 2, 3]), G * c, H, W), (G * o, c, I, J), how


@random_examples
def test_convolution(e):
    """A bad weight meets the zeros of the padding or does not, as a kernel likes: weights and dy
    are bad in examples without padding only."""
    size, shape, how = convolution(e)
    bare = how["padding"] == (0, 0)
    x, weight, bias = e.array(*size), e.array(*shape, special=bare), e.maybe(shape[0])
    y = product(e, "conv2d", x, weight, bias, terms=math.prod(shape[1:]), **how)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    dy, kernel_size = e.array(*y.shape, special=bare), shape[2:]
    product(e, "conv2d_weight", dy, x, terms=dy.size // shape[0], kernel_size=kernel_size, **how)
    weight = e.array(*shape, special=False)
    dy = e.array(*y.shape)
    product(e, "conv2d_input", dy, weight, terms=math.prod(shape) // shape[1], input_size=size,
            **how)


def window(e, size, dilation):
    """Settings of a pooling window that PyTorch allows: padding at most half of it."""
    k = [e.pick([n for n in (1, 2, 3, 5) if d * (n - 1) < s + 2 * (n // 2)])
         for s, d in zip(size, dilation)]
    low = [max(0, -(-(d * (n - 1) + 1 - s) // 2)) for n, s, d in zip(k, size, dilation)]
    return {"kernel_size": tuple(k), "stride": (e.pick([1, 2, 3]), e.pick([1, 2, 3])),
            "padding": tuple(e.pick(range(a, n // 2 + 1)) if a <= n // 2 else a
                             for a, n in zip(low, k)),
            "ceil_mode": e.draw(st.booleans())}


def image(e):
    return tuple(map(e.pick, ([0, 1, 2, 3], SMALL, [1, 2, 5, 8, 9, 13], [1, 3, 4, 7, 16])))


@random_examples
def test_max_pool(e):
    size = image(e)
    dilation = e.pick([(1, 1), (1, 1), (2, 1), (2, 3)])
    how = window(e, size[2:], dilation)
    x = e.array(*size, scale=2)
    np.rint(x, out=x)                                             # ties: the first one wins
    y, indices = e.check("max_pool2d", x, dilation=dilation, **how)
    indices = e.pick(LAYOUTS)(indices)
    taps = math.prod(how["kernel_size"])
    e.check("max_pool2d_backward", e.array(*y.shape), indices, input_size=size, terms=taps,
            scale=5.0 * taps)
    e.check("max_pool2d_gather", x, indices)


def mean_pool(e, name, x, **how):
    """The output is bad exactly where it reads something bad: NaN if both infinities or a NaN."""
    bad = ~np.isfinite(x)
    good = np.where(bad, x.dtype.type(0), x)
    want = getattr(reference, name)(wide(good), **how)
    for value in (np.inf, -np.inf, np.nan):
        here = np.isnan(x) if np.isnan(value) else x == value
        want = want + np.where(getattr(reference, name)(wide(here * 1.0), **how) > 0, value, 0)
    bits = x.tobytes()
    got = getattr(cpu, name)(x, **how)
    assert x.tobytes() == bits
    assert got.dtype == e.dtype
    e.compare(got, want, terms=9, scale=max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0)))
    return got


@random_examples
def test_average_pool(e):
    size = image(e)
    how = {**window(e, size[2:], (1, 1)), "count_include_pad": e.draw(st.booleans()),
           "divisor_override": e.pick([None, 3])}
    y = mean_pool(e, "avg_pool2d", e.array(*size), **how)
    mean_pool(e, "avg_pool2d_backward", e.array(*y.shape), input_size=size, **how)
    out = e.pick([1, 2, 3, 7]), e.pick([1, 2, 5])
    y = mean_pool(e, "adaptive_avg_pool2d", e.array(*size), output_size=out)
    mean_pool(e, "adaptive_avg_pool2d_backward", e.array(*y.shape), input_size=size)


@random_examples
def test_batch_norm(e):
    """Statistics of an infinity may be infinite or NaN: blocks of values are merged. The backward
    passes get statistics of other values: a bad one in dy or x shows in its own places first."""
    x = e.array(*e.shape(e.pick([2, 2, 3, 4, 5]), 1 << 14), scale=3, shift=5)
    C, n = x.shape[1], x.size // max(x.shape[1], 1)
    gamma, beta = e.maybe(C, special=False), e.maybe(C, special=False)
    eps = e.pick([1e-5, 1e-3])
    _, mean, var, invstd = e.check("batch_norm", x, gamma, beta, eps=eps, terms=n, which=FINITE)
    for a, b in zip(cpu.batch_norm_stats(x), (mean, var)):
        e.compare(a, b, terms=n, which=FINITE)
    mean, invstd = e.random.standard_normal(C), 0.5 + e.random.random(C)
    e.check("batch_norm_elemt", x, gamma, beta, mean, invstd)
    dy = e.array(*x.shape)
    total = 10 * largest(dy, x) * max(n, 1)
    sums = cpu.batch_norm_backward_reduce(dy, x, mean, invstd)
    for a, b in zip(sums, reference.batch_norm_backward_reduce(wide(dy), wide(x), mean, invstd)):
        e.compare(a, b, scale=total, which=FINITE)
    scale = 100 * largest(dy, gamma, x, x)
    e.check("batch_norm_backward", dy, x, gamma, mean, invstd, terms=n, scale=max(scale, total),
            which=FINITE)
    for given_sums in (sums, (None, None)):
        e.check("batch_norm_backward_elemt", dy, x, gamma, mean, invstd, *given_sums, scale=scale,
                which=FINITE)


@random_examples
def test_layer_norm(e):
    x = e.array(*e.shape(e.pick([1, 2, 2, 3, 4]), 1 << 14), scale=3, shift=5)
    dims = e.pick(range(1, x.ndim + 1))
    shape = x.shape[x.ndim - dims:]
    gamma, beta, D = e.maybe(*shape), e.maybe(*shape), math.prod(shape)
    _, mean, invstd = e.check("layer_norm", x, gamma, beta, dims=dims, eps=1e-5, terms=D,
                              which=FINITE)
    dy = e.array(*x.shape)
    scale = 10 * largest(dy, gamma) * max(invstd[np.isfinite(invstd)].max(initial=0), mean.size)
    e.check("layer_norm_backward", dy, x, gamma, mean, invstd, dims=dims, terms=D, scale=scale,
            which=FINITE)


@random_examples
def test_rms_norm(e):
    x = e.array(*e.shape(e.pick([1, 2, 2, 3, 4]), 1 << 14), scale=3, shift=1)
    dims = e.pick(range(1, x.ndim + 1))
    shape = x.shape[x.ndim - dims:]
    gamma, D = e.maybe(*shape), math.prod(shape)
    _, invrms = e.check("rms_norm", x, gamma, dims=dims, eps=1e-3, terms=D, which=FINITE)
    dy = e.array(*x.shape)
    scale = 10 * largest(dy, gamma) * max(invrms[np.isfinite(invrms)].max(initial=0), invrms.size)
    e.check("rms_norm_backward", dy, x, gamma, invrms, dims=dims, terms=D, scale=scale,
            which=FINITE)


@random_examples
def test_group_norm(e):
    N, G, *S = e.shape(e.pick([2, 3, 3, 4, 5]), 1 << 13)
    C = G * e.pick([1, 1, 2, 3, 5])
    groups, center = max(G, 1), e.draw(st.booleans())
    x = e.array(N, C, *S, scale=3, shift=5)
    gamma, beta, D = e.maybe(C), e.maybe(C), x[:1, :C // groups].size
    how = {"groups": groups, "center": center}
    _, mean, invstd = e.check("group_norm", x, gamma, beta, eps=1e-3, terms=D, which=FINITE, **how)
    dy = e.array(*x.shape)
    most = invstd[np.isfinite(invstd)].max(initial=0)
    scale = 10 * largest(dy, gamma) * max(most, x.size / max(C, 1))
    e.check("group_norm_backward", dy, x, gamma, mean, invstd, terms=D, scale=scale, which=FINITE,
            **how)


@random_examples
def test_softmax(e):
    x = e.array(*e.shape(e.pick([1, 2, 2, 3, 4]), 1 << 14), scale=3, shift=5)
    axis = e.pick(range(-x.ndim, x.ndim))
    n = x.shape[axis]
    for name in ("softmax", "log_softmax"):
        y = e.check(name, x, axis=axis)
        dy = e.array(*x.shape)
        e.check(f"{name}_backward", dy, y, axis=axis, scale=largest(dy) * max(n, 1))


@random_examples
def test_cross_entropy(e):
    x = e.array(*e.shape(e.pick([2, 2, 3, 4]), 1 << 14), scale=3, shift=5)
    C = x.shape[1]
    rest = (x.shape[0], *x.shape[2:])
    target = e.random.integers(0, max(C, 1), rest) if C else np.full(rest, -100)
    target[e.random.random(rest) < 0.2] = -100
    target = e.pick(LAYOUTS)(target)
    weight = e.pick([None, e.random.random(C).astype(e.dtype)])
    how = {"ignore_index": -100, "label_smoothing": e.pick([0.0, 0.1])}
    e.check("cross_entropy", x, target, weight, terms=C, **how)
    e.check("cross_entropy_backward", e.array(*rest), x, target, weight, terms=C, which=FINITE,
            **how)


@random_examples
def test_reductions(e):
    x = e.array(*e.shape(e.pick([1, 2, 3, 4]), e.pick([1 << 12, 1 << 17])))
    axes = e.draw(st.one_of(st.none(), st.integers(-x.ndim, x.ndim - 1),
                            st.sets(st.integers(0, x.ndim - 1)).map(tuple)))
    how = {"axes": axes, "keepdims": e.draw(st.booleans())}
    n = x.size // max(1, reference.sum(x * 0 + 1, **how).size)
    product(e, "sum", x, terms=n, **how)
    near_one = 1 + x / 100                                        # no product leaves float32
    np.testing.assert_allclose(cpu.prod(near_one, **how), reference.prod(wide(near_one), **how),
                               rtol=4 * e.eps * max(n, 1))
    for name in ("max", "min"):
        if n:
            e.check(name, x, **how)
        elif x.size == 0 and reference.sum(x, **how).size:
            with pytest.raises(ValueError, match="zero-size"):
                getattr(cpu, name)(x, **how)


UNARY = ["abs", "ceil", "cos", "erf", "exp", "expm1", "floor", "gelu", "gelu_tanh", "log", "log1p",
         "neg", "reciprocal", "relu", "round", "rsqrt", "sigmoid", "sign", "silu", "sin", "sqrt",
         "square", "tanh", "trunc"]
BINARY = ["add", "sub", "mul", "div", "pow", "maximum", "minimum"]
BACKWARD = ["relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh"]
WITH_NUMBERS = {"leaky_relu": (0.1,), "elu": (1.5,), "softplus": (2.0, 5.0)}


@random_examples
def test_elementwise(e):
    """One ulp of the result is the least that can be asked, but float32 formulas cancel (1 + tanh,
    1 − y²) and divide by numbers close to zero: their errors are those of values about 1."""
    shape = e.shape(e.pick([0, 1, 2, 3, 4]), 1 << 13)
    x, dy = e.array(*shape), e.array(*shape)
    for name in UNARY:
        e.check(name, x, scale=1.0)
    for name in BACKWARD:
        e.check(f"{name}_backward", dy, x, scale=largest(dy) * max(1, largest(x)) ** 2)
    for name, numbers in WITH_NUMBERS.items():
        same(e, name, x, *numbers)
        same(e, f"{name}_backward", dy, x, *numbers, scale=max(1, largest(dy)))


def same(e, name, *arguments, scale=1.0):
    """As check, for kernels that take numbers after their arrays."""
    got = getattr(cpu, name)(*arguments)
    want = getattr(reference, name)(*(wide(a) if isinstance(a, np.ndarray) else a
                                      for a in arguments))
    assert got.dtype == e.dtype
    e.compare(got, want, scale=scale)


@random_examples
def test_elementwise_with_broadcasting(e):
    shape = e.shape(e.pick([0, 1, 2, 3, 4]), e.pick([1 << 12, 1 << 20]))
    kept = [e.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
            for _ in range(2)]
    shapes = [tuple(n if k else 1 for n, k in zip(shape, ks)) for ks in kept]
    shapes[1] = shapes[1][e.draw(st.integers(0, len(shape))):]
    a, b = (e.array(*s) for s in e.draw(st.permutations(shapes)))
    for name in BINARY:
        e.check(name, a, b, scale=1.0)


@random_examples
def test_optimizer_steps(e):
    sizes = e.draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=5))
    first = [e.draw(st.booleans()) for _ in sizes]

    def both(name, states, **how):
        """In place on our arrays, and on copies of them in float64."""
        ps, gs, *rest = ([e.random.standard_normal(n).astype(e.dtype) for n in sizes]
                         for _ in range(2 + states))
        if e.special:
            gs = [np.ascontiguousarray(e.array(n)) for n in sizes]
        rest = [[np.abs(a) for a in state] for state in rest]
        ours, theirs = (ps, gs, *rest), tuple([wide(a) for a in s] for s in (ps, gs, *rest))
        for kernels, arrays in ((cpu, ours), (reference, theirs)):
            getattr(kernels, name)(*arrays, *[None] * (1 - states), lr=0.1, weight_decay=0.01,
                                   **how)
        for a, b in zip(ours, theirs):
            for got, want in zip(a, b):
                e.compare(got, want)

    both("sgd_step", 0, momentum=0, dampening=0, nesterov=False, first=first)
    both("sgd_step", 1, momentum=0.9, dampening=0.1, nesterov=e.draw(st.booleans()), first=first)
    both("adam_step", 2, beta1=0.9, beta2=0.99, eps=1e-8, decoupled=e.draw(st.booleans()),
         steps=[e.pick([1, 2, 100]) for _ in sizes])
