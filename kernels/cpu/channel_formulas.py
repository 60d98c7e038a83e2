"""What a value becomes by the constants of its channel, and the derivatives: formulas of vectors of
float64, for the loops in samples.py.

Each has ``prepare``, what it wants of two vectors first, in the precision of the array at p;
``value``, y of x, the channel's constants k and that; ``sums``, what a value adds to the gradients
of the constants, g = dy; and ``slope``, dx for constants that stay.
"""

from ..polynomials import exp
from .columns import inlined
from .simd import greater, high, low, narrow, where

__all__ = ["CONSTANTS", "FORMULAS"]

CONSTANTS = 5              # of a channel at most; as many sums


def _nothing(x, z, k, l, p):
    return x, z


def _affine():
    """y = (x − μ) s + t of the constants μ, s, t."""
    def value(x, e, k, one):
        return (x - k[0]) * k[1] + k[2]

    def sums(x, g, e, k, zero, one):
        return g * -k[1], g * (x - k[0]), g, zero, zero

    def slope(x, g, e, k, one):
        return g * k[1]
    return _nothing, value, sums, slope


@inlined
def _gates(e, one):
    """sigmoid(v x) and 1 − sigmoid(v x)."""
    gate = one / (one + e)
    return gate, where(greater(e, one), one - gate, e * gate)


def _gated():
    """y = x sigmoid(v x) s + t of v, s, t; prepared: exp(−v x), which in float32 takes half the
    time and twice as many at once."""
    def prepare(x, z, k, l, p):
        e = exp(narrow(-(x * k[0]), -(z * l[0]), p))
        return low(e), high(e)

    def value(x, e, k, one):
        return x / (one + e) * k[1] + k[2]

    def sums(x, g, e, k, zero, one):
        gate, rest = _gates(e, one)
        z = g * x * gate
        return z * x * rest * k[1], z, g, zero, zero

    def slope(x, g, e, k, one):
        gate, rest = _gates(e, one)
        return g * k[1] * gate * (one + k[0] * x * rest)
    return prepare, value, sums, slope


def _bounded():
    """y = γ x / max(v x + r, c) + β of v, r, c, γ, β; the maximum's slope is that of v x + r where
    this is above c, else that of c."""
    def value(x, e, k, one):
        own = k[0] * x + k[1]
        return x / where(greater(k[2], own), k[2], own) * k[3] + k[4]

    def sums(x, g, e, k, zero, one):
        own = k[0] * x + k[1]
        above = greater(own, k[2])
        d = where(above, own, k[2])
        z = g * (x / d)
        down = z * -k[3] / d
        own = where(above, down, zero)
        return own * x, own, where(above, zero, down), z, g

    def slope(x, g, e, k, one):
        own = k[0] * x + k[1]
        above = greater(own, k[2])
        d = where(above, own, k[2])
        return g * k[3] / d * where(above, k[1] / d, one)
    return _nothing, value, sums, slope


def _inlined(formula):
    return tuple(inlined(f) for f in formula())


FORMULAS = {"affine": _inlined(_affine), "gated": _inlined(_gated), "bounded": _inlined(_bounded)}
