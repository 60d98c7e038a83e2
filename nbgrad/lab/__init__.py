"""Questions about normalization, settled by measuring.

``nbgrad lab list`` shows the studies (``studies``, one file each), ``nbgrad lab run`` runs them
cell by cell in parallel processes (``running``), and ``results`` keeps what they found. ``ablate``
is an experiment of one's own in one expression::

    print(ablate(Config(epochs=5), norm=["none", "batch"], lr=[0.1, 1.0, 10.0], tune=True))
"""

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
