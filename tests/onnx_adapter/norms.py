"""Normalization."""

import nbgrad as nb
from nbgrad import nn
from nbgrad.nn import functional as F

from .tools import Unsupported, ints


def batch_norm(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    """ONNX's momentum is what is kept, and its running variance is of the biased one."""
    if not training_mode:
        return F.batch_norm(x, mean, var, scale, bias, eps=epsilon)
    norm = nn.BatchNorm(x.shape[1], epsilon, 1 - momentum, correction=0, dtype=x.dtype)
    norm.load_state_dict({"weight": scale, "bias": bias, "running_mean": mean, "running_var": var,
                          "num_batches_tracked": nb.tensor(0)})
    return norm(x), norm.running_mean, norm.running_var


def layer_norm(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1):
    dims = tuple(range(axis % x.ndim, x.ndim))
    invstd = nb.rsqrt(nb.var(x, dims, keepdim=True, correction=0) + epsilon)
    return (F.layer_norm(x, x.shape[dims[0]:], scale, bias, epsilon), nb.mean(x, dims, True),
            invstd)


def rms_norm(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    return F.rms_norm(x, x.shape[axis % x.ndim:], scale, epsilon)


def group_norm(x, scale, bias, *, num_groups, epsilon=1e-5, stash_type=1):
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def instance_norm(x, scale, bias, *, epsilon=1e-5):
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def lrn(x, *, size, alpha=1e-4, beta=0.75, bias=1.0):
    return F.local_response_norm(x, size, alpha, beta, bias)


def lp_normalization(x, *, axis=-1, p=2):
    return F.normalize(x, p, axis)


def mean_variance(x, *, axes=(0, 2, 3)):
    """Batch norm without parameters; ε as small as the 1e-9 that ONNX adds to σ."""
    if ints(axes) != [0, *range(2, x.ndim)]:
        raise Unsupported("batch statistics over other axes")
    return F.batch_norm(x, None, None, training=True, eps=1e-9)


NORMS = {
    "BatchNormalization": batch_norm, "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm, "LRN": lrn, "LayerNormalization": layer_norm,
    "LpNormalization": lp_normalization, "MeanVarianceNormalization": mean_variance,
    "RMSNormalization": rms_norm,
}
