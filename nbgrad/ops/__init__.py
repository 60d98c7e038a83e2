"""Every op, under PyTorch's names. ``nbgrad.autograd.OPS`` is the registry."""

from nbgrad.ops import (  # the modules by other names: `matmul` and `norm` below are the functions
    channels as _channels,
    conv as _conv,
    creation as _creation,
    elementwise as _elementwise,
    fused as _fused,
    indexing as _indexing,
    inplace as _inplace,
    joining as _joining,
    loss as _loss,
    lp_norm as _lp_norm,
    matmul as _matmul,
    moments as _moments,
    norm as _norm,
    pool as _pool,
    random as _random,
    reduce as _reduce,
    response_norm as _response_norm,
    selection as _selection,
    shape as _shape,
    switchable_norm as _switchable_norm,
    weight_norm as _weight_norm,
    weighted_norm as _weighted_norm,
    whitening as _whitening,
)
from nbgrad.ops.channels import *  # noqa: F403
from nbgrad.ops.conv import *  # noqa: F403
from nbgrad.ops.creation import *  # noqa: F403
from nbgrad.ops.elementwise import *  # noqa: F403
from nbgrad.ops.fused import *  # noqa: F403
from nbgrad.ops.indexing import *  # noqa: F403
from nbgrad.ops.joining import *  # noqa: F403
from nbgrad.ops.loss import *  # noqa: F403
from nbgrad.ops.lp_norm import *  # noqa: F403
from nbgrad.ops.matmul import *  # noqa: F403
from nbgrad.ops.moments import *  # noqa: F403
from nbgrad.ops.norm import *  # noqa: F403
from nbgrad.ops.pool import *  # noqa: F403
from nbgrad.ops.random import *  # noqa: F403
from nbgrad.ops.reduce import *  # noqa: F403
from nbgrad.ops.response_norm import *  # noqa: F403
from nbgrad.ops.selection import *  # noqa: F403
from nbgrad.ops.shape import *  # noqa: F403
from nbgrad.ops.switchable_norm import *  # noqa: F403
from nbgrad.ops.weight_norm import *  # noqa: F403
from nbgrad.ops.weighted_norm import *  # noqa: F403
from nbgrad.ops.whitening import *  # noqa: F403

_FILES = (_conv, _creation, _elementwise, _fused, _indexing, _inplace, _joining, _loss, _matmul,
          _moments, _norm, _pool, _random, _reduce, _selection, _shape, _weighted_norm, _channels,
          _lp_norm, _response_norm, _switchable_norm, _weight_norm, _whitening)

__all__ = [name for module in _FILES for name in module.__all__]
