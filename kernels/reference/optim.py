"""Optimizer steps, in place on one parameter array."""

import numpy as np

__all__ = ["adam_step", "sgd_step"]


def sgd_step(p, g, buf, *, lr, momentum, dampening, weight_decay, nesterov, first):
    """d = g + λp;  b ← μb + (1 − τ)d (d at the first step);  p ← p − lr (nesterov: d + μb, else b).

    Sutskever et al. 2013, in PyTorch's form. buf is None when momentum is 0.
    """
    d = g + weight_decay * p if weight_decay else g
    if buf is not None:
        buf[...] = d if first else momentum * buf + (1 - dampening) * d
        d = d + momentum * buf if nesterov else buf
    p -= lr * d


def adam_step(p, g, m, v, *, lr, beta1, beta2, eps, weight_decay, decoupled, step):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps), m̂ = m / (1 − β₁ᵗ).

    Kingma & Ba 2015. λ: g ← g + λp before; decoupled: p ← (1 − lr λ)p before (AdamW, Loshchilov &
    Hutter 2019).
    """
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
