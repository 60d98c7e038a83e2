"""The loss around the point where a model stands: along its gradient, and its curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, as_tensor, enable_grad, grad
from nbgrad.nn import Module
from nbgrad.nn.functional import cross_entropy

from .measuring import Batch, Loss, as_it_was, gradients, length, loss_on, trained, write

__all__ = ["Eigenpair", "Landscape", "hessian_vector_product", "landscape", "top_eigenvalue"]

Array = np.ndarray[Any, Any]
Product = Callable[[Array], Array]


@dataclass(frozen=True)
class Landscape:
    """Along w − η g: at each η of ``steps``, the loss, and how far the gradient is from g."""

    loss: float
    norm: float                         # ‖g‖₂
    steps: Array
    losses: Array
    changes: Array                      # ‖g − g(w − η g)‖₂
    cosines: Array

    @property
    def loss_range(self) -> tuple[float, float]:
        """Smallest and largest loss on the way (Santurkar et al. 2018, figure 4a)."""
        return float(self.losses.min()), float(self.losses.max())

    @property
    def predictiveness(self) -> tuple[float, float]:
        """Smallest and largest change of the gradient (figure 4b)."""
        return float(self.changes.min()), float(self.changes.max())

    @property
    def smoothness(self) -> float:
        """Effective β: the largest ‖g − g'‖ / ‖w − w'‖ (figure 4c); less is smoother."""
        with np.errstate(all="ignore"):
            return float(np.max(self.changes / (self.steps * self.norm)))


def landscape(model: Module, batch: Batch, steps: Sequence[float],
              loss: Loss = cross_entropy) -> Landscape:
    """Loss and gradient at w − η g for each η of ``steps``, g the gradient of the loss on this
    batch: how far a gradient step can be trusted.      Santurkar et al. 2018, section 3.1

    batch: (input, target).  steps: η > 0, such as multiples of a learning rate; the paper takes
    1/2 to 4 times the one in use. In the model's mode, with the same noise at every point; the
    model is left as it was. Raises ValueError for steps that are not above 0.

    >>> from nbgrad import nn, tensor
    >>> model = nn.Linear(1, 1, bias=False)
    >>> around = landscape(model, (tensor([[3.0]]), tensor([[1.0]])), [0.01, 0.02],
    ...                    nn.functional.mse_loss)
    >>> round(around.smoothness, 3)                     # L = (3w − 1)²: L'' = 18 everywhere
    18.0
    """
    etas = np.asarray(steps, np.float64)
    if etas.ndim != 1 or not etas.size or not (etas > 0).all():
        raise ValueError(f"landscape: steps must be numbers above 0, got {steps}")
    with as_it_was(model), np.errstate(all="ignore"):
        params = trained(model)
        value, g = gradients(model, batch, loss, params)
        here, norm = [p.data.copy(order="K") for p in params], length(g)
        rows = []
        for eta in etas:
            for p, w, d in zip(params, here, g):
                write(p, (w - eta * d.astype(np.float64)).astype(w.dtype))
            there, other = gradients(model, batch, loss, params)
            dot = sum(float(np.vdot(a.astype(np.float64), b.astype(np.float64)))
                      for a, b in zip(g, other))
            rows.append((there, length([a.astype(np.float64) - b for a, b in zip(g, other)]),
                         float(np.float64(dot) / (norm * length(other)))))
    losses, changes, cosines = np.array(rows).T
    return Landscape(value, norm, etas, losses, changes, cosines)


# ------------------------------------------------------------------------------------ the Hessian

def hessian_vector_product(model: Module, batch: Batch, v: Sequence[Array],
                           loss: Loss = cross_entropy) -> list[Array]:
    """H v, exactly: the gradient of ⟨∇L, v⟩.      Pearlmutter 1994

    v: an array for each parameter that requires a gradient, of its shape. The model is left as it
    was.

    >>> from nbgrad import nn, tensor
    >>> batch = tensor([[3.0]]), tensor([[1.0]])        # L = (3w − 1)²
    >>> hessian_vector_product(nn.Linear(1, 1, bias=False), batch, [np.ones((1, 1))],
    ...                        nn.functional.mse_loss)[0].tolist()
    [[18.0]]
    """
    with as_it_was(model):
        params = trained(model)
        flat = _product(model, batch, loss, params)(np.concatenate([np.ravel(a) for a in v]))
    return [part.reshape(p.shape) for part, p in zip(_parts(flat, params), params)]


@dataclass(frozen=True)
class Eigenpair:
    """H v ≈ value · v, ‖v‖ = 1; |value − an eigenvalue| ≤ ``residual`` (in exact arithmetic)."""

    value: float
    vector: Array
    residual: float
    products: int                       # Hessian-vector products that it took


def top_eigenvalue(model: Module, batch: Batch, loss: Loss = cross_entropy, *,
                   tolerance: float = 1e-3, iterations: int = 100, seed: int = 0) -> Eigenpair:
    """The largest eigenvalue of the loss's Hessian with respect to all parameters, by Lanczos on
    exact Hessian-vector products (power iteration that forgets nothing: the best estimate from all
    products so far).      Lanczos 1950; for networks Ghorbani et al. 2019

    batch: (input, target).  Ends when the residual ‖H v − λ v‖ is below ``tolerance`` · |λ|, or
    after ``iterations`` products, whose vectors are kept (float64, one number per parameter each).
    In the model's mode; the model is left as it was. NaN where the gradient is not finite. Raises
    ValueError for ``iterations`` below 1.

    >>> from nbgrad import nn, tensor
    >>> batch = tensor([[3.0]]), tensor([[1.0]])        # L = (3w − 1)²
    >>> round(top_eigenvalue(nn.Linear(1, 1, bias=False), batch, nn.functional.mse_loss).value, 6)
    18.0
    """
    if iterations < 1:
        raise ValueError(f"top_eigenvalue: iterations must be at least 1, got {iterations}")
    with as_it_was(model), np.errstate(all="ignore"):
        params = trained(model)
        size = sum(p.data.size for p in params)
        product = _product(model, batch, loss, params)
        start = np.random.Generator(np.random.PCG64(seed)).standard_normal(size)
        return _lanczos(product, start / np.linalg.norm(start), tolerance, min(iterations, size))


def _product(model: Module, batch: Batch, loss: Loss, params: Sequence[Tensor]) -> Product:
    """v → H v on flat float64 vectors; the gradient's graph is recorded once."""
    with enable_grad():
        found = grad(loss_on(model, batch, loss), params, create_graph=True, allow_unused=True)
    gs = [g for g in found if g is not None and g.requires_grad]
    at = [i for i, g in enumerate(found) if g is not None and g.requires_grad]

    def product(v: Array) -> Array:
        if not gs:                                      # the loss is linear
            return np.zeros_like(v, np.float64)
        parts = _parts(v, params)
        vs = [as_tensor(parts[i].reshape(g.shape).astype(g.dtype)) for i, g in zip(at, gs)]
        hv = grad(gs, params, vs, retain_graph=True, allow_unused=True)
        return np.concatenate([np.zeros(p.data.size) if h is None else
                               h.data.astype(np.float64).ravel() for p, h in zip(params, hv)])
    return product


def _parts(v: Array, params: Sequence[Tensor]) -> list[Array]:
    return np.split(v, np.cumsum([p.data.size for p in params])[:-1])


def _lanczos(product: Product, q: Array, tolerance: float, iterations: int) -> Eigenpair:
    """The top Ritz pair of the Krylov space of q."""
    basis = np.empty((iterations, q.size))              # a row costs memory once it is written
    alpha, beta = list[float](), list[float]()
    while True:
        n = len(alpha)
        basis[n] = q
        w = product(q)
        alpha.append(float(q @ w))
        for _ in range(2):              # twice: once leaves components that grow into false copies
            w = w - (basis[:n + 1] @ w) @ basis[:n + 1]
        left = float(np.linalg.norm(w))
        if not np.isfinite(left):
            return Eigenpair(float("nan"), q, float("nan"), n + 1)
        values, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
        value, y = float(values[-1]), vectors[:, -1]
        residual = abs(left * float(y[-1]))
        if (residual <= tolerance * abs(value) or left <= 1e-12 * float(np.abs(values).max())
                or n + 1 == iterations):
            return Eigenpair(value, y @ basis[:n + 1], residual, n + 1)
        beta.append(left)
        q = w / left
