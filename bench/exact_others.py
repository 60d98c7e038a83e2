"""How exact the other norms are: derivatives to third order, and float32 far from zero.

There is nothing to compare with but finite differences, and the same function in float64.
"""

import math

import numpy as np

import nbgrad
from nbgrad import nn, ops
from nbgrad.nn import functional as F
from nbgrad.nn.utils import parametrizations
from nbgrad.ops.norm.channels import affine

from . import exactness

__all__ = ["BENT", "ORDERS", "OTHERS", "POINTS", "derivatives", "single"]

ORDERS = (1, 2, 3)
EPS = exactness.EPS
LEAST = 1e-3                # smaller derivatives count as that: some are 0, and differences are not
MASK = np.array([1.0, 0.5, 2.0, 1.0])

# (offset, scale) of x in float32
POINTS = ([(o, 1.0) for o in exactness.OFFSETS] + [(0.0, s) for s in exactness.SCALES])


def _renorm(x, gamma, beta, eps):
    """With r and d at their limits, since the gradient takes them as constants."""
    layer = nn.BatchRenorm(x.shape[1], eps, 0.0, r_max=1.0, d_max=0.5, affine=False, dtype=x.dtype)
    layer.running_mean.data[...] = -1e9
    return affine(layer(x), gamma, beta)


def _noisy(x, gamma, beta, eps):
    """The same noise whenever it is called."""
    layer = nn.NoisyBatchNorm(x.shape[1], eps, generator=nbgrad.Generator(0), affine=False,
                              dtype=x.dtype)
    vars(layer).update(weight=gamma, bias=beta)      # no parameters: part of what is differentiated
    return layer(x)


def _sync(x, gamma, beta, eps):
    worker = nn.InProcess(1).rank(0)
    return ops.weighted_batch_norm(x, gamma, beta, eps, workers=worker)[0]


def _deviation(p):
    return lambda x, g, b, v, eps: ops.lp_batch_norm(x, g, b, p, eps)[0]


def _spectral(x, *_):
    """Of a weight; u and v have converged."""
    layer = nn.Linear(4, 4, dtype=x.dtype)
    layer.weight = nn.Parameter(x.detach().reshape((x.shape[0], -1)))
    parametrizations.spectral_norm(layer, n_power_iterations=300)
    with nbgrad.no_grad():
        layer.weight  # noqa: B018  (reading it iterates)
    parametrization = getattr(layer.eval().parametrizations.weight, "0")
    return parametrization(x.reshape((x.shape[0], -1))).reshape(x.shape)


