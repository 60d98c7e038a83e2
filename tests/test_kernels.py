"""The CPU kernels against the reference, on the table of cases that the benches use too."""

import importlib
import inspect

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference

from bench import cases

MODULES = ["elementwise", "reduce", "matmul", "conv", "pool", "norm", "loss", "optim", "random",
           "fused", "ghosts", "lp", "outer", "samples", "whitening"]
DTYPES = [np.float32, np.float64]
MAX = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1),
       "ceil_mode": False}
EPS = 1e-5


def channels_last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, -1, *range(1, x.ndim - 1))


def negative(x):
    return np.ascontiguousarray(x[..., ::-1])[..., ::-1]


def every_second(x):
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = [np.ascontiguousarray, channels_last, np.asfortranarray, negative, every_second]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)


def each(table, name=lambda c: getattr(c, "name", "x".join(map(str, c)))):
    return pytest.mark.parametrize("case", table, ids=[str(name(c)) for c in table])


@pytest.fixture
def normal():
    """normal(dtype, *shape): the same numbers in every run."""
    rng = np.random.default_rng(0)
    return lambda dtype, *shape: rng.standard_normal(shape).astype(dtype)


def close(got, want, terms=1, real=None):
    """Equal up to the rounding of sums of so many terms: each side errs by about √terms ulp, of
    ``real`` where that is coarser than the result."""
    got, want = (v if isinstance(v, tuple) else (v,) for v in (got, want))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        if b is None:
            assert a is None
            continue
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
            continue
        finite = b[np.isfinite(b)]
        eps = max(np.finfo(t).eps for t in (a.dtype, real or a.dtype))
        ulp = eps * max(1.0, np.abs(finite).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * (2 + np.sqrt(terms)) * ulp)


def agree(name, *arrays, terms=1, **settings):
    """Both sets give the same, and leave their inputs as they were."""
    before = [a.copy() if isinstance(a, np.ndarray) else a for a in arrays]
    got = getattr(cpu, name)(*arrays, **settings)
    want = getattr(reference, name)(*arrays, **settings)
    close(got, want, terms, next(a.dtype for a in arrays if isinstance(a, np.ndarray)
                                 and a.dtype.kind == "f"))
    for a, b in zip(arrays, before):
        np.testing.assert_array_equal(a, b)
    return got


def parameters(f):
    """(name, kind, default) of each parameter; the number of inputs of a NumPy ufunc."""
    f = inspect.unwrap(f)
    if isinstance(f, np.ufunc):
        return f.nin
    return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]


@pytest.mark.parametrize("module", MODULES)
def test_both_sets_have_the_same_names_and_signatures(module):
    sets = [importlib.import_module(f"nbgrad.kernels.{s}.{module}") for s in ("reference", "cpu")]
    assert sorted(sets[0].__all__) == sorted(sets[1].__all__)
    for name in sets[0].__all__:
        want, got = (parameters(getattr(s, name)) for s in sets)
        if isinstance(want, int) and not isinstance(got, int):
            got = len(got)
        assert want == got, name


@dtypes
@each(cases.CONV)
def test_convolution_and_its_gradients(case, dtype, normal):
    x, w, b = normal(dtype, *case.x), normal(dtype, *case.weight), normal(dtype, case.weight[0])
    terms = int(np.prod(case.weight[1:]))
    y = agree("conv2d", x, w, b, terms=terms, **case.settings)
    agree("conv2d", x, w, None, terms=terms, **case.settings)
    dy = normal(dtype, *y.shape)
    agree("conv2d_input", dy, w, input_size=case.x, terms=terms * 4, **case.settings)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    agree("conv2d_weight", dy, x, kernel_size=case.weight[2:], terms=pixels, **case.settings)


@layouts
def test_convolution_reads_any_strides(layout, normal):
    case = cases.CONV[1]
    x, w = layout(normal(np.float32, *case.x)), layout(normal(np.float32, *case.weight))
    y = agree("conv2d", x, w, None, terms=27, **case.settings)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    dy = layout(normal(np.float32, *y.shape))
    agree("conv2d_input", dy, w, input_size=case.x, terms=36, **case.settings)
    agree("conv2d_weight", dy, x, kernel_size=(3, 3), terms=84, **case.settings)


