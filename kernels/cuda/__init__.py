"""Kernels for CUDA devices, in Numba CUDA; arrays are CuPy's."""

from ..reference.lp import *  # noqa: F403
from ..reference.outer import *  # noqa: F403
from ..reference.samples import *  # noqa: F403
from ..reference.whitening import *  # noqa: F403
from . import graphs, indices, launch, memory, precision  # noqa: F401
from .conv import *  # noqa: F403
from .elementwise import *  # noqa: F403
from .fused import *  # noqa: F403
from .ghosts import *  # noqa: F403
from .group_norm import *  # noqa: F403
from .loss import *  # noqa: F403
from .matmul import *  # noqa: F403
from .norm import *  # noqa: F403
from .optim import *  # noqa: F403
from .pool import *  # noqa: F403
from .random import *  # noqa: F403
from .reduce import *  # noqa: F403

# what takes halves as such
HALF = {"batch_norm", "batch_norm_backward", "batch_norm_backward_elemt",
        "batch_norm_backward_reduce", "batch_norm_elemt", "batch_norm_stats", "batch_norm_update",
        "conv2d", "conv2d_input", "conv2d_weight", "ghost_batch_norm",
        "ghost_batch_norm_backward", "group_norm", "group_norm_backward",
        "layer_norm", "layer_norm_backward", "linear", "linear_backward", "matmul", "rms_norm",
        "rms_norm_backward"}
