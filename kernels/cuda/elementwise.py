"""Elementwise kernels: one pass at the speed of memory, with the formulas that the CPU compiles.

A thread takes two vectors of 16 bytes of each array and reads all before it writes: nothing tells
the compiler that an output is not an input. Integers and bools are CuPy's.
"""

import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from .. import formulas, polynomials
from ..quiet import quiet
from .intrinsics import cuda, device, libm, load, quotient, store, width
from .launch import Kernel, factory
from .layout import aligned, alike, collapsed, dense, ordered, padded, spread as spread_to
from .memory import SIMULATED, empty_like, order_of, xp

THREADS = 256 if not SIMULATED else 32
VECTORS = 2                  # per thread and array: 64 KB of loads in flight on a multiprocessor
MOST = 4                     # axes that a strided kernel walks; what has more is copied first

_BINARY = {"add", "sub", "mul", "div"}
_PLAIN = _BINARY | {"exp", "tanh"}            # no constants of a dtype
_NUMBERS = {"leaky_relu": 1, "leaky_relu_backward": 1, "elu": 1, "elu_backward": 1, "softplus": 2,
            "softplus_backward": 2}


def _neg(real):
    return lambda x: -x


def _square(real):
    return lambda x: x * x


def _reciprocal(real):
    one = real(1)
    return lambda x: one / x


def _rsqrt(real):
    one, sqrt = real(1), libm("sqrt", real)
    return lambda x: one / sqrt(x)


def _sign(real):
    zero, one = real(0), real(1)
    return lambda x: one if x > zero else -one if x < zero else x


def _maximum(real):
    return lambda a, b: a if a > b or a != a else b


def _minimum(real):
    return lambda a, b: a if a < b or a != a else b


_OWN = {"neg": _neg, "square": _square, "reciprocal": _reciprocal, "rsqrt": _rsqrt, "sign": _sign,
        "maximum": _maximum, "minimum": _minimum}
_LIBM = {"abs": "fabs", "round": "rint", **{n: n for n in (
    "floor", "ceil", "trunc", "log", "log1p", "expm1", "sqrt", "sin", "cos", "pow")}}
_TWO = _BINARY | {"maximum", "minimum", "pow"} | {
    n for n in vars(formulas) if n.endswith("_backward")}


def formula(name, dtype):
    """The scalar function: of one number or two, and of its settings p and q."""
    real = np.dtype(dtype).type
    if name in _OWN:
        f = device(_OWN[name](real))
    elif name in _LIBM:
        f = libm(_LIBM[name], real)
    elif name in _PLAIN:
        f = getattr(formulas if name in _BINARY else polynomials, name)
    else:
        f = getattr(formulas, name)(real)
    numbers = _NUMBERS.get(name, 0)
    if name in _TWO:
        return device((lambda a, b, p, q: f(a, b)) if not numbers else
                      (lambda a, b, p, q: f(a, b, p)) if numbers == 1 else
                      (lambda a, b, p, q: f(a, b, p, q)))
    return device((lambda a, p, q: f(a)) if not numbers else
                  (lambda a, p, q: f(a, p)) if numbers == 1 else (lambda a, p, q: f(a, p, q)))


def _of_vectors(f, n, arrays):
    """A formula of tuples of n numbers."""
    if arrays == 1:
        if n == 2:
            return device(lambda a, p, q: (f(a[0], p, q), f(a[1], p, q)))
        return device(lambda a, p, q: (f(a[0], p, q), f(a[1], p, q), f(a[2], p, q), f(a[3], p, q)))
    if n == 2:
        return device(lambda a, b, p, q: (f(a[0], b[0], p, q), f(a[1], b[1], p, q)))
    return device(lambda a, b, p, q: (f(a[0], b[0], p, q), f(a[1], b[1], p, q),
                                      f(a[2], b[2], p, q), f(a[3], b[3], p, q)))


def _spread(n):
    """One number as a tuple of n."""
    return device((lambda x: (x, x)) if n == 2 else (lambda x: (x, x, x, x)))


@factory
def unary(name, dtype):
    """out[i] = formula(x[i], p, q), i < n; the first ``vectors`` in vectors."""
    W, f, kind = width(dtype), formula(name, dtype), dtype.str[1:]
    g = _of_vectors(f, W, 1)

    def body(x, out, vectors, n, p, q):
        i = (cuda.blockIdx.x * (VECTORS * THREADS) + cuda.threadIdx.x) * W
        j = i + THREADS * W
        if j + W <= vectors:
            a, b = load(x, i), load(x, j)
            store(out, i, g(a, p, q))
            store(out, j, g(b, p, q))
        else:
            for k in range(i, min(i + W, n)):
                out[k] = f(x[k], p, q)
            for k in range(j, min(j + W, n)):
                out[k] = f(x[k], p, q)
    return Kernel(body, f"*{kind} *{kind} i8 i8 {kind} {kind}", name=f"{name}_{kind}",
                  threads=THREADS)


