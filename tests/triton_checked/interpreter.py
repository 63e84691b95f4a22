"""A checked interpreter: Triton kernels on CPU tensors, by the rules of a GPU.

    with checked(x=x, out=out, shuffle=0) as report:
        scale(x, out)
    assert report["out"].written == out.nbytes and report.never_written("out") == 0

Raises KernelFault, which names kernel, program, source line and tensor, for
- an access outside the tensor that a pointer was made from, and a misaligned access;
- a race between programs of a launch, or between lanes of a program without a barrier in between;
- two lanes of one store that write the same cell;
- signed integer overflow, and arithmetic on bfloat16;
- use of lanes that a masked load without `other` left undefined;
- a false tl.device_assert, tl.assume, tl.multiple_of or tl.max_contiguous;
- a branch on a block, and a grid that no GPU runs.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

from . import memo
from .builder import CheckedBuilder, set_undefined, undefined
from .memory import KernelFault, Memory, Traffic
from .numerics import device_functions

__all__ = ["KernelFault", "Launch", "Report", "checked"]

# a global that the interpreter gives to the module of every function it rewrites
INJECTED = "interpreter_semantic"
POISONED_BYTES = 1 << 26  # larger allocations are left alone, so that their pages stay untouched


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    moved: int = field(default=0, compare=False)  # bytes


class Report:
    """What the launches of a checked block did.

    A tensor has the name that was given to `checked`, else that of the kernel argument it was first
    passed as ("grad[0]" for an item of a tuple). The tensor itself works in place of its name.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self.launches: list[Launch] = []

    def __getitem__(self, tensor: str | Tensor) -> Traffic:
        return self._memory.traffic[self._memory.name(tensor)]

    @property
    def traffic(self) -> dict[str, Traffic]:
        return self._memory.traffic

    def never_written(self, tensor: str | Tensor) -> int:
        """Elements of the tensor that no launch has written."""
        return self._memory.never_written(self._memory.name(tensor))


@contextmanager
def checked(
    *,
    races: bool = True,
    shuffle: int | None = None,
    programs: Sequence[int] | None = None,
    **tensors: Tensor,
) -> Iterator[Report]:
    """Check every launch of an interpreted kernel in the block. A nested block joins the outer one.

    Every tensor that is passed to a kernel is watched. Tensors given here keep their names in
    faults and in the report. In a process that runs compiled kernels on a GPU this does nothing.

    races: False skips all that needs notes on every cell: races, distinct and unwritten cells.
    shuffle: seed of a random order of programs.
    programs: run only these; negative numbers count from the end. Memory that they do not touch is
        never touched, so that huge tensors cost nothing.

    Memory that torch.empty and the like allocate in the block is filled with NaN (integers: the
    largest value).
    """
    builder = interpreter.interpreter_builder
    if not triton.knobs.runtime.interpret:
        if not torch.cuda.is_available():
            raise RuntimeError("checked() needs enable_interpreter() before triton is imported")
        yield Report(Memory({}, races))
        return
    if isinstance(builder, CheckedBuilder):
        yield builder.report
        return
    memory = Memory(tensors, races)
    report = Report(memory)
    session = _Session(memory, report, shuffle, programs)

    def run(kernel: InterpretedFunction, *args, grid, warmup: bool, **kwargs) -> None:
        session.launch(kernel, args, grid, kwargs)

    with (
        _patched_language(),
        device_functions(),
        _poisoned_allocations(),
        np.errstate(all="ignore"),
    ):
        builder.memory, builder.report, builder.any_undefined = memory, report, False
        with mock.patch.object(InterpretedFunction, "run", run):
            yield report


