"""Normalization. The common norms are one fused op each, and so is each backward, whose own
gradient is recorded from elementary ops that recompute the statistics from x: exact at every order.
The others are compositions."""

from nbgrad.ops.norm.batch import (  # beyond __all__: what fused ops and layers are made of
    backward_of_batch as backward_of_batch,
    batch_norm,
    batch_norm_inference as batch_norm_inference,
    check_batch as check_batch,
    check_fused as check_fused,
    data as data,
    moving as moving,
    scaled as scaled,
)
from nbgrad.ops.norm.channels import (
    at_least,
    center,
    channel_dot,
    channel_rms,
    channel_size,
    channel_std,
    channel_sums,
    divide_channels,
)
from nbgrad.ops.norm.ghost import ghost_batch_norm
from nbgrad.ops.norm.group import group_norm, instance_norm
from nbgrad.ops.norm.layer import layer_norm
from nbgrad.ops.norm.local import local_response_norm, normalize
from nbgrad.ops.norm.lp import lp_batch_norm, lp_deviation
from nbgrad.ops.norm.response import (
    evonorm_b0,
    evonorm_s0,
    filter_response_norm,
    global_response_norm,
)
from nbgrad.ops.norm.rms import rms_norm
from nbgrad.ops.norm.switchable import switchable_norm
from nbgrad.ops.norm.weight import weight_norm, weight_standardization
from nbgrad.ops.norm.weighted import weighted_batch_norm
from nbgrad.ops.norm.whitening import inverse_sqrt, whiten

__all__ = ["at_least", "batch_norm", "center", "channel_dot", "channel_rms", "channel_size",
           "channel_std", "channel_sums", "divide_channels", "evonorm_b0", "evonorm_s0",
           "filter_response_norm", "ghost_batch_norm", "global_response_norm", "group_norm",
           "instance_norm", "inverse_sqrt", "layer_norm", "local_response_norm", "lp_batch_norm",
           "lp_deviation", "normalize", "rms_norm", "switchable_norm", "weight_norm",
           "weight_standardization", "weighted_batch_norm", "whiten"]
