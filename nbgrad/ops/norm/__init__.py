"""Normalization. Each norm is one fused op, and so is each backward, whose own gradient is recorded
from elementary ops that recompute the statistics from x: exact at every order."""

from nbgrad.ops.norm.batch import (  # beyond __all__ = ["at_least", "batch_norm", "center", "channel_dot", "channel_rms", "channel_std",
           "divide_channels", "evonorm_b0", "evonorm_s0", "filter_response_norm",
           "global_response_norm", "group_norm", "instance_norm", "inverse_sqrt", "layer_norm",
           "local_response_norm", "lp_deviation", "normalize", "rms_norm", "switchable_norm",
           "weight_norm", "weight_standardization", "weighted_batch_norm", "whiten"]
