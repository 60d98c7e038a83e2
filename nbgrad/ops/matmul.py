"""Matrix products."""

from __future__ import annotations

from typing import Any

from nbgrad.autograd import Tensor, composition, op
from nbgrad.backend import kernels
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import checked, mT, reshape, unsqueeze


@op(promote=True)
def matmul(a: Tensor, b: Tensor, /) -> Any:
    """y = a b.   ∂a = ∂y bᵀ,   ∂b = aᵀ ∂y.      a: (…, M, K)  b: (…, K, N)  y: (…, M, N)

    Leading dims broadcast; a 1-d operand is a row on the left, a column on the right, and its dim
    is dropped. Keeps a and b. Raises RuntimeError if the inner sizes differ.
    """
    if not a.ndim or not b.ndim:
        raise RuntimeError("both arguments to matmul need to be at least 1D, but they are "
                           f"{a.ndim}D and {b.ndim}D")
    if a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise RuntimeError(_mismatch(a.shape, b.shape))
    if a.ndim > 1 < b.ndim:
        return (kernels(a).matmul(a.data, b.data),
                (lambda dy: matmul(dy, mT(b)), lambda dy: matmul(mT(a), dy)))
    return _with_vectors(a, b)


def _mismatch(a: Any, b: Any) -> str:
    pair = " and ".join("x".join(map(str, s)) for s in (a, b))
    return f"mat1 and mat2 shapes cannot be multiplied ({pair})"


def _with_vectors(a: Tensor, b: Tensor) -> Any:
    """matmul where an operand is 1-d: as (1, K) or (K, 1), and back."""
    row, column = a.ndim == 1, b.ndim == 1
    y = kernels(a).matmul(a.data[None] if row else a.data, b.data[:, None] if column else b.data)
    y = y[..., 0] if column else y
    y = (y[..., 0] if column else y[..., 0, :]) if row else y

    def matrix(dy: Tensor) -> Tensor:
        dy = unsqueeze(dy, -1) if column else dy
        return unsqueeze(dy, -2) if row else dy

    def da(dy: Tensor) -> Tensor:
        return matmul(matrix(dy), mT(unsqueeze(b, -1) if column else b))  # type: ignore[no-any-return]

    def db(dy: Tensor) -> Tensor:
        d = matmul(mT(unsqueeze(a, 0) if row else a), matrix(dy))
        return reshape(d, d.shape[:-1]) if column else d
    return y, (da, db)


def mm(input: Tensor, mat2: Tensor) -> Tensor:
    """``matmul`` of two matrices, no broadcasting."""
    return _product(input, mat2, 2, "mm")


def bmm(input: Tensor, mat2: Tensor) -> Tensor:
    """``matmul`` of two batches (B, M, K) and (B, K, N), no broadcasting."""
    if checked(input, "bmm").shape[:1] != checked(mat2, "bmm").shape[:1]:
        raise RuntimeError(f"bmm: expected equal batch sizes, got shapes {input.shape} and "
                           f"{mat2.shape}")
    return _product(input, mat2, 3, "bmm")


def dot(input: Tensor, tensor: Tensor) -> Tensor:
    """Σ a b of two vectors of one length."""
    return _product(input, tensor, 1, "dot")


def _product(a: Tensor, b: Tensor, ndim: int, name: str) -> Tensor:
    a, b = checked(a, name), checked(b, name)
    if a.ndim != ndim or b.ndim != ndim:
        raise RuntimeError(f"{name}: expected two {ndim}D tensors, got shapes {a.shape} and "
                           f"{b.shape}")
    return matmul(a, b)  # type: ignore[no-any-return]


def outer(input: Tensor, vec2: Tensor) -> Tensor:
    """yᵢⱼ = aᵢ bⱼ of two vectors."""
    a, b = checked(input, "outer"), checked(vec2, "outer")
    if a.ndim != 1 or b.ndim != 1:
        raise RuntimeError(f"outer: expected two 1D tensors, got shapes {a.shape} and {b.shape}")
    return unsqueeze(a, 1) * b


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Any:
    """y = x wᵀ + b.   ∂x = ∂y w,   ∂w = ∂yᵀ x,   ∂b = Σ ∂y.

    x: (…, K)  w: (N, K)  b: (N,)  y: (…, N). Keeps x and w. Raises RuntimeError if the sizes do
    not fit.
    """
    check_linear(x, weight, bias)
    y = kernels(x).linear(x.data, weight.data, None if bias is None else bias.data)
    return y, lambda dy: linear_backward(dy, x, weight, input_gradient=x.requires_grad)


def check_linear(x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise what ``linear`` raises for sizes and dtypes that do not fit."""
    if x is None or weight is None:
        raise TypeError("linear: expected input and weight to be Tensors, got None")
    a, w = x.data, weight.data
    if w.ndim != 2 or not a.ndim or a.shape[-1] != w.shape[1]:
        raise RuntimeError("linear: " + _mismatch(x.shape, weight.shape[::-1]))
    b = w if bias is None else bias.data
    if bias is not None and b.shape != w.shape[:1]:
        raise RuntimeError(f"linear: expected bias of shape {weight.shape[:1]}, got {bias.shape}")
    if not a.dtype == w.dtype == b.dtype:
        raise RuntimeError(f"linear: expected one dtype, got x {x.dtype}, weight {weight.dtype}"
                           + ("" if bias is None else f", bias {bias.dtype}"))


@op(method=False)
def linear_backward(dy: Tensor, x: Tensor, weight: Tensor, /, input_gradient: bool) -> Any:
    """∂x (0 unless asked for), ∂w and ∂b of linear."""
    grads = kernels(dy).linear_backward(dy.data, x.data, weight.data, input_gradient=input_gradient)

    def again(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        rows, inputs = reshape(dy, (-1, dy.shape[-1])), reshape(x, (-1, x.shape[-1]))
        return matmul(dy, weight), matmul(mT(rows), inputs), sum(rows, 0)
    return grads, composition(again, dy, x, weight)


for _f in (mm, bmm, dot, outer):
    setattr(Tensor, _f.__name__, _f)

__all__ = ["bmm", "dot", "linear", "matmul", "mm", "outer"]
