"""Conv2d."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad import ops
from nbgrad.autograd import Tensor

from .linear import init_weight_and_bias
from .module import Module
from .parameter import Parameter, check_sizes

__all__ = ["Conv2d"]

Pair = int | tuple[int, int]


class Conv2d(Module):
    """y[n, k] = b[k] + Σ_c x[n, c] ⋆ W[k, c]   (cross-correlation)

    x: (N, in_channels, H, W)   weight: (out_channels, in_channels / groups, *kernel_size)
    y: (N, out_channels, H', W'),  H' = ⌊(H + 2 padding − dilation (kernel − 1) − 1) / stride⌋ + 1

    ``padding`` is an int, a pair, "valid" (none) or "same" (H' = H, stride 1 only; the odd zero
    goes below and right). Weights are drawn as in Linear. Raises ValueError for any
    ``padding_mode`` other than "zeros".
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Pair, stride: Pair = 1,
                 padding: Pair | str = 0, dilation: Pair = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = "zeros", *, dtype: Any = np.float32) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair("Conv2d", "kernel_size", kernel_size, 1)
        self.stride = pair("Conv2d", "stride", stride, 1)
        self.dilation = pair("Conv2d", "dilation", dilation, 1)
        self.padding = (padding if isinstance(padding, str)
                        else pair("Conv2d", "padding", padding, 0))
        self.padding_mode = padding_mode
        self._check()
        self._before, self._pad = self._resolve()
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = Parameter(np.empty(shape, dtype))
        self.register_parameter("bias", Parameter(np.empty(out_channels, dtype)) if bias else None)
        self.reset_parameters()

    def _check(self) -> None:
        check_sizes("Conv2d", in_channels=self.in_channels, out_channels=self.out_channels)
        if not isinstance(self.groups, (int, np.integer)) or self.groups <= 0:
            raise ValueError(f"Conv2d: groups must be a positive integer, got {self.groups}")
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"Conv2d: {name} must be divisible by groups, "
                                 f"got {getattr(self, name)} and {self.groups}")
        if self.padding_mode != "zeros":
            raise ValueError(f"Conv2d: padding_mode must be 'zeros', got {self.padding_mode!r}")
        if isinstance(self.padding, str) and self.padding not in ("same", "valid"):
            raise ValueError(f"Conv2d: invalid padding string {self.padding!r}, "
                             "should be one of 'valid', 'same'")
        if self.padding == "same" and self.stride != (1, 1):
            raise ValueError("Conv2d: padding='same' is not supported for strided convolutions, "
                             f"got stride={self.stride}")

    def _resolve(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Symmetric padding that the convolution does, and, for "same" with an even kernel, the
        extra zeros (right, below)."""
        if not isinstance(self.padding, str):
            return self.padding, None
        if self.padding == "valid":
            return (0, 0), None
        totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
        odd = totals[0] % 2, totals[1] % 2
        return (totals[0] // 2, totals[1] // 2), odd if any(odd) else None

    def reset_parameters(self) -> None:
        """Draw the initial values again."""
        init_weight_and_bias(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._pad is not None:
            below, right = self._pad
            x = ops.pad(x, (0, right, 0, below))
        return ops.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self._before,
                          dilation=self.dilation, groups=self.groups)

    def extra_repr(self) -> str:
        text = (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
                f"stride={self.stride}")
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text + (", bias=False" if self.bias is None else "")


def pair(owner: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """An int or two ints as two ints, none below ``least``."""
    values = (value, value) if isinstance(value, (int, np.integer)) else value
    if (not isinstance(values, (tuple, list)) or len(values) != 2
            or not all(isinstance(v, (int, np.integer)) and v >= least for v in values)):
        raise ValueError(f"{owner}: {name} must be an int or two ints, at least {least}, "
                         f"got {value!r}")
    return int(values[0]), int(values[1])
