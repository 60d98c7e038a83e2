"""The suite's kernels timed by pytest-benchmark: ``pytest tests/test_benchmarks.py
--benchmark-enable``. Otherwise every one runs once, cut short.

The result that was timed is compared with the reference kernel's, or with the composition's.
"""

import numpy as np
import pytest

import nbgrad
from bench import on_nbgrad, suite

TOO_SLOW = 2e8              # operations; beyond, the reference takes seconds
CASES = [case for group in ("matmul", "conv", "norm", "elementwise")
         for case in suite.table(group)
         if not case.random and case.flops < TOO_SLOW and "recorded" not in case.op
         and case.op != "optimizer_step"]


def cut(case):
    """The same case with every length at most 8."""
    return next(c for c in suite.table(case.group, 8) if c.label == case.label)


def arrays(result):
    results = result if isinstance(result, tuple | list) else (result,)
    return [r.detach().numpy() if isinstance(r, nbgrad.Tensor) else r for r in results]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group} {case.label}")
def test_kernel(benchmark, case):
    if not benchmark.enabled:
        case = cut(case)
    got = benchmark(on_nbgrad.build(case))
    how = "composed" if case.op == "other_norm" else "reference"
    got, want = arrays(got), arrays(on_nbgrad.build(case, how)())
    assert len(got) == len(want)
    terms = max(1, case.flops / np.size(want[0]))
    for a, b in zip(got, want):
        eps = np.finfo(case.dtype).eps * max(1, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=8 * (2 + np.sqrt(terms)) * eps)
