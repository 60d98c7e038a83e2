"""Products of the channels of a group with each other, by definition. x is (N, C, *S), groups are
``size`` channels that lie together; matrices are float64 (C / size, size, size). Of functions that
arrays on a device have, too."""

import numpy as np

__all__ = ["channel_mix", "channel_products"]


def _grouped(x, mean, size):
    """(C / size, size, values of a channel) of x − mean, in float64."""
    wide = np.moveaxis(x, 1, 0).astype(np.float64).reshape(x.shape[1], -1)
    return (wide - mean[:, None]).reshape(x.shape[1] // size, size, wide.shape[1])


def channel_products(a, b, mean_a, mean_b, *, size):
    """Σ (a_i − ā_i) (b_j − b̄_j) of the channels i and j of each group."""
    with np.errstate(all="ignore"):
        return _grouped(a, mean_a, size) @ np.moveaxis(_grouped(b, mean_b, size), 1, 2)


def channel_mix(x, mean, w, shift=None, z=None, mean_z=None, v=None):
    """y = W (x − μ) [+ V (z − ζ)] [+ β] of each group of channels, in x's dtype; β: (C,)."""
    with np.errstate(all="ignore"):
        y = w @ _grouped(x, mean, w.shape[1])
        if z is not None:
            y = y + v @ _grouped(z, mean_z, w.shape[1])
        y = np.moveaxis(y.reshape(x.shape[1], len(x), *x.shape[2:]), 0, 1)
        if shift is not None:
            y = y + shift.reshape(1, -1, *[1] * (x.ndim - 2))
        return y.astype(x.dtype)
