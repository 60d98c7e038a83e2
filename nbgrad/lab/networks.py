"""The two training problems on which instruments are used: a classifier, and a deep linear network.

Initial weights depend on the seed and the layer's number alone, batches on the seed: arms of one
seed differ in the norm and in nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np

from nbgrad import nn, optim
from nbgrad.autograd import Tensor, as_tensor
from nbgrad.lab.training import task_of
from nbgrad.nn.functional import cross_entropy
from nbgrad.ops.random import Generator, default_generator
from nbgrad.train.config import Config
from nbgrad.train.evaluation import evaluate
from nbgrad.train.setup import Task, in_order, loader

__all__ = ["Norm", "Problem", "accuracy", "along", "classifier", "deep_linear", "last_step",
           "perceptron", "problem"]

Record = dict[str, Any]
Norm = Callable[[int], nn.Module] | None
NORMS: dict[str, Norm] = {"none": None, "batch": nn.BatchNorm1d, "noisy": nn.NoisyBatchNorm}


@dataclass(frozen=True)
class Problem:
    """A model and its next batches, without end; ``task`` where the data are images."""

    model: nn.Module
    optimizer: Any
    batches: Iterator[Any]
    loss: Callable[[Any, Any], Tensor]
    task: Task | None = None

    def step(self, batch: Any) -> float:
        """One step of training; the loss before it."""
        self.model.zero_grad()
        x, target = batch
        value = self.loss(self.model(x), target)
        value.backward()
        self.optimizer.step()
        return float(value.item())


def along(p: Problem, cell: dict[str, Any],
          measure: Callable[[Problem, Any], Record]) -> list[Record]:
    """Train for ``steps`` and measure before every ``every``-th; records with "step" and "loss".
    Ends early where the loss is not finite: see ``last_step``."""
    rows: list[Record] = []
    with np.errstate(all="ignore"):
        for step in range(cell["steps"]):
            batch = next(p.batches)
            row = {"step": step, **measure(p, batch)} if step % cell["every"] == 0 else None
            loss = p.step(batch)
            if not math.isfinite(loss):
                break
            if row is not None:
                rows.append({**row, "loss": loss})
    return rows


def last_step(cell: dict[str, Any]) -> int:
    """The step before which ``along`` measures for the last time, where the loss stays finite."""
    return range(0, cell["steps"], cell["every"])[-1]


def perceptron(widths: Sequence[int], norm: Norm = None, *, activation: Any = nn.ReLU,
               gain: float = math.sqrt(2), seed: int = 0, dtype: Any = np.float32,
               last: bool = False) -> nn.Sequential:
    """Linear layers of these widths, each followed by norm and activation, but for the last one
    (unless ``last``). Weights ~ N(0, gain² / inputs), biases 0.

    >>> [type(layer).__name__ for layer in perceptron([4, 3, 2], nn.BatchNorm1d)]
    ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        linear = nn.Linear(fan_in, fan_out, dtype=dtype)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(fan_in),
                        generator=Generator(1_000_003 * seed + i))
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if last or i + 2 < len(widths):
            layers += [] if norm is None else [norm(fan_out).to(dtype=dtype)]
            layers += [] if activation is None else [activation()]
    return nn.Sequential(*layers)


def problem(cell: dict[str, Any]) -> Problem:
    """network "digits" (or the cell's data) or "linear", norm of NORMS, lr, seed; see below."""
    default_generator.manual_seed(cell["seed"])         # the noise of NoisyBatchNorm
    make = {"digits": classifier, "linear": deep_linear}[cell["network"]]
    return make(NORMS[cell["norm"]], cell)


def classifier(norm: Norm, cell: dict[str, Any]) -> Problem:
    """An MLP of ``depth`` (5) layers of ``width`` (100) ReLUs on images, cross entropy, SGD on
    batches of ``batch`` (64)."""
    config = Config(data=cell.get("data", "digits"), root=cell.get("root"),
                    batch_size=cell.get("batch", 64), seed=cell["seed"])
    task = task_of(config)
    hidden = [cell.get("width", 100)] * cell.get("depth", 5)
    net = perceptron([math.prod(task.shape), *hidden, task.classes], norm, seed=cell["seed"])
    model = nn.Sequential(nn.Flatten(), *net)
    optimizer = optim.SGD(model.parameters(), lr=cell["lr"])
    return Problem(model, optimizer, _repeated(loader(config, task)), cross_entropy, task)


def _repeated(batches: Any) -> Iterator[Any]:
    return chain.from_iterable(repeat(batches))


def deep_linear(norm: Norm, cell: dict[str, Any]) -> Problem:
    """min ‖W₂₅ … W₁ x − A x‖², a norm behind each W but the last; W 10 × 10, Glorot; A and the
    ``samples`` (1,000) x are normal; gradient descent on all.      Santurkar et al. 2018

    The loss is the sum over samples and outputs, as a learning rate of 1e-6 asks for; float64.
    """
    width, depth = 10, cell.get("depth", 25)
    rng = Generator(1_000_003 * cell["seed"] + 999_999).numpy
    A = rng.standard_normal((width, width))
    x = rng.standard_normal((cell.get("samples", 1000), width))
    model = perceptron([width] * (depth + 1), norm, activation=None, gain=1.0, seed=cell["seed"],
                       dtype=np.float64)
    batch = as_tensor(x), as_tensor(x @ A.T)
    optimizer = optim.SGD(model.parameters(), lr=cell["lr"])
    return Problem(model, optimizer, _repeated([batch]), _squares)


def _squares(y: Tensor, target: Tensor) -> Tensor:
    d = y - target
    total: Tensor = (d * d).sum()
    return total


def accuracy(model: nn.Module, task: Task) -> float:
    """On the test images, by running statistics."""
    return evaluate(model, in_order(task.test)).accuracy
