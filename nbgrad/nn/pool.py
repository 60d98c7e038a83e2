"""Pooling over H and W."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

from nbgrad import ops
from nbgrad.autograd import Tensor

from .module import Module

__all__ = ["AdaptiveAvgPool2d", "AvgPool2d", "MaxPool2d"]

Pair = int | tuple[int, int]


class MaxPool2d(Module):
    """Maximum of each window.      x: (N, C, H, W)  y: (N, C, H', W')

    ``stride`` is ``kernel_size`` unless given; padding counts as −∞.
    """

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0,
                 dilation: Pair = 1, return_indices: bool = False, ceil_mode: bool = False) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation = padding, dilation
        self.return_indices, self.ceil_mode = return_indices, ceil_mode

    def forward(self, x: Tensor) -> Any:
        return ops.max_pool2d(x, kernel_size=self.kernel_size, stride=self.stride,
                              padding=self.padding, dilation=self.dilation,
                              ceil_mode=self.ceil_mode, return_indices=self.return_indices)

    def extra_repr(self) -> str:
        return (f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}, ceil_mode={self.ceil_mode}")


class AvgPool2d(Module):
    """Mean of each window.      x: (N, C, H, W)  y: (N, C, H', W')

    ``stride`` is ``kernel_size`` unless given; padding zeros count unless ``count_include_pad`` is
    False; ``divisor_override`` replaces the number of elements.
    """

    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0,
                 ceil_mode: bool = False, count_include_pad: bool = True,
                 divisor_override: int | None = None) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.ceil_mode = padding, ceil_mode
        self.count_include_pad, self.divisor_override = count_include_pad, divisor_override

    def forward(self, x: Tensor) -> Tensor:
        return ops.avg_pool2d(x, kernel_size=self.kernel_size, stride=self.stride,
                              padding=self.padding, ceil_mode=self.ceil_mode,
                              count_include_pad=self.count_include_pad,
                              divisor_override=self.divisor_override)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class AdaptiveAvgPool2d(Module):
    """Mean of windows chosen such that y: (N, C, *output_size); None keeps the input's size."""

    def __init__(self, output_size: int | tuple[int | None, int | None]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        return ops.adaptive_avg_pool2d(x, output_size=self.output_size)

    def extra_repr(self) -> str:
        return f"output_size={self.output_size}"
