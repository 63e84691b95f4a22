"""The tests that every op needs, made from the table in tests/opinfo.py."""

import contextlib
import inspect
import math
import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpretedFunction

from fmkernels import functional
from fmkernels.kernels import tuning
from fmkernels.ops.library import WITH_TENSORS
from tests.conftest import launches
from tests.opinfo import FLOATS, OPS, VIEWS_OF_TORCH, VOXELS, Arguments, OpInfo, copy, rand
from tests.support import on_gpu
from tests.support.cases import kernel_only
from tests.support.threads import finely_split
from tests.support.tolerance import assert_close
from tests.triton_checked.host_sync import HostSyncError, no_host_sync

ROOT = Path(__file__).parents[1]
KERNELS = [op for op in OPS if op.launches]
DIFFERENTIABLE = [op for op in OPS if op.differentiable]
WITH_OUT = [op for op in OPS if op.in_place]
LAUNCHES = [] if on_gpu() else list(launches())
WITH_DTYPE = [op for op in OPS if "dtype" in inspect.signature(op.function).parameters]


def each(ops: Iterable[OpInfo], **values: Callable[[OpInfo], Iterable]) -> pytest.MarkDecorator:
    """Parametrize by op, and by what each of `values` gives for it."""
    rows = [((op,), op.name) for op in ops]
    for give in values.values():
        rows = [
            ((*row, v), "-".join([name, *map(str, v if isinstance(v, tuple) else (v,))]))
            for row, name in rows
            for v in give(row[0])
        ]
    params = [pytest.param(*row, id=name.replace("torch.", "")) for row, name in rows]
    return pytest.mark.parametrize(("op", *values), params)


def samples(op: OpInfo) -> Iterable[str]:
    return op.samples(torch.float32)


def samples_with_gradients(op: OpInfo) -> Iterable[str]:
    return [name for name, x in op.samples(torch.float32).items() if op.gradients_to(x)]


def some(op: OpInfo, path, dtype: torch.dtype = torch.float32) -> list[Arguments]:
    """All samples on the device; of the kernels, which are interpreted, the last one."""
    every = [copy(arguments, path.device) for arguments in op.samples(dtype).values()]
    return every if path.name == "cpu" else every[-1:]


def some_with_gradients(op: OpInfo, path, dtype: torch.dtype = torch.float32) -> list[Arguments]:
    return [arguments for arguments in some(op, path, dtype) if op.gradients_to(arguments)]


def dtypes(op: OpInfo) -> Iterable[torch.dtype]:
    return op.dtypes


def exact(op: OpInfo, arguments: Arguments) -> list[Tensor]:
    """The results of the reference, in float64 and not rounded."""
    arguments = {k: v for k, v in arguments.items() if k not in ("dtype", "out")}
    if op in WITH_DTYPE:
        arguments["dtype"] = torch.float64
    return tree_leaves(op.reference(**arguments))


def compare(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Within the tolerance of their type, for data of type `dtype`."""
    for ours, theirs in zip(results, expected, strict=True):
        assert_close(ours, theirs, arithmetic=dtype)


@pytest.fixture(autouse=True)
def few_elements_at_once(request, monkeypatch):
    """The interpreter takes long for large blocks of the ops that say so in the table."""
    if "path" in request.fixturenames and not on_gpu():
        for op in KERNELS:
            if op.interpreted_block:
                row = tuning.TABLE[op.name][tuning.DEFAULT]
                launch = replace(row, block=op.interpreted_block, enough_programs=1)
                monkeypatch.setitem(tuning.TABLE, op.name, {tuning.DEFAULT: launch})


def with_leaves(op: OpInfo, arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """The arguments with gradients asked for, the differentiable ones in another type if given."""

    def leaf(x: Tensor) -> Tensor:
        x = x.detach()
        x = x.clone(memory_format=torch.preserve_format) if dtype is None else x.to(dtype)
        return x.requires_grad_(x.is_floating_point())

    return {
        name: tree_map_only(Tensor, leaf, value) if name in op.gradients_to(arguments) else value
        for name, value in arguments.items()
    }


def leaves(arguments: Arguments) -> list[Tensor]:
    return [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]


def upstream(results: list[Tensor]) -> list[Tensor]:
    """Any gradient of the results."""
    return [(0.5 + rand(*y.shape, seed=9)).to(y) for y in results]


def backward(results: list[Tensor], arguments: Arguments, **options) -> list[Tensor]:
    return list(torch.autograd.grad(results, leaves(arguments), upstream(results), **options))


def run(op: OpInfo, arguments: Arguments, **changes) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients."""
    arguments = with_leaves(op, arguments)
    results = tree_leaves(op.function(**arguments, **changes))
    gradients = backward(results, arguments) if leaves(arguments) else []
    return [y.detach() for y in results], gradients


def same(first, second) -> bool:
    """Whether two structures of tensors hold the same bits, NaN included."""
    first, second = ([x for x in tree_leaves(y) if isinstance(x, Tensor)] for y in (first, second))
    return len(first) == len(second) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(first, second, strict=True)
    )


