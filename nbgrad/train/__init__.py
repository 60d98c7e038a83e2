"""Training: one loop, its metrics, checkpoints and evaluations, and the study that compares norms.

Names are imported when first used, so that the command line can read ``config`` without NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbgrad.train.checkpoint import (
        CheckpointError,
        load as load_checkpoint,
        save as save_checkpoint,
    )
    from nbgrad.train.config import Config
    from nbgrad.train.doctor import Finding, Report, bn_doctor
    from nbgrad.train.evaluation import Evaluation, evaluate
    from nbgrad.train.loop import Interrupted, Trainer
    from nbgrad.train.metrics import CsvLog, TensorBoardLog
    from nbgrad.train.population import adapt, population_statistics, update_bn
    from nbgrad.train.study import Study, compare

__all__ = ["Trainer", "Interrupted", "evaluate", "Evaluation", "population_statistics",
           "update_bn", "adapt", "bn_doctor", "Report", "Finding", "save_checkpoint",
           "load_checkpoint", "CheckpointError", "CsvLog", "TensorBoardLog", "Config", "Study",
           "compare"]

_WHERE = {"Trainer": "loop", "Interrupted": "loop", "evaluate": "evaluation",
          "Evaluation": "evaluation", "population_statistics": "population",
          "update_bn": "population", "adapt": "population",
          "bn_doctor": "doctor", "Report": "doctor", "Finding": "doctor",
          "CheckpointError": "checkpoint", "CsvLog": "metrics", "TensorBoardLog": "metrics",
          "Config": "config", "Study": "study", "compare": "study"}
_RENAMED = {"save_checkpoint": ("checkpoint", "save"), "load_checkpoint": ("checkpoint", "load")}


def __getattr__(name: str) -> Any:
    module, attribute = _RENAMED.get(name, (_WHERE.get(name), name))
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value
