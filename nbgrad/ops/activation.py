"""Activations: each one fused kernel, and so is its backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nbgrad.autograd import OPS, Op, Tensor, as_tensor, composition
from nbgrad.backend import kernels
from nbgrad.ops.elementwise import erf, exp, minimum, real, where


def _activation(name: str, keeps: str, slope: Callable[..., Tensor], doc: str,
                defaults: tuple[tuple[str, Any], ...] = ()) -> Op:
    """y = f(x) by a fused kernel, ∂x by another; ``slope(k, *numbers)`` is f' in elementary ops,
    from which the derivatives of the second kernel are recorded when they are asked for."""
    names, kernel = [n for n, _ in defaults], name + "_backward"
    in_place = name in ("relu", "silu", "leaky_relu", "elu")
    of_y = (lambda dy, y: back(dy, y),)      # no function that keeps y has numbers

    def backward(dy: Tensor, k: Tensor, /, **numbers: Any) -> Any:
        return (getattr(kernels(dy), kernel)(dy.data, k.data, *numbers.values()),
                composition(lambda dy, k: dy * slope(k, *numbers.values()), dy, k))

    def fn(x: Tensor, /, **settings: Any) -> Any:
        if settings or defaults:
            settings = checked(settings)
        y = getattr(kernels(x), name)(real(x), *settings.values())
        return y, of_y if keeps == "y" else (lambda dy: back(dy, x, **settings),)

    def checked(settings: dict[str, Any]) -> dict[str, Any]:
        settings = {**dict(defaults), **settings}
        if in_place:                         # accepted for PyTorch's sake, without effect
            settings.pop("inplace", None)
        unknown = set(settings) - set(names)
        if unknown:
            raise TypeError(f"{name}() got an unexpected argument {unknown.pop()!r}")
        return settings

    for f in (fn, backward):
        f.__module__ = __name__
    fn.__doc__, backward.__doc__ = doc, f"∂x of {name}."
    back: Op = Op(backward, kernel, method=False)
    made = Op(fn, name, saves_output=keeps == "y")
    made.settings = [*names, "inplace"] if in_place else names
    return made


def _positive(x: Tensor) -> Tensor:
    return as_tensor((x.data > 0).astype(x.dtype))


def _leaky_slope(x: Tensor, slope: float) -> Any:
    return where(as_tensor(x.data > 0), 1.0, as_tensor(x.dtype.type(slope)))


relu = _activation("relu", "y", _positive, "y = max(x, 0).   ∂x = ∂y where y > 0.")
sigmoid = _activation("sigmoid", "y", lambda y: y * (1 - y),
                      "y = 1 / (1 + e^−x).   ∂x = ∂y y (1 − y).")
silu = _activation("silu", "x", lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
                   "y = x σ(x).   ∂x = ∂y σ (1 + x (1 − σ)).   Elfwing et al. 2018.")
leaky_relu = _activation(
    "leaky_relu", "x", _leaky_slope, "y = x, or negative_slope·x below 0.   Maas et al. 2013.",
    (("negative_slope", 0.01),))
elu = _activation(
    "elu", "x", lambda x, alpha: where(as_tensor(x.data > 0), 1.0, exp(minimum(x, 0.0)) * alpha),
    "y = x, or α (e^x − 1) below 0.   Clevert et al. 2016.", (("alpha", 1.0),))
softplus = _activation(
    "softplus", "x", lambda x, beta, threshold: where(
        as_tensor(x.data * beta > threshold), 1.0, sigmoid(x * beta)),
    "y = log(1 + e^{βx}) / β, x itself where βx > threshold.", (("beta", 1.0), ("threshold", 20.0)))


def _tanh_of(x: Tensor) -> Any:
    return tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi))


def _gelu_tanh_slope(x: Tensor) -> Any:
    t = _tanh_of(x)
    return (1 + t + x * (1 - t * t) * (1 + x * x * (3 * 0.044715)) * math.sqrt(2 / math.pi)) * 0.5


tanh = _activation("tanh", "y", lambda y: 1 - y * y, "y = tanh x.   ∂x = ∂y (1 − y²).")
_gelu = _activation(
    "gelu", "x", lambda x: (erf(x * math.sqrt(0.5)) + 1) * 0.5
    + x * exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi)), "y = x Φ(x).")
_gelu_tanh = _activation("gelu_tanh", "x", _gelu_tanh_slope,
                         "y = x (1 + tanh(√(2/π)(x + 0.044715 x³)))/2.")


def gelu(input: Tensor, approximate: str = "none") -> Any:
    """y = x Φ(x), or its tanh approximation.   Hendrycks & Gimpel 2016."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _gelu(input) if approximate == "none" else _gelu_tanh(input)


relu_backward = OPS["relu_backward"]

__all__ = ["elu", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus", "tanh"]
