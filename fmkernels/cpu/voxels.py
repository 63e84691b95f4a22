"""How compiled loops read and write volumes of any dtype: in blocks that stay in the L1 cache.

A loop takes a volume as its address and dtype code, which `parallel_for` passes for a tensor, and
computes on blocks of float32 (float64 for float64 data). That costs the host next to nothing, and
one compiled loop serves every dtype::

    address, code = volume
    block = empty(n, np.float32)
    load_block(address, code, start, block)  # voxels start, start + 1, ...
    store_block(block, address, code, start)  # into voxels start, start + 1, ...
"""

from collections.abc import Sequence
from functools import partial

import llvmlite.ir
import numpy as np
import torch
from numba import types
from numba.core.cgutils import for_range, unpack_tuple
from numba.extending import intrinsic
from numba.np.arrayobj import _empty_nd_impl, populate_array
from torch import Tensor

from fmkernels.cpu.compiled import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT16,
    UINT8,
    subroutine,
)

_ZERO, _ZERO_OF_FLOAT64 = np.float32(0), np.float64(0)


def zero_of(x: Tensor) -> np.floating:
    """A zero that fixes the compute dtype of a loop: float64 for float64, else float32."""
    return _ZERO_OF_FLOAT64 if x.dtype == torch.float64 else _ZERO


def window_of(window: Sequence[float] | None) -> tuple[bool, float, float, float]:
    """A window as loops take it: (enabled, low, 1 / (high - low), high)."""
    low, high = window or (0.0, 1.0)
    return window is not None, low, 1 / (high - low), high


# Numba compiles functions of its own for numpy.empty, carray and reshape with each new type.


@intrinsic
def empty(_, shape, dtype):
    """An array of a NumPy dtype, or of the dtype of a scalar, with undefined elements."""
    result = types.Array(getattr(dtype, "dtype", dtype), getattr(shape, "count", 1), "C")

    def generate(context, builder, signature, arguments):
        return _empty_nd_impl(context, builder, result, _sizes(builder, arguments[0]))._getvalue()

    return result(shape, dtype), generate


@intrinsic
def elements(_, address, shape, dtype):
    """An array of a shape and of a NumPy dtype at an address."""
    result = types.Array(dtype.dtype, getattr(shape, "count", 1), "C")

    def generate(context, builder, signature, arguments):
        pointer = context.get_value_type(result.dtype).as_pointer()
        data = builder.inttoptr(arguments[0], pointer)
        return _array(context, builder, result, data, arguments[1])

    return result(types.intp, shape, dtype), generate


@intrinsic
def part(_, array, start, shape):
    """Elements from ``start`` on of a flat array, in a shape. The array must live on."""
    result = types.Array(array.dtype, getattr(shape, "count", 1), "C")

    def generate(context, builder, signature, arguments):
        data = context.make_array(array)(context, builder, arguments[0]).data
        data = builder.gep(data, [arguments[1]])
        return _array(context, builder, result, data, arguments[2])

    return result(array, types.intp, shape), generate


def _array(context, builder, type_, data, shape):
    array, shape = context.make_array(type_)(context, builder), _sizes(builder, shape)
    strides = [context.get_constant(types.intp, context.get_abi_sizeof(data.type.pointee))]
    for size in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], size))
    populate_array(array, data, shape, strides, strides[-1], None)
    return array._getvalue()


def _sizes(builder, shape):
    return unpack_tuple(builder, shape) if hasattr(shape.type, "count") else [shape]


@intrinsic
def own_kind(_, block):
    """The dtype code of an array of float32 or float64."""
    code = FLOAT64 if block.dtype == types.float64 else FLOAT32
    return types.intp(block), lambda context, *_: context.get_constant(types.intp, code)


@intrinsic
def load_block(_, address, kind, start, block):
    """block[i] = voxel start + i of the volume at an address."""
    write = partial(_load_loops, _INT64(1))
    return _conversion("load", write, block, address, kind, start, block)