class _Session:
    """The launches of one checked block."""

    def __init__(
        self, memory: Memory, report: Report, shuffle: int | None, programs: Sequence[int] | None
    ):
        self.memory, self.report, self.programs = memory, report, programs
        self.order = None if shuffle is None else np.random.default_rng(shuffle)

    def launch(self, kernel: InterpretedFunction, args: tuple, grid, kwargs: dict) -> None:
        function, name = kernel.rewrite(), kernel.fn.__name__
        bound = inspect.getcallargs(
            function, *args, **{k: v for k, v in kwargs.items() if k in kernel.arg_names}
        )
        grid = grid(bound) if callable(grid) else grid
        grid = tuple(int(n) for n in grid) + (1,) * (3 - len(grid))
        if max(grid[1:]) > 65535 or np.prod(grid, dtype=float) >= 2**31:
            raise KernelFault(
                f"{name}: no GPU runs the grid {grid}: "
                "y and z are at most 65535, the product at most 2^31 - 1"
            )
        self.memory.begin_launch()
        before = self.memory.moved()
        types = inspect.get_annotations(kernel.fn, eval_str=True)
        arguments = {
            k: v if types.get(k) is tl.constexpr else self.argument(k, v, types.get(k))
            for k, v in bound.items()
        }
        builder = interpreter.interpreter_builder
        builder.any_undefined = False
        builder.set_grid_dim(*grid)
        for program in self._chosen(int(np.prod(grid))):
            index = tuple(map(int, np.unravel_index(program, grid)))
            builder.set_grid_idx(*index)
            self.memory.clock.begin(program)
            try:
                function(**arguments)
            except KernelFault as fault:
                fault.args = (f"{name}, program {index} of {grid}, {_line(fault)}: {fault}",)
                raise
        self.report.launches.append(Launch(name, grid, self.memory.moved() - before))

    def argument(self, name: str, value, declared: tl.dtype | None = None):
        """A kernel argument as a compiled kernel would receive it."""
        if isinstance(value, tuple):
            items = [self.argument(f"{name}[{i}]", item) for i, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if hasattr(value, "data_ptr"):
            tensor = getattr(value, "base", value) if not isinstance(value, Tensor) else value
            ty = tl.str_to_ty(triton.runtime.jit.mangle_type(value), None)
            return tl.tensor(
                TensorHandle(np.array([self.memory.bind(name, tensor)], np.uint64), ty), ty
            )
        if isinstance(declared, tl.dtype) or isinstance(value, bool | float):
            dtype = declared or (tl.int1 if isinstance(value, bool) else tl.float32)
            return tl.tensor(
                TensorHandle(np.array([value], interpreter._get_np_dtype(dtype)), dtype), dtype
            )
        return interpreter._implicit_cvt(value)

    def _chosen(self, count: int) -> Sequence[int]:
        if self.programs is not None:
            chosen = dict.fromkeys(p + count if p < 0 else p for p in self.programs)
            return [p for p in chosen if 0 <= p < count]
        return range(count) if self.order is None else self.order.permutation(count).tolist()


def _line(fault: KernelFault) -> str:
    """The line where a fault arose, in the kernel or in a device function that it calls."""
    lines = [
        (f.f_code.co_filename, line)
        for f, line in traceback.walk_tb(fault.__traceback__)
        if _is_kernel_code(f)
    ]
    return f"{os.path.basename(lines[-1][0])}:{lines[-1][1]}" if lines else "before its first line"


def _is_kernel_code(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return INJECTED in frame.f_globals and not module.startswith("triton.")


# --- patches of triton.language -------------------------------------------------------------------


@contextmanager
def _patched_language() -> Iterator[None]:
    """Point triton.language at the checked builder.

    Once per checked block: the stock interpreter does it at every call of a function.
    """
    scope = interpreter._patch_lang(_Module)
    for module in (tl, tl.core):
        scope.set_attr(module, "reduce", _combining(module.reduce, keeps_shape=False))
        scope.set_attr(
            module, "associative_scan", _combining(module.associative_scan, keeps_shape=True)
        )
        scope.set_attr(module, "multiple_of", _multiple_of)
        scope.set_attr(module, "max_contiguous", _max_contiguous)
    for owner in (tl, tl.tensor):
        scope.set_attr(owner, "flip", _flip)
    scope.set_attr(tl.tensor, "__bool__", _branch)
    scope.set_attr(tl.tensor, "__index__", _number)
    scope.set_attr(interpreter, "_patch_lang", lambda function: _NoScope)
    scope.set_attr(
        InterpretedFunction,
        "__call__",
        lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs),
    )
    scope.set_attr(interpreter.interpreter_builder, "__class__", CheckedBuilder)
    for owner, name, value in memo.patches():
        scope.set_attr(owner, name, value)
    # the builder checks overflow itself
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    scope.set_attr(interpreter.interpreter_builder, "options", options)
    try:
        yield
    finally:
        scope.restore()


class _Module:
    __globals__: dict = {"tl": tl, "core": tl.core}  # noqa: RUF012


class _NoScope:
    restore = staticmethod(lambda: None)


def _branch(tensor: tl.tensor) -> bool:
    if INJECTED not in sys._getframe(1).f_globals:
        return True  # Triton asks whether a tensor is given
    if tensor.handle.data.size != 1:
        raise KernelFault("a branch on a block of values: only a scalar can be a condition")
    interpreter.interpreter_builder.defined(tensor.handle, "a branch condition")
    return bool(tensor.handle.data.item())


def _number(tensor: tl.tensor) -> int:
    interpreter.interpreter_builder.defined(tensor.handle, "a loop bound")
    return int(tensor.handle.data.item())


def _flip(tensor: tl.tensor, dim: int | None = None) -> tl.tensor:
    axis = (len(tensor.shape) if dim is None or dim < 0 else 0) + (-1 if dim is None else dim)
    result = TensorHandle(np.flip(tensor.handle.data, axis), tensor.handle.dtype)
    if undefined(tensor.handle) is not None:
        set_undefined(result, np.flip(undefined(tensor.handle), axis))
    return tl.tensor(result, tensor.type)


def _combining(stock: Callable, keeps_shape: bool) -> Callable:
    """tl.reduce or tl.associative_scan: a result is undefined where any value it combines is."""

    def method(input, axis, combine_fn, *args, **kwargs):
        result = stock(input, axis, combine_fn, *args, **kwargs)
        marks = [undefined(t.handle) for t in (input if isinstance(input, tuple) else (input,))]
        marks = [m for m in marks if m is not None]
        if marks:
            for out in result if isinstance(result, tuple) else (result,):
                mark = np.logical_or.reduce(marks).any(axis=axis, keepdims=keeps_shape)
                set_undefined(
                    out.handle, mark if keeps_shape else mark.reshape(np.shape(out.handle.data))
                )
        return result

    return method


def _values(values) -> list[int]:
    return [
        getattr(v, "value", v) for v in (values if isinstance(values, list | tuple) else [values])
    ]


def _multiple_of(input, values):
    """The promise is about the first value of every run. Checks the first of the block."""
    if isinstance(input, tl.tensor):
        first = int(input.handle.data.flat[0])
        for value in _values(values):
            if first % value:
                raise KernelFault(f"tl.multiple_of: {first} is not a multiple of {value}")
    return input


def _max_contiguous(input, values):
    data = input.handle.data
    for axis, value in enumerate(_values(values)):
        runs = (
            np.moveaxis(data, axis, -1).reshape(-1, min(value, data.shape[axis])).astype(np.int64)
        )
        if (np.diff(runs) != 1).any():
            raise KernelFault(
                f"tl.max_contiguous: no runs of {value} consecutive values along axis {axis}"
            )
    return input


@contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Fill what torch leaves uninitialized, so that results show where it was read."""

    def poisoned(allocate: Callable) -> Callable:
        def call(*args, **kwargs) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if (
                0 < tensor.nbytes <= POISONED_BYTES
                and tensor.device.type == "cpu"
                and not tensor.is_complex()
            ):
                dtype = tensor.dtype
                limit = (
                    np.nan
                    if dtype.is_floating_point
                    else dtype == torch.bool or torch.iinfo(dtype).max
                )
                tensor.detach().fill_(limit)
            return tensor

        return call

    names = (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    )
    with ExitStack() as patches:
        for owner, functions in names:
            for name in functions:
                patches.enter_context(
                    mock.patch.object(owner, name, poisoned(getattr(owner, name)))
                )
        yield
