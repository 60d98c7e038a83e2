"""Gradient clipping, parameters as one vector, and weights as functions of parameters:
``torch.nn.utils``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, bump
from nbgrad.backend import device_of, greatest, is_array
from nbgrad.ops import cat, reshape

from . import parametrizations, parametrize

__all__ = ["clip_grad_norm_", "clip_grad_value_", "parameters_to_vector", "parametrizations",
           "parametrize", "vector_to_parameters"]

Array = np.ndarray[Any, Any]


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0,
                    error_if_nonfinite: bool = False) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), norm over all of them as one vector.

    Returns the norm before scaling (0-d, float64; summed in float64). With ``error_if_nonfinite`` a
    NaN or infinite norm raises RuntimeError and changes nothing. On a device nothing waits for the
    norm but this check.
    """
    grads = _grads(parameters)
    norm = _norm([g.data for g in grads], float(norm_type))
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"The total norm of order {norm_type} for gradients from `parameters` "
                           f"is non-finite ({norm}), so it cannot be clipped")
    scale = max_norm / (norm + 1e-6)
    there = is_array(norm)
    if there or not scale >= 1.0:                           # also where it is NaN, as in PyTorch
        for g in grads:
            by = np.minimum(scale, 1.0).astype(g.dtype) if there else scale
            np.multiply(g.data, by, out=g.data)
            bump(g)
    return as_tensor(norm if there else np.asarray(norm))


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """Clamp every gradient to [−clip_value, clip_value]."""
    for g in _grads(parameters):
        np.clip(g.data, -clip_value, clip_value, out=g.data)
        bump(g)


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """All parameters, flattened and joined. Raises ValueError if there are none."""
    flat = [reshape(p, (-1,)) for p in parameters]
    if not flat:
        raise ValueError("parameters_to_vector: got no parameters")
    return cat(flat)


def vector_to_parameters(vec: Tensor, parameters: Iterable[Tensor]) -> None:
    """Copy the slices of ``vec`` into the parameters. Raises ValueError if its length is not
    theirs."""
    parameters = list(parameters)
    total = sum(p.numel() for p in parameters)
    if vec.shape != (total,):
        raise ValueError(f"vector_to_parameters: the parameters need a vector of shape ({total},), "
                         f"got {vec.shape}")
    values, start = vec.data.copy(), 0          # the vector may be a view of one of them
    for p in parameters:
        p.data[...] = values[start:start + p.numel()].reshape(p.shape)
        bump(p)
        start += p.numel()


def _grads(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p.grad for p in parameters if p.grad is not None]


def _norm(grads: list[Array], p: float) -> Any:
    """A number; where all are on one GPU, a 0-d array there."""
    if not grads:
        return 0.0
    places = {device_of(g) for g in grads}
    taken = float if len(places) > 1 or "cpu" in places else lambda x: x
    if math.isinf(p):
        return reduce(np.maximum, [taken(greatest(np.abs(g))) for g in grads])
    if p == 2.0:
        return np.sqrt(sum(taken(np.einsum("i,i->", g, g)) for g in map(_flat, grads)))
    return sum(taken((np.abs(_flat(g)) ** p).sum()) for g in grads) ** (1 / p)


def _flat(g: Array) -> Array:
    return g.reshape(-1).astype(np.float64, copy=False)