@intrinsic
def load_reversed(_, address, kind, start, block):
    """block[i] = voxel start - i."""
    write = partial(_load_loops, _INT64(-1))
    return _conversion("load_reversed", write, block, address, kind, start, block)


@intrinsic
def load_strided(_, address, kind, start, step, block):
    """block[i] = voxel start + i * step. Slower: it does not vectorize."""
    write = partial(_load_loops, None)
    return _conversion("load_strided", write, block, address, kind, start, step, block)


@intrinsic
def store_block(_, block, address, kind, start):
    """Voxel start + i = block[i], rounded to nearest even; integers saturate, NaN becomes 0."""
    return _conversion("store", _store_loops, block, block, address, kind, start)


# Loops in LLVM's language convert blocks: Numba would take seconds to compile a loop per dtype.
# Each loop has one copy of them, in functions that are not inlined.

_INT8, _INT16, _INT32, _INT64 = map(llvmlite.ir.IntType, (8, 16, 32, 64))
_FLOAT, _DOUBLE = llvmlite.ir.FloatType(), llvmlite.ir.DoubleType()
_STORED = {
    FLOAT32: _FLOAT,
    FLOAT64: _DOUBLE,
    BFLOAT16: _INT16,
    FLOAT16: _INT16,
    INT16: _INT16,
    UINT8: _INT8,
}
"""What the elements of each dtype are in the memory."""


def _conversion(name, write, block, *arguments):
    """Signature and code of an intrinsic that calls a function for blocks of this dtype.

    The function gets the block as pointer and size, in place of the array, and integers.
    """
    if block.dtype not in (types.float32, types.float64) or block.layout != "C":
        raise TypeError(f"{name}_block: expected a contiguous block of floats, got {block}")
    signature = types.void(*[x if x == block else types.intp for x in arguments])

    def generate(context, builder, signature, values):
        flat = []
        for value, type_ in zip(values, signature.args, strict=True):
            if type_ == block:
                array = context.make_array(block)(context, builder, value)
                flat += [array.data, array.nitems]
            else:
                flat.append(value)
        module, called = builder.module, f"fmkernels_{name}_{block.dtype}"
        if called not in module.globals:
            kind = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [x.type for x in flat])
            function = llvmlite.ir.Function(module, kind, called)
            function.linkage = "linkonce_odr"
            function.attributes.add("noinline")
            for argument in function.args:
                if argument.type.is_pointer:
                    argument.add_attribute("noalias")
            inner = llvmlite.ir.IRBuilder(function.append_basic_block())
            write(inner, *function.args)
            inner.ret_void()
        builder.call(module.globals[called], flat)
        return context.get_dummy_value()

    return signature, generate


def _load_loops(step, b, address, kind, start, *others):
    *steps, block, size = others
    for code, stored in _STORED.items():
        with b.if_then(b.icmp_signed("==", kind, _INT64(code))):
            first = b.gep(b.inttoptr(address, stored.as_pointer()), [start])
            with for_range(b, size) as loop:
                voxel = b.gep(first, [b.mul(loop.index, step or steps[0])])
                value = _decoded(b, b.load(voxel), code)
                b.store(_as(b, value, block.type.pointee), b.gep(block, [loop.index]))


def _store_loops(b, block, size, address, kind, start):
    for code, stored in _STORED.items():
        with b.if_then(b.icmp_signed("==", kind, _INT64(code))):
            first = b.gep(b.inttoptr(address, stored.as_pointer()), [start])
            with for_range(b, size) as loop:
                value = b.load(b.gep(block, [loop.index]))
                b.store(_encoded(b, value, code), b.gep(first, [loop.index]))


def _as(b, value, float_type):
    """A float or double as the other one, or unchanged."""
    if value.type == float_type:
        return value
    return (b.fpext if float_type == _DOUBLE else b.fptrunc)(value, float_type)


