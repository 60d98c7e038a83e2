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
