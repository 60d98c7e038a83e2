"""How long the kernels take on the device: of copy bandwidth, and beside PyTorch's.

``of_copy`` is the share of the measured copy bandwidth that the bytes of the best algorithm need
(each input read once, each output written once); ``of_torch`` is PyTorch's time over nbgrad's.

PyTorch runs what its own training step would: batch norm forward and backward by the library that
``torch.nn.functional.batch_norm`` takes for that shape and layout (cuDNN or ATen's own), the others
by the functions that its autograd calls. Statistics for a backward, in the dtype that its forward
keeps, and weights in the layout of the images are made before the clock starts, as nbgrad's are.
"""

from functools import partial
from importlib.util import find_spec
from time import monotonic
from typing import Any, NamedTuple

import numpy as np

from .cuda_clock import nbgrad_clock, rotating, torch_clock
from .cuda_verify import channels_last, drawn, kernels_for

IMAGES = [(64, c, 56, 56) for c in (64, 128, 256)] + [(256, 256, 56, 56)]
ROWS = [(1 << 24) // c for c in (256, 1024, 4096, 32768)], (256, 1024, 4096, 32768)
# ResNet-50's (He et al. 2016), batch 64: channels, filters, size, kernel, stride
CONV = [(3, 64, 224, 7, 2), (64, 64, 56, 1, 1), (64, 64, 56, 3, 1), (64, 256, 56, 1, 1),
        (128, 128, 28, 3, 1), (256, 512, 56, 1, 2), (256, 256, 14, 3, 1), (1024, 256, 14, 1, 1),
        (512, 512, 7, 3, 1)]
BATCH, SIDE = 64, 4096
HALVES = "f2", "bf"


class Case(NamedTuple):
    """Arrays of the host, what nbgrad's kernels and torch do with them (torch: None if nothing
    there does it), bytes of the best algorithm, multiply-adds. ``ready(torch, *arrays)``: what
    torch is given, made of the arrays ahead."""

    name: str
    arrays: list
    call: Any
    torch: Any = None
    nbytes: int = 0
    madds: int = 0
    ready: Any = None

    def theirs(self, torch, arrays):
        """torch's call, of arrays that are where it shall run."""
        with torch.no_grad():
            arrays = arrays if self.ready is None else self.ready(torch, *arrays)
        return partial(self.torch, torch, *arrays)


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
        calls = [case.theirs(torch, [to_torch(torch, a).cuda() for a in case.arrays])
                 for _ in range(rotating(size, self.cache))]          # keeps channels-last memory
        with torch.no_grad():
            return self.peer_clock(calls)


def to_torch(torch, a):
    """A tensor of an array's memory; bfloat16, which torch does not take from NumPy, by its bits.
    """
    if a.dtype.name != "bfloat16":
        return torch.from_numpy(a)
    return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)


def bench(report):
    """A Bench of the current device, whose clocks stop when the time of ``report`` is over."""
    from nbgrad.kernels.cuda.memory import to_device, xp

    cache = xp.cuda.Device().attributes["L2CacheSize"]
    torch: Any = None
    if find_spec("torch"):
        import torch

        torch.backends.cudnn.benchmark = True              # its fastest algorithm for each shape
    if torch is None or not torch.cuda.is_available():
        report.add("measure", "torch", "skipped", note="no torch with CUDA: no ratios")
        return Bench(report, nbgrad_clock(report.deadline), cache, to_device)
    return Bench(report, nbgrad_clock(report.deadline), cache, to_device, torch,
                 torch_clock(torch, report.deadline))


