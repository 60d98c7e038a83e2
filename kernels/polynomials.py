"""exp, tanh and the logarithm as polynomials, and the jit policy of every function of a number.

Numba has no vector math library (SVML is gone), and a call of libm's ``expf`` keeps a loop scalar.
The functions here are plain arithmetic on a number, or on a vector of them (cpu/simd.py): what
would be ``a if c else b`` is ``select(c, a, b)``. With the JIT off they are NumPy's.
"""

import math
from functools import cache

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .libraries import DeviceCompiler

__all__ = ["POLICY", "TYPE", "device", "exp", "horner", "log1p_unit", "log_above_one", "select",
           "tanh"]

# No nnan/ninf (NaN must stay NaN) and no reassoc (it undoes compensated sums); a kernel that may be
# reassociated says so itself. error_model="numpy": a division is a division, without a branch.
POLICY = {"error_model": "numpy", "fastmath": {"contract"}}


def _general(kind):
    """The type without what is known of its values."""
    if isinstance(kind, types.BaseTuple) and not isinstance(kind, types.BaseNamedTuple):
        return types.BaseTuple.from_types([_general(k) for k in kind])
    return types.unliteral(kind)


def device(function, **options):
    """Jit a function that only kernels call; it is compiled into each of them. A wrapper for Python
    is a third of what compiling it costs. Numba would compile it again for every constant argument;
    LLVM folds those in when it inlines."""
    jitted = njit(pipeline_class=DeviceCompiler, no_cpython_wrapper=True, no_cfunc_wrapper=True,
                  **POLICY, **options)(function)
    if not config.DISABLE_JIT:
        template = jitted.get_call_template
        jitted.get_call_template = lambda args, kws: template(
            [_general(a) for a in args], {name: _general(kind) for name, kind in kws.items()})
    return jitted


def select(c, a, b):
    """a where c, else b; both are computed."""
    return np.where(c, a, b)


# Coefficients: interpolation at Chebyshev nodes in 50 digits; the error stated is that of the
# polynomial, rounding adds about one ulp.
TYPE = {
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
        # erf(x)/x in x² on |x| ≤ 1: 1.3e-9
        "erf": (1.12837916585, -0.376126266667, 0.112835947152, -0.0268542120106, 0.00518908742343,
                -0.000801686428717, 7.87587506269e-5),
        # e^{x²} erfc(x) (x + k) in (x − k)/(x + k) on 1 … end, k = 2.5: 1.6e-9
        "erfc": (1.05403181986, -0.804651851024, 0.453914183528, -0.171250964129, 0.0283598869459,
                 0.00838937827199, -0.00480328634153, -0.000414283940848, 0.000637145854618),
        "k": 2.5, "end": 10.5,
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
        # 1.5e-19
        "erf": (1.1283791670955125738, -0.37612638903183748056, 0.11283791670954878666,
                -0.026866170645076793248, 0.0052239776248180144673, -0.00085483269808337899052,
                0.00012055331111642710923, -1.4925595266831181565e-5, 1.6461000484121368033e-6,
                -1.6350312701054695011e-7, 1.4659775274047435814e-8, -1.137284885679167367e-9,
                5.9571761477489114044e-11),
        # k = 3: 3.3e-19
        "erfc": (1.0740069070883397028, -0.88339445316988366567, 0.59022835710410144486,
                 -0.31046726190056176816, 0.1195277612873238458, -0.02682723462473217152,
                 -0.0012124166282967977154, 0.0030340620065761134045, -0.00054830967446935884491,
                 -0.0002767779138441585587, 0.00010756133800444045256, 3.0398714599381244813e-5,
                 -1.7469890737820890505e-5, -4.7521865898347787694e-6, 2.764288390072408132e-6,
                 1.0087762870979003057e-6, -4.1113483069498175996e-7, -2.5116921863632087773e-7,
                 6.2514665545413447281e-8, 6.0309122952205454926e-8, -2.1587798112545437356e-8),
        "k": 3.0, "end": 27.5,
        "ln2": (0.693147180369123816490, 1.90821492927058770002e-10), "low": -746.0, "high": 710.0,
        "magic": 1.5 * 2.0**52, "shift": 52, "bits": 64},
}


