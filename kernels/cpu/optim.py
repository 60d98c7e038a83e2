"""Optimizer steps, in place: all parameters in one call, one pass over each and its state.

A kernel gets the addresses of the arrays in a table, whatever their number and shapes: 14 calls for
the arrays of a small network cost as much as its matrix products.
"""

import math
from ctypes import addressof, c_char
from operator import is_

import numpy as np
from numba import carray, config, types
from numba.extending import intrinsic

from .jit import device
from .tasks import share, tasks

__all__ = ["adam_step", "sgd_step"]

CHUNK, PARTS = 1 << 13, 256  # values per task, and how many tasks there are at most
UNIT = 1 << 10             # values; shorter arrays stay whole


@intrinsic
def _pointer(typingctx, address, like):
    """An integer address as a pointer to like's values."""
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))
    return types.CPointer(like.dtype)(address, like), codegen


@device
def _at(table, row, t, first, count, like):
    """So many values of array t in that row of addresses."""
    return carray(_pointer(table[row, t] + first * like.itemsize, like), count)


if config.DISABLE_JIT:
    def _at(table, row, t, first, count, like):
        values = np.ctypeslib.as_ctypes_type(like.dtype) * int(count)
        address = int(table[row, t] + first * like.itemsize)
        return np.ctypeslib.as_array(values.from_address(address))


# Settings come as Python floats, which Numba takes in a third of the time of np.float32, and become
# the arrays' dtype in the loops: in float64 these would be half as fast.

@device
def _descend(p, g, lr, weight_decay):
    for i in range(p.size):
        p[i] -= lr * (g[i] + weight_decay * p[i])


@device
def _roll(p, g, buf, first, lr, momentum, keep, weight_decay, nesterov):
    for i in range(p.size):
        d = g[i] + weight_decay * p[i]
        b = d if first else momentum * buf[i] + keep * d
        buf[i] = b
        p[i] -= lr * (d + momentum * b if nesterov else b)


@device
def _adapt(p, g, m, v, step_size, root, shrink, weight_decay, beta1, beta2, keep1, keep2, eps):
    for i in range(p.size):
        q = p[i] * shrink
        d = g[i] + weight_decay * q
        a = beta1 * m[i] + keep1 * d
        b = beta2 * v[i] + keep2 * d * d
        m[i], v[i] = a, b
        p[i] = q - step_size * a / (np.sqrt(b) / root + eps)


@device
def _sgd_task(k, table, pieces, spans, like, lr, weight_decay):
    real = like.dtype.type
    for i in range(spans[k, 0], spans[k, 1]):
        t, first, n = pieces[i, 0], pieces[i, 1], pieces[i, 2]
        _descend(_at(table, 0, t, first, n, like), _at(table, 1, t, first, n, like), real(lr),
                 real(weight_decay))


@tasks
def _sgd(run, table, pieces, spans, like, lr, weight_decay):
    share(_sgd_task, spans.shape[0], run, (table, pieces, spans, like, lr, weight_decay))


@device
def _momentum_task(k, table, pieces, spans, like, new, lr, momentum, keep, weight_decay, nesterov):
    real = like.dtype.type
    for i in range(spans[k, 0], spans[k, 1]):
        t, first, n = pieces[i, 0], pieces[i, 1], pieces[i, 2]
        _roll(_at(table, 0, t, first, n, like), _at(table, 1, t, first, n, like),
              _at(table, 2, t, first, n, like), new[t], real(lr), real(momentum), real(keep),
              real(weight_decay), nesterov)


@tasks
def _momentum(run, table, pieces, spans, like, new, lr, momentum, keep, weight_decay, nesterov):
    share(_momentum_task, spans.shape[0], run,
          (table, pieces, spans, like, new, lr, momentum, keep, weight_decay, nesterov))


@device
def _adam_task(k, table, pieces, spans, like, steps, lr, weight_decay, decoupled, beta1, beta2,
               eps):
    real = like.dtype.type
    shrink, decay = (1 - lr * weight_decay, 0.0) if decoupled else (1.0, weight_decay)
    for i in range(spans[k, 0], spans[k, 1]):
        t, first, n = pieces[i, 0], pieces[i, 1], pieces[i, 2]
        _adapt(_at(table, 0, t, first, n, like), _at(table, 1, t, first, n, like),
               _at(table, 2, t, first, n, like), _at(table, 3, t, first, n, like),
               real(lr / (1 - beta1 ** steps[t])), real(math.sqrt(1 - beta2 ** steps[t])),
               real(shrink), real(decay), real(beta1), real(beta2), real(1 - beta1),
               real(1 - beta2), real(eps))


@tasks
def _adam(run, table, pieces, spans, like, steps, lr, weight_decay, decoupled, beta1, beta2, eps):
    share(_adam_task, spans.shape[0], run, (table, pieces, spans, like, steps, lr, weight_decay,
                                            decoupled, beta1, beta2, eps))


