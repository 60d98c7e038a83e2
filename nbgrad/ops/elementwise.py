"""Elementwise ops: arithmetic with broadcasting, functions, comparisons.

The engine sums a gradient to its input's shape, so the rules here are plain calculus.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nbgrad.autograd import OPS, Op, Tensor, as_tensor, op, promoted
from nbgrad.backend import constant, kernels, several

_BOOL = np.dtype(np.bool_)


def _same(dy: Tensor) -> Tensor:
    return dy


def _neg(dy: Tensor) -> Any:
    return neg(dy)


def real(x: Tensor) -> Any:
    """x's array, integers as float32, as PyTorch's float functions take them."""
    return x.data if x.data.dtype.kind in "fV" else x.data.astype(np.float32)


# --------------------------------------------------------------------------------------- arithmetic

@op(promote=True)
def add(a: Tensor, b: Tensor, /, alpha: Any = 1) -> Any:
    """y = a + α b.   ∂a = ∂y,   ∂b = α ∂y.   Broadcasts."""
    if alpha == 1:
        return kernels(a).add(a.data, b.data), (_same, _same)
    return kernels(a).add(a.data, _times(b, alpha)), (_same, lambda dy: dy * alpha)


@op(promote=True)
def sub(a: Tensor, b: Tensor, /, alpha: Any = 1) -> Any:
    """y = a − α b.   ∂a = ∂y,   ∂b = −α ∂y.   Broadcasts. Raises RuntimeError for two bools."""
    if a.data.dtype is _BOOL:
        raise RuntimeError("sub: Subtraction, the `-` operator, with two bool tensors is not "
                           "supported; use `^`, or `~` to invert a mask")
    if alpha == 1:
        return kernels(a).sub(a.data, b.data), (_same, _neg)
    return kernels(a).sub(a.data, _times(b, alpha)), (_same, lambda dy: dy * -alpha)


def _times(b: Tensor, alpha: Any) -> Any:
    if b.dtype.kind not in "fV" and isinstance(alpha, float):
        raise TypeError(f"add, sub: integer tensors need an integer alpha, got {alpha}")
    return kernels(b).mul(b.data, constant(alpha, b.dtype, b.data))


@op
def neg(x: Tensor, /) -> Any:
    """y = −x.   ∂x = −∂y."""
    return kernels(x).neg(x.data), (_neg,)


@op(promote=True)
def mul(a: Tensor, b: Tensor, /) -> Any:
    """y = a b.   ∂a = ∂y b,   ∂b = ∂y a.   Broadcasts."""
    return kernels(a).mul(a.data, b.data), (lambda dy: mul(dy, b), lambda dy: mul(dy, a))


@op(promote=True)
def div(a: Tensor, b: Tensor, /, rounding_mode: str | None = None) -> Any:
    """y = a / b.   ∂a = ∂y / b,   ∂b = −∂y a / b².   Broadcasts; integers give float32.

    Rounded towards 0 by "trunc", down by "floor": integers stay integers, and ∂a = ∂b = 0."""
    if rounding_mode is not None:
        return _rounded(a.data, b.data, rounding_mode), (_nothing, _nothing)
    return (kernels(a).div(real(a), real(b)),
            (lambda dy: div(dy, b), lambda dy: _by_divisor(dy, a, b)))


def _by_divisor(dy: Tensor, a: Tensor, b: Tensor) -> Any:
    """−∂y a / b², summed to b's shape before the last division: that of a length by which rows are
    divided is as small as they are many."""
    t = mul(dy, div(a, b))
    return div(t if t.shape == b.shape else OPS["sum_to"](t, shape=b.shape), neg(b))


def _rounded(a: Any, b: Any, mode: str) -> Any:
    if mode not in ("trunc", "floor"):
        raise RuntimeError("div expected rounding_mode to be one of None, 'trunc', or 'floor' but "
                           f"found {mode!r}")
    if mode == "trunc" and a.dtype.kind in "fV":
        with np.errstate(all="ignore"):
            return np.trunc(a / b)
    down = _divided(np.floor_divide)(a, b)
    return down if mode == "floor" else down + ((a < 0) != (b < 0)) * (down * b != a)


def _nothing(dy: Tensor) -> Any:
    return mask(dy, keep=False)


@op(promote=True)
def pow(a: Tensor, b: Tensor, /) -> Any:
    """y = a^b.   ∂a = ∂y b a^(b−1),   ∂b = ∂y a^b log a, 0 where a = 0.   Broadcasts."""
    if a.dtype.kind in "iu" and (b.data < 0).any():
        raise ValueError("pow: integers to negative integer powers are not allowed")
    square_ = b.data.ndim == 0 and b.data == 2
    y = kernels(a).square(a.data) if square_ else kernels(a).pow(a.data, b.data)
    return y, (lambda dy: dy * (b * pow(a, where(b == 0, 1, b) - 1)),
               lambda dy: dy * (pow(a, b) * log(where(a == 0, 1, a))))


@op(promote=True)
def maximum(a: Tensor, b: Tensor, /) -> Any:
    """y = max(a, b), NaN if either is.   ∂y goes to the larger, half to each at a tie."""
    return (kernels(a).maximum(a.data, b.data),
            (lambda dy: _share(dy, a, b), lambda dy: _share(dy, b, a)))


@op(promote=True)
def minimum(a: Tensor, b: Tensor, /) -> Any:
    """y = min(a, b), NaN if either is.   ∂y goes to the smaller, half to each at a tie."""
    return (kernels(a).minimum(a.data, b.data),
            (lambda dy: _share(dy, b, a, a), lambda dy: _share(dy, a, b, b)))


def _share(dy: Tensor, large: Tensor, small: Tensor, winner: Tensor | None = None) -> Tensor:
    won = (large.data > small.data) + 0.5 * (large.data == small.data)
    return dy * as_tensor(won.astype(dy.dtype))


# ---------------------------------------------------------------------------------------- functions

def _function(name: str, slope: Callable[..., Tensor], keeps: str, doc: str) -> Op:
    """y = f(x) with ∂x = ∂y f'; ``slope(dy, k)`` is that product, k what is kept: "x" or "y"."""
    if keeps == "y":
        def fn(x: Tensor, /) -> Any:
            return getattr(kernels(x), name)(real(x)), (slope,)
    else:
        def fn(x: Tensor, /) -> Any:
            return getattr(kernels(x), name)(real(x)), (lambda dy: slope(dy, x),)
    fn.__doc__, fn.__module__ = doc, __name__
    return Op(fn, name, saves_output=keeps == "y")


