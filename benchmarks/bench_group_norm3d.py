"""group_norm3d against the same three operations of PyTorch, in several forms, and torch.compile.

Workloads have the shapes of the detector's backbone. Values stay away from the kink of the ReLU, so
that rounding does not change which gradients pass it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from benchmarks.common import (
    DEVICE,
    OURS,
    Comparison,
    Provider,
    Sweep,
    on_one_thread,
    rows,
    wall_time,
)
from fmkernels import group_norm3d
from tests.support.tolerance import assert_close

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Workload:
    """ReLU(group_norm(x) + residual), groups of ``width`` channels, x [batch, channels, edge^3]."""

    batch: int
    channels: int
    edge: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    residual: bool = True
    width: int = 4

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layout = "channels last" if self.channels_last else "contiguous"
        extras = ", instance norm" * (self.width == 1) + ", no residual" * (not self.residual)
        return f"{dtype} {self.batch} x {self.channels} x {self.edge}^3, {layout}{extras}"

    @property
    def groups(self) -> int:
        return self.channels // self.width

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.edge**3

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        shape, channels = (self.batch, self.channels, *[self.edge] * 3), self.channels
        layout = torch.channels_last_3d if self.channels_last else torch.contiguous_format

        def leaf(values: Tensor) -> Tensor:
            return values.to(self.dtype, memory_format=layout).requires_grad_()

        x = torch.randn(shape, device=DEVICE)
        x += x.sign()
        residual = torch.rand(shape, device=DEVICE).mul_(x.sign()) if self.residual else None
        weight, bias = torch.rand(2, channels, device=DEVICE).mul_(0.2)
        return (
            leaf(x),
            (1 + weight).requires_grad_(),
            (bias - 0.1).requires_grad_(),
            None if residual is None else leaf(residual),
        )

    def floor(self) -> dict[str, int]:
        """Every element read once and written once: x, gradients, result, and so on."""
        size = self.elements * self.dtype.itemsize
        forward, backward = (2 + self.residual) * size, (4 + self.residual) * size
        return {"forward": forward, "backward": backward, "both": forward + backward}


TARGETS = {
    "cpu": [
        Workload(8, 24, 32),
        Workload(8, 24, 32, channels_last=False),
        Workload(8, 24, 32, BF16),
        Workload(8, 24, 32, BF16, channels_last=False),
    ],
    "cuda": [Workload(16, 24, 80, BF16), Workload(16, 24, 80, BF16, channels_last=False)],
}[DEVICE.type]
OTHERS = {
    "cpu": [
        Workload(8, 24, 32, BF16, residual=False),
        Workload(8, 48, 16, BF16),
        Workload(8, 96, 8, BF16),
        Workload(8, 96, 8, BF16, channels_last=False),
        Workload(1, 24, 64),
        Workload(8, 24, 32, width=1),
    ],
    "cuda": [
        Workload(16, 24, 80),
        Workload(16, 24, 80, BF16, residual=False),
        Workload(16, 48, 40, BF16),
        Workload(16, 96, 20, BF16),
        Workload(16, 128, 10, BF16),
        Workload(64, 16, 16, BF16),
        Workload(16, 24, 80, BF16, width=1),
    ],
}[DEVICE.type]


def ours(workload: Workload) -> Callable[..., Tensor]:
    def run(x, weight, bias, residual):
        return group_norm3d(x, workload.groups, weight, bias, residual=residual, activation="relu")

    return run


def eager(workload: Workload) -> Callable[..., Tensor]:
    """The formula as a network has it. Parameters get the dtype of x, as in a converted network."""

    def run(x, weight, bias, residual):
        y = F.group_norm(x, workload.groups, weight.to(x.dtype), bias.to(x.dtype))
        return F.relu(y if residual is None else y + residual)

    return run


def in_place(workload: Workload) -> Callable[..., Tensor]:
    """The least memory traffic of eager PyTorch."""

    def run(x, weight, bias, residual):
        y = F.group_norm(x, workload.groups, weight.to(x.dtype), bias.to(x.dtype))
        return (y if residual is None else y.add_(residual)).relu_()

    return run


def autocast(workload: Workload) -> Callable[..., Tensor]:
    """What autocast makes of the formula: all in float32. The next convolution converts back."""

    def run(x, weight, bias, residual):
        return eager(workload)(x.float(), weight, bias, residual).to(x.dtype)

    return run


def providers(workload: Workload) -> list[Provider]:
    functions = {OURS: ours, "eager": eager, "best eager": in_place}
    if workload.dtype == BF16:
        functions["eager, autocast"] = autocast
    result = [Provider(name, make(workload)) for name, make in functions.items()]
    to_compile = autocast if workload.dtype == BF16 else eager
    return [*result, Provider("torch.compile", to_compile(workload), compile=True)]


def oracle(workload: Workload) -> Callable[..., Tensor]:
    def run(x, weight, bias, residual):
        return reference.group_norm3d(
            x, workload.groups, weight, bias, residual=residual, activation="relu"
        )

    return run


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="group_norm3d",
        workload=str(workload),
        inputs=workload.inputs,
        reference=oracle(workload),
        floor=workload.floor(),
        providers=providers(workload),
        precision=workload.dtype,
    )


EVERY = [
    *map(comparison, TARGETS),
    *(alone for workload in TARGETS for alone in on_one_thread(comparison(workload))),
    *(timed for workload in TARGETS for timed in wall_time(comparison(workload))),
    *map(comparison, OTHERS),
]

SECONDS = 45
ONE = comparison(Workload(1, 4, 2))  # a single element has no variance
SMALL = [
    comparison(Workload(2, 24, 6, channels_last=last, residual=last, dtype=dtype))
    for last in (False, True)
    for dtype in (torch.float32, BF16)
]


def tuned() -> list[tuple[Comparison, str]]:
    workloads = Workload(8, 24, 80, BF16), Workload(8, 96, 20, BF16), Workload(8, 24, 80)
    return [(comparison(workload), "both") for workload in workloads]


SWEEPS = [
    Sweep(
        "group_norm3d",
        {1024: (2, 4), 2048: (4, 8), 4096: (4, 8)},
        tuned,
        max_tiles=(16, 64, 256),
    )
]


def growth() -> Iterator[tuple[Workload, int]]:
    for edge in (4, 16, 64, 128) if DEVICE.type == "cuda" else (2, 4, 8, 16, 32):
        workload = Workload(4, 24, edge)
        yield workload, workload.elements


LARGE_BYTES = 8


def large(elements: int, part: int) -> None:
    """Samples do not depend on one another."""
    shape = elements // part, 16, 16, 16, part // 16**3
    x = torch.empty(shape, dtype=BF16, device=DEVICE).normal_().requires_grad_()
    y = group_norm3d(x, 4, activation="relu")
    (gradient,) = torch.autograd.grad(y, x, x.detach())
    last = x.detach()[-1:].requires_grad_()
    expected = group_norm3d(last, 4, activation="relu")
    assert_close(y[-1:], expected)
    assert_close(gradient[-1:], torch.autograd.grad(expected, last, last.detach())[0])


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_group_norm3d(record, comparison, provider, phase):
    record(comparison, provider, phase)
