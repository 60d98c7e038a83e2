"""Elementwise functions by definition. Derivatives take dy and what the forward keeps, y or x."""

import math

import numpy as np

from ..formulas import _CUBIC, _SQRT_2_OVER_PI
from ..quiet import quiet

__all__ = ["abs", "add", "ceil", "cos", "div", "elu", "elu_backward", "erf", "exp", "expm1",
           "floor", "gelu", "gelu_backward", "gelu_tanh", "gelu_tanh_backward", "leaky_relu",
           "leaky_relu_backward", "log", "log1p", "maximum", "minimum", "mul", "neg", "pow",
           "reciprocal", "relu", "relu_backward", "round", "rsqrt", "sigmoid",
           "sigmoid_backward", "sign", "silu", "silu_backward", "sin", "softplus",
           "softplus_backward", "sqrt", "square", "sub", "tanh", "tanh_backward", "trunc"]


add, sub, mul, div, pow = map(quiet, (np.add, np.subtract, np.multiply, np.divide, np.power))
neg, abs, sign = np.negative, np.abs, np.sign
floor, ceil, round, trunc = np.floor, np.ceil, np.rint, np.trunc
maximum, minimum = np.maximum, np.minimum
exp, log, log1p, expm1 = map(quiet, (np.exp, np.log, np.log1p, np.expm1))
sqrt, square, reciprocal = map(quiet, (np.sqrt, np.square, np.reciprocal))
sin, cos, tanh = map(quiet, (np.sin, np.cos, np.tanh))


@quiet
def rsqrt(x):
    """1 / √x."""
    return 1 / np.sqrt(x)


def relu(x):
    """max(x, 0); NaN stays NaN."""
    return np.where(x < 0, 0, x).astype(x.dtype)


def relu_backward(dy, y):
    """dy where y > 0."""
    return np.where(y > 0, dy, 0).astype(dy.dtype)


@quiet
def leaky_relu(x, slope):
    """x, or slope·x below 0."""
    return np.where(x < 0, x * x.dtype.type(slope), x)


@quiet
def leaky_relu_backward(dy, x, slope):
    """dy, or slope·dy where x ≤ 0."""
    return np.where(x > 0, dy, dy * dy.dtype.type(slope))


@quiet
def elu(x, alpha):
    """x, or α(e^x − 1) below 0."""
    return np.where(x < 0, x.dtype.type(alpha) * np.expm1(x), x)


@quiet
def elu_backward(dy, x, alpha):
    """dy, or dy α e^x where x ≤ 0."""
    return np.where(x > 0, dy, dy * dy.dtype.type(alpha) * np.exp(x))


@quiet
def sigmoid(x):
    """1 / (1 + e^−x)."""
    return 1 / (1 + np.exp(-x))


@quiet
def sigmoid_backward(dy, y):
    """dy y (1 − y)."""
    return dy * y * (1 - y)


@quiet
def tanh_backward(dy, y):
    """dy (1 − y²)."""
    return dy * (1 - y * y)


@quiet
def silu(x):
    """x σ(x)."""
    return x * sigmoid(x)


@quiet
def silu_backward(dy, x):
    """dy σ(x) (1 + x (1 − σ(x)))."""
    s = sigmoid(x)
    return dy * s * (1 + x * (1 - s))


@quiet
def softplus(x, beta, threshold):
    """log(1 + e^{βx}) / β; x where βx > threshold."""
    t = x * x.dtype.type(beta)
    return np.where(t > threshold, x, np.logaddexp(x.dtype.type(0), t) / x.dtype.type(beta))


@quiet
def softplus_backward(dy, x, beta, threshold):
    """dy σ(βx); dy where βx > threshold."""
    t = x * x.dtype.type(beta)
    return np.where(t > threshold, dy, dy * sigmoid(t))


@quiet
def erf(x):
    """2/√π ∫₀^x e^−t² dt."""
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x.astype(np.float64))).astype(x.dtype)


@quiet
def gelu(x):
    """x Φ(x), Φ the normal distribution function. Hendrycks & Gimpel 2016."""
    return (x * 0.5 * (1 + erf(x * math.sqrt(0.5)))).astype(x.dtype)


@quiet
def gelu_backward(dy, x):
    """dy (Φ(x) + x φ(x))."""
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return (dy * (0.5 * (1 + erf(x * math.sqrt(0.5))) + x * density)).astype(x.dtype)


@quiet
def _inner(x):
    return np.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x * x * x))


@quiet
def gelu_tanh(x):
    """x (1 + t)/2 with t = tanh(√(2/π) (x + 0.044715 x³)). Hendrycks & Gimpel 2016."""
    return (0.5 * x * (1 + _inner(x))).astype(x.dtype)


@quiet
def gelu_tanh_backward(dy, x):
    """dy (1 + t + x (1 − t²) √(2/π) (1 + 3·0.044715 x²)) / 2."""
    t = _inner(x)
    slope = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * x * x)
    return (dy * 0.5 * (1 + t + x * (1 - t * t) * slope)).astype(x.dtype)