@dtypes
@each(cases.MAX_POOL)
def test_max_pool(case, dtype, normal):
    x = np.round(normal(dtype, *case.x) * 2)                       # with ties: the first one wins
    y, indices = agree("max_pool2d", x, dilation=case.dilation, **case.settings)
    dy = normal(dtype, *y.shape)
    agree("max_pool2d_backward", dy, indices, input_size=case.x, terms=9)
    np.testing.assert_array_equal(agree("max_pool2d_gather", x, indices), y)


@dtypes
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("override", [None, 3])
@each(cases.AVG_POOL)
def test_avg_pool(case, override, include, dtype, normal):
    settings = {**case.settings, "count_include_pad": include, "divisor_override": override}
    y = agree("avg_pool2d", normal(dtype, *case.x), **settings)
    agree("avg_pool2d_backward", normal(dtype, *y.shape), input_size=case.x, terms=9, **settings)


@dtypes
@pytest.mark.parametrize(("shape", "size"), cases.ADAPTIVE)
def test_adaptive_avg_pool(shape, size, dtype, normal):
    y = agree("adaptive_avg_pool2d", normal(dtype, *shape), output_size=size)
    agree("adaptive_avg_pool2d_backward", normal(dtype, *y.shape), input_size=shape, terms=9)


@layouts
def test_pooling_reads_any_strides(layout, normal):
    x = layout(normal(np.float32, 2, 5, 7, 6))
    y, indices = agree("max_pool2d", x, **MAX)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    agree("max_pool2d_backward", layout(normal(np.float32, *y.shape)), layout(indices),
          input_size=x.shape, terms=9)
    agree("adaptive_avg_pool2d", x, output_size=(2, 4))


def test_a_window_all_in_padding_is_minus_infinity_and_takes_no_gradient():
    settings = {"kernel_size": (2, 1), "stride": (1, 1), "padding": (2, 0), "dilation": (3, 1),
                "ceil_mode": False}
    y, indices = agree("max_pool2d", np.ones((1, 1, 1, 1)), **settings)
    assert y.ravel().tolist() == [-np.inf, 1] or indices.min() == -1
    dx = agree("max_pool2d_backward", np.ones(y.shape), indices, input_size=(1, 1, 1, 1))
    assert dx.item() == np.count_nonzero(indices >= 0)


def norm_arrays(normal, dtype, shape, layout=np.ascontiguousarray):
    x, dy = (layout(normal(dtype, *shape) * 3 + 5) for _ in range(2))
    return x, dy, normal(dtype, shape[1]), normal(dtype, shape[1])


def check_batch_norm(x, dy, gamma, beta):
    n = x.size // max(1, x.shape[1])
    agree("batch_norm_stats", x, terms=n)
    y, mean, _, invstd = agree("batch_norm", x, gamma, beta, eps=EPS, terms=n)
    agree("batch_norm", x, None, None, eps=EPS, terms=n)
    agree("batch_norm_elemt", x, gamma, None, mean, invstd)
    sums = agree("batch_norm_backward_reduce", dy, x, mean, invstd, terms=n)
    dx = agree("batch_norm_backward_elemt", dy, x, gamma, mean, invstd, *sums)
    agree("batch_norm_backward_elemt", dy, x, gamma, mean, invstd, None, None)
    agree("batch_norm_backward", dy, x, None, mean, invstd, terms=n)
    fused = agree("batch_norm_backward", dy, x, gamma, mean, invstd, terms=n)
    np.testing.assert_array_equal(fused[0], dx)
    for relu, residual in ((True, None), (False, dy), (True, dy)):
        z = agree("batch_norm", x, gamma, beta, residual, eps=EPS, relu=relu, terms=n)[0]
        agree("batch_norm_elemt", x, gamma, beta, mean, invstd, residual, relu=relu)
        agree("batch_norm_backward", dy, x, gamma, mean, invstd, beta=beta, relu=relu,
              y=None if residual is None else z, residual=residual is not None, terms=n)
    return y, dx


