"""Kernels: arrays in, arrays out. Two sets with the same names and signatures.

``reference`` is plain NumPy, one formula per function: the definition and the tests' oracle.
``cpu`` is Numba. Inputs of any strides, zero-size and read-only are taken and never modified; the
memory order of the input is kept, and convolution and pooling produce channels-last memory under an
NCHW shape. Nothing here knows of Tensors. Shapes and settings have been checked by ``nbgrad.ops``.
"""
