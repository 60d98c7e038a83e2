"""The study behind ``nbgrad compare``: one network with and without a normalization, paired."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbgrad import backend
from nbgrad.train.config import DATA, NORMS, Config
from nbgrad.train.loop import Interrupted, Signals, Trainer
from nbgrad.train.metrics import TensorBoardLog
from nbgrad.train.progress import Silent
from nbgrad.train.report import LEVELS, epochs_to, finding, summarize
from nbgrad.train.setup import Task, trainer, warm_up

__all__ = ["Study", "compare", "diverged"]

FORMAT = "nbgrad-compare-1"


@dataclass(frozen=True)
class Study:
    """``config`` with every norm × learning rate × seed; its own norm, lr and seed do not count.

    Runs of one seed are paired over everything else: same initial weights (norm layers apart), same
    batches in the same order.
    """

    config: Config
    norms: Sequence[str] = ("none", "batch")
    lrs: Sequence[float] = (0.1, 1.0, 10.0)
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in ("norms", "lrs", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected one or more different values, got {values}")
        self.runs()

    def runs(self) -> list[Config]:
        """Arms side by side, so that a machine that slows down slows both."""
        return [self.config.but(norm=norm, lr=lr, seed=seed)
                for lr in self.lrs for seed in self.seeds for norm in self.norms]


def compare(study: Study, task: Task, folder: Path | None = None,
            progress: Silent | None = None) -> dict[str, Any]:
    """Train every run of the study; returns results as JSON-able values.

    With ``folder``: TensorBoard logs in ``tensorboard/<norm>-lr<lr>-seed<seed>`` where tensorboardX
    is installed, and ``best.safetensors``, the network of the highest test accuracy of all. When
    interrupted, the results are those of the finished runs, ``"interrupted"`` is the signal's
    number, and ``last.safetensors`` holds the run that was under way.
    """
    progress, begin = progress or Silent(), time.perf_counter()
    progress.update(0, "compiling kernels")
    for norm in study.norms:
        warm_up(study.config.but(norm=norm), task)
    results, runs = _header(study, task), list[dict[str, Any]]()
    with Signals() as signals:
        try:
            # A signal between two runs is noticed, and the run saved, at the next one's first step.
            for run in _runs(study, task, folder, progress, signals):
                runs.append(run)
            if folder is not None:
                (folder / "last.safetensors").unlink(missing_ok=True)
        except Interrupted as e:
            results["interrupted"] = e.signum
    summary = summarize(runs)
    complete = len(runs) == len(study.runs())
    return results | {"seconds": time.perf_counter() - begin, "runs": runs, "summary": summary,
                      "finding": finding(summary, study.config.epochs) if complete else
                      f"Interrupted after {len(runs)} of {len(study.runs())} runs."}


def _runs(study: Study, task: Task, folder: Path | None, progress: Silent,
          signals: Signals) -> Iterator[dict[str, Any]]:
    best = -math.inf
    for i, config in enumerate(study.runs()):
        one = trainer(config, task, folder=folder, save_epochs=False, best=best)
        text = f"{NORMS[config.norm]}, lr {config.lr:g}, seed {config.seed}"
        one.fit(config.epochs, _Part(progress, i * config.epochs, text), signals)
        best, record = one.best, _record(config, one, task)
        progress.say(_line(text, record))
        if folder is not None:
            _write_tensorboard(folder, config, one.history)
        yield record


class _Part(Silent):
    """One run's share of the study's progress."""

    def __init__(self, whole: Silent, offset: int, text: str) -> None:
        self.whole, self.offset, self.text = whole, offset, text

    def update(self, done: float, text: str = "") -> None:
        self.whole.update(self.offset + done, self.text)


def _header(study: Study, task: Task) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "title": title(study), "details": details(study, task),
        "machine": backend.info(), "config": study.config.to_dict(),
        "norms": list(study.norms), "lrs": list(study.lrs), "seeds": list(study.seeds),
        "epochs": study.config.epochs, "train_samples": len(task.train),
        "test_samples": len(task.test),
    }


def title(study: Study) -> str:
    """The question in a line."""
    norms = " and ".join(f"with {NORMS[norm]}" for norm in study.norms if norm != "none")
    without = "without and " if "none" in study.norms else ""
    return f"{_NAMES[study.config.model]} on {DATA[study.config.data]}, {without}{norms}"


_NAMES = {"mlp": "MLP", "cnn": "CNN", "lenet": "LeNet-5", "resnet20": "ResNet-20"}


def details(study: Study, task: Task) -> str:
    """How it was asked, in a line."""
    c = study.config
    parts = [f"{len(task.train):,} training and {len(task.test):,} test images",
             f"{c.activation}, norm {c.placement} the activation", f"{c.optimizer}",
             f"batch size {c.batch_size}", f"{c.init} initial weights"]
    if c.dropout:
        parts.append(f"dropout {c.dropout:g}")
    return ", ".join(parts)


def diverged(one: Trainer, classes: int) -> bool:
    """Whether the loss stopped being finite, or ended above ln(classes), that of guessing."""
    return one.diverged or one.history["train/loss"][-1] > math.log(classes)


def _record(config: Config, one: Trainer, task: Task) -> dict[str, Any]:
    """One run's results."""
    curves = {name: [v if math.isfinite(v) else None for v in column]
              for name, column in one.history.items()}
    accuracy = one.history["test/accuracy"]
    return {
        "norm": config.norm, "lr": config.lr, "seed": config.seed,
        "diverged": diverged(one, task.classes),
        "epochs_to": {f"{level:g}": epochs_to(accuracy, level) for level in LEVELS},
        "final_accuracy": accuracy[-1], "best_accuracy": max(accuracy),
        "seconds": sum(one.history["seconds"]), "curves": curves,
    }


def _line(text: str, run: dict[str, Any]) -> str:
    state = "diverged" if run["diverged"] else f"{run['final_accuracy']:.1%}"
    return f"{text}: {state}, {run['seconds']:.2f} s"


def _write_tensorboard(folder: Path, config: Config, history: dict[str, list[float]]) -> None:
    try:
        name = f"{config.norm}-lr{config.lr:g}-seed{config.seed}"
        log = TensorBoardLog(folder / "tensorboard" / name)
    except ModuleNotFoundError:     # the command line has said so
        return
    for values in zip(*history.values()):
        log.write(dict(zip(history, values)))
    log.close()
