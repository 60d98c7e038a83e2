"""How long the kernels take on the device: of copy bandwidth, and beside PyTorch's.

``of_copy`` is the share of the measured copy bandwidth that the bytes of the best algorithm need
(each input read once, each output written once); ``of_torch`` is PyTorch's time over nbgrad's.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from .cuda_clock import nbgrad_clock, rotating, torch_clock
from .cuda_verify import channels_last, drawn

IMAGES = [(64, c, 56, 56) for c in (64, 128, 256)] + [(256, 256, 56, 56)]
ROWS = [(1 << 24) // c for c in (256, 1024, 4096, 32768)], (256, 1024, 4096, 32768)
# ResNet-50's (He et al. 2016), batch 64: channels, filters, size, kernel, stride
CONV = [(3, 64, 224, 7, 2), (64, 64, 56, 1, 1), (64, 64, 56, 3, 1), (64, 256, 56, 1, 1),
        (128, 128, 28, 3, 1), (256, 512, 56, 1, 2), (256, 256, 14, 3, 1), (1024, 256, 14, 1, 1),
        (512, 512, 7, 3, 1)]
BATCH, SIDE = 64, 4096


class Case(NamedTuple):
    """Arrays of the host, what nbgrad's kernels and torch do with them (torch: None if nothing
    there does it), bytes of the best algorithm, multiply-adds."""

    name: str
    arrays: list
    call: Any
    torch: Any = None
    nbytes: int = 0
    madds: int = 0


class Bench:
    """The clocks and copy bandwidth of one run; ``peer`` is torch, or None."""

    def __init__(self, report, clock, cache, move, peer=None, peer_clock=None):
        self.report, self.clock, self.cache, self.move = report, clock, cache, move
        self.peer, self.peer_clock, self.bandwidth = peer, peer_clock, None

    def copies(self, empty, copy, nbytes=1 << 30):
        """Copy bandwidth, bytes read and written per second."""
        a, b = empty(nbytes), empty(nbytes)
        self.bandwidth = 2 * nbytes / self.clock([partial(copy, a, b)])
        self.report.add("measure", "copy bandwidth", value=self.bandwidth / 1e9, unit="GB/s")

    def measure(self, case):
        """One row: milliseconds, of copy bandwidth, of torch's."""
        size = sum(a.nbytes for a in case.arrays)
        sets = [[self.move(a) for a in case.arrays] for _ in range(rotating(size, self.cache))]
        calls = [partial(case.call, *arrays) for arrays in sets]
        seconds, more = self.clock(calls), {}
        if case.nbytes and self.bandwidth:
            more["of_copy"] = case.nbytes / seconds / self.bandwidth
        if case.madds:
            more["note"] = f"{2e-12 * case.madds / seconds:.1f} TFLOP/s"
        del sets, calls
        if self.peer is not None and case.torch is not None:
            more["of_torch"] = self._theirs(case, size) / seconds
        self.report.add("measure", case.name, value=1e3 * seconds, unit="ms", **more)

    def _theirs(self, case, size):
        torch = self.peer
        sets = [[torch.from_numpy(a).cuda() for a in case.arrays]     # keeps channels-last memory
                for _ in range(rotating(size, self.cache))]
        with torch.no_grad():
            return self.peer_clock([partial(case.torch, torch, *arrays) for arrays in sets])


def bench(report):
    """A Bench of the current device."""
    from nbgrad.kernels.cuda.memory import to_device, xp

    cache = xp.cuda.Device().attributes["L2CacheSize"]
    torch: Any = None
    if find_spec("torch"):
        import torch
    if torch is None or not torch.cuda.is_available():
        report.add("measure", "torch", "skipped", note="no torch with CUDA: no ratios")
        return Bench(report, nbgrad_clock(), cache, to_device)
    return Bench(report, nbgrad_clock(), cache, to_device, torch, torch_clock(torch))


