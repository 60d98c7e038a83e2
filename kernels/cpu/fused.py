"""A linear layer, its batch norm and the activation behind them in one call.

Channels are independent: a task takes a block of them from the product over the statistics to the
activation while its columns are in a cache, and a small layer is one parallel region, where the
three kernels in turn are three calls and four regions. The gradient of x alone needs all channels:
a second region. Larger layers, whose regions cost little beside their work, are done in turn.
"""

from functools import cache, lru_cache

import numpy as np

from .. import formulas
from . import elementwise
from .batch_norm import ADDS, Plan, backward_block, forward_block, infinite, lost, move
from .columns import BY_Y, RELU, inner
from .matmul import _NOTHING, _empty, dots_preferred, linear, linear_backward
from .norm import _vector, batch_norm, batch_norm_backward
from .products import (
    DEPTH,
    TASK,
    TASKS,
    as_bytes,
    dots_block,
    sums_between,
    tiles_shares,
    tiles_task,
)
from .simd import VECTOR, lanes, load, load_part, store, store_part
from .tasks import share, tasks
from .tiles import pack, strip

__all__ = ["linear_batch_norm", "linear_batch_norm_backward"]

KINDS = {None: 0, "relu": 1, "sigmoid": 2, "tanh": 3}
LARGEST = 1 << 20          # bytes of x, w and z, each, that are read once for each task
LEAST = 2                  # vectors of channels per task: x is read once for each task