def _real(t):
    """The NumPy dtype of a number's or a vector's type, None for any other."""
    return {types.float32: np.float32, types.float64: np.float64}.get(getattr(t, "real", t))


def _llvm(builder, name, *args):
    """The LLVM intrinsic of that name, on numbers or on vectors of them."""
    v = args[0].type
    suffix = {"float": "f32", "double": "f64"}[str(getattr(v, "element", v))]
    suffix = f"v{v.count}{suffix}" if hasattr(v, "count") else suffix
    f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(v, [v] * len(args)),
                                       f"llvm.{name}.{suffix}")
    return builder.call(f, args)


def _nearest(builder, x):
    """x rounded to an integer, half to even. NVVM has no such intrinsic: there |x| < 2^22 (2^51)
    is added to a number whose last bit is worth 1, and it taken away again."""
    if "nvptx" not in str(builder.module.triple):
        return _llvm(builder, "rint", x)
    magic = _fill(x.type, 1.5 * 2.0 ** (23 if str(x.type) == "float" else 52))
    return builder.fsub(builder.fadd(x, magic), magic)


def _fill(v, number):
    """A constant of an LLVM type, in every lane of a vector."""
    return ir.Constant(v, [number] * v.count if hasattr(v, "count") else number)


@intrinsic
def _rint(typingctx, x):
    """x rounded to an integer, half to even."""
    return x(x), lambda context, builder, sig, args: _nearest(builder, *args)


@intrinsic
def _scale(typingctx, p, n):
    """p 2^n, n integral: one rounding, in two factors since 2^n itself may overflow."""
    table = TYPE[_real(p)]

    def pow2(builder, n, v):
        """From n + 1.5·2^mantissa, whose low bits are n: shift them into the exponent of 1."""
        integer = _bits(builder, v)
        bits = builder.bitcast(builder.fadd(n, _fill(v, table["magic"])), integer)
        one = int(_real(p)(1).view(f"u{table['bits'] // 8}"))
        shifted = builder.shl(bits, _fill(integer, table["shift"]))
        return builder.bitcast(builder.add(shifted, _fill(integer, one)), v)

    def codegen(context, builder, sig, args):
        value, n = args
        v = value.type
        if getattr(v, "count", 0) * table["bits"] == 512 and _SCALEF:
            name = f"llvm.x86.avx512.mask.scalef.p{'sd'[table['bits'] // 64]}.512"
            mask, i32 = ir.IntType(v.count), ir.IntType(32)
            f = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(v, [v, v, v, mask, i32]), name)
            return builder.call(f, [value, n, value, mask(-1), i32(4)])
        h = _nearest(builder, builder.fmul(n, _fill(v, 0.5)))
        first = builder.fmul(value, pow2(builder, h, v))
        return builder.fmul(first, pow2(builder, builder.fsub(n, h), v))
    return p(p, n), codegen


def _bits(builder, v):
    """The integer type of a number's bits, or of those of a vector."""
    integer = ir.IntType(32 if str(getattr(v, "element", v)) == "float" else 64)
    return ir.VectorType(integer, v.count) if hasattr(v, "count") else integer


@intrinsic
def _exponent(typingctx, x):
    """n of x = m 2^n, 1 ≤ m < 2, for a normal x > 0."""
    table = TYPE[_real(x)]

    def codegen(context, builder, sig, args):
        integer = _bits(builder, args[0].type)
        n = builder.lshr(builder.bitcast(args[0], integer), _fill(integer, table["shift"]))
        bias = (1 << (table["bits"] - table["shift"] - 2)) - 1
        return builder.sitofp(builder.sub(n, _fill(integer, bias)), args[0].type)
    return x(x), codegen


