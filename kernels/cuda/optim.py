"""Optimizer steps, in place: one pass over each parameter and its state, MANY parameters in a
launch. Their addresses are the kernel's own parameters: nothing is sent to the device before."""

import math
from functools import cache

import numpy as np

from .. import reference
from .intrinsics import aligned, cuda, device, libm, width
from .launch import Kernel, factory
from .layout import alike, dense
from .memory import SIMULATED, Array, empty
from .vectors import each, filled, picker, reader, writer

__all__ = ["adam_step", "sgd_step"]

THREADS = 256 if not SIMULATED else 32
CHUNK = 8 * THREADS          # values of a block: two vectors of float32 of each thread
MANY = 8
COUNTS = 32                  # of Adam's steps, in a launch
_pick = picker(MANY)


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
def _tuple(*a):
    return a


@cache
def _pass(formula, arrays, dtype):
    """(x[0], …, x[-2]) ← formula(numbers of x, c) for a block's values from ``first`` on, of n;
    x[-1] is only read. In vectors where all arrays begin on one: two of each are asked for before
    one is written."""
    def of(W):
        read, write = each(reader(W), 2, arrays), each(writer(W), 3, arrays - 1)
        lanes, back, new = each(_tuple, arrays, W), each(_tuple, W, arrays - 1), each(formula, 2, W)
        places, owned, same = filled(arrays), filled(arrays - 1), filled(W)

        @device
        def put(x, i, v, c):
            write(x[:-1], owned(i), back(*new(v, same(c))))
        return device(lambda x, i: lanes(*read(x, places(i)))), put

    W = width(dtype)
    (read, put), (read_one, put_one), T = of(W), of(1), THREADS

    @device
    def run(x, c, first, n):
        end = min(first + CHUNK, n)
        if aligned(x):
            i = first + cuda.threadIdx.x * W
            while i + (T + 1) * W <= end:
                u, v = read(x, i), read(x, i + T * W)
                put(x, i, u, c)
                put(x, i + T * W, v, c)
                i += 2 * T * W
            if i + W <= end:
                put(x, i, read(x, i), c)
            first = end - end % W
        for k in range(first + cuda.threadIdx.x, end, T):
            put_one(x, k, read_one(x, k), c)
    return run


def _parameters(kind, lists, numbers, *more):
    return " ".join([f"{MANY}x*{kind}"] * lists + [f"{MANY}xi8"] + [kind] * numbers + [*more])


@factory
def _sgd(dtype):
    @device
    def descend(x, c):
        (p, g), (lr, decay) = x, c
        return (p - lr * (g + decay * p),)
    kind, run = dtype.str[1:], _pass(descend, 2, dtype)

    def body(p, g, n, lr, decay):
        t, first = _task(cuda.blockIdx.x, n)
        run((_pick(t, p), _pick(t, g)), (lr, decay), first, _pick(t, n))
    return Kernel(body, _parameters(kind, 2, 2), threads=THREADS, name=f"sgd_{kind}")


@factory
def _momentum(dtype):
    """how: 1 if the buffer is new, 2 for Nesterov's, 3 for both."""
    @device
    def roll(x, c):
        (p, b, g), (lr, decay, momentum, keep, how) = x, c
        d = g + decay * p
        v = d if how & 1 else momentum * b + keep * d
        return p - lr * (d + momentum * v if how & 2 else v), v
    kind, run = dtype.str[1:], _pass(roll, 3, dtype)

    def body(p, b, g, n, lr, decay, momentum, keep, how):
        t, first = _task(cuda.blockIdx.x, n)
        run((_pick(t, p), _pick(t, b), _pick(t, g)), (lr, decay, momentum, keep, how), first,
            _pick(t, n))
    return Kernel(body, _parameters(kind, 3, 4, "i4"), threads=THREADS,
                  name=f"sgd_momentum_{kind}")


@factory
def _adam(dtype):
    """``step`` is lr / (1 − β₁ᵗ) and ``root`` √(1 − β₂ᵗ); where row is not negative, array t's are
    in row + t of ``found``, which ``_count`` has written."""
    real, sqrt = dtype.type, libm("sqrt", dtype)

    @device
    def adapt(x, c):
        (p, m, v, g), (step, root, shrink, decay, beta1, keep1, beta2, keep2, eps) = x, c
        q = p * shrink
        d = g + decay * q
        a, b = beta1 * m + keep1 * d, beta2 * v + keep2 * d * d
        return q - step * a / (sqrt(b) / root + eps), a, b
    kind, run = dtype.str[1:], _pass(adapt, 4, dtype)

    def body(p, m, v, g, n, step, root, shrink, decay, beta1, keep1, beta2, keep2, eps, found, row):
        t, first = _task(cuda.blockIdx.x, n)
        if row >= 0:
            step, root = real(found[2 * (row + t)]), real(found[2 * (row + t) + 1])
        run((_pick(t, p), _pick(t, m), _pick(t, v), _pick(t, g)),
            (step, root, shrink, decay, beta1, keep1, beta2, keep2, eps), first, _pick(t, n))
    return Kernel(body, _parameters(kind, 4, 9, "*f8", "i4"), threads=THREADS, name=f"adam_{kind}")