def check(op: OpInfo, arguments: Arguments, dtype: torch.dtype) -> None:
    """Results and gradients against the reference; the arguments stay as they are."""
    before = copy(arguments)
    results, gradients = run(op, arguments)
    assert {y.dtype for y in results} == {op.result_dtype(arguments)}
    compare(results, exact(op, arguments), dtype)
    assert same(copy(arguments), before), "an argument was changed"
    if not gradients:
        return
    doubles = with_leaves(op, arguments, torch.float64)
    expected = exact(op, doubles)
    total = sum((y * u.double()).sum() for y, u in zip(expected, upstream(results), strict=True))
    total = total + sum(0 * x.sum() for x in leaves(doubles))  # some have no part in the result
    expected = torch.autograd.grad(total, leaves(doubles))
    asked = leaves(with_leaves(op, arguments))
    for ours, theirs, x in zip(gradients, expected, asked, strict=True):
        assert (ours.dtype, ours.shape) == (x.dtype, x.shape)
        assert_close(ours, theirs)


def test_the_table_is_complete():
    names = [*(op.name for op in OPS), *VIEWS_OF_TORCH]
    assert sorted(names) == sorted(functional.__all__)
    for op in KERNELS:
        assert (ROOT / f"tests/plans/{op.name}.py").exists()


# --- values and gradients ------------------------------------------------------------------------


