"""The arithmetic of a GPU for Triton's interpreter, where numpy's differs.

Approximate float32 instructions are computed in float64, with the rounding steps of the hardware,
so that a kernel that relies on more accuracy shows it. Results are close to a GPU's, not equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import libdevice as cuda_libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .memory import KernelFault

LOG2E, LN2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
TINY = np.finfo(np.float32).tiny


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(x))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (
        (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16))
        .view(np.float32)
        .reshape(np.shape(bits))
    )


def to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """cvt.rzi: toward zero, saturating, NaN to 0. 8 bits are the low bits of a 16-bit result."""
    through = (
        dtype if dtype.itemsize >= 2 else np.dtype(np.uint16 if dtype.kind == "u" else np.int16)
    )
    bounds = np.iinfo(through)
    x = np.nan_to_num(np.trunc(np.asarray(x, np.float64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = (x > float(bounds.min)) & (x < float(bounds.max))
    saturated = np.where(x >= float(bounds.max), through.type(bounds.max), through.type(bounds.min))
    return np.where(inside, np.where(inside, x, 0).astype(through), saturated).astype(dtype)


def _via64(f: Callable) -> Callable:
    """An elementwise function, computed in float64 and rounded once."""

    def apply(*args: np.ndarray) -> np.ndarray:
        return f(*(a.astype(np.float64) for a in args)).astype(args[0].dtype)

    return apply


def _flushed(f: Callable) -> Callable:
    """The .ftz form of an instruction: subnormal arguments and results become zero."""

    def flush(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)

    return lambda *args: flush(f(*(flush(a) for a in args)))


ex2 = _via64(np.exp2)
rsqrt = _via64(lambda x: 1 / np.sqrt(x))


def lg2(x: np.ndarray) -> np.ndarray:
    """lg2.approx.f32: absolute error 2^-22 for x in (0.5, 2), relative error 2^-22 elsewhere."""
    y = np.log2(x.astype(np.float64))
    return np.where((x > 0.5) & (x < 2), np.round(y * 2.0**22) / 2.0**22, y).astype(np.float32)


def fast_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div.approx.f32: a * rcp(b), and 0 for 2^126 < |b| < 2^128 (NaN where a is infinite)."""
    huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
    return np.where(
        huge,
        np.where(np.isinf(a), np.float32(np.nan), np.copysign(np.float32(0), a * b)),
        _via64(np.divide)(a, b),
    )


FLOAT32 = {
    name: _flushed(f)
    for name, f in {
        "fast_expf": lambda x: ex2(x * LOG2E),
        "fast_exp10f": lambda x: ex2(x * np.float32(math.log2(10))),
        "fast_logf": lambda x: lg2(x) * LN2,
        "fast_log2f": lg2,
        "fast_log10f": lambda x: lg2(x) * np.float32(math.log10(2)),
        "fast_powf": lambda x, y: ex2(y * lg2(x)),
        "fast_dividef": fast_divide,
        "fast_sinf": _via64(np.sin),
        "fast_cosf": _via64(np.cos),
    }.items()
}
FLOAT32_OR_64 = {
    name: _via64(f)
    for name, f in {
        "abs": np.abs, "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan,
        "atan2": np.arctan2, "ceil": np.ceil, "copysign": np.copysign, "cos": np.cos,
        "cosh": np.cosh, "div_rn": np.divide, "exp": np.exp, "exp2": np.exp2,
        "erf": np.vectorize(math.erf, otypes=[np.float64]), "expm1": np.expm1, "floor": np.floor,
        "fma": lambda x, y, z: x * y + z, "fmod": np.fmod, "hypot": np.hypot, "log": np.log,
        "log10": np.log10, "log1p": np.log1p, "log2": np.log2, "nearbyint": np.rint,
        "pow": np.power, "rcp_rn": np.reciprocal, "rint": np.rint,
        "round": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
        "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "sinh": np.sinh, "sqrt": np.sqrt,
        "sqrt_rn": np.sqrt, "tan": np.tan, "tanh": np.tanh, "trunc": np.trunc,
    }.items()
}  # fmt: skip
PREDICATES = {
    "isnan": np.isnan,
    "isinf": np.isinf,
    "finitef": np.isfinite,
    "isfinited": np.isfinite,
    "signbit": np.signbit,
}
INLINE_ASM = {
    "ex2": ex2, "lg2": lg2, "rcp": _via64(np.reciprocal), "rsqrt": rsqrt, "sqrt": _via64(np.sqrt),
    "tanh": _via64(np.tanh), "sin": _via64(np.sin), "cos": _via64(np.cos),
}  # fmt: skip