# {name: (x, γ, β, v) -> y}; γ, β and v are (C,), ε is the caller's
OTHERS = {
    "batch, evaluation": lambda x, g, b, v, eps: F.batch_norm(
        x, nbgrad.tensor(np.arange(4.0)[:x.shape[1]], dtype=x.dtype),
        nbgrad.tensor(np.arange(1.0, 5.0)[:x.shape[1]], dtype=x.dtype), g, b, eps=eps),
    "masked batch": lambda x, g, b, v, eps: ops.weighted_batch_norm(
        x, g, b, eps, mask=np.resize(MASK, x.shape[0]))[0],
    "ghost batch": lambda x, g, b, v, eps: ops.ghost_batch_norm(x, 2, g, b, eps)[0],
    "split batch": lambda x, g, b, v, eps: ops.ghost_batch_norm(
        x, len(x) - len(x) // 2, ops.stack([g, v]), ops.stack([b, b]), eps)[0],
    "sync batch": lambda x, g, b, v, eps: _sync(x, g, b, eps),
    "batch renorm": lambda x, g, b, v, eps: _renorm(x, g, b, eps),
    "noisy batch": lambda x, g, b, v, eps: _noisy(x, g, b, eps),
    "mean-only batch": lambda x, g, b, v, eps: ops.center(x, b)[0],
    "ℓ4 batch": _deviation(4),
    "decorrelated": lambda x, g, b, v, eps: ops.whiten(x, 2, eps, g, b)[0],
    "switchable": lambda x, g, b, v, eps: ops.switchable_norm(x, v[:3], b[:3], g, b, eps)[0],
    "filter response": lambda x, g, b, v, eps: ops.filter_response_norm(x, g, b, None, eps),
    "filter response, TLU": lambda x, g, b, v, eps: ops.filter_response_norm(x, g, b, v, eps),
    "filter response, learned ε": lambda x, g, b, v, eps: ops.filter_response_norm(
        x, g, b, None, eps, v),
    "EvoNorm B0": lambda x, g, b, v, eps: ops.evonorm_b0(x, g, b, v, ops.channel_std(x, eps=eps),
                                                         eps),
    "EvoNorm S0": lambda x, g, b, v, eps: ops.evonorm_s0(x, 2, g, b, v, eps),
    "global response": lambda x, g, b, v, eps: ops.global_response_norm(x, g, b, eps),
    "local response": lambda x, g, b, v, eps: F.local_response_norm(x, 3, 1.0, 0.75, 1.0),
    "normalize": lambda x, g, b, v, eps: F.normalize(x, eps=eps),
    "weight standardization": lambda x, g, b, v, eps: ops.weight_standardization(x, eps),
    "weight norm": lambda x, g, b, v, eps: ops.weight_norm(x, g.reshape((1, -1, 1, 1)), 1),
}
# in float32 only: with a kink for every channel, or with constants for derivatives that depend on x
BENT = {"ℓ1 batch": _deviation(1), "ℓ∞ batch": _deviation(math.inf), "spectral norm": _spectral}


def _inputs(case, rng):
    shape = (4, 4, 1, 2) if case == "one spatial element" else (4, 4, 2, 3)
    x, (gamma, beta, v) = rng.standard_normal(shape), rng.standard_normal((3, 4))
    if case == "one spatial element":
        x = x[..., :1]
    elif case == "γ = 0":
        gamma[...] = 0
    elif case == "a constant channel":
        x[:, 1] = 0.7
    elif case == "mean = 1e4 σ":
        x += 1e4
    return x, gamma, beta, v


def derivatives(name, case, seed=2):
    """{order: relative error against differences of the derivative below it}."""
    rng = np.random.default_rng(seed)
    xs = _inputs(case, rng)
    u, found = rng.standard_normal(xs[0].shape), {}
    vs = [[rng.standard_normal(x.shape) for x in xs] for _ in ORDERS]

    def f(x, g, b, v):
        return OTHERS[name](x, g, b, v, EPS)

    def along(at, k):
        return exactness.along(nbgrad, f, at, u, vs[:k])
    for k in ORDERS:
        below = exactness.difference(lambda at, k=k: along(at, k - 1), xs, vs[k - 1])
        d = along(xs, k)
        found[k] = abs(d - below) / max(abs(d), abs(below), LEAST)
    return found


def _both(name, x, gains, dy, layout, dtype):
    """y, ∂x and ∂γ, or None without γ, in a dtype, as float64 arrays."""
    def given(a):
        t = nbgrad.tensor(a.astype(dtype))
        if layout == "channels-last" and a.ndim == 4:
            t = t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return t
    t, gamma, *rest = (given(a).requires_grad_() for a in (x, *gains))
    y = {**OTHERS, **BENT}[name](t, gamma, *rest, 1e-5)
    found = nbgrad.autograd.grad(y, (t, gamma), given(dy), allow_unused=True)
    return [None if a is None else np.asarray(a.detach().numpy(), np.float64)
            for a in (y, *found)]


def single(name, offset, scale, layout, seed=0):
    """Largest errors of y, of ∂x and, if there is γ, of ∂γ in float32, relative to the largest
    element of each. What is smaller than float32's normal numbers cannot have more digits than
    these leave it."""
    rng = np.random.default_rng(seed)
    x = ((rng.standard_normal((9, 4, 8, 8)).clip(-3, 3) + offset) * scale).astype(np.float32)
    dy, gains = rng.standard_normal(x.shape), rng.standard_normal((3, 4)).astype(np.float32)
    found, largest = [], float(np.finfo(np.float32).max)
    dy = dy.astype(np.float32)
    for got, want in zip(_both(name, x, gains, dy, layout, np.float32),
                         _both(name, x, gains, dy, layout, np.float64)):
        if want is None:
            continue
        fits = np.abs(want) < largest                      # what float32 cannot hold may be inf
        apart = np.abs(np.where(fits, got - want, 0.0)).max()
        worst = apart / max(np.abs(want[fits]).max(initial=0.0), float(np.finfo(np.float32).tiny))
        found.append(float(worst) if np.isfinite(worst) else float("inf"))
    return found
