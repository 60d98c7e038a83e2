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
from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .batch_variants import (
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    SplitBatchNorm,
    SyncBatchNorm,
)
from .container import ModuleDict, ModuleList, ParameterList, Sequential
from .conv import Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d
from .conversion import convert_norm, freeze_batch_norm, unfreeze_batch_norm
from .create_norm import create_norm, register_norm
from .dropout import Dropout
from .fusion import Folded, fold, fuse
from .group_norm import (
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LocalResponseNorm,
    RMSNorm,
)
from .lazy import (
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyConv1d,
    LazyConv2d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    LazyLinear,
)
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
    "Linear", "Identity", "Flatten", "Unflatten",
    "Conv1d", "Conv2d", "ConvTranspose1d", "ConvTranspose2d",
    "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d", "LazyConv1d", "LazyConv2d",
    "LazyConvTranspose1d", "LazyConvTranspose2d", "LazyInstanceNorm1d",
    "LazyInstanceNorm2d", "LazyInstanceNorm3d", "LazyLinear",
    "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d",
    "BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "Normalization",
    "BatchRenorm", "FrozenBatchNorm", "GhostBatchNorm", "SplitBatchNorm", "SyncBatchNorm",
    "Exponential", "DebiasedExponential", "Cumulative", "InProcess", "Dropout",
    "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LocalResponseNorm",
    "RMSNorm", "create_norm", "register_norm",
    "LpBatchNorm", "MeanOnlyBatchNorm", "NoisyBatchNorm", "DecorrelatedBatchNorm", "SwitchableNorm",
    "FilterResponseNorm", "TLU", "EvoNormB0", "EvoNormS0", "GlobalResponseNorm",
    "ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Sigmoid", "Tanh", "Softplus", "Softmax",
    "LogSoftmax",
    "CrossEntropyLoss", "NLLLoss", "MSELoss",
    "convert_norm", "freeze_batch_norm", "unfreeze_batch_norm", "fold", "Folded",
    "functional", "fuse", "init", "summary", "utils",
]
