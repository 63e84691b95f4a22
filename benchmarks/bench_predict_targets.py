"""predict_targets against plain PyTorch, its best eager form, and torch.compile of both."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

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
FLIPS = (0, 1, 2, 4)  # of the K = 4 views, as 1 = D, 2 = H, 4 = W
SYMMETRIES = (0, 13, 26, 47)  # three of the views have their axes permuted, each differently
ORDERS = list(itertools.permutations((2, 3, 4)))


@dataclass(frozen=True)
class Workload:
    """A level of a detector's head: logits [4, batch, kinds * classes, size, size, size]."""

    size: int
    batch: int
    dtype: torch.dtype = torch.float32
    kinds: int = 3  # of anchors at every place
    codes: tuple[int, ...] = FLIPS
    classes: int | None = None

    @property
    def anchors(self) -> int:
        return self.batch * self.kinds * self.size**3

    @property
    def logits(self) -> int:
        return self.anchors * (self.classes or 1)

    def __str__(self) -> str:
        classes = f", {self.classes} classes" if self.classes else ""
        symmetries = ", symmetries" if self.codes == SYMMETRIES else ""
        return f"{self.dtype} {self.anchors:,}{classes}{symmetries}".replace("torch.", "")

    def inputs(self) -> tuple[Tensor, Tensor]:
        channels = self.kinds * (self.classes or 1)
        shape = (len(self.codes), self.batch, channels, *[self.size] * 3)
        logits = torch.randn(shape, device=DEVICE) * 3 - 2
        return logits.to(self.dtype), torch.tensor(self.codes, dtype=torch.uint8, device=DEVICE)


TARGETS = {  # the workloads of the aims, where the best form is compiled too
    "cpu": [Workload(40, 2)],
    "cuda": [Workload(80, 8), Workload(80, 8, torch.bfloat16)],
}[DEVICE.type]
OTHERS = {
    "cpu": [
        Workload(8, 2),
        Workload(40, 2, torch.bfloat16),
        Workload(40, 2, codes=SYMMETRIES),
        Workload(40, 2, classes=3),
    ],
    "cuda": [
        Workload(size, batch, dtype)
        for size, batch in ((20, 4), (160, 8), (40, 8))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    + [
        Workload(80, 8, dtype, **other)
        for other in ({"codes": SYMMETRIES}, {"classes": 3})
        for dtype in (torch.float32, torch.bfloat16)
    ],
}[DEVICE.type]


def ours(logits: Tensor, flips: Tensor, *, classes: int | None = None) -> Tensor:
    return predict_targets(logits, flips, temperature=TEMPERATURE, classes=classes)


def undone(view: Tensor, code: int) -> Tensor:
    """A view [B, A, D, H, W] turned back, with the code known to the host."""
    view = view.flip([axis + 2 for axis in range(3) if code >> axis & 1])
    if code >= 8:
        order = ORDERS[code // 8]
        view = view.permute(0, 1, *(2 + order.index(axis) for axis in (2, 3, 4)))
    return view


def plain(logits: Tensor, codes: Sequence[int]) -> Tensor:
    """The formula as a trainer writes it."""
    views = [undone(view, code) for view, code in zip(logits.float().sigmoid(), codes, strict=True)]
    mean = torch.stack(views).mean(dim=0)
    own, other = mean ** (1 / TEMPERATURE), (1 - mean) ** (1 / TEMPERATURE)
    return own / (own + other)


def best_eager(logits: Tensor, codes: Sequence[int]) -> Tensor:
    """The best of eager PyTorch: one buffer summed into, sharpening as a sigmoid, all in place.

    The first view is the image as it is.
    """
    total = torch.sigmoid(logits[0].float())
    for view, code in zip(logits[1:], codes[1:], strict=True):
        total += undone(view, code).float().sigmoid_()
    return total.div_(len(codes)).logit_().div_(TEMPERATURE).sigmoid_()


def plain_classes(logits: Tensor, codes: Sequence[int], classes: int) -> Tensor:
    views = torch.stack([undone(view, code) for view, code in zip(logits, codes, strict=True)])
    mean = views.float().unflatten(2, (-1, classes)).softmax(3).mean(0)
    power = mean ** (1 / TEMPERATURE)
    return (power / power.sum(2, keepdim=True)).flatten(1, 2)


def best_eager_classes(logits: Tensor, codes: Sequence[int], classes: int) -> Tensor:
    """One buffer summed into, sharpening as a softmax of logarithms, in place where possible."""
    total = logits[0].float().unflatten(1, (-1, classes)).softmax(2)
    for view, code in zip(logits[1:], codes[1:], strict=True):
        total += undone(view, code).float().unflatten(1, (-1, classes)).softmax(2)
    return total.log_().div_(TEMPERATURE).softmax(2).flatten(1, 2)


PROVIDERS = {OURS: ours, "eager": plain, "best eager": best_eager}
PROVIDERS_OF_CLASSES = {OURS: ours, "eager": plain_classes, "best eager": best_eager_classes}


def providers(workload: Workload) -> list[Provider]:
    classes = {"classes": workload.classes} if workload.classes else {}
    functions = dict(PROVIDERS_OF_CLASSES if classes else PROVIDERS)
    for name in ("eager", "best eager"):
        functions[name] = on_host(functions[name], workload.codes, **classes)
    if classes:
        functions[OURS] = partial(ours, **classes)
    result = [Provider(name, function) for name, function in functions.items()]
    result.append(Provider("torch.compile", functions["eager"], compile=True))
    if workload in TARGETS:
        best = functions["best eager"]
        result.append(Provider("torch.compile of the best", best, compile=True))
    return result


def on_host(function: Callable, codes: Sequence[int], **options: int) -> Callable:
    """The function with the codes known to the host, which needs no copy from the device."""
    return lambda logits, flips: function(logits, codes, **options)


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="predict_targets",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda logits, flips: reference.predict_targets(
            logits, flips, temperature=TEMPERATURE, classes=workload.classes
        ),
        floor={"forward": workload.logits * (len(workload.codes) * workload.dtype.itemsize + 4)},
        providers=providers(workload),
    )


EVERY = [
    *map(comparison, TARGETS),
    *on_one_thread(comparison(Workload(40, 2))),
    *map(comparison, OTHERS),
]

SECONDS = 40
ONE = comparison(Workload(1, 1, kinds=1))
SMALL = [
    comparison(Workload(8, 2)),
    comparison(Workload(7, 2, torch.bfloat16, codes=SYMMETRIES)),
    comparison(Workload(8, 2, classes=3)),
]


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
