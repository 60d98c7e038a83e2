"""Every op in the registry: gradients to second order against finite differences, documentation,
and a mutation test that shows that the gradient checks notice a changed or missing term."""

import ast
import gc
import importlib
import inspect
import math
import types
from functools import partial

import numpy as np
import pytest

import nbgrad
import nbgrad.ops as F
from nbgrad import backend
from nbgrad.autograd import OPS, Tensor, as_tensor, grad
from nbgrad.ops.norm.samples import Sampled
from nbgrad.testing import GradcheckError, gradcheck

NOT_DIFFERENTIATED = {
    "all", "any", "argmax", "argmin", "eq", "floor_divide", "ge", "gt", "isfinite", "isinf",
    "isnan", "le", "logical_and", "logical_not", "logical_or", "logical_xor", "lt", "ne",
    "remainder"}
INTEGERS_ONLY = {"bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor"}
PIECEWISE_LINEAR = {"relu_backward", "leaky_relu_backward"}    # second input: zero gradient
ZERO_GRADIENT = {"ceil", "floor", "round", "sign", "trunc"}

rng = np.random.default_rng(7)


def real(*shape, low=None, high=None):
    """Random values; away from kinks and poles where bounds are given."""
    x = rng.standard_normal(shape) if low is None else rng.uniform(low, high, shape)
    return as_tensor(x)


def distinct(*shape):
    """Values 0.1 and more apart: a step of finite differences swaps no two."""
    return as_tensor((rng.permutation(np.prod(shape)) * 0.1 - 0.7).reshape(shape))


def kinked(*shape):
    """Both signs, 0.1 and more away from 0."""
    x = rng.uniform(0.1, 2, shape)
    return as_tensor(x * np.where(np.arange(x.size).reshape(shape) % 2, 1, -1))


