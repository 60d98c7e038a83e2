"""Matrix products on CUDA against the reference: tails, strides, batches, splits of k."""

import inspect

import numpy as np
import pytest
from nbgrad.kernels import cuda, reference
from nbgrad.kernels.cuda import precision, tile
from nbgrad.kernels.cuda.memory import to_device, to_host

EPS = {np.float32: 2.0**-23, np.float64: 2.0**-52}
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@pytest.fixture
def normal():
    rng = np.random.default_rng(0)
    return lambda dtype, *shape: rng.standard_normal(shape).astype(dtype)


def check(got, a, b, bias=0):
    """Within the rounding of a sum of K numbers, each of its size or less."""
    K, wide = a.shape[-1], (a.astype(np.float64), b.astype(np.float64))
    bound = EPS[a.dtype.type] * (K + 2) * (np.abs(wide[0]) @ np.abs(wide[1]) + np.abs(bias))
    assert to_host(got).dtype == a.dtype
    assert (np.abs(to_host(got) - (wide[0] @ wide[1] + bias)) <= bound).all()


def test_names_and_signatures_are_the_references():
    for name in ("matmul", "linear", "linear_backward"):
        a, b = (inspect.unwrap(getattr(m, name)) for m in (reference, cuda))
        assert str(inspect.signature(a)) == str(inspect.signature(b))


@dtypes
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (64, 64, 16), (65, 68, 40), (3, 130, 33)])
def test_sizes(sizes, dtype, normal):
    M, N, K = sizes
    a, b = normal(dtype, M, K), normal(dtype, K, N)
    check(cuda.matmul(to_device(a), to_device(b)), a, b)
    a, b = normal(dtype, K, M).T, normal(dtype, N, K).T
    check(cuda.matmul(to_device(a), to_device(b)), a, b)


def test_large_tiles(normal, monkeypatch, either_order):
    monkeypatch.setattr(tile, "SMALL", tile.LARGE)
    a, b = normal(np.float32, 130, 20), normal(np.float32, 20, 4)
    check(cuda.matmul(to_device(a), to_device(b)), a, b)


@pytest.mark.parametrize("loads", ["plain", "ahead"])
def test_either_way_into_shared_memory(loads, normal, monkeypatch, either_order):
    """By registers, or by copies which happen at once or as late as they may: each layout."""
    monkeypatch.setattr(precision, "loads", lambda: loads)
    for dtype in (np.float32, np.float64):
        a, b = normal(dtype, 8, 52), normal(dtype, 52, 12)
        for x, y in ((a, b), (np.asfortranarray(a), b), (a, np.asfortranarray(b)),
                     (a[:, 1:50], b[1:50, :11])):
            check(cuda.matmul(to_device(x), to_device(y)), x, y)


def test_splits_of_k(normal, monkeypatch, either_order):
    monkeypatch.setattr(tile, "DEEP", 16)
    a, b, bias = normal(np.float32, 3, 100), normal(np.float32, 5, 100), normal(np.float32, 5)
    check(cuda.matmul(to_device(a), to_device(b).T), a, b.T)
    check(cuda.linear(to_device(a), to_device(b), to_device(bias)), a, b.T, bias)


def test_sizes_beyond_32_bits_are_refused():
    with pytest.raises(ValueError, match=r"\(2147483648, 3\) times \(3, 5\) on CUDA"):
        tile.plan(2**31, 5, 3, 1, np.dtype(np.float32))


BATCHES = [((3, 2, 4), (3, 4, 2)), ((2, 1, 3, 4), (3, 4, 2)), ((4, 3), (2, 3, 5)),
           ((2, 3, 4), (4, 2)), ((2, 1, 2, 2, 3), (2, 1, 3, 2)), ((4,), (4,)), ((4,), (2, 4, 3)),
           ((2, 3, 4), (4,)), ((0, 3), (3, 2)), ((2, 0), (0, 3)), ((0, 2, 3), (3, 2))]


@pytest.mark.parametrize("shapes", BATCHES)
def test_batches_and_nothing(shapes, normal):
    a, b = (normal(np.float64, *s) for s in shapes)
    got = to_host(cuda.matmul(to_device(a), to_device(b)))
    np.testing.assert_allclose(got, reference.matmul(a, b), rtol=1e-13, atol=1e-14)
    assert got.shape == reference.matmul(a, b).shape


