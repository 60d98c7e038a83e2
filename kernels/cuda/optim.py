"""Optimizer steps, in place: one pass over each parameter and its state, MANY parameters in a
launch. Their addresses are the kernel's own parameters: nothing is sent to the device before."""

import math

import numpy as np

from .. import reference
from .intrinsics import cuda, device, libm
from .launch import Kernel, factory
from .layout import alike, dense
from .memory import SIMULATED

__all__ = ["adam_step", "sgd_step"]

THREADS = 256 if not SIMULATED else 32
CHUNK = 8 * THREADS          # values of a block
MANY = 8


@device
def _skip(t, b, k, n):
    """Past array k of n values, if block b of the rest lies behind it."""
    blocks = (n + CHUNK - 1) // CHUNK
    return (t + 1, b - blocks) if t == k and b >= blocks else (t, b)


@device
def _task(b, n):
    """Array and first value of block b."""
    t = 0
    t, b = _skip(t, b, 0, n[0])
    t, b = _skip(t, b, 1, n[1])
    t, b = _skip(t, b, 2, n[2])
    t, b = _skip(t, b, 3, n[3])
    t, b = _skip(t, b, 4, n[4])
    t, b = _skip(t, b, 5, n[5])
    t, b = _skip(t, b, 6, n[6])
    return t, b * CHUNK


@device
def _pick(t, a):
    """a[t]: choices, since a tuple with an index that is not known lies in memory."""
    low = (a[1] if t == 1 else a[0]) if t < 2 else (a[3] if t == 3 else a[2])
    high = (a[5] if t == 5 else a[4]) if t < 6 else (a[7] if t == 7 else a[6])
    return low if t < 4 else high


def _parameters(kind, lists, numbers):
    return f"*{kind} " * (MANY * lists) + "i8 " * MANY + f"{kind} " * numbers + "i4"


@factory
def _sgd(dtype):
    kind = dtype.str[1:]

    def body(p0, p1, p2, p3, p4, p5, p6, p7, g0, g1, g2, g3, g4, g5, g6, g7,
             n0, n1, n2, n3, n4, n5, n6, n7, lr, decay, _):
        n = (n0, n1, n2, n3, n4, n5, n6, n7)
        t, first = _task(cuda.blockIdx.x, n)
        p, g = (_pick(t, (p0, p1, p2, p3, p4, p5, p6, p7)),
                _pick(t, (g0, g1, g2, g3, g4, g5, g6, g7)))
        for i in range(first + cuda.threadIdx.x, min(first + CHUNK, _pick(t, n)), THREADS):
            p[i] = p[i] - lr * (g[i] + decay * p[i])
    return Kernel(body, _parameters(kind, 2, 2), threads=THREADS, name=f"sgd_{kind}")


@factory
def _momentum(dtype):
    """how: 1 if the buffer is new, 2 for Nesterov's, 3 for both."""
    kind = dtype.str[1:]

    def body(p0, p1, p2, p3, p4, p5, p6, p7, g0, g1, g2, g3, g4, g5, g6, g7,
             b0, b1, b2, b3, b4, b5, b6, b7, n0, n1, n2, n3, n4, n5, n6, n7,
             lr, decay, momentum, keep, how):
        n = (n0, n1, n2, n3, n4, n5, n6, n7)
        t, first = _task(cuda.blockIdx.x, n)
        p, g, b = (_pick(t, (p0, p1, p2, p3, p4, p5, p6, p7)),
                   _pick(t, (g0, g1, g2, g3, g4, g5, g6, g7)),
                   _pick(t, (b0, b1, b2, b3, b4, b5, b6, b7)))
        for i in range(first + cuda.threadIdx.x, min(first + CHUNK, _pick(t, n)), THREADS):
            d = g[i] + decay * p[i]
            v = d if how & 1 else momentum * b[i] + keep * d
            p[i] = p[i] - lr * (d + momentum * v if how & 2 else v)
            b[i] = v
    return Kernel(body, _parameters(kind, 3, 4), threads=THREADS, name=f"sgd_momentum_{kind}")


