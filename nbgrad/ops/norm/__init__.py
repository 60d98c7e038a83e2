"""Normalization. Each norm is one fused op, and so is each backward, whose own gradient is recorded
from elementary ops that recompute the statistics from x: exact at every order."""

from nbgrad.ops.norm.batch import (  # beyond __all__: what fused ops are made of
    backward_of_batch as backward_of_batch,
    batch_norm,
    check_batch as check_batch,
    data as data,
    moving as moving,
)
from nbgrad.ops.norm.group import group_norm, instance_norm
from nbgrad.ops.norm.layer import layer_norm
from nbgrad.ops.norm.local import local_response_norm, normalize
from nbgrad.ops.norm.rms import rms_norm
from nbgrad.ops.norm.weighted import weighted_batch_norm

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "local_response_norm",
           "normalize", "rms_norm", "weighted_batch_norm"]