def cases(report, simulate):
    """(name, measurement), copy bandwidth first, then the step, then what it is made of."""
    from nbgrad.kernels.cuda.memory import empty, xp

    b = bench(report)
    yield "copy bandwidth", partial(b.copies, lambda n: empty((n // 4,), np.float32), xp.copyto)
    for captured in (False, True):
        name = f"resnet20 step, batch 128, {'captured' if captured else 'eager'}"
        yield name, partial(step, b, name, captured)
    for make in table():
        yield _made(b, make)
        if monotonic() > report.deadline:                  # arrays of the rest are not made
            return


def _made(b, make):
    """A case's name and measurement; what its arrays raise, the measurement raises."""
    try:
        case = make()
    except Exception as e:
        return f"{make.func.__name__} {make.args}", partial(_raise, e)
    return case.name, partial(b.measure, case)


def _raise(e):
    raise e


def table(images=IMAGES, rows=ROWS, convolutions=CONV, batch=BATCH, side=SIDE):
    """Functions that make a Case: its arrays are large, and made when it is its turn."""
    from nbgrad.kernels.cuda import precision

    norms = _forward, _backward, _added, _added_backward
    for dtype, shapes in (("f4", images), *((half, images[:1]) for half in HALVES)):
        for shape in shapes:
            for layout in ("NCHW", "channels-last"):
                for what in norms:
                    yield partial(what, shape, layout, dtype)
    shapes = list(zip(*rows))
    for dtype, some in (("f4", shapes), *((half, shapes[:1]) for half in HALVES)):
        for shape in some:
            for name in ("layer_norm", "rms_norm", "softmax"):
                yield partial(_rows, name, shape, dtype)
                yield partial(_rows_backward, name, shape, dtype)
    for way in (*precision.WAYS, *HALVES):
        yield partial(_matmul, way, side)
    for way in ("fma", "tf32", *HALVES):
        for sizes in convolutions:
            for name in ("conv2d", "conv2d_input", "conv2d_weight"):
                yield partial(_convolution, name, batch, *sizes, way)


def _image(shape, layout, dtype="f4", seed=0):
    x = drawn(dtype, *shape[1:], seed=seed)                    # one image, for all: drawing is slow
    x = np.broadcast_to(x, shape)
    return channels_last(x) if layout == "channels-last" else np.ascontiguousarray(x)


def _kernels(dtype="f4"):
    from nbgrad.kernels import cuda

    return kernels_for(cuda, dtype)


def _norm(shape, layout, dtype, arrays):
    """Images, γ and β; of a backward also the statistics."""
    C = shape[1]
    return [*(_image(shape, layout, dtype, i) for i in range(arrays)), drawn(dtype, C, seed=3),
            drawn(dtype, C, seed=4)]


def _ending(dtype):
    """Of the names of cases: nothing for float32."""
    return "" if dtype in ("f4", "fma") else f" {dtype}"


def _named(what, shape, layout, dtype):
    return f"batch_norm {what} {'x'.join(map(str, shape))} {layout}{_ending(dtype)}"


def _forward(shape, layout, dtype):
    arrays = _norm(shape, layout, dtype, 1)
    return Case(_named("forward", shape, layout, dtype), arrays,
                lambda x, g, b: _kernels(dtype).batch_norm(x, g, b, eps=1e-5),
                lambda t, x, g, b: t.nn.functional.batch_norm(x, None, None, g, b, True),
                2 * arrays[0].nbytes)


def _statistics(x):
    """Mean and 1/σ of channels of equal images."""
    one = x[:1].astype(np.float64)
    return one.mean((0, 2, 3)), 1 / np.sqrt(one.var((0, 2, 3)) + 1e-5)


def _of_forward(t, x, g):
    """What torch's forward keeps for ``_of_batch``: the library that it took, and for it the
    statistics, and what cuDNN reserves."""
    _, mean, invstd, reserved, library = t._batch_norm_impl_index(
        x, g, t.zeros_like(g), None, None, True, 0.0, 1e-5, t.backends.cudnn.enabled)
    return library, mean, invstd, reserved


def _of_batch(t, dy, x, g, kept):
    """torch's dx, dγ and dβ."""
    library, mean, invstd, reserved = kept
    return t.ops.aten._batch_norm_impl_index_backward(
        library, x, dy, g, None, None, mean, invstd, True, 1e-5, [True, True, True], reserved)


def _backward(shape, layout, dtype):
    arrays = _norm(shape, layout, dtype, 2)[:3]
    arrays += _statistics(arrays[1])
    return Case(_named("backward", shape, layout, dtype), arrays,
                lambda dy, x, g, m, s: _kernels(dtype).batch_norm_backward(dy, x, g, m, s),
                _of_batch, 3 * arrays[0].nbytes,
                ready=lambda t, dy, x, g, m, s: (dy, x, g, _of_forward(t, x, g)))


def _added(shape, layout, dtype):
    arrays = _norm(shape, layout, dtype, 2)

    def theirs(t, x, z, g, b):
        return t.relu_(t.nn.functional.batch_norm(x, None, None, g, b, True).add_(z))
    return Case(_named("+ add + relu forward", shape, layout, dtype), arrays,
                lambda x, z, g, b: _kernels(dtype).batch_norm(x, g, b, z, eps=1e-5, relu=True),
                theirs, 3 * arrays[0].nbytes)


def _added_backward(shape, layout, dtype):
    arrays = _norm(shape, layout, dtype, 3)[:4]
    arrays += _statistics(arrays[1])

    def theirs(t, dy, x, y, g, kept):
        dz = t.ops.aten.threshold_backward(dy, y, 0)
        return *_of_batch(t, dz, x, g, kept), dz
    return Case(_named("+ add + relu backward", shape, layout, dtype), arrays,
                lambda dy, x, y, g, m, s: _kernels(dtype).batch_norm_backward(
                    dy, x, g, m, s, y=y, relu=True, residual=True), theirs, 5 * arrays[0].nbytes,
                ready=lambda t, dy, x, y, g, m, s: (dy, x, y, g, _of_forward(t, x, g)))


def _rows(name, shape, dtype):
    arrays = [drawn(dtype, *shape), drawn(dtype, shape[1], seed=1)]
    ours = {"layer_norm": lambda x, g: _kernels(dtype).layer_norm(x, g, None, dims=1, eps=1e-5),
            "rms_norm": lambda x, g: _kernels(dtype).rms_norm(x, g, dims=1, eps=1e-5),
            "softmax": lambda x, g: _kernels(dtype).softmax(x, axis=1)}
    theirs = {"layer_norm": lambda t, x, g: t.nn.functional.layer_norm(x, g.shape, g),
              "rms_norm": lambda t, x, g: t.nn.functional.rms_norm(x, g.shape, g, 1e-5),
              "softmax": lambda t, x, g: t.softmax(x, 1)}
    return Case(f"{name} forward {shape[0]}x{shape[1]}{_ending(dtype)}", arrays, ours[name],
                theirs[name], 2 * arrays[0].nbytes)


def _rows_backward(name, shape, dtype):
    """Of dy, of x (softmax: y), γ and statistics that are given."""
    arrays = [drawn(dtype, *shape), drawn(dtype, *shape, seed=1), drawn(dtype, shape[1], seed=2),
              np.zeros(shape[0]), np.ones(shape[0])]
    ours = {"layer_norm": lambda dy, x, g, m, s: _kernels(dtype).layer_norm_backward(
                dy, x, g, m, s, dims=1),
            "rms_norm": lambda dy, x, g, m, s: _kernels(dtype).rms_norm_backward(
                dy, x, g, s, dims=1),
            "softmax": lambda dy, y, g, m, s: _kernels(dtype).softmax_backward(dy, y, axis=1)}

    def ready(t, dy, x, g, m, s):            # statistics as torch's forward leaves them: (N, 1)
        return dy, x, g, m.float()[:, None], s.float()[:, None]

    def layer(t, dy, x, g, m, s):
        return t.ops.aten.native_layer_norm_backward(dy, x, g.shape, m, s, g, g,
                                                     [True, True, True])

    def rms(t, dy, x, g, m, s):
        return t.ops.aten._fused_rms_norm_backward(dy, x, g.shape, s, g, [True, True])

    def soft(t, dy, y, g, m, s):
        return t.ops.aten._softmax_backward_data(dy, y, 1, y.dtype)
    theirs = {"layer_norm": layer, "rms_norm": rms, "softmax": soft}
    return Case(f"{name} backward {shape[0]}x{shape[1]}{_ending(dtype)}", arrays, ours[name],
                theirs[name], 3 * arrays[0].nbytes, ready=ready)


def _in_way(way, call):
    """``call`` with float32 multiplied in a way; halves have their own."""
    from nbgrad.kernels.cuda import precision

    def run(*arrays):
        precision.use("fma" if way in HALVES else way)
        try:
            return call(*arrays)
        finally:
            precision.use("fma")
    return run


def _matmul(way, n):
    dtype = way if way in HALVES else "f4"
    arrays = [drawn(dtype, n, n), drawn(dtype, n, n, seed=1)]

    def theirs(t, a, b):
        t.backends.cuda.matmul.allow_tf32 = way == "tf32"
        return a @ b
    return Case(f"matmul {n}x{n}x{n} {way}", arrays,
                _in_way(way, lambda a, b: _kernels(dtype).matmul(a, b)), theirs, madds=n ** 3)


def _convolution(name, batch, channels, filters, size, k, stride, way):
    pad, out = k // 2, (size + 2 * (k // 2) - k) // stride + 1
    dtype = way if way in HALVES else "f4"
    x = _image((batch, channels, size, size), "channels-last", dtype)
    dy = _image((batch, filters, out, out), "channels-last", dtype, 1)
    w = drawn(dtype, filters, channels, k, k, seed=2)
    how = {"stride": (stride, stride), "padding": (pad, pad), "dilation": (1, 1), "groups": 1}

    def theirs(t, x, dy, w):
        t.backends.cudnn.allow_tf32 = way == "tf32"
        if name == "conv2d":
            return t.nn.functional.conv2d(x, w, None, stride, pad)
        return t.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1,
            [name == "conv2d_input", name == "conv2d_weight", False])
    more = {"conv2d_input": {"input_size": x.shape}, "conv2d_weight": {"kernel_size": (k, k)}}
    first = {"conv2d": lambda x, dy, w: (x, w), "conv2d_input": lambda x, dy, w: (dy, w),
             "conv2d_weight": lambda x, dy, w: (dy, x)}[name]
    call = _in_way(way, lambda *a: getattr(_kernels(dtype), name)(
        *first(*a), **more.get(name, {}), **how))
    return Case(f"{name} {batch}x{channels}->{filters} {k}x{k}/{stride} @{size}{_ending(way)}",
                [x, dy, w], call, theirs, madds=batch * filters * out * out * channels * k * k,
                ready=lambda t, x, dy, w: (x, dy, w.contiguous(memory_format=t.channels_last)))


def step(b, name, captured, model="resnet20", shape=(128, 3, 32, 32), **how):
    """A training step of SGD with momentum, beside PyTorch's, eager, where it has the model."""
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
    seconds, more = b.clock([run]), {}
    if b.peer is not None:
        more["of_torch"] = b.peer_clock([torch_step(b.peer, shape, "cuda")]) / seconds
    b.report.add("measure", name, value=1e3 * seconds, unit="ms",
                 note=f"{nbgrad.cuda.memory_reserved() >> 20} MB in the pool", **more)


def torch_step(torch, shape, device):
    """The same step of ResNet-20 in PyTorch, channels-last, by cuDNN's fastest float32."""
    from .on_torch import resnet20

    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    net = resnet20().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    t = torch.zeros(shape[0], dtype=torch.int64, device=device)

    def once():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), t)
        loss.backward()
        optimizer.step()
        return loss
    return once