@dtypes
@each(cases.NORM)
def test_batch_norm(case, dtype, normal):
    for layout in (np.ascontiguousarray, channels_last):
        check_batch_norm(*norm_arrays(normal, dtype, case, layout))


@layouts
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 6)])
def test_batch_norm_reads_any_strides_and_keeps_the_order(layout, shape, normal):
    x, dy, gamma, beta = norm_arrays(normal, np.float32, shape, layout)
    y, dx = check_batch_norm(x, dy, gamma, beta)
    if layout is channels_last:
        assert y.strides == dx.strides == x.strides
    check_batch_norm(x, np.ascontiguousarray(dy), gamma, beta)


@dtypes
@each(cases.NORM)
def test_layer_norm(case, dtype, normal):
    for layout in (np.ascontiguousarray, channels_last):
        x, dy, *_ = norm_arrays(normal, dtype, case, layout)
        for dims in range(1, len(case)):
            gamma, beta = normal(dtype, *case[-dims:]), normal(dtype, *case[-dims:])
            y, mean, invstd = agree("layer_norm", x, gamma, beta, dims=dims, eps=EPS)
            agree("layer_norm", x, None, None, dims=dims, eps=EPS)
            for gain in (None, gamma):
                dx, *_ = agree("layer_norm_backward", dy, x, gain, mean, invstd, dims=dims,
                               terms=mean.size)
            if x.size and min(case) > 1:
                assert y.strides == dx.strides == x.strides


def exact_batch_norm(x):
    x = x.astype(np.longdouble)
    axes = (0, *range(2, x.ndim))
    d = x - x.mean(axes, keepdims=True)
    return d / np.sqrt((d * d).mean(axes, keepdims=True) + EPS)


@pytest.mark.parametrize("offset", [0, 1e1, 1e3, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])
def test_float32_batch_norm_is_exact_at_any_channel_offset(offset, layout, normal):
    x = layout(normal(np.float32, 16, 5, 9, 11) + np.float32(offset))
    y = cpu.batch_norm(x, None, None, eps=EPS)[0]
    assert np.abs(y - exact_batch_norm(x)).max() <= 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-3, 1, 1e20, 1e37, 1e38])
def test_float32_batch_norm_at_any_scale(scale):
    x = np.random.default_rng(0).uniform(-3, 3, (64, 5)).astype(np.float32) * np.float32(scale)
    y = cpu.batch_norm(x, None, None, eps=EPS)[0]
    want = exact_batch_norm(x)
    assert np.isfinite(y).all()
    assert np.abs(y - want).max() <= 1e-6 * max(1e-30, np.abs(want).max())


@dtypes
@pytest.mark.parametrize("shape", [(60, 3), (50_001, 3), (60, 3, 7, 7), (3, 3, 300, 301)])
@pytest.mark.parametrize("value", [0.1, 1e-30, 123456.789, 3e38])
def test_a_constant_channel_gives_exactly_beta(value, shape, dtype):
    beta = np.array([0.5, -2, 0.1], dtype)
    y, mean, var, _ = cpu.batch_norm(np.full(shape, value, dtype), None, beta, eps=EPS)
    assert (mean == dtype(value)).all()
    assert (var == 0).all()
    assert (np.moveaxis(y, 1, -1) == beta).all()


def test_a_bad_value_spoils_its_channel_alone(normal):
    for shape in [(70, 65), (4, 65, 3, 3)]:
        for bad in (np.nan, np.inf, -np.inf):
            x = normal(np.float32, *shape)
            x[1, 7] = bad
            y, mean, var, _ = cpu.batch_norm(x, None, None, eps=EPS)
            spoiled = np.isnan(np.moveaxis(y, 1, 0)).reshape(65, -1)
            assert spoiled[7].all()
            assert not np.delete(spoiled, 7, axis=0).any()
            assert not np.isfinite(mean[7])
            assert np.isnan(var[7])


