"""Each kernel function against the reference: random inputs, outputs that start as NaN."""

from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
from nbgrad.kernels import reference
from nbgrad.kernels.shapes import Conv

# relative and absolute, by the scale of the result; sums of up to 10⁵ terms are of float64 or trees
CLOSE = {"f4": 5e-5, "f8": 1e-11}
NUMBERS = {"elu": (0.7,), "leaky_relu": (0.1,), "softplus": (1.3, 2.0)}
HOW = {"ignore_index": -100, "label_smoothing": 0.1}


def channels_last(x):
    """The same values with channels innermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def drawn(dtype, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@contextmanager
def poisoned():
    """Memory of the device is NaN (integers: −1) until a kernel writes it, as in the simulator."""
    from nbgrad.kernels.cuda.memory import xp

    pool = xp.get_default_memory_pool()

    def malloc(size):
        found = pool.malloc(size)
        if size:
            found.memset_async(0xFF, size, xp.cuda.get_current_stream())
        return found
    xp.cuda.set_allocator(malloc)
    try:
        yield
    finally:
        xp.cuda.set_allocator(pool.malloc)


def moved(x):
    """Arrays, also those in lists, to the device."""
    from nbgrad.kernels.cuda.memory import to_device

    if isinstance(x, list):
        return [moved(a) for a in x]
    return to_device(x) if isinstance(x, np.ndarray) else x


def flat(y):
    """The arrays and numbers of a result, on the host."""
    from nbgrad.kernels.cuda.memory import Array, to_host

    if isinstance(y, (tuple, list)):
        return [a for part in y for a in flat(part)]
    return [] if y is None else [to_host(y) if isinstance(y, Array) else np.asarray(y)]


def furthest(got, want, dtype):
    """The largest distance as a share of what is allowed. Raises AssertionError above 1, and for
    other dtypes, shapes, or places of NaN."""
    worst = 0.0
    assert len(got) == len(want), (len(got), len(want))
    for a, b in zip(got, want):
        assert a.shape == b.shape, (a.shape, b.shape)
        if b.dtype.kind != "f":
            assert (a == b).all(), f"{(a != b).sum()} of {a.size} differ"
            continue
        assert (np.isfinite(a) == np.isfinite(b)).all(), "NaN or Inf at other places"
        there = np.isfinite(b)
        a, b = np.asarray(a[there], np.float64), np.asarray(b[there], np.float64)
        scale = CLOSE[dtype] * (np.abs(b) + max(1.0, np.abs(b).max(initial=0)))
        worst = max(worst, float((np.abs(a - b) / scale).max(initial=0)))
    assert worst <= 1, f"{worst:.3g} times as far off as {CLOSE[dtype]:g} of the largest"
    return worst


def compare(report, name, call, inputs, dtype, simulate):
    """``call(kernels, *inputs)`` by both; inputs are copied, since some are written to."""
    from nbgrad.kernels import cuda

    want = [a.copy() if isinstance(a, np.ndarray) else [b.copy() for b in a] for a in inputs]
    with nullcontext() if simulate else poisoned():
        got = flat(call(cuda, *map(moved, inputs)))
    with np.errstate(all="ignore"):
        worst = furthest(got, flat(call(reference, *want)), dtype)
    report.add("verify", name, value=worst, unit="tol")


def cases(report, simulate):
    """(name, what verifies it and adds its row), for each function, size, layout and dtype."""
    for dtype in CLOSE:
        for make in (_elementwise, _reduce, _batch_norm, _rows, _products, _convolutions, _pools,
                     _losses, _fused, _steps):
            for name, call, inputs in make(dtype, simulate):
                name = f"{name} {dtype}"
                yield name, partial(compare, report, name, call, inputs, dtype, simulate)


def _elementwise(dtype, simulate):
    from nbgrad.kernels.cuda import elementwise

    for name in elementwise.__all__:
        for n in (37,) if simulate else (1, 1000, 3_000_001):
            numbers = NUMBERS.get(name.removesuffix("_backward"), ())
            inputs = [drawn(dtype, n, seed=i) for i in range(1 + (name in elementwise._TWO))]
            yield f"{name} {n}", (lambda k, *a, f=name, v=numbers: getattr(k, f)(*a, *v)), inputs
    a, b = drawn(dtype, 3, 4, 5), drawn(dtype, 4, 1)
    yield "add broadcast", lambda k, a, b: k.add(a, b), [a, b]


def _reduce(dtype, simulate):
    for name in ("sum", "max", "min", "prod"):
        for shape in ((3, 40, 5),) if simulate else ((3, 40, 5), (1, 300_000), (5000, 130)):
            for axes in ((0,), (1,), tuple(range(len(shape)))):
                x = drawn(dtype, *shape)
                x = 1 + x / x.size if name == "prod" else x
                yield f"{name} {shape} over {axes}", (
                    lambda k, x, f=name, a=axes: getattr(k, f)(x, axes=a, keepdims=False)), [x]


def _layouts(shape):
    return [("", np.ascontiguousarray)] + [(" channels-last", channels_last)] * (len(shape) > 2)


def _batch_norm(dtype, simulate):
    def forward(k, x, g, b, z, relu, add):
        return k.batch_norm(x, g, b, z if add else None, eps=1e-5, relu=relu)

    def both(k, dy, x, g, b, z, relu, add):
        y, mean, _, invstd = k.batch_norm(x, g, b, z if add else None, eps=1e-5, relu=relu)[:4]
        own = {"y": y} if add else {"beta": b}
        return k.batch_norm_backward(dy, x, g, mean, invstd, relu=relu, residual=add, **own)
    small, large = [(5, 3), (3, 4, 3, 3)], [(4096, 257), (16, 64, 28, 28), (64, 130, 7, 7)]
    for shape in small + large * (not simulate):
        for layout, order in _layouts(shape):
            x, dy, z = (order(drawn(dtype, *shape, seed=i)) for i in range(3))
            g, b = drawn(dtype, shape[1], seed=3), drawn(dtype, shape[1], seed=4)
            for relu, add in ((False, False), (True, False), (True, True)):
                name = f"{shape}{layout}{' add' * add}{' relu' * relu}"
                how = {"relu": relu, "add": add}
                yield f"batch_norm {name}", partial(_with, forward, how), [x, g, b, z]
                yield f"batch_norm_backward {name}", partial(_with, both, how), [dy, x, g, b, z]
            if len(shape) == 4:
                yield from _group_norm(shape, layout, x, dy, g, b)


def _with(f, how, k, *arrays):
    return f(k, *arrays, **how)


def _group_norm(shape, layout, x, dy, g, b):
    def both(k, dy, x, g, b):
        y, mean, invstd = k.group_norm(x, g, b, groups=2, eps=1e-5)
        return y, k.group_norm_backward(dy, x, g, mean, invstd, groups=2)
    yield f"group_norm, both ways {shape}{layout}", both, [dy, x, g, b]


def _rows(dtype, simulate):
    def layer(k, dy, x, g, b):
        y, mean, invstd = k.layer_norm(x, g, b, dims=1, eps=1e-5)
        return y, k.layer_norm_backward(dy, x, g, mean, invstd, dims=1)

    def rms(k, dy, x, g, b):
        y, inv = k.rms_norm(x, g, dims=1, eps=1e-5)
        return y, k.rms_norm_backward(dy, x, g, inv, dims=1)

    def soft(k, dy, x, g, b, name):
        y = getattr(k, name)(x, axis=1)
        return y, getattr(k, name + "_backward")(dy, y, axis=1)
    for shape in [(3, 40), (2, 301)] if simulate else [(3, 40), (1000, 257), (77, 4096),
                                                       (33, 32768)]:
        arrays = [drawn(dtype, *shape), drawn(dtype, *shape, seed=1),
                  *(drawn(dtype, shape[1], seed=i) for i in (2, 3))]
        for name, call in (("layer_norm", layer), ("rms_norm", rms),
                           *((n, partial(_with, soft, {"name": n}))
                             for n in ("softmax", "log_softmax"))):
            yield f"{name}, both ways {shape}", call, arrays


def _products(dtype, simulate):
    from nbgrad.kernels.cuda import precision

    sizes = [(5, 7, 3), (17, 9, 33)] if simulate else [(5, 7, 3), (64, 64, 64), (129, 513, 257),
                                                       (1024, 1024, 1024), (3, 20000, 5)]
    for M, K, N in sizes:
        a, b, c = drawn(dtype, M, K), drawn(dtype, K, N, seed=1), drawn(dtype, N, seed=2)
        w = np.ascontiguousarray(b.T)
        yield f"matmul {M}x{K}x{N}", lambda k, a, b, c, w: k.matmul(a, b), [a, b, c, w]
        yield f"linear {M}x{K}x{N}", lambda k, a, b, c, w: k.linear(a, w, c), [a, b, c, w]
        if dtype == "f4":
            for way in sorted(set(precision.WAYS) - {"fma"}):
                # numbers that tf32 holds (8 bits), so that it, too, has the reference's products
                exact = [np.round(v * 16).clip(-127, 127) / np.float32(16) for v in (a, b)]
                yield f"matmul {way} {M}x{K}x{N}", partial(_in_way, way), exact


def _in_way(way, k, a, b):
    from nbgrad.kernels.cuda import precision

    precision.use(way)
    try:
        return k.matmul(a, b)
    finally:
        precision.use("fma")


def _convolutions(dtype, simulate):
    from . import cases as table

    few = table.CONV[:3] + table.CONV[9:10]
    for case in few if simulate else table.CONV + table.RESNET20[1:4]:
        g = Conv.of(case.x, case.weight, case.stride, case.padding, case.dilation, case.groups)
        for layout, order in (("", np.ascontiguousarray), (" channels-last", channels_last)):
            x, w = order(drawn(dtype, *case.x)), drawn(dtype, *case.weight, seed=1)
            dy = order(drawn(dtype, g.N, g.O, g.P, g.Q, seed=2))
            for name in ("conv2d", "conv2d_input", "conv2d_weight"):
                yield f"{name} {case.name}{layout}", partial(_convolve, name, case), [x, w, dy]


def _convolve(name, case, k, x, w, dy):
    if name == "conv2d":
        return k.conv2d(x, w, **case.settings)
    if name == "conv2d_input":
        return k.conv2d_input(dy, w, input_size=case.x, **case.settings)
    return k.conv2d_weight(dy, x, kernel_size=case.weight[2:], **case.settings)


def _pools(dtype, simulate):
    from . import cases as table

    def largest(k, x, case):
        y, at = k.max_pool2d(x, dilation=case.dilation, **case.settings)
        return y, at, k.max_pool2d_backward(y, at, input_size=case.x)

    def average(k, x, case):
        more = {"count_include_pad": True, "divisor_override": None}
        y = k.avg_pool2d(x, **case.settings, **more)
        return y, k.avg_pool2d_backward(y, input_size=case.x, **case.settings, **more)
    for case in (table.MAX_POOL[1:4] if simulate else table.MAX_POOL + table.BENCH_POOL):
        for layout, order in (("", np.ascontiguousarray), (" channels-last", channels_last)):
            x = [order(drawn(dtype, *case.x))]
            yield f"max_pool2d {case.name}{layout}", partial(_with, largest, {"case": case}), x
            if case.dilation == (1, 1):
                yield f"avg_pool2d {case.name}{layout}", partial(_with, average, {"case": case}), x


def _losses(dtype, simulate):
    def both(k, x, t, dy):
        losses = k.cross_entropy(x, t, None, **HOW)
        return losses, k.cross_entropy_backward(dy, x, t, None, **HOW)
    for N, C in [(7, 5), (3, 40)] if simulate else [(128, 10), (64, 1000), (512, 32000)]:
        x, t = drawn(dtype, N, C), np.random.default_rng(1).integers(0, C, N)
        t[0] = -100
        yield f"cross_entropy, both ways {(N, C)}", both, [x, t, drawn(dtype, N, seed=2)]


def _fused(dtype, simulate):
    def both(k, dy, x, w, b, g, activation):
        y, z, mean, invstd = k.linear_batch_norm(x, w, b, g, b, eps=1e-5, activation=activation)
        return y, k.linear_batch_norm_backward(dy, x, w, g, z, y, mean, invstd,
                                               activation=activation, input_gradient=True)
    N, K, C = (6, 5, 3) if simulate else (60, 784, 100)
    for how in (None, "relu", "sigmoid", "tanh"):
        yield f"linear_batch_norm, both ways {how}", partial(_with, both, {"activation": how}), [
            drawn(dtype, *s, seed=i) for i, s in enumerate([(N, C), (N, K), (C, K), (C,), (C,)])]


def _steps(dtype, simulate):
    def sgd(k, p, g, m, v):
        k.sgd_step(p, g, m, lr=0.1, momentum=0.9, dampening=0, weight_decay=0.01, nesterov=True,
                   first=[False] * len(p))
        return p, m

    def adam(k, p, g, m, v):
        k.adam_step(p, g, m, v, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
                    decoupled=True, steps=[3] * len(p))
        return p, m, v
    shapes = [(3, 4), (300,), (5,), (2, 3, 3, 3)] if simulate else [(512, 512, 3, 3), (64,), (7,)]
    lists = [[np.abs(drawn(dtype, *s, seed=i)) for s in shapes] for i in range(4)]
    yield "sgd_step", sgd, lists
    yield "adam_step", adam, lists
    x = drawn(dtype, 77) if simulate else drawn(dtype, 1_000_003)
    yield "dropout", lambda k, x: k.dropout(x, np.random.Generator(np.random.PCG64(3)), 0.3), [x]