@pytest.fixture
def poisoned():
    """New memory is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def samples_and_types(op: OpInfo, compiled: bool) -> list[tuple[str, torch.dtype]]:
    """Samples and types that compile kernels, or the other ones.

    The former are all samples of one type, and the first and the last one of all types.
    """
    names = list(samples(op))
    return [
        (name, dtype)
        for name in names
        for dtype in op.dtypes
        if compiled == (name in (names[0], names[-1]) or dtype == op.dtypes[0])
    ]


def types_of_results(op: OpInfo, compiled: bool) -> list[tuple[torch.dtype, torch.dtype]]:
    """Types and types of results that compile kernels, or the other pairs.

    The former are those of equal types and of float32: no load depends on the type of the result.
    """
    return [
        (dtype, result)
        for dtype in op.dtypes
        for result in VOXELS
        if compiled == (dtype == result or torch.float32 in (dtype, result))
    ]


@each(KERNELS, case=lambda op: samples_and_types(op, compiled=True))
def test_agrees_with_the_reference(path, op, case, poisoned):
    sample, dtype = case
    check(op, copy(op.samples(dtype)[sample], path.device), dtype)


@each(KERNELS, case=lambda op: samples_and_types(op, compiled=False))
def test_agrees_with_the_reference_on_the_cpu(op, case, poisoned):
    """The other types, of which each would compile a kernel for the same arithmetic."""
    sample, dtype = case
    check(op, op.samples(dtype)[sample], dtype)


def check_type_of_result(op, arguments: Arguments, dtype, result) -> None:
    arguments = {**arguments, "dtype": result}
    results = tree_leaves(op.function(**arguments))
    assert {y.dtype for y in results} == {result}
    compare(results, exact(op, arguments), dtype)


@each(WITH_DTYPE, types=lambda op: types_of_results(op, compiled=True))
def test_every_type_of_result(path, op, types):
    windows: tuple = (None, (-20.5, 30.0))
    if path.name == "kernel":  # each compiles a variant: one for a pair of types
        windows = (windows[sum(map(VOXELS.index, types)) % 2],)
    for window in windows:
        arguments = copy({**op.sized(4, types[0]), "window": window}, path.device)
        check_type_of_result(op, arguments, *types)


@each(WITH_DTYPE, types=lambda op: types_of_results(op, compiled=False))
def test_every_type_of_result_on_the_cpu(op, types):
    for window in (None, (-20.5, 30.0)):
        check_type_of_result(op, {**op.sized(4, types[0]), "window": window}, *types)


@each(DIFFERENTIABLE)
def test_gradcheck(path, op):
    for arguments in some_with_gradients(op, path, torch.float64):
        arguments = with_leaves(op, arguments)
        values, tree = tree_flatten(arguments)
        asked = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.requires_grad]

        def call(*inputs, values=values, tree=tree, asked=asked):
            given = dict(zip(asked, inputs, strict=True))
            changed = [given.get(i, x) for i, x in enumerate(values)]
            return tuple(tree_leaves(op.function(**tree_unflatten(changed, tree))))

        assert torch.autograd.gradcheck(call, leaves(arguments), fast_mode=True)


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@each(
    [op for op in KERNELS if "levels" in op.samples(torch.float32)],
    sample=lambda op: [name for name in op.samples(torch.float32) if name.startswith("levels")],
    dtype=lambda _: (torch.float32, torch.bfloat16),
)
def test_levels_of_different_dtypes(op, sample, dtype, second):
    """As autocast makes them: each is as exact as it is alone in its dtype."""
    arguments = op.samples(dtype)[sample]
    name = next(iter(op.valid))
    levels = [x.to((dtype, second)[i % 2]) for i, x in enumerate(arguments[name])]
    arguments = {**arguments, name: type(arguments[name])(levels)}
    results, gradients = run(op, arguments)
    kept = arguments.get("reduction") == "none"
    assert not kept or [y.dtype for y in results] == [x.dtype for x in levels]
    for ours, theirs, x in zip(results, exact(op, arguments), levels, strict=kept):
        assert_close(ours, theirs, arithmetic=x.dtype if kept else torch.float32)
    if gradients:
        assert [x.dtype for x in gradients] == [x.dtype for x in levels]
        doubles = with_leaves(op, arguments, torch.float64)
        expected = exact(op, doubles)
        total = sum(
            (y * u.double()).sum() for y, u in zip(expected, upstream(results), strict=kept)
        )
        for ours, theirs in zip(
            gradients, torch.autograd.grad(total, leaves(doubles)), strict=True
        ):
            assert_close(ours, theirs)


@each(KERNELS, sample=lambda op: op.empty())
def test_empty(path, op, sample):
    check(op, copy(op.empty()[sample], path.device), torch.float32)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else gaps(x)


def reversed_axes(x: Tensor) -> Tensor:
    axes = tuple(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def channels_last(x: Tensor) -> Tensor:
    """Of the last five axes."""
    if x.dim() < 5:
        return x
    flat = x.flatten(0, x.dim() - 5).contiguous(memory_format=torch.channels_last_3d)
    return flat.unflatten(0, x.shape[: x.dim() - 4])


def gaps(x: Tensor) -> Tensor:
    """Every other element of every axis."""
    wide = torch.full([2 * n + 1 for n in x.shape], 9, dtype=x.dtype, device=x.device)
    view = wide[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def offset(x: Tensor) -> Tensor:
    """Off the borders of 16 bytes."""
    return torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    """One sample, the first, as all."""
    return x[:1].expand_as(x) if x.dim() > 2 else x


LAYOUTS = (transposed, reversed_axes, channels_last, gaps, offset, expanded)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@each(KERNELS)
def test_strides(path, op, layout):
    for arguments in some(op, path):
        check(op, tree_map_only(Tensor, layout, arguments), torch.float32)


# --- memory --------------------------------------------------------------------------------------


@each(OPS)
def test_repeats_bit_for_bit(path, op):
    for arguments in some(op, path):
        first, second = (run(op, copy(arguments, path.device)) for _ in range(2))
        assert same(first, second)


@each(KERNELS)
def test_a_hundred_runs_in_any_number_of_threads_give_one_result(op):
    arguments = op.sized(600, torch.float32)
    first = run(op, arguments)
    for n in range(100):
        with finely_split(1 + n % 3):
            assert same(run(op, arguments), first)


def contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


MEMORY = pytest.mark.parametrize(
    "layout", (contiguous, *LAYOUTS[:-1]), ids=lambda layout: layout.__name__
)


@MEMORY
@each(WITH_OUT)
def test_out(path, op, layout):
    for arguments in some(op, path, torch.int16):
        (expected,) = tree_leaves(op.function(**arguments))
        poison = math.nan if expected.is_floating_point() else 77
        out = layout(torch.full_like(expected, poison)).fill_(poison)
        around = None if out._base is None else out._base.clone()
        before = copy(arguments)
        assert op.function(**arguments, out=out) is out
        assert same(out, expected) and same(copy(arguments), before)
        assert around is None or same(out.fill_(poison)._base, around), "wrote outside out"


def check_in_place(op: OpInfo, arguments: Arguments, layout: Callable) -> None:
    own = layout(arguments[op.in_place])
    arguments = {**arguments, "dtype": own.dtype, op.in_place: own}
    expected, kept = op.function(**arguments), own.clone()
    around = None if own._base is None else own._base.clone()
    assert op.function(**arguments, out=own) is own
    assert same(own, expected)
    assert around is None or same(own.copy_(kept)._base, around), "wrote between the elements"


def negative_view(x: Tensor) -> Tensor:
    """The same values in memory that holds their opposites."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


@each(WITH_OUT)
def test_out_of_the_opposite_sign(path, op):
    for arguments in some(op, path):
        own = negative_view(arguments[op.in_place])
        assert own.is_neg() and same(own, arguments[op.in_place])
        check_in_place(op, {**arguments, op.in_place: own}, lambda x: x)
        expected = op.function(**{**arguments, op.in_place: contiguous(own)})
        out = negative_view(torch.zeros_like(expected))
        assert op.function(**arguments, out=out) is out and same(out, expected)


@each(WITH_OUT, case=lambda op: samples_and_types(op, compiled=True))
def test_in_place_equals_out_of_place(path, op, case):
    sample, dtype = case
    check_in_place(op, copy(op.samples(dtype)[sample], path.device), contiguous)


@each(WITH_OUT, case=lambda op: samples_and_types(op, compiled=False))
def test_in_place_equals_out_of_place_on_the_cpu(op, case):
    sample, dtype = case
    check_in_place(op, op.samples(dtype)[sample], contiguous)


@MEMORY
@each(WITH_OUT)
def test_in_place_in_strided_memory(path, op, layout):
    for arguments in some(op, path):
        check_in_place(op, arguments, layout)


