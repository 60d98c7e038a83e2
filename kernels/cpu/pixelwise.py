"""Gradients of 1×1 convolutions of few pixels: plain matrix products.

The last layers of a network have 49 pixels of 1000 channels, and tasks that share out pixels have
little each. (8 images, two cores of Zen 4: weights of 160 → 960 at 7×7 651 us, 546 as a product;
inputs of 96 → 576 at 14×14 959 and 780; inputs of 256 → 512 at 14×14, stride 2, 1180 and 600.)
"""

from .matmul import matmul
from .memory import empty

__all__ = ["few_pixels", "input_gradient", "weight_gradient"]

PIXELS = 1 << 11           # of 28×28 and more the windows' tasks are as fast or faster


def few_pixels(g):
    """Whether this is the way of a convolution."""
    pixels = g.N * g.P * g.Q
    return (g.I == g.J == g.G == 1 and g.ph == g.pw == 0 and 0 < pixels <= PIXELS
            and g.C > 0 and g.O > 0)


def input_gradient(dy, weight, g):
    """dx (N, H, W, C) from dy (N, P, Q, O): zero where the steps pass over."""
    own = matmul(dy.reshape(-1, g.O), weight.reshape(g.O, g.C)).reshape(g.N, g.P, g.Q, g.C)
    if g.sh == g.sw == 1:
        return own
    dx = empty((g.N, g.H, g.W, g.C), dy.dtype)
    dx[...] = 0
    dx[:, ::g.sh, ::g.sw] = own
    return dx


def weight_gradient(dy, x, g):
    """dw (O, C, 1, 1) from dy (N, P, Q, O) and x (N, H, W, C)."""
    seen = x[:, ::g.sh, ::g.sw].reshape(-1, g.C)
    return matmul(dy.reshape(-1, g.O).T, seen).reshape(g.O, g.C, 1, 1)
