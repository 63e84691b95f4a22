"""Conversion of voxels: the HU window after a load, rounding and saturation before a store."""

import triton
import triton.language as tl


@triton.jit
def window_voxels(voxels, low, scale):
    """clamp((voxels - low) * scale, 0, 1) in the dtype of low; NaN stays NaN."""
    value = (voxels.to(low.dtype) - low) * scale
    if voxels.dtype.is_int():
        value = tl.clamp(value, 0.0, 1.0)
    elif value.dtype == tl.float64:  # max.NaN exists in 16 and 32 bits only
        value = tl.where(value < 0.0, 0.0, tl.where(value > 1.0, 1.0, value))
    else:
        value = tl.clamp(value, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return value


@triton.jit
def to_storage(value, TYPE: tl.constexpr):
    """The value rounded to nearest, ties to even; integers saturate, NaN becomes 0."""
    if TYPE.is_int():
        LOW: tl.constexpr = -(2 ** (TYPE.primitive_bitwidth - 1)) if TYPE.is_int_signed() else 0
        HIGH: tl.constexpr = LOW + 2**TYPE.primitive_bitwidth - 1
        value = tl.clamp(tl.where(value == value, value, 0.0), LOW * 1.0, HIGH * 1.0)
        # added to 1.5 * 2^52 or 1.5 * 2^23, the whole number is in the lowest bits
        if value.dtype == tl.float64:
            bits = (value + 6755399441055744.0).to(tl.int64, bitcast=True)
        else:
            bits = (value + 12582912.0).to(tl.int32, bitcast=True)
        result = bits.to(TYPE)
    elif TYPE.is_bf16():  # no conversion from float64 exists
        result = value.to(tl.float32).to(TYPE)
    else:
        result = value.to(TYPE)
    return result
