"""Math functions for the loops of the CPU path, which vectorize; access to single elements.

Where a loop does little with each element, blocks of converted ones (see `voxels`) would cost it a
third of its speed: `load` and `store` convert bfloat16, seen as uint16, between two operations.
"""

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from fmkernels.cpu.compiled import subroutine

INLINE: dict[str, Any] = {"forceinline": True}
"""Options of functions that must be inlined for the loop around them to be vectorized."""
STRICT: dict[str, Any] = {"forceinline": True, "fastmath": {"contract", "nsz"}}
"""The same, for functions that must evaluate sums and products in the order written."""

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693145751953125)  # its product with an integer below 2^8 is exact
_LN2_LOW = np.float32(1.4286068203094172e-06)
_ROUNDER = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_BIASED_ROUNDER = np.float32(1.5 * 2**23 + 127)  # the same, plus the bias of exponents
# e^r = 1 + r + r^2 P(r) for |r| <= log(2) / 2, relative error 3e-9 (minimax fit, degree 4)
_P0, _P1, _P2, _P3, _P4 = map(
    np.float32, (0.49999994, 0.16666521, 0.04166839, 0.0083687454, 0.0013814539)
)
# 2^r = 1 + r Q(r) for |r| <= 1/2, relative error 2e-8 (minimax fit, degree 5)
_Q0, _Q1, _Q2, _Q3, _Q4, _Q5 = map(
    np.float32, (0.6931472, 0.24022648, 0.055503324, 0.009618437, 0.0013398875, 0.00015353362)
)
# log(1 + f) = f - s (f - s^2 R(s^2)), s = f / (2 + f), for f in [-0.3, 1], relative error 5e-9
# (minimax fit, degree 3)
_R0, _R1, _R2, _R3 = map(np.float32, (0.6666642, 0.40021533, 0.28001678, 0.28012666))


@intrinsic
def float_of(_, bits):
    """The float32 with these bits, which are cast to uint32."""
    return types.float32(types.uint32), _bitcast


@intrinsic
def bits_of(_, value):
    """The bits of a value cast to float32, as uint32."""
    return types.uint32(types.float32), _bitcast


def _bitcast(context, builder, signature, arguments):
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


@subroutine(**INLINE)
def to_bfloat16(value):
    """The bits of a float32 rounded to bfloat16, to nearest, ties to even."""
    bits = bits_of(value)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 if value == value else 0x7FC0


@subroutine(by_type=True, **INLINE)
def load(array, i):
    """Element i, in a compiled loop: bfloat16 (stored as uint16) as float32, others unchanged."""
    if array.dtype == types.uint16:
        return lambda array, i: float_of(array[i] << 16)
    return lambda array, i: array[i]


@subroutine(by_type=True, **INLINE)
def store(array, i, value):
    """Element i = value, in a compiled loop: rounded to bfloat16 (as uint16) where needed."""
    if array.dtype == types.uint16:

        def write(array, i, value):
            array[i] = to_bfloat16(value)

    else:

        def write(array, i, value):
            array[i] = value

    return write


@subroutine(by_type=True, **STRICT)
def exp(x):
    """e^x, in a compiled loop: float32 within 1.1 ulp, vectorized."""
    if x == types.float64:
        return lambda x: math.exp(x)

    def exp_float32(x):
        x = np.float32(-105) if x < np.float32(-105) else x
        x = np.float32(89) if x > np.float32(89) else x
        shifted = x * _LOG2E + _ROUNDER
        n = shifted - _ROUNDER
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        p = (((_P4 * r + _P3) * r + _P2) * r + _P1) * r + _P0
        power = np.int32(bits_of(shifted)) - np.int32(0x4B400000)
        half = power >> 1
        first, second = float_of((half + 127) << 23), float_of((power - half + 127) << 23)
        return ((r * r) * p + r + np.float32(1)) * first * second

    return exp_float32


@subroutine(by_type=True, **STRICT)
def sigmoid(x):
    """1 / (1 + e^-x), in a compiled loop, vectorized; 0 below -88.4.

    The relative error in float32 is at most 2^-24 (1.25 |x| + 4).
    """
    if x == types.float64:
        return lambda x: 1 / (1 + math.exp(-x))

    def sigmoid_float32(x):
        t = x * -_LOG2E
        t = np.float32(-126) if t < np.float32(-126) else t
        t = np.float32(128) if t > np.float32(128) else t  # 2^128 is infinity
        shifted = t + _BIASED_ROUNDER
        r = t - (shifted - _BIASED_ROUNDER)
        q = ((((_Q5 * r + _Q4) * r + _Q3) * r + _Q2) * r + _Q1) * r + _Q0
        power = (r * q + np.float32(1)) * float_of(bits_of(shifted) << 23)
        return np.float32(1) / (np.float32(1) + power)

    return sigmoid_float32


@subroutine(**STRICT)
def _log_series(f, correction):
    """log(1 + f) + correction, for f in [-0.3, 1]."""
    s = f / (np.float32(2) + f)
    z = s * s
    series = ((_R3 * z + _R2) * z + _R1) * z + _R0
    return f - (s * (f - z * series) - correction)


@subroutine(by_type=True, **STRICT)
def log1p(x):
    """log(1 + x) for x in [0, 1], in a compiled loop: float32 within 1 ulp, vectorized."""
    if x == types.float64:
        return lambda x: math.log1p(x)
    return lambda x: _log_series(x, np.float32(0))


@subroutine(by_type=True, **STRICT)
def log(x):
    """The natural logarithm, in a compiled loop: float32 within 1 ulp, vectorized."""
    if x == types.float64:
        return lambda x: math.log(x)

    def log_float32(x):
        tiny = x < np.float32(2.0**-126)
        bits = bits_of(x * np.float32(2.0**23) if tiny else x)
        # the fraction lies in [sqrt(1/2), sqrt(2))
        power = np.int32(np.int32(bits - 0x3F3504F3) >> 23)
        f = float_of(bits - (power << 23)) - np.float32(1)
        n = np.float32(power) - np.float32(23 if tiny else 0)
        result = n * _LN2_HIGH + _log_series(f, n * _LN2_LOW)
        result = x if x == np.float32(np.inf) else result
        result = np.float32(-np.inf) if x == 0 else result
        return result if x >= 0 else np.float32(np.nan)

    return log_float32


@subroutine(fastmath={"reassoc"})
def sum_reordered(values):
    """The sum of an array in float64, reordered so that the loop is vectorized."""
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total
