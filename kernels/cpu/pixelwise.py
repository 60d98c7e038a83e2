"""Gradients of 1×1 convolutions of few pixels: plain matrix products.

The last layers of a network have 49 pixels of 1000 channels, and tasks that share out pixels have
little each. (8 images, two cores of Zen 4: weights of 160 → 960 at 7×7 651 us, 546 as a product;
inputs of 96 → 576 at 14×14 959 and 780; inputs of 256 → 512 at 14×14, stride 2, 1180 and 600.)
"""

from .matmul import matmul
from .memory import empty
from .padded import clear

__all__ = ["few_pixels", "input_gradient", "weight_gradient"]

PIXELS = 1 << 11           # of 28×28 and more the windows' tasks are as fast or faster
# The same for weights where pixels are passed over, as those that are not are copied (8 images, 128
# → 256 at 28×28, stride 2, two cores of Emerald Rapids: 90 GFLOP/s, by tasks 120; 256 → 512 at
# 14×14: 126 and 118).
COPIED = 1 << 10


def few_pixels(g, weights=False):
    """Whether this is the way of a convolution's gradient, of its inputs or its ``weights``."""
    pixels, most = g.N * g.P * g.Q, COPIED if weights and g.sh * g.sw > 1 else PIXELS
    return (g.I == g.J == g.G == 1 and g.ph == g.pw == 0 and 0 < pixels <= most
            and g.C > 0 and g.O > 0)


def input_gradient(dy, weight, g):
    """dx (N, H, W, C) from dy (N, P, Q, O): zero where the steps pass over."""
    own = matmul(dy.reshape(-1, g.O), weight.reshape(g.O, g.C)).reshape(g.N, g.P, g.Q, g.C)
    if g.sh == g.sw == 1:
        return own
    dx = empty((g.N, g.H, g.W, g.C), dy.dtype)
    clear(dx)
    dx[:, ::g.sh, ::g.sw] = own
    return dx


def weight_gradient(dy, x, g):
    """dw (O, C, 1, 1) from dy (N, P, Q, O) and x (N, H, W, C)."""
    seen = x[:, ::g.sh, ::g.sw]
    if not seen.flags.c_contiguous:               # in memory that is not new
        seen = empty(seen.shape, x.dtype)
        seen[...] = x[:, ::g.sh, ::g.sw]
    return matmul(dy.reshape(-1, g.O).T, seen.reshape(-1, g.C)).reshape(g.O, g.C, 1, 1)
