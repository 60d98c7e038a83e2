"""2-d convolution (cross-correlation, as everywhere in deep learning). Its gradients are its two
gradient ops, whose gradients are again these three, so every order is exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, kept, op
from nbgrad.backend import kernels
from nbgrad.ops.indexing import pad
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked, squeeze, unsqueeze

Pair = tuple[int, int]


def pair(value: Any, name: str, op_name: str, low: int = 1) -> Pair:
    """An int or a pair of ints, each at least ``low``."""
    both = tuple(value) if isinstance(value, (tuple, list, str)) else (value,)
    if len(both) == 1:
        both *= 2
    whole = all(isinstance(v, (int, np.integer)) for v in both)
    if len(both) != 2 or not whole or min(both) < low:
        error = ValueError if whole or isinstance(value, str) else TypeError
        raise error(f"{op_name}: expected {name} to be an int or two ints >= {low}, got {value!r}")
    return int(both[0]), int(both[1])


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
           padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    """y[n, o, p, q] = b[o] + Σ_{c,i,j} x[n, c, p·s + i·d − pad, q·s + j·d − pad] w[o, c, i, j]

    x: (N, C, H, W) or (C, H, W)  weight: (O, C/groups, I, J)  bias: (O,)  y: (N, O, P, Q),
    P = ⌊(H + 2 padding − dilation (I − 1) − 1) / stride⌋ + 1. ``padding`` may be "valid" (none) or
    "same" (P = H; an odd zero goes below and right). Keeps x (or what makes it again, see
    ``autograd.kept``) and weight. y has channels-last memory.
    Raises RuntimeError where sizes do not fit.
    """
    input, weight = checked(input, "conv2d"), checked(weight, "conv2d")
    if input.ndim == 3:
        return squeeze(conv2d(unsqueeze(input, 0), weight, bias, stride, padding, dilation, groups),
                       0)
    if not groups >= 1:
        raise ValueError(f"conv2d: expected groups >= 1, got {groups}")
    _check(input, weight, bias, groups)
    stride, dilation = pair(stride, "stride", "conv2d"), pair(dilation, "dilation", "conv2d")
    if padding == "same":
        if stride != (1, 1):
            raise ValueError("conv2d: padding='same' is not supported for strided convolutions")
        (ph, below), (pw, right) = [divmod(d * (k - 1), 2)
                                    for d, k in zip(dilation, weight.shape[2:])]
        input, padding = pad(input, (0, right, 0, below)) if below or right else input, (ph, pw)
    padding = pair(0 if padding == "valid" else padding, "padding", "conv2d", 0)
    size = [n + 2 * p - d * (k - 1) - 1
            for n, p, d, k in zip(input.shape[2:], padding, dilation, weight.shape[2:])]
    if min(size) < 0:
        padded = tuple(n + 2 * p for n, p in zip(input.shape[2:], padding))
        raise RuntimeError(
            f"conv2d: Calculated padded input size per channel: {padded}. Kernel size: "
            f"{weight.shape[2:]}. Kernel size can't be greater than actual input size")
    return _conv2d(input, weight, bias, stride=stride, padding=padding, dilation=dilation,
                   groups=groups)


@op(name="conv2d", method=False)
def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, /, stride: Pair = (1, 1),
            padding: Pair = (0, 0), dilation: Pair = (1, 1), groups: int = 1) -> Any:
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    y = kernels(x).conv2d(x.data, weight.data, None if bias is None else bias.data, **how)
    input_size, kernel_size, x = x.shape, weight.shape[2:], kept(x)
    return y, (lambda dy: conv2d_input(dy, weight, input_size=input_size, **how),
               lambda dy: conv2d_weight(dy, x, kernel_size=kernel_size, **how),
               lambda dy: sum(dy, (0, 2, 3)))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if x.ndim != 4 or weight.ndim != 4:
        raise RuntimeError("conv2d: Expected 3D (unbatched) or 4D (batched) input and 4D weight, "
                           f"got input of size: {x.shape} and weight of size: {weight.shape}")
    O, C = weight.shape[0], weight.shape[1] * groups
    if x.shape[1] != C or O % groups:
        raise RuntimeError(f"Given groups={groups}, weight of size {weight.shape}, expected "
                           f"input{x.shape} to have {C} channels, but got {x.shape[1]} channels "
                           "instead"
                           + (f"; {O} outputs are not divisible by groups" if O % groups else ""))
    if bias is not None and bias.shape != (O,):
        raise RuntimeError(f"Given weight of size {weight.shape}, expected bias to be "
                           f"1-dimensional with {O} elements, but got bias of size {bias.shape} "
                           "instead")
    others = weight.dtype, weight.dtype if bias is None else bias.dtype
    if x.dtype.kind not in "fV" or others != (x.dtype, x.dtype):
        raise RuntimeError("conv2d: expected one floating dtype, got input "
                           f"{x.dtype}, weight {weight.dtype}"
                           + ("" if bias is None else f", bias {bias.dtype}"))


@op(method=False)
def conv2d_input(dy: Tensor, weight: Tensor, /, input_size: tuple[int, ...], stride: Pair,
                 padding: Pair, dilation: Pair, groups: int) -> Any:
    """∂x of conv2d: the transposed convolution of dy with weight."""
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dx = kernels(dy).conv2d_input(dy.data, weight.data, input_size=input_size, **how)
    kernel_size = weight.shape[2:]
    return dx, (lambda d: _conv2d(d, weight, None, **how),
                lambda d: conv2d_weight(dy, d, kernel_size=kernel_size, **how))


@op(method=False)
def conv2d_weight(dy: Tensor, x: Tensor, /, kernel_size: tuple[int, ...], stride: Pair,
                  padding: Pair, dilation: Pair, groups: int) -> Any:
    """∂weight of conv2d: the correlation of x with dy."""
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dweight = kernels(dy).conv2d_weight(dy.data, x.data, kernel_size=kernel_size, **how)
    input_size = x.shape
    return dweight, (lambda d: _conv2d(x, d, None, **how),
                     lambda d: conv2d_input(dy, d, input_size=input_size, **how))


__all__ = ["conv2d"]
