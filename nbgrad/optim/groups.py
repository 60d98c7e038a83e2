"""Parameter groups of a model."""

from __future__ import annotations

from typing import Any

from nbgrad.autograd import Tensor
from nbgrad.nn import Module, Normalization

__all__ = ["param_groups"]


def param_groups(model: Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with ``weight_decay``; biases, everything else of at most one dimension,
    and the parameters of normalization layers without. An empty group is left out.

    >>> from nbgrad import nn, optim
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    >>> [(len(g["params"]), g["weight_decay"]) for g in optim.param_groups(model, 1e-4)]
    [(1, 0.0001), (3, 0.0)]
    """
    decayed: dict[Tensor, None] = {}
    exempt: dict[Tensor, None] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            group = exempt if isinstance(module, Normalization) or p.ndim <= 1 else decayed
            group[p] = None
    weights = [p for p in decayed if p not in exempt]
    groups = [{"params": weights, "weight_decay": weight_decay},
              {"params": list(exempt), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
