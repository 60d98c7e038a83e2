"""Arithmetic, functions, comparisons and logic."""

import functools

import nbgrad as nb


def _all(f):
    """A function of two tensors as one of any number."""
    return lambda *xs: functools.reduce(f, xs)


def div(a, b):
    """Integers are divided towards 0."""
    return a / b if a.dtype.kind == "f" else nb.div(a, b, rounding_mode="trunc")


def clip(x, min=None, max=None):
    return x if min is None and max is None else nb.clamp(x, min, max)


def mod(a, b, *, fmod=0):
    """fmod: with the sign of a, else with that of b."""
    return a - b * nb.div(a, b, rounding_mode="trunc") if fmod else nb.remainder(a, b)


def isinf(x, *, detect_negative=1, detect_positive=1):
    found = nb.isinf(x)
    return found & ((x < 0) & bool(detect_negative) | (x > 0) & bool(detect_positive))


def sinh(x):
    e = nb.expm1(x)
    return (e + e / (e + 1)) / 2


def shrink(x, *, bias=0.0, lambd=0.5):
    return nb.where(x < -lambd, x + bias, nb.where(x > lambd, x - bias, x * 0))


ARITHMETIC = {
    "Abs": nb.abs, "Add": nb.add, "Ceil": nb.ceil, "Clip": clip, "Cos": nb.cos, "Div": div,
    "Erf": nb.erf, "Exp": nb.exp, "Floor": nb.floor, "Log": nb.log, "Max": _all(nb.maximum),
    "Min": _all(nb.minimum), "Mod": mod, "Mul": nb.mul, "Neg": nb.neg,
    "Pow": lambda a, b: nb.pow(a, b).to(a.dtype), "Reciprocal": nb.reciprocal, "Round": nb.round,
    "Sign": nb.sign, "Sin": nb.sin, "Sqrt": nb.sqrt, "Sub": nb.sub, "Sum": _all(nb.add),
    "Where": nb.where,
}

COMPOSED = {
    "Cosh": lambda x: (nb.exp(x) + nb.exp(-x)) / 2,
    "Mean": lambda *xs: functools.reduce(nb.add, xs) / len(xs),
    "Shrink": shrink,
    "Sinh": sinh,
    "Tan": lambda x: nb.sin(x) / nb.cos(x),
}

LOGIC = {
    "And": nb.logical_and, "Or": nb.logical_or, "Xor": nb.logical_xor, "Not": nb.logical_not,
    "BitwiseAnd": nb.bitwise_and, "BitwiseOr": nb.bitwise_or, "BitwiseXor": nb.bitwise_xor,
    "BitwiseNot": nb.bitwise_not, "Equal": nb.eq, "Greater": nb.gt, "GreaterOrEqual": nb.ge,
    "Less": nb.lt, "LessOrEqual": nb.le, "IsInf": isinf, "IsNaN": nb.isnan,
}
