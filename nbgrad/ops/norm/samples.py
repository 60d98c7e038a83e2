"""Norms that are a formula of x and of constants of its sample and channel, which are a function of
the means and variances there: one op for all of them.

The formula runs in kernels over x, in float64; the function, over arrays (N, C), is written in ops,
and its gradients are recorded as any other. What derivatives of higher order are recorded from is
the same norm in elementary ops, in float64.
"""

# mypy: no-warn-return-any

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, composition, enable_grad, grad, op
from nbgrad.backend import full, kernels
from nbgrad.ops.elementwise import sqrt, where
from nbgrad.ops.norm.channels import mean_of
from nbgrad.ops.shape import reshape

__all__ = ["Sampled", "gains", "merged", "root", "row", "sample_norm", "zero"]


class Sampled(NamedTuple):
    """A norm: its formula's name in the kernels; the constants, (N, C) or (1, C), of mean, var
    (N, C) and the parameters; and y of x and the parameters in elementary ops; all float64."""

    formula: str
    constants: Callable[..., tuple[Tensor, ...]]
    composed: Callable[..., Tensor]


def _wide(t: Tensor) -> Tensor:
    return as_tensor(t.data.astype(np.float64))


@op(name="sample_norm", method=False)
def sample_norm(x: Tensor, *parameters: Tensor, how: Sampled) -> Any:
    """y = f(x; k),  k = the constants of (μ, σ², parameters), μ and σ² of each sample's channels;
    also μ and σ².

    ∂x = ∂y ∂f/∂x + (∂μ + 2 ∂σ² (x − μ)) / m,  ∂μ and ∂σ² from ∂k = Σ ∂y ∂f/∂k, m = |S|.
    """
    _, mean, m2 = kernels(x).sample_moments(x.data)
    var = m2 / _area(x)
    k = how.constants(as_tensor(mean), as_tensor(var), *map(_wide, parameters))
    y = kernels(x).sample_map(how.formula, x.data, [c.data for c in k])
    return y, lambda dy: sample_norm_backward(dy, x, *parameters, mean=mean, var=var,
                                              how=how), mean, var


@op(method=False)
def sample_norm_backward(dy: Tensor, x: Tensor, *parameters: Tensor, mean: Any, var: Any,
                         how: Sampled) -> Any:
    """∂x and the parameters' gradients of sample_norm."""
    with enable_grad():
        given = [t.requires_grad_() for t in (as_tensor(mean), as_tensor(var),
                                              *map(_wide, parameters))]
        k = how.constants(*given)
    constants = [c.data for c in k]
    sums = kernels(dy).sample_sums(how.formula, dy.data, x.data, constants)
    with np.errstate(all="ignore"):
        down = [s.sum(0, keepdims=True) if len(c) == 1 else s[:len(c)]
                for s, c in zip(sums, constants)]
        found = [as_tensor(np.zeros_like(t.data)) if g is None else g
                 for t, g in zip(given, _grad(k, given, down))]
        p, q = found[0].data / _area(x), found[1].data * (2 / _area(x))
        rest = [g.data.astype(t.dtype) for t, g in zip(parameters, found[2:])]
    dx = kernels(dy).sample_map_backward(how.formula, dy.data, x.data, constants, None, p, q, mean)

    def again(dy: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        at = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, *parameters)]
        y = how.composed(*(t.to(np.float64) for t in at)).to(x.dtype)
        return tuple(grad(y, at, dy, create_graph=True))  # type: ignore[arg-type]
    return (dx, *rest), composition(again, dy, x, *parameters)


def _grad(ys: tuple[Tensor, ...], xs: list[Tensor], dys: list[Any]) -> Any:
    pairs = [(y, as_tensor(dy)) for y, dy in zip(ys, dys) if y.requires_grad]
    return grad([y for y, _ in pairs], xs, [dy for _, dy in pairs], allow_unused=True)


def _area(x: Tensor) -> int:
    return max(math.prod(x.shape[2:]), 1)


def root(square: Tensor) -> Tensor:
    """√ of what is not negative; at 0 its slope counts as 0."""
    zero = square.data == 0
    return where(zero, 0.0, sqrt(where(zero, 1.0, square))) if zero.any() else sqrt(square)


def merged(mean: Tensor, var: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of groups of as many values as each other along an axis, which is kept."""
    middle = mean_of(mean, axis, True)
    apart = mean - middle
    return middle, mean_of(var + apart * apart, axis, True)


def gains(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """γ and β; ones and zeros for None."""
    return (as_tensor(full(x.shape[1:2], 1, x.dtype, x.data)) if gamma is None else gamma,
            as_tensor(full(x.shape[1:2], 0, x.dtype, x.data)) if beta is None else beta)


def row(t: Tensor) -> Tensor:
    """(C,) or (1, C, 1, …) as constants of all samples, (1, C)."""
    return reshape(t, (1, -1))


def zero(mean: Tensor) -> Tensor:
    """The constant 0 of all samples."""
    return as_tensor(np.zeros_like(mean.data[:1] if len(mean) else mean.data.sum(0, keepdims=True)))