@each(KERNELS, dtype=dtypes)
def test_the_tolerance_bites(op, dtype):
    """Zeros, a lost block and what belongs elsewhere are not taken for right."""
    results, gradients = run(op, op.sized(op.block // 16, dtype))
    for right in (*results, *gradients):
        assert right.numel() > 4 * op.block
        flat = right.flatten()
        lost = flat.clone()
        lost[op.block : 2 * op.block] = 0
        for wrong in (flat * 0, lost, *(flat.roll(n) for n in (1, op.block, 4 * op.block))):
            with pytest.raises(AssertionError):
                compare([wrong], [flat.double()], dtype)


# --- autograd ------------------------------------------------------------------------------------


@each(DIFFERENTIABLE, dtype=lambda _: FLOATS)
def test_backward_can_be_repeated(path, op, dtype):
    for arguments in some_with_gradients(op, path, dtype):
        arguments = with_leaves(op, arguments)
        results = tree_leaves(op.function(**arguments))
        first = backward(results, arguments, retain_graph=True)
        kept = copy(first)
        second, third = (backward(results, arguments, retain_graph=True) for _ in range(2))
        doubled = backward([2 * y for y in results], arguments)  # a factor that rounds nothing
        assert same(first, kept), "a later backward changed a gradient already given away"
        assert same(second, third)
        compare(second, [x.double() for x in first], dtype)
        compare(doubled, [2 * x.double() for x in first], dtype)


def nodes(results: list[Tensor]) -> list:
    """All of the graph of autograd."""
    found, new = [], [y.grad_fn for y in results]
    while new:
        found += new
        following = (node for f in new for node, _ in f.next_functions if node is not None)
        new = [f for f in dict.fromkeys(following) if f not in found]
    return found


def test_the_graph_is_walked():
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    assert len(nodes([y.exp() + y, y])) == 4


@each(DIFFERENTIABLE)
def test_hooks_see_all_that_is_saved(path, op):
    """The graph holds no tensor besides, so that it can be kept elsewhere or computed again."""
    for arguments in some_with_gradients(op, path):
        expected, gradients = run(op, arguments)
        given = with_leaves(op, arguments)
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.clone):
            results = tree_leaves(op.function(**given))
        held = [vars(node) for node in nodes(results) if hasattr(node, "__dict__")]
        assert held and not any(isinstance(x, Tensor) for x in tree_leaves(held))
        for retain_graph in (True, True, False):
            found = backward(results, given, retain_graph=retain_graph)
            compare(found, [x.double() for x in gradients], torch.float32)
            for x in found:
                x.fill_(math.nan)  # a gradient that was handed out is the caller's

        def call(given=given):
            return tree_leaves(op.function(**given))

        with torch.autograd.graph.save_on_cpu():
            offloaded = call()
        for results in (offloaded, checkpoint(call, use_reentrant=False)):
            assert same(results, expected)
            compare(backward(results, given), [x.double() for x in gradients], torch.float32)


@each(DIFFERENTIABLE)
def test_arguments_made_in_inference_mode(path, op):
    for arguments in some(op, path):
        with torch.inference_mode():
            made = copy(arguments)
        assert same(run(op, made), run(op, arguments))


@each(DIFFERENTIABLE)
def test_a_second_derivative_raises(path, op):
    for arguments in some_with_gradients(op, path):
        arguments = with_leaves(op, arguments)
        results = [y.square() for y in tree_leaves(op.function(**arguments))]
        gradients = backward(results, arguments, create_graph=True)
        with pytest.raises(RuntimeError, match=r"derivative|differentiable|autograd formula"):
            sum(x.sum() for x in gradients).backward()


@each(KERNELS)
def test_without_gradients(path, op):
    arguments = copy(op.sized(4, torch.float32), path.device)
    expected = op.function(**arguments)
    assert not any(y.requires_grad for y in tree_leaves(expected))
    name = (op.differentiable or tuple(op.not_finite))[0]
    asked = {**arguments, name: arguments[name].clone().requires_grad_()}
    with torch.no_grad():
        results = op.function(**asked)
    assert same(results, expected) and not any(y.requires_grad for y in tree_leaves(results))
    with torch.inference_mode():
        assert same(op.function(**asked), expected)
        assert same(op.function(**copy(arguments)), expected)
    if not op.differentiable:
        with pytest.raises(ValueError, match=f"{op.name}: no gradient to {name} is offered"):
            op.function(**asked)


def floating(op: OpInfo) -> Iterable[str]:
    return [
        name
        for name, x in op.sized(4, torch.float32).items()
        if isinstance(x, Tensor) and x.is_floating_point()
    ]


@each(OPS, argument=floating)
def test_a_forward_mode_derivative_is_refused(op, argument):
    arguments = op.sized(4, torch.float32)
    x = arguments.pop(argument)
    with pytest.raises(ValueError, match=f"{op.name}: no forward-mode derivative by {argument}"):
        torch.func.jvp(lambda x: op.function(**arguments, **{argument: x}), (x,), (x,))
    if not op.launches:
        return
    message = f"{op.name}: no forward-mode derivative"
    step = lambda x: op.function(**arguments, **{argument: x})  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.func.jvp(step, (x,), (x,)), backend="eager")
    with pytest.raises((ValueError, RuntimeError), match=message):
        compiled(x)
    if argument in op.differentiable:
        gradient = torch.func.grad(lambda x: step(x).square().sum())
        with pytest.raises(ValueError, match=message):
            torch.func.jvp(gradient, (x,), (x,))
    one = torch.ones(())
    constant = lambda y: y * op.function(**arguments, **{argument: x}).sum()  # noqa: E731
    assert torch.func.jvp(constant, (one,), (one,))[1].isfinite()


