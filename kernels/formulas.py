"""Formulas of one number, written once and compiled into the loops of every device.

Plain arithmetic on a number, or on a vector of them (cpu/simd.py), as in polynomials.py.
"""

import math

from .polynomials import TYPE, bell, bounded, device, exp, horner, log1p_unit, select, tanh

# Activations. Each is a function of the dtype, so that its constants have that dtype (an int or a
# float literal would turn a float32 formula into float64), and returns the scalar formula. A
# derivative takes dy and what its forward keeps: the output y where that is enough, else x.

def relu(real):
    zero = real(0)
    return device(lambda x: select(x < zero, zero, x))


def relu_backward(real):
    zero = real(0)
    return device(lambda dy, y: select(y > zero, dy, zero))


def leaky_relu(real):
    zero = real(0)
    return device(lambda x, slope: select(x < zero, x * slope, x))


def leaky_relu_backward(real):
    zero = real(0)
    return device(lambda dy, x, slope: select(x > zero, dy, dy * slope))


def elu(real):
    zero, one = real(0), real(1)
    return device(lambda x, alpha: select(x < zero, alpha * (exp(x) - one), x))


def elu_backward(real):
    zero = real(0)
    return device(lambda dy, x, alpha: select(x > zero, dy, dy * alpha * exp(x)))


def sigmoid(real):
    one = real(1)
    return device(lambda x: one / (one + exp(-x)))


def sigmoid_backward(real):
    one = real(1)
    return device(lambda dy, y: dy * y * (one - y))


def tanh_backward(real):
    one = real(1)
    return device(lambda dy, y: dy * (one - y * y))


def silu(real):
    one = real(1)
    return device(lambda x: x / (one + exp(-x)))


def silu_backward(real):
    one = real(1)

    @device
    def f(dy, x):
        s = one / (one + exp(-x))
        return dy * s * (one + x * (one - s))
    return f


def softplus(real):
    """log(1 + e^{βx}) / β; x itself above the threshold."""
    zero, one = real(0), real(1)

    @device
    def f(x, beta, threshold):
        t = x * beta
        a = select(t > zero, t, -t)
        soft = (select(t > zero, t, zero) + log1p_unit(exp(-a))) * (one / beta)
        return select(t > threshold, x, soft)
    return f


def softplus_backward(real):
    one = real(1)
    return device(lambda dy, x, beta, threshold:
                  select(x * beta > threshold, dy, dy / (one + exp(-x * beta))))


_SQRT_2_OVER_PI, _CUBIC = 0.7978845608028653559, 0.044715


def erf(real):
    """A rational; of float64 x p(x²) up to 1, 1 − 2Φ(−√2 x) above. Errors as those of tanh."""
    if "erf end" in TYPE[real]:
        return device(bounded("erf", real))
    zero, one, two, root = real(0), real(1), real(2), real(math.sqrt(2))
    near, tail = horner(TYPE[real]["erf"], real), _tail(real)

    @device
    def f(x):
        a = select(x < zero, -x, x)
        y = one - two * tail(root * a, exp(-a * a))
        return select(a > one, select(x < zero, -y, y), x * near(x * x))
    return f


def _tail(real):
    """Φ(−a) for a ≥ 0, from a and e^{−a²/2}."""
    end = real(TYPE[real]["mills end"])
    p, q = (horner(c, real) for c in TYPE[real]["mills"])

    @device
    def f(a, e):
        a = select(a > end, end, a)                # there e is 0; p and q are to be finite
        return e * p(a) / q(a)
    return f


def _normal(real):
    """Φ(x), from x and e^{−x²/2}; exact in the tail too."""
    zero, one, tail = real(0), real(1), _tail(real)

    @device
    def f(x, e):
        y = tail(abs(x), e)
        return select(x > zero, one - y, y)
    return f


def gelu(real):
    normal = _normal(real)
    return device(lambda x: x * normal(x, bell(x)))


def gelu_backward(real):
    normal = _normal(real)
    density = real(1 / math.sqrt(2 * math.pi))

    @device
    def f(dy, x):
        e = bell(x)
        return dy * (normal(x, e) + x * density * e)
    return f


def gelu_tanh(real):
    half, one, k, c = real(0.5), real(1), real(_SQRT_2_OVER_PI), real(_CUBIC)
    return device(lambda x: half * x * (one + tanh(k * (x + c * x * x * x))))


def gelu_tanh_backward(real):
    half, one, three = real(0.5), real(1), real(3)
    k, c = real(_SQRT_2_OVER_PI), real(_CUBIC)

    @device
    def f(dy, x):
        t = tanh(k * (x + c * x * x * x))
        return dy * half * (one + t + x * (one - t * t) * k * (one + three * c * x * x))
    return f


@device
def add(a, b):
    return a + b


@device
def sub(a, b):
    return a - b


@device
def mul(a, b):
    return a * b


@device
def div(a, b):
    return a / b
