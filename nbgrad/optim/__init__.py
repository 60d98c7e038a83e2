"""Optimizers and learning rate schedules, under the names of ``torch.optim``."""

from . import lr_scheduler
from .adam import Adam, AdamW
from .groups import param_groups
from .onecycle import OneCycleLR
from .optimizer import Optimizer
from .schedule import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
    StepLR,
    warmup,
)
from .sgd import SGD

__all__ = ["Optimizer", "SGD", "Adam", "AdamW", "param_groups",
           "LRScheduler", "LambdaLR", "StepLR", "MultiStepLR", "ExponentialLR", "CosineAnnealingLR",
           "LinearLR", "ConstantLR", "OneCycleLR", "SequentialLR", "warmup", "lr_scheduler"]
