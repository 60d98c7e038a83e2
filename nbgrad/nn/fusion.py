"""What runs as one op where the modules stand side by side, and batch norm folded into weights."""

# mypy: no-warn-return-any

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from nbgrad.autograd import Tensor, no_grad
from nbgrad.backend import greatest

from .activation import ReLU, Sigmoid, Tanh
from .batch_controls import LpBatchNorm, MeanOnlyBatchNorm, NoisyBatchNorm
from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, finish, there
from .batch_variants import (
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SplitBatchNorm,
    SyncBatchNorm,
)
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .group_norm import InstanceNorm2d
from .hooks import input_of
from .linear import Identity, Linear
from .module import Module, check_model
from .parameter import Parameter
from .running import keeps_statistics

__all__ = ["Folded", "fold", "fuse"]             # what `import nbgrad` shows

_ACTIVATIONS: dict[type, str] = {ReLU: "relu", Sigmoid: "sigmoid", Tanh: "tanh"}
_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_BY_MODE = (NoisyBatchNorm, SplitBatchNorm)      # in training something else, frozen or not
# whose evaluation is γ (x − μ)/σ + β; classes derived from them may do anything
_AFFINE = (*_NORMS, BatchNorm, BatchRenorm, FrozenBatchNorm, GhostBatchNorm, SyncBatchNorm,
           *_BY_MODE)
_CONVOLUTIONS = (Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d)
_FUSED = (Linear, Conv2d)
_OTHERS = (LpBatchNorm, MeanOnlyBatchNorm)       # by other statistics


def _plain(module: Any) -> bool:
    """Whether nobody watches or replaces this module's call."""
    return module._hooks is None and "forward" not in vars(module)


def activation_of(module: Any) -> str | None:
    """The name of the activation that this module is, if its call can become part of another's."""
    name = _ACTIVATIONS.get(type(module))
    return name if name is not None and _plain(module) else None


def run(modules: Sequence[Any], x: Any) -> Any:
    """modules in turn. A batch norm takes the ReLU that follows into its kernel, in training a
    linear layer the batch norm and the activation, and a convolution takes the statistics of its
    output for the batch norm: the same numbers with fewer passes and nodes. Modules with hooks are
    called one by one."""
    i = 0
    while i < len(modules):
        used, x = _step(modules, i, x)
        i += used
    return x


def led(first: Any, rest: Any, x: Any) -> Any:
    """rest(first(x)) of a Sequential, as if ``first`` were its first module."""
    return run([first, *rest], x) if _plain(rest) else rest(first(x))


