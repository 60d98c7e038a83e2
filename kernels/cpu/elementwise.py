"""Elementwise kernels. NumPy's own vector loops serve small arrays and single functions; large
same-shape arithmetic and every composite formula is one fused pass, parallel when large.
"""

import math
from functools import cache

import numpy as np

from .. import formulas
from ..quiet import quiet, silent
from . import memory
from .jit import device, get_num_threads
from .simd import PAST_BYTES, VECTOR, lanes, load, load_part, put, splat, store_part
from .tasks import share, tasks

# The pool costs 5 to 10 us an array: 30 % of a ufunc's time at 1 MB, nothing at 8 MB, and from
# 32 MB, where malloc hands out fresh pages, it saves half.
POOLED_BYTES = 1 << 22
# Two threads beat a ufunc from here (float32: 0.5 MB in 13 us against 14, 1 MB in 22 against 30).
SHARED_BYTES = 1 << 19
SPREAD_BYTES = 1 << 18       # a broadcast operand: a ufunc starts anew in each row
BLOCK = 1 << 14              # elements of a task: 64 KB of float32


def flat(x):
    """x's elements in memory order, as one axis: a view of a dense array, a copy of any other."""
    return x.reshape(-1) if x.flags.c_contiguous else x.ravel(order="K")


def _empty_like(x):
    if x.nbytes < memory.SMALLEST:
        return np.empty_like(x)
    return memory.empty(x.shape, x.dtype) if x.flags.c_contiguous else memory.empty_like(x)


def _alike(x, like):
    """x with the memory order of ``like``."""
    if x.strides == like.strides:
        return x
    out = memory.empty_like(like, x.dtype)
    out[...] = x
    return out


def _dense(x):
    """x if its elements fill its memory, in whatever order; else a copy that does."""
    return x if x.flags.c_contiguous or x.T.flags.c_contiguous or _permuted(x) else x.copy()


def _permuted(x):
    if 0 in x.strides or min(x.strides) < 0:
        return False
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    return x.transpose(order).flags.c_contiguous


