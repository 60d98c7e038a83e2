"""Initial values. Every function fills its tensor in place, returns it, and takes ``generator``
(``nbgrad.default_generator`` if None). Draws are made in float64 and rounded, so that one seed
gives a float32 and a float64 model the same weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, bump
from nbgrad.backend import move
from nbgrad.ops.random import Generator, default_generator

__all__ = ["calculate_gain", "constant_", "kaiming_normal_", "kaiming_uniform_", "normal_",
           "ones_", "orthogonal_", "trunc_normal_", "uniform_", "xavier_normal_",
           "xavier_uniform_", "zeros_"]

Array = np.ndarray[Any, Any]


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0,
             generator: Generator | None = None) -> Tensor:
    """U(a, b). Raises ValueError unless a ≤ b."""
    if not a <= b:
        raise ValueError(f"uniform_: expected a <= b, got a={a} and b={b}")
    return _write("uniform_", tensor, _rng(generator).uniform(a, b, tensor.shape))


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0,
            generator: Generator | None = None) -> Tensor:
    """N(mean, std²). Raises ValueError for a negative std."""
    if not std >= 0:
        raise ValueError(f"normal_: expected std >= 0, got {std}")
    return _write("normal_", tensor, _rng(generator).normal(mean, std, tensor.shape))


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0,
                  b: float = 2.0, generator: Generator | None = None) -> Tensor:
    """N(mean, std²) conditioned on [a, b], by rejection: from the normal, or from U(a, b) where
    that accepts more often. Raises ValueError where both accept less than once in 10,000."""
    if not std > 0 or not a < b:
        raise ValueError(f"trunc_normal_: needs std > 0 and a < b, got std={std}, a={a}, b={b}")
    low, high = (a - mean) / std, (b - mean) / std
    mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    mode = min(max(0.0, low), high)
    peak = (high - low) * math.exp(-0.5 * mode * mode) / math.sqrt(2 * math.pi)
    flat = mass / peak if 0 < peak < math.inf else 0.0
    if max(mass, flat) < 1e-4:
        raise ValueError(f"trunc_normal_: [{a}, {b}] is too far from the mean {mean} for std {std}")
    rng, z = _rng(generator), np.empty(tensor.numel())
    left = np.arange(z.size)
    while left.size:
        if mass >= flat:
            z[left] = rng.standard_normal(left.size)
            rejected = (z[left] < low) | (z[left] > high)
        else:
            z[left] = rng.uniform(low, high, left.size)
            rejected = rng.random(left.size) > np.exp(0.5 * (mode * mode - z[left] ** 2))
        left = left[rejected]
    return _write("trunc_normal_", tensor, (mean + std * z).clip(a, b).reshape(tensor.shape))


def constant_(tensor: Tensor, val: float) -> Tensor:
    """Every element ``val``."""
    return _write("constant_", tensor, np.asarray(val))


def zeros_(tensor: Tensor) -> Tensor:
    """Every element 0."""
    return constant_(tensor, 0.0)


def ones_(tensor: Tensor) -> Tensor:
    """Every element 1."""
    return constant_(tensor, 1.0)


def xavier_uniform_(tensor: Tensor, gain: float = 1.0,
                    generator: Generator | None = None) -> Tensor:
    """U(−b, b), b = gain √(6 / (fan_in + fan_out)).  Glorot & Bengio 2010."""
    bound = gain * math.sqrt(6.0 / max(1, sum(fans(tensor))))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """N(0, gain² · 2 / (fan_in + fan_out)).  Glorot & Bengio 2010."""
    return normal_(tensor, 0.0, gain * math.sqrt(2.0 / max(1, sum(fans(tensor)))), generator)


def kaiming_uniform_(tensor: Tensor, a: float = 0, mode: str = "fan_in",
                     nonlinearity: str = "leaky_relu",
                     generator: Generator | None = None) -> Tensor:
    """U(−b, b), b = gain √(3 / fan).  He et al. 2015; ``a``: the leaky ReLU's slope."""
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(tensor: Tensor, a: float = 0, mode: str = "fan_in",
                    nonlinearity: str = "leaky_relu", generator: Generator | None = None) -> Tensor:
    """N(0, gain² / fan).  He et al. 2015; ``a``: the leaky ReLU's slope."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), generator)


def orthogonal_(tensor: Tensor, gain: float = 1, generator: Generator | None = None) -> Tensor:
    """gain · Q, Q Haar-distributed with orthonormal rows or columns, of the tensor seen as
    (shape[0], rest).  Saxe et al. 2013. Raises ValueError below two dimensions."""
    if tensor.ndim < 2:
        raise ValueError("Only tensors with 2 or more dimensions are supported, "
                         f"got shape {tensor.shape}")
    rows = tensor.shape[0]
    columns = math.prod(tensor.shape[1:])
    q, r = np.linalg.qr(_rng(generator).standard_normal((max(rows, columns), min(rows, columns))))
    q *= np.sign(np.diag(r))                # without the signs, Q depends on the QR algorithm
    q = q if rows >= columns else q.T
    return _write("orthogonal_", tensor, gain * q.reshape(tensor.shape))


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """√(1 / E[f'²]) or the customary value: linear, conv*d, sigmoid 1; tanh 5/3; relu √2;
    leaky_relu √(2 / (1 + param²)), param 0.01 by default; selu 3/4."""
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        if isinstance(slope, bool) or not isinstance(slope, (int, float)):
            raise ValueError(f"negative_slope {param} not a valid number")
        return math.sqrt(2.0 / (1 + slope**2))
    if nonlinearity not in _GAINS:
        raise ValueError(f"Unsupported nonlinearity {nonlinearity}: choose from "
                         f"{', '.join(sorted([*_GAINS, 'leaky_relu']))}")
    return _GAINS[nonlinearity]


_GAINS = {"linear": 1.0, "conv1d": 1.0, "conv2d": 1.0, "conv3d": 1.0, "sigmoid": 1.0,
          "tanh": 5.0 / 3, "relu": math.sqrt(2.0), "selu": 3.0 / 4}


def fans(tensor: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, *kernel). Raises ValueError below two dimensions."""
    if tensor.ndim < 2:
        raise ValueError("Fan in and fan out can not be computed for tensor with fewer than 2 "
                         f"dimensions, got shape {tensor.shape}")
    taps = math.prod(tensor.shape[2:])
    return tensor.shape[1] * taps, tensor.shape[0] * taps


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"Mode {mode} not supported, please use one of ['fan_in', 'fan_out']")
    fan = fans(tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(max(1, fan))


def _rng(generator: Generator | None) -> np.random.Generator:
    return (default_generator if generator is None else generator).numpy


def _write(name: str, tensor: Tensor, values: Array) -> Tensor:
    if tensor.dtype.kind not in "fV" and values.ndim:
        raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
    tensor.data[...] = move(values, tensor.device)
    bump(tensor)
    return tensor
