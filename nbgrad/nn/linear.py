"""Linear, Identity, Flatten, Unflatten."""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor

from . import init
from .module import Module
from .parameter import Parameter, check_sizes

__all__ = ["Flatten", "Identity", "Linear", "Unflatten"]


class Linear(Module):
    """y = x Wᵀ + b.      x: (..., in_features)  W: (out_features, in_features)  y: (...,
    out_features)

    W and b are drawn from U(−k, k), k = 1/√in_features, as in PyTorch.
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *,
                 dtype: Any = np.float32) -> None:
        super().__init__()
        check_sizes("Linear", in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(np.empty((out_features, in_features), dtype))
        self.register_parameter("bias", Parameter(np.empty(out_features, dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values again."""
        init_weight_and_bias(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}")


class Identity(Module):
    """y = x. Accepts and ignores any arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class Flatten(Module):
    """Merges the dimensions start_dim..end_dim into one: (N, C, H, W) → (N, C·H·W)."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Tensor) -> Tensor:
        return ops.flatten(x, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Unflatten(Module):
    """Splits dimension dim into unflattened_size, of which one may be −1: (N, C·H·W) → (N, C, H, W)
    with ``Unflatten(1, (C, H, W))``.

    Raises TypeError for sizes that are no ints, RuntimeError where they do not multiply up to the
    dimension.
    """

    def __init__(self, dim: int, unflattened_size: Sequence[int]) -> None:
        super().__init__()
        sizes = unflattened_size
        if not isinstance(sizes, Sequence) or not all(isinstance(n, int) for n in sizes):
            raise TypeError(f"unflattened_size must be a tuple of ints, got {sizes!r}")
        if not sizes or min(sizes) < -1 or list(sizes).count(-1) > 1:
            raise ValueError("unflattened_size must be sizes of at least 0, one of which may be "
                             f"-1, got {sizes!r}")
        self.dim, self.unflattened_size = dim, tuple(sizes)

    def forward(self, x: Tensor) -> Tensor:
        if not -x.ndim <= self.dim < x.ndim:
            raise IndexError(f"Unflatten: dim {self.dim} is out of range for {x.ndim} dimensions")
        dim, sizes = self.dim % x.ndim, self.unflattened_size
        whole, known = x.shape[dim], math.prod(n for n in sizes if n >= 0)
        fits = (known and whole % known == 0) if -1 in sizes else whole == known
        if not fits:
            raise RuntimeError(f"unflatten: Provided sizes {list(sizes)} don't multiply up to the "
                               f"size of dim {dim} ({whole}) in the input tensor")
        sizes = tuple(whole // known if n < 0 else n for n in sizes)
        return ops.reshape(x, (*x.shape[:dim], *sizes, *x.shape[dim + 1:]))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, unflattened_size={self.unflattened_size}"


def init_weight_and_bias(weight: Parameter, bias: Parameter | None) -> None:
    """PyTorch's default for linear and convolution: both U(−k, k), k = 1/√fan_in."""
    init.kaiming_uniform_(weight, a=math.sqrt(5))       # √(2/(1+5)) √(3/fan_in) = 1/√fan_in
    if bias is not None:
        fan_in, _ = init.fans(weight)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        init.uniform_(bias, -bound, bound)


_linear = ops.linear
