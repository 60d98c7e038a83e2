"""Norms by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .batch_controls import LpBatchNorm, MeanOnlyBatchNorm, NoisyBatchNorm
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .batch_variants import (
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SplitBatchNorm,
    SyncBatchNorm,
)
from .group_norm import (
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LocalResponseNorm,
    RMSNorm,
)
from .linear import Identity
from .module import Module
from .norm import LayerNorm
from .parameter import check_sizes
from .response_norm import EvoNormB0, EvoNormS0, FilterResponseNorm, GlobalResponseNorm
from .switchable_norm import SwitchableNorm
from .whitening import DecorrelatedBatchNorm

__all__ = ["create_norm", "register_norm"]

Builder = Callable[..., Module]
_BUILDERS: dict[str, Builder] = {}


def register_norm(name: str) -> Callable[[Builder], Builder]:
    """Decorator: file a function (channels, dims, size, **settings) → Module under a name of
    ``create_norm``. ``dims`` is the number of axes behind the channels, ``size`` their lengths;
    each may be None. Raises ValueError for a name that is taken.

    >>> @register_norm("scale only")
    ... def _scale_only(channels, dims, size, **settings):
    ...     return RMSNorm(channels, **settings)
    >>> create_norm("scale only", 8)
    RMSNorm((8,), eps=None, elementwise_affine=True)
    """
    if name in _BUILDERS:
        raise ValueError(f"register_norm: there is a norm {name!r} already")

    def register(build: Builder) -> Builder:
        _BUILDERS[name] = build
        return build
    return register


def create_norm(name: str | None, channels: int, *, dims: int | None = None,
                size: int | Sequence[int] | None = None, **settings: Any) -> Module:
    """A norm for x (N, channels, *) by name; None is Identity. ``settings`` are those of the layer;
    ``affine=False`` and ``bias=False`` leave gamma and beta out by every name that has them, but
    for "global_response", which is nothing without.

    dims: number of axes behind the channels (0: a layer of units); where it is None, that of
    ``size``, else 2, as for images.   size: their lengths, which "layer" and "rms" need to take a
    sample as a whole.

    "batch": BatchNorm1d/2d/3d.  "layer": LayerNorm of (channels, *size); without size, of images,
    GroupNorm with one group, the same statistics with gamma and beta per channel.  "group":
    GroupNorm; ``groups``, as many of 32 as divide the channels with 4 or more each.  "instance":
    InstanceNorm1d/2d/3d with gamma and beta.  "rms": RMSNorm.  "local": LocalResponseNorm, over
    ``window=5`` channels.  "evonorm_s0": EvoNormS0, ``groups`` as for "group".  Those that take the
    channels alone: "ghost", "split", "renorm", "frozen", "sync", "lp", "mean_only", "noisy",
    "decorrelated", "switchable", "filter_response", "global_response", "evonorm_b0".

    Raises ValueError for an unknown name, channels that are no int of at least 0, or where
    the norm does not fit the dims.

    >>> create_norm("group", 64, groups=8)
    GroupNorm(8, 64, eps=1e-05, affine=True, bias=True)
    >>> create_norm("batch", 100, dims=0).extra_repr()[:10]
    '100, eps=1'
    """
    if name is None:
        return Identity()
    if name not in _BUILDERS:
        raise ValueError(f"create_norm: expected None or one of {', '.join(sorted(_BUILDERS))}, "
                         f"got {name!r}")
    check_sizes("create_norm", channels=channels)
    lengths = (size,) if isinstance(size, int) else None if size is None else tuple(size)
    if dims is None:
        dims = 2 if lengths is None else len(lengths)
    if dims not in (0, 1, 2, 3) or (lengths is not None and len(lengths) != dims):
        raise ValueError(f"create_norm: expected dims from 0 to 3 and as many sizes, got {dims} "
                         f"and {size}")
    return _BUILDERS[name](channels, dims, () if dims == 0 else lengths, **settings)


@register_norm("batch")
def _batch(channels: int, dims: int, size: Any, **settings: Any) -> Module:
    kinds = (BatchNorm1d, BatchNorm1d, BatchNorm2d, BatchNorm3d)
    return kinds[dims](channels, **settings)


@register_norm("layer")
def _layer(channels: int, dims: int, size: Any, *, affine: bool = True, **settings: Any) -> Module:
    if size is None:
        return GroupNorm(1, channels, affine=affine, **settings)
    return LayerNorm((channels, *size), **{"elementwise_affine": affine, **settings})


@register_norm("group")
def _group(channels: int, dims: int, size: Any, *, groups: int | None = None,
           **settings: Any) -> Module:
    return GroupNorm(_groups(channels) if groups is None else groups, channels, **settings)


def _groups(channels: int) -> int:
    """As many of 32 as divide the channels with 4 or more each."""
    return next(g for g in range(min(32, max(channels // 4, 1)), 0, -1) if channels % g == 0)


@register_norm("evonorm_s0")
def _evonorm_s0(channels: int, dims: int, size: Any, *, groups: int | None = None,
                **settings: Any) -> Module:
    return EvoNormS0(channels, groups=_groups(channels) if groups is None else groups, **settings)


@register_norm("instance")
def _instance(channels: int, dims: int, size: Any, *, affine: bool = True,
              **settings: Any) -> Module:
    _check_space("instance", dims)             # of a single value nothing is left
    kinds = (InstanceNorm1d, InstanceNorm2d, InstanceNorm3d)
    return kinds[dims - 1](channels, affine=affine, **settings)


@register_norm("rms")
def _rms(channels: int, dims: int, size: Any, *, affine: bool = True, **settings: Any) -> Module:
    if size is None:
        raise ValueError("create_norm: rms norm needs the size of the axes behind the channels")
    return RMSNorm((channels, *size), **{"elementwise_affine": affine, **settings})


@register_norm("local")
def _local(channels: int, dims: int, size: Any, *, window: int = 5, **settings: Any) -> Module:
    _check_space("local response", dims)
    return LocalResponseNorm(window, **settings)


def _check_space(name: str, dims: int) -> None:
    if dims == 0:
        raise ValueError(f"create_norm: {name} norm needs axes behind the channels")


def _of_channels(name: str, kind: Callable[..., Module]) -> Builder:
    def build(channels: int, dims: int, size: Any, **settings: Any) -> Module:
        if name in ("filter_response", "global_response", "switchable"):
            _check_space(name, dims)
        return kind(channels, **settings)
    return build


for _name, _kind in {
        "ghost": GhostBatchNorm, "split": SplitBatchNorm, "renorm": BatchRenorm,
        "frozen": FrozenBatchNorm, "sync": SyncBatchNorm, "lp": LpBatchNorm,
        "mean_only": MeanOnlyBatchNorm, "noisy": NoisyBatchNorm,
        "decorrelated": DecorrelatedBatchNorm, "switchable": SwitchableNorm,
        "filter_response": FilterResponseNorm, "global_response": GlobalResponseNorm,
        "evonorm_b0": EvoNormB0}.items():
    register_norm(_name)(_of_channels(_name, _kind))
