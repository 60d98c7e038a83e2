"""From a Config to the things a run needs: data, model, optimiser, schedule, trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbgrad import data, models, nn, optim
from nbgrad.autograd import Tensor, as_tensor, bump
from nbgrad.data import DataLoader, TensorDataset
from nbgrad.nn import init
from nbgrad.nn.functional import cross_entropy
from nbgrad.ops.random import Generator, default_generator, manual_seed, randn
from nbgrad.train.config import Config
from nbgrad.train.evaluation import evaluate
from nbgrad.train.loop import Trainer

__all__ = ["CLASSES", "SHAPES", "Task", "build_model", "build_optimizer", "in_order",
           "load_task", "loader", "sample_loss", "trainer", "warm_up"]

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28),
          "cifar10": (3, 32, 32)}
CLASSES = {
    "digits": tuple("0123456789"), "mnist": tuple("0123456789"),
    "fashion_mnist": ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt",
                      "sneaker", "bag", "ankle boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                "truck"),
}
_EVALUATED = 512        # images at a time: resnet20 then keeps 34 MB per activation


@dataclass(frozen=True)
class Task:
    """Standardised images with labels, and how they were standardised: x̂ = (x − mean) / std."""

    train: TensorDataset
    test: TensorDataset
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_task(config: Config) -> Task:
    """The data of a run. Raises what ``nbgrad.data.load`` raises."""
    train, test = data.load(config.data, config.root)
    shape = SHAPES[config.data]
    # What standardize does to 0 and to 1 is what a prediction needs to know later.
    probe = np.stack([np.zeros((shape[0], 1, 1)), np.ones((shape[0], 1, 1))])
    labels = as_tensor(np.zeros(2, np.int64))
    train, seen = data.standardize(train, TensorDataset(as_tensor(probe), labels))
    zero, one = seen.tensors[0].data.reshape(2, -1)
    mean, std = -zero / (one - zero), 1 / (one - zero)
    x, y = test.tensors
    column = (-1, 1, 1)
    x = as_tensor(((x.data - mean.reshape(column)) / std.reshape(column)).astype(x.dtype))
    return Task(train, TensorDataset(x, y), shape, len(CLASSES[config.data]),
                tuple(mean.tolist()), tuple(std.tolist()))


def trainer(config: Config, task: Task, *,
            prepare: Callable[[nn.Module], nn.Module] | None = None, **settings: Any) -> Trainer:
    """A Trainer for one run, seeded; further settings are Trainer's own. ``prepare`` is given the
    new network, before the optimizer is made, and returns the one to train.

    Everything drawn depends on ``config.seed`` alone: the default generator (dropout) and the
    loader's order are the same for every norm, learning rate and optimiser.
    """
    model = build_model(config)
    model = model if prepare is None else prepare(model)
    optimizer = build_optimizer(config, model)
    train = loader(config, task)
    steps = len(train)
    schedule = _schedule(config, optimizer, steps)
    manual_seed(config.seed)
    extra = {"config": config.to_dict(), "mean": list(task.mean), "std": list(task.std)}
    return Trainer(model, optimizer, train, in_order(task.test), schedule=schedule,
                   clip_grad=config.clip_grad, extra=extra, **settings)


def loader(config: Config, task: Task) -> DataLoader:
    """Shuffled training batches of one size: a rest would be a batch norm over fewer samples."""
    size = min(config.batch_size, len(task.train))
    return DataLoader(task.train, batch_size=size, shuffle=True, drop_last=True,
                      generator=Generator(config.seed))


def in_order(dataset: TensorDataset, batch_size: int | None = None) -> DataLoader:
    """Every sample once, in the order of the data set."""
    return DataLoader(dataset, batch_size=batch_size or _EVALUATED)


def sample_loss(config: Config, samples: int) -> tuple[nn.Module, Tensor]:
    """A new network, and its training loss on ``samples`` random images, recorded."""
    if samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    manual_seed(config.seed)
    x = randn(samples, *SHAPES[config.data])
    target = as_tensor(np.arange(samples) % len(CLASSES[config.data]))
    model = build_model(config)
    return model, cross_entropy(model(x), target)


def warm_up(config: Config, task: Task) -> None:
    """Compile or load a run's kernels, so that they are not counted in its seconds: one step and
    one evaluated batch of a throw-away. No generator moves."""
    state = default_generator.get_state()
    one = trainer(config, task)
    with np.errstate(over="ignore", invalid="ignore"):
        one.train_step(*next(iter(one.train)))
    evaluate(one.model, [next(iter(one.test))])
    default_generator.set_state(state)


def build_model(config: Config) -> nn.Module:
    """The network with its initial weights.

    The weights of the i-th linear or convolution layer are drawn from a generator of their own,
    seeded with (seed, i): adding norm layers does not change them.
    """
    shape, classes = SHAPES[config.data], len(CLASSES[config.data])
    inputs = ({"in_features": math.prod(shape)} if config.model == "mlp" else
              {"in_channels": shape[0], "image_size": shape[1]})
    model = models.create(config.model, **inputs, **_size(config), num_classes=classes,
                          activation=config.activation, norm=_norm(config),
                          placement=config.placement, dropout=config.dropout)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for i, layer in enumerate(layers):
        _draw(layer, config.init, Generator(config.seed * 1_000_003 + i))
        if config.gain != 1.0:
            layer.weight.data[...] *= config.gain
            bump(layer.weight)
    return model


def _size(config: Config) -> dict[str, Any]:
    """Depth, width and place of dropout, where the model has them."""
    named = {} if config.model == "resnet20" else {"dropout_at": config.dropout_at}
    if config.model == "mlp":
        return {**named, "hidden": (config.width or 100,) * (config.depth or 3)}
    sizes = {"depth": config.depth, "width": config.width}
    return {**named, **{name: size for name, size in sizes.items() if size is not None}}


def _norm(config: Config) -> models.Norm:
    """A norm by name, or, where settings were given, what makes it for maps of a shape."""
    if config.norm == "none":
        return None
    settings: dict[str, Any] = {}
    if config.groups is not None:
        settings["groups"] = config.groups
    if config.decay is not None:
        settings["momentum"] = 1 - config.decay
    name = config.norm
    if config.ghost is not None:
        name, settings = "ghost", {**settings, "ghost_size": config.ghost}
    if not settings:
        return name
    return lambda shape: nn.create_norm(name, shape[0], size=shape[1:], **settings)


def _draw(layer: Any, how: str, generator: Generator) -> None:
    """Initial weights; biases are zero, except PyTorch's with "default"."""
    if how == "default":
        init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        if layer.bias is not None:
            bound = 1 / math.sqrt(math.prod(layer.weight.shape[1:]))
            init.uniform_(layer.bias, -bound, bound, generator=generator)
        return
    if layer.bias is not None:
        init.zeros_(layer.bias)
    if how == "normal":                     # "small random Gaussian values", Ioffe & Szegedy 2015
        init.normal_(layer.weight, std=0.1, generator=generator)
    elif how == "uniform":
        init.uniform_(layer.weight, -0.1, 0.1, generator=generator)
    elif how == "xavier":
        init.xavier_uniform_(layer.weight, generator=generator)
    elif how == "kaiming":
        init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    else:
        init.orthogonal_(layer.weight, generator=generator)


def build_optimizer(config: Config, model: nn.Module) -> Any:
    """A new one; the weights of norms and biases are not decayed."""
    groups = optim.param_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return {"adam": optim.Adam, "adamw": optim.AdamW}[config.optimizer](groups, lr=config.lr)


def _schedule(config: Config, optimizer: Any, per_epoch: int) -> Any:
    """In optimiser steps: a tenth after each third of the run, half a cosine, or one cycle."""
    from nbgrad.optim import schedule as s

    rise = config.warmup * per_epoch
    steps = max(config.epochs * per_epoch - rise, 1)
    if config.schedule == "onecycle":
        turning = config.optimizer != "sgd" or config.momentum > 0
        return optim.OneCycleLR(optimizer, config.lr, total_steps=steps + 1,
                                cycle_momentum=turning)
    if config.schedule == "step":
        then: Any = s.StepLR(optimizer, max(math.ceil(steps / 3), 1))
    elif config.schedule == "cosine":
        then = s.CosineAnnealingLR(optimizer, steps)
    elif rise:
        then = s.LambdaLR(optimizer, lambda _: 1.0)
    else:
        return None
    return s.warmup(then, rise) if rise else then
