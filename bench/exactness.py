"""How exact the norms are: derivatives of every order, and float32 far from zero.

    python -m bench.exactness            measure, keep the results, write docs/exactness.md
    python -m bench.exactness --page     write the page from the results that are there

The k-th derivative of ⟨u, y⟩ is taken along k random directions v₁ … v_k of all inputs together, by
k backward passes. Beside it stand the same of a composition of elementary ops, and the central
difference along v_k of the derivative of the order below.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from . import measure

__all__ = ["CASES", "NORMS", "along", "derivatives", "difference", "error", "far_from_zero", "main",
           "page", "single"]

PAGE = measure.RESULTS.parent.parent / "docs" / "exactness.md"
RESULTS = measure.RESULTS / "exactness.csv"
FIELDS = ["date", "versions", "table", "norm", "case", "what", "side", "error"]
ORDERS = (1, 2, 3, 4)
EPS = 1e-2          # large enough for differences at a constant channel, whose scale is √eps
STEP = 1e-3         # of a fourth-order difference: errors of 1e-12 both ways
OFFSETS = (0.0, 1e1, 1e3, 1e4, 1e5, 1e6, 1e7)
SCALES = (1e-30, 1e-10, 1e10, 1e19, 1e30, 1e38)


def _axes(x, kind, groups=2):
    """The shape in which statistics are over some axes, and those axes."""
    N, C, *S = x.shape
    if kind == "batch":
        return x.shape, (0, *range(2, x.ndim))
    if kind in ("layer", "rms"):
        return x.shape, tuple(range(1, x.ndim))
    groups = C if kind == "instance" else groups
    return (N, groups, C // groups, *S), tuple(range(2, x.ndim + 1))


def composed(x, gamma, beta, kind, eps=EPS):
    """The norm in elementary operations that nbgrad and PyTorch both have."""
    shape, axes = _axes(x, kind)
    r = x.reshape(shape)
    xc = r if kind == "rms" else r - r.mean(axes, True)
    y = xc * ((xc * xc).mean(axes, True) + eps) ** -0.5
    own = x.shape[1:] if kind in ("layer", "rms") else (1, -1) + (1,) * (x.ndim - 2)
    y = y.reshape(x.shape) * gamma.reshape(own)
    return y if kind == "rms" else y + beta.reshape(own)


def fused(lib, kind, x, gamma, beta, eps=EPS):
    """The norm as the library's own function."""
    f = lib.nn.functional
    if kind == "batch":
        return f.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)
    if kind == "layer":
        return f.layer_norm(x, x.shape[1:], gamma, beta, eps)
    if kind == "rms":
        return f.rms_norm(x, x.shape[1:], gamma, eps)
    if kind == "group":
        return f.group_norm(x, 2, gamma, beta, eps)
    return f.instance_norm(x, None, None, gamma, beta, True, 0.1, eps)


NORMS = ("batch", "layer", "group", "instance", "rms")


def _inputs(kind, case, rng):
    shape = (4, 4, 1, 1) if case == "one spatial element" and kind != "instance" else (4, 4, 2, 3)
    if case == "one spatial element" and kind == "group":
        shape = (4, 4, 1)
    x = rng.standard_normal(shape)
    own = shape[1:] if kind in ("layer", "rms") else shape[1:2]
    gamma, beta = rng.standard_normal((2, *own))
    if case == "γ = 0":
        gamma[...] = 0
    elif case == "a constant channel":
        where = (slice(None), 1) if kind == "batch" else (1, slice(0, 2))
        x[where] = 0.7
        if kind in ("layer", "rms"):
            x[1] = 0.7
    elif case == "mean = 1e4 σ":
        x += 1e4
    return x, gamma, beta


CASES = ("random", "γ = 0", "a constant channel", "mean = 1e4 σ", "one spatial element")


def along(lib, f, xs, u, vs):
    """The derivative of ⟨u, f(xs)⟩ along vs, one after the other."""
    ts = [lib.tensor(x, requires_grad=True) for x in xs]
    s = (f(*ts) * lib.tensor(u)).sum()
    for v in vs:
        if not s.requires_grad:                      # a polynomial of x: no such derivative is left
            return 0.0
        found = lib.autograd.grad(s, ts, create_graph=True, allow_unused=True)
        s = sum((g * lib.tensor(d)).sum() for g, d in zip(found, v) if g is not None)
    return float(s.detach())


def difference(f, xs, v):
    """f′ along v by a central difference of fourth order."""
    at = {k: f([x + k * STEP * d for x, d in zip(xs, v)]) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP)


def derivatives(lib, kind, case, orders=ORDERS, seed=0):
    """{(order, "composition" or "differences"): relative error} of a library's own function."""
    rng = np.random.default_rng(seed)
    xs = _inputs(kind, case, rng)
    u, found = rng.standard_normal(xs[0].shape), {}
    vs = [[rng.standard_normal(x.shape) for x in xs] for _ in range(max(orders))]
    own, other = partial(fused, lib, kind), partial(composed, kind=kind)
    for k in orders:
        d = along(lib, own, xs, u, vs[:k])
        found[k, "composition"] = error(d, along(lib, other, xs, u, vs[:k]))
        below = difference(lambda at, k=k: along(lib, own, at, u, vs[:k - 1]), xs, vs[k - 1])
        found[k, "differences"] = error(d, below)
    return found


