"""Batch norms of a finished model turned into other layers, frozen, and released again."""

# mypy: no-warn-return-any

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nbgrad.autograd import bump
from nbgrad.ops import Workers

from .batch_norm import BatchNorm
from .batch_variants import check_workers
from .create_norm import create_norm
from .module import Module, check_model
from .norm import Unsaid
from .running import keeps_statistics
from .statistics import PRESETS
from .tree import MODULE

__all__ = ["convert_norm", "freeze_batch_norm", "unfreeze_batch_norm"]

Factory = Callable[[Any], Module]


def convert_norm(model: Module, to: str | Factory, *, of: Any = None,
                 **options: Any) -> Module:
    """Replace the batch norms of a model, in place; returns the model, or, where that is itself a
    batch norm, the layer that takes its place.

    to: "frozen" and "batch": ``freeze_batch_norm`` and ``unfreeze_batch_norm``: the layers stay;
      "sync" with ``workers=`` (see nbgrad.ops.Workers; None ends it): the layers stay, and take
      the statistics of the workers' batches together;
      "group", or another name that ``nn.create_norm`` knows, with its ``options``: groups=8. It
      gets eps, affine, bias and momentum of the layer, where it has such, and dims: of BatchNorm1d
      1, where none and no size are given; one that is a batch norm, too ("ghost", "renorm"), gets
      all settings, and evaluates as it did;
      a function: layer -> the module in its place (the layer itself, to leave it as it is).
    of: the class or classes of layers to convert; None: batch norms, and for "frozen" and "batch"
      all that keep running statistics.

    Names, hooks, training flags and dtypes are kept (hooks stay with a layer that its successor
    contains); a parameter or buffer is copied where the new layer has one of that name and shape:
    gamma and beta, which are then a start for fine-tuning, since another normalization computes
    another function. A layer with two names stays shared.

    Raises ValueError for names, options, groups and layers that do not fit, TypeError for what is
    neither name nor function and for a function that returns no Module; the model is then as it
    was.

    >>> from nbgrad import nn
    >>> convert_norm(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)), lambda bn: nn.LayerNorm(4))
    Sequential(
      (0): Linear(in_features=2, out_features=4, bias=True)
      (1): LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    )
    """
    check_model("convert_norm", model)
    if not isinstance(to, str) and not callable(to):
        raise TypeError("convert_norm: expected a name or a function that makes a layer, got "
                        f"{to!r}")
    if isinstance(to, str) and to in _STAYING:
        return _changed(model, to, of, options)
    make = to if callable(to) else _factory(to, options)
    if callable(to) and options:
        raise ValueError(f"convert_norm: a function takes no options, got {', '.join(options)}")
    new = {layer: _made(make, name, layer) for name, layer in model.named_modules()
           if isinstance(layer, BatchNorm if of is None else of)}
    homes = [(parent, name, child) for parent in model.modules()
             for name, child in parent._own(MODULE) if child in new]
    for old, layer in new.items():
        _take_over(old, layer)
    for parent, name, child in homes:
        setattr(parent, name, new[child])
    return new.get(model, model)


def freeze_batch_norm(model: Module, *, affine: bool = True) -> Module:
    """Normalize with the running statistics in training, too, and move neither them nor, with
    ``affine``, gamma, beta and the layer's other parameters: for fine-tuning with batches too small
    to have statistics. Of batch norms and all others with running statistics (EvoNorm B0,
    switchable, ℓp, mean-only and decorrelated batch norm, instance norm that tracks). In place,
    survives ``model.train()``; returns the model. ``unfreeze_batch_norm`` takes it back.

    Raises ValueError, with nothing changed, for a batch norm that keeps no running statistics.

    >>> from nbgrad import nn
    >>> layer = freeze_batch_norm(nn.BatchNorm1d(2))
    >>> layer.statistics, layer.weight.requires_grad
    ('frozen', False)
    """
    check_model("freeze_batch_norm", model)
    _freeze(_with_statistics(model), affine)
    return model


def _freeze(layers: dict[str, Any], affine: bool = True) -> None:
    for name, layer in layers.items():
        if layer.num_batches_tracked is None:
            raise ValueError(f"freeze_batch_norm: {name or 'the model'} keeps no running "
                             "statistics (track_running_stats=False)")
    for layer in layers.values():
        parameters = list(layer.parameters(recurse=False))
        if layer._thawed is None:
            layer._thawed = layer.statistics, [p.requires_grad for p in parameters]
        layer.statistics = "frozen"
        for p in parameters if affine else ():
            p.requires_grad_(False)


def unfreeze_batch_norm(model: Module) -> Module:
    """Undo ``freeze_batch_norm``: the statistics that were used before, and parameters trained
    where they were, all of a ``FrozenBatchNorm``. Layers that were built with statistics="frozen"
    get "batch". In place; returns the model.

    >>> from nbgrad import nn
    >>> layer = unfreeze_batch_norm(freeze_batch_norm(nn.BatchNorm1d(2, statistics="population")))
    >>> layer.statistics, layer.weight.requires_grad
    ('population', True)
    """
    check_model("unfreeze_batch_norm", model)
    _unfreeze(_with_statistics(model))
    return model


def _unfreeze(layers: dict[str, Any]) -> None:
    for layer in layers.values():
        if layer._thawed is not None:
            layer.statistics, trained = layer._thawed
            for p, flag in zip(layer.parameters(recurse=False), trained):
                p.requires_grad_(flag)
            layer._thawed = None
        elif layer.statistics == "frozen":
            layer.statistics = "batch"


