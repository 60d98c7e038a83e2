"""Normalized weights: ``torch.nn.utils.parametrizations``, and weight standardization.

Each function changes a module in place and returns it; ``parametrize.remove_parametrizations``
makes the weight a plain parameter again, with the value it has then.
"""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor, as_tensor, bump
from nbgrad.backend import is_half
from nbgrad.nn.conv import ConvTranspose
from nbgrad.nn.module import Module
from nbgrad.ops.norm.channels import check_eps
from nbgrad.ops.norm.weight import largest, norm_axes, over_sigma

from .parametrize import register_parametrization

__all__ = ["spectral_norm", "weight_norm", "weight_standardization"]

Array = np.ndarray[Any, Any]


def _weight(module: Module, name: str, owner: str) -> Tensor:
    t = getattr(module, name, None)
    if not isinstance(t, Tensor):
        raise ValueError(f"{owner}: {type(module).__name__} has no parameter or buffer {name!r}")
    return t


class _WeightNorm(Module):
    """w = g v / ‖v‖."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return ops.weight_norm(v, g, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        axes = norm_axes(weight, self.dim)
        w = weight.data.astype(np.float64)
        g = np.sqrt((w * w).sum(axes, keepdims=len(axes) < weight.ndim)).astype(weight.dtype)
        return as_tensor(np.asarray(g)), weight


def weight_norm(module: Module, name: str = "weight", dim: int | None = 0) -> Module:
    """w = g v / ‖v‖: length and direction of a weight as two parameters.   Salimans & Kingma 2016

    The norm is over every axis but ``dim``, of each output channel; over all with None (or −1).
    g is ``module.parametrizations.weight.original0``, v is ``original1``; the keys of a state dict
    are PyTorch's. At first w is what it was. Keeps v, g and ‖v‖. Raises ValueError if there is no
    such tensor, IndexError for a dim that it lacks.

    >>> from nbgrad import nn
    >>> layer = weight_norm(nn.Linear(3, 2))
    >>> {name: p.shape for name, p in layer.named_parameters()}   # doctest: +NORMALIZE_WHITESPACE
    {'bias': (2,), 'parametrizations.weight.original0': (2, 1),
     'parametrizations.weight.original1': (2, 3)}
    """
    norm_axes(_weight(module, name, "weight_norm"), dim)
    return register_parametrization(module, name, _WeightNorm(dim))


def in_units(weight: Tensor) -> Tensor:
    """The weight over its largest |w|, a constant: sums of products stay within the range."""
    return weight / as_tensor(largest(weight, tuple(range(weight.ndim))))


class _SpectralNorm(Module):
    """w = v / σ(v)."""

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int, dim: int, eps: float) -> None:
        super().__init__()
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim, eps
        if weight.ndim > 1:
            matrix = self._matrix(in_units(weight)).detach()
            drawn = np.dtype(np.float32) if is_half(weight.dtype) else weight.dtype
            for name, n in zip(("_u", "_v"), matrix.shape):
                start = ops.randn(n, dtype=drawn).data.astype(weight.dtype)
                self.register_buffer(name, as_tensor(self._unit(start)[0]))
            self._iterate(matrix, 15)

    def _matrix(self, weight: Tensor) -> Tensor:
        """The weight with ``dim`` first and the others as one."""
        others = (d for d in range(weight.ndim) if d != self.dim)
        return ops.flatten(ops.permute(weight, self.dim, *others) if self.dim else weight, 1)

    def _unit(self, x: Array) -> tuple[Array, float]:
        """x / max(‖x‖, eps), and ‖x‖."""
        norm = float(np.linalg.norm(x))
        return x / x.dtype.type(max(norm, self.eps)), norm

    def _iterate(self, matrix: Tensor, n: int) -> float:
        """n steps; ‖matrixᵀ u‖ of the last, which is σ of its u and v. (Threads of BLAS beside
        those of kernels wait for each other, up to 12 ms.)"""
        u, v, norm = self._u, self._v, 0.0
        for _ in range(n):
            u.data[...], _ = self._unit(ops.matmul(matrix, v).data)
            v.data[...], norm = self._unit(ops.matmul(matrix.T, u).data)
        bump(u, v)
        return norm

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return ops.normalize(weight, dim=0, eps=self.eps)
        matrix = self._matrix(weight)
        before = [t.data.copy() for t in (self._u, self._v)]
        sigma = self._sigma(matrix.detach())
        if not 1e-9 < sigma < 1e9:                    # w is the same whatever v is measured in
            self._u.data[...], self._v.data[...] = before
            matrix = self._matrix(in_units(weight))
            sigma = self._sigma(matrix.detach())
        if sigma == 0:
            return weight
        u, v = (t.data.copy() for t in (self._u, self._v))            # they move, it is kept
        y = over_sigma(matrix, u=u, v=v, sigma=sigma)
        dim, shape = self.dim, weight.shape
        y = ops.reshape(y, (shape[dim], *shape[:dim], *shape[dim + 1:]))
        return ops.permute(y, *range(1, dim + 1), 0, *range(dim + 1, y.ndim)) if dim else y

    def _sigma(self, matrix: Tensor) -> float:
        with np.errstate(all="ignore"):
            if self.training:
                norm = self._iterate(matrix, self.n_power_iterations)
                if norm > self.eps:
                    return norm
            return float(ops.dot(self._u, ops.matmul(matrix, self._v)).data)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def spectral_norm(module: Module, name: str = "weight", n_power_iterations: int = 1,
                  eps: float = 1e-12, dim: int | None = None) -> Module:
    """w = v / σ(v), σ the largest singular value of v as a matrix (``dim``, by default that of
    the outputs: 0, and 1 of a transposed convolution, × the rest).      Miyato et al. 2018

    σ = uᵀ v_matrix v with singular vectors u, v that follow by ``n_power_iterations`` steps of the
    power method whenever the weight is read in training mode, after 15 at first; in evaluation they
    stay. Its gradient takes u and v as constants: exact to first order where they have converged.
    A vector is divided by its norm. eps: the least norm that is divided by. A weight of zeros stays
    (PyTorch: NaN), and one of huge or tiny values is no other case. Keeps v (in units of its
    largest value if that is huge or tiny), and copies of the u and v of σ.

    v is ``module.parametrizations.weight.original``; buffers ``parametrizations.weight.0._u`` and
    ``_v``; the keys are PyTorch's. Raises ValueError if there is no such tensor, and for fewer than
    1 iteration, IndexError for a dim that it lacks.

    >>> import numpy as np
    >>> from nbgrad import nn
    >>> layer = spectral_norm(nn.Linear(3, 2), n_power_iterations=20)
    >>> bool(np.isclose(np.linalg.norm(layer.weight.detach().numpy(), 2), 1))
    True
    """
    weight = _weight(module, name, "spectral_norm")
    dim = int(isinstance(module, ConvTranspose)) if dim is None else dim
    if not -weight.ndim <= dim < weight.ndim:
        raise IndexError("spectral_norm: Dimension out of range (expected to be in range of "
                         f"[{-weight.ndim}, {weight.ndim - 1}], but got {dim})")
    if not isinstance(n_power_iterations, int) or n_power_iterations <= 0:
        raise ValueError("spectral_norm: Expected n_power_iterations to be positive, but got "
                         f"n_power_iterations={n_power_iterations}")
    check_eps("spectral_norm", eps)
    return register_parametrization(module, name, _SpectralNorm(
        weight, n_power_iterations, dim % weight.ndim, eps))


class _WeightStandardization(Module):
    """ŵ = (w − μ) / √(σ² + ε)."""

    def __init__(self, eps: float, dim: int) -> None:
        super().__init__()
        self.eps, self.dim = eps, dim

    def forward(self, weight: Tensor) -> Tensor:
        return ops.weight_standardization(weight, self.eps, self.dim)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, dim={self.dim}"


def weight_standardization(module: Module, name: str = "weight", eps: float = 1e-5,
                           dim: int = 0) -> Module:
    """ŵ = (w − μ) / √(σ² + ε), mean and (biased) variance of each output channel ``dim`` of the
    weight.      Qiao et al. 2019

    Put a group or batch norm behind the layer: its output grows with √fan_in. w is
    ``module.parametrizations.weight.original``. Keeps w, μ and 1/σ. Raises ValueError if there is
    no such tensor, and for a weight with one value per channel.

    >>> from nbgrad import nn
    >>> layer = weight_standardization(nn.Conv2d(3, 4, 3))
    >>> bool(abs(layer.weight.mean().item()) < 1e-6)
    True
    """
    _weight(module, name, "weight_standardization")
    return register_parametrization(module, name, _WeightStandardization(eps, dim))
