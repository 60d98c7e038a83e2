"""Seeded random numbers, and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, checked_dtype, op
from nbgrad.backend import checked_device, device_of, kernels, move, refuse_captured
from nbgrad.ops.shape import checked


class Generator:
    """A stream of random numbers that depends on the seed alone (NumPy's PCG64).

    >>> from nbgrad import Generator, rand
    >>> rand(2, generator=Generator(0)).tolist() == rand(2, generator=Generator(0)).tolist()
    True
    """

    def __init__(self, seed: int | None = None) -> None:
        self.numpy = np.random.Generator(np.random.PCG64(seed))

    def manual_seed(self, seed: int) -> Generator:
        """Start the stream of this seed."""
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"manual_seed: expected an integer >= 0, got {seed!r}")
        self.numpy.bit_generator.state = np.random.PCG64(int(seed)).state
        return self

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as numbers and strings that JSON can hold."""
        return dict(self.numpy.bit_generator.state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from what ``get_state`` returned."""
        try:
            self.numpy.bit_generator.state = state
        except (TypeError, KeyError, ValueError, OverflowError) as e:
            raise ValueError(f"Generator.set_state: not a state of this generator: {e}") from None


default_generator = Generator()


def manual_seed(seed: int) -> Generator:
    """Seed the generator that is used where none is given."""
    return default_generator.manual_seed(seed)


def get_rng_state() -> dict[str, Any]:
    """State of the default generator."""
    return default_generator.get_state()


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the state of the default generator."""
    default_generator.set_state(state)


def _rng(generator: Generator | None) -> np.random.Generator:
    refuse_captured("drawing random numbers (rand, randn, …), whose generator is on the host,")
    return (generator or default_generator).numpy


def _shape(size: Any) -> tuple[int, ...]:
    if len(size) == 1 and isinstance(size[0], (tuple, list)):
        size = size[0]
    if any(not isinstance(n, (int, np.integer)) or n < 0 for n in size):
        raise ValueError(f"expected sizes >= 0, got {size}")
    return tuple(int(n) for n in size)


def _made(data: Any, dtype: Any, requires_grad: bool, device: Any = None) -> Tensor:
    """A Tensor of an array: of NumPy's moved to a device, if one is given."""
    data = data.astype(checked_dtype(dtype), copy=False)
    if device is not None:
        data = move(data, checked_device(device))
    return as_tensor(data).requires_grad_(requires_grad)


def rand(*size: Any, generator: Generator | None = None, dtype: Any = np.float32,
         requires_grad: bool = False, device: Any = None) -> Tensor:
    """Uniform on [0, 1): the same numbers on every device."""
    u = _rng(generator).random(_shape(size), checked_dtype(dtype))
    return _made(u, dtype, requires_grad, device)


def randn(*size: Any, generator: Generator | None = None, dtype: Any = np.float32,
          requires_grad: bool = False, device: Any = None) -> Tensor:
    """Normal with mean 0 and variance 1: the same numbers on every device."""
    z = _rng(generator).standard_normal(_shape(size), checked_dtype(dtype))
    return _made(z, dtype, requires_grad, device)


def uniform(low: float, high: float, size: Sequence[int], generator: Generator | None = None,
            dtype: Any = np.float32) -> Tensor:
    """Uniform on [low, high)."""
    if not low <= high:
        raise ValueError(f"uniform: expected low <= high, got {low} and {high}")
    u = _rng(generator).random(_shape((size,)), checked_dtype(dtype))
    return _made(u * (high - low) + low, dtype, False)


def normal(mean: float, std: float, size: Sequence[int], generator: Generator | None = None,
           dtype: Any = np.float32) -> Tensor:
    """Normal with this mean and standard deviation."""
    if not std >= 0:
        raise ValueError(f"normal expects std >= 0.0, but found std {std}")
    z = _rng(generator).standard_normal(_shape((size,)), checked_dtype(dtype))
    return _made(z * std + mean, dtype, False)


def randint(low: int = 0, high: Any = None, size: Sequence[int] = (),
            generator: Generator | None = None, dtype: Any = np.int64,
            device: Any = None) -> Tensor:
    """Integers from low (0 if one number is given) to high − 1; ``randint(high, size)`` as well."""
    if isinstance(high, (tuple, list)):
        high, size = None, high
    low, high = (0, low) if high is None else (low, high)
    if not low < high:
        raise ValueError(f"randint: expected low < high, got {low} and {high}")
    return _made(_rng(generator).integers(low, high, _shape((size,))), dtype, False, device)


def randperm(n: int, generator: Generator | None = None, dtype: Any = np.int64) -> Tensor:
    """0 … n − 1 in random order."""
    if n < 0:
        raise ValueError(f"randperm: expected n >= 0, got {n}")
    return _made(_rng(generator).permutation(n), dtype, False)


def rand_like(input: Tensor, *, generator: Generator | None = None, dtype: Any = None) -> Tensor:
    """Uniform on [0, 1), of x's shape and dtype."""
    return rand(input.shape, generator=generator, dtype=dtype or input.dtype, device=input.device)


def randn_like(input: Tensor, *, generator: Generator | None = None, dtype: Any = None) -> Tensor:
    """Normal with mean 0 and variance 1, of x's shape and dtype."""
    return randn(input.shape, generator=generator, dtype=dtype or input.dtype,
                 device=input.device)


def bernoulli(input: Tensor, generator: Generator | None = None) -> Tensor:
    """1 with probability p, else 0, elementwise."""
    if input.data.size and not (input.data.min() >= 0 and input.data.max() <= 1):
        raise ValueError("bernoulli: expected probabilities in [0, 1]")
    u = move(_rng(generator).random(input.shape), input.device)
    return as_tensor((u < input.data).astype(input.dtype))


@op(name="dropout", method=False)
def _dropout(x: Tensor, /, p: float, generator: Generator | None) -> Any:
    if device_of(x.data) == "cpu":
        refuse_captured("dropout of a tensor on the CPU")
    y, kept = kernels(x).dropout(x.data, (generator or default_generator).numpy, p)
    kept = as_tensor(kept)
    return y, (lambda dy: dy * kept,)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *,
            generator: Generator | None = None) -> Tensor:
    """y = x / (1 − p) with probability 1 − p, else 0; x itself in evaluation. ``inplace`` has no
    effect.

    Srivastava et al. 2014."""
    input = checked(input, "dropout")
    if not (isinstance(p, (int, float)) and 0 <= p <= 1 and not math.isnan(p)):
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not training or p == 0:
        return input
    return _dropout(input, p=p, generator=generator)  # type: ignore[no-any-return]


__all__ = ["Generator", "bernoulli", "default_generator", "dropout", "get_rng_state", "manual_seed",
           "normal", "rand", "rand_like", "randint", "randn", "randn_like", "randperm",
           "set_rng_state", "uniform"]