def _share(layers: dict[str, Any], workers: Workers | None) -> None:
    check_workers("convert_norm", workers)
    for layer in layers.values():
        layer.workers = workers


# what changes batch norms and leaves them in place, with its options
_STAYING: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "frozen": (_freeze, ("affine",)), "batch": (_unfreeze, ()), "sync": (_share, ("workers",))}


def _changed(model: Module, to: str, of: Any, options: dict[str, Any]) -> Module:
    change, known = _STAYING[to]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"convert_norm: {to!r} takes {', '.join(known) or 'no options'}, got "
                         f"{', '.join(unknown)}")
    if to == "sync" and "workers" not in options:
        raise ValueError("convert_norm: 'sync' needs workers= (see nbgrad.ops.Workers; None ends "
                         "it)")
    both = to != "sync"
    if of is None:
        layers = _with_statistics(model, both)
    else:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, of)}
    layers |= {f"{name}.aux_bn.{i}": aux for name, m in list(layers.items())
               for i, aux in enumerate(getattr(m, "aux_bn", ()))}       # they are part of it
    for name, layer in layers.items():
        if not (isinstance(layer, BatchNorm) or (both and keeps_statistics(layer))):
            raise ValueError(f"convert_norm: {to!r} changes batch norms, and {name or 'the model'} "
                             f"is {type(layer).__name__}: pass a function that makes a layer")
    change(layers, **options)
    return model


def _with_statistics(model: Module, others: bool = True) -> dict[str, Any]:
    """The batch norms by name, and the other norms that keep running statistics."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, BatchNorm) or (others and keeps_statistics(m))}


def _factory(name: str, options: dict[str, Any]) -> Factory:
    """layer -> its replacement, by a name of ``create_norm``."""
    def make(layer: Any) -> Any:
        channels = getattr(layer, "num_features", getattr(layer, "num_channels", None))
        if channels is None:
            raise ValueError(f"convert_norm: {type(layer).__name__} does not say its number of "
                             "channels: pass a function that makes the layer")
        settings: dict[str, Any] = {}
        ndims: tuple[int, ...] = getattr(layer, "_ndims", ())
        if len(ndims) == 1 or (len(ndims) == 2 and "size" not in options):      # 1d: of (N, C, L)
            settings["dims"] = ndims[-1] - 2        # those of any dims leave it open
        new = create_norm(name, channels, **{**settings, **options})
        same = isinstance(new, BatchNorm)           # a name does not tell: ask what it makes
        more = _kept(layer, options) if same else _fitting(layer, new)
        if more:
            new = create_norm(name, channels, **{**settings, **more, **options})
        if same:
            vars(new)["_thawed"] = getattr(layer, "_thawed", None)
        return new
    return make


# with which running statistics and gamma give what they gave
_POLICY = ("momentum", "track_running_stats", "statistics", "average", "correction", "update",
           "on_nonfinite")


def _scaling(layer: Any) -> dict[str, Any]:
    """eps, and which of gamma and beta there are."""
    found = {"affine": getattr(layer, "weight", None) is not None,
             "bias": getattr(layer, "bias", None) is not None}
    eps = getattr(layer, "eps", None)
    return found if eps is None else {**found, "eps": eps}


def _fitting(layer: Any, new: Module) -> dict[str, Any]:
    """The settings of a layer that another norm in its place has, too."""
    found = _scaling(layer)
    found["elementwise_affine"] = found["affine"]
    if getattr(layer, "average", None) is None and getattr(layer, "momentum", None) is not None:
        found["momentum"] = layer.momentum           # None means different things
    known = inspect.signature(type(new)).parameters
    return {name: value for name, value in found.items() if name in known}


def _kept(layer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a layer that a batch norm in its place gets."""
    kept = _scaling(layer)
    if isinstance(layer, BatchNorm):
        kept |= {name: getattr(layer, name) for name in _POLICY}
    said = {"average"} if "momentum" in options else set()      # by an option of another name
    if kept.get("average") is not None:              # then the momentum is one that nobody gave
        kept["momentum"] = Unsaid(layer.momentum or 0.0)
    if options.get("like") is not None:
        said |= {"momentum", *PRESETS["torch"]}
    return {name: value for name, value in kept.items() if name not in said}


def _made(make: Factory, name: str, layer: Any) -> Module:
    new = make(layer)
    if not isinstance(new, Module):
        raise TypeError(f"convert_norm: expected a Module in place of {name or 'the model'}, got "
                        f"{type(new).__name__}")
    return new


def _take_over(old: Any, new: Any) -> None:
    """What both have, copied into the new one; the same hooks."""
    if new is old:
        return
    have = [*old.parameters(), *old.buffers()]
    if have:
        new.to(have[0].dtype)
    values = {**dict(old.named_parameters()), **dict(old.named_buffers())}
    _copy(values, new)
    if hasattr(new, "aux_bn") and not hasattr(old, "aux_bn"):   # every split starts as the layer
        for aux in new.aux_bn:
            _copy(values, aux)
    new.train(old.training)
    if old._hooks is not None and old not in set(new.modules()):
        vars(new)["_hooks"] = old._hooks


def _copy(values: dict[str, Any], new: Any) -> None:
    """What has the same name and shape."""
    for name, t in [*new.named_parameters(), *new.named_buffers()]:
        source = values.get(name)
        if source is not None and source.shape == t.shape:
            t.data[...] = source.data
            t.requires_grad_(source.requires_grad)
            bump(t)
