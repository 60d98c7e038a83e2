"""Norms that PyTorch does not have: nbgrad's own function, and the same in elementary ops.

Each takes x and three vectors of one number per channel, of which it uses as many as it has
parameters, and is timed with all its gradients.
"""

import math
from functools import cache

import numpy as np

import nbgrad
from nbgrad import nn, ops
from nbgrad.nn.utils import parametrizations
from nbgrad.ops.norm import lp

from .data import normal

__all__ = ["OTHERS", "build"]

EPS, GHOST, GROUPS = 1e-3, 16, 8


def _channels(t):
    return t.reshape((1, -1, 1, 1))


def _affine(x, gamma, beta):
    return x * _channels(gamma) + _channels(beta)


def _moments(x, axes):
    """x less its mean, and its variance."""
    xc = x - x.mean(axes, True)
    return xc, (xc * xc).mean(axes, True)


def _with(layer, gamma, beta):
    """The layer with tensors that are no parameters for its γ and β."""
    vars(layer).update(weight=gamma, bias=beta)
    return layer


def _renorm(x, gamma, beta, _):
    layer = nn.BatchRenorm(x.shape[1], eps=EPS, momentum=0.0, affine=False, dtype=x.dtype)
    return _with(layer, gamma, beta)(x)


def _renorm_composed(x, gamma, beta, _):
    """The running statistics are those that a new layer has: mean 0, variance 1."""
    mean = x.mean((0, 2, 3), True)
    xc = x - mean
    sigma = ops.sqrt((xc * xc).mean((0, 2, 3), True) + EPS)
    own = (1 + EPS) ** 0.5
    r = (sigma.detach() / own).clamp(1 / 3, 3)
    d = (mean.detach() / own).clamp(-5, 5)
    return _affine(xc / sigma * r + d, gamma, beta)


