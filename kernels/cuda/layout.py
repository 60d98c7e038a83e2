"""How arrays lie in memory: what is dense, in which order, and which axes can be walked as one."""

from .memory import SIMULATED, contiguous, empty, gapless, order_of, xp

__all__ = ["MISSING", "aligned", "alike", "collapsed", "dense", "ordered", "padded",
           "spread"]

VECTOR = 16
MISSING = -(1 << 62)         # where an element is that counts as 0; the sum of two fits 64 bits


def dense(x):
    """x if its elements fill its memory, in whatever order; else a copy that does."""
    if contiguous(x) or gapless(x.shape, x.strides, x.itemsize):
        return x
    out = ordered(x.shape, x.dtype, order_of(x))
    out[...] = x
    return out


def ordered(shape, dtype, order):
    """A dense uninitialised array whose axes lie in memory in this order."""
    if _straight(order):
        return empty(shape, dtype)
    out = empty([shape[i] for i in order], dtype)
    return out.transpose([order.index(i) for i in range(len(shape))])


def _straight(order):
    return all(i == axis for i, axis in enumerate(order))


def alike(x, like):
    """x in the memory order of the dense ``like``, of the same shape."""
    if x.strides == like.strides:
        return x
    out = ordered(like.shape, x.dtype, order_of(like))
    out[...] = x
    return out


def aligned(*arrays):
    """Whether vectors can be read from their first elements on."""
    bits = 0
    for a in arrays:
        bits |= a.ctypes.data if SIMULATED else a.data.ptr
    return bits % VECTOR == 0


def collapsed(shape, order, arrays):
    """Sizes and each array's steps, in elements, along as few axes as walk them all; outermost
    first. Of arrays that were broadcast to ``shape``."""
    sizes, steps = [], [[] for _ in arrays]
    for i in order:
        n, step = shape[i], [a.strides[i] // a.itemsize for a in arrays]
        if n == 1:
            continue
        if sizes and all(s[-1] == n * t for s, t in zip(steps, step)):
            sizes[-1] *= n
            for s, t in zip(steps, step):
                s[-1] = t
        else:
            sizes.append(n)
            for s, t in zip(steps, step):
                s.append(t)
    return sizes, steps


def spread(x, shape):
    """x broadcast to a shape: a view with steps of 0."""
    return x if x.shape == shape else xp.broadcast_to(x, shape)


def padded(values, count, value):
    """``count`` values, the missing ones in front."""
    return [value] * (count - len(values)) + list(values)

