"""Decorrelation: products of channels, the inverse square root of a covariance, and one sum of
channels by it."""

# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, composition, grad, no_grad, op
from nbgrad.backend import device_of, greatest, kernels, move
from nbgrad.ops.elementwise import rsqrt
from nbgrad.ops.matmul import matmul
from nbgrad.ops.norm.batch import scaled
from nbgrad.ops.norm.channels import (
    _count,
    center,
    check_channels,
    check_count,
    check_tensors,
    per_channel,
)
from nbgrad.ops.reduce import sum
from nbgrad.ops.shape import broadcast_to, mT, permute, reshape

__all__ = ["inverse_sqrt", "whiten"]

CLOSE = 1e-8                # from here on, two more steps are exact, and so are their derivatives
STEPS = 100                 # what is not there then never will be: it is singular


def inverse_sqrt(matrix: Tensor) -> Tensor:
    """A^(−1/2) of symmetric, positive definite matrices (…, d, d).

    The coupled Newton–Schulz iteration Y ← Y T, Z ← T Z, T = (3 I − Z Y)/2 from Y = A / tr A and
    Z = I, whose Z approaches √(tr A) A^(−1/2), until it has converged (Higham 2008; Huang et al.
    2019, who stop early). Made of products, so derivatives of all orders follow. Steps grow with
    the logarithm of the condition number: about 10 for 10, 24 for 10⁶. Keeps Y, Z and T of each.
    Raises ValueError for what is singular or not positive definite in its dtype; a matrix with NaN
    or infinity gives NaN.

    >>> import nbgrad
    >>> root = inverse_sqrt(nbgrad.tensor([[4.0, 0.0], [0.0, 16.0]]))
    >>> [[round(v, 6) for v in row] for row in root.tolist()]
    [[0.5, 0.0], [0.0, 0.25]]
    """
    check_tensors("inverse_sqrt", matrix=matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.dtype.kind not in "fV":
        raise ValueError("inverse_sqrt: expected floating square matrices, got "
                         f"{matrix.dtype} of size {list(matrix.shape)}")
    eye = as_tensor(move(np.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.device))
    trace = sum(matrix * eye, (-2, -1), True)
    finite = np.isfinite(greatest(np.abs(matrix.data), (-2, -1)))
    if (finite & ~(trace.data[..., 0, 0] > 0)).any() and matrix.data.size:
        raise ValueError("inverse_sqrt: expected positive definite matrices, got a trace of "
                         "0 or less")
    y, z, left, last = matrix / trace, broadcast_to(eye, matrix.shape), 2, np.inf
    for _ in range(STEPS):
        product = matmul(z, y)
        each = greatest(np.abs(product.data - eye.data), (-2, -1))
        apart = float(greatest(np.where(finite, each, 0)))            # one bad matrix is not all
        close = apart < CLOSE or (apart < 1e-2 and apart >= last)     # or as close as rounding lets
        left, last = left - close, apart
        t = (eye * 3 - product) * 0.5
        y, z = matmul(y, t), matmul(t, z)
        if left <= 0:
            return z * rsqrt(trace)
        if not np.isfinite(apart):
            break
    raise ValueError("inverse_sqrt: expected positive definite matrices, got one that is singular "
                     f"in {matrix.dtype}: the iteration does not converge")


@op(name="whiten", method=False)
def _whiten(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, *, size: int,
            eps: float) -> Any:
    """y = γ W (x − μ) + β,  W = (Σ + ε I)^(−1/2) of each group of channels; also μ and W.

    G = Σ ∂y (x − μ)ᵀ,   ∂γ_i = Σ_j W_ij G_ij,   ∂β = Σ ∂y,   ∂x = Wᵀ γ (∂y − mean ∂y) + 2/m ∂Σ
    (x − μ),  ∂Σ by the eigenvalues of W from γ G;  m values per channel.
    """
    k = kernels(x)
    mean, _ = k.batch_norm_stats(x.data)
    cov = k.channel_products(x.data, x.data, mean, mean, size=size) / _count(x)
    eye = move(np.eye(size), x.device)
    with no_grad():
        w = inverse_sqrt(as_tensor(cov + eye * eps)).data
    shift = None if beta is None else beta.data
    y = k.channel_mix(x.data, mean, _scaled(gamma, w), shift)
    return y, lambda dy: whiten_backward(dy, x, gamma, mean=mean, w=w, size=size, eps=eps), mean, w


@op(method=False)
def whiten_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, *, mean: Any, w: Any, size: int,
                    eps: float) -> Any:
    """∂x, ∂γ and ∂β of whiten."""
    k = kernels(dy)
    own, _ = k.batch_norm_stats(dy.data)
    products = k.channel_products(dy.data, x.data, own, mean, size=size)
    slope = _slope_of_root(w, products if gamma is None else _scaled(gamma, products))
    dx = k.channel_mix(dy.data, own, np.moveaxis(_scaled(gamma, w), 1, 2), None, x.data, mean,
                       slope * (2 / _count(x)))

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        at = x if x.requires_grad else x.detach().requires_grad_()
        xhat = _whitened(at, size, eps)
        g = dy if gamma is None else dy * per_channel(gamma, dy)
        dx, = grad(xhat, (at,), g, create_graph=True)
        axes = (0, *range(2, x.ndim))
        return dx, sum(dy * xhat, axes), sum(dy, axes)  # type: ignore[return-value]
    dtype = x.dtype if gamma is None else gamma.dtype
    with np.errstate(all="ignore"):
        sums = (w * products).sum(2).reshape(-1).astype(dtype), (own * _count(x)).astype(dtype)
    return (dx, *sums), composition(again, dy, x, gamma)


