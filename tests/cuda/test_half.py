"""Halves on CUDA: read as float32, rounded to nearest even when written; engine and kernels."""

import numpy as np
import pytest
from nbgrad.kernels import half
from nbgrad.kernels.cuda import launch
from nbgrad.kernels.cuda.intrinsics import cuda, load, store, width
from nbgrad.kernels.cuda.launch import Kernel
from nbgrad.kernels.cuda.memory import empty, to_device, to_host

ml_dtypes = pytest.importorskip("ml_dtypes")
HALVES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])


@dtypes
def test_vectors_and_single_ones(dtype, monkeypatch):
    """x / 3 of every finite half: eight by vectors, the last ones one by one."""
    monkeypatch.setattr(launch, "KERNELS", {})
    three = np.float32(3)

    def body(x, y, n):
        i = cuda.threadIdx.x * 8
        if i + 8 <= n:
            a = load(x, i)
            store(y, i, (a[0] / three, a[1] / three, a[2] / three, a[3] / three, a[4] / three,
                         a[5] / three, a[6] / three, a[7] / three))
        else:
            for k in range(i, n):
                y[k] = x[k] / three
    kind = half.kind(dtype)
    x = np.arange(0, 1 << 16, 7, np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        x = x[np.isfinite(x)]
    x = x[:x.size // 8 * 8 - 3]
    y = empty(x.shape, dtype)
    assert width(dtype) == 8
    assert np.isnan(to_host(y)).all()                        # unwritten memory shows
    Kernel(body, f"*{kind} *{kind} i4", name="thirds", threads=-(-x.size // 8))(
        1, to_device(x), y, x.size)
    np.testing.assert_array_equal(to_host(y), (x.astype(np.float32) / three).astype(dtype))
    with pytest.raises(TypeError, match="expected an array of"):
        Kernel(body, f"*{kind} *{kind} i4", name="other")(1, y, to_device(np.zeros(8, "f4")), 8)


@dtypes
def test_the_engine(dtype):
    """What has no kernel for halves goes through float32, on the device."""
    import nbgrad
    from nbgrad import nn, tensor

    x = tensor([[1.0, -2.5, 3.0]] * 2, device="cuda").to(dtype)
    assert (x.device, x.dtype) == ("cuda", dtype)
    y = nbgrad.softmax(x * 2 + 1, 1).sum(0).cpu()
    want = nbgrad.softmax(x.cpu() * 2 + 1, 1).sum(0)
    np.testing.assert_allclose(y.float().data, want.float().data, rtol=2.0**-7)
    layer = nn.Linear(3, 2).to("cuda").to(dtype=dtype)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == dtype
    assert layer.weight.grad.cpu().tolist() == [[2.0, -5.0, 6.0]] * 2


def test_bfloat16_needs_ampere(monkeypatch):
    monkeypatch.setattr(launch, "KERNELS", {})
    assert Kernel(None, "*bf f4", name="a").least == (8, 0)
    assert Kernel(None, "*f2 f4", name="b").least == (0, 0)


# x, weight, stride, padding, dilation, groups: 70 pixels are two steps of 32 and some
WEIGHTS = [((1, 8, 7, 10), (8, 8, 3, 3), (1, 1), (1, 1), (1, 1), 1),
           ((2, 16, 5, 4), (72, 16, 2, 1), (2, 1), (1, 0), (1, 2), 1),
           ((1, 16, 5, 8), (16, 8, 1, 2), (1, 1), (0, 0), (1, 1), 2),
           ((1, 3, 6, 5), (5, 3, 2, 2), (1, 1), (0, 0), (1, 1), 1)]          # through float32


@dtypes
@pytest.mark.parametrize("case", WEIGHTS)
def test_gradient_of_weights(dtype, case, either_order, monkeypatch):
    """Products of halves are exact; sums in float32, in parts of the pixels or not; one rounding.
    The images are read as they are: nothing is converted."""
    from nbgrad.kernels import cuda as kernels, reference
    from nbgrad.kernels.cuda import conv, tile
    from nbgrad.kernels.shapes import Conv

    size, weight, stride, padding, dilation, groups = case
    settings = {"kernel_size": weight[2:], "stride": stride, "padding": padding,
                "dilation": dilation, "groups": groups}
    g, rng = Conv.of(size, weight, stride, padding, dilation, groups), np.random.default_rng(0)
    dy, x = (rng.standard_normal(s).astype(dtype) for s in ((g.N, g.O, g.P, g.Q), size))
    wide = [a.astype(np.float64) for a in (dy, x)]
    want = reference.conv2d_weight(*wide, **settings)
    sizes = reference.conv2d_weight(*map(np.abs, wide), **settings)
    unit = 2.0**-11 if dtype == np.float16 else 2.0**-8
    bound = unit * np.abs(want) + g.N * g.P * g.Q * 2.0**-23 * sizes + 2.0**-25
    if size[1] % 8 == 0:
        monkeypatch.setattr(conv, "wide", None)
    for deep in (tile.DEEP, 16):
        monkeypatch.setattr(tile, "DEEP", deep)
        dw = kernels.conv2d_weight(to_device(dy), to_device(x), **settings)
        assert dw.dtype == dtype
        assert (np.abs(to_host(dw).astype(np.float64) - want) <= bound).all()


@dtypes
def test_a_linear_layer_with_batch_norm_multiplies_halves(dtype, monkeypatch):
    """As one op it is the three, bit by bit, by the kernels that they have for halves."""
    import nbgrad
    from nbgrad import nn

    kind, names, start = half.kind(dtype), set(), Kernel.__call__
    monkeypatch.setattr(Kernel, "__call__", lambda k, *args: (names.add(k.name), start(k, *args)))
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()).to("cuda")
    model[0].to(dtype=dtype)
    x = nbgrad.randn(5, 6, device="cuda").to(dtype)
    runs = [lambda: model(x), lambda: model[2](model[1](model[0](x)))]
    found = []
    for run in runs:
        model.zero_grad()
        y = run()
        y.float().square().sum().backward()
        found.append([y.tolist(), *(p.grad.tolist() for p in model.parameters())])
        kernels = {n.split("_")[0]: n for n in names if f"_{kind}" in n}
        assert {"matmul", "normalize", "gradient"} <= kernels.keys() or "single" in kernels
        assert not [n for n in names if n.startswith(("matmul_f4", "normalize_f4", "single_f4"))]
        names.clear()
    assert found[0] == found[1]
    assert model[0].weight.grad.dtype == dtype
    assert model[1].weight.grad.dtype == np.float32


ROWS, IMAGES = (16, 40), (2, 8, 6, 6)
# two arrays of each shape, a gradient of the result's, and what the kernels are given
PRODUCTS = {
    "matmul": [ROWS, ROWS[::-1], (16, 16)], "linear": [ROWS, (8, 40), (16, 8)],
    "conv2d": [IMAGES, (16, 8, 3, 3), (2, 16, 6, 6)]}
NORMS = {"batch_norm": IMAGES, "ghost_batch_norm": IMAGES, "group_norm": IMAGES,
         "layer_norm": ROWS, "rms_norm": ROWS}


def calls(name, dtype, drawn):
    """Forward and backward of one of PRODUCTS or NORMS."""
    from nbgrad.kernels import cuda as k

    if name in PRODUCTS:
        a, b, dy = (drawn(dtype, *shape) for shape in PRODUCTS[name])
        if name == "matmul":
            yield k.matmul(a, b)
        elif name == "linear":
            yield k.linear(a, b, drawn(dtype, 8))
            yield from k.linear_backward(dy, a, b, input_gradient=True)
        else:
            how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
            yield k.conv2d(a, b, drawn(dtype, 16), **how)
            yield k.conv2d_input(dy, b, input_size=IMAGES, **how)
            yield k.conv2d_weight(dy, a, kernel_size=(3, 3), **how)
        return
    x, dy = drawn(dtype, *NORMS[name]), drawn(dtype, *NORMS[name])
    g, b = drawn(dtype, x.shape[1]), drawn(dtype, x.shape[1])
    more = {"ghost_batch_norm": {"size": 1}, "group_norm": {"groups": 2}}.get(name, {})
    if name in ("layer_norm", "rms_norm"):
        more["dims"] = 1
    given = (x, g) if name == "rms_norm" else (x, g, b)
    y, *stats = getattr(k, name)(*given, **more, eps=1e-5)
    yield y
    stats = stats[-1:] if name == "rms_norm" else [stats[0], stats[-1]]
    yield from (a for a in getattr(k, name + "_backward")(dy, x, g, *stats, **more)
                if a is not None)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), *HALVES], ids=str)
@pytest.mark.parametrize("name", [*PRODUCTS, *NORMS])
def test_products_and_norms_have_kernels_for_every_dtype(name, dtype, monkeypatch):
    """Which read and write arrays as they are: none larger than a vector of channels is converted,
    but the gradient that a bias sums up. Results are of that dtype."""
    from nbgrad.kernels.cuda import memory

    names, converted, start = set(), [], Kernel.__call__
    convert = memory.Array.astype

    def astype(self, to, *args, **settings):
        if self.dtype != to and self.size > 40:
            converted.append(self.shape)
        return convert(self, to, *args, **settings)
    monkeypatch.setattr(memory.Array, "astype", astype)
    monkeypatch.setattr(Kernel, "__call__", lambda k, *args: (names.add(k.name), start(k, *args)))
    rng = np.random.default_rng(0)
    found = list(calls(name, dtype, lambda dtype, *shape: to_device(
        rng.standard_normal(shape).astype(dtype))))
    assert {y.dtype for y in found} == {dtype}
    own = [n for n in names if f"_{half.kind(dtype)}" in n]
    assert own
    assert converted == [(16, 8)] * (name == "linear" and dtype in HALVES)
