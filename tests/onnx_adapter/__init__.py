"""ONNX operators as functions on nbgrad's Tensors, to run ONNX's own test vectors.

A function of the table takes the node's inputs (None where one is left out) and its attributes by
name, and returns a Tensor or a tuple of at least as many outputs as the node has. ``outputs``,
where it takes that, is how many are wanted. ``Unsupported`` says what nbgrad does not have.
"""

from . import elementwise, layers, norms, reduce, shape, windows
from .tools import Unsupported

__all__ = ["COMPOSED", "GROUPS", "OPERATORS", "Unsupported"]

GROUPS = {
    "normalization": norms.NORMS,
    "convolution, products": windows.CONVOLUTIONS | layers.PRODUCTS,
    "pooling": windows.POOLS,
    "activations": layers.ACTIVATIONS | layers.COMPOSED_ACTIVATIONS,
    "softmax, losses": layers.LOSSES,
    "optimizers, dropout": layers.TRAINING,
    "elementwise": elementwise.ARITHMETIC | elementwise.COMPOSED,
    "comparisons, logic": elementwise.LOGIC,
    "reductions": reduce.REDUCTIONS,
    "shape, indexing, making": shape.SHAPES,
}
OPERATORS = {name: f for group in GROUPS.values() for name, f in group.items()}
COMPOSED = {**layers.COMPOSED_ACTIVATIONS, **elementwise.COMPOSED}