@op(method=False)
def whiten_inference(x: Tensor, gamma: Tensor | None, beta: Tensor | None, /, *, mean: Any,
                     w: Any) -> Any:
    """y = γ W (x − μ) + β with given μ (C,) and W (groups, d, d), float64.

    ∂x = Wᵀ γ ∂y,   ∂γ_i = Σ_j W_ij G_ij,   ∂β = Σ ∂y,   G = Σ ∂y (x − μ)ᵀ.
    """
    shift = None if beta is None else beta.data
    y = kernels(x).channel_mix(x.data, mean, _scaled(gamma, w), shift)
    return y, lambda dy: whiten_inference_backward(dy, x, gamma, mean=mean, w=w)


@op(method=False)
def whiten_inference_backward(dy: Tensor, x: Tensor, gamma: Tensor | None, /, *, mean: Any,
                              w: Any) -> Any:
    """∂x, ∂γ and ∂β of whiten_inference."""
    k, size, zero = kernels(dy), w.shape[1], np.zeros_like(mean)
    own, _ = k.batch_norm_stats(dy.data)
    products = k.channel_products(dy.data, x.data, zero, mean, size=size)
    dx = k.channel_mix(dy.data, zero, np.moveaxis(_scaled(gamma, w), 1, 2))

    def again(dy: Tensor, x: Tensor, gamma: Tensor | None) -> tuple[Tensor, ...]:
        axes, left = (0, *range(2, x.ndim)), as_tensor(w)
        xhat = ungrouped(matmul(left, grouped(x - per_channel(as_tensor(mean), x), size)), x)
        g = dy if gamma is None else dy * per_channel(gamma, dy)
        return (ungrouped(matmul(mT(left), grouped(g, size)), x), sum(dy * xhat, axes),
                sum(dy, axes))
    dtype = x.dtype if gamma is None else gamma.dtype
    with np.errstate(all="ignore"):
        sums = (w * products).sum(2).reshape(-1).astype(dtype), (own * _count(x)).astype(dtype)
    return (dx, *sums), composition(again, dy, x, gamma, dtype=np.float64)


def _scaled(gamma: Tensor | None, w: Any) -> Any:
    """Rows of matrices (C / d, d, d), each times γ of its channel."""
    return w if gamma is None else w * gamma.data.astype(np.float64).reshape(*w.shape[:2], 1)


def _slope_of_root(w: Any, dw: Any) -> Any:
    """∂A, symmetric, of ∂W of W = A^(−1/2): with W = U diag(r) Uᵀ, ∂A = −U (K ∘ Uᵀ ∂W U) Uᵀ,
    K_ij = r_i² r_j² / (r_i + r_j) (Daleckii & Krein 1965). NaN where W or ∂W is not finite."""
    device = device_of(w)
    w, dw = move(w, "cpu"), move(dw, "cpu")
    fine = np.isfinite(w + dw).all((1, 2))[:, None, None]
    r, u = np.linalg.eigh(np.where(fine, w, np.eye(w.shape[-1])))
    inner = np.moveaxis(u, 1, 2) @ np.where(fine, dw, 0.0) @ u
    square = r * r
    inner *= square[:, :, None] * square[:, None, :] / (r[:, :, None] + r[:, None, :])
    da = u @ inner @ np.moveaxis(u, 1, 2)
    return move(np.where(fine, -(da + np.moveaxis(da, 1, 2)) / 2, np.nan), device)


def _whitened(x: Tensor, d: int, eps: float) -> Tensor:
    """W (x − μ) in elementary ops."""
    xc = grouped(center(x)[0], d).to(np.float64)
    eye = as_tensor(move(np.eye(d), x.device))
    w = inverse_sqrt(matmul(xc, mT(xc)) / _count(x) + eye * eps)
    return ungrouped(matmul(w, xc), x)


def whiten(input: Tensor, group_size: int, eps: float = 1e-5, weight: Tensor | None = None,
           bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ W (x − μ) + β,  W = (Σ + ε I)^(−1/2): channels of a group are uncorrelated, of variance
    1 before γ, and as near to x as that can be (ZCA). Also μ (C,) and W (groups, d, d), for running
    averages, which carry no gradient.      Huang et al. 2018

    x: (N, C, *S)   γ ``weight``, β ``bias``: (C,), groups of d = ``group_size`` channels; μ and Σ
    (biased) are over N and S. Sums and W are float64; keeps x, γ, μ and W. Raises ValueError for
    group sizes that do not divide C, for one value per channel, for sizes that do not fit, and for
    a Σ + ε I that is singular in float64.
    """
    check_channels("whiten", input, weight, bias)
    check_count("whiten", input)
    C, d = input.shape[1], group_size
    if not isinstance(d, (int, np.integer)) or d < 1 or C % d or d > max(C, 1):
        raise ValueError(f"whiten: group_size must divide the {C} channels, got {d!r}")
    if not eps >= 0:
        raise ValueError(f"whiten: eps must not be negative, got {eps}")
    y, mean, w = _whiten(input, scaled(input, weight, bias), bias, size=d, eps=float(eps))
    return y, mean, w


def grouped(x: Tensor, d: int) -> Tensor:
    """(N, C, *S) as (C/d, d, N·|S|)."""
    order = (1, 0, *range(2, x.ndim))
    return reshape(permute(x, *order), (x.shape[1] // d, d, x.data.size // max(x.shape[1], 1)))


def ungrouped(y: Tensor, x: Tensor) -> Tensor:
    """Back to x's shape and dtype."""
    N, C, *S = x.shape
    order = (1, 0, *range(2, x.ndim))
    return permute(reshape(y, (C, N, *S)), *order).to(x.dtype)
