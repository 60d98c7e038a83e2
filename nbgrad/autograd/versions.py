"""In-place writes, counted, so that ``backward`` can refuse a value that has been overwritten.

There is one clock. A write sets the tensor's version to it; a node remembers what it said when the
op was recorded. A tensor that the node's vjp holds and whose version is newer is not what it was.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tensors import Tensor

__all__ = ["bump", "clock", "share_version"]

clock = 0                   # counts in-place writes


def bump(*ts: Tensor) -> None:
    """Say that the ``data`` of these was written to: a vjp that still needs an old value will
    raise."""
    global clock
    clock += 1
    for t in ts:
        version = t._version
        if version is None:
            t._version = [clock]
        else:
            version[0] = clock


def share_version(base: Tensor, view: Tensor) -> None:
    """Memory that several tensors see has one version, which knows the tensors: [clock, when to
    look for dead ones, refs …]."""
    version = base._version
    if version is None:
        version = base._version = [0]
    if len(version) == 1:
        version += [16, weakref.ref(base)]
    if len(version) > version[1]:
        version[2:] = [r for r in version[2:] if r() is not None]
        version[1] = max(16, 2 * len(version))
    version.append(weakref.ref(view))
    view._version = version
