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
from .batch_controls import LpBatchNorm, MeanOnlyBatchNorm, NoisyBatchNorm
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .container import ModuleDict, ModuleList, ParameterList, Sequential
from .conv import Conv2d
from .dropout import Dropout
from .fusion import fuse
from .linear import Flatten, Identity, Linear, Unflatten
from .loss import CrossEntropyLoss, MSELoss, NLLLoss
from .module import Module
from .norm import LayerNorm, Normalization
from .parameter import Parameter
from .pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from .response_norm import TLU, EvoNormB0, EvoNormS0, FilterResponseNorm, GlobalResponseNorm
from .statistics import Cumulative, DebiasedExponential, Exponential, InProcess
from .summary import summary
from .switchable_norm import SwitchableNorm
from .whitening import DecorrelatedBatchNorm

__all__ = [
    "Module", "Parameter", "Sequential", "ModuleList", "ModuleDict", "ParameterList",
    "Linear", "Identity", "Flatten", "Unflatten", "Conv2d",
    "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d",
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "Normalization", "Dropout",
    "LpBatchNorm", "MeanOnlyBatchNorm", "NoisyBatchNorm", "DecorrelatedBatchNorm", "SwitchableNorm",
    "FilterResponseNorm", "TLU", "EvoNormB0", "EvoNormS0", "GlobalResponseNorm",
    "Exponential", "DebiasedExponential", "Cumulative", "InProcess",
    "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Sigmoid", "Tanh", "Softplus", "Softmax",
    "LogSoftmax",
    "CrossEntropyLoss", "NLLLoss", "MSELoss",
    "functional", "fuse", "init", "summary", "utils",
]
