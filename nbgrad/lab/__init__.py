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
    from .curvature import Eigenpair, Landscape, hessian_vector_product, landscape, top_eigenvalue
    from .inference import PopulationGap, VarianceShift, population_vs_running, variance_shift
    from .intervals import Interval, bootstrap, paired
    from .running import Plan, run
    from .shift import LayerShift, covariate_shift
    from .slices import LossSlice, loss_slice, random_direction
    from .watching import Watch, effective_rank, watch

__all__ = [
    "Figure", "Finding", "Series", "Study", "Table",
    "ablate", "Ablation", "bootstrap", "paired", "Interval", "run", "Plan",
    "watch", "Watch", "effective_rank", "covariate_shift", "LayerShift", "landscape", "Landscape",
    "top_eigenvalue", "Eigenpair", "hessian_vector_product", "loss_slice", "LossSlice",
    "random_direction", "variance_shift", "VarianceShift", "population_vs_running", "PopulationGap",
]

_HOMES = {
    "ablation": ("ablate", "Ablation"), "intervals": ("bootstrap", "paired", "Interval"),
    "running": ("run", "Plan"), "watching": ("watch", "Watch", "effective_rank"),
    "shift": ("covariate_shift", "LayerShift"),
    "curvature": ("landscape", "Landscape", "top_eigenvalue", "Eigenpair",
                  "hessian_vector_product"),
    "slices": ("loss_slice", "LossSlice", "random_direction"),
    "inference": ("variance_shift", "VarianceShift", "population_vs_running", "PopulationGap"),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The rest when first used, so that a name on the command line costs no NumPy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
