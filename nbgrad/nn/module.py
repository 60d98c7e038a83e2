"""Module: the base class of layers and models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from nbgrad.autograd import Tensor, no_grad
from nbgrad.backend import half_dtype

from . import hooks, state
from .parameter import Uninitialized
from .tree import MODULE, Tree

__all__ = ["Module", "check_model"]


class Module(Tree):
    """Base class of everything with parameters: define ``forward``, call the object.

    Assigning a Parameter or a Module to an attribute registers it; calling the object runs
    ``forward``, between hooks if there are any.

    >>> from nbgrad.nn import Parameter
    >>> class Scale(Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gamma = Parameter(np.full(2, 3.0))
    ...     def forward(self, x):
    ...         return x * self.gamma
    >>> model = Scale()
    >>> model(Tensor(np.ones(2))).tolist(), list(model.state_dict())
    ([3.0, 3.0], ['gamma'])
    """

    training: bool
    _hooks: hooks.Hooks | None = None
    _optional_state: tuple[str, ...] = ()           # keys that old state dicts may lack

    def __init__(self) -> None:
        super().__init__()
        self.training = True

    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._hooks is None:
            return self.forward(*args, **kwargs)
        return hooks.call(self, self._hooks, args, kwargs)

    # -------------------------------------------------------------------------------------- state

    def state_dict(self, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Tensor]:
        """Name to Tensor for every parameter and persistent buffer, PyTorch's keys. The Tensors
        share memory with the module and are detached unless ``keep_vars``."""
        entries = state.entries(self, prefix)
        return {key: t if keep_vars else t.detach() for key, t in entries.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any],
                        strict: bool = True) -> state.Incompatible:
        """Copy values (Tensors or arrays, cast to the module's dtypes) into parameters and buffers.

        Raises RuntimeError that lists every missing and unexpected key (unless not ``strict``) and
        every wrong shape, before anything has been changed."""
        return state.load(self, state_dict, strict)

    # --------------------------------------------------------------------------------- conversion

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call ``fn`` on every submodule, children first, then on this one."""
        for module in self.children():
            module.apply(fn)
        fn(self)
        return self

    def to(self, *args: Any, device: Any = None, dtype: Any = None,
           non_blocking: bool = False) -> Self:
        """Move parameters, buffers and gradients to a device, and convert those of floating point
        to a dtype, in place. Raises TypeError for other dtypes, RuntimeError where the device is
        not there; then nothing has changed."""
        for target in args:
            device, dtype = (target, dtype) if _is_device(target) else (device, target)
        if isinstance(dtype, str) and dtype == "bfloat16":
            dtype = half_dtype(dtype)
        if dtype is not None and (dtype := np.dtype(dtype)).kind not in "fV":
            raise TypeError("nn.Module.to only accepts floating point dtypes, "
                            f"but got desired dtype={dtype}")
        tensors: list[Tensor] = [*self.parameters(), *self.buffers()]
        for lazy in [t for t in tensors if isinstance(t, Uninitialized)]:
            vars(lazy)["lazy_dtype"] = dtype
        tensors = [t for t in tensors if not isinstance(t, Uninitialized)]
        tensors += [t.grad for t in tensors if t.grad is not None]
        with no_grad():
            arrays = [t.detach().to(dtype=dtype if t.dtype.kind in "fV" else None,
                                    device=device, non_blocking=non_blocking).data
                      for t in tensors]
        for t, array in zip(tensors, arrays):
            t.data = array
        return self

    def cpu(self) -> Self:
        """Move this module to main memory."""
        return self.to(device="cpu")

    def cuda(self, device: Any = None) -> Self:
        """Move this module to a GPU, by default the first."""
        return self.to(device="cuda" if device is None else device)

    def float(self) -> Self:
        return self.to(np.float32)

    def double(self) -> Self:
        return self.to(np.float64)

    def half(self) -> Self:
        return self.to(np.float16)

    def bfloat16(self) -> Self:
        return self.to("bfloat16")

    # --------------------------------------------------------------------------------------- mode

    def train(self, mode: bool = True) -> Self:
        """Training mode for this module and all below: batch statistics, dropout."""
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        for module in self.modules():
            vars(module)["training"] = mode
        return self

    def eval(self) -> Self:
        """Evaluation mode: running statistics, no dropout."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze (False) or train (True) all parameters."""
        for p in self.parameters():
            p.requires_grad_(requires_grad)
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or fill them with zeros."""
        for p in self.parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad = p.grad.detach().zero_()

    # -------------------------------------------------------------------------------------- hooks

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, prepend: bool = False,
                                  with_kwargs: bool = False) -> hooks.Handle:
        """``hook(module, args)`` before ``forward``; may return new arguments."""
        return hooks.Handle(self, "pre", hook, keywords=with_kwargs, first=prepend)

    def register_forward_hook(self, hook: Callable[..., Any], *, prepend: bool = False,
                              with_kwargs: bool = False) -> hooks.Handle:
        """``hook(module, args, output)`` after ``forward``; may return a new output."""
        return hooks.Handle(self, "post", hook, keywords=with_kwargs, first=prepend)

    def register_full_backward_hook(self, hook: Callable[..., Any],
                                    prepend: bool = False) -> hooks.Handle:
        """``hook(module, grad_input, grad_output)`` once both are known; may return a new
        grad_input (one differentiable input). Sees positional inputs, and outputs in a tuple or
        list."""
        return hooks.Handle(self, "backward", hook, first=prepend)

    # --------------------------------------------------------------------------------------- text

    def extra_repr(self) -> str:
        """What stands between the parentheses of ``repr``."""
        return ""

    def _child_lines(self) -> list[str]:
        return [f"({name}): {_indent(repr(module))}" for name, module in self._own(MODULE)]

    def __repr__(self) -> str:
        extra = self.extra_repr().split("\n") if self.extra_repr() else []
        children = self._child_lines()
        if not children and len(extra) <= 1:
            return f"{type(self).__name__}({''.join(extra)})"
        return f"{type(self).__name__}(\n  " + "\n  ".join(extra + children) + "\n)"


def check_model(name: str, model: Any) -> None:
    """Raise TypeError, in the words of the function ``name``, for what is no Module."""
    if not isinstance(model, Module):
        raise TypeError(f"{name}: expected the model as an nn.Module, got {type(model).__name__}")


def _indent(text: str) -> str:
    return text.replace("\n", "\n  ")


def _is_device(target: Any) -> bool:
    """A string that is no dtype's name: "cpu", "cuda:0"."""
    if not isinstance(target, str) or target == "bfloat16":
        return False
    try:
        np.dtype(target)
    except TypeError:
        return True
    return False