def test_views(normal):
    """Gaps, negative steps, a broadcast operand, memory off its alignment."""
    x, w = normal(np.float32, 2, 9, 21), normal(np.float32, 21, 8)
    d, e = to_device(x), to_device(w)
    for view in (np.s_[:, ::2, 1:], np.s_[:, ::-1, :20], np.s_[:1, 3:, 4:8], np.s_[:, :, ::-2]):
        K = x[view].shape[-1]
        check(cuda.matmul(d[view], e[1:1 + K] if K < 21 else e), x[view],
              w[1:1 + K] if K < 21 else w)
    one = np.broadcast_to(x[0, 0, :4], (6, 4))
    check(cuda.matmul(np.broadcast_to(d[0, 0, :4], (6, 4)), e[:4, ::2]), one, w[:4, ::2])


def test_nan_and_infinity_reach_their_rows_and_columns(normal):
    a, b = normal(np.float32, 5, 6), normal(np.float32, 6, 3)
    a[2, 1], b[0, 2] = np.nan, np.inf
    got = to_host(cuda.matmul(to_device(a), to_device(b)))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(a @ b))


@pytest.mark.parametrize("way", ["tf32", "3xtf32"])
def test_nan_and_infinity_on_tensor_cores(way, normal, monkeypatch):
    """As in float32, each kind at the same places: beside numbers that TF32 holds, whose rests are
    0, and others; in either operand, in both, against zeros, NaN with all bits."""
    monkeypatch.setattr(precision, "_chosen", way)
    a, b = normal(np.float32, 20, 9), normal(np.float32, 9, 12)
    a[:, 3], b[:, 4] = 1, 0.5
    a[0, 1], a[2, 2], a[5, 8] = np.inf, -np.inf, np.uint32(0x7FFFFFFF).view(np.float32)
    b[0, 3], b[2, 5], b[1, 7], b[7, 9] = np.inf, -np.inf, 0, np.nan
    a[9, 7], a[10, 3], b[3, 3] = 2.0**100, -np.inf, np.inf
    with np.errstate(invalid="ignore"):
        want, size = a @ b, np.abs(a) @ np.abs(b)
    got = to_host(cuda.matmul(to_device(a), to_device(b)))
    there = np.isfinite(want)
    np.testing.assert_array_equal(got[~there], want[~there])
    off = {"tf32": 2.0**-10, "3xtf32": 2.0**-20}[way] + 11 * 2.0**-24
    assert (np.abs(got[there] - want[there]) <= off * size[there]).all()
    assert {np.inf, -np.inf} <= set(want[~there])
    assert np.isnan(want).any()


def test_linear_and_its_gradients(normal):
    x, w, dy = (normal(np.float64, *s) for s in ((2, 3, 5), (4, 5), (2, 3, 4)))
    bias = normal(np.float64, 8)[::2]
    d = [*map(to_device, (dy, x, w))]
    np.testing.assert_allclose(to_host(cuda.linear(*d[1:], to_device(bias))),
                               reference.linear(x, w, bias), rtol=1e-13)
    for asked in (True, False):
        want = reference.linear_backward(dy, x, w, input_gradient=asked)
        for g, y in zip(cuda.linear_backward(*d, input_gradient=asked), want):
            np.testing.assert_allclose(to_host(g), y, rtol=1e-13, atol=1e-14)


def test_integers_are_numpys():
    a = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(to_host(cuda.matmul(to_device(a), to_device(a.T))), a @ a.T)


@pytest.mark.parametrize(("way", "bits"), [("tf32", 11), ("3xtf32", 21)])
def test_tensor_cores(way, bits, normal, monkeypatch, either_order):
    """TF32 rounds each number to 11 bits, two of them to 21 or more; sums are float32."""
    monkeypatch.setattr(precision, "_chosen", way)
    a, b, bias = normal(np.float32, 30, 20), normal(np.float32, 70, 20), normal(np.float32, 70)
    want = a.astype(np.float64) @ b.T.astype(np.float64) + bias
    size = np.abs(a) @ np.abs(b).T + np.abs(bias)
    for x, w in ((a, b), (np.asfortranarray(a), np.asfortranarray(b))):
        got = to_host(cuda.linear(to_device(x), to_device(w), to_device(bias)))
        error = np.abs(got - want) / size
        assert error.max() <= 2.0 ** (1 - bits) + 22 * 2.0**-24
        assert way == "3xtf32" or error.max() > 2.0**-17           # it is TF32


