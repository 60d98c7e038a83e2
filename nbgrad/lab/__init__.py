"""Questions about normalization, settled by measuring."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .study import Figure, Finding, Series, Study, Table

if TYPE_CHECKING:
    from .ablation import Ablation, ablate
    from .intervals import Interval, bootstrap, paired
    from .running import Plan, run

__all__ = ["Figure", "Finding", "Series", "Study", "Table",
           "ablate", "Ablation", "bootstrap", "paired", "Interval", "run", "Plan"]

_WHERE = {"ablate": "ablation", "Ablation": "ablation", "bootstrap": "intervals",
          "paired": "intervals", "Interval": "intervals", "run": "running", "Plan": "running"}


def __getattr__(name: str) -> Any:
    """The rest when first used, so that a name on the command line costs no NumPy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