exp = _function("exp", lambda dy, y: dy * y, "y", "y = e^x.   ∂x = ∂y y.")
log = _function("log", lambda dy, x: dy / x, "x", "y = log x.   ∂x = ∂y / x.")
log1p = _function("log1p", lambda dy, x: dy / (x + 1), "x", "y = log(1 + x).   ∂x = ∂y / (1 + x).")
expm1 = _function("expm1", lambda dy, y: dy * (y + 1), "y", "y = e^x − 1.   ∂x = ∂y (y + 1).")
sqrt = _function("sqrt", lambda dy, y: dy / (y * 2), "y", "y = √x.   ∂x = ∂y / 2y.")
rsqrt = _function("rsqrt", lambda dy, y: dy * (y * y * y * -0.5), "y", "y = 1/√x.   ∂x = −∂y y³/2.")
square = _function("square", lambda dy, x: dy * (x * 2), "x", "y = x².   ∂x = 2 ∂y x.")
reciprocal = _function("reciprocal", lambda dy, y: neg(dy * (y * y)), "y",
                       "y = 1/x.   ∂x = −∂y y².")
sin = _function("sin", lambda dy, x: dy * cos(x), "x", "y = sin x.   ∂x = ∂y cos x.")
cos: Op = _function("cos", lambda dy, x: neg(dy * sin(x)), "x", "y = cos x.   ∂x = −∂y sin x.")
erf = _function("erf", lambda dy, x: dy * (exp(neg(x * x)) * (2 / math.sqrt(math.pi))), "x",
                "y = erf x.   ∂x = ∂y 2/√π e^−x².")


@op
def abs(x: Tensor, /) -> Any:
    """y = |x|.   ∂x = ∂y sign x, 0 at 0."""
    return kernels(x).abs(x.data), (lambda dy: dy * sign(x),)


def _step(name: str, doc: str) -> Op:
    """A function whose derivative is 0 wherever it exists."""
    def fn(x: Tensor, /) -> Any:
        return getattr(kernels(x), name)(x.data), (lambda dy: dy * 0,)
    fn.__doc__, fn.__module__ = doc, __name__
    return Op(fn, name)


sign = _step("sign", "y = −1, 0 or 1, NaN of NaN (PyTorch: 0).   ∂x = 0.")
floor = _step("floor", "y = ⌊x⌋.   ∂x = 0.")
ceil = _step("ceil", "y = ⌈x⌉.   ∂x = 0.")
trunc = _step("trunc", "y = x without its fraction.   ∂x = 0.")


@op
def round(x: Tensor, /, *, decimals: int = 0) -> Any:
    """y = x rounded to so many decimals, half to even.   ∂x = 0."""
    if not isinstance(decimals, int):
        raise TypeError(f"round: expected decimals to be an int, got {decimals!r}")
    y = np.round(x.data, decimals) if decimals else kernels(x).round(x.data)
    return y, (_nothing,)


@op(name="clamp", method=False)
def _clamp(x: Tensor, min: Tensor | None = None, max: Tensor | None = None, /) -> Any:
    low: Any = -math.inf if min is None else min.data
    high: Any = math.inf if max is None else max.data
    y = np.clip(x.data, None if min is None else low, None if max is None else high)
    return y, (lambda dy: mask(dy, (x.data >= low) & (x.data <= high)),
               lambda dy: mask(dy, (x.data < low) & (low < high)),
               lambda dy: mask(dy, (x.data > high) | (low > high)))


