"""nbgrad's side: each function prepares the arrays of one op and returns the call that is timed.

``k`` is a set of kernels: ``nbgrad.kernels.cpu``, or ``reference``, against which tests compare.
What lies in channels-last memory is what nbgrad's own layers hand on.
"""

import inspect

import numpy as np
from nbgrad.kernels import cpu, reference

import nbgrad
from nbgrad import models

from . import ceilings, ladder, on_both, other_norms
from .data import factors, normal

__all__ = ["build", "set_num_threads"]

set_num_threads = nbgrad.set_num_threads
EPS = 1e-5
LOSS = {"ignore_index": -100, "label_smoothing": 0.0}


def build(case, how=""):
    """The call of a case; ``how`` is "", "one thread", "composed" or "reference"."""
    if case.op in ("copy", "fma"):
        return getattr(ceilings, case.op)(**case.settings)
    if case.op == "ladder":
        return ladder.build(how, **case.settings)
    if case.op == "other_norm":
        return other_norms.build(put, how == "composed", **case.settings)
    if case.op in on_both.OPS:
        return getattr(on_both, case.op)(nbgrad, put, network, **case.settings)
    return globals()[case.op](reference if how == "reference" else cpu, **case.settings)


def small():
    """A first operation."""
    return nbgrad.ones(2).relu()


def put(a, last=False):
    """A copy in memory as nbgrad's own outputs have it: aligned, channels-last if asked."""
    like = a.transpose(0, 2, 3, 1) if last else a
    out = cpu.memory.empty(like.shape, a.dtype)
    out[...] = like
    return out.transpose(0, 3, 1, 2) if last else out


def some(shape, seed=0, last=False):
    return put(normal(shape, seed), last)


def network(name):
    """A model by name, and its images in the memory format it likes best."""
    if name == "mlp":
        return models.create("mlp", in_features=784, activation="sigmoid")
    return models.create(name)


def matmul(k, M, K, N, dtype, transposed):
    a, b = factors(M, K, N, dtype, transposed)
    return lambda: k.matmul(a, b)


def _conv(conv, size):
    y = (conv.x[0], conv.weight[0], *size)
    return some(conv.x, 0, last=True), some(conv.weight, 1), some(y, 2, last=True)


def conv_forward(k, conv, size):
    x, weight, _ = _conv(conv, size)
    return lambda: k.conv2d(x, weight, None, **conv.settings)


def conv_input_gradient(k, conv, size):
    _, weight, dy = _conv(conv, size)
    return lambda: k.conv2d_input(dy, weight, input_size=conv.x, **conv.settings)


def conv_weight_gradient(k, conv, size):
    x, _, dy = _conv(conv, size)
    return lambda: k.conv2d_weight(dy, x, kernel_size=conv.weight[2:], **conv.settings)


def _norm(shape, layout):
    """x, dy, a residual, γ and β."""
    C = shape[1]
    return (*(some(shape, seed, layout == "channels-last") for seed in range(3)),
            some((C,), 3), some((C,), 4))


def batch_norm_forward(k, shape, layout):
    x, _, _, gamma, beta = _norm(shape, layout)
    return lambda: k.batch_norm(x, gamma, beta, eps=EPS)


def batch_norm_backward(k, shape, layout):
    x, dy, _, gamma, beta = _norm(shape, layout)
    _, mean, _, invstd = k.batch_norm(x, gamma, beta, eps=EPS)
    return lambda: k.batch_norm_backward(dy, x, gamma, mean, invstd)[:3]


def batch_norm_evaluation(k, shape, layout):
    """With running statistics, given as they are: variances."""
    x, _, _, gamma, beta = _norm(shape, layout)
    _, mean, var, _ = k.batch_norm(x, gamma, beta, eps=EPS)
    return lambda: k.batch_norm_elemt(x, gamma, beta, mean, 1 / np.sqrt(var + EPS))


