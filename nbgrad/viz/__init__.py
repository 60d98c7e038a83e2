"""Pictures of results. matplotlib is imported when one is drawn."""

from nbgrad.viz.curves import draw

__all__ = ["draw"]
