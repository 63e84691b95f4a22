"""A checked interpreter: Triton kernels on CPU tensors, held to the rules of a GPU.

    with checked(x=x, out=out, shuffle=0) as report:
        launch_scale(x, out)
    assert report["out"].written == out.nbytes and report.never_written("out") == 0

Raises KernelFault, naming kernel, program, source line and tensor, for: an access outside the tensor a pointer was made
from; a race between programs of a launch, or between lanes of a program with no barrier in between; two lanes of a
store writing one cell; signed integer overflow; tl.device_assert and tl.assume; use of lanes that a masked load without
`other` left undefined; arithmetic on bfloat16; a branch on a block; a grid no GPU accepts.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

from . import on_gpu
from .memory import ADDRESS, KernelFault, Memory, Traffic
from .numerics import HardwareNumerics, device_functions

__all__ = ["KernelFault", "Launch", "Report", "checked"]


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]


class Report:
    """What the launches of a checked block did."""

    def __init__(self, memory: Memory | None):
        self._memory = memory
        self.launches: list[Launch] = []

    def __getitem__(self, name: str) -> Traffic:
        return self._memory.traffic[name]

    @property
    def traffic(self) -> dict[str, Traffic]:
        return self._memory.traffic

    def never_written(self, name: str) -> int:
        """Elements of the tensor that no launch has written."""
        return self._memory.never_written(name)


# --- lanes left undefined by a masked load ---------------------------------------------------------------------------


def _undefined(handle: TensorHandle) -> np.ndarray | None:
    return handle.attr.get("undefined")


def _shape_only(stock: Callable) -> Callable:
    """An operation that moves lanes without computing: move their marks alike."""

    def method(self, *args):
        result = stock(self, *args)
        if self.any_undefined:
            handles = [a for a in args if isinstance(a, TensorHandle)]
            if any(_undefined(h) is not None for h in handles):
                marks = iter([TensorHandle(_marks(h), tl.int1) for h in handles])
                moved = stock(self, *(next(marks) if isinstance(a, TensorHandle) else a for a in args))
                pairs = zip(result, moved, strict=True) if isinstance(result, tuple) else ((result, moved),)
                for out, mark in pairs:
                    out.attr["undefined"] = mark.data
        return result

    return method


def _elementwise(stock: Callable) -> Callable:
    """An operation lane by lane: a result is undefined where an argument is."""

    def method(self, *args):
        result = stock(self, *args)
        if self.any_undefined:
            self.mark(result, [a for a in args if isinstance(a, TensorHandle)])
        return result

    return method


def _marks(handle: TensorHandle) -> np.ndarray:
    marks = _undefined(handle)
    return np.zeros(np.shape(handle.data), bool) if marks is None else np.broadcast_to(marks, np.shape(handle.data))


def _overflow_checked(op: Callable) -> Callable:
    def method(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        result = self.binary_op(lhs, rhs, op)
        if lhs.dtype.scalar.is_int_signed() and lhs.dtype.scalar != tl.int1:
            bounds = np.iinfo(result.data.dtype)
            exact = op(lhs.data, rhs.data, dtype=np.float64)
            if exact.max() >= bounds.max + 1.0 or exact.min() < bounds.min:
                bad = (exact >= bounds.max + 1.0) | (exact < bounds.min)
                for handle in (lhs, rhs):
                    if _undefined(handle) is not None:
                        bad &= ~_undefined(handle)
                if bad.any():
                    value = int(exact[bad].flat[0])
                    raise KernelFault(f"{lhs.dtype.scalar} overflow: {op.__name__} gives {value}")
        return result

    return _elementwise(method)


class CheckedBuilder(HardwareNumerics):
    """The operations of a kernel, each checked before it is carried out."""

    memory: Memory
    any_undefined: bool

    create_add = _overflow_checked(np.add)
    create_sub = _overflow_checked(np.subtract)
    create_mul = _overflow_checked(np.multiply)

    def mark(self, result: TensorHandle, arguments: Sequence[TensorHandle]) -> None:
        marks = [m for m in map(_undefined, arguments) if m is not None]
        if marks:
            shape = np.shape(result.data)
            result.attr["undefined"] = np.logical_or.reduce([np.broadcast_to(m, shape) for m in marks])

    def elementwise(self, data: np.ndarray, dtype: tl.dtype, arguments: Sequence[TensorHandle]) -> TensorHandle:
        result = TensorHandle(data, dtype)
        self.mark(result, arguments)
        return result

    def defined(self, handle: TensorHandle, use: str, mask: np.ndarray | bool = True) -> None:
        """Raise if a lane that matters is one a masked load never filled."""
        marks = _undefined(handle)
        if marks is not None and (marks & mask).any():
            lane = int(np.flatnonzero(np.broadcast_to(marks & mask, np.shape(handle.data)))[0])
            raise KernelFault(f"undefined lanes: lane {lane} of {use} comes from a masked load without `other`")

    def create_select(self, cond: TensorHandle, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        result = super().create_select(cond, lhs, rhs)
        if self.any_undefined and any(_undefined(h) is not None for h in (cond, lhs, rhs)):
            result.attr["undefined"] = _marks(cond) | np.where(cond.data, _marks(lhs), _marks(rhs))
        return result

    def _logic(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable, decides: bool) -> TensorHandle:
        """A logical operation, defined where one side decides it."""
        result = self.binary_op(lhs, rhs, op)
        if self.any_undefined and lhs.dtype.scalar == tl.int1:
            left, right = _marks(lhs), _marks(rhs)
            decided = (~left & (lhs.data == decides)) | (~right & (rhs.data == decides))
            result.attr["undefined"] = (left | right) & ~decided
        elif self.any_undefined:
            self.mark(result, (lhs, rhs))
        return result

    def create_and(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._logic(lhs, rhs, np.bitwise_and, False)

    def create_or(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self._logic(lhs, rhs, np.bitwise_or, True)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile) -> TensorHandle:
        element, active = ptrs.get_element_ty(), _mask(mask, ptrs.data)
        dtype = interpreter._get_np_dtype(element)
        self._check_access("read", ptrs, mask, active, dtype.itemsize)
        holes = other is None and not active.all()
        fill = other.data if other is not None else np.full(ptrs.data.shape, _garbage(element, dtype), dtype)
        data = interpreter._interpreter.load(ptrs.data & ADDRESS, active, np.broadcast_to(fill, ptrs.data.shape), dtype)
        result = TensorHandle(data, element)
        if holes:
            self.any_undefined = True
            result.attr["undefined"] = ~active
        elif other is not None and _undefined(other) is not None:
            result.attr["undefined"] = _undefined(other) & ~active
        return result

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy) -> None:
        active = _mask(mask, ptrs.data)
        self.defined(value, "a stored value", active)
        self._check_access("write", ptrs, mask, active, interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize)
        interpreter._interpreter.store(ptrs.data & ADDRESS, value.data, active)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope) -> TensorHandle:
        active = _mask(mask, ptr.data)
        self.defined(val, "the value of an atomic", active)
        ordered = sem == interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE
        self._check_access("atomic", ptr, mask, active, val.data.dtype.itemsize, ordered)
        return super().create_atomic_rmw(op, TensorHandle(ptr.data & ADDRESS, ptr.dtype), val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope) -> TensorHandle:
        ordered = sem == interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE
        active = np.ones(np.shape(ptr.data), bool)
        self._check_access("atomic", ptr, None, active, val.data.dtype.itemsize, ordered)
        return super().create_atomic_cas(TensorHandle(ptr.data & ADDRESS, ptr.dtype), cmp, val, sem, scope)

    def _check_access(self, kind: str, ptrs, mask, active: np.ndarray, size: int, ordered: bool = False) -> None:
        if self.any_undefined:
            self.defined(ptrs, f"the addresses of a {kind}", active)
            if isinstance(mask, TensorHandle):
                self.defined(mask, f"the mask of a {kind}")
        self.memory.access(kind, ptrs.data, active, size, ordered)

    def create_barrier(self) -> None:
        self.memory.clock.epoch += 1

    def create_assert(self, condition: TensorHandle, message: str) -> None:
        self.defined(condition, "the condition of a device_assert")
        if not np.all(condition.data):
            raise KernelFault(f"device_assert: {message}")

    def create_assume(self, condition: TensorHandle) -> None:
        if not np.all(condition.data):
            raise KernelFault("tl.assume: the assumption is false")


def _mask(mask: TensorHandle | np.ndarray, pointers: np.ndarray) -> np.ndarray:
    return np.broadcast_to(mask.data if isinstance(mask, TensorHandle) else mask, pointers.shape)


def _garbage(element: tl.dtype, dtype: np.dtype):
    """What a lane holds that was not loaded."""
    if element == tl.bfloat16:
        return 0x7FC0
    return np.nan if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max


MOVES = ("reshape", "trans", "expand_dims", "broadcast", "cat", "join", "split", "splat", "unsplat")
OWN = ("load", "store", "masked", "tensor_pointer", "atomic", "descriptor", "barrier", "assert", "assume", "print", "select",
       "get_program_id", "get_num_programs", "make_range", "make_block_ptr", "make_tensor", "advance")  # fmt: skip
for _name in dir(HardwareNumerics):
    _kind = _name.removeprefix("create_")
    if _kind != _name and _name not in vars(CheckedBuilder) and not _kind.startswith(OWN):
        _wrap = _shape_only if _kind in MOVES else _elementwise
        setattr(CheckedBuilder, _name, _wrap(getattr(HardwareNumerics, _name)))


# --- launches --------------------------------------------------------------------------------------------------------


class _Session:
    """One checked block: takes over the launches of interpreted kernels."""

    def __init__(self, memory: Memory, report: Report, shuffle: int | None, programs: Sequence[int] | None):
        self.memory, self.report, self.programs = memory, report, programs
        self.order = None if shuffle is None else np.random.default_rng(shuffle)
        self.constexprs: dict[Callable, set[str]] = {}

    def argument(self, name: str, value, declared: tl.dtype | None = None):
        """A kernel argument as the compiled kernel would receive it."""
        base = getattr(value, "base", value)
        if isinstance(base, torch.Tensor) and hasattr(value, "data_ptr"):
            ty = tl.str_to_ty(triton.runtime.jit.mangle_type(value), None)
            return tl.tensor(TensorHandle(np.array([self.memory.bind(name, base)], np.uint64), ty), ty)
        if isinstance(value, tuple):
            items = [self.argument(f"{name}[{i}]", item) for i, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if isinstance(value, bool | float):
            dtype = declared or (tl.int1 if isinstance(value, bool) else tl.float32)
            return tl.tensor(TensorHandle(np.array([value], interpreter._get_np_dtype(dtype)), dtype), dtype)
        return interpreter._implicit_cvt(value)

    def launch(self, kernel: InterpretedFunction, args: tuple, grid, kwargs: dict) -> None:
        function = kernel.rewrite()
        if kernel.fn not in self.constexprs:
            self.constexprs[kernel.fn] = set(interpreter.GridExecutor(function, kernel.arg_names, grid).constexprs)
        bound = inspect.getcallargs(function, *args, **{k: v for k, v in kwargs.items() if k in kernel.arg_names})
        grid = tuple(int(n) for n in (grid(bound) if callable(grid) else grid))
        grid = grid + (1,) * (3 - len(grid))
        name = kernel.fn.__name__
        if max(grid[1:]) > 65535 or np.prod(grid, dtype=float) >= 2**31:
            raise KernelFault(f"{name}: no GPU runs the grid {grid}: y and z end at 65535, the product at 2^31 - 1")
        self.report.launches.append(Launch(name, grid))
        self.memory.begin_launch()
        constexprs = self.constexprs[kernel.fn]
        declared = {k: v for k, v in inspect.get_annotations(kernel.fn).items() if isinstance(v, tl.dtype)}
        ready = {k: v if k in constexprs else self.argument(k, v, declared.get(k)) for k, v in bound.items()}
        builder = interpreter.interpreter_builder
        builder.any_undefined = False
        builder.set_grid_dim(*grid)
        for program in self._programs(int(np.prod(grid))):
            x, y, z = np.unravel_index(program, grid)
            place = (int(x), int(y), int(z))
            builder.set_grid_idx(*place)
            self.memory.clock.begin(program)
            try:
                function(**ready)
            except KernelFault as fault:
                fault.args = (f"{name}, program {place} of {grid}, {_line(fault)}: {fault}",)
                raise

    def _programs(self, count: int) -> Sequence[int]:
        if self.programs is not None:
            chosen = dict.fromkeys(p + count if p < 0 else p for p in self.programs)
            return [p for p in chosen if 0 <= p < count]
        return range(count) if self.order is None else self.order.permutation(count).tolist()


def _line(fault: KernelFault) -> str:
    """The line of the kernel where a fault arose."""
    frames = [f for f, _ in traceback.walk_tb(fault.__traceback__) if "interpreter_semantic" in f.f_globals]
    frames = [f for f in frames if f.f_globals is not vars(interpreter) and "/triton/" not in f.f_code.co_filename]
    return f"{frames[-1].f_code.co_filename}:{frames[-1].f_lineno}" if frames else "at launch"


def _branch(tensor: tl.tensor) -> bool:
    if "interpreter_semantic" not in sys._getframe(1).f_globals:
        return True  # Triton's own code asks whether there is a tensor
    if tensor.handle.data.size != 1:
        raise KernelFault("a branch on a block of values: only scalars decide a branch")
    interpreter.interpreter_builder.defined(tensor.handle, "a branch condition")
    return bool(tensor.handle.data.item())


def _number(tensor: tl.tensor) -> int:
    interpreter.interpreter_builder.defined(tensor.handle, "a loop bound")
    return int(tensor.handle.data.item())


def _marked_reduction(stock: Callable, keeps_shape: bool) -> Callable:
    """tl.reduce or tl.associative_scan: a result is undefined where any value it combines is."""

    def method(input, axis, combine_fn, *args, **kwargs):
        result = stock(input, axis, combine_fn, *args, **kwargs)
        inputs = input if isinstance(input, tuple) else (input,)
        marks = [m for m in (_undefined(t.handle) for t in inputs) if m is not None]
        if marks:
            mark = np.logical_or.reduce(marks).any(axis=axis, keepdims=keeps_shape)
            for out in result if isinstance(result, tuple) else (result,):
                out.handle.attr["undefined"] = np.broadcast_to(mark.reshape(mark.shape or (1,)), out.handle.data.shape)
        return result

    return method


@contextmanager
def _patched_language() -> Iterator[None]:
    """Point triton.language at the interpreter once, instead of at every launch and call of a device function."""

    def everything() -> None: ...

    stock, builder = interpreter._patch_lang, interpreter.interpreter_builder
    holder = type("Holder", (), {"__globals__": {"tl": tl, "core": tl.core}})
    scope = stock(holder)
    for module in (tl, tl.core):
        scope.set_attr(module, "reduce", _marked_reduction(module.reduce, False))
        scope.set_attr(module, "associative_scan", _marked_reduction(module.associative_scan, True))
    scope.set_attr(tl.tensor, "__bool__", _branch)
    scope.set_attr(tl.tensor, "__index__", _number)
    scope.set_attr(interpreter, "_patch_lang", lambda fn: type("Scope", (), {"restore": lambda self: None})())
    scope.set_attr(InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
    scope.set_attr(builder, "__class__", CheckedBuilder)
    scope.set_attr(builder, "options", interpreter.InterpreterOptions(debug=True, sanitize_overflow=False))
    try:
        yield
    finally:
        scope.restore()


@contextmanager
def checked(
    *, races: bool = True, shuffle: int | None = None, programs: Sequence[int] | None = None, **tensors
) -> Iterator[Report]:
    """Check every launch of an interpreted kernel in the block."""
    if on_gpu():
        yield Report(None)
        return
    memory = Memory(tensors, races)
    report = Report(memory)
    session = _Session(memory, report, shuffle, programs)
    stock_run = InterpretedFunction.run

    def run(kernel, *args, grid, warmup, **kwargs):
        if not warmup:
            session.launch(kernel, args, grid, kwargs)

    with _patched_language(), device_functions(), np.errstate(all="ignore"):
        interpreter.interpreter_builder.memory = memory
        interpreter.interpreter_builder.any_undefined = False
        InterpretedFunction.run = run
        try:
            yield report
        finally:
            InterpretedFunction.run = stock_run
