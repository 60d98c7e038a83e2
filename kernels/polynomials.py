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

__all__ = ["POLICY", "TYPE", "bell", "bounded", "device", "exp", "horner", "log1p_unit",
           "log_above_one", "select", "tanh"]

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
        # tanh(x)/x in x² on |x| ≤ 8.9: 1.8e-8. Rationals are numerator and denominator; all their
        # coefficients are positive, so nothing cancels. At "end" they are past 1 by more than
        # rounding: what is cut off there is 1.
        "tanh": ((0.999999981715, 0.133876538642, 0.0035034680635, 2.07392300423e-5,
                  1.35363703091e-8),
                 (1.0, 0.467209711852, 0.0259069386742, 0.000329853968591, 7.85060958465e-7)),
        # erf(x)/x in x² on |x| ≤ 3.8: 1.2e-8. Both are times a number of which the coefficients'
        # rounding is of little harm: 2.3·2⁻²³ in all, 3.0 where the denominator begins with 1.
        "erf": ((1.87425689945, 0.309377060085, 0.0868906418277, 0.0060052269765,
                 0.000475900423191, 3.5727076892e-06),
                (1.66101694915, 0.82784996678, 0.186856441888, 0.0243636551012,
                 0.00188553405142, 6.51324447684e-05)),
        # e^{x²/2} Φ(−x) on 0 … 14.6: 6.0e-9
        "mills": ((0.500000002964, 0.438508742663, 0.183393885712, 0.0406868359974,
                   0.00412428401678),
                  (1.0, 1.67490247057, 1.20316175672, 0.469889761943, 0.101993149283,
                   0.0103379289303)),
        "tanh end": 10.0, "erf end": 4.1, "mills end": 14.6,
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
        # tanh(x)/x in x² on |x| ≤ 0.55: 5.5e-19. A rational would err by 6 ulp
        "tanh": (0.99999999999999999945, -0.33333333333333280843, 0.13333333333325044417,
                 -0.053968253963118578468, 0.021869488371442864052, -0.0088632324046676681614,
                 0.0035920903102564792201, -0.0014555330088204245092, 0.00058840786491411976775,
                 -0.00023329605704104198289, 8.3202741789433233788e-5, -1.9428993183663043083e-5),
        # erf(x)/x in x² on |x| ≤ 1: 1.5e-19
        "erf": (1.1283791670955125738, -0.37612638903183748056, 0.11283791670954878666,
                -0.026866170645076793248, 0.0052239776248180144673, -0.00085483269808337899052,
                0.00012055331111642710923, -1.4925595266831181565e-5, 1.6461000484121368033e-6,
                -1.6350312701054695011e-7, 1.4659775274047435814e-8, -1.137284885679167367e-9,
                5.9571761477489114044e-11),
        # 0 … 39: 9.2e-19
        "mills": ((0.50000000000000000046, 0.82794267668683358601, 0.67963793147956641898,
                   0.35736787498741255272, 0.13205777394566978318, 0.035671841615646640304,
                   0.0071238766439828001057, 0.0010398915630168481666, 0.0001065940318532573351,
                   6.9776004257237022062e-6, 2.2424446845144833893e-7),
                  (1.0, 2.453769914176532739, 2.8171009932431524184, 2.0015337018854234048,
                   0.98016626669121358858, 0.34834789119724123259, 0.091987688187622872748,
                   0.018122978030859331995, 0.0026241118451287154276, 0.00026775371167217711115,
                   0.000017490250516226181738, 5.6209752504987138742e-7)),
        "mills end": 39.0,
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
def _within(typingctx, nothing, x):
    """x, and 0 where e^x is nothing. With vscalef, x: what it makes of any x is not slow."""
    table = TYPE[_real(x)]

    def codegen(context, builder, sig, args):
        nothing, value = args
        if _has_scalef(value.type, table["bits"]):
            return value
        return builder.select(nothing, _fill(value.type, 0.0), value)
    return x(nothing, x), codegen


