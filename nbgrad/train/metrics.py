"""What a run records about itself, and where that goes: CSV files and TensorBoard."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nbgrad.autograd import Tensor
from nbgrad.nn import BatchNorm, Module

__all__ = ["CsvLog", "Log", "TensorBoardLog", "batch_norm_layers", "grad_norm", "norm_statistics"]


class Log(Protocol):
    """Takes one row of numbers per step or epoch; every row has an integer "step"."""

    def write(self, row: Mapping[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class CsvLog:
    """Rows of numbers as a CSV file; the first row's names become the header.

    ``upto``: go on with the file that is there, without its rows of later steps (those were written
    after the checkpoint from which the run resumes). None: start a new file. Rows are on disk after
    every ``flush_every`` writes and at the end.
    """

    def __init__(self, path: str | os.PathLike[str], *, upto: int | None = None,
                 flush_every: int = 1) -> None:
        kept = _rows_upto(Path(path), upto) if upto is not None else []
        self.names: Sequence[str] = kept[0] if kept else ()
        self.flush_every, self._unwritten = flush_every, list[Sequence[Any]]()
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._writer = csv.writer(self._file)
        self._writer.writerows(kept)

    def write(self, row: Mapping[str, float]) -> None:
        if not self.names:
            self.names = tuple(row)
            self._unwritten.append(self.names)
        self._unwritten.append(tuple(row.get(name, "") for name in self.names))
        if len(self._unwritten) > self.flush_every:
            self.flush()

    def flush(self) -> None:
        # Numbers become text only here: repr of a float costs 1 us, a step of a small net 300.
        self._writer.writerows(self._unwritten)
        self._unwritten.clear()
        self._file.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()


class TensorBoardLog:
    """Rows of numbers as TensorBoard scalars in ``folder`` (view: ``tensorboard --logdir``);
    values that are not finite are left out.

    Raises ModuleNotFoundError, with the command that installs it, where tensorboardX is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], *, upto: int | None = None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(
                "TensorBoard logs need tensorboardX: pip install 'nbgrad[lab]'", name=e.name) from e
        purge = None if upto is None else upto + 1
        # The name has the second in it: a log that goes on in the same one would replace the file.
        there = len(list(Path(folder).glob("events.out.tfevents.*")))
        self._writer = SummaryWriter(str(folder), purge_step=purge,
                                     filename_suffix=f".{there}" if there else "")

    def write(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        for name, value in row.items():
            # tensorboardX prints a line for every NaN.
            if name not in ("step", "epoch") and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def grad_norm(parameters: Iterable[Tensor]) -> float:
    """‖g‖₂ over all gradients together, summed in float64 from per-tensor sums."""
    total = 0.0
    for p in parameters:
        if p.grad is not None:
            g = p.grad.data.ravel(order="K")
            total += float(np.dot(g, g))
    return math.sqrt(total)


def batch_norm_layers(model: Module) -> dict[str, Any]:
    """Every batch-norm layer of a model under its dotted name (the model itself under "model")."""
    return {name or "model": layer for name, layer in model.named_modules()
            if isinstance(layer, BatchNorm)}


def norm_statistics(model: Module) -> dict[str, float]:
    """The state of every batch-norm layer as norms: ``norm/<layer>/running_mean`` and so on.

    ‖running mean‖₂, ‖running var‖₂, ‖γ‖₂ and ‖β‖₂; what a layer does not have is left out.
    """
    row = {}
    for name, layer in batch_norm_layers(model).items():
        for word, tensor in (("running_mean", layer.running_mean),
                             ("running_var", layer.running_var),
                             ("gamma", layer.weight), ("beta", layer.bias)):
            if tensor is not None:
                row[f"norm/{name}/{word}"] = float(np.linalg.norm(tensor.data))
    return row


def _rows_upto(path: Path, step: int) -> list[list[str]]:
    """Header and rows of a CSV file up to ``step``; nothing where it is no such file."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.reader(f))
        at = rows[0].index("step")
        return rows[:1] + [r for r in rows[1:] if len(r) == len(rows[0]) and int(r[at]) <= step]
    except (OSError, ValueError, IndexError, csv.Error):
        return []
