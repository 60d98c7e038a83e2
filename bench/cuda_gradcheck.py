"""Gradients on the device against finite differences, in float64."""

from functools import partial

import nbgrad
from nbgrad import nn
from nbgrad.nn import functional as F
from nbgrad.testing import gradcheck

FUNCTIONS = {
    "matmul": (lambda x, y: x @ y, [(3, 4), (4, 2)]),
    "conv2d": (lambda x, w: F.conv2d(x, w, padding=1), [(2, 2, 4, 3), (3, 2, 3, 3)]),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), [(4, 3, 2, 2)]),
    "layer_norm": (lambda x: F.layer_norm(x, (5,)), [(3, 5)]),
    "group_norm": (lambda x: F.group_norm(x, 2), [(2, 4, 3)]),
    "softmax": (lambda x: nbgrad.softmax(x, 1), [(3, 5)]),
    "gelu": (nbgrad.gelu, [(3, 4)]),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), [(1, 2, 4, 4)]),
    "sum and broadcast": (lambda x, y: (x * y).sum(1), [(3, 4), (4,)])}


def _function(report, name):
    f, shapes = FUNCTIONS[name]
    xs = [nbgrad.randn(*s, dtype=nbgrad.float64, generator=nbgrad.Generator(i), device="cuda")
          .requires_grad_() for i, s in enumerate(shapes)]
    gradcheck(f, xs, mode="fast", order=1 if name == "max_pool2d" else 2)
    report.add("gradcheck", name)


def _network(report):
    nbgrad.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
                          nn.Linear(12, 2)).double().to("cuda")
    x = nbgrad.randn(3, 2, 4, 4, dtype=nbgrad.float64, generator=nbgrad.Generator(1), device="cuda")
    gradcheck(lambda t: model(t), x.requires_grad_(), mode="fast")
    report.add("gradcheck", "network")


def cases(report, simulate):
    """(name, check)."""
    for name in FUNCTIONS:
        yield name, partial(_function, report, name)
    yield "network", partial(_network, report)
