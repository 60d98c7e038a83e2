"""Every op against PyTorch: value, shape, dtype, and the gradient of every floating input."""

import math
import warnings

import numpy as np
import pytest

import nbgrad

torch = pytest.importorskip("torch")
F32, F64 = np.float32, np.float64
RNG = np.random.default_rng(0)


class Torch:
    """torch and torch.nn.functional under one name, as nbgrad's functions are."""

    def __getattr__(self, name):
        home = torch.nn.functional if hasattr(torch.nn.functional, name) else torch
        return getattr(home, name)


def normal(*shape):
    return RNG.standard_normal(shape)


def positive(*shape):
    return RNG.uniform(0.2, 3, shape)


def ties(*shape):
    """Multiples of a half: equal neighbours, bounds that are met exactly."""
    return RNG.integers(-3, 4, shape) / 2


def classes(*shape, C=5):
    return RNG.integers(0, C, shape)


def mask(*shape):
    return RNG.random(shape) < 0.5


X, P, V = (3, 4, 5), (2, 3, 7, 6), (4,)
ELEMENTWISE = {                            # name: (function of a namespace and tensors, inputs)
    "add": (lambda F, a, b: F.add(a, b, alpha=0.5), normal(*X), normal(5)),
    "add operator": (lambda F, a, b: a + b + 1 + 2.5, normal(*X), normal(4, 1)),
    "sub": (lambda F, a, b: F.sub(a, b, alpha=3), normal(*X), normal(5)),
    "rsub": (lambda F, a: 1 - a, normal(*X)),
    "mul": (lambda F, a, b: a * b, normal(1, 4, 1), normal(3, 1, 5)),
    "div": (lambda F, a, b: a / b, normal(*X), positive(3, 1, 1)),
    "rdiv": (lambda F, a: 2 / a, positive(*X)),
    "pow of tensors": (lambda F, a, b: a ** b, positive(*X), normal(5)),
    "pow 2": (lambda F, a: a ** 2, normal(*X)),
    "pow 3": (lambda F, a: a ** 3, normal(*X)),
    "pow -1": (lambda F, a: a ** -1, positive(*X)),
    "pow .5": (lambda F, a: F.pow(a, 0.5), positive(*X)),
    "rpow": (lambda F, a: 2 ** a, normal(*X)),
    "pow of zero": (lambda F, a: a ** 2.5 + a ** 0 + a ** 1, np.array([0.0, 1.0, 2.0])),
    "neg": (lambda F, a: -a, normal(*X)),
    "abs": (lambda F, a: abs(a), ties(*X)),
    "floor ceil round trunc": (lambda F, a: a.floor() + 10 * a.ceil() + 100 * a.round()
                               + 1000 * a.trunc(),
                               ties(*X)),
    "floor_divide": (lambda F, a, b: a.detach() // b.detach(), normal(*X), positive(5)),
    "remainder": (lambda F, a, b: a.detach() % b.detach(), normal(*X), positive(5)),
    "maximum": (lambda F, a, b: F.maximum(a, b), ties(*X), ties(5)),
    "minimum": (lambda F, a, b: F.minimum(a, b), ties(*X), ties(5)),
    "clamp": (lambda F, a: F.clamp(a, -0.5, 1), ties(*X)),
    "clamp min": (lambda F, a: a.clamp(min=0.5), ties(*X)),
    "clamp max": (lambda F, a: a.clamp(max=0.5), ties(*X)),
    "clamp tensors": (lambda F, a, b, c: F.clamp(a, b, c), normal(*X), -positive(5), positive(5)),
    "where": (lambda F, c, a, b: F.where(c, a, b), mask(*X), normal(*X), normal(5)),
    "where number": (lambda F, c, a: F.where(c, a, -1.0), mask(4, 1), normal(*X)),
    "masked_fill": (lambda F, a, c: a.masked_fill(c, 7), normal(*X), mask(4, 5)),
    "relu": (lambda F, a: F.relu(a), ties(*X)),
    "leaky_relu": (lambda F, a: F.leaky_relu(a, 0.2), ties(*X)),
    "elu": (lambda F, a: F.elu(a, 0.7), ties(*X)),
    "gelu": (lambda F, a: F.gelu(a), normal(*X)),
    "gelu tanh": (lambda F, a: F.gelu(a, approximate="tanh"), 2 * normal(*X)),
    "silu": (lambda F, a: F.silu(a), 5 * normal(*X)),
    "softplus": (lambda F, a: F.softplus(a), 20 * normal(*X)),
    "softplus threshold": (lambda F, a: F.softplus(a, beta=2.0, threshold=1.0), ties(*X) + 0.1),
    **{name: (lambda F, a, name=name: getattr(F, name)(a), make(*X)) for names, make in {
        "exp expm1 sigmoid tanh sin cos erf square sign": normal,
        "log log1p sqrt rsqrt reciprocal": positive}.items() for name in names.split()},
    "comparisons": (lambda F, a, b: (a < b) | (a >= b + 1) & (a != 0.5) ^ (a == b) & ~(a > 1),
                    ties(*X), ties(5)),
    "composite": (lambda F, a, b: F.tanh(a * F.exp(b)).sum(1) / (1 + (a - b).square().mean(1)),
                  normal(*X), normal(5)),
}

REDUCE = {
    **{f"{name} {dim} {keep}": (lambda F, a, name=name, dim=dim, keep=keep: getattr(F, name)(
        a, dim=dim, keepdim=keep), ties(*X) + 0.1)
       for name in ("sum", "mean", "amax", "amin", "var", "std")
       for dim, keep in ((-1, False), (0, True), ((0, -1), False), ((1, 2), True),
                         ((0, 1, 2), False))},
    **{name: (lambda F, a, name=name: getattr(F, name)(a), ties(*X) + 0.1)
       for name in ("sum", "mean", "amax", "amin", "var", "std", "prod", "max", "min")},
    "var unbiased": (lambda F, a: a.var(1, unbiased=False)
                     + a.var(1, unbiased=True, keepdim=True).sum(),
                     normal(*X)),
    "var correction": (lambda F, a: F.var(a, dim=1, correction=0) + F.std(a, dim=1, correction=2),
                       normal(*X)),
    "prod dim": (lambda F, a: F.prod(a, 1), normal(*X)),
    "prod one zero": (lambda F, a: F.prod(a, -1, keepdim=True), np.array([[1.0, 0, 3], [4, 5, 6]])),
    "prod two zeros": (lambda F, a: F.prod(a), np.array([2.0, 0, 3, 0])),
    "max dim": (lambda F, a: F.max(a, 1).values, normal(*X)),
    "max indices": (lambda F, a: F.max(a, -1, keepdim=True).indices, normal(*X)),
    "min dim": (lambda F, a: F.min(a, 0, keepdim=True)[0], normal(*X)),
    "max tensors": (lambda F, a, b: F.max(a, b) + F.min(a, b), ties(*X), ties(*X)),
    "argmax": (lambda F, a: a.argmax(), normal(*X)),
    "argmin dim": (lambda F, a: a.argmin(1, keepdim=True), normal(*X)),
    "all any": (lambda F, c: F.all(c, 1) | F.any(c, 1), mask(*X)),
    "logsumexp": (lambda F, a: F.logsumexp(a, 1), 100 * normal(*X)),
    "logsumexp dims": (lambda F, a: F.logsumexp(a, (0, -1), True), normal(*X)),
    "norm": (lambda F, a: torch.linalg.vector_norm(a) if F is not nbgrad else F.norm(a),
             normal(*X)),
    **{f"norm {p}": (lambda F, a, p=p: a.norm(p, dim=1), normal(*X))
       for p in (1, 2, 3, 2.5, float("inf"))},
    "norm of dims": (lambda F, a: a.norm(2, dim=(0, 1), keepdim=True), normal(*X)),
    **{f"norm {p} at zero": (lambda F, a, p=p: a.norm(p, dim=1),
                             np.array([[0.0, 0], [3, 4], [0, 2]]))
       for p in (0.5, 1, 1.5, 2, 3, math.inf)},
    "cumsum": (lambda F, a: F.cumsum(a, 1), normal(*X)),
    "softmax": (lambda F, a: F.softmax(a, 1), 50 * normal(*X)),
    "softmax last": (lambda F, a: a.softmax(-1) + a.log_softmax(0), 3 * normal(*X)),
    "log_softmax": (lambda F, a: F.log_softmax(a, dim=-2), 50 * normal(*X)),
}

I = np.array([2, 0, 2])
INDEX = {
    "int": (lambda F, a: a[1], normal(*X)),
    "negative": (lambda F, a: a[-1, -2], normal(*X)),
    "slices": (lambda F, a: a[1:, ::2, 1:-1], normal(*X)),
    "ellipsis": (lambda F, a: a[..., 1:3], normal(*X)),
    "none": (lambda F, a: a[:, None, 1, ..., None], normal(*X)),
    "mask": (lambda F, a, c: a[c], normal(*X), mask(*X)),
    "mask of dims": (lambda F, a, c: a[:, c], normal(*X), mask(4, 5)),
    "ints": (lambda F, a, i: a[i], normal(*X), I),
    "list": (lambda F, a: a[[0, 0, 2]], normal(*X)),
    "ints and slice": (lambda F, a, i: a[i, 1:], normal(*X), I),
    "two ints": (lambda F, a, i, j: a[:, i, j], normal(*X), I, np.array([[0], [4]])),
    "split ints": (lambda F, a, i: a[i, :, i], normal(*X), I),
    "index_select": (lambda F, a, i: F.index_select(a, 1, i), normal(*X), I),
    "gather": (lambda F, a, i: F.gather(a, 1, i), normal(*X), RNG.integers(0, 4, (2, 6, 5))),
    "gather negative": (lambda F, a, i: a.gather(-1, i), normal(*X), RNG.integers(0, 5, (3, 4, 2))),
}

SHAPE = {
    "reshape": (lambda F, a: a.reshape(2, -1) * 2, normal(*X)),
    "view": (lambda F, a: a.view(-1, 5), normal(*X)),
    "flatten": (lambda F, a: a.flatten(1) * 2, normal(*X)),
    "flatten dims": (lambda F, a: F.flatten(a, 0, -2), normal(*X)),
    "transpose": (lambda F, a: a.transpose(0, -1), normal(*X)),
    "permute": (lambda F, a: a.permute(2, 0, 1).contiguous(), normal(*X)),
    "T mT": (lambda F, a: a.mT @ a.mT.mT, normal(*X)),
    "squeeze": (lambda F, a: a.squeeze() * 1, normal(3, 1, 4, 1)),
    "squeeze dim": (lambda F, a: a.squeeze(-1).squeeze(0), normal(3, 1, 4, 1)),
    "unsqueeze": (lambda F, a: a.unsqueeze(-1).unsqueeze(1), normal(*X)),
    "expand": (lambda F, a: a.expand(2, -1, 5), normal(4, 1)),
    "broadcast_to": (lambda F, a: F.broadcast_to(a, (2, 4, 5)), normal(4, 1)),
    "repeat": (lambda F, a: a.repeat(2, 1, 3), normal(4, 2)),
    "cat": (lambda F, a, b: F.cat([a, b, a], 1), normal(3, 4), normal(3, 2)),
    "cat last": (lambda F, a, b: F.cat((a, b), dim=-1), normal(2, 3, 4), normal(2, 3, 1)),
    "stack": (lambda F, a, b: F.stack([a, b], dim=1), normal(3, 4), normal(3, 4)),
    "stack last": (lambda F, a, b: F.stack([a, b], -1), normal(3, 4), normal(3, 4)),
    "split": (lambda F, a: F.split(a, 2, 1)[1] + F.split(a, [1, 2, 2], dim=1)[2], normal(3, 5)),
    "split rest": (lambda F, a: F.split(a, 2, -1)[-1], normal(3, 5)),
    "chunk": (lambda F, a: F.chunk(a, 3, 1)[0] + a.chunk(3, 1)[1], normal(3, 5)),
    "chunk rest": (lambda F, a: a.chunk(4, dim=1)[-1], normal(3, 6)),
    "unbind": (lambda F, a: a.unbind(1)[2] * a.unbind(1)[0], normal(*X)),
    "pad": (lambda F, a: F.pad(a, (1, 2)), normal(*X)),
    "pad dims": (lambda F, a: F.pad(a, (1, 0, 0, 2, 1, 1), value=3.5), normal(*X)),
    "pad reflect": (lambda F, a: F.pad(a, (1, 0, 2, 4), mode="reflect"), normal(*P)),
    "pad replicate": (lambda F, a: F.pad(a, (0, 7, 2, 1), mode="replicate"), normal(*P)),
    "pad circular": (lambda F, a: F.pad(a, (6, 1), mode="circular"), normal(*P)[0]),
    "crop": (lambda F, a: F.pad(a, (-1, 2, 1, -2)), normal(*X)),
    "flip": (lambda F, a: a.flip(0) + F.flip(a, (0, 2)), normal(*X)),
    "roll": (lambda F, a: a.roll(2, 1) + F.roll(a, -7, 2), normal(*X)),
    "roll dims": (lambda F, a: F.roll(a, (1, -2), (0, 2)), normal(*X)),
    "roll flat": (lambda F, a: F.roll(a, 3), normal(*X)),
    "tril": (lambda F, a: F.tril(a) + a.tril(-1) + a.tril(2), normal(*X)),
    "triu": (lambda F, a: F.triu(a) + a.triu(-1) + a.triu(2), normal(*X)),
    "clone": (lambda F, a: a.clone(), normal(*X)),
    "cast": (lambda F, a: a.float() * 2 + a.double(), normal(*X)),
}

MATMUL = {
    **{f"matmul {a} {b}": (lambda F, a, b: F.matmul(a, b) if a.ndim < 3 else a @ b, normal(*a),
                           normal(*b))
       for a, b in (((3, 4), (4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)),
                    ((2, 3, 4), (4, 5)), ((4,), (2, 4, 5)),
                    ((2, 3, 4), (4,)), ((2, 1, 3, 4), (5, 4, 2)), ((3, 0), (0, 5)),
                    ((0, 3), (3, 2)))},
    "linear": (lambda F, x, w, b: F.linear(x, w, b), normal(3, 4), normal(5, 4), normal(5)),
    "linear rows": (lambda F, x, w: F.linear(x, w), normal(2, 3, 4), normal(5, 4)),
    "linear vector": (lambda F, x, w, b: F.linear(x, w, b), normal(4), normal(5, 4), normal(5)),
}

WINDOWS = {
    **{f"conv2d {how}": (lambda F, x, w, b, how=how: F.conv2d(x, w, b, **how), normal(2, 4, 7, 6),
                         normal(6, 4 // how.get("groups", 1), *kernel), normal(6))
       for kernel, how in (
        ((3, 3), {}), ((3, 2), {"stride": 2, "padding": 1}),
        ((3, 3), {"padding": "same", "dilation": 2}),
        ((2, 3), {"padding": "valid", "stride": (2, 1)}), ((1, 1), {"groups": 2}),
        ((3, 3), {"dilation": (1, 2)}),
        ((2, 2), {"padding": (0, 2), "groups": 2, "stride": (1, 3)}))},
    "conv2d depthwise": (lambda F, x, w: F.conv2d(x, w, groups=4, padding=1), normal(2, 4, 5, 5),
                         normal(4, 1, 3, 3)),
    "conv2d even same": (lambda F, x, w: F.conv2d(x, w, padding="same"), normal(2, 3, 5, 5),
                         normal(4, 3, 2, 4)),
    **{f"conv_transpose2d {how}": (
        lambda F, x, w, b, how=how: F.conv_transpose2d(x, w, b, *how), normal(2, 4, 4, 3),
        normal(4, 3, *kernel), normal(3 * how[3]))
       for kernel, how in (              # stride, padding, output_padding, groups, dilation
        ((3, 3), (1, 0, 0, 1, 1)), ((3, 2), (2, 1, 1, 1, 1)), ((2, 3), ((3, 1), (0, 2), 0, 2, 1)),
        ((3, 3), (1, 1, 2, 1, 3)), ((2, 2), (2, 1, (2, 1), 2, (3, 1))), ((1, 1), (3, 0, 2, 4, 1)))},
    **{f"max_pool2d {how}": (lambda F, x, how=how: F.max_pool2d(x, **how), normal(*P)) for how in (
        {"kernel_size": 2}, {"kernel_size": (3, 2), "stride": 1, "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True},
        {"kernel_size": 2, "dilation": 2, "stride": (1, 2)},
        {"kernel_size": 3, "stride": 4, "padding": 1, "ceil_mode": True})},
    "max_pool2d integers": (lambda F, x: F.max_pool2d(x, 3, 2, 1), RNG.integers(-9, 0, P)),
    "max_pool2d bytes": (lambda F, x: F.max_pool2d(x[0], 2), RNG.integers(0, 256, P, np.uint8)),
    "max_pool2d indices": (lambda F, x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[1],
                           normal(*P)),
    **{f"avg_pool2d {how}": (lambda F, x, how=how: F.avg_pool2d(x, **how), normal(*P)) for how in (
        {"kernel_size": 2}, {"kernel_size": (3, 2), "stride": 1, "padding": 1},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": 3, "stride": 2, "ceil_mode": True, "count_include_pad": False},
        {"kernel_size": 3, "divisor_override": 5},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True})},
    **{f"adaptive_avg_pool2d {size}": (lambda F, x, size=size: F.adaptive_avg_pool2d(x, size),
                                       normal(*P))
       for size in (1, (3, 4), (None, 2), (9, 8))},
}

NORM = {
    "batch_norm": (lambda F, x, g, b: F.batch_norm(x, None, None, g, b, training=True), normal(*P),
                   normal(3), normal(3)),
    "batch_norm bare": (lambda F, x: F.batch_norm(x, None, None, training=True, eps=0.1),
                        normal(6, 3)),
    "batch_norm 3d": (lambda F, x, g: F.batch_norm(x, None, None, g, None, True), normal(4, 3, 5),
                      normal(3)),
    "batch_norm eval": (lambda F, x, m, v, g, b: F.batch_norm(
                            x, m.detach(), v.detach(), g, b, eps=1e-3), normal(*P),
                        normal(3), positive(3), normal(3), normal(3)),
    "layer_norm": (lambda F, x, g, b: F.layer_norm(x, (4, 5), g, b), normal(*X), normal(4, 5),
                   normal(4, 5)),
    "layer_norm bare": (lambda F, x: F.layer_norm(x, [5], eps=0.1), normal(*X)),
}

T, W = classes(6), positive(5)
T[1] = 3
WITH_IGNORED = np.where(np.arange(6) == 2, -100, T)
PIXELS = classes(2, 3, 4)
SOFT = positive(6, 5) / 7
LOSS = {
    **{f"cross_entropy {how}": (lambda F, x, t, w, how=how: F.cross_entropy(
                                    x, t, w.detach(), **how), normal(6, 5), T, W)
       for how in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.3},
                   {"ignore_index": 3},
                   {"ignore_index": 3, "label_smoothing": 0.1, "reduction": "none"})},
    "cross_entropy ignored": (lambda F, x, t: F.cross_entropy(x, t), normal(6, 5), WITH_IGNORED),
    "cross_entropy pixels": (lambda F, x, t, w: F.cross_entropy(
                                 x, t, w.detach(), label_smoothing=0.2),
                             normal(2, 5, 3, 4), PIXELS, W),
    "cross_entropy one": (lambda F, x, t: F.cross_entropy(x, t), normal(5), np.array(3)),
    "cross_entropy one none": (lambda F, x, t: F.cross_entropy(x, t, reduction="none"), normal(5),
                               np.array(3)),
    **{f"cross_entropy soft {how}": (lambda F, x, q, w, how=how: F.cross_entropy(x, q, w, **how),
                                     normal(6, 5), SOFT, W)
       for how in ({}, {"reduction": "sum"}, {"reduction": "none", "label_smoothing": 0.2})},
    "cross_entropy soft pixels": (lambda F, x, q: F.cross_entropy(x, q), normal(2, 5, 3),
                                  positive(2, 5, 3)),
    **{f"nll_loss {how}": (lambda F, x, t, w, how=how: F.nll_loss(x, t, w.detach(), **how),
                           normal(6, 5), T, W)
       for how in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3})},
    "nll_loss pixels": (lambda F, x, t: F.nll_loss(x, t), normal(2, 5, 3, 4), PIXELS),
    "nll_loss one": (lambda F, x, t: F.nll_loss(x, t), normal(5), np.array(3)),
    **{f"mse_loss {r}": (lambda F, x, t, r=r: F.mse_loss(x, t, reduction=r), normal(*X), normal(*X))
       for r in ("mean", "sum", "none")},
}
TABLE = {f"{name} of {group}" if group == "index" else name: case for group, cases in {
    "elementwise": ELEMENTWISE, "reduce": REDUCE, "index": INDEX, "shape": SHAPE, "matmul": MATMUL,
    "windows": WINDOWS, "norm": NORM, "loss": LOSS}.items() for name, case in cases.items()}


