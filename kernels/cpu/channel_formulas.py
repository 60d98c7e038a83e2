"""What a value becomes by the constants of its channel, and the derivatives: formulas of numbers or
vectors in float64, for the loops in samples.py.

Each has ``value``, y of x and the channel's constants k; ``sums``, what a value adds to the
gradients of the constants, g = dy; and ``slope``, dx for constants that stay. p points to x.
"""

from ..polynomials import exp
from .columns import inlined
from .simd import greater, low, narrow, where

__all__ = ["CONSTANTS", "FORMULAS"]

CONSTANTS = 5              # of a channel at most; as many sums


@inlined
def _sigmoid(x, p, zero, one):
    """sigmoid(x) and 1 − sigmoid(x), with exp(−x) in the dtype of the array at p: of float32 that
    takes half the time."""
    e = low(exp(narrow(-x, zero, p)))
    gate = one / (one + e)
    return gate, where(greater(e, one), one - gate, e * gate)


def _affine():
    """y = (x − μ) s + t of the constants μ, s, t."""
    def value(x, k, p, zero, one):
        return (x - k[0]) * k[1] + k[2]

    def sums(x, g, k, p, zero, one):
        return g * -k[1], g * (x - k[0]), g, zero, zero

    def slope(x, g, k, p, zero, one):
        return g * k[1]
    return value, sums, slope


def _gated():
    """y = x sigmoid(v x) s + t of v, s, t."""
    def value(x, k, p, zero, one):
        return x * _sigmoid(k[0] * x, p, zero, one)[0] * k[1] + k[2]

    def sums(x, g, k, p, zero, one):
        gate, rest = _sigmoid(k[0] * x, p, zero, one)
        z = g * x * gate
        return z * x * rest * k[1], z, g, zero, zero

    def slope(x, g, k, p, zero, one):
        gate, rest = _sigmoid(k[0] * x, p, zero, one)
        return g * k[1] * gate * (one + k[0] * x * rest)
    return value, sums, slope


def _bounded():
    """y = γ x / max(v x + r, c) + β of v, r, c, γ, β; the maximum's slope is that of v x + r where
    this is above c, else that of c."""
    def value(x, k, p, zero, one):
        own = k[0] * x + k[1]
        return x / where(greater(k[2], own), k[2], own) * k[3] + k[4]

    def sums(x, g, k, p, zero, one):
        own = k[0] * x + k[1]
        above = greater(own, k[2])
        d = where(above, own, k[2])
        z = g * (x / d)
        down = z * -k[3] / d
        own = where(above, down, zero)
        return own * x, own, where(above, zero, down), z, g

    def slope(x, g, k, p, zero, one):
        own = k[0] * x + k[1]
        above = greater(own, k[2])
        d = where(above, own, k[2])
        return g * k[3] / d * where(above, k[1] / d, one)
    return value, sums, slope


def _inlined(formula):
    return tuple(inlined(f) for f in formula())


FORMULAS = {"affine": _inlined(_affine), "gated": _inlined(_gated), "bounded": _inlined(_bounded)}
