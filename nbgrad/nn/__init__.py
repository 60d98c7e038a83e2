"""Layers, containers, losses and initial values, under the names of ``torch.nn``."""

from . import functional, init, utils
from .activation import (
    ELU,
    GELU,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .container import ModuleDict, ModuleList, ParameterList, Sequential
from .conv import Conv2d
from .conversion import convert_norm, freeze_batch_norm, unfreeze_batch_norm
from .dropout import Dropout
from .fusion import Folded, fold, fuse
from .linear import Flatten, Identity, Linear, Unflatten
from .loss import CrossEntropyLoss, MSELoss, NLLLoss
from .module import Module
from .norm import LayerNorm, Normalization
from .parameter import Parameter
from .pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from .statistics import Cumulative, DebiasedExponential, Exponential, InProcess
from .summary import summary

__all__ = [
    "Module", "Parameter", "Sequential", "ModuleList", "ModuleDict", "ParameterList",
    "Linear", "Identity", "Flatten", "Unflatten", "Conv2d",
    "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d",
    "BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "Normalization",
    "Exponential", "DebiasedExponential", "Cumulative", "InProcess", "Dropout",
    "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Sigmoid", "Tanh", "Softplus", "Softmax",
    "LogSoftmax",
    "CrossEntropyLoss", "NLLLoss", "MSELoss",
    "convert_norm", "freeze_batch_norm", "unfreeze_batch_norm", "fold", "Folded",
    "functional", "fuse", "init", "summary", "utils",
]
