"""2-d convolution by definition: a sum over the kernel's taps. Results are channels-last."""

import numpy as np

from ..shapes import Conv
from .norm import batch_norm_stats

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]


def _pad(x, g):
    return np.pad(x, ((0, 0), (0, 0), (g.ph, g.ph), (g.pw, g.pw)))


def _taps(xp, g):
    """(i, j, view) for each tap: view[n, g, c, p, q] = xp[n, gc, p·s + i·d, q·s + j·d]."""
    for i in range(g.I):
        for j in range(g.J):
            rows = slice(i * g.dh, i * g.dh + g.sh * (g.P - 1) + 1, g.sh)
            columns = slice(j * g.dw, j * g.dw + g.sw * (g.Q - 1) + 1, g.sw)
            view = xp[:, :, rows, columns]
            yield i, j, view.reshape(g.N, g.G, g.C // g.G, g.P, g.Q)


def _grouped(weight, g):
    return weight.reshape(g.G, g.O // g.G, g.C // g.G, g.I, g.J)


def conv2d(x, weight, bias=None, *, stride, padding, dilation, groups, moments=None):
    """y[n,o,p,q] = b[o] + Σ_{c,i,j} w[o,c,i,j] x[n, c, p·s + i·d − pad, q·s + j·d − pad].

    ``moments``, an empty list, gets count, mean and M2 = Σ (y − mean)² of each o, float64 (O,)."""
    g = Conv.of(x.shape, weight.shape, stride, padding, dilation, groups)
    w = _grouped(weight, g)
    y = np.zeros((g.N, g.P, g.Q, g.G, g.O // g.G), np.result_type(x, weight))
    for i, j, tap in _taps(_pad(x, g), g):
        y += np.einsum("ngcpq,goc->npqgo", tap, w[..., i, j], optimize=True)
    y = y.reshape(g.N, g.P, g.Q, g.O).transpose(0, 3, 1, 2)
    y = y if bias is None else y + bias.reshape(1, -1, 1, 1)
    if moments is not None and y.size:
        count = np.full(g.O, y.size / g.O)
        mean, var = batch_norm_stats(y)
        moments += [count, mean, var * count]
    return y


def conv2d_input(dy, weight, *, input_size, stride, padding, dilation, groups):
    """dx[n, c, p·s + i·d − pad, …] = Σ_{o,i,j} w[o,c,i,j] dy[n,o,p,q]: conv2d's transpose in x."""
    g = Conv.of(input_size, weight.shape, stride, padding, dilation, groups)
    w, dy = _grouped(weight, g), dy.reshape(g.N, g.G, g.O // g.G, g.P, g.Q)
    dxp = np.zeros((g.N, g.H + 2 * g.ph, g.W + 2 * g.pw, g.C), np.result_type(dy, weight))
    dxp = dxp.transpose(0, 3, 1, 2)
    for i in range(g.I):
        for j in range(g.J):
            part = np.einsum("ngopq,goc->ngcpq", dy, w[..., i, j], optimize=True)
            dxp[:, :, i * g.dh:i * g.dh + g.sh * (g.P - 1) + 1:g.sh,
                j * g.dw:j * g.dw + g.sw * (g.Q - 1) + 1:g.sw] += part.reshape(g.N, g.C, g.P, g.Q)
    return dxp[:, :, g.ph:g.ph + g.H, g.pw:g.pw + g.W].copy(order="K")


def conv2d_weight(dy, x, *, kernel_size, stride, padding, dilation, groups):
    """dw[o,c,i,j] = Σ_{n,p,q} dy[n,o,p,q] x[n, c, p·s + i·d − pad, …]: conv2d's transpose in w."""
    shape = (dy.shape[1], x.shape[1] // groups, *kernel_size)
    g = Conv.of(x.shape, shape, stride, padding, dilation, groups)
    dy = dy.reshape(g.N, g.G, g.O // g.G, g.P, g.Q)
    dw = np.zeros((g.G, g.O // g.G, g.C // g.G, g.I, g.J), np.result_type(dy, x))
    for i, j, tap in _taps(_pad(x, g), g):
        dw[..., i, j] = np.einsum("ngopq,ngcpq->goc", dy, tap, optimize=True)
    return dw.reshape(shape)