def _pieces(sizes):
    """Tasks: part k of every array is task k. Pieces as (array, first value, number of values), and
    those of each task as (first, end).

    The kernels that use a parameter and that make its gradient cut it in about the same proportion:
    what a core updates lies in its cache then.
    """
    parts, pieces, spans = max(1, min(PARTS, sum(sizes) // (2 * CHUNK) * 2)), [], []
    for k in range(parts):
        start = len(pieces)
        for t, n in enumerate(sizes):
            first, end = (min(n, -(-i * n // (parts * UNIT)) * UNIT) for i in (k, k + 1))
            if first < end:
                pieces.append((t, first, end - first))
        spans.append((start, len(pieces)))
    return np.array(pieces, np.int64).reshape(-1, 3), np.array(spans)


def _address(a):
    try:
        return addressof(c_char.from_buffer(a))     # 0.4 us; a.ctypes.data 1.0
    except (TypeError, ValueError):                 # read-only or empty
        return a.ctypes.data


class _Plan:
    """Addresses of parameters and their state, which stay where they are from step to step."""

    def __init__(self, owned):
        self.owned = owned
        sizes = [p.size for p in owned[0]]
        self.pieces, self.spans = _pieces(sizes)
        self.like = np.empty(0, owned[0][0].dtype)
        self.work = sum(sizes) * self.like.itemsize * (2 * len(owned) + 1)    # read and written
        rows = [[_address(a) for a in arrays] for arrays in owned]
        self.table = np.array([rows[0], rows[0], *rows[1:]])

    def fits(self, owned):
        return len(owned) == len(self.owned) and all(
            len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(owned, self.owned))

    def run(self, loop, gs, settings):
        self.table[1] = [_address(g) for g in gs]
        loop(self.table, self.pieces, self.spans, self.like, *settings, work=self.work)


def _dense(a, dtype):
    return a if a.flags.c_contiguous and a.dtype is dtype else np.ascontiguousarray(a, dtype)


def _are_ready(gs, dtype):
    return all(g.dtype is dtype and g.flags.c_contiguous for g in gs)


def _in_place(loop, gs, owned, per_array, settings, plans):
    """Run loop on the arrays of each dtype; those that are not C-ordered go through a copy."""
    if len(plans) == 1:                             # as in the step before
        (dtype, plan), = plans.items()
        if plan.fits(owned) and _are_ready(gs, dtype):
            plan.run(loop, gs, (*map(np.array, per_array), *settings))
            return
    for dtype in {p.dtype for p in owned[0]}:
        which = [i for i, p in enumerate(owned[0]) if p.dtype is dtype and p.size]
        if which:
            _in_place_of(dtype, which, loop, gs, owned, per_array, settings, plans)


def _in_place_of(dtype, which, loop, gs, owned, per_array, settings, plans):
    mine = [[arrays[i] for i in which] for arrays in owned]
    plan = plans.get(dtype)
    if plan is None or not plan.fits(mine):
        plan = _Plan([[_dense(a, dtype) for a in arrays] for arrays in mine])
        if plan.fits(mine):
            plans[dtype] = plan
    values = [np.array([a[i] for i in which]) for a in per_array]
    plan.run(loop, [_dense(gs[i], dtype) for i in which], (*values, *settings))
    for arrays, copies in zip(mine, plan.owned):
        for a, copy in zip(arrays, copies):
            if copy is not a:
                a[...] = copy


def sgd_step(ps, gs, bufs, *, lr, momentum, dampening, weight_decay, nesterov, first, plans=None):
    """d = g + λp;  b ← μb + (1 − τ)d (d where ``first``);  p ← p − lr (nesterov: d + μb, else b).

    Sutskever et al. 2013, in PyTorch's form. bufs is None when momentum is 0. ``plans``: a dict in
    which the caller keeps what stays the same from step to step.
    """
    plans = {} if plans is None else plans
    if bufs is None:
        _in_place(_sgd, gs, (ps,), (), (float(lr), float(weight_decay)), plans)
    else:
        _in_place(_momentum, gs, (ps, bufs), (first,), (
            float(lr), float(momentum), 1.0 - dampening, float(weight_decay), bool(nesterov)),
            plans)


def adam_step(ps, gs, ms, vs, *, lr, beta1, beta2, eps, weight_decay, decoupled, steps, plans=None):
    """m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  p ← p − lr m̂ / (√v̂ + eps), m̂ = m / (1 − β₁ᵗ).

    Kingma & Ba 2015. λ: g ← g + λp before; decoupled: p ← (1 − lr λ)p before (AdamW, Loshchilov &
    Hutter 2019).
    """
    _in_place(_adam, gs, (ps, ms, vs), (steps,), (
        float(lr), float(weight_decay), bool(decoupled), float(beta1), float(beta2), float(eps)),
        {} if plans is None else plans)
