"""The benchmark's table: every case by group, its arguments, who takes part, what it must cost.

``op`` names a function in ``on_nbgrad``, ``on_torch`` and ``on_numpy`` and ``settings`` are its
arguments. ``bytes`` is what any algorithm must move between the operands and the result, each once;
``flops`` counts additions, multiplications and comparisons, a function such as exp as one.
"""

from math import prod
from typing import Any, NamedTuple

from . import cases, ladder

__all__ = ["GROUPS", "MACHINE", "Case", "table"]

OURS, TORCH, LAST, NUMPY = "nbgrad", "torch", "torch channels-last", "numpy"
COMPOSED = "nbgrad composed"
LAYOUTS = (OURS, TORCH, LAST)


class Case(NamedTuple):
    """One measured call. A side is a library, then in some cases how it is used."""

    group: str
    kind: str                      # geometric means are taken over the cases of a kind
    name: str
    op: str
    settings: dict[str, Any]
    sides: tuple[str, ...]         # ours first
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"
    random: bool = False           # sides draw their own numbers: results cannot be compared

    @property
    def label(self):
        """Unique within the group."""
        return f"{self.kind}, {self.name}"


def _x(*numbers):
    return "x".join(map(str, numbers))


def _cut(shape, limit):
    return shape if limit is None else tuple(min(n, limit) for n in shape)