@each(
    [op for op in DIFFERENTIABLE if op.functorch],
    sample=samples_with_gradients,
)
def test_func_grad_and_vmap(op, sample):
    check_func_grad_and_vmap(op, op.samples(torch.float32)[sample])


@kernel_only
@each([op for op in DIFFERENTIABLE if op.functorch])
def test_func_grad_and_vmap_of_kernels(path, op):
    last = list(samples_with_gradients(op))[-1]
    check_func_grad_and_vmap(op, copy(op.samples(torch.float32)[last], path.device))


def check_func_grad_and_vmap(op: OpInfo, arguments: Arguments) -> None:
    name = op.differentiable[0]
    batch = [tree_map(lambda x, k=k: x * k, arguments[name]) for k in (1.0, 0.5, -2.0)]

    def call(x):
        return tree_leaves(op.function(**{**arguments, name: x}))

    def loss(x):
        return sum(y.square().sum() for y in call(x))

    def gradient(x):
        x = tree_map(lambda v: v.clone().requires_grad_(), x)
        return torch.autograd.grad(loss(x), tree_leaves(x))

    stacked = tree_map(lambda *x: torch.stack(x), *batch)
    for function, single in (
        (torch.func.vmap(call), call),
        (torch.func.vmap(torch.func.grad(loss)), gradient),
    ):
        one_by_one = [torch.stack(x) for x in zip(*map(single, batch), strict=True)]
        compare(tree_leaves(function(stacked)), one_by_one, torch.float32)
    compare(tree_leaves(torch.func.grad(loss)(batch[0])), gradient(batch[0]), torch.float32)


# --- torch.library, torch.compile ----------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes every call of an op of the library, with arguments as they were before it."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fmkernels":
            given = [describe(x) for x in tree_leaves((args, kwargs))]
            self.calls.setdefault(f"{func} {given}", (func, kept(func, args), kept(func, kwargs)))
        return func(*args, **(kwargs or {}))


def describe(x) -> object:
    return (x.dtype, x.dim()) if isinstance(x, Tensor) else type(x)


def kept(func, arguments):
    """Copies. Gradients are asked for where the op has some and the only result has them."""
    asks = "_backward" not in func.name() and len(func._schema.returns) == 1
    asks &= torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Autograd")
    return tree_map_only(
        Tensor, lambda x: x.detach().clone().requires_grad_(asks and x.requires_grad), arguments
    )


@each(KERNELS)
def test_opcheck(path, op):
    """Of every op of the library that the samples call, forward, backward and with out."""
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    with Calls() as noted:
        for arguments in some(op, path):
            run(op, arguments)
            run(op, tree_map_only(Tensor, channels_last, arguments))
            if op.in_place:
                op.function(**arguments, out=torch.empty_like(arguments[op.in_place]))
    assert noted.calls
    for func, args, kwargs in noted.calls.values():
        torch.library.opcheck(func, args, kwargs, test_utils=tests)
        if path.name == "cpu" and func in WITH_TENSORS:
            args = tree_map_only(float, lambda x: torch.tensor(x, dtype=torch.float64), args)
            args = [
                torch.stack(x) if name.endswith("window") and x else x
                for name, x in zip((a.name for a in func._schema.arguments), args, strict=False)
            ]
            torch.library.opcheck(WITH_TENSORS[func], args, kwargs, test_utils=tests[:3])


