"""Modules that hold hyperparameters and call fmkernels.functional."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmkernels import functional
from fmkernels.ops import group_norm3d, soft_target_focal_loss

__all__ = ["GroupNorm3d", "InstanceNorm3d", "SoftTargetFocalLoss"]


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
        self.alpha0, self.alpha1, self.gamma = soft_target_focal_loss.check_hyperparameters(
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


class GroupNorm3d(nn.GroupNorm):
    """act(group normalization of x + residual); see :func:`fmkernels.group_norm3d`.

    A drop-in for torch.nn.GroupNorm: same parameters, same state dict, any number of axes.

    Args:
        num_groups: divides num_channels.
        num_channels: of x.
        eps: added to the variances, >= 0.
        affine: whether there are a weight and a bias per channel.
        activation: None, "relu" or "leaky_relu".
        negative_slope: slope of the leaky ReLU below 0, >= 0.
        device: of the parameters.
        dtype: likewise.

    Example:
        >>> import torch
        >>> norm = GroupNorm3d(2, 8, activation="relu")
        >>> x = torch.rand(1, 8, 4, 4, 4)
        >>> norm(x, residual=x).min().item() >= 0
        True
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        group_norm3d.check_hyperparameters(
            type(self).__name__, num_groups, num_channels, eps, activation, negative_slope
        )
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._normalize(x, self.num_groups, residual)

    def _normalize(self, x: Tensor, num_groups: int, residual: Tensor | None) -> Tensor:
        if x.dim() == 2 or x.dim() > 5:  # torch takes any number of axes
            shape = (*x.shape[:2], x.shape[2:].numel())
            residual = None if residual is None else residual.reshape(shape)
            return self._normalize(x.reshape(shape), num_groups, residual).reshape(x.shape)
        return functional.group_norm3d(
            x,
            num_groups,
            self.weight,
            self.bias,
            residual=residual,
            activation=self.activation,
            negative_slope=self.negative_slope,
            eps=self.eps,
        )

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self._repr_of_options()}"

    def _repr_of_options(self) -> str:
        options = f"{self.num_channels}, eps={self.eps}, affine={self.affine}"
        if self.activation is not None:
            options += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            options += f", negative_slope={self.negative_slope}"
        return options


class InstanceNorm3d(GroupNorm3d):
    """act(instance normalization of x + residual): :class:`GroupNorm3d` with a group per channel.

    A drop-in for torch.nn.InstanceNorm3d without running statistics: same parameters and state
    dict. As there, x of 4 axes is a sample without a batch, and without parameters x may have any
    number of channels.

    Args:
        num_features: channels of x.
        eps: added to the variances, >= 0.
        affine: whether there are a weight and a bias per channel.
        activation: None, "relu" or "leaky_relu".
        negative_slope: slope of the leaky ReLU below 0, >= 0.
        device: of the parameters.
        dtype: likewise.

    Example:
        >>> import torch
        >>> InstanceNorm3d(8)(torch.rand(1, 8, 4, 4, 4)).mean().abs().item() < 1e-6
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = False,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            num_features,
            eps,
            affine,
            activation=activation,
            negative_slope=negative_slope,
            device=device,
            dtype=dtype,
        )

    @property
    def num_features(self) -> int:
        return self.num_channels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dim() == 4:  # unbatched, as torch takes it
            return self(x[None], None if residual is None else residual[None])[0]
        return self._normalize(x, x.shape[1] if self.weight is None else self.num_groups, residual)

    def extra_repr(self) -> str:
        return self._repr_of_options()
