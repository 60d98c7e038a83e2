"""Each kernel function against the reference: random inputs, outputs that start as NaN."""

import importlib
import math
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import product
from unittest.mock import patch

import numpy as np
from nbgrad.kernels import half, reference
from nbgrad.kernels.shapes import Conv

# Relative and absolute, by the scale of the result; sums of up to 10⁵ terms are of float64 or
# trees. Halves are rounded once or twice on the way, to 11 and 8 bits.
CLOSE = {"f4": 5e-5, "f8": 1e-11, "f2": 2e-3, "bf": 1.6e-2}
NUMBERS = {"elu": (0.7,), "leaky_relu": (0.1,), "softplus": (1.3, 2.0)}


def channels_last(x):
    """The same values with channels innermost in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def named(dtype):
    """NumPy's dtype for "f4", "f8", "f2" or "bf"."""
    if dtype == "bf":
        importlib.import_module("ml_dtypes")                 # tells NumPy of it
    return half.named(dtype) if dtype in ("f2", "bf") else np.dtype(dtype)


def drawn(dtype, *shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(named(dtype))


@contextmanager
def poisoned(pooled=True):
    """Memory of the device is NaN (integers: −1) until a kernel writes it, as in the simulator.
    From CuPy's pool, or each array's own, for compute-sanitizer: it knows what lies behind those.
    """
    from nbgrad.kernels.cuda.memory import xp

    memory, pool = xp.cuda.memory, xp.get_default_memory_pool()

    def malloc(size):
        found = pool.malloc(size) if pooled else memory.MemoryPointer(memory.Memory(size), 0)
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
        if half.is_half(b.dtype):
            # what ``through`` rounds, as gradients of float32 parameters, kernels leave in float32
            assert a.dtype in (b.dtype, np.float32), (a.dtype, b.dtype)
            a, b = half.wide(a), half.wide(b)
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


def kernels_for(module, dtype):
    """A kernel package, as ops take it for arrays of this dtype."""
    return half.through(module) if dtype in ("f2", "bf") else module


@contextmanager
def launches():
    """The names of the kernels that are launched inside the block."""
    from nbgrad.kernels.cuda.launch import Kernel

    names, call = set(), Kernel.__call__

    def noted(self, blocks, *args):
        if blocks:
            names.add(self.name)
        return call(self, blocks, *args)
    with patch.object(Kernel, "__call__", noted):
        yield names


def compare(report, ran, name, call, inputs, dtype, simulate):
    """``call(kernels, *inputs)`` by both; inputs are copied, since some are written to. ``ran``
    gains the names of the kernels."""
    from nbgrad.kernels import cuda

    want = [[b.copy() for b in a] if isinstance(a, list) else a if a is None else a.copy(order="K")
            for a in inputs]
    with launches() as names, nullcontext() if simulate else poisoned(report.pooled):
        got = flat(call(kernels_for(cuda, dtype), *map(moved, inputs)))
    with np.errstate(all="ignore"):
        expected = flat(call(kernels_for(reference, dtype), *want))
    worst = furthest(got, expected, dtype)
    ran |= names
    report.add("verify", name, value=worst, unit="tol")


def calls(simulate):
    """(name, call, inputs, dtype) for each function, size, layout and dtype."""
    for dtype in CLOSE:
        if dtype == "bf" and find_spec("ml_dtypes") is None:
            continue
        for make in (_elementwise, _reduce, _batch_norm, _ghosts, _samples, _definitions, _rows,
                     _products, _convolutions, _pools, _losses, _of_cupy, _fused, _steps):
            for name, call, inputs in make(dtype, simulate):
                yield f"{name} {dtype}", call, inputs, dtype


def cases(report, simulate):
    """(name, what verifies it and adds its row); at last, whether that was all kernels."""
    ran = set()
    for name, call, inputs, dtype in calls(simulate):
        yield name, partial(compare, report, ran, name, call, inputs, dtype, simulate)
    if not simulate:
        yield "kernels that no case ran", partial(covered, report, ran)


def covered(report, ran):
    """A row if all kernels ran; a failure with the names of those that no case did."""
    from nbgrad.kernels.cuda import offline

    if any(row["part"] == "verify" and row["status"] == "skipped" for row in report.rows):
        report.add("verify", "kernels that no case ran", "skipped", note="not all cases ran")
        return
    # "plain" ones are for devices below 8.0, which nothing here chooses otherwise
    there = {k.name for k in offline.every_kernel() if not k.name.endswith("_plain")}
    assert there <= ran, f"{len(there - ran)} kernels: {' '.join(sorted(there - ran))}"
    report.add("verify", "kernels that no case ran", value=0, note=f"of {len(there)}")


def _elementwise(dtype, simulate):
    from nbgrad.kernels.cuda import elementwise

    for name in elementwise.__all__:
        for n in (37,) if simulate else (1, 1000, 3_000_001):
            numbers = NUMBERS.get(name.removesuffix("_backward"), ())
            inputs = [drawn(dtype, n, seed=i) for i in range(1 + (name in elementwise._TWO))]
            yield f"{name} {n}", (lambda k, *a, f=name, v=numbers: getattr(k, f)(*a, *v)), inputs
    for shapes in (((3, 4, 5), (4, 1)), ((3, 8, 16), (16,)), ((3, 8, 16), (8, 1))):
        a, b = (drawn(dtype, *shape, seed=i) for i, shape in enumerate(shapes))
        for name in ("add", "sub", "mul", "div"):
            yield (f"{name} broadcast {shapes[1]} to {shapes[0]}",
                   lambda k, a, b, f=name: getattr(k, f)(a, b), [a, b])


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
    small = [(5, 3), (3, 4, 3, 3), (2, 4, 4, 4), (2, 8, 4, 4)]
    large = [(4096, 257), (16, 64, 28, 28), (64, 130, 7, 7)]
    for shape in small + large * (not simulate):
        for (layout, order), (params, of) in product(_layouts(shape), _parameters(dtype)):
            x, dy, z = (order(drawn(dtype, *shape, seed=i)) for i in range(3))
            g, b = drawn(of, shape[1], seed=3), drawn(of, shape[1], seed=4)
            for relu, add in ((False, False), (True, False), (True, True)):
                name = f"{shape}{layout}{params}{' add' * add}{' relu' * relu}"
                how = {"relu": relu, "add": add}
                yield f"batch_norm {name}", partial(_with, forward, how), [x, g, b, z]
                yield f"batch_norm_backward {name}", partial(_with, both, how), [dy, x, g, b, z]
                if not relu:
                    yield f"batch_norm of large channels {name}", partial(
                        _of_large_channels, partial(_with, both, how)), [dy, x, g, b, z]
            yield (f"batch_norm of workers {shape}{layout}{params}", _of_workers, [dy, x, g, b])
            if len(shape) == 4:
                yield from _group_norm(shape, layout + params, x, dy, g, b)


def _parameters(dtype):
    """What a name says of gamma's and beta's dtype, and that: x's, and for halves float32, too."""
    return [("", dtype)] + [(" parameters f4", "f4")] * (dtype in ("f2", "bf"))


def _of_large_channels(call, k, *arrays):
    """As if they did not fit the chip: by kernels that read memory twice."""
    from nbgrad.kernels.cuda import single

    with patch.object(single, "enabled", False):
        return call(k, *arrays)


def _of_workers(k, dy, x, g, b):
    """By functions that each do a part, for what workers see of one batch."""
    mean, var = k.batch_norm_stats(x)
    invstd = 1 / (var + 1e-5) ** 0.5
    sums = k.batch_norm_backward_reduce(dy, x, mean, invstd)
    running = [(sums[0] * 0 + i).astype(g.dtype) for i in (0, 1)]
    known = k.batch_norm(x, g, b, eps=1e-5, known=(mean, var), running=(*running, 0.3))
    return (mean, var, k.batch_norm_elemt(x, g, b, mean, invstd), *sums, *known, *running,
            k.batch_norm_backward_elemt(dy, x, g, mean, invstd, *sums))


def _ghosts(dtype, simulate):
    def both(k, dy, x, g, b, size):
        y, mean, var, invstd = k.ghost_batch_norm(x, g, b, size=size, eps=1e-5)
        own = [a + mean.astype(a.dtype) for a in (g, b)]             # of each ghost
        return (y, mean, var, k.ghost_batch_norm_backward(dy, x, g, mean, invstd, size=size),
                k.ghost_batch_norm(x, *own, size=size, eps=1e-5)[0],
                k.ghost_batch_norm_backward(dy, x, own[0], mean, invstd, size=size, apart=True))
    for shape, size in [((5, 3), 2), ((5, 4, 3, 3), 2)] + [((512, 64, 14, 14), 32),
                                                          ((4100, 70), 512)] * (not simulate):
        for layout, order in _layouts(shape):
            x, dy = (order(drawn(dtype, *shape, seed=i)) for i in range(2))
            for name, params in _parameters(dtype):
                g, b = drawn(params, shape[1], seed=3), drawn(params, shape[1], seed=4)
                yield (f"ghost_batch_norm, both ways {shape}{layout}{name}",
                       partial(_with, both, {"size": size}), [dy, x, g, b])


def _samples(dtype, simulate):
    def all_of(k, x, dy, w, a, b, c):
        count, mean, m2 = k.sample_moments(x, w)
        constants = a, b, c
        return (count, mean, m2, k.sample_map("affine", x, constants, w),
                k.sample_map_backward("affine", dy, x, constants, w, a, b, mean),
                *k.sample_sums("affine", dy, x, constants, w))
    shapes = [(3, 4, 3, 3)] + [(16, 64, 28, 28)] * (not simulate)
    for shape in shapes if dtype in ("f4", "f8") else ():
        x, dy = drawn(dtype, *shape), drawn(dtype, *shape, seed=1)
        w = (drawn(dtype, shape[0], 1, *shape[2:], seed=2) > 0).astype(x.dtype)
        constants = [drawn("f8", *shape[:2], seed=i) for i in range(3)]
        yield f"sample_moments and maps {shape}", all_of, [x, dy, w, *constants]


def _definitions(dtype, simulate):
    """What runs the reference's own formulas, on a device's arrays."""
    def all_of(k, x, dy, mean, unit, w, beta):
        y = [k.channel_products(x, dy, mean, unit, size=2), k.channel_mix(x, mean, w, beta)]
        for p in (1, 3, math.inf):
            y += k.power_sums(x, mean, unit, p=p)
            top = y[-3] if p == math.inf else mean
            y.append(k.power_map(dy, x, mean, unit, unit, mean, unit, top, p=p))
        flat = x.reshape(len(x), -1)
        return (*y, k.add_outer(flat, flat[:, 0], flat[0], a=2.0, b=-0.5))
    shapes = [(3, 4, 3, 3)] + [(16, 64, 28, 28)] * (not simulate)
    for shape in shapes if dtype in ("f4", "f8") else ():
        x, dy = drawn(dtype, *shape), drawn(dtype, *shape, seed=1)
        mean, unit = drawn("f8", shape[1], seed=2), 1 + abs(drawn("f8", shape[1], seed=3))
        w, beta = drawn("f8", shape[1] // 2, 2, 2, seed=4), drawn(dtype, shape[1], seed=5)
        yield f"powers and products of channels {shape}", all_of, [x, dy, mean, unit, w, beta]


def _with(f, how, k, *arrays):
    return f(k, *arrays, **how)


def _group_norm(shape, layout, x, dy, g, b):
    def both(k, dy, x, g, b):
        y, mean, invstd = k.group_norm(x, g, b, groups=2, eps=1e-5)
        return y, k.group_norm_backward(dy, x, g, mean, invstd, groups=2)

    def uncentered(k, dy, x, g, b):
        how = {"groups": 2, "center": False}
        y, mean, invstd = k.group_norm(x, g, b, eps=1e-5, **how)
        z, *_ = k.group_norm(x, g, b, eps=1e-5, floor=g, **how)
        return y, invstd, z, k.group_norm_backward(dy, x, g, mean, invstd, **how), (
            k.group_norm_backward(dy, x, g, mean, invstd, beta=b, floor=g, **how))
    yield f"group_norm, both ways {shape}{layout}", both, [dy, x, g, b]
    yield f"group_norm without means, above a floor {shape}{layout}", uncentered, [dy, x, g, b]


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
    # rows by a warp, by a block, longer than its registers; in vectors and one by one
    for shape in [(3, 40), (2, 301)] if simulate else [
            (3, 40), (1000, 257), (77, 4096), (33, 32768), *((3, D) for D in lengths())]:
        x, dy = drawn(dtype, *shape), drawn(dtype, *shape, seed=1)
        for params, of in _parameters(dtype):
            arrays = [x, dy, *(drawn(of, shape[1], seed=i) for i in (2, 3))]
            yield f"layer_norm, both ways {shape}{params}", layer, arrays
            yield f"rms_norm, both ways {shape}{params}", rms, arrays
        for name in ("softmax", "log_softmax"):
            yield (f"{name}, both ways {shape}", partial(_with, soft, {"name": name}),
                   [x, dy, None, None])
        for name in () if simulate else ("softmax", "log_softmax"):
            yield (f"{name} of columns {shape}", partial(_with, _of_columns, {"name": name}),
                   [drawn(dtype, 2, shape[1], 4, seed=i) for i in range(2)])
    yield from () if simulate else _planes(dtype)


def lengths():
    """Of rows that a warp, or blocks of either size, just hold, in vectors and one by one; and
    shorter and longer ones."""
    from nbgrad.kernels.cuda.rows import WIDE

    return sorted({n * T * W - (W == 1) for T in (32, *WIDE) for W in (1, 2, 4) for n in (4, 8)}
                  | {7, 64, 99_999, 1 << 17})


def _of_columns(k, dy, x, name):
    y = getattr(k, name)(x, axis=1)
    return y, getattr(k, name + "_backward")(dy, y, axis=1)


def _planes(dtype):
    """Groups of channels as long as ``lengths``, each channel of one or more vectors."""
    for D in lengths():
        S = next(n for n in (16, 7, 11, 3, 1) if D % n == 0)
        x, dy = drawn(dtype, 2, 2 * D // S, S), drawn(dtype, 2, 2 * D // S, S, seed=1)
        for params, of in _parameters(dtype):
            g, b = (drawn(of, 2 * D // S, seed=i) for i in (2, 3))
            yield from _group_norm(x.shape, params, x, dy, g, b)


def _products(dtype, simulate):
    from nbgrad.kernels.cuda import precision

    sizes = [(5, 7, 3), (17, 9, 33)] if simulate else [(5, 7, 3), (64, 64, 64), (129, 513, 257),
                                                       (1536, 64, 1536), (3, 20000, 5)]
    for M, K, N in sizes:
        a, b, c = drawn(dtype, M, K), drawn(dtype, K, N, seed=1), drawn(dtype, N, seed=2)
        w = np.ascontiguousarray(b.T)
        yield f"matmul {M}x{K}x{N}", lambda k, a, b, c, w: k.matmul(a, b), [a, b, c, w]
        yield f"linear {M}x{K}x{N}", lambda k, a, b, c, w: k.linear(a, w, c), [a, b, c, w]
        yield (f"linear_backward {M}x{K}x{N}", lambda k, a, c, w: k.linear_backward(
            c, a, w, input_gradient=True), [a, drawn(dtype, M, N, seed=3), w])
        yield (f"matmul of transposed {M}x{K}x{N}", lambda k, a, b, c, w: k.matmul(a.T, w.T),
               [np.ascontiguousarray(a.T), b, c, w])
        yield (f"matmul by columns {M}x{K}x{N}", lambda k, a, b, c, w: k.matmul(a.T, b),
               [np.ascontiguousarray(a.T), b, c, w])
        if dtype == "f4":
            for way in sorted(set(precision.WAYS) - {"fma"}):
                yield (f"matmul {way} {M}x{K}x{N}", partial(_in_way, way, lambda k, a, b: k.matmul(
                    a, b)), [_short(a), _short(b)])


def _short(a):
    """Numbers that tf32 holds (8 bits), so that it, too, has the reference's products."""
    return np.round(a * 16).clip(-127, 127) / np.float32(16)


def _in_way(way, call, k, *arrays):
    from nbgrad.kernels.cuda import precision

    precision.use(way)
    try:
        return call(k, *arrays)
    finally:
        precision.use("fma")


def _convolutions(dtype, simulate):
    from nbgrad.kernels.cuda import precision

    from . import cases as table

    few = table.CONV[:3] + table.CONV[9:10]
    many = table.CONV + table.RESNET20[1:4] + [
        table.Conv("large tiles", (5, 128, 60, 60), (128, 128, 1, 1)),
        table.Conv("large tiles of weights", (1, 1536, 4, 4), (1536, 1536, 1, 1))]
    for case in few if simulate else many:
        g = Conv.of(case.x, case.weight, case.stride, case.padding, case.dilation, case.groups)
        for layout, order in (("", np.ascontiguousarray), (" channels-last", channels_last)):
            x, w = order(drawn(dtype, *case.x)), drawn(dtype, *case.weight, seed=1)
            dy = order(drawn(dtype, g.N, g.O, g.P, g.Q, seed=2))
            for name in ("conv2d", "conv2d_input", "conv2d_weight"):
                yield f"{name} {case.name}{layout}", partial(_convolve, name, case), [x, w, dy]
                if dtype == "f4" and case.groups == 1 and not simulate:
                    for way in sorted(set(precision.WAYS) - {"fma"}):
                        yield (f"{name} {way} {case.name}{layout}",
                               partial(_in_way, way, partial(_convolve, name, case)),
                               [_short(a) for a in (x, w, dy)])
            yield f"conv2d with moments {case.name}{layout}", partial(_with_moments, case), [x, w]


def _with_moments(case, k, x, w):
    """A convolution that leaves its channels' moments, where the kernel can."""
    found = []
    y = k.conv2d(x, w, moments=found, **case.settings)
    mean, var = (found[1], found[2] / found[0]) if found else k.batch_norm_stats(y)
    return y, mean, var


def _convolve(name, case, k, x, w, dy):
    if name == "conv2d":
        return k.conv2d(x, w, **case.settings)
    if name == "conv2d_input":
        return k.conv2d_input(dy, w, input_size=case.x, **case.settings)
    return k.conv2d_weight(dy, x, kernel_size=case.weight[2:], **case.settings)


def _pools(dtype, simulate):
    from . import cases as table

    few, many = table.MAX_POOL[1:4], table.MAX_POOL + table.BENCH_POOL
    for case in few if simulate else many:
        large = case in table.BENCH_POOL                       # in one way each
        ceils = (case.ceil_mode,) if large else (False, True)
        for (layout, order), ceil in product(_layouts(case.x), ceils):
            x, how = [order(drawn(dtype, *case.x))], {**case.settings, "ceil_mode": ceil}
            ending = f"{case.name}{layout}{' ceil' * ceil}"
            how["dilation"] = case.dilation
            for name, call in (("max_pool2d", _largest), ("max_pool2d gathered", _gathered)):
                yield f"{name} {ending}", partial(_with, call, how), x
            del how["dilation"]
            for include, divisor in ((True, None), (False, None), (True, 3))[:1 if large else 3]:
                if case.dilation == (1, 1):
                    more = {"count_include_pad": include, "divisor_override": divisor}
                    way = f"{' without padding' * (not include)}{' by 3' * (divisor == 3)}"
                    yield f"avg_pool2d {ending}{way}", partial(
                        _with, _average, {**how, **more}), x
    for shape, size in table.ADAPTIVE:
        for layout, order in _layouts(shape):
            yield (f"adaptive_avg_pool2d {shape} to {size}{layout}",
                   partial(_with, _adaptive, {"output_size": size}), [order(drawn(dtype, *shape))])


def _largest(k, x, **how):
    y, at = k.max_pool2d(x, **how)
    return y, at, k.max_pool2d_backward(y, at, input_size=x.shape)


def _gathered(k, x, **how):
    y, at = k.max_pool2d(x, **how)
    del how["ceil_mode"]
    return k.max_pool2d_gather(x * 2, at), k.max_pool2d_backward(y, at, input_size=x.shape, **how)


def _average(k, x, **how):
    y = k.avg_pool2d(x, **how)
    return y, k.avg_pool2d_backward(y, input_size=x.shape, **how)


def _adaptive(k, x, output_size):
    y = k.adaptive_avg_pool2d(x, output_size=output_size)
    return y, k.adaptive_avg_pool2d_backward(y, input_size=x.shape)


def _losses(dtype, simulate):
    def both(k, x, t, dy, w, **how):
        losses = k.cross_entropy(x, t, w, **how)
        return losses, k.cross_entropy_backward(dy, x, t, w, **how)
    usual = [(7, 5), (3, 40), (4, 6, 5)] if simulate else [
        (128, 10), (64, 1000), (512, 32000), (9, 11, 16), (9, 300, 5)]
    for N, C, *S in usual + [(3, D) for D in lengths()] * (not simulate):
        x, t = drawn(dtype, N, C, *S), np.random.default_rng(1).integers(0, C, (N, *S))
        t[0] = -100
        dy, weight = drawn(dtype, N, *S, seed=2), np.abs(drawn(dtype, C, seed=3))
        ways = product((None, weight), (0.1, 0.0)) if (N, C, *S) in usual else [(None, 0.1)]
        for (w, smoothing), (layout, order) in product(ways, _layouts(x.shape)):
            how = {"ignore_index": -100, "label_smoothing": smoothing}
            way = f"{' weighted' * (w is not None)}{' not smoothed' * (not smoothing)}"
            yield f"cross_entropy, both ways {(N, C, *S)}{layout}{way}", partial(
                _with, both, how), [order(x), t, dy, w]


def _of_cupy(dtype, simulate):
    """What ops leave to the functions of arrays."""
    from nbgrad import as_tensor

    def chosen(k, x):
        x = as_tensor(x)
        return [y.data for y in (x.argmax(1), x.argmin(0), x.argmax(), x.clamp(-0.5, 0.7),
                                 x.clamp(min=0.1), x.max(1)[0], x.max(1)[1])]
    for shape in ((3, 40), (2, 5, 4)) if simulate else ((3, 40), (300, 257), (8, 30, 14, 14)):
        for layout, order in _layouts(shape):
            yield f"argmax, argmin and clip {shape}{layout}", chosen, [order(drawn(dtype, *shape))]


def _fused(dtype, simulate):
    def both(k, dy, x, w, b, g, activation):
        y, z, mean, invstd = k.linear_batch_norm(x, w, b, g, b, eps=1e-5, activation=activation)
        return y, k.linear_batch_norm_backward(dy, x, w, g, z, y, mean, invstd,
                                               activation=activation, input_gradient=True)
    N, K, C = (6, 5, 3) if simulate else (60, 784, 100)
    for how in (None, "relu", "sigmoid", "tanh"):
        yield f"linear_batch_norm, both ways {how}", partial(_with, both, {"activation": how}), [
            drawn(dtype, *s, seed=i) for i, s in enumerate([(N, C), (N, K), (C, K), (C,), (C,)])]


def _replay(step):
    """A function that is a replay of a captured step, and gives what the step gave."""
    from nbgrad.kernels.cuda import graphs, memory

    recording, result = graphs.capture(step, memory.xp, memory.SIMULATED)

    def run():
        recording.replay()
        memory.synchronize()
        return result
    return run


def _steps(dtype, simulate):
    def plain(k, p, g, m, v):
        k.sgd_step(p, g, None, lr=0.1, momentum=0, dampening=0, weight_decay=0.01, nesterov=False,
                   first=[False] * len(p))
        return p

    def sgd(k, p, g, m, v):
        k.sgd_step(p, g, m, lr=0.1, momentum=0.9, dampening=0, weight_decay=0.01, nesterov=True,
                   first=[False] * len(p))
        return p, m

    def adam(k, p, g, m, v, counted=False):
        counted = counted and type(p[0]) is not np.ndarray
        k.adam_step(p, g, m, v, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1,
                    decoupled=True, steps=moved([np.array(2) for _ in p]) if counted
                    else [3] * len(p))
        return p, m, v

    def drops(k, x):
        return k.dropout(x, np.random.Generator(np.random.PCG64(3)), 0.3)

    def third(k, x):
        rng = np.random.Generator(np.random.PCG64(3))
        run = partial(k.dropout, x, rng, 0.3) if type(x) is np.ndarray else _replay(
            partial(k.dropout, x, rng, 0.3))
        return [run() for _ in range(3)][-1]
    shapes = [(3, 4), (300,), (5,), (2, 3, 3, 3)] if simulate else [(512, 512, 3, 3), (64,), (7,)]
    lists = [[np.abs(drawn(dtype, *s, seed=i)) for s in shapes] for i in range(4)]
    if dtype in ("f4", "f8"):                    # parameters in halves are refused
        yield "sgd_step", sgd, lists
        yield "sgd_step without momentum", plain, lists
        yield "adam_step", adam, lists
        yield "adam_step, counted on the device", partial(adam, counted=True), lists
    x = drawn(dtype, 77) if simulate else drawn(dtype, 1_000_003)
    yield "dropout", drops, [x]
    yield "dropout, replayed", third, [x]