@cache
def _loop(name, dtype, arrays):
    """The kernel ``out[i] = formula(a[i], …, p, …)`` for so many arrays, and numbers p."""
    f = getattr(formulas, name)
    if name not in _PLAIN:
        f = f(dtype.type)

    @device
    def task(t, a, out, past, p):
        W, first, last = lanes(a), t * BLOCK, min(a.size, t * BLOCK + BLOCK)
        whole = first + (last - first) // W * W
        for i in range(first, whole, W):
            put(out, i, f(load(a, i), *p), past)
        if whole < last:
            n = last - whole
            store_part(out, whole, f(load_part(a, whole, n), *p), n)

    @device
    def task2(t, a, b, out, past, p):
        W, first, last = lanes(a), t * BLOCK, min(a.size, t * BLOCK + BLOCK)
        whole = first + (last - first) // W * W
        for i in range(first, whole, W):
            put(out, i, f(load(a, i), load(b, i), *p), past)
        if whole < last:
            n = last - whole
            store_part(out, whole, f(load_part(a, whole, n), load_part(b, whole, n), *p), n)

    def one(run, a, out, past, *p):
        share(task, (a.size + BLOCK - 1) // BLOCK, run, (a, out, past, p))

    def two(run, a, b, out, past, *p):
        share(task2, (a.size + BLOCK - 1) // BLOCK, run, (a, b, out, past, p))

    return tasks(one if arrays == 1 else two, name=f"{name}_{dtype.name}")


_BINARY = {"add", "sub", "mul", "div"}
_PLAIN = _BINARY | {"exp", "tanh"}            # no constants of a dtype
# What takes no longer than moving the bytes; the others take about four times as long.
_LIGHT = _BINARY | {"relu", "relu_backward", "leaky_relu", "leaky_relu_backward",
                    "sigmoid_backward", "tanh_backward"}


def _run(name, x, *more, numbers=()):
    if not x.flags.c_contiguous:
        x = _dense(x)
    out, nbytes, dtype = _empty_like(x), x.nbytes, x.dtype
    arrays = [x.reshape(-1), out.reshape(-1)] if x.flags.c_contiguous else [flat(x), flat(out)]
    if more:
        y, = more
        if y.strides == x.strides and x.flags.c_contiguous:
            arrays.insert(1, y.reshape(-1))
        else:
            arrays.insert(1, flat(y if y.strides == x.strides else _alike(y, x)))
    if numbers:
        numbers = map(dtype.type, numbers)
    loop = _loop(name, dtype, 1 + len(more))
    if nbytes < memory.SMALLEST:
        loop.serial(*arrays, False, *numbers)
    else:
        loop(*arrays, nbytes > PAST_BYTES, *numbers, work=nbytes * (3 if name in _LIGHT else 8))
    return out


@cache
def _row_loop(name, dtype):
    """The kernel ``out[a, m, c] = formula(x[a, m, c], b[a, c])`` of x (A, M, C); b (A, C or 1)."""
    f = getattr(formulas, name)

    @device
    def row(x, i, b, j, C, out, past):
        W, spread = lanes(x), b.shape[1] == 1
        whole, v = C // W * W, splat(b[j // b.shape[1], 0])
        for c in range(0, whole, W):
            put(out, i + c, f(load(x, i + c), v if spread else load(b, j + c)), past)
        if whole < C:
            n = C - whole
            v = v if spread else load_part(b, j + whole, n)
            store_part(out, i + whole, f(load_part(x, i + whole, n), v), n)

    @device
    def task(t, x, b, out, block, past):
        A, M, C = x.shape
        for r in range(t * block, min(A * M, t * block + block)):
            row(x, r * C, b, r // M * b.shape[1], C, out, past)

    def rows(run, x, b, out, block, past):
        share(task, (x.shape[0] * x.shape[1] + block - 1) // block, run, (x, b, out, block, past))

    return tasks(rows, name=f"{name}_rows_{dtype.name}")


def _rows(name, x, b):
    """formula(x, b) where b is broadcast to the dense x; None where a copy of b would be large."""
    order = sorted(range(x.ndim), key=lambda i: (-x.strides[i], i))
    t, s = x.transpose(order), np.broadcast_to(b, x.shape).transpose(order)
    kept = [i for i in range(t.ndim) if t.shape[i] > 1]
    t, s = (v.reshape([t.shape[i] for i in kept]) if v is t else
            v[tuple(slice(None) if i in kept else 0 for i in range(v.ndim))] for v in (t, s))
    inner = t.ndim
    same = s.strides[-1] == 0
    while inner and (s.strides[inner - 1] == 0) == same:
        inner -= 1
    outer = inner
    while not same and outer and s.strides[outer - 1] == 0:
        outer -= 1
    s = s[(slice(None),) * outer + (0,) * (inner - outer) + ((0,) * (t.ndim - inner) if same
                                                             else ())]
    A, M = math.prod(t.shape[:outer]), math.prod(t.shape[outer:inner])
    if 4 * s.size > t.size:
        return None
    C, out = t.size // (A * M), _empty_like(x)
    past = x.nbytes > PAST_BYTES and C * x.itemsize % VECTOR == 0
    _row_loop(name, x.dtype)(t.reshape(A, M, C), np.ascontiguousarray(s).reshape(A, -1),
                             out.transpose(order).reshape(A, M, C), max(1, BLOCK // C), past,
                             work=3 * x.nbytes)
    return out


def _arithmetic(name, ufunc):
    def run(a, b):
        if a.nbytes < SPREAD_BYTES > b.nbytes or (a.nbytes < SHARED_BYTES and a.shape == b.shape):
            return silent().run(ufunc, a, b)
        if a.strides != b.strides or a.shape != b.shape or a.dtype != b.dtype or (
                a.dtype.kind != "f"):
            return silent().run(_broadcast, name, ufunc, a, b)
        if (get_num_threads() > 1 or a.nbytes > PAST_BYTES) and (
                a.flags.c_contiguous or _permuted(a)):
            return _run(name, a, b)
        return silent().run(_into, ufunc, a, a, b)
    run.__name__, run.__doc__ = name, f"Elementwise {name} with broadcasting."
    return run


def _into(ufunc, like, *arrays):
    """The ufunc of arrays, in the memory order of ``like``; a large result is from the pool."""
    if like.nbytes < POOLED_BYTES:
        return ufunc(*arrays)
    return ufunc(*arrays, out=_empty_like(like))


def _broadcast(name, ufunc, a, b):
    """Where a and b differ in shape, dtype or memory order; the pool's part as in ``_into``."""
    if a.shape != b.shape and a.dtype == b.dtype and a.dtype.kind == "f" and a.size and b.size:
        x, s = (b, a) if name in ("add", "mul") and b.size > a.size else (a, b)
        if (x.flags.c_contiguous or _permuted(x)) and x.shape == np.broadcast_shapes(
                x.shape, s.shape):
            y = _run(name, x, numbers=(s.reshape(())[()],)) if s.size == 1 else _rows(name, x, s)
            if y is not None:
                return y
    if a.shape == b.shape or a.dtype != b.dtype or a.dtype.kind != "f":
        return ufunc(a, b)
    shape = np.broadcast_shapes(a.shape, b.shape)
    like = a if a.shape == shape else b if b.shape == shape else None
    if like is None:
        return ufunc(a, b, out=memory.empty(shape, a.dtype))
    return _into(ufunc, like, a, b)


def _pooled(ufunc):
    """A NumPy function of one array; a large result is from the pool."""
    def run(x):
        if x.nbytes < POOLED_BYTES or x.dtype.kind != "f":
            return silent().run(ufunc, x)
        return silent().run(_into, ufunc, x, x)
    run.__name__, run.__doc__ = ufunc.__name__, f"Elementwise {ufunc.__name__}."
    return run


add, sub = _arithmetic("add", np.add), _arithmetic("sub", np.subtract)
mul = _arithmetic("mul", np.multiply)
div, pow = _arithmetic("div", np.divide), quiet(np.power)
neg, abs, sign = np.negative, np.abs, np.sign
floor, ceil, round, trunc = np.floor, np.ceil, np.rint, np.trunc
maximum, minimum = np.maximum, np.minimum
log, log1p, expm1 = map(_pooled, (np.log, np.log1p, np.expm1))
sqrt, square, reciprocal = map(_pooled, (np.sqrt, np.square, np.reciprocal))
sin, cos = map(_pooled, (np.sin, np.cos))


@quiet
def rsqrt(x):
    """1 / √x."""
    y = np.sqrt(x, out=memory.empty_like(x))
    return np.reciprocal(y, out=y)


def _named(run, name):
    run.__name__, run.__doc__ = name, f"{name}: one pass; the formula is formulas.{name}."
    return run


def _fused(name):
    serial = {}

    def run(x):
        if x.nbytes >= memory.SMALLEST or not x.flags.c_contiguous:
            return _run(name, x)
        out, dtype = np.empty_like(x), x.dtype
        loop = serial.get(dtype) or serial.setdefault(dtype, _loop(name, dtype, 1).serial)
        loop(x.ravel(), out.ravel(), False)      # a view here, in half of reshape's time
        return out
    return _named(run, name)


def _slope(name):
    """A derivative, of dy and of what its forward keeps."""
    serial = {}

    def run(dy, k):
        if dy.nbytes >= memory.SMALLEST or not (dy.flags.c_contiguous and k.flags.c_contiguous):
            return _run(name, dy, k)
        out, dtype = np.empty_like(dy), dy.dtype
        loop = serial.get(dtype) or serial.setdefault(dtype, _loop(name, dtype, 2).serial)
        loop(dy.ravel(), k.ravel(), out.ravel(), False)
        return out
    return run


def _fused_from_y(name):
    slope = _slope(name)
    return _named(lambda dy, y: slope(dy, y), name)


def _fused_from_x(name):
    slope = _slope(name)
    return _named(lambda dy, x: slope(dy, x), name)


def _function(ufunc):
    """A NumPy function that polynomials.py has too, two to four times as fast."""
    fused = _fused(ufunc.__name__)

    def run(x):
        return fused(x) if x.dtype.kind == "f" else silent().run(ufunc, x)
    run.__name__, run.__doc__ = ufunc.__name__, f"Elementwise {ufunc.__name__}."
    return run


exp, tanh = map(_function, (np.exp, np.tanh))
relu, sigmoid, silu, erf = map(_fused, ("relu", "sigmoid", "silu", "erf"))
gelu, gelu_tanh = map(_fused, ("gelu", "gelu_tanh"))
relu_backward, sigmoid_backward = map(_fused_from_y, ("relu_backward", "sigmoid_backward"))
tanh_backward, silu_backward = _fused_from_y("tanh_backward"), _fused_from_x("silu_backward")
gelu_backward, gelu_tanh_backward = map(_fused_from_x, ("gelu_backward", "gelu_tanh_backward"))


def leaky_relu(x, slope):
    """x, or slope·x below 0."""
    return _run("leaky_relu", x, numbers=(slope,))


def leaky_relu_backward(dy, x, slope):
    """dy, or slope·dy where x ≤ 0."""
    return _run("leaky_relu_backward", dy, x, numbers=(slope,))


def elu(x, alpha):
    """x, or α(e^x − 1) below 0."""
    return _run("elu", x, numbers=(alpha,))


def elu_backward(dy, x, alpha):
    """dy, or dy α e^x where x ≤ 0."""
    return _run("elu_backward", dy, x, numbers=(alpha,))


def softplus(x, beta, threshold):
    """log(1 + e^{βx}) / β; x where βx > threshold."""
    return _run("softplus", x, numbers=(beta, threshold))


def softplus_backward(dy, x, beta, threshold):
    """dy σ(βx); dy where βx > threshold."""
    return _run("softplus_backward", dy, x, numbers=(beta, threshold))


__all__ = ["abs", "add", "ceil", "cos", "div", "elu", "elu_backward", "erf", "exp", "expm1",
           "floor", "gelu", "gelu_backward", "gelu_tanh", "gelu_tanh_backward", "leaky_relu",
           "leaky_relu_backward", "log", "log1p", "maximum", "minimum", "mul", "neg", "pow",
           "reciprocal", "relu", "relu_backward", "round", "rsqrt", "sigmoid",
           "sigmoid_backward", "sign", "silu", "silu_backward", "sin", "softplus",
           "softplus_backward", "sqrt", "square", "sub", "tanh", "tanh_backward", "trunc"]
