"""The operations of an interpreted kernel. Each is checked before it runs.

Lanes that a masked load without `other` leaves undefined are marked, and every operation passes the
marks on. A use that matters is a fault, whatever garbage the lanes hold; a use that is masked or
selected away is not. Results of an integer division by zero are treated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from .memory import ADDRESS, KernelFault, Memory
from .numerics import HardwareNumerics


def undefined(handle: TensorHandle) -> np.ndarray | None:
    """The undefined lanes as a mask, or None if there are none."""
    return handle.attr.get("undefined")


def set_undefined(handle: TensorHandle, lanes: np.ndarray) -> None:
    shape = np.shape(handle.data)
    handle.attr["undefined"] = lanes if lanes.shape == shape else np.broadcast_to(lanes, shape)
    interpreter.interpreter_builder.any_undefined = True


def _lanes(handle: TensorHandle) -> np.ndarray:
    lanes = undefined(handle)
    return np.zeros(np.shape(handle.data), bool) if lanes is None else lanes


def _handles(args: Sequence) -> list[TensorHandle]:
    return [a for a in args if isinstance(a, TensorHandle)]


def _moves_lanes(stock: Callable) -> Callable:
    """An operation that only moves lanes. It moves their marks in the same way."""

    def method(self, *args):
        result = stock(self, *args)
        if self.any_undefined and any(undefined(h) is not None for h in _handles(args)):
            marks = [
                TensorHandle(_lanes(a), tl.int1) if isinstance(a, TensorHandle) else a for a in args
            ]
            moved = stock(self, *marks)
            pairs = (
                zip(result, moved, strict=True) if isinstance(result, tuple) else [(result, moved)]
            )
            for out, mark in pairs:
                set_undefined(out, mark.data)
        return result

    return method


def _elementwise(stock: Callable) -> Callable:
    """An elementwise operation. A result is undefined where an argument is."""

    def method(self, *args):
        result = stock(self, *args)
        return self.carry(result, _handles(args)) if self.any_undefined else result

    return method


def _without_overflow(op: Callable) -> Callable:
    """Integer arithmetic that must stay in the range of a signed type."""

    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        result = self.binary_op(lhs, rhs, op)
        dtype = lhs.dtype.scalar
        if dtype.is_int_signed() and dtype != tl.int1:
            bounds = np.iinfo(result.data.dtype)
            exact = op(lhs.data, rhs.data, dtype=np.float64)
            if exact.max() >= bounds.max + 1.0 or exact.min() < bounds.min:
                bad = (exact >= bounds.max + 1.0) | (exact < bounds.min)
                if (bad := bad & ~_lanes(lhs) & ~_lanes(rhs)).any():
                    raise KernelFault(
                        f"{dtype} overflow: {op.__name__} gives {int(exact[bad].flat[0])}"
                    )
        return result

    return _elementwise(method)


def _divides(stock: Callable) -> Callable:
    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        result = stock(self, lhs, rhs)
        if not rhs.data.all():
            set_undefined(result, rhs.data == 0)
        return self.carry(result, (lhs, rhs, result)) if self.any_undefined else result

    return method


class CheckedBuilder(HardwareNumerics):
    """Replaces the interpreter's builder. Checks values here, and memory through `memory`."""

    memory: Memory
    report: object  # the report of the running checked block
    any_undefined: bool  # whether this launch has had an undefined lane so far

    create_add = _without_overflow(np.add)
    create_sub = _without_overflow(np.subtract)
    create_mul = _without_overflow(np.multiply)
    create_sdiv = _divides(HardwareNumerics.create_sdiv)
    create_udiv = _divides(HardwareNumerics.create_udiv)
    create_srem = _divides(HardwareNumerics.create_srem)
    create_urem = _divides(HardwareNumerics.create_urem)

    def carry(self, result: TensorHandle, arguments: Sequence[TensorHandle]) -> TensorHandle:
        """Mark the lanes of a result that depend on undefined lanes of the arguments."""
        marks = [m for m in map(undefined, arguments) if m is not None]
        if marks:
            lanes = marks.pop()
            try:
                for other in marks:
                    lanes = lanes if other is lanes else lanes | other
                set_undefined(result, lanes)
            except ValueError:  # not elementwise, such as a dot product
                set_undefined(result, np.array(any(m.any() for m in [lanes, *marks])))
        return result

    def defined(self, handle: TensorHandle, use: str, mask: np.ndarray | bool = True) -> None:
        """Raise if a lane that matters is undefined."""
        marks = undefined(handle)
        if marks is not None and (marks & mask).any():
            lane = int(np.flatnonzero(np.broadcast_to(marks & mask, np.shape(handle.data)))[0])
            raise KernelFault(
                f"undefined lanes: lane {lane} of {use} comes from a masked load without `other`, "
                "or from a division by zero"
            )

    def create_select(
        self, cond: TensorHandle, lhs: TensorHandle, rhs: TensorHandle
    ) -> TensorHandle:
        result = super().create_select(cond, lhs, rhs)
        if self.any_undefined:
            set_undefined(result, _lanes(cond) | np.where(cond.data, _lanes(lhs), _lanes(rhs)))
        return result

    def create_and(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._logic(lhs, rhs, np.bitwise_and, decisive=False)

    def create_or(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._logic(lhs, rhs, np.bitwise_or, decisive=True)

    def _logic(
        self, lhs: TensorHandle, rhs: TensorHandle, op: Callable, decisive: bool
    ) -> TensorHandle:
        result = self.carry(self.binary_op(lhs, rhs, op), (lhs, rhs))
        if self.any_undefined and result.data.dtype == bool:  # defined where one side is decisive
            decided = (~_lanes(lhs) & (lhs.data == decisive)) | (
                ~_lanes(rhs) & (rhs.data == decisive)
            )
            set_undefined(result, _lanes(result) & ~decided)
        return result

    def create_gather(self, src: TensorHandle, indices: TensorHandle, axis: int) -> TensorHandle:
        result = super().create_gather(src, indices, axis)
        if self.any_undefined:
            set_undefined(
                result, _lanes(indices) | np.take_along_axis(_lanes(src), indices.data, axis=axis)
            )
        return result

    def create_masked_load(
        self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile
    ) -> TensorHandle:
        element, active = ptrs.get_element_ty(), _mask(mask, ptrs.data)
        dtype = interpreter._get_np_dtype(element)
        self._access("read", ptrs, mask, active, dtype.itemsize)
        fill = np.broadcast_to(
            _garbage(element, dtype) if other is None else other.data, ptrs.data.shape
        )
        data = interpreter._interpreter.load(ptrs.data & ADDRESS, active, fill.astype(dtype), dtype)
        result = TensorHandle(data, element)
        if other is None and not active.all():
            set_undefined(result, ~active)
        elif other is not None and undefined(other) is not None:
            set_undefined(result, undefined(other) & ~active)
        return result

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy) -> None:
        active = _mask(mask, ptrs.data)
        self.defined(value, "a stored value", active)
        self._access(
            "write", ptrs, mask, active, interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        )
        interpreter._interpreter.store(ptrs.data & ADDRESS, value.data, active)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope) -> TensorHandle:
        active = _mask(mask, ptr.data)
        self.defined(val, "the value of an atomic", active)
        self._access("atomic", ptr, mask, active, val.data.dtype.itemsize, sem)
        return super().create_atomic_rmw(
            op, TensorHandle(ptr.data & ADDRESS, ptr.dtype), val, mask, sem, scope
        )

    def create_atomic_cas(self, ptr, cmp, val, sem, scope) -> TensorHandle:
        for handle in (cmp, val):
            self.defined(handle, "the value of an atomic")
        self._access(
            "atomic", ptr, None, np.ones(np.shape(ptr.data), bool), val.data.dtype.itemsize, sem
        )
        return super().create_atomic_cas(
            TensorHandle(ptr.data & ADDRESS, ptr.dtype), cmp, val, sem, scope
        )

    def _access(
        self, kind: str, ptrs: TensorHandle, mask, active: np.ndarray, size: int, semantics=None
    ) -> None:
        self.defined(ptrs, f"the addresses of a {kind}", active)
        if isinstance(mask, TensorHandle):
            self.defined(mask, f"the mask of a {kind}")
        ordered = semantics == interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE
        self.memory.access(kind, ptrs.data, active, size, ordered)

    def create_barrier(self) -> None:
        self.memory.clock.barrier()

    def create_assert(self, condition: TensorHandle, message: str) -> None:
        self.defined(condition, "the condition of a device_assert")
        if not np.all(condition.data):
            raise KernelFault(f"device_assert: {message}")

    def create_assume(self, condition: TensorHandle) -> None:
        self.defined(condition, "the condition of tl.assume")
        if not np.all(condition.data):
            raise KernelFault("tl.assume: the assumption is false")


def _mask(mask: TensorHandle | np.ndarray, pointers: np.ndarray) -> np.ndarray:
    return np.broadcast_to(mask.data if isinstance(mask, TensorHandle) else mask, pointers.shape)


def _garbage(element: tl.dtype, dtype: np.dtype) -> float | int | bool:
    """The value of a lane that was not loaded: one that shows in results."""
    if element == tl.bfloat16:
        return 0x7FC0
    return np.nan if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max


MOVING = {
    "reshape", "trans", "expand_dims", "broadcast", "cat", "join", "split", "splat", "unsplat",
}  # fmt: skip
NOT_ELEMENTWISE = (
    "load", "store", "masked_", "tensor_pointer_", "atomic_", "descriptor_", "barrier", "assert",
    "assume", "print", "get_", "make_", "advance", "idiv",
)  # fmt: skip
for _name in dir(HardwareNumerics):
    _operation = _name.removeprefix("create_")
    if (
        _operation == _name
        or _name in vars(CheckedBuilder)
        or _operation.startswith(NOT_ELEMENTWISE)
    ):
        continue
    _wrap = _moves_lanes if _operation in MOVING else _elementwise
    setattr(CheckedBuilder, _name, _wrap(getattr(HardwareNumerics, _name)))
