"""soft_target_focal_loss against plain PyTorch, torch.compile of it, and the focal losses of other libraries.

Those take hard labels or mean something else by soft ones: they run on the targets rounded to 0 and 1, where the
formulas agree (alpha0 = 1 - alpha, alpha1 = alpha), and are marked so.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from benchmarks.common import DEVICE, OURS, Comparison, Provider, rows
from fmkernels import soft_target_focal_loss


@dataclass(frozen=True)
class Workload:
    """`elements` logits of type `logits`; the loss is summed, then multiplied by `scale` as a GradScaler does."""

    elements: int
    logits: torch.dtype = torch.float32
    targets: torch.dtype = torch.float32
    scale: float = 1.0

    def __str__(self) -> str:
        types = f"{self.logits}/{self.targets}".replace("torch.", "")
        return f"{types} {self.elements:,}" + (f" x {self.scale:g}" if self.scale != 1 else "")

    def inputs(self) -> tuple[Tensor, Tensor]:
        """A detector's head: most anchors are confident negatives, some have targets in between."""
        logits = torch.randn(self.elements, device=DEVICE) * 3 - 2
        targets = torch.rand(self.elements, device=DEVICE) * (torch.rand(self.elements, device=DEVICE) < 0.3)
        if self.targets == torch.uint8:
            targets = targets.round()
        return logits.to(self.logits).requires_grad_(), targets.to(self.targets)

    def hard_inputs(self) -> tuple[Tensor, Tensor]:
        logits, targets = self.inputs()
        return logits, targets.round()

    def floor(self) -> dict[str, int | None]:
        """Logits and targets read, gradients written, be it in the forward or in the backward."""
        read = self.elements * (self.logits.itemsize + self.targets.itemsize)
        written = self.elements * self.logits.itemsize
        return {"forward": read, "backward": None, "both": read + written}


WORKLOADS = {
    "cpu": [
        Workload(10_000),
        Workload(1_000_000),
        Workload(1_000_000, scale=1024),
        Workload(1_000_000, torch.bfloat16, torch.bfloat16),
    ],
    "cuda": [
        Workload(elements, *types, scale=scale)
        for elements in (100_000_000, 100_000, 10_000_000, 1_000_000)
        for types in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.bfloat16, torch.uint8),
        )
        for scale in ((1.0, 1024.0) if elements == 100_000_000 else (1.0,))
    ],
}[DEVICE.type]


def ours(logits: Tensor, targets: Tensor) -> Tensor:
    return soft_target_focal_loss(logits, targets, reduction="sum")


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    """The formula as a trainer writes it."""
    x, y = logits.float(), targets.float()
    cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return ((0.05 + 0.9 * y) * (y - torch.sigmoid(x)).square() * cross_entropy).sum()


class _ClosedForm(torch.autograd.Function):
    """The best of eager PyTorch: loss and gradient in the forward, temporaries reused."""

    @staticmethod
    def forward(ctx, logits, targets):
        x, y = logits.float(), targets.float()
        p = torch.sigmoid(x)
        cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        d = p - y
        weight = (0.9 * y).add_(0.05).mul_(d)
        loss = torch.dot((weight * d).view(-1), cross_entropy.view(-1))
        slope = torch.addcmul(p, p, p, value=-1).mul_(cross_entropy).mul_(2).addcmul_(d, d)
        ctx.save_for_backward(slope.mul_(weight).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream.to(ctx.saved_tensors[0].dtype), None


def torchvision(logits: Tensor, targets: Tensor) -> Tensor:
    ops = pytest.importorskip("torchvision.ops", exc_type=Exception)
    return ops.sigmoid_focal_loss(logits.float(), targets.float(), alpha=0.95, gamma=2, reduction="sum")


def monai(logits: Tensor, targets: Tensor) -> Tensor:
    losses = pytest.importorskip("monai.losses.focal_loss")
    return losses.sigmoid_focal_loss(logits.float(), targets.float(), gamma=2, alpha=0.95).sum()


def kornia(logits: Tensor, targets: Tensor) -> Tensor:
    losses = pytest.importorskip("kornia.losses")
    return losses.binary_focal_loss_with_logits(logits.float(), targets.float(), alpha=0.95, gamma=2, reduction="sum")


PROVIDERS = {
    OURS: ours,
    "eager": plain,
    "best eager": _ClosedForm.apply,
    "torch.compile": plain,
    "torchvision (hard labels)": torchvision,
    "monai (hard labels)": monai,
    "kornia (hard labels)": kornia,
}


def comparison(workload: Workload) -> Comparison:
    return Comparison(
        op="soft_target_focal_loss",
        workload=str(workload),
        inputs=workload.inputs,
        reference=lambda logits, targets: reference.soft_target_focal_loss(logits, targets, reduction="sum"),
        floor=workload.floor(),
        providers=[
            Provider(
                name,
                function,
                inputs=workload.hard_inputs if "hard" in name else None,
                compile=name == "torch.compile",
            )
            for name, function in PROVIDERS.items()
        ],
        scale=workload.scale,
    )


@pytest.mark.parametrize(("comparison", "provider", "phase"), rows(map(comparison, WORKLOADS)))
def test_soft_target_focal_loss(record, comparison, provider, phase):
    record(comparison, provider, phase)