def _ghost_composed(x, gamma, beta, _):
    N, C, H, W = x.shape
    xc, var = _moments(x.reshape((N // GHOST, GHOST, C, H, W)), (1, 3, 4))
    return _affine((xc * ops.rsqrt(var + EPS)).reshape(x.shape), gamma, beta)


def _response_composed(x, gamma, beta, tau):
    y = _affine(x * ops.rsqrt((x * x).mean((2, 3), True) + EPS), gamma, beta)
    return y if tau is None else ops.maximum(y, _channels(tau))


def _b0_composed(x, gamma, beta, v):
    of_batch, own = (ops.sqrt(_moments(x, axes)[1] + EPS) for axes in ((0, 2, 3), (2, 3)))
    return _affine(x / ops.maximum(_channels(v) * x + own, of_batch), gamma, beta)


def _s0_composed(x, gamma, beta, v):
    N, C, H, W = x.shape
    var = _moments(x.reshape((N, GROUPS, C // GROUPS, H, W)), (2, 3, 4))[1]
    z = (x * ops.sigmoid(_channels(v) * x)).reshape((N, GROUPS, C // GROUPS, H, W))
    return _affine((z * ops.rsqrt(var + EPS)).reshape(x.shape), gamma, beta)


def _global_composed(x, gamma, beta, _):
    norm = ops.sqrt((x * x).sum((2, 3), True))
    return x * (norm / (norm.mean(1, True) + EPS)) * _channels(gamma) + _channels(beta) + x


def _absolute_composed(x, gamma, beta, _):
    xc = x - x.mean((0, 2, 3), True)
    scale = (abs(xc).mean((0, 2, 3), True) + EPS ** 0.5) * 1.2533141373155003      # √(π/2)
    return _affine(xc / scale, gamma, beta)


def _deviation(p):
    return lambda x, gamma, beta, _: ops.lp_batch_norm(x, gamma, beta, p, EPS)[0]


def _cubes_composed(x, gamma, beta, _):
    """p = 3: E|z|³ = √(8/π) of a normal z."""
    xc = x - x.mean((0, 2, 3), True)
    scale = ((abs(xc) ** 3).mean((0, 2, 3), True) + EPS ** 1.5) ** (1 / 3)
    return _affine(xc / scale * (8 / np.pi) ** (1 / 6), gamma, beta)


def _largest_composed(x, gamma, beta, _):
    xc = x - x.mean((0, 2, 3), True)
    n = x.shape[0] * x.shape[2] * x.shape[3]
    scale = (ops.amax(abs(xc), (0, 2, 3), True) + EPS ** 0.5) / lp._largest(n)
    return _affine(xc / scale, gamma, beta)


def _split(x, gamma, beta, v):
    """γ_i and β_i of each of two parts."""
    gains = (ops.stack(pair) for pair in ((gamma, v), (beta, gamma)))
    return ops.ghost_batch_norm(x, len(x) // 2, *gains, EPS)[0]


def _split_composed(x, gamma, beta, v):
    half = len(x) // 2
    return ops.cat([_batch_composed(x[:half], gamma, beta, None),
                    _batch_composed(x[half:], v, gamma, None)])


def _noise(x):
    return nn.NoisyBatchNorm(x.shape[1], EPS, 0.0, affine=False, generator=nbgrad.Generator(0),
                             dtype=x.dtype)


def _noisy(x, gamma, beta, _):
    return _with(_noise(x), gamma, beta)(x)


def _noisy_composed(x, gamma, beta, _):
    """The same noise: that of a layer with the same generator."""
    scale, shift = (nbgrad.as_tensor(a.astype(x.dtype)[:, :, None, None])
                    for a in _noise(x)._drawn(*x.shape[:2]))
    return _batch_composed(x, gamma, beta, None) * scale + shift


def _weight_norm_composed(v, g, *_):
    return v * (_channels(g) / ops.sqrt((v * v).sum((0, 2, 3), True)))


def _singular(shape):
    """Where the power method starts, in every call: (out,) and (in,) of length 1."""
    pair = (np.cos(np.arange(n, dtype=np.float32)) for n in (shape[0], math.prod(shape[1:])))
    return [a / np.linalg.norm(a) for a in pair]


def _spectral(w, *_):
    """One step of the power method, as a layer in training makes it."""
    layer = _spectral_layer(w.shape)
    for t, start in zip((layer._u, layer._v), _singular(w.shape)):
        t.data[...] = start
    return layer(w)


@cache
def _spectral_layer(shape):
    layer = nn.Conv2d(shape[1], shape[0], shape[2:])
    parametrizations.spectral_norm(layer)
    return getattr(layer.parametrizations.weight, "0")


def _spectral_composed(w, *_):
    matrix, (_, v) = w.reshape((w.shape[0], -1)), map(nbgrad.as_tensor, _singular(w.shape))
    with nbgrad.no_grad():
        u = ops.normalize(ops.matmul(matrix, v), dim=0)
        v = ops.normalize(ops.matmul(matrix.T, u), dim=0)
    return w / ops.dot(u, ops.matmul(matrix, v))


def _mask(x):
    """Padded sequences: rows of each sample are there from none, then one, to all of them."""
    N, _, H, W = x.shape
    there = (np.arange(H) < np.arange(N)[:, None] % (H + 1)).reshape(N, 1, H, 1)
    return np.broadcast_to(there, (N, 1, H, W))


def _masked_composed(x, gamma, beta, _):
    mask = _mask(x)
    there = nbgrad.as_tensor(mask.astype(x.dtype))
    share = there / float(mask.sum())
    xc = x - (x * share).sum((0, 2, 3), True)
    var = (xc * xc * share).sum((0, 2, 3), True)
    return _affine(xc * ops.rsqrt(var + EPS), gamma, beta) * there


def _weights(x):
    """Of positions, from 0 up; a quarter of them are 0."""
    N, _, H, W = x.shape
    return (np.arange(N * H * W) % 4 / 2).reshape(N, 1, H, W)


def _weighted_composed(x, gamma, beta, _):
    w = _weights(x)
    share, there = (nbgrad.as_tensor(a.astype(x.dtype)) for a in (w / w.sum(), w > 0))
    xc = x - (x * share).sum((0, 2, 3), True)
    var = (xc * xc * share).sum((0, 2, 3), True)
    return _affine(xc * ops.rsqrt(var + EPS), gamma, beta) * there


def _sync(x, gamma, beta, _):
    """One worker, which has all there is: what merging costs a process."""
    workers = nn.InProcess(1).rank(0)
    return ops.weighted_batch_norm(x, gamma, beta, EPS, workers=workers)[0]


def _batch_composed(x, gamma, beta, _):
    xc, var = _moments(x, (0, 2, 3))
    return _affine(xc * ops.rsqrt(var + EPS), gamma, beta)


def _switchable(x, gamma, beta, v):
    return ops.switchable_norm(x, v[:3], v[3:6], gamma, beta, EPS)[0]


def _switchable_composed(x, gamma, beta, v):
    """Instance, layer and batch statistics, each of x."""
    means, variances = [], []
    for axes in ((2, 3), (1, 2, 3), (0, 2, 3)):
        mean = x.mean(axes, True)
        means.append(mean)
        variances.append(((x - mean) * (x - mean)).mean(axes, True))
    a, b = ops.softmax(v[:3], 0), ops.softmax(v[3:6], 0)
    mean = a[0] * means[0] + a[1] * means[1] + a[2] * means[2]
    var = b[0] * variances[0] + b[1] * variances[1] + b[2] * variances[2]
    return _affine((x - mean) * ops.rsqrt(var + EPS), gamma, beta)


def _decorrelated(x, gamma, beta, _):
    return ops.whiten(x, GROUPS, EPS, gamma, beta)[0]


def _decorrelated_composed(x, gamma, beta, _):
    """In x's dtype, and with covariances by elementary ops, too."""
    N, C, H, W = x.shape
    xc = _moments(x, (0, 2, 3))[0].permute(1, 0, 2, 3).reshape((C // GROUPS, GROUPS, N * H * W))
    cov = ops.matmul(xc, xc.mT) / float(N * H * W)
    root = ops.inverse_sqrt(cov + nbgrad.as_tensor(EPS * np.eye(GROUPS, dtype=x.dtype)))
    y = ops.matmul(root, xc).reshape((C, N, H, W)).permute(1, 0, 2, 3)
    return _affine(y, gamma, beta)


def _standardized_composed(w, *_):
    wc, var = _moments(w, (1, 2, 3))
    return wc * ops.rsqrt(var + EPS)


# {name: (nbgrad's, in elementary ops)}
OTHERS = {
    "ghost": (lambda x, g, b, _: ops.ghost_batch_norm(x, GHOST, g, b, EPS)[0], _ghost_composed),
    "renorm": (_renorm, _renorm_composed),
    "filter response": (lambda x, g, b, _: ops.filter_response_norm(x, g, b, None, EPS),
                        lambda x, g, b, _: _response_composed(x, g, b, None)),
    "filter response, TLU": (lambda x, g, b, t: ops.filter_response_norm(x, g, b, t, EPS),
                             _response_composed),
    "weight standardization": (lambda w, *_: ops.weight_standardization(w, EPS),
                               _standardized_composed),
    "EvoNorm B0": (lambda x, g, b, v: ops.evonorm_b0(x, g, b, v, ops.channel_std(x, eps=EPS), EPS),
                   _b0_composed),
    "EvoNorm S0": (lambda x, g, b, v: ops.evonorm_s0(x, GROUPS, g, b, v, EPS), _s0_composed),
    "global response": (lambda x, g, b, _: ops.global_response_norm(x, g, b, EPS),
                        _global_composed),
    "masked": (lambda x, g, b, _: ops.weighted_batch_norm(x, g, b, EPS, mask=_mask(x))[0],
               _masked_composed),
    "masked by weights": (
        lambda x, g, b, _: ops.weighted_batch_norm(x, g, b, EPS, mask=_weights(x))[0],
        _weighted_composed),
    "sync": (_sync, _batch_composed),
    "switchable": (_switchable, _switchable_composed),
    "decorrelated": (_decorrelated, _decorrelated_composed),
    "absolute deviation": (_deviation(1), _absolute_composed),
    "ℓ3": (_deviation(3), _cubes_composed),
    "ℓ∞": (_deviation(math.inf), _largest_composed),
    "mean-only": (lambda x, g, b, _: ops.center(x, b)[0],
                  lambda x, g, b, _: x - x.mean((0, 2, 3), True) + _channels(b)),
    "split": (_split, _split_composed),
    "noisy": (_noisy, _noisy_composed),
    "weight norm": (lambda v, g, *_: ops.weight_norm(v, _channels(g), 1), _weight_norm_composed),
    "spectral norm": (_spectral, _spectral_composed),
}


def build(put, composed, name, shape, layout):
    """Forward and backward of one of them; ``put`` copies an array into nbgrad's memory."""
    f = OTHERS[name][composed]
    x, dy = (nbgrad.as_tensor(put(normal(shape, seed), layout == "channels-last"))
             for seed in (0, 1))
    own = [nbgrad.as_tensor(put(normal(shape[1:2], seed))) for seed in (3, 4, 5)]
    leaves = [x, *own]
    for leaf in leaves:
        leaf.requires_grad = True

    def run():
        for leaf in leaves:
            leaf.grad = None
        y = f(*leaves)
        y.backward(dy)
        return y, *(leaf.grad for leaf in leaves if leaf.grad is not None)
    return run
