"""soft_target_focal_loss against plain and the best PyTorch, compiled or not, and other libraries.

Losses of other libraries take hard labels, or define soft ones differently. They run on targets
rounded to 0 and 1, where the formulas agree (alpha0 = 1 - alpha, alpha1 = alpha), and their names
say so. The losses of apex and mmcv need a GPU and have one class index per anchor.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

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
from fmkernels import soft_target_focal_loss
from tests.support.tolerance import assert_close

CLASSES = 8  # per anchor, for apex and mmcv
BLOCK = 2**17  # elements per thread of the best eager form: its buffers stay in the caches
LEVEL_RATIO = 8  # elements of a level per element of the next: half the size along three axes


@dataclass(frozen=True)
class Workload:
    """`elements` logits in one tensor or in the `levels` of a feature pyramid.

    The loss is summed, then multiplied by `scale`, as a GradScaler does.
    """

    elements: int
    logits: torch.dtype = torch.float32
    targets: torch.dtype = torch.float32
    scale: float = 1.0
    levels: int = 1

    def __str__(self) -> str:
        types = f"{self.logits}/{self.targets}".replace("torch.", "")
        levels = f" in {self.levels} levels" if self.levels > 1 else ""
        return f"{types} {self.elements:,}{levels}" + (
            f" x {self.scale:g}" if self.scale != 1 else ""
        )

    def inputs(self) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
        """As in a detector: most anchors are confident negatives, some have targets in between."""
        logits = torch.randn(self.elements, device=DEVICE) * 3 - 2
        targets = torch.rand(self.elements, device=DEVICE) * (
            torch.rand(self.elements, device=DEVICE) < 0.3
        )
        if self.targets == torch.uint8:
            targets = targets.round()
        logits, targets = logits.to(self.logits), targets.to(self.targets)
        if self.levels == 1:
            return logits.requires_grad_(), targets
        ratios = [LEVEL_RATIO**i for i in range(self.levels)]
        sizes = [self.elements * ratio // sum(ratios) for ratio in ratios[:0:-1]]
        sizes.append(self.elements - sum(sizes))
        return [x.clone().requires_grad_() for x in logits.split(sizes)], [
            y.clone() for y in targets.split(sizes)
        ]

    def hard_inputs(self) -> tuple[Tensor, Tensor]:
        logits, targets = self.inputs()
        return logits, targets.round()

    def class_inputs(self) -> tuple[Tensor, Tensor]:
        """Logits [anchors, CLASSES], and the class of each anchor; CLASSES is the background."""
        logits = torch.randn(self.elements // CLASSES, CLASSES, device=DEVICE) * 3 - 2
        classes = torch.randint(CLASSES + 1, logits.shape[:1], device=DEVICE)
        return logits.to(self.logits).requires_grad_(), classes

    def floor(self) -> dict[str, int | None]:
        """Logits and targets are read, gradients written, in the forward or in the backward."""
        read = self.elements * (self.logits.itemsize + self.targets.itemsize)
        written = self.elements * self.logits.itemsize
        return {"forward": read, "backward": None, "both": read + written}


BF16 = torch.bfloat16
TARGETS = {  # workloads with a target time; the best form is also compiled
    "cpu": [Workload(4_000_000)],
    "cuda": [
        Workload(100_000_000),
        Workload(100_000_000, BF16, BF16),
        Workload(100_000, levels=3),
        Workload(100_000, BF16, BF16, levels=3),
    ],
}[DEVICE.type]
OTHERS = {
    "cpu": [
        Workload(10_000),
        Workload(1_000_000),
        Workload(1_000_000, scale=1024),
        Workload(1_000_000, BF16, BF16),
        *(Workload(elements, levels=3) for elements in (10_000, 100_000, 1_000_000)),
    ],
    "cuda": [
        workload
        for elements in (100_000_000, 100_000, 10_000_000, 1_000_000, 10_000)
        for scale in ((1.0, 1024.0) if elements == 100_000_000 else (1.0,))
        for types in ((torch.float32, torch.float32), (BF16, BF16), (BF16, torch.uint8))
        if (
            workload := Workload(
                elements, *types, scale=scale, levels=1 if elements > 1_000_000 else 3
            )
        )
        not in TARGETS
    ],
}[DEVICE.type]

importorskip = cache(pytest.importorskip)  # uncached, it takes longer than a small loss


def over_levels(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The function of one tensor, or its sum over the levels of a pyramid."""

    def total(logits: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> Tensor:
        if isinstance(logits, Tensor):
            return function(logits, targets)
        return sum(map(function, logits, targets))

    return total


def ours(logits: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> Tensor:
    return soft_target_focal_loss(logits, targets, reduction="sum")


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    """The formula as it is usually written."""
    x, y = logits.float(), targets.float()
    cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return ((0.05 + 0.9 * y) * (y - torch.sigmoid(x)).square() * cross_entropy).sum()


def closed_form(
    x: Tensor,
    y: Tensor,
    gradient: bool,
    slope: Tensor | None = None,
    buffers: Sequence[Tensor | None] = (None,) * 4,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, if asked for, the gradient, in the given buffers."""
    p, cross_entropy, weight, d = buffers
    p = torch.sigmoid(x, out=p)
    cross_entropy = F.softplus(x, out=cross_entropy).addcmul_(x, y, value=-1)
    d = torch.sub(p, y, out=d)
    weight = torch.mul(y, 0.9, out=weight).add_(0.05).mul_(d)
    slope = torch.mul(weight, d, out=slope)
    loss = torch.dot(slope, cross_entropy)
    if not gradient:
        return loss, None
    d.mul_(d).addcmul_(p.addcmul_(p, p, value=-1), cross_entropy, value=2)
    return loss, torch.mul(weight, d, out=slope)


def in_blocks(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The closed form, block by block, in buffers that stay in the caches of a CPU."""
    block = min(BLOCK * torch.get_num_threads(), logits.numel())
    buffers = torch.empty(5, block)
    loss, slopes = torch.zeros(()), torch.empty_like(logits)
    for x, y, slope in zip(
        logits.split(block), targets.split(block), slopes.split(block), strict=True
    ):
        *four, wide = buffers[:, : len(x)]
        wide = slope if slope.dtype == torch.float32 else wide
        loss += closed_form(x.float(), y.float(), gradient, wide, four)[0]
        if gradient and wide is not slope:
            slope.copy_(wide)
    return loss, slopes


def _loss_and_slope(
    logits: Tensor, targets: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    if DEVICE.type == "cpu" and not torch.compiler.is_compiling():
        return in_blocks(logits, targets, gradient)
    loss, slope = closed_form(logits.float(), targets.float(), gradient)
    return loss, slope.to(logits.dtype) if gradient else None


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        loss, slope = _loss_and_slope(logits, targets, gradient=True)
        ctx.save_for_backward(slope)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        (slope,) = ctx.saved_tensors
        if DEVICE.type == "cpu" and not torch.compiler.is_compiling() and grad_output == 1:
            return slope, None
        return slope * grad_output.to(slope.dtype), None


def best(logits: Tensor, targets: Tensor) -> Tensor:
    """The best in PyTorch: loss and gradient in closed form in the forward, reusing temporaries."""
    if torch.is_grad_enabled():
        return _WithSlope.apply(logits, targets)
    return _loss_and_slope(logits, targets, gradient=False)[0]


def torchvision(logits: Tensor, targets: Tensor) -> Tensor:
    ops = importorskip("torchvision.ops", exc_type=Exception)
    return ops.sigmoid_focal_loss(
        logits.float(), targets.float(), alpha=0.95, gamma=2, reduction="sum"
    )


def monai(logits: Tensor, targets: Tensor) -> Tensor:
    losses = importorskip("monai.losses.focal_loss", exc_type=Exception)
    return losses.sigmoid_focal_loss(logits.float(), targets.float(), gamma=2, alpha=0.95).sum()


def kornia(logits: Tensor, targets: Tensor) -> Tensor:
    losses = importorskip("kornia.losses", exc_type=Exception)
    x, y = (each.float().view(1, 1, -1) for each in (logits, targets))
    return losses.binary_focal_loss_with_logits(x, y, alpha=0.95, gamma=2, reduction="sum")


def fvcore(logits: Tensor, targets: Tensor) -> Tensor:
    """The formula of fvcore, written out."""
    x, y = logits.float(), targets.float()
    p = torch.sigmoid(x)
    cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    p_of_target = p * y + (1 - p) * (1 - y)
    loss = cross_entropy * (1 - p_of_target) ** 2
    return ((0.95 * y + 0.05 * (1 - y)) * loss).sum()


def apex(logits: Tensor, classes: Tensor) -> Tensor:
    losses = importorskip("apex.contrib.focal_loss", exc_type=Exception)
    background = torch.where(classes == CLASSES, -1, classes)
    return losses.focal_loss(
        logits.float(), background, torch.ones(1, device=DEVICE), CLASSES, 0.95, 2.0
    )


def mmcv(logits: Tensor, classes: Tensor) -> Tensor:
    ops = importorskip("mmcv.ops", exc_type=Exception)
    return ops.sigmoid_focal_loss(logits.float(), classes, 2.0, 0.95, None, "sum")


def class_reference(logits: Tensor, classes: Tensor) -> Tensor:
    return reference.soft_target_focal_loss(
        logits, F.one_hot(classes, CLASSES + 1)[:, :CLASSES], reduction="sum"
    )


SOFT = {OURS: ours, "eager": over_levels(plain), "best eager": over_levels(best)}
HARD = {
    "torchvision (hard labels)": torchvision,
    "monai (hard labels)": monai,
    "kornia (hard labels)": kornia,
    "fvcore's formula (hard labels)": fvcore,
}
BY_CLASS = {"apex (one class an anchor)": apex, "mmcv (one class an anchor)": mmcv}


def providers(workload: Workload) -> list[Provider]:
    soft = [Provider(name, function) for name, function in SOFT.items()]
    soft.append(Provider("torch.compile", SOFT["eager"], compile=True))
    if workload in TARGETS:
        soft.append(Provider("torch.compile of the best", SOFT["best eager"], compile=True))
    if workload.levels > 1:
        return soft
    hard = [
        Provider(name, function, inputs=workload.hard_inputs) for name, function in HARD.items()
    ]
    if DEVICE.type == "cpu":
        return soft + hard
    return (
        soft
        + hard
        + [
            Provider(name, function, inputs=workload.class_inputs, reference=class_reference)
            for name, function in BY_CLASS.items()
        ]
    )


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="soft_target_focal_loss",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda logits, targets: reference.soft_target_focal_loss(
            logits, targets, reduction="sum"
        ),
        floor=workload.floor(),
        providers=providers(workload),
        scale=workload.scale,
    )


EVERY = [
    *map(comparison, TARGETS),
    *wall_time(comparison(Workload(100_000, levels=3))),
    *on_one_thread(comparison(Workload(4_000_000))),
    *map(comparison, OTHERS),
]


def three_levels() -> Comparison:
    """The loss of every element, some ignored, with mixed targets."""

    def inputs() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        logits = [torch.randn(2, n, device=DEVICE, requires_grad=True) for n in (1000, 130, 17)]
        targets = [torch.rand_like(x) - 0.1 for x in logits]
        return logits, targets, torch.rand(2, device=DEVICE), torch.tensor([1, 0], device=DEVICE)

    def losses(function: Callable) -> Callable:
        return lambda xs, ys, lam, index: function(xs, ys, mix=(lam, index), reduction="none")

    return Comparison(
        op="soft_target_focal_loss",
        workload="three levels, mixed targets, no reduction",
        inputs=inputs,
        reference=losses(reference.soft_target_focal_loss),
        floor=dict.fromkeys(("forward", "backward", "both")),
        providers=[Provider(OURS, losses(soft_target_focal_loss))],
    )


SECONDS = 80
ONE = comparison(Workload(1))
SMALL = [
    comparison(Workload(5003)),
    comparison(Workload(5003, BF16, torch.uint8, scale=1024)),
    comparison(Workload(5003, torch.float16, torch.float16, scale=1024)),
    three_levels(),
]


def tuned() -> list[tuple[Comparison, str]]:
    workloads = (
        Workload(100_000),
        Workload(10_000_000, scale=1024),
        Workload(100_000_000, BF16, BF16),
    )
    return [(comparison(workload), "both") for workload in workloads]


SWEEPS = [
    Sweep(
        "soft_target_focal_loss",
        {512: (2, 4), 1024: (2, 4, 8), 2048: (4, 8), 4096: (8, 16)},
        tuned,
        max_tiles=(1, 4, 8, 32),
    )
]


def growth() -> Iterator[tuple[Workload, int]]:
    for power in range(0, 9, 2) if DEVICE.type == "cuda" else range(7):
        yield Workload(10**power), 10**power


LARGE_BYTES = 14


def large(elements: int, part: int) -> None:
    """The loss is added up from pieces; the end of each has the gradient of the piece alone."""
    logits = torch.empty(elements, dtype=BF16, device=DEVICE).normal_().requires_grad_()
    targets = torch.empty(elements, dtype=torch.uint8, device=DEVICE).random_(2)
    loss = soft_target_focal_loss(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    total = 0.0
    pieces = (tensor.split(elements // 8) for tensor in (logits.detach(), targets, gradient))
    for x, y, expected in zip(*pieces, strict=True):
        piece = x.requires_grad_()
        loss_of_piece = soft_target_focal_loss(piece, y, reduction="sum")
        assert_close(torch.autograd.grad(loss_of_piece, piece)[0][-part:], expected[-part:])
        total += loss_of_piece.item()
    assert abs(loss.item() - total) <= 1e-5 * abs(total), (loss.item(), total)


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(EVERY))
def test_soft_target_focal_loss(record, comparison, provider, phase):
    record(comparison, provider, phase)
