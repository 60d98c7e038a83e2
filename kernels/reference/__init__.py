"""Every kernel in plain NumPy."""

from .conv import *  # noqa: F403
from .elementwise import *  # noqa: F403
from .fused import *  # noqa: F403
from .ghosts import *  # noqa: F403
from .group_norm import *  # noqa: F403
from .loss import *  # noqa: F403
from .lp import *  # noqa: F403
from .matmul import *  # noqa: F403
from .norm import *  # noqa: F403
from .optim import *  # noqa: F403
from .outer import *  # noqa: F403
from .pool import *  # noqa: F403
from .random import *  # noqa: F403
from .reduce import *  # noqa: F403
from .samples import *  # noqa: F403
from .whitening import *  # noqa: F403
