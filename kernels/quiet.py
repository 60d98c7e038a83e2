"""inf and NaN are values here, not warnings.

NumPy keeps its error state in a context variable, and ``silent().run(f, *args)`` runs f in a copy
of a context where it says "ignore": 10 ns, where a small addition takes 360 and ``np.errstate``
another 900.
"""

from contextvars import Context
from functools import wraps

import numpy as np

__all__ = ["quiet", "silent"]

_context = Context()
_context.run(np.seterr, all="ignore")

silent = _context.copy          # one copy per call: a context cannot be entered twice


def quiet(f):
    """f without floating-point warnings."""
    @wraps(f)
    def run(*args, **kwargs):
        return silent().run(f, *args, **kwargs)
    return run