class HardwareNumerics(InterpreterBuilder):
    """The interpreter's builder with a GPU's conversions, NaN rules and approximate functions."""

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source == tl.float32:
            return TensorHandle(to_bf16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(from_bf16(src.data), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_si(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        return TensorHandle(
            to_integer(src.data, interpreter._get_np_dtype(dst_type)), dst_type.scalar
        )

    create_fp_to_ui = create_fp_to_si

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
        if lhs.dtype.scalar == tl.bfloat16:
            raise KernelFault(
                f"arithmetic ({op.__name__}) on bfloat16: convert with .to(tl.float32) first"
            )
        result = super().binary_op(lhs, rhs, op)
        if result.data.dtype == bool:  # a comparison, which would keep the type of its operands
            result.dtype = tl.int1
        return result

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(
        self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, propagate_nans
    ) -> TensorHandle:
        every = propagate_nans == interpreter._ir.PROPAGATE_NAN.ALL
        at_least = self.binary_op(arg, lo, np.maximum if every else np.fmax)
        return self.binary_op(at_least, hi, np.minimum if every else np.fmin)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        wide = (h.data.astype(np.float64) for h in (x, y, z))
        return TensorHandle(FLOAT32_OR_64["fma"](*wide).astype(z.data.dtype), z.dtype.scalar)

    def create_exp(self, arg: TensorHandle) -> TensorHandle:
        return self._unary(arg, lambda x: ex2(x * LOG2E), np.exp)

    def create_exp2(self, arg: TensorHandle) -> TensorHandle:
        return self._unary(arg, _flushed(ex2), np.exp2)

    def create_sqrt(self, arg: TensorHandle) -> TensorHandle:
        return self._unary(arg, _flushed(np.sqrt), np.sqrt)

    def create_rsqrt(self, arg: TensorHandle) -> TensorHandle:
        return self._unary(arg, _flushed(rsqrt), lambda x: 1 / np.sqrt(x))

    def _unary(self, arg: TensorHandle, single: Callable, double: Callable) -> TensorHandle:
        return self.unary_op(arg, single if arg.data.dtype == np.float32 else double)

    def create_inline_asm(
        self,
        asm: str,
        constraints: str,
        values: list[TensorHandle],
        types,
        is_pure: bool,
        pack: int,
    ):
        one = re.fullmatch(r"\s*(\w+)\.approx(\.ftz)?\.f32\s+\$0\s*,\s*\$1\s*;?\s*", asm)
        if not one or one[1] not in INLINE_ASM or len(values) != 1:
            raise KernelFault(
                f"the checked interpreter does not know the inline assembly {asm!r} "
                "(numerics.INLINE_ASM)"
            )
        f = _flushed(INLINE_ASM[one[1]]) if one[2] else INLINE_ASM[one[1]]
        return _Result(TensorHandle(f(values[0].data), values[0].dtype.scalar))


class _Result:
    """An operation with one result, as tl.inline_asm_elementwise expects it."""

    def __init__(self, handle: TensorHandle):
        self.handle = handle

    def get_result(self, _: int) -> TensorHandle:
        return self.handle


def _device_function(name: str) -> Callable:
    single, either = FLOAT32.get(name), FLOAT32_OR_64.get(name) or PREDICATES.get(name)

    def call(*args, _semantic=None):
        semantic = interpreter.interpreter_semantic
        tensors = [semantic.to_tensor(arg) for arg in args]
        block = next((t for t in tensors if t.type.is_block()), None)
        if block is not None:
            tensors = [semantic.broadcast_impl_value(t, block)[0] for t in tensors]
            block = max((t for t in tensors), key=lambda t: t.handle.data.size)
            tensors = [semantic.broadcast_impl_value(t, block)[0] for t in tensors]
        dtypes = {t.dtype for t in tensors}
        f = single if single and dtypes == {tl.float32} else None if single else either
        if f is None or len(dtypes) != 1 or not dtypes <= {tl.float32, tl.float64}:
            raise KernelFault(
                f"libdevice.{name} does not take {', '.join(str(t.dtype) for t in tensors)}"
            )
        dtype = tl.int32 if name in PREDICATES else tensors[0].dtype
        data = np.asarray(f(*(t.handle.data for t in tensors))).astype(
            interpreter._get_np_dtype(dtype)
        )
        handle = interpreter.interpreter_builder.carry(
            TensorHandle(data, dtype), [t.handle for t in tensors]
        )
        return tl.tensor(handle, block.type.with_element_ty(dtype) if block is not None else dtype)

    return call


@contextmanager
def device_functions() -> Iterator[None]:
    """Give the interpreter a libdevice.

    Kernels must name its functions through the module: libdevice.log1p(x).
    """
    names = {*FLOAT32, *FLOAT32_OR_64, *PREDICATES}
    saved = [
        (m, n, getattr(m, n)) for m in (libdevice, cuda_libdevice) for n in names if hasattr(m, n)
    ]
    for module, name, _ in saved:
        setattr(module, name, _device_function(name))
    try:
        yield
    finally:
        for module, name, function in saved:
            setattr(module, name, function)
