"""Convolution (cross-correlation, as everywhere in deep learning) over two dimensions, and over one
as over two of which one is 1. Its gradients are its two gradient ops, whose gradients are again
these three, so every order is exact; the first of them is the transposed convolution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, kept, op, transient
from nbgrad.backend import kernels
from nbgrad.ops.indexing import pad
from nbgrad.ops.moments import Moments
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked, reshape, squeeze, unsqueeze

Pair = tuple[int, int]

# Of an output on a device whose statistics a convolution takes: smaller ones batch norm reads from
# the caches (50 MB in an H100). Reckoned, not measured.
DEVICE_BYTES = 64 << 20


def ints(value: Any, name: str, op_name: str, low: int = 1, n: int = 2) -> Any:
    """An int or n ints, each at least ``low``, as n ints."""
    if type(value) is int and value >= low:
        return (value,) * n
    if type(value) is tuple and len(value) == n == 2:
        a, b = value
        if type(a) is type(b) is int and a >= low <= b:
            return value
    each = tuple(value) if isinstance(value, (tuple, list, str)) else (value,)
    if len(each) == 1:
        each *= n
    whole = all(isinstance(v, (int, np.integer)) for v in each)
    if len(each) != n or not whole or min(each) < low:
        error = ValueError if whole or isinstance(value, str) else TypeError
        raise error(f"{op_name}: expected {name} to be an int or {'two ints' if n == 2 else 'one'} "
                    f">= {low}, got {value!r}")
    return tuple(map(int, each))


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
           padding: Any = 0, dilation: Any = 1, groups: int = 1, *,
           return_moments: bool = False) -> Any:
    """y[n, o, p, q] = b[o] + Σ_{c,i,j} x[n, c, p·s + i·d − pad, q·s + j·d − pad] w[o, c, i, j]

    x: (N, C, H, W) or (C, H, W)  weight: (O, C/groups, I, J)  bias: (O,)  y: (N, O, P, Q),
    P = ⌊(H + 2 padding − dilation (I − 1) − 1) / stride⌋ + 1. ``padding`` may be "valid" (none) or
    "same" (P = H; an odd zero goes below and right). Keeps x (or what makes it again, see
    ``autograd.kept``) and weight. y has channels-last memory. Beyond PyTorch's arguments:
    ``return_moments``: also y's ``Moments`` per channel, for ``batch_norm``, if the kernel can take
    them for less than a pass over y, else None.
    Raises RuntimeError where sizes do not fit.
    """
    moments: list[Any] | None = [] if return_moments else None
    y = _convolve("conv2d", 2, input, weight, bias, stride, padding, dilation, groups, moments)
    return (y, Moments(*moments) if moments else None) if return_moments else y


def conv1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
           padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    """y[n, o, p] = b[o] + Σ_{c,i} x[n, c, p·s + i·d − pad] w[o, c, i]: ``conv2d`` over one
    dimension.      x: (N, C, L) or (C, L)  weight: (O, C/groups, I)  bias: (O,)  y: (N, O, P)

    >>> import nbgrad
    >>> conv1d(nbgrad.tensor([[1.0, 2.0, 4.0]]), nbgrad.ones(1, 1, 2), padding="same").tolist()
    [[3.0, 6.0, 4.0]]
    """
    return _convolve("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                     padding: Any = 0, output_padding: Any = 0, groups: int = 1,
                     dilation: Any = 1) -> Any:
    """y = b + the sum of every x[n, c, p, q] w[c, o, i, j] at [n, o, p·s + i·d − pad,
    q·s + j·d − pad]: the transpose of ``conv2d``, its gradient in x.

    x: (N, C, H, W) or (C, H, W)  weight: (C, O/groups, I, J)  bias: (O,)  y: (N, O, P, Q),
    P = (H − 1) stride − 2 padding + dilation (I − 1) + output_padding + 1. Keeps x and weight. y
    has channels-last memory. Raises RuntimeError where sizes do not fit, and for an
    ``output_padding`` as large as stride and dilation.      Zeiler et al. 2010

    >>> import nbgrad
    >>> x = nbgrad.tensor([[[1.0, 2.0]]])
    >>> conv_transpose2d(x, nbgrad.ones(1, 1, 1, 2), stride=2).tolist()
    [[[1.0, 1.0, 2.0, 2.0]]]
    """
    return _transposed("conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding,
                       groups, dilation)


def conv_transpose1d(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                     padding: Any = 0, output_padding: Any = 0, groups: int = 1,
                     dilation: Any = 1) -> Any:
    """y = b + the sum of every x[n, c, p] w[c, o, i] at [n, o, p·s + i·d − pad]:
    ``conv_transpose2d`` over one dimension.
    x: (N, C, L) or (C, L)  weight: (C, O/groups, I)  bias: (O,)  y: (N, O, P)"""
    return _transposed("conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding,
                       groups, dilation)


def _convolve(name: str, dims: int, x: Any, weight: Any, bias: Any, stride: Any, padding: Any,
              dilation: Any, groups: int, moments: list[Any] | None = None) -> Any:
    x, weight = checked(x, name), checked(weight, name)
    if x.ndim == dims + 1:
        return squeeze(_convolve(name, dims, unsqueeze(x, 0), weight, bias, stride, padding,
                                 dilation, groups, moments), 0)
    _check(name, dims, x, weight, bias, groups)
    stride = ints(stride, "stride", name, n=dims)
    dilation = ints(dilation, "dilation", name, n=dims)
    if padding == "same":
        if max(stride) > 1:
            raise ValueError(f"{name}: padding='same' is not supported for strided convolutions")
        totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
        x, padding = _longer(x, [t % 2 for t in totals]), [t // 2 for t in totals]
    padding = ints(0 if padding == "valid" else padding, "padding", name, 0, dims)
    size = [n + 2 * p - d * (k - 1) - 1
            for n, p, d, k in zip(x.shape[2:], padding, dilation, weight.shape[2:])]
    if min(size) < 0:
        padded = tuple(n + 2 * p for n, p in zip(x.shape[2:], padding))
        raise RuntimeError(
            f"{name}: Calculated padded input size per channel: {padded}. Kernel size: "
            f"{weight.shape[2:]}. Kernel size can't be greater than actual input size")
    how = _plane_settings(stride, padding, dilation, groups)
    if moments is not None and type(x.data) is not np.ndarray and (
            math.prod((x.shape[0], weight.shape[0], *size)) * x.dtype.itemsize < DEVICE_BYTES):
        moments = None
    if dims == 2 and moments is not None:
        return transient(_conv2d, (x, weight, bias), "moments", **how, moments=moments)
    if dims == 2:
        return _conv2d(x, weight, bias, **how)
    return squeeze(_conv2d(unsqueeze(x, 2), unsqueeze(weight, 2), bias, **how), 2)


def _transposed(name: str, dims: int, x: Any, weight: Any, bias: Any, stride: Any, padding: Any,
                output_padding: Any, groups: int, dilation: Any) -> Any:
    x, weight = checked(x, name), checked(weight, name)
    if x.ndim == dims + 1:
        return squeeze(_transposed(name, dims, unsqueeze(x, 0), weight, bias, stride, padding,
                                   output_padding, groups, dilation), 0)
    _check(name, dims, x, weight, bias, groups, transposed=True)
    stride = ints(stride, "stride", name, n=dims)
    dilation = ints(dilation, "dilation", name, n=dims)
    padding = ints(padding, "padding", name, 0, dims)
    more = ints(output_padding, "output_padding", name, 0, dims)
    if any(m >= max(s, d) for m, s, d in zip(more, stride, dilation)):
        raise RuntimeError(f"{name}: output padding must be smaller than either stride or dilation,"
                           f" but got output_padding: {more}, stride: {stride}, dilation: "
                           f"{dilation}")
    size = tuple((n - 1) * s - 2 * p + d * (k - 1) + m + 1 for n, s, p, d, k, m in zip(
        x.shape[2:], stride, padding, dilation, weight.shape[2:], more))
    if min(*size, *x.shape[2:]) < 1:
        raise RuntimeError(f"{name}: Given input size per channel: {x.shape[2:]}. Calculated "
                           f"output size per channel: {size}. Output size is too small")
    # zeros behind x where y reaches a stride further: the convolution of y has x's size
    x = _longer(x, [m // s for m, s in zip(more, stride)])
    how, size = _plane_settings(stride, padding, dilation, groups), (1,) * (2 - dims) + size
    if dims == 1:
        x, weight = unsqueeze(x, 2), unsqueeze(weight, 2)
    y = conv2d_input(x, weight, input_size=(x.shape[0], weight.shape[1] * groups, *size), **how)
    y = y if bias is None else y + reshape(bias, (-1, 1, 1))
    return y if dims == 2 else squeeze(y, 2)


def _plane_settings(stride: Any, padding: Any, dilation: Any, groups: int) -> dict[str, Any]:
    """Of one dimension or two, for two."""
    before = 2 - len(stride)
    return {"stride": (1,) * before + stride, "padding": (0,) * before + padding,
            "dilation": (1,) * before + dilation, "groups": groups}


def _longer(x: Tensor, by: list[int]) -> Any:
    """x with so many zeros at the end of each spatial dimension."""
    return pad(x, [n for last in reversed(by) for n in (0, last)]) if any(by) else x


@op(name="conv2d", method=False)
def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, /, stride: Pair = (1, 1),
            padding: Pair = (0, 0), dilation: Pair = (1, 1), groups: int = 1,
            moments: list[Any] | None = None) -> Any:
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation,
                           "groups": groups}
    more = {} if moments is None else {"moments": moments}
    y = kernels(x).conv2d(x.data, weight.data, None if bias is None else bias.data, **how, **more)
    input_size, kernel_size, x = x.shape, weight.shape[2:], kept(x)
    return y, (lambda dy: conv2d_input(dy, weight, input_size=input_size, **how),
               lambda dy: conv2d_weight(dy, x, kernel_size=kernel_size, **how),
               lambda dy: sum(dy, (0, 2, 3)))


def _check(name: str, dims: int, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int,
           transposed: bool = False) -> None:
    if not groups >= 1:
        raise ValueError(f"{name}: expected groups >= 1, got {groups}")
    if x.ndim != dims + 2 or weight.ndim != dims + 2:
        raise RuntimeError(f"{name}: Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) "
                           f"input and {dims + 2}D weight, got input of size: {x.shape} and weight "
                           f"of size: {weight.shape}")
    own, others = weight.shape[0], weight.shape[1] * groups
    C, O = (own, others) if transposed else (others, own)
    if x.shape[1] != C or own % groups:
        raise RuntimeError(f"Given {'transposed=1, ' if transposed else ''}groups={groups}, weight "
                           f"of size {weight.shape}, expected input{x.shape} to have {C} channels, "
                           f"but got {x.shape[1]} channels instead"
                           + (f"; {own} {'inputs' if transposed else 'outputs'} are not divisible "
                              "by groups" if own % groups else ""))
    if bias is not None and bias.shape != (O,):
        raise RuntimeError(f"Given weight of size {weight.shape}, expected bias to be "
                           f"1-dimensional with {O} elements, but got bias of size {bias.shape} "
                           "instead")
    dtypes = weight.dtype, weight.dtype if bias is None else bias.dtype
    if x.dtype.kind not in "fV" or dtypes != (x.dtype, x.dtype):
        raise RuntimeError(f"{name}: expected one floating dtype, got input "
                           f"{x.dtype}, weight {weight.dtype}"
                           + ("" if bias is None else f", bias {bias.dtype}"))


@op(method=False)
def conv2d_input(dy: Tensor, weight: Tensor, /, input_size: tuple[int, ...], stride: Pair,
                 padding: Pair, dilation: Pair, groups: int) -> Any:
    """∂x of conv2d: the transposed convolution of dy with weight."""
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dx = kernels(dy).conv2d_input(dy.data, weight.data, input_size=input_size, **how)
    kernel_size, dy = weight.shape[2:], kept(dy)
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


__all__ = ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"]