class Functions(TorchFunctionMode):
    """Notes the ops that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


@each(KERNELS)
def test_calls_go_past_the_dispatcher(op, monkeypatch):
    """Forward and backward, where nobody would see them."""
    stacks = []

    def noting(launch):
        def call(*args):
            stacks.append([frame.filename for frame in traceback.extract_stack()])
            return launch(*args)

        return call

    for cpu, name, _ in launches():
        monkeypatch.setattr(cpu, name, noting(getattr(cpu, name)))
    for arguments in op.samples(torch.float32).values():
        run(op, arguments)
    assert stacks and not any(str(Path("torch", "_ops.py")) in "".join(files) for files in stacks)


@each(KERNELS)
def test_whoever_watches_sees_calls(op):
    arguments = with_leaves(op, list(op.samples(torch.float32).values())[-1])
    name = f"fmkernels::{op.name}"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op.function(**arguments)
    assert any(event.name.startswith(name) for event in profile.events())
    with Functions() as noted:
        op.function(**arguments)
    assert any(call.startswith(name.replace("::", ".")) for call in noted.calls)
    mine = tree_map_only(Tensor, lambda x: x.as_subclass(Subclass), arguments)
    assert all(type(y) is Subclass for y in tree_leaves(op.function(**mine)))
    with torch._C._AutoDispatchBelowAutograd():
        assert not any(y.requires_grad for y in tree_leaves(op.function(**arguments)))


@each(OPS)
def test_compiles_at_changing_sizes(path, op):
    """With symbolic sizes from the first on the CPU path, from the second on for the kernels."""
    torch._dynamo.reset()
    dynamic, sizes = (True, (4, 5, 7)) if path.name == "cpu" else (None, (4, 5))

    def step(arguments):
        return op.function(**arguments)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in sizes:
        for layout in (copy, channels_last):
            arguments = copy(op.sized(n, torch.float32), path.device)
            arguments = tree_map_only(Tensor, layout, arguments)
            if op in WITH_DTYPE:
                arguments["dtype"] = torch.float16
            found = []
            for function in (step, compiled):
                torch.manual_seed(n)
                given = with_leaves(op, arguments)
                results = tree_leaves(function(given))
                found.append((results, backward(results, given) if leaves(given) else []))
            for ours, theirs in zip(tree_leaves(found[1]), tree_leaves(found[0]), strict=True):
                assert ours.stride() == theirs.stride()
                compare([ours], [theirs.double()], torch.float32)


TEN_VALUES = {
    "alpha0": lambda i: 0.1 * i,
    "alpha1": lambda i: 1 - 0.1 * i,
    "gamma": lambda i: 0.5 * i,  # also 0, 1 and 2
    "normalizer": lambda i: 0.5 * i,
    "temperature": lambda i: 0.1 + 0.1 * i,
    "eta": lambda i: 0.1 + 0.1 * i,
    "window": lambda i: (-2 - 0.1 * i, 1 + 0.1 * i),
    "batch_size": lambda i: 2 + i,
}


def varied(op: OpInfo) -> list[str]:
    return [name for name in TEN_VALUES if name in inspect.signature(op.function).parameters]


@each(OPS, argument=varied, into=lambda op: ["new", "out"] if op.in_place else ["new"])
def test_ten_values_of_a_number_take_two_graphs(op, argument, into):
    """The first is taken for a constant, the second is not."""

    def step(given, value):
        out = {"out": torch.empty_like(given[op.in_place])} if into == "out" else {}
        given = {name: tree_map_only(Tensor, lambda x: x * 1, x) for name, x in given.items()}
        return tree_leaves(op.function(**{**given, argument: value}, **out))

    arguments = next(iter(op.samples(torch.float32).values()))
    arguments = {name: x for name, x in arguments.items() if name != "generator"}
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(10):
        found = []
        for function in (step, compiled):
            torch.manual_seed(i)
            given = copy(arguments) if into == "out" else with_leaves(op, arguments)
            results = function(given, TEN_VALUES[argument](i))
            found.append((results, backward(results, given) if leaves(given) else []))
        for ours, theirs in zip(tree_leaves(found[1]), tree_leaves(found[0]), strict=True):
            compare([ours], [theirs.double()], torch.float32)
    assert counter.frame_count == 2


@pytest.mark.parametrize("sample", ["mean", "none", "levels"])
def test_cpp_wrapper_is_refused_where_results_are_lists(sample):
    (op,) = (op for op in OPS if op.name == "soft_target_focal_loss")
    arguments = op.samples(torch.float32)[sample]
    torch._dynamo.reset()
    with inductor_config.patch(cpp_wrapper=True, force_disable_caches=True):
        assert same(op.function(**arguments), run(op, arguments)[0])
        compiled = torch.compile(lambda x: op.function(**{**arguments, "logits": x}))
        with pytest.raises(Exception, match=f"{op.name}: cannot be compiled with .*cpp_wrapper"):
            compiled(arguments["logits"])


class Layers(torch.nn.Module):
    """An op between a layer with a parameter and a layer without."""

    def __init__(self, op: OpInfo, arguments: Arguments):
        super().__init__()
        given = {name: arguments[name] for name in op.differentiable if name in arguments}
        self.op, self.fixed = op, {k: v for k, v in arguments.items() if k not in given}
        self.inputs, self.structure = tree_flatten(given)
        self.scale = torch.nn.Parameter(torch.tensor(0.7))
        self.last = torch.nn.ReLU()

    def forward(self, *inputs):
        given = tree_unflatten([x * self.scale for x in inputs], self.structure)
        results = tree_leaves(self.op.function(**self.fixed, **given))
        return self.last(sum(y.float().square().sum() for y in results))


def layers(op: OpInfo, arguments: Arguments) -> tuple[Layers, tuple[Tensor, ...], Tensor]:
    """The layers, their inputs, and the gradient of the parameter."""
    model = Layers(op, arguments)
    model(*model.inputs).backward()
    gradient, model.scale.grad = model.scale.grad, None
    assert gradient.isfinite() and gradient != 0
    return model, tuple(model.inputs), gradient


@pytest.mark.parametrize("strict", [False, True])
@each(DIFFERENTIABLE, sample=samples_with_gradients)
def test_exports_with_gradients(op, sample, strict):
    model, inputs, gradient = layers(op, op.samples(torch.float32)[sample])
    program = torch.export.export(model, inputs, strict=strict)
    for exported in (program.module(), program.run_decompositions().module()):
        for _ in range(2):
            exported.scale.grad = None
            exported(*inputs).backward()
            assert_close(exported.scale.grad, gradient.double())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each(DIFFERENTIABLE)
def test_pipelining_keeps_gradients(op):
    for sample in samples_with_gradients(op):
        arguments = op.samples(torch.float32)[sample]
        model, inputs, gradient = layers(op, arguments)
        stages = pipeline(model, mb_args=inputs, split_spec={"last": SplitPoint.BEGINNING})
        first, last = stages.get_stage_module(0), stages.get_stage_module(1)
        last(first(*inputs)).backward()
        assert_close(first.scale.grad, gradient.double())


@each(DIFFERENTIABLE)
def test_compiled_autograd(op):
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    for sample in samples_with_gradients(op):
        arguments = op.samples(torch.float32)[sample]
        expected = run(op, arguments)[1]
        given = with_leaves(op, arguments)
        results = tree_leaves(op.function(**given))
        torch._dynamo.reset()
        with torch._dynamo.compiled_autograd._enable(compiler):
            for retain_graph in (True, False):
                found = backward(results, given, retain_graph=retain_graph)
                compare(found, [x.double() for x in expected], torch.float32)


@each(WITH_OUT)
def test_compiles_in_place(path, op):
    torch._dynamo.reset()

    def step(arguments):
        op.function(**arguments, out=arguments[op.in_place])
        return arguments[op.in_place] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (4, 5):
        arguments = copy(op.sized(n, torch.float32), path.device)
        expected = op.function(**arguments)
        assert torch.equal(compiled(arguments), expected + 1)
        assert torch.equal(arguments[op.in_place], expected)


@each(KERNELS, sample=samples)
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(op, sample):
    arguments = op.samples(torch.float32)[sample]
    real = tree_leaves(op.function(**arguments))
    with FakeTensorMode() as mode:
        fakes = op.function(**tree_map_only(Tensor, mode.from_tensor, arguments))
        if op.in_place:
            op.function(**tree_map_only(Tensor, mode.from_tensor, arguments), out=fakes)
    metas = op.function(**tree_map_only(Tensor, lambda x: x.to("meta"), arguments))
    for results in (tree_leaves(fakes), tree_leaves(metas)):
        for ours, theirs in zip(results, real, strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert ours.stride() == theirs.stride()


def test_a_second_import():
    """After modules were cleared; what the first import left behind goes on working."""
    script = """
        import sys
        import torch
        import fmkernels as first

        x, y = torch.linspace(-2, 2, 6, requires_grad=True), torch.linspace(0, 1, 6)
        volumes, lam, index = torch.ones(1, 1, 2, 3, 4), torch.ones(1), torch.zeros(1).long()
        loss = first.soft_target_focal_loss(x, y)
        for name in [name for name in sys.modules if name.partition(".")[0] == "fmkernels"]:
            del sys.modules[name]
        import fmkernels as second

        assert first.mixup3d is not second.mixup3d
        for functions in (second, first):
            again = functions.soft_target_focal_loss(x, y)
            assert torch.equal(again, loss)
            (gradient,) = torch.autograd.grad(again, x)
            assert torch.equal(functions.mixup3d(volumes, lam, index), volumes)
            out = torch.empty_like(volumes)
            assert functions.mixup3d(volumes, lam, index, out=out).equal(volumes)
            compiled = torch.compile(functions.soft_target_focal_loss, backend="aot_eager")
            assert torch.equal(compiled(x, y), loss)
        loss.backward()
        assert torch.equal(x.grad, gradient)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what must not matter ------------------------------------------------------------------------