@factory
def _adam(dtype):
    kind, sqrt = dtype.str[1:], libm("sqrt", dtype)

    def body(p0, p1, p2, p3, p4, p5, p6, p7, g0, g1, g2, g3, g4, g5, g6, g7,
             m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, v2, v3, v4, v5, v6, v7,
             n0, n1, n2, n3, n4, n5, n6, n7,
             step, root, shrink, decay, beta1, keep1, beta2, keep2, eps, _):
        n = (n0, n1, n2, n3, n4, n5, n6, n7)
        t, first = _task(cuda.blockIdx.x, n)
        p, g, m, v = (_pick(t, (p0, p1, p2, p3, p4, p5, p6, p7)),
                      _pick(t, (g0, g1, g2, g3, g4, g5, g6, g7)),
                      _pick(t, (m0, m1, m2, m3, m4, m5, m6, m7)),
                      _pick(t, (v0, v1, v2, v3, v4, v5, v6, v7)))
        for i in range(first + cuda.threadIdx.x, min(first + CHUNK, _pick(t, n)), THREADS):
            q = p[i] * shrink
            d = g[i] + decay * q
            a, b = beta1 * m[i] + keep1 * d, beta2 * v[i] + keep2 * d * d
            p[i] = q - step * a / (sqrt(b) / root + eps)
            m[i] = a
            v[i] = b
    return Kernel(body, _parameters(kind, 4, 9), threads=THREADS, name=f"adam_{kind}")


def every():
    """The kernels of float32 and float64, for those who compile them ahead."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for make in (_sgd, _momentum, _adam):
            yield make(dtype)


def _launch(kernel, owned, gs, numbers):
    """``kernel`` on lists of arrays of one dtype, MANY at a time."""
    for i in range(0, len(gs), MANY):
        ps, *states = [arrays[i:i + MANY] for arrays in owned]
        missing = [None] * (MANY - len(ps))
        sizes = [p.size for p in ps] + [0] * len(missing)
        lists = [[*a, *missing] for a in (ps, gs[i:i + MANY], *states)]
        kernel(sum(-(-n // CHUNK) for n in sizes), *(a for arrays in lists for a in arrays),
               *sizes, *numbers)


def _grouped(make, gs, owned, keys, numbers, plain):
    """make(dtype) for the arrays of each dtype and key, which gives its numbers; arrays with gaps,
    or in another order than their state, by ``plain`` NumPy."""
    groups = {}
    for i, arrays in enumerate(zip(*owned)):
        p = arrays[0]
        if dense(p) is not p or any(a.strides != p.strides or a.dtype != p.dtype for a in arrays):
            plain(i)
        elif p.size:
            groups.setdefault((p.dtype, keys[i]), []).append(i)
    for (dtype, key), which in groups.items():
        mine = [[arrays[i] for i in which] for arrays in owned]
        ready = [alike(gs[i].astype(dtype, copy=False), p) for i, p in zip(which, mine[0])]
        _launch(make(dtype), mine, ready, numbers(key))


def sgd_step(ps, gs, bufs, *, lr, momentum, dampening, weight_decay, nesterov, first, plans=None):
    """d = g + λp;  b ← μb + (1 − τ)d (d where ``first``);  p ← p − lr (nesterov: d + μb, else b).

    Sutskever et al. 2013, in PyTorch's form. bufs is None when momentum is 0.
    """
    def plain(i):
        reference.sgd_step([ps[i]], [gs[i]], None if bufs is None else [bufs[i]], lr=lr,
                           momentum=momentum, dampening=dampening, weight_decay=weight_decay,
                           nesterov=nesterov, first=[first[i]])
    if bufs is None:
        _grouped(_sgd, gs, (ps,), [0] * len(ps), lambda key: (lr, weight_decay, 0), plain)
    else:
        _grouped(_momentum, gs, (ps, bufs), [bool(f) for f in first], lambda new: (
            lr, weight_decay, momentum, 1 - dampening, new + 2 * bool(nesterov)), plain)


def adam_step(ps, gs, ms, vs, *, lr, beta1, beta2, eps, weight_decay, decoupled, steps, plans=None):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps), m̂ = m / (1 − β₁ᵗ).

    Kingma & Ba 2015. λ: g ← g + λp before; decoupled: p ← (1 − lr λ)p before (AdamW, Loshchilov &
    Hutter 2019).
    """
    def plain(i):
        reference.adam_step([ps[i]], [gs[i]], [ms[i]], [vs[i]], lr=lr, beta1=beta1, beta2=beta2,
                            eps=eps, weight_decay=weight_decay, decoupled=decoupled,
                            steps=[steps[i]])
    shrink, decay = (1 - lr * weight_decay, 0) if decoupled else (1, weight_decay)
    _grouped(_adam, gs, (ps, ms, vs), steps, lambda t: (
        lr / (1 - beta1 ** t), math.sqrt(1 - beta2 ** t), shrink, decay, beta1, 1 - beta1, beta2,
        1 - beta2, eps, 0), plain)
