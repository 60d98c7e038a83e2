"""Parameter: a Tensor that a Module registers when it is assigned to an attribute."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor

__all__ = ["Parameter", "Uninitialized"]


class Parameter(Tensor):
    """A leaf Tensor to be trained. Shares memory with ``data``, as in PyTorch.

    >>> import numpy as np
    >>> Parameter(np.zeros(2)).requires_grad
    True

    Raises TypeError if it would require grad and is not floating point.
    """

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        array = as_tensor(data).data
        if requires_grad and array.dtype.kind not in "fV":
            raise TypeError("Parameter: only floating point tensors can require gradients, "
                            f"got {array.dtype}")
        self.data = array
        self.requires_grad = requires_grad

    def __repr__(self) -> str:
        return f"Parameter containing:\n{super().__repr__()}"


class Uninitialized:
    """What a lazy layer has in place of a parameter or buffer before its first batch: a Tensor
    without data. ``materialize`` makes it one of class ``_then``, the same object."""

    _then: type[Tensor]

    def __init__(self, dtype: Any) -> None:
        vars(self)["lazy_dtype"] = np.dtype(dtype)
        self.requires_grad = issubclass(self._then, Parameter)

    @property
    def data(self) -> Any:
        raise RuntimeError("a parameter or buffer of a lazy layer has no data and no shape before "
                           "the first batch: run a batch through the model, or load a state dict")

    @property
    def dtype(self) -> np.dtype[Any]:
        return vars(self)["lazy_dtype"]  # type: ignore[no-any-return]

    def detach(self) -> Any:
        return self

    def materialize(self, array: Any) -> None:
        """Take these values, in the dtype that was asked for."""
        array = array.astype(vars(self).pop("lazy_dtype"))
        self.__class__ = self._then  # type: ignore[assignment]
        self.data = array  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        out = memo[id(self)] = type(self)(self.dtype)
        out.requires_grad = self.requires_grad
        return out

    def __repr__(self) -> str:
        return f"<{self._then.__name__} without data, dtype={self.dtype}>"


def check_sizes(owner: str, **sizes: Any) -> None:
    """Raise ValueError unless all are ints of at least 0."""
    for name, n in sizes.items():
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 0:
            raise ValueError(f"{owner}: {name} must be an int of at least 0, got {n!r}")
