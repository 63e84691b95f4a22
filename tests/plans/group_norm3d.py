"""Launches of group_norm3d: types, both memory layouts, residual, activations, group widths."""

from collections.abc import Callable, Iterator

import torch

from tests.plans import alike
from tests.support.launch import launch
from tests.triton_checked.plan import Case

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SIZES = {"bfloat16": 2, "float32": 4, "float16": 2, "float64": 8}
SHAPE = (2, 24, 16, 40, 40)
RELU, NONE, LEAKY = 0.0, 1.0, 0.01


def tensors(dtype, shape, last, count):
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return [torch.zeros(shape, dtype=dtype).to(memory_format=layout) for _ in range(count)]


def forward(dtype, *, shape=SHAPE, groups=6, last=True, residual=True, slope=RELU):
    x, added = tensors(dtype, shape, last, 2)
    weight = torch.ones(shape[1])
    arguments = x, weight, weight, added if residual else None, groups, 1e-5, slope
    return lambda: launch("group_norm3d", *arguments)


def backward(dtype, *, shape=SHAPE, groups=6, last=True, residual=True, slope=RELU):
    grad_output, x, out = tensors(dtype, shape, last, 3)
    moments = torch.zeros((shape[0], 2, groups), dtype=F64 if dtype == F64 else F32)
    arguments = grad_output, x, torch.ones(shape[1]), moments, None if slope == NONE else out
    return lambda: launch(
        "group_norm3d_backward", *arguments, groups, slope,
        with_residual=residual and slope != NONE,
    )  # fmt: skip


def case(name: str, call, shape=SHAPE, min_bytes: float | None = None) -> Case:
    return Case(name, call, torch.Size(shape).numel(), min_bytes)


def cases() -> Iterator[Case]:
    for dtype in (BF16, F32, F16, F64):
        name, size = str(dtype).removeprefix("torch."), dtype.itemsize
        ordinary = dtype in (F32, F16)
        yield alike(case(f"forward {name}", forward(dtype), min_bytes=3 * size), ordinary)
        yield alike(case(f"backward {name}", backward(dtype), min_bytes=5 * size), ordinary)
    yield alike(case("forward, no residual bfloat16", forward(BF16, residual=False), min_bytes=4))
    yield alike(case("backward, no residual bfloat16", backward(BF16, residual=False), min_bytes=8))
    for name, options in {
        "no activation": {"slope": NONE, "residual": False},
        "leaky ReLU": {"slope": LEAKY},
        "contiguous": {"last": False},
        "instance norm": {"groups": 24},
        "96 channels": {"shape": (4, 96, 12, 12, 12), "groups": 24},
        "260 channels, 4 groups": {"shape": (4, 260, 9, 9, 9), "groups": 4},
        "7 channels": {"shape": (4, 7, 31, 33, 35), "groups": 1},
        "contiguous, odd size": {"shape": (4, 24, 31, 33, 35), "last": False},
    }.items():
        shape = options.get("shape", SHAPE)
        ordinary = name not in ("contiguous", "7 channels")
        yield alike(case(f"forward, {name} bfloat16", forward(BF16, **options), shape), ordinary)
        yield alike(case(f"backward, {name} bfloat16", backward(BF16, **options), shape), ordinary)


# Statistics take a pass of their own, over x or over all that the backward reads; with a residual,
# the second pass of the backward reads the gradient that the first one wrote.
EXTRA_BYTES = {
    **{f"forward {name}": size for name, size in SIZES.items()},
    **{f"backward {name}": 2 * size for name, size in SIZES.items()},
    "forward, no residual bfloat16": 2,
    "backward, no residual bfloat16": 6,
}


def tuned() -> dict[str, tuple[Callable, tuple[str, ...]]]:
    return {"group_norm3d": (forward(BF16), ("K", "R"))}
