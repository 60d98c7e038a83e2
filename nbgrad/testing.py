"""Check gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, enable_grad, grad
from nbgrad.backend import move, writable

__all__ = ["GradcheckError", "gradcheck", "gradgradcheck"]

Outputs = Callable[[], tuple[Tensor, ...]]


class GradcheckError(AssertionError):
    """A gradient differs from finite differences, is not repeatable, or says nothing."""


def gradcheck(fn: Callable[..., Any], inputs: Tensor | Sequence[Any], *, order: int = 1,
              mode: str = "full", eps: float = 1e-6, atol: float = 1e-6, rtol: float = 1e-4,
              nondet_tol: float = 0.0, allow_zero: bool = False, seed: int = 0,
              raise_exception: bool = True) -> bool:
    """Compare gradients of ``fn(*inputs)`` with central differences of random projections ⟨u, y⟩.

    inputs: float64 Tensors with requires_grad are checked; the parameters, too, if ``fn`` is a
    Module.
    order: 2 also checks the gradients of the gradients, and so on.
    mode: "full" differentiates every element, "fast" one random direction for all inputs together.

    Passes where |a − n| ≤ rtol · max(|a|, |n|) + atol · scale, scale being the largest |n| of that
    input: an absolute tolerance would pass a tiny gradient that is all wrong. Raises GradcheckError
    (returns False without ``raise_exception``) otherwise; also if two runs differ by more than
    ``nondet_tol``, and if a gradient is zero everywhere, unless ``allow_zero``: a sum of normalised
    values is constant, and a check of it cannot fail. Raises TypeError for inputs that are not
    float64.

    >>> import nbgrad
    >>> x = nbgrad.randn(3, 4, dtype=nbgrad.float64, requires_grad=True)
    >>> gradcheck(lambda x: nbgrad.softmax(x, 1), x, order=2)
    True
    """
    if mode not in ("full", "fast") or order < 1:
        raise ValueError("gradcheck: expected mode 'full' or 'fast' and order >= 1, got "
                         f"{mode!r} and {order}")
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    names, leaves = _leaves(fn, args)
    run = _Check(names, order, mode, eps, atol, rtol, nondet_tol, allow_zero,
                 np.random.default_rng(seed))
    buffers = [(b, b.data.copy()) for b in getattr(fn, "buffers", list)()]
    try:
        with enable_grad():
            run.check(lambda: _differentiable(fn(*args)), leaves, 1)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    finally:
        for buffer, before in buffers:
            buffer.data[...] = before
    return True


def gradgradcheck(fn: Callable[..., Any], inputs: Tensor | Sequence[Any], **options: Any) -> bool:
    """``gradcheck`` to second order."""
    return gradcheck(fn, inputs, **{"order": 2, **options})


def _leaves(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[list[str], list[Tensor]]:
    """What is checked: names for messages, and the tensors."""
    found = {f"input {i}": x for i, x in enumerate(args)}
    found |= {f"parameter {n}": p for n, p in getattr(fn, "named_parameters", list)()}
    found = {n: x for n, x in found.items() if isinstance(x, Tensor) and x.requires_grad}
    leaves = list(found.values())
    if not leaves:
        raise ValueError("gradcheck: none of the inputs requires grad: there is nothing to check")
    for x in leaves:
        if x.dtype != np.float64:
            raise TypeError(f"gradcheck: expected float64, got {x.dtype} of shape {x.shape}: "
                            "finite differences of float32 are noise")
        if not writable(x.data):
            raise TypeError(f"gradcheck: an input of shape {x.shape} is read-only")
    return [f"{n} of shape {x.shape}" for n, x in found.items()], leaves


def _differentiable(out: Any) -> tuple[Tensor, ...]:
    outs = (out,) if isinstance(out, Tensor) else tuple(out)
    ys = tuple(y for y in outs if isinstance(y, Tensor) and y.requires_grad)
    if not ys:
        raise GradcheckError("gradcheck: no output requires grad: the graph is cut between inputs "
                             "and outputs")
    return ys


def _host(x: Tensor) -> Any:
    return move(x.data, "cpu")


def _put(x: Tensor, at: Any, value: Any) -> None:
    x.data[at] = move(np.asarray(value), x.device)


class _Check:
    """The settings of one call, and the comparison."""

    def __init__(self, names: list[str], order: int, mode: str, eps: float, atol: float,
                 rtol: float, nondet_tol: float, allow_zero: bool,
                 rng: np.random.Generator) -> None:
        self.names, self.order, self.mode, self.eps = names, order, mode, eps
        self.atol, self.rtol, self.nondet_tol = atol, rtol, nondet_tol
        self.allow_zero, self.rng = allow_zero, rng

    def check(self, f: Outputs, leaves: list[Tensor], order: int) -> None:
        us = [self._random(y) for y in f()]
        dxs = self._gradients(f, us, leaves, order)
        again = self._gradients(f, us, leaves, order)
        for name, a, b in zip(self.names, dxs, again):
            apart = np.max(np.abs(a - b), initial=0.0)
            if not apart <= self.nondet_tol:
                raise GradcheckError(
                    f"order {order}: two runs give gradients of {name} that differ by "
                    f"{apart:.3g}: the function is not deterministic")
        if order == 1 and not self.allow_zero:
            self._not_vacuous(dxs)
        # what a projection is rounded to, over 2 eps: a difference quotient knows no better. Of a
        # value that cancelled to zero, the terms are unknown: taken to be of order 1
        size = sum(float(np.sum(np.abs(_host(u) * _host(y)))) for u, y in zip(us, f()))
        noise = 1e-9 * (max(size, 1.0) if self.allow_zero else size)
        quotients = self._full if self.mode == "full" else self._fast
        for name, x, dx in zip(self.names, leaves, dxs):
            quotients(f, us, x, dx, noise, f"order {order}: gradient of {name}")
        if order < self.order:
            self.names = self.names + [f"the cotangent of output {i} (order {order})"
                                       for i in range(len(us))]
            self.check(*self._derivative(f, us, leaves), order + 1)

    def _random(self, y: Tensor) -> Tensor:
        return as_tensor(move(np.asarray(self.rng.standard_normal(y.shape)), y.device))

    def _gradients(self, f: Outputs, us: list[Tensor], leaves: list[Tensor],
                   order: int) -> list[Any]:
        found = grad(f(), leaves, us, allow_unused=True)
        for name, d in zip(self.names, found):
            if d is None and order == 1 and not self.allow_zero:
                raise GradcheckError(
                    f"{name} has no gradient: it is not used, or a vjp on the way returned None. "
                    "Pass allow_zero=True if that is right")
        return [np.zeros(x.shape) if d is None else _host(d) for d, x in zip(found, leaves)]

    @staticmethod
    def _derivative(f: Outputs, us: list[Tensor],
                    leaves: list[Tensor]) -> tuple[Outputs, list[Tensor]]:
        """The gradient as a function of the same leaves and of the cotangents."""
        us = [u.detach().requires_grad_() for u in us]

        def g() -> tuple[Tensor, ...]:
            found = grad(f(), leaves, us, create_graph=True, allow_unused=True)
            return _differentiable([d for d in found if d is not None])
        return g, leaves + us

    def _projected(self, f: Outputs, us: list[Tensor]) -> float:
        return sum(float(np.vdot(_host(u), _host(y))) for u, y in zip(us, f(), strict=True))

    def _difference(self, f: Outputs, us: list[Tensor], x: Tensor, at: Any, step: Any) -> float:
        """Central difference along ``step`` at elements ``at``; x comes back whatever f does."""
        before = np.array(move(x.data[at], "cpu"))
        try:
            _put(x, at, before + self.eps * step)
            up = self._projected(f, us)
            _put(x, at, before - self.eps * step)
            return (up - self._projected(f, us)) / (2 * self.eps)
        finally:
            _put(x, at, before)

    def _full(self, f: Outputs, us: list[Tensor], x: Tensor, dx: Any, noise: float,
              what: str) -> None:
        numeric = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            numeric[at] = self._difference(f, us, x, at, 1.0)
        self._compare(dx, numeric, noise, what)

    def _fast(self, f: Outputs, us: list[Tensor], x: Tensor, dx: Any, noise: float,
              what: str) -> None:
        v = self.rng.standard_normal(x.shape)
        numeric = self._difference(f, us, x, ..., v)
        self._compare(np.vdot(dx, v), numeric, noise, f"{what}, along a random direction,")

    def _compare(self, analytic: Any, numeric: Any, noise: float, what: str) -> None:
        a, n = np.asarray(analytic), np.asarray(numeric)
        scale = np.max(np.abs(n), initial=0.0)
        bound = self.rtol * np.maximum(np.abs(a), np.abs(n)) + self.atol * scale + noise
        bad = ~(np.abs(a - n) <= bound)
        if bad.any():
            at = np.unravel_index(np.argmax(np.where(bad, np.abs(a - n), -1.0)), a.shape)
            nothing = np.max(np.abs(a)) <= 1e-6 * scale
            raise GradcheckError(
                f"{what} differs from finite differences at {tuple(map(int, at))}: "
                f"analytic {a[at]:.10g}, numeric {n[at]:.10g}; "
                f"{int(bad.sum())} of {a.size} elements are off"
                + (f". Beside the differences it is zero: {_CONSTANT}" if nothing else ""))

    def _not_vacuous(self, dxs: list[Any]) -> None:
        for name, dx in zip(self.names, dxs):
            if dx.size and np.max(np.abs(dx)) <= 1e-12:
                raise GradcheckError(f"the gradient of {name} is zero everywhere: the check is "
                                     f"vacuous. {_CONSTANT}. Pass allow_zero=True if zero is right")


_CONSTANT = ("If the function sums a normalised tensor, the sum is constant: return the tensor "
             "itself, gradcheck projects it on random cotangents")