def _decoded(b, x, code):
    """An element as float; as double if it is one."""
    if code == INT16:
        return b.sitofp(x, _FLOAT)
    if code == UINT8:
        return b.uitofp(x, _FLOAT)
    if code not in (BFLOAT16, FLOAT16):
        return x
    bits = b.zext(x, _INT32)
    if code == BFLOAT16:
        return b.bitcast(b.shl(bits, _INT32(16)), _FLOAT)
    sign = b.shl(b.and_(bits, _INT32(0x8000)), _INT32(16))
    magnitude = b.shl(b.and_(bits, _INT32(0x7FFF)), _INT32(13))
    special = b.icmp_unsigned(">=", magnitude, _INT32(0x0F800000))
    bias = b.select(special, _INT32(224 << 23), _INT32(112 << 23))
    normal = b.add(magnitude, bias)
    shifted = b.bitcast(b.add(magnitude, _INT32(113 << 23)), _FLOAT)
    subnormal = b.bitcast(b.fsub(shifted, _FLOAT(2.0**-14)), _INT32)
    is_normal = b.icmp_unsigned(">=", magnitude, _INT32(1 << 23))
    return b.bitcast(b.or_(sign, b.select(is_normal, normal, subnormal)), _FLOAT)


def _encoded(b, value, code):
    """A float or double as an element."""
    if code in (FLOAT32, FLOAT64):
        return _as(b, value, _STORED[code])
    if code in (INT16, UINT8):
        low, high = (-32768, 32767) if code == INT16 else (0, 255)
        low, high = value.type(low), value.type(high)
        number = b.select(b.fcmp_ordered("<", value, low), low, value)
        number = b.select(b.fcmp_ordered(">", number, high), high, number)
        number = b.select(b.fcmp_unordered("uno", value, value), value.type(0), number)
        rounded = b.call(b.module.declare_intrinsic("llvm.rint", [value.type]), [number])
        return b.trunc(b.fptosi(rounded, _INT32), _STORED[code])
    bits = b.bitcast(_as(b, value, _FLOAT), _INT32)
    magnitude = b.and_(bits, _INT32(0x7FFFFFFF))
    is_nan = b.icmp_unsigned(">", magnitude, _INT32(0x7F800000))

    def nearest_even(x, shift):  # x >> shift
        odd = b.and_(b.lshr(x, _INT32(shift)), _INT32(1))
        return b.lshr(b.add(x, b.add(odd, _INT32((1 << shift - 1) - 1))), _INT32(shift))

    if code == BFLOAT16:
        return b.trunc(b.select(is_nan, _INT32(0x7FC0), nearest_even(bits, 16)), _INT16)
    normal = nearest_even(b.sub(magnitude, _INT32(112 << 23)), 13)
    sum = b.fadd(b.bitcast(magnitude, _FLOAT), _FLOAT(0.5))  # rounds
    subnormal = b.sub(b.bitcast(sum, _INT32), _INT32(0x3F000000))
    is_normal = b.icmp_unsigned(">=", magnitude, _INT32(113 << 23))
    finite = b.select(is_normal, normal, subnormal)
    special = b.select(is_nan, _INT32(0x7E00), _INT32(0x7C00))
    is_finite = b.icmp_unsigned("<", magnitude, _INT32(0x47800000))
    sign = b.and_(b.lshr(bits, _INT32(16)), _INT32(0x8000))
    return b.trunc(b.or_(sign, b.select(is_finite, finite, special)), _INT16)


@subroutine
def read_block(x, first, block):
    """Elements from ``first`` on: where they lie if of the dtype of the block, else loaded."""
    address, kind = x
    if kind == own_kind(block):
        return elements(address + block.itemsize * first, block.size, block.dtype)
    load_block(address, kind, first, block)
    return block


@subroutine
def window_voxel(value, low, scale):
    """clamp((value - low) * scale, 0, 1), all of one dtype; NaN stays NaN."""
    value = (value - low) * scale
    return type(value)(0) if value < 0 else type(value)(1) if value > 1 else value


@subroutine
def window_block(block, low, scale):
    """window_voxel of every voxel of a block."""
    low, scale = block.dtype.type(low), block.dtype.type(scale)
    for i in range(block.size):
        block[i] = window_voxel(block[i], low, scale)