INDEX = np.array([[0, 2], [1, 1]])
KEEP = np.array([[True, False, True], [False, True, True]])
TARGET = np.array([0, 2, -100, 1])
CLASS_WEIGHT = np.array([0.5, 2.0, 1.0])
CONV = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
POOL = {"kernel_size": (2, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": True,
        "count_include_pad": False, "divisor_override": None}
BETA = np.array([0.3, -0.4, 0.1])
MEAN, INVSTD = np.array([0.3, -0.2, 0.1]), np.array([1.5, 0.5, 1.0])


def statistics(x, eps=1e-5):
    """What batch_norm hands to its backward."""
    axes = (0, *range(2, x.ndim))
    return {"mean": x.data.mean(axes), "invstd": 1 / np.sqrt(x.data.var(axes) + eps), "eps": eps}


def op(name, **settings):
    return lambda *xs: OPS[name](*xs, **settings)


def of_batch(dy, x, gamma):
    return OPS["batch_norm_backward"](dy, x, gamma, **statistics(x))


def of_batch_with_relu(dy, x, gamma, y=None):
    """The mask comes from x, γ and β, or from y; neither β nor y has a gradient."""
    beta = as_tensor(BETA) if y is None else None
    return OPS["batch_norm_backward"](dy, x, gamma, beta, y, relu=True, **statistics(x))


def linear_norm(activation):
    """linear_batch_norm at a constant bias: what it adds, the norm takes out again."""
    return lambda x, w, g, b: OPS["linear_batch_norm"](
        x, w, g, b, as_tensor(BETA), eps=1e-3, activation=activation)


def of_linear_norm(activation):
    def f(dy, x, w, gamma):
        z = x.data @ w.data.T
        kept = statistics(as_tensor(z), 1e-3)
        u = (z - kept["mean"]) * kept["invstd"] * gamma.data + BETA
        y = {None: u, "relu": np.maximum(u, 0), "sigmoid": 1 / (1 + np.exp(-u)),
             "tanh": np.tanh(u)}[activation]
        return OPS["linear_batch_norm_backward"](
            dy, x, w, gamma, as_tensor(BETA), None, z=z, y=y, activation=activation,
            input_gradient=True, **kept)
    return f


def of_layer(dy, x, gamma):
    rows = x.data.reshape(4, -1)
    return OPS["layer_norm_backward"](dy, x, gamma, mean=rows.mean(1), eps=1e-5, dims=2,
                                      invstd=1 / np.sqrt(rows.var(1) + 1e-5))


def of_group(groups, center=True):
    def f(dy, x, gamma):
        parts = x.data.reshape(x.shape[0], groups, -1)
        mean = parts.mean(2) * center
        var = ((parts - mean[..., None]) ** 2).mean(2)
        return OPS["group_norm_backward"](dy, x, gamma, mean=mean, invstd=1 / np.sqrt(var + 1e-3),
                                          groups=groups, eps=1e-3, center=center)
    return f


def of_rms(dy, x, gamma):
    rows = x.data.reshape(4, -1)
    return OPS["rms_norm_backward"](dy, x, gamma, eps=1e-3, dims=2,
                                    invrms=1 / np.sqrt((rows ** 2).mean(1) + 1e-3))


def of_response(dy, x, gamma=None, beta=None, tau=None):
    square = (x.data ** 2).mean(2) + 0.1
    return OPS["filter_response_norm_backward"](dy, x, gamma, beta, tau, eps=0.1,
                                                mean=np.zeros(square.shape),
                                                invrms=1 / np.sqrt(square))


FLOOR = as_tensor([0.3, -0.2, 0.1]), as_tensor([0.4, -0.5, 0.2])


def of_learned_response(dy, x, gamma, extra):
    square = (x.data ** 2).mean(2) + 0.1 + extra.data
    return OPS["filter_response_norm_eps_backward"](dy, x, gamma, extra, eps=0.1,
                                                    invrms=1 / np.sqrt(square).reshape(-1))


def of_ghosts(size):
    def f(dy, x, gamma):
        parts = [x.data[i:i + size] for i in range(0, len(x.data), size)]
        mean, var = (np.stack([g((0, 2)) for g in [getattr(p, w) for p in parts]])
                     for w in ("mean", "var"))
        return OPS["ghost_batch_norm_backward"](dy, x, gamma, mean=mean, size=size, eps=1e-3,
                                                invstd=1 / np.sqrt(var + 1e-3))
    return f


def gradients_of(f):
    """The gradients of f(x, *parameters), by the op of its backward, as a function of ∂y, too."""
    def run(dy, *xs):
        with nbgrad.enable_grad():
            at = [x if x.requires_grad else x.detach().requires_grad_() for x in xs]
            return tuple(grad(f(*at), at, dy, create_graph=True))
    return run


def lp(p, **settings):
    return lambda *xs: nbgrad.ops.lp_batch_norm(*xs, p=p, eps=0.1, **settings)[0]


def whitened(size):
    return lambda x, *gains: nbgrad.ops.whiten(x, size, 0.1, *gains)[0]


def mixed(x, gamma=None, beta=None):
    """By matrices that are not symmetric, as averages of others hardly are."""
    w = np.array([[[1.0, 0.5], [-0.25, 2.0]], [[0.5, 0.0], [1.5, -1.0]]])
    return op("whiten_inference", mean=np.arange(4.0), w=w)(x, gamma, beta)


def over_sigma(w):
    """At the constants u and v of another matrix."""
    u, v = np.array([0.6, 0.8, 0.0]), np.array([0.5, -0.5, 0.5, 0.5])
    return OPS["spectral_norm"](w, u=u, v=v, sigma=float(u @ w.data @ v))


SIGMA = as_tensor(np.outer([0.6, 0.8, 0.1], [0.5, -0.5, 0.4, 0.6]) * 3)
WEIGHTS = np.array([[1.0, 0.0], [0.5, 2.0], [0.0, 1.0], [1.5, 0.7]])[:, None]


def of_weighted(w):
    def f(dy, x, gamma):
        found = nbgrad.ops.moments(x, mask=w)
        return OPS["weighted_batch_norm_backward"](
            dy, x, gamma, count=found.count, mean=found.mean, eps=1e-3, w=w,
            invstd=1 / np.sqrt(found.var() + 1e-3))
    return f


def sampled(name, *settings):
    """One of the norms that the op sample_norm is, by its module and its functions' names."""
    module, formula, constants, composed = {
        "b0": ("response", "bounded", "_b0_constants", "_b0"),
        "s0": ("response", "gated", "_s0_constants", "_s0"),
        "s0 linear": ("response", "affine", "_s0_constants", "_s0"),
        "global": ("response", "affine", "_global_constants", "_global"),
        "switchable": ("switchable", "affine", "_constants", "_composed")}[name]
    module = importlib.import_module(f"nbgrad.ops.norm.{module}")
    first = settings[-1:] if name == "global" else settings          # _global knows the area
    return Sampled(formula, partial(getattr(module, constants), *settings),
                   partial(getattr(module, composed), *first))


def of_samples(how, parameters):
    """Of dy, x and the parameters but β, on which it does not depend; and these."""
    (at,) = (i for i, t in enumerate(parameters) if t is BIAS)

    def f(dy, x, *others):
        parameters = (*others[:at], BIAS, *others[at:])
        axes = tuple(range(2, x.ndim))
        return OPS["sample_norm_backward"](dy, x, *parameters, mean=x.data.mean(axes),
                                           var=x.data.var(axes), how=how)
    return f, parameters[:at] + parameters[at + 1:]


BIAS = real(4)


def _sampled():
    gains = real(4), BIAS
    v, std = as_tensor(np.array([1.0, -0.5, 2.0, 0.3])), as_tensor(np.full((1, 4, 1), 1.3))
    return [(sampled("b0", 1e-3), (v, std, *gains)), (sampled("s0", 2, 1e-3), (*gains, v)),
            (sampled("s0 linear", 2, 1e-3), gains), (sampled("global", 3, 1e-3), gains),
            (sampled("switchable", 1e-3), (real(3), real(3), *gains)),
            (sampled("switchable", 1e-3), (real(3), real(3), *gains, real(1, 4, 1), std))]


SAMPLED = _sampled()


def softmax_of(x):
    return as_tensor(np.exp(x.data) / np.exp(x.data).sum(1, keepdims=True))


def cross(reduction, weight=None, smoothing=0.0):
    return op("cross_entropy", target=TARGET, weight=weight, ignore_index=-100, reduction=reduction,
              label_smoothing=smoothing)


ACTIVE = kinked(4, 3).data.clip(0)
POOL_INDICES = nbgrad.max_pool2d(distinct(2, 2, 5, 4), 2, return_indices=True)[1].data

SOFT = as_tensor(np.array([-1.5, -0.5, 0.4, 1.0, 1.6, 1.9]))          # 1.5 x is on both sides of 2

# name -> [(function, inputs)]: each input is checked, and the first and second derivatives
SAMPLES = {
    "add": [(op("add"), (real(2, 3), real(3))), (op("add", alpha=2.5), (real(2, 3), real(2, 1)))],
    "sub": [(op("sub"), (real(2, 3), real(3))), (op("sub", alpha=2.5), (real(2, 3), real(2, 1)))],
    "mul": [(op("mul"), (real(2, 3), real(3)))],
    "div": [(op("div"), (real(2, 3), real(3, low=0.5, high=2)))],
    "pow": [(op("pow"), (real(2, 3, low=0.5, high=2), real(3))), (lambda x: x ** 3, (real(2, 3),)),
            (lambda x: x ** 2, (real(2, 3),))],
    "maximum": [(op("maximum"), (distinct(2, 3), as_tensor(distinct(2, 3).data + 0.05)))],
    "minimum": [(op("minimum"), (distinct(2, 3), as_tensor(distinct(2, 3).data + 0.05)))],
    **{name: [(op(name), (real(2, 3, low=0.5, high=2),))]
       for name in ("log", "log1p", "sqrt", "rsqrt", "reciprocal")},
    **{name: [(op(name), (kinked(2, 3),))]
       for name in ("exp", "expm1", "square", "sin", "cos", "erf", "neg", "abs", "relu", "sigmoid",
                    "silu", "tanh", "gelu", "gelu_tanh", "leaky_relu", "elu", "softplus", "alias",
                    "clone", "contiguous")},
    **{name + "_backward": [(op(name + "_backward"), (real(2, 3), kinked(2, 3)))]
       for name in ("relu", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh")},
    "leaky_relu_backward": [(op("leaky_relu_backward", negative_slope=0.3),
                             (real(2, 3), kinked(2, 3)))],
    "elu_backward": [(op("elu_backward", alpha=1.3), (real(2, 3), kinked(2, 3)))],
    "softplus_backward": [(op("softplus_backward", beta=1.5, threshold=2.0), (real(6), SOFT))],
    "clamp": [(op("clamp", min=-0.35, max=0.25), (distinct(3, 4),))],
    "where": [(op("where", condition=KEEP), (real(2, 3), real(3)))],
    "mask": [(op("mask", keep=KEEP), (real(2, 3),))],
    "sum": [(op("sum"), (real(2, 3),)), (op("sum", dim=(0, -1), keepdim=True), (real(2, 3, 2),)),
            (op("sum", dim=1), (real(2, 3, 2),))],
    "sum_to": [(op("sum_to", shape=(3, 1)), (real(2, 3, 4),))],
    "mean": [(op("mean"), (real(2, 3),)), (op("mean", dim=(0, 2)), (real(2, 3, 2),))],
    "amax": [(op("amax", dim=1), (distinct(3, 4),)), (op("amax"), (distinct(3, 4),))],
    "amin": [(op("amin", dim=0, keepdim=True), (distinct(3, 4),)), (op("amin"), (distinct(3, 4),))],
    "prod": [(op("prod", dim=1), (kinked(3, 4),)), (op("prod"), (kinked(2, 2),)),
             (op("prod", dim=1), (as_tensor(np.array([[0.0, 1.2, -0.7], [0.5, -1.1, 2.0],
                                                      [0.0, 0.0, 3.0]])),))],
    "norm": [(op("norm", dim=1, keepdim=False), (real(3, 4),))],
    "cumsum": [(op("cumsum", dim=1), (real(3, 4),))],
    "cast": [(lambda x: OPS["cast"](x, dtype=np.float64) * x, (real(3),))],
    "to_device": [(lambda x: OPS["to_device"](x, device="cpu") * x, (real(3),))],
    "reshape": [(op("reshape", shape=(3, 2)), (real(2, 3),))],
    "permute": [(op("permute", dims=(2, 0, 1)), (real(2, 3, 4),))],
    "transpose": [(op("transpose", dim0=0, dim1=-1), (real(2, 3, 4),))],
    "broadcast_to": [(op("broadcast_to", shape=(4, 2, 3)), (real(2, 1),))],
    "cat": [(op("cat", dim=1), (real(2, 3), real(2, 1), real(2, 2)))],
    "getitem": [(op("getitem", index=(slice(None, None, -2), 1)), (real(3, 4),)),
                (op("getitem", index=INDEX), (real(3, 4),))],
    "index_add": [(op("index_add", index=INDEX, shape=(3,)), (real(2, 2),)),
                  (op("index_add", index=(slice(1, None), None, 0), shape=(3, 2)), (real(2, 1),))],
    "index_put": [(op("index_put", index=(slice(1, None), 0)), (real(3, 2), real(2))),
                  (op("index_put", index=KEEP), (real(2, 3), real(4)))],
    "pad": [(op("pad", widths=((1, 0), (0, 2)), value=0.5), (real(2, 3),))],
    "matmul": [(op("matmul"), (real(2, 1, 3, 4), real(3, 4, 2))),
               (op("matmul"), (real(4), real(2, 4, 3))),
               (op("matmul"), (real(2, 3, 4), real(4))), (op("matmul"), (real(4), real(4)))],
    "linear": [(op("linear"), (real(2, 3, 4), real(5, 4), real(5))),
               (op("linear"), (real(4), real(5, 4)))],
    "linear_backward": [(op("linear_backward", input_gradient=True),
                         (real(3, 5), real(3, 4), real(5, 4))),
                        (op("linear_backward", input_gradient=True),
                         (real(2, 3, 5), real(2, 3, 4), real(5, 4)))],
    "conv2d": [(op("conv2d", **CONV), (real(2, 4, 5, 6), real(6, 2, 3, 2), real(6))),
               (op("conv2d"), (real(1, 2, 3, 3), real(3, 2, 1, 1)))],
    "conv2d_input": [(op("conv2d_input", input_size=(2, 4, 5, 6), **CONV),
                      (real(2, 6, 3, 4), real(6, 2, 3, 2)))],
    "conv2d_weight": [(op("conv2d_weight", kernel_size=(3, 2), **CONV),
                       (real(2, 6, 3, 4), real(2, 4, 5, 6)))],
    "max_pool2d": [(op("max_pool2d", kernel_size=(3, 2), stride=(2, 1), padding=(1, 0),
                       dilation=(1, 2), ceil_mode=True), (distinct(2, 2, 5, 4),))],
    "max_pool2d_backward": [(op("max_pool2d_backward", indices=POOL_INDICES,
                                input_size=(2, 2, 5, 4)),
                             (real(2, 2, 2, 2),))],
    "max_pool2d_gather": [(op("max_pool2d_gather", indices=POOL_INDICES), (real(2, 2, 5, 4),))],
    "avg_pool2d": [(op("avg_pool2d", **POOL), (real(2, 2, 5, 4),))],
    "avg_pool2d_backward": [(op("avg_pool2d_backward", input_size=(2, 2, 5, 4), **POOL),
                             (real(*nbgrad.avg_pool2d(real(2, 2, 5, 4), 2, (2, 1), (1, 0),
                                                      True).shape),))],
    "adaptive_avg_pool2d": [(op("adaptive_avg_pool2d", output_size=(2, 3)), (real(2, 2, 5, 4),))],
    "adaptive_avg_pool2d_backward": [(op("adaptive_avg_pool2d_backward", input_size=(2, 2, 5, 4)),
                                      (real(2, 2, 2, 3),))],
    "linear_batch_norm": [(linear_norm(f), (real(5, 2), real(3, 2), real(3), real(3)))
                          for f in ("sigmoid", "tanh", "relu", None)],
    "linear_batch_norm_backward": [(of_linear_norm(f),
                                    (real(5, 3), real(5, 2), real(3, 2), real(3)))
                                   for f in ("sigmoid", "tanh", "relu", None)],
    "batch_norm": [(op("batch_norm", eps=1e-5), (real(4, 3), real(3), real(3))),
                   (op("batch_norm", eps=1e-3), (real(2, 3, 2, 2), real(3), real(3))),
                   (op("batch_norm", eps=1e-3), (real(4, 3), real(3), real(3), real(4, 3))),
                   (op("batch_norm", eps=1e-3, relu=True), (real(4, 3, 2), real(3), real(3)))],
    "batch_norm_add_relu": [(op("batch_norm_add_relu", eps=1e-3, relu=True),
                             (real(4, 3, 2), real(3), real(3), real(4, 3, 2)))],
    "batch_norm_backward": [(of_batch, (real(4, 3), real(4, 3), real(3))),
                            (of_batch, (real(2, 3, 2, 2), real(2, 3, 2, 2), real(3))),
                            (of_batch_with_relu, (real(4, 3, 2), real(4, 3, 2), real(3))),
                            (lambda dy, x, g: of_batch_with_relu(dy, x, g, as_tensor(ACTIVE)),
                             (real(4, 3), real(4, 3), real(3)))],
    "batch_norm_inference": [(op("batch_norm_inference", mean=MEAN, invstd=INVSTD),
                              (real(2, 3, 2), real(3), real(3))),
                             (op("batch_norm_inference", mean=MEAN, invstd=INVSTD),
                              (real(4, 3), real(3), real(3), real(4, 3)))],
    "batch_norm_inference_relu": [(op("batch_norm_inference_relu", mean=MEAN, invstd=INVSTD,
                                      relu=True), (real(4, 3), real(3), real(3), real(4, 3)))],
    "batch_norm_inference_backward": [(op("batch_norm_inference_backward", mean=MEAN,
                                          invstd=INVSTD),
                                       (real(2, 3, 2), real(2, 3, 2), real(3)))],
    "layer_norm": [(op("layer_norm", dims=2, eps=1e-5), (real(4, 3, 2), real(3, 2), real(3, 2))),
                   (op("layer_norm", dims=1, eps=1e-3), (real(4), real(4), real(4)))],
    "layer_norm_backward": [(of_layer, (real(4, 3, 2), real(4, 3, 2), real(3, 2)))],
    "group_norm": [(op("group_norm", groups=2, eps=1e-3), (real(2, 4, 3), real(4), real(4))),
                   (op("group_norm", groups=4, eps=1e-3), (real(2, 4, 2, 2), real(4), real(4))),
                   (op("group_norm", groups=2, eps=1e-3, center=False),
                    (real(2, 4, 3), real(4), real(4)))],
    "group_norm_backward": [(of_group(2), (real(2, 4, 3), real(2, 4, 3), real(4))),
                            (of_group(4, False), (real(2, 4, 3), real(2, 4, 3), real(4)))],
    "rms_norm": [(op("rms_norm", dims=2, eps=1e-3), (real(4, 3, 2), real(3, 2))),
                 (op("rms_norm", dims=1, eps=1e-3), (real(4), real(4)))],
    "rms_norm_backward": [(of_rms, (real(4, 3, 2), real(4, 3, 2), real(3, 2)))],
    "center": [(op("center"), (real(3, 2, 2),)), (op("center"), (real(3, 2, 2), real(2)))],
    "center_backward": [(op("center_backward", dtype=np.float64), (real(3, 2, 2),))],
    "lp_batch_norm": [(lp(1), (real(3, 2, 2), real(2), real(2))),
                      (lp(3), (real(3, 2, 2), real(2), real(2))),
                      (lp(4, centered=False), (real(3, 2, 2), real(2))),
                      (lp(1, centered=False), (real(3, 2, 2),)),
                      (lp(math.inf), (real(3, 2, 2), real(2)))],
    "lp_batch_norm_backward": [(gradients_of(lp(p)), (real(3, 2, 2), real(3, 2, 2), real(2)))
                               for p in (1, 3, math.inf)],
    "whiten": [(whitened(2), (real(4, 4, 2), real(4), real(4))), (whitened(3), (real(5, 3),))],
    "whiten_backward": [(gradients_of(whitened(2)), (real(4, 4, 2), real(4, 4, 2), real(4))),
                        (gradients_of(whitened(1)), (real(5, 2), real(5, 2)))],
    "whiten_inference": [(mixed, (real(3, 4, 2), real(4), real(4))), (mixed, (real(3, 4),))],
    "whiten_inference_backward": [
        (gradients_of(mixed), (real(3, 4, 2), real(3, 4, 2), real(4))),
        (gradients_of(mixed), (real(3, 4), real(3, 4), real(4)))],
    "weight_norm": [(lambda v, g: nbgrad.ops.weight_norm(v, g, 1), (real(2, 3, 2), real(1, 3, 1))),
                    (lambda v, g: nbgrad.ops.weight_norm(v, g, None), (real(2, 3), real()))],
    "weight_norm_backward": [(gradients_of(lambda v, g: nbgrad.ops.weight_norm(v, g, 0)),
                              (real(3, 4), real(3, 4), real(3, 1)))],
    "spectral_norm": [(over_sigma, (SIGMA,))],
    "spectral_norm_backward": [(gradients_of(over_sigma), (real(3, 4), SIGMA))],
    "at_least": [(op("at_least"), (distinct(3, 2, 2), as_tensor(np.array([[[0.03], [-0.28]]]))))],
    "channel_std": [(op("channel_std", eps=0.1), (real(3, 2, 2),))],
    "channel_rms": [(op("channel_rms", eps=0.1), (real(3, 2, 2),))],
    "channel_dot": [(op("channel_dot"), (real(3, 2, 2), real(3, 2, 2)))],
    "channel_size": [(op("channel_size"), (kinked(3, 2, 2),))],
    "channel_sums": [(op("channel_sums"), (real(3, 2, 2), real(3, 2, 2),
                                           real(1, 2, 1, low=0.5, high=2)))],
    "divide_channels": [
        (op("divide_channels"), (real(3, 2, 2), real(1, 2, 1, low=0.5, high=2), real(1, 2, 1),
                                 real(1, 2, 1))),
        (op("divide_channels"), (real(3, 2, 2), real(1, 2, 1, low=0.5, high=2)))],
    "filter_response_norm": [
        (op("filter_response_norm", eps=0.1), (real(2, 3, 4), real(3), real(3), real(3))),
        (op("filter_response_norm", eps=0.1), (real(2, 3, 2, 2), real(3), real(3)))],
    "filter_response_norm_backward": [
        (lambda dy, x, gamma: of_response(dy, x, gamma, *FLOOR),         # which move the mask only
         (real(2, 3, 4), real(2, 3, 4), real(3))),
        (of_response, (real(2, 3, 4), real(2, 3, 4)))],
    "filter_response_norm_eps": [
        (op("filter_response_norm_eps", eps=0.1), (real(2, 3, 4), real(3), real(3),
                                                   real(3, low=0.1, high=1)))],
    "filter_response_norm_eps_backward": [
        (of_learned_response, (real(2, 3, 4), real(2, 3, 4), real(3), real(3, low=0.1, high=1)))],
    "ghost_batch_norm": [
        (op("ghost_batch_norm", size=2, eps=1e-3), (real(5, 3, 2), real(3, 3), real(3, 3))),
        (op("ghost_batch_norm", size=2, eps=1e-3), (real(5, 3, 2), real(3), real(3))),
        (op("ghost_batch_norm", size=4, eps=1e-3), (real(4, 3, 2),))],
    "ghost_batch_norm_backward": [(of_ghosts(n), (real(5, 3, 2), real(5, 3, 2), real(3)))
                                  for n in (2, 8)],
    "weighted_batch_norm": [
        (op("weighted_batch_norm", eps=1e-3), (real(4, 3, 2), real(3), real(3))),
        (op("weighted_batch_norm", eps=1e-3, w=WEIGHTS), (real(4, 3, 2), real(3), real(3)))],
    "weighted_batch_norm_backward": [(of_weighted(w), (real(4, 3, 2), real(4, 3, 2), real(3)))
                                     for w in (None, WEIGHTS)],
    "sample_norm": [(op("sample_norm", how=how), (real(2, 4, 3), *more)) for how, more in SAMPLED],
    "sample_norm_backward": [(f, (real(2, 4, 3), real(2, 4, 3), *more)) for f, more in
                             (of_samples(*given) for given in SAMPLED)],
    "sum_over_workers": [(op("sum_over_workers", workers=nbgrad.nn.InProcess(1).rank(0)),
                          (real(2, 3),))],
    "softmax": [(op("softmax", dim=1), (real(3, 4),)), (op("softmax", dim=0), (real(3, 4),))],
    "softmax_backward": [(op("softmax_backward", axis=1), (real(3, 4), softmax_of(real(3, 4))))],
    "log_softmax": [(op("log_softmax", dim=-1), (real(3, 4),))],
    "log_softmax_backward": [(op("log_softmax_backward", axis=1),
                              (real(3, 4), as_tensor(np.log(softmax_of(real(3, 4)).data))))],
    "cross_entropy": [(cross("mean"), (real(4, 3),)),
                      (cross("sum", CLASS_WEIGHT, 0.2), (real(4, 3),)),
                      (cross("none", CLASS_WEIGHT), (real(4, 3),)),
                      (cross("mean", CLASS_WEIGHT, 0.1), (real(4, 3),))],
    "cross_entropy_backward": [(op("cross_entropy_backward", target=TARGET, weight=CLASS_WEIGHT,
                                   ignore_index=-100, label_smoothing=0.2, share=0.3),
                                (dy, real(4, 3)))
                               for dy in (real(4), real())],
    "dropout": [(lambda x: OPS["dropout"](x, p=0.4, generator=nbgrad.Generator(3)), (real(5, 6),))],
    **{name: [(op(name), (kinked(2, 3),))] for name in ZERO_GRADIENT},
    # public compositions of ops, which have no entry of their own in the registry
    "var": [(lambda x: F.var(x, 1, keepdim=True), (real(3, 4),)),
            (lambda x: F.var(x, correction=0), (real(5),))],
    "std": [(lambda x: F.std(x, 0), (real(3, 4),))],
    "logsumexp": [(lambda x: F.logsumexp(x, 1), (real(3, 4),))],
    "vector_norm": [(lambda x: F.norm(x, 3, 1), (kinked(3, 4),)),
                    (lambda x: F.norm(x, 1), (kinked(3, 4),))],
    "local_response_norm": [(lambda x: F.local_response_norm(x, 3, 0.5), (real(2, 4, 3),))],
    "normalize": [(F.normalize, (real(3, 4),)), (lambda x: F.normalize(x, 1, 0), (kinked(3, 4),))],
    "nll_loss": [(lambda x: F.nll_loss(x, as_tensor(TARGET), as_tensor(CLASS_WEIGHT)),
                  (real(4, 3),))],
    "conv1d": [(lambda *xs: F.conv1d(*xs, 2, 1, 2, 2),
                (real(2, 4, 6), real(2, 2, 2), real(2)))],
    "conv_transpose2d": [(lambda *xs: F.conv_transpose2d(*xs, (2, 1), (1, 0), (1, 0), 2, (1, 2)),
                          (real(2, 4, 3, 2), real(4, 1, 3, 2), real(2))),
                         (lambda *xs: F.conv_transpose2d(*xs, output_padding=1, dilation=3),
                          (real(2, 2, 3), real(2, 3, 2, 1)))],
    "conv_transpose1d": [(lambda *xs: F.conv_transpose1d(*xs, 2, output_padding=1),
                          (real(3, 4), real(3, 2, 3), real(2)))],
    "mse_loss": [(F.mse_loss, (real(3, 2), real(3, 2)))],
    "soft_cross_entropy": [(lambda x, q: F.cross_entropy(x, q, label_smoothing=0.1),
                            (real(3, 4), real(3, 4)))],
    "max_along": [(lambda x: F.max(x, 1)[0], (distinct(3, 4),)),
                  (lambda x: F.min(x, 0, True)[0], (distinct(3, 4),))],
    "gather": [(lambda x: F.gather(x, 1, as_tensor([[0, 0], [2, 1], [3, 3]])), (real(3, 4),))],
}


def fresh(xs):
    return tuple(as_tensor(x.data.copy()).requires_grad_() for x in xs)


def check(name, mode="full", order=2):
    for f, xs in SAMPLES[name]:
        gradcheck(f, fresh(xs), order=order, mode=mode,
                  allow_zero=name in ZERO_GRADIENT | PIECEWISE_LINEAR)


def test_every_op_has_a_sample():
    assert set(OPS) - set(SAMPLES) - NOT_DIFFERENTIATED - INTEGERS_ONLY == set()
    assert set(OPS) >= NOT_DIFFERENTIATED


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_gradients_to_second_order(name):
    check(name)


@pytest.mark.parametrize("name", sorted(NOT_DIFFERENTIATED))
def test_what_is_not_differentiated_is_not_recorded(name):
    x = as_tensor([0.5, -1.0, 2.0]).requires_grad_()
    inputs = (x, x) if OPS[name].arity == 2 else (x,)
    assert not OPS[name](*inputs).requires_grad


@pytest.mark.parametrize("name", ["batch_norm", "layer_norm", "batch_norm_inference", "group_norm",
                                  "rms_norm", "softmax", "log_softmax", "cross_entropy",
                                  "sigmoid", "tanh", "gelu", "conv2d", "linear",
                                  "conv_transpose2d"])
def test_gradients_to_third_order(name):
    check(name, mode="fast", order=3)


def test_fused_batch_norm_gradient_is_right_at_a_constant_channel_and_far_mean():
    x = rng.standard_normal((6, 4))
    x[:, 1] = 0.5
    x[:, 2] += 1e4
    gradcheck(lambda x, g, b: F.batch_norm(x, None, None, g, b, True, eps=1e-2),
              fresh((as_tensor(x), real(4), real(4))), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", sorted(OPS))
def test_ops_do_not_write_to_their_inputs(name):
    for f, xs in SAMPLES.get(name, []):
        frozen = fresh(xs)
        for x in frozen:
            x.data.flags.writeable = False
        y = f(*frozen)
        y = y[0] if isinstance(y, tuple) else y
        assert np.isfinite(y.data).all()
        y.backward(np.ones(y.shape))


@pytest.mark.parametrize("name", sorted(OPS))
def test_public_ops_say_what_they_compute(name):
    public = getattr(F, name, OPS[name])
    assert (inspect.getdoc(public) or "").strip(), f"{name} has no docstring"


# ---------------------------------------------------------------------------------------- mutations

@pytest.mark.parametrize("mutate", [lambda d: -d, lambda d: d * 1.01, lambda d: d * 0,
                                    lambda d: None])
@pytest.mark.parametrize("name", sorted(set(SAMPLES) & set(OPS) - ZERO_GRADIENT))
def test_a_changed_gradient_is_noticed(name, mutate, monkeypatch):
    """Each input's gradient of each op: negated, 1 % too large, zero, missing."""
    target = OPS[name]
    original = target.fn

    def altered(which):
        def fn(*xs, **settings):
            y, vjp, *rest = original(*xs, **settings)

            def changed(*dys):
                if isinstance(vjp, tuple):
                    dxs = [f(*dys) for f in vjp]
                else:
                    dxs = vjp(*dys)
                    dxs = [dxs] if isinstance(dxs, Tensor) else list(dxs)
                dxs[which] = None if dxs[which] is None else mutate(dxs[which])
                return dxs
            return y, changed, *rest
        return fn

    for i in range(1 if name in PIECEWISE_LINEAR else len(SAMPLES[name][0][1])):
        monkeypatch.setattr(target, "fn", altered(i))
        with pytest.raises(GradcheckError):
            check(name, mode="fast", order=1)
    monkeypatch.setattr(target, "fn", original)
    check(name, mode="fast", order=1)


class _Terms(ast.NodeTransformer):
    """Replace the n-th arithmetic term where gradients are written: in nested functions and
    lambdas, or in functions named ``within``. a + b becomes a, b or a − b; a · b becomes a, b or a
    + b; etc."""

    SWAPPED = types.MappingProxyType({ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
                                      ast.Div: ast.Mult})

    def __init__(self, n, within=None):
        self.n, self.count, self.depth, self.within, self.line = n, 0, 0, within, None

    def visit_FunctionDef(self, node):
        own = self.within in node.name if self.within else True
        self.depth += own
        self.generic_visit(node)
        self.depth -= own
        return node

    def visit_Lambda(self, node):
        self.depth += 2
        self.generic_visit(node)
        self.depth -= 2
        return node

    def visit_Raise(self, node):
        return node

    def _choose(self, node, *others):
        if self.depth < (1 if self.within else 2):
            return node
        for other in others:
            self.count += 1
            if self.count - 1 == self.n:
                self.line = node.lineno
                return ast.copy_location(other, node)
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.left, (ast.Tuple, ast.List)) or type(node.op) not in self.SWAPPED:
            return node
        other = ast.BinOp(node.left, self.SWAPPED[type(node.op)](), node.right)
        return self._choose(node, *(self._one_of(node, i) for i in (0, 1)), other)

    @staticmethod
    def _one_of(node, i):
        """(a, b)[i]: both stay mentioned, so that the function's free variables stay the same."""
        pair = ast.Tuple([node.left, node.right], ast.Load())
        return ast.Subscript(pair, ast.Constant(i), ast.Load())

    def visit_Call(self, node):
        self.generic_visit(node)
        named = isinstance(node.func, ast.Name) and node.func.id in ("neg", "_neg")
        negated = named and len(node.args) == 1
        return self._choose(node, node.args[0]) if negated else node

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        numeric = isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant)
        return self._choose(node, node.operand) if numeric else node


def _key(code):
    """What identifies a function's place in its file: two lambdas may share a line."""
    places = [(line, column) for line, _, column, _ in code.co_positions() if column]
    return code.co_qualname, code.co_firstlineno, min(places, default=None)


def _codes(code):
    """Every code object inside one, by its place."""
    found = {}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found[_key(const)] = const
            found.update(_codes(const))
    return found


def _mutants(module, within=None):
    """(line, {live function: mutated code}) for each mutation of the module's source."""
    source = inspect.getsource(module)
    live = [f for f in gc.get_objects() if type(f) is types.FunctionType
            and f.__code__.co_filename == module.__file__]
    n = 0
    while True:
        terms = _Terms(n, within)
        tree = ast.fix_missing_locations(terms.visit(ast.parse(source)))
        if terms.line is None:
            return
        codes = _codes(compile(tree, module.__file__, "exec"))
        new = {f: codes.get(_key(f.__code__)) for f in live}
        yield terms.line, {f: c for f, c in new.items() if c is not None and c != f.__code__
                           and c.co_freevars == f.__code__.co_freevars}
        n += 1


def _survives(names):
    for name in names:
        try:
            check(name, mode="fast")
        except Exception:       # GradcheckError, or shapes that no longer fit: noticed either way
            return False
    return True


def _survivors(module, names, within=None):
    survivors, count = [], 0
    lines = inspect.getsource(module).splitlines()
    for line, swaps in _mutants(module, within):
        before = {f: f.__code__ for f in swaps}
        try:
            for f, code in swaps.items():
                f.__code__ = code
            count += 1
            if not swaps or _survives(names):
                survivors.append(f"{module.__name__}:{line}: {lines[line - 1].strip()}")
        finally:
            for f, code in before.items():
                f.__code__ = code
    return survivors, count


MODULES = {
    **{file: sorted(n for n in SAMPLES
                    if n in OPS and OPS[n].fn.__module__ == f"nbgrad.ops.{file}")
       for file in ("activation", "elementwise")},
    "reduce": ["sum", "sum_to", "mean", "amax", "amin", "prod", "norm", "cumsum", "var", "std",
               "logsumexp", "vector_norm"],
    "norm.batch": ["batch_norm", "batch_norm_add_relu", "batch_norm_backward",
                   "batch_norm_inference", "batch_norm_inference_relu",
                   "batch_norm_inference_backward"],
    "norm.channels": ["center", "center_backward", "channel_std", "channel_rms", "channel_dot",
                      "channel_size", "channel_sums", "divide_channels", "at_least"],
    "norm.lp": ["lp_batch_norm", "lp_batch_norm_backward"],
    "norm.whitening": ["whiten", "whiten_backward", "whiten_inference",
                       "whiten_inference_backward"],
    "norm.weight": ["weight_norm", "weight_norm_backward", "spectral_norm",
                    "spectral_norm_backward"],
    "norm.ghost": ["ghost_batch_norm", "ghost_batch_norm_backward"],
    "norm.response": ["filter_response_norm", "filter_response_norm_backward",
                      "filter_response_norm_eps", "filter_response_norm_eps_backward"],
    "loss": ["softmax", "softmax_backward", "log_softmax", "log_softmax_backward", "cross_entropy",
             "cross_entropy_backward", "nll_loss", "soft_cross_entropy", "mse_loss"],
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_term_of_a_vjp_can_be_changed_unnoticed(name):
    """Each arithmetic term of each vjp in ops, dropped or altered, fails a gradient check."""
    module = importlib.import_module(f"nbgrad.ops.{name}")
    survivors, count = _survivors(module, MODULES[name])
    assert count > 3
    assert survivors == []


NORMS = {name: [f"{name}_norm", f"{name}_norm_backward"] for name in ("layer", "group", "rms")}
NORMS["weighted"] = ["weighted_batch_norm", "weighted_batch_norm_backward"]


@pytest.mark.parametrize("name", sorted(NORMS))
def test_no_term_of_a_norms_composition_can_be_changed_unnoticed(name):
    """The same for what derivatives of higher order are recorded from."""
    module = importlib.import_module(f"nbgrad.ops.norm.{name}")
    survivors, count = _survivors(module, NORMS[name], within="_backward_of")
    assert count > 3
    assert survivors == []


@pytest.mark.parametrize("name", ["norm", "group_norm", "loss", "elementwise"])
def test_no_term_of_a_backward_kernel_can_be_changed_unnoticed(name):
    """The same for the reference kernels, which define what the compiled ones must return."""
    names = {"norm": MODULES["norm.batch"] + NORMS["layer"] + NORMS["rms"],
             "group_norm": [*NORMS["group"], "filter_response_norm",
                            "filter_response_norm_backward"], "loss": MODULES["loss"],
             "elementwise": [n for n in MODULES["activation"] if n.endswith("_backward")]}[name]
    module = importlib.import_module(f"nbgrad.kernels.reference.{name}")
    with backend.use("reference"):
        assert _survives(names)
        survivors, count = _survivors(module, names, within="backward")
    assert count > 3
    assert survivors == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_fused_batch_norm_is_the_three_ops(training, residual, activation):
    x, g, b, r = fresh((real(6, 3, 5), real(3), real(3), real(6, 3, 5)))
    dy = as_tensor(rng.standard_normal(x.shape))
    given = (x, g, b, r) if residual else (x, g, b)
    stats = [as_tensor(a) for a in (MEAN, INVSTD)], [as_tensor(a) for a in (MEAN, INVSTD)]
    y = F.batch_norm(x, *stats[0], g, b, training, residual=r if residual else None,
                     activation=activation)
    z = F.batch_norm(x, *stats[1], g, b, training)
    z = z + r if residual else z
    z = F.relu(z) if activation else z
    np.testing.assert_allclose(y.data, z.data, rtol=1e-13, atol=1e-14)
    for first, second in zip(*[grad(v, given, dy, create_graph=True) for v in (y, z)]):
        np.testing.assert_allclose(first.data, second.data, rtol=1e-12, atol=1e-13)
    for a, c in zip(*stats):
        np.testing.assert_array_equal(a.data, c.data)
    twice = [grad(grad(v, (x,), dy, create_graph=True)[0], (x, g), dy)
             for v in (F.batch_norm(x, None, None, g, b, True, activation="relu"),
                       F.relu(F.batch_norm(x, None, None, g, b, True)))]
    for first, second in zip(*twice):
        np.testing.assert_allclose(first.data, second.data, rtol=1e-10, atol=1e-11)


def test_batch_norm_backward_matches_its_composition():
    """The fused backward against autograd through the formula, written from elementary ops."""
    x, g, b = fresh((real(5, 3, 2), real(3), real(3)))
    dy = as_tensor(rng.standard_normal(x.shape))
    fused = grad(F.batch_norm(x, None, None, g, b, True), (x, g, b), dy)
    axes = (0, 2)
    xc = x - x.mean(axes, True)
    y = xc / F.sqrt((xc * xc).mean(axes, True) + 1e-5) * g.reshape(1, 3, 1) + b.reshape(1, 3, 1)
    for a, n in zip(fused, grad(y, (x, g, b), dy)):
        np.testing.assert_allclose(a.data, n.data, rtol=1e-12, atol=1e-13)
