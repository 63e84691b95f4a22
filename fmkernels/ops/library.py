"""The torch.library fragment that holds every op: schema, fake, gradient, one launcher per device.

A functional op allocates its results and has a launcher write into them::

    def _backward(ctx, grad_output):
        return (scale_op(grad_output, ctx.factor),)

    def _save(ctx, args, results):
        ctx.factor = args[1]

    @functional_op("scale(Tensor x, float factor) -> Tensor", save=_save, backward=_backward)
    def scale_op(x, factor):
        return torch.empty_like(x)

In ``fmkernels/ops/scale.py`` this defines ``torch.ops.fmkernels.scale``. It calls
``scale(x, factor, result)`` of ``fmkernels/kernels/scale.py`` for CUDA tensors and of
``fmkernels/cpu/scale.py`` for CPU tensors. Either module is imported at the first call, so that
``import fmkernels`` imports neither triton nor numba.

``scale_op`` is a function that calls the op. Where only this package would see the call, it goes
past the dispatcher, which takes 5 to 10 microseconds to convert arguments to C++ and back.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import reduce
from importlib import import_module
from itertools import repeat
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from fmkernels.ops.checks import refuse_tangent
from fmkernels.ops.tensors import has_memory

_REGISTERED = vars(torch.library).setdefault("_fmkernels", {})
"""Survives a second import, as in notebooks and test runners that clear sys.modules: the ops are
then defined already. Their definitions stay, because objects of the first import refer to them;
their kernels are replaced."""

if _REGISTERED:
    _REGISTERED["kernels"]._destroy()
else:
    _REGISTERED |= {"definitions": torch.library.Library("fmkernels", "DEF"), "schemas": set()}
LIBRARY = _REGISTERED["kernels"] = torch.library.Library("fmkernels", "IMPL")
_BACKENDS = {
    _C.DispatchKey.CPU: "fmkernels.cpu",
    _C.DispatchKey.CUDA: "fmkernels.kernels",
}
_IMPORT_LOCK = threading.RLock()
_HELD: list[Any] = []
"""During a fork, the lock of Numba's compiler, or None before Numba is imported."""
ALLOCATORS: dict[str, Callable] = {}
"""Of each functional op, the function that allocates its results: what a launcher needs."""
WITH_TENSORS: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
"""Of each op that takes numbers, the overload for compiled code, which takes tensors on the CPU in
their place (see `varying`). A CUDA graph would freeze the numbers, hence the tag."""
_NOTHING = nullcontext()


def _before_fork() -> None:
    """Take locks that another thread may hold: the child would wait for them forever."""
    _IMPORT_LOCK.acquire()  # the thread that held it may have imported Numba, so look for that now
    numba = sys.modules.get("numba.core.compiler_lock")
    _HELD.append(getattr(numba, "global_compiler_lock", None))
    if _HELD[-1] is not None:
        _HELD[-1].acquire()


def _after_fork() -> None:
    lock = _HELD.pop()
    if lock is not None:
        lock.release()
    _IMPORT_LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork
    )


def _keys(*names: str) -> int:
    keys = [_C.DispatchKeySet(getattr(_C.DispatchKey, name)) for name in names]
    return reduce(_C.DispatchKeySet.__or__, keys).raw_repr()


