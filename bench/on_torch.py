"""PyTorch's side: the functions behind its layers, without recording; its layers in whole steps."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from . import on_both
from .data import factors, normal

__all__ = ["build", "set_num_threads"]

set_num_threads = torch.set_num_threads
aten = torch.ops.aten
EPS = 1e-5


def build(case, how=""):
    """The call of a case; ``how`` is "", "one thread", "channels-last" or "compiled"."""
    last = how == "channels-last"
    if case.op in on_both.OPS:
        return getattr(on_both, case.op)(torch, lambda a: put(a, last and a.ndim == 4),
                                         lambda name: network(name, how), **case.settings)
    call = globals()[case.op](last, **case.settings)

    def run():
        with torch.no_grad():
            return call()
    return run


def small():
    """A first operation."""
    return torch.ones(2).relu()


def put(a, last=False):
    """A copy in memory of PyTorch's own."""
    out = torch.empty(a.shape, dtype=torch.from_numpy(a).dtype,
                      memory_format=torch.channels_last if last else torch.contiguous_format)
    return out.copy_(torch.from_numpy(a))


def some(shape, seed=0, last=False):
    return put(normal(shape, seed), last)


class Block(nn.Module):
    """A basic block with the shortcut without parameters: strided, and zeros for new channels."""

    def __init__(self, before, channels, stride):
        super().__init__()
        self.stride, self.extra = stride, channels - before
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        if self.stride > 1:
            x = x[:, :, ::self.stride, ::self.stride]
        if self.extra:
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        y = self.norm2(self.conv2(y))
        y += x
        return F.relu(y, inplace=True)


def resnet20():
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16),
                         nn.ReLU(inplace=True), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(64, 10))


