"""Random arguments to the norm functions: a result or a documented exception, never a crash.

``NBGRAD_FUZZ=100000 pytest tests/test_norm_fuzz.py`` draws more of them.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

import nbgrad
from nbgrad import ops
from nbgrad.nn import functional as F

COUNT = int(os.environ.get("NBGRAD_FUZZ", "20000"))
DOCUMENTED = ValueError, TypeError, RuntimeError, IndexError
DTYPES = (np.float32,) * 4 + (np.float64, np.int64, np.bool_)
NUMBERS = (1e-5, 0.1, 0.0, -1.0, 1.0, float("nan"), float("inf"), 1, 2, -3, 10**9, None, "1", [])


class Draw:
    """Arguments that mostly fit each other, and now and then do not."""

    def __init__(self, rng):
        self.rng = rng
        self.shape = tuple(rng.integers(0, 5, rng.integers(0, 6)).tolist())
        if rng.random() < 0.7:
            self.shape = tuple(rng.integers(1, 6, rng.integers(2, 5)).tolist())
        self.dtype = DTYPES[rng.integers(len(DTYPES))]

    def odd(self, chance=0.06):
        return self.rng.random() < chance

    def tensor(self, shape):
        if self.odd():
            return (None, 3.0, "x", np.ones(3, np.float32), [1.0])[self.rng.integers(5)]
        if self.odd():
            shape = (*shape, 2) if self.odd(0.5) else shape[1:]
        dtype = DTYPES[self.rng.integers(len(DTYPES))] if self.odd() else self.dtype
        with np.errstate(all="ignore"):
            x = (self.rng.standard_normal(shape) * 10.0 ** self.rng.integers(-3, 4)).astype(dtype)
        if x.ndim and self.odd(0.2):
            x = (x[::-1], np.asfortranarray(x), np.repeat(x, 2, -1)[..., ::2],
                 np.broadcast_to(x[:1], x.shape))[self.rng.integers(4)]
        if x.size and x.flags.writeable and x.dtype.kind == "f" and self.odd():
            x.reshape(-1)[0] = (np.nan, np.inf, -np.inf, 1e38)[self.rng.integers(4)]
        t = nbgrad.Tensor(x)
        t.requires_grad = bool(x.dtype.kind == "f" and self.rng.random() < 0.5)
        return t

    def x(self):
        return self.tensor(self.shape)

    def channels(self):
        return None if self.odd(0.3) else self.tensor(self.shape[1:2])

    def number(self, usual):
        return NUMBERS[self.rng.integers(len(NUMBERS))] if self.odd(0.15) else usual

    def flag(self):
        return bool(self.rng.integers(2))


def batch_norm(d):
    return F.batch_norm(d.x(), d.channels(), d.channels(), d.channels(), d.channels(), d.flag(),
                        d.number(0.1), d.number(1e-5),
                        residual=d.x() if d.odd(0.2) else None,
                        activation="relu" if d.odd(0.3) else d.number(None))


def weighted_batch_norm(d):
    mask = d.tensor(d.shape[:1] + d.shape[2:]) if d.flag() else None
    if isinstance(mask, nbgrad.Tensor) and d.flag():
        mask = abs(mask.data)
    return ops.weighted_batch_norm(d.x(), d.channels(), d.channels(), d.number(1e-5), mask=mask)[0]


def moments(d):
    return ops.moments(d.x(), groups=d.number(None), ghost_size=d.number(None))


def layer_norm(d):
    dims = int(d.rng.integers(0, 4))
    own = d.shape[len(d.shape) - dims:]
    return F.layer_norm(d.x(), own if not d.odd() else d.number(own),
                        None if d.odd(0.3) else d.tensor(own),
                        None if d.odd(0.3) else d.tensor(own), d.number(1e-5))


def rms_norm(d):
    dims = int(d.rng.integers(0, 4))
    own = d.shape[len(d.shape) - dims:]
    return F.rms_norm(d.x(), own if not d.odd() else d.number(own),
                      None if d.odd(0.3) else d.tensor(own), d.number(None))


def group_norm(d):
    C = d.shape[1] if len(d.shape) > 1 else 1
    groups = [n for n in range(1, C + 1) if C % n == 0] or [1]
    return F.group_norm(d.x(), d.number(int(d.rng.choice(groups))), d.channels(), d.channels(),
                        d.number(1e-5))


def instance_norm(d):
    return F.instance_norm(d.x(), d.channels(), d.channels(), d.channels(), d.channels(), d.flag(),
                           d.number(0.1), d.number(1e-5))


def local_response_norm(d):
    return F.local_response_norm(d.x(), d.number(int(d.rng.integers(1, 4))), d.number(1e-4),
                                 d.number(0.75), d.number(1.0))


def filter_response_norm(d):
    return ops.filter_response_norm(d.x(), d.channels(), d.channels(), d.channels(),
                                    d.number(1e-6))


FUNCTIONS = [batch_norm, weighted_batch_norm, moments, layer_norm, rms_norm, group_norm,
             instance_norm, local_response_norm, filter_response_norm]


def fuzz(count, seed=0):
    """How many results and how many documented exceptions there were, by function."""
    rng, found = np.random.default_rng(seed), {}
    for i in range(count):
        f = FUNCTIONS[i % len(FUNCTIONS)]
        results, errors = found.get(f.__name__, (0, 0))
        try:
            y = f(Draw(rng))
            if isinstance(y, nbgrad.Tensor) and y.requires_grad:
                y.sum().backward()
            found[f.__name__] = results + 1, errors
        except DOCUMENTED as e:
            found[f.__name__] = results, errors + bool(str(e))       # one that says nothing is none
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_arguments_give_a_result_or_a_documented_exception():
    found = fuzz(COUNT)
    assert sum(map(sum, found.values())) == COUNT
    for name, (results, errors) in found.items():
        share = results / (results + errors)
        assert 0.1 < share < 0.95, f"{name}: {share:.2f} of the calls gave a result"


@pytest.mark.slow
def test_random_arguments_with_bounds_checks():
    code = ("import warnings; warnings.simplefilter('ignore')\n"
            f"import sys; sys.path[:0] = {[os.path.dirname(__file__)]!r}\n"
            "import test_norm_fuzz as t; print(len(t.fuzz(2000, seed=1)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600,
                         env={**os.environ, "NUMBA_BOUNDSCHECK": "1"}, check=False)
    assert out.stdout.strip() == str(len(FUNCTIONS)), out.stderr[-2000:]
