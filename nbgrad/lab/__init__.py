"""Questions about normalization, settled by measuring."""

from .curvature import Eigenpair, Landscape, hessian_vector_product, landscape, top_eigenvalue
from .inference import PopulationGap, VarianceShift, population_vs_running, variance_shift
from .shift import LayerShift, covariate_shift
from .slices import LossSlice, loss_slice, random_direction
from .study import Figure, Finding, Series, Study, Table
from .watching import Watch, effective_rank, watch

__all__ = [
    "Figure", "Finding", "Series", "Study", "Table",
    "watch", "Watch", "effective_rank", "covariate_shift", "LayerShift", "landscape", "Landscape",
    "top_eigenvalue", "Eigenpair", "hessian_vector_product", "loss_slice", "LossSlice",
    "random_direction", "variance_shift", "VarianceShift", "population_vs_running", "PopulationGap",
]