@dtypes
@pytest.mark.parametrize(("shape", "axis"), cases.LOSS)
def test_softmax_and_its_gradient(shape, axis, dtype, normal):
    x, dy = normal(dtype, *shape) * 3 + 5, normal(dtype, *shape)
    for name in ("softmax", "log_softmax"):
        y = agree(name, x, axis=axis)
        agree(f"{name}_backward", dy, y, axis=axis, terms=x.shape[axis])


@layouts
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_softmax_reads_any_strides_and_keeps_the_order(layout, axis, normal):
    x = layout(normal(np.float32, 3, 5, 4, 6))
    y = agree("log_softmax", x, axis=axis)
    dx = agree("log_softmax_backward", layout(normal(np.float32, *x.shape)), y, axis=axis, terms=6)
    agree("log_softmax_backward", normal(np.float32, *x.shape), y, axis=axis, terms=6)
    if layout is not every_second:
        assert np.argsort(np.abs(y.strides)).tolist() == np.argsort(np.abs(x.strides)).tolist()
        assert dx.strides == y.strides


def test_softmax_of_bad_rows():
    inf, nan = np.inf, np.nan
    x = np.array([[-inf, -inf], [inf, 1], [nan, 1], [-inf, 1], [1e38, -1e38]], np.float32)
    y = agree("log_softmax", x, axis=1)
    assert np.isnan(y[:3]).all()
    assert y[3:].tolist() == [[-inf, 0], [0, np.float32(-2e38)]]
    assert agree("softmax", x, axis=1)[3:].tolist() == [[0, 1], [1, 0]]


def agree_on_losses(x, target, weight, **settings):
    """Losses to the rounding of sums over the classes, sums to that of as many such losses."""
    before = [a if a is None else a.copy() for a in (x, target, weight)]
    losses, *sums, valid = cpu.cross_entropy(x, target, weight, **settings)
    want, *totals, known = reference.cross_entropy(x, target, weight, **settings)
    close(losses, want, x.shape[1])
    close(*(tuple(np.array(s, x.dtype) for s in both) for both in (sums, totals)), x.size)
    assert valid is known
    for a, b in zip((x, target, weight), before):
        np.testing.assert_array_equal(a, b)
    return valid


@dtypes
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (33, 1500), (3, 5, 4, 3), (0, 4), (2, 3, 0)])
def test_cross_entropy(shape, smoothing, dtype, normal):
    rng = np.random.default_rng(1)
    for layout in LAYOUTS:
        x = layout(normal(dtype, *shape) * 3 + 5)
        target = rng.integers(0, shape[1], (shape[0], *shape[2:]))
        target.flat[1:2] = -100
        dloss = normal(dtype, *target.shape)
        for weight in (None, rng.random(shape[1]).astype(dtype)):
            settings = {"ignore_index": -100, "label_smoothing": smoothing}
            agree_on_losses(x, target, weight, **settings)
            agree("cross_entropy_backward", dloss, x, target, weight, **settings)
            agree("cross_entropy_backward", dtype(0.3) * np.ones((), dtype), x, target, weight,
                  **settings)


@dtypes
@pytest.mark.parametrize("shape", [(), (1,), (77,), (3, 4, 5), (0, 3)])
def test_optimizer_steps(shape, dtype, normal):
    def both(name, count, **settings):
        g = normal(dtype, *shape)
        start = [np.abs(normal(dtype, *shape)) for _ in range(count)]
        state = [[np.array(a) for a in start] for _ in range(2)]
        for kernels, (p, *rest) in zip((cpu, reference), state):
            states = [[a] for a in rest] or [None]
            getattr(kernels, name)([p], [g], *states, **settings)
        close(*(tuple(s) for s in state))

    sgd = {"lr": 0.1, "weight_decay": 0.01}
    both("sgd_step", 1, **sgd, momentum=0, dampening=0, nesterov=False, first=[True])
    for nesterov in (False, True):
        for first in (False, True):
            both("sgd_step", 2, **sgd, momentum=0.9, dampening=0.1, nesterov=nesterov,
                 first=[first])
    for decoupled in (False, True):
        both("adam_step", 3, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
             decoupled=decoupled, steps=[3])


