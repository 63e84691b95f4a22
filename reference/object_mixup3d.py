"""Objects mixed with other objects, one pair of boxes after another, in float64."""

import math

import torch
from torch import Tensor

from reference.crop_and_resize3d import apply_window, crop_and_resize3d


def object_mixup3d(
    volumes, boxes, donor_boxes, lam, *, donors=None, window=None, dtype=None
) -> Tensor:
    """Voxels with centers in a target box become lam * target + (1 - lam) * donor.

    The donor is cropped and resized to these voxels. Both boxes are clipped to their volumes. A
    pair is left out if either box is empty, is not finite or lies in no volume. A window is not
    applied to volumes of another dtype than the donors.
    """
    donors = volumes if donors is None else donors
    out = volumes.double().clone()
    target_window = window if donors.dtype == volumes.dtype else None
    if target_window:
        out = apply_window(out, target_window)
    for target, source, weight in zip(boxes, donor_boxes, lam.double(), strict=True):
        target, source = _clip(target, volumes), _clip(source, donors)
        if target is None or source is None:
            continue
        batch, *bounds = target.tolist()
        axes = zip(bounds[:3], bounds[3:], volumes.shape[2:], strict=True)
        inside = [[i for i in range(size) if start <= i + 0.5 < end] for start, end, size in axes]
        if not all(inside):
            continue
        size = [len(voxels) for voxels in inside]
        donor = crop_and_resize3d(donors, source[None], size, window=window, dtype=torch.float64)[0]
        region = (int(batch), slice(None), *(slice(voxels[0], voxels[-1] + 1) for voxels in inside))
        out[region] = _weighted(weight, out[region]) + _weighted(1 - weight, donor)
    if dtype is None:
        dtype = (
            torch.float32 if target_window and not volumes.is_floating_point() else volumes.dtype
        )
    if not dtype.is_floating_point:
        out = out.round().clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return out


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x; 0 for a weight of 0 even if x is not finite."""
    return torch.zeros_like(x) if weight == 0 else weight * x


def _clip(box: Tensor, volumes: Tensor) -> Tensor | None:
    """The part of a box that lies in its volume; None if there is none."""
    batch, *bounds = box.tolist()
    if not (0 <= batch < len(volumes) and all(map(math.isfinite, bounds))):
        return None
    sizes = [*volumes.shape[2:], *volumes.shape[2:]]
    bounds = [min(max(bound, 0.0), size) for bound, size in zip(bounds, sizes, strict=True)]
    if any(end <= start for start, end in zip(bounds[:3], bounds[3:], strict=True)):
        return None
    return torch.tensor([batch, *bounds], device=box.device)
