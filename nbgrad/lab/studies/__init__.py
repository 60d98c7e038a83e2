"""The studies: one file per question, each with a ``STUDY``. Imported when asked for."""

from __future__ import annotations

from importlib import import_module

from nbgrad.lab.study import Study

__all__ = ["STUDIES", "find", "names"]

# What `nbgrad lab list` shows, by number. A study's name is its file's, with "-" for "_".
STUDIES: dict[int, str] = {
    1: "convergence_speed",
    2: "higher_learning_rates",
    3: "initialisation",
    4: "regularisation",
    5: "covariate_shift",
    6: "landscape_smoothness",
    7: "placement",
    8: "batch_size",
    9: "momentum",
    10: "statistics_at_inference",
    11: "dropout",
    12: "cnn",
    13: "gradient_growth",
    14: "rank_collapse",
    15: "scale_invariance",
    16: "hessian_eigenvalue",
    17: "gamma_beta_only",
    18: "divide_by_variance",
    19: "layer_norm_small_batch",
    20: "batch_renorm",
    21: "noisy_batch_norm",
}


def names() -> tuple[str, ...]:
    """The studies' names, in order.

    >>> names()[0]
    'convergence-speed'
    """
    return tuple(module.replace("_", "-") for _, module in sorted(STUDIES.items()))


def find(name: str) -> Study:
    """A study by its name. Raises ValueError, which says what is nearest, where there is none."""
    if name not in names():
        from difflib import get_close_matches

        near = get_close_matches(name, names(), 1)
        raise ValueError(f"there is no study {name!r}" + (f"; do you mean {near[0]!r}?" if near else
                         ": `nbgrad lab list` shows them"))
    study: Study = import_module(f"{__name__}.{name.replace('-', '_')}").STUDY
    return study