@factory
def binary(name, dtype):
    """out[i] = formula(x[i], y[i], p, q), as ``unary``."""
    W, f, kind = width(dtype), formula(name, dtype), dtype.str[1:]
    g = _of_vectors(f, W, 2)

    def body(x, y, out, vectors, n, p, q):
        i = (cuda.blockIdx.x * (VECTORS * THREADS) + cuda.threadIdx.x) * W
        j = i + THREADS * W
        if j + W <= vectors:
            a, b, c, d = load(x, i), load(y, i), load(x, j), load(y, j)
            store(out, i, g(a, b, p, q))
            store(out, j, g(c, d, p, q))
        else:
            for k in range(i, min(i + W, n)):
                out[k] = f(x[k], y[k], p, q)
            for k in range(j, min(j + W, n)):
                out[k] = f(x[k], y[k], p, q)
    return Kernel(body, f"*{kind} *{kind} *{kind} i8 i8 {kind} {kind}", name=f"{name}_{kind}",
                  threads=THREADS)


@factory
def spread(name, dtype, index, vectors):
    """out[i] = formula(x[…], y[…]) for dense out of up to four axes n0 … n3, which x and y walk in
    steps s0 … s3 and t0 … t3. In vectors along the last axis, where a step is 1 or 0, or one by
    one; ``index``: the type of positions, 32 bits where they fit."""
    f, kind, zero = formula(name, dtype), dtype.str[1:], dtype.type(0)
    W = width(dtype) if vectors else 1
    g, same = _of_vectors(f, width(dtype), 2), _spread(width(dtype))

    def body(x, y, out, n, n1, n2, n3, s0, s1, s2, s3, t0, t1, t2, t3):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x        # of n3 / W positions in a row
        if i >= n:
            return
        row = quotient(i, n3)
        c = (i - row * n3) * W
        plane = quotient(row, n2)
        b, o = row - plane * n2, quotient(plane, n1)
        a = plane - o * n1
        at, bt = o * s0 + a * s1 + b * s2, o * t0 + a * t1 + b * t2
        if W == 1:
            out[i] = f(x[at + c * s3], y[bt + c * t3], zero, zero)
        else:
            u = load(x, at + c) if s3 else same(x[at])
            v = load(y, bt + c) if t3 else same(y[bt])
            store(out, i * W, g(u, v, zero, zero))
    return Kernel(body, f"*{kind} *{kind} *{kind} " + f"{index} " * 4 + "i8 " * 8,
                  name=f"{name}_{kind}_{index}_{'vectors' if vectors else 'single'}",
                  threads=THREADS, strided=True)


def every():
    """All kernels that there are, for those who compile them ahead."""
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for name in __all__:
            yield (binary if name in _TWO else unary)(name, dtype)
        for name in sorted(_BINARY):
            for vectors in (False, True):
                yield spread(name, dtype, "u4", vectors)


# ------------------------------------------------------------------------------------------ plans
# What follows from names, dtypes, shapes and strides is found once: it takes ten times a launch.

