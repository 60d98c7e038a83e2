"""One training run of a study: a Config, so many steps, a record of how it went."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from nbgrad.data import TensorDataset
from nbgrad.lab.study import Cell, Record
from nbgrad.nn import Module
from nbgrad.train.config import Config
from nbgrad.train.evaluation import evaluate
from nbgrad.train.loop import Signals, Trainer
from nbgrad.train.setup import Task, in_order, load_task, trainer
from nbgrad.train.study import diverged

__all__ = ["COLUMNS", "configured", "task_of", "train"]

COLUMNS = {"train_loss": "train/loss", "train_accuracy": "train/accuracy",
           "test_loss": "test/loss", "test_accuracy": "test/accuracy"}
_FIELDS = {field.name for field in dataclasses.fields(Config)}


def configured(cell: Cell, **base: Any) -> Config:
    """What a cell says about Config's fields, else ``base``, else Config's defaults.

    >>> configured({"norm": "layer", "seed": 3, "arm": "x"}, lr=0.1).lr
    0.1
    """
    return Config(**{**base, **{k: v for k, v in cell.items() if k in _FIELDS and v is not None}})


def task_of(config: Config, images: int | None = None) -> Task:
    """The config's data, read once per process; the first so many training images, if given."""
    task = _task(config.data, config.root)
    if images is None:
        return task
    x, target = task.train.tensors
    few = TensorDataset(x[:images], target[:images])
    return dataclasses.replace(task, train=few)


@lru_cache(maxsize=2)
def _task(data: str, root: str | None) -> Task:
    return load_task(Config(data=data, root=root))


def train(config: Config, *, steps: int, every: int,
          prepare: Callable[[Module], Module] | None = None,
          look: Callable[[Trainer], Record] | None = None,
          evaluations: Sequence[str] = (), on_train: bool = False,
          task: Task | None = None) -> Record:
    """Train for ``steps`` steps (not epochs), evaluating after each ``every`` and after the last.

    Returns "planned": steps; "steps": [every, 2 every, …, steps], fewer where it diverged, and
    columns of the same length: "train_loss" and "train_accuracy" (means over the steps since the
    last), "test_loss", "test_accuracy"; "final_accuracy": the last test accuracy; "diverged": the
    loss was not finite, or ended above that of guessing.

    prepare: what is done to the new network, before its optimizer is made; it may return another.
    look: called at each evaluation; what it returns become columns, too.
    evaluations: "running", "batch", "population": adds "accuracies" and "losses" by these names,
    at the end and with the batch norms using these statistics (see ``evaluate``; test batches are
    of the size of training batches).
    on_train: adds "fit_loss" and "fit_accuracy", those of the training images at the end.
    task: other data than the config's.
    """
    task = task or task_of(config)
    one = _trainer(config, task, steps, prepare)
    one.train = chunks = _Chunks(one.train, every)
    record: Record = {"steps": [], "planned": steps}
    for i, end in enumerate([*range(every, steps, every), steps], 1):
        chunks.steps = end - (i - 1) * every
        one.fit(i, signals=Signals())       # never entered: the one who runs cells has the signals
        record["steps"].append(end)
        for name, value in {} if look is None else look(one).items():
            record.setdefault(name, []).append(value)
        if one.diverged:
            break
    record |= {name: one.history[column] for name, column in COLUMNS.items()}
    record["diverged"] = diverged(one, task.classes)
    record["final_accuracy"] = one.history["test/accuracy"][-1]
    if on_train:
        with np.errstate(over="ignore", invalid="ignore"):
            fit = evaluate(one.model, in_order(task.train))
        record |= {"fit_loss": fit.loss, "fit_accuracy": fit.accuracy}
    if evaluations:
        record |= _evaluated(one.model, config, task, evaluations)
    return record


class _Chunks:
    """A loader whose epochs are ``steps`` batches long and go on where the last one ended."""

    def __init__(self, loader: Any, steps: int) -> None:
        self.steps = steps
        self._batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._batches, self.steps)


def _trainer(config: Config, task: Task, steps: int,
             prepare: Callable[[Module], Module] | None) -> Trainer:
    """With the schedule laid out for these steps, to an epoch."""
    epoch = max(len(task.train) // config.batch_size, 1)
    config = config.but(epochs=max(math.ceil(steps / epoch), config.warmup, 1))
    return trainer(config, task, prepare=prepare)


def _evaluated(model: Module, config: Config, task: Task, words: Sequence[str]) -> Record:
    test, found = in_order(task.test, config.batch_size), {}
    with np.errstate(over="ignore", invalid="ignore"):
        for word in words:
            found[word] = evaluate(model, test, statistics=word, train=in_order(task.train))
    return {"accuracies": {word: e.accuracy for word, e in found.items()},
            "losses": {word: e.loss for word, e in found.items()}}