def normalized(norm: Any, act: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """act(norm(x) + residual), as one op where norm is a batch norm and act a ReLU."""
    if type(norm) in _NORMS and _plain(norm) and activation_of(act) == "relu":
        return norm.forward(x, residual=residual, activation="relu")
    y = norm(x)
    return act(y if residual is None else y + residual)


def convolved(conv: Any, norm: Any, act: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """act(norm(conv(x)) + residual), in as few passes over memory as there are kernels for."""
    if type(norm) in _NORMS and type(conv) is Conv2d and _plain(norm) and _plain(conv):
        if activation_of(act) == "relu":
            return norm.of_conv(x, conv, residual, "relu")
        y = norm.of_conv(x, conv)
        return act(y if residual is None else y + residual)
    return normalized(norm, act, conv(x), residual)


def _step(modules: Sequence[Any], i: int, x: Any) -> tuple[int, Any]:
    """How many modules from the i-th on were run as one, and their value."""
    module, kind = modules[i], type(modules[i])
    if i + 1 < len(modules) and (kind in _FUSED or kind in _NORMS) and _plain(module):
        following = modules[i + 1]
        if kind is Conv2d:
            if type(following) in _NORMS and _plain(following):
                act = activation_of(modules[i + 2]) if i + 2 < len(modules) else None
                relu = act if act == "relu" else None
                return 2 + (relu is not None), following.of_conv(x, module, activation=relu)
        elif kind is not Linear:
            if activation_of(following) == "relu":
                return 2, module.forward(x, activation="relu")
        elif type(following) is BatchNorm1d and _plain(following) and following.follows(x, module):
            act = activation_of(modules[i + 2]) if i + 2 < len(modules) else None
            return 2 + (act is not None), following.of_linear(x, module, act)
    return 1, module(x)


def fuse(model: Module, *example: Tensor) -> Module:
    """A copy of a model in evaluation mode, with each batch norm folded into the Linear or
    convolution (transposed or not) that feeds it: w' = w γ/σ, b' = (b − μ) γ/σ + β, in float64,
    rounded once. It may be of any kind whose evaluation is γ (x − μ)/σ + β, as ℓp and mean-only
    batch norm and, behind a convolution over two dimensions, an InstanceNorm2d that tracks are.

    Pairs are neighbours in a Sequential (a Linear's norm is taken to see (N, C)); with ``example``
    inputs, the model is run on them, and the pairs are those where a batch norm's input is the
    output of a layer, however ``forward`` is written; that the outputs agree is then checked.
    Modules with hooks, with a forward of their own, parametrized, or used twice stay as they are
    (``fold`` says which norms). The folded model is for inference: training it would train other
    parameters.

    Raises ValueError if a batch norm is in training mode and not frozen, has no running statistics
    or does not use them, or if they are not finite or var + eps is not positive, or the output on
    the example is empty or not finite; RuntimeError if the example's output
    changes (a layer whose output has a second use).

    >>> from nbgrad import nn
    >>> nn.fuse(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU()).eval())
    Sequential(
      (0): Linear(in_features=2, out_features=3, bias=True)
      (1): Identity()
      (2): ReLU()
    )
    """
    return _folded(model, example)[0]


class _Rest(Identity):
    """What is left of a batch norm's call: 0 where the mask is, + residual, the activation."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, activation: str | None = None,
                mask: Any = None) -> Tensor:
        return finish(x if mask is None else there(x, mask), residual, activation)


class Folded(NamedTuple):
    """A folded model and what folding did to it; see ``fold``."""

    model: Module
    deviation: float                    # largest |y − y'| on the example
    condition: float                    # largest |γ|/√(σ² + ε) of the norms folded
    layers: tuple[str, ...]             # the norms folded, by name
    left: tuple[str, ...]               # the norms with running statistics that were not


def fold(model: Module, *example: Tensor) -> Folded:
    """``fuse``, and how far the folded model is from the model on the ``example`` inputs.

    deviation: the largest difference of an output, in the output's units. It is rounding: weights
    and inputs of size w and x that cancel in w x + b are rounded before γ/σ enlarges what is left,
    so about 1e-7 · w x · ``condition`` in float32. condition: that largest γ/σ; a channel that
    hardly varied in training (σ → 0) makes it large.

    Raises what ``fuse`` raises, and TypeError without an example.

    >>> import nbgrad
    >>> from nbgrad import nn
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, eps=0)).eval()
    >>> folded = fold(model, nbgrad.randn(8, 2))
    >>> folded.deviation < 1e-6, folded.condition, folded.layers, folded.left
    (True, 1.0, ('1',), ())
    """
    if not example:
        raise TypeError("fold: expected an example input, on which the models are compared")
    folded, deviation, scales = _folded(model, example)
    left = tuple(name or "the model" for name, _ in _running(folded))
    return Folded(folded, deviation, max(scales.values(), default=0.0), tuple(scales), left)


def _folded(model: Module, example: tuple[Tensor, ...]) -> tuple[Module, float, dict[str, float]]:
    """The folded copy, its deviation on the example, and the largest γ/σ of each norm folded."""
    check_model("fold", model)
    for name, module in _running(model):
        (_check if isinstance(module, BatchNorm) else _check_other)(module, name or "the model")
    fused = copy.deepcopy(model)
    pairs, added = _observed(fused, example) if example else (dict(_neighbours(fused)), set())
    homes = {id(child): (parent, name) for parent in fused.modules()
             for name, child in parent.named_children()}
    names = {norm: name for name, norm in fused.named_modules() if norm in pairs}
    scales = {names[norm]: _fold(layer, norm) for norm, layer in pairs.items()}
    for norm in pairs:
        parent, name = homes[id(norm)]
        setattr(parent, name, _Rest() if norm in added else Identity())
    return fused, _compare(model, fused, example) if example else 0.0, scales


def _running(model: Module) -> Iterator[tuple[str, Any]]:
    """The norms that evaluation computes with running statistics, by name."""
    unused = {m for split in model.modules() if isinstance(split, SplitBatchNorm)
              for m in split.aux_bn}
    return ((name, m) for name, m in model.named_modules()
            if (isinstance(m, BatchNorm) or keeps_statistics(m)) and m not in unused)


def _is_affine(norm: Any) -> bool:
    """Whether evaluation is γ (x − μ)/σ + β with constants."""
    kind = type(norm)
    return kind in _AFFINE or kind in _OTHERS or (
        kind is InstanceNorm2d and keeps_statistics(norm))


def _check(norm: Any, name: str) -> None:
    """Raise ValueError unless norm multiplies and adds constants that are finite."""
    if norm.training and (norm.statistics == "running" or type(norm) in _BY_MODE):
        raise ValueError(f"fuse: {name} is in training mode; call model.eval() first")
    moves = norm.training and norm.statistics != "frozen"
    if moves or norm.running_mean is None or norm.statistics == "prediction":
        raise ValueError(f"fuse: {name} normalizes with the batch's statistics; call model.eval() "
                         "first, with running statistics tracked and used")
    if norm.statistics == "population" and not norm.num_batches_tracked.data:
        raise ValueError(f"fuse: {name} has no statistics of the population: call "
                         "nbgrad.train.update_bn(model, loader) first")
    mean, var = norm.running_mean.data, norm.running_var.data
    bad = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(var) & (var + norm.eps > 0)))
    if bad.size:
        c = bad[0]
        raise ValueError(f"fuse: {name} cannot normalize channel {c}: running mean {mean[c]:g}, "
                         f"running var {var[c]:g}, eps {norm.eps:g}"
                         + (f", and {bad.size - 1} more channels" if bad.size > 1 else ""))


def _check_other(norm: Any, name: str) -> None:
    """The same for norms with statistics of another kind."""
    if norm._by_batch:
        raise ValueError(f"fuse: {name} is in training mode; call model.eval() first")
    if _is_affine(norm) and not all(np.isfinite(a).all() for a in _constants(norm)):
        raise ValueError(f"fuse: {name} cannot normalize: its running statistics are not finite, "
                         "or say that there is no spread")


def _neighbours(model: Module) -> Iterator[tuple[Any, Any]]:
    from .container import Sequential

    for parent in model.modules():
        if isinstance(parent, Sequential):
            children = list(parent)
            for layer, norm in pairwise(children):
                once = children.count(layer) == children.count(norm) == 1
                if once and _foldable(layer, norm):
                    yield norm, layer


def _foldable(layer: Any, norm: Any) -> bool:
    """Whether both are just what they are called, unwatched, and of one number of channels."""
    if not _is_affine(norm) or not _by_channel(layer, norm):
        return False
    size = layer.out_features if type(layer) is Linear else layer.out_channels
    return _plain(layer) and _plain(norm) and size == norm.num_features


def _by_channel(layer: Any, norm: Any, ndim: int | None = None) -> bool:
    """Whether the norm's channels are the layer's outputs; ndim is that of its value, if known."""
    if type(norm) is InstanceNorm2d:                # which takes (C, H, W), too
        return type(layer) in _CONVOLUTIONS and layer.dims == 2
    if type(layer) is Linear:
        return ndim in (None, 2)
    return type(layer) in _CONVOLUTIONS and ndim in (None, layer.dims + 2)


def _observed(model: Module, example: tuple[Tensor, ...]) -> tuple[dict[Any, Any], set[Any]]:
    """{norm: layer} where, in one run, the norm's only input was the layer's only output, and the
    norms that were called with more than that."""
    made: dict[int, tuple[Any, Any]] = {}
    plain = {m for m in model.modules() if _plain(m)}           # before the hooks below
    calls: dict[Any, int] = {}
    pairs: dict[Any, Any] = {}
    added: set[Any] = set()

    def watch(module: Any, args: Any, settings: Any, y: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if _is_affine(module) and id(input_of(args, settings)) in made:
            layer, x = made[id(input_of(args, settings))]
            if _by_channel(layer, module, x.ndim):
                pairs[module] = layer
                added.update({module} if settings else ())
        elif type(module) in (*_CONVOLUTIONS, Linear):
            made[id(y)] = module, y                 # y stays alive, so that its id stays its own

    handles = [m.register_forward_hook(watch, with_kwargs=True) for m in model.modules()]
    try:
        with no_grad():
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return {norm: layer for norm, layer in pairs.items()
            if calls[norm] == calls[layer] == 1 and {norm, layer} <= plain}, added


def _fold(layer: Any, norm: Any) -> float:
    """norm into layer; the largest |γ|/σ."""
    mean, scale = _constants(norm)
    if norm.weight is not None:
        scale *= norm.weight.data
    w, dtype = layer.weight.data, layer.weight.dtype
    shift = (0.0 if layer.bias is None else layer.bias.data) - mean
    shift = shift * scale + (0.0 if norm.bias is None else norm.bias.data)
    layer.weight = Parameter((w * _by_output(layer, scale)).astype(dtype))
    layer.bias = Parameter(shift.astype(dtype))
    return float(greatest(np.abs(scale)))


def _by_output(layer: Any, scale: Any) -> Any:
    """A number for each output, shaped as its weights are."""
    ones = [1] * (layer.weight.ndim - 2)
    if not getattr(layer, "transposed", False):
        return scale.reshape(-1, 1, *ones)
    own = scale.reshape(layer.groups, -1, *ones)    # weight: (in, out / groups, …), group by group
    return np.repeat(own, layer.in_channels // layer.groups, axis=0)


def _constants(norm: Any) -> tuple[Any, Any]:
    """μ and 1/σ in float64."""
    mean: Any = norm.running_mean.data.astype(np.float64)
    if type(norm) is MeanOnlyBatchNorm:
        return mean, np.ones_like(mean)
    with np.errstate(all="ignore"):
        if type(norm) is LpBatchNorm:
            return mean, 1 / norm.running_scale.data.astype(np.float64)
        return mean, 1 / np.sqrt(norm.running_var.data.astype(np.float64) + norm.eps)


def _compare(model: Module, fused: Module, example: tuple[Tensor, ...]) -> float:
    """The outputs agree to 1e-3 of their size, or, of halves, 16 roundings: what rounding does
    stays below, what a wrong pair does hardly ever. Returns the largest difference."""
    with no_grad():
        pairs = list(zip(_arrays(model(*example)), _arrays(fused(*example))))
    if not sum(y.size for y, _ in pairs) or not all(np.isfinite(y).all() for y, _ in pairs):
        raise ValueError("fuse: the model's output on the example is empty, holds no floating "
                         "numbers, or some that are not finite: it shows nothing")
    worst = 0.0
    for y, new in pairs:
        limit = {"float16": 2.0 ** -6, "bfloat16": 2.0 ** -3}.get(y.dtype.name, 1e-3)
        y, new = y.astype(np.float64), new.astype(np.float64)
        off = float(greatest(np.abs(y - new)))
        if not off <= limit * greatest(np.abs(y)):
            raise RuntimeError(f"fuse: the example's output changed by {off:.3g}: the output of a "
                               "layer before a batch norm is used elsewhere, too, or the model "
                               "does not give the same output twice")
        worst = max(worst, off)
    return worst


def _arrays(y: Any) -> list[Any]:
    """The floating arrays in what a model returns."""
    if isinstance(y, Tensor):
        return [y.data] if y.dtype.kind in "fV" else []
    values = y.values() if isinstance(y, dict) else y if isinstance(y, (tuple, list)) else ()
    return [a for value in values for a in _arrays(value)]
