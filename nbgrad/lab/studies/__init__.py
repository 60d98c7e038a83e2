"""The studies: one file per question, each with a ``STUDY``. Imported when asked for."""

from __future__ import annotations

from importlib import import_module

from nbgrad.lab.study import Study

__all__ = ["STUDIES", "find", "names"]

# What `nbgrad lab list` shows, in this order. A study's name is its file's, with "-" for "_".
STUDIES: tuple[str, ...] = (
    "convergence_speed",
    "higher_learning_rates",
    "batch_renorm",
)


def names() -> tuple[str, ...]:
    """The studies' names, in order.

    >>> names()[0]
    'convergence-speed'
    """
    return tuple(module.replace("_", "-") for module in STUDIES)


def find(name: str) -> Study:
    """A study by its name. Raises ValueError, which says what is nearest, where there is none."""
    if name not in names():
        from difflib import get_close_matches

        near = get_close_matches(name, names(), 1)
        raise ValueError(f"there is no study {name!r}" + (f"; do you mean {near[0]!r}?" if near else
                         ": `nbgrad lab list` shows them"))
    study: Study = import_module(f"{__name__}.{name.replace('-', '_')}").STUDY
    return study
