"""The operations of a FocalMix step in plain eager PyTorch, as a careful user would write them.

``--ops plain`` runs them, for comparison only. Names and meaning are those of
`fmkernels.functional`, as far as a step needs them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmkernels.focalmix.model.detector import apply_window
from fmkernels.functional import apply_symmetry, undo_symmetry


def views_of(
    images: Tensor, codes: Sequence[int], *, window: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    windowed = apply_window(images, window).to(dtype)
    return torch.cat([apply_symmetry(windowed, code) for code in codes])


def mixup3d(
    volumes: Tensor,
    lam: Tensor,
    index: Tensor,
    *,
    window: tuple[float, float],
    dtype: torch.dtype,
) -> Tensor:
    x = apply_window(volumes, window)
    return torch.lerp(x[index], x, lam.view(-1, 1, 1, 1, 1)).to(dtype)


def object_mixup3d(
    volumes: Tensor,
    boxes: Tensor,
    donor_boxes: Tensor,
    lam: Tensor,
    *,
    donors: Tensor,
    window: tuple[float, float],
    out: Tensor,
) -> Tensor:
    """Works in place only (``out`` is ``volumes``), and rounds boxes to the nearest voxel."""
    is_valid = (boxes.isfinite() & donor_boxes.isfinite()).all(1)
    for (b, *box), (j, *donor_box), weight in zip(
        *(x[is_valid].tolist() for x in (boxes, donor_boxes, lam)), strict=True
    ):
        region = out[int(b)][(slice(None), *_region(box, out.shape[2:]))]
        donor = donors[int(j)][(slice(None), *_region(donor_box, donors.shape[2:]))]
        if region.numel() and donor.numel():
            windowed = apply_window(donor, window)[None]
            resized = F.interpolate(windowed, region.shape[1:], mode="trilinear")[0]
            region.copy_(torch.lerp(resized, region.float(), weight))
    return out


def _region(box: Sequence[float], size: Sequence[int]) -> list[slice]:
    """The voxels whose centers lie in a box."""
    ends = [(max(a, 0.0), min(b, n)) for a, b, n in zip(box[:3], box[3:], size, strict=True)]
    return [slice(math.ceil(a - 0.5), max(math.ceil(b - 0.5), 0)) for a, b in ends]


def predict_targets(
    view_logits: Sequence[Tensor], flips: Tensor, *, temperature: float
) -> list[Tensor]:
    codes, targets = flips.tolist(), []
    for level in view_logits:
        mean = torch.sigmoid(level[0].float())
        for view, code in zip(level[1:], codes[1:], strict=True):
            mean += undo_symmetry(view, code).float().sigmoid_()
        targets.append(mean.div_(len(codes)).logit_().div_(temperature).sigmoid_())
    return targets


def soft_target_focal_loss(
    logits: Sequence[Tensor], targets: Sequence[Tensor], **arguments: Any
) -> Tensor:
    def loss(x: Tensor, y: Tensor, alpha0: float, alpha1: float, gamma: float) -> Tensor:
        cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        alpha = alpha0 + (alpha1 - alpha0) * y
        return alpha * (y - torch.sigmoid(x)).abs() ** gamma * cross_entropy

    return _total(loss, logits, targets, **arguments)


def hard_target_focal_loss(
    logits: Sequence[Tensor], targets: Sequence[Tensor], **arguments: Any
) -> Tensor:
    """The usual focal loss with soft targets in the formula for hard ones: not minimal at p = y.

    ``--loss hard`` trains with it, for comparison with the soft-target focal loss.
    """

    def loss(x: Tensor, y: Tensor, alpha0: float, alpha1: float, gamma: float) -> Tensor:
        p = torch.sigmoid(x)
        p_t, alpha_t = p * y + (1 - p) * (1 - y), alpha1 * y + alpha0 * (1 - y)
        cross_entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        return alpha_t * (1 - p_t) ** gamma * cross_entropy

    return _total(loss, logits, targets, **arguments)


def _total(
    loss: Callable[[Tensor, Tensor, float, float, float], Tensor],
    logits: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    alpha0: float,
    alpha1: float,
    gamma: float,
    weight: Tensor | None,
    normalizer: Tensor,
    mix: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The sum over all anchors that are not ignored, divided by the normalizer."""
    total = normalizer.new_zeros(())
    for x, y in zip(logits, targets, strict=True):
        y, ignored = _mixed(y, mix)
        losses = loss(x.float(), y, alpha0, alpha1, gamma)
        losses = losses if weight is None else losses * weight
        total = total + losses.masked_fill(ignored, 0.0).sum()
    return total / normalizer.clamp(min=1)


def _mixed(y: Tensor, mix: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Mixed targets, and a mask of those that are ignored."""
    ignored = y < 0
    if mix is not None:
        lam, index = mix[0].view(-1, 1, 1, 1, 1), mix[1]
        y, ignored = lam * y + (1 - lam) * y[index], ignored | ignored[index]
    return y.masked_fill(ignored, 0.0), ignored
