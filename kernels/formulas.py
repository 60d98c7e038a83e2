"""Scalar formulas, written once and compiled into the loops of every device.

Numba has no vector math library (SVML is gone), and a call of libm's ``expf`` keeps a loop scalar.
The functions here are plain arithmetic on one number, so that LLVM turns the loops around them into
vector code. With the JIT off they are NumPy's.
"""

import math
from functools import cache

import numpy as np
from numba import config, njit, types
from numba.extending import intrinsic, overload

# No nnan/ninf (NaN must stay NaN) and no reassoc (it undoes compensated sums); a kernel that may be
# reassociated says so itself. error_model="numpy": a division is a division, without a branch.
POLICY = {"error_model": "numpy", "fastmath": {"contract"}}


def device(function):
    """Jit a scalar function that kernels call; it is compiled into each of them."""
    return njit(**POLICY)(function)


def _poly(x, coefficients):
    y = coefficients[-1]
    for c in coefficients[-2::-1]:
        y = y * x + c
    return y


# Coefficients: interpolation at Chebyshev nodes in 50 digits; the error stated is that of the
# polynomial, rounding adds about one ulp.
_TYPE = {
    np.float32: {
        # (e^r − 1 − r)/r² on |r| ≤ ln2/2: 1.0e-8
        "exp": (0.5, 0.1666657702559798819, 0.041666554662050533982, 0.0083631730745137109028,
                0.0013926176119935578884),
        # 2 atanh(s)/s in s² on 0 … 1/9: 4.1e-9
        "atanh2": (2.0000000076817588809, 0.66666321641377773156, 0.40024595230703747912,
                   0.27965157745197268888, 0.28157778363109080655),
        # tanh(x)/x in x² on |x| ≤ 0.55: 3.3e-8
        "tanh": (0.99999996729807167721, -0.33332791480236107179, 0.1331881878050192971,
                 -0.052586260038930358337, 0.016310403867162955831),
        # ln 2 in two words, the first with zeros at its end: n·hi is exact
        "ln2": (0.693359375, -2.12194440054690583e-4), "low": -104.0, "high": 89.0,
        "magic": 1.5 * 2.0**23, "shift": 23, "bits": 32},
    np.float64: {
        # 2.3e-19
        "exp": (0.5, 0.16666666666666670986, 0.041666666666666669752, 0.008333333333326140884,
                0.0013888888888883752417, 0.00019841269874800491981, 2.4801587325533363819e-5,
                2.7557255425746434282e-6, 2.7557273661348636219e-7, 2.5105206373957011116e-8,
                2.09146793765839351e-9),
        # 1.3e-18
        "atanh2": (2.0000000000000000024, 0.66666666666666149594, 0.40000000000185747468,
                   0.28571428545454114534, 0.22222224080747673173, 0.1818174083250480451,
                   0.15386614042304007762, 0.13300374032674624337, 0.12110168728069217655,
                   0.083245065118608205757, 0.17044163562781398129),
        # 5.5e-19
        "tanh": (0.99999999999999999945, -0.33333333333333280843, 0.13333333333325044417,
                 -0.053968253963118578468, 0.021869488371442864052, -0.0088632324046676681614,
                 0.0035920903102564792201, -0.0014555330088204245092, 0.00058840786491411976775,
                 -0.00023329605704104198289, 8.3202741789433233788e-5, -1.9428993183663043083e-5),
        "ln2": (0.693147180369123816490, 1.90821492927058770002e-10), "low": -746.0, "high": 710.0,
        "magic": 1.5 * 2.0**52, "shift": 52, "bits": 64},
}


@intrinsic
def _pow2(typingctx, t):
    """2^n from t = n + 1.5·2^mantissa, whose low bits are n: shift them into the exponent of 1."""
    real = np.float32 if t == types.float32 else np.float64
    table = _TYPE[real]

    def codegen(context, builder, signature, args):
        from llvmlite import ir

        integer = ir.IntType(table["bits"])
        bits = builder.bitcast(args[0], integer)
        one = int(real(1).view(f"u{table['bits'] // 8}"))
        exponent = builder.add(builder.shl(bits, integer(table["shift"])), integer(one))
        return builder.bitcast(exponent, args[0].type)
    return t(t), codegen


def exp(x):
    """e^x. Relative error ≤ 2 ulp; NaN stays NaN; overflow to inf, underflow by denormals to 0."""
    return np.exp(x)


