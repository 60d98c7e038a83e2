"""2-d pooling by definition: over windows gathered as two more axes. Results are channels-last."""

import numpy as np

from ..shapes import Pool, adaptive_ranges, window_ranges

__all__ = ["adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", "avg_pool2d",
           "avg_pool2d_backward", "max_pool2d", "max_pool2d_backward", "max_pool2d_gather"]


def _last(y):
    """The same values in channels-last memory."""
    return np.ascontiguousarray(y.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def _positions(out, k, s, p, d, size):
    """(out, k) input positions of each window's taps, and which of them lie inside."""
    at = np.arange(out)[:, None] * s - p + np.arange(k) * d
    inside = (at >= 0) & (at < size)
    return np.where(inside, at, 0), inside


def max_pool2d(x, *, kernel_size, stride, padding, dilation, ceil_mode):
    """y = max over the window, and where: index into the H·W plane, −1 for a window all in padding.

    The first maximum wins; a NaN is the maximum, the last one if there are several.
    """
    g = Pool.of(x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    h, in_h = _positions(g.P, g.I, g.sh, g.ph, g.dh, g.H)
    w, in_w = _positions(g.Q, g.J, g.sw, g.pw, g.dw, g.W)
    where = h[:, None, :, None] * g.W + w[:, None, :]                     # (P, Q, I, J)
    inside = in_h[:, None, :, None] & in_w[:, None, :]
    N, C = x.shape[:2]
    where, inside = (a.reshape(g.P, g.Q, g.I * g.J) for a in np.broadcast_arrays(where, inside))
    y = np.full((N, C, g.P, g.Q), -np.inf, x.dtype)
    indices = np.full((N, C, g.P, g.Q), -1, np.int64)
    for t in range(g.I * g.J if x.size else 0):
        tap = x.reshape(N, C, -1)[:, :, where[..., t]]
        better = inside[..., t] & ((tap > y) | np.isnan(tap) | (indices < 0))
        y, indices = np.where(better, tap, y), np.where(better, where[..., t], indices)
    return _last(y), _last(indices)


def max_pool2d_backward(dy, indices, *, input_size, kernel_size=None, stride=None, padding=None,
                        dilation=None):
    """dx = dy added at the indices, 0 elsewhere. What windows they are from need not be known."""
    N, C, H, W = input_size
    dx = np.zeros((N, C, H * W), dy.dtype)
    n, c, p, q = np.nonzero(indices >= 0)
    np.add.at(dx, (n, c, indices[n, c, p, q]), dy[n, c, p, q])
    return _last(dx.reshape(N, C, H, W))


def max_pool2d_gather(x, indices):
    """y = x at the indices, 0 at −1: the transpose of max_pool2d_backward."""
    N, C, H, W = x.shape
    if x.size == 0 or indices.size == 0:
        return _last(np.zeros(indices.shape, x.dtype))
    flat = np.maximum(indices, 0).reshape(N, C, -1)
    y = np.take_along_axis(x.reshape(N, C, H * W), flat, axis=2).reshape(indices.shape)
    return _last(np.where(indices >= 0, y, np.zeros((), x.dtype)))


def _windows(rows, columns):
    """Each window: its place in y, and what it covers in x."""
    for p, (top, bottom) in enumerate(zip(*rows[:2])):
        for q, (left, right) in enumerate(zip(*columns[:2])):
            yield (..., p, q), (..., slice(top, bottom), slice(left, right))


def _divisor(rows, columns, override=None):
    count = np.multiply.outer(rows[2], columns[2])
    return np.maximum(count, 1) if override is None else np.full(count.shape, override)


def _mean(x, rows, columns, divisor):
    y = np.zeros((*x.shape[:2], *divisor.shape))
    for place, window in _windows(rows, columns):
        y[place] = x[window].astype(np.float64).sum((2, 3))
    return _last((y / divisor).astype(x.dtype))


def _mean_backward(dy, input_size, rows, columns, divisor):
    dx = np.zeros(input_size)
    share = dy.astype(np.float64) / divisor
    for place, window in _windows(rows, columns):
        dx[window] += share[place][..., None, None]
    return _last(dx.astype(dy.dtype))


def _ranges(size, kernel_size, stride, padding, ceil_mode, count_include_pad):
    return [window_ranges(*a, ceil_mode, count_include_pad)
            for a in zip(size, kernel_size, stride, padding)]


def avg_pool2d(x, *, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    """y = Σ over the window / (its size, or divisor_override)."""
    ranges = _ranges(x.shape[2:], kernel_size, stride, padding, ceil_mode, count_include_pad)
    return _mean(x, *ranges, _divisor(*ranges, divisor_override))


def avg_pool2d_backward(dy, *, input_size, kernel_size, stride, padding, ceil_mode,
                        count_include_pad, divisor_override):
    """dx = Σ over the windows that hold the pixel of dy / divisor."""
    ranges = _ranges(input_size[2:], kernel_size, stride, padding, ceil_mode, count_include_pad)
    return _mean_backward(dy, input_size, *ranges, _divisor(*ranges, divisor_override))


def adaptive_avg_pool2d(x, *, output_size):
    """y[p, q] = mean of rows [⌊pH/P⌋, ⌈(p+1)H/P⌉) and columns likewise."""
    ranges = [adaptive_ranges(*a) for a in zip(x.shape[2:], output_size)]
    return _mean(x, *ranges, _divisor(*ranges))


def adaptive_avg_pool2d_backward(dy, *, input_size):
    """dx = Σ over the windows that hold the pixel of dy / window size."""
    ranges = [adaptive_ranges(*a) for a in zip(input_size[2:], dy.shape[2:])]
    return _mean_backward(dy, input_size, *ranges, _divisor(*ranges))
