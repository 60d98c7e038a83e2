"""docs/exactness.md: the numbers that the page promises, measured again, and the page itself."""

import pytest

import nbgrad
from bench import exact_others, exactness, measure

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


@pytest.mark.parametrize("name", [*exact_others.OTHERS, *exact_others.BENT])
def test_the_others_in_float32_at_every_offset_and_scale(name):
    for layout in ("NCHW", "channels-last"):
        for point in exact_others.POINTS:
            y, dx, *dgamma = exact_others.single(name, *point, layout)
            assert y <= 1e-6, (point, layout)
            assert dx <= 2e-6, (point, layout)
            assert all(error <= GAMMA.get(name, 1e-6) for error in dgamma), (point, layout)


def test_the_page_says_what_the_results_say():
    rows = measure.read(exactness.RESULTS)
    assert exactness.PAGE.read_text(encoding="utf-8") == exactness.page(rows)
    assert {row["norm"] for row in rows} == {*exactness.NORMS, *exact_others.OTHERS,
                                           *exact_others.BENT}
