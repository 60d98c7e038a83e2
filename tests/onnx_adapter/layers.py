"""Products, activations, losses, optimizers, dropout."""

import nbgrad as nb
from nbgrad import nn, optim
from nbgrad.nn import functional as F

from .tools import Unsupported, number

# ----------------------------------------------------------------------------------------- products

def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    y = nb.matmul(a.T if transA else a, b.T if transB else b) * alpha
    return y if c is None else y + c * beta


PRODUCTS = {"Gemm": gemm, "MatMul": nb.matmul}

# -------------------------------------------------------------------------------------- activations

def swish(x, *, alpha=1.0):
    return F.silu(x) if alpha == 1 else x * F.sigmoid(x * alpha)


ACTIVATIONS = {
    "Elu": F.elu, "Gelu": F.gelu, "Relu": F.relu, "Sigmoid": F.sigmoid, "Softplus": F.softplus,
    "Tanh": F.tanh,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Swish": swish,
}
COMPOSED_ACTIVATIONS = {
    "Celu": lambda x, *, alpha=1.0: F.relu(x) + nb.minimum(nb.expm1(x / alpha) * alpha, 0.0),
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: nb.clamp(x * alpha + beta, 0.0, 1.0),
    "HardSwish": lambda x: x * nb.clamp(x / 6 + 0.5, 0.0, 1.0),
    "Mish": lambda x: x * F.tanh(F.softplus(x)),
    "PRelu": lambda x, slope: nb.where(x < 0, x * slope, x),
    "Selu": lambda x, *, alpha=1.6732632, gamma=1.0507010: F.elu(x, alpha) * gamma,
    "SwiGLU": lambda a, b, *, alpha=1.0: swish(a, alpha=alpha) * b,
    "Softsign": lambda x: x / (nb.abs(x) + 1),
    "ThresholdedRelu": lambda x, *, alpha=1.0: nb.where(x > alpha, x, x * 0),
}

# --------------------------------------------------------------------------- softmax and the losses

def hardmax(x, *, axis=-1):
    size = [1] * x.ndim
    size[axis] = x.shape[axis]
    return (nb.argmax(x, axis, True) == nb.arange(x.shape[axis]).reshape(size)).to(x.dtype)


def cross_entropy(x, target, weight=None, *, ignore_index=-100, reduction="mean"):
    return (F.cross_entropy(x, target, weight, ignore_index, reduction), F.log_softmax(x, 1))


def nll_loss(x, target, weight=None, *, ignore_index=-100, reduction="mean"):
    return F.nll_loss(x, target, weight, ignore_index, reduction)


LOSSES = {
    "Hardmax": hardmax, "NegativeLogLikelihoodLoss": nll_loss,
    "Softmax": lambda x, *, axis=-1: F.softmax(x, axis),
    "LogSoftmax": lambda x, *, axis=-1: F.log_softmax(x, axis),
    "SoftmaxCrossEntropyLoss": cross_entropy,
}

# ------------------------------------------------------------------------------ optimizers, dropout

def momentum(rate, t, *tensors, alpha, beta, mode, norm_coefficient):
    """SGD whose dampening is 1 − β, and 0 at first. Inputs: all X, all G, all V."""
    n = len(tensors) // 3
    params = [nn.Parameter(nb.clone(x)) for x in tensors[:n]]
    first = not number(t)
    sgd = optim.SGD(params, number(rate), alpha, 0 if first else 1 - beta, norm_coefficient,
                    mode == "nesterov")
    for p, g, v in zip(params, tensors[n:], tensors[2 * n:]):
        p.grad, sgd.state[p] = g, {"momentum_buffer": v.data.copy()}
    sgd.step()
    return *params, *[nb.tensor(sgd.state[p]["momentum_buffer"]) for p in params]


def adam(rate, t, *tensors, alpha=0.9, beta=0.999, epsilon=0.0, norm_coefficient=0.0,
         norm_coefficient_post=0.0):
    """ONNX's ε is beside √v, not beside √v̂, and at t = 0 nothing is corrected (as at t = ∞)."""
    n, t = len(tensors) // 4, number(t)
    params = [nn.Parameter(nb.clone(x)) for x in tensors[:n]]
    eps = epsilon / (1 - beta ** t) ** 0.5 if t else epsilon
    adam = optim.Adam(params, number(rate), (alpha, beta), eps, norm_coefficient)
    for p, g, v, h in zip(params, *(tensors[i * n:] for i in (1, 2, 3))):
        p.grad = g
        adam.state[p] = {"step": t - 1 if t else 10 ** 9, "exp_avg": v.data.copy(),
                         "exp_avg_sq": h.data.copy()}
    adam.step()
    states = [nb.tensor(adam.state[p][name]) for name in ("exp_avg", "exp_avg_sq") for p in params]
    return *[p.detach() * (1 - norm_coefficient_post) for p in params], *states


RANDOM = Unsupported("the random numbers of NumPy's RandomState")


def bernoulli(x, *, dtype=None, seed=None):
    raise RANDOM


def dropout(x, ratio=None, training_mode=None, *, seed=0, **old):
    ratio = 0.5 if ratio is None else number(ratio)
    training = training_mode is not None and number(training_mode)
    if training and ratio:
        raise RANDOM
    return F.dropout(x, ratio, bool(training)), nb.ones_like(x, "bool")


TRAINING = {"Adam": adam, "Bernoulli": bernoulli, "Dropout": dropout, "Momentum": momentum}
