"""Runs on disk: new folders, a run that starts or goes on in one, a network out of a checkpoint.

A run's folder holds config.json, epochs.csv, steps.csv, last.safetensors, best.safetensors and,
where tensorboardX is installed, tensorboard/.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from nbgrad.nn import Module
from nbgrad.train import checkpoint
from nbgrad.train.checkpoint import CheckpointError
from nbgrad.train.config import Config
from nbgrad.train.loop import Trainer
from nbgrad.train.metrics import CsvLog, Log, TensorBoardLog
from nbgrad.train.setup import SHAPES, Task, build_model, load_task, trainer, warm_up

__all__ = ["new_folder", "restored", "resumed", "started", "write_json"]

Path_ = str | os.PathLike[str]
_SMALLEST = sys.float_info.min      # below, 1 / std is inf


def new_folder(out: Path_ | None, command: str) -> Path:
    """Make the folder of a run: ``out``, or ``runs/<command>-<date>-<time>``.

    Raises ValueError if ``out`` holds something already: results are never overwritten.
    """
    if out is None:
        name = f"{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        folder, n = Path("runs", name), 1
        while folder.exists():
            folder, n = Path("runs", f"{name}-{n}"), n + 1
    else:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out: {folder} exists and is not an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def started(config: Config, task: Task, folder: Path, **settings: Any) -> Trainer:
    """A Trainer that begins in ``folder``."""
    one = trainer(config, task, folder=folder, **settings)
    warm_up(config, task)
    write_json(folder / "config.json", config.to_dict())
    return _with_logs(one, folder, None)


def resumed(path: Path_, *, root: str | None = None, epochs: int | None = None,
            **settings: Any) -> tuple[Trainer, Config]:
    """A Trainer that goes on from a checkpoint (a folder: from its last one), in the same folder.

    Raises FileNotFoundError, CheckpointError, ValueError for other ``epochs`` where the schedule
    was laid out for a number or where more are done already, and what the data raise.
    """
    file = _file(path, "last", "best")
    state = checkpoint.load(file)
    config = _config(file, state)
    if epochs not in (None, config.epochs) and config.schedule != "constant":
        raise ValueError(f"epochs: the {config.schedule} schedule was laid out for {config.epochs}")
    config = config.but(root=root or config.root,
                        epochs=config.epochs if epochs is None else epochs)
    checkpoint.remove_stale(file.parent)
    task = load_task(config)
    one = trainer(config, task, folder=file.parent, **settings)
    try:
        one.load_state_dict(state)
    except CheckpointError as e:
        raise CheckpointError(f"{file}: {e}") from e
    if one.epoch + (one.batch > 0) > config.epochs:
        raise ValueError(f"epochs: {config.epochs} are fewer than the {one.epoch} that the run has "
                         f"done{' and the one it is in' if one.batch else ''}")
    warm_up(config, task)
    return _with_logs(one, file.parent, one.step), config


def restored(path: Path_) -> tuple[Module, Config, dict[str, Any]]:
    """The network of a checkpoint (a folder: of its best one), its Config, and the whole state,
    whose "mean" and "std" are good to standardise by."""
    file = _file(path, "best", "last")
    state = checkpoint.load(file)
    config = _config(file, state)
    _check_standardisation(file, state, SHAPES[config.data][0])
    model = build_model(config)
    try:
        model.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split())
        raise CheckpointError(f"{file}: does not fit its own network: {reason}") from e
    return model, config, state


def write_json(path: Path, value: Any) -> Path:
    """Strict JSON (no NaN), indented."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _with_logs(one: Trainer, folder: Path, upto: int | None) -> Trainer:
    logs: list[Log] = [CsvLog(folder / "epochs.csv", upto=upto)]
    steps: list[Log] = [CsvLog(folder / "steps.csv", upto=None if upto is None else upto - 1,
                               flush_every=50)]
    try:
        board = TensorBoardLog(folder / "tensorboard", upto=upto)
    except ModuleNotFoundError:
        pass
    else:
        logs.append(board)
    one.logs, one.step_logs = logs, steps
    return one


def _file(path: Path_, *names: str) -> Path:
    """The path itself, or the first of these checkpoints in the folder."""
    if not Path(path).is_dir():
        return Path(path)
    found = [Path(path, f"{name}.safetensors") for name in names]
    return next((file for file in found if file.exists()), found[0])


def _check_standardisation(file: Path, state: dict[str, Any], channels: int) -> None:
    for name in ("mean", "std"):
        values = state.get(name)
        good = (isinstance(values, list) and len(values) == channels
                and all(isinstance(v, float) and math.isfinite(v) for v in values))
        if not good or (name == "std" and min(state[name]) < _SMALLEST):
            raise CheckpointError(f"{file}: {name} of the images: expected {channels} finite "
                                  f"number{'s' * (channels > 1)}"
                                  f"{' above 0' if name == 'std' else ''}")


def _config(file: Path, state: dict[str, Any]) -> Config:
    try:
        return Config.from_dict(state["config"])
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{file}: holds no run of this version of nbgrad: {e}") from e