def error(a, b):
    return abs(a - b) / max(abs(a), abs(b), 1e-300)


# ---------------------------------------------------------------------------- float32 far from zero

def single(lib, kind, x, dy, layout):
    """y, ∂x and ∂γ in float32, as float64 arrays; x in the memory order ``layout`` names."""
    def given(a):
        t = lib.tensor(a.astype(np.float32))
        if layout == "channels-last":
            t = t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return t
    own = x.shape[1:] if kind in ("layer", "rms") else x.shape[1:2]
    t, gamma, beta = given(x).requires_grad_(), np.ones(own), np.zeros(own)
    gamma, beta = (lib.tensor(a.astype(np.float32), requires_grad=True) for a in (gamma, beta))
    y = fused(lib, kind, t, gamma, beta, 1e-5)
    dx, dgamma = lib.autograd.grad(y, (t, gamma), given(dy))
    return [np.asarray(a.detach().numpy(), np.float64) for a in (y, dx, dgamma)]


def exact(kind, x, dy):
    """The same in float64 by NumPy, of x as float32 holds it."""
    x, dy = x.astype(np.float32).astype(np.float64), dy.astype(np.float32).astype(np.float64)
    shape, axes = _axes(x, kind)
    r, g = x.reshape(shape), dy.reshape(shape)
    xc = r - (0 if kind == "rms" else r.mean(axes, keepdims=True))
    size = np.abs(xc).max() or 1.0                   # squares of 1e-200 and 1e200 are none
    var = ((xc / size) ** 2).mean(axes, keepdims=True)
    invstd = 1 / np.sqrt(var + 1e-5 / size ** 2) / size
    xhat = xc * invstd
    center = 0 if kind == "rms" else g.mean(axes, keepdims=True)
    dx = invstd * (g - center - xhat * (g * xhat).mean(axes, keepdims=True))
    over = (0,) if kind in ("layer", "rms") else (0, *range(2, x.ndim))
    y = xhat.reshape(x.shape)
    return y, dx.reshape(x.shape), (y * dy).sum(over)


def far_from_zero(lib, kind, offset, scale, layout, seed=0):
    """Largest errors of y, of ∂x and of ∂γ, relative to the largest element of each."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((32, 8, 16, 16)).clip(-3, 3) + offset) * scale    # 3e38 is not inf
    dy = rng.standard_normal(x.shape)
    found = []
    for got, want in zip(single(lib, kind, x, dy, layout), exact(kind, x, dy)):
        error = np.abs(got - want).max() / (np.abs(want).max() or 1.0)
        found.append(float(error) if np.isfinite(error) else float("inf"))
    return found


# ----------------------------------------------------------------------------------------- the page

def measured(libs):
    """Rows of both tables."""
    rows = []
    for side, lib in libs.items():
        for kind in NORMS:
            for case in CASES:
                for (k, by), error in derivatives(lib, kind, case).items():
                    rows.append(("derivatives", kind, case, f"{k}, {by}", side, error))
            for layout in ("NCHW", "channels-last"):
                for offset, scale in [(o, 1.0) for o in OFFSETS] + [(0.0, s) for s in SCALES]:
                    errors = far_from_zero(lib, kind, offset, scale, layout)
                    what = f"offset {offset:g}" if scale == 1 else f"scale {scale:g}"
                    rows += [("float32", kind, what, f"{name}, {layout}", side, error)
                             for name, error in zip(("y", "∂x", "∂γ"), errors)]
    return rows + _measured_others()


def _measured_others():
    from . import exact_others

    rows = []
    for name in exact_others.OTHERS:
        for case in CASES:
            rows += [("others", name, case, str(k), "nbgrad", error)
                     for k, error in exact_others.derivatives(name, case).items()]
    for name in (*exact_others.OTHERS, *exact_others.BENT):
        for layout in ("NCHW", "channels-last"):
            for offset, scale in exact_others.POINTS:
                found = exact_others.single(name, offset, scale, layout)
                what = f"offset {offset:g}" if scale == 1 else f"scale {scale:g}"
                rows += [("others, float32", name, what, f"{f}, {layout}", "nbgrad", error)
                         for f, error in zip(("y", "∂x", "∂γ"), found)]
    return rows


def _worst(rows, table, *what, **where):
    """The largest error of the rows that have those values, and those parts of ``what``."""
    found = [float(row["error"]) for row in rows
             if row["table"] == table and set(what) <= set(row["what"].split(", "))
             and all(row[key] == value for key, value in where.items())]
    return f"{max(found):.1e}" if found else ""


def _table(header, lines):
    rows = [header, ["---"] + ["--:"] * (len(header) - 1), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def page(rows):
    """docs/exactness.md from the rows of the results file."""
    sides = list(dict.fromkeys(row["side"] for row in rows))
    by_order = [[kind, side, *(_worst(rows, "derivatives", "composition", str(k), norm=kind,
                                      side=side) for k in ORDERS)]
                for kind in NORMS for side in sides]
    by_case = [[case, side, *(_worst(rows, "derivatives", "differences", case=case, side=side,
                                     norm=kind) for kind in NORMS)]
               for case in CASES for side in sides]
    words = list(dict.fromkeys(row["case"] for row in rows if row["table"] == "float32"))
    far = [[what, side, *(_worst(rows, "float32", f, case=what, side=side, norm=kind)
                          for kind in NORMS for f in ("y", "∂x", "∂γ"))]
           for what in words for side in sides]
    others = list(dict.fromkeys(row["norm"] for row in rows if row["table"] == "others"))
    orders = [[name, *(_worst(rows, "others", str(k), norm=name) for k in (1, 2, 3)),
               *(_worst(rows, "others", norm=name, case=case) for case in CASES)]
              for name in others]
    single = [row for row in rows if row["table"] == "others, float32"]
    parts = [[row for row in single if row["case"].startswith(word)] for word in ("off", "scale")]
    small = [[name, *(_worst(part, "others, float32", f, norm=name)
                      for part in parts for f in ("y", "∂x", "∂γ"))]
             for name in dict.fromkeys(row["norm"] for row in single)]
    return TEXT.format(
        others=_table(["norm", "1", "2", "3", *CASES], orders),
        others32=_table(["norm", *(f"{word} {f}" for word in ("offsets:", "scales:")
                                   for f in ("y", "∂x", "∂γ"))], small),
        offsets=", ".join(f"{o:g}" for o in OFFSETS), scales=", ".join(f"{s:g}" for s in SCALES),
        orders=_table(["norm", "", *map(str, ORDERS)], by_order),
        cases=_table(["case", "", *NORMS], by_case),
        float32=_table(["x", "", *(f"{kind} {f}" for kind in NORMS
                                   for f in ("y", "∂x", "∂γ"))], far),
        versions=rows[0]["versions"], date=rows[0]["date"][:10])


TEXT = """# How exact the norms are