def clamp(input: Tensor, min: Any = None, max: Any = None) -> Any:
    """y = min(max(x, low), high).   ∂y goes to x in the bounds and on them, else to the bound."""
    if min is None and max is None:
        raise ValueError("clamp: at least one of min or max must be given")
    input, *bounds = _clamp._convert((input, min, max))  # type: ignore[assignment]
    for bound in bounds:
        input = input if bound is None else promoted(input, bound)[0]
    return _clamp(input, *[bound if bound is None else bound.to(input.dtype) for bound in bounds])


@op(name="where", method=False)
def _where(a: Tensor, b: Tensor, /, condition: Any) -> Any:
    return (np.where(condition, a.data, b.data),
            (lambda dy: mask(dy, condition), lambda dy: mask(dy, ~condition)))


@op(method=False)
def mask(x: Tensor, /, keep: Any) -> Any:
    """y = x where keep, 0 elsewhere (also where x is NaN or inf).   ∂x = the same of ∂y."""
    return np.where(keep, x.data, x.dtype.type(0)), (lambda dy: mask(dy, keep),)


def where(condition: Any, input: Any, other: Any) -> Any:
    """input where condition, other elsewhere.   ∂y goes to the one that was taken.   Broadcasts."""
    condition = as_tensor(condition)
    if condition.dtype != np.bool_:
        raise TypeError(f"where: expected condition to be a boolean tensor, got {condition.dtype}")
    if not isinstance(input, Tensor) and not isinstance(other, Tensor):
        input = as_tensor(input)
    a, b = _where._convert((input, other))
    if a is None or b is None:
        raise TypeError("where: expected two Tensors, arrays or numbers, got None")
    if several:
        condition, a, b = _where._on_one_device((condition, a, b)) or (condition, a, b)
    return _where(*promoted(a, b), condition=condition.data)


# ---------------------------------------------------------------------------- comparisons and logic

def _compare(name: str, ufunc: Any, **options: bool) -> Op:
    def fn(a: Tensor, b: Tensor, /) -> Any:
        return ufunc(a.data, b.data), None
    fn.__doc__, fn.__module__ = f"{ufunc.__name__}, elementwise; not differentiated.", __name__
    return Op(fn, name, **options)


eq, ne = _compare("eq", np.equal), _compare("ne", np.not_equal)
lt, le = _compare("lt", np.less), _compare("le", np.less_equal)
gt, ge = _compare("gt", np.greater), _compare("ge", np.greater_equal)
logical_and = _compare("logical_and", np.logical_and)
logical_or = _compare("logical_or", np.logical_or)
logical_xor = _compare("logical_xor", np.logical_xor)
bitwise_and = _compare("bitwise_and", np.bitwise_and, promote=True)
bitwise_or = _compare("bitwise_or", np.bitwise_or, promote=True)
bitwise_xor = _compare("bitwise_xor", np.bitwise_xor, promote=True)


def _divided(ufunc: Any) -> Any:
    def f(a: Any, b: Any) -> Any:
        if np.result_type(a, b).kind not in "fV" and not np.all(b):
            raise ZeroDivisionError(f"{ufunc.__name__}: integer division by zero")
        with np.errstate(all="ignore"):
            return ufunc(a, b)
    f.__name__ = ufunc.__name__
    return f


floor_divide = _compare("floor_divide", _divided(np.floor_divide), promote=True)
remainder = _compare("remainder", _divided(np.remainder), promote=True)


def _test(name: str, ufunc: Any) -> Op:
    def fn(x: Tensor, /) -> Any:
        return ufunc(x.data), None
    fn.__doc__, fn.__module__ = f"{ufunc.__name__}, elementwise; not differentiated.", __name__
    return Op(fn, name)


logical_not = _test("logical_not", np.logical_not)
bitwise_not = _test("bitwise_not", np.bitwise_not)
isnan, isinf = _test("isnan", np.isnan), _test("isinf", np.isinf)
isfinite = _test("isfinite", np.isfinite)

def _where_method(self: Tensor, condition: Any, other: Any) -> Any:
    """self where condition, other elsewhere."""
    return where(condition, self, other)


for _name, _f in {"clamp": clamp, "where": _where_method}.items():
    setattr(Tensor, _name, _f)

__all__ = ["abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "clamp",
           "cos", "div", "eq", "erf", "exp", "expm1", "floor", "floor_divide", "ge", "gt",
           "isfinite", "isinf", "isnan", "le", "log", "log1p", "logical_and", "logical_not",
           "logical_or", "logical_xor", "lt", "maximum", "minimum", "mul", "ne", "neg", "pow",
           "reciprocal", "remainder", "round", "rsqrt", "sign", "sin", "sqrt", "square", "sub",
           "trunc", "where"]