def run(F, make, f, arrays, seed):
    xs = [make(a) for a in arrays]
    for x, a in zip(xs, arrays):
        x.requires_grad_(a.dtype.kind == "f")
    with warnings.catch_warnings():
        if F is not nbgrad:
            warnings.simplefilter("ignore")
        y = f(F, *xs)
    value = y.detach().numpy()
    if y.requires_grad:
        dy = np.random.default_rng(seed).standard_normal(value.shape).astype(value.dtype)
        y.backward(make(dy))
    return value, [x.grad if x.grad is None else x.grad.detach().numpy() for x in xs]


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", TABLE)
def test_value_and_gradient(name, dtype):
    f, *arrays = TABLE[name]
    arrays = [a.astype(dtype) if a.dtype.kind == "f" else a for a in arrays]
    value, grads = run(nbgrad, nbgrad.tensor, f, arrays, 1)
    expected, slopes = run(Torch(), torch.tensor, f, arrays, 1)
    assert value.dtype == expected.dtype
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype is F64 else {"rtol": 3e-5, "atol": 1e-5}
    np.testing.assert_allclose(value, expected, **tolerance)
    assert value.shape == expected.shape
    for grad, slope, a in zip(grads, slopes, arrays):
        assert (grad is None) == (slope is None), "one has a gradient, the other none"
        if grad is not None:
            assert grad.dtype == a.dtype
            scale = max(1, np.abs(slope).max(initial=0))
            np.testing.assert_allclose(grad, slope, rtol=tolerance["rtol"],
                                       atol=tolerance["atol"] * scale)