def test_what_multiplies_is_asked_for():
    with pytest.raises(ValueError, match=r"expected one of \['3xtf32', 'fma', 'tf32'\], got 'f16'"):
        precision.use("f16")
    assert precision.way(np.dtype(np.float32)) == "fma"
    try:
        precision.use("tf32")
        assert precision.way(np.dtype(np.float32)) == "tf32"
        assert precision.way(np.dtype(np.float64)) == "fma"
    finally:
        precision.use("fma")


def test_float32s_precision_by_pytorchs_name(monkeypatch):
    """Remembered until there is a device, and then what multiplies."""
    import nbgrad
    from nbgrad import backend

    monkeypatch.setattr(precision, "_chosen", "fma")
    monkeypatch.setattr(backend, "_precision", "highest")
    monkeypatch.setattr(backend, "_cuda", None)
    single = np.dtype(np.float32)
    assert nbgrad.get_float32_matmul_precision() == "highest"
    nbgrad.set_float32_matmul_precision("high")
    assert precision.way(single) == "fma"
    nbgrad.ones(1, device="cuda")
    assert precision.way(single) == "tf32"
    for name, way in (("highest", "fma"), ("3xtf32", "3xtf32"), ("medium", "tf32")):
        nbgrad.set_float32_matmul_precision(name)
        assert (precision.way(single), nbgrad.get_float32_matmul_precision()) == (way, name)
    with pytest.raises(ValueError, match=r"expected 'highest', '3xtf32', .*'medium', got 'low'"):
        nbgrad.set_float32_matmul_precision("low")
    assert nbgrad.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 7, 3), (66, 3, 40)])
def test_halves(name, sizes, normal, monkeypatch, either_order):
    """Products of halves are exact in float32; K sums of it, in parts or not, and one rounding."""
    pytest.importorskip("ml_dtypes")
    dtype, (M, N, K) = np.dtype(name), sizes
    unit = 2.0**-11 if name == "float16" else 2.0**-8
    a, b, bias = (normal(np.float32, *s).astype(dtype) for s in ((M, K), (N, K), (N,)))
    d = [*map(to_device, (a, b, bias))]
    wide = [x.astype(np.float64) for x in (a, b, bias)]
    want = wide[0] @ wide[1].T + wide[2]
    size = np.abs(wide[0]) @ np.abs(wide[1]).T + np.abs(wide[2])
    bound = unit * np.abs(want) + (K + 2) * 2.0**-23 * size + 2.0**-25
    for deep in (tile.DEEP, 4):
        monkeypatch.setattr(tile, "DEEP", deep)
        y = to_host(cuda.linear(*d))
        assert y.dtype == dtype
        assert (np.abs(y.astype(np.float64) - want) <= bound).all()
        z = to_host(cuda.matmul(to_device(np.asfortranarray(a)), d[1].T)).astype(np.float64)
        assert (np.abs(z - want + wide[2]) <= bound + unit * np.abs(wide[2])).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_halves_in_batches_and_gradients(name, normal, monkeypatch):
    """As float32's of the same numbers, rounded; and so it is without tensor cores."""
    pytest.importorskip("ml_dtypes")
    unit = 2.0**-10 if name == "float16" else 2.0**-7
    x, w, dy = (normal(np.float32, *s).astype(name) for s in ((2, 3, 5), (4, 5), (2, 3, 4)))
    wide = [v.astype(np.float64) for v in (dy, x, w)]
    for tensor_cores in (True, False):
        monkeypatch.setattr(precision, "multiplies_halves", lambda on=tensor_cores: on)
        got = cuda.linear_backward(*map(to_device, (dy, x, w)), input_gradient=True)
        for g, y in zip(got, reference.linear_backward(*wide, input_gradient=True)):
            assert g.dtype == x.dtype
            np.testing.assert_allclose(to_host(g).astype(np.float64), y, rtol=unit, atol=1e-5)
        b = normal(np.float32, 3, 1, 5, 9).astype(name)
        y = to_host(cuda.matmul(to_device(x), to_device(b)))
        want = x.astype(np.float64) @ b.astype(np.float64)
        assert y.shape == want.shape == (3, 2, 3, 9)
        np.testing.assert_allclose(y.astype(np.float64), want, rtol=unit, atol=1e-5)
    assert to_host(cuda.matmul(to_device(x[:, :, :0]), to_device(b[0, 0, :0]))).sum() == 0
