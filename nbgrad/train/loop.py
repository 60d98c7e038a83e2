"""The training loop: steps, metrics, checkpoints, and what happens when it is interrupted."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np

from nbgrad.autograd import Tensor
from nbgrad.nn import Module
from nbgrad.nn.functional import cross_entropy
from nbgrad.nn.utils import clip_grad_norm_
from nbgrad.ops.random import default_generator
from nbgrad.train import checkpoint
from nbgrad.train.checkpoint import CheckpointError, checked, columns
from nbgrad.train.evaluation import evaluate
from nbgrad.train.metrics import Log, grad_norm, norm_statistics
from nbgrad.train.progress import Silent

__all__ = ["Interrupted", "Signals", "Trainer"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; the step was finished and ``path`` (or None) holds the state."""

    def __init__(self, signum: int, path: Path | None) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum, self.path = signum, path


class Trainer:
    """One run of mini-batch training, from which it can be stopped and gone on with, bit for bit.

    ``train`` is a DataLoader of (x, target) batches, ``test`` one, any iterable of such, or None.
    ``schedule.step()`` is called after every optimiser step. The run ends early, with ``diverged``
    set, at the first step whose loss is not finite, before that step changes a weight.

    folder: keeps ``last.safetensors`` (every ``save_every`` seconds and, with ``save_epochs``, at
    the end of every epoch) and ``best.safetensors`` (highest test accuracy, if above ``best``).
    ``extra`` is stored with them, as is.
    logs: get one row per epoch; step_logs: one every ``log_every`` steps and per epoch at least.
    """

    def __init__(self, model: Module, optimizer: Any, train: Any, test: Any = None, *,
                 schedule: Any = None, clip_grad: float | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 folder: Path | None = None, extra: dict[str, Any] | None = None,
                 save_every: float = 60.0, save_epochs: bool = True, best: float = -math.inf,
                 logs: Sequence[Log] = (), step_logs: Sequence[Log] = (),
                 log_every: int = 10) -> None:
        self.model, self.optimizer, self.train, self.test = model, optimizer, train, test
        self.schedule, self.clip_grad, self.loss = schedule, clip_grad, loss
        self.folder, self.extra, self.best = folder, extra or {}, best
        self.save_every, self.save_epochs = save_every, save_epochs
        self.logs, self.step_logs, self.log_every = logs, step_logs, log_every
        self.epoch = self.batch = self.step = 0     # done: epochs, batches of this one, steps
        self.sums = dict.fromkeys(("loss", "hits", "samples", "norm", "norms", "seconds"), 0.0)
        self.history: dict[str, list[float]] = {}   # one column per metric, one entry per epoch
        self.diverged = False
        self._saved_at = time.monotonic()

    # ---------------------------------------------------------------------------------- running

    def fit(self, epochs: int, progress: Silent | None = None,
            signals: Signals | None = None) -> dict[str, list[float]]:
        """Train until ``epochs`` epochs are done in all; returns the history.

        Raises Interrupted at Ctrl-C or SIGTERM, after the step that was under way and a save.
        ``signals``: the caller's block, where it has more to protect than this run.
        """
        # NumPy's overflow warnings of a run that diverges add nothing to the loss saying so.
        quiet = np.errstate(over="ignore", invalid="ignore")
        with quiet, Signals() if signals is None else nullcontext(signals) as noted:
            while self.epoch < epochs and not self.diverged:
                self._epoch(progress or Silent(), noted)
                self._check(noted)
        return self.history

    def _epoch(self, progress: Silent, signals: Signals) -> None:
        begin, length = time.perf_counter() - self.sums["seconds"], len(self.train)
        self.model.train()
        for x, target in self.train:
            if not self.train_step(x, target):
                self.diverged = True
                break
            self.batch += 1
            progress.update(self.epoch + self.batch / length)
            if signals.caught or time.monotonic() - self._saved_at > self.save_every:
                self.sums["seconds"] = time.perf_counter() - begin
                self._check(signals)
                self.save("last")
        row = self._end_of_epoch(time.perf_counter() - begin)
        progress.say(_line(row))

    def train_step(self, x: Tensor, target: Tensor) -> bool:
        """One optimiser step; False, with nothing changed, where the loss is not finite."""
        y = self.model(x)
        loss = self.loss(y, target)
        value = loss.item()
        if not math.isfinite(value):
            return False
        self.optimizer.zero_grad()
        loss.backward()
        sums, count = self.sums, len(target.data)
        logged = self.batch == 0 or self.step % self.log_every == 0
        if self.clip_grad is not None:
            norm = float(clip_grad_norm_(self.model.parameters(), self.clip_grad))
        elif logged:
            norm = grad_norm(self.model.parameters())
        if logged:
            sums["norm"] += norm
            sums["norms"] += 1
            row = {"step": self.step, "train/loss": value, "lr": self._lr(), "grad_norm": norm}
            for log in self.step_logs:
                log.write(row)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        sums["loss"] += value * count
        sums["hits"] += int(np.count_nonzero(y.data.argmax(1) == target.data))
        sums["samples"] += count
        self.step += 1
        return True

    def _end_of_epoch(self, seconds: float) -> dict[str, float]:
        sums = self.sums
        samples, norms = sums["samples"] or math.nan, sums["norms"] or math.nan
        row = {"epoch": self.epoch + 1, "step": self.step, "lr": self._lr(),
               "train/loss": math.nan if self.diverged else sums["loss"] / samples,
               "train/accuracy": sums["hits"] / samples, "grad_norm": sums["norm"] / norms}
        if self.test is not None:
            result = evaluate(self.model, self.test, loss=self.loss)
            row |= {"test/loss": result.loss, "test/accuracy": result.accuracy}
        row |= {"seconds": seconds, **norm_statistics(self.model)}
        for log in self.logs:
            log.write(row)
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums = dict.fromkeys(sums, 0.0)
        accuracy = row.get("test/accuracy", row["train/accuracy"])
        if accuracy > self.best:
            self.best = accuracy
            self.save("best")
        if self.save_epochs:
            self.save("last")
        return row

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _check(self, signals: Signals) -> None:
        if signals.caught:
            raise Interrupted(signals.caught, self.save("last"))

    # -------------------------------------------------------------------------------- the state

    def save(self, name: str) -> Path | None:
        """Write ``folder/name.safetensors``; None without a folder."""
        self._saved_at = time.monotonic()
        if self.folder is None:
            return None
        for log in (*self.logs, *self.step_logs):
            log.flush()
        return checkpoint.save(self.folder / f"{name}.safetensors", self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, and ``extra``."""
        return {
            **self.extra,
            "model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
            "generator": default_generator.get_state(), "loader": self.train.state_dict(),
            "progress": {"epoch": self.epoch, "batch": self.batch, "step": self.step,
                         "best": self.best, "diverged": self.diverged, "sums": self.sums},
            "history": {k: np.array(v) for k, v in self.history.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict()``. Raises CheckpointError, and leaves everything as it was,
        if that does not fit this run."""
        before = copy.deepcopy(self.state_dict())
        try:
            progress = checked(state["progress"], len(self.train))
            metrics = {"train/loss", "train/accuracy", "seconds"}
            metrics |= {"test/loss", "test/accuracy"} if self.test is not None else set()
            history = columns(state["history"], progress["epoch"], metrics)
            self._load(state, progress, history)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError,
                OverflowError) as e:
            self._load(before, before["progress"], self.history)
            reason = " ".join(f"{e}".split())
            reason = f"{reason} is missing" if isinstance(e, KeyError) else reason
            raise CheckpointError(f"the checkpoint does not fit this run: {reason}") from e

    def _load(self, state: dict[str, Any], progress: dict[str, Any],
              history: dict[str, list[float]]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.train.load_state_dict(state["loader"])
        default_generator.set_state(state["generator"])
        self.epoch, self.batch, self.step = (progress[k] for k in ("epoch", "batch", "step"))
        self.best, self.diverged = progress["best"], progress["diverged"]
        self.sums, self.history = {k: progress["sums"][k] for k in self.sums}, history


class Signals:
    """Within the block, the first Ctrl-C or SIGTERM is only noted; a second Ctrl-C interrupts.

    Python runs handlers in the main thread only; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number


def _line(row: dict[str, float]) -> str:
    text = f"epoch {row['epoch']:3.0f}   train loss {row['train/loss']:.4f}"
    if "test/accuracy" in row:
        text += f"   test loss {row['test/loss']:.4f}   test accuracy {row['test/accuracy']:.2%}"
    return text + f"   {row['seconds']:.2f} s"
