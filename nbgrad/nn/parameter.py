"""Parameter: a Tensor that a Module registers when it is assigned to an attribute."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor

__all__ = ["Parameter"]


class Parameter(Tensor):
    """A leaf Tensor to be trained. Shares memory with ``data``, as in PyTorch.

    >>> import numpy as np
    >>> Parameter(np.zeros(2)).requires_grad
    True

    Raises TypeError if it would require grad and is not floating point.
    """

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        array = as_tensor(data).data
        if requires_grad and array.dtype.kind != "f":
            raise TypeError("Parameter: only floating point tensors can require gradients, "
                            f"got {array.dtype}")
        self.data = array
        self.requires_grad = requires_grad

    def __repr__(self) -> str:
        return f"Parameter containing:\n{super().__repr__()}"


def check_sizes(owner: str, **sizes: Any) -> None:
    """Raise ValueError unless all are ints of at least 0."""
    for name, n in sizes.items():
        if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 0:
            raise ValueError(f"{owner}: {name} must be an int of at least 0, got {n!r}")
