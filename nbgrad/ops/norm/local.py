"""Local response normalization and normalization to unit length: compositions of other ops."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.backend import greatest, kernels
from nbgrad.ops.elementwise import clamp, div, maximum, pow
from nbgrad.ops.indexing import pad
from nbgrad.ops.reduce import norm
from nbgrad.ops.shape import checked

__all__ = ["local_response_norm", "normalize"]

SAFE = 1e9                  # up to here no power that a usual α and β make leaves float32's range
LEAST = 1e-30               # beside it, what float32 loses of squares is no part of the sum


def _check_numbers(owner: str, **given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Real):
            raise TypeError(f"{owner}: expected {name} to be a number, got {type(value).__name__}")


def local_response_norm(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75,
                        k: float = 1.0) -> Tensor:
    """y = x / (k + α/size Σ x²)^β, the sum over ``size`` channels of which x's is the middle one;
    those that are not there count as 0.      x: (N, C, *), at least 3 dims

    Keeps x and the sums. Raises ValueError for fewer dims and for a size below 1, TypeError for
    what are no numbers.      Krizhevsky, Sutskever & Hinton 2012, with α divided by the size as in
    PyTorch.

    >>> import nbgrad
    >>> local_response_norm(nbgrad.ones((1, 3, 1)), 3, alpha=3.0, beta=1.0).flatten().tolist()
    [0.3333333432674408, 0.25, 0.3333333432674408]
    """
    x = checked(input, "local_response_norm")
    if x.ndim < 3:
        raise ValueError("local_response_norm: Expected 3D or higher dimensionality input (got "
                         f"{x.ndim} dimensions)")
    if not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"local_response_norm: size must be an int of at least 1, got {size!r}")
    _check_numbers("local_response_norm", alpha=alpha, beta=beta, k=k)
    C = x.shape[1]
    window = min(size // 2, C), min((size - 1) // 2, C)
    far = _largest(x) * math.sqrt(max(abs(alpha), 1.0)) > SAFE
    if far or 0 <= k < LEAST:                        # small squares are seen beside a small k only
        return _large_response(x, window, alpha / size, beta, k)
    total = _over_window(x * x, window, C)
    return div(x, pow(total * (alpha / size) + k, beta))  # type: ignore[no-any-return]


def _largest(x: Tensor) -> float:
    """The largest finite |x|, or 0."""
    k = kernels(x)
    if not x.data.size:
        return 0.0
    top = float(k.max(k.abs(x.data), axes=tuple(range(x.ndim)), keepdims=False))
    if math.isfinite(top):
        return top
    return float(np.where(np.isfinite(x.data), np.abs(x.data), 0).max())


def _slices(x: Any, window: tuple[int, int], C: int) -> list[Any]:
    """The neighbours of each channel, one after the other."""
    padded = pad(x, (0, 0) * (x.ndim - 2) + window)
    return [padded[:, i:i + C] for i in range(window[0] + window[1] + 1)]


def _over_window(x: Tensor, window: tuple[int, int], C: int) -> Tensor:
    first, *others = _slices(x, window, C)
    for other in others:
        first = first + other
    return first  # type: ignore[no-any-return]


def _large_response(x: Tensor, window: tuple[int, int], alpha: float, beta: float,
                    k: float) -> Tensor:
    """The same with every window in units of its largest |x|, c, or of √k: squares stay within the
    range. c is a constant for the gradient: y does not depend on it.

    y = (x/c) c^(1 − 2β) / (k/c² + α/size Σ (x/c)²)^β
    """
    C, size = x.shape[1], abs(x.detach())
    c = np.maximum.reduce([t.data for t in _slices(size, window, C)]).astype(np.float64)
    c = np.maximum(np.where(np.isfinite(c), c, 0.0), math.sqrt(k) if k > 0 else 0.0)
    c = np.where(c > 0, c, 1.0)
    with np.errstate(all="ignore"):
        rest, power = (as_tensor(a.astype(x.dtype)) for a in (k / (c * c), c ** (1 - 2 * beta)))
    unit, total = as_tensor(c.astype(x.dtype)), rest
    for t in _slices(x, window, C):
        u = t / unit
        total = total + u * u * alpha
    return x / unit * power / pow(total, beta)  # type: ignore[no-any-return]


def normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    """y = x / max(‖x‖ₚ, ε), the norm over ``dim``: vectors of length 1, or 0.

    x, y: any shape. Keeps x and its lengths; for a p other than 1 and 2, also |x|.
    Raises TypeError for integers and an eps that is no number, IndexError for a dim that is not
    there, ValueError for p ≤ 0.

    >>> import nbgrad
    >>> normalize(nbgrad.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = checked(input, "normalize")
    _check_numbers("normalize", eps=eps)
    length = norm(x, p, dim, keepdim=True)
    if _in_range(length.data, p, eps):
        return div(x, clamp(length, min=eps))  # type: ignore[no-any-return]
    # in units of the largest |x|, on which y does not depend: a constant for the gradient
    axes = tuple(range(x.ndim)) if dim is None else tuple(np.atleast_1d(dim))
    top = greatest(np.abs(x.data), axes, True)
    unit = as_tensor(np.where((top > 0) & np.isfinite(top), top, 1.0).astype(x.dtype))
    u = x / unit
    with np.errstate(all="ignore"):
        least = as_tensor((np.float64(eps) / unit.data).astype(x.dtype))
    return div(u, maximum(norm(u, p, dim, keepdim=True), least))  # type: ignore[no-any-return]


def _in_range(length: Any, p: Any, eps: float) -> bool:
    """Whether no power has left the range of float32, or below, where it is not eps that counts."""
    if p == math.inf or not length.size:
        return True
    far = 1e30 ** (1 / max(2.0 if p == "fro" else float(p), 1.0))
    with np.errstate(all="ignore"):
        return bool(np.all((length < far) & ((length > 1 / far) | (eps >= 1 / far))))