def _make_exp(real):
    t = _TYPE[real]
    log2e, hi, lo = real(1.4426950408889634074), real(t["ln2"][0]), real(t["ln2"][1])
    low, high, magic = real(t["low"]), real(t["high"]), real(t["magic"])
    half, one = real(0.5), real(1)
    poly = _horner(t["exp"], real)

    def exp(x):
        x = high if x > high else x                # comparisons with NaN are false: it passes
        x = low if x < low else x
        n = np.rint(x * log2e)
        r = (x - n * hi) - n * lo
        p = one + (r + r * r * poly(r))
        h = np.rint(n * half)                      # two factors: 2^n itself may overflow
        return p * _pow2(h + magic) * _pow2((n - h) + magic)
    return exp


def _horner(coefficients, real):
    """The polynomial as nested calls, each one multiply-add."""
    *rest, last = [real(c) for c in coefficients]
    f = _linear(rest.pop(), last)
    while rest:
        f = _step(rest.pop(), f)
    return f


def _linear(a, b):
    return device(lambda x: a + x * b)


def _step(a, f):
    return device(lambda x: a + x * f(x))


def log1p_unit(x):
    """log(1 + x) for 0 ≤ x ≤ 1, as 2 atanh(x/(2 + x)). Relative error ≤ 2 ulp."""
    return np.log1p(x)


def _make_log1p(real):
    two, poly = real(2), _horner(_TYPE[real]["atanh2"], real)

    def log1p_unit(x):
        s = x / (two + x)
        return s * poly(s * s)
    return log1p_unit


def tanh(x):
    """tanh x: a polynomial below 0.55, 1 − 2/(e^{2|x|} + 1) above. Relative error ≤ 3 ulp."""
    return np.tanh(x)


def _make_tanh(real):
    one, two, zero, near = real(1), real(2), real(0), real(0.55)
    poly = _horner(_TYPE[real]["tanh"], real)

    def tanh(x):
        a = -x if x < zero else x
        far = one - two / (exp(two * a) + one)
        far = -far if x < zero else far
        return far if a > near else x * poly(x * x)
    return tanh


_REAL = {types.float32: np.float32, types.float64: np.float64}


def _overloads(public, make):
    made = cache(make)              # when first needed: making them all costs 15 ms at import

    @overload(public, jit_options=POLICY, inline="never")
    def choose(x):
        return made(_REAL[x]) if x in _REAL else None


for _public, _make in ((exp, _make_exp), (log1p_unit, _make_log1p), (tanh, _make_tanh)):
    if not config.DISABLE_JIT:
        _overloads(_public, _make)


# Activations. Each is a function of the dtype, so that its constants have that dtype (an int or a
# float literal would turn a float32 formula into float64), and returns the scalar formula. A
# derivative takes dy and what its forward keeps: the output y where that is enough, else x.

def relu(real):
    zero = real(0)
    return device(lambda x: zero if x < zero else x)


def relu_backward(real):
    zero = real(0)
    return device(lambda dy, y: dy if y > zero else zero)


def leaky_relu(real):
    zero = real(0)
    return device(lambda x, slope: x * slope if x < zero else x)


def leaky_relu_backward(real):
    zero = real(0)
    return device(lambda dy, x, slope: dy if x > zero else dy * slope)


def elu(real):
    zero, one = real(0), real(1)
    return device(lambda x, alpha: alpha * (exp(x) - one) if x < zero else x)


def elu_backward(real):
    zero = real(0)
    return device(lambda dy, x, alpha: dy if x > zero else dy * alpha * exp(x))


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
        a = t if t > zero else -t
        soft = ((t if t > zero else zero) + log1p_unit(exp(-a))) * (one / beta)
        return x if t > threshold else soft
    return f


def softplus_backward(real):
    one = real(1)
    return device(lambda dy, x, beta, threshold:
                  dy if x * beta > threshold else dy / (one + exp(-x * beta)))


_SQRT_2_OVER_PI, _CUBIC = 0.7978845608028653559, 0.044715


def erf(real):
    return device(lambda x: real(math.erf(x)))


def gelu(real):
    half, one, root = real(0.5), real(1), real(math.sqrt(0.5))
    return device(lambda x: half * x * (one + real(math.erf(x * root))))


def gelu_backward(real):
    half, one, root = real(0.5), real(1), real(math.sqrt(0.5))
    density = real(1 / math.sqrt(2 * math.pi))
    return device(lambda dy, x: dy * (half * (one + real(math.erf(x * root)))
                                      + x * density * exp(-half * x * x)))


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