def lenet():
    layers = []
    for before, channels, pad in ((1, 6, 2), (6, 16, 0)):
        layers += [nn.Conv2d(before, channels, 5, padding=pad), nn.BatchNorm2d(channels),
                   nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers.append(nn.Flatten())
    for before, units in ((400, 120), (120, 84)):
        layers += [nn.Linear(before, units), nn.BatchNorm1d(units), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(84, 10))


def mlp():
    layers = []
    for before in (784, 100, 100):
        layers += [nn.Linear(before, 100), nn.BatchNorm1d(100), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def network(name, how=""):
    net = {"resnet20": resnet20, "lenet": lenet, "mlp": mlp}[name]()
    if how == "channels-last":
        net = net.to(memory_format=torch.channels_last)
    return torch.compile(net) if how == "compiled" else net


def matmul(last, M, K, N, dtype, transposed):
    a, b = map(torch.from_numpy, factors(M, K, N, dtype, transposed))
    return lambda: a @ b


def _conv(last, conv, size):
    y = (conv.x[0], conv.weight[0], *size)
    return some(conv.x, 0, last), some(conv.weight, 1, last), some(y, 2, last)


def conv_forward(last, conv, size):
    x, weight, _ = _conv(last, conv, size)
    return lambda: F.conv2d(x, weight, None, **conv.settings)


def _conv_gradient(last, conv, size, which):
    x, weight, dy = _conv(last, conv, size)
    mask = [which == "x", which == "weight", False]
    settings = conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
    at = mask.index(True)
    return lambda: aten.convolution_backward(dy, x, weight, None, *settings, mask)[at]


def conv_input_gradient(last, conv, size):
    return _conv_gradient(last, conv, size, "x")


def conv_weight_gradient(last, conv, size):
    return _conv_gradient(last, conv, size, "weight")


def _norm(last, shape):
    C = shape[1]
    return *(some(shape, seed, last) for seed in range(3)), some((C,), 3), some((C,), 4)


def batch_norm_forward(last, shape, layout):
    x, _, _, gamma, beta = _norm(last, shape)
    return lambda: aten.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)[0]


def batch_norm_evaluation(last, shape, layout):
    """With running statistics."""
    x, _, _, gamma, beta = _norm(last, shape)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return lambda: aten.native_batch_norm(x, gamma, beta, mean, var, False, 0.1, EPS)[0]


def _norm_gradients(dy, x, gamma, mean, invstd):
    return aten.native_batch_norm_backward(dy, x, gamma, None, None, mean, invstd, True, EPS,
                                           [True] * 3)


def batch_norm_backward(last, shape, layout):
    x, dy, _, gamma, beta = _norm(last, shape)
    _, *stats = aten.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
    return lambda: _norm_gradients(dy, x, gamma, *stats)


def batch_norm_add_relu(last, shape, layout):
    """Three ops, the last two in place, as torchvision's residual blocks have them."""
    x, dy, r, gamma, beta = _norm(last, shape)

    def run():
        y, *stats = aten.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
        y.add_(r).relu_()
        dr = aten.threshold_backward(dy, y, 0)
        return y, *_norm_gradients(dr, x, gamma, *stats), dr
    return run


def _group(last, shape, groups):
    """x, dy, γ, β, and the sizes that the op takes."""
    N, C, H, W = shape
    return (some(shape, 0, last), some(shape, 1, last), some((C,), 3), some((C,), 4),
            (N, C, H * W, groups))


def group_norm_forward(last, shape, groups, layout):
    x, _, gamma, beta, sizes = _group(last, shape, groups)
    return lambda: aten.native_group_norm(x, gamma, beta, *sizes, EPS)[0]


def group_norm_backward(last, shape, groups, layout):
    x, dy, gamma, beta, sizes = _group(last, shape, groups)
    _, *stats = aten.native_group_norm(x, gamma, beta, *sizes, EPS)
    return lambda: aten.native_group_norm_backward(dy, x, *stats, gamma, *sizes, [True] * 3)


def instance_norm_forward(last, shape, groups, layout):
    x, _, gamma, beta, _ = _group(last, shape, groups)
    return lambda: F.instance_norm(x, weight=gamma, bias=beta)


def instance_norm_backward(last, shape, groups, layout):
    """What is recorded by instance_norm: batch norm of N C channels, and sums over N."""
    x, dy, *gains, _ = _group(last, shape, groups)
    x, *gains = (a.requires_grad_() for a in (x, *gains))
    with torch.enable_grad():
        y = F.instance_norm(x, weight=gains[0], bias=gains[1])
    return lambda: torch.autograd.grad(y, (x, *gains), dy, retain_graph=True)


def rms_norm_forward(last, shape):
    x, gamma = some(shape), some(shape[1:], 3)
    return lambda: F.rms_norm(x, shape[1:], gamma, EPS)


def rms_norm_backward(last, shape):
    x, dy, gamma = some(shape), some(shape, 1), some(shape[1:], 3)
    x, gamma = x.requires_grad_(), gamma.requires_grad_()
    with torch.enable_grad():
        y = F.rms_norm(x, shape[1:], gamma, EPS)
    return lambda: torch.autograd.grad(y, (x, gamma), dy, retain_graph=True)


POINTWISE = {"relu": torch.relu, "add": torch.add, "exp": torch.exp, "tanh": torch.tanh,
             "gelu": F.gelu, "gelu_backward": aten.gelu_backward,
             "relu_backward": lambda dy, y: aten.threshold_backward(dy, y, 0)}


def pointwise(last, shape, f):
    x, y = some(shape), some(shape, 1)
    if f == "dropout":
        return on_both.dropout(torch, x)
    call = POINTWISE[f]
    return (lambda: call(x, y)) if f == "add" or f.endswith("backward") else lambda: call(x)


def softmax(last, shape):
    x = some(shape)
    return lambda: torch.softmax(x, 1)


def log_softmax(last, shape):
    x = some(shape)
    return lambda: torch.log_softmax(x, 1)


def layer_norm_forward(last, shape):
    x, gamma, beta = some(shape), some(shape[1:], 3), some(shape[1:], 4)
    return lambda: torch.native_layer_norm(x, shape[1:], gamma, beta, EPS)[0]


def layer_norm_backward(last, shape):
    x, dy, gamma, beta = some(shape), some(shape, 1), some(shape[1:], 3), some(shape[1:], 4)
    _, *stats = torch.native_layer_norm(x, shape[1:], gamma, beta, EPS)
    return lambda: aten.native_layer_norm_backward(dy, x, shape[1:], *stats, gamma, beta,
                                                   [True] * 3)


def sum(last, shape, axes):
    x = some(shape)
    return lambda: torch.sum(x, axes)


def _windows(pool):
    return pool.kernel_size, pool.stride, pool.padding


def max_pool_forward(last, pool, size):
    x = some(pool.x, 0, last)
    return lambda: aten.max_pool2d_with_indices(x, *_windows(pool))


def max_pool_backward(last, pool, size):
    x = some(pool.x, 0, last)
    y, indices = aten.max_pool2d_with_indices(x, *_windows(pool))
    dy = some(y.shape, 1, last)
    return lambda: aten.max_pool2d_with_indices_backward(dy, x, *_windows(pool), (1, 1), False,
                                                         indices)


def avg_pool_forward(last, pool, size):
    x = some(pool.x, 0, last)
    return lambda: aten.avg_pool2d(x, *_windows(pool))


def avg_pool_backward(last, pool, size):
    x, dy = some(pool.x, 0, last), some((*pool.x[:2], *size), 1, last)
    return lambda: aten.avg_pool2d_backward(dy, x, *_windows(pool), False, True, None)
