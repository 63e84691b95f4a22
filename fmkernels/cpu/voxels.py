"""How compiled loops read and write volumes of any dtype: in blocks that stay in the L1 cache.

A loop takes a volume as its address and dtype code, and computes on blocks of float32 (float64 for
float64 data). That costs the host next to nothing, and one compiled loop serves every dtype::

    address, code = located(x)  # on the host; x must outlive the call

    block = np.empty(n, np.float32)  # in a loop
    load_block(address, code, start, step, block)  # voxels start, start + step, ...
    store_block(block, address, code, start)  # into voxels start, start + 1, ...
"""

from collections.abc import Sequence

import llvmlite.ir
import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from fmkernels.cpu.arithmetic import bits_of, float_of, to_bfloat16
from fmkernels.cpu.compiled import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT16,
    KINDS,
    UINT8,
    njit,
)

ZEROS: dict[torch.dtype, np.floating] = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
"""Typed zeros: they fix the compute dtype of a loop."""


def zero_of(x: Tensor) -> np.floating:
    """A zero that fixes the compute dtype of a loop: float64 for float64, else float32."""
    return np.float64(0) if x.dtype == torch.float64 else np.float32(0)


def located(x: Tensor) -> tuple[int, int]:
    """The address and dtype code of a tensor."""
    return x.data_ptr(), KINDS[x.dtype]


def window_of(window: Sequence[float] | None) -> tuple[bool, float, float, float]:
    """A window as loops take it: (enabled, low, 1 / (high - low), high)."""
    low, high = window or (0.0, 1.0)
    return window is not None, low, 1 / (high - low), high


@intrinsic
def _pointer(_, address):
    """int address -> void*"""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], llvmlite.ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@njit
def elements(address, size, dtype):
    """An array of ``size`` elements of a NumPy dtype at an address."""
    return numba.carray(_pointer(address), (size,), dtype)


@njit
def own_kind(block):
    """The dtype code of an array of float32 or float64."""
    return FLOAT64 if block.itemsize == 8 else FLOAT32


@njit
def _decode_bfloat16(block):
    for i in range(block.size):
        block[i] = float_of(np.uint32(block[i]) << 16)


@njit
def _decode_float16(block):
    for i in range(block.size):
        bits = np.uint32(block[i])
        sign, magnitude = (bits & 0x8000) << 16, (bits & 0x7FFF) << 13
        normal = magnitude + (112 << 23 if magnitude < 0x0F800000 else 224 << 23)
        subnormal = bits_of(float_of(magnitude + (113 << 23)) - np.float32(2.0**-14))
        block[i] = float_of(sign | (normal if magnitude >= 1 << 23 else subnormal))


@njit
def _copy(source, step, block):
    if step == 1:  # only this loop and the next vectorize
        for i in range(block.size):
            block[i] = source[i]
    elif step == -1:
        for i in range(block.size):
            # unsigned: negative indices would count from the end
            block[i] = source[np.uint64(block.size - 1 - i)]
    else:
        first = 0 if step > 0 else source.size - 1
        for i in range(block.size):
            block[i] = source[np.uint64(first + i * step)]


@njit
def load_block(address, kind, start, step, block):
    """block[i] = voxel start + i * step of the volume at an address; step may be negative."""
    way = (block.size - 1) * step
    lowest, span = start + min(way, 0), abs(way) + 1
    if kind == FLOAT32:
        _copy(elements(address + 4 * lowest, span, np.float32), step, block)
    elif kind == FLOAT64:
        _copy(elements(address + 8 * lowest, span, np.float64), step, block)
    elif kind == INT16:
        _copy(elements(address + 2 * lowest, span, np.int16), step, block)
    elif kind == UINT8:
        _copy(elements(address + lowest, span, np.uint8), step, block)
    else:
        _copy(elements(address + 2 * lowest, span, np.uint16), step, block)
        if kind == BFLOAT16:
            _decode_bfloat16(block)
        else:
            _decode_float16(block)


@njit
def _encode_bfloat16(block, target):
    for i in range(block.size):
        target[i] = to_bfloat16(block[i])


@njit
def _encode_float16(block, target):
    for i in range(block.size):
        bits = bits_of(block[i])
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13
        # the sum rounds
        subnormal = bits_of(float_of(magnitude) + np.float32(0.5)) - 0x3F000000
        finite = normal if magnitude >= 113 << 23 else subnormal
        special = 0x7C00 if magnitude <= 0x7F800000 else 0x7E00
        target[i] = ((bits >> 16) & 0x8000) | (finite if magnitude < 0x47800000 else special)


@njit
def _round(block, low, high, target):
    dtype = block.dtype.type
    for i in range(block.size):
        value = np.rint(min(max(block[i], dtype(low)), dtype(high)))
        target[i] = value if block[i] == block[i] else 0


@njit
def store_block(block, address, kind, start):
    """Voxel start + i = block[i], rounded to nearest even; integers saturate, NaN becomes 0."""
    if kind == FLOAT32:
        _copy(block, 1, elements(address + 4 * start, block.size, np.float32))
    elif kind == FLOAT64:
        _copy(block, 1, elements(address + 8 * start, block.size, np.float64))
    elif kind == BFLOAT16:
        _encode_bfloat16(block, elements(address + 2 * start, block.size, np.uint16))
    elif kind == FLOAT16:
        _encode_float16(block, elements(address + 2 * start, block.size, np.uint16))
    elif kind == INT16:
        _round(block, -32768, 32767, elements(address + 2 * start, block.size, np.int16))
    else:
        _round(block, 0, 255, elements(address + start, block.size, np.uint8))


@njit
def window_voxel(value, low, scale):
    """clamp((value - low) * scale, 0, 1), all of one dtype; NaN stays NaN."""
    value = (value - low) * scale
    return type(value)(0) if value < 0 else type(value)(1) if value > 1 else value


@njit
def window_block(block, low, scale):
    """window_voxel of every voxel of a block."""
    low, scale = block.dtype.type(low), block.dtype.type(scale)
    for i in range(block.size):
        block[i] = window_voxel(block[i], low, scale)
