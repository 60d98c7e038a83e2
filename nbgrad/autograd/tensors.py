"""Tensor: an array, whether its gradient is wanted, and the Node that it was computed by.

What starts the engine is in gradients.py, what writes to a tensor in inplace.py, Python's operators
are in operators.py; ops become methods as they are filed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy import ndarray

from nbgrad.backend import (
    checked_device,
    device_of,
    is_array,
    is_pinned,
    move,
    pinned,
    refuse_captured,
    writable,
)

from .arrays import Array, checked_dtype, to_array
from .node import OPS, Node
from .versions import share_version

__all__ = ["Handle", "Tensor", "as_tensor", "new", "tensor", "wrap"]

new: Any = object.__new__


class Handle:
    """What a hook's registration returns; ``remove()`` takes the hook away."""

    def __init__(self, hooks: list[Any], hook: Any) -> None:
        self.hooks, self.hook = hooks, hook

    def remove(self) -> None:
        if self.hook in self.hooks:
            self.hooks.remove(self.hook)


class Tensor:
    """An array that remembers how it was computed.

    ``data`` is the NumPy array, on a GPU the CuPy array. Every op of ``nbgrad.ops`` is also a
    method. Names, argument order and meaning are PyTorch's; ``data``, ``dtype`` and ``shape`` are
    NumPy's.

    >>> import nbgrad
    >>> x = nbgrad.tensor([1.0, 2.0], requires_grad=True)
    >>> y = (x * x).sum()
    >>> y.backward()
    >>> x.grad
    tensor([2., 4.])
    """

    data: Array
    requires_grad: bool = False
    grad: Tensor | None = None
    grad_fn: Node | None = None
    _version: list[Any] | None = None        # [clock of the last in-place write, views …]
    _hooks: list[Any] | None = None
    _retained: Handle | None = None          # of retain_grad's hook
    __array_priority__ = 1000

    if TYPE_CHECKING:                        # what the ops and the loops below the class set
        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def __eq__(self, other: object) -> Any: ...
        def __ne__(self, other: object) -> Any: ...
        def __neg__(self) -> Tensor: ...
        def _binary(self, other: Any) -> Tensor: ...
        def _write(self, new: Tensor, name: str) -> Tensor: ...
        def _in_place(self, name: str, *args: Any) -> Tensor: ...
        def backward(self, gradient: Any = None, retain_graph: bool | None = None,
                     create_graph: bool = False, inputs: Any = None) -> None: ...

        __abs__ = __invert__ = __neg__
        __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __matmul__ = _binary
        __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rpow__ = __rmatmul__ = _binary
        __floordiv__ = __mod__ = __and__ = __or__ = __xor__ = _binary
        __rfloordiv__ = __rmod__ = __rand__ = __ror__ = __rxor__ = _binary
        __lt__ = __le__ = __gt__ = __ge__ = _binary
        __iadd__ = __isub__ = __imul__ = __itruediv__ = _binary
        add_ = sub_ = mul_ = div_ = copy_ = fill_ = _binary
        zero_ = __neg__

    def __init__(self, data: Any, dtype: Any = None, requires_grad: bool = False) -> None:
        data = data.data if isinstance(data, Tensor) else data
        self.data = to_array(data, dtype, copy=True)
        self.requires_grad_(requires_grad)

    # what it is
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def is_leaf(self) -> bool:
        return self.grad_fn is None

    @property
    def device(self) -> str:
        """Where the array lives: "cpu", or "cuda", "cuda:1" …"""
        return device_of(self.data)

    def size(self, dim: int | None = None) -> Any:
        """Shape, or the length of one dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.data.ndim

    def numel(self) -> int:
        return self.data.size

    def is_floating_point(self) -> bool:
        return self.data.dtype.kind in "fV"

    def __len__(self) -> int:
        if not self.data.ndim:
            raise TypeError("len() of a 0-d tensor")
        return len(self.data)

    def __repr__(self) -> str:
        text = np.array2string(move(self.data, "cpu"), precision=4, separator=", ",
                               prefix="tensor(", threshold=1000)
        if not self.data.size and self.ndim != 1:
            text += f", size={self.shape}"
        if self.dtype not in (np.float32, np.int64, np.bool_):
            text += f", dtype={self.dtype}"
        if self.device != "cpu":
            text += f", device='{self.device}'"
        if self.grad_fn is not None:
            text += f", grad_fn={self.grad_fn!r}"
        elif self.requires_grad:
            text += ", requires_grad=True"
        return f"tensor({text})"

    # out of the graph
    def numpy(self) -> Array:
        """The array itself, not a copy. Raises RuntimeError if it requires grad, TypeError if it
        is on a GPU."""
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. "
                               "Use tensor.detach().numpy() instead.")
        if self.device != "cpu":
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use "
                            "Tensor.cpu() to copy the tensor to host memory first.")
        return self.data

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.numpy(), dtype, copy=copy)

    def __dlpack__(self, **kwargs: Any) -> Any:
        x = self.data
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        odd = any(s < 0 or (s == 0 and n > 1) for s, n in zip(x.strides, x.shape))
        if odd or not writable(x):
            x = x.copy()    # consumers write through read-only memory, abort on negative strides
        return x.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Where a device's memory is, for CuPy, Numba and PyTorch. Raises AttributeError on the
        CPU, RuntimeError if it requires grad."""
        if self.device == "cpu":
            raise AttributeError("Can't get __cuda_array_interface__ on non-CUDA tensor; use "
                                 "Tensor.to('cuda') first")
        if self.requires_grad:
            raise RuntimeError("Can't get __cuda_array_interface__ on Tensor that requires grad. "
                               "If gradients aren't required, use Tensor.detach()")
        return self.data.__cuda_array_interface__  # type: ignore[no-any-return, attr-defined]

    def item(self) -> Any:
        """The one element as a Python number."""
        if self.data.size != 1:
            raise RuntimeError(f"a Tensor with {self.data.size} elements cannot be converted to "
                               "Scalar")
        refuse_captured("item(), which waits for a value of the device,")
        return self.data.item()

    def tolist(self) -> Any:
        refuse_captured("tolist(), which waits for values of the device,")
        return self.data.tolist()

    def detach(self) -> Tensor:
        """The same memory, outside the graph."""
        out: Tensor = wrap(self.data)
        share_version(self, out)
        return out

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if not self.data.ndim else super().__format__(spec)

    def __bool__(self) -> bool:
        if self.data.size != 1:
            raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.dtype.kind not in "iu":
            raise TypeError("only integer tensors of a single element can be converted to an index")
        return int(self.item())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support "
                               "the deepcopy protocol at the moment; use detach()")
        out: Tensor = new(type(self))
        memo[id(self)] = out
        for name, value in vars(self).items():
            if name not in ("_hooks", "_retained", "_version", "grad", "data"):
                setattr(out, name, value)
        if self._version is not None:                # what was noted of the clock holds of the copy
            out._version = self._version[:1]
        out.data = self.data.copy(order="K")
        out.grad = None if self.grad is None else self.grad.detach().clone()
        return out

    # the graph
    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Ask for gradients of this leaf, in place."""
        if requires_grad and self.dtype.kind not in "fV":
            raise RuntimeError("only Tensors of floating point dtype can require gradients, got "
                               f"{self.dtype}")
        if not requires_grad and not self.is_leaf:
            raise RuntimeError("you can only change requires_grad flags of leaf variables; use "
                               "detach()")
        self.requires_grad = requires_grad
        return self

    def retain_grad(self) -> None:
        """Keep ``.grad`` of this non-leaf, too."""
        if not self.requires_grad:
            raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
        if self.grad_fn is None or self._retained is not None:
            return
        ref = weakref.ref(self)

        def keep(dy: Tensor) -> None:
            t = ref()
            if t is not None:
                t.grad = dy if t.grad is None else t.grad + dy
        self._retained = self.register_hook(keep)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Handle:
        """Call ``hook(dy)`` when this tensor's gradient is known; what it returns replaces dy."""
        if not self.requires_grad:
            raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
        owner: Any = self.grad_fn or self
        name = "_hooks" if owner is self else "hooks"
        if getattr(owner, name) is None:
            setattr(owner, name, [])
        getattr(owner, name).append(hook)
        return Handle(getattr(owner, name), hook)

    # dtype
    def to(self, *args: Any, dtype: Any = None, device: Any = None,
           non_blocking: bool = False) -> Tensor:
        """This tensor as another dtype or on another device (or as another tensor has them);
        itself if it is so already. Devices are "cpu", "cuda", "cuda:1" …

        With ``non_blocking``, the host goes on while the device copies from pinned memory, or to
        the pinned memory of the result, whose values are there after nbgrad.cuda.synchronize().
        Memory that is not pinned is copied before this returns."""
        for arg in args:
            if isinstance(arg, Tensor):
                dtype, device = arg.dtype, arg.device
            elif isinstance(arg, str) and not hasattr(np, arg) and arg != "bfloat16":
                device = arg
            else:
                dtype = arg
        y: Tensor = self
        if device is not None and (device := checked_device(device)) != self.device:
            y = OPS["to_device"](y, device=device, non_blocking=bool(non_blocking))
        if dtype is not None and (dtype := checked_dtype(dtype)) != y.data.dtype:
            y = OPS["cast"](y, dtype=dtype)
        return y

    def cpu(self) -> Tensor:
        """This tensor in main memory."""
        return self.to(device="cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Tensor:
        """This tensor on a GPU, by default the first."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def pin_memory(self) -> Tensor:
        """This tensor in memory that a GPU copies from while the host goes on (see ``to``), outside
        the graph; itself if it is there. Raises RuntimeError on a GPU, and where there is none."""
        return self if self.is_pinned() else wrap(pinned(self.data))

    def is_pinned(self) -> bool:
        """Whether this tensor is in pinned memory."""
        return is_pinned(self.data)

    def float(self) -> Tensor:
        return self.to(np.float32)

    def half(self) -> Tensor:
        """This tensor as float16."""
        return self.to(np.float16)

    def bfloat16(self) -> Tensor:
        """This tensor as bfloat16, which needs ml_dtypes."""
        return self.to("bfloat16")

    def double(self) -> Tensor:
        return self.to(np.float64)

    def long(self) -> Tensor:
        return self.to(np.int64)

    def int(self) -> Tensor:
        return self.to(np.int32)

    def bool(self) -> Tensor:
        return self.to(np.bool_)

    # operators
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[Tensor]:
        if not self.data.ndim:
            raise TypeError("iteration over a 0-d tensor")
        return (self[i] for i in range(len(self.data)))

    @property
    def T(self) -> Tensor:
        y: Tensor = OPS["permute"](self, dims=tuple(range(self.ndim))[::-1])
        return y

    @property
    def mT(self) -> Tensor:
        y: Tensor = OPS["transpose"](self, -2, -1)
        return y


@overload
def wrap(y: Array) -> Tensor: ...
@overload
def wrap(y: Any) -> Any: ...
def wrap(y: Any) -> Any:
    if type(y) is tuple:
        return tuple(map(wrap, y))
    out = new(Tensor)
    out.data = y if type(y) is ndarray or is_array(y) else np.asarray(y)
    return out


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False, *,
           device: Any = None) -> Tensor:
    """A new Tensor that owns a copy of ``data``.

    Python floats become float32, arrays keep their dtype. Raises TypeError for what is no number,
    ValueError for ragged lists.

    >>> from nbgrad import tensor
    >>> tensor([[1, 2], [3, 4]])
    tensor([[1, 2],
            [3, 4]])
    """
    if device is None:
        return Tensor(data, dtype, requires_grad)
    device = checked_device(device)
    data = data.data if isinstance(data, Tensor) else data
    x: Tensor = wrap(move(to_array(data, dtype, copy=True), device))
    return x.requires_grad_(requires_grad)


def as_tensor(data: Any, dtype: Any = None) -> Tensor:
    """A Tensor that shares ``data``'s memory where it can; itself if it is one of that dtype."""
    if isinstance(data, Tensor):
        return data if dtype is None else data.to(dtype)
    return wrap(to_array(data, dtype))
