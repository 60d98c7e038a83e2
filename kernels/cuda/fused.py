"""Kernels that are others in turn, each of them on the device."""

from types import SimpleNamespace

from ..composed import fused
from .elementwise import sigmoid, sigmoid_backward, tanh, tanh_backward
from .matmul import linear, linear_backward
from .norm import batch_norm, batch_norm_backward

__all__ = ["linear_batch_norm", "linear_batch_norm_backward"]

linear_batch_norm, linear_batch_norm_backward = fused(SimpleNamespace(
    linear=linear, linear_backward=linear_backward, batch_norm=batch_norm,
    batch_norm_backward=batch_norm_backward, sigmoid=sigmoid, sigmoid_backward=sigmoid_backward,
    tanh=tanh, tanh_backward=tanh_backward))