@intrinsic
def _mantissa(typingctx, x):
    """m of x = m 2^n, 1 ≤ m < 2, for a normal x > 0."""
    table = TYPE[_real(x)]

    def codegen(context, builder, sig, args):
        integer = _bits(builder, args[0].type)
        fraction = builder.and_(builder.bitcast(args[0], integer),
                                _fill(integer, (1 << table["shift"]) - 1))
        one = int(_real(x)(1).view(f"u{table['bits'] // 8}"))
        return builder.bitcast(builder.or_(fraction, _fill(integer, one)), args[0].type)
    return x(x), codegen


_SCALEF = binding.get_host_cpu_features().get("avx512f", False)


def exp(x):
    """e^x. Relative error ≤ 2 ulp; NaN stays NaN; overflow to inf, underflow by denormals to 0."""
    return np.exp(x)


def _make_exp(real):
    t = TYPE[real]
    log2e, hi, lo = real(1.4426950408889634074), real(t["ln2"][0]), real(t["ln2"][1])
    low, high, zero, one = real(t["low"]), real(t["high"]), real(0), real(1)
    poly = horner(t["exp"], real)

    def exp(x):
        x = select(x > high, high, x)              # comparisons with NaN are false: it passes
        nothing = x < low                          # as 0, not by way of slow denormals
        x = select(nothing, zero, x)
        n = _rint(x * log2e)
        r = (x - n * hi) - n * lo
        return select(nothing, zero, _scale(one + (r + r * r * poly(r)), n))
    return exp


def horner(coefficients, real):
    """The polynomial, each step one multiply-add."""
    if config.DISABLE_JIT:
        def poly(x):
            y = real(coefficients[-1])
            for c in coefficients[-2::-1]:
                y = real(c) + y * x
            return y
        return poly

    @intrinsic
    def poly(typingctx, x):
        def codegen(context, builder, sig, args):
            v, contract = args[0].type, {"flags": ("contract",)}
            y = _fill(v, float(real(coefficients[-1])))
            for c in coefficients[-2::-1]:
                y = builder.fmul(y, args[0], **contract)
                y = builder.fadd(_fill(v, float(real(c))), y, **contract)
            return y
        return x(x), codegen
    return poly


def log1p_unit(x):
    """log(1 + x) for 0 ≤ x ≤ 1, as 2 atanh(x/(2 + x)). Relative error ≤ 2 ulp."""
    return np.log1p(x)


def _make_log1p(real):
    two, poly = real(2), horner(TYPE[real]["atanh2"], real)

    def log1p_unit(x):
        s = x / (two + x)
        return s * poly(s * s)
    return log1p_unit


def log_above_one(x):
    """log x for finite x ≥ 1 or NaN. Relative error ≤ 2 ulp."""
    return np.log(x)


def _make_log(real):
    one, ln2, log1p = real(1), real(math.log(2)), device(_make_log1p(real))

    def log_above_one(x):
        return select(x != x, x, _exponent(x) * ln2 + log1p(_mantissa(x) - one))
    return log_above_one


def tanh(x):
    """tanh x: a polynomial below 0.55, 1 − 2/(e^{2|x|} + 1) above. Relative error ≤ 3 ulp."""
    return np.tanh(x)


def _make_tanh(real):
    one, two, zero, near = real(1), real(2), real(0), real(0.55)
    poly = horner(TYPE[real]["tanh"], real)

    def tanh(x):
        a = select(x < zero, -x, x)
        far = one - two / (exp(two * a) + one)
        far = select(x < zero, -far, far)
        return select(a > near, far, x * poly(x * x))
    return tanh


def _overloads(public, make):
    made = cache(make)              # when first needed: making them all costs 15 ms at import

    @overload(public, jit_options=POLICY, inline="never")
    def choose(x):
        return made(_real(x)) if _real(x) else None


if not config.DISABLE_JIT:
    for _public, _make in (
            (exp, _make_exp), (log1p_unit, _make_log1p), (log_above_one, _make_log),
            (tanh, _make_tanh)):
        _overloads(_public, _make)

    @overload(select, jit_options=POLICY, inline="never")
    def _select(c, a, b):
        return (lambda c, a, b: a if c else b) if isinstance(c, types.Boolean) else None
