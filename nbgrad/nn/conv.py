"""Convolution and transposed convolution over one dimension or two."""

# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor
from nbgrad.ops import Moments

from .linear import init_weight_and_bias
from .module import Module
from .parameter import Parameter, check_sizes

__all__ = ["Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d"]

Ints = int | tuple[int, ...]


class Conv(Module):
    """Base: settings, checked, and parameters, of a convolution over ``dims`` dimensions."""

    weight: Parameter
    bias: Parameter | None
    padding: Any
    dims: int
    transposed = False

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Ints, stride: Ints = 1,
                 padding: Ints | str = 0, dilation: Ints = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", *, dtype: Any = np.float32) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = self._ints("kernel_size", kernel_size, 1)
        self.stride = self._ints("stride", stride, 1)
        self.dilation = self._ints("dilation", dilation, 1)
        self.padding = (padding if isinstance(padding, str) and not self.transposed
                        else self._ints("padding", padding, 0))
        self.padding_mode = padding_mode
        self._check()
        own, others = ((in_channels, out_channels) if self.transposed else
                       (out_channels, in_channels))
        self.weight = Parameter(np.empty((own, others // groups, *self.kernel_size), dtype))
        self.register_parameter("bias", Parameter(np.empty(out_channels, dtype)) if bias else None)
        self.reset_parameters()

    def _ints(self, name: str, value: Any, least: int) -> tuple[int, ...]:
        """An int or as many as there are dims, none below ``least``."""
        values = (value,) * self.dims if isinstance(value, (int, np.integer)) else value
        if (not isinstance(values, (tuple, list)) or len(values) != self.dims
                or not all(isinstance(v, (int, np.integer)) and v >= least for v in values)):
            raise ValueError(f"{type(self).__name__}: {name} must be an int or "
                             f"{'two ints' if self.dims == 2 else 'one'}, at least {least}, got "
                             f"{value!r}")
        return tuple(map(int, values))

    def _check(self) -> None:
        owner = type(self).__name__
        check_sizes(owner, in_channels=self.in_channels, out_channels=self.out_channels)
        if not isinstance(self.groups, (int, np.integer)) or self.groups <= 0:
            raise ValueError(f"{owner}: groups must be a positive integer, got {self.groups}")
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{owner}: {name} must be divisible by groups, "
                                 f"got {getattr(self, name)} and {self.groups}")
        if self.padding_mode != "zeros":
            raise ValueError(f"{owner}: padding_mode must be 'zeros', got {self.padding_mode!r}")
        if isinstance(self.padding, str) and self.padding not in ("same", "valid"):
            raise ValueError(f"{owner}: invalid padding string {self.padding!r}, "
                             "should be one of 'valid', 'same'")
        if self.padding == "same" and max(self.stride) > 1:
            raise ValueError(f"{owner}: padding='same' is not supported for strided convolutions, "
                             f"got stride={self.stride}")

    def reset_parameters(self) -> None:
        """Draw the initial values again."""
        init_weight_and_bias(self.weight, self.bias)

    def extra_repr(self) -> str:
        text = (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
                f"stride={self.stride}")
        for name, usual in (("padding", 0), ("dilation", 1), ("output_padding", 0)):
            if (value := getattr(self, name, usual)) not in (usual, (usual,) * self.dims):
                text += f", {name}={value}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text + (", bias=False" if self.bias is None else "")


class Conv2d(Conv):
    """y[n, k] = b[k] + Σ_c x[n, c] ⋆ W[k, c]   (cross-correlation)

    x: (N, in_channels, H, W)   weight: (out_channels, in_channels / groups, *kernel_size)
    y: (N, out_channels, H', W'),  H' = ⌊(H + 2 padding − dilation (kernel − 1) − 1) / stride⌋ + 1

    ``padding`` is an int, a pair, "valid" (none) or "same" (H' = H, stride 1 only; the odd zero
    goes below and right). Weights are drawn as in Linear. Raises ValueError for any
    ``padding_mode`` other than "zeros".
    """

    dims = 2

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                          self.groups)

    def with_moments(self, x: Tensor) -> tuple[Tensor, Moments | None]:
        """forward(x), and what ``ops.conv2d`` knows of its statistics."""
        return ops.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                          self.groups, return_moments=True)


class Conv1d(Conv):
    """Conv2d over one dimension.
    x: (N, in_channels, L)   weight: (out_channels, in_channels / groups, kernel_size)"""

    dims = 1

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation,
                          self.groups)


class ConvTranspose(Conv):
    """Base of the two below."""

    transposed = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Ints, stride: Ints = 1,
                 padding: Ints = 0, output_padding: Ints = 0, groups: int = 1, bias: bool = True,
                 dilation: Ints = 1, padding_mode: str = "zeros", *,
                 dtype: Any = np.float32) -> None:
        more = self._ints("output_padding", output_padding, 0)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, padding_mode, dtype=dtype)
        self.output_padding = more

    def _more(self, x: Tensor, output_size: Sequence[int] | None) -> tuple[int, ...]:
        """The output_padding that makes y of the size asked for."""
        if output_size is None:
            return self.output_padding
        wanted, size = tuple(output_size), x.shape[max(x.ndim - self.dims, 0):]
        least = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, s, p, d, k in zip(
            size, self.stride, self.padding, self.dilation, self.kernel_size))
        if len(wanted) not in (self.dims, x.ndim):
            raise ValueError(f"{type(self).__name__}: for {x.ndim}D input, output_size must have "
                             f"{self.dims} or {x.ndim} elements (got {len(wanted)})")
        wanted = wanted[-self.dims:]
        most = tuple(n + s - 1 for n, s in zip(least, self.stride))
        if not all(low <= n <= high for low, n, high in zip(least, wanted, most)):
            raise ValueError(f"{type(self).__name__}: requested an output size of {wanted}, but "
                             f"valid sizes range from {least} to {most} (for an input of {size})")
        return tuple(n - low for n, low in zip(wanted, least))


class ConvTranspose2d(ConvTranspose):
    """y = b + the sum of every x[n, c, p, q] W[c, k] at p · stride − padding, q · stride − padding:
    the gradient of Conv2d in its input.

    x: (N, in_channels, H, W)   weight: (in_channels, out_channels / groups, *kernel_size)
    y: (N, out_channels, H', W'),
    H' = (H − 1) stride − 2 padding + dilation (kernel − 1) + output_padding + 1

    ``forward(x, output_size)``: the output_padding, from 0 to stride − 1, that gives y this size,
    (H', W') or y's shape; raises ValueError if none does. Weights are drawn as in Linear, with the
    fan_in of PyTorch, out_channels / groups times the kernel's size. Raises ValueError for any
    ``padding_mode`` other than "zeros".

    >>> import nbgrad
    >>> up, x = ConvTranspose2d(3, 2, 3, stride=2, padding=1), nbgrad.ones(1, 3, 4, 4)
    >>> up(x).shape, up(x, output_size=(8, 8)).shape
    ((1, 2, 7, 7), (1, 2, 8, 8))
    """

    dims = 2

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return ops.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding,
                                    self._more(x, output_size), self.groups, self.dilation)


class ConvTranspose1d(ConvTranspose):
    """ConvTranspose2d over one dimension.
    x: (N, in_channels, L)   weight: (in_channels, out_channels / groups, kernel_size)"""

    dims = 1

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        return ops.conv_transpose1d(x, self.weight, self.bias, self.stride, self.padding,
                                    self._more(x, output_size), self.groups, self.dilation)
