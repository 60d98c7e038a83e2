"""The engine: Tensor, Op, Node, backward. To study it, read in this order:

1. ``tensors``    Tensor: an array, and the Node that it was computed by
2. ``recording``  Op: runs a function and records a Node (``node``) where a gradient is wanted
                  (``mode``); arguments of several dtypes get one (``promotion``, ``arrays``)
3. ``engine``     backward: carries cotangents from node to node
4. ``gradients``  what starts it: ``Tensor.backward``, ``grad``, and ``composition`` for fused ops
5. ``saved``      what a node's vjp keeps alive, and what is made again instead
6. ``versions``   in-place writes are counted, so that an overwritten value is refused
7. ``inplace``    those writes; ``operators``: Python's operators and NumPy's functions
"""

from . import inplace as inplace, operators as operators  # they add to Tensor
from .arrays import checked_dtype as checked_dtype
from .gradients import composition, grad
from .mode import enable_grad, is_grad_enabled, no_grad, set_grad_enabled
from .node import OPS, Node, Part as Part
from .promotion import constant as constant, promoted
from .recording import Op, op, transient as transient
from .saved import Remade as Remade, kept as kept, saved_tensors as saved_tensors
from .tensors import Tensor, as_tensor, tensor
from .versions import bump

__all__ = ["OPS", "Node", "Op", "Tensor", "as_tensor", "bump", "composition", "enable_grad", "grad",
           "is_grad_enabled", "no_grad", "op", "promoted", "set_grad_enabled", "tensor"]