@factory
def _count():
    """A thread for each of n counts t on the device: t += 1, and what ``_adam`` needs of it."""
    pick, pow, sqrt = picker(COUNTS), libm("pow", np.float64), libm("sqrt", np.float64)

    def body(counts, n, found, lr, beta1, beta2):
        k = cuda.threadIdx.x
        if k < n:
            count = pick(k, counts)
            t = count[0] + 1
            count[0] = t
            found[2 * k] = lr / (1.0 - pow(beta1, np.float64(t)))
            found[2 * k + 1] = sqrt(1.0 - pow(beta2, np.float64(t)))
    return Kernel(body, f"{COUNTS}x*i8 i4 *f8 f8 f8 f8", threads=COUNTS, name="adam_count")


def every():
    """The kernels of float32 and float64, for those who compile them ahead."""
    yield _count()
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for make in (_sgd, _momentum, _adam):
            yield make(dtype)


def _launch(kernel, lists, numbers):
    """``kernel`` on lists of arrays of one dtype, MANY at a time; numbers(i): those of arrays from
    i on."""
    for i in range(0, len(lists[0]), MANY):
        parts = [arrays[i:i + MANY] for arrays in lists]
        missing = [None] * (MANY - len(parts[0]))
        sizes = [p.size for p in parts[0]] + [0] * len(missing)
        kernel(sum(-(-n // CHUNK) for n in sizes),
               *(a for part in parts for a in (*part, *missing)), *sizes, *numbers(i))


def _grouped(make, gs, owned, keys, numbers, plain):
    """make(dtype) for the arrays of each dtype and key; numbers(key, which) gives a function that
    gives a launch's numbers. Arrays with gaps, or in another order than their state, by ``plain``
    NumPy."""
    groups = {}
    for i, arrays in enumerate(zip(*owned)):
        p = arrays[0]
        if dense(p) is not p or any(a.strides != p.strides or a.dtype != p.dtype for a in arrays):
            plain(i)
        else:
            groups.setdefault((p.dtype, keys[i]), []).append(i)
    for (dtype, key), which in groups.items():
        mine = [[arrays[i] for i in which] for arrays in owned]
        ready = [alike(gs[i].astype(dtype, copy=False), p) for i, p in zip(which, mine[0])]
        _launch(make(dtype), [*mine, ready], numbers(key, which))


def _counted(counts, lr, beta1, beta2):
    """Each count on the device one further; rows (lr / (1 − β₁ᵗ), √(1 − β₂ᵗ)), in float64 as the
    host has them, but for pow's last bit or two."""
    found = empty((len(counts), 2), np.float64)
    for i in range(0, len(counts), COUNTS):
        some = counts[i:i + COUNTS]
        _count()(1, *some, *[None] * (COUNTS - len(some)), len(some), found[i:i + COUNTS], lr,
                 beta1, beta2)
    return found


def sgd_step(ps, gs, bufs, *, lr, momentum, dampening, weight_decay, nesterov, first, plans=None):
    """d = g + λp;  b ← μb + (1 − τ)d (d where ``first``);  p ← p − lr (nesterov: d + μb, else b).

    Sutskever et al. 2013, in PyTorch's form. bufs is None when momentum is 0.
    """
    def plain(i):
        reference.sgd_step([ps[i]], [gs[i]], None if bufs is None else [bufs[i]], lr=lr,
                           momentum=momentum, dampening=dampening, weight_decay=weight_decay,
                           nesterov=nesterov, first=[first[i]])
    if bufs is None:
        _grouped(_sgd, gs, (ps,), [0] * len(ps), lambda *_: lambda i: (lr, weight_decay), plain)
    else:
        _grouped(_momentum, gs, (ps, bufs), [bool(f) for f in first], lambda new, _: lambda i: (
            lr, weight_decay, momentum, 1 - dampening, new + 2 * bool(nesterov)), plain)


def adam_step(ps, gs, ms, vs, *, lr, beta1, beta2, eps, weight_decay, decoupled, steps, plans=None):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps), m̂ = m / (1 − β₁ᵗ).

    Kingma & Ba 2015. λ: g ← g + λp before; decoupled: p ← (1 − lr λ)p before (AdamW, Loshchilov &
    Hutter 2019). ``steps`` are t, or arrays () of int64 on the device with t − 1, which become t.
    """
    counted = bool(steps) and isinstance(steps[0], Array)

    def plain(i):
        if counted:
            _counted([steps[i]], lr, beta1, beta2)
        reference.adam_step([ps[i]], [gs[i]], [ms[i]], [vs[i]], lr=lr, beta1=beta1, beta2=beta2,
                            eps=eps, weight_decay=weight_decay, decoupled=decoupled,
                            steps=[steps[i]])

    def numbers(t, which):
        found = _counted([steps[i] for i in which], lr, beta1, beta2) if counted else None
        first = (0, 0) if counted else (lr / (1 - beta1 ** t), math.sqrt(1 - beta2 ** t))
        return lambda i: (*first, shrink, decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, found,
                          i if counted else -1)
    shrink, decay = (1 - lr * weight_decay, 0) if decoupled else (1, weight_decay)
    _grouped(_adam, gs, (ps, ms, vs), [None] * len(ps) if counted else steps, numbers, plain)
