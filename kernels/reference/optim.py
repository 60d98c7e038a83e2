"""Optimizer steps, in place on lists of parameter arrays."""

import numpy as np

__all__ = ["adam_step", "sgd_step"]


def sgd_step(ps, gs, bufs, *, lr, momentum, dampening, weight_decay, nesterov, first, plans=None):
    """d = g + λp;  b ← μb + (1 − τ)d (d where ``first``);  p ← p − lr (nesterov: d + μb, else b).

    Sutskever et al. 2013, in PyTorch's form. bufs is None when momentum is 0.
    """
    for i, (p, g) in enumerate(zip(ps, gs)):
        d = g + weight_decay * p if weight_decay else g
        if bufs is not None:
            buf = bufs[i]
            buf[...] = d if first[i] else momentum * buf + (1 - dampening) * d
            d = d + momentum * buf if nesterov else buf
        p -= lr * d


def adam_step(ps, gs, ms, vs, *, lr, beta1, beta2, eps, weight_decay, decoupled, steps, plans=None):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps), m̂ = m / (1 − β₁ᵗ).

    Kingma & Ba 2015. λ: g ← g + λp before; decoupled: p ← (1 − lr λ)p before (AdamW, Loshchilov &
    Hutter 2019).
    """
    for p, g, m, v, step in zip(ps, gs, ms, vs, steps):
        if decoupled:
            p *= 1 - lr * weight_decay
        elif weight_decay:
            g = g + weight_decay * p
        m *= beta1
        m += (1 - beta1) * g
        v *= beta2
        v += (1 - beta2) * g * g
        step_size = lr / (1 - beta1 ** step)
        p -= step_size * m / (np.sqrt(v) / np.sqrt(1 - beta2 ** step) + eps)
