"""The ops under the names of ``torch.nn.functional``, and one_hot."""

from __future__ import annotations

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.backend import device_of, move
from nbgrad.ops import (
    adaptive_avg_pool2d,
    avg_pool2d,
    batch_norm,
    conv1d,
    conv2d,
    conv_transpose1d,
    conv_transpose2d,
    cross_entropy,
    dropout,
    elu,
    gelu,
    group_norm,
    instance_norm,
    layer_norm,
    leaky_relu,
    linear,
    local_response_norm,
    log_softmax,
    max_pool2d,
    mse_loss,
    nll_loss,
    normalize,
    pad,
    relu,
    rms_norm,
    sigmoid,
    silu,
    softmax,
    softplus,
    tanh,
)

__all__ = ["adaptive_avg_pool2d", "avg_pool2d", "batch_norm", "conv1d", "conv2d",
           "conv_transpose1d", "conv_transpose2d", "cross_entropy", "dropout", "elu", "gelu",
           "group_norm", "instance_norm", "layer_norm", "leaky_relu", "linear",
           "local_response_norm", "log_softmax", "max_pool2d", "mse_loss", "nll_loss", "normalize",
           "one_hot", "pad", "relu", "rms_norm", "sigmoid", "silu", "softmax", "softplus", "tanh"]


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """y[…, c] = 1 where x = c, else 0.      x: (…) ints from 0  y: (…, num_classes), int64

    ``num_classes=-1``: one more than the largest. Raises TypeError for other dtypes, ValueError for
    a class below 0 or from ``num_classes`` on.

    >>> import nbgrad
    >>> one_hot(nbgrad.tensor([2, 0])).tolist()
    [[0, 0, 1], [1, 0, 0]]
    """
    x = tensor.data
    if x.dtype.kind not in "iu":
        raise TypeError(f"one_hot: expected a tensor of integers, got {x.dtype}")
    if num_classes == -1:
        if not x.size:
            raise ValueError("one_hot: Can not infer total number of classes from empty tensor.")
        num_classes = int(x.max()) + 1
    if num_classes < 0 or (x.size and not 0 <= x.min() <= x.max() < num_classes):
        raise ValueError(f"one_hot: Class values must be from 0 to num_classes - 1, got "
                         f"num_classes={num_classes}"
                         + (f" and classes {x.min()} to {x.max()}" if x.size else ""))
    return as_tensor((x[..., None] == move(np.arange(num_classes), device_of(x))).astype(np.int64))
