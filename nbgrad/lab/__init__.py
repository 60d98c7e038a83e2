"""Questions about normalization, settled by measuring."""

from .study import Figure, Finding, Series, Study, Table

__all__ = ["Figure", "Finding", "Series", "Study", "Table"]