@inner
def _edge(i, tasks, C, L):
    """The first channel of task i: channels are cut between vectors."""
    return min(C, i * ((C + L - 1) // L) // tasks * L)


@inner
def _plan(N, C, tasks, L):
    """The Plan of (N, C) memory whose blocks are those of the tasks."""
    width = min(C, ((C + L - 1) // L + tasks - 1) // tasks * L)
    return Plan(N, C, 1, 1, 1, width, width, 1, width, ADDS, N, 1, tasks, 0, 0)


@inner
def _product(x, w, bias, N, K, C, c0, c1, z):
    """Columns c0 … c1 of z = x wᵀ + bias."""
    W, depth, sj = 2 * lanes(x), DEPTH // x.itemsize, 1 if bias.size == C else 0
    if dots_preferred(N, C, K, x.itemsize):
        dots_block(0, N, c0, c1, C, K, x, w, bias, sj, z)
        return
    panel = np.empty(min(K, depth) * W, x.dtype)
    for k0 in range(0, K, depth):
        k = min(depth, K - k0)
        for c in range(c0, c1, W):
            n = min(W, c1 - c)
            pack(w, c * K + k0, 1, K, n, k, panel, 0)
            if k0:
                strip(N, n, k, x, k0, K, 1, panel, 0, W, z, c, C, z, c, C, 0, 0)
            else:
                strip(N, n, k, x, 0, K, 1, panel, 0, W, bias, c * sj, 0, z, c, C, 0, 0)


@inner
def _weight_gradient(dz, x, zeros, N, K, C, c0, c1, dw):
    """Rows c0 … c1 of dw = dzᵀ x."""
    W, depth, m = 2 * lanes(x), DEPTH // x.itemsize, c1 - c0
    for r in range(0, N, depth):
        rows, at = min(depth, N - r), r * C + c0
        for k in range(0, K, W):
            n, to = min(W, K - k), c0 * K + k
            if r:
                strip(m, n, rows, dz, at, 1, C, x, r * K + k, K, dw, to, K, dw, to, K, 0, 0)
            else:
                strip(m, n, rows, dz, at, 1, C, x, k, K, zeros, 0, 0, dw, to, K, 0, 0)


@cache
def _forward(dtype):
    sigmoid, tanh = formulas.sigmoid(dtype.type), formulas.tanh

    @inner
    def activate(y, kind, N, C, c0, c1):
        L = lanes(y)
        for i in range(0, N * C, C):
            for j in range(i + c0, i + c1 - L + 1, L):
                v = load(y, j)
                store(y, j, sigmoid(v) if kind == 2 else tanh(v))
            n = (c1 - c0) % L
            if n:
                v = load_part(y, i + c1 - n, n)
                store_part(y, i + c1 - n, sigmoid(v) if kind == 2 else tanh(v), n)

    @inner
    def task(t, n, N, K, C, x, w, bias, gamma, beta, eps, kind, z, y, mean, var, invstd,
             block_mean, block_m2):
        c0, c1 = _edge(t, n, C, lanes(x)), _edge(t + 1, n, C, lanes(x))
        _product(x, w, bias, N, K, C, c0, c1, z)
        forward_block(z, z, gamma, beta, eps, _plan(N, C, n, lanes(x)), 0, c0, c1, True,
                      RELU if kind == 1 else 0, y, mean, var, invstd, block_mean, block_m2)
        if kind > 1:
            activate(y, kind, N, C, c0, c1)

    def forward(run, x, w, bias, gamma, beta, running_mean, running_var, momentum, eps, kind, n,
                z, y, stats):
        """z, y and stats: mean, var and invstd. True if float32 is not enough."""
        (N, K), C = x.shape, w.shape[0]
        x, w, z, y = x.reshape(-1), w.reshape(-1), z.reshape(-1), y.reshape(-1)
        mean, var, invstd = stats[0], stats[1], stats[2]
        block_mean, block_m2 = np.empty(C), np.empty(C)
        share(task, n, run, (n, N, K, C, x, w, bias, gamma, beta, eps, kind, z, y, mean, var,
                             invstd, block_mean, block_m2))
        if lost(z, var, invstd, eps):
            return True
        move(running_mean, running_var, momentum, N, mean, var)
        return False

    return tasks(forward, name=f"linear_batch_norm_{dtype.name}")


@cache
def _backward(dtype):
    of_sigmoid, of_tanh = formulas.sigmoid_backward(dtype.type), formulas.tanh_backward(dtype.type)

    @inner
    def activate(dy, y, du, kind, N, C, c0, c1):
        L = lanes(y)
        for i in range(0, N * C, C):
            for j in range(i + c0, i + c1 - L + 1, L):
                d, v = load(dy, j), load(y, j)
                store(du, j, of_sigmoid(d, v) if kind == 2 else of_tanh(d, v))
            n = (c1 - c0) % L
            if n:
                j = i + c1 - n
                d, v = load_part(dy, j, n), load_part(y, j, n)
                store_part(du, j, of_sigmoid(d, v) if kind == 2 else of_tanh(d, v), n)

    @inner
    def task(t, n, N, K, C, dy, x, zeros, gamma, z, y, mean, invstd, kind, dz, sums, block_dy,
             block_p, dw, dgamma, dbeta, db):
        c0, c1 = _edge(t, n, C, lanes(x)), _edge(t + 1, n, C, lanes(x))
        du = dy
        if kind > 1:
            activate(dy, y, dz, kind, N, C, c0, c1)
            du = dz
        backward_block(z, du, y, gamma, gamma[:0], mean, invstd, _plan(N, C, n, lanes(x)), 0,
                       c0, c1, True, BY_Y if kind == 1 else 0, dz, block_dy, block_p, sums[0],
                       sums[1], dgamma, dbeta, dz)
        sums_between(c0, c1, dz, N, C, db)
        _weight_gradient(dz, x, zeros, N, K, C, c0, c1, dw)

    @inner
    def input_task(t, blocks, groups, N, C, K, w, zeros, dz, dx):
        W = 2 * lanes(dz)
        tiles_task(t, blocks, groups, N, C, K, W, dz, 0, C, 1, 0, w, 0, W, K, zeros, 0, dx)

    def backward(run, dy, x, w, zeros, gamma, z, y, mean, invstd, kind, n, dz, dx, dw, dgamma,
                 dbeta, db):
        """dz, dw, dgamma, dbeta and db, and dx unless it is empty. True if float32 is not enough:
        nothing holds then."""
        (N, K), C = x.shape, w.shape[0]
        dy, x, w = dy.reshape(-1), x.reshape(-1), w.reshape(-1)
        z, y = z.reshape(-1), y.reshape(-1)
        dz, dw = dz.reshape(-1), dw.reshape(-1)
        if lost(x, invstd, invstd, 1.0):
            return True
        sums, block_dy, block_p = np.empty((2, C)), np.empty(C), np.empty(C)
        share(task, n, run, (n, N, K, C, dy, x, zeros, gamma, z, y, mean, invstd, kind, dz, sums,
                             block_dy, block_p, dw, dgamma, dbeta, db))
        if infinite(x, sums[0], sums[1]):
            return True
        if dx.size:
            blocks, groups = tiles_shares(1, N, C, K, 2 * lanes(x))
            share(input_task, blocks * groups, run,
                  (blocks, groups, N, C, K, w, zeros, dz, dx))
        return False

    return tasks(backward, name=f"linear_batch_norm_backward_{dtype.name}")


@lru_cache(1 << 12)
def _in_one(N, K, C, dtype):
    """The kernels of such a layer and the number of their tasks, by its size and even; None where
    the layer is too large for them."""
    largest = max(N * K, C * K, N * C) * dtype.itemsize
    if N * K * C == 0 or dtype not in _NOTHING or largest >= LARGEST:
        return None
    n = min(TASKS, N * K * C >> TASK, -(-C * dtype.itemsize // VECTOR) // LEAST)
    return _forward(dtype), _backward(dtype), n - n % 2 if n > 1 else 1


def _writable(running):
    return running is None or (running[0].flags.carray and running[1].flags.carray)


def linear_batch_norm(x, weight, bias, gamma, beta, *, eps, activation=None, running=None):
    """y = φ(ẑ γ + β) of z = x wᵀ + b, z, and z's mean and invstd; ``running`` as in batch_norm.

    x: (N, K)  weight: (C, K)  φ: None, "relu", "sigmoid" or "tanh"."""
    (N, K), C, dtype = x.shape, weight.shape[0], x.dtype
    way = _in_one(N, K, C, dtype) if weight.dtype == dtype else None
    if way is not None and _writable(running):
        zeros, none = _NOTHING[dtype]
        mean, var, momentum = (none, none, 0.0) if running is None else running
        z, y, stats = _empty(N, C, dtype), _empty(N, C, dtype), np.empty((3, C))
        if not way[0](np.ascontiguousarray(x), np.ascontiguousarray(weight),
                      zeros if bias is None else _vector(bias, dtype), _vector(gamma, dtype),
                      _vector(beta, dtype), mean, var, float(momentum), float(eps),
                      KINDS[activation], way[2], z, y, stats, work=as_bytes(N * K * C)):
            return y, z, stats[0], stats[2]
    z = linear(x, weight, bias)
    y, mean, _, invstd = batch_norm(z, gamma, beta, eps=eps, relu=activation == "relu",
                                    running=running)
    if activation in ("sigmoid", "tanh"):
        y = getattr(elementwise, activation)(y)
    return y, z, mean, invstd


def linear_batch_norm_backward(dy, x, weight, gamma, z, y, mean, invstd, *, activation=None,
                               input_gradient):
    """dx (0 unless asked for), dw, dγ, dβ and db from what linear_batch_norm returned."""
    (N, K), C, dtype = x.shape, weight.shape[0], x.dtype
    way = _in_one(N, K, C, dtype) if weight.dtype == dtype == dy.dtype else None
    if way is not None:
        zeros, dx = _NOTHING[dtype]
        if input_gradient:
            dx = _empty(N, K, dtype)
        dz, dw = _empty(N, C, dtype), _empty(C, K, dtype)
        dgamma, dbeta, db = np.empty(C, dtype), np.empty(C, dtype), np.empty(C, dtype)
        if not way[1](np.ascontiguousarray(dy), np.ascontiguousarray(x),
                      np.ascontiguousarray(weight), zeros, _vector(gamma, dtype), z, y, mean,
                      invstd, KINDS[activation], way[2], dz, dx.reshape(-1), dw, dgamma, dbeta, db,
                      work=as_bytes((2 if input_gradient else 1) * N * K * C)):
            return dx if input_gradient else np.zeros((), dtype), dw, dgamma, dbeta, db
    masked = activation == "relu"
    if activation in ("sigmoid", "tanh"):
        dy = getattr(elementwise, f"{activation}_backward")(dy, y)
    dz, dgamma, dbeta, _ = batch_norm_backward(dy, z, gamma, mean, invstd, y=y if masked else None,
                                               relu=masked)
    dx, dw, db = linear_backward(dz, x, weight, input_gradient=input_gradient)
    return dx, dw, dgamma, dbeta, db
