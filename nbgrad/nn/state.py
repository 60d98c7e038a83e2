"""state_dict and load_state_dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nbgrad.autograd import Tensor, bump
from nbgrad.backend import is_array, move, writable

from .parameter import Uninitialized

if TYPE_CHECKING:
    from .module import Module

__all__ = ["Incompatible", "entries", "load"]


class Incompatible(NamedTuple):
    """The keys that did not match; both empty after a strict load."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return f"missing_keys={self.missing_keys}, unexpected_keys={self.unexpected_keys}"


def entries(module: Module, prefix: str = "") -> dict[str, Tensor]:
    """Key to the very Tensor, a shared one under each of its names."""
    found: dict[str, Tensor] = {}
    for path, m in module.named_modules(remove_duplicate=False):
        path = f"{prefix}{path}." if path else prefix
        found |= {path + name: t for kind in ("parameter", "buffer") for name, t in m._own(kind)}
    return found


def load(module: Module, state_dict: Mapping[str, Any], strict: bool) -> Incompatible:
    """Check everything, then copy everything."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
    own = entries(module)
    optional = _optional(module)
    missing = [key for key in own if key not in state_dict and key not in optional]
    unexpected = [key for key in state_dict if key not in own]
    lazy: list[tuple[str, Any]] = [(f"{path}." if path else "", m)
                                   for path, m in module.named_modules() if hasattr(m, "draft")]
    drafts = [(m, m.draft(state_dict, prefix)) for prefix, m in lazy]
    shapes = {id(t): vars(new)[name] for m, new in drafts if new is not None
              for name, t in m._own("parameter", "buffer")}
    problems = []
    if strict and missing:
        problems.append(f"Missing key(s) in state_dict: {_quoted(missing)}. ")
    if strict and unexpected:
        problems.append(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}. ")
    copies = []
    for key, t in own.items():
        if key in state_dict:
            if isinstance(state_dict[key], Uninitialized) and isinstance(t, Uninitialized):
                continue
            value, problem = _value(key, state_dict[key], shapes.get(id(t), t))
            problems += [problem] if problem else []
            copies.append((t, value))
    if problems:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t"
                           + "\n\t".join(problems))
    for m, new in drafts:
        if new is not None:
            m.become(new)
    for t, value in copies:
        np.copyto(t.data, value, casting="unsafe")
        bump(t)
    return Incompatible(missing, unexpected)


def _value(key: str, value: Any, t: Tensor) -> tuple[Any, str]:
    """The array to copy and "", or anything and what is wrong with it."""
    if isinstance(value, Uninitialized) or isinstance(t, Uninitialized):
        side = "checkpoint" if isinstance(value, Uninitialized) else "model"
        return None, (f'"{key}" of the {side} belongs to a lazy layer that has seen no batch, and '
                      "nothing says how large it is")
    if isinstance(value, Tensor):
        value = value.data
    elif not hasattr(value, "__array__"):
        return None, (f'While copying the parameter named "{key}", expected a Tensor or an array '
                      f"from checkpoint object but received {type(value)}")
    array = value if is_array(value) else np.asarray(value)
    if array.shape != t.shape:
        return None, (f"size mismatch for {key}: copying a param with shape {array.shape} from "
                      f"checkpoint, the shape in current model is {t.shape}.")
    if array.dtype.kind not in "biuf":
        return None, (f'While copying the parameter named "{key}", whose dtype in the model is '
                      f"{t.dtype}, got an array of {array.dtype}")
    if not writable(t.data):
        return None, f'The memory of "{key}" in the model is read-only'
    array = move(array, t.device)
    return array.copy() if np.may_share_memory(array, t.data) else array, ""


def _optional(module: Module) -> set[str]:
    return {f"{path}.{name}" if path else name
            for path, m in module.named_modules(remove_duplicate=False)
            for name in m._optional_state}


def _quoted(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)
