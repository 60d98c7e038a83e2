"""Kernels for CUDA devices, in Numba CUDA; arrays are CuPy's."""

from . import graphs, launch, memory, precision  # noqa: F401
from .conv import *  # noqa: F403
from .elementwise import *  # noqa: F403
from .fused import *  # noqa: F403
from .group_norm import *  # noqa: F403
from .loss import *  # noqa: F403
from .matmul import *  # noqa: F403
from .norm import *  # noqa: F403
from .optim import *  # noqa: F403
from .pool import *  # noqa: F403
from .random import *  # noqa: F403
from .reduce import *  # noqa: F403

# these take halves as such
HALF = {"conv2d", "conv2d_input", "conv2d_weight", "linear", "linear_backward", "matmul"}
