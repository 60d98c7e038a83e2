"""nbgrad: tensors, autograd and normalization on Numba kernels.

Names are looked up when first used, so that ``import nbgrad`` and ``nbgrad --help`` cost nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PACKAGES = ("autograd", "backend", "cuda", "data", "graph", "models", "nn", "ops", "optim",
             "testing", "train", "viz")
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64",
           "uint8", "bool")
_HOMES = ("autograd", "ops", "backend", "nn.fusion")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"nbgrad.{name}")
    if name in _DTYPES:
        if name.endswith("float16"):
            return import_module("nbgrad.backend").half_dtype(name)
        import numpy as np

        return np.dtype(name)
    if not name.startswith("_"):
        import_module("nbgrad.ops")          # files the ops, which Tensor's operators look up
        for home in _HOMES:
            module = import_module(f"nbgrad.{home}")
            if name in module.__all__:
                value = globals()[name] = getattr(module, name)
                return value
    raise AttributeError(f"module 'nbgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    names = {*_PACKAGES, *_DTYPES, "__version__"}
    for home in _HOMES:
        names.update(import_module(f"nbgrad.{home}").__all__)
    return sorted(names)