@intrinsic
def _scale(typingctx, p, n, nothing):
    """p 2^n, n integral, or 0 where ``nothing``: one rounding, in two factors since 2^n itself may
    overflow. vscalefps takes 100 to 1000 cycles for what underflows, unless its mask says 0."""
    table = TYPE[_real(p)]

    def pow2(builder, n, v):
        """From n + 1.5·2^mantissa, whose low bits are n: shift them into the exponent of 1."""
        integer = _bits(builder, v)
        bits = builder.bitcast(builder.fadd(n, _fill(v, table["magic"])), integer)
        one = int(_real(p)(1).view(f"u{table['bits'] // 8}"))
        shifted = builder.shl(bits, _fill(integer, table["shift"]))
        return builder.bitcast(builder.add(shifted, _fill(integer, one)), v)

    def codegen(context, builder, sig, args):
        value, n, nothing = args
        v = value.type
        zero = _fill(v, 0.0)
        if _has_scalef(v, table["bits"]):
            name = f"llvm.x86.avx512.mask.scalef.p{'sd'[table['bits'] // 64]}.512"
            mask, i32 = ir.IntType(v.count), ir.IntType(32)
            f = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(v, [v, v, v, mask, i32]), name)
            some = builder.bitcast(builder.not_(nothing), mask)
            return builder.call(f, [value, n, zero, some, i32(4)])
        h = _nearest(builder, builder.fmul(n, _fill(v, 0.5)))
        first = builder.fmul(value, pow2(builder, h, v))
        scaled = builder.fmul(first, pow2(builder, builder.fsub(n, h), v))
        return builder.select(nothing, zero, scaled)
    return p(p, n, nothing), codegen


def _has_scalef(v, bits):
    """AVX-512's instruction for p 2^n, of whole registers."""
    return _SCALEF and getattr(v, "count", 0) * bits == 512


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


def bell(x):
    """e^{−x²/2}. Relative error ≤ (2 + x²/4) ulp."""
    return np.exp(x * x * x.dtype.type(-0.5))


def _power(real, factor):
    """e^{factor x} for factor x below exp's limit; the factor is a power of 2 or minus one."""
    t = TYPE[real]
    log2e, hi, lo, low = (real(v) for v in (1.4426950408889634074 * factor, t["ln2"][0] / factor,
                                            t["ln2"][1] / factor, t["low"] / factor))
    magic = real(t["magic"])
    poly = horner([c * factor**k for k, c in enumerate((1.0, 1.0, *t["exp"]))], real)
    beyond = device((lambda x: x < low) if factor > 0 else (lambda x: x > low))

    @device
    def power(x):
        nothing = beyond(x)                        # as 0, not by way of slow denormals
        x = _within(nothing, x)
        n = (x * log2e + magic) - magic            # an integer; vrndscaleps is two steps of a port
        r = (x - n * hi) - n * lo
        return _scale(poly(r), n, nothing)
    return power


def _make_exp(real):
    high, power = real(TYPE[real]["high"]), _power(real, 1)
    # comparisons with NaN are false: it passes
    return lambda x: power(select(x > high, high, x))


def _make_bell(real):
    power = _power(real, -0.5)
    return lambda x: power(x * x)


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


def bounded(name, real):
    """An odd function within ±1 as x p(x²)/q(x²)."""
    one, end = real(1), real(TYPE[real][f"{name} end"])
    p, q = (horner(c, real) for c in TYPE[real][name])

    def f(x):
        x = select(x > end, end, x)
        x = select(x < -end, -end, x)
        t = x * x
        y = x * p(t) / q(t)
        y = select(y > one, one, y)
        return select(y < -one, -one, y)
    return f


def tanh(x):
    """tanh x. Relative error ≤ 3·2⁻²³, of float64 ≤ 3 ulp."""
    return np.tanh(x)


def _make_tanh(real):
    """A rational; of float64 a polynomial below 0.55, 1 − 2/(e^{2|x|} + 1) above."""
    if "tanh end" in TYPE[real]:
        return bounded("tanh", real)
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
            (exp, _make_exp), (bell, _make_bell), (log1p_unit, _make_log1p),
            (log_above_one, _make_log), (tanh, _make_tanh)):
        _overloads(_public, _make)

    @overload(select, jit_options=POLICY, inline="never")
    def _select(c, a, b):
        return (lambda c, a, b: a if c else b) if isinstance(c, types.Boolean) else None
