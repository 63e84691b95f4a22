"""Modules that hold hyperparameters and call fmkernels.functional."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fmkernels import functional
from fmkernels.ops.soft_target_focal_loss import check_hyperparameters

__all__ = ["SoftTargetFocalLoss"]


class SoftTargetFocalLoss(nn.Module):
    """Focal loss for soft targets; see :func:`fmkernels.soft_target_focal_loss`.

    Args:
        alpha0: weight of the loss at y = 0.
        alpha1: weight of the loss at y = 1.
        gamma: focusing exponent, >= 0.
        reduction: "none", "sum" or "mean".

    Example:
        >>> import torch
        >>> loss = SoftTargetFocalLoss(alpha0=0.25, alpha1=0.75)
        >>> loss(torch.zeros(4), torch.tensor([0.0, 0.3, 1.0, -1.0])).dim()
        0
    """

    def __init__(
        self,
        alpha0: float = 0.05,
        alpha1: float = 0.95,
        gamma: float = 2.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.alpha0, self.alpha1, self.gamma = check_hyperparameters(
            "SoftTargetFocalLoss", alpha0, alpha1, gamma, reduction
        )
        self.reduction = reduction

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[Tensor],
        *,
        weight: Tensor | Sequence[Tensor] | None = None,
        normalizer: float | Tensor | None = None,
        mix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | Sequence[Tensor]:
        loss: Callable[..., Any] = functional.soft_target_focal_loss  # overloads take no unions
        return loss(
            logits,
            targets,
            alpha0=self.alpha0,
            alpha1=self.alpha1,
            gamma=self.gamma,
            weight=weight,
            normalizer=normalizer,
            mix=mix,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"alpha0={self.alpha0}, alpha1={self.alpha1}, gamma={self.gamma}, "
            f"reduction={self.reduction!r}"
        )