def test_optimizer_steps_write_through_strides(normal):
    p, g = normal(np.float32, 6, 4).T, normal(np.float32, 4, 6)
    want = p - np.float32(0.1) * g
    cpu.sgd_step([p], [g], None, lr=0.1, momentum=0, dampening=0, weight_decay=0, nesterov=False,
                 first=[True])
    close(p, want)


def test_optimizer_steps_of_many_arrays(normal):
    """Sizes around a task's, both dtypes, some for the first time, read-only gradients."""
    sizes = [1, 0, 4095, 4096, 4097, 100_000, 3]
    dtypes = [np.float32] * 5 + [np.float64] * 2
    ps, bufs, gs = ([normal(d, n) for n, d in zip(sizes, dtypes)] for _ in range(3))
    for g in gs:
        g.flags.writeable = False
    first = [i % 2 == 0 for i in range(len(sizes))]
    for name, states, settings in (
            ("sgd_step", [bufs], {"momentum": 0.9, "dampening": 0.1, "nesterov": True,
                                  "first": first}),
            ("adam_step", [bufs, [np.abs(b) for b in bufs]], {
                "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decoupled": False,
                "steps": [1 + i for i in range(len(sizes))]})):
        both = [[[a.copy() for a in arrays] for arrays in (ps, *states)] for _ in range(2)]
        for kernels, (p, *rest) in zip((cpu, reference), both):
            getattr(kernels, name)(p, gs, *rest, lr=0.1, weight_decay=0.01, **settings)
        for ours, want in zip(*both):
            for a, b in zip(ours, want):
                close(a, b)


def test_read_only_inputs_are_accepted(normal):
    def fixed(*shape):
        a = normal(np.float32, *shape)
        a.flags.writeable = False
        return a

    x, w, dy, rows = fixed(2, 3, 6, 6), fixed(4, 3, 3, 3), fixed(2, 4, 6, 6), fixed(6, 3)
    conv, target, gamma = cases.CONV[1].settings, np.arange(6) % 3, fixed(3)
    target.flags.writeable = False
    agree("conv2d", x, w, fixed(4), terms=27, **conv)
    agree("conv2d_input", dy, w, input_size=x.shape, terms=36, **conv)
    agree("conv2d_weight", dy, x, kernel_size=(3, 3), terms=72, **conv)
    y, _ = agree("max_pool2d", x, **MAX)
    agree("adaptive_avg_pool2d_backward", fixed(*y.shape), input_size=x.shape, terms=9)
    _, mean, _, invstd = agree("batch_norm", rows, gamma, gamma, eps=EPS)
    mean.flags.writeable = invstd.flags.writeable = False
    agree("batch_norm_elemt", rows, gamma, gamma, mean, invstd)
    agree("batch_norm_backward", fixed(6, 3), rows, gamma, mean, invstd)
    agree("layer_norm", rows, gamma, gamma, dims=1, eps=EPS)
    agree("log_softmax_backward", fixed(6, 3), agree("log_softmax", rows, axis=1), axis=1)
    agree_on_losses(rows, target, gamma, ignore_index=-100, label_smoothing=0.1)


def test_nan_wins_the_maximum_and_infinity_stays():
    x = np.zeros((1, 2, 4, 4), np.float32)
    x[0, 0, 1, 1], x[0, 1, 2, 2] = np.nan, np.inf
    y, _ = agree("max_pool2d", x, **MAX)
    assert np.isnan(y[0, 0]).all()
    assert np.isinf(y[0, 1]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_pixel_reaches_just_the_outputs_that_read_it(bad, normal):
    settings = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    x, w = normal(np.float32, 2, 3, 8, 8), normal(np.float32, 5, 3, 3, 3)
    x[1, 2, 4, 4] = bad
    spoiled = ~np.isfinite(cpu.conv2d(x, w, **settings))
    want = np.zeros_like(spoiled)
    want[1, :, 3:6, 3:6] = True
    np.testing.assert_array_equal(spoiled, want)
