"""predict_targets against plain PyTorch, its best eager form, and torch.compile of both."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import reference
from benchmarks.common import (
    DEVICE,
    LARGE_ROWS,
    OURS,
    Comparison,
    Provider,
    Sweep,
    on_one_thread,
    rows,
)
from fmkernels import predict_targets
from tests.support.tolerance import assert_close

TEMPERATURE = 0.7
MASKS = (0, 1, 2, 4)  # of the K = 4 views, as 1 = D, 2 = H, 4 = W
AXES = [[axis for bit, axis in ((1, 2), (2, 3), (4, 4)) if mask & bit] for mask in MASKS]


@dataclass(frozen=True)
class Workload:
    """A level of a detector's head: logits [4, batch, kinds, size, size, size]."""

    size: int
    batch: int
    dtype: torch.dtype = torch.float32
    kinds: int = 3  # of anchors at every place

    @property
    def anchors(self) -> int:
        return self.batch * self.kinds * self.size**3

    def __str__(self) -> str:
        return f"{self.dtype} {self.anchors:,}".replace("torch.", "")

    def inputs(self) -> tuple[Tensor, Tensor]:
        logits = (
            torch.randn(len(MASKS), self.batch, self.kinds, *[self.size] * 3, device=DEVICE) * 3 - 2
        )
        return logits.to(self.dtype), torch.tensor(MASKS, dtype=torch.uint8, device=DEVICE)


TARGETS = {  # the workloads of the aims, where the best form is compiled too
    "cpu": [Workload(40, 2)],
    "cuda": [Workload(80, 8), Workload(80, 8, torch.bfloat16)],
}[DEVICE.type]
OTHERS = {
    "cpu": [Workload(8, 2), Workload(40, 2, torch.bfloat16)],
    "cuda": [
        Workload(size, batch, dtype)
        for size, batch in ((20, 4), (160, 8), (40, 8))
        for dtype in (torch.float32, torch.bfloat16)
    ],
}[DEVICE.type]


def ours(logits: Tensor, flips: Tensor) -> Tensor:
    return predict_targets(logits, flips, temperature=TEMPERATURE)


def plain(logits: Tensor, flips: Tensor) -> Tensor:
    """The formula as a trainer writes it, with flips known to the host."""
    views = [view.flip(axes) for view, axes in zip(logits.float().sigmoid(), AXES, strict=True)]
    mean = torch.stack(views).mean(dim=0)
    own, other = mean ** (1 / TEMPERATURE), (1 - mean) ** (1 / TEMPERATURE)
    return own / (own + other)


def best_eager(logits: Tensor, flips: Tensor) -> Tensor:
    """The best of eager PyTorch: one buffer summed into, sharpening as a sigmoid, all in place."""
    total = torch.sigmoid(logits[0].float())
    for view, axes in zip(logits[1:], AXES[1:], strict=True):
        total += view.flip(axes).float().sigmoid_()
    return total.div_(len(MASKS)).logit_().div_(TEMPERATURE).sigmoid_()


PROVIDERS = {OURS: ours, "eager": plain, "best eager": best_eager}


def providers(workload: Workload) -> list[Provider]:
    result = [Provider(name, function) for name, function in PROVIDERS.items()]
    result.append(Provider("torch.compile", plain, compile=True))
    if workload in TARGETS:
        result.append(Provider("torch.compile of the best", best_eager, compile=True))
    return result


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="predict_targets",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda logits, flips: reference.predict_targets(
            logits, flips, temperature=TEMPERATURE
        ),
        floor={"forward": workload.anchors * (len(MASKS) * workload.dtype.itemsize + 4)},
        providers=providers(workload),
    )


EVERY = [
    *map(comparison, TARGETS),
    *on_one_thread(comparison(Workload(40, 2))),
    *map(comparison, OTHERS),
]

SECONDS = 40
ONE = comparison(Workload(1, 1, kinds=1))
SMALL = [comparison(Workload(8, 2)), comparison(Workload(7, 2, torch.bfloat16))]


def tuned() -> list[tuple[Comparison, str]]:
    workloads = Workload(20, 4), Workload(80, 8), Workload(80, 8, torch.bfloat16)
    return [(comparison(workload), "forward") for workload in workloads]


SWEEPS = [Sweep("predict_targets", {512: (2, 4), 1024: (2, 4, 8), 2048: (4, 8)}, tuned)]


def growth() -> Iterator[tuple[Workload, int]]:
    yield Workload(1, 1, kinds=1), 1
    for size in (4, 16, 64, 256) if DEVICE.type == "cuda" else (2, 4, 8, 16, 32, 64):
        workload = Workload(size, 2)
        yield workload, workload.anchors


LARGE_BYTES = 8


def large(elements: int, part: int) -> None:
    """One flipped view: the first planes come from the last ones."""
    logits = torch.empty(
        1, 1, 1, elements // LARGE_ROWS, LARGE_ROWS // 32, 32, dtype=torch.bfloat16, device=DEVICE
    ).normal_()
    flips = torch.tensor([1], dtype=torch.uint8, device=DEVICE)
    targets = predict_targets(logits, flips)
    planes = part // LARGE_ROWS
    for own in (slice(planes), slice(-planes, None)):
        mirror = slice(-planes, None) if own.start is None else slice(planes)
        expected = predict_targets(logits[:, :, :, mirror].contiguous(), flips)
        assert_close(expected, targets[:, :, own])


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_predict_targets(record, comparison, provider, phase):
    record(comparison, provider, phase)