def _cut_conv(c, limit):
    if limit is None:
        return c
    N, C, H, W = c.x
    I, J = c.weight[2:]
    x = (min(N, 2), min(C, limit), min(H, limit + I), min(W, limit + J))
    groups = x[1] if c.groups > 1 else 1
    return c._replace(x=x, weight=(min(c.weight[0], limit), x[1] // groups, I, J), groups=groups)


def _matmul(limit):
    variants = [(shape, "float32", "") for shape in cases.BENCH_MATMUL]
    variants += [((512,) * 3, "float32", t) for t in ("a", "b", "ab")]
    variants += [((1024,) * 3, "float32", t) for t in ("a", "b")]
    variants += [((n,) * 3, "float64", "") for n in (128, 512, 1024)]
    for shape, dtype, transposed in variants:
        M, K, N = _cut(shape, limit)
        name = str(shape[0]) if len(set(shape)) == 1 else _x(*shape)
        name += "".join(f", {t} transposed" for t in transposed)
        yield Case("matmul", dtype, name, "matmul",
                   {"M": M, "K": K, "N": N, "dtype": dtype, "transposed": transposed},
                   (OURS, NUMPY, TORCH), 2 * M * K * N,
                   (M * K + K * N + M * N) * (4 if dtype == "float32" else 8), dtype)


def _conv(limit):
    for conv in cases.BENCH_CONV:
        c = _cut_conv(conv, limit)
        (N, _, H, W), (O, _, I, J) = c.x, c.weight
        P, Q = ((n + 2 * p - k) // s + 1
                for n, p, k, s in zip((H, W), c.padding, (I, J), c.stride))
        flops = 2 * N * P * Q * prod(c.weight)
        nbytes = 4 * (prod(c.x) + prod(c.weight) + N * O * P * Q)
        for kind in ("forward", "input gradient", "weight gradient"):
            yield Case("conv", kind, conv.name, "conv_" + kind.replace(" ", "_"),
                       {"conv": c, "size": (P, Q)}, LAYOUTS, flops, nbytes)


def _norm(limit):
    for whole in cases.BENCH_NORM:
        shape = _cut(whole, limit)
        n, name = prod(shape), _x(*whole)
        images = len(shape) == 4
        for layout in ("NCHW", "channels-last") if images else ("rows",):
            both = {"shape": shape, "layout": layout}
            sides = LAYOUTS if images else (OURS, TORCH)
            for way, flops, moved in (("forward", 8, 2), ("backward", 10, 3)):
                yield Case("norm", f"{way} {layout}", name, f"batch_norm_{way}", both, sides,
                           flops * n, 4 * moved * n)
            if images:
                yield Case("norm", f"evaluation {layout}", name, "batch_norm_evaluation", both,
                           sides, 2 * n, 8 * n)
                # forward: x, r, y. backward: dy, x, the sign of y (a byte would do), dx, dr
                yield Case("norm", f"+ add + relu, both ways, {layout}", name,
                           "batch_norm_add_relu", both, sides, 22 * n, (12 + 17) * n)
    yield from _sample_norms(limit)
    yield from _other_norms(limit)
    for whole in cases.BENCH_SMALL_NORM:
        shape = _cut(whole, limit)
        n = prod(shape)
        yield Case("norm", "small, recorded, both ways", _x(*whole), "recorded_batch_norm",
                   {"shape": shape}, (OURS, TORCH), 18 * n, 20 * n)


def _sample_norms(limit):
    """Norms of single samples, one way at a time: (operations per element, arrays moved)."""
    ways = ("forward", 8, 2), ("backward", 10, 3)
    for whole, groups in cases.BENCH_GROUP_NORM:
        kind, shape = "instance" if groups == whole[1] else "group", _cut(whole, limit)
        n = prod(shape)
        if limit:
            groups = shape[1] if kind == "instance" else 2
        for layout in ("NCHW", "channels-last"):
            for way, flops, moved in ways:
                yield Case("norm", f"{kind} {way} {layout}", _x(*whole), f"{kind}_norm_{way}",
                           {"shape": shape, "groups": groups, "layout": layout}, LAYOUTS, flops * n,
                           4 * moved * n)
    for whole in cases.BENCH_ROW_NORM:
        shape = _cut(whole, limit)
        for kind in ("layer", "rms"):
            for way, flops, moved in ways:
                yield Case("norm", f"{kind} {way} rows", _x(*whole), f"{kind}_norm_{way}",
                           {"shape": shape}, (OURS, TORCH), flops * prod(shape),
                           4 * moved * prod(shape))


# {name: (settings, operations per element)}
FUNCTIONS = {"local_response_norm": ({"size": 5}, 20), "normalize": ({}, 8)}
WEIGHTS = ("weight standardization", "weight norm", "spectral norm")
BOTH = ("ghost", "filter response", "filter response, TLU", "weight standardization")
ONCE = ("renorm", "EvoNorm B0", "EvoNorm S0", "global response", "absolute deviation",
        "masked", "masked by weights", "sync", "switchable", "decorrelated", "ℓ3", "ℓ∞",
        "mean-only", "split", "noisy", "weight norm", "spectral norm")


def _other_norms(limit):
    """Both ways, recorded: against PyTorch what it has, the others against elementary ops. At least
    x, y, dy, x again and dx are moved."""
    for f, (settings, flops) in FUNCTIONS.items():
        shape = _cut(cases.BENCH_OTHER_NORM, limit)
        yield Case("norm", f"{f.replace('_', ' ')}, both ways", _x(*cases.BENCH_OTHER_NORM),
                   "recorded_norm", {"shape": shape, "f": f, "settings": settings}, LAYOUTS,
                   flops * prod(shape), 20 * prod(shape))
    for name in BOTH + ONCE:
        whole = cases.BENCH_WEIGHT if name in WEIGHTS else cases.BENCH_OTHER_NORM
        shape = whole if limit is None else (16, 8, 2, 2)        # ghosts and groups want to divide
        for layout in ("NCHW", "channels-last") if name in BOTH else ("NCHW",):
            yield Case("norm", f"{name}, both ways", f"{_x(*whole)}, {layout}", "other_norm",
                       {"name": name, "shape": shape, "layout": layout}, (OURS, COMPOSED),
                       18 * prod(shape), 20 * prod(shape))


# {op: (arrays read and written, operations per element, NumPy has it)}
POINTWISE = {"relu": (2, 1, True), "add": (3, 1, True), "exp": (2, 1, True), "tanh": (2, 1, True),
             "gelu": (2, 4, False), "relu_backward": (3, 1, False), "gelu_backward": (3, 8, False),
             "dropout": (2, 2, False)}
SUMS = [("all", None), ("rows", (1,)), ("columns", (0,))]
OPTIMIZERS = {"SGD": (3, 2), "SGD momentum": (5, 4), "Adam": (7, 12)}      # arrays, operations


def _elementwise(limit):
    for whole in cases.BENCH_ELEMENTWISE:
        shape = _cut(whole, limit)
        n, name = prod(shape), _x(*whole)

        def case(op, settings, moved, flops, numpy=False, n=n, shape=shape, name=name, kind=None):
            return Case("elementwise", kind or op, name, op, {"shape": shape, **settings},
                        (OURS, TORCH, NUMPY) if numpy else (OURS, TORCH), flops * n, 4 * moved * n,
                        random=kind == "dropout")
        for f, (moved, flops, numpy) in POINTWISE.items():
            yield case("pointwise", {"f": f}, moved, flops, numpy, kind=f)
        for f in ("softmax", "log_softmax"):
            yield case(f, {}, 2, 5)
        yield case("layer_norm_forward", {}, 2, 8)
        yield case("layer_norm_backward", {}, 3, 10)
        for over, axes in SUMS:
            yield case("sum", {"axes": axes}, 1, 1, True, kind=f"sum over {over}")
    yield from _losses(limit)
    yield from _images(limit)
    for f, (moved, flops) in OPTIMIZERS.items():
        for name in ("resnet20", "16 x 1M"):
            size = 8 * 64 if limit else 1 << 20
            shapes = None if name == "resnet20" else [(size // 64, 64)] * 16
            n = 269722 if shapes is None else 16 * size
            yield Case("elementwise", f"{f} step", name, "optimizer_step",
                       {"f": f, "shapes": shapes}, (OURS, TORCH), flops * n, 4 * moved * n,
                       random=shapes is None)


def _losses(limit):
    for whole in cases.BENCH_LOSS:
        shape = _cut(whole, limit)
        yield Case("elementwise", "cross_entropy, both ways", _x(*whole), "recorded_cross_entropy",
                   {"shape": shape}, (OURS, TORCH), 10 * prod(shape), 12 * prod(shape))


def _images(limit):
    whole = (128, 64, 32, 32)
    shape = _cut(whole, limit)
    yield Case("elementwise", "sum over N, H, W", _x(*whole), "sum",
               {"shape": shape, "axes": (0, 2, 3)}, (OURS, TORCH, NUMPY), prod(shape),
               4 * prod(shape))
    for pool in cases.BENCH_POOL:
        p = pool if limit is None else pool._replace(x=_cut(pool.x, limit))
        P, Q = ((n + 2 * pad - k) // s + 1
                for n, pad, k, s in zip(p.x[2:], p.padding, p.kernel_size, p.stride))
        taps, windows = prod(p.kernel_size), prod(p.x[:2]) * P * Q
        for f in ("max_pool", "avg_pool"):
            for way in ("forward", "backward"):
                yield Case("elementwise", f"{f} {way}", p.name, f"{f}_{way}",
                           {"pool": p, "size": (P, Q)}, LAYOUTS, taps * windows,
                           4 * (prod(p.x) + windows))


def _step(limit):
    compiled = (OURS, TORCH, "torch compiled")
    for name, batch, size, sides in (
            ("resnet20", 128, 32, (OURS, TORCH, LAST, "torch compiled")),
            ("lenet", 64, 28, compiled), ("mlp", 60, 28, compiled)):
        yield Case("step", "training step", f"{name}, batch {batch}", "training_step",
                   {"model": name, "batch": min(batch, limit or batch), "size": size}, sides,
                   random=True)


def _scaling(limit):
    """The same work on one thread; all of it fits into the second-level caches."""
    sides = tuple(f"{lib}{how}" for lib in (OURS, TORCH) for how in ("", " one thread"))
    conv = _cut_conv(cases.RESNET20[-1]._replace(x=(8, 64, 8, 8)), limit)
    shape = _cut((128, 1024), limit)
    n = min(384, limit or 384)
    how = {"M": n, "K": n, "N": n, "dtype": "float32", "transposed": ""}
    yield Case("scaling", "threads", "matmul 384", "matmul", how, sides, 2 * n ** 3)
    yield Case("scaling", "threads", "conv 64->64 3x3 @8, batch 8", "conv_forward",
               {"conv": conv, "size": conv.x[2:]}, sides,
               2 * conv.x[0] * prod(conv.x[2:]) * prod(conv.weight))
    for f in ("tanh", "gelu"):
        yield Case("scaling", "threads", f"{f} {_x(128, 1024)}", "pointwise",
                   {"shape": shape, "f": f}, sides)


def _ladder(limit):
    """One kernel from naive to fast: every rung is a side, see ladder.py."""
    for case in ladder.table(limit):
        yield Case("ladder", *case)


GROUPS = {"matmul": _matmul, "conv": _conv, "norm": _norm, "elementwise": _elementwise,
          "step": _step, "scaling": _scaling, "ladder": _ladder}

# The ceilings, measured before everything else: 64 MB copied, which no cache here holds, and
# multiply-adds in registers.
_COPY, _FMA = 64 << 20, 32 * 12 * 16 * 2 * 20_000
MACHINE = [
    Case("machine", "machine", "copy", "copy", {"nbytes": _COPY}, (OURS,), bytes=2 * _COPY),
    *(Case("machine", "machine", f"fma {dtype}", "fma", {"dtype": dtype, "flops": _FMA}, (OURS,),
           _FMA, dtype=dtype) for dtype in ("float32", "float64")),
]


def table(group, limit=None):
    """The cases of a group; ``limit`` cuts every length to that, for trying them out."""
    if group == "machine":
        return MACHINE
    return list(GROUPS[group](limit))
