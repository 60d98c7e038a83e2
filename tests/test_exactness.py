"""docs/exactness.md: the numbers that the page promises, measured again, and the page itself."""

from functools import partial

import numpy as np
import pytest

import nbgrad
from bench import exact_others, exactness, measure, other_norms

# float64 at |μ| = 1e4 σ has lost 4 of 16 digits before a norm sees it, in x and in every sum
ROUNDING = {"mean = 1e4 σ": 1e-9}
# fourth-order differences with steps of 1e-3: h⁴ f⁽⁵⁾/30 where the scale of x is √eps = 0.1
DIFFERENCES = {"a constant channel": 2e-5}


# of terms of either sign a 30th is left: 1.4e-6 of their sum is 5e-8 of their sizes
GAMMA = {"filter response, TLU": 2e-6}


@pytest.mark.parametrize("case", exactness.CASES)
@pytest.mark.parametrize("norm", exactness.NORMS)
def test_derivatives_of_orders_1_to_4(norm, case):
    for (order, by), error in exactness.derivatives(nbgrad, norm, case).items():
        limit = (ROUNDING.get(case, 1e-11) if by == "composition"
                 else DIFFERENCES.get(case, 1e-7))
        assert error < limit, (order, by)


@pytest.mark.parametrize("layout", ["NCHW", "channels-last"])
@pytest.mark.parametrize("norm", exactness.NORMS)
def test_float32_at_every_offset_and_scale(norm, layout):
    points = [(o, 1.0) for o in exactness.OFFSETS] + [(0.0, s) for s in exactness.SCALES]
    for offset, scale in points:
        y, dx, dgamma = exactness.far_from_zero(nbgrad, norm, offset, scale, layout)
        assert y <= 1e-6, (offset, scale)
        assert dx <= 2e-6, (offset, scale)
        assert dgamma <= 1e-6, (offset, scale)


@pytest.mark.parametrize("name", exact_others.OTHERS)
def test_derivatives_of_the_others_to_order_3(name):
    for case in exactness.CASES:
        for order, error in exact_others.derivatives(name, case).items():
            assert error < DIFFERENCES.get(case, 1e-6), (case, order)


# spectral norm holds u and v constant, which its composition does not say
@pytest.mark.parametrize("name", sorted(set(other_norms.OTHERS) - {"spectral norm"}))
def test_derivatives_of_the_others_are_those_of_elementary_ops(name):
    """To order 3, in the compositions that the benchmarks measure: 16 channels in groups of 8,
    ghosts of 16 samples."""
    rng = np.random.default_rng(3)
    bent = name in ("absolute deviation", "ℓ3", "ℓ∞")         # |x − μ|³ has no third one at 0
    for case in [c for c in exactness.CASES if not (bent and c == "a constant channel")]:
        x, gains = rng.standard_normal((32, 16, 2, 2)), rng.standard_normal((3, 16))
        x = x[..., :1, :1] if case == "one spatial element" else x
        gains[0] *= case != "γ = 0"
        x[:, 1] = 0.7 if case == "a constant channel" else x[:, 1]
        xs = [x + 1e4 * (case == "mean = 1e4 σ"), *gains]
        u, vs = rng.standard_normal(x.shape), [[rng.standard_normal(a.shape) for a in xs]
                                               for _ in range(3)]
        for k in (1, 2, 3):
            ours, theirs = (exactness.along(nbgrad, f, xs, u, vs[:k])
                            for f in other_norms.OTHERS[name])
            # what is left of terms that cancel, and the polynomials' zeros, count as 1e-3
            error = abs(ours - theirs) / max(abs(ours), abs(theirs), 1e-3)
            assert error < ROUNDING.get(case, 1e-11), (case, k)


@pytest.mark.parametrize("name", [*exact_others.OTHERS, *exact_others.BENT])
def test_the_others_in_float32_at_every_offset_and_scale(name):
    for layout in ("NCHW", "channels-last"):
        for point in exact_others.POINTS:
            y, dx, *dgamma = exact_others.single(name, *point, layout)
            assert y <= 1e-6, (point, layout)
            assert dx <= 2e-6, (point, layout)
            assert all(error <= GAMMA.get(name, 1e-6) for error in dgamma), (point, layout)


def second(f, arrays, u, v, dtype):
    """The derivative along v of that along u, by every input, as float64 arrays."""
    leaves = [nbgrad.tensor(a.astype(dtype), requires_grad=True) for a in arrays]
    u, v = (nbgrad.tensor(a.astype(dtype)) for a in (u, v))
    first, = nbgrad.autograd.grad((f(*leaves) * u).sum(), leaves[:1], create_graph=True)
    found = nbgrad.autograd.grad((first * v).sum(), leaves, allow_unused=True)
    return [g.data.astype(np.float64) for g in found if g is not None]


SECOND = {**{kind: partial(exactness.fused, nbgrad, kind) for kind in exactness.NORMS},
          **{name: lambda x, g, b, f=f: f(x, g, b, b, 1e-5)
             for name, f in exact_others.OTHERS.items() if name != "mean-only batch"}}   # linear


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_in_float32_at_every_offset_and_scale(name):
    for offset, scale in [(0, 1), (1e4, 1), (1e6, 1), (0, 1e-3), (0, 1e12), (0, 1e18)]:
        rng = np.random.default_rng(3)
        x, u, v = rng.standard_normal((3, 6, 4, 3, 3)).astype(np.float32)
        x = ((x + offset) * scale).astype(np.float32)
        own = x.shape[1:] if name in ("layer", "rms") else 4
        gains = rng.standard_normal((2, *np.atleast_1d(own))).astype(np.float32)
        with np.errstate(all="ignore"):              # what is 0 in float32 may be 1e-50 in float64
            got, want = (second(SECOND[name], (x, *gains), u, v, dtype)
                         for dtype in (np.float32, np.float64))
        for a, b in zip(got, want):
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-37)
            assert error <= 1e-6, (offset, scale)


def test_the_page_says_what_the_results_say():
    rows = measure.read(exactness.RESULTS)
    assert exactness.PAGE.read_text(encoding="utf-8") == exactness.page(rows)
    assert {row["norm"] for row in rows} == {*exactness.NORMS, *exact_others.OTHERS,
                                           *exact_others.BENT}