_BACKEND_OF = {
    _keys(*keys): getattr(_C.DispatchKey, backend)
    for backend in ("CPU", "CUDA")
    for keys in (
        (backend, "ADInplaceOrView", f"Autograd{backend}", f"Autocast{backend}"),
        (backend, f"Autocast{backend}"),  # made in inference mode
    )
}
"""The backend of a tensor that nobody has wrapped or marked, by its dispatch keys."""
_UNWATCHED = {_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")}
"""The dispatch keys of a thread without modes, transforms and tracers; in inference mode too."""
_AUTOGRAD = _C.DispatchKey.AutogradFunctionality
_NUMBERS = re.compile(r"float(?:\[\])?(\??) (\w+)(?:=[^,)]+)?")


def functional_op(
    schema: str, *, save: Callable | None = None, backward: Callable | None = None
) -> Callable[[Callable], Callable]:
    """Define an op; the decorated function allocates its results, of fake tensors too.

    The launcher gets the positional arguments, then the results. Keyword-only arguments of the
    schema describe the results; the launcher does not get them.

    Args:
        schema: name, arguments and results. Results are a tensor, a list, or a tuple of tensors
            the last of which may be a list.
        save: ``save(ctx, args, results)`` runs after the forward.
        backward: ``backward(ctx, *grad_outputs)`` returns a gradient or None for each argument;
            None may be left out at the end. Lists count as their elements, in both directions
            and in ``ctx.needs_input_grad``. Without it the op is not differentiable, and a
            backward pass through it raises.

    Returns:
        A function that calls the op.
    """

    def define(allocate: Callable) -> Callable:
        def calling(launcher: Callable) -> Callable:
            def call(*args, **options):
                results = allocate(*args, **options)
                launcher(*args, *(results if isinstance(results, tuple) else (results,)))
                return results

            return call

        def finish(op: torch._ops.OpOverload, backends: dict, numbers: Iterable[int]) -> Callable:
            torch.library.register_vmap(op, _one_sample_at_a_time(op), lib=LIBRARY)
            differentiable = _differentiable(op, numbers, save, backward)
            kernel = _autograd_kernel(op, backends, differentiable)
            LIBRARY.impl(op.name(), kernel, "Autograd", with_keyset=True)
            return differentiable

        name = schema.partition("(")[0]
        ALLOCATORS[name] = allocate
        return _define(schema, allocate, calling, allocate.__module__, name, finish)

    return define


def mutating_op(schema: str, launcher: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Define an op that writes into arguments and returns nothing.

    The decorated function gets the launcher of that name, then the arguments. The result is a
    function that calls the op.
    """

    def define(launch: Callable[..., None]) -> Callable[..., None]:
        def calling(function: Callable) -> Callable:
            return lambda *args: launch(function, *args)

        def finish(op: torch._ops.OpOverload, *_: Any) -> None:
            LIBRARY.impl(op.name(), _resolving_negatives(op), "Negative")
            kernel = _counting_versions(op)
            LIBRARY.impl(op.name(), kernel, "ADInplaceOrView", with_keyset=True)

        return _define(schema, lambda *args: None, calling, launch.__module__, launcher, finish)

    return define


def _written(op: torch._ops.OpOverload) -> list[int]:
    """The arguments that an op writes into, by their number."""
    return [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]


def _counting_versions(op: torch._ops.OpOverload) -> Callable:
    """The op, and one more version of what it writes: autograd may have saved the one before."""
    written = _written(op)

    def kernel(keyset, *args):
        for i in written:
            increment_version(args[i])
        with _C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & _C._after_ADInplaceOrView_keyset, *args)

    return kernel


def _resolving_negatives(op: torch._ops.OpOverload) -> Callable:
    """The op for tensors that are stored with the opposite sign, such as x.conj().imag.

    PyTorch's own fallback cannot write into them where an op returns nothing.
    """

    def kernel(*args):
        resolved = [x.resolve_neg() if isinstance(x, Tensor) else x for x in args]
        op(*resolved)
        for argument, x, y in zip(op._schema.arguments, args, resolved, strict=True):
            if x is not y and argument.is_write:
                x.copy_(y)

    return kernel


def _define(
    schema: str, fake: Callable, calling: Callable, module: str, launcher: str, finish: Callable
) -> Callable:
    """Define the op and, where it takes numbers, its overload with tensors; return its caller."""
    calls = {
        key: calling(_late(f"{package}.{module.rpartition('.')[2]}", launcher))
        for key, package in _BACKENDS.items()
    }
    op, differentiable = _define_overload(schema, "default", fake, calls, finish)
    arguments = op._schema.arguments
    numbers = [
        i
        for i, argument in enumerate(arguments)
        if "float" in str(argument.type) and not argument.kwarg_only
    ]
    if numbers:
        positional, star, rest = schema.replace("(", ".tensors(", 1).partition("*,")
        with_tensors = _NUMBERS.sub(r"Tensor\1 \2", positional) + star + rest
        reading = {key: _reading(numbers, call) for key, call in calls.items()}
        WITH_TENSORS[op], _ = _define_overload(
            with_tensors, "tensors", fake, reading, finish, numbers
        )
    return _caller(op, calls, differentiable, numbers)


def _caller(
    op: torch._ops.OpOverload,
    backends: dict[_C.DispatchKey, Callable],
    differentiable: Callable | None,
    numbers: Sequence[int],
) -> Callable:
    """A function that calls the op: its backend at once where nobody else would see the call."""
    kinds = [str(argument.type) for argument in op._schema.arguments]
    tensors = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    lists = [i for i, kind in enumerate(kinds) if kind == "List[Tensor]"]
    written = _written(op)

    def call(*args, **options):
        if not (torch.compiler.is_compiling() or _is_watched()):
            given = [args[i] for i in tensors if args[i] is not None]
            for i in lists:
                given += args[i]
            key = _plain_backend(given)
            if key is not None:
                if not (torch.is_grad_enabled() and any([x.requires_grad for x in given])):
                    for i in written:
                        increment_version(args[i])
                    return backends[key](*args, **options)
                if differentiable and not _C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD):
                    return differentiable(backends[key], args, options)
        by_tensors = any(isinstance(args[i], Tensor) for i in numbers)
        return (WITH_TENSORS[op] if by_tensors else op)(*args, **options)

    return call


def _is_watched() -> bool:
    """Whether a mode, a transform, a tracer or a profiler of this thread wants to see calls."""
    return (
        _C._dispatch_tls_local_include_set().raw_repr() not in _UNWATCHED
        or _C._len_torch_function_stack() > 0
        or _C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


def _plain_backend(tensors: Iterable[Tensor]) -> _C.DispatchKey | None:
    """The backend of tensors none of which is wrapped, marked or of a class of its own."""
    found = None
    for x in tensors:
        backend = _BACKEND_OF.get(_C._dispatch_keys(x).raw_repr())
        if backend is None or not (type(x) is Tensor or type(x) is Parameter):
            return None
        if backend is not found and found is not None:
            return None
        found = backend
    return found


def _define_overload(
    schema: str,
    overload: str,
    fake: Callable,
    backends: dict,
    finish: Callable,
    numbers: Iterable[int] = (),
) -> tuple[torch._ops.OpOverload, Callable | None]:
    """The op, and what `finish` returns for it."""
    if schema not in _REGISTERED["schemas"]:
        tags = (torch.Tag.cudagraph_unsafe,) if numbers else ()
        _REGISTERED["definitions"].define(schema, tags=tags)
        _REGISTERED["schemas"].add(schema)
    name = schema.partition("(")[0].partition(".")[0]
    op = getattr(getattr(torch.ops.fmkernels, name), overload)
    for key, call in backends.items():
        LIBRARY.impl(op.name(), call, key.name)
    if any(isinstance(result.type, torch.ListType) for result in op._schema.returns):
        fake = _refusing_cpp_wrapper(op, fake)
    torch.library.register_fake(op.name(), fake, lib=LIBRARY)
    return op, finish(op, backends, numbers)


def _refusing_cpp_wrapper(op: torch._ops.OpOverload, fake: Callable) -> Callable:
    """Inductor's cpp_wrapper fails, or crashes, where results are lists. AOTInductor does not."""

    def call(*args, **options):
        inductor = sys.modules.get("torch._inductor.virtualized")
        graph = None if inductor is None else inductor.V.graph
        if getattr(graph, "cpp_wrapper", False) and not graph.aot_mode:
            raise NotImplementedError(
                f"{_public_name(op)}: cannot be compiled with torch._inductor.config.cpp_wrapper, "
                "which does not take ops that return lists of tensors; set it to False"
            )
        return fake(*args, **options)

    return call


def _public_name(op: torch._ops.OpOverload) -> str:
    return op._opname.removesuffix("_elementwise").removesuffix("_backward")


def _reading(numbers: Iterable[int], call: Callable) -> Callable:
    return lambda *args, **options: call(*_read(numbers, args), **options)


def _read(numbers: Iterable[int], args: Sequence) -> Sequence:
    """The arguments with the numbers that tensors hold, where those are not traced."""
    values = list(args)
    for i in numbers:
        if values[i] is not None and has_memory(values[i]):
            values[i] = values[i].tolist()
    return values


def _late(module: str, name: str) -> Callable:
    """A function of a module that is imported when the function is first called."""
    loaded = None

    def call(*args):
        nonlocal loaded
        if loaded is None:
            with _IMPORT_LOCK:  # two threads that import numba at once can deadlock
                loaded = import_module(module)
        return getattr(loaded, name)(*args)

    return call


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """As the method of ctx, which refuses tensors made in inference mode: those are copied."""
    ctx.save_for_backward(*[x if x is None or not x.is_inference() else x.clone() for x in tensors])


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # first those of the op, so that needs_input_grad begins with them
        *_, compute, ctx.differentiate = inputs
        ctx.count = len(inputs)
        return compute(ctx)

    @staticmethod
    def backward(ctx, *grad_outputs):
        gradients = ctx.differentiate(ctx, *grad_outputs)
        return (*gradients, *[None] * (ctx.count - len(gradients)))


class _DifferentiableUnderFunctorch(torch.autograd.function._SingleLevelFunction):
    """Functorch takes no other class below the Autograd key."""

    forward = staticmethod(_Differentiable.forward)
    backward = staticmethod(_Differentiable.backward)


# autograd.Function.apply without the Python code that comes before: a microsecond
_apply = super(torch.autograd.Function, _Differentiable).apply


def _differentiable(
    op: torch._ops.OpOverload,
    numbers: Iterable[int],
    save: Callable | None,
    backward: Callable | None,
) -> Callable:
    """A function that calls a backend with arguments such that the results are differentiable."""
    name = _public_name(op)
    second = op._opname.endswith("_backward")
    lists_given, lists_result = (
        any("List" in str(each.type) for each in values)
        for values in (op._schema.arguments, op._schema.returns)
    )

    def not_differentiable(ctx, *grad_outputs):
        raise RuntimeError(f"{name}: no {'second derivative' if second else 'gradient'} is offered")

    def differentiable(backend, args, options, functorch=False):
        def compute(ctx):
            nonlocal structure
            with _outer_derivatives() if functorch else _NOTHING:
                structure = results = backend(*args, **options)
            if save is not None:
                save(ctx, _read(numbers, args) if numbers else args, results)
            return tuple(_flat(results)) if lists_result else results

        structure = None
        apply = _DifferentiableUnderFunctorch.apply if functorch else _apply
        flat = _flat(args) if lists_given else args
        with _allowed_under_functorch() if functorch else _NOTHING:
            results = apply(*flat, compute, backward or not_differentiable)
        return _like(structure, iter(results)) if lists_result else results

    return differentiable


def _autograd_kernel(
    op: torch._ops.OpOverload, backends: dict[_C.DispatchKey, Callable], differentiable: Callable
) -> Callable:
    """What the dispatcher calls before the backend.

    `torch.library.register_autograd` makes the like, but takes twice the host time where arguments
    are lists, and torch.func.grad refuses what it makes.
    """
    name = _public_name(op)

    def kernel(keyset, *args, **options):
        def backend(*args, **options):
            below = keyset & _C._after_ADInplaceOrView_keyset
            function = backends.get(below.highestPriorityTypeId())
            with _C._AutoDispatchBelowAutograd():
                if function is not None:  # without conversion of arguments to C++ and back
                    return function(*args, **options)
                return op.redispatch(below, *args, **options)

        functorch = _C._are_functorch_transforms_active()
        if functorch or forward_ad._current_level >= 0:
            for value in _flat(args):  # public functions miss outer transforms and compiled code
                if isinstance(value, Tensor):
                    refuse_tangent(name, "any argument", value)
        if torch.is_grad_enabled() and _C._any_requires_grad(*args):
            return differentiable(backend, args, options, functorch)
        return backend(*args, **options)

    return kernel


def _allowed_under_functorch() -> AbstractContextManager:
    """Functorch admits autograd functions only where it expects them."""
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    return enable_single_level_autograd_function()


def _outer_derivatives() -> AbstractContextManager:
    """The forward of an autograd function disables derivatives, also those of outer transforms."""
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
    return stack


def _flat(values: Sequence) -> Iterator:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _like(structure: Any, values: Iterator) -> Any:
    """The values, in the nesting of a list or tuple of tensors and lists."""
    if isinstance(structure, (list, tuple)):
        return type(structure)(_like(part, values) for part in structure)
    return next(values)


def _one_sample_at_a_time(op: torch._ops.OpOverload) -> Callable:
    """The op under torch.vmap: a loop."""

    def select(value, dim, i):
        if isinstance(value, (list, tuple)):
            return [select(v, d, i) for v, d in zip(value, dim, strict=True)]
        return value if dim is None else value.select(dim, i)

    def stack(results):
        if isinstance(results[0], Tensor):
            return torch.stack(results)
        return type(results[0])(map(stack, zip(*results, strict=True)))

    def batched(info, in_dims, *args, **options):
        results = stack(
            [
                op(*(select(v, d, i) for v, d in zip(args, in_dims, strict=True)), **options)
                for i in range(info.batch_size)
            ]
        )
        return results, _like(results, repeat(0))

    return batched
