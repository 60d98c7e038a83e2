"""Optimizer steps, in place: one pass over the parameter and its state."""

import math

import numpy as np

from .jit import kernel, prange

__all__ = ["adam_step", "sgd_step"]


# Settings come as Python floats, which Numba takes in a third of the time of np.float32, and become
# the array's dtype here: in float64 the loops would be half as fast.

@kernel
def _sgd(p, g, lr, weight_decay):
    lr, weight_decay = p.dtype.type(lr), p.dtype.type(weight_decay)
    for i in prange(p.size):
        p[i] -= lr * (g[i] + weight_decay * p[i])


@kernel
def _momentum(p, g, buf, lr, momentum, keep, weight_decay, nesterov, first):
    real = p.dtype.type
    lr, momentum, keep, weight_decay = real(lr), real(momentum), real(keep), real(weight_decay)
    for i in prange(p.size):
        d = g[i] + weight_decay * p[i]
        b = d if first else momentum * buf[i] + keep * d
        buf[i] = b
        p[i] -= lr * (d + momentum * b if nesterov else b)


@kernel
def _adam(p, g, m, v, shrink, weight_decay, beta1, beta2, keep1, keep2, step_size, root, eps):
    real = p.dtype.type
    shrink, weight_decay, step_size = real(shrink), real(weight_decay), real(step_size)
    beta1, beta2, keep1, keep2 = real(beta1), real(beta2), real(keep1), real(keep2)
    root, eps = real(root), real(eps)
    for i in prange(p.size):
        q = p[i] * shrink
        d = g[i] + weight_decay * q
        a = beta1 * m[i] + keep1 * d
        b = beta2 * v[i] + keep2 * d * d
        m[i], v[i] = a, b
        p[i] = q - step_size * a / (np.sqrt(b) / root + eps)


def _in_place(loop, g, state, settings):
    """Run loop(p, g, …, settings) on one axis; arrays that are not C-ordered go through a copy."""
    p = state[0]
    flat = [a.reshape(-1) if a.flags.c_contiguous else a.flatten() for a in state]
    if g.dtype is not p.dtype or not g.flags.c_contiguous:
        g = np.ascontiguousarray(g, p.dtype)
    loop(flat[0], g.reshape(-1), *flat[1:], *settings, work=p.nbytes * (len(state) + 1))
    for a, f in zip(state, flat):
        if f.base is None:                          # `flatten` copied, `reshape` did not
            a[...] = f.reshape(a.shape)


def sgd_step(p, g, buf, *, lr, momentum, dampening, weight_decay, nesterov, first):
    """d = g + λp;  b ← μb + (1 − τ)d (d at the first step);  p ← p − lr (nesterov: d + μb, else b).

    Sutskever et al. 2013, in PyTorch's form. buf is None when momentum is 0.
    """
    if buf is None:
        _in_place(_sgd, g, (p,), (float(lr), float(weight_decay)))
    else:
        _in_place(_momentum, g, (p, buf), (float(lr), float(momentum), 1.0 - dampening,
                                           float(weight_decay), bool(nesterov), bool(first)))


def adam_step(p, g, m, v, *, lr, beta1, beta2, eps, weight_decay, decoupled, step):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps), m̂ = m / (1 − β₁ᵗ).

    Kingma & Ba 2015. λ: g ← g + λp before; decoupled: p ← (1 − lr λ)p before (AdamW, Loshchilov &
    Hutter 2019).
    """
    shrink, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    settings = (shrink, decay, beta1, beta2, 1 - beta1, 1 - beta2, lr / (1 - beta1 ** step),
                math.sqrt(1 - beta2 ** step), eps)
    _in_place(_adam, g, (p, m, v), tuple(map(float, settings)))
