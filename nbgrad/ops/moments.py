"""Count, mean and M2 of groups of numbers: the statistics that merge exactly.

M2 = Σ w (x − mean)². Two groups a and b merge to (Chan, Golub & LeVeque 1983)

    n = nₐ + n_b,   mean = meanₐ + δ n_b/n,   M2 = M2ₐ + M2_b + δ² nₐ n_b/n,   δ = mean_b − meanₐ

so that micro-batches, ghost batches and workers give what one large batch would have given, up to
the rounding of float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, is_grad_enabled
from nbgrad.backend import full, is_array, kernels

__all__ = ["Moments", "Workers", "moments"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Moments:
    """Arrays of one shape, float64: Σw, Σwx/Σw (0 of nothing) and Σw(x − mean)².

    >>> a, b = moments(np.array([[0.0], [2.0]])), moments(np.array([[7.0]]))
    >>> all_of_them = a.merge(b)
    >>> all_of_them.count.item(), all_of_them.mean.item(), all_of_them.var().item()
    (3.0, 3.0, 8.666666666666666)
    """

    count: Array
    mean: Array
    m2: Array

    def __iter__(self) -> Iterator[Array]:
        return iter((self.count, self.mean, self.m2))

    def var(self, correction: float = 0) -> Array:
        """M2 / (count − correction); NaN where no more than ``correction`` were counted."""
        free = self.count - correction
        with np.errstate(all="ignore"):
            return np.where(free > 0, self.m2 / free, np.nan)

    def merge(self, *others: Moments) -> Moments:
        """These and others, in the order given."""
        merged = self
        for other in others:
            merged = _merged(merged, other)
        return merged

    def over(self, axis: int = 0) -> Moments:
        """The groups along one axis merged into one."""
        axis %= self.count.ndim
        count, there = self.count.sum(axis), self.count > 0
        with np.errstate(all="ignore"):
            share = self.count / np.where(count > 0, count, 1.0)[_kept(axis)]
            # about one of them: equal means give exactly that mean
            known = np.where(there, self.mean, -np.inf)
            pivot = known.max(axis) if known.shape[axis] else count
            pivot = np.where(np.isfinite(pivot), pivot, 0.0)
            apart = np.where(there, self.mean - pivot[_kept(axis)], 0.0)
            mean = np.where(count > 0, pivot + (apart * share).sum(axis), 0.0)
            apart = np.where(there, self.mean - mean[_kept(axis)], 0.0)
            return Moments(count, mean, (self.m2 + self.count * apart * apart).sum(axis))


def _kept(axis: int) -> Any:
    """Where a summed axis is put back."""
    return (slice(None),) * axis + (None,)


def _merged(a: Moments, b: Moments) -> Moments:
    n = a.count + b.count
    with np.errstate(all="ignore"):
        share = np.where(n > 0, b.count / n, 0.0)
        delta = b.mean - a.mean
        # an empty side has mean 0, which may be far from the other's, and must not be looked at
        mean = np.where(a.count == 0, b.mean, np.where(b.count == 0, a.mean,
                                                       a.mean + delta * share))
        between = np.where((a.count == 0) | (b.count == 0), 0.0, delta * delta * a.count * share)
    return Moments(n, mean, a.m2 + b.m2 + between)


class Workers(Protocol):
    """Several processes or threads that see parts of one batch. Both methods are called by all of
    them, in the same order, and return the same to each."""

    def merge(self, own: Moments) -> Moments:
        """The moments of all, merged in the order of their ranks."""

    def sum(self, *own: Array) -> tuple[Array, ...]:
        """Each array summed over all, in the order of their ranks."""


def moments(x: Tensor | Array, *, mask: Tensor | Array | None = None, groups: int | None = None,
            ghost_size: int | None = None) -> Moments:
    """Moments of x (N, C, *S) per channel, over N and S: arrays (C,).

    mask: weights w ≥ 0 (or booleans), one per sample (N,), per position (N, *S), or what broadcasts
    against (N, 1, *S), without gradient; what has weight 0 is not looked at, not even a NaN.
    groups: per sample and group of channels, arrays (N, groups). ghost_size: per that many samples,
    arrays (⌈N / ghost_size⌉, C); the last may be smaller.

    Raises ValueError for fewer than 2 dimensions, masks that do not fit, are negative or want a
    gradient, groups that do not divide C, and ghost sizes below 1.

    >>> moments(np.array([[1.0], [3.0], [100.0]]), mask=np.array([1, 1, 0])).mean
    array([2.])
    """
    array = x.data if isinstance(x, Tensor) else x if is_array(x) else np.asarray(x)
    if array.ndim < 2 or array.dtype.kind not in "fV":
        raise ValueError(f"moments: expected a floating (N, C, *) input, got {array.dtype} of size "
                         f"{list(array.shape)}")
    w = None if mask is None else weights(mask, array.shape)
    N, C, *S = array.shape
    for name, value in (("groups", groups), ("ghost_size", ghost_size)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"moments: {name} must be an int of at least 1, got {value!r}")
    if ghost_size is not None:
        return _stacked(array, w, ghost_size, groups)
    if groups is None:
        return over_channels(array, w)
    if C % groups or groups > C:
        raise ValueError(f"moments: groups must divide the {C} channels, got {groups}")
    array = array.reshape(N * groups, 1, C // groups, *S)
    if w is not None:
        w = np.broadcast_to(w[:, None], (N, groups, C // groups, *S)).reshape(array.shape)
    found = kernels(as_tensor(array)).sample_moments(array, w)
    return Moments(*(a.reshape(N, groups) for a in found))


def weights(mask: Tensor | Array, shape: tuple[int, ...]) -> Array:
    """A mask as float64 (N, 1, *S), a constant for the gradient."""
    if isinstance(mask, Tensor) and mask.requires_grad and is_grad_enabled():
        raise ValueError("expected a mask without gradient, which is not taken: use mask.detach()")
    w = mask.data if isinstance(mask, Tensor) else mask if is_array(mask) else np.asarray(mask)
    whole = shape[0], 1, *shape[2:]
    if w.ndim == len(shape) - 1:
        w = w[:, None]
    elif w.ndim == 1 and len(shape) > 2:
        w = w.reshape(-1, *[1] * (len(shape) - 1))
    try:
        w = np.broadcast_to(w, whole).astype(np.float64)
    except ValueError:
        raise ValueError(f"expected a mask that broadcasts against {whole}, got "
                         f"{np.shape(mask)}") from None
    if not (w >= 0).all() or not np.isfinite(w).all():
        raise ValueError("expected a mask of finite weights that are not negative")
    return w


def _stacked(x: Array, w: Array | None, ghost_size: int, groups: int | None) -> Moments:
    if groups is not None:
        raise ValueError("moments: groups have statistics of each sample, and no ghost batches")
    parts = [over_channels(x[i:i + ghost_size], None if w is None else w[i:i + ghost_size])
             for i in range(0, len(x), ghost_size)]
    return Moments(*(np.stack(a) if a else np.zeros((0, x.shape[1]))
                     for a in (list(zip(*parts)) or [(), (), ()])))


def over_channels(x: Array, w: Array | None) -> Moments:
    """Moments of each channel, w as ``weights`` returns it."""
    C = x.shape[1]
    if w is None:
        count = float(x.size // C) if C else 0.0
        mean, var = kernels(as_tensor(x)).batch_norm_stats(x)
        return Moments(full((C,), count, np.float64, x), mean, var * count)
    return Moments(*(a[0] for a in kernels(as_tensor(x)).sample_moments(x, w, together=True)))
