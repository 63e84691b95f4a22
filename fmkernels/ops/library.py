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
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from itertools import repeat
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from fmkernels.ops.checks import check_no_tangent

LIBRARY = torch.library.Library("fmkernels", "DEF")
_BACKENDS = {
    _C.DispatchKey.CPU: "fmkernels.cpu",
    _C.DispatchKey.CUDA: "fmkernels.kernels",
}
_IMPORT_LOCK = threading.Lock()
ALLOCATORS: dict[str, Callable] = {}
"""Of each functional op, the function that allocates its results: what a launcher needs."""


def functional_op(
    schema: str, *, save: Callable | None = None, backward: Callable | None = None
) -> Callable[[Callable], torch._ops.OpOverload]:
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
    """

    def define(allocate: Callable) -> torch._ops.OpOverload:
        name = schema.partition("(")[0]

        def calling(launcher: Callable) -> Callable:
            def call(*args, **options):
                results = allocate(*args, **options)
                launcher(*args, *(results if isinstance(results, tuple) else (results,)))
                return results

            return call

        ALLOCATORS[name] = allocate
        op, backends = _define(schema, allocate, calling, allocate.__module__, name)
        torch.library.register_vmap(op, _one_sample_at_a_time(op), lib=LIBRARY)
        kernel = _autograd_kernel(op, backends, save, backward)
        LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
        return op

    return define


def mutating_op(
    schema: str, launcher: str
) -> Callable[[Callable[..., None]], torch._ops.OpOverload]:
    """Define an op that writes into arguments and returns nothing.

    The decorated function gets the launcher of that name, then the arguments.
    """

    def define(launch: Callable[..., None]) -> torch._ops.OpOverload:
        def calling(function: Callable) -> Callable:
            return lambda *args: launch(function, *args)

        return _define(schema, lambda *args: None, calling, launch.__module__, launcher)[0]

    return define


def _define(
    schema: str, fake: Callable, calling: Callable, module: str, launcher: str
) -> tuple[torch._ops.OpOverload, dict[_C.DispatchKey, Callable]]:
    """The op, and what it calls for each device."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    backends = {
        key: calling(_late(f"{package}.{module.rpartition('.')[2]}", launcher))
        for key, package in _BACKENDS.items()
    }
    for key, function in backends.items():
        LIBRARY.impl(name, function, key.name)
    torch.library.register_fake(f"fmkernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fmkernels, name).default, backends


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


# autograd.Function.apply without the Python code that comes before: a microsecond, and functorch's
# check, which does not hold below the Autograd key
_apply = super(torch.autograd.Function, _Differentiable).apply


def _autograd_kernel(
    op: torch._ops.OpOverload,
    backends: dict[_C.DispatchKey, Callable],
    save: Callable | None,
    backward: Callable | None,
) -> Callable:
    """What the dispatcher calls before the backend.

    `torch.library.register_autograd` makes the like, but takes twice the host time where arguments
    are lists, and torch.func.grad refuses what it makes.
    """

    def call_backend(keyset, args, options):
        keyset = keyset & _C._after_ADInplaceOrView_keyset
        function = backends.get(keyset.highestPriorityTypeId())
        with _C._AutoDispatchBelowAutograd():
            if function is not None:  # without conversion of arguments to C++ and back
                return function(*args, **options)
            return op.redispatch(keyset, *args, **options)

    name, second = op._opname.removesuffix("_backward"), op._opname.endswith("_backward")

    def not_differentiable(ctx, *grad_outputs):
        raise RuntimeError(f"{name}: no {'second derivative' if second else 'gradient'} is offered")

    def kernel(keyset, *args, **options):
        if forward_ad._current_level >= 0:  # public functions miss tangents of outer transforms
            for value in _flat(args):
                if isinstance(value, Tensor):
                    check_no_tangent(name, "any argument", value)
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            return call_backend(keyset, args, options)

        def compute(ctx):
            nonlocal structure
            with _outer_gradients():
                structure = results = call_backend(keyset, args, options)
            if save is not None:
                save(ctx, args, results)
            return results if isinstance(results, Tensor) else tuple(_flat(results))

        structure = None
        with _allowed_under_functorch():
            results = _apply(*_flat(args), compute, backward or not_differentiable)
        return results if isinstance(results, Tensor) else _like(structure, iter(results))

    return kernel


def _allowed_under_functorch() -> AbstractContextManager:
    """Functorch admits autograd functions only where it expects them."""
    if not _C._are_functorch_transforms_active():
        return nullcontext()
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    return enable_single_level_autograd_function()


def _outer_gradients() -> AbstractContextManager:
    """The forward of an autograd function disables gradients, also those of outer transforms."""
    return torch.enable_grad() if _C._are_functorch_transforms_active() else nullcontext()


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