def batch_norm_add_relu(k, shape, layout):
    """y = max(bn(x) + r, 0), then all gradients: dx, dr, dγ, dβ."""
    x, dy, r, gamma, beta = _norm(shape, layout)

    def separate():
        y, mean, _, invstd = k.batch_norm(x, gamma, beta, eps=EPS)
        y = k.relu(k.add(y, r))
        dr = k.relu_backward(dy, y)
        return y, *k.batch_norm_backward(dr, x, gamma, mean, invstd)[:3], dr

    def fused():
        y, mean, _, invstd = k.batch_norm(x, gamma, beta, r, eps=EPS, relu=True)
        return y, *k.batch_norm_backward(dy, x, gamma, mean, invstd, beta=beta, y=y, relu=True,
                                         residual=True)
    return fused if "residual" in inspect.signature(k.batch_norm).parameters else separate


def _group(shape, layout):
    last = layout == "channels-last"
    return some(shape, 0, last), some(shape, 1, last), some(shape[1:2], 3), some(shape[1:2], 4)


def group_norm_forward(k, shape, groups, layout):
    x, _, gamma, beta = _group(shape, layout)
    return lambda: k.group_norm(x, gamma, beta, groups=groups, eps=EPS)[0]


def group_norm_backward(k, shape, groups, layout):
    x, dy, gamma, beta = _group(shape, layout)
    _, mean, invstd = k.group_norm(x, gamma, beta, groups=groups, eps=EPS)
    return lambda: k.group_norm_backward(dy, x, gamma, mean, invstd, groups=groups)


instance_norm_forward, instance_norm_backward = group_norm_forward, group_norm_backward


def rms_norm_forward(k, shape):
    x, gamma = some(shape), some(shape[1:], 3)
    return lambda: k.rms_norm(x, gamma, dims=1, eps=EPS)[0]


def rms_norm_backward(k, shape):
    x, dy, gamma = some(shape), some(shape, 1), some(shape[1:], 3)
    _, invrms = k.rms_norm(x, gamma, dims=1, eps=EPS)
    return lambda: k.rms_norm_backward(dy, x, gamma, invrms, dims=1)


def pointwise(k, shape, f):
    x, y = some(shape), some(shape, 1)
    if f == "dropout":
        return on_both.dropout(nbgrad, x)
    call = getattr(k, f)
    return (lambda: call(x, y)) if f == "add" or f.endswith("backward") else lambda: call(x)


def softmax(k, shape):
    x = some(shape)
    return lambda: k.softmax(x, axis=1)


def log_softmax(k, shape):
    x = some(shape)
    return lambda: k.log_softmax(x, axis=1)


def layer_norm_forward(k, shape):
    x, gamma, beta = some(shape), some(shape[1:], 3), some(shape[1:], 4)
    return lambda: k.layer_norm(x, gamma, beta, dims=1, eps=EPS)


def layer_norm_backward(k, shape):
    x, dy, gamma, beta = some(shape), some(shape, 1), some(shape[1:], 3), some(shape[1:], 4)
    _, mean, invstd = k.layer_norm(x, gamma, beta, dims=1, eps=EPS)
    return lambda: k.layer_norm_backward(dy, x, gamma, mean, invstd, dims=1)


def sum(k, shape, axes):
    x = some(shape)
    axes = tuple(range(len(shape))) if axes is None else axes
    return lambda: k.sum(x, axes=axes, keepdims=False)


def max_pool_forward(k, pool, size):
    x = some(pool.x, last=True)
    return lambda: k.max_pool2d(x, dilation=(1, 1), **pool.settings)


def max_pool_backward(k, pool, size):
    y, indices = max_pool_forward(k, pool, size)()
    dy = some(y.shape, 1, last=True)
    return lambda: k.max_pool2d_backward(dy, indices, input_size=pool.x)


def avg_pool_forward(k, pool, size):
    x = some(pool.x, last=True)
    return lambda: k.avg_pool2d(x, count_include_pad=True, divisor_override=None, **pool.settings)


def avg_pool_backward(k, pool, size):
    dy = some((*pool.x[:2], *size), 1, last=True)
    return lambda: k.avg_pool2d_backward(dy, input_size=pool.x, count_include_pad=True,
                                         divisor_override=None, **pool.settings)
