"""float16 and bfloat16: 16 bits in memory, float32 in arithmetic.

bfloat16 (float32's exponent, 8 bits of fraction) is ml_dtypes'; NumPy says "V" for its kind. What
has no kernel for halves is computed in float32 and rounded once, to nearest even.
"""

from functools import cache, wraps

import numpy as np

from .composed import fused
from .quiet import quiet

__all__ = ["is_half", "kind", "named", "real", "through", "wide"]

# of what these return, only the first is a tensor; the rest are statistics, which stay float32
_STATISTICS = {"batch_norm", "ghost_batch_norm", "group_norm", "layer_norm", "rms_norm",
               "cross_entropy"}
_KEPT = {"batch_norm_stats", "batch_norm_backward_reduce"}           # nothing but statistics
# which argument is γ, in whose dtype the gradients from here to there are: it may be float32
_GAINS = {"batch_norm_backward": (2, 1, 3), "ghost_batch_norm_backward": (2, 1, 3),
          "group_norm_backward": (2, 1, 4), "layer_norm_backward": (2, 1, 3),
          "rms_norm_backward": (2, 1, 2)}
_FUSED = "linear_batch_norm", "linear_batch_norm_backward"           # of others, which round
_IN_PLACE = {"adam_step", "sgd_step"}


def is_half(dtype):
    """Whether a dtype is float16 or bfloat16."""
    return dtype.itemsize == 2 and dtype.kind in "fV"


def kind(dtype):
    """The name that kernels have for a dtype: "f4", "f2" …, "bf" for bfloat16."""
    return "bf" if dtype.kind == "V" else dtype.str[1:]


def named(name):
    """The half by the name that kernels have for it."""
    return np.dtype("float16" if name == "f2" else "bfloat16")


def real(dtype):
    """The dtype that a dtype's numbers are computed in."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def wide(x):
    """x, halves as float32."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(wide, x))
    dtype = getattr(x, "dtype", None)
    return x.astype(np.float32) if dtype is not None and is_half(dtype) else x


def _dtype_of(args):
    for x in args:
        if isinstance(x, (list, tuple)):
            found = _dtype_of(x)
        else:
            dtype = getattr(x, "dtype", None)
            found = dtype if dtype is not None and is_half(dtype) else None
        if found is not None:
            return found
    return None


def _narrow(y, dtype):
    if isinstance(y, (list, tuple)):
        return type(y)(_narrow(v, dtype) for v in y)
    return y.astype(dtype) if getattr(y, "dtype", None) == np.float32 else y


def _rounded(function, name):
    """``function`` of halves, computed in float32."""
    @wraps(function)
    @quiet
    def run(*args, **settings):
        dtype = _dtype_of((*args, *settings.values()))
        used = {n: wide(x) for n, x in settings.items()}
        y = function(*wide(args), **used)
        for a, moved in zip(settings.get("running") or (), used.get("running") or ()):
            if moved is not a:
                a[...] = moved.astype(a.dtype)           # running statistics move in place
        if dtype is None or name in _KEPT:
            return y
        if name in _GAINS:
            at, first, end = _GAINS[name]
            own = dtype if args[at] is None else args[at].dtype
            return (*_narrow(y[:first], dtype), *_narrow(y[first:end], own),
                    *_narrow(y[end:], dtype))
        return (_narrow(y[0], dtype), *y[1:]) if name in _STATISTICS else _narrow(y, dtype)
    return run


class _Through:
    """A module's kernels for halves: its own, those in its HALF, or through float32."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        if name in _FUSED:
            for made, f in zip(_FUSED, fused(self)):
                setattr(self, made, f)
            return getattr(self, name)
        f = getattr(self._module, name)
        if name in _IN_PLACE:
            raise TypeError(f"{name}: parameters in float16 or bfloat16 would lose the updates: "
                            "keep them in float32 and cast what is computed with them")
        if callable(f) and name not in getattr(self._module, "HALF", ()):
            f = _rounded(f, name)
        setattr(self, name, f)
        return f


@cache
def through(module):
    """The kernels of a module, for halves."""
    return _Through(module)
