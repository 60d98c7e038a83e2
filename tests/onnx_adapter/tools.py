"""What the operators of several groups need."""

import numpy as np


class Unsupported(Exception):
    """nbgrad does not have this; the message says what."""


def ints(x):
    """An attribute or a Tensor as a list of integers; None stays None."""
    return None if x is None else [int(i) for i in np.ravel(getattr(x, "data", x))]


def number(x):
    """A Tensor of one element as a number of Python."""
    return getattr(x, "data", np.asarray(x)).item()


def along(axis, index):
    """An index that takes ``index`` along one axis, and all of those before it."""
    return (*[slice(None)] * axis, index)