Written by `python -m bench.exactness` from `bench/results/exactness.csv`. Smaller is better; 1
means that no digit is right.

## Derivatives to fourth order

float64. The derivative of ⟨u, y⟩ along random directions of x, γ and β together, by one backward
pass after the other through the fused kernels. The largest error relative to a composition of
elementary operations, over the cases of the next table, by order:

{orders}
By case, the largest over the orders, against central differences of fourth order of the derivative
below. They err themselves: by up to 1e-5 at a constant channel, where √ε = 0.1 is all that x has of
a scale.

{cases}
## float32, far from zero

x is (32, 8, 16, 16), normal (cut at 3) with mean `offset` and standard deviation 1, or mean 0 and
standard deviation `scale`. The largest errors of y, ∂x and ∂γ, relative to the largest element of
each, against float64 computed from the same float32 x, over NCHW and channels-last memory (`inf`: a
result that is not finite).

{float32}
## The other norms, derivatives to third order

float64, along random directions of x and all parameters together, against central differences of
fourth order of the derivative below: the largest over the cases by order, and over the orders by
case. Ghosts are of 2 samples, a mask weighs samples by ½ to 2. The draw is one in which no value
lies within a step of the kinks that TLU and EvoNorm B0 have; what has one for every channel (ℓ1 and
ℓ∞ batch norm) is in the tests, away from it.

{others}
## The other norms in float32, far from zero

x is (9, 4, 8, 8), normal (cut at 3) with mean {offsets}, or mean 0
times {scales}; ghosts are of 2 samples, and one of 1. The
largest errors of y, ∂x and, where there is γ, ∂γ, relative to the largest element of each, against
the same function in float64, over all of these and both memory formats. What float32 cannot hold
does not count. Of spectral norm, x is the weight, and the singular vectors have converged.

{others32}
{versions}; {date}.
"""


def main(argv=None):
    """Measure both libraries where they are installed; write results and page."""
    parser = argparse.ArgumentParser(prog="python -m bench.exactness",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the page again")
    if not parser.parse_args(argv).page:
        import nbgrad

        libs = {"nbgrad": nbgrad}
        try:
            import torch
            libs["torch"] = torch
        except ModuleNotFoundError:
            pass
        run = measure.where_and_when(1, ("nbgrad", "numpy", "numba", "torch"))
        rows = [dict(zip(FIELDS, (run["date"], run["versions"], *row[:5], f"{row[5]:.3g}")))
                for row in measured(libs)]
        measure.write(RESULTS, rows)
    PAGE.write_text(page(measure.read(RESULTS)), encoding="utf-8")
    print(Path(PAGE).name)


if __name__ == "__main__":
    main()
