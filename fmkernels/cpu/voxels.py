"""How compiled loops read and write volumes of any type of voxel: in blocks that stay in a core's nearest cache.

A loop takes a volume as its address and the number of its type, and computes on blocks of float32 (float64 for float64
data): that costs the host next to nothing, and one compiled loop serves every type::

    address, kind = x.data_ptr(), KINDS[x.dtype]  # on the host; x must outlive the call

    block = np.empty(n, np.float32)  # in a loop
    load_block(address, kind, start, step, block)  # voxels start, start + step, ...
    store_block(block, address, kind, start)  # into voxels start, start + 1, ...
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
    compiled,
)

ZEROS: dict[torch.dtype, np.floating] = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
"""From which a loop knows in which type to compute."""


def zero_of(x: Tensor) -> np.floating:
    """A zero of the compute dtype, from which a loop takes it: float64 for float64, else float32."""
    return np.float64(0) if x.dtype == torch.float64 else np.float32(0)


def located(x: Tensor) -> tuple[int, int]:
    """A tensor as loops take it: its address, and the number of its type."""
    return x.data_ptr(), KINDS[x.dtype]


def window_of(window: Sequence[float] | None) -> tuple[bool, float, float]:
    """A window as loops take it: whether there is one, its lower end, what its width is multiplied with to be 1."""
    low, high = window or (0.0, 1.0)
    return window is not None, low, 1 / (high - low)


@intrinsic
def _pointer(_, address):
    """The pointer that an integer is the address of."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], llvmlite.ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@compiled
def elements(address, size, dtype):
    """``size`` elements of a numpy type at an address, as an array."""
    return numba.carray(_pointer(address), (size,), dtype)


@compiled
def own_kind(block):
    """The number of the type of an array of float32 or float64."""
    return FLOAT64 if block.itemsize == 8 else FLOAT32


@compiled
def _decode_bfloat16(block):
    for i in range(block.size):
        block[i] = float_of(np.uint32(block[i]) << 16)


@compiled
def _decode_float16(block):
    for i in range(block.size):
        bits = np.uint32(block[i])
        sign, magnitude = (bits & 0x8000) << 16, (bits & 0x7FFF) << 13
        normal = magnitude + (112 << 23 if magnitude < 0x0F800000 else 224 << 23)
        subnormal = bits_of(float_of(magnitude + (113 << 23)) - np.float32(2.0**-14))
        block[i] = float_of(sign | (normal if magnitude >= 1 << 23 else subnormal))


@compiled
def _copy(source, step, block):
    if step == 1:  # this and the next alone fill vectors
        for i in range(block.size):
            block[i] = source[i]
    elif step == -1:
        for i in range(block.size):
            block[i] = source[
                np.uint64(block.size - 1 - i)
            ]  # unsigned: no index that counts from the end
    else:
        first = 0 if step > 0 else source.size - 1
        for i in range(block.size):
            block[i] = source[np.uint64(first + i * step)]


@compiled
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


@compiled
def _encode_bfloat16(block, target):
    for i in range(block.size):
        target[i] = to_bfloat16(block[i])


@compiled
def _encode_float16(block, target):
    for i in range(block.size):
        bits = bits_of(block[i])
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13
        subnormal = (
            bits_of(float_of(magnitude) + np.float32(0.5)) - 0x3F000000
        )  # rounded by the sum
        finite = normal if magnitude >= 113 << 23 else subnormal
        special = 0x7C00 if magnitude <= 0x7F800000 else 0x7E00
        target[i] = ((bits >> 16) & 0x8000) | (finite if magnitude < 0x47800000 else special)


@compiled
def _round(block, low, high, target):
    dtype = block.dtype.type
    for i in range(block.size):
        target[i] = (
            np.rint(min(max(block[i], dtype(low)), dtype(high))) if block[i] == block[i] else 0
        )


@compiled
def store_block(block, address, kind, start):
    """Voxel start + i = block[i], to nearest, ties to even; integers saturate, NaN becomes 0."""
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


@compiled
def window_voxel(value, low, scale):
    """clamp((value - low) * scale, 0, 1), all of one type; NaN stays NaN."""
    value = (value - low) * scale
    return type(value)(0) if value < 0 else type(value)(1) if value > 1 else value


@compiled
def window_block(block, low, scale):
    """window_voxel of every voxel of a block."""
    low, scale = block.dtype.type(low), block.dtype.type(scale)
    for i in range(block.size):
        block[i] = window_voxel(block[i], low, scale)
