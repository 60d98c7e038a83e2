"""2-d pooling."""

from __future__ import annotations

from typing import Any

from nbgrad.autograd import Tensor, op
from nbgrad.backend import kernels
from nbgrad.ops.conv import Pair, ints
from nbgrad.ops.shape import checked, squeeze, unsqueeze


def _geometry(x: Tensor, name: str, kernel_size: Any, stride: Any, padding: Any,
              dilation: Any = 1) -> dict[str, Pair]:
    if x.ndim != 4 or x.dtype.kind not in "fV":
        raise RuntimeError(f"{name}: Expected a floating 4D (N, C, H, W) or 3D (C, H, W) input, "
                           f"got {x.dtype} of size {x.shape}")
    k, d = ints(kernel_size, "kernel_size", name), ints(dilation, "dilation", name)
    s = k if stride is None or stride == () else ints(stride, "stride", name)
    p = ints(padding, "padding", name, 0)
    if any(2 * pi > ki for pi, ki in zip(p, k)):
        raise RuntimeError(f"{name}: pad should be at most half of effective kernel size, but got "
                           f"pad={p} and kernel_size={k}")
    if any(n + 2 * pi - di * (ki - 1) < 1 for n, pi, di, ki in zip(x.shape[2:], p, d, k)):
        raise RuntimeError(f"{name}: Given input size {x.shape[1:]}, calculated output size is too "
                           f"small for kernel_size={k}, stride={s}, padding={p}, dilation={d}")
    return {"kernel_size": k, "stride": s, "padding": p, "dilation": d}


@op(name="max_pool2d", method=False)
def _max_pool2d(x: Tensor, /, ceil_mode: bool, **how: Pair) -> Any:
    y, indices = kernels(x).max_pool2d(x.data, ceil_mode=ceil_mode, **how)
    shape = x.shape
    return (y, (lambda dy: max_pool2d_backward(dy, indices=indices, input_size=shape, **how),),
            indices)


@op(method=False)
def max_pool2d_backward(dy: Tensor, /, indices: Any, input_size: tuple[int, ...],
                        **how: Pair) -> Any:
    """∂x of max_pool2d: dy added where the maxima were."""
    return (kernels(dy).max_pool2d_backward(dy.data, indices, input_size=input_size, **how),
            (lambda dx: max_pool2d_gather(dx, indices=indices, **how),))


@op(method=False)
def max_pool2d_gather(x: Tensor, /, indices: Any, **how: Pair) -> Any:
    """x at the places of the maxima: ∂dy of max_pool2d_backward."""
    shape = x.shape
    return (kernels(x).max_pool2d_gather(x.data, indices),
            (lambda dy: max_pool2d_backward(dy, indices=indices, input_size=shape, **how),))


def _batched(x: Tensor, name: str) -> Tensor:
    x = checked(x, name)
    return unsqueeze(x, 0) if x.ndim == 3 else x


def _exact(x: Tensor, name: str) -> Tensor:
    """Integers as float64, for kernels that are of floating point."""
    if x.dtype.itemsize == 8 and x.data.size and max(x.data.max(), -int(x.data.min())) > 2 ** 53:
        raise RuntimeError(f"{name}: integers beyond 2^53 are not supported")
    return x.double()


def max_pool2d(input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
               dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False) -> Any:
    """y = the largest of each window (the first of equal ones, NaN if there is one); stride
    defaults to kernel_size.   ∂y goes to that element. Keeps the indices, not x. Raises
    RuntimeError for integers beyond 2⁵³."""
    x = _batched(input, "max_pool2d")
    if x.dtype.kind in "iu":
        exact = _exact(checked(input, "max_pool2d"), "max_pool2d")
        y, indices = max_pool2d(exact, kernel_size, stride, padding, dilation, ceil_mode, True)
        return (y.to(x.dtype), indices) if return_indices else y.to(x.dtype)
    how = _geometry(x, "max_pool2d", kernel_size, stride, padding, dilation)
    y, indices = _max_pool2d(x, **how, ceil_mode=ceil_mode)
    if input.ndim == 3:
        y, indices = squeeze(y, 0), squeeze(indices, 0)
    return (y, indices) if return_indices else y


@op(name="avg_pool2d", method=False)
def _avg_pool2d(x: Tensor, /, **how: Any) -> Any:
    shape = x.shape
    return (kernels(x).avg_pool2d(x.data, **how),
            (lambda dy: avg_pool2d_backward(dy, input_size=shape, **how),))


@op(method=False)
def avg_pool2d_backward(dy: Tensor, /, input_size: tuple[int, ...], **how: Any) -> Any:
    """∂x of avg_pool2d: dy spread over each window."""
    return (kernels(dy).avg_pool2d_backward(dy.data, input_size=input_size, **how),
            (lambda dx: _avg_pool2d(dx, **how),))


def avg_pool2d(input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
               ceil_mode: bool = False, count_include_pad: bool = True,
               divisor_override: int | None = None) -> Any:
    """y = the mean of each window; zeros of the padding count if ``count_include_pad``."""
    x = _batched(input, "avg_pool2d")
    how: dict[str, Any] = _geometry(x, "avg_pool2d", kernel_size, stride, padding)
    del how["dilation"]
    if divisor_override is not None and not divisor_override:
        raise RuntimeError("avg_pool2d: divisor must be not zero")
    y = _avg_pool2d(x, **how, ceil_mode=ceil_mode, count_include_pad=count_include_pad,
                    divisor_override=divisor_override)
    return squeeze(y, 0) if input.ndim == 3 else y


@op(name="adaptive_avg_pool2d", method=False)
def _adaptive_avg_pool2d(x: Tensor, /, output_size: Pair) -> Any:
    shape = x.shape
    return (kernels(x).adaptive_avg_pool2d(x.data, output_size=output_size),
            (lambda dy: adaptive_avg_pool2d_backward(dy, input_size=shape),))


@op(method=False)
def adaptive_avg_pool2d_backward(dy: Tensor, /, input_size: tuple[int, ...]) -> Any:
    """∂x of adaptive_avg_pool2d: dy spread over each window."""
    size = dy.shape[2:]
    return (kernels(dy).adaptive_avg_pool2d_backward(dy.data, input_size=input_size),
            (lambda dx: _adaptive_avg_pool2d(dx, output_size=size),))


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Any:
    """y: (N, C, P, Q), each the mean of x over rows ⌊pH/P⌋ … ⌈(p+1)H/P⌉ and columns likewise.
    A size of None keeps the input's."""
    x = _batched(input, "adaptive_avg_pool2d")
    if x.ndim != 4 or x.dtype.kind not in "fV" or 0 in x.shape[2:]:
        raise RuntimeError("adaptive_avg_pool2d: Expected a floating 4D (N, C, H, W) or 3D "
                           f"(C, H, W) input with non-zero H and W, got {x.dtype} of size "
                           f"{input.shape}")
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    sizes = tuple(n if s is None else s for s, n in zip(sizes, x.shape[2:]))
    y = _adaptive_avg_pool2d(x, output_size=ints(sizes, "output_size", "adaptive_avg_pool2d", 0))
    return squeeze(y, 0) if input.ndim == 3 else y


__all__ = ["adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"]
