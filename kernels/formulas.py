"""Formulas of one number, written once and compiled into the loops of every device.

Plain arithmetic on a number, or on a vector of them (cpu/simd.py), as in polynomials.py.
"""

import math

from .polynomials import TYPE, device, exp, horner, log1p_unit, select, tanh

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


def _erfc_far(real):
    """erfc a for a ≥ 1, from a and e^−a²."""
    t = TYPE[real]
    k, end, one, poly = real(t["k"]), real(t["end"]), real(1), horner(t["erfc"], real)

    @device
    def f(a, e):
        a = select(a > end, end, a)
        q = one / (a + k)
        return e * q * poly((a - k) * q)
    return f


def erf(real):
    """x p(x²) up to 1, 1 − erfc above. Relative error ≤ 3 ulp."""
    zero, one = real(0), real(1)
    near, far = horner(TYPE[real]["erf"], real), _erfc_far(real)

    @device
    def f(x):
        a = select(x < zero, -x, x)
        y = one - far(a, exp(-a * a))
        return select(a > one, select(x < zero, -y, y), x * near(x * x))
    return f


def _normal(real):
    """Φ(x), from z = x/√2 and e^−z²; exact in the tail too."""
    zero, half, one = real(0), real(0.5), real(1)
    near, far = horner(TYPE[real]["erf"], real), _erfc_far(real)

    @device
    def f(z, e):
        a = select(z < zero, -z, z)
        tail = half * far(a, e)
        return select(a > one, select(z < zero, tail, one - tail), half + half * z * near(z * z))
    return f


def gelu(real):
    root, normal = real(math.sqrt(0.5)), _normal(real)

    @device
    def f(x):
        z = x * root
        return x * normal(z, exp(-z * z))
    return f


def gelu_backward(real):
    root, normal = real(math.sqrt(0.5)), _normal(real)
    density = real(1 / math.sqrt(2 * math.pi))

    @device
    def f(dy, x):
        z = x * root
        e = exp(-z * z)
        return dy * (normal(z, e) + x * density * e)
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
