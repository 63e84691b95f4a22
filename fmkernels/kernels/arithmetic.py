"""Fast float32 logarithm and division, as accurate as the ops need; float64 in full accuracy.

And division of integers by a divisor that the host knows, in 3 instructions instead of 17.
"""

from functools import lru_cache

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)
# log1p(e) = e * P(e) on [0, 1], relative error 1.6e-7 in float32 (minimax fit, degree 8)
P0 = tl.constexpr(0.9999999403953552)
P1 = tl.constexpr(-0.4999949336051941)
P2 = tl.constexpr(0.3331909775733948)
P3 = tl.constexpr(-0.2484297901391983)
P4 = tl.constexpr(0.19105996191501617)
P5 = tl.constexpr(-0.13663223385810852)
P6 = tl.constexpr(0.07822569459676743)
P7 = tl.constexpr(-0.029505079612135887)
P8 = tl.constexpr(0.005232654511928558)


@triton.jit
def _log1p_by(e, UNIT: tl.constexpr):
    """log1p(e) / e * UNIT for e in [0, 1], in float32."""
    s = e * (P8 * UNIT) + P7 * UNIT
    s = s * e + P6 * UNIT
    s = s * e + P5 * UNIT
    s = s * e + P4 * UNIT
    s = s * e + P3 * UNIT
    s = s * e + P2 * UNIT
    s = s * e + P1 * UNIT
    return s * e + P0 * UNIT


@triton.jit
def log1p(e):
    """log1p(e) for e in [0, 1]."""
    if e.dtype == tl.float64:
        result = libdevice.log1p(e)
    else:
        result = _log1p_by(e, 1.0) * e
    return result


@triton.jit
def log2(a):
    """log2 of a normal a > 0: exponent plus log1p of the mantissa; half as long as tl.log2."""
    if a.dtype == tl.float64:
        result = tl.log2(a)
    else:
        bits = a.to(tl.int32, bitcast=True)
        fraction = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
        biased = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True)
        exponent = biased - 8388735.0  # 2^23 + 127
        result = _log1p_by(fraction, LOG2E) * fraction + exponent
    return result


@triton.jit
def divide(a, b):
    """a / b; in float32 within 2 ulp, and 0 for |b| above 2^126."""
    if b.dtype == tl.float64:
        result = a / b
    else:
        result = libdevice.fast_dividef(a, b)
    return result


@lru_cache(maxsize=4096)
def reciprocal(divisor: int) -> int:
    """What `quotient` takes for a divisor in [1, 2^31]: 32 bits of a multiplier, 32 of a shift."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << 31 + shift) // divisor) << 32 | shift


@triton.jit
def quotient(n, reciprocal):
    """n // divisor for int32 n >= 0: exact, because n < 2^31 times the error of 2^-31-shift / d."""
    multiplier, shift = (reciprocal >> 32).to(tl.uint32), reciprocal.to(tl.uint32)
    return (tl.umulhi(n.to(tl.uint32) * 2, multiplier) >> shift).to(tl.int32)
