"""What one training run is: a frozen, validated record that survives JSON and checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["CHOICES", "DATA", "NORMS", "Config", "defaults"]

NORMS = {"none": "without norm", "batch": "batch norm", "layer": "layer norm",
         "group": "group norm", "instance": "instance norm", "rms": "RMS norm"}
DATA = {"digits": "UCI digits", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST",
        "cifar10": "CIFAR-10"}
CHOICES = {
    "data": tuple(DATA),
    "model": ("mlp", "cnn", "lenet", "resnet20"),
    "norm": tuple(NORMS),
    "placement": ("before", "after", "preact"),
    "dropout_at": ("each", "before", "last"),
    "activation": ("sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus"),
    "init": ("default", "normal", "uniform", "xavier", "kaiming", "orthogonal"),
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("constant", "step", "cosine", "onecycle"),
}

# mlp: the network of Ioffe & Szegedy 2015, section 4.1 (three layers of 100 sigmoids, small
# Gaussian weights, batches of 60). The learning rates are decades around the plain network's best.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"activation": "sigmoid", "init": "normal", "lrs": (0.1, 1.0, 10.0), "lr": 1.0,
            "batch_size": 60, "epochs": 30},
    "cnn": {"activation": "relu", "init": "kaiming", "lrs": (0.01, 0.1, 1.0), "lr": 0.1,
            "batch_size": 64, "epochs": 20},
    "lenet": {"activation": "relu", "init": "kaiming", "lrs": (0.01, 0.03, 0.1), "lr": 0.1,
              "batch_size": 64, "epochs": 8, "momentum": 0.9, "schedule": "cosine"},
    "resnet20": {"activation": "relu", "init": "kaiming", "lrs": (0.01, 0.1, 1.0), "lr": 0.1,
                 "batch_size": 128, "epochs": 10, "momentum": 0.9, "weight_decay": 1e-4,
                 "schedule": "cosine"},
}
_ADAPTIVE = {"lrs": (1e-3, 1e-2, 1e-1), "lr": 1e-3}


@dataclass(frozen=True)
class Config:
    """One run. Every field is checked when the record is made; a wrong one raises ValueError.

    >>> Config(model="lenet", lr=0.1).norm
    'batch'
    >>> Config(dropout=1.5)
    Traceback (most recent call last):
    ...
    ValueError: dropout: expected a number from 0 to 1 (1 excluded), got 1.5
    """

    data: str = "digits"
    root: str | None = None
    model: str = "mlp"
    norm: str = "batch"
    placement: str = "before"
    groups: int | None = None           # of group norm
    ghost: int | None = None            # samples over which batch norm takes its statistics
    decay: float | None = None          # of the running statistics: 1 − PyTorch's momentum
    depth: int | None = None            # hidden layers of mlp (3), convolutions of cnn (4)
    width: int | None = None            # units of mlp (100), channels of cnn, resnet20 (16)
    activation: str = "sigmoid"
    init: str = "normal"
    gain: float = 1.0                   # times the initial weights
    dropout: float = 0.0
    dropout_at: str = "each"            # activation; "before" each norm; the "last" activation
    optimizer: str = "sgd"
    lr: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0                     # epochs of linear warm-up
    clip_grad: float | None = None      # largest gradient norm
    batch_size: int = 60
    epochs: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, "
                                 f"got {_short(getattr(self, name))}")
        if not isinstance(self.root, str | None):
            raise ValueError(f"root: expected the path of a folder, got {_short(self.root)}")
        _number(self, "lr", low=0.0, low_excluded=True)
        _number(self, "momentum", low=0.0, high=1.0)
        _number(self, "dropout", low=0.0, high=1.0)
        _number(self, "weight_decay", low=0.0)
        if self.clip_grad is not None:
            _number(self, "clip_grad", low=0.0, low_excluded=True)
        # Batch norm cannot train on one sample: there is no variance.
        _integer(self, "batch_size", 2 if self.norm == "batch" else 1)
        _integer(self, "epochs", 1)
        _integer(self, "warmup", 0)
        _integer(self, "seed", 0)
        _number(self, "gain", low=0.0, low_excluded=True)
        for name, low in (("groups", 1), ("ghost", 2), ("depth", 1), ("width", 1)):
            if getattr(self, name) is not None:
                _integer(self, name, low)
        if self.decay is not None:
            _number(self, "decay", low=0.0, high=1.0)
        self._check_fit()
        if self.warmup > self.epochs:
            raise ValueError(f"warmup: {self.warmup} epochs are more than the run's {self.epochs}")
        if self.warmup and self.schedule == "onecycle":
            raise ValueError("warmup: the one-cycle schedule has a warm-up of its own")

    def _check_fit(self) -> None:
        """What a model or a norm does not have."""
        model, norm = self.model, self.norm
        if norm == "instance" and model not in ("cnn", "resnet20"):
            raise ValueError(f"norm: 'instance' needs images; {model} has layers of units")
        if self.placement == "preact" and model != "resnet20":
            raise ValueError(f"placement: 'preact' is resnet20's; {model} has before, after")
        if self.dropout_at != "each" and model == "resnet20":
            raise ValueError("dropout_at: resnet20 has dropout before its last layer alone")
        for name, models in (("depth", ("mlp", "cnn")), ("width", ("mlp", "cnn", "resnet20"))):
            if getattr(self, name) is not None and model not in models:
                raise ValueError(f"{name}: {model}'s is fixed; that of {', '.join(models)} is not")
        for name, owner in (("groups", "group"), ("ghost", "batch"), ("decay", "batch")):
            if getattr(self, name) is not None and norm not in (owner, "none"):
                raise ValueError(f"{name}: {norm} norm has none; it is {owner} norm's")

    def but(self, **changes: Any) -> Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> Config:
        """The inverse of ``to_dict``; raises ValueError for unknown fields or wrong types."""
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not fields.keys() <= names:
            unknown = sorted(map(str, set(fields) - names)) if isinstance(fields, dict) else fields
            raise ValueError(f"Config: unknown fields {_short(unknown)}")
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Config:
        return cls.from_dict(json.loads(text))


def defaults(model: str, optimizer: str = "sgd") -> dict[str, Any]:
    """Settings that suit a model, and ``lrs``, the learning rates of a comparison."""
    if model not in _DEFAULTS:
        raise ValueError(f"model: expected one of {', '.join(_DEFAULTS)}, got {model!r}")
    return {**_DEFAULTS[model], **({} if optimizer == "sgd" else _ADAPTIVE)}


def _number(c: Config, name: str, *, low: float, high: float = math.inf,
            low_excluded: bool = False) -> None:
    x = getattr(c, name)
    good = isinstance(x, int | float) and not isinstance(x, bool) and low <= x < high
    good = good and x <= sys.float_info.max         # an int may be larger
    if not good or (low_excluded and x == low):
        limits = f"above {low:g}" if low_excluded else f"from {low:g}"
        limits += f" to {high:g} ({high:g} excluded)" if high < math.inf else ""
        raise ValueError(f"{name}: expected a number {limits}, got {_short(x)}")


def _integer(c: Config, name: str, low: int) -> None:
    x = getattr(c, name)
    if not isinstance(x, int) or isinstance(x, bool) or not low <= x < 2**63:
        why = " (batch norm needs two samples)" if name == "batch_size" and low == 2 else ""
        raise ValueError(f"{name}: expected a whole number of at least {low}{why}, "
                         f"got {_short(x)}")


def _short(x: Any) -> str:
    """repr, of which at most 60 characters."""
    text = repr(x)
    return text if len(text) <= 60 else f"{text[:57]}..."