def cases(report, simulate):
    """(name, measurement), copy bandwidth first."""
    from nbgrad.kernels.cuda.memory import empty, xp

    b = bench(report)
    yield "copy bandwidth", partial(b.copies, lambda n: empty((n // 4,), np.float32), xp.copyto)
    for make in table():
        case = make()
        yield case.name, partial(b.measure, case)
    for captured in (False, True):
        name = f"resnet20 step, batch 128, {'captured' if captured else 'eager'}"
        yield name, partial(step, b, name, captured)


def table(images=IMAGES, rows=ROWS, convolutions=CONV, batch=BATCH, side=SIDE):
    """Functions that make a Case: its arrays are large, and made when it is its turn."""
    from nbgrad.kernels.cuda import precision

    for shape in images:
        for layout in ("NCHW", "channels-last"):
            for what in (_forward, _backward, _added, _added_backward):
                yield partial(what, shape, layout)
    for shape in zip(*rows):
        for name in ("layer_norm", "rms_norm", "softmax"):
            yield partial(_rows, name, shape)
    for way in precision.WAYS:
        yield partial(_matmul, way, side)
    for sizes in convolutions:
        for name in ("conv2d", "conv2d_input", "conv2d_weight"):
            yield partial(_convolution, name, batch, *sizes)


def _image(shape, layout, seed=0):
    x = drawn("f4", *shape[1:], seed=seed)                     # one image, for all: drawing is slow
    x = np.broadcast_to(x, shape)
    return channels_last(x) if layout == "channels-last" else np.ascontiguousarray(x)


def _kernels():
    from nbgrad.kernels import cuda

    return cuda


def _norm(shape, layout, arrays):
    C = shape[1]
    return [*(_image(shape, layout, i) for i in range(arrays)), drawn("f4", C, seed=3),
            drawn("f4", C, seed=4)]


def _named(what, shape, layout):
    return f"batch_norm {what} {'x'.join(map(str, shape))} {layout}"


def _forward(shape, layout):
    arrays = _norm(shape, layout, 1)
    return Case(_named("forward", shape, layout), arrays,
                lambda x, g, b: _kernels().batch_norm(x, g, b, eps=1e-5),
                lambda t, x, g, b: t.nn.functional.batch_norm(x, None, None, g, b, True),
                2 * arrays[0].nbytes)


def _backward(shape, layout):
    C = shape[1]
    arrays = [*_norm(shape, layout, 2)[:3], np.zeros(C), np.ones(C)]

    def theirs(t, dy, x, g, mean, invstd):
        return t.ops.aten.native_batch_norm_backward(
            dy, x, g, None, None, mean.float(), invstd.float(), True, 1e-5, [True, True, True])
    return Case(_named("backward", shape, layout), arrays,
                lambda dy, x, g, m, s: _kernels().batch_norm_backward(dy, x, g, m, s), theirs,
                3 * arrays[0].nbytes)


def _added(shape, layout):
    arrays = _norm(shape, layout, 2)

    def theirs(t, x, z, g, b):
        return t.relu_(t.nn.functional.batch_norm(x, None, None, g, b, True).add_(z))
    return Case(_named("+ add + relu forward", shape, layout), arrays,
                lambda x, z, g, b: _kernels().batch_norm(x, g, b, z, eps=1e-5, relu=True), theirs,
                3 * arrays[0].nbytes)


def _added_backward(shape, layout):
    C = shape[1]
    arrays = [*_norm(shape, layout, 3)[:4], np.zeros(C), np.ones(C)]
    return Case(_named("+ add + relu backward", shape, layout), arrays,
                lambda dy, x, y, g, m, s: _kernels().batch_norm_backward(
                    dy, x, g, m, s, y=y, relu=True, residual=True), None, 5 * arrays[0].nbytes)


def _rows(name, shape):
    arrays = [drawn("f4", *shape), drawn("f4", shape[1], seed=1)]
    ours = {"layer_norm": lambda x, g: _kernels().layer_norm(x, g, None, dims=1, eps=1e-5),
            "rms_norm": lambda x, g: _kernels().rms_norm(x, g, dims=1, eps=1e-5),
            "softmax": lambda x, g: _kernels().softmax(x, axis=1)}
    theirs = {"layer_norm": lambda t, x, g: t.nn.functional.layer_norm(x, g.shape, g),
              "rms_norm": lambda t, x, g: t.nn.functional.rms_norm(x, g.shape, g, 1e-5),
              "softmax": lambda t, x, g: t.softmax(x, 1)}
    return Case(f"{name} forward {shape[0]}x{shape[1]}", arrays, ours[name], theirs[name],
                2 * arrays[0].nbytes)


def _matmul(way, n):
    from nbgrad.kernels.cuda import precision

    arrays = [drawn("f4", n, n), drawn("f4", n, n, seed=1)]

    def ours(a, b):
        precision.use(way)
        try:
            return _kernels().matmul(a, b)
        finally:
            precision.use("fma")

    def theirs(t, a, b):
        t.backends.cuda.matmul.allow_tf32 = way == "tf32"
        return a @ b
    return Case(f"matmul {n}x{n}x{n} {way}", arrays, ours, theirs, madds=n ** 3)


def _convolution(name, batch, channels, filters, size, k, stride):
    pad, out = k // 2, (size + 2 * (k // 2) - k) // stride + 1
    x = _image((batch, channels, size, size), "channels-last")
    dy = _image((batch, filters, out, out), "channels-last", 1)
    w = drawn("f4", filters, channels, k, k, seed=2)
    how = {"stride": (stride, stride), "padding": (pad, pad), "dilation": (1, 1), "groups": 1}

    def theirs(t, x, dy, w):
        t.backends.cudnn.allow_tf32 = False
        w = w.contiguous(memory_format=t.channels_last)
        if name == "conv2d":
            return t.nn.functional.conv2d(x, w, None, stride, pad)
        return t.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1,
            [name == "conv2d_input", name == "conv2d_weight", False])
    more = {"conv2d_input": {"input_size": x.shape}, "conv2d_weight": {"kernel_size": (k, k)}}
    first = {"conv2d": lambda x, dy, w: (x, w), "conv2d_input": lambda x, dy, w: (dy, w),
             "conv2d_weight": lambda x, dy, w: (dy, x)}[name]
    return Case(f"{name} {batch}x{channels}->{filters} {k}x{k}/{stride} @{size}", [x, dy, w],
                lambda *a: getattr(_kernels(), name)(*first(*a), **more.get(name, {}), **how),
                theirs, madds=batch * filters * out * out * channels * k * k)


def step(b, name, captured, model="resnet20", shape=(128, 3, 32, 32), **how):
    """A training step of SGD with momentum."""
    import nbgrad
    from nbgrad import models, nn, optim

    net, x = getattr(models, model)(**how).to("cuda"), nbgrad.randn(*shape, device="cuda")
    t, optimizer = nbgrad.zeros(len(x), dtype=np.int64, device="cuda"), optim.SGD(
        net.parameters(), 0.1, momentum=0.9)

    def once():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), t)
        loss.backward()
        optimizer.step()
        return loss
    run = nbgrad.cuda.graph(once, warmup=3) if captured else once
    for _ in range(4):
        run()
    b.report.add("measure", name, value=1e3 * b.clock([run]), unit="ms",
                 note=f"{nbgrad.cuda.memory_reserved() >> 20} MB in the pool")