@each(OPS, sample=samples)
def test_autocast_changes_nothing(op, sample):
    arguments = op.samples(torch.float32)[sample]
    expected = run(op, copy(arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(run(op, copy(arguments)), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
@each(OPS, sample=samples)
def test_process_wide_defaults_change_nothing(op, sample, default):
    arguments = op.samples(torch.float32)[sample]
    expected, again = run(op, copy(arguments)), copy(arguments)
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        found = run(op, again)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert same(found, expected)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
@each(OPS)
def test_numbers_of_numpy(op, kind):
    def convert(x: float) -> object:
        return kind(x) if kind(x) == x else x

    for arguments in op.samples(torch.float32).values():
        numbers = tree_map_only(float, convert, copy(arguments))
        assert same(op.function(**numbers), op.function(**copy(arguments)))
    if "batch_size" in arguments:
        assert op.function(np.int64(3))[0].shape == (3,)


@each(
    KERNELS,
    place=lambda op: [(name, v) for name, values in op.not_finite.items() for v in values],
)
def test_what_is_not_finite_stays_where_it_belongs(path, op, place):
    """A NaN gives NaN wherever it has a weight in the result, an infinity infinity or NaN."""
    (name, value), found = place, 0
    for arguments in op.samples(torch.float32).values():
        size = arguments[name].numel() if isinstance(arguments.get(name), Tensor) else 0
        for element in {size // 2, size * 5 // 8} if size > 1 else ():
            given = copy(arguments, path.device)
            given[name][np.unravel_index(element, given[name].shape)] = value
            results = tree_leaves(op.function(**given))
            for ours, theirs in zip(results, exact(op, given), strict=True):
                finite = theirs.isfinite()
                assert torch.equal(ours.isfinite(), finite)
                assert math.isinf(value) or ours[~finite].isnan().all()
                assert_close(ours[finite], theirs[finite])
                found += finite.any().item() and not finite.all().item()
            if found and path.name == "kernel":
                return
    assert found, "no sample mixes finite and other results"


# --- errors, host synchronization ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "error"),
    [pytest.param(op, e, id=f"{op.name}-{e.words}") for op in OPS for e in op.errors],
)
def test_errors(op, error):
    with pytest.raises(error.kind, match=f"^{op.name}: {error.words}") as raised:
        op.function(**{**op.valid, **error.arguments})
    assert any(name in str(raised.value) for name in error.arguments)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@each(KERNELS)
def test_dtensors_are_refused(op, mesh):
    for arguments in op.samples(torch.float32).values():
        values, structure = tree_flatten(arguments)
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                sharded = distribute_tensor(value, mesh, [Replicate()])
                given = tree_unflatten([*values[:i], sharded, *values[i + 1 :]], structure)
                with pytest.raises(TypeError, match=f"{op.name}: .* got a DTensor; pass the local"):
                    op.function(**given)
        if op.in_place:
            out = distribute_tensor(op.function(**arguments), mesh, [Replicate()])
            with pytest.raises(TypeError, match=f"{op.name}: out must be a plain tensor, got a DT"):
                op.function(**arguments, out=out)


@pytest.fixture
def idle_kernels(monkeypatch):
    """The launch code of a GPU in place of the CPU path, above kernels that do nothing."""
    if on_gpu():
        pytest.skip("the kernels of a GPU are not to run")
    run = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *_, **__: run.append(kernel))
    for cpu, name, launch in LAUNCHES:
        monkeypatch.setattr(cpu, name, launch)
    return run


def call_all(op: OpInfo) -> None:
    """Every sample, dense and strided: forward, backward twice, into a new tensor and in place."""
    for dtype in {torch.float32, torch.float16, torch.int16} & set(op.dtypes):
        for dense in op.samples(dtype).values():
            for arguments in (dense, tree_map_only(Tensor, transposed, dense)):
                given = with_leaves(op, arguments)
                with no_host_sync():
                    op.function(**arguments)
                    results = tree_leaves(op.function(**given))
                sent = upstream(results)
                for retain_graph in (True, False) if leaves(given) else ():
                    with no_host_sync():
                        torch.autograd.backward(results, sent, retain_graph=retain_graph)
                if op.in_place:
                    own = arguments[op.in_place]
                    for out in (torch.empty_like(own), own):
                        with no_host_sync():
                            op.function(**{**arguments, "dtype": dtype}, out=out)


@each(OPS)
def test_no_op_waits_for_the_device(op, idle_kernels):
    call_all(op)
    assert bool(idle_kernels) == op.launches


@each(KERNELS)
@pytest.mark.parametrize("line", ["item", "cpu", "nonzero", "__bool__", "tolist"])
def test_an_op_that_waits_is_caught(op, line, idle_kernels, monkeypatch):
    """A wait planted in any launch function: the samples reach each of them."""

    def waits(launch: Callable) -> Callable:
        def call(*arguments):
            x = next(x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.numel())
            getattr(x.flatten()[0], line)()
            return launch(*arguments)

        return call

    planted = [(cpu, n, f) for cpu, n, f in LAUNCHES if cpu.__name__.endswith(f".{op.name}")]
    assert planted
    for cpu, name, launch in planted:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, name, waits(launch))
            with pytest.raises(HostSyncError, match="waits for the device"):
                call_all(op)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("name", ["mixup3d", "object_mixup3d"])
def test_autograd_notices_what_out_overwrites(name, watched):
    """As after an in-place function of PyTorch's: else gradients would silently be wrong."""
    volumes, lam = torch.rand(2, 1, 4, 4, 4), torch.tensor([0.5, 0.5])
    boxes = torch.tensor([[0.0, 0, 0, 0, 3, 3, 3], [1, 1, 1, 1, 4, 4, 4]])
    others = (lam, torch.tensor([1, 0])) if name == "mixup3d" else (boxes, boxes.flip(0), lam)
    weight = torch.ones_like(volumes, requires_grad=True)
    loss = (weight * volumes).sum()
    seen = Functions() if watched else contextlib.nullcontext()
    with seen:
        getattr(functional, name)(volumes, *others, out=volumes)
    assert volumes._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