@lru_cache(1 << 12)
def _along(name, dtype, arrays, n, vectors):
    """The kernel, its blocks and numbers for n elements side by side of so many arrays."""
    W, kernel = width(dtype), (unary if arrays == 1 else binary)(name, dtype)
    return kernel, -(-n // (W * VECTORS * THREADS)), (n // W * W if vectors else 0, n)


def run(name, x, *more, numbers=()):
    """The formula of arrays of one shape and dtype, in the memory order of the first."""
    x = dense(x)
    out = empty_like(x)
    if x.size:
        arrays = (x, *[alike(y, x) for y in more], out)
        kernel, blocks, counts = _along(name, x.dtype, len(arrays) - 1, x.size, aligned(*arrays))
        kernel(blocks, *arrays, *counts, *(*numbers, 0, 0)[:2])
    return out


def _walk(shape, strides, itemsize):
    """What ``order_of`` and ``collapsed`` look at of an array."""
    return SimpleNamespace(shape=shape, strides=strides, itemsize=itemsize, ndim=len(shape))


@lru_cache(1 << 12)
def _broadcasting(name, dtype, shape_a, strides_a, shape_b, strides_b, vectors):
    """The output's shape and axes from the outermost in memory on, and the kernel, its blocks and
    numbers; no kernel where arrays have too many axes to walk."""
    shape, arrays = np.broadcast_shapes(shape_a, shape_b), []
    for own, strides in ((shape_a, strides_a), (shape_b, strides_b)):
        steps = [0 if n != m else s for n, m, s in zip(own, shape[len(shape) - len(own):], strides)]
        arrays.append(_walk(shape, tuple(padded(steps, len(shape), 0)),
                            dtype.itemsize))
    like = _walk(shape_a, strides_a, 0) if shape_a == shape else _walk(shape_b, strides_b, 0)
    order = order_of(like) if like.shape == shape else tuple(range(len(shape)))
    size, (sizes, (s, t)) = math.prod(shape), collapsed(shape, order, arrays)
    if len(sizes) > MOST:
        return shape, order, None, 0, ()
    sizes, s, t = padded(sizes, MOST, 1), padded(s, MOST, 0), padded(t, MOST, 0)
    W = width(dtype)
    vectors = (vectors and sizes[-1] % W == 0 and {s[-1], t[-1]} <= {0, 1}
               and not any(v % W for steps in (s, t) if steps[-1] for v in steps[:-1]))
    count = size // W if vectors else size
    if vectors:
        sizes[-1] //= W
    kernel = spread(name, dtype, "u4" if size < 2**31 else "i8", vectors)
    return shape, order, kernel, -(-count // THREADS), (count, *sizes[1:], *s, *t)


def _broadcast(name, a, b):
    """formula(a, b) of one dtype, in the memory order of the larger."""
    shape, order, kernel, blocks, numbers = _broadcasting(
        name, a.dtype, a.shape, a.strides, b.shape, b.strides, aligned(a, b))
    out = ordered(shape, a.dtype, order)
    if not out.size:
        return out
    if kernel is None:
        return run(name, *(alike(spread_to(v, shape), out) for v in (a, b)))
    kernel(blocks, a, b, out, *numbers)
    return out


def _arithmetic(name, ufunc):
    @quiet
    def f(a, b):
        if a.dtype != b.dtype or a.dtype.kind != "f":
            return ufunc(a, b)
        return run(name, a, b) if a.shape == b.shape else _broadcast(name, a, b)
    f.__name__, f.__doc__ = name, f"Elementwise {name} with broadcasting."
    return f


def _function(name, ufunc=None):
    @quiet
    def f(x):
        return run(name, x) if x.dtype.kind == "f" else ufunc(x)
    f.__name__, f.__doc__ = name, f"{name}, elementwise."
    return f


add, sub = _arithmetic("add", xp.add), _arithmetic("sub", xp.subtract)
mul, div = _arithmetic("mul", xp.multiply), _arithmetic("div", xp.divide)
pow = _arithmetic("pow", xp.power)
maximum, minimum = _arithmetic("maximum", xp.maximum), _arithmetic("minimum", xp.minimum)
neg, abs, sign = (_function(*n) for n in (("neg", xp.negative), ("abs", xp.abs), ("sign", xp.sign)))
floor, ceil = _function("floor", xp.floor), _function("ceil", xp.ceil)
round, trunc = _function("round", xp.rint), _function("trunc", xp.trunc)
square = _function("square", xp.square)
exp, log, log1p, expm1, sqrt, rsqrt, reciprocal, sin, cos, tanh = map(_function, (
    "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh"))
relu, sigmoid, silu, erf, gelu, gelu_tanh = map(_function, (
    "relu", "sigmoid", "silu", "erf", "gelu", "gelu_tanh"))


def _from_y(name):
    def f(dy, y):
        return run(name, dy, y)
    f.__name__, f.__doc__ = name, f"{name}: a derivative, of dy and of the forward's y."
    return f


def _from_x(name):
    def f(dy, x):
        return run(name, dy, x)
    f.__name__, f.__doc__ = name, f"{name}: a derivative, of dy and of the forward's x."
    return f


relu_backward, sigmoid_backward, tanh_backward = map(_from_y, (
    "relu_backward", "sigmoid_backward", "tanh_backward"))
silu_backward, gelu_backward, gelu_tanh_backward = map(_from_x, (
    "silu_backward", "gelu_backward", "gelu_tanh_backward"))


def leaky_relu(x, slope):
    """x, or slope·x below 0."""
    return run("leaky_relu", x, numbers=(slope,))


def leaky_relu_backward(dy, x, slope):
    """dy, or slope·dy where x ≤ 0."""
    return run("leaky_relu_backward", dy, x, numbers=(slope,))


def elu(x, alpha):
    """x, or α(e^x − 1) below 0."""
    return run("elu", x, numbers=(alpha,))


def elu_backward(dy, x, alpha):
    """dy, or dy α e^x where x ≤ 0."""
    return run("elu_backward", dy, x, numbers=(alpha,))


def softplus(x, beta, threshold):
    """log(1 + e^{βx}) / β; x where βx > threshold."""
    return run("softplus", x, numbers=(beta, threshold))


def softplus_backward(dy, x, beta, threshold):
    """dy σ(βx); dy where βx > threshold."""
    return run("softplus_backward", dy, x, numbers=(beta, threshold))


__all__ = ["abs", "add", "ceil", "cos", "div", "elu", "elu_backward", "erf", "exp", "expm1",
           "floor", "gelu", "gelu_backward", "gelu_tanh", "gelu_tanh_backward", "leaky_relu",
           "leaky_relu_backward", "log", "log1p", "maximum", "minimum", "mul", "neg", "pow",
           "reciprocal", "relu", "relu_backward", "round", "rsqrt", "sigmoid",
           "sigmoid_backward", "sign", "silu", "silu_backward", "sin", "softplus",
           "softplus_backward", "sqrt", "square", "sub", "tanh", "tanh_backward", "trunc"]
