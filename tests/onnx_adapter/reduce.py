"""Reductions."""

import nbgrad as nb

from .tools import ints


def reduced(f):
    """f(x, dims, keepdim) as an operator; axes are an input or, until opset 17, an attribute."""
    def operator(x, axes=None, *, keepdims=1, noop_with_empty_axes=0):
        dims = ints(axes)
        if not dims and noop_with_empty_axes:
            return x
        return f(x, tuple(dims or range(x.ndim)), bool(keepdims))
    return operator


def prod(x, dims, keepdim):
    """One dim after the other, the last first."""
    for dim in sorted((d % x.ndim for d in dims), reverse=True):
        x = nb.prod(x, dim, keepdim, dtype=x.dtype)
    return x


def arg(f):
    """argmax and argmin, the last of equal ones if asked for."""
    def operator(x, *, axis=0, keepdims=1, select_last_index=0):
        if not select_last_index:
            return f(x, axis, bool(keepdims))
        return x.shape[axis] - 1 - f(nb.flip(x, axis), axis, bool(keepdims))
    return operator


def _sum(x, dims, keepdim):
    return nb.sum(x, dims, keepdim, dtype=x.dtype)


REDUCTIONS = {
    "ArgMax": arg(nb.argmax), "ArgMin": arg(nb.argmin),
    "ReduceL1": reduced(lambda x, dims, keep: _sum(nb.abs(x), dims, keep)),
    "ReduceL2": reduced(lambda x, dims, keep: nb.norm(x, 2, dims, keep)),
    "ReduceLogSum": reduced(lambda x, dims, keep: nb.log(_sum(x, dims, keep))),
    "ReduceLogSumExp": reduced(nb.logsumexp),
    "ReduceMax": reduced(nb.amax), "ReduceMean": reduced(nb.mean), "ReduceMin": reduced(nb.amin),
    "ReduceProd": reduced(prod), "ReduceSum": reduced(_sum),
    "ReduceSumSquare": reduced(lambda x, dims, keep: _sum(x * x, dims, keep)),
}
