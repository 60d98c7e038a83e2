"""Layers that take the number of their input's channels or features from the first batch."""

# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbgrad.autograd import Tensor

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .group_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .linear import Linear
from .module import Module
from .norm import MOMENTUM
from .parameter import Parameter, Uninitialized
from .tree import BUFFER, PARAMETER

__all__ = ["Lazy", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d", "LazyConv1d",
           "LazyConv2d", "LazyConvTranspose1d", "LazyConvTranspose2d", "LazyInstanceNorm1d",
           "LazyInstanceNorm2d", "LazyInstanceNorm3d", "LazyLinear"]


class _UninitializedBuffer(Uninitialized, Tensor):  # type: ignore[override]  # none yet
    _then = Tensor


class _UninitializedParameter(Uninitialized, Parameter):  # type: ignore[override]
    _then = Parameter


class Lazy(Module):
    """Base: the next class with its first argument left out. The first forward pass, or a state
    dict, gives the parameters and buffers their shapes and initial values (those drawn then), and
    the object becomes one of that class.

    Until then they have no data, and what asks for it raises RuntimeError; ``to``,
    ``requires_grad_``, ``train``, hooks, and an optimizer made of ``parameters()`` work, since
    these are the very objects that are filled. A batch that the layer refuses leaves it as it was.
    A state dict taken before holds them as they are, and can be loaded into a model that is lazy.
    """

    _becomes: type[Module]
    _sized: str                                       # the attribute, and first argument
    _telling: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var")
    _rank = 1                                         # the number of dimensions of these
    _given: tuple[tuple[Any, ...], dict[str, Any]]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(0, *args, **settings)  # type: ignore[call-arg]   # checks the arguments
        self._given = args, settings
        for name, t in self._own(PARAMETER):
            setattr(self, name, _UninitializedParameter(t.dtype))
        for name, t in self._own(BUFFER):
            if t.ndim:
                setattr(self, name, _UninitializedBuffer(t.dtype))

    def __init_subclass__(cls) -> None:
        cls._becomes = cls.__bases__[-1]

    def _size(self, x: Tensor) -> int:
        """Of the first argument, for a batch; raises for one that the layer would refuse."""
        raise NotImplementedError

    def _size_of(self, shape: tuple[int, ...]) -> int:
        """The same, for the shape of one of those that ``_telling`` names."""
        return shape[0]

    def has_uninitialized_params(self) -> bool:
        """Whether the first batch is still to come."""
        return any(isinstance(t, Uninitialized) for _, t in self._own(PARAMETER, BUFFER))

    def reset_parameters(self) -> None:
        """Nothing before the first batch, which does it."""
        if not self.has_uninitialized_params():
            super().reset_parameters()  # type: ignore[misc]

    def initialize_parameters(self, x: Tensor) -> None:
        """Become the layer that fits a batch, without a forward pass."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: expected a Tensor, got {type(x).__name__}")
        self.become(self._made(self._size(x)))

    def _made(self, size: int) -> Module:
        args, settings = self._given
        made: Any = self._becomes
        return made(size, *args, **settings)

    def draft(self, state_dict: Mapping[str, Any], prefix: str) -> Module | None:
        """The layer whose shapes a state dict has, or None if it says nothing of them."""
        for name in self._telling:
            value = state_dict.get(prefix + name)
            shape = () if isinstance(value, Uninitialized) else getattr(value, "shape", ())
            if len(shape) == self._rank:
                return self._made(self._size_of(shape))
        return None

    def become(self, new: Module) -> None:
        """Take over the size and the values of a layer that has them."""
        setattr(self, self._sized, getattr(new, self._sized))
        for name, t in self._own(PARAMETER, BUFFER):
            if isinstance(t, Uninitialized):
                t.materialize(getattr(new, name).data)
        del self._given
        self.__class__ = self._becomes  # type: ignore[assignment]

    def forward(self, *args: Any, **settings: Any) -> Any:
        self.initialize_parameters(*args[:1])
        return self.forward(*args, **settings)


class _LazyNorm(Lazy):
    _sized = "num_features"

    def _size(self, x: Tensor) -> int:
        ndims: tuple[int, ...] = vars(self._becomes)["_ndims"]
        if x.ndim not in ndims:
            expected = " or ".join(f"{n}D" for n in ndims)
            raise ValueError(f"expected {expected} input (got {x.ndim}D input)")
        return x.shape[1]


class LazyBatchNorm1d(_LazyNorm, BatchNorm1d):
    """BatchNorm1d whose num_features is that of the first batch: LazyBatchNorm1d(eps, …).

    >>> import nbgrad
    >>> layer = LazyBatchNorm1d(eps=1e-3)
    >>> y = layer(nbgrad.randn(8, 3))
    >>> type(layer).__name__, layer.num_features, layer.eps
    ('BatchNorm1d', 3, 0.001)
    """


class LazyBatchNorm2d(_LazyNorm, BatchNorm2d):
    """BatchNorm2d whose num_features is that of the first batch: LazyBatchNorm2d(eps, …)."""


class LazyBatchNorm3d(_LazyNorm, BatchNorm3d):
    """BatchNorm3d whose num_features is that of the first batch: LazyBatchNorm3d(eps, …)."""


class _LazyInstanceNorm(Lazy):
    _sized = "num_features"
    _ndim: int

    def __init__(self, eps: float = 1e-5, momentum: float | None = MOMENTUM, affine: bool = True,
                 track_running_stats: bool = True, **settings: Any) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, **settings)

    def _size(self, x: Tensor) -> int:
        if x.ndim not in (self._ndim - 1, self._ndim):
            raise ValueError(f"expected {self._ndim - 1}D or {self._ndim}D input (got {x.ndim}D "
                             "input)")
        return x.shape[x.ndim - self._ndim + 1]


class LazyInstanceNorm1d(_LazyInstanceNorm, InstanceNorm1d):
    """InstanceNorm1d whose num_features is that of the first batch; as in PyTorch, with gamma, beta
    and running statistics unless told otherwise."""


class LazyInstanceNorm2d(_LazyInstanceNorm, InstanceNorm2d):
    """InstanceNorm2d whose num_features is that of the first batch; see LazyInstanceNorm1d."""


class LazyInstanceNorm3d(_LazyInstanceNorm, InstanceNorm3d):
    """InstanceNorm3d whose num_features is that of the first batch; see LazyInstanceNorm1d."""


class _LazyLinear(Lazy):
    _sized, _telling, _rank = "in_features", ("weight",), 2

    def reset_parameters(self) -> None:
        """Nothing: the first batch draws."""

    def _size(self, x: Tensor) -> int:
        if not x.ndim:
            raise ValueError("LazyLinear: expected at least 1D input (got 0D input)")
        return x.shape[-1]

    def _size_of(self, shape: tuple[int, ...]) -> int:
        return shape[1]


class LazyLinear(_LazyLinear, Linear):
    """Linear whose in_features is that of the first batch: LazyLinear(out_features, …).

    >>> import nbgrad
    >>> layer = LazyLinear(2)
    >>> layer(nbgrad.randn(8, 3)).shape, layer.weight.shape
    ((8, 2), (2, 3))
    """


class _LazyConv(Lazy):
    _sized, _telling = "in_channels", ("weight",)
    groups: int
    dims: int

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._rank = cls.dims + 2

    def reset_parameters(self) -> None:
        """Nothing: the first batch draws."""

    def _size(self, x: Tensor) -> int:
        if x.ndim not in (self.dims + 1, self.dims + 2):
            raise ValueError(f"expected {self.dims + 1}D or {self.dims + 2}D input (got {x.ndim}D "
                             "input)")
        return x.shape[-self.dims - 1]

    def _size_of(self, shape: tuple[int, ...]) -> int:
        made: Any = self._becomes
        return shape[0] if made.transposed else shape[1] * self.groups


class LazyConv1d(_LazyConv, Conv1d):
    """Conv1d whose in_channels is that of the first batch: LazyConv1d(out_channels, kernel_size,
    …)."""


class LazyConv2d(_LazyConv, Conv2d):
    """Conv2d whose in_channels is that of the first batch: LazyConv2d(out_channels, kernel_size,
    …)."""


class LazyConvTranspose1d(_LazyConv, ConvTranspose1d):
    """ConvTranspose1d whose in_channels is that of the first batch."""


class LazyConvTranspose2d(_LazyConv, ConvTranspose2d):
    """ConvTranspose2d whose in_channels is that of the first batch:
    LazyConvTranspose2d(out_channels, kernel_size, …)."""
