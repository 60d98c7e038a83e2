"""Single kernels timed by pytest-benchmark; run once each unless ``--benchmark-enable`` is given.

Every timed result is compared with the reference kernel's.
"""

import numpy as np
import pytest
from nbgrad.kernels import cpu, reference

from bench import cases


@pytest.fixture
def same_as_reference(benchmark):
    """Time one kernel; values are the reference's up to the rounding of sums of ``terms``."""
    def run(name, *arrays, terms=1, **settings):
        got = benchmark(getattr(cpu, name), *arrays, **settings)
        want = getattr(reference, name)(*arrays, **settings)
        got, want = (v if isinstance(v, tuple) else (v,) for v in (got, want))
        assert len(got) == len(want)
        for a, b in zip(got, want):
            ulp = np.finfo(np.float32).eps * max(1, np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=8 * (2 + np.sqrt(terms)) * ulp)
    return run


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def each(table):
    return pytest.mark.parametrize("case", table, ids=lambda c: getattr(c, "name", None) or
                                   "x".join(map(str, np.ravel(np.array(c, dtype=object)))))


@each(cases.BENCH_ELEMENTWISE[:2])
def test_add(same_as_reference, case):
    same_as_reference("add", normal(*case), normal(*case))


@each(cases.BENCH_ELEMENTWISE[:2])
def test_sigmoid(same_as_reference, case):
    same_as_reference("sigmoid", normal(*case))


@each(cases.BENCH_MATMUL[:2])
def test_matmul(same_as_reference, case):
    M, K, N = case
    same_as_reference("matmul", normal(M, K), normal(K, N), terms=K)


@each([c for c in cases.BENCH_CONV if c.name in ("lenet 2", "depthwise")])
def test_conv2d(same_as_reference, case):
    terms = int(np.prod(case.weight[1:]))
    same_as_reference("conv2d", normal(*case.x), normal(*case.weight), terms=terms, **case.settings)


@each(cases.BENCH_POOL[:1])
def test_max_pool2d(same_as_reference, case):
    same_as_reference("max_pool2d", normal(*case.x), dilation=case.dilation, **case.settings)


@each([cases.BENCH_NORM[0], cases.BENCH_NORM[4]])
def test_batch_norm(same_as_reference, case):
    C = case[1]
    same_as_reference("batch_norm", normal(*case), normal(C), normal(C), eps=1e-5)


@each([cases.BENCH_NORM[0], cases.BENCH_NORM[4]])
def test_batch_norm_backward(same_as_reference, case):
    C, rest = case[1], tuple(i for i in range(len(case)) if i != 1)
    x = normal(*case)
    mean, invstd = x.mean(rest, dtype=float), 1 / np.sqrt(x.var(rest, dtype=float) + 1e-5)
    same_as_reference("batch_norm_backward", normal(*case)[::-1], x, normal(C), mean, invstd,
                      terms=x.size // C)


@each(cases.BENCH_LOSS[:2])
def test_cross_entropy(same_as_reference, case):
    N, C = case
    target = np.random.default_rng(1).integers(0, C, N)
    same_as_reference("cross_entropy", normal(*case), target, None, ignore_index=-100,
                      label_smoothing=0.0, terms=C)
