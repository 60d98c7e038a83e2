"""Optimizer: parameter groups, their options, and state per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, enable_grad
from nbgrad.backend import device_of, is_array, move, several, watch_captured, writable
from nbgrad.nn.statistics import step_taken

__all__ = ["Optimizer", "Params"]

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Array = np.ndarray[Any, Any]


class Optimizer:
    """Base class. ``params``: Tensors, or groups ``{"params": Tensors, option: value, …}``; in
    place of Tensors also (name, Tensor) pairs, whose names the group keeps as ``param_names``.

    ``param_groups`` holds the options of each group, read at every step; ``state[p]`` a dict of
    arrays and numbers. A subclass defines ``_update(group)`` and may extend ``_check(group)``.
    Raises TypeError or ValueError for what is not a leaf Tensor, duplicates and bad options.
    """

    _state_names: tuple[str, ...] = ()              # what loaded state must have
    _buffers: tuple[str, ...] = ()                  # state arrays of the parameter's shape

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        if isinstance(params, (Tensor, Mapping, str)):
            raise TypeError("params argument given to the optimizer should be an iterable of "
                            f"Tensors or dicts, but got {type(params).__name__}")
        self.defaults = defaults
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.param_groups: list[dict[str, Any]] = []
        self._plans: dict[int, dict[Any, Any]] = {}     # what the kernels keep between steps
        self._loads = 0                                 # how often state has come in new arrays
        groups: list[Any] = list(params)
        if not groups:
            raise ValueError("optimizer got an empty parameter list")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add Tensors with options of their own; the others are the defaults."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError("param_group must be a dict with the key 'params', "
                            f"got {param_group!r}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("optimizer parameters need to be organized in ordered collections, but "
                            "the ordering of tensors in sets will change between runs: use a list")
        params = [params] if isinstance(params, Tensor) else list(params)
        names, params = _named(params)
        for p in params:
            _check_parameter(p)
        taken = [p for group in self.param_groups for p in group["params"]] + params
        if len(set(taken)) < len(taken):
            raise ValueError("some parameters appear in more than one parameter group, "
                             "or twice in one")
        group = {**self.defaults, **param_group, "params": params, **names}
        self._check(group)
        self.param_groups.append(group)

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options out of range; ``not x >= 0`` also catches NaN."""
        for option, text in (("lr", "learning rate"), ("weight_decay", "weight_decay value")):
            if not isinstance(group[option], Real) or not group[option] >= 0:
                raise ValueError(f"Invalid {text}: {group[option]}")

    def _update(self, group: dict[str, Any]) -> None:
        """Step for the parameters of one group that have a gradient."""
        raise TypeError(f"{type(self).__name__} does not define _update(group)")

    def _gradients(self, params: list[Tensor], group: dict[str, Any]) -> list[Any]:
        """The arrays to descend along."""
        gs = [p.grad.data for p in params if p.grad is not None]
        return [np.negative(g, np.empty_like(g)) for g in gs] if group["maximize"] else gs

    def _options(self) -> tuple[int, list[dict[str, Any]]]:
        """What a captured step is captured for."""
        return self._loads, [{k: v for k, v in group.items() if k != "params"}
                             for group in self.param_groups]

    def _plans_of(self, group: dict[str, Any]) -> dict[Any, Any]:
        return self._plans.setdefault(id(group), {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place. ``closure`` computes the loss and
        the gradients first, and its value is returned.

        Raises TypeError or ValueError, before anything has changed, where a gradient is not a
        Tensor, or it or the state is not of its parameter's shape; RuntimeError where a group's
        parameters, gradients or state are partly on a GPU."""
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        self._check_step()
        watch_captured(self._options)
        for group in self.param_groups:
            self._update(group)
        step_taken()
        return loss

    def _check_step(self) -> None:
        """Kernels trust the shapes: they would read and write beyond a smaller array."""
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                if not isinstance(g, Tensor):
                    raise TypeError(f"{type(self).__name__}: expected a Tensor as the gradient of "
                                    f"a parameter of shape {p.shape}, got {type(g).__name__}")
                if g.data.shape != p.data.shape:
                    raise self._misfit("the gradient", g, p)
        for p, own in self.state.items():
            for name in self._buffers:
                buf = own.get(name)
                if buf is not None and buf.shape != p.data.shape:
                    raise self._misfit(name, buf, p)
        for group in self.param_groups if several else ():
            self._check_device(group)

    def _check_device(self, group: dict[str, Any]) -> None:
        """The kernels of one device update a group."""
        found: dict[type, Any] = {}
        for p in group["params"]:
            if p.grad is not None:
                own = self.state.get(p, {})
                for x in (p.data, p.grad.data, *(own.get(name) for name in self._buffers)):
                    found.setdefault(type(x), x)
        found.pop(type(None), None)
        if len(found) > 1:
            raise RuntimeError(f"{type(self).__name__}: expected a group's parameters, their "
                               "gradients and state to be on the same device, but found at least "
                               f"two devices, {' and '.join(map(device_of, found.values()))}")

    def _misfit(self, name: str, x: Any, p: Tensor) -> ValueError:
        return ValueError(f"{type(self).__name__}: {name} of a parameter of shape {p.shape} has "
                          f"shape {x.shape}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or fill them with zeros."""
        for group in self.param_groups:
            for p in group["params"]:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad = p.grad.detach().zero_()

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {number: {name: array or number}}, "param_groups": [options and numbers]}``.

        Parameters are numbered through all groups. Arrays are the optimizer's own, not copies.
        """
        order = [p for group in self.param_groups for p in group["params"]]
        number = {id(p): i for i, p in enumerate(order)}
        return {
            "state": {i: dict(self.state[p]) for i, p in enumerate(order) if p in self.state},
            "param_groups": [{**group, "params": [number[id(p)] for p in group["params"]]}
                             for group in self.param_groups],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over options and state (copied, cast to the parameters' dtypes), also PyTorch's.

        Raises ValueError, before anything has changed, if groups, their sizes, shapes or options do
        not fit.
        """
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
            raise ValueError("loaded state dict must have the keys 'state' and 'param_groups'")
        groups = _matching(self.param_groups, state_dict["param_groups"])
        for group in groups:
            self._check(group)
        numbers = [i for saved in state_dict["param_groups"] for i in saved["params"]]
        order = dict(zip(numbers, (p for group in groups for p in group["params"])))
        state = {}
        for i, values in state_dict["state"].items():
            p = order.get(int(i))
            if p is None:
                raise ValueError(f"loaded state dict has state for parameter {i}, "
                                 "which no group lists")
            missing = {name for name in self._state_names if values.get(name) is None}
            if missing:
                raise ValueError(f"loaded state dict: {type(self).__name__} needs "
                                 f"{sorted(missing)} for parameter {i}")
            state[p] = {name: _copied(name, value, p) for name, value in values.items()}
        self.param_groups, self.state, self._plans = groups, state, {}
        self._loads += 1

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {name}: {group[name]}" for name in sorted(group) if name != "params"]
        return "\n".join([*lines, ")"])


def _named(params: list[Any]) -> tuple[dict[str, list[str]], list[Any]]:
    """(name, Tensor) pairs apart: what the group keeps of the names, and the Tensors."""
    pairs = [p for p in params if isinstance(p, tuple)]
    if not pairs:
        return {}, params
    if len(pairs) < len(params) or not all(len(p) == 2 and isinstance(p[0], str) for p in pairs):
        raise ValueError("all optimizer params should be with or without names: some param names "
                         "are missing")
    return {"param_names": [name for name, _ in pairs]}, [p for _, p in pairs]


def _check_parameter(p: Any) -> None:
    if not isinstance(p, Tensor):
        raise TypeError("optimizer can only optimize Tensors, but one of the params is "
                        f"{type(p).__name__}")
    if not p.is_leaf:
        raise ValueError("can't optimize a non-leaf Tensor")
    if p.dtype.kind not in "fV":
        raise ValueError(f"can't optimize a Tensor of dtype {p.dtype}")
    if hasattr(p, "materialize"):                # of a lazy layer: it is filled by the first batch
        return
    if not writable(p.data):
        raise ValueError(f"can't optimize a Tensor of shape {p.shape} whose memory is read-only")


def _matching(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(own) != len(saved):
        raise ValueError("loaded state dict has a different number of parameter groups: "
                         f"{len(saved)}, and the optimizer has {len(own)}")
    for i, (a, b) in enumerate(zip(own, saved)):
        if len(a["params"]) != len(b["params"]):
            raise ValueError("loaded state dict contains a parameter group that doesn't match the "
                             f"size of optimizer's group {i}: "
                             f"{len(b['params'])} and {len(a['params'])}")
    return [{**a, **b, "params": a["params"]} for a, b in zip(own, saved)]


def _copied(name: str, value: Any, p: Tensor) -> Any:
    """The step as a number; arrays in p's dtype and memory order, of p's shape."""
    if value is None and name != "step":            # PyTorch's SGD without momentum
        return None
    array = value.data if isinstance(value, Tensor) else value
    if not is_array(array):
        array = np.asarray(array.detach() if hasattr(array, "detach") else array)
    if name == "step":
        if array.size != 1 or not 0 <= array < 2**63:
            raise ValueError(f"loaded state dict: step must be a number of at least 0, got {value}")
        return int(array.item())
    if array.shape != p.shape:
        raise ValueError(f"loaded state dict: {name} has shape {array.shape}, "
                         f"its parameter {p.shape}")
    out = np.empty_like(p.data)
    out[...] = move(array, p.device)
    return out
